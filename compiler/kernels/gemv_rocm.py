# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Products of a few tokens with a large weight on AMD GPUs, bound by reading the weight.

A wave takes `rows` rows of the weight at once and shares its reading of x among them; each lane
reads a unit of 16 bytes (8 fp16 or 32 four-bit elements), neighbours neighbouring units. `split`
waves of a block share the same rows and cut the inner dimension, so that small weights fill the GPU
as well. x lies in shared memory. Products are summed in float32, two at a time (`v_dot2_f32_f16`).
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from shardwright.errors import UsageError

from .common import SCHEDULED, shuffle_xor, silu_mul, warp_size_of
from .gemv import Plan

THREADS = 256  # of a block
SHARED_BYTES = 16 * 1024  # of x at a time; three blocks fit into a compute unit
FULL_GPU = 96 * 16  # waves that keep the memory of a large GPU busy: not measured, a guess


def plan(*, batch: int, out_features: int, units: int, wave: int) -> Plan:
    """The plan for `batch` tokens and a weight of `out_features` rows of `units` units."""
    waves = THREADS // wave
    rows, split, unroll = (4 if batch <= 4 else 2), 1, 2
    while rows > 1 and out_features // rows * waves < FULL_GPU:
        rows //= 2
    while split < waves and out_features // rows * split < FULL_GPU:
        split *= 2
    while split > 1 and split * wave * unroll > units:
        split //= 2
    return Plan(rows, split, unroll if units >= unroll * wave else 1)


def _dot(pair: Any, x: Any, total: Any) -> Any:
    """`total + pair[0] * x[0] + pair[1] * x[1]`, of float16 pairs in 32 bits, in float32."""
    return T.call_llvm_pure_intrin(
        "float32",
        "llvm.amdgcn.fdot2",
        T.reinterpret("float16x2", pair),
        T.reinterpret("float16x2", x),
        total,
        T.bool(False),
    )


def _pairs(word: Any) -> list[Any]:
    """The eight elements of a word, without their scale, as float16 pairs: 0 4, 1 5, 2 6, 3 7.

    0x6400 is 1024 in half precision, whose last bits count ones: or-ing four bits into it makes
    1024 + nibble without a conversion. In the upper position they count sixteens.
    """

    def both(value: float) -> Any:
        return T.Broadcast(T.float16(value), 2)

    def pair(bits: Any, mask: int) -> Any:
        found = T.bitwise_or(T.bitwise_and(bits, T.uint32(mask)), T.uint32(0x64006400))
        return T.reinterpret("float16x2", found)

    out = []
    for bits in (word, T.shift_right(word, T.uint32(8))):
        out.append(pair(bits, 0x000F000F) - both(1031.0))
        out.append(T.fma(pair(bits, 0x00F000F0), both(1 / 16), both(-71.0)))  # 1024 / 16 + 7
    return [T.reinterpret("uint32", value) for value in out]


