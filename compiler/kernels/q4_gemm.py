# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Products of many tokens with a four-bit weight on Hopper's tensor cores.

The weight is unpacked in registers, on its way to the tensor cores, so no fp16 copy of it is ever
in memory. `wgmma` takes 64 rows of the weight from registers and up to 256 tokens of x from shared
memory. Inside 128 columns the order of the inner dimension is free as long as both agree; ours
gives each lane 32 consecutive elements of a row: 16 bytes, one scale. x is brought into that order
beforehand, as an image of what shared memory shall hold, so that one thread loads 32 KB with one
instruction (`cp.async.bulk`) and needs no tensor map.

PTX for later GPUs has no `wgmma`; there the same image feeds `mma`.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from .common import SCHEDULED, cuda_source

TILE = 256
"""Tokens of an image's tile, and of the largest product at once."""
COLUMNS = 128
"""K must be a multiple."""
_ROWS = 128  # of the weight, in a block
_THREADS = 384  # two warpgroups that multiply, one that loads
_STAGES_BYTES = 192 * 1024
_SHARED_BYTES = _STAGES_BYTES + 1024 + 512  # alignment, barriers


def _source() -> str:
    return cuda_source("q4_image.cuh", "q4_unpack.cuh", "q4_gemm.cuh")


def image_rows(tokens: Any) -> Any:
    """Rows of the image of x for `tokens` tokens."""
    return (tokens + TILE - 1) // TILE * TILE


