"""`shardwright selftest`: every kernel of an artefact and the collectives, on this machine."""

from pathlib import Path

import numpy as np
import pytest
import quantized_models
import tvm

from shardwright import cli
from shardwright.compiler.build import build
from shardwright.compiler.kernels import attention, rotary
from shardwright.compiler.options import BuildOptions
from shardwright.runtime import expert_references as experts
from shardwright.runtime import references
from shardwright.runtime.selftest import _compare

DEMO = Path(__file__).parents[1] / "demo" / "model"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("selftest") / "demo"
    build(BuildOptions(str(DEMO), out, num_shards=2, max_batch_size=2, max_seq_len=128))
    return out


def test_every_kernel_and_collective_is_right(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["selftest", str(demo), "--target", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "cpu, 2 ranks" in lines[0]
    results = {line.split()[0]: line.split()[-1] for line in lines if line.strip()}
    assert "WRONG" not in results.values() and "reference" not in results.values()
    for kernel in ("attention_cpu", "quantized_matmul_cpu", "rotary_append", "sample", "q4_take"):
        assert results[f"{kernel}_kernel"] == "ok"
    # A size a line.
    assert sum(line.startswith("all_reduce float16 ") for line in lines) >= 4
    assert ", 0 wrong, " in lines[-1]


def test_a_wrong_kernel_is_named(
    demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = references.REFERENCES["rotary_append"]

    def wrong(before, after, note):
        return [(got, want * 1.01) for got, want in right(before, after, note)]

    monkeypatch.setitem(references.REFERENCES, "rotary_append", wrong)
    assert cli.run(["selftest", str(demo)]) == 1
    captured = capsys.readouterr()
    assert "checks failed: rotary_append_kernel\n" in captured.err
    (line,) = [x for x in captured.out.splitlines() if x.startswith("rotary_append_kernel")]
    assert line.endswith("WRONG")


def test_another_target_is_refused(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["selftest", str(demo), "--target", "cuda"]) == 2
    assert "was built for cpu, not cuda" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("got", "wanted", "passed"),
    [
        (np.float16([1, 2]), np.float64([1, 2.001]), True),
        (np.float16([1, 2]), np.float64([1, 2.1]), False),
        (np.float16([1, np.nan]), np.float64([1, 2]), False),
        (np.float32([-np.inf, 2]), np.float64([-np.inf, 2]), True),
        (np.int32([5]), np.int32([6]), False),
        (np.float32([1, 2, 3]), np.float64([1, 2]), False),
    ],
)
def test_comparison(got: np.ndarray, wanted: np.ndarray, passed: bool) -> None:
    assert _compare("x", [(got, wanted)]).passed == passed
    # The worst pair counts, in any order.
    fine = (np.float16([1]), np.float64([1]))
    assert _compare("x", [(got, wanted), fine]).passed == passed
    assert _compare("x", [fine, (got, wanted)]).passed == passed


@pytest.mark.parametrize(
    ("kernel", "reference"),
    [
        ("q4_gemv_kernel11", references.matmul),
        ("gemv_kernel", references.matmul),
        ("gated_gemm_kernel1", references.gated_matmul),
        ("add_norm_gemv_kernel3", references.add_norm_product),
        ("fused_NT_matmul6_cast4", references.matmul),
        ("fused_strided_slice4_strided_slice5_silu2_multiply2", references.gate),
        ("fused_strided_slice4_silu2_strided_slice5_multiply2", references.gate),
        ("add_rms_norm_kernel3", references.add_rms_norm),
        ("take1", references.take),
        ("no_such_kernel", None),
    ],
)
def test_references_are_found_by_name(kernel: str, reference: references.Reference) -> None:
    assert references.reference_of(kernel) is reference


def run(func):
    """A callable of a CPU kernel that writes numpy arrays in place."""
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    compiled = tvm.compile(mod, target="llvm")

    def call(*args):
        tensors = [tvm.runtime.tensor(a) if isinstance(a, np.ndarray) else a for a in args]
        compiled["main"](*tensors)
        for a, t in zip(args, tensors, strict=True):
            if isinstance(a, np.ndarray):
                a[...] = t.numpy()

    return call


@pytest.mark.parametrize("append", ["joined", "apart", ""])
def test_the_reference_of_decode_attention_is_its_two_parts(append: str) -> None:
    rng = np.random.default_rng(0)
    n, heads, kv, dim, page = 2, 4, 2, 8, 4
    sizes = dict(heads=heads, kv_heads=kv, head_dim=dim, layers=2, pages=5, page_size=page,
                 batch=n, max_pages=2, dtype="float32", tokens=n)  # fmt: skip
    qkv = rng.standard_normal((n, heads + 2 * kv, dim)).astype("float32")
    angle = rng.standard_normal((n, dim // 2)) * 3
    table = np.stack([np.cos(angle), np.sin(angle)], 1).astype("float32")
    pages = [rng.standard_normal((2, 5, kv, page, dim)).astype("float32") for _ in range(2)]
    where = [
        np.array([[4, 1], [0, 3]], "int32"), np.array([1, 0], "int32"), np.array([5, 2], "int32"), 1
    ]  # fmt: skip
    joined = append != "apart"
    apart = [x.copy() for x in np.split(qkv, [heads, heads + kv], 1)]
    first = [qkv.reshape(n, -1), table] if joined else [*apart, table]
    q, scale = np.zeros((n, heads, dim), "float32"), 0.3
    turned, attended = [x.copy() for x in pages], np.zeros_like(q)
    run(rotary.rotary_append(**sizes, target="cpu", joined=joined))(*first, *turned, *where, q)
    run(attention.attention_cpu(**sizes, scale=scale))(q, *turned, *where, attended)

    results = [attended, np.zeros(1), np.zeros(1)]
    read = first if append else [q]
    before = [*read, *(pages if append else turned), *where, *results]
    after = [*read, *turned, *where, *results]
    note = dict(heads=heads, kv_heads=kv, head_dim=dim, scale=scale, append=append, rotary=None)
    pairs = references.decode_attention(before, after, note)
    assert len(pairs) == (3 if append else 1) and _compare("x", pairs).passed
    assert references.reference_of("decode_attention_kernel3") is references.decode_attention
    attended[1, 2, 3] += 0.1
    assert not _compare("x", references.decode_attention(before, after, note)).passed


def test_kernels_of_experts_have_references(tmp_path, capsys) -> None:
    quantized_models.write(tmp_path / "checkpoint", "mixtral-awq")
    options = {"num_shards": 2, "max_batch_size": 2, "max_seq_len": 64}
    build(BuildOptions(str(tmp_path / "checkpoint"), tmp_path / "dist", **options))
    assert cli.run(["selftest", str(tmp_path / "dist")]) == 0
    lines = capsys.readouterr().out.splitlines()
    results = {line.split()[0]: line.split()[-1] for line in lines if line.strip()}
    for kernel in ("route", "experts_up", "experts_down"):
        assert results[f"{kernel}_kernel"] == "ok"


def test_references_of_grouped_experts_agree_with_the_others() -> None:
    """GPUs take many tokens by expert, in four kernels; the result is that of the two for few."""
    rng = np.random.default_rng(0)
    n, top, count, inner, mlp = 6, 2, 3, 8, 5
    note = dict(top=top, experts=count, packing=None, biased=True, alpha=1.5, limit=2.0)
    ids = np.stack([rng.permutation(2 * count)[:top] for _ in range(n)]).astype("int32")
    rank, factors = np.array([1], "int32"), rng.random((n, top)).astype("float32")
    x = rng.standard_normal((n, inner))
    gate, up = rng.standard_normal((2, count * mlp, inner))
    down = rng.standard_normal((count * inner, mlp))
    gate_bias, up_bias = rng.standard_normal((2, count * mlp, 1))
    bias = rng.standard_normal((count * inner, 1))
    local = ids.reshape(-1) - count
    used = (local >= 0) & (local < count)

    few = [x, *[gate] * 3, *[up] * 3, gate_bias, up_bias, ids, rank]
    h = np.full((n * top, mlp), np.nan)
    for slot in np.flatnonzero(used):
        e = slice(local[slot] * mlp, (local[slot] + 1) * mlp)
        g = np.minimum(gate[e] @ x[slot // top] + gate_bias[e, 0], 2.0)
        u = np.clip(up[e] @ x[slot // top] + up_bias[e, 0], -2.0, 2.0)
        h[slot] = g / (1 + np.exp(-1.5 * g)) * (u + 1)
    note["rows"] = mlp
    assert _compare("up", experts.experts_up(few, [*few, h], note)).passed
    order, begin = (pair[1] for pair in experts.expert_order(
        [ids, rank], [ids, rank, np.zeros(n * top), np.zeros(count + 1)], note))  # fmt: skip
    assert sorted(order) == list(np.flatnonzero(used)) and begin[-1] == used.sum()
    many = [x, *[gate] * 3, *[up] * 3, gate_bias, up_bias, order, begin]
    found = experts.experts_grouped(many, [*many, h], note | {"gated": True})
    assert len(found) == len(set(local[used])) and all(_compare("h", [p]).passed for p in found)

    note["rows"] = inner
    y = np.full((n * top, inner), np.nan)
    many = [h, *[down] * 6, rank, rank, order, begin]
    for got, want in experts.experts_grouped(
        many, [*many, y], note | {"gated": False, "biased": False}
    ):
        assert got.shape == want.shape
    for slot in np.flatnonzero(used):
        y[slot] = down[local[slot] * inner : (local[slot] + 1) * inner] @ h[slot]
    whole = [h, *[down] * 3, bias, ids, factors, rank]
    (pair,) = experts.experts_down(whole, [*whole, np.zeros((n, inner))], note)
    last = [y, bias, ids, factors, rank]
    assert _compare("sum", experts.experts_sum(last, [*last, pair[1]], note)).passed
    assert not _compare("sum", experts.experts_sum(last, [*last, pair[1] + 0.1], note)).passed
