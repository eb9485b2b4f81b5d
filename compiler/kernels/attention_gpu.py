# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Attention over the paged cache for GPUs.

A row's context is cut into `splits` contiguous pieces, so that a single sequence fills the GPU.
`attention_partial` gives each piece's unnormalised sum, maximum and mass; `attention_combine` joins
them. With one piece (`attention_prefill`) there is nothing to join.

A group of threads holds one position of the cache at a time, 16 bytes of it each, and applies it to
all query heads that share the kv head. Each such group keeps an online softmax of its own; they are
joined once, at the end of the piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from shardwright.errors import UsageError

from .common import SCHEDULED, extent, lanes_for, shuffle_xor, warp_size_of, window_start

WARPS = 4  # of a block
FULL_GPU = 396  # blocks that keep a large GPU busy: three for each of 132 multiprocessors
MAX_SPLITS = 64
MAX_QUERIES = 8  # query heads whose sums fit into a thread's registers
LOWEST = -1.0e30  # finite, so that the difference of two of them is 0 and not NaN
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Tiling:
    """How a block covers positions, the head dimension and a group of query heads.

    `lanes` threads hold one position, `width` elements each, loaded `load` at a time; a warp holds
    `per_warp` positions at once, and takes `unroll` of them before it updates its softmax. A group
    of query heads is cut into `parts` of at most `queries` each.
    """

    load: int
    width: int
    lanes: int
    per_warp: int
    unroll: int
    queries: int
    parts: int

    @property
    def step(self) -> int:
        """Positions that a block takes at once."""
        return WARPS * self.per_warp * self.unroll


