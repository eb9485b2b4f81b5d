"""Rotary embedding and paged attention on the CPU against float64 numpy."""

import math

import numpy as np
import pytest
import tvm

from shardwright.compiler.kernels import attention, rotary


def build(func):
    """A callable that takes and returns numpy arrays; the ones written are updated in place."""
    mod = tvm.compile(
        tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), target="llvm"
    )

    def call(*args):
        tensors = [tvm.runtime.tensor(a) if isinstance(a, np.ndarray) else a for a in args]
        mod["main"](*tensors)
        for a, t in zip(args, tensors, strict=True):
            if isinstance(a, np.ndarray):
                a[...] = t.numpy()

    return call


class Paged:
    """A batch of rows with different contexts over a shuffled page table."""

    def __init__(self, contexts, *, kv_heads, head_dim, page_size, dtype, layers=2, seed=0):
        rng = np.random.default_rng(seed)
        self.contexts, self.page_size = contexts, page_size
        self.max_pages = max(-(-c // page_size) for c in contexts)
        self.batch, self.pages = len(contexts), len(contexts) * self.max_pages + 3
        shape = (layers, self.pages, kv_heads, page_size, head_dim)
        self.k = rng.standard_normal(shape).astype(dtype)
        self.v = rng.standard_normal(shape).astype(dtype)
        order = rng.permutation(self.pages)[: self.batch * self.max_pages]
        self.table = order.reshape(self.batch, self.max_pages).astype("int32")
        self.sizes = dict(
            kv_heads=kv_heads,
            head_dim=head_dim,
            layers=layers,
            pages=self.pages,
            page_size=page_size,
            batch=self.batch,
            max_pages=self.max_pages,
            dtype=dtype,
        )

    def rows_of(self, cache, layer, row, length):
        """Positions 0..length-1 of a row: [length, kv_heads, head_dim]."""
        at = np.arange(length)
        return cache[layer, self.table[row, at // self.page_size], :, at % self.page_size]


def attend(q, paged, rows, positions, layer, scale, window=0, softcap=0.0, sinks=None):
    out = np.zeros(q.shape)
    group = q.shape[1] // paged.sizes["kv_heads"]
    for t, (row, position) in enumerate(zip(rows, positions, strict=True)):
        if position < 0:
            continue
        k = paged.rows_of(paged.k, layer, row, position + 1).astype("float64").repeat(group, 1)
        v = paged.rows_of(paged.v, layer, row, position + 1).astype("float64").repeat(group, 1)
        s = np.einsum("hd,phd->hp", q[t].astype("float64"), k) * scale
        if softcap:
            s = softcap * np.tanh(s / softcap)
        if window:
            s[:, : max(0, position + 1 - window)] = -np.inf
        top = s.max(1, keepdims=True)
        w = np.exp(s - top)
        total = w.sum(1, keepdims=True)
        if sinks is not None:
            total += np.exp(sinks[:, None].astype("float64") - top)
        out[t] = np.einsum("hp,phd->hd", w / total, v)
    return out


def check_attention(
    paged, heads, rows, positions, layer=1, tokens=None, scale=None, sinks=None, **masks
):
    rng = np.random.default_rng(1)
    dtype, head_dim = paged.sizes["dtype"], paged.sizes["head_dim"]
    q = rng.standard_normal((len(rows), heads, head_dim)).astype(dtype)
    rows, positions = np.array(rows, "int32"), np.array(positions, "int32")
    out = np.full(q.shape, 7, dtype)
    scale = scale or 1 / math.sqrt(head_dim)
    sizes = paged.sizes | masks | {"sinks": sinks is not None}
    kernel = build(attention.attention_cpu(tokens=tokens, heads=heads, scale=scale, **sizes))
    read = [] if sinks is None else [sinks]
    kernel(q, paged.k, paged.v, paged.table, rows, positions, *read, layer, out)
    tolerance = 2e-5 if dtype == "float32" else 2e-3
    np.testing.assert_allclose(
        out,
        attend(q, paged, rows, positions, layer, scale, sinks=sinks, **masks),
        atol=tolerance,
        rtol=tolerance,
    )


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16])
def test_groups_of_query_heads(group):
    paged = Paged([9, 1, 33], kv_heads=2, head_dim=16, page_size=4, dtype="float32", seed=group)
    check_attention(paged, 2 * group, [0, 1, 2], [8, 0, 32], tokens=3)


@pytest.mark.parametrize("head_dim", [16, 20, 32, 64, 80, 96, 128, 256])
def test_head_dims_in_half_precision(head_dim):
    paged = Paged([21, 40], kv_heads=1, head_dim=head_dim, page_size=16, dtype="float16")
    check_attention(paged, 3, [1, 0], [39, 20])


def test_ragged_prefill_with_inactive_tokens():
    paged = Paged([7, 5, 19], kv_heads=2, head_dim=8, page_size=4, dtype="float32")
    rows = [2] * 9 + [0] * 7 + [1, 1, 0, 2]
    positions = [*range(10, 19), *range(7), 3, 4, -1, -1]
    check_attention(paged, 6, rows, positions)


@pytest.mark.parametrize("context", [1, 15, 16, 17, 1000, 4000])
def test_contexts(context):
    paged = Paged([context, 3], kv_heads=1, head_dim=32, page_size=16, dtype="float32")
    check_attention(paged, 2, [0, 1], [context - 1, 2], layer=0)


@pytest.mark.parametrize("window", [1, 4, 5, 40, 41])
def test_windows_shorter_and_longer_than_the_context(window):
    paged = Paged([40, 5, 9], kv_heads=2, head_dim=8, page_size=4, dtype="float32")
    rows, positions = [0, 1, 0, 2, 0], [39, 4, 3, -1, 0]
    check_attention(paged, 4, rows, positions, window=window)


@pytest.mark.parametrize("masks", [{"softcap": 5.0}, {"softcap": 30.0, "window": 7}])
def test_soft_capped_scores(masks):
    # Scores of some tens, so that the cap shows.
    paged = Paged([33, 5], kv_heads=2, head_dim=16, page_size=4, dtype="float32")
    check_attention(paged, 4, [0, 1, 0], [32, 4, 9], scale=4.0, **masks)


@pytest.mark.parametrize("window", [0, 7])
def test_sinks_below_and_far_above_the_scores(window):
    paged = Paged([33, 5], kv_heads=2, head_dim=16, page_size=4, dtype="float32")
    sinks = np.array([-2.0, 0.5, 3.0, -100.0, 200.0, 1.0], "float32")
    check_attention(paged, 6, [0, 1, 0, 1], [32, 4, -1, 0], sinks=sinks, window=window)


def test_large_scores_do_not_overflow():
    paged = Paged([40], kv_heads=1, head_dim=8, page_size=8, dtype="float32")
    paged.k *= 300
    check_attention(paged, 2, [0], [39])


def frequencies(positions, lengths, inv_freq, ntk):
    freq = np.repeat(inv_freq[None].astype("float64"), len(positions), 0)
    if ntk:
        factor, limit = ntk
        j, d = np.arange(len(inv_freq)), 2 * len(inv_freq)
        for t, length in enumerate(lengths):
            if length > limit:
                freq[t] *= (factor * length / limit - (factor - 1)) ** (-2 * j / (d - 2))
    return positions[:, None] * freq


@pytest.mark.parametrize("ntk", [None, (2.0, 64), (8.0, 100)])
@pytest.mark.parametrize("tokens", [None, 5])
def test_rotary_table(ntk, tokens):
    positions = np.array([0, 1, 63, 500, 4095], "int32")
    lengths = np.array([1, 65, 64, 501, 4096], "int32")
    inv_freq = (10000.0 ** (-np.arange(16) / 16)).astype("float32")
    table = np.zeros((5, 2, 16), "float32")
    kernel = build(rotary.rotary_table(tokens=tokens, half=16, scale=1.25, ntk=ntk, target="cpu"))
    kernel(positions, lengths, inv_freq, table)
    angle = frequencies(positions, lengths, inv_freq, ntk)
    # An angle of 4,000 radians has an error of 2e-4 in float32, as in Hugging Face.
    np.testing.assert_allclose(table[:, 0], 1.25 * np.cos(angle), atol=2e-3)
    np.testing.assert_allclose(table[:, 1], 1.25 * np.sin(angle), atol=2e-3)


def test_rotary_table_of_inactive_tokens_is_finite():
    table = np.zeros((2, 2, 4), "float32")
    kernel = build(rotary.rotary_table(tokens=2, half=4, scale=1.0, ntk=(2.0, 8), target="cpu"))
    kernel(np.array([-1, 3], "int32"), np.array([0, 4], "int32"), np.ones(4, "float32"), table)
    assert np.isfinite(table).all()


def test_rotary_table_with_other_frequencies_for_long_sequences():
    positions = np.array([0, 7, 8, 500], "int32")
    lengths = np.array([1, 8, 9, 501], "int32")
    inv_freq = np.stack([0.5 ** np.arange(4), 0.25 ** np.arange(4)]).astype("float32")
    table = np.zeros((4, 2, 4), "float32")
    func = rotary.rotary_table(tokens=None, half=4, scale=1.5, longer=8, target="cpu")
    build(func)(positions, lengths, inv_freq, table)
    angle = positions[:, None] * inv_freq[[0, 0, 1, 1]].astype("float64")
    np.testing.assert_allclose(table[:, 0], 1.5 * np.cos(angle), atol=1e-4)
    np.testing.assert_allclose(table[:, 1], 1.5 * np.sin(angle), atol=1e-4)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("turning", [4, 3, 1])
@pytest.mark.parametrize(("dtype", "tokens"), [("float32", None), ("float16", 5)])
def test_rotary_append(dtype, tokens, turning, joined):
    rng = np.random.default_rng(0)
    heads, kv_heads, head_dim = 6, 2, 8
    paged = Paged([9, 6], kv_heads=kv_heads, head_dim=head_dim, page_size=4, dtype=dtype)
    rows = np.array([1, 0, 0, 1, 0], "int32")
    positions = np.array([5, 3, 4, -1, 8], "int32")
    q = rng.standard_normal((5, heads, head_dim)).astype(dtype)
    k = rng.standard_normal((5, kv_heads, head_dim)).astype(dtype)
    v = rng.standard_normal((5, kv_heads, head_dim)).astype(dtype)
    angle = rng.standard_normal((5, turning)) * 3
    table = np.stack([np.cos(angle), np.sin(angle)], 1).astype("float32")
    q_rot = np.zeros_like(q)
    before_k, before_v = paged.k.copy(), paged.v.copy()
    sizes = dict(tokens=tokens, heads=heads, target="cpu", joined=joined, **paged.sizes)
    sizes["rotary"] = 2 * turning
    read = [np.concatenate([x.reshape(5, -1) for x in (q, k, v)], 1)] if joined else [q, k, v]
    kernel = build(rotary.rotary_append(**sizes))
    kernel(*read, table, paged.k, paged.v, paged.table, rows, positions, 1, q_rot)

    def rotate(x):
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b, rest = np.split(x.astype("float64"), [turning, 2 * turning], axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

    tolerance = 1e-5 if dtype == "float32" else 2e-3
    np.testing.assert_allclose(q_rot, rotate(q), atol=tolerance, rtol=tolerance)
    written = np.zeros(paged.k.shape, bool)
    for t in (0, 1, 2, 4):
        page = paged.table[rows[t], positions[t] // 4]
        at = (1, page, slice(None), positions[t] % 4)
        np.testing.assert_allclose(paged.k[at], rotate(k)[t], atol=tolerance, rtol=tolerance)
        np.testing.assert_array_equal(paged.v[at], v[t])
        written[at] = True
    np.testing.assert_array_equal(paged.k[~written], before_k[~written])
    np.testing.assert_array_equal(paged.v[~written], before_v[~written])
