"""Kernels of every weight format on the CPU, against float64 numpy."""

import numpy as np
import pytest
from test_kernel_matmul import run

from shardwright.compiler.kernels import quantized
from shardwright.compiler.packing import Packing, dequantize, pack

FORMATS = {
    "q4": Packing(4, 32, offset=7),
    "q4-small-groups": Packing(4, 8, offset=7),
    "q4-zeros": Packing(4, 128, zeros=True),
    "q4-zeros-f32": Packing(4, 16, zeros=True, scale_dtype="float32"),
    "q3": Packing(3, 40, offset=3),
    "q8": Packing(8, 64, offset=128),
    "q8-zeros": Packing(8, 4, zeros=True),
    "e4m3-rows": Packing(8, 640, code="e4m3", scale_dtype="float32"),
    "e4m3-blocks": Packing(8, 128, code="e4m3", scale_dtype="float32"),
}
COLS = 640


def weight(packing, rows, seed=0):
    """Random tensors of every code that is a number, and what they stand for."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << packing.bits, (rows, COLS)).astype(np.uint8)
    if packing.code == "e4m3":
        codes[(codes & 0x7F) == 0x7F] = 0x01  # the smallest number instead of NaN
    shape = (rows, COLS // packing.group)
    scale = (rng.uniform(-1, 1, shape) / 16).astype(packing.scale_dtype)
    zero = rng.integers(0, (1 << packing.bits) + 1, shape).astype(packing.scale_dtype)
    tensors = [pack(codes, packing.bits), scale, *([zero] if packing.zeros else [])]
    return tensors, dequantize(*tensors[:2], zero if packing.zeros else None, packing)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("n", "tokens", "features"), [(1, 1, 24), (11, None, 7)])
def test_matmul(name, n, tokens, features):
    packing = FORMATS[name]
    x = np.random.default_rng(1).standard_normal((n, COLS)).astype("float32")
    tensors, values = weight(packing, features)
    func = quantized.quantized_matmul_cpu(
        tokens=tokens,
        out_features=features,
        in_features=COLS,
        packing=packing,
        dtype="float32",
        out_dtype="float32",
    )
    got = run(func, x, *tensors, out=((n, features), "float32"))
    want = x.astype("float64") @ values.astype("float64").T
    assert np.abs(got - want).max() < 1e-6 * np.abs(want).max()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_is_exact(name, dtype):
    packing = FORMATS[name]
    tensors, values = weight(packing, 5)
    func = quantized.dequantize(
        out_features=5, in_features=COLS, packing=packing, dtype=dtype, target="cpu"
    )
    got = run(func, *tensors, out=((5, COLS), dtype))
    np.testing.assert_array_equal(got, values.astype(dtype))


@pytest.mark.parametrize("tokens", [None, 6])
@pytest.mark.parametrize("name", FORMATS)
def test_take_of_a_sharded_vocabulary(name, tokens):
    packing = FORMATS[name]
    ids = np.array([0, 9, 10, 19, 20, 29], "int32")
    tensors, values = weight(packing, 10)
    func = quantized.quantized_take(
        tokens=tokens,
        vocab_rows=10,
        features=COLS,
        packing=packing,
        dtype="float32",
        target="cpu",
    )
    got = run(func, *tensors, ids, np.array([1], "int32"), out=((6, COLS), "float32"))
    expected = np.zeros((6, COLS), "float32")
    expected[2:4] = values[[0, 9]]
    np.testing.assert_array_equal(got, expected)
