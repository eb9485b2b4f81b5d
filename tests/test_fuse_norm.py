"""Sums, norms and products of few tokens in one kernel: what becomes of functions, what stays."""

import shutil

import numpy as np
import pytest
import tvm
import tvm_ffi
from reference import families
from tvm import relax

from shardwright.compiler import cuda, fuse
from shardwright.compiler.fuse_norm import FUSE_NORM_PASS, fuse_norm, sum_first_norms
from shardwright.compiler.kernels import gemv_mma, gemv_norm, gemv_sum, gemv_tokens, send_embed
from shardwright.compiler.lower import lower_abstract
from shardwright.compiler.peer import SUM_PLACES, add_peer_functions, peer_state, sum_places
from shardwright.compiler.program import partition_program
from shardwright.compiler.propagate import bindings_of
from shardwright.compiler.quantization import quantization
from shardwright.compiler.rules import op_name, operands_of
from shardwright.compiler.script_speed import without_source_context
from shardwright.compiler.trace import Limits
from shardwright.model_defs import family_of
from shardwright.runtime import references
from shardwright.runtime.selftest import _compare

CONFIG = dict(
    architectures=["LlamaForCausalLM"], hidden_size=256, intermediate_size=384, vocab_size=100,
    num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
    max_position_embeddings=64, rope_theta=1e4, hidden_act="silu", tie_word_embeddings=False,
    head_dim=64,
)  # fmt: skip


def fused(config, ranks, scheme="q4f16_1"):
    """A model's module before the pass and after it, and the peers' state."""
    _, family = family_of(config)
    scheme = quantization(scheme)
    model = family.model(family.config.from_hf(config), scheme.dtype)
    before = partition_program(model, scheme, Limits(64, 2, 32, 16), ranks).mod
    peer = peer_state(before, ranks, 32)
    for fusion in fuse.FUSIONS.values():
        before = fusion(before)
    before = sum_first_norms(before)
    if peer is not None:
        before = add_peer_functions(before, peer)
    return before, fuse_norm(before, peer), peer


def calls(func):
    """The operations of ours that a function calls: names without `shardwright.`, and results."""
    found = [(b.var, b.value) for b in bindings_of(func) if isinstance(b.value, relax.Call)]
    return [(op_name(c).removeprefix("shardwright."), v, operands_of(c)) for v, c in found]


def changed(before, after):
    """Names of the functions that differ."""
    found = set()
    for gv, func in before.functions_items():
        if not tvm_ffi.structural_equal(func, after[gv.name_hint]):
            found.add(gv.name_hint)
    return found


SCHEMES = [("q4f16_1", "q4_"), ("q0f16", "")]
"""A scheme of quantization and what names of its products begin with."""


def kernels_of(func):
    """The kernels that a function calls, in order."""
    found = [b.value for b in bindings_of(func) if isinstance(b.value, relax.Call)]
    return [
        c.args[0].name_hint for c in found if c.args and isinstance(c.args[0], tvm.ir.GlobalVar)
    ]


def item(func, var):
    """The tuple and the place in it that a variable is taken from."""
    (value,) = [b.value for b in bindings_of(func) if b.var == var]
    return value.tuple_value, value.index


def is_zero(x):
    """Whether a residual is none."""
    return not isinstance(x, relax.Var) and not x.value.numpy().any()


