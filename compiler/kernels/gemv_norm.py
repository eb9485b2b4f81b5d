# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Residual sums and norms of several tokens as part of the products around them.

The product in front of a norm adds the residual. Beside the sum it writes that times the norm's
weight, and each block the squares of its columns, added up. The product behind multiplies what was
written as any x, and scales its results. So a norm costs no kernel, and nothing waits for it. With
several ranks each block in front first sends its results to all of them and takes the sum over
ranks of the same results, so neither does an all-reduce. For GPUs with clusters of blocks.
"""

from __future__ import annotations

from typing import TypeAlias

from tvm import tirx
from tvm.script import tirx as T

from . import gemv_mma, gemv_tokens
from .common import SCHEDULED
from .gemv_mma import (
    CUDA_TYPE,
    MAX_BATCH,
    SHARED_BYTES_CLUSTERS,
    Function,
    Product,
    device_function,
    launch_clusters,
)
from .gemv_rows import weight_of, with_scale, without

Plan: TypeAlias = gemv_mma.Plan | gemv_tokens.Plan

SCALES_BYTES = MAX_BATCH * 4
"""Of shared memory, for the tokens' scales behind all else."""

MAX_SENT = 1 << 20
"""Bytes that a rank may send for a sum over ranks: each of its rows goes to each of the others.

That is 16 rows of 8192 among 5 ranks. More is left to `all_reduce.py`, where each rank sums a part.
"""

_BESIDE = "gemv_norm.cuh"


def added_plan(product: Product) -> Plan | None:
    """The plan for `add_gemv`, of several tokens, on GPUs with clusters."""
    return gemv_tokens.plan(product) or gemv_mma.plan(product, clusters=True)


def scaled_plan(product: Product) -> Plan | None:
    """The plan for `norm_gemv`, of several tokens, on GPUs with clusters."""
    p = added_plan(product) if product.batch > 1 else None
    if isinstance(p, gemv_mma.Plan):
        return p if product.shared(p) + SCALES_BYTES <= SHARED_BYTES_CLUSTERS else None
    return p


def sums(tokens: int, features: int, ranks: int) -> bool:
    """Whether `sum_add_gemv` is for products of so many rows and columns, among so many ranks."""
    return features % 8 == 0 and tokens * features * 2 * (ranks - 1) <= MAX_SENT


def blocks(product: Product, p: Plan) -> int:
    """Blocks of `add_gemv` or `sum_add_gemv`, each of which writes a row's part of `squares`."""
    among = gemv_tokens.parts(p) if isinstance(p, gemv_tokens.Plan) else product.parts(p)
    return among * p.cluster


def _function(
    kind: str, product: Product, tuned: Plan, out_dtype: str, given: str, output: str, made: str
) -> Function:
    """The device function of a product; `output`, made by `made`, is one of either kernel's."""
    given = f"const half* x, {given}"
    if isinstance(tuned, gemv_tokens.Plan):
        # An output of these may have another as its base.
        made = f"{{{made}}}" if kind == "norm" else made
        output = f"{output.replace('Output', 'Tokens')}{made}"
        return gemv_tokens.device_function(kind, product, tuned, out_dtype, given, output)
    return device_function(
        kind, product, tuned, out_dtype, given, output + made, beside=_BESIDE, more=SCALES_BYTES
    )


def add_gemv(
    *, batch: int, out_features: int, in_features: int, tuned: Plan, group: int
) -> tirx.PrimFunc:
    """A product of several tokens, the residual's sum with it, and what its norm needs.

    `(x [b,K] f16, weight, residual [b,N] f16, norm [N] f16) -> (sum [b,N] f16, weighted [b,N] f16,
    squares [b,blocks] f32)`, `weight` [N,K] f16, or for `group` > 0 `packed [N,K/8] u32, scale
    [N,K/group] f16`. `sum` is residual + product, rounded as by separate kernels; `weighted` is
    sum * norm / 16, and all `squares` of a row add up to those of its sum. `tuned` is from
    `added_plan`.
    """
    return _add_gemv(Product(batch, out_features, in_features, group), tuned, ranks=1)


