"""Products with plain and packed weights on the CPU, against float64 numpy."""

import numpy as np
import pytest
import tvm

from shardwright.compiler.kernels import matmul


def run(func, *args, out):
    mod = tvm.compile(
        tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), target="llvm"
    )
    result = tvm.runtime.tensor(np.full(out[0], 7, out[1]))
    mod["main"](*[tvm.runtime.tensor(a) for a in args], result)
    return result.numpy()


def packed_weight(rows, cols, group, dtype, seed=0):
    """Random words and scales, and the weight they stand for in float64."""
    rng = np.random.default_rng(seed)
    nibbles = rng.integers(0, 15, (rows, cols // 8, 8), dtype="uint32")
    words = (nibbles << (4 * np.arange(8, dtype="uint32"))).sum(-1, dtype="uint32")
    scale = (rng.random((rows, cols // group)) / 16).astype(dtype)
    weight = (nibbles.reshape(rows, cols).astype("float64") - 7) * scale.repeat(group, 1)
    return words, scale, weight


@pytest.mark.parametrize(
    ("n", "tokens", "features", "inner"),
    [
        (1, 1, 24, 64),
        (3, 3, 7, 33),
        (8, 8, 10, 160),
        (13, None, 9, 48),
        (2, None, 4, 15),
        (16, None, 2, 250),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_matmul(n, tokens, features, inner, dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, inner)).astype(dtype)
    w = rng.standard_normal((features, inner)).astype(dtype)
    func = matmul.matmul_cpu(
        tokens=tokens, out_features=features, in_features=inner, dtype=dtype, out_dtype="float32"
    )
    got = run(func, x, w, out=((n, features), "float32"))
    np.testing.assert_allclose(got, x.astype("float64") @ w.astype("float64").T, atol=1e-4)


@pytest.mark.parametrize("tokens", [None, 6])
def test_q4_take_of_a_sharded_vocabulary(tokens):
    ids = np.array([0, 9, 10, 19, 20, 29], "int32")
    words, scale, weight = packed_weight(10, 64, 32, "float16")
    func = matmul.q4_take(
        tokens=tokens, vocab_rows=10, features=64, group=32, dtype="float16", target="cpu"
    )
    got = run(func, words, scale, ids, np.array([1], "int32"), out=((6, 64), "float16"))
    expected = np.zeros((6, 64))
    expected[2:4] = weight[[0, 9]]
    np.testing.assert_allclose(got, expected, rtol=1e-3)
