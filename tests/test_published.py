"""Published configurations, full size, partitioned and lowered for CUDA without weights.

Layers that repeat add nothing but time, so of each model as many are kept as differ.
"""

import re

import pytest
from reference.published import PUBLISHED

from shardwright.compiler.checkpoint import Checkpoint
from shardwright.compiler.cuda import cuda_target
from shardwright.compiler.library import compile_program
from shardwright.compiler.lower import lower_abstract
from shardwright.compiler.options import BuildOptions, limits_of
from shardwright.compiler.program import partition_program
from shardwright.compiler.scheme import model_config, scheme_of
from shardwright.compiler.script_speed import without_source_context
from shardwright.errors import UsageError
from shardwright.model_defs import family_of

RANKS = (2, 4, 8)
NAMES = list(PUBLISHED)
TARGET = cuda_target(("sm_90a",))
# One of each kind goes all the way to CUDA source in `make test`.
TO_SOURCE = {("Gemma-2-27b", 8), ("Phi-4-mini", 4), ("Qwen3-30B-A3B", 2), ("gpt-oss-20b", 4)}


def shortened(config):
    _, family = family_of(config)
    whole = family.config.from_hf(config)
    kinds = list(whole.layer_types)
    layers = 1 if len(set(kinds)) < 2 else kinds.index("full_attention") + 1
    few = {**config, "num_hidden_layers": layers}
    if "layer_types" in few:
        few["layer_types"] = kinds[:layers]
    return family, family.config.from_hf(few)


def partitioned(name, ranks, tmp_path, expert_parallel=False):
    checkpoint = Checkpoint(tmp_path, dict(PUBLISHED[name]), {})
    family, config = shortened(model_config(checkpoint))
    options = BuildOptions("", tmp_path, num_shards=ranks, target="cuda", max_batch_size=1)
    scheme = scheme_of(None, checkpoint)
    limits = limits_of(options, config)
    model = family.model(config, scheme.dtype)
    options = {"expert_parallel": expert_parallel}
    return partition_program(model, scheme, limits, ranks, **options), limits


def grid(quick):
    """Every model at every number of ranks; those that are not `quick` are marked `matrix`."""
    for name in NAMES:
        for ranks in RANKS:
            marks = () if quick(name, ranks) else pytest.mark.matrix
            yield pytest.param(name, ranks, marks=marks)


def one_each(name, ranks):
    return ranks == RANKS[NAMES.index(name) % len(RANKS)]


@pytest.mark.parametrize(("name", "ranks"), [*grid(one_each)])
def test_every_operation_has_kernels(name, ranks, tmp_path):
    program, _ = partitioned(name, ranks, tmp_path)
    with TARGET, without_source_context():
        mod = lower_abstract(program.mod, TARGET)
    calls = {str(call) for call in mod["decode_1"].script().split() if "shardwright." in call}
    assert all("shardwright.all_" in call for call in calls), calls


@pytest.mark.parametrize(("name", "ranks"), [*grid(lambda *case: case in TO_SOURCE)])
def test_compiles_to_cuda_source(name, ranks, tmp_path):
    program, limits = partitioned(name, ranks, tmp_path)
    compiled = compile_program(program, (TARGET,), limits, tmp_path / "model.so")
    assert {"prefill", "decode_1", "sample", "workspace"} <= compiled.functions.keys()


def test_whole_experts_on_each_rank(tmp_path):
    program, limits = partitioned("Qwen3-235B-A22B", 8, tmp_path, expert_parallel=True)
    shapes = {name: w.tensors()[0][1] for name, w in program.weights.items()}
    experts = "model.layers.0.mlp.experts."
    assert shapes[experts + "gate_proj"] == (128 // 8 * 1536, 4096 // 8)
    assert shapes[experts + "down_proj"] == (128 // 8 * 4096, 1536 // 8)
    compile_program(program, (TARGET,), limits, tmp_path / "model.so")


def test_experts_in_mxfp4_keep_their_blocks(tmp_path):
    """2,880 columns are 90 blocks of 32; a quarter is 22.5, so a rank has 23."""
    program, _ = partitioned("gpt-oss-120b", 4, tmp_path)
    shapes = {name: w.tensors() for name, w in program.weights.items()}
    down, gate = (shapes[f"model.layers.0.mlp.experts.{n}_proj"] for n in ("down", "gate"))
    assert [t[1:] for t in down] == [((128 * 2880, 92), "uint32"), ((128 * 2880, 23), "uint8")]
    assert [t[1:] for t in gate] == [((128 * 736, 360), "uint32"), ((128 * 736, 90), "uint8")]
    (bias,) = shapes["model.layers.0.mlp.experts.down_proj_bias"]
    assert bias[1:] == ((128 * 2880, 1), "float32")


def test_a_model_without_experts_refuses_to_have_them_whole(tmp_path):
    with pytest.raises(UsageError, match="this model has no experts"):
        partitioned("Qwen3-0.6B", 2, tmp_path, expert_parallel=True)


def test_explain_shows_experts_as_the_model_has_them(tmp_path):
    program, _ = partitioned("Qwen3-30B-A3B", 4, tmp_path)
    text = re.sub(" +", " ", program.explanation())
    assert "experts.gate_proj [128, 768, 2048] -> [128, 192, 2048] Shard(1)" in text
    assert "shardwright.experts [1, 2048] Partial(sum)" in text
