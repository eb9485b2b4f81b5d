"""Experts in four bits on tensor cores, their CUDA code run by a CPU's threads."""

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from shardwright.compiler.kernels import experts_cuda
from shardwright.compiler.packing import Packing, dequantize

MX, Q4 = Packing(4, 32, code="e2m1", scale_dtype="uint8"), Packing(4, 32, offset=7)


@dataclass(frozen=True)
class Case:
    """`width` columns of x, `inner` of h; five experts in all, of which a rank has `held`."""

    packing: Packing
    width: int
    inner: int
    held: int = 5
    rank: int = 0
    top: int = 2
    tokens: int = 2
    alpha: float = 0.0
    limit: float = 0.0
    split: bool = False

    @property
    def biased(self):
        return self.limit > 0


# Tails of the columns and of the rows; a rank with some of the experts; one that adds no bias.
CASES = {
    "q4": Case(Q4, 160, 96),
    "q4, group 64, some": Case(Packing(4, 64, offset=7), 192, 64, held=3, rank=1),
    "mxfp4, biases": Case(MX, 96, 544, alpha=1.7, limit=0.75),
    "mxfp4, biases, some, three": Case(MX, 64, 32, 2, 1, 3, 1, alpha=1.7, limit=0.75),
    "mxfp4, biases of rank 0": Case(MX, 64, 96, rank=1, alpha=1.7, limit=0.75, split=True),
}
MANY = 70  # slots of the busiest expert fill more than a block takes


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    directory = tmp_path_factory.mktemp("emulated")
    folder = Path(experts_cuda.__file__).parent
    text = "".join((folder / f).read_text() for f in ("gemv_mma.cuh", "experts.cuh"))
    words = "const unsigned* w, const void* ws, const float* wb"
    for i, c in enumerate(CASES.values()):
        flag = str(c.biased).lower()
        up = f"{experts_cuda.format_of(c.packing, c.width)}, {c.inner}"
        down = f"{experts_cuda.format_of(c.packing, c.inner)}, {c.width}"
        into, out = (-(-n // 16) for n in (c.inner, c.width))
        warps = experts_cuda.WARPS_UP, experts_cuda.WARPS_DOWN
        few = [(2, warps[0], into * c.tokens * c.top), (1, warps[1], out * c.tokens)]
        run_up, run_down = (
            f"{blocks}, 1, {n * 32}, {experts_cuda.shared_bytes(mats, n)}"
            for mats, n, blocks in few
        )
        split = str(c.split).lower()
        text += f"""
extern "C" void up_{i}(const half* x, {words}, const unsigned* u, const void* us, const float* ub,
                       const int* ids, const int* rank, half* h) {{
  run_grid({run_up}, [&](char* shared) {{
    shardwright_experts::up<{up}, {c.held}, {c.top}, {warps[0]}, {flag}>(
        x, {{{{w, u}}, {{ws, us}}}}, wb, ub, ids, rank, h, {c.alpha}f, {c.limit}f, shared,
        blockIdx.x % {into}, blockIdx.x / {into});
  }});
}}
extern "C" void down_{i}(const half* h, {words}, const int* ids, const float* shares,
                         const int* rank, half* out) {{
  run_grid({run_down}, [&](char* shared) {{
    shardwright_experts::down<{down}, {c.held}, {c.top}, {warps[1]}, {flag}, {split}>(
        h, {{{{w}}, {{ws}}}}, wb, ids, shares, rank, out, shared, blockIdx.x % {out},
        blockIdx.x / {out});
  }});
}}
extern "C" void gated_{i}(const half* x, {words}, const unsigned* u, const void* us,
                          const float* ub, const int* order, const int* begin, half* y) {{
  run_grid({c.held} * {-(-c.inner // 64)}, 1, 128, 3 * (8192 + 16384), [&](char* shared) {{
    shardwright_experts::many<{up.rpartition(",")[0]}, 2, {c.inner}, {c.top}, {flag}>(
        x, {{{{w, u}}, {{ws, us}}}}, wb, ub, order, begin, y, {c.alpha}f, {c.limit}f, shared,
        blockIdx.x % {c.held}, blockIdx.x / {c.held});
  }});
}}
extern "C" void plain_{i}(const half* x, {words}, const int* order, const int* begin, half* y) {{
  run_grid({c.held} * {-(-c.width // 64)}, 1, 128, 3 * (4096 + 16384), [&](char* shared) {{
    shardwright_experts::many<{down.rpartition(",")[0]}, 1, {c.width}, {c.top}, false>(
        x, {{{{w}}, {{ws}}}}, nullptr, nullptr, order, begin, y, 0, 0, shared,
        blockIdx.x % {c.held}, blockIdx.x / {c.held});
  }});
}}
"""
    source = directory / "experts.cc"
    source.write_text(f'#include "{Path(__file__).with_name("emulated_gemv.h")}"\n{text}')
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w", "-o"]
    subprocess.run([*command, str(directory / "experts.so"), str(source)], check=True)
    return ctypes.CDLL(str(directory / "experts.so"))


def weight_of(rng, c, rows, cols):
    """Words, scales and biases of a rank's experts; weights and biases in float64."""
    packing, shape = c.packing, (c.held * rows, cols // c.packing.group)
    words = rng.integers(0, 2**32, (c.held * rows, cols // 8), dtype=np.uint32)
    if packing.code == "e2m1":
        scale = rng.integers(119, 123, shape).astype(np.uint8)
        scale[0, 0], scale[1, -1] = 0, 90  # zero, and what half precision has no number for
    else:
        scale = (rng.random(shape) / 16).astype(np.float16)
    bias = rng.standard_normal((c.held, rows)).astype(np.float32)
    dense = dequantize(words, scale, None, packing).astype(np.float64)
    return (words, scale, bias), dense.reshape(c.held, rows, cols), bias.astype(np.float64)


def call(function, *arrays):
    function(*(ctypes.c_void_p(a.ctypes.data) for a in arrays))


def gated(c, x, gate, up, expert):
    (_, g, gb), (_, u, ub) = gate, up
    g, u = g[expert] @ x, u[expert] @ x
    if not c.biased:
        return g / (1 + np.exp(-g)) * u
    g, u = np.minimum(g + gb[expert], c.limit), np.clip(u + ub[expert], -c.limit, c.limit)
    return g / (1 + np.exp(-c.alpha * g)) * (u + 1)


def close(got, want):
    np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_few_tokens(library, name):
    c, i = CASES[name], list(CASES).index(name)
    rng = np.random.default_rng(i)
    gate, up = (weight_of(rng, c, c.inner, c.width) for _ in range(2))
    down = weight_of(rng, c, c.width, c.inner)
    x = rng.standard_normal((c.tokens, c.width)).astype(np.float16)
    ids = np.stack([rng.permutation(5)[: c.top] for _ in x]).astype(np.int32)
    shares = rng.random(ids.shape).astype(np.float32)
    rank = np.array([c.rank], np.int32)
    start = np.zeros(1, np.int32) if c.split else rank
    h = np.zeros((ids.size, c.inner), np.float16)
    out = np.full((c.tokens, c.width), np.nan, np.float16)
    call(getattr(library, f"up_{i}"), x, *gate[0], *up[0], ids, start, h)
    call(getattr(library, f"down_{i}"), h, *down[0], ids, shares, rank, out)
    want = np.zeros(out.shape)
    for slot, expert in enumerate(ids.reshape(-1) - start[0] * c.held):
        if not 0 <= expert < c.held:
            continue
        close(h[slot], gated(c, x[slot // c.top].astype(np.float64), gate, up, expert))
        y = down[1][expert] @ h[slot].astype(np.float64)
        if c.biased and not (c.split and c.rank):
            y += down[2][expert]
        want[slot // c.top] += shares.reshape(-1)[slot] * y
    close(out, want)


@pytest.mark.parametrize("name", ["q4", "mxfp4, biases"])
def test_many_tokens(library, name):
    c, i = CASES[name], list(CASES).index(name)
    rng = np.random.default_rng(i)
    gate, up = (weight_of(rng, c, c.inner, c.width) for _ in range(2))
    down = weight_of(rng, c, c.width, c.inner)
    counts = [MANY, 0, 3, 64, 1]
    slots = sum(counts)
    x = rng.standard_normal((slots // c.top, c.width)).astype(np.float16)
    order = rng.permutation(slots).astype(np.int32)
    begin = np.cumsum([0, *counts]).astype(np.int32)
    h = np.full((slots, c.inner), np.nan, np.float16)
    y = np.full((slots, c.width), np.nan, np.float16)
    call(getattr(library, f"gated_{i}"), x, *gate[0], *up[0], order, begin, h)
    call(getattr(library, f"plain_{i}"), h, *down[0], order, begin, y)
    expert = np.repeat(np.arange(c.held), counts)
    pairs = list(zip(order, expert, strict=True))
    want = [gated(c, x[s // c.top].astype(np.float64), gate, up, e) for s, e in pairs]
    close(h[order], np.array(want))
    close(y[order], np.array([down[1][e] @ h[s].astype(np.float64) for s, e in pairs]))
