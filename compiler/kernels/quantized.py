# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Products with a weight in any of the formats of `packing`, for every target.

Weights are words uint32 `[N, K / per_word]`, scales `[N, K / group]` and, with `packing.zeros`,
zero points of the scales' shape and dtype. Elements are computed in float32.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from shardwright.compiler.packing import Packing

from .common import (
    SCHEDULED,
    element,
    extent,
    for_blocks,
    for_threads,
    is_gpu,
    lanes_for,
    scale_of,
    shuffle_xor,
    warp_size_of,
)

TOKEN_TILE = 8  # tokens that share one reading (and one unpacking) of the weight on a CPU
WARPS = 4  # of a block


def quantized_matmul_cpu(
    *,
    tokens: int | None,
    out_features: int,
    in_features: int,
    packing: Packing,
    dtype: str,
    out_dtype: str,
) -> tirx.PrimFunc:
    """`(x [n,K], words, scale[, zero]) -> x @ w.T [n,N]` for CPUs.

    Float32 accumulation, parallel over rows; a unit of the weight is unpacked once for up to eight
    tokens.
    """
    n = extent(tokens)
    tile = min(tokens or TOKEN_TILE, TOKEN_TILE)
    unit, per_word, group = packing.unit, packing.per_word, packing.group
    lanes = lanes_for(unit)
    words_shape = (out_features, in_features // per_word)
    scale_shape = (out_features, in_features // group)
    zeros = packing.zeros

    @T.inline
    def body(x, words, scale, zero, out):
        for o in T.parallel(out_features):
            acc = T.alloc_buffer((tile, lanes), "float32", scope="local")
            row = T.alloc_buffer((unit,), "float32", scope="local")
            for t0 in T.serial(T.ceildiv(n, tile)):
                for t in T.unroll(tile):
                    for l in T.vectorized(lanes):
                        acc[t, l] = T.float32(0)
                for u in T.serial(in_features // unit):
                    factor: T.let[T.float32] = scale_of(scale[o, u * unit // group], packing)
                    origin: T.let[T.float32] = (
                        T.cast(zero[o, u * unit // group], "float32") if zeros else T.float32(0)
                    )
                    for i in T.unroll(unit // per_word):
                        for l in T.vectorized(per_word):
                            row[i * per_word + l] = factor * (
                                element(words[o, u * (unit // per_word) + i], l, packing) - origin
                            )
                    for c in T.unroll(unit // lanes):
                        for t in T.unroll(tile):
                            for l in T.vectorized(lanes):
                                acc[t, l] = acc[t, l] + row[c * lanes + l] * T.cast(
                                    x[T.min(t0 * tile + t, n - 1), u * unit + c * lanes + l],
                                    "float32",
                                )
                for t in T.serial(tile):
                    if t0 * tile + t < n:
                        total: T.float32 = T.float32(0)
                        for l in T.serial(lanes):
                            total = total + acc[t, l]
                        out[t0 * tile + t, o] = T.cast(total, out_dtype)

    if zeros:

        @T.prim_func(s_tir=True)
        def quantized_matmul_zeros_cpu(
            x_h: T.handle, words_h: T.handle, scale_h: T.handle, zero_h: T.handle, out_h: T.handle
        ):
            T.func_attr(SCHEDULED)
            x = T.match_buffer(x_h, (n, in_features), dtype)
            words = T.match_buffer(words_h, words_shape, "uint32")
            scale = T.match_buffer(scale_h, scale_shape, packing.scale_dtype)
            zero = T.match_buffer(zero_h, scale_shape, packing.scale_dtype)
            out = T.match_buffer(out_h, (n, out_features), out_dtype)
            with T.sblock("root"):
                T.reads()
                T.writes()
                body(x, words, scale, zero, out)

        return quantized_matmul_zeros_cpu

    @T.prim_func(s_tir=True)
    def quantized_matmul_cpu(x_h: T.handle, words_h: T.handle, scale_h: T.handle, out_h: T.handle):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (n, in_features), dtype)
        words = T.match_buffer(words_h, words_shape, "uint32")
        scale = T.match_buffer(scale_h, scale_shape, packing.scale_dtype)
        out = T.match_buffer(out_h, (n, out_features), out_dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            body(x, words, scale, scale, out)

    return quantized_matmul_cpu


def quantized_take(
    *,
    tokens: int | None,
    vocab_rows: int,
    features: int,
    packing: Packing,
    dtype: str,
    target: Any,
) -> tirx.PrimFunc:
    """Rows of a quantized embedding whose vocabulary is split over the ranks.

    `(words, scale[, zero], ids [n] i32, rank [1] i32) -> [n,F]`: row `ids[t] - rank * vocab_rows`
    where this rank holds it, zeros where another does.
    """
    n = extent(tokens)
    gpu = is_gpu(target)
    per_word, group = packing.per_word, packing.group
    words_of_row = features // per_word
    threads = 128 if gpu else 1
    words_shape = (vocab_rows, words_of_row)
    scale_shape = (vocab_rows, features // group)
    zeros = packing.zeros

    @T.inline
    def body(words, scale, zero, ids, rank, out):
        for t in for_blocks(n, gpu):
            for tid in for_threads(threads, gpu):
                row: T.int32 = ids[t] - rank[0] * vocab_rows
                inside: T.let[T.bool] = row >= 0 and row < vocab_rows
                # An address is formed in any case, so it must lie inside the table.
                safe: T.let[T.int32] = T.if_then_else(inside, row, 0)
                for i in T.serial((words_of_row + threads - 1 - tid) // threads):
                    word: T.uint32 = words[safe, tid + i * threads]
                    at: T.let[T.int32] = (tid + i * threads) * per_word // group
                    factor: T.let[T.float32] = scale_of(scale[safe, at], packing)
                    origin: T.let[T.float32] = (
                        T.cast(zero[safe, at], "float32") if zeros else T.float32(0)
                    )
                    for l in T.unroll(per_word):
                        out[t, (tid + i * threads) * per_word + l] = T.if_then_else(
                            inside,
                            T.cast((element(word, l, packing) - origin) * factor, dtype),
                            T.cast(0, dtype),
                        )

    if zeros:

        @T.prim_func(s_tir=True)
        def quantized_take_zeros(
            words_h: T.handle,
            scale_h: T.handle,
            zero_h: T.handle,
            ids_h: T.handle,
            rank_h: T.handle,
            out_h: T.handle,
        ):
            T.func_attr(SCHEDULED)
            words = T.match_buffer(words_h, words_shape, "uint32")
            scale = T.match_buffer(scale_h, scale_shape, packing.scale_dtype)
            zero = T.match_buffer(zero_h, scale_shape, packing.scale_dtype)
            ids = T.match_buffer(ids_h, (n,), "int32")
            rank = T.match_buffer(rank_h, (1,), "int32")
            out = T.match_buffer(out_h, (n, features), dtype)
            with T.sblock("root"):
                T.reads()
                T.writes()
                body(words, scale, zero, ids, rank, out)

        return quantized_take_zeros

    @T.prim_func(s_tir=True)
    def quantized_take(
        words_h: T.handle, scale_h: T.handle, ids_h: T.handle, rank_h: T.handle, out_h: T.handle
    ):
        T.func_attr(SCHEDULED)
        words = T.match_buffer(words_h, words_shape, "uint32")
        scale = T.match_buffer(scale_h, scale_shape, packing.scale_dtype)
        ids = T.match_buffer(ids_h, (n,), "int32")
        rank = T.match_buffer(rank_h, (1,), "int32")
        out = T.match_buffer(out_h, (n, features), dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            body(words, scale, scale, ids, rank, out)

    return quantized_take


def dequantize(
    *,
    out_features: int,
    in_features: int,
    packing: Packing,
    dtype: str,
    target: Any = "cuda",
) -> tirx.PrimFunc:
    """`(words, scale[, zero]) -> w [N,K]`, for a matrix product of many tokens."""
    gpu = is_gpu(target)
    per_word, group = packing.per_word, packing.group
    words_of_row = in_features // per_word
    threads = 256 if gpu else 1
    per_block = threads * 4 if gpu else words_of_row
    blocks = -(-out_features * words_of_row // per_block)
    words_shape = (out_features, words_of_row)
    scale_shape = (out_features, in_features // group)
    zeros = packing.zeros
    # Eight codes of two bytes are one store; ten, or four bytes each, are not.
    store = min(per_word, 16 // (2 if dtype == "float16" else 4)) if per_word != 10 else 1

    @T.inline
    def body(words, scale, zero, out):
        for block in for_blocks(blocks, gpu):
            for tid in for_threads(threads, gpu):
                unpacked = T.alloc_buffer((per_word,), dtype, scope="local")
                for i in T.serial(per_block // threads):
                    # Element offsets of a large vocabulary pass 2 ** 31.
                    at: T.let[T.int64] = T.cast(block, "int64") * per_block + i * threads + tid
                    if at < out_features * words_of_row:
                        row: T.let[T.int64] = at // words_of_row
                        column: T.let[T.int64] = at % words_of_row
                        word: T.uint32 = words[row, column]
                        factor: T.let[T.float32] = scale_of(
                            scale[row, column * per_word // group], packing
                        )
                        origin: T.let[T.float32] = (
                            T.cast(zero[row, column * per_word // group], "float32")
                            if zeros
                            else T.float32(0)
                        )
                        for l in T.unroll(per_word):
                            unpacked[l] = T.cast(
                                (element(word, l, packing) - origin) * factor, dtype
                            )
                        for part in T.unroll(per_word // store):
                            for l in T.vectorized(store):
                                out[row, column * per_word + part * store + l] = unpacked[
                                    part * store + l
                                ]

    if zeros:

        @T.prim_func(s_tir=True)
        def dequantize_zeros(
            words_h: T.handle, scale_h: T.handle, zero_h: T.handle, out_h: T.handle
        ):
            T.func_attr(SCHEDULED)
            words = T.match_buffer(words_h, words_shape, "uint32")
            scale = T.match_buffer(scale_h, scale_shape, packing.scale_dtype)
            zero = T.match_buffer(zero_h, scale_shape, packing.scale_dtype)
            out = T.match_buffer(out_h, (out_features, in_features), dtype)
            with T.sblock("root"):
                T.reads()
                T.writes()
                body(words, scale, zero, out)

        return dequantize_zeros

    @T.prim_func(s_tir=True)
    def dequantize(words_h: T.handle, scale_h: T.handle, out_h: T.handle):
        T.func_attr(SCHEDULED)
        words = T.match_buffer(words_h, words_shape, "uint32")
        scale = T.match_buffer(scale_h, scale_shape, packing.scale_dtype)
        out = T.match_buffer(out_h, (out_features, in_features), dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            body(words, scale, scale, out)

    return dequantize


def quantized_gemv(
    *,
    batch: int,
    out_features: int,
    in_features: int,
    packing: Packing,
    dtype: str,
    out_dtype: str,
    target: Any = "cuda",
) -> tirx.PrimFunc:
    """`(x [b,K], words, scale[, zero]) -> x @ w.T [b,N]` for 1 to 8 tokens on a GPU.

    A warp takes one or two rows; each lane reads units of up to sixteen bytes that lie side by side
    over the warp, and shares its reading of x between them. Sums are in float32, a unit's before
    its scale is applied.
    """
    unit, per_word, group = packing.unit, packing.per_word, packing.group
    warp = warp_size_of(target)
    rows = 2 if batch <= 4 else 1
    load = unit // per_word  # words of a unit
    units = in_features // unit
    # Elements of x read at once: sixteen bytes, where a unit has them.
    pieces = 2 if unit % 8 else 8 if dtype == "float16" else 4
    threads = WARPS * warp
    blocks = -(-out_features // (WARPS * rows))
    words_shape = (out_features, in_features // per_word)
    scale_shape = (out_features, in_features // group)
    zeros = packing.zeros

    def row_read(row: Any) -> Any:
        row = T.min(row, out_features - 1)
        # The largest vocabularies have more elements than an int32 counts.
        return T.cast(row, "int64") if out_features * in_features >= 2**31 else row

    @T.inline
    def body(x, words, scale, zero, out):
        for block in T.thread_binding(blocks, thread="blockIdx.x"):
            for tid in T.thread_binding(threads, thread="threadIdx.x"):
                read = T.alloc_buffer((rows * load,), "uint32", scope="local")
                factor = T.alloc_buffer((rows,), "float32", scope="local")
                origin = T.alloc_buffer((rows,), "float32", scope="local")
                code = T.alloc_buffer((rows * pieces,), "float32", scope="local")
                xs = T.alloc_buffer((pieces,), dtype, scope="local")
                part = T.alloc_buffer((rows * batch,), "float32", scope="local")
                acc = T.alloc_buffer((rows * batch,), "float32", scope="local")
                row0: T.let[T.int32] = (block * WARPS + tid // warp) * rows
                for i in T.unroll(rows * batch):
                    acc[i] = T.float32(0)
                for it in T.serial((units + warp - 1 - tid % warp) // warp):
                    u: T.let[T.int32] = it * warp + tid % warp
                    for r in T.unroll(rows):
                        for w in T.vectorized(load):
                            read[r * load + w] = words[row_read(row0 + r), u * load + w]
                        factor[r] = scale_of(scale[row_read(row0 + r), u * unit // group], packing)
                        if zeros:
                            origin[r] = T.cast(
                                zero[row_read(row0 + r), u * unit // group], "float32"
                            )
                    for i in T.unroll(rows * batch):
                        part[i] = T.float32(0)
                    for p in T.unroll(unit // pieces):
                        for r in T.unroll(rows):
                            for e in T.unroll(pieces):
                                code[r * pieces + e] = element(
                                    read[r * load + (p * pieces + e) // per_word],
                                    (p * pieces + e) % per_word,
                                    packing,
                                )
                                if zeros:
                                    code[r * pieces + e] = code[r * pieces + e] - origin[r]
                        for b in T.unroll(batch):
                            for e in T.vectorized(pieces):
                                xs[e] = x[b, u * unit + p * pieces + e]
                            for r in T.unroll(rows):
                                for e in T.unroll(pieces):
                                    part[r * batch + b] = part[r * batch + b] + code[
                                        r * pieces + e
                                    ] * T.cast(xs[e], "float32")
                    for r in T.unroll(rows):
                        for b in T.unroll(batch):
                            acc[r * batch + b] = (
                                acc[r * batch + b] + part[r * batch + b] * factor[r]
                            )
                for i in T.unroll(rows * batch):
                    for s in T.unroll(warp.bit_length() - 1):
                        acc[i] = acc[i] + shuffle_xor(acc[i], T.shift_right(warp // 2, s), warp)
                for r in T.unroll(rows):
                    for b in T.unroll(batch):
                        if tid % warp == (r * batch + b) % warp and row0 + r < out_features:
                            out[b, row0 + r] = T.cast(acc[r * batch + b], out_dtype)

    if zeros:

        @T.prim_func(s_tir=True)
        def quantized_gemv_zeros(
            x_h: T.handle, words_h: T.handle, scale_h: T.handle, zero_h: T.handle, out_h: T.handle
        ):
            T.func_attr(SCHEDULED)
            x = T.match_buffer(x_h, (batch, in_features), dtype)
            words = T.match_buffer(words_h, words_shape, "uint32")
            scale = T.match_buffer(scale_h, scale_shape, packing.scale_dtype)
            zero = T.match_buffer(zero_h, scale_shape, packing.scale_dtype)
            out = T.match_buffer(out_h, (batch, out_features), out_dtype)
            with T.sblock("root"):
                T.reads()
                T.writes()
                body(x, words, scale, zero, out)

        return quantized_gemv_zeros

    @T.prim_func(s_tir=True)
    def quantized_gemv(x_h: T.handle, words_h: T.handle, scale_h: T.handle, out_h: T.handle):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (batch, in_features), dtype)
        words = T.match_buffer(words_h, words_shape, "uint32")
        scale = T.match_buffer(scale_h, scale_shape, packing.scale_dtype)
        out = T.match_buffer(out_h, (batch, out_features), out_dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            body(x, words, scale, scale, out)

    return quantized_gemv
