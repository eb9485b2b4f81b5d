"""What each kernel should compute, in numpy and float64: the references of `selftest`.

A reference takes the kernel's arguments as they were before the call and as they are after it, and
what the build noted of it (`Note`). It returns pairs of what the kernel wrote and what it should
have written. Arguments are in the order of `compiler/kernels`: tensors read or written in place,
numbers, results.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from shardwright.runtime import expert_references as experts
from shardwright.runtime.reference_values import Array, Note, Pairs, silu, wide
from shardwright.runtime.reference_values import weight as weight_of

Reference = Callable[[list[Any], list[Any], Note], Pairs]


def rotary_table(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(positions, lengths, inv_freq) -> table [n, 2, half]`."""
    positions, lengths, inv_freq = before[:3]
    active = positions >= 0
    # The kernel's angles are float32 too; what is checked is their sines.
    frequencies = np.broadcast_to(inv_freq, (len(positions), *inv_freq.shape)).astype(np.float32)
    if note.get("longer"):
        long = (lengths > note["longer"]).astype(int)
        frequencies = frequencies[np.arange(len(positions)), long]
    if note.get("ntk"):
        factor, limit = note["ntk"]
        half = inv_freq.shape[-1]
        ratio = np.maximum(lengths / limit * factor - (factor - 1), 1.0)
        step = np.arange(half) * (-2.0 / max(2 * half - 2, 1))
        scaled = (frequencies * ratio[:, None] ** step).astype(np.float32)
        frequencies = np.where((lengths > limit)[:, None], scaled, frequencies)
    angles = wide(positions[:, None].astype(np.float32) * frequencies)
    wanted = np.stack([np.cos(angles), np.sin(angles)], 1) * note["scale"]
    return [(after[-1][active], wanted[active])]


