# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Products of a few tokens with a large weight on CUDA GPUs, bound by reading the weight.

A warp takes `rows` rows of the weight at once and shares its reading of x among them; each lane
reads a unit of 16 bytes (8 fp16 or 32 four-bit elements). `split` warps of a block share the same
rows and cut the inner dimension, so that small weights fill the GPU as well. x lies in shared
memory, in an order in which a warp's reads meet no bank twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from shardwright.errors import UsageError

from .common import SCHEDULED, launch_dependents, shuffle_xor, silu_mul, wait_for_inputs

WARP = 32
WARPS = 8  # of a block
FULL_GPU = 132 * 15  # warps that keep the memory of a large GPU busy
SHARED_BYTES = 96 * 1024  # of x at a time; two blocks fit into a multiprocessor

# 0x6400 is 1024 in half precision, whose last bits count ones: or-ing four bits into it makes
# 1024 + nibble without a conversion. In the upper position they count sixteens.
_UNPACK = """
__device__ __forceinline__ void shardwright_q4_unpack(uint w, half s, uint* out) {
  half2* o = reinterpret_cast<half2*>(out);
  const half2 scale = __half2half2(s);
  const half2 low = __half2half2(__ushort_as_half(0x6407));     // 1031
  const half2 sixteenth = __half2half2(__ushort_as_half(0x2c00));  // 1 / 16
  const half2 high = __half2half2(__ushort_as_half(0xd470));    // -71 = -(1024 / 16 + 7)
  uint a, b, c, d, v = w >> 8;
  asm("lop3.b32 %0, %1, 0x000f000f, 0x64006400, 0xea;" : "=r"(a) : "r"(w));
  asm("lop3.b32 %0, %1, 0x00f000f0, 0x64006400, 0xea;" : "=r"(b) : "r"(w));
  asm("lop3.b32 %0, %1, 0x000f000f, 0x64006400, 0xea;" : "=r"(c) : "r"(v));
  asm("lop3.b32 %0, %1, 0x00f000f0, 0x64006400, 0xea;" : "=r"(d) : "r"(v));
  o[0] = __hmul2(__hsub2(*reinterpret_cast<half2*>(&a), low), scale);
  o[1] = __hmul2(__hfma2(*reinterpret_cast<half2*>(&b), sixteenth, high), scale);
  o[2] = __hmul2(__hsub2(*reinterpret_cast<half2*>(&c), low), scale);
  o[3] = __hmul2(__hfma2(*reinterpret_cast<half2*>(&d), sixteenth, high), scale);
}
"""
_FMA2 = """
__device__ __forceinline__ void shardwright_fma2(uint a, const half* b, half* acc) {
  half2* c = reinterpret_cast<half2*>(acc);
  *c = __hfma2(*reinterpret_cast<half2*>(&a), *reinterpret_cast<const half2*>(b), *c);
}
"""


def _unpack(word: Any, scale: Any, out: Any) -> Any:
    """Eight elements of a word as four pairs of fp16: 0 4, 1 5, 2 6, 3 7."""
    return T.cuda.func_call("shardwright_q4_unpack", word, scale, out, source_code=_UNPACK)


def _fma2(a: Any, b: Any, acc: Any) -> Any:
    """Acc += a * b for two fp16 each."""
    return T.cuda.func_call("shardwright_fma2", a, b, acc, source_code=_FMA2)


@dataclass(frozen=True)
class Plan:
    """`rows` of a warp (AMD: a wave), warps that `split` the inner dimension, units in flight."""

    rows: int
    split: int
    unroll: int


def plan(*, batch: int, out_features: int, units: int, q4: bool) -> Plan:
    """The plan for `batch` tokens and a weight of `out_features` rows of `units` units.

    The tables are the fastest of those measured on an H200 (`scripts/gpu_kernel_checks.py`).
    """
    if q4:
        rows, split, unroll = _q4_plan(batch, out_features, units)
    else:
        long = units > 1024
        rows, split, unroll = {
            1: (4, 4, 2) if long else (2, WARPS, 2),
            2: (4, 4, 2),
            3: (4, 4, 1) if long else (2, 2, 2),
            4: (4, 4, 1) if long else (2, 2, 2),
        }.get(batch, (4, 2, 1))
    while rows > 1 and out_features // rows * WARPS < FULL_GPU:
        rows //= 2
    while split < WARPS and out_features // rows * split < FULL_GPU:
        split *= 2
    while split > 1 and split * WARP * unroll > units:
        split //= 2
    return Plan(rows, split, unroll if units >= unroll * WARP else 1)