@pytest.mark.parametrize("scheme, kind", SCHEMES)
def test_one_rank_adds_and_norms_in_front_of_its_products(scheme, kind):
    before, after, _ = fused(CONFIG, 1, scheme)
    assert changed(before, after) == {"decode_1", "decode_2"}
    func = after["decode_1"]
    found = calls(func)
    layer = ["append_attention_joined", "relax.reshape", f"{kind}linear"]
    layer += [f"add_norm_{kind}gated_linear", f"{kind}linear", f"add_norm_{kind}linear"]
    names = [name for name, _, _ in found]
    row = found[names.index("q4_embed" if kind else "relax.take")][1]
    assert names[names.index(f"add_norm_{kind}linear") :] == [
        f"add_norm_{kind}linear", *layer * 3, "store_logits", "sample"
    ]  # fmt: skip
    pairs = [x for x in found if x[0].startswith("add_norm")]
    for i, (_, pair, (x, y, norm, weight, *scale, eps)) in enumerate(pairs):
        at = [v for _, v, _ in found].index(pair)
        assert y == (found[at - 1][1] if i else row)  # the product in front
        # The sum goes on from pair to pair.
        assert item(func, x) == (pairs[i - 1][1], 0) if i else is_zero(x)
        assert eps.value == 1e-5 and "norm" in norm.name
        assert [s.name[:-5] for s in scale] == [weight.name.removesuffix("q4")] * (kind != "")
        # And the product to what reads it.
        reader = found[at + 1][2][0]
        assert item(func, reader) == (pair, 1)
    assert str(pairs[-1][1].ty.fields[1].dtype) == "float32" and "lm_head" in pairs[-1][2][3].name


@pytest.mark.parametrize("scheme, kind", SCHEMES)
def test_several_rows_add_behind_products_and_scale_those_behind_norms(scheme, kind):
    _, after, _ = fused(CONFIG, 1, scheme)
    func = after["decode_2"]
    found = calls(func)
    names = [name for name, _, _ in found]
    layer = ["append_attention_joined", "relax.reshape", f"add_{kind}linear"]
    layer += [f"norm_{kind}gated_linear", f"add_{kind}linear", f"norm_{kind}linear"]
    start = names.index("relax.nn.rms_norm")
    assert names[start:] == [
        *("relax.nn.rms_norm", f"{kind}linear"), *layer * 3, "store_logits", "sample"
    ]  # fmt: skip
    sums = [(v, args) for name, v, args in found if name == f"add_{kind}linear"]
    products = [(v, args) for name, v, args in found if name.startswith("norm")]
    last = None
    for (three, added), (_, normed) in zip(sums, products, strict=True):
        _x, weight, *scale, residual, norm = added
        # The residual is the sum before.
        assert residual == found[start][2][0] if last is None else item(func, residual) == (last, 0)
        assert [s.name[:-5] for s in scale] == [weight.name.removesuffix("q4")] * (kind != "")
        assert "norm" in norm.name
        weighted, squares, other, *_scale, eps = normed
        assert item(func, weighted) == (three, 1) and item(func, squares) == (three, 2)
        assert eps.value == 1e-5 and other.name != weight.name
        last = three
    assert str(products[-1][0].ty.dtype) == "float32" and "lm_head" in products[-1][1][2].name


