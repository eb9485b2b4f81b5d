"""Products of few tokens, their CUDA code run by a CPU's threads.

`emulated_gemv.h` has the meaning of the instructions that these CUDA sources ask for.
"""

import ctypes
import itertools
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shardwright.compiler.kernels import gemv_mma, gemv_norm, gemv_rows, gemv_tokens
from shardwright.compiler.kernels.gemv_mma import Plan, Product
from shardwright.compiler.kernels.gemv_rows import Plan as Rows
from shardwright.compiler.kernels.gemv_tokens import Plan as Tokens

# Rows that fill no tile, a tail of the inner dimension, several tiles, teams and phases, clusters.
CASES = {
    "fp16": (Product(1, 19, 200), Plan(128, 1, 2, 2, 1)),
    "fp16, 9 tokens, cluster": (Product(9, 40, 392), Plan(128, 1, 3, 1, 2, 2)),
    "fp16, gated, phases": (Product(3, 22, 520, 0, True), Plan(128, 2, 2, 2, 1, 1, 3)),
    "fp16, tiles in phases": (Product(5, 72, 640), Plan(128, 1, 3, 1, 1, 1, 3)),
    "q4": (Product(1, 37, 1088, 32), Plan(256, 1, 2, 2, 1)),
    "q4, one token, warps without x": (Product(1, 200, 512, 32), Plan(128, 1, 3, 1, 4)),
    "q4, gated, one token": (Product(1, 44, 1024, 32, True), Plan(128, 1, 3, 2, 2)),
    "q4, group 128, one token, phases": (Product(1, 21, 1536, 128), Plan(128, 1, 2, 2, 1, 1, 2)),
    "q4, gated, 10 tokens": (Product(10, 42, 448, 32, True), Plan(128, 1, 2, 1, 2)),
    "q4, group 64, cluster": (Product(2, 17, 896, 64), Plan(128, 1, 2, 1, 1, 2, 2)),
    "q4, gated, 16 tokens, cluster": (Product(16, 96, 2048, 32, True), Plan(128, 2, 2, 2, 2, 2)),
    "q4, 16 tokens, many rows": (Product(16, 160, 1024, 32), Plan(128, 1, 2, 2, 1)),
    "q4, 12 tokens, phases": (Product(12, 44, 1088, 32), Plan(128, 1, 2, 1, 2, 1, 2)),
    "q4, group 128": (Product(8, 33, 768, 128), Plan(128, 1, 4, 1, 2)),
    # Rings that are used again, threads without a piece, several rows at once.
    "rows": (Product(1, 45, 512), Rows(64, 2, 3, 2, 3)),
    "rows, threads without a piece": (Product(1, 37, 328), Rows(32, 1, 4, 2, 4)),
    "rows, few": (Product(1, 3, 264), Rows(64, 2, 1, 1, 1)),
    "rows, four at once": (Product(1, 75, 256), Rows(128, 2, 2, 1, 2)),
    "rows, gated": (Product(1, 46, 576, 0, True), Rows(96, 2, 4, 2, 4)),
    "rows, gated, two at once": (Product(1, 94, 256, 0, True), Rows(64, 4, 3, 2, 3)),
    "rows, q4": (Product(1, 45, 1024, 32), Rows(32, 2, 3, 2, 2)),
    "rows, q4, two pieces of a thread, some without": (
        Product(1, 37, 1280, 32),
        Rows(32, 1, 4, 2, 3),
    ),
    "rows, q4, four at once, lanes without a piece": (
        Product(1, 75, 512, 64),
        Rows(128, 2, 2, 1, 2),
    ),
    "rows, q4, gated": (Product(1, 94, 2048, 128, True), Rows(64, 4, 3, 1, 1)),
    # Rings that are used again, warps with fewer columns than others, pieces, clusters.
    "tokens": (Product(2, 42, 192), Tokens(2, 2, 1, 1, 1, 1, False)),
    "tokens, 16": (Product(16, 70, 352), Tokens(3, 4, 2, 1, 1, 1, False)),
    "tokens, gated": (Product(5, 44, 384, 0, True), Tokens(2, 3, 1, 2, 1, 1, False)),
    "tokens, 8, cluster": (Product(8, 70, 768), Tokens(2, 4, 2, 2, 1, 2, False)),
    "tokens, 12, gated, cluster": (Product(12, 60, 384, 0, True), Tokens(1, 9, 3, 3, 1, 2, False)),
    "tokens, 11, gated, sums stay": (Product(11, 46, 576, 0, True), Tokens(2, 3, 1, 1, 3, 1, True)),
    "tokens, 7, sums stay, cluster": (Product(7, 70, 768), Tokens(2, 4, 2, 2, 2, 2, True)),
}


