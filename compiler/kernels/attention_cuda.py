# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Attention over the paged cache on the tensor cores of CUDA GPUs.

The kernels are templates in `decode_attention.cuh` and `prefill_attention.cuh`; what is here
chooses their sizes and calls them. They take float16 and the head dimensions and pages that
`supported` names; `attention_gpu.py` has a kernel for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from .common import SCHEDULED, cuda_source, extent, kind_of, launch_dependents
from .q4_gemm import image_rows

MULTIPROCESSORS = 132
"""Of the GPU that the plans are made for; others are served as well."""

MAX_COUNTERS = 4096
"""Of `decode_attention.cuh`: items whose context can be cut."""


def _much_shared(arch: int) -> bool:
    """Whether a block can have 227 KB of shared memory, as on data centres' GPUs; else it has 99.

    From the table of compute capabilities in NVIDIA's CUDA programming guide.
    """
    return 90 <= arch < 120


def supported(
    *, head_dim: int, page_size: int, dtype: str, target: Any, rotary: int | None = None
) -> bool:
    """Whether the decode kernels take these sizes, and turn `rotary` elements of a head."""
    fits = head_dim % 16 == 0 and head_dim <= 256 and page_size % 16 == 0
    fits = fits and (rotary or 0) % 4 == 0
    return kind_of(target) == "cuda" and dtype == "float16" and fits


def prefill_supported(*, arch: int, **sizes: Any) -> bool:
    """Whether the prefill kernel takes these sizes on `arch`, such as 89 for sm_89, and later.

    A tile of keys is whole pages. Heads of more than 128 need more shared memory than most GPUs
    have.
    """
    whole = 64 % sizes["page_size"] == 0
    return supported(**sizes) and whole and (sizes["head_dim"] <= 128 or _much_shared(arch))


