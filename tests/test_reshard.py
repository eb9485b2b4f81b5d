"""Artefacts for another number of ranks have the bytes of a build from the checkpoint."""

import dataclasses
import json
import shutil
from pathlib import Path

import ml_dtypes
import mxfp4_models
import numpy as np
import pytest
import quantized_models as qm
from reference import families
from safetensors.numpy import save_file

import demo
from shardwright import cli
from shardwright.compiler.build import build
from shardwright.compiler.library import Compiled
from shardwright.compiler.options import BuildOptions
from shardwright.compiler.reshard import reshard
from shardwright.errors import ArtifactError, UsageError
from shardwright.runtime.artifact import load_manifest

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo/model"
LIMITS = {"max_seq_len": 64, "max_batch_size": 2, "prefill_chunk_size": 16}


@pytest.fixture
def no_compiler(monkeypatch):
    """Builds that leave out what takes time and has nothing to do with weights."""

    def compile_program(program, targets, limits, library, *others):
        library.write_bytes(b"code")
        return Compiled(0, {}, (), {})

    monkeypatch.setattr("shardwright.compiler.build.compile_program", compile_program)


def built(model: Path, out: Path, ranks: int, scheme: str | None, **options) -> Path:
    options |= LIMITS
    build(BuildOptions(str(model), out, quantization=scheme, num_shards=ranks, **options))
    return out


def assert_same_shards(a: Path, b: Path) -> None:
    first, second = load_manifest(a), load_manifest(b)
    shards = {n: e for n, e in first.files.items() if n.startswith("shards/")}
    assert shards and shards == {n: e for n, e in second.files.items() if n.startswith("shards/")}
    for name in shards:
        assert (a / name).read_bytes() == (b / name).read_bytes()
    # The libraries may differ in the names of temporary files; all else is the same.
    whole = [
        dataclasses.replace(m, name="", files={n: e for n, e in m.files.items() if n != "model.so"})
        for m in (first, second)
    ]
    assert whole[0] == whole[1]


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """A checkpoint whose cuts are uneven: 6 query and 2 kv heads, biases, short last blocks."""
    path = tmp_path_factory.mktemp("odd")
    config = json.loads((DEMO / "config.json").read_text())
    hidden, heads, kv, dim, mlp, vocab = 48, 6, 2, 16, 80, 97
    config |= {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": dim,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "num_hidden_layers": 2,
        "attention_bias": True,
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text("{}")
    shapes = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (heads * dim, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv * dim, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv * dim, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, heads * dim),
            f"{layer}.self_attn.q_proj.bias": (heads * dim,),
            f"{layer}.self_attn.k_proj.bias": (kv * dim,),
            f"{layer}.self_attn.v_proj.bias": (kv * dim,),
            f"{layer}.self_attn.o_proj.bias": (hidden,),
            f"{layer}.mlp.gate_proj.weight": (mlp, hidden),
            f"{layer}.mlp.up_proj.weight": (mlp, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, mlp),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
    rng = np.random.default_rng(0)
    tensors = {n: rng.normal(size=s).astype(ml_dtypes.bfloat16) for n, s in shapes.items()}
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("scheme", "before", "after"),
    [("q4f16_1", 3, 4), ("q4f16_1", 1, 7), ("q3f16_1", 2, 5), ("fp8f16", 3, 2), ("q0f16", 4, 16)],
)
def test_uneven_cuts(no_compiler, odd, tmp_path, scheme, before, after):
    old = built(odd, tmp_path / "old", before, scheme)
    reshard(old, tmp_path / "new", after)
    assert_same_shards(tmp_path / "new", built(odd, tmp_path / "direct", after, scheme))


QUICK = {
    *("gptq-act-order-asym", "gptq-8bit", "awq-64", "fp8-blocks", "ct-int4-act-order"),
    *("mlc-q4f16_0", "mixtral-gptq", "qwen3-moe-fp8-blocks"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.matrix) for n in qm.ALL],
)
def test_quantized_checkpoints(no_compiler, tmp_path, name):
    """Of every format, from a cut inside groups to whole ones, and to more ranks than heads."""
    qm.write_any(tmp_path / "model", name)
    old = built(tmp_path / "model", tmp_path / "old", 3, None)
    for ranks in (1, 8):
        reshard(old, tmp_path / "new", ranks)
        direct = built(tmp_path / "model", tmp_path / "direct", ranks, None)
        assert_same_shards(tmp_path / "new", direct)
        old = (tmp_path / "new").rename(tmp_path / f"old{ranks}")


@pytest.mark.parametrize("whole", [False, True])
def test_experts_in_mxfp4(no_compiler, tmp_path, whole):
    mxfp4_models.checkpoints(tmp_path)
    model, options = tmp_path / "mxfp4", {"expert_parallel": whole}
    old = built(model, tmp_path / "old", 2, None, **options)
    reshard(old, tmp_path / "new", 3)
    assert_same_shards(tmp_path / "new", built(model, tmp_path / "direct", 3, None, **options))