# Ranks, the product that sends, the product of the norm of what all have sent; of one rank, of y.
SUMS = {
    "1 rank, gated": (
        1,
        (Product(1, 512, 64, 32), Plan(128, 1, 2, 1, 1)),
        (Product(1, 46, 512, 32, True), Plan(128, 1, 2, 2, 1)),
    ),
    "2 ranks, gated": (
        2,
        (Product(1, 576, 320, 32), Plan(128, 1, 2, 1, 2)),
        (Product(1, 46, 576, 32, True), Plan(128, 1, 2, 1, 2)),
    ),
    "3 ranks": (
        3,
        (Product(1, 1024, 256, 64), Plan(128, 1, 3, 1, 1)),
        (Product(1, 37, 1024, 64), Plan(256, 1, 2, 2, 1)),
    ),
    "1 rank, fp16": (
        1,
        (Product(1, 264, 64), Rows(32, 2, 2, 1, 2)),
        (Product(1, 37, 264), Rows(64, 2, 2, 1, 2)),
    ),
    "2 ranks, fp16, gated, fewer pieces than threads": (
        2,
        (Product(1, 200, 256), Rows(64, 2, 3, 2, 3)),
        (Product(1, 46, 200, 0, True), Rows(32, 2, 2, 1, 2)),
    ),
    "3 ranks, fp16": (
        3,
        (Product(1, 576, 96), Rows(32, 1, 3, 2, 3)),
        (Product(1, 37, 576), Rows(32, 2, 3, 2, 3)),
    ),
    "1 rank, rows of four bits": (
        1,
        (Product(1, 768, 256, 32), Rows(32, 2, 2, 1, 2)),
        (Product(1, 37, 768, 32), Rows(64, 2, 2, 1, 2)),
    ),
    "3 ranks, rows of four bits, fewer pieces than threads": (
        3,
        (Product(1, 512, 256, 32), Rows(128, 1, 3, 2, 3)),
        (Product(1, 46, 512, 32, True), Rows(96, 2, 2, 1, 2)),
    ),
    "4 ranks, a piece at a time": (
        4,
        (Product(1, 1024, 128, 32), Plan(128, 1, 2, 1, 1)),
        (Product(1, 20, 1024, 32, True), Plan(128, 1, 2, 1, 1)),
    ),
}
# Of several tokens, the product in front of a norm, which adds the residual, and the one behind it.
NORMS = {
    "2 tokens": (
        (Product(2, 1024, 256, 32), Plan(128, 1, 2, 1, 2)),
        (Product(2, 44, 1024, 32, True), Plan(128, 1, 2, 2, 1)),
    ),
    "5 tokens, a tail, clusters in front": (
        (Product(5, 320, 512, 64), Plan(128, 1, 2, 1, 2, 2)),
        (Product(5, 37, 320, 32), Plan(128, 1, 2, 1, 1)),
    ),
    "8 tokens, phases in front, clusters behind": (
        (Product(8, 1024, 768, 32), Plan(128, 1, 2, 1, 1, 1, 3)),
        (Product(8, 40, 1024, 32), Plan(128, 1, 2, 1, 4, 2)),
    ),
    "12 tokens, phases behind": (
        (Product(12, 1088, 256, 32), Plan(128, 2, 2, 1, 2)),
        (Product(12, 44, 1088, 32, True), Plan(128, 1, 2, 1, 2, 1, 2)),
    ),
    "3 tokens, fp16": (
        (Product(3, 320, 256), Tokens(2, 3, 2, 1, 1, 1, False)),
        (Product(3, 44, 320, 0, True), Tokens(3, 3, 1, 2, 1, 1, False)),
    ),
    "16 tokens, fp16, clusters": (
        (Product(16, 384, 768), Tokens(2, 8, 1, 1, 2, 2, True)),
        (Product(16, 42, 384), Tokens(3, 3, 1, 1, 1, 2, False)),
    ),
    "9 tokens, fp16, cluster in front, plainly copied": (
        (Product(9, 256, 384), Plan(128, 1, 2, 1, 2, 2)),
        (Product(9, 52, 256, 0, True), Tokens(1, 3, 1, 1, 1, 1, False)),
    ),
}
# Ranks among which the products in front are summed.
SUMMED = {
    "2 tokens": 3,
    "5 tokens, a tail, clusters in front": 2,
    "12 tokens, phases behind": 2,
    "3 tokens, fp16": 4,
    "16 tokens, fp16, clusters": 2,
    "9 tokens, fp16, cluster in front, plainly copied": 3,
}
EXCHANGE = "const int64_t* peers, const int* rank, unsigned first, int place, int last_place"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    directory = tmp_path_factory.mktemp("emulated")
    text = Path(gemv_mma.__file__).with_suffix(".cuh").read_text()
    for name in ("gemv_rows", "patience", "gemv_sum", "gemv_norm", "gemv_tokens"):
        text += Path(gemv_mma.__file__).with_name(f"{name}.cuh").read_text()
    for i, (product, plan) in enumerate(CASES.values()):
        output = "PlainTokens<Z, half>" if isinstance(plan, Tokens) else "PlainOutput<half>"
        call, grid = call_of(product, plan, f"{output}{{out}}")
        text += f"""
extern "C" void case_{i}(const half* x, const void* w, const half* scale, half* out) {{
  run_grid({grid}, [&](char* shared) {{
    using namespace shardwright_gemv;
    {call};
  }});
}}
"""
    for i, (ranks, *both) in enumerate(SUMS.values()):
        sent, sent_grid = call_of(*both[0], "output")
        summed = f"SumInput<Z, {ranks}>{{residual, y, norm, sum, 1e-5f, exchange, last_place}}"
        normed, normed_grid = call_of(*both[1], "PlainOutput<half>{out}", summed)
        text += f"""
extern "C" void send_{i}(const half* x, {EXCHANGE}, const void* w, const half* scale) {{
  run_grid({sent_grid}, [&](char* shared) {{
    using namespace shardwright_gemv;
    SentOutput<{ranks}> output{{Exchange{{peers, rank, first, place}}}};
    {sent};
  }});
}}
extern "C" void send_row_{i}(const half* row, {EXCHANGE}) {{
  using namespace shardwright_gemv;
  constexpr int kFeatures = {both[0][0].outputs};
  for (int i = 0; i < kFeatures / 8; ++i)
    send_piece<{ranks}, kFeatures>(row + 8 * i, peers, rank, first, place, i);
}}
extern "C" void sum_{i}(const half* residual, const half* y, const half* norm, half* sum,
                        {EXCHANGE}, const void* w, const half* scale, half* out) {{
  run_grid({normed_grid}, [&](char* shared) {{
    using namespace shardwright_gemv;
    const Exchange exchange{{peers, rank, first, place}};
    {normed};
  }});
}}
"""
    for i, (name, both) in enumerate(NORMS.items()):
        pieces = BLOCKS * both[0][1].cluster
        in_front, behind = (isinstance(plan, Tokens) for _, plan in both)
        added = "AddedTokens<Z>" if in_front else "AddedOutput<Z>"
        added += "{residual, norm, sum, weighted, squares}"
        added, added_grid = call_of(*both[0], added)
        if name in SUMMED:
            summed = "SummedTokens" if in_front else "SummedOutput"
            summed += f"<Z, {SUMMED[name]}>"
            summed += "{{residual, norm, sum, weighted, squares}, {peers, rank, first}}"
            summed, summed_grid = call_of(*both[0], summed)
            text += f"""
extern "C" void sum_add_{i}(const half* x, const void* w, const half* scale, const half* residual,
                            const half* norm, const int64_t* peers, const int* rank, int first,
                            half* sum, half* weighted, float* squares) {{
  run_grid({summed_grid}, [&](char* shared) {{
    using namespace shardwright_gemv;
    {summed};
  }});
}}
"""
        normed = f"NormedOutput<Z, half, {pieces}>{{squares, 1e-5f, {{out}}}}"
        if behind:
            normed = f"NormedTokens<Z, half, {pieces}>{{{{squares, 1e-5f, {{out}}}}}}"
        given = "weighted" if behind else "PlainInput{weighted}"
        normed, normed_grid = call_of(*both[1], normed, given)
        text += f"""
extern "C" void add_{i}(const half* x, const void* w, const half* scale, const half* residual,
                        const half* norm, half* sum, half* weighted, float* squares) {{
  run_grid({added_grid}, [&](char* shared) {{
    using namespace shardwright_gemv;
    {added};
  }});
}}
extern "C" void norm_{i}(const half* weighted, const float* squares, const void* w,
                         const half* scale, half* out) {{
  run_grid({normed_grid}, [&](char* shared) {{
    using namespace shardwright_gemv;
    {normed};
  }});
}}
"""
    source = directory / "gemv.cc"
    source.write_text(f'#include "{Path(__file__).with_name("emulated_gemv.h")}"\n{text}')
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w", "-o"]
    subprocess.run([*command, str(directory / "gemv.so"), str(source)], check=True)
    return ctypes.CDLL(str(directory / "gemv.so"))


