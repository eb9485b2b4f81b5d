# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Rotary position embedding, and the append of keys and values to the paged cache."""

from __future__ import annotations

import math
from math import gcd
from typing import Any

import tvm
from tvm import tirx
from tvm.script import tirx as T

from .common import (
    SCHEDULED,
    extent,
    for_blocks,
    is_gpu,
    kind_of,
    lanes_for,
    launch_dependents,
    wait_for_inputs,
)


def _power(base: Any, exponent: Any, target: Any) -> Any:
    """`base ** exponent`, float32, base positive, on a GPU."""
    if kind_of(target) == "cuda":
        # powf, cosf, sinf by name: the intrinsics become fast-math versions, which are wrong for
        # angles of thousands of radians.
        return T.call_pure_extern("float32", "powf", base, exponent)
    return T.exp2(T.log2(base) * exponent)


def _sine(angle: Any, target: Any, quarters: int = 0) -> Any:
    """The sine of `angle + quarters * pi / 2`, float32, of any angle below 2 ** 31, on a GPU."""
    if kind_of(target) == "cuda":
        return T.call_pure_extern("float32", "cosf" if quarters else "sinf", angle)
    # AMD's instructions lose an angle of thousands of radians. The nearest multiple of pi / 2 is
    # taken off in double precision; on what is left, the polynomials of Cephes' sinf and cosf.
    wide = T.cast(angle, "float64")
    turns = T.nearbyint(wide * T.float64(2 / math.pi))
    x = T.cast(wide - turns * T.float64(math.pi / 2), "float32")
    y = x * x
    sine = x + x * y * _polynomial(y, -1.6666654611e-1, 8.3321608736e-3, -1.9515295891e-4)
    cosine = (
        T.float32(1)
        - y * T.float32(0.5)
        + y * y * _polynomial(y, 4.166664568298827e-2, -1.388731625493765e-3, 2.443315711809948e-5)
    )
    quarter = T.cast(turns, "int32") + quarters
    value = T.if_then_else(T.bitwise_and(quarter, 1) == 0, sine, cosine)
    return T.if_then_else(T.bitwise_and(quarter, 2) == 0, value, -value)


def _polynomial(x: Any, *coefficients: float) -> Any:
    value = T.float32(coefficients[-1])
    for c in coefficients[-2::-1]:
        value = value * x + T.float32(c)
    return value