def sum_add_gemv(
    *, batch: int, out_features: int, in_features: int, tuned: Plan, group: int, ranks: int
) -> tirx.PrimFunc:
    """As `add_gemv`, of the sum over ranks of their products.

    The arguments are followed by `peers [ranks+1] i64, rank [1] i32, first i64`, as for
    `all_reduce.all_reduce`. Summands go to the ranks' buffers, from word `first` on [ranks, b, N]
    f16 in an order of their own; `first` is even, and for two sums in turn the memory is not the
    same. It has zeros before and behind a sum. Summands are added in rank order, so that all ranks
    get the same bits, and their sum is rounded before the residual is added.
    """
    return _add_gemv(Product(batch, out_features, in_features, group), tuned, ranks)


def _add_gemv(product: Product, tuned: Plan, ranks: int) -> tirx.PrimFunc:
    """`add_gemv` for one rank, `sum_add_gemv` for several."""
    batch, in_features, out_features = product.batch, product.in_features, product.out_features
    given = "const half* residual, const half* norm, half* sum, half* weighted, float* squares"
    kind, output, made = "add", "AddedOutput<Z>", "{residual, norm, sum, weighted, squares}"
    summed = ranks > 1
    if summed:
        given += ", const int64_t* peers, const int* rank, int64_t first"
        kind, output = f"sum_{ranks}", f"SummedOutput<Z, {ranks}>"
        made = f"{{{made}, {{peers, rank, first}}}}"
    f = _function(kind, product, tuned, "float16", given, output, made)
    q4, words, dtype, scales = weight_of(product)

    @T.prim_func(s_tir=True)
    def add_gemv(
        x_h: T.handle,
        w_h: T.handle,
        scale_h: T.handle,
        residual_h: T.handle,
        norm_h: T.handle,
        peers_h: T.handle,
        rank_h: T.handle,
        first: T.int64,
        sum_h: T.handle,
        weighted_h: T.handle,
        squares_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (batch, in_features), "float16")
        w = T.match_buffer(w_h, words, dtype)
        scale = T.match_buffer(scale_h, scales, "float16")
        residual = T.match_buffer(residual_h, (batch, out_features), "float16")
        norm = T.match_buffer(norm_h, (out_features,), "float16")
        peers = T.match_buffer(peers_h, (ranks + 1,), "int64")
        rank = T.match_buffer(rank_h, (1,), "int32")
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
                    *([peers.data, rank.data, first] if summed else []),
                    w.data,
                    scale.data if q4 else w.data,
                ],
            )

    func = add_gemv if summed else without(add_gemv, "peers", "rank", "first")
    return with_scale(func, q4)


def norm_gemv(
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
    """A product of the norms of sums of several tokens, from what `add_gemv` gives.

    `(weighted [b,K] f16, squares [b,pieces] f32, weight) -> out [b,N]`, the weight as for
    `add_gemv`; `gated` is as for `gemv_mma`, `tuned` is from `scaled_plan`.
    """
    product = Product(batch, out_features, in_features, group, gated)
    out_type = CUDA_TYPE[out_dtype]
    given = f"const float* squares, float epsilon, {out_type}* out"
    output, made = f"NormedOutput<Z, {out_type}, {pieces}>", "{squares, epsilon, {out}}"
    f = _function("norm", product, tuned, out_dtype, given, output, made)
    q4, words, dtype, scales = weight_of(product)

    @T.prim_func(s_tir=True)
    def norm_gemv(
        weighted_h: T.handle,
        squares_h: T.handle,
        w_h: T.handle,
        scale_h: T.handle,
        out_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        weighted = T.match_buffer(weighted_h, (batch, in_features), "float16")
        squares = T.match_buffer(squares_h, (batch, pieces), "float32")
        w = T.match_buffer(w_h, words, dtype)
        scale = T.match_buffer(scale_h, scales, "float16")
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
                    w.data,
                    scale.data if q4 else w.data,
                ],
            )

    return with_scale(norm_gemv, q4)
