"""Products of few tokens on tensor cores, their CUDA code run by a CPU's threads.

`emulated_gemv.h` has the meaning of the instructions that gemv_mma.cuh asks for.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from shardwright.compiler.kernels import gemv_mma
from shardwright.compiler.kernels.gemv_mma import Plan, Product

# Rows that fill no tile, a tail of the inner dimension, several tiles, teams and phases, clusters.
CASES = {
    "fp16": (Product(1, 19, 200), Plan(128, 1, 2, 2, 1)),
    "fp16, 9 tokens, cluster": (Product(9, 40, 392), Plan(128, 1, 3, 1, 2, 2)),
    "fp16, gated, phases": (Product(3, 22, 520, 0, True), Plan(128, 2, 2, 2, 1, 1, 3)),
    "q4": (Product(1, 37, 1088, 32), Plan(256, 1, 2, 2, 1)),
    "q4, gated, one token": (Product(1, 44, 1024, 32, True), Plan(128, 1, 3, 2, 2)),
    "q4, group 128, one token, phases": (Product(1, 21, 1536, 128), Plan(128, 1, 2, 2, 1, 1, 2)),
    "q4, gated, 10 tokens": (Product(10, 42, 448, 32, True), Plan(128, 1, 2, 1, 2)),
    "q4, group 64, cluster": (Product(2, 17, 896, 64), Plan(128, 1, 2, 1, 1, 2, 2)),
    "q4, group 128": (Product(8, 33, 768, 128), Plan(128, 1, 4, 1, 2)),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    directory = tmp_path_factory.mktemp("emulated")
    text = Path(gemv_mma.__file__).with_suffix(".cuh").read_text()
    for i, (product, plan) in enumerate(CASES.values()):
        sizes = f"shardwright_gemv::Sizes<{gemv_mma.sizes(product, plan)}>"
        blocks, threads = BLOCKS * plan.cluster, plan.split * plan.teams * 32
        text += f"""
extern "C" void case_{i}(const half* x, const void* w, const half* scale, half* out) {{
  run_grid({blocks}, {plan.cluster}, {threads}, {shared_of(product, plan)}, [&](char* shared) {{
    using namespace shardwright_gemv;
    product<{sizes}>(PlainInput{{x}}, w, scale, PlainOutput<half>{{out}}, shared);
  }});
}}
"""
    source = directory / "gemv.cc"
    source.write_text(f'#include "{Path(__file__).with_name("emulated_gemv.h")}"\n{text}')
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w", "-o"]
    subprocess.run([*command, str(directory / "gemv.so"), str(source)], check=True)
    return ctypes.CDLL(str(directory / "gemv.so"))


BLOCKS = 2  # that share the outputs


def shared_of(product, plan):
    """More than a GPU would give: it has many more blocks."""
    return product.shared(plan) + 4 * product.batch * product.out_features * plan.split


@pytest.mark.parametrize("name", CASES)
def test_product(library, name):
    product, _plan = CASES[name]
    rng = np.random.default_rng(0)
    shape = (product.out_features, product.in_features)
    x = rng.standard_normal((product.batch, product.in_features)).astype(np.float16)
    if product.group:
        weight = rng.integers(0, 2**32, (shape[0], shape[1] // 8), dtype=np.uint32)
        scale = (rng.random((shape[0], shape[1] // product.group)) / 16).astype(np.float16)
        nibbles = (weight[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15).reshape(shape)
        dense = (nibbles - 7.0) * np.repeat(scale.astype(np.float64), product.group, 1)
    else:
        weight = rng.standard_normal(shape).astype(np.float16)
        scale, dense = weight, weight.astype(np.float64)
    want = x.astype(np.float64) @ dense.T
    if product.gated:
        gate, value = np.split(want, 2, axis=1)
        want = gate / (1 + np.exp(-gate)) * value
    out = np.full(want.shape, np.nan, np.float16)
    arguments = [ctypes.c_void_p(a.ctypes.data) for a in (x, weight, scale, out)]
    getattr(library, f"case_{list(CASES).index(name)}")(*arguments)
    np.testing.assert_allclose(out, want, atol=3e-3 * np.abs(want).max(), rtol=0)
