# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Causal attention over the paged key/value cache, with grouped query heads."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from .attention_gpu import (
    attention_combine,
    attention_partial,
    attention_prefill,
    num_splits,
)
from .common import SCHEDULED, extent, lanes_for, window_start

__all__ = [
    "attention_combine",
    "attention_cpu",
    "attention_partial",
    "attention_prefill",
    "num_splits",
]


def attention_cpu(
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
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
) -> tirx.PrimFunc:
    """Attention for CPUs, parallel over tokens and heads, with an online softmax in float32.

    `(q [n,H,D], k_pages, v_pages, page_table [B,P] i32, rows [n] i32, positions [n] i32,
    layer i64) -> out [n,H,D]`. Query head h reads kv head `h // (H // K)` of positions 0 up to the
    token's own. Tokens of position -1 give zeros. A `window` leaves only so many positions, the
    last ones; a `softcap` c makes each score s `c * tanh(s / c)`; 0 is none. With `sinks` a score
    float32 [H] of each head, before `layer`, takes part in its softmax.
    """
    n = extent(tokens)
    group = heads // kv_heads
    lanes = lanes_for(head_dim)
    chunks = head_dim // lanes
    cache = (layers, pages, kv_heads, page_size, head_dim)

    @T.inline
    def attend(q, k_pages, v_pages, page_table, rows, positions, sink_values, layer, out):
        for th in T.parallel(n * heads):
            t = T.meta_var(th // heads)
            h = T.meta_var(th % heads)
            query = T.alloc_buffer((head_dim,), "float32", scope="local")
            acc = T.alloc_buffer((head_dim,), "float32", scope="local")
            dot = T.alloc_buffer((lanes,), "float32", scope="local")
            for c in T.serial(chunks):
                for l in T.vectorized(lanes):
                    query[c * lanes + l] = T.cast(q[t, h, c * lanes + l], "float32") * T.float32(
                        scale
                    )
                    acc[c * lanes + l] = T.float32(0)
            # A sink is as a position whose value is zero.
            highest: T.float32 = sink_values[h] if sinks else T.float32(-3.0e38)
            total: T.float32 = T.float32(1 if sinks else 0)
            begin: T.let[T.int32] = window_start(positions[t], window)
            for step in T.serial(positions[t] + 1 - begin):
                p: T.let[T.int32] = begin + step
                page: T.let[T.int32] = page_table[rows[t], p // page_size]
                for l in T.vectorized(lanes):
                    dot[l] = T.float32(0)
                for c in T.serial(chunks):
                    for l in T.vectorized(lanes):
                        dot[l] = dot[l] + query[c * lanes + l] * T.cast(
                            k_pages[layer, page, h // group, p % page_size, c * lanes + l],
                            "float32",
                        )
                score: T.float32 = T.float32(0)
                for l in T.unroll(lanes):
                    score = score + dot[l]
                if softcap > 0:
                    score = T.tanh(score * T.float32(1 / softcap)) * T.float32(softcap)
                if score > highest:
                    rescale: T.let[T.float32] = T.exp(highest - score)
                    total = total * rescale
                    for c in T.serial(chunks):
                        for l in T.vectorized(lanes):
                            acc[c * lanes + l] = acc[c * lanes + l] * rescale
                    highest = score
                weight: T.let[T.float32] = T.exp(score - highest)
                total = total + weight
                for c in T.serial(chunks):
                    for l in T.vectorized(lanes):
                        acc[c * lanes + l] = acc[c * lanes + l] + weight * T.cast(
                            v_pages[layer, page, h // group, p % page_size, c * lanes + l],
                            "float32",
                        )
            # No position at all (an inactive token): 0 / 1 = 0.
            inverse: T.let[T.float32] = T.float32(1) / T.if_then_else(
                total > T.float32(0), total, T.float32(1)
            )
            for c in T.serial(chunks):
                for l in T.vectorized(lanes):
                    out[t, h, c * lanes + l] = T.cast(acc[c * lanes + l] * inverse, dtype)

    if sinks:

        @T.prim_func(s_tir=True)
        def attention_cpu(
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
                attend(q, k_pages, v_pages, page_table, rows, positions, sink_values, layer, out)

        return attention_cpu

    @T.prim_func(s_tir=True)
    def attention_cpu(
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
            attend(q, k_pages, v_pages, page_table, rows, positions, positions, layer, out)

    return attention_cpu
