"""Four-bit products of several tokens, their CUDA code run by a CPU's threads.

`emulated_q4_batch.h` has the meaning of what q4_batch.cuh asks for; products go through its path
for GPUs without `wgmma`.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from shardwright.compiler.kernels import q4_batch
from shardwright.compiler.kernels.gemv_mma import Product
from shardwright.compiler.kernels.q4_batch import Plan

# Outputs that fill no tile, shared rows, several teams, tiles, and blocks of a cluster.
CASES = {
    "split": (Product(9, 72, 768, 32), Plan(2, 1, 1, 3, 4, 4)),
    "gated, teams, tiles": (Product(17, 176, 512, 32, True), Plan(1, 2, 2, 2, 4, 4)),
    "group 64, cluster": (Product(16, 136, 512, 64), Plan(1, 2, 1, 2, 6, 4, 2)),
    "group 128, split, cluster": (Product(33, 64, 768, 128), Plan(2, 1, 1, 2, 4, 4, 2)),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    directory = tmp_path_factory.mktemp("emulated")
    folder = Path(q4_batch.__file__).parent
    files = ("wgmma.cuh", "gemv_mma.cuh", "q4_batch.cuh")
    text = "".join((folder / name).read_text() for name in files)
    for i, (product, plan) in enumerate(CASES.values()):
        sizes = f"shardwright_q4_batch::Sizes<{q4_batch.sizes(product, plan)}>"
        grid = f"{q4_batch.blocks(product, plan)}, {plan.cluster}, {plan.threads}"
        text += f"""
extern "C" void case_{i}(const half* x, const unsigned* packed, const half* scale, half* out) {{
  run_grid({grid}, {q4_batch.shared_bytes(product, plan)}, [&](char* shared) {{
    shardwright_q4_batch::product<{sizes}>(x, packed, scale, out, shared);
  }});
}}
"""
    source = directory / "q4_batch.cc"
    source.write_text(f'#include "{Path(__file__).with_name("emulated_q4_batch.h")}"\n{text}')
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w", "-o"]
    subprocess.run([*command, str(directory / "q4_batch.so"), str(source)], check=True)
    return ctypes.CDLL(str(directory / "q4_batch.so"))


@pytest.mark.parametrize("name", CASES)
def test_product(library, name):
    product, _plan = CASES[name]
    rng = np.random.default_rng(0)
    shape = (product.out_features, product.in_features)
    x = rng.standard_normal((product.batch, product.in_features)).astype(np.float16)
    packed = rng.integers(0, 2**32, (shape[0], shape[1] // 8), dtype=np.uint32)
    scale = (rng.random((shape[0], shape[1] // product.group)) / 16).astype(np.float16)
    nibbles = (packed[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15).reshape(shape)
    weight = (nibbles.astype(np.float16) - 7) * np.repeat(scale, product.group, 1)
    want = x.astype(np.float64) @ weight.astype(np.float64).T
    if product.gated:
        gate, value = np.split(want, 2, axis=1)
        want = gate / (1 + np.exp(-gate)) * value
    out = np.full(want.shape, np.nan, np.float16)
    arguments = [ctypes.c_void_p(a.ctypes.data) for a in (x, packed, scale, out)]
    getattr(library, f"case_{list(CASES).index(name)}")(*arguments)
    np.testing.assert_allclose(out, want, atol=3e-3 * np.abs(want).max(), rtol=0)
