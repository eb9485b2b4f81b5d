# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Products with the experts that a router chose, and the choice itself.

Slot s of `n * top` is choice `s % top` of token `s // top`. A weight `[experts * rows, cols]` is
three tensors in any format of `packing`: words, scales and zero points. In place of those that a
format does not have stands the one before, which is not read; a plain weight (no packing) stands
there three times. Only experts that are `biased` have a bias, float32 `[experts * rows, 1]`; for
others the rank stands in its place. The experts of a rank are those from `rank * experts` on. Slots
of others are skipped: what is written of them is not read, and in the sum they are zero.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from shardwright.compiler.packing import Packing

from .common import (
    SCHEDULED,
    clamped_swiglu,
    element,
    extent,
    for_blocks,
    for_threads,
    is_gpu,
    lanes_for,
    scale_of,
    shuffle_xor,
    silu_mul,
    warp_size_of,
)

TILE = 64  # slots and rows of a block of `experts_grouped`
STEP = 32  # columns it has in shared memory at a time
THREADS = 256


def route(
    *, tokens: int | None, experts: int, top: int, normalize: bool, target: Any
) -> tirx.PrimFunc:
    """The `top` most likely experts: `scores [n,E] f32 -> (ids [n,top] i32, weights [n,top] f32)`.

    Weights are softmax probabilities over all experts, with `normalize` over those chosen. Of equal
    scores the first wins. One thread per token: a row is short.
    """
    n = extent(tokens)
    gpu = is_gpu(target)
    threads = 32 if gpu else 1

    @T.prim_func(s_tir=True)
    def route(scores_h: T.handle, ids_h: T.handle, weights_h: T.handle):
        T.func_attr(SCHEDULED)
        scores = T.match_buffer(scores_h, (n, experts), "float32")
        ids = T.match_buffer(ids_h, (n, top), "int32")
        weights = T.match_buffer(weights_h, (n, top), "float32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for block in for_blocks((n + threads - 1) // threads, gpu):
                for tid in for_threads(threads, gpu):
                    if block * threads + tid < n:
                        t = T.meta_var(block * threads + tid)
                        chosen = T.alloc_buffer((top,), "float32", scope="local")
                        highest: T.float32 = T.float32(-3.0e38)
                        for e in T.serial(experts):
                            highest = T.max(highest, scores[t, e])
                        mass: T.float32 = T.float32(0)
                        for e in T.serial(experts):
                            mass = mass + T.exp(scores[t, e] - highest)
                        total: T.float32 = T.float32(0)
                        # The next is the largest that comes after the one before: smaller, or
                        # equal and further on.
                        last: T.float32 = T.float32(3.0e38)
                        last_id: T.int32 = -1
                        for k in T.serial(top):
                            best: T.float32 = T.float32(-3.0e38)
                            best_id: T.int32 = 0
                            for e in T.serial(experts):
                                if scores[t, e] > best and (
                                    scores[t, e] < last or (scores[t, e] == last and e > last_id)
                                ):
                                    best = scores[t, e]
                                    best_id = e
                            last = best
                            last_id = best_id
                            ids[t, k] = best_id
                            chosen[k] = T.exp(best - highest)
                            total = total + chosen[k]
                        for k in T.serial(top):
                            weights[t, k] = chosen[k] / (total if normalize else mass)

    return route


Buffer = tuple[tuple[int, ...], str]


def _buffers(rows: int, cols: int, packing: Packing | None, dtype: str) -> list[Buffer]:
    """Shapes and dtypes of the three tensors of a weight `[rows, cols]`."""
    if packing is None:
        return [((rows, cols), dtype)] * 3
    side = ((rows, cols // packing.group), packing.scale_dtype)
    return [((rows, cols // packing.per_word), "uint32"), side, side]


def _bias_buffer(rows: int, biased: bool) -> Buffer:
    return ((rows, 1), "float32") if biased else ((1,), "int32")


def _activation(gate: Any, up: Any, dtype: str, alpha: float, limit: float) -> Any:
    """What an expert makes of its two products; with a `limit` it is clamped."""
    return clamped_swiglu(gate, up, dtype, alpha, limit) if limit else silu_mul(gate, up, dtype)


def experts_up(
    *,
    tokens: int | None,
    top: int,
    experts: int,
    rows: int,
    cols: int,
    packing: Packing | None,
    dtype: str,
    target: Any,
    biased: bool = False,
    alpha: float = 0.0,
    limit: float = 0.0,
) -> tirx.PrimFunc:
    """The gated product of each slot: `silu(x @ gate.T) * (x @ up.T)`.

    `(x [n,cols], gate (3), up (3), gate_bias, up_bias, ids [n,top] i32, rank [1] i32) ->
    h [n*top, rows]`. With a `limit` the activation is `common.clamped_swiglu`. On a GPU for few
    tokens: a warp takes a row of both weights.
    """
    n = extent(tokens)
    gpu = is_gpu(target)
    warp = warp_size_of(target)
    per_block = THREADS // warp if gpu else 1
    words, scales, zeros = _buffers(experts * rows, cols, packing, dtype)
    bias = _bias_buffer(experts * rows, biased)
    unit = _unit(cols, packing, gpu, dtype)

    @T.prim_func(s_tir=True)
    def experts_up(
        x_h: T.handle,
        gate_h: T.handle,
        gate_scale_h: T.handle,
        gate_zero_h: T.handle,
        up_h: T.handle,
        up_scale_h: T.handle,
        up_zero_h: T.handle,
        gate_bias_h: T.handle,
        up_bias_h: T.handle,
        ids_h: T.handle,
        rank_h: T.handle,
        h_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (n, cols), dtype)
        gate = T.match_buffer(gate_h, *words)
        gate_scale = T.match_buffer(gate_scale_h, *scales)
        gate_zero = T.match_buffer(gate_zero_h, *zeros)
        up = T.match_buffer(up_h, *words)
        up_scale = T.match_buffer(up_scale_h, *scales)
        up_zero = T.match_buffer(up_zero_h, *zeros)
        gate_bias = T.match_buffer(gate_bias_h, *bias)
        up_bias = T.match_buffer(up_bias_h, *bias)
        ids = T.match_buffer(ids_h, (n, top), "int32")
        rank = T.match_buffer(rank_h, (1,), "int32")
        h = T.match_buffer(h_h, (n * top, rows), dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            for slot in _slots(n * top, gpu):
                for block in _each(T.ceildiv(rows, per_block), gpu):
                    for tid in for_threads(THREADS, gpu):
                        expert: T.let[T.int32] = ids[slot // top, slot % top] - rank[0] * experts
                        row: T.let[T.int32] = T.cast(block * per_block + tid // warp, "int32")
                        if expert >= 0 and expert < experts and row < rows:
                            a = T.alloc_buffer((unit,), "float32", scope="local")
                            b = T.alloc_buffer((unit,), "float32", scope="local")
                            _dot(x, slot // top, gate, gate_scale, gate_zero, expert * rows + row,
                                 a, tid % warp, warp, cols, unit, packing, dtype)  # fmt: skip
                            _dot(x, slot // top, up, up_scale, up_zero, expert * rows + row,
                                 b, tid % warp, warp, cols, unit, packing, dtype)  # fmt: skip
                            g: T.float32 = T.float32(0)
                            u: T.float32 = T.float32(0)
                            for i in T.unroll(unit):
                                g = g + a[i]
                                u = u + b[i]
                            for s in T.unroll(warp.bit_length() - 1):
                                g = g + shuffle_xor(g, T.shift_right(warp // 2, s), warp)
                                u = u + shuffle_xor(u, T.shift_right(warp // 2, s), warp)
                            if tid % warp == 0:
                                if biased:
                                    g = g + gate_bias[expert * rows + row, 0]
                                    u = u + up_bias[expert * rows + row, 0]
                                h[slot, row] = _activation(g, u, dtype, alpha, limit)

    return experts_up


def experts_down(
    *,
    tokens: int | None,
    top: int,
    experts: int,
    rows: int,
    cols: int,
    packing: Packing | None,
    dtype: str,
    target: Any,
    biased: bool = False,
    split: bool = False,
) -> tirx.PrimFunc:
    """The weighted sum of the slots' products: `sum over k of weights[:, k] * (h @ down.T)`.

    `(h [n*top,cols], down (3), bias, ids [n,top] i32, weights [n,top] f32, rank [1] i32) ->
    out [n, rows]`; as `experts_up`. With `split` every rank has a part of all experts, and only
    rank 0 adds their biases.
    """
    n = extent(tokens)
    gpu = is_gpu(target)
    warp = warp_size_of(target)
    per_block = THREADS // warp if gpu else 1
    words, scales, zeros = _buffers(experts * rows, cols, packing, dtype)
    biases = _bias_buffer(experts * rows, biased)
    unit = _unit(cols, packing, gpu, dtype)

    @T.prim_func(s_tir=True)
    def experts_down(
        h_h: T.handle,
        down_h: T.handle,
        down_scale_h: T.handle,
        down_zero_h: T.handle,
        bias_h: T.handle,
        ids_h: T.handle,
        weights_h: T.handle,
        rank_h: T.handle,
        out_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        h = T.match_buffer(h_h, (n * top, cols), dtype)
        down = T.match_buffer(down_h, *words)
        down_scale = T.match_buffer(down_scale_h, *scales)
        down_zero = T.match_buffer(down_zero_h, *zeros)
        bias = T.match_buffer(bias_h, *biases)
        ids = T.match_buffer(ids_h, (n, top), "int32")
        weights = T.match_buffer(weights_h, (n, top), "float32")
        rank = T.match_buffer(rank_h, (1,), "int32")
        out = T.match_buffer(out_h, (n, rows), dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            for t in _slots(n, gpu):
                for block in _each(T.ceildiv(rows, per_block), gpu):
                    for tid in for_threads(THREADS, gpu):
                        row: T.let[T.int32] = T.cast(block * per_block + tid // warp, "int32")
                        if row < rows:
                            a = T.alloc_buffer((unit,), "float32", scope="local")
                            total: T.float32 = T.float32(0)
                            for k in T.serial(top):
                                expert: T.let[T.int32] = ids[t, k] - _first(rank, experts, split)
                                if expert >= 0 and expert < experts:
                                    _dot(h, t * top + k, down, down_scale, down_zero,
                                         expert * rows + row, a, tid % warp, warp, cols, unit,
                                         packing, dtype)  # fmt: skip
                                    for i in T.unroll(unit):
                                        total = total + weights[t, k] * a[i]
                            for s in T.unroll(warp.bit_length() - 1):
                                total = total + shuffle_xor(
                                    total, T.shift_right(warp // 2, s), warp
                                )
                            if tid % warp == 0:
                                if biased:
                                    for k in T.serial(top):
                                        owner: T.let[T.int32] = ids[t, k] - _first(
                                            rank, experts, split
                                        )
                                        if _adds(owner, rank, experts, split):
                                            total = (
                                                total + weights[t, k] * bias[owner * rows + row, 0]
                                            )
                                out[t, row] = T.cast(total, dtype)

    return experts_down


def _first(rank: Any, experts: int, split: bool) -> Any:
    """The first expert of this rank."""
    return T.int32(0) if split else rank[0] * experts


def _adds(expert: Any, rank: Any, experts: int, split: bool) -> Any:
    """Whether this rank adds the bias of its expert number `expert`, which may be another's."""
    return rank[0] == 0 if split else T.And(expert >= 0, expert < experts)


def _unit(cols: int, packing: Packing | None, gpu: bool, dtype: str) -> int:
    """Elements that a thread takes at once: 16 bytes of a weight on a GPU, within one group."""
    if packing is not None:
        return packing.unit
    return lanes_for(cols, (8 if dtype == "float16" else 4) if gpu else 16)


def _slots(count: Any, gpu: bool) -> Any:
    return T.thread_binding(count, thread="blockIdx.x") if gpu else T.serial(count)


def _each(count: Any, gpu: bool) -> Any:
    """Loop over the rows of a weight: threads of a CPU share them."""
    return T.thread_binding(count, thread="blockIdx.y") if gpu else T.parallel(count)


@T.inline
def _dot(x, source_row, weight, scale, zero, row, acc, lane, lanes, cols, unit, packing, dtype):
    """Every thread's part of a row's product with x, spread over `acc`."""
    for i in T.unroll(unit):
        acc[i] = T.float32(0)
    for step in T.serial((cols // unit + lanes - 1 - lane) // lanes):
        first: T.let[T.int32] = T.cast((step * lanes + lane) * unit, "int32")
        if packing is None:
            if lanes == 1:
                for i in T.vectorized(unit):
                    acc[i] = acc[i] + T.cast(weight[row, first + i], "float32") * T.cast(
                        x[source_row, first + i], "float32"
                    )
            else:
                values = T.alloc_buffer((unit,), dtype, scope="local")
                xs = T.alloc_buffer((unit,), dtype, scope="local")
                for i in T.vectorized(unit):
                    values[i] = weight[row, first + i]
                for i in T.vectorized(unit):
                    xs[i] = x[source_row, first + i]
                for i in T.unroll(unit):
                    acc[i] = acc[i] + T.cast(values[i], "float32") * T.cast(xs[i], "float32")
        else:
            factor: T.let[T.float32] = scale_of(scale[row, first // packing.group], packing)
            origin: T.let[T.float32] = (
                T.cast(zero[row, first // packing.group], "float32")
                if packing.zeros
                else T.float32(0)
            )
            if lanes == 1:
                for w in T.unroll(unit // packing.per_word):
                    for i in T.vectorized(packing.per_word):
                        acc[w * packing.per_word + i] = acc[w * packing.per_word + i] + factor * (
                            element(weight[row, first // packing.per_word + w], i, packing) - origin
                        ) * T.cast(x[source_row, first + w * packing.per_word + i], "float32")
            else:
                read = T.alloc_buffer((unit // packing.per_word,), "uint32", scope="local")
                some = T.alloc_buffer((unit,), dtype, scope="local")
                wide = T.meta_var(lanes_for(unit, 8 if dtype == "float16" else 4))
                for i in T.vectorized(unit // packing.per_word):
                    read[i] = weight[row, first // packing.per_word + i]
                for c in T.unroll(unit // wide):
                    for i in T.vectorized(wide):
                        some[c * wide + i] = x[source_row, first + c * wide + i]
                for i in T.unroll(unit):
                    acc[i] = acc[i] + factor * (
                        element(read[i // packing.per_word], i % packing.per_word, packing) - origin
                    ) * T.cast(some[i], "float32")


def expert_order(*, tokens: int | None, top: int, experts: int, target: Any) -> tirx.PrimFunc:
    """Slots by expert: `(ids [n,top] i32, rank [1] i32) -> (order [n*top] i32, begin [E+1] i32)`.

    Expert e has the slots `order[begin[e]]` to `order[begin[e + 1] - 1]`, in ascending order. For
    GPUs; a block for each expert reads all ids.
    """
    n = extent(tokens)

    @T.prim_func(s_tir=True)
    def expert_order(ids_h: T.handle, rank_h: T.handle, order_h: T.handle, begin_h: T.handle):
        T.func_attr(SCHEDULED)
        ids = T.match_buffer(ids_h, (n, top), "int32")
        rank = T.match_buffer(rank_h, (1,), "int32")
        order = T.match_buffer(order_h, (n * top,), "int32")
        begin = T.match_buffer(begin_h, (experts + 1,), "int32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for e in T.thread_binding(experts, thread="blockIdx.x"):
                for tid in T.thread_binding(THREADS, thread="threadIdx.x"):
                    below = T.alloc_buffer((THREADS,), "int32", scope="shared")
                    here = T.alloc_buffer((THREADS,), "int32", scope="shared")
                    # A thread has consecutive slots, so that their order can be kept.
                    slots: T.let[T.int32] = T.cast(n * top, "int32")
                    each: T.let[T.int32] = (slots + THREADS - 1) // THREADS
                    last: T.let[T.int32] = T.min(tid * each + each, slots)
                    count: T.let[T.int32] = T.max(last - tid * each, 0)
                    less: T.int32 = 0
                    equal: T.int32 = 0
                    for i in T.serial(count):
                        s = T.meta_var(tid * each + i)
                        id: T.let[T.int32] = ids[s // top, s % top] - rank[0] * experts
                        if id >= 0 and id < e:
                            less = less + 1
                        if id == e:
                            equal = equal + 1
                    below[tid] = less
                    here[tid] = equal
                    T.tvm_storage_sync("shared")
                    start: T.int32 = 0
                    before: T.int32 = 0
                    total: T.int32 = 0
                    for j in T.serial(THREADS):
                        start = start + below[j]
                        if j < tid:
                            before = before + here[j]
                        total = total + here[j]
                    if tid == 0:
                        begin[e] = start
                        if e == experts - 1:
                            begin[experts] = start + total
                    place: T.int32 = start + before
                    for i in T.serial(count):
                        s = T.meta_var(tid * each + i)
                        if ids[s // top, s % top] - rank[0] * experts == e:
                            order[place] = s
                            place = place + 1

    return expert_order


def experts_grouped(
    *,
    tokens: int | None,
    top: int,
    experts: int,
    rows: int,
    cols: int,
    packing: Packing | None,
    dtype: str,
    gated: bool,
    target: Any,
    biased: bool = False,
    alpha: float = 0.0,
    limit: float = 0.0,
) -> tirx.PrimFunc:
    """Products of many slots at once, those of an expert together, for GPUs.

    `(x, w (3), up (3), w_bias, up_bias, order [n*top] i32, begin [E+1] i32) -> y [n*top, rows]`.
    With `gated`, x is [n,cols] and y as in `experts_up`; else x is [n*top,cols], y is `x @ w.T`,
    `up` is w again and not read, and there are no biases. A block has an expert and `TILE` rows of
    its weight, and goes through its slots `TILE` at a time; a thread has 4 x 4 sums, in float32.
    """
    slots = extent(tokens and tokens * top, "slots")
    x_rows = extent(tokens) if gated else slots
    words, scales, zeros = _buffers(experts * rows, cols, packing, dtype)
    bias = _bias_buffer(experts * rows, biased)
    kinds = 2 if gated else 1
    wide = lanes_for(cols, 8 if dtype == "float16" else 4)  # elements read at once
    # Codes that are unpacked together; ten in a word do not divide what a thread takes.
    span = 1 if packing is None or packing.per_word > 8 else packing.per_word

    @T.inline
    def load_weight(source, scale, zero, shared, kind, expert, row, column, at):
        """Eight elements of a row, transposed, to shared memory; zeros past the end."""
        for i in T.unroll(8):
            shared[kind, at % 4 * 8 + i, at // 4] = T.float32(0)
        if packing is None:
            for p in T.unroll(8 // wide):
                if row < rows and column + p * wide < cols:
                    some = T.alloc_buffer((wide,), dtype, scope="local")
                    for i in T.vectorized(wide):
                        some[i] = source[expert * rows + row, column + p * wide + i]
                    for i in T.unroll(wide):
                        shared[kind, at % 4 * 8 + p * wide + i, at // 4] = T.cast(
                            some[i], "float32"
                        )
        else:
            for p in T.unroll(8 // span):
                c = T.meta_var(column + p * span)
                if row < rows and c < cols:
                    word: T.let[T.uint32] = source[expert * rows + row, c // packing.per_word]
                    factor: T.let[T.float32] = scale_of(
                        scale[expert * rows + row, c // packing.group], packing
                    )
                    origin: T.let[T.float32] = (
                        T.cast(zero[expert * rows + row, c // packing.group], "float32")
                        if packing.zeros
                        else T.float32(0)
                    )
                    for i in T.unroll(span):
                        value = T.meta_var(
                            (element(word, c % packing.per_word + i, packing) - origin) * factor
                        )
                        # Rounded as the kernels that unpack to memory round, but for MXFP4.
                        shared[kind, at % 4 * 8 + p * span + i, at // 4] = (
                            value
                            if packing.code == "e2m1"
                            else T.cast(T.cast(value, dtype), "float32")
                        )

    @T.inline
    def load_x(x, shared, order, first, end, column, at):
        for i in T.unroll(8):
            shared[at % 4 * 8 + i, at // 4] = T.float32(0)
        if first + at // 4 < end:
            source: T.let[T.int32] = order[first + at // 4] // (top if gated else 1)
            for p in T.unroll(8 // wide):
                if column + p * wide < cols:
                    some = T.alloc_buffer((wide,), dtype, scope="local")
                    for i in T.vectorized(wide):
                        some[i] = x[source, column + p * wide + i]
                    for i in T.unroll(wide):
                        shared[at % 4 * 8 + p * wide + i, at // 4] = T.cast(some[i], "float32")

    @T.prim_func(s_tir=True)
    def experts_grouped(
        x_h: T.handle,
        w_h: T.handle,
        w_scale_h: T.handle,
        w_zero_h: T.handle,
        up_h: T.handle,
        up_scale_h: T.handle,
        up_zero_h: T.handle,
        w_bias_h: T.handle,
        up_bias_h: T.handle,
        order_h: T.handle,
        begin_h: T.handle,
        y_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (x_rows, cols), dtype)
        w = T.match_buffer(w_h, *words)
        w_scale = T.match_buffer(w_scale_h, *scales)
        w_zero = T.match_buffer(w_zero_h, *zeros)
        up = T.match_buffer(up_h, *words)
        up_scale = T.match_buffer(up_scale_h, *scales)
        up_zero = T.match_buffer(up_zero_h, *zeros)
        w_bias = T.match_buffer(w_bias_h, *bias)
        up_bias = T.match_buffer(up_bias_h, *bias)
        order = T.match_buffer(order_h, (slots,), "int32")
        begin = T.match_buffer(begin_h, (experts + 1,), "int32")
        y = T.match_buffer(y_h, (slots, rows), dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            for e in T.thread_binding(experts, thread="blockIdx.x"):
                for block in T.thread_binding((rows + TILE - 1) // TILE, thread="blockIdx.y"):
                    for tid in T.thread_binding(THREADS, thread="threadIdx.x"):
                        xs = T.alloc_buffer((STEP, TILE), "float32", scope="shared")
                        ws = T.alloc_buffer((kinds, STEP, TILE), "float32", scope="shared")
                        acc = T.alloc_buffer((kinds * 16,), "float32", scope="local")
                        a = T.alloc_buffer((4,), "float32", scope="local")
                        b = T.alloc_buffer((4,), "float32", scope="local")
                        end: T.let[T.int32] = begin[e + 1]
                        tiles: T.let[T.int32] = (end - begin[e] + TILE - 1) // TILE
                        for tile in T.serial(tiles):
                            first: T.let[T.int32] = begin[e] + tile * TILE
                            for i in T.unroll(kinds * 16):
                                acc[i] = T.float32(0)
                            for step in T.serial((cols + STEP - 1) // STEP):
                                column: T.let[T.int32] = step * STEP + tid % 4 * 8
                                T.tvm_storage_sync("shared")
                                load_x(x, xs, order, first, end, column, tid)
                                load_weight(w, w_scale, w_zero, ws, 0, e,
                                            block * TILE + tid // 4, column, tid)  # fmt: skip
                                if gated:
                                    load_weight(up, up_scale, up_zero, ws, 1, e,
                                                block * TILE + tid // 4, column,
                                                tid)  # fmt: skip
                                T.tvm_storage_sync("shared")
                                for c in T.serial(STEP):
                                    for i in T.vectorized(4):
                                        a[i] = xs[c, tid // 16 * 4 + i]
                                    for kind in T.unroll(kinds):
                                        for j in T.vectorized(4):
                                            b[j] = ws[kind, c, tid % 16 * 4 + j]
                                        for i in T.unroll(4):
                                            for j in T.unroll(4):
                                                acc[kind * 16 + i * 4 + j] = (
                                                    acc[kind * 16 + i * 4 + j] + a[i] * b[j]
                                                )
                            for i in T.unroll(4):
                                if first + tid // 16 * 4 + i < end:
                                    slot: T.let[T.int32] = order[first + tid // 16 * 4 + i]
                                    for j in T.unroll(4):
                                        row = T.meta_var(block * TILE + tid % 16 * 4 + j)
                                        if row < rows:
                                            g: T.float32 = acc[i * 4 + j]
                                            if gated:
                                                u: T.float32 = acc[(kinds - 1) * 16 + i * 4 + j]
                                                if biased:
                                                    g = g + w_bias[e * rows + row, 0]
                                                    u = u + up_bias[e * rows + row, 0]
                                                y[slot, row] = _activation(
                                                    g, u, dtype, alpha, limit
                                                )
                                            else:
                                                y[slot, row] = T.cast(g, dtype)

    return experts_grouped


def experts_sum(
    *,
    tokens: int | None,
    top: int,
    experts: int,
    features: int,
    dtype: str,
    target: Any,
    biased: bool = False,
    split: bool = False,
) -> tirx.PrimFunc:
    """The weighted sum over the slots of a token that this rank has an expert for, for GPUs.

    `(y [n*top,F], bias, ids [n,top] i32, weights [n,top] f32, rank [1] i32) -> out [n,F]`, with
    biases as in `experts_down`.
    """
    n = extent(tokens)
    biases = _bias_buffer(experts * features, biased)

    @T.prim_func(s_tir=True)
    def experts_sum(
        y_h: T.handle,
        bias_h: T.handle,
        ids_h: T.handle,
        weights_h: T.handle,
        rank_h: T.handle,
        out_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        y = T.match_buffer(y_h, (n * top, features), dtype)
        bias = T.match_buffer(bias_h, *biases)
        ids = T.match_buffer(ids_h, (n, top), "int32")
        weights = T.match_buffer(weights_h, (n, top), "float32")
        rank = T.match_buffer(rank_h, (1,), "int32")
        out = T.match_buffer(out_h, (n, features), dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            for t in T.thread_binding(n, thread="blockIdx.x"):
                for tid in T.thread_binding(THREADS, thread="threadIdx.x"):
                    for i in T.serial((features + THREADS - 1 - tid) // THREADS):
                        total: T.float32 = T.float32(0)
                        for k in T.serial(top):
                            expert: T.let[T.int32] = ids[t, k] - _first(rank, experts, split)
                            if expert >= 0 and expert < experts:
                                value: T.float32 = T.cast(
                                    y[t * top + k, i * THREADS + tid], "float32"
                                )
                                if biased:
                                    if _adds(expert, rank, experts, split):
                                        value = (
                                            value + bias[expert * features + i * THREADS + tid, 0]
                                        )
                                total = total + weights[t, k] * value
                        out[t, i * THREADS + tid] = T.cast(total, dtype)

    return experts_sum
