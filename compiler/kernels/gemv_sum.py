# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Products of one token that compute their x as a sum's norm, or send their result to all ranks.

On CUDA GPUs with clusters. `gemv_sum.cuh` is put in front of and behind the products of
`gemv_rows.py` and of `gemv_mma.py`, which has those with small weights of four bits.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from . import gemv_mma, gemv_rows
from .common import SCHEDULED
from .gemv_mma import CUDA_TYPE, Function, Product, launch
from .gemv_rows import weight_of, with_scale

Plan = gemv_mma.Plan | gemv_rows.Plan


def sent_plan(product: Product) -> Plan | None:
    """The plan for a product of one token whose result is sent, None if there is no kernel."""
    return gemv_rows.plan(product) or gemv_mma.plan(product, clusters=True)


def normed_plan(product: Product) -> Plan | None:
    """The plan for a product of one token that computes its x, all of which is in each block."""
    if (rows := gemv_rows.plan(product, whole_x=True)) is not None or product.batch != 1:
        return rows
    p = gemv_mma.plan(product, clusters=True)
    return p if p is not None and p.phases == 1 and p.cluster == 1 else None


def _function(
    kind: str, product: Product, tuned: Plan, ranks: int, out_dtype: str, first_word: int = 0
) -> Function:
    """The device function for a product whose x is a sum's norm, or whose result is sent."""
    out, exchange = CUDA_TYPE[out_dtype], "const int64_t* peers, const int* rank, int64_t place"
    where = f"Exchange{{peers, rank, {first_word}, (int)place}}"
    if kind == "send":
        given = f"const half* x, {exchange}"
        x = "RowInput{x}" if isinstance(tuned, gemv_rows.Plan) else "PlainInput{x}"
        output = f"SentOutput<{ranks}>{{{where}}}"
    else:
        given = "const half* residual, const half* y, const half* norm, half* sum, float epsilon, "
        summed = "{}, 0"
        if ranks > 1:
            given += f"{exchange}, int64_t last_place, "
            summed = f"{where}, (int)last_place"
        given += f"{out}* out"
        x = f"SumInput<Z, {ranks}>{{residual, y, norm, sum, epsilon, {summed}}}"
        output = f"PlainOutput<{out}>{{out}}"
    kind, texts = f"{kind}_{ranks}", (out_dtype, given, output, x, "gemv_sum.cuh")
    if isinstance(tuned, gemv_rows.Plan):
        return gemv_rows.device_function(kind, product, tuned, *texts)
    return gemv_mma.device_function(kind, product, tuned, *texts)


