# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Residual sums and norms of several tokens as part of the four-bit products around them.

The product in front of a norm adds the residual. Beside the sum it writes that times the norm's
weight, and each block the squares of its columns, added up. The product behind multiplies what was
written as any x, and scales its results. So a norm costs no kernel, and nothing waits for it. For
GPUs with clusters of blocks.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from .common import SCHEDULED
from .gemv_mma import (
    CUDA_TYPE,
    MAX_BATCH,
    SHARED_BYTES_CLUSTERS,
    Plan,
    Product,
    device_function,
    launch_clusters,
    plan,
)

MOST_TOKENS = 8
"""Of more it is hardly faster than with norms as kernels."""

SCALES_BYTES = MAX_BATCH * 4
"""Of shared memory, for the tokens' scales behind all else."""

_BESIDE = "gemv_norm.cuh"


def scaled_plan(product: Product) -> Plan | None:
    """The plan for `norm_gemv_mma`, on GPUs with clusters, of several tokens and four bits."""
    if not 1 < product.batch <= MOST_TOKENS or not product.group:
        return None
    p = plan(product, clusters=True)
    fits = p is not None and product.shared(p) + SCALES_BYTES <= SHARED_BYTES_CLUSTERS
    return p if fits else None


def add_gemv_mma(
    *, batch: int, out_features: int, in_features: int, tuned: Plan, group: int
) -> tirx.PrimFunc:
    """A four-bit product of several tokens, the residual's sum with it, and what its norm needs.

    `(x [b,K] f16, packed [N,K/8] u32, scale [N,K/group] f16, residual [b,N] f16, norm [N] f16) ->
    (sum [b,N] f16, weighted [b,N] f16, squares [b,blocks] f32)`. `sum` is residual + product,
    rounded as by separate kernels; `weighted` is sum * norm / 16, and all `squares` of a row add up
    to those of its sum. `tuned` is from `plan`.
    """
    product = Product(batch, out_features, in_features, group)
    given = "const half* x, const half* residual, const half* norm, half* sum, half* weighted, "
    given += "float* squares"
    output = "AddedOutput<Z>{residual, norm, sum, weighted, squares}"
    f = device_function("add", product, tuned, "float16", given, output, beside=_BESIDE)

    @T.prim_func(s_tir=True)
    def add_gemv_mma(
        x_h: T.handle,
        packed_h: T.handle,
        scale_h: T.handle,
        residual_h: T.handle,
        norm_h: T.handle,
        sum_h: T.handle,
        weighted_h: T.handle,
        squares_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (batch, in_features), "float16")
        packed = T.match_buffer(packed_h, (out_features, in_features // 8), "uint32")
        scale = T.match_buffer(scale_h, (out_features, in_features // group), "float16")
        residual = T.match_buffer(residual_h, (batch, out_features), "float16")
        norm = T.match_buffer(norm_h, (out_features,), "float16")
        total = T.match_buffer(sum_h, (batch, out_features), "float16")
        weighted = T.match_buffer(weighted_h, (batch, out_features), "float16")
        squares = T.match_buffer(squares_h, (batch, f.blocks), "float32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            launch_clusters(
                f,
                [
                    x.data,
                    residual.data,
                    norm.data,
                    total.data,
                    weighted.data,
                    squares.data,
                    packed.data,
                    scale.data,
                ],
            )

    return add_gemv_mma


def norm_gemv_mma(
    *,
    batch: int,
    out_features: int,
    in_features: int,
    out_dtype: str,
    tuned: Plan,
    group: int,
    eps: float,
    pieces: int,
    gated: bool = False,
) -> tirx.PrimFunc:
    """A four-bit product of the norms of sums of several tokens, from what `add_gemv_mma` gives.

    `(weighted [b,K] f16, squares [b,pieces] f32, packed [N,K/8] u32, scale [N,K/group] f16) -> out
    [b,N]`; `gated` is as for `gemv_mma`, `tuned` is from `scaled_plan`.
    """
    product = Product(batch, out_features, in_features, group, gated)
    out_type = CUDA_TYPE[out_dtype]
    given = f"const half* x, const float* squares, float epsilon, {out_type}* out"
    output = f"NormedOutput<Z, {out_type}, {pieces}>{{squares, epsilon, {{out}}}}"
    f = device_function(
        "norm", product, tuned, out_dtype, given, output, beside=_BESIDE, more=SCALES_BYTES
    )

    @T.prim_func(s_tir=True)
    def norm_gemv_mma(
        weighted_h: T.handle,
        squares_h: T.handle,
        packed_h: T.handle,
        scale_h: T.handle,
        out_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        weighted = T.match_buffer(weighted_h, (batch, in_features), "float16")
        squares = T.match_buffer(squares_h, (batch, pieces), "float32")
        packed = T.match_buffer(packed_h, (out_features, in_features // 8), "uint32")
        scale = T.match_buffer(scale_h, (out_features, in_features // group), "float16")
        out = T.match_buffer(out_h, (batch, product.outputs), out_dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            launch_clusters(
                f,
                [
                    weighted.data,
                    squares.data,
                    T.float32(eps),
                    out.data,
                    packed.data,
                    scale.data,
                ],
            )

    return norm_gemv_mma
