# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Products of a few tokens with a large weight on CUDA GPUs, bound by reading the weight.

How threads share the work is in `gemv_common.py`. x lies in shared memory in an order in which a
warp's reads meet no bank twice.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from .common import SCHEDULED, cuda_source, launch_dependents
from .gemv_common import Layout, Plan, Sizes, steps

WARP = 32
WARPS = 8  # of a block
FULL_GPU = 132 * 15  # warps that keep the memory of a large GPU busy
SHARED_BYTES = 96 * 1024  # of x at a time; two blocks fit into a multiprocessor

_FMA2 = """
__device__ __forceinline__ void shardwright_fma2(uint a, const half* b, half* acc) {
  half2* c = reinterpret_cast<half2*>(acc);
  *c = __hfma2(*reinterpret_cast<half2*>(&a), *reinterpret_cast<const half2*>(b), *c);
}
"""


def _unpack(word: Any, scale: Any, out: Any) -> Any:
    """Eight elements of a word as four pairs of fp16: 0 4, 1 5, 2 6, 3 7."""
    return T.cuda.func_call(
        "shardwright_q4_unpack", word, scale, out, source_code=cuda_source("q4_unpack.cuh")
    )


def _fma2(a: Any, b: Any, acc: Any) -> Any:
    """Acc += a * b for two fp16 each."""
    return T.cuda.func_call("shardwright_fma2", a, b, acc, source_code=_FMA2)


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
    return Plan(rows, split, unroll).filling(
        out_features=out_features, units=units, warp=WARP, warps=WARPS, full=FULL_GPU
    )


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
    sizes = Sizes(batch, out_features, in_features, group, out_dtype, gated)
    chosen = tuned or plan(batch=batch, out_features=out_features, units=sizes.units, q4=group > 0)
    g = Layout(sizes, chosen, WARP, WARPS, SHARED_BYTES)
    do = steps(g, "cuda")
    rows, unroll, chunk = g.rows, chosen.unroll, g.chunk
    small = batch * chunk * sizes.unit * 2 <= 40 * 1024
    scope = "shared" if small else "shared.dyn"

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
                        launch_dependents("cuda")
                        staged = T.alloc_buffer((batch, g.pieces, chunk, 8), "float16", scope=scope)
                        partial = T.alloc_buffer((WARPS, rows * batch), "float32", scope="shared")
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
                                            for e in T.unroll(8):
                                                acc[r * batch + b] = acc[r * batch + b] + T.cast(
                                                    weight[(j * rows + r) * 8 + e], "float32"
                                                ) * T.cast(xs[e], "float32")
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
                    launch_dependents("cuda")
                    staged = T.alloc_buffer((batch, g.pieces, chunk, 8), "float16", scope=scope)
                    partial = T.alloc_buffer((WARPS, rows * batch), "float32", scope="shared")
                    eight = T.alloc_buffer((16,), "float16", scope="local")
                    words = T.alloc_buffer((unroll * rows * 4,), "uint32", scope="local")
                    scales = T.alloc_buffer((unroll * rows,), "float16", scope="local")
                    weight = T.alloc_buffer((rows * 4,), "uint32", scope="local")
                    xs = T.alloc_buffer((8,), "float16", scope="local")
                    pairs = T.alloc_buffer((rows * batch * 2,), "float16", scope="local")
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
                                            xs[e] = staged[b, i, g.unit_of(it, j, tid), e]
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