BLOCKS = 2  # or clusters of them, that share the outputs


def call_of(product, plan, output, given=""):
    """The call of a product, of x or of what `given` makes, and the grid whose threads call it."""
    # More shared memory than a GPU would give: it has many more blocks.
    if isinstance(plan, Rows):
        sizes = f"RowSizes<{gemv_rows.sizes(product, plan, BLOCKS)}>"
        call = f"product_of_rows<Z>({given or 'RowInput{x}'}, w, scale, {output}, shared)"
        threads, shared = plan.threads + 32, gemv_rows.shared_bytes(product, plan, BLOCKS)
        blocks, cluster = BLOCKS, 1
    elif isinstance(plan, Tokens):
        sizes = f"TokenSizes<{gemv_tokens.sizes(product, plan, BLOCKS)}>"
        call = f"product_of_tokens<Z>({given or 'x'}, w, scale, {output}, shared)"
        threads, cluster = (plan.warps + 1) * 32, plan.cluster
        blocks, shared = BLOCKS * cluster, gemv_tokens.shared_bytes(product, plan, BLOCKS)
    else:
        sizes = f"Sizes<{gemv_mma.sizes(product, plan, BLOCKS)}>"
        call = f"product<Z>({given or 'PlainInput{x}'}, w, scale, {output}, shared)"
        threads = plan.split * plan.teams * 32
        shared = product.shared(plan) + 4 * product.batch * product.out_features * plan.split
        shared += gemv_norm.SCALES_BYTES
        blocks, cluster = BLOCKS * plan.cluster, plan.cluster
    return f"using Z = {sizes};\n    {call}", f"{blocks}, {cluster}, {threads}, {shared}"


