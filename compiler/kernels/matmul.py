# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Products with a weight of `[out_features, in_features]`, plain or packed in four bits.

The packed format: word `w` of a row holds elements `8 w` to `8 w + 7`, the first in its lowest
four bits; an element is `(nibble - 7) * scale` of its group. Words `[N, K / 8]` uint32, scales
`[N, K / group]`.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from .common import SCHEDULED, extent, for_blocks, for_threads, is_gpu, nibble
from .gemv import gemv, q4_gemv

__all__ = ["gemv", "matmul_cpu", "q4_dequantize", "q4_gemv", "q4_take"]

TOKEN_TILE = 8  # tokens that share one reading (and one unpacking) of the weight on a CPU


def matmul_cpu(
    *,
    tokens: int | None,
    out_features: int,
    in_features: int,
    dtype: str,
    out_dtype: str,
) -> tirx.PrimFunc:
    """`(x [n,K], w [N,K]) -> x @ w.T [n,N]` for CPUs, float32 accumulation, parallel over rows."""
    n = extent(tokens)
    tile = min(tokens or TOKEN_TILE, TOKEN_TILE)
    rows = 2 if out_features % 2 == 0 else 1
    chunks, tail = divmod(in_features, 16)

    @T.prim_func(s_tir=True)
    def matmul_cpu(x_h: T.handle, w_h: T.handle, out_h: T.handle):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (n, in_features), dtype)
        w = T.match_buffer(w_h, (out_features, in_features), dtype)
        out = T.match_buffer(out_h, (n, out_features), out_dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            for o in T.parallel(out_features // rows):
                acc = T.alloc_buffer((rows, tile, 16), "float32", scope="local")
                for t0 in T.serial(T.ceildiv(n, tile)):
                    for r in T.unroll(rows):
                        for t in T.unroll(tile):
                            for l in T.vectorized(16):
                                acc[r, t, l] = T.float32(0)
                    for c in T.serial(chunks):
                        for r in T.unroll(rows):
                            for t in T.unroll(tile):
                                for l in T.vectorized(16):
                                    acc[r, t, l] = acc[r, t, l] + T.cast(
                                        x[T.min(t0 * tile + t, n - 1), c * 16 + l], "float32"
                                    ) * T.cast(w[o * rows + r, c * 16 + l], "float32")
                    for r in T.serial(rows):
                        for t in T.serial(tile):
                            if t0 * tile + t < n:
                                total: T.float32 = T.float32(0)
                                for l in T.serial(16):
                                    total = total + acc[r, t, l]
                                for l in T.serial(tail):
                                    total = total + T.cast(
                                        x[t0 * tile + t, chunks * 16 + l], "float32"
                                    ) * T.cast(w[o * rows + r, chunks * 16 + l], "float32")
                                out[t0 * tile + t, o * rows + r] = T.cast(total, out_dtype)

    return matmul_cpu


def q4_take(
    *,
    tokens: int | None,
    vocab_rows: int,
    features: int,
    group: int,
    dtype: str,
    target: Any,
) -> tirx.PrimFunc:
    """Rows of a packed embedding whose vocabulary is split over the ranks.

    `(packed [R,F/8] u32, scale [R,F/group], ids [n] i32, rank [1] i32) -> [n,F]`: row
    `ids[t] - rank * R` where this rank holds it, zeros where another does.
    """
    n = extent(tokens)
    gpu = is_gpu(target)
    words = features // 8
    threads = 128 if gpu else 1

    @T.prim_func(s_tir=True)
    def q4_take(
        packed_h: T.handle, scale_h: T.handle, ids_h: T.handle, rank_h: T.handle, out_h: T.handle
    ):
        T.func_attr(SCHEDULED)
        packed = T.match_buffer(packed_h, (vocab_rows, words), "uint32")
        scale = T.match_buffer(scale_h, (vocab_rows, features // group), dtype)
        ids = T.match_buffer(ids_h, (n,), "int32")
        rank = T.match_buffer(rank_h, (1,), "int32")
        out = T.match_buffer(out_h, (n, features), dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            for t in for_blocks(n, gpu):
                for tid in for_threads(threads, gpu):
                    unpacked = T.alloc_buffer((8,), dtype, scope="local")
                    row: T.int32 = ids[t] - rank[0] * vocab_rows
                    if row >= 0 and row < vocab_rows:
                        for i in T.serial((words + threads - 1 - tid) // threads):
                            word: T.uint32 = packed[row, tid + i * threads]
                            factor: T.let[T.float32] = T.cast(
                                scale[row, (tid + i * threads) * 8 // group], "float32"
                            )
                            for l in T.unroll(8):
                                unpacked[l] = T.cast(nibble(word, l) * factor, dtype)
                            for l in T.vectorized(8):
                                out[t, (tid + i * threads) * 8 + l] = unpacked[l]
                    else:
                        for i in T.serial((words + threads - 1 - tid) // threads):
                            for l in T.vectorized(8):
                                out[t, (tid + i * threads) * 8 + l] = T.cast(0, dtype)

    return q4_take


def q4_dequantize(
    *, out_features: int, in_features: int, group: int, dtype: str, target: Any = "cuda"
) -> tirx.PrimFunc:
    """`(packed [N,K/8] u32, scale [N,K/group]) -> w [N,K]`, for a matrix product of many tokens."""
    gpu = is_gpu(target)
    words = in_features // 8
    threads = 256 if gpu else 1
    per_block = threads * 4 if gpu else words
    blocks = -(-out_features * words // per_block)

    @T.prim_func(s_tir=True)
    def q4_dequantize(packed_h: T.handle, scale_h: T.handle, out_h: T.handle):
        T.func_attr(SCHEDULED)
        packed = T.match_buffer(packed_h, (out_features, words), "uint32")
        scale = T.match_buffer(scale_h, (out_features, in_features // group), dtype)
        out = T.match_buffer(out_h, (out_features, in_features), dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            for block in for_blocks(blocks, gpu):
                for tid in for_threads(threads, gpu):
                    unpacked = T.alloc_buffer((8,), dtype, scope="local")
                    for i in T.serial(per_block // threads):
                        # Element offsets of a large vocabulary pass 2 ** 31.
                        at: T.let[T.int64] = T.cast(block, "int64") * per_block + i * threads + tid
                        if at < out_features * words:
                            row: T.let[T.int64] = at // words
                            column: T.let[T.int64] = at % words
                            word: T.uint32 = packed[row, column]
                            factor: T.let[T.float32] = T.cast(
                                scale[row, column * 8 // group], "float32"
                            )
                            for l in T.unroll(8):
                                unpacked[l] = T.cast(nibble(word, l) * factor, dtype)
                            for l in T.vectorized(8 if dtype == "float16" else 4):
                                out[row, column * 8 + l] = unpacked[l]
                            if dtype == "float32":
                                for l in T.vectorized(4):
                                    out[row, column * 8 + 4 + l] = unpacked[4 + l]

    return q4_dequantize
