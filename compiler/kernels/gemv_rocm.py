# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Products of a few tokens with a large weight on AMD GPUs, bound by reading the weight.

How threads share the work is in `gemv_common.py`. Products are summed in float32, two at a time
(`v_dot2_f32_f16`).
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from .common import SCHEDULED, warp_size_of
from .gemv_common import Layout, Plan, Sizes, steps

THREADS = 256  # of a block
SHARED_BYTES = 16 * 1024  # of x at a time; three blocks fit into a compute unit
FULL_GPU = 96 * 16  # waves that keep the memory of a large GPU busy: not measured, a guess


def plan(*, batch: int, out_features: int, units: int, wave: int) -> Plan:
    """The plan for `batch` tokens and a weight of `out_features` rows of `units` units."""
    return Plan(rows=4 if batch <= 4 else 2, split=1, unroll=2).filling(
        out_features=out_features, units=units, warp=wave, warps=THREADS // wave, full=FULL_GPU
    )


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
    wave = warp_size_of(target)
    sizes = Sizes(batch, out_features, in_features, group, out_dtype, gated)
    chosen = tuned or plan(batch=batch, out_features=out_features, units=sizes.units, wave=wave)
    g = Layout(sizes, chosen, wave, THREADS // wave, SHARED_BYTES)
    do = steps(g, target)
    rows, unroll, chunk = g.rows, chosen.unroll, g.chunk

    if not group:

        @T.prim_func(s_tir=True)
        def gemv(x_h: T.handle, w_h: T.handle, out_h: T.handle):
            T.func_attr(SCHEDULED)
            x = T.match_buffer(x_h, (batch, in_features), "float16")
            w = T.match_buffer(w_h, (out_features, in_features), "float16")
            out = T.match_buffer(out_h, (batch, sizes.outputs), out_dtype)
            with T.sblock("root"):
                T.reads()
                T.writes()
                for block in T.thread_binding(g.blocks, thread="blockIdx.x"):
                    for tid in T.thread_binding(g.threads, thread="threadIdx.x"):
                        staged = T.alloc_buffer(
                            (batch, g.pieces, chunk, 8), "float16", scope="shared"
                        )
                        partial = T.alloc_buffer((g.warps, rows * batch), "float32", scope="shared")
                        eight = T.alloc_buffer((16,), "float16", scope="local")
                        weight = T.alloc_buffer((unroll * rows * 8,), "float16", scope="local")
                        xs = T.alloc_buffer((8,), "float16", scope="local")
                        acc = T.alloc_buffer((rows * batch,), "float32", scope="local")
                        row0: T.let[T.int32] = g.first_row(block, tid)
                        for i in T.unroll(rows * batch):
                            acc[i] = T.float32(0)
                        for c in T.serial(g.chunks):
                            if c > 0:
                                T.tvm_storage_sync("shared")
                            do.read(w, weight, row0, c * chunk, 0, tid)
                            do.stage(x, staged, eight, c * chunk, tid)
                            T.tvm_storage_sync("shared")
                            for it in T.serial(chunk // g.step):
                                for j in T.unroll(unroll):
                                    for b in T.unroll(batch):
                                        for e in T.vectorized(8):
                                            xs[e] = staged[b, 0, g.unit_of(it, j, tid), e]
                                        for r in T.unroll(rows):
                                            for e in T.unroll(4):
                                                acc[r * batch + b] = _dot(
                                                    weight.vload(
                                                        [(j * rows + r) * 8 + e * 2], "float16x2"
                                                    ),
                                                    xs.vload([e * 2], "float16x2"),
                                                    acc[r * batch + b],
                                                )
                                if it + 1 < chunk // g.step:
                                    do.read(w, weight, row0, c * chunk, it + 1, tid)
                        do.finish(acc, partial, out, row0, tid)

        return gemv

    @T.prim_func(s_tir=True)
    def q4_gemv(x_h: T.handle, packed_h: T.handle, scale_h: T.handle, out_h: T.handle):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (batch, in_features), "float16")
        packed = T.match_buffer(packed_h, (out_features, in_features // 8), "uint32")
        scale = T.match_buffer(scale_h, (out_features, in_features // group), "float16")
        out = T.match_buffer(out_h, (batch, sizes.outputs), out_dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            for block in T.thread_binding(g.blocks, thread="blockIdx.x"):
                for tid in T.thread_binding(g.threads, thread="threadIdx.x"):
                    staged = T.alloc_buffer((batch, g.pieces, chunk, 8), "float16", scope="shared")
                    partial = T.alloc_buffer((g.warps, rows * batch), "float32", scope="shared")
                    eight = T.alloc_buffer((16,), "float16", scope="local")
                    words = T.alloc_buffer((unroll * rows * 4,), "uint32", scope="local")
                    scales = T.alloc_buffer((unroll * rows,), "float16", scope="local")
                    weight = T.alloc_buffer((rows * 4,), "uint32", scope="local")
                    xs = T.alloc_buffer((8,), "float16", scope="local")
                    part = T.alloc_buffer((rows * batch,), "float32", scope="local")
                    acc = T.alloc_buffer((rows * batch,), "float32", scope="local")
                    row0: T.let[T.int32] = g.first_row(block, tid)
                    for i in T.unroll(rows * batch):
                        acc[i] = T.float32(0)
                    for c in T.serial(g.chunks):
                        if c > 0:
                            T.tvm_storage_sync("shared")
                        do.read(packed, words, row0, c * chunk, 0, tid)
                        do.read_scales(scale, scales, row0, c * chunk, 0, tid)
                        do.stage(x, staged, eight, c * chunk, tid)
                        T.tvm_storage_sync("shared")
                        for it in T.serial(chunk // g.step):
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
                                            xs[e] = staged[b, i, g.unit_of(it, j, tid), e]
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
                            if it + 1 < chunk // g.step:
                                do.read(packed, words, row0, c * chunk, it + 1, tid)
                                do.read_scales(scale, scales, row0, c * chunk, it + 1, tid)
                    do.finish(acc, partial, out, row0, tid)

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
