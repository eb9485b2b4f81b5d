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

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Note = dict[str, Any]
Pairs = list[tuple[Array, Array]]
Reference = Callable[[list[Any], list[Any], Note], Pairs]


def _wide(x: Array) -> Array:
    return x.astype(np.float64)


def _silu(x: Array) -> Array:
    found: Array = x / (1 + np.exp(-x))
    return found


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
    angles = _wide(positions[:, None].astype(np.float32) * frequencies)
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
    cos, sin = _wide(table[:, 0, None]), _wide(table[:, 1, None])

    def turn(x: Array) -> Array:
        a, b, rest = _wide(x[..., :half]), _wide(x[..., half : 2 * half]), _wide(x[..., 2 * half :])
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

    keys, values = _wide(k_pages[layer]), _wide(v_pages[layer])
    turned, size = turn(k), k_pages.shape[3]
    for t, (row, position) in enumerate(zip(rows, positions, strict=True)):
        if position >= 0:
            page, slot = page_table[row, position // size], position % size
            keys[page, :, slot], values[page, :, slot] = turned[t], v[t]
    return [(after[-1], turn(q)), (after[at][layer], keys), (after[at + 1][layer], values)]


def _attend(before: list[Any], note: Note) -> Array:
    q, k_pages, v_pages, page_table, rows, positions, *more = before[:8]
    sinks, layer = (_wide(more[0]), more[1]) if note.get("sinks") else (None, more[0])
    out = np.zeros(q.shape)
    page_size = k_pages.shape[3]
    group = q.shape[1] // k_pages.shape[2]
    for t, (row, position) in enumerate(zip(rows, positions, strict=True)):
        window = note.get("window") or position + 1
        places = np.arange(max(position - window + 1, 0), position + 1)
        if position < 0:
            continue
        pages, slots = page_table[row, places // page_size], places % page_size
        keys = np.repeat(_wide(k_pages[layer, pages, :, slots]), group, axis=1)
        values = np.repeat(_wide(v_pages[layer, pages, :, slots]), group, axis=1)
        scores = np.einsum("hd,phd->hp", _wide(q[t]), keys) * note["scale"]
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
    highest, mass = _wide(stats[..., 0]), _wide(stats[..., 1])
    share = np.exp2(highest - highest.max(0))
    total = (share * mass).sum(0)
    if sinks is not None:
        sink = np.exp2(_wide(sinks) / np.log(2) - highest.max(0))
        total = np.where(total == 0, 0, total + sink)
    # The sums of pieces without mass are not written.
    parts = np.where(mass[..., None] > 0, _wide(sums), 0) * share[..., None]
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


def _weight(operands: list[Array], note: Note) -> Array:
    """The weight that words, scales and maybe zero points stand for."""
    words, scale, *zero = operands
    packing = note.get("packing", {"bits": 4, "offset": 7, "code": "int"})
    bits = packing["bits"]
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    codes = ((words[..., None] >> shifts) & np.uint32((1 << bits) - 1)).reshape(len(words), -1)
    if packing["code"] == "e4m3":
        values = _wide(codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn))
    else:
        values = codes.astype(np.float64) - packing["offset"]
    group = values.shape[1] // scale.shape[1]
    if zero:
        values -= np.repeat(_wide(zero[0]), group, axis=1)
    weight: Array = values * np.repeat(_wide(scale), group, axis=1)
    return weight


def matmul(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(x [n,K], weight [N,K] in one or more tensors) -> y [n,N]`, gated where noted."""
    x, *operands = before[:-1]
    weight = _wide(operands[0]) if len(operands) == 1 else _weight(operands, note)
    y = _wide(x)[:, : weight.shape[1]] @ weight.T
    if note.get("gated"):
        half = y.shape[1] // 2
        y = _silu(y[:, :half]) * y[:, half:]
    return [(after[-1], y)]


def dequantize(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(words, scale[, zero]) -> weight [N,K]`."""
    return [(after[-1], _weight(before[:-1], note))]


def quantized_take(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(words, scale[, zero], ids, rank) -> rows`, zeros for those of other ranks."""
    *operands, ids, rank, _ = before
    weight = _weight(operands, note)
    return [(after[-1], _rows(weight, ids, rank))]


def _rows(table: Array, ids: Array, rank: Array) -> Array:
    at = ids.astype(np.int64) - int(rank[0]) * len(table)
    inside = (at >= 0) & (at < len(table))
    found: Array = np.where(inside[:, None], _wide(table[np.where(inside, at, 0)]), 0)
    return found


def embed(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(table, ids, rank) -> rows`, zeros for those of other ranks."""
    return [(after[-1], _rows(*before[:3]))]


def add_rms_norm(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(x, y, weight) -> (sum, normed)`; the norm is that of the sum as it was rounded."""
    x, y, weight = before[:3]
    total = _wide(after[3])
    scale = 1 / np.sqrt((total**2).mean(1, keepdims=True) + note["eps"])
    return [(after[3], _wide(x) + _wide(y)), (after[4], total * scale * _wide(weight))]


def rms_norm(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(x, weight) -> normed`."""
    x = _wide(before[0])
    scale = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + note["eps"])
    return [(after[-1], x * scale * _wide(before[1]))]


def add(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(x, y) -> x + y`; of one operand, some constant is added."""
    x, *rest, _ = before
    if rest:
        return [(after[-1], _wide(x) + _wide(rest[0]))]
    shift = _wide(after[-1]) - _wide(x)
    return [(shift, np.full_like(shift, shift.flat[0]))]


def maximum(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`x -> max(x, c)` for some constant."""
    return [(after[-1], np.maximum(_wide(before[0]), float(after[-1].min())))]


def gate(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`y [n,2F] -> silu(y[:, :F]) * y[:, F:]`, rounded on the way or not."""
    y = _wide(before[0])
    half = y.shape[1] // 2
    return [(after[-1], _silu(y[:, :half]) * y[:, half:])]


def move(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """A reshape or transpose: elements in their order, or in that of a permutation of axes."""
    x, out = before[0], after[-1]
    if x.size == out.size and note["name"].startswith("reshape"):
        return [(out, x.reshape(out.shape))]
    moved = [np.transpose(x, axes) for axes in itertools.permutations(range(x.ndim))]
    fitting = [y for y in moved if y.shape == out.shape]
    equal = [y for y in fitting if np.array_equal(y, out)]
    return [(out, (equal or fitting)[0])]


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
    "gemv": matmul,
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
    "rms_norm": rms_norm,
    "add": add,
    "maximum": maximum,
    "reshape": move,
    "transpose": move,
    "fused_NT_matmul_cast": matmul,
    "NT_matmul": matmul,
    "fused_strided_slice_strided_slice_silu_multiply": gate,
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