def add_norm_gemv(
    *,
    out_features: int,
    in_features: int,
    out_dtype: str,
    tuned: Plan,
    group: int = 0,
    eps: float,
    gated: bool = False,
) -> tirx.PrimFunc:
    """A residual's sum and norm, and the product of that with a weight, for one token.

    `(residual [1,K] f16, y [1,K] f16, norm [K] f16, weight [N,K] f16) -> (the product [1,N],
    residual + y [1,K])`, or with `packed [N,K/8] u32, scale [N,K/group] f16` for `group` > 0. Sums
    are rounded as by separate kernels; `gated` is as for `gemv_mma`, `tuned` from `normed_plan`.
    """
    k, product = in_features, Product(1, out_features, in_features, group, gated)
    q4, words, dtype, scales = weight_of(product)
    f = _function("add_norm", product, tuned, 1, out_dtype)

    @T.prim_func(s_tir=True)
    def add_norm_gemv(
        residual_h: T.handle,
        y_h: T.handle,
        norm_h: T.handle,
        weight_h: T.handle,
        scale_h: T.handle,
        out_h: T.handle,
        sum_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        residual = T.match_buffer(residual_h, (1, k), "float16")
        y = T.match_buffer(y_h, (1, k), "float16")
        norm = T.match_buffer(norm_h, (k,), "float16")
        weight = T.match_buffer(weight_h, words, dtype)
        scale = T.match_buffer(scale_h, scales, "float16")
        total = T.match_buffer(sum_h, (1, k), "float16")
        out = T.match_buffer(out_h, (1, product.outputs), out_dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            launch(
                f,
                [
                    residual.data,
                    y.data,
                    norm.data,
                    total.data,
                    T.float32(eps),
                    out.data,
                    weight.data,
                    (scale if q4 else weight).data,
                ],
            )

    return with_scale(add_norm_gemv, q4)


def send_gemv(
    *,
    out_features: int,
    in_features: int,
    tuned: Plan,
    group: int = 0,
    ranks: int,
    first_word: int,
) -> tirx.PrimFunc:
    """A product whose result goes to all ranks as a summand, for one token.

    `(x [1,K] f16, weight, peers [ranks+1] i64, rank [1] i32, place i64) -> done [1] i32`, the
    weight as for `add_norm_gemv`, `tuned` from `sent_plan`.
    What is sent goes to the ranks' buffers, from word `first_word` on [places, ranks, N] f16, where
    `sum_norm_gemv` receives it. `done` is not written: it stands for the order of the two.
    """
    k, product = in_features, Product(1, out_features, in_features, group)
    q4, words, dtype, scales = weight_of(product)
    f = _function("send", product, tuned, ranks, "float16", first_word)

    @T.prim_func(s_tir=True)
    def send_gemv(
        x_h: T.handle,
        weight_h: T.handle,
        scale_h: T.handle,
        peers_h: T.handle,
        rank_h: T.handle,
        place: T.int64,
        done_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (1, k), "float16")
        weight = T.match_buffer(weight_h, words, dtype)
        scale = T.match_buffer(scale_h, scales, "float16")
        peers = T.match_buffer(peers_h, (ranks + 1,), "int64")
        rank = T.match_buffer(rank_h, (1,), "int32")
        _done = T.match_buffer(done_h, (1,), "int32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            launch(
                f,
                [
                    x.data,
                    peers.data,
                    rank.data,
                    place,
                    weight.data,
                    (scale if q4 else weight).data,
                ],
            )

    return with_scale(send_gemv, q4)


def sum_norm_gemv(
    *,
    out_features: int,
    in_features: int,
    out_dtype: str,
    tuned: Plan,
    group: int = 0,
    eps: float,
    ranks: int,
    first_word: int,
    gated: bool = False,
) -> tirx.PrimFunc:
    """As `add_norm_gemv`, with what `send_gemv` has sent on all ranks in place of y.

    `(residual, norm, weight, done, x, peers, rank, place, last_place i64) -> (out, sum)`,
    arguments as for those two; `last_place` is that of the sum before, which is cleared for its
    next use, behind at least two others. `x` is that of `send_gemv`, or the ids of `send_embed`,
    which may still read it while this kernel runs: it is not read here, but its memory must not be
    that of a result.
    Summands are added in rank order, so that all ranks get the same bits.
    """
    k, product = in_features, Product(1, out_features, in_features, group, gated)
    q4, words, dtype, scales = weight_of(product)
    f = _function("sum_norm", product, tuned, ranks, out_dtype, first_word)

    @T.prim_func(s_tir=True)
    def sum_norm_gemv(
        residual_h: T.handle,
        norm_h: T.handle,
        weight_h: T.handle,
        scale_h: T.handle,
        done_h: T.handle,
        x_h: T.handle,
        peers_h: T.handle,
        rank_h: T.handle,
        place: T.int64,
        last_place: T.int64,
        out_h: T.handle,
        sum_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        residual = T.match_buffer(residual_h, (1, k), "float16")
        norm = T.match_buffer(norm_h, (k,), "float16")
        weight = T.match_buffer(weight_h, words, dtype)
        scale = T.match_buffer(scale_h, scales, "float16")
        _done = T.match_buffer(done_h, (1,), "int32")
        peers = T.match_buffer(peers_h, (ranks + 1,), "int64")
        rank = T.match_buffer(rank_h, (1,), "int32")
        total = T.match_buffer(sum_h, (1, k), "float16")
        out = T.match_buffer(out_h, (1, product.outputs), out_dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            launch(
                f,
                [
                    residual.data,
                    residual.data,
                    norm.data,
                    total.data,
                    T.float32(eps),
                    peers.data,
                    rank.data,
                    place,
                    last_place,
                    out.data,
                    weight.data,
                    (scale if q4 else weight).data,
                ],
            )

    return with_scale(sum_norm_gemv, q4)