def pointers(*values):
    return [v if isinstance(v, int) else ctypes.c_void_p(v.ctypes.data) for v in values]


def multiplied(library, name, x, weight, scale, before):
    """What the case `name` computes, where `before` was."""
    product, _plan = CASES[name]
    out = np.full((product.batch, product.outputs), before, np.float16)
    getattr(library, f"case_{list(CASES).index(name)}")(*pointers(x, weight, scale, out))
    return out


def random_weight(rng, product):
    """A weight as it is stored, its scale if it has one, and what they stand for in float64."""
    shape = (product.out_features, product.in_features)
    if product.group:
        return four_bits(rng, shape, product.group)
    weight = (rng.standard_normal(shape) / 16).astype(np.float16)
    return weight, weight, weight.astype(np.float64)


def four_bits(rng, shape, group):
    """A weight of random codes, its scale, and what they stand for in float64."""
    weight = rng.integers(0, 2**32, (shape[0], shape[1] // 8), dtype=np.uint32)
    scale = (rng.random((shape[0], shape[1] // group)) / 16).astype(np.float16)
    nibbles = (weight[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15).reshape(shape)
    return weight, scale, (nibbles - 7.0) * np.repeat(scale.astype(np.float64), group, 1)


@pytest.mark.parametrize("name", CASES)
def test_product(library, name):
    product, _plan = CASES[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((product.batch, product.in_features)).astype(np.float16)
    weight, scale, dense = random_weight(rng, product)
    want = x.astype(np.float64) @ dense.T
    if product.gated:
        gate, value = np.split(want, 2, axis=1)
        want = gate / (1 + np.exp(-gate)) * value
    out = multiplied(library, name, x, weight, scale, np.nan)
    np.testing.assert_allclose(out, want, atol=3e-3 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_no_number_stays_none(library, wrong):
    product, _ = CASES["q4"]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, product.in_features)).astype(np.float16)
    x[0, 700] = wrong
    weight, scale, _ = four_bits(rng, (product.out_features, product.in_features), product.group)
    assert not np.isfinite(multiplied(library, "q4", x, weight, scale, 0)).any()


@pytest.mark.parametrize("name", NORMS)
def test_residuals_behind_products_and_norms_in_front(library, name):
    (front, plan), (behind, _) = NORMS[name]
    case, tokens = list(NORMS).index(name), front.batch
    rng = np.random.default_rng(1)
    weight, scale, dense = random_weight(rng, front)
    # Tokens of different sizes, so that none may have another's norm.
    sizes = np.geomspace(0.01, 10, tokens)[:, None]
    x = (rng.standard_normal((tokens, front.in_features)) * sizes).astype(np.float16)
    more = x.astype(np.float64) @ dense.T
    residual = (rng.standard_normal(more.shape) * sizes).astype(np.float16)
    norm = rng.standard_normal(front.out_features).astype(np.float16)
    total, weighted = np.full((2, *more.shape), np.nan, np.float16)
    squares = np.full((tokens, BLOCKS * plan.cluster), np.nan, np.float32)
    arrays = (x, weight, scale, residual, norm, total, weighted, squares)
    getattr(library, f"add_{case}")(*pointers(*arrays))
    of_row = np.abs(more).max(1, keepdims=True)
    np.testing.assert_allclose((total - residual.astype(np.float64) - more) / of_row, 0, atol=3e-3)
    wide = total.astype(np.float64)
    np.testing.assert_allclose(squares.sum(1), (wide**2).sum(1), rtol=1e-5)

    weight, scale, dense = random_weight(rng, behind)
    want = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * norm @ dense.T
    if behind.gated:
        gate, value = np.split(want, 2, axis=1)
        want = gate / (1 + np.exp(-gate)) * value
    out = np.full((tokens, behind.outputs), np.nan, np.float16)
    getattr(library, f"norm_{case}")(*pointers(weighted, squares, weight, scale, out))
    np.testing.assert_allclose(out, want, atol=4e-3 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("name", SUMMED)
def test_sums_of_all_ranks_in_front_of_norms(library, name):
    ranks, ((front, plan), _) = SUMMED[name], NORMS[name]
    case, tokens, features = list(NORMS).index(name), front.batch, front.out_features
    rng = np.random.default_rng(ranks)
    weights = [random_weight(rng, front) for _ in range(ranks)]
    norm = rng.standard_normal(features).astype(np.float16)
    words = ranks * tokens * features // 2
    buffers = [np.zeros(2 * words + 12, np.uint32) for _ in range(ranks)]
    peers = np.array([a.ctypes.data for a in (*buffers, np.zeros(1, np.int32))])
    numbers = [np.array([r], np.int32) for r in range(ranks)]

    def run(r, x, residual, first):
        results = [np.full((tokens, features), np.nan, np.float16) for _ in range(2)]
        results.append(np.full((tokens, BLOCKS * plan.cluster), np.nan, np.float32))
        given = pointers(x[r], *weights[r][:2], residual, norm, peers, numbers[r], first)
        getattr(library, f"sum_add_{case}")(*given, *pointers(*results))
        return results

    for step in range(3):
        x = rng.standard_normal((ranks, tokens, front.in_features)).astype(np.float16)
        x[:, tokens - 1] = 0  # summands that are zeros
        residual = rng.standard_normal((tokens, features)).astype(np.float16)
        first = 8 + step % 2 * words
        with ThreadPoolExecutor(ranks) as pool:
            found = [*pool.map(run, range(ranks), *map(itertools.repeat, (x, residual, first)))]
        summands = [(a.astype(np.float64) @ w[2].T) for a, w in zip(x, weights, strict=True)]
        more = sum(summands)
        total, weighted, squares = found[0]
        atol = 3e-3 * np.abs(summands).max()
        np.testing.assert_allclose(total, residual + more, rtol=0, atol=atol)
        wide = total.astype(np.float64)
        np.testing.assert_array_equal(total[-1], residual[-1])
        np.testing.assert_allclose(weighted, wide * norm / 16, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(squares.sum(1), (wide**2).sum(1), rtol=1e-5)
        for other in found[1:]:
            for a, b in zip(other, found[0], strict=True):
                np.testing.assert_array_equal(a, b)
        assert not any(buffer.any() for buffer in buffers)  # ready for the next, nothing else
    # Of a sum that no other rank sends to: a word says so, and then the lack of its address.
    give_up = np.ones(1, np.int32)
    astray = [np.zeros_like(buffer) for buffer in buffers]
    peers = np.array([buffers[0].ctypes.data, *(a.ctypes.data for a in astray[1:]), 0])
    peers[-1] = give_up.ctypes.data
    for _ in range(2):
        run(0, x, residual, first)
        assert peers[-1] == 0
        give_up[0] = 0


def test_large_sums_stay_finite(library):
    (front, _), _ = NORMS["2 tokens"]
    rng = np.random.default_rng(3)
    weight, scale, _ = four_bits(rng, (front.out_features, front.in_features), front.group)
    x = np.zeros((2, front.in_features), np.float16)
    residual = rng.choice([-6e4, 6e4], (2, front.out_features)).astype(np.float16)
    norm = np.full(front.out_features, 64, np.float16)
    total, weighted = np.full((2, *residual.shape), np.nan, np.float16)
    squares = np.full((2, BLOCKS), np.nan, np.float32)
    library.add_0(*pointers(x, weight, scale, residual, norm, total, weighted, squares))
    np.testing.assert_array_equal(total, residual)
    assert np.isfinite(weighted).all() and np.isfinite(squares).all()


@pytest.mark.parametrize("name", [name for name, (ranks, *_) in SUMS.items() if ranks > 1])
def test_a_row_that_one_rank_has_comes_to_all(library, name):
    ranks, _, (product, _) = SUMS[name]
    case, first, features = list(SUMS).index(name), 8, product.in_features
    rng = np.random.default_rng(7)
    row = rng.standard_normal(features).astype(np.float16)
    row[::5] = 0
    nothing, norm = np.zeros_like(row), np.ones_like(row)
    weight, scale, _ = random_weight(rng, product)
    buffers = [np.zeros(first + ranks * features, np.uint32) for _ in range(ranks)]
    peers = np.array([a.ctypes.data for a in (*buffers, np.zeros(1, np.int32))])
    exchange = [(peers, np.array([r], np.int32), first, 1, 0) for r in range(ranks)]
    for r in range(ranks):
        sent = row if r == 1 else nothing
        getattr(library, f"send_row_{case}")(*pointers(sent, *exchange[r]))
    for r in range(ranks):
        total, out = np.full_like(row, np.nan), np.zeros(product.outputs, np.float16)
        arrays = (nothing, nothing, norm, total, *exchange[r], weight, scale, out)
        getattr(library, f"sum_{case}")(*pointers(*arrays))
        np.testing.assert_array_equal(total, row)


@pytest.mark.parametrize("name", SUMS)
def test_sums_of_all_ranks_and_their_norm(library, name):
    ranks, (sender, _), (product, _) = SUMS[name]
    case, first, places = list(SUMS).index(name), 8, 4
    rng, features = np.random.default_rng(ranks), product.in_features
    senders = [random_weight(rng, sender) for _ in range(ranks)]
    weight, scale, dense = random_weight(rng, product)
    norm = rng.standard_normal(features).astype(np.float16)
    end = first + places * ranks * features // 2
    buffers = [np.zeros(end + 8, np.uint32) for _ in range(ranks)]
    peers = np.array([a.ctypes.data for a in (*buffers, np.zeros(1, np.int32))])
    numbers = [np.array([r], np.int32) for r in range(ranks)]
    for place, last_place in ((0, 3), (1, 0), (2, 1), (3, 2), (0, 3), (1, 0)):
        residual = rng.standard_normal(features).astype(np.float16)
        given = rng.standard_normal((ranks, sender.in_features)).astype(np.float16)
        y = rng.standard_normal(features).astype(np.float16)
        exchange = [(peers, r, first, place, last_place) for r in numbers]
        send, add = getattr(library, f"send_{case}"), getattr(library, f"sum_{case}")
        for r, (words, scales, _) in enumerate(senders) if ranks > 1 else ():
            send(*pointers(given[r], *exchange[r], words, scales))
        found = []
        for r in range(ranks):
            total, out = np.zeros(features, np.float16), np.zeros(product.outputs, np.float16)
            arrays = (residual, y, norm, total, *exchange[r], weight, scale, out)
            add(*pointers(*arrays))
            found.append((total, out))
        summands = [x.astype(np.float64) @ s[2].T for x, s in zip(given, senders, strict=True)]
        more = sum(summands) if ranks > 1 else y.astype(np.float64)
        total, out = found[0]
        atol = 2e-3 * np.abs(more).max()
        np.testing.assert_allclose(total, residual + more, rtol=0, atol=atol)
        wide = total.astype(np.float64)
        want = dense @ (wide / np.sqrt((wide**2).mean() + 1e-5) * norm)
        if product.gated:
            gate, value = np.split(want, 2)
            want = gate / (1 + np.exp(-gate)) * value
        np.testing.assert_allclose(out, want, atol=4e-3 * np.abs(want).max(), rtol=0)
        for other in found:
            np.testing.assert_array_equal(other[0], total)
            np.testing.assert_array_equal(other[1], out)
        for buffer in buffers:
            assert not buffer[:first].any() and not buffer[end:].any()
            of_places = buffer[first:end].reshape(places, -1).any(1)
            assert ranks == 1 or [*np.flatnonzero(of_places)] == [place]
    if ranks == 1:
        return
    # Of a step that nobody has sent: a word says so, and then the lack of its address.
    give_up = np.ones(1, np.int32)
    peers[-1] = give_up.ctypes.data
    arrays = (residual, y, norm, total, *(peers, numbers[0], first, 3, 2))
    for _ in range(2):
        add(*pointers(*arrays, weight, scale, out))
        assert peers[-1] == 0
        give_up[0] = 0
