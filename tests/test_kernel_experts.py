"""Routing and products with experts against float64 numpy, on the CPU; CUDA source for GPUs."""

from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm.target import Target

from shardwright.compiler.kernels import experts, experts_cuda
from shardwright.compiler.packing import Packing, dequantize, pack


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


# Every kind of format: scales of 16 and 32 bits, zero points, words of 4, 8 and 10 codes.
FORMATS = {
    "plain": None,
    "q4": Packing(4, 32, offset=7),
    "q4-small-groups": Packing(4, 8, offset=7),
    "q4-zeros": Packing(4, 16, zeros=True),
    "q3": Packing(3, 40, offset=3),
    "q8": Packing(8, 32, offset=128, scale_dtype="float32"),
    "q8-zeros": Packing(8, 4, zeros=True),
    "e4m3-rows": Packing(8, 0, code="e4m3", scale_dtype="float32"),
    "e4m3-blocks": Packing(8, 32, code="e4m3", scale_dtype="float32"),
    "mxfp4": Packing(4, 32, code="e2m1", scale_dtype="uint8"),
}


def packing_of(name, cols):
    packing = FORMATS[name]
    return replace(packing, group=cols) if packing and not packing.group else packing


def width_of(name, cols):
    """`cols`, padded to whole groups."""
    packing = packing_of(name, cols)
    return cols + (-cols % packing.group if packing else 0)


def tensors_of(rng, packing, shape, dtype):
    """The three tensors of a random weight `[experts, rows, cols]`, and what it stands for."""
    experts, rows, cols = shape
    if packing is None:
        weight = (rng.standard_normal(shape) * cols**-0.5).astype(dtype)
        return [weight.reshape(-1, cols)] * 3, weight.astype("float64")
    codes = rng.integers(0, 1 << packing.bits, (experts * rows, cols)).astype(np.uint8)
    if packing.code == "e4m3":
        codes[(codes & 0x7F) == 0x7F] = 0x01  # the smallest number instead of NaN
    largest = 448 if packing.code == "e4m3" else 1 << packing.bits
    side = (experts * rows, cols // packing.group)
    if packing.code == "e2m1":
        scale = rng.integers(119, 124, side).astype(np.uint8)
        scale[0, 0], scale[1, -1] = 0, 1  # zero, and far below what half precision has
    else:
        scale = (rng.uniform(-2, 2, side) / largest * cols**-0.5).astype(packing.scale_dtype)
    zero = rng.integers(0, 1 << packing.bits, side).astype(packing.scale_dtype)
    zero = zero if packing.zeros else None
    words = pack(codes, packing.bits)
    values = dequantize(words, scale, zero, packing)
    return [words, scale, scale if zero is None else zero], values.reshape(shape)


def clamped(g, u, alpha, limit):
    g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
    return g / (1 + np.exp(-alpha * g)) * (u + 1)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("split", [False, True])
def test_biases_and_a_clamped_activation(split, rank):
    """With `split` a rank has a part of every expert, and only rank 0 adds the last bias."""
    check_products("plain", "float32", rank, split, alpha=1.7, limit=0.5)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", FORMATS)
def test_products_with_chosen_experts(name, dtype, rank):
    """Of six experts a rank has three; slots of the others count for nothing."""
    check_products(name, dtype, rank)


def check_products(name, dtype, rank, split=False, **activation):
    rng = np.random.default_rng(0)
    n, top, held = 5, 2, 6 if split else 3
    biased = bool(activation)
    inner, mlp = width_of(name, 64), width_of(name, 96)
    ids = np.stack([rng.permutation(6)[:top] for _ in range(n)]).astype("int32")
    weights = rng.random((n, top)).astype("float32")
    x = rng.standard_normal((n, inner)).astype(dtype)
    into, out_of = packing_of(name, inner), packing_of(name, mlp)
    gate, wg = tensors_of(rng, into, (held, mlp, inner), dtype)
    up, wu = tensors_of(rng, into, (held, mlp, inner), dtype)
    down, wd = tensors_of(rng, out_of, (held, inner, mlp), dtype)
    common = dict(tokens=None, top=top, experts=held, dtype=dtype, target="cpu")
    h, out = np.zeros((n * top, mlp), dtype), np.zeros((n, inner), dtype)
    number = np.array([rank], "int32")
    start = np.zeros(1, "int32") if split else number
    biases = [rng.standard_normal((held, size)).astype("float32") for size in (mlp, mlp, inner)]
    flat = [b.reshape(-1, 1) if biased else start for b in biases]
    sizes = dict(rows=mlp, cols=inner, packing=into, biased=biased, **activation, **common)
    build(experts.experts_up(**sizes))(x, *gate, *up, *flat[:2], ids, start, h)
    sizes = dict(rows=inner, cols=mlp, packing=out_of, biased=biased, split=split, **common)
    build(experts.experts_down(**sizes))(h, *down, flat[2], ids, weights, number, out)

    want = np.zeros((n, inner))
    for t in range(n):
        for k in range(top):
            e = ids[t, k] - start[0] * held
            if 0 <= e < held:
                g, u = wg[e] @ x[t].astype("float64"), wu[e] @ x[t].astype("float64")
                if biased:
                    y = clamped(g + biases[0][e], u + biases[1][e], **activation)
                else:
                    y = silu(g) * u
                last = biases[2][e] if biased and not (split and rank) else 0
                want[t] += weights[t, k] * (wd[e] @ y + last)
    tolerance = 1e-5 if dtype == "float32" else 5e-3
    np.testing.assert_allclose(out, want, atol=tolerance, rtol=tolerance)


def source(func):
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    pending = [tvm.compile(mod, Target({"kind": "cuda", "arch": "sm_90a"}, host="llvm")).mod]
    while pending:
        module = pending.pop()
        if module.kind == "cuda":
            return module.inspect_source()
        pending.extend(module.imports)
    raise AssertionError("no CUDA module")


@pytest.mark.parametrize("name", FORMATS)
def test_cuda_source(name):
    common = dict(top=2, experts=4, dtype="float16", target="cuda")
    cols = width_of(name, 64)
    product = dict(rows=96, cols=cols, packing=packing_of(name, cols), **common)
    assert "__shfl_xor_sync" in source(experts.experts_up(tokens=2, **product))
    assert "__shfl_xor_sync" in source(experts.experts_down(tokens=2, **product))
    for gated in (True, False):
        text = source(experts.experts_grouped(tokens=None, gated=gated, **product))
        assert "__shared__" in text
    assert source(experts.expert_order(tokens=None, top=2, experts=4, target="cuda"))


def test_cuda_source_with_biases():
    common = dict(top=2, experts=4, dtype="float16", target="cuda", biased=True)
    product = dict(rows=96, cols=64, packing=FORMATS["mxfp4"], **common)
    gates = dict(alpha=1.702, limit=7.0)
    assert "__shfl_xor_sync" in source(experts.experts_up(tokens=2, **gates, **product))
    assert "__shfl_xor_sync" in source(experts.experts_down(tokens=2, split=True, **product))
    grouped = experts.experts_grouped(tokens=None, gated=True, **gates, **product)
    assert "__shared__" in source(grouped)
    many = experts_cuda.experts_grouped(tokens=None, gated=True, **gates, **product)
    assert "mma.sync" in source(many)
    assert "cp.async" in source(experts_cuda.experts_up(tokens=2, **gates, **product))
    assert "mma.sync" in source(experts_cuda.experts_down(tokens=2, split=True, **product))
    for split in (False, True):
        total = experts.experts_sum(tokens=None, features=64, split=split, **common)
        assert "blockIdx" in source(total)
