# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Attention over the paged cache on the tensor cores of CUDA GPUs.

The kernels are templates in `decode_attention.cuh` and `prefill_attention.cuh`; what is here
chooses their sizes and calls them. They take float16 and the head dimensions and pages that
`supported` names; `attention_gpu.py` has a kernel for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from .common import SCHEDULED, extent, kind_of, launch_dependents

MULTIPROCESSORS = 132
"""Of the GPU that the plans are made for; others are served as well."""

MAX_COUNTERS = 65536
"""Of `decode_attention.cuh`: kv heads of all tokens whose context can be cut."""

_PREFILL_TOKENS, _PREFILL_THREADS = 128, 256


def supported(*, head_dim: int, page_size: int, dtype: str, target: Any) -> bool:
    """Whether the decode kernels take these sizes."""
    fits = head_dim % 16 == 0 and head_dim <= 256 and page_size % 16 == 0
    return kind_of(target) == "cuda" and dtype == "float16" and fits


def prefill_supported(*, arch: int, **sizes: Any) -> bool:
    """Whether the prefill kernel takes these sizes on `arch`, such as 89 for sm_89, and later.

    A tile of keys is whole pages. Heads of more than 128 need more shared memory than GPUs before
    sm_90 have.
    """
    whole = 64 % sizes["page_size"] == 0
    return supported(**sizes) and whole and (sizes["head_dim"] <= 128 or arch >= 90)


@dataclass(frozen=True)
class DecodePlan:
    """`parts` blocks share the query heads of a kv head; a block has `warps` warps.

    A context is cut among at most `splits` blocks; while it is short, among so many that each uses
    `few` of its warps. `blocks` of them fill the GPU.
    """

    parts: int
    warps: int
    few: int
    splits: int
    blocks: int


