# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""What matrix-vector kernels of CUDA and AMD GPUs share: who reads what, staging of x, last sums.

A warp (AMD: a wave) takes `rows` rows of the weight at once and shares its reading of x among them;
each lane reads a unit of 16 bytes (8 fp16 or 32 four-bit elements), neighbours neighbouring units.
`split` warps of a block share the same rows and cut the inner dimension, so that small weights fill
the GPU as well. x lies in shared memory, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from shardwright.errors import UsageError

from .common import shuffle_xor, silu_mul, wait_for_inputs


@dataclass(frozen=True)
class Plan:
    """`rows` of a warp, warps that `split` the inner dimension, units in flight."""

    rows: int
    split: int
    unroll: int

    def filling(self, *, out_features: int, units: int, warp: int, warps: int, full: int) -> Plan:
        """The plan with fewer rows and more splits, until `full` warps keep the GPU busy.

        `warp` lanes and `warps` of a block are the target's; a row has `units` units.
        """
        rows, split = self.rows, self.split
        while rows > 1 and out_features // rows * warps < full:
            rows //= 2
        while split < warps and out_features // rows * split < full:
            split *= 2
        while split > 1 and split * warp * self.unroll > units:
            split //= 2
        return Plan(rows, split, self.unroll if units >= self.unroll * warp else 1)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a product: `batch` tokens, a weight [out_features, in_features].

    `group` elements of a row share a scale, 0 for a plain weight. With `gated` the first half of
    the rows are gates of the second. Raises UsageError for sizes without a kernel.
    """

    batch: int
    out_features: int
    in_features: int
    group: int
    out_dtype: str
    gated: bool

    def __post_init__(self) -> None:
        if self.in_features % self.unit:
            raise UsageError(
                f"a GPU product over {self.in_features} elements is not supported; pad them to a "
                f"multiple of {self.unit}"
            )
        if self.group % 32:
            raise UsageError(
                f"four-bit groups of {self.group} have no GPU kernel; use a multiple of 32"
            )

    @property
    def unit(self) -> int:
        """Elements in 16 bytes."""
        return 32 if self.group else 8

    @property
    def units(self) -> int:
        """Units of a row."""
        return self.in_features // self.unit

    @property
    def paired(self) -> int:
        """Rows for one result: a gate and its value, or the row alone."""
        return 2 if self.gated else 1

    @property
    def outputs(self) -> int:
        """Results of a token."""
        return self.out_features // self.paired


@dataclass(frozen=True)
class Layout:
    """How the threads of a block share a product, by `plan`.

    `warp` lanes and `warps` of a block are the target's, x has `shared_bytes` at a time.
    """

    sizes: Sizes
    plan: Plan
    warp: int
    warps: int
    shared_bytes: int

    @property
    def rows(self) -> int:
        """Rows of a warp: pairs of a gate and its value, or rows as they lie."""
        return max(self.plan.rows, self.sizes.paired)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warps * self.warp

    @property
    def team(self) -> int:
        """Threads that share rows."""
        return self.plan.split * self.warp

    @property
    def teams(self) -> int:
        """Teams of a block."""
        return self.warps // self.plan.split

    @property
    def blocks(self) -> int:
        """Blocks of the grid."""
        return -(-self.sizes.out_features // (self.teams * self.rows))

    @property
    def step(self) -> int:
        """Units that a team has in flight."""
        return self.team * self.plan.unroll

    @property
    def chunk(self) -> int:
        """Units of x in shared memory at a time, a multiple of the step."""
        s = self.sizes
        limit = self.shared_bytes // (s.batch * s.unit * 2) // self.step * self.step
        return min(-(-s.units // self.step) * self.step, max(limit, self.step))

    @property
    def chunks(self) -> int:
        """Chunks of x."""
        return -(-self.sizes.units // self.chunk)

    @property
    def pieces(self) -> int:
        """Pieces of eight elements in a unit."""
        return self.sizes.unit // 8

    def first_row(self, block: Any, tid: Any) -> Any:
        """The first result of a thread's team."""
        return (block * self.teams + tid // self.team) * (self.rows // self.sizes.paired)

    def unit_of(self, it: Any, j: Any, tid: Any) -> Any:
        """The unit of the chunk that a thread takes in step `it`."""
        unroll, warp = self.plan.unroll, self.warp
        place = tid // warp % self.plan.split * (warp * unroll)
        return it * self.step + place + j * warp + tid % warp


@dataclass(frozen=True)
class Steps:
    """What a kernel does before and after its products, to be called in TVMScript.

    `read(source, registers, row0, first, it, tid)`, `read_scales(scale, ...)`,
    `stage(x, staged, eight, first, tid)` and `finish(acc, partial, out, row0, tid)`.
    """

    read: Callable[..., Any]
    read_scales: Callable[..., Any]
    stage: Callable[..., Any]
    finish: Callable[..., Any]


def steps(layout: Layout, target: Any) -> Steps:
    """The steps of a kernel of this layout."""
    s = layout.sizes
    batch, units, group, paired, outputs = s.batch, s.units, s.group, s.paired, s.outputs
    rows, split, unroll = layout.rows, layout.plan.split, layout.plan.unroll
    warp, threads, team = layout.warp, layout.threads, layout.team
    chunk, pieces = layout.chunk, layout.pieces
    per_unit = 4 if group else 8  # words or halves

    def wide(row: Any) -> Any:
        # The largest vocabularies have more elements than an int32 counts.
        return T.cast(row, "int64") if s.out_features * s.in_features >= 2**31 else row

    def unit_read(first: Any, it: Any, j: Any, tid: Any) -> Any:
        # Past the end x is zero, whatever weight is read.
        return T.min(first + layout.unit_of(it, j, tid), units - 1)

    def row_read(row0: Any, r: Any) -> Any:
        """Row r of a warp's; gates lie in the first half of the weight, values in the other."""
        return wide(T.min(row0 + r // paired, outputs - 1) + r % paired * outputs)

    def result(gate: Any, value: Any) -> Any:
        """What is written: a sum, or silu(gate) * value of the sums rounded as if written."""
        if not s.gated:
            return T.cast(gate, s.out_dtype)
        return silu_mul(gate, value, s.out_dtype)

    @T.inline
    def read(source, registers, row0, first, it, tid):
        """16 bytes of each row and each unit in flight; the first ones before x is staged."""
        for j in T.unroll(unroll):
            for r in T.unroll(rows):
                for e in T.vectorized(per_unit):
                    registers[(j * rows + r) * per_unit + e] = source[
                        row_read(row0, r), unit_read(first, it, j, tid) * per_unit + e
                    ]

    @T.inline
    def read_scales(scale, registers, row0, first, it, tid):
        for j in T.unroll(unroll):
            for r in T.unroll(rows):
                registers[j * rows + r] = scale[
                    row_read(row0, r), unit_read(first, it, j, tid) * 32 // group
                ]

    @T.inline
    def stage(x, staged, eight, first, tid):
        """Copy a chunk of x to shared memory as [batch, piece, unit, 8], zeros past its end."""
        wait_for_inputs(target)
        for b in T.serial(batch):
            for i in T.serial((chunk * pieces + threads - 1 - tid) // threads):
                at: T.let[T.int32] = tid + i * threads
                if first * pieces + at < units * pieces:
                    for e in T.vectorized(8):
                        eight[e] = x[b, (first * pieces + at) * 8 + e]
                else:
                    for e in T.unroll(8):
                        eight[e] = T.float16(0)
                if group > 0:
                    for e in T.unroll(4):
                        eight[8 + 2 * e] = eight[e]
                        eight[9 + 2 * e] = eight[e + 4]
                else:
                    for e in T.unroll(8):
                        eight[8 + e] = eight[e]
                for e in T.vectorized(8):
                    staged[b, at % pieces, at // pieces, e] = eight[8 + e]

    @T.inline
    def finish(acc, partial, out, row0, tid):
        """Sum over lanes and over the warps that split the inner dimension, and write."""
        for i in T.unroll(rows * batch):
            for k in T.unroll(warp.bit_length() - 1):
                acc[i] = acc[i] + shuffle_xor(acc[i], T.shift_right(warp // 2, k), warp)
        if split == 1:
            for r in T.unroll(rows // paired):
                for b in T.unroll(batch):
                    if tid % warp == (r * batch + b) % warp and row0 + r < outputs:
                        out[b, row0 + r] = result(
                            acc[r * paired * batch + b], acc[(r * paired + paired - 1) * batch + b]
                        )
        else:
            if tid % warp == 0:
                for i in T.unroll(rows * batch):
                    partial[tid // warp, i] = acc[i]
            T.tvm_storage_sync("shared")
            # A team has at least 64 threads, and at most 64 sums.
            j: T.let[T.int32] = tid % team
            if j < rows // paired * batch:
                total: T.float32 = T.float32(0)
                other: T.float32 = T.float32(0)
                for k in T.unroll(split):
                    total = (
                        total
                        + partial[tid // team * split + k, j // batch * paired * batch + j % batch]
                    )
                    if s.gated:
                        other = (
                            other
                            + partial[
                                tid // team * split + k, (j // batch * 2 + 1) * batch + j % batch
                            ]
                        )
                if row0 + j // batch < outputs:
                    out[j % batch, row0 + j // batch] = result(total, other)

    return Steps(read, read_scales, stage, finish)