def _q4_plan(batch: int, out_features: int, units: int) -> tuple[int, int, int]:
    if batch > 4:
        return 8, 2, 1
    if units < 256:
        return 2, 1, 2
    if batch > 1:
        return 4, 4, 2
    if units < 448:
        return (4, 4, 2) if out_features >= 8192 else (2, 2, 2)
    return (4, 1, 2) if out_features >= 8192 else (2, 1, 2)


def _gemv(
    *,
    batch: int,
    out_features: int,
    in_features: int,
    group: int,
    out_dtype: str,
    gated: bool,
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
    units = in_features // unit
    p = tuned or plan(batch=batch, out_features=out_features, units=units, q4=q4)
    rows, split, unroll = p.rows, p.split, p.unroll
    # Rows of a warp are pairs of a gate and its value, or rows as they lie.
    paired = 2 if gated else 1
    rows = max(rows, paired)
    outputs = out_features // paired
    team = split * WARP  # threads that share rows
    teams = WARPS // split
    step = split * WARP * unroll
    # x of so many units at a time, a multiple of the step.
    limit = SHARED_BYTES // (batch * unit * 2) // step * step
    chunk = min(-(-units // step) * step, max(limit, step))
    chunks = -(-units // chunk)
    pieces = unit // 8
    per_unit = 4 if q4 else 8  # words or halves
    threads = WARPS * WARP
    blocks = -(-out_features // (teams * rows))
    small = batch * chunk * unit * 2 <= 40 * 1024
    scope = "shared" if small else "shared.dyn"

    def wide(row: Any) -> Any:
        # The largest vocabularies have more elements than an int32 counts.
        return T.cast(row, "int64") if out_features * in_features >= 2**31 else row

    def unit_of(it: Any, j: Any, tid: Any) -> Any:
        """The unit of the chunk that a thread takes in step `it`."""
        return it * step + tid // WARP % split * (WARP * unroll) + j * WARP + tid % WARP

    def unit_read(first: Any, it: Any, j: Any, tid: Any) -> Any:
        # Past the end x is zero, whatever weight is read.
        return T.min(first + unit_of(it, j, tid), units - 1)

    def row_read(row0: Any, r: Any) -> Any:
        """Row r of a warp's; gates lie in the first half of the weight, values in the other."""
        return wide(T.min(row0 + r // paired, outputs - 1) + r % paired * outputs)

    def result(gate: Any, value: Any) -> Any:
        """What is written: a sum, or silu(gate) * value of the sums rounded as if written."""
        if not gated:
            return T.cast(gate, out_dtype)
        return silu_mul(gate, value, out_dtype)

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
        wait_for_inputs("cuda")
        for b in T.serial(batch):
            for i in T.serial((chunk * pieces + threads - 1 - tid) // threads):
                at: T.let[T.int32] = tid + i * threads
                if first * pieces + at < units * pieces:
                    for e in T.vectorized(8):
                        eight[e] = x[b, (first * pieces + at) * 8 + e]
                else:
                    for e in T.unroll(8):
                        eight[e] = T.float16(0)
                if q4:
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
            for s in T.unroll(5):
                acc[i] = acc[i] + shuffle_xor(acc[i], T.shift_right(16, s), WARP)
        if split == 1:
            for r in T.unroll(rows // paired):
                for b in T.unroll(batch):
                    if tid % WARP == (r * batch + b) % WARP and row0 + r < outputs:
                        out[b, row0 + r] = result(
                            acc[r * paired * batch + b], acc[(r * paired + paired - 1) * batch + b]
                        )
        else:
            if tid % WARP == 0:
                for i in T.unroll(rows * batch):
                    partial[tid // WARP, i] = acc[i]
            T.tvm_storage_sync("shared")
            # A team has at least 64 threads, and at most 64 sums.
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
                    for tid in T.thread_binding(threads, thread="threadIdx.x"):
                        launch_dependents("cuda")
                        staged = T.alloc_buffer((batch, pieces, chunk, 8), "float16", scope=scope)
                        partial = T.alloc_buffer((WARPS, rows * batch), "float32", scope="shared")
                        eight = T.alloc_buffer((16,), "float16", scope="local")
                        weight = T.alloc_buffer((unroll * rows * 8,), "float16", scope="local")
                        xs = T.alloc_buffer((8,), "float16", scope="local")
                        acc = T.alloc_buffer((rows * batch,), "float32", scope="local")
                        row0: T.let[T.int32] = (block * teams + tid // team) * (rows // paired)
                        for i in T.unroll(rows * batch):
                            acc[i] = T.float32(0)
                        for c in T.serial(chunks):
                            if c > 0:
                                T.tvm_storage_sync("shared")
                            read(w, weight, row0, c * chunk, 0, tid)
                            stage(x, staged, eight, c * chunk, tid)
                            T.tvm_storage_sync("shared")
                            for it in T.serial(chunk // step):
                                for j in T.unroll(unroll):
                                    for b in T.unroll(batch):
                                        for e in T.vectorized(8):
                                            xs[e] = staged[b, 0, unit_of(it, j, tid), e]
                                        for r in T.unroll(rows):
                                            for e in T.unroll(8):
                                                acc[r * batch + b] = acc[r * batch + b] + T.cast(
                                                    weight[(j * rows + r) * 8 + e], "float32"
                                                ) * T.cast(xs[e], "float32")
                                if it + 1 < chunk // step:
                                    read(w, weight, row0, c * chunk, it + 1, tid)
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
                for tid in T.thread_binding(threads, thread="threadIdx.x"):
                    launch_dependents("cuda")
                    staged = T.alloc_buffer((batch, pieces, chunk, 8), "float16", scope=scope)
                    partial = T.alloc_buffer((WARPS, rows * batch), "float32", scope="shared")
                    eight = T.alloc_buffer((16,), "float16", scope="local")
                    words = T.alloc_buffer((unroll * rows * 4,), "uint32", scope="local")
                    scales = T.alloc_buffer((unroll * rows,), "float16", scope="local")
                    weight = T.alloc_buffer((rows * 4,), "uint32", scope="local")
                    xs = T.alloc_buffer((8,), "float16", scope="local")
                    pairs = T.alloc_buffer((rows * batch * 2,), "float16", scope="local")
                    acc = T.alloc_buffer((rows * batch,), "float32", scope="local")
                    row0: T.let[T.int32] = (block * teams + tid // team) * (rows // paired)
                    for i in T.unroll(rows * batch):
                        acc[i] = T.float32(0)
                    for c in T.serial(chunks):
                        if c > 0:
                            T.tvm_storage_sync("shared")
                        read(packed, words, row0, c * chunk, 0, tid)
                        read_scales(scale, scales, row0, c * chunk, 0, tid)
                        stage(x, staged, eight, c * chunk, tid)
                        T.tvm_storage_sync("shared")
                        for it in T.serial(chunk // step):
                            for j in T.unroll(unroll):
                                for i in T.unroll(rows * batch * 2):
                                    pairs[i] = T.float16(0)
                                for i in T.unroll(4):
                                    for r in T.unroll(rows):
                                        T.evaluate(
                                            _unpack(
                                                words[(j * rows + r) * 4 + i],
                                                scales[j * rows + r],
                                                T.address_of(weight[r * 4]),
                                            )
                                        )
                                    for b in T.unroll(batch):
                                        for e in T.vectorized(8):
                                            xs[e] = staged[b, i, unit_of(it, j, tid), e]
                                        for r in T.unroll(rows):
                                            for e in T.unroll(4):
                                                T.evaluate(
                                                    _fma2(
                                                        weight[r * 4 + e],
                                                        T.address_of(xs[e * 2]),
                                                        T.address_of(pairs[(r * batch + b) * 2]),
                                                    )
                                                )
                                # Sixteen products a half are summed in fp16, the rest in float32.
                                for i in T.unroll(rows * batch):
                                    acc[i] = (
                                        acc[i]
                                        + T.cast(pairs[i * 2], "float32")
                                        + T.cast(pairs[i * 2 + 1], "float32")
                                    )
                            if it + 1 < chunk // step:
                                read(packed, words, row0, c * chunk, it + 1, tid)
                                read_scales(scale, scales, row0, c * chunk, it + 1, tid)
                    finish(acc, partial, out, row0, tid)

    return q4_gemv


def gemv(
    *,
    batch: int,
    out_features: int,
    in_features: int,
    out_dtype: str,
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
        tuned=tuned,
    )


def q4_gemv(
    *,
    batch: int,
    out_features: int,
    in_features: int,
    group: int,
    out_dtype: str,
    gated: bool = False,
    tuned: Plan | None = None,
) -> tirx.PrimFunc:
    """`(x [b,K] f16, packed [N,K/8] u32, scale [N,K/group] f16) -> x @ w.T [b,N]`, 1 to 8 tokens.

    Weights are rounded to fp16 as `q4_dequantize` rounds them, and 16 products at a time are summed
    in fp16, the rest in float32. `group` and K must be multiples of 32 (UsageError).
    `gated` and `tuned` are as for `gemv`.
    """
    return _gemv(
        batch=batch,
        out_features=out_features,
        in_features=in_features,
        group=group,
        out_dtype=out_dtype,
        gated=gated,
        tuned=tuned,
    )