@dataclass(frozen=True)
class DecodePlan:
    """`parts` items share the query heads of a kv head of a token.

    A block has `warps` warps that compute, `loaders` that copy, and shared memory for `stages`
    chunks of 16 positions, of which at most `ahead` are on their way at a time. With `pair` the
    blocks of two parts are a cluster, and each copies half of every chunk for both.
    An item's context is cut among at most `splits` blocks, while it is short among so many that
    each takes about `few` chunks; about `blocks` fill the GPU.
    """

    parts: int
    warps: int
    loaders: int
    stages: int
    ahead: int
    pair: bool
    few: int
    splits: int
    blocks: int

    @property
    def threads(self) -> int:
        """Of a block, as `DecodeSizes` of `decode_attention.cuh`."""
        return 32 * (self.warps + self.loaders)

    def shared(self, group: int, head_dim: int) -> int:
        """Bytes of shared memory of a block, as `DecodeSizes` of `decode_attention.cuh`."""
        queries = -(-group // self.parts)
        return 2 * (self.stages * 32 * head_dim + (queries + 2) * (head_dim + 8))


def decode_plan(
    *, tokens: int, kv_heads: int, group: int, head_dim: int, arch: int = 90
) -> DecodePlan:
    """The plan for `tokens` rows and `group` query heads to a kv head, for contexts of any length.

    `arch` is the oldest architecture that it is for, such as 89. The numbers are the fastest of
    those measured on an H200.
    """
    limit = (220 if _much_shared(arch) else 98) * 1024  # of shared memory
    alone = tokens == 1
    parts = -(-group // 16)  # two sums of 8 query heads fit into a warp's registers
    if alone and head_dim >= 128:  # one is faster, although the L2 cache is read more often
        parts = -(-group // 8)
    while True:
        items = tokens * kv_heads * parts
        # With fewer items pairs are no faster: their contexts are cut into smaller pieces.
        pair = alone and head_dim >= 128 and parts == 2 and 16 <= items <= 33 and _much_shared(arch)
        many, few = -(-group // parts) > 8, 4
        if items > MULTIPROCESSORS:  # small blocks, several to a multiprocessor
            warps, ring, blocks, splits = 2, 48, 4 * MULTIPROCESSORS, 2
        elif alone and items > 33:
            warps, ring, blocks = 4, 64, 2 * MULTIPROCESSORS
            splits = blocks // items
        else:
            # As there are registers for the sums; in a pair, so that each warp has several places.
            warps = 4 if (many or pair) and head_dim > 128 else 8
            # Beside a ring of 200 KB the product before has no room, which costs a step of 8B 1 %.
            large = pair or (alone and not many and head_dim < 128)
            ring, blocks = 200 if large else 144, MULTIPROCESSORS
            splits = min(64, (2 if 1 < tokens and items <= 16 else 1) * blocks // items)
            if tokens > 1 and items > 16:  # to join two blocks' sums takes longer than that
                few = min(24, items // 2)
        if items > MAX_COUNTERS:
            splits = 1
        while warps > 1:
            bytes_of_ring = min(ring * 1024, limit - 16 * 1024)
            stages = max(1, bytes_of_ring // (64 * head_dim) // warps) * warps
            loaders, ahead = (4 if warps == 8 or pair else 1), stages
            if warps == 8 and not pair:  # some 50 KB under way to each block keep the memory busy
                ahead = min(stages, max(1, round(112 / head_dim)) * 8)
            plan = DecodePlan(parts, warps, loaders, stages, ahead, pair, few, splits, blocks)
            if plan.shared(group, head_dim) <= limit:
                return plan
            warps //= 2
        parts *= 2


def decode_attention(
    *,
    tokens: int,
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
    target: Any,
    window: int = 0,
    softcap: float = 0.0,
    append: str = "",
    rotary: int | None = None,
    sinks: bool = False,
    arch: int = 90,
    tuned: DecodePlan | None = None,
) -> tirx.PrimFunc:
    """Attention of one token of each row, the pieces of a context joined by the last to finish.

    `(q [n,H,D], k_pages, v_pages, page_table [B,P] i32, rows [n] i32, positions [n] i32[, sinks],
    layer i64) -> (out [n,H,D], sums, stats)`, zeros for position -1. The last two are scratch, see
    `decode_scratch`. With `append` the kernel turns and appends the token first, as
    `rotary.rotary_append` does, whose arguments before `k_pages` it takes in place of q: "joined"
    or "apart" are queries, keys and values. The token's rows must be different ones.
    `window`, `softcap` and `sinks`, which exclude `append`, are as for `attention.attention_cpu`,
    `rotary` as for `rotary_append`, but a multiple of 4; `tuned` replaces the plan that the sizes
    and `arch` suggest.
    """
    group = heads // kv_heads
    plan = tuned or decode_plan(
        tokens=tokens, kv_heads=kv_heads, group=group, head_dim=head_dim, arch=arch
    )
    cache = (layers, pages, kv_heads, page_size, head_dim)
    width = (heads + 2 * kv_heads) * head_dim
    turned = rotary or head_dim
    table_shape = (tokens, 2, turned // 2)
    rows_of_table = extent(batch, "b")
    sums_shape, stats_shape = decode_scratch(plan, tokens, heads, kv_heads, head_dim)
    flag = {True: "true", False: "false"}
    sizes: list[int | str] = [tokens, heads, kv_heads, head_dim, page_size, plan.parts]
    sizes += [plan.warps, plan.loaders, plan.stages, plan.ahead, flag[plan.pair]]
    sizes += [plan.few, plan.splits, plan.blocks]
    sizes += [flag[append != ""], flag[append == "joined"], turned]
    sizes += [window, flag[softcap > 0], flag[sinks]]
    name = f"shardwright::decode_attention<shardwright::DecodeSizes<{', '.join(map(str, sizes))}>>"
    source = cuda_source("decode_attention.cuh")
    blocks = tokens * kv_heads * plan.parts * plan.splits
    shared = plan.shared(group, head_dim)

    @T.inline
    def attend(block, tid, args, layer, out, sums, stats):
        launch_dependents(target)
        decode_shared = T.alloc_buffer((shared,), "uint8", scope="shared.dyn")
        T.evaluate(
            T.cuda.func_call(
                name,
                *[x.data for x in args],
                out.data,
                sums.data,
                stats.data,
                layer,
                pages,
                T.cast(rows_of_table, "int32"),
                max_pages,
                T.float32(scale),
                T.float32(softcap),
                block,
                tid,
                decode_shared.data,
                source_code=source,
            )
        )

    @T.inline
    def alone(args, layer, out, sums, stats):
        for block in T.thread_binding(blocks, thread="blockIdx.x"):
            for tid in T.thread_binding(plan.threads, thread="threadIdx.x"):
                attend(block, tid, args, layer, out, sums, stats)

    @T.inline
    def in_pairs(args, layer, out, sums, stats):
        for block in T.thread_binding(blocks, thread="blockIdx.x"):
            for _rank in T.thread_binding(2, thread="clusterCtaIdx.x"):
                for tid in T.thread_binding(plan.threads, thread="threadIdx.x"):
                    attend(block, tid, args, layer, out, sums, stats)

    body = in_pairs if plan.pair else alone

    if append == "joined":

        @T.prim_func(s_tir=True)
        def decode_attention_joined(
            qkv_h: T.handle,
            table_h: T.handle,
            k_pages_h: T.handle,
            v_pages_h: T.handle,
            page_table_h: T.handle,
            rows_h: T.handle,
            positions_h: T.handle,
            layer: T.int64,
            out_h: T.handle,
            sums_h: T.handle,
            stats_h: T.handle,
        ):
            T.func_attr(SCHEDULED)
            qkv = T.match_buffer(qkv_h, (tokens, width), dtype)
            table = T.match_buffer(table_h, table_shape, "float32")
            k_pages = T.match_buffer(k_pages_h, cache, dtype)
            v_pages = T.match_buffer(v_pages_h, cache, dtype)
            page_table = T.match_buffer(page_table_h, (rows_of_table, max_pages), "int32")
            rows = T.match_buffer(rows_h, (tokens,), "int32")
            positions = T.match_buffer(positions_h, (tokens,), "int32")
            out = T.match_buffer(out_h, (tokens, heads, head_dim), dtype)
            sums = T.match_buffer(sums_h, sums_shape, "float32")
            stats = T.match_buffer(stats_h, stats_shape, "float32")
            with T.sblock("root"):
                T.reads()
                T.writes()
                body((qkv, qkv, qkv, table, k_pages, v_pages, page_table, rows, positions, stats),
                     layer, out, sums, stats)  # fmt: skip

        return decode_attention_joined

    if append:

        @T.prim_func(s_tir=True)
        def decode_attention_apart(
            q_h: T.handle,
            k_h: T.handle,
            v_h: T.handle,
            table_h: T.handle,
            k_pages_h: T.handle,
            v_pages_h: T.handle,
            page_table_h: T.handle,
            rows_h: T.handle,
            positions_h: T.handle,
            layer: T.int64,
            out_h: T.handle,
            sums_h: T.handle,
            stats_h: T.handle,
        ):
            T.func_attr(SCHEDULED)
            q = T.match_buffer(q_h, (tokens, heads, head_dim), dtype)
            k = T.match_buffer(k_h, (tokens, kv_heads, head_dim), dtype)
            v = T.match_buffer(v_h, (tokens, kv_heads, head_dim), dtype)
            table = T.match_buffer(table_h, table_shape, "float32")
            k_pages = T.match_buffer(k_pages_h, cache, dtype)
            v_pages = T.match_buffer(v_pages_h, cache, dtype)
            page_table = T.match_buffer(page_table_h, (rows_of_table, max_pages), "int32")
            rows = T.match_buffer(rows_h, (tokens,), "int32")
            positions = T.match_buffer(positions_h, (tokens,), "int32")
            out = T.match_buffer(out_h, (tokens, heads, head_dim), dtype)
            sums = T.match_buffer(sums_h, sums_shape, "float32")
            stats = T.match_buffer(stats_h, stats_shape, "float32")
            with T.sblock("root"):
                T.reads()
                T.writes()
                body((q, k, v, table, k_pages, v_pages, page_table, rows, positions, stats),
                     layer, out, sums, stats)  # fmt: skip

        return decode_attention_apart

    if sinks:

        @T.prim_func(s_tir=True)
        def decode_attention_sinks(
            q_h: T.handle,
            k_pages_h: T.handle,
            v_pages_h: T.handle,
            page_table_h: T.handle,
            rows_h: T.handle,
            positions_h: T.handle,
            sinks_h: T.handle,
            layer: T.int64,
            out_h: T.handle,
            sums_h: T.handle,
            stats_h: T.handle,
        ):
            T.func_attr(SCHEDULED)
            q = T.match_buffer(q_h, (tokens, heads, head_dim), dtype)
            k_pages = T.match_buffer(k_pages_h, cache, dtype)
            v_pages = T.match_buffer(v_pages_h, cache, dtype)
            page_table = T.match_buffer(page_table_h, (rows_of_table, max_pages), "int32")
            rows = T.match_buffer(rows_h, (tokens,), "int32")
            positions = T.match_buffer(positions_h, (tokens,), "int32")
            sink_values = T.match_buffer(sinks_h, (heads,), "float32")
            out = T.match_buffer(out_h, (tokens, heads, head_dim), dtype)
            sums = T.match_buffer(sums_h, sums_shape, "float32")
            stats = T.match_buffer(stats_h, stats_shape, "float32")
            with T.sblock("root"):
                T.reads()
                T.writes()
                body((q, q, q, stats, k_pages, v_pages, page_table, rows, positions, sink_values),
                     layer, out, sums, stats)  # fmt: skip

        return decode_attention_sinks

    @T.prim_func(s_tir=True)
    def decode_attention_alone(
        q_h: T.handle,
        k_pages_h: T.handle,
        v_pages_h: T.handle,
        page_table_h: T.handle,
        rows_h: T.handle,
        positions_h: T.handle,
        layer: T.int64,
        out_h: T.handle,
        sums_h: T.handle,
        stats_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        q = T.match_buffer(q_h, (tokens, heads, head_dim), dtype)
        k_pages = T.match_buffer(k_pages_h, cache, dtype)
        v_pages = T.match_buffer(v_pages_h, cache, dtype)
        page_table = T.match_buffer(page_table_h, (rows_of_table, max_pages), "int32")
        rows = T.match_buffer(rows_h, (tokens,), "int32")
        positions = T.match_buffer(positions_h, (tokens,), "int32")
        out = T.match_buffer(out_h, (tokens, heads, head_dim), dtype)
        sums = T.match_buffer(sums_h, sums_shape, "float32")
        stats = T.match_buffer(stats_h, stats_shape, "float32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            # Keys, values and angles are in the cache and in q.
            body((q, q, q, stats, k_pages, v_pages, page_table, rows, positions, stats), layer,
                 out, sums, stats)  # fmt: skip

    return decode_attention_alone


def decode_scratch(
    plan: DecodePlan, tokens: int, heads: int, kv_heads: int, head_dim: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes, in float32, of what the blocks of `decode_attention` leave for the last one."""
    queries = -(-heads // kv_heads // plan.parts)
    pieces = tokens * kv_heads * plan.parts * plan.splits
    return (pieces, queries, head_dim), (pieces, queries, 2)


def prefill_tile(head_dim: int, arch: int) -> tuple[int, int]:
    """Tokens and positions in a tile of `prefill_attention`.

    As shared memory and registers hold them; three warpgroups only where there is wgmma.
    """
    keys = 128 if _much_shared(arch) and head_dim <= 128 else 64
    return 192 if 90 <= arch < 100 and head_dim <= 64 else 128, keys


def prefill_attention(
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
    target: Any,
    arch: int,
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
    image: bool = False,
) -> tirx.PrimFunc:
    """Attention of many tokens of any rows at once.

    `(q [n,H,D], k_pages, v_pages, page_table, rows, positions[, sinks], layer) -> out [n,H,D]`;
    zeros for tokens of position -1. It is fast where the tokens of a row stand together. `arch` is
    the oldest architecture that it is compiled for, such as 89; `window`, `softcap` and `sinks` are
    as for `attention.attention_cpu`. With `image`, for D a multiple of 128 and without sinks, the
    result is `q4_gemm_image` of out [n,H*D].
    """
    n = extent(tokens)
    block, keys = prefill_tile(head_dim, arch)
    cache = (layers, pages, kv_heads, page_size, head_dim)
    panels = -(-head_dim // 64)
    # 1024 to align, the queries' tile, and two tiles of keys and values each.
    shared = 1024 + panels * 128 * (block + 4 * keys)
    sizes: list[Any] = [heads, kv_heads, head_dim, page_size, block // 64, keys, window]
    sizes += ["true" if x else "false" for x in (softcap, image, sinks)]
    name = "shardwright::prefill::attention<shardwright::prefill::Sizes<"
    name += f"{', '.join(map(str, sizes))}>>"
    source = cuda_source("q4_image.cuh", "prefill_attention.cuh")
    result = (image_rows(n), heads * head_dim) if image else (n, heads, head_dim)
    tiles = (n + block - 1) // block

    @T.inline
    def body(q, k_pages, v_pages, page_table, rows, positions, sink_values, layer, out):
        for head in T.thread_binding(heads, thread="blockIdx.x"):
            for i in T.thread_binding(tiles, thread="blockIdx.y"):
                for tid in T.thread_binding(2 * block + 128, thread="threadIdx.x"):
                    launch_dependents(target)
                    attention_shared = T.alloc_buffer((shared,), "uint8", scope="shared.dyn")
                    T.evaluate(
                        T.cuda.func_call(
                            name,
                            q.data,
                            k_pages.data,
                            v_pages.data,
                            page_table.data,
                            rows.data,
                            positions.data,
                            sink_values.data,
                            out.data,
                            layer,
                            pages,
                            T.cast(n, "int32"),
                            max_pages,
                            T.float32(scale),
                            T.float32(softcap),
                            # The last tokens see the most: they come first.
                            T.cast(tiles - 1 - i, "int32"),
                            head,
                            tid,
                            attention_shared.data,
                            source_code=source,
                        )
                    )

    if sinks:

        @T.prim_func(s_tir=True)
        def prefill_attention_sinks(
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
                body(q, k_pages, v_pages, page_table, rows, positions, sink_values, layer, out)

        return prefill_attention_sinks

    @T.prim_func(s_tir=True)
    def prefill_attention(
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
        out = T.match_buffer(out_h, result, dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            # `out` stands for the sinks, which are not read.
            body(q, k_pages, v_pages, page_table, rows, positions, out, layer, out)

    return prefill_attention


def prefill_attention_image(**sizes: Any) -> tirx.PrimFunc:
    """`prefill_attention` whose result is an image."""
    return prefill_attention(**sizes, image=True)