def q4_gemm_image() -> tirx.PrimFunc:
    """`x [n,K] f16 -> image [image_rows(n),K] f16`, x as `q4_gemm` reads it; K of any size."""
    threads, source = 256, _source()
    n = tirx.Var("n", "int64")
    inner = tirx.Var("k", "int64")
    rows = image_rows(n)

    @T.prim_func(s_tir=True)
    def q4_gemm_image(x_h: T.handle, image_h: T.handle):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (n, inner), "float16")
        image = T.match_buffer(image_h, (rows, inner), "float16")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for block in T.thread_binding(
                T.ceildiv(rows * (inner // 8), threads), thread="blockIdx.x"
            ):
                for tid in T.thread_binding(threads, thread="threadIdx.x"):
                    at: T.let[T.int64] = T.cast(block, "int64") * threads + tid
                    if at < rows * (inner // 8):
                        T.evaluate(
                            T.cuda.func_call(
                                "shardwright_q4_image",
                                x.data,
                                image.data,
                                T.cast(n, "int32"),
                                T.cast(inner, "int32"),
                                T.cast(at // (inner // 8), "int32"),
                                T.cast(at % (inner // 8), "int32"),
                                source_code=source,
                            )
                        )

    return q4_gemm_image


def silu_mul_image(*, features: int) -> tirx.PrimFunc:
    """`y [n,2F] f16 -> image` of `activation.silu_mul`; F a multiple of `COLUMNS`."""
    threads, parts, source = 256, features // 32, cuda_source("q4_image.cuh")
    n = tirx.Var("n", "int64")

    @T.prim_func(s_tir=True)
    def silu_mul_image(y_h: T.handle, image_h: T.handle):
        T.func_attr(SCHEDULED)
        y = T.match_buffer(y_h, (n, 2 * features), "float16")
        image = T.match_buffer(image_h, (image_rows(n), features), "float16")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for block in T.thread_binding(T.ceildiv(n * parts, threads), thread="blockIdx.x"):
                for tid in T.thread_binding(threads, thread="threadIdx.x"):
                    at: T.let[T.int64] = T.cast(block, "int64") * threads + tid
                    # All lanes of a warp exchange what they have, so none stays away.
                    T.evaluate(
                        T.cuda.func_call(
                            "shardwright_q4::silu_mul_image",
                            y.data,
                            image.data,
                            T.cast(n, "int32"),
                            features,
                            T.cast(at // parts, "int32"),
                            T.cast(at % parts, "int32"),
                            source_code=source,
                        )
                    )

    return silu_mul_image


NORM_FEATURES = 1024
"""Features of a norm that is written as an image must be a multiple, up to 32 times as many."""


def add_rms_norm_image(*, features: int, eps: float) -> tirx.PrimFunc:
    """`(x [n,E], y [n,E], weight [E]) -> (sum [n,E], image)`, of `norm.add_rms_norm`, all f16."""
    threads, source = features // 32, cuda_source("q4_image.cuh")
    name = f"shardwright_q4::add_rms_norm_image<{features}>"
    n = tirx.Var("n", "int64")

    @T.prim_func(s_tir=True)
    def add_rms_norm_image(
        x_h: T.handle, y_h: T.handle, weight_h: T.handle, sum_h: T.handle, image_h: T.handle
    ):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (n, features), "float16")
        y = T.match_buffer(y_h, (n, features), "float16")
        weight = T.match_buffer(weight_h, (features,), "float16")
        total = T.match_buffer(sum_h, (n, features), "float16")
        image = T.match_buffer(image_h, (image_rows(n), features), "float16")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for token in T.thread_binding(n, thread="blockIdx.x"):
                for tid in T.thread_binding(threads, thread="threadIdx.x"):
                    T.evaluate(
                        T.cuda.func_call(
                            name,
                            x.data,
                            y.data,
                            weight.data,
                            total.data,
                            image.data,
                            T.float32(eps),
                            T.cast(n, "int32"),
                            T.cast(token, "int32"),
                            tid,
                            source_code=source,
                        )
                    )

    return add_rms_norm_image


@T.inline
def _multiply(name, image, packed, scale, out, n, rows, inner, group):
    """Blocks that call the device function `name` of `q4_gemm.cuh` for a weight of `rows` rows."""
    for block in T.thread_binding(T.ceildiv(n, TILE) * T.ceildiv(rows, _ROWS), thread="blockIdx.x"):
        for _tid in T.thread_binding(_THREADS, thread="threadIdx.x"):
            # CUDA code knows it by this name and one type in all kernels of a library.
            q4_gemm_shared = T.alloc_buffer((_SHARED_BYTES,), "uint8", scope="shared.dyn")
            T.evaluate(
                T.cuda.func_call(
                    name,
                    image.data,
                    packed.data,
                    scale.data,
                    out.data,
                    q4_gemm_shared.data,
                    T.cast(n, "int32"),
                    T.cast(rows, "int32"),
                    T.cast(inner, "int32"),
                    group,
                    T.cast(block, "int32"),
                    source_code=_source(),
                )
            )


def q4_gemm(*, group: int) -> tirx.PrimFunc:
    """`(image, packed [N,K/8] u32, scale [N,K/group] f16) -> x @ w.T [n,N] f16` for any n.

    `image` is made by `q4_gemm_image` from x [n,K]. Weights are rounded to fp16 as `q4_dequantize`
    rounds them, sums are float32. K is a multiple of `COLUMNS`, N of 8, `group` of 32.
    """
    n = tirx.Var("n", "int64")
    rows, inner = tirx.Var("rows", "int64"), tirx.Var("k", "int64")

    @T.prim_func(s_tir=True)
    def q4_gemm(image_h: T.handle, packed_h: T.handle, scale_h: T.handle, out_h: T.handle):
        T.func_attr(SCHEDULED)
        image = T.match_buffer(image_h, (image_rows(n), inner), "float16")
        packed = T.match_buffer(packed_h, (rows, inner // 8), "uint32")
        scale = T.match_buffer(scale_h, (rows, inner // group), "float16")
        out = T.match_buffer(out_h, (n, rows), "float16")
        with T.sblock("root"):
            T.reads()
            T.writes()
            _multiply("shardwright_q4_gemm", image, packed, scale, out, n, rows, inner, group)

    return q4_gemm


def q4_gemm_gated(*, group: int, features: int) -> tirx.PrimFunc:
    """`q4_gemm` with `silu_mul_image` of its result, which is rounded to fp16 between them.

    `(image, packed [2F,K/8] u32, scale [2F,K/group] f16, n) -> image [image_rows(n),F]`; F is a
    multiple of `COLUMNS`, n a number: no operand has n rows.
    """
    inner = tirx.Var("k", "int64")

    @T.prim_func(s_tir=True)
    def q4_gemm_gated(
        image_h: T.handle, packed_h: T.handle, scale_h: T.handle, n: T.int64, out_h: T.handle
    ):
        T.func_attr(SCHEDULED)
        image = T.match_buffer(image_h, (image_rows(n), inner), "float16")
        packed = T.match_buffer(packed_h, (2 * features, inner // 8), "uint32")
        scale = T.match_buffer(scale_h, (2 * features, inner // group), "float16")
        out = T.match_buffer(out_h, (image_rows(n), features), "float16")
        with T.sblock("root"):
            T.reads()
            T.writes()
            _multiply(
                "shardwright_q4_gemm_gated",
                image,
                packed,
                scale,
                out,
                n,
                2 * features,
                inner,
                group,
            )

    return q4_gemm_gated