def rotary_table(
    *,
    tokens: int | None,
    half: int,
    scale: float,
    ntk: tuple[float, int] | None = None,
    longer: int = 0,
    target: Any,
) -> tirx.PrimFunc:
    """Cosines and sines of each token's angles.

    `(positions [n] i32, lengths [n] i32, inv_freq [half] f32) -> table [n, 2, half] f32`

    `table[t, 0]` is `cos(position * inv_freq) * scale`, `table[t, 1]` the sine. With
    `ntk = (factor, max_position)` the frequencies follow Hugging Face's "dynamic" rope scaling by
    `lengths[t]`, the length in tokens of the token's prompt. With `longer`, `inv_freq` is
    [2, half], and the second row is for tokens whose length is above it. Rows of inactive tokens
    (position -1) hold finite numbers without meaning.
    """
    n = extent(tokens)
    factor, limit = ntk if ntk else (1.0, 1)
    # inv_freq_j = base ** (-2j / D); dynamic NTK scales base by ratio ** (D / (D - 2)).
    step = -2.0 / max(2 * half - 2, 1)
    dynamic = ntk is not None
    shape = (2, half) if longer else (half,)

    def frequency(inv_freq: Any, length: Any, j: Any) -> Any:
        return inv_freq[T.if_then_else(length > longer, 1, 0), j] if longer else inv_freq[j]

    if is_gpu(target):

        @T.prim_func(s_tir=True)
        def rotary_table_gpu(
            positions_h: T.handle, lengths_h: T.handle, inv_freq_h: T.handle, table_h: T.handle
        ):
            T.func_attr(SCHEDULED)
            positions = T.match_buffer(positions_h, (n,), "int32")
            lengths = T.match_buffer(lengths_h, (n,), "int32")
            inv_freq = T.match_buffer(inv_freq_h, shape, "float32")
            table = T.match_buffer(table_h, (n, 2, half), "float32")
            with T.sblock("root"):
                T.reads()
                T.writes()
                for t in T.thread_binding(n, thread="blockIdx.x"):
                    for j in T.thread_binding(half, thread="threadIdx.x"):
                        launch_dependents(target)
                        freq: T.float32 = frequency(inv_freq, lengths[t], j)
                        wait_for_inputs(target)
                        if dynamic:
                            if lengths[t] > limit:
                                ratio: T.let[T.float32] = T.cast(lengths[t], "float32") * T.float32(
                                    factor / limit
                                ) - T.float32(factor - 1.0)
                                freq = freq * _power(
                                    ratio, T.cast(j, "float32") * T.float32(step), target
                                )
                        angle: T.let[T.float32] = T.cast(positions[t], "float32") * freq
                        table[t, 0, j] = _sine(angle, target, 1) * T.float32(scale)
                        table[t, 1, j] = _sine(angle, target) * T.float32(scale)

        return rotary_table_gpu

    @T.prim_func(s_tir=True)
    def rotary_table_cpu(
        positions_h: T.handle, lengths_h: T.handle, inv_freq_h: T.handle, table_h: T.handle
    ):
        T.func_attr(SCHEDULED)
        positions = T.match_buffer(positions_h, (n,), "int32")
        lengths = T.match_buffer(lengths_h, (n,), "int32")
        inv_freq = T.match_buffer(inv_freq_h, shape, "float32")
        table = T.match_buffer(table_h, (n, 2, half), "float32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for t in T.parallel(n):
                for j in T.serial(half):
                    freq: T.float32 = frequency(inv_freq, lengths[t], j)
                    if dynamic:
                        if lengths[t] > limit:
                            ratio: T.let[T.float32] = T.cast(lengths[t], "float32") * T.float32(
                                factor / limit
                            ) - T.float32(factor - 1.0)
                            freq = freq * T.pow(ratio, T.cast(j, "float32") * T.float32(step))
                    angle: T.let[T.float32] = T.cast(positions[t], "float32") * freq
                    table[t, 0, j] = T.cos(angle) * T.float32(scale)
                    table[t, 1, j] = T.sin(angle) * T.float32(scale)

    return rotary_table_cpu


def rotary_append(
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
    target: Any,
    joined: bool = False,
    rotary: int | None = None,
) -> tirx.PrimFunc:
    """Rotate queries and keys, and append keys and values to the cache.

    `(q [n,H,D], k [n,K,D], v [n,K,D], table [n,2,D/2] f32, k_pages, v_pages, page_table [B,P] i32,
    rows [n] i32, positions [n] i32, layer i64) -> q_rot [n,H,D]`, with `k_pages` and `v_pages`
    `[layers, pages, K, page_size, D]` written in place. Pairs are (j, j + D/2), as in the
    `rotate_half` of Hugging Face; the arithmetic is float32. Tokens of position -1 append nothing.
    With `joined`, one `qkv [n,(H+2K)*D]` stands for q, k and v. Of a head, only the first `rotary`
    elements are turned (R in place of D in the table and the pairs), all if None.
    """
    n = extent(tokens)
    half = head_dim // 2
    turning = (rotary or head_dim) // 2
    cache = (layers, pages, kv_heads, page_size, head_dim)
    parts = heads + 2 * kv_heads
    gpu = is_gpu(target)
    # Adjacent pairs that a thread takes, so that it reads and writes 16 bytes at once.
    lanes = lanes_for(gcd(half, turning), 128 // tvm.DataType(dtype).bits) if gpu else 1
    threads = half // lanes  # of a head
    # A block takes several heads of a prefill: one would be done before the next is launched.
    together = max(1, min(parts, 256 // threads)) if gpu and tokens is None else 1

    def read(source: Any, t: Any, part: Any, first: int, j: Any) -> Any:
        """Element j of a head: `part` counts all heads, of which q, k or v begins at `first`."""
        return source[t, part * head_dim + j] if joined else source[t, part - first, j]

    # In units of `lanes`, so that TVM sees that reads are aligned.
    turning_units, half_units = turning // lanes, half // lanes

    def low(unit: Any) -> Any:
        """The first elements of a unit of pairs; pairs that are not turned follow the others."""
        if turning == half:
            return unit
        return T.if_then_else(unit < turning_units, unit, unit + turning_units)

    def high(unit: Any) -> Any:
        if turning == half:
            return unit + half_units
        return unit + T.if_then_else(unit < turning_units, turning_units, half_units)

    def angle(table: Any, t: Any, which: int, j: Any) -> Any:
        """Cosine (0) or sine (1) of pair j."""
        if turning == half:
            return table[t, which, j]
        still = T.float32(1 - which)
        return T.if_then_else(j < turning, table[t, which, T.min(j, turning - 1)], still)

    def each_heads() -> Any:
        return T.thread_binding(-(-parts // together), thread="blockIdx.y") if gpu else T.serial(1)

    def each_head() -> Any:
        return T.thread_binding(together, thread="threadIdx.y") if gpu else T.serial(parts)

    def each_pairs() -> Any:
        return T.thread_binding(threads, thread="threadIdx.x") if gpu else T.serial(threads)

    @T.inline
    def load(source, t, part, first, one, other, a, b):
        for e in T.vectorized(lanes):
            a[e] = read(source, t, part, first, one * lanes + e)
        for e in T.vectorized(lanes):
            b[e] = read(source, t, part, first, other * lanes + e)

    @T.inline
    def turn(table, t, j, a, b):
        """Turn the pairs (a, b) by the token's angles."""
        for e in T.unroll(lanes):
            x: T.let[T.float32] = T.cast(a[e], "float32")
            y: T.let[T.float32] = T.cast(b[e], "float32")
            c: T.let[T.float32] = angle(table, t, 0, j + e)
            s: T.let[T.float32] = angle(table, t, 1, j + e)
            a[e] = T.cast(x * c - y * s, dtype)
            b[e] = T.cast(y * c + x * s, dtype)

    @T.inline
    def append(cache, layer, page, h, slot, one, other, a, b):
        for e in T.vectorized(lanes):
            cache[layer, page, h, slot, one * lanes + e] = a[e]
        for e in T.vectorized(lanes):
            cache[layer, page, h, slot, other * lanes + e] = b[e]

    @T.inline
    def body(q, k, v, table, k_pages, v_pages, page_table, rows, positions, layer, q_rot):
        # Query heads, then key heads, then value heads.
        for t in for_blocks(n, gpu):
            for group in each_heads():
                for member in each_head():
                    for unit in each_pairs():
                        launch_dependents(target)
                        wait_for_inputs(target)
                        a = T.alloc_buffer((lanes,), dtype, scope="local")
                        b = T.alloc_buffer((lanes,), dtype, scope="local")
                        part: T.let[T.int32] = group * together + member
                        j: T.let[T.int32] = unit * lanes
                        # Not lets, which would be put in: CUDA cannot choose between vectors.
                        one: T.int32 = low(unit)
                        other: T.int32 = high(unit)
                        if part < heads:
                            load(q, t, part, 0, one, other, a, b)
                            turn(table, t, j, a, b)
                            for e in T.vectorized(lanes):
                                q_rot[t, part, one * lanes + e] = a[e]
                            for e in T.vectorized(lanes):
                                q_rot[t, part, other * lanes + e] = b[e]
                        else:
                            position: T.let[T.int32] = positions[t]
                            if position >= 0 and part < parts:
                                page: T.let[T.int32] = page_table[rows[t], position // page_size]
                                slot: T.let[T.int32] = position % page_size
                                if part < heads + kv_heads:
                                    load(k, t, part, heads, one, other, a, b)
                                    turn(table, t, j, a, b)
                                    h: T.let[T.int32] = part - heads
                                    append(k_pages, layer, page, h, slot, one, other, a, b)
                                else:
                                    g: T.let[T.int32] = part - heads - kv_heads
                                    load(v, t, part, heads + kv_heads, one, other, a, b)
                                    append(v_pages, layer, page, g, slot, one, other, a, b)

    if joined:

        @T.prim_func(s_tir=True)
        def rotary_append_joined(
            qkv_h: T.handle,
            table_h: T.handle,
            k_pages_h: T.handle,
            v_pages_h: T.handle,
            page_table_h: T.handle,
            rows_h: T.handle,
            positions_h: T.handle,
            layer: T.int64,
            q_rot_h: T.handle,
        ):
            T.func_attr(SCHEDULED)
            qkv = T.match_buffer(qkv_h, (n, parts * head_dim), dtype)
            table = T.match_buffer(table_h, (n, 2, turning), "float32")
            k_pages = T.match_buffer(k_pages_h, cache, dtype)
            v_pages = T.match_buffer(v_pages_h, cache, dtype)
            page_table = T.match_buffer(page_table_h, (extent(batch, "b"), max_pages), "int32")
            rows = T.match_buffer(rows_h, (n,), "int32")
            positions = T.match_buffer(positions_h, (n,), "int32")
            q_rot = T.match_buffer(q_rot_h, (n, heads, head_dim), dtype)
            with T.sblock("root"):
                T.reads()
                T.writes()
                body(
                    qkv,
                    qkv,
                    qkv,
                    table,
                    k_pages,
                    v_pages,
                    page_table,
                    rows,
                    positions,
                    layer,
                    q_rot,
                )

        return rotary_append_joined

    @T.prim_func(s_tir=True)
    def rotary_append_plain(
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
        q_rot_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        q = T.match_buffer(q_h, (n, heads, head_dim), dtype)
        k = T.match_buffer(k_h, (n, kv_heads, head_dim), dtype)
        v = T.match_buffer(v_h, (n, kv_heads, head_dim), dtype)
        table = T.match_buffer(table_h, (n, 2, turning), "float32")
        k_pages = T.match_buffer(k_pages_h, cache, dtype)
        v_pages = T.match_buffer(v_pages_h, cache, dtype)
        page_table = T.match_buffer(page_table_h, (extent(batch, "b"), max_pages), "int32")
        rows = T.match_buffer(rows_h, (n,), "int32")
        positions = T.match_buffer(positions_h, (n,), "int32")
        q_rot = T.match_buffer(q_rot_h, (n, heads, head_dim), dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            body(q, k, v, table, k_pages, v_pages, page_table, rows, positions, layer, q_rot)

    return rotary_append_plain