def _gemv(
    *,
    batch: int,
    out_features: int,
    in_features: int,
    group: int,
    out_dtype: str,
    gated: bool,
    target: Any,
    tuned: Plan | None,
) -> tirx.PrimFunc:
    q4 = group > 0
    unit = 32 if q4 else 8  # elements in 16 bytes
    if in_features % unit:
        raise UsageError(
            f"a GPU product over {in_features} elements is not supported; pad them to a multiple "
            f"of {unit}"
        )
    if q4 and group % 32:
        raise UsageError(f"four-bit groups of {group} have no GPU kernel; use a multiple of 32")
    wave = warp_size_of(target)
    waves = THREADS // wave
    units = in_features // unit
    p = tuned or plan(batch=batch, out_features=out_features, units=units, wave=wave)
    rows, split, unroll = p.rows, p.split, p.unroll
    # Rows of a wave are pairs of a gate and its value, or rows as they lie.
    paired = 2 if gated else 1
    rows = max(rows, paired)
    outputs = out_features // paired
    team = split * wave  # threads that share rows
    teams = waves // split
    step = split * wave * unroll
    # x of so many units at a time, a multiple of the step.
    limit = SHARED_BYTES // (batch * unit * 2) // step * step
    chunk = min(-(-units // step) * step, max(limit, step))
    chunks = -(-units // chunk)
    pieces = unit // 8
    blocks = -(-out_features // (teams * rows))

    def wide(row: Any) -> Any:
        # The largest vocabularies have more elements than an int32 counts.
        return T.cast(row, "int64") if out_features * in_features >= 2**31 else row

    def unit_of(it: Any, j: Any, tid: Any) -> Any:
        """The unit of the chunk that a thread takes in step `it`."""
        return it * step + tid // wave % split * (wave * unroll) + j * wave + tid % wave

    def unit_read(first: Any, it: Any, j: Any, tid: Any) -> Any:
        # Past the end x is zero, whatever weight is read.
        return T.min(first + unit_of(it, j, tid), units - 1)

    def row_read(row0: Any, r: Any) -> Any:
        """Row r of a wave's; gates lie in the first half of the weight, values in the other."""
        return wide(T.min(row0 + r // paired, outputs - 1) + r % paired * outputs)

    def result(gate: Any, value: Any) -> Any:
        """What is written: a sum, or silu(gate) * value of the sums rounded as if written."""
        if not gated:
            return T.cast(gate, out_dtype)
        return silu_mul(gate, value, out_dtype)

    @T.inline
    def read(source, registers, row0, first, it, tid, width):
        """16 bytes of each row and each unit in flight; the first ones before x is staged."""
        for j in T.unroll(unroll):
            for r in T.unroll(rows):
                for e in T.vectorized(width):
                    registers[(j * rows + r) * width + e] = source[
                        row_read(row0, r), unit_read(first, it, j, tid) * width + e
                    ]

    @T.inline
    def read_scales(scale, registers, row0, first, it, tid):
        for j in T.unroll(unroll):
            for r in T.unroll(rows):
                registers[j * rows + r] = scale[
                    row_read(row0, r), unit_read(first, it, j, tid) * 32 // group
                ]

    @T.inline
    def stage(x, staged, first, tid):
        """Copy a chunk of x to shared memory as [batch, piece, unit, 8], zeros past its end.

        For four-bit weights the eight elements of a piece lie as `_pairs` has them.
        """
        eight = T.alloc_buffer((8,), "float16", scope="local")
        ordered = T.alloc_buffer((8,), "float16", scope="local")
        for b in T.serial(batch):
            for i in T.serial((chunk * pieces + THREADS - 1 - tid) // THREADS):
                at: T.let[T.int32] = tid + i * THREADS
                if first * pieces + at < units * pieces:
                    for e in T.vectorized(8):
                        eight[e] = x[b, (first * pieces + at) * 8 + e]
                else:
                    for e in T.unroll(8):
                        eight[e] = T.float16(0)
                if q4:
                    for e in T.unroll(4):
                        ordered[2 * e] = eight[e]
                        ordered[2 * e + 1] = eight[e + 4]
                else:
                    for e in T.unroll(8):
                        ordered[e] = eight[e]
                for e in T.vectorized(8):
                    staged[b, at % pieces, at // pieces, e] = ordered[e]

    @T.inline
    def finish(acc, partial, out, row0, tid):
        """Sum over lanes and over the waves that split the inner dimension, and write."""
        for i in T.unroll(rows * batch):
            for s in T.unroll(wave.bit_length() - 1):
                acc[i] = acc[i] + shuffle_xor(acc[i], T.shift_right(wave // 2, s), wave)
        if split == 1:
            for r in T.unroll(rows // paired):
                for b in T.unroll(batch):
                    if tid % wave == (r * batch + b) % wave and row0 + r < outputs:
                        out[b, row0 + r] = result(
                            acc[r * paired * batch + b], acc[(r * paired + paired - 1) * batch + b]
                        )
        else:
            if tid % wave == 0:
                for i in T.unroll(rows * batch):
                    partial[tid // wave, i] = acc[i]
            T.tvm_storage_sync("shared")
            # A team has at least 64 threads, and at most 32 sums.
            j: T.let[T.int32] = tid % team
            if j < rows // paired * batch:
                total: T.float32 = T.float32(0)
                other: T.float32 = T.float32(0)
                for s in T.unroll(split):
                    total = (
                        total
                        + partial[tid // team * split + s, j // batch * paired * batch + j % batch]
                    )
                    if gated:
                        other = (
                            other
                            + partial[
                                tid // team * split + s, (j // batch * 2 + 1) * batch + j % batch
                            ]
                        )
                if row0 + j // batch < outputs:
                    out[j % batch, row0 + j // batch] = result(total, other)

    if not q4:

        @T.prim_func(s_tir=True)
        def gemv(x_h: T.handle, w_h: T.handle, out_h: T.handle):
            T.func_attr(SCHEDULED)
            x = T.match_buffer(x_h, (batch, in_features), "float16")
            w = T.match_buffer(w_h, (out_features, in_features), "float16")
            out = T.match_buffer(out_h, (batch, outputs), out_dtype)
            with T.sblock("root"):
                T.reads()
                T.writes()
                for block in T.thread_binding(blocks, thread="blockIdx.x"):
                    for tid in T.thread_binding(THREADS, thread="threadIdx.x"):
                        staged = T.alloc_buffer(
                            (batch, pieces, chunk, 8), "float16", scope="shared"
                        )
                        partial = T.alloc_buffer((waves, rows * batch), "float32", scope="shared")
                        weight = T.alloc_buffer((unroll * rows * 8,), "float16", scope="local")
                        xs = T.alloc_buffer((8,), "float16", scope="local")
                        acc = T.alloc_buffer((rows * batch,), "float32", scope="local")
                        row0: T.let[T.int32] = (block * teams + tid // team) * (rows // paired)
                        for i in T.unroll(rows * batch):
                            acc[i] = T.float32(0)
                        for c in T.serial(chunks):
                            if c > 0:
                                T.tvm_storage_sync("shared")
                            read(w, weight, row0, c * chunk, 0, tid, 8)
                            stage(x, staged, c * chunk, tid)
                            T.tvm_storage_sync("shared")
                            for it in T.serial(chunk // step):
                                for j in T.unroll(unroll):
                                    for b in T.unroll(batch):
                                        for e in T.vectorized(8):
                                            xs[e] = staged[b, 0, unit_of(it, j, tid), e]
                                        for r in T.unroll(rows):
                                            for e in T.unroll(4):
                                                acc[r * batch + b] = _dot(
                                                    weight.vload(
                                                        [(j * rows + r) * 8 + e * 2], "float16x2"
                                                    ),
                                                    xs.vload([e * 2], "float16x2"),
                                                    acc[r * batch + b],
                                                )
                                if it + 1 < chunk // step:
                                    read(w, weight, row0, c * chunk, it + 1, tid, 8)
                        finish(acc, partial, out, row0, tid)

        return gemv

    @T.prim_func(s_tir=True)
    def q4_gemv(x_h: T.handle, packed_h: T.handle, scale_h: T.handle, out_h: T.handle):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (batch, in_features), "float16")
        packed = T.match_buffer(packed_h, (out_features, in_features // 8), "uint32")
        scale = T.match_buffer(scale_h, (out_features, in_features // group), "float16")
        out = T.match_buffer(out_h, (batch, outputs), out_dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            for block in T.thread_binding(blocks, thread="blockIdx.x"):
                for tid in T.thread_binding(THREADS, thread="threadIdx.x"):
                    staged = T.alloc_buffer((batch, pieces, chunk, 8), "float16", scope="shared")
                    partial = T.alloc_buffer((waves, rows * batch), "float32", scope="shared")
                    words = T.alloc_buffer((unroll * rows * 4,), "uint32", scope="local")
                    scales = T.alloc_buffer((unroll * rows,), "float16", scope="local")
                    weight = T.alloc_buffer((rows * 4,), "uint32", scope="local")
                    xs = T.alloc_buffer((8,), "float16", scope="local")
                    part = T.alloc_buffer((rows * batch,), "float32", scope="local")
                    acc = T.alloc_buffer((rows * batch,), "float32", scope="local")
                    row0: T.let[T.int32] = (block * teams + tid // team) * (rows // paired)
                    for i in T.unroll(rows * batch):
                        acc[i] = T.float32(0)
                    for c in T.serial(chunks):
                        if c > 0:
                            T.tvm_storage_sync("shared")
                        read(packed, words, row0, c * chunk, 0, tid, 4)
                        read_scales(scale, scales, row0, c * chunk, 0, tid)
                        stage(x, staged, c * chunk, tid)
                        T.tvm_storage_sync("shared")
                        for it in T.serial(chunk // step):
                            for j in T.unroll(unroll):
                                # A unit lies in one group, so its sum is scaled as a whole.
                                for i in T.unroll(rows * batch):
                                    part[i] = T.float32(0)
                                for i in T.unroll(4):
                                    for r in T.unroll(rows):
                                        pairs = T.meta_var(_pairs(words[(j * rows + r) * 4 + i]))
                                        weight[r * 4] = pairs[0]
                                        weight[r * 4 + 1] = pairs[1]
                                        weight[r * 4 + 2] = pairs[2]
                                        weight[r * 4 + 3] = pairs[3]
                                    for b in T.unroll(batch):
                                        for e in T.vectorized(8):
                                            xs[e] = staged[b, i, unit_of(it, j, tid), e]
                                        for r in T.unroll(rows):
                                            for e in T.unroll(4):
                                                part[r * batch + b] = _dot(
                                                    weight[r * 4 + e],
                                                    xs.vload([e * 2], "float16x2"),
                                                    part[r * batch + b],
                                                )
                                for r in T.unroll(rows):
                                    for b in T.unroll(batch):
                                        acc[r * batch + b] = acc[r * batch + b] + part[
                                            r * batch + b
                                        ] * T.cast(scales[j * rows + r], "float32")
                            if it + 1 < chunk // step:
                                read(packed, words, row0, c * chunk, it + 1, tid, 4)
                                read_scales(scale, scales, row0, c * chunk, it + 1, tid)
                    finish(acc, partial, out, row0, tid)

    return q4_gemv


def gemv(
    *,
    batch: int,
    out_features: int,
    in_features: int,
    out_dtype: str,
    target: Any,
    gated: bool = False,
    tuned: Plan | None = None,
) -> tirx.PrimFunc:
    """`(x [b,K] f16, w [N,K] f16) -> x @ w.T [b,N]` for 1 to 8 tokens, float32 accumulation.

    K must be a multiple of 8 (UsageError). With `gated` the result is `silu(y[:, :N/2]) *
    y[:, N/2:]`, [b,N/2], of the product y rounded to `out_dtype`. `tuned` replaces the
    plan that the sizes suggest.
    """
    return _gemv(
        batch=batch,
        out_features=out_features,
        in_features=in_features,
        group=0,
        out_dtype=out_dtype,
        gated=gated,
        target=target,
        tuned=tuned,
    )


def q4_gemv(
    *,
    batch: int,
    out_features: int,
    in_features: int,
    group: int,
    out_dtype: str,
    target: Any,
    gated: bool = False,
    tuned: Plan | None = None,
) -> tirx.PrimFunc:
    """`(x [b,K] f16, packed [N,K/8] u32, scale [N,K/group] f16) -> x @ w.T [b,N]`, 1 to 8 tokens.

    Float32 accumulation; the weights are exact, not rounded to fp16 as `q4_dequantize` does.
    `group` and K must be multiples of 32 (UsageError). `gated` and `tuned` are as for `gemv`.
    """
    return _gemv(
        batch=batch,
        out_features=out_features,
        in_features=in_features,
        group=group,
        out_dtype=out_dtype,
        gated=gated,
        target=target,
        tuned=tuned,
    )