def tiling(*, group: int, head_dim: int, dtype: str, warp: int) -> Tiling:
    """The tiling for `group` query heads to a kv head; UsageError for odd head dimensions."""
    load = lanes_for(head_dim, 8 if dtype == "float16" else 4)
    width = load
    while head_dim > width * warp:
        width *= 2
    if load == 1 or head_dim % width or width > 16:
        raise UsageError(
            f"attention of head_dim {head_dim} has no GPU kernel; use a multiple of 8 up to 512"
        )
    lanes = 1
    while lanes * width < head_dim:
        lanes *= 2
    parts = -(-group // MAX_QUERIES)
    queries = -(-group // parts)
    # More positions in flight, where the queries leave registers for them.
    unroll = 4 if queries * width <= 32 else 2
    return Tiling(load, width, lanes, warp // lanes, unroll, queries, parts)


def num_splits(*, tokens: int, kv_heads: int, max_len: int) -> int:
    """Pieces to cut a context of up to `max_len` into, so that `tokens` at once fill the GPU."""
    wanted = -(-FULL_GPU // (tokens * kv_heads))
    return max(1, min(wanted, MAX_SPLITS, -(-max_len // 16)))


def _piece(length: Any, splits: int, step: int) -> Any:
    """Positions in a piece: a multiple of the block's step, at least one step."""
    return T.max((length + splits * step - 1) // (splits * step), 1) * step


def _attention(
    *,
    tokens: int | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    layers: int,
    pages: int,
    page_size: int,
    batch: int | None,
    max_pages: int,
    dtype: str,
    scale: float,
    splits: int,
    whole: bool,
    target: Any,
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
) -> tirx.PrimFunc:
    n = extent(tokens)
    # Scores are to base 2; those to be capped come as what tanh takes.
    query_scale = scale / softcap if softcap else scale * LOG2E
    warp = warp_size_of(target)
    group = heads // kv_heads
    tile = tiling(group=group, head_dim=head_dim, dtype=dtype, warp=warp)
    load, width, lanes, per_warp = tile.load, tile.width, tile.lanes, tile.per_warp
    unroll, queries, parts, step = tile.unroll, tile.queries, tile.parts, tile.step
    slots = WARPS * per_warp
    threads = WARPS * warp
    cache = (layers, pages, kv_heads, page_size, head_dim)

    @T.inline
    def load_position(registers, u, source, layer, page, head, slot, lane):
        if (lane + 1) * width <= head_dim:
            for c in T.unroll(width // load):
                for e in T.vectorized(load):
                    registers[u * width + c * load + e] = source[
                        layer, page, head, slot, lane * width + c * load + e
                    ]

    @T.inline
    def attend(q, k_pages, v_pages, page_table, rows, t, layer, kv_head, part, begin, end, tid,
               total, highest, acc):  # fmt: skip
        """Every thread's own softmax over the positions begin..end-1 that it meets."""
        query = T.alloc_buffer((queries * width,), "float32", scope="local")
        keys = T.alloc_buffer((unroll * width,), dtype, scope="local")
        values = T.alloc_buffer((unroll * width,), dtype, scope="local")
        score = T.alloc_buffer((unroll * queries,), "float32", scope="local")
        slot_of_block: T.let[T.int32] = tid // lanes
        lane: T.let[T.int32] = tid % lanes
        for g in T.unroll(queries):
            highest[g] = T.float32(LOWEST)
            total[g] = T.float32(0)
            for e in T.unroll(width):
                acc[g * width + e] = T.float32(0)
                query[g * width + e] = T.float32(0)
        for e in T.unroll(unroll * width):
            keys[e] = T.cast(0, dtype)
            values[e] = T.cast(0, dtype)
        if (lane + 1) * width <= head_dim:
            for g in T.unroll(queries):
                for e in T.unroll(width):
                    query[g * width + e] = T.cast(
                        q[
                            t,
                            kv_head * group + T.min(part * queries + g, group - 1),
                            lane * width + e,
                        ],
                        "float32",
                    ) * T.float32(query_scale)
        for it in T.serial((end - begin + step - 1) // step):
            for u in T.unroll(unroll):
                # Past the end, read the last position again and give it no weight.
                p: T.let[T.int32] = T.min(begin + it * step + u * slots + slot_of_block, end - 1)
                page: T.let[T.int32] = page_table[rows[t], p // page_size]
                load_position(keys, u, k_pages, layer, page, kv_head, p % page_size, lane)
                load_position(values, u, v_pages, layer, page, kv_head, p % page_size, lane)
            for u in T.unroll(unroll):
                for g in T.unroll(queries):
                    score[u * queries + g] = T.float32(0)
                    for e in T.unroll(width):
                        score[u * queries + g] = score[u * queries + g] + query[
                            g * width + e
                        ] * T.cast(keys[u * width + e], "float32")
                    for s in T.unroll(lanes.bit_length() - 1):
                        score[u * queries + g] = score[u * queries + g] + shuffle_xor(
                            score[u * queries + g], T.shift_right(lanes // 2, s), warp
                        )
                    if softcap > 0:
                        score[u * queries + g] = T.tanh(score[u * queries + g]) * T.float32(
                            softcap * LOG2E
                        )
            for g in T.unroll(queries):
                above: T.float32 = highest[g]
                for u in T.unroll(unroll):
                    if begin + it * step + u * slots + slot_of_block < end:
                        above = T.max(above, score[u * queries + g])
                rescale: T.float32 = T.exp2(highest[g] - above)
                highest[g] = above
                total[g] = total[g] * rescale
                for e in T.unroll(width):
                    acc[g * width + e] = acc[g * width + e] * rescale
                for u in T.unroll(unroll):
                    weight: T.float32 = T.float32(0)
                    if begin + it * step + u * slots + slot_of_block < end:
                        weight = T.exp2(score[u * queries + g] - above)
                    total[g] = total[g] + weight
                    for e in T.unroll(width):
                        acc[g * width + e] = acc[g * width + e] + weight * T.cast(
                            values[u * width + e], "float32"
                        )

    @T.inline
    def join(tid, total, highest, acc, all_highest, all_total, all_acc):
        """The block's softmax: its maxima and masses, and the warps' sums, rescaled to them."""
        for g in T.unroll(queries):
            # Of the warp first: lanes of the same place in a position hold the same elements.
            top: T.float32 = highest[g]
            for s in T.unroll(per_warp.bit_length() - 1):
                top = T.max(top, shuffle_xor(top, T.shift_left(lanes, s), warp))
            shrink: T.float32 = T.exp2(highest[g] - top)
            highest[g] = top
            total[g] = total[g] * shrink
            for s in T.unroll(per_warp.bit_length() - 1):
                total[g] = total[g] + shuffle_xor(total[g], T.shift_left(lanes, s), warp)
            for e in T.unroll(width):
                acc[g * width + e] = acc[g * width + e] * shrink
                for s in T.unroll(per_warp.bit_length() - 1):
                    acc[g * width + e] = acc[g * width + e] + shuffle_xor(
                        acc[g * width + e], T.shift_left(lanes, s), warp
                    )
            if tid % warp == 0:
                all_highest[tid // warp * queries + g] = top
                all_total[tid // warp * queries + g] = total[g]
        T.tvm_storage_sync("shared")
        for g in T.unroll(queries):
            above: T.float32 = T.float32(LOWEST)
            for w in T.unroll(WARPS):
                above = T.max(above, all_highest[w * queries + g])
            mass: T.float32 = T.float32(0)
            for w in T.unroll(WARPS):
                mass = mass + all_total[w * queries + g] * T.exp2(
                    all_highest[w * queries + g] - above
                )
            rescale: T.float32 = T.exp2(highest[g] - above)
            highest[g] = above
            total[g] = mass
            for e in T.unroll(width):
                acc[g * width + e] = acc[g * width + e] * rescale
        if tid % warp < lanes and (tid % lanes + 1) * width <= head_dim:
            for g in T.unroll(queries):
                for e in T.unroll(width):
                    all_acc[tid // warp, g * head_dim + tid % lanes * width + e] = acc[
                        g * width + e
                    ]
        T.tvm_storage_sync("shared")

    def head_of(kp: Any, g: Any) -> Any:
        """Query head g of a part; one past the end of its group is read as the last."""
        return kp // parts * group + T.min(kp % parts * queries + g, group - 1)

    @T.inline
    def softmax_piece(q, k_pages, v_pages, page_table, rows, t, layer, kp, begin, end, tid,
                      total, highest, all_acc):  # fmt: skip
        """Sums, maxima and masses of one piece for all query heads of a part."""
        acc = T.alloc_buffer((queries * width,), "float32", scope="local")
        all_highest = T.alloc_buffer((WARPS * queries,), "float32", scope="shared")
        all_total = T.alloc_buffer((WARPS * queries,), "float32", scope="shared")
        attend(q, k_pages, v_pages, page_table, rows, t, layer, kp // parts, kp % parts, begin, end,
               tid, total, highest, acc)  # fmt: skip
        join(tid, total, highest, acc, all_highest, all_total, all_acc)

    if whole:

        @T.inline
        def prefill(q, k_pages, v_pages, page_table, rows, positions, sink_values, layer, out):
            for t in T.thread_binding(n, thread="blockIdx.x"):
                for kp in T.thread_binding(kv_heads * parts, thread="blockIdx.y"):
                    for tid in T.thread_binding(threads, thread="threadIdx.x"):
                        total = T.alloc_buffer((queries,), "float32", scope="local")
                        highest = T.alloc_buffer((queries,), "float32", scope="local")
                        all_acc = T.alloc_buffer(
                            (WARPS, queries * head_dim), "float32", scope="shared"
                        )
                        masses = T.alloc_buffer((queries,), "float32", scope="shared")
                        length: T.let[T.int32] = positions[t] + 1
                        if length > 0:
                            softmax_piece(q, k_pages, v_pages, page_table, rows, t, layer, kp,
                                          window_start(positions[t], window), length, tid,
                                          total, highest, all_acc)  # fmt: skip
                            if tid == 0:
                                for g in T.unroll(queries):
                                    masses[g] = total[g]
                                    if sinks:
                                        h = T.meta_var(head_of(kp, g))
                                        masses[g] = total[g] + T.exp2(
                                            sink_values[h] * T.float32(LOG2E) - highest[g]
                                        )
                            T.tvm_storage_sync("shared")
                        for i in T.serial((queries * head_dim + threads - 1 - tid) // threads):
                            g: T.let[T.int32] = (tid + i * threads) // head_dim
                            if kp % parts * queries + g < group:
                                value: T.float32 = T.float32(0)
                                if length > 0:
                                    for w in T.unroll(WARPS):
                                        value = value + all_acc[w, tid + i * threads]
                                    value = value / masses[g]
                                out[
                                    t,
                                    kp // parts * group + kp % parts * queries + g,
                                    (tid + i * threads) % head_dim,
                                ] = T.cast(value, dtype)

        if sinks:

            @T.prim_func(s_tir=True)
            def attention_prefill(
                q_h: T.handle,
                k_pages_h: T.handle,
                v_pages_h: T.handle,
                page_table_h: T.handle,
                rows_h: T.handle,
                positions_h: T.handle,
                sinks_h: T.handle,
                layer: T.int64,
                out_h: T.handle,
            ):
                T.func_attr(SCHEDULED)
                q = T.match_buffer(q_h, (n, heads, head_dim), dtype)
                k_pages = T.match_buffer(k_pages_h, cache, dtype)
                v_pages = T.match_buffer(v_pages_h, cache, dtype)
                page_table = T.match_buffer(page_table_h, (extent(batch, "b"), max_pages), "int32")
                rows = T.match_buffer(rows_h, (n,), "int32")
                positions = T.match_buffer(positions_h, (n,), "int32")
                sink_values = T.match_buffer(sinks_h, (heads,), "float32")
                out = T.match_buffer(out_h, (n, heads, head_dim), dtype)
                with T.sblock("root"):
                    T.reads()
                    T.writes()
                    prefill(
                        q, k_pages, v_pages, page_table, rows, positions, sink_values, layer, out
                    )

            return attention_prefill

        @T.prim_func(s_tir=True)
        def attention_prefill(
            q_h: T.handle,
            k_pages_h: T.handle,
            v_pages_h: T.handle,
            page_table_h: T.handle,
            rows_h: T.handle,
            positions_h: T.handle,
            layer: T.int64,
            out_h: T.handle,
        ):
            T.func_attr(SCHEDULED)
            q = T.match_buffer(q_h, (n, heads, head_dim), dtype)
            k_pages = T.match_buffer(k_pages_h, cache, dtype)
            v_pages = T.match_buffer(v_pages_h, cache, dtype)
            page_table = T.match_buffer(page_table_h, (extent(batch, "b"), max_pages), "int32")
            rows = T.match_buffer(rows_h, (n,), "int32")
            positions = T.match_buffer(positions_h, (n,), "int32")
            out = T.match_buffer(out_h, (n, heads, head_dim), dtype)
            with T.sblock("root"):
                T.reads()
                T.writes()
                prefill(q, k_pages, v_pages, page_table, rows, positions, positions, layer, out)

        return attention_prefill

    @T.prim_func(s_tir=True)
    def attention_partial(
        q_h: T.handle,
        k_pages_h: T.handle,
        v_pages_h: T.handle,
        page_table_h: T.handle,
        rows_h: T.handle,
        positions_h: T.handle,
        layer: T.int64,
        sums_h: T.handle,
        stats_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        q = T.match_buffer(q_h, (n, heads, head_dim), dtype)
        k_pages = T.match_buffer(k_pages_h, cache, dtype)
        v_pages = T.match_buffer(v_pages_h, cache, dtype)
        page_table = T.match_buffer(page_table_h, (extent(batch, "b"), max_pages), "int32")
        rows = T.match_buffer(rows_h, (n,), "int32")
        positions = T.match_buffer(positions_h, (n,), "int32")
        sums = T.match_buffer(sums_h, (splits, n, heads, head_dim), "float32")
        stats = T.match_buffer(stats_h, (splits, n, heads, 2), "float32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for t in T.thread_binding(n, thread="blockIdx.x"):
                for kp in T.thread_binding(kv_heads * parts, thread="blockIdx.y"):
                    for piece in T.thread_binding(splits, thread="blockIdx.z"):
                        for tid in T.thread_binding(threads, thread="threadIdx.x"):
                            total = T.alloc_buffer((queries,), "float32", scope="local")
                            highest = T.alloc_buffer((queries,), "float32", scope="local")
                            all_acc = T.alloc_buffer(
                                (WARPS, queries * head_dim), "float32", scope="shared"
                            )
                            length: T.let[T.int32] = positions[t] + 1
                            first: T.let[T.int32] = window_start(positions[t], window)
                            size: T.let[T.int32] = _piece(length - first, splits, step)
                            begin: T.let[T.int32] = first + piece * size
                            if begin < length:
                                softmax_piece(q, k_pages, v_pages, page_table, rows, t, layer, kp,
                                              begin, T.min(begin + size, length), tid,
                                              total, highest, all_acc)  # fmt: skip
                                if tid == 0:
                                    for g in T.unroll(queries):
                                        if kp % parts * queries + g < group:
                                            h = T.meta_var(
                                                kp // parts * group + kp % parts * queries + g
                                            )
                                            stats[piece, t, h, 0] = highest[g]
                                            stats[piece, t, h, 1] = total[g]
                                for i in T.serial(
                                    (queries * head_dim + threads - 1 - tid) // threads
                                ):
                                    g: T.let[T.int32] = (tid + i * threads) // head_dim
                                    if kp % parts * queries + g < group:
                                        value: T.float32 = T.float32(0)
                                        for w in T.unroll(WARPS):
                                            value = value + all_acc[w, tid + i * threads]
                                        sums[
                                            piece,
                                            t,
                                            kp // parts * group + kp % parts * queries + g,
                                            (tid + i * threads) % head_dim,
                                        ] = value
                            elif tid < queries:
                                if kp % parts * queries + tid < group:
                                    h = T.meta_var(kp // parts * group + kp % parts * queries + tid)
                                    stats[piece, t, h, 0] = T.float32(LOWEST)
                                    stats[piece, t, h, 1] = T.float32(0)

    return attention_partial


def attention_partial(*, splits: int, **sizes: Any) -> tirx.PrimFunc:
    """Attention to each of `splits` pieces of the context.

    `(q [n,H,D], k_pages, v_pages, page_table [B,P] i32, rows [n] i32, positions [n] i32, layer i64)
    -> (sums [splits,n,H,D] f32, stats [splits,n,H,2] f32)`; stats are the maximum (of scores in
    base 2) and the mass. The sums of a piece without mass stay unwritten. `sizes`: tokens, heads,
    kv_heads, head_dim, layers, pages, page_size, batch, max_pages, dtype, scale, target, and
    `window` and `softcap` as for `attention_cpu`.
    """
    return _attention(splits=splits, whole=False, **sizes)


def attention_prefill(**sizes: Any) -> tirx.PrimFunc:
    """Attention without pieces, for many tokens at once.

    `(q, k_pages, v_pages, page_table, rows, positions[, sinks], layer) -> out [n,H,D]`; zeros for
    tokens of position -1. `sizes` as for `attention_partial`, and `sinks` as for `attention_cpu`.
    """
    return _attention(splits=1, whole=True, **sizes)


def attention_combine(
    *,
    tokens: int | None,
    heads: int,
    head_dim: int,
    dtype: str,
    splits: int,
    target: Any,
    sinks: bool = False,
) -> tirx.PrimFunc:
    """Join the pieces: `(sums, stats[, sinks]) -> out [n,H,D]`, zeros where no piece has mass."""
    n = extent(tokens)

    @T.inline
    def combine(sums, stats, sink_values, out):
        for t in T.thread_binding(n, thread="blockIdx.x"):
            for h in T.thread_binding(heads, thread="blockIdx.y"):
                for d in T.thread_binding(head_dim, thread="threadIdx.x"):
                    above: T.float32 = T.float32(LOWEST)
                    for s in T.serial(splits):
                        above = T.max(above, stats[s, t, h, 0])
                    mass: T.float32 = T.float32(0)
                    value: T.float32 = T.float32(0)
                    for s in T.serial(splits):
                        weight: T.let[T.float32] = T.exp2(stats[s, t, h, 0] - above)
                        mass = mass + weight * stats[s, t, h, 1]
                        # The sums of pieces without mass are not written.
                        value = value + weight * T.if_then_else(
                            stats[s, t, h, 1] > T.float32(0), sums[s, t, h, d], T.float32(0)
                        )
                    if mass == T.float32(0):
                        mass = T.float32(1)
                    elif sinks:
                        mass = mass + T.exp2(sink_values[h] * T.float32(LOG2E) - above)
                    out[t, h, d] = T.cast(value / mass, dtype)

    if sinks:

        @T.prim_func(s_tir=True)
        def attention_combine(
            sums_h: T.handle, stats_h: T.handle, sinks_h: T.handle, out_h: T.handle
        ):
            T.func_attr(SCHEDULED)
            sums = T.match_buffer(sums_h, (splits, n, heads, head_dim), "float32")
            stats = T.match_buffer(stats_h, (splits, n, heads, 2), "float32")
            sink_values = T.match_buffer(sinks_h, (heads,), "float32")
            out = T.match_buffer(out_h, (n, heads, head_dim), dtype)
            with T.sblock("root"):
                T.reads()
                T.writes()
                combine(sums, stats, sink_values, out)

        return attention_combine

    @T.prim_func(s_tir=True)
    def attention_combine(sums_h: T.handle, stats_h: T.handle, out_h: T.handle):
        T.func_attr(SCHEDULED)
        sums = T.match_buffer(sums_h, (splits, n, heads, head_dim), "float32")
        stats = T.match_buffer(stats_h, (splits, n, heads, 2), "float32")
        out = T.match_buffer(out_h, (n, heads, head_dim), dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            combine(sums, stats, stats, out)

    return attention_combine