def decode_plan(*, tokens: int, kv_heads: int, group: int, head_dim: int) -> DecodePlan:
    """The plan for `tokens` rows and `group` query heads to a kv head, for contexts of any length.

    The numbers are the fastest of those measured on an H200 (`scripts/gpu_kernel_checks.py`).
    """
    # Two sums of 8 query heads fit into a warp's registers, of large heads one.
    parts = -(-group // (16 if head_dim <= 128 else 8))
    columns = -(-group // parts // 8) * 8
    items = tokens * kv_heads * parts
    if items > 2 * MULTIPROCESSORS:
        # Small blocks, several to a multiprocessor. Blocks that find nothing to do cost little.
        return DecodePlan(parts, 2, 2, 8 if items <= MAX_COUNTERS else 1, 4 * MULTIPROCESSORS)
    if items > MULTIPROCESSORS:
        return DecodePlan(parts, 4, 4, 2, 2 * MULTIPROCESSORS)
    # One block to a multiprocessor, as many warps as have room for their sums in shared memory; two
    # if that leaves registers for it.
    warps = next(w for w in (16, 12, 8, 4) if w * columns * (head_dim + 2) * 4 <= 40 * 1024)
    blocks = MULTIPROCESSORS * (2 if warps == 4 else 1)
    return DecodePlan(parts, warps, 2, max(1, min(64, blocks // items)), blocks)


def _source(name: str) -> str:
    return Path(__file__).with_name(name).read_text()


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
    tuned: DecodePlan | None = None,
) -> tirx.PrimFunc:
    """Attention of one token of each row, the pieces of a context joined by the last to finish.

    `(q [n,H,D], k_pages, v_pages, page_table [B,P] i32, rows [n] i32, positions [n] i32,
    layer i64) -> (out [n,H,D], sums, stats)`, zeros for position -1. The last two are scratch, see
    `decode_scratch`. With `append` the kernel turns and appends the token first, as
    `rotary.rotary_append` does, whose arguments before `k_pages` it takes in place of q: "joined"
    or "apart" are queries, keys and values. The token's rows must be different ones.
    `window` and `softcap` are as for `attention.attention_cpu`, `rotary` as for `rotary_append`;
    `tuned` replaces the plan that the sizes suggest.
    """
    plan = tuned or decode_plan(
        tokens=tokens, kv_heads=kv_heads, group=heads // kv_heads, head_dim=head_dim
    )
    cache = (layers, pages, kv_heads, page_size, head_dim)
    width = (heads + 2 * kv_heads) * head_dim
    turned = rotary or head_dim
    table_shape = (tokens, 2, turned // 2)
    rows_of_table = extent(batch, "b")
    sums_shape, stats_shape = decode_scratch(plan, tokens, heads, kv_heads, head_dim)
    flag = {True: "true", False: "false"}
    numbers = [tokens, heads, kv_heads, head_dim, page_size, plan.parts, plan.warps, plan.few]
    numbers += [plan.splits, plan.blocks]
    sizes = [*map(str, numbers), flag[append != ""], flag[append == "joined"], str(turned)]
    sizes += [str(window), flag[softcap > 0]]
    name = f"shardwright::decode_attention<shardwright::DecodeSizes<{', '.join(sizes)}>>"
    source = _source("decode_attention.cuh")

    @T.inline
    def body(q, k, v, table, k_pages, v_pages, page_table, rows, positions, layer, out, sums,
             stats):  # fmt: skip
        for kp in T.thread_binding(kv_heads * plan.parts, thread="blockIdx.x"):
            for split in T.thread_binding(plan.splits, thread="blockIdx.y"):
                for t in T.thread_binding(tokens, thread="blockIdx.z"):
                    for tid in T.thread_binding(plan.warps * 32, thread="threadIdx.x"):
                        launch_dependents(target)
                        T.evaluate(
                            T.cuda.func_call(
                                name,
                                q.data,
                                k.data,
                                v.data,
                                table.data,
                                k_pages.data,
                                v_pages.data,
                                page_table.data,
                                rows.data,
                                positions.data,
                                out.data,
                                sums.data,
                                stats.data,
                                layer,
                                pages,
                                T.cast(rows_of_table, "int32"),
                                max_pages,
                                T.float32(scale),
                                T.float32(softcap),
                                t,
                                kp,
                                split,
                                tid,
                                source_code=source,
                            )
                        )

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
                body(qkv, qkv, qkv, table, k_pages, v_pages, page_table, rows, positions, layer,
                     out, sums, stats)  # fmt: skip

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
                body(q, k, v, table, k_pages, v_pages, page_table, rows, positions, layer, out,
                     sums, stats)  # fmt: skip

        return decode_attention_apart

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
            body(q, q, q, stats, k_pages, v_pages, page_table, rows, positions, layer, out, sums,
                 stats)  # fmt: skip

    return decode_attention_alone


def decode_scratch(
    plan: DecodePlan, tokens: int, heads: int, kv_heads: int, head_dim: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes, in float32, of what the blocks of `decode_attention` leave for the last one."""
    queries = -(-heads // kv_heads // plan.parts)
    leading = (tokens, kv_heads * plan.parts, plan.splits, queries)
    return (*leading, head_dim), (*leading, 2)


def prefill_keys(head_dim: int, arch: int) -> int:
    """Positions in a tile of `prefill_attention`, by what shared memory and registers hold."""
    return 128 if arch >= 90 and 64 < head_dim <= 128 else 64


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
) -> tirx.PrimFunc:
    """Attention of many tokens of any rows at once.

    `(q [n,H,D], k_pages, v_pages, page_table, rows, positions, layer) -> out [n,H,D]`; zeros for
    tokens of position -1. It is fast where the tokens of a row stand together. `arch` is the
    oldest architecture that it is compiled for, such as 89.
    """
    n = extent(tokens)
    keys = prefill_keys(head_dim, arch)
    cache = (layers, pages, kv_heads, page_size, head_dim)
    panels = -(-head_dim // 64)
    # 1024 to align, the queries' tile, and two tiles of keys and values each.
    shared = 1024 + panels * 128 * (_PREFILL_TOKENS + 4 * keys)
    sizes = [heads, kv_heads, head_dim, page_size, keys, window, "true" if softcap else "false"]
    name = "shardwright::prefill::attention<shardwright::prefill::Sizes<"
    name += f"{', '.join(map(str, sizes))}>>"
    source = _source("prefill_attention.cuh")
    tiles = (n + _PREFILL_TOKENS - 1) // _PREFILL_TOKENS

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
        out = T.match_buffer(out_h, (n, heads, head_dim), dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            for head in T.thread_binding(heads, thread="blockIdx.x"):
                for i in T.thread_binding(tiles, thread="blockIdx.y"):
                    for tid in T.thread_binding(_PREFILL_THREADS, thread="threadIdx.x"):
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

    return prefill_attention
