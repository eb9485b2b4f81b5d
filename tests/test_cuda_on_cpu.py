"""CUDA sources of compiler/kernels, run on the CPU by tests/cuda_on_cpu.h."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
import test_kernel_sampling as reference

from shardwright.compiler.kernels import all_reduce
from shardwright.runtime.outbox import SLOTS, Outbox

ROWS = 3


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    (folder / "cuda_fp16.h").write_text("")
    source, out = Path(__file__).with_name("kernels_on_cpu.cc"), folder / "kernels.so"
    options = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-pthread", f"-I{folder}"]
    subprocess.run(["g++", *options, "-o", str(out), str(source)], check=True)
    return ctypes.CDLL(str(out))


def addresses(arrays):
    return (ctypes.c_void_p * len(arrays))(*[a.ctypes.data for a in arrays])


@pytest.mark.parametrize("two_shots", [False, True])
@pytest.mark.parametrize(("ranks", "size", "parts"), [(2, 264, 1), (3, 1032, 4), (8, 264, 2)])
def test_all_reduce(library, ranks, size, parts, two_shots):
    def call(fused, state, rows):
        return library.all_reduce(ranks, size, parts, two_shots, fused, state, rows)

    check_all_reduce(call, ranks, size, 8 * ranks * ROWS * size)


@pytest.mark.parametrize("two_shots", [False, True])
@pytest.mark.parametrize(("ranks", "size"), [(2, 264), (3, 1032), (3, 1024), (8, 264)])
def test_all_reduce_of_many_rows(library, ranks, size, two_shots):
    def call(fused, state, rows):
        return library.all_reduce_many(ranks, size, two_shots, fused, state, rows)

    nbytes = all_reduce.many_bytes(ranks=ranks, rows=ROWS, features=size, two_shots=two_shots)
    check_all_reduce(call, ranks, size, 16 + nbytes, image=size == 1024)


def from_image(image, n):
    """x [n, K] of an image of it, by the definitions in q4_image.cuh."""
    tile, columns = 64 if n <= 64 else 128 if n <= 128 else 256, image.shape[1]
    token = np.arange(n)[:, None]
    chunk = np.arange(columns // 8)
    line = (token // tile * (columns // 64) + chunk // 8) * tile + token % tile
    chunks = image.reshape(-1, 8)[line * 8 + (chunk % 8 ^ token % 8)]
    place, i = np.arange(16)[:, None], np.arange(8)
    order = (32 * (i // 2) + 8 * (place // 4) + place % 4 + 4 * (i % 2)).ravel()
    x = np.empty((n, columns // 128, 128), image.dtype)
    x[:, :, order] = chunks.reshape(n, -1, 128)
    return x.reshape(n, columns)


@pytest.mark.parametrize("n", [3, 100, 130, 260])
def test_images_hold_what_the_kernels_compute(library, n):
    rng = np.random.default_rng(n)
    rows = -(-n // 256) * 256
    y = rng.standard_normal((n, 512)).astype("float16")
    gate, up = y[:, :256].astype("float64"), y[:, 256:].astype("float64")
    for kernel in (library.silu_mul_image, library.gated_image):
        image = np.zeros((rows, 256), "float16")
        kernel(*(ctypes.c_void_p(a.ctypes.data) for a in (y, image)), n, 256)
        gated = from_image(image, n)
        np.testing.assert_allclose(gated, gate / (1 + np.exp(-gate)) * up, 1e-3, 1e-7)

    x, image = rng.standard_normal((n, 256)).astype("float16"), np.zeros((rows, 256), "float16")
    library.pairs_image(*(ctypes.c_void_p(a.ctypes.data) for a in (x, image)), n)
    np.testing.assert_array_equal(from_image(image, n), x)

    x, residual = rng.standard_normal((2, n, 2048)).astype("float16")
    weight, total = rng.standard_normal(2048).astype("float16"), np.zeros((n, 2048), "float16")
    image = np.zeros((rows, 2048), "float16")
    arrays = (x, residual, weight, total, image)
    library.add_rms_norm_image(*(ctypes.c_void_p(a.ctypes.data) for a in arrays), n)
    np.testing.assert_array_equal(total, x + residual)
    scale = 1 / np.sqrt((total.astype("float64") ** 2).mean(1, keepdims=True) + 1e-5)
    normed = total.astype("float64") * scale * weight.astype("float64")
    np.testing.assert_allclose(from_image(image, n), normed, rtol=2e-3, atol=1e-5)


def check_all_reduce(call, ranks, size, nbytes, image=False):
    """Sums and norms of `call` on buffers of `nbytes`, several times, against numpy's.

    With `image` norms are written as an image.
    """
    rng = np.random.default_rng(ranks)
    residual, weight = rng.standard_normal((2, ROWS, size)).astype("float16")
    weight = weight[0]
    x = [np.empty((ROWS, size), "float16") for _ in range(ranks)]
    sums = [np.zeros((ROWS, size), "float16") for _ in range(ranks)]
    norms = [np.zeros((64 if image else ROWS, size), "float16") for _ in range(ranks)]
    calls = [np.zeros(ROWS, "int32") for _ in range(ranks)]
    numbers = [np.array([r], "int32") for r in range(ranks)]
    # Behind each buffer is a margin that nothing may write to.
    buffers = [np.zeros(nbytes + 64, "uint8") for _ in range(ranks)]
    give_up = np.zeros(1, "int32")
    peers = np.array([a.ctypes.data for a in (*buffers, give_up)], "int64")
    arguments = [
        array.ctypes.data
        for r in range(ranks)
        for array in (x[r], residual, weight, sums[r], norms[r], peers, calls[r], numbers[r])
    ]
    state = (ctypes.c_void_p * len(arguments))(*arguments)
    # Calls of different kinds and numbers of rows follow each other on the same buffers.
    for fused, rows in ((True, ROWS), (False, 1), (True, 2), (True, ROWS)):
        for values in x:
            values[:] = rng.standard_normal(values.shape)
        for values in (*sums, *norms):
            values[:] = 0
        assert call(fused, state, rows) == 0
        total = np.zeros((rows, size), "float32")
        for values in x:
            total += values[:rows].astype("float32")
        expected = total.astype("float16")
        if fused:
            expected = residual[:rows] + expected
            scale = 1 / np.sqrt((expected.astype("float64") ** 2).mean(1, keepdims=True) + 1e-5)
            normed = expected.astype("float64") * scale * weight.astype("float64")
            found = from_image(norms[0], rows) if image else norms[0][:rows]
            np.testing.assert_allclose(found, normed, rtol=2e-3, atol=1e-5)
        for r in range(ranks):
            np.testing.assert_array_equal(sums[r][:rows], expected)
            np.testing.assert_array_equal(sums[r][rows:], 0)
            np.testing.assert_array_equal(norms[r], norms[0])
    assert all(c.tolist() == [4, 3, 2] for c in calls)
    assert not any(buffer[nbytes:].any() for buffer in buffers)


def test_a_rank_that_waits_gives_up_when_told(library):
    x = [np.ones((ROWS, 264), "float16") for _ in range(2)]
    give_up = np.ones(1, "int32")
    # What both push goes astray, so neither receives anything.
    astray, buffers = (np.zeros((2, 2 * 2 * ROWS * 264), "uint32") for _ in range(2))
    calls = [np.zeros(ROWS, "int32") for _ in range(2)]
    numbers = [np.array([r], "int32") for r in range(2)]
    sums, norms = np.zeros((2, 2, ROWS, 264), "float16")
    seen = [[buffers[0], astray[1]], [astray[0], buffers[1]]]
    peers = [np.array([a.ctypes.data for a in (*pair, give_up)], "int64") for pair in seen]
    arguments = [
        array.ctypes.data
        for r in range(2)
        for array in (x[r], x[r], x[r], sums[r], norms[r], peers[r], calls[r], numbers[r])
    ]
    state = (ctypes.c_void_p * len(arguments))(*arguments)
    assert library.all_reduce(2, 264, 1, False, False, state, 1) == 0
    assert all(c[0] == 1 for c in calls)
    # From then on none waits, or so much as looks at the word.
    assert all(pair[2] == 0 for pair in peers)
    give_up[0] = 0
    assert library.all_reduce(2, 264, 1, False, False, state, 1) == 0
    assert all(c[0] == 2 for c in calls)


def test_logits_are_gathered(library):
    rng = np.random.default_rng(0)
    new = rng.standard_normal((3, ROWS, 22)).astype("float32")
    logits = [np.zeros((ROWS, 64), "float32") for _ in range(3)]
    last = np.array([4, -1, 0], "int32")
    calls = np.array([7, 0, 9], "int32")
    numbers = [np.array([r], "int32") for r in range(3)]
    buffers = [np.zeros(16 + 2 * 3 * ROWS * 22, "uint32") for _ in range(3)]
    give_up = np.zeros(1, "int32")
    peers = np.array([a.ctypes.data for a in (*buffers, give_up)], "int64")
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (last, peers, calls)]
    library.gather(addresses(list(new)), *pointers, addresses(numbers), addresses(logits), ROWS)
    expected = np.concatenate(list(new), 1)[:, :64]  # the last two are padding
    expected[1] = 0
    for row in logits:
        np.testing.assert_array_equal(row, expected)


# Each row has other options, and one of the logits below.
OPTIONS = [
    {},
    {"temperature": 0.8},
    {"temperature": 1, "top_k": 40},
    {"temperature": 1, "top_p": 0.9},
    {"temperature": 1, "top_k": 5, "top_p": 0.0},
    {"repetition_penalty": 1.5, "ngram": 2},
    {"temperature": 0.5, "min_new_tokens": 30, "top_p": 0.5},
    {"temperature": 1, "top_k": 3},
]


def test_the_sampler_chooses_the_tokens_of_the_other(library):
    vocab, count = 9001, len(OPTIONS)
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((count, vocab)) * 3).astype("float32")
    logits[0, 5:] = -np.inf
    logits[[2, 4]] = np.round(logits[[2, 4]])  # ties at the top and at the threshold
    logits[3, :50] = np.nan
    logits[7] = np.nan
    best = logits[5].argmax()
    history = [[*rng.integers(0, 20, 12)] for _ in range(count)]
    history[1] = []
    history[5] = [best, best, 7, best]
    rows = reference.Rows(logits, history=history, eos=(3, int(logits[6].argmax())))
    for r, options in enumerate(OPTIONS):
        one = reference.Rows(logits[r : r + 1], **options)
        rows.f[r], rows.i[r] = one.f[0], one.i[0]
    rows.i[:, 4:6] = rng.integers(0, 2**31, (count, 2))
    names = ("tokens", "positions", "history")
    state = [getattr(rows, name).copy() for name in names]
    outbox = Outbox(np.zeros((count, SLOTS), np.uint64), reference.MAX_LEN, lambda: None)
    outbox.begin(rows.positions)
    rows.i[:, 6:] = outbox.address()
    chosen = outbox.next(count)
    assert not chosen.ready()
    arrays = (rows.logits, np.zeros_like(logits), *state, rows.f, rows.i, rows.eos)
    library.sample(*(ctypes.c_void_p(a.ctypes.data) for a in arrays), count)
    rows.run(lambda *_: reference.compiled(count, vocab))
    for name, array in zip(names, state, strict=True):
        np.testing.assert_array_equal(array, getattr(rows, name))
    assert chosen.ready()
    assert chosen.value().tolist() == [0 if t == -7 else t for t in rows.tokens]
    assert rows.tokens[1] == -7 and rows.tokens[5] != best and rows.tokens[7] == 0


# Of decode_attention_case in kernels_on_cpu.cc: heads, kv heads, head dim, page, positions, and
# what is appended, window, cap and sinks.
DECODE = [
    (4, 1, 32, 16, [203], dict(append="joined")),
    (4, 1, 32, 16, [0], dict(append="joined")),
    (4, 1, 32, 16, [-1], dict(append="joined")),
    (6, 2, 48, 16, [70, -1, 15, 16], dict(append="apart", rotary=32)),
    (9, 1, 16, 32, [0, 99, -1, 31], dict(sinks=True)),
    (16, 1, 64, 16, [9, 130, 20, 47], dict(append="joined", window=20, cap=5.0, sinks=True)),
    (12, 1, 144, 16, [50], dict(append="joined")),
    (6, 2, 48, 16, [170, -1, 15, 16], dict(append="apart", rotary=32, sinks=True)),
    (9, 1, 128, 64, [603], {}),  # of so many blocks that their shares are joined
    (2, 1, 256, 16, [40, 20], dict(append="joined")),
    # So short that blocks share the query heads: 4, 4 and 1 of them, and 6 and 6.
    (9, 1, 128, 64, [40], {}),
    (12, 1, 48, 16, [40], dict(append="joined", sinks=True)),
    (12, 1, 48, 16, [140], dict(append="joined", sinks=True)),
    (4, 1, 16, 64, [801], dict(append="joined")),  # the ring is used again, with several loaders
    # Pairs of blocks that copy for each other, of 5 and 4 query heads; once nobody has any chunks.
    (9, 1, 64, 16, [203], dict(append="joined")),
    (9, 1, 64, 16, [20], dict(append="joined")),  # slices of 4 and 1 heads, and of 4 and none
    (9, 1, 64, 16, [-1], dict(append="joined")),
    (24, 2, 32, 64, [801], dict(sinks=True)),  # again a ring used twice; warps are no power of two
]
NUMBERS = [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 6, 8, 8, 9, 10, 10, 10, 11]


class DecodeArgs(ctypes.Structure):
    """As in decode_attention.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "table", "k_pages", "v_pages")),
        *((name, ctypes.c_void_p) for name in ("page_table", "rows", "positions", "sinks")),
        *((name, ctypes.c_void_p) for name in ("out", "sums", "stats")),
        ("layer", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("pages", "table_rows", "max_pages")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


@pytest.mark.parametrize(("number", "case"), list(zip(NUMBERS, DECODE, strict=True)))
def test_decode_attention(library, number, case):
    heads, kv_heads, dim, page, positions, kind = case
    rng, n, layers, layer = np.random.default_rng(number), len(positions), 2, 1
    max_pages = 13
    pages = n * max_pages
    rotary, append = kind.get("rotary", dim), kind.get("append", "")
    shape = (layers, pages, kv_heads, page, dim)
    k_pages, v_pages = rng.standard_normal((2, *shape)).astype("float16")
    page_table = rng.permutation(pages).reshape(n, max_pages).astype("int32")
    rows = np.roll(np.arange(n), 1).astype("int32")
    at = np.array(positions, "int32")
    q = rng.standard_normal((n, heads, dim)).astype("float16") * 2
    k, v = rng.standard_normal((2, n, kv_heads, dim)).astype("float16")
    angle = rng.standard_normal((n, rotary // 2)) * 3
    table = np.stack([np.cos(angle), np.sin(angle)], 1).astype("float32")
    sinks = rng.standard_normal(heads).astype("float32") * 2
    out = np.full((n, heads, dim), np.nan, "float16")
    sums, stats = np.full((2, 64 * heads * dim), np.nan, "float32")

    def turned(x):
        if not append:
            return x.astype("float64")
        cos, sin = (np.asarray(table[:, None, i], "float64") for i in range(2))
        a, b, rest = np.split(x.astype("float64"), [rotary // 2, rotary], axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1).astype("float16")

    want_k, want_v = k_pages.copy(), v_pages.copy()
    for t, p in enumerate(positions):
        place = (layer, page_table[rows[t], p // page], slice(None), p % page)
        if append and p >= 0:
            want_k[place], want_v[place] = turned(k)[t], v[t]
        if p >= 0:  # what comes behind may be anything
            behind = (*place[:3], slice(p % page + 1, None))
            for cache in (k_pages, v_pages, want_k, want_v):
                cache[behind] = np.nan
            if append:
                k_pages[place] = v_pages[place] = np.nan
    read = [np.concatenate([x.reshape(n, -1) for x in (q, k, v)], 1)] * 3
    if append != "joined":
        read = [q, k, v]
    tensors = (*read, table, k_pages, v_pages, page_table, rows, at, sinks, out, sums, stats)
    scale, cap = 1 / np.sqrt(dim), kind.get("cap", 0.0)
    args = DecodeArgs(*(x.ctypes.data for x in tensors), layer, pages, n, max_pages, scale, cap)
    for _ in range(2):  # the counters are back at 0
        out[:] = np.nan
        assert library.decode_attention_case(number, ctypes.byref(args)) == 0
        for t, p in enumerate(positions):
            if p < 0:
                np.testing.assert_array_equal(out[t], 0)
                continue
            begin = max(0, p + 1 - kind["window"]) if "window" in kind else 0
            near = page_table[rows[t], np.arange(begin, p + 1) // page]
            slots = np.arange(begin, p + 1) % page
            for head in range(heads):
                kv = head // (heads // kv_heads)
                keys, values = (
                    c[layer, near, kv, slots].astype("float64") for c in (want_k, want_v)
                )
                scores = keys @ turned(q)[t, head].astype("float64") * scale
                if cap:
                    scores = np.tanh(scores / cap) * cap
                sink = np.exp(sinks[head] - scores.max()) if kind.get("sinks") else 0.0
                weights = np.exp(scores - scores.max())
                want = weights @ values / (weights.sum() + sink)
                np.testing.assert_allclose(out[t, head], want, atol=4e-3, rtol=4e-3)
        if append:
            np.testing.assert_allclose(k_pages, want_k, atol=4e-3, rtol=2e-3)
            np.testing.assert_array_equal(v_pages, want_v)


@pytest.mark.parametrize(
    ("n", "features", "blocks", "sharing"),
    [
        (2048, 14336, 132, 2),
        (2048, 14336, 114, 2),
        (1000, 7168, 132, 2),
        (200, 14336, 132, 2),
        (384, 14336, 132, 1),
        (128, 14336, 132, 1),
        (1, 14336, 132, 1),
        (300, 128, 132, 2),
    ],
)
def test_gated_gemm_multiplies_each_tile_once(library, n, features, blocks, sharing):
    counts = np.zeros((-(-n // 128), features // 128), np.int32)
    found = library.gated_gemm_tiles(n, features, blocks, ctypes.c_void_p(counts.ctypes.data))
    assert found == sharing and (counts == 1).all()