def rotary_append(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(q, k, v | qkv, table, k_pages, v_pages, page_table, rows, positions, layer) -> q_rot`."""
    at = next(i for i, x in enumerate(before) if np.ndim(x) == 5)
    table, k_pages, v_pages, page_table, rows, positions, layer = before[at - 1 : at + 6]
    heads, kv, dim = note["heads"], note["kv_heads"], note["head_dim"]
    if note["joined"]:
        whole = before[0].reshape(len(rows), heads + 2 * kv, dim)
        q, k, v = whole[:, :heads], whole[:, heads : heads + kv], whole[:, heads + kv :]
    else:
        q, k, v = before[:3]
    half = (note.get("rotary") or dim) // 2
    cos, sin = wide(table[:, 0, None]), wide(table[:, 1, None])

    def turn(x: Array) -> Array:
        a, b, rest = wide(x[..., :half]), wide(x[..., half : 2 * half]), wide(x[..., 2 * half :])
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

    keys, values = wide(k_pages[layer]), wide(v_pages[layer])
    turned, size = turn(k), k_pages.shape[3]
    for t, (row, position) in enumerate(zip(rows, positions, strict=True)):
        if position >= 0:
            page, slot = page_table[row, position // size], position % size
            keys[page, :, slot], values[page, :, slot] = turned[t], v[t]
    return [(after[-1], turn(q)), (after[at][layer], keys), (after[at + 1][layer], values)]


def _attend(before: list[Any], note: Note) -> Array:
    q, k_pages, v_pages, page_table, rows, positions, *more = before[:8]
    sinks, layer = (wide(more[0]), more[1]) if note.get("sinks") else (None, more[0])
    out = np.zeros(q.shape)
    page_size = k_pages.shape[3]
    group = q.shape[1] // k_pages.shape[2]
    for t, (row, position) in enumerate(zip(rows, positions, strict=True)):
        window = note.get("window") or position + 1
        places = np.arange(max(position - window + 1, 0), position + 1)
        if position < 0:
            continue
        pages, slots = page_table[row, places // page_size], places % page_size
        keys = np.repeat(wide(k_pages[layer, pages, :, slots]), group, axis=1)
        values = np.repeat(wide(v_pages[layer, pages, :, slots]), group, axis=1)
        scores = np.einsum("hd,phd->hp", wide(q[t]), keys) * note["scale"]
        if note.get("softcap"):
            scores = np.tanh(scores / note["softcap"]) * note["softcap"]
        weights = np.exp(scores - scores.max(1, keepdims=True))
        total = weights.sum(1, keepdims=True)
        if sinks is not None:
            total += np.exp(sinks[:, None] - scores.max(1, keepdims=True))
        weights /= total
        out[t] = np.einsum("hp,phd->hd", weights, values)
    return out


def attention(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(q, k_pages, v_pages, page_table, rows, positions[, sinks], layer) -> out [n,H,D]`."""
    return [(after[-1], _attend(before, note))]


def decode_attention(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(..., k_pages, v_pages, page_table, rows, positions, layer) -> (out, sums, stats)`.

    Before the pages is the query, or all that `rotary_append` takes where that is to be done first.
    """
    at = next(i for i, x in enumerate(before) if np.ndim(x) == 5)
    where = before[at + 2 : at + 6]
    if not note.get("append"):
        return [(after[-3], _attend(before, note))]
    joined = note | {"joined": note["append"] == "joined"}
    (_, turned), *pages = rotary_append(before, after, joined)
    query = turned.astype(before[0].dtype)
    return [(after[-3], _attend([query, *after[at : at + 2], *where], note)), *pages]


def _join(sums: Array, stats: Array, sinks: Array | None = None) -> Array:
    highest, mass = wide(stats[..., 0]), wide(stats[..., 1])
    share = np.exp2(highest - highest.max(0))
    total = (share * mass).sum(0)
    if sinks is not None:
        sink = np.exp2(wide(sinks) / np.log(2) - highest.max(0))
        total = np.where(total == 0, 0, total + sink)
    # The sums of pieces without mass are not written.
    parts = np.where(mass[..., None] > 0, wide(sums), 0) * share[..., None]
    joined: Array = parts.sum(0) / np.where(total == 0, 1, total)[..., None]
    return joined


def attention_partial(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(...) -> (sums, stats)`: the pieces must join to attention, however it is cut."""
    return [(_join(after[-2], after[-1]), _attend(before, note))]


def attention_combine(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(sums, stats[, sinks]) -> out`."""
    return [(after[-1], _join(*before[:-1]))]


def store_logits(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(new, last, logits)`: in place, rows with `last >= 0`."""
    new, last, logits = before
    return [(after[2], np.where((last >= 0)[:, None], new, logits))]


def sample(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """Greedy rows: the largest logit's token, and its place in the history."""
    logits, _, tokens, positions, history, sampling_f, *_ = before
    space = (positions >= 0) & (positions + 1 < history.shape[1])
    best = logits.argmax(1)
    moved = history.copy()
    moved[np.flatnonzero(space), positions[space] + 1] = best[space]
    wanted = np.where(space, best, tokens), np.where(space, positions + 1, positions), moved
    greedy = sampling_f[:, 0] <= 0
    return [(got[greedy], want[greedy]) for got, want in zip(after[2:5], wanted, strict=True)]


def matmul(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(x [n,K], weight [N,K] in one or more tensors) -> y [n,N]`, gated where noted."""
    x, *operands = before[:-1]
    weight = wide(operands[0]) if len(operands) == 1 else weight_of(operands, note)
    y = wide(x)[:, : weight.shape[1]] @ weight.T
    if note.get("gated"):
        half = y.shape[1] // 2
        y = silu(y[:, :half]) * y[:, half:]
    return [(after[-1], y)]


def gated_matmul(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`matmul` that is gated."""
    return matmul(before, after, note | {"gated": True})


def dequantize(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(words, scale[, zero]) -> weight [N,K]`."""
    return [(after[-1], weight_of(before[:-1], note))]


def quantized_take(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(words, scale[, zero], ids, rank) -> rows`, zeros for those of other ranks."""
    *operands, ids, rank, _ = before
    weight = weight_of(operands, note)
    return [(after[-1], _rows(weight, ids, rank))]


def _rows(table: Array, ids: Array, rank: Array) -> Array:
    at = ids.astype(np.int64) - int(rank[0]) * len(table)
    inside = (at >= 0) & (at < len(table))
    found: Array = np.where(inside[:, None], wide(table[np.where(inside, at, 0)]), 0)
    return found


def embed(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(table, ids, rank) -> rows`, zeros for those of other ranks."""
    return [(after[-1], _rows(*before[:3]))]


def add_rms_norm(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(x, y, weight) -> (sum, normed)`; the norm is that of the sum as it was rounded."""
    x, y, weight = before[:3]
    total = wide(after[3])
    scale = 1 / np.sqrt((total**2).mean(1, keepdims=True) + note["eps"])
    return [(after[3], wide(x) + wide(y)), (after[4], total * scale * wide(weight))]


def add_norm_product(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(residual, y, norm, *weight) -> (product of the sum's norm, sum)`, gated where noted."""
    total = (after[-1], wide(before[0]) + wide(before[1]))
    return [total, _product_of_norm(before[2:-2], after[-2:], note)]


def sum_norm_product(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(residual, norm, *weight, ...) -> (product, sum)`, the summands being elsewhere."""
    weight_ends = 4 if before[2].dtype == np.uint32 else 3
    return [_product_of_norm(before[1:weight_ends], after[-2:], note)]


def norm_product(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(weighted, squares, *weight) -> product of the norm`; see `gemv_norm.add_gemv`."""
    weighted, squares, *operands, _ = before
    x = 16 * wide(weighted)
    x /= np.sqrt(wide(squares).sum(1, keepdims=True) / x.shape[1] + note["eps"])
    return matmul([x, *operands, after[-1]], after, note)


def add_product(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(x, *weight, residual, norm) -> (sum, weighted, squares)`; see `gemv_norm.add_gemv`."""
    *operands, residual, norm = before[:-3]
    total, weighted, squares = after[-3:]
    ((_, y),) = matmul([*operands, total], [total], note)
    row = wide(total)  # as it was rounded
    return [
        (total, wide(residual) + y),
        (weighted, row * wide(norm) / 16),
        (squares.sum(1), (row**2).sum(1)),
    ]


def sum_add_product(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """As `add_product`, the summands being elsewhere."""
    norm, (total, weighted, squares) = before[-7], after[-3:]
    row = wide(total)
    return [(weighted, row * wide(norm) / 16), (squares.sum(1), (row**2).sum(1))]


def _product_of_norm(
    operands: list[Array], results: list[Array], note: Note
) -> tuple[Array, Array]:
    """The product with the norm of the sum as it was rounded: what is, and what should be."""
    norm, *weight = operands
    found, total = results
    scale = 1 / np.sqrt((wide(total) ** 2).mean(1, keepdims=True) + note["eps"])
    x = (wide(total) * scale * wide(norm)).astype(np.float16)
    return matmul([x, *weight, found], [found], note)[0]


def rms_norm(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(x, weight) -> normed`."""
    x = wide(before[0])
    scale = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + note["eps"])
    return [(after[-1], x * scale * wide(before[1]))]


def add(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(x, y) -> x + y`; of one operand, some constant is added."""
    x, *rest, _ = before
    if rest:
        return [(after[-1], wide(x) + wide(rest[0]))]
    shift = wide(after[-1]) - wide(x)
    return [(shift, np.full_like(shift, shift.flat[0]))]


def maximum(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`x -> max(x, c)` for some constant."""
    return [(after[-1], np.maximum(wide(before[0]), float(after[-1].min())))]


def gate(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`y [n,2F] -> silu(y[:, :F]) * y[:, F:]`, rounded on the way or not."""
    y = wide(before[0])
    half = y.shape[1] // 2
    return [(after[-1], silu(y[:, :half]) * y[:, half:])]


def move(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """A reshape or transpose: elements in their order, or in that of a permutation of axes."""
    x, out = before[0], after[-1]
    if x.size == out.size and note["name"].startswith("reshape"):
        return [(out, x.reshape(out.shape))]
    moved = [np.transpose(x, axes) for axes in itertools.permutations(range(x.ndim))]
    fitting = [y for y in moved if y.shape == out.shape]
    equal = [y for y in fitting if np.array_equal(y, out)]
    return [(out, (equal or fitting)[0])]


def take_columns(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(x, index) -> x[:, index]`, zeros where the index is -1."""
    x, index = before[:2]
    return [(after[-1], np.where(index >= 0, wide(x)[:, np.maximum(index, 0)], 0))]


def take(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(data, ids) -> data[ids]`."""
    return [(after[-1], before[0][before[1]])]


REFERENCES: dict[str, Reference] = {
    "rotary_table": rotary_table,
    "rotary_append": rotary_append,
    "attention_cpu": attention,
    "attention_prefill": attention,
    "prefill_attention": attention,
    "decode_attention": decode_attention,
    "attention_partial": attention_partial,
    "attention_combine": attention_combine,
    "store_logits": store_logits,
    "sample": sample,
    "matmul_cpu": matmul,
    "matmul_rocm": matmul,
    "gated_gemm": gated_matmul,
    "gemv": matmul,
    "gemv_mma": matmul,
    "gemv_rows": matmul,
    "gemv_tokens": matmul,
    "add_norm_gemv": add_norm_product,
    "sum_norm_gemv": sum_norm_product,
    "add_gemv": add_product,
    "sum_add_gemv": sum_add_product,
    "norm_gemv": norm_product,
    "q4_gemv": matmul,
    "q4_batch": matmul,
    "quantized_gemv": matmul,
    "quantized_matmul_cpu": matmul,
    "q4_dequantize": dequantize,
    "dequantize": dequantize,
    "q4_take": quantized_take,
    "quantized_take": quantized_take,
    "add_rms_norm": add_rms_norm,
    "silu_mul": gate,
    "embed": embed,
    "take": take,
    "take_columns": take_columns,
    "route": experts.route,
    "experts_up": experts.experts_up,
    "experts_down": experts.experts_down,
    "expert_order": experts.expert_order,
    "experts_grouped": experts.experts_grouped,
    "experts_sum": experts.experts_sum,
    "rms_norm": rms_norm,
    "add": add,
    "maximum": maximum,
    "reshape": move,
    "transpose": move,
    "fused_NT_matmul_cast": matmul,
    "NT_matmul": matmul,
    "fused_strided_slice_strided_slice_silu_multiply": gate,
    "fused_strided_slice_silu_strided_slice_multiply": gate,
}


def reference_of(kernel: str) -> Reference | None:
    """The reference of a kernel by its name in the library, None if there is none."""
    plain = "_".join(re.sub(r"\d+$", "", part) for part in kernel.split("_"))
    plain = plain.removesuffix("_kernel")
    # The digit of names like q4_gemv and float16 is no counter.
    for name in (kernel, re.sub(r"(_kernel)?\d*$", "", kernel), plain):
        if name in REFERENCES:
            return REFERENCES[name]
    return None
