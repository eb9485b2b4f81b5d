"""Routing and products with experts against float64 numpy, on the CPU; CUDA source for GPUs."""

import numpy as np
import pytest
import tvm
from tvm.target import Target

from shardwright.compiler.kernels import experts
from shardwright.compiler.packing import Packing, pack
from shardwright.compiler.quantization import quantize


def build(func):
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    mod = tvm.compile(mod, target="llvm")

    def call(*args):
        tensors = [tvm.runtime.tensor(a) for a in args]
        mod["main"](*tensors)
        for a, t in zip(args, tensors, strict=True):
            a[...] = t.numpy()

    return call


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("count", "top"), [(8, 2), (5, 5), (128, 8), (3, 1)])
def test_route(count, top, normalize):
    scores = np.random.default_rng(count).standard_normal((6, count)).astype("float32")
    scores[1] = 0  # all equal: the first ones win
    scores[2, -2:] = 4
    ids, weights = np.zeros((6, top), "int32"), np.zeros((6, top), "float32")
    func = experts.route(tokens=None, experts=count, top=top, normalize=normalize, target="cpu")
    build(func)(scores, ids, weights)
    want = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    np.testing.assert_array_equal(ids, want)
    p = np.exp(scores - scores.max(1, keepdims=True)).astype("float64")
    p = np.take_along_axis(p / p.sum(1, keepdims=True), want, 1)
    p = p / p.sum(1, keepdims=True) if normalize else p
    np.testing.assert_allclose(weights, p, rtol=1e-5)


def pair(weight, group):
    """A weight and its scales, or itself twice; and what it stands for."""
    if not group:
        flat = weight.reshape(-1, weight.shape[-1])
        return (flat, flat), weight.astype("float64")
    cols = weight.shape[-1]
    packing = Packing(4, group, offset=7)
    codes, scales = quantize(weight.reshape(-1, cols), packing)
    whole = (codes.astype("float64") - 7) * np.repeat(scales.astype("float64"), group, axis=1)
    return (pack(codes, 4), scales), whole.reshape(weight.shape)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("group", "dtype"), [(0, "float32"), (0, "float16"), (32, "float16")])
def test_products_with_chosen_experts(group, dtype, rank):
    """Of six experts a rank has three; slots of the others count for nothing."""
    rng = np.random.default_rng(0)
    n, top, held, inner, mlp = 5, 2, 3, 64, 96
    ids = np.stack([rng.permutation(6)[:top] for _ in range(n)]).astype("int32")
    weights = rng.random((n, top)).astype("float32")
    x = rng.standard_normal((n, inner)).astype(dtype)
    shapes = [(held, mlp, inner), (held, mlp, inner), (held, inner, mlp)]
    raw = [rng.standard_normal(s).astype(dtype) * dtype_scale(s) for s in shapes]
    (gate, wg), (up, wu), (down, wd) = (pair(w.astype(dtype), group) for w in raw)
    common = dict(tokens=None, top=top, experts=held, group=group, dtype=dtype, target="cpu")
    h, out = np.zeros((n * top, mlp), dtype), np.zeros((n, inner), dtype)
    number = np.array([rank], "int32")
    first = build(experts.experts_up(rows=mlp, cols=inner, width=inner, **common))
    first(x, *gate, *up, ids, number, h)
    second = build(experts.experts_down(rows=inner, cols=mlp, width=mlp, **common))
    second(h, *down, ids, weights, number, out)

    want = np.zeros((n, inner))
    for t in range(n):
        for k in range(top):
            e = ids[t, k] - rank * held
            if 0 <= e < held:
                y = silu(wg[e] @ x[t].astype("float64")) * (wu[e] @ x[t].astype("float64"))
                want[t] += weights[t, k] * (wd[e] @ y)
    tolerance = 1e-5 if dtype == "float32" else 5e-3
    np.testing.assert_allclose(out, want, atol=tolerance, rtol=tolerance)


def dtype_scale(shape):
    return shape[-1] ** -0.5


def source(func):
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    pending = [tvm.compile(mod, Target({"kind": "cuda", "arch": "sm_90a"}, host="llvm")).mod]
    while pending:
        module = pending.pop()
        if module.kind == "cuda":
            return module.inspect_source()
        pending.extend(module.imports)
    raise AssertionError("no CUDA module")


@pytest.mark.parametrize("group", [0, 32])
def test_cuda_source(group):
    common = dict(top=2, experts=4, group=group, dtype="float16", target="cuda")
    product = dict(rows=96, cols=64, width=64, **common)
    assert "__shfl_xor_sync" in source(experts.experts_up(tokens=2, **product))
    assert "__shfl_xor_sync" in source(experts.experts_down(tokens=2, **product))
    for gated in (True, False):
        text = source(experts.experts_grouped(tokens=None, gated=gated, **product))
        assert "__shared__" in text
    assert source(experts.expert_order(tokens=None, top=2, experts=4, target="cuda"))