def test_a_quantized_checkpoint_in_float32(no_compiler, tmp_path):
    qm.write_any(tmp_path / "model", "gptq-act-order-asym")
    old = built(tmp_path / "model", tmp_path / "old", 1, "checkpoint-f32")
    reshard(old, tmp_path / "new", 2)
    direct = built(tmp_path / "model", tmp_path / "direct", 2, "checkpoint-f32")
    assert_same_shards(tmp_path / "new", direct)


def test_a_quantized_checkpoint_without_weights(no_compiler, tmp_path):
    qm.write_any(tmp_path / "model", "awq-64")
    old = built(tmp_path / "model", tmp_path / "old", 2, None, dummy_weights=True)
    reshard(old, tmp_path / "new", 3)
    manifest = load_manifest(tmp_path / "new")
    direct = built(tmp_path / "model", tmp_path / "direct", 3, None, dummy_weights=True)
    assert manifest.weights == load_manifest(direct).weights


@pytest.mark.parametrize(
    ("name", "scheme", "options"),
    [
        ("gemma2", "q4f16_1", {}),
        ("gemma3", "q0f32", {}),
        ("mixtral", "q4f16_1", {}),
        ("mixtral", "q4f16_1", {"expert_parallel": True}),
        ("qwen3-moe", "q0f16", {"expert_parallel": True}),
        ("phi3", "q8f16_1", {}),
        ("gpt-oss", "q0f32", {}),
        ("gpt-oss", "q4f16_1", {"expert_parallel": True}),
    ],
)
def test_families(no_compiler, tmp_path, name, scheme, options):
    """Norms less one, tied embeddings, joined tensors, experts cut and whole."""
    case = next(case for case in families.cases() if case.name == name)
    families.write_checkpoint(case, tmp_path / "model")
    old = built(tmp_path / "model", tmp_path / "old", 2, scheme, **options)
    for ranks in (3, 1):
        reshard(old, tmp_path / "new", ranks)
        direct = built(tmp_path / "model", tmp_path / "direct", ranks, scheme, **options)
        assert_same_shards(tmp_path / "new", direct)


def test_the_command_there_and_back(no_compiler, odd, tmp_path, capsys):
    old = built(odd, tmp_path / "old", 2, "q4f16_1")
    for source, out, ranks in (("old", "new", "5"), ("new", "back", "2")):
        args = ["reshard", str(tmp_path / source), "--num-shards", ranks]
        assert cli.run([*args, "-o", str(tmp_path / out)]) == 0
        assert f"{ranks} x cpu" in capsys.readouterr().out
    assert_same_shards(tmp_path / "back", old)
    assert (tmp_path / "back/tokenizer_config.json").read_text() == "{}"


def test_dummy_weights_stay_dummy(no_compiler, odd, tmp_path):
    options = BuildOptions(str(odd), tmp_path / "old", dummy_weights=True, **LIMITS)
    build(dataclasses.replace(options, disable_pass=("fuse_add_norm",)))
    reshard(tmp_path / "old", tmp_path / "new", 2)
    manifest = load_manifest(tmp_path / "new")
    assert manifest.dummy_weights and manifest.mesh.size == 2
    assert manifest.disable_pass == ("fuse_add_norm",) and manifest.limits.max_batch_size == 2


def test_what_cannot_be_taken_apart(no_compiler, odd, tmp_path):
    old = built(odd, tmp_path / "old", 2, "q0f16")
    with pytest.raises(UsageError, match="is the artefact itself"):
        reshard(old, tmp_path / "old/../old", 4)
    with pytest.raises(UsageError, match="from 1 to 16"):
        reshard(old, tmp_path / "new", 17)
    qm.write_any(tmp_path / "quantized", "gptq-32")
    quantized = built(tmp_path / "quantized", tmp_path / "four", 2, None)
    (quantized / "quantized.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"quantized\.safetensors"):
        reshard(quantized, tmp_path / "new", 4)
    other = shutil.copytree(old, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["weights"][0]["shape"] = [1, 1]
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="build the model again from its checkpoint"):
        reshard(other, tmp_path / "new", 4)
    shard = old / "shards/rank-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(ArtifactError, match="truncated"):
        reshard(old, tmp_path / "new", 4)


def test_a_model_resharded_runs(tmp_path):
    """The demo model from 1 to 3 ranks gives the tokens that it gives from its checkpoint."""
    build(BuildOptions(str(DEMO), tmp_path / "one", demo.QUANTIZATION, max_batch_size=demo.BATCH))
    reshard(tmp_path / "one", tmp_path / "three", 3)
    assert demo.answers(tmp_path / "three") == demo.golden()