@pytest.mark.parametrize("scheme, kind", SCHEMES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_send_and_sum(ranks, scheme, kind):
    before, after, peer = fused(CONFIG, ranks, scheme)
    assert changed(before, after) == {"decode_1_peer", "decode_2_peer"}
    func = after["decode_1_peer"]
    found = calls(func)
    names = [name for name, _, _ in found]
    layer = ["append_attention_joined", "relax.reshape", f"send_{kind}linear"]
    layer += [f"sum_norm_{kind}gated_linear", f"send_{kind}linear", f"sum_norm_{kind}linear"]
    assert names[names.index(f"send_{kind}embed") :] == [
        *(f"send_{kind}embed", f"sum_norm_{kind}linear", "rotary_table"), *layer * 3,
        *("peer_store_logits", "sample"),
    ]  # fmt: skip
    assert not {"embed", "q4_embed", "peer_all_reduce", "relax.nn.rms_norm"} & {*names}
    sends = [x for x in found if x[0].startswith("send")]
    sums = [x for x in found if x[0].startswith("sum_norm")]
    places = [0, 1, 2, 3, 0, 4, 5]
    for i, ((_, sent, send), (_, _pair, args)) in enumerate(zip(sends, sums, strict=True)):
        *send, place, first = send
        if i == 0:  # the look-up
            table, *scale, x, peers, at, calls_ = send
            assert (x.name, calls_.name, "embed" in table.name) == ("tokens", "peer_calls", True)
        else:
            x, weight, *scale, peers, at = send
            assert [s.name[:-5] for s in scale] == [weight.name.removesuffix("q4")] * (kind != "")
        assert (peers.name, at.name) == ("peers", "rank")
        assert (place.value, first.value) == (places[i], peer.sums_at)
        old, norm, *_weight, done, held, peers, at, place, last, eps, first = args
        assert (peers.name, at.name) == ("peers", "rank")
        assert (place.value, last.value, first.value) == (places[i], places[i - 1], peer.sums_at)
        assert done == sent and held == x and eps.value == 1e-5 and "norm" in norm.name
        assert item(func, old) == (sums[i - 1][1], 0) if i else is_zero(old)


@pytest.mark.parametrize("scheme, kind", SCHEMES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_sum_several_rows_behind_products(ranks, scheme, kind):
    _, after, peer = fused(CONFIG, ranks, scheme)
    func = after["decode_2_peer"]
    found = calls(func)
    names = [name for name, _, _ in found]
    start = names.index("relax.nn.rms_norm")
    layer = ["append_attention_joined", "relax.reshape", f"sum_add_{kind}linear"]
    layer += [f"norm_{kind}gated_linear", f"sum_add_{kind}linear", f"norm_{kind}linear"]
    assert names[start - 1 :] == [
        *("peer_all_reduce", "relax.nn.rms_norm", f"{kind}linear"), *layer * 3,
        *("peer_store_logits", "sample"),
    ]  # fmt: skip
    sums = [(v, args) for name, v, args in found if name == f"sum_add_{kind}linear"]
    products = [args for name, _, args in found if name.startswith("norm")]
    last = None
    for i, ((three, added), normed) in enumerate(zip(sums, products, strict=True)):
        _x, weight, *scale, residual, norm, peers, rank, first = added
        assert residual == found[start][2][0] if last is None else item(func, residual) == (last, 0)
        assert [s.name[:-5] for s in scale] == [weight.name.removesuffix("q4")] * (kind != "")
        assert "norm" in norm.name and (peers.name, rank.name) == ("peers", "rank")
        # What a sum left is taken before the next but one begins.
        assert first.value == peer.several_at[i % 2]
        weighted, squares, *_weight, eps = normed
        assert item(func, weighted) == (three, 1) and item(func, squares) == (three, 2)
        assert eps.value == 1e-5
        last = three


def test_sums_of_several_rows_that_are_large_stay(monkeypatch):
    assert gemv_norm.sums(16, 8192, 4) and not gemv_norm.sums(16, 8192, 8)
    # Two rows of 256 halves to each of two others.
    for limit, names in ((2048, {"decode_1_peer", "decode_2_peer"}), (2047, {"decode_1_peer"})):
        monkeypatch.setattr(gemv_norm, "MAX_SENT", limit)
        before, after, _ = fused(CONFIG, 3)
        assert changed(before, after) == names


@pytest.mark.parametrize("sums", range(SUM_PLACES, 24))
def test_places_of_sums_are_used_again_behind_two_others(sums):
    steps = sum_places(sums) * 2
    assert set(steps) == set(range(SUM_PLACES))
    assert all(len({*steps[i : i + 3]}) == 3 for i in range(len(steps) - 2))


def test_all_of_several_ranks_or_none():
    # Too few sums to have places of their own.
    before, after, _ = fused(CONFIG | {"num_hidden_layers": 1}, 2)
    assert changed(before, after) == {"decode_2_peer"}
    before, after, _ = fused(CONFIG | {"mlp_bias": True}, 2)
    assert not changed(before, after)
    # One rank fuses what it can: behind attention, but not behind a bias.
    before, after, _ = fused(CONFIG | {"mlp_bias": True}, 1)
    assert changed(before, after)
    assert "add_norm_q4_linear" in [name for name, _, _ in calls(after["decode_1"])]
    names = [name for name, _, _ in calls(after["decode_2"])]
    assert names.count("add_q4_linear") == names.count("norm_q4_linear") == 3
    assert names.count("add_rms_norm") == 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_in_float32_keep_their_norms(ranks):
    before, after, _ = fused(CONFIG, ranks, "q0f32")
    assert not changed(before, after)


def test_without_peers_sums_come_before():
    before, _, _ = fused(CONFIG, 2)
    assert not changed(before, fuse_norm(before, None))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2", "mixtral", "gpt-oss"])
def test_other_families_stay_whole(name, ranks):
    config = next(case.config for case in families.cases() if case.name == name)
    before, after, _ = fused(config, ranks)
    for function in changed(before, after):
        read = {x for _, _, args in calls(after[function]) for x in args}
        # Every product of the function before is still computed, and every result still used.
        plain, new = ([n for n, _, _ in calls(m[function])] for m in (before, after))
        assert sum("linear" in n for n in plain) == sum("linear" in n for n in new)
        for kind, var, _ in calls(after[function]):
            if kind.startswith("send"):
                assert var in read


@pytest.mark.parametrize("arch", ["sm_89", "sm_90a", "sm_120"])
@pytest.mark.parametrize("disabled", [False, True])
def test_only_gpus_with_clusters_have_the_kernels(arch, disabled):
    before, _, _ = fused(CONFIG, 1)
    target = cuda.cuda_target((arch,))
    with target, without_source_context():
        mod = lower_abstract(before, target, disabled=frozenset([FUSE_NORM_PASS] * disabled))
    names = {gv.name_hint for gv in mod.get_global_vars()}
    for kind in ("add_norm_gemv", "add_gemv", "norm_gemv"):
        found = any(n.startswith(kind) for n in names)
        assert found == (arch == "sm_90a" and not disabled)


@pytest.mark.parametrize("arch", ["sm_89", "sm_90a", "sm_120"])
@pytest.mark.parametrize("disabled", [False, True])
def test_only_gpus_with_clusters_stream_rows(arch, disabled):
    before, _, _ = fused(CONFIG, 1, "q0f16")
    target = cuda.cuda_target((arch,))
    with target, without_source_context():
        mod = lower_abstract(before, target, disabled=frozenset([FUSE_NORM_PASS] * disabled))
    names = [n.split("_kernel")[0] for n in kernels_of(mod["decode_1"])]
    products = [n for n in names if "gemv" in n]
    assert len(products) == 4 * CONFIG["num_hidden_layers"] + 1
    rows = {"gemv_rows"} if disabled else {"gemv_rows", "add_norm_gemv"}
    assert {*products} == (rows if arch == "sm_90a" else {"gemv"})
    assert ("add_rms_norm" in names) == (arch != "sm_90a" or disabled)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("group", [0, 32])
def test_the_kernels_of_one_token_compile(group):
    product = gemv_mma.Product(1, 96, 256, group, True)
    sizes = {"group": group, "in_features": 256}
    normed = sizes | {"out_features": 96, "tuned": gemv_sum.normed_plan(product), "eps": 1e-5}
    peers = {"ranks": 2, "first_word": 64}
    plain = gemv_sum.sent_plan(gemv_mma.Product(1, 256, 256, group))
    compiled(
        add=gemv_sum.add_norm_gemv(**normed, out_dtype="float16", gated=True),
        sum=gemv_sum.sum_norm_gemv(**normed, **peers, out_dtype="float32"),
        send=gemv_sum.send_gemv(**sizes, **peers, out_features=256, tuned=plain),
        row=send_embed.send_embed(**peers, table_rows=50, features=256, group=group, rows=2),
    )


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("group, out_features", [(32, 96), (0, 96), (0, 8192)])
def test_the_kernels_of_several_tokens_compile(group, out_features):
    product = gemv_mma.Product(7, out_features, 2048, group)
    sizes = {"batch": 7, "out_features": out_features, "in_features": 2048, "group": group}
    plan = gemv_norm.added_plan(product)
    assert isinstance(plan, gemv_tokens.Plan) == (out_features == 8192)
    scaled = sizes | {"tuned": gemv_norm.scaled_plan(product), "eps": 1e-5, "pieces": 132}
    compiled(
        norm_several=gemv_norm.norm_gemv(**scaled, out_dtype="float32"),
        add_several=gemv_norm.add_gemv(**sizes, tuned=plan),
        sum_several=gemv_norm.sum_add_gemv(**sizes, tuned=plan, ranks=3),
    )


def compiled(**kernels):
    """Compile kernels by their names."""
    target = cuda.cuda_target(("sm_90a",))
    cuda.install_hook(("sm_90a",))
    with target:
        mod = tvm.IRModule({n: f.with_attr("global_symbol", n) for n, f in kernels.items()})
        assert tvm.compile(mod, target) is not None


def test_references():
    rng = np.random.default_rng(0)
    residual, y = rng.standard_normal((2, 1, 64)).astype(np.float16)
    norm, scale = rng.random(64).astype(np.float16), rng.random((6, 2)).astype(np.float16)
    packed = rng.integers(0, 2**32, (6, 8), dtype=np.uint32)
    total = residual + y
    wide = total.astype(np.float64)
    x = wide / np.sqrt((wide**2).mean() + 1e-5) * norm
    codes = (packed[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15).reshape(6, 64)
    out = x @ ((codes - 7.0) * np.repeat(scale.astype(np.float64), 32, 1)).T
    gate, up = out[:, :3], out[:, 3:]
    gated = (gate / (1 + np.exp(-gate)) * up).astype(np.float16)
    note = {"eps": 1e-5, "gated": True}
    add = [residual, y, norm, packed, scale, gated, total]
    exchange = [np.zeros(1), y, np.zeros(3), np.zeros(1), np.zeros(1), 0]
    several = [residual, norm, packed, scale, *exchange, gated, total]
    dense = ((codes - 7.0) * np.repeat(scale.astype(np.float64), 32, 1)).astype(np.float16)
    gate, up = x @ dense[:3].T.astype(np.float64), x @ dense[3:].T.astype(np.float64)
    plain = [dense, *exchange, (gate / (1 + np.exp(-gate)) * up).astype(np.float16), total]
    weighted = (wide * norm / 16).astype(np.float16)
    squares = np.array([[(wide**2).sum() / 4, (wide**2).sum() * 3 / 4]], np.float32)
    product = x @ ((codes - 7.0) * np.repeat(scale.astype(np.float64), 32, 1)).T
    behind, by = rng.standard_normal((2, 1, 6)).astype(np.float16)
    sums = (product + behind).astype(np.float16)
    parts = np.array([[(sums.astype(np.float64) ** 2).sum(), 0]], np.float32)
    added = [x.astype(np.float16), packed, scale, behind, by[0], sums, sums * by / 16, parts]
    for name, args in (
        ("add_norm_gemv_kernel2", add),
        ("sum_norm_gemv_kernel", several),
        ("add_norm_gemv_kernel", [residual, y, norm, dense, *plain[-2:]]),
        ("sum_norm_gemv_kernel1", [residual, norm, *plain]),
        ("norm_gemv_kernel", [weighted, squares, packed, scale, gated]),
        ("add_gemv_kernel1", added),
        ("add_gemv_kernel", [added[0], dense, *added[3:]]),
        ("sum_add_gemv_kernel1", [*added[:5], np.zeros(2), np.zeros(1), 0, *added[5:]]),
    ):
        adds = name.startswith(("add_gemv", "sum_add_gemv"))
        reference, of = references.reference_of(name), {} if adds else note
        assert _compare("x", reference(args, args, of)).passed
        for i in (-1, -2, -3) if adds else (-1,) if name.startswith("norm") else (-2,):
            wrong = [*args]
            wrong[i] = args[i] * args[i].dtype.type(1.05)
            assert not _compare("x", reference(args, wrong, of)).passed
