# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""A row of a table that is cut over the ranks, sent to all of them as `gemv_sum.send_gemv` does."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from .common import SCHEDULED, ceil_div, cuda_source, launch_dependents, nibble, wait_for_inputs
from .gemv_mma import Product
from .gemv_rows import weight_of, with_scale

THREADS = 128
"""Of a block; each sends eight elements."""


def send_embed(
    *, table_rows: int, features: int, group: int = 0, ranks: int, rows: int, first_word: int
) -> tirx.PrimFunc:
    """The row of one token, from the rank that holds it, and zeros from the others.

    `(table [R,F] f16, ids [1] i32, peers [ranks+1] i64, rank [1] i32, calls [rows] i32, place i64)
    -> done [1] i32`, or `packed [R,F/8] u32, scale [R,F/group] f16` for `group` > 0. A rank's first
    row is number `rank * R`; F is a multiple of 8. Where the row goes, and `done`, are as for
    `gemv_sum.send_gemv`. `calls[0]` is counted up in place, as by an all-reduce. All threads wait
    for the kernels in front: so `sum_norm_gemv`, which does not, finds them ended.
    """
    q4, words, dtype, scales = weight_of(Product(1, table_rows, features, group))
    pieces, name = features // 8, f"shardwright_gemv::send_piece<{ranks}, {features}>"
    source = cuda_source("gemv_mma.cuh", "gemv_sum.cuh")

    @T.prim_func(s_tir=True)
    def send_embed(
        table_h: T.handle,
        scale_h: T.handle,
        ids_h: T.handle,
        peers_h: T.handle,
        rank_h: T.handle,
        calls_h: T.handle,
        place: T.int64,
        done_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        table = T.match_buffer(table_h, words, dtype)
        scale = T.match_buffer(scale_h, scales, "float16")
        ids = T.match_buffer(ids_h, (1,), "int32")
        peers = T.match_buffer(peers_h, (ranks + 1,), "int64")
        rank = T.match_buffer(rank_h, (1,), "int32")
        calls = T.match_buffer(calls_h, (rows,), "int32")
        _done = T.match_buffer(done_h, (1,), "int32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for block in T.thread_binding(ceil_div(pieces, THREADS), thread="blockIdx.x"):
                for tid in T.thread_binding(THREADS, thread="threadIdx.x"):
                    launch_dependents("cuda")
                    values = T.alloc_buffer((8,), "float16", scope="local")
                    piece: T.let[T.int32] = block * THREADS + tid
                    for l in T.unroll(8):
                        values[l] = T.float16(0)
                    wait_for_inputs("cuda")
                    if piece < pieces:
                        row: T.let[T.int32] = ids[0] - rank[0] * table_rows
                        if row >= 0 and row < table_rows:
                            if q4:
                                word: T.uint32 = table[row, piece]
                                factor: T.let[T.float32] = T.cast(
                                    scale[row, piece * 8 // group], "float32"
                                )
                                for l in T.unroll(8):
                                    values[l] = T.cast(nibble(word, l) * factor, "float16")
                            else:
                                for l in T.vectorized(8):
                                    values[l] = table[row, piece * 8 + l]
                        T.evaluate(
                            T.cuda.func_call(
                                name,
                                values.data,
                                peers.data,
                                rank.data,
                                T.int32(first_word),
                                place,
                                piece,
                                source_code=source,
                            )
                        )
                    if piece == 0:
                        calls[0] = calls[0] + 1

    return with_scale(send_embed, q4)
