"""Logits of quantized checkpoints, through real worker processes.

They are compared with those that transformers computes with the dequantized weights (stored, see
quantized_models.py).
"""

import json

import numpy as np
import pytest
import quantized_models as qm
from reference import models

from shardwright import Session
from shardwright.compiler.build import build
from shardwright.compiler.options import BuildOptions
from shardwright.errors import ConfigError
from shardwright.runtime.artifact import load_manifest

RANKS = (1, 2, 3, 4)
# One format of each kind runs on more ranks than it has heads.
ON_EIGHT = ("gptq-act-order-asym", "awq-64", "fp8-blocks", "ct-int4-asym", "mlc-q4f16_0")
ON_EIGHT += ("mixtral-awq", "qwen3-moe-fp8-blocks")


def logits(case, folder, ranks, out, quantization="checkpoint-f32", **options):
    options = {"max_batch_size": 2, "max_seq_len": case.max_len, **options}
    build(BuildOptions(str(folder), out, quantization, ranks, **options))
    with Session(out) as session:
        steps = [session.prefill([list(p) for p in case.prompts])]
        steps += [session.decode(list(tokens)) for tokens in case.decode]
    return np.stack(steps)


QUICK = ("gptq-act-order-asym", "gptq-8bit", "awq-64", "fp8-blocks", "ct-int4", "ct-int8-asym")
QUICK += ("mlc-q4f16_0", "mixtral-gptq-rows", "qwen3-moe-awq", "qwen3-moe-fp8-blocks")


def _grid():
    """Every format at every number of ranks; `QUICK` ones once outside the marker `matrix`."""
    for name in qm.ALL:
        for ranks in (*RANKS, 8) if name in ON_EIGHT else RANKS:
            quick = name in QUICK and ranks == RANKS[QUICK.index(name) % len(RANKS)]
            yield pytest.param(name, ranks, marks=() if quick else pytest.mark.matrix)


@pytest.mark.parametrize(("name", "ranks"), [*_grid()])
def test_every_format(name, ranks, tmp_path):
    """Float32 activations: within 1e-4 of transformers."""
    qm.write_any(tmp_path / "checkpoint", name)
    got = logits(qm.case_of(name), tmp_path / "checkpoint", ranks, tmp_path / "dist")
    assert models.relative_error(got, qm.golden(name)) < 1e-4


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        pytest.param("qwen3-moe-fp8-blocks", 4),
        pytest.param("mixtral-gptq", 3, marks=pytest.mark.matrix),
        pytest.param("mixtral-awq", 2, marks=pytest.mark.matrix),
        pytest.param("qwen3-moe-ct-int4", 8, marks=pytest.mark.matrix),
    ],
)
def test_whole_experts_on_each_rank(name, ranks, tmp_path):
    qm.write_any(tmp_path / "checkpoint", name)
    out, case = tmp_path / "dist", qm.case_of(name)
    got = logits(case, tmp_path / "checkpoint", ranks, out, expert_parallel=True)
    assert models.relative_error(got, qm.golden(name)) < 1e-4


@pytest.mark.parametrize("name", ["gptq-act-order", "qwen3-moe-gptq"])
def test_half_precision_is_the_default_and_close(name, tmp_path):
    qm.write_any(tmp_path / "checkpoint", name)
    got = logits(qm.case_of(name), tmp_path / "checkpoint", 2, tmp_path / "dist", None)
    manifest = load_manifest(tmp_path / "dist")
    assert manifest.quantization.startswith("gptq int4, groups of")
    assert manifest.dtype == "float16"
    # fp16 activations differ by this much with plain weights too; a wrong scale by far more.
    assert models.relative_error(got, qm.golden(name)) < 1e-2


def test_experts_that_are_quantized_differently(tmp_path):
    def plain_expert(tensors, _module):
        module = "model.layers.0.block_sparse_moe.experts.3.w1"
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{module}.{part}"]
        tensors[f"{module}.weight"] = qm.weights(qm.MIXTRAL_CASE)[f"{module}.weight"]

    qm.write(tmp_path / "checkpoint", "mixtral-gptq", change=plain_expert)
    with pytest.raises(ConfigError, match=r"experts\.3\.w1 is quantized otherwise than .*\.0\.w1"):
        build(BuildOptions(str(tmp_path / "checkpoint"), tmp_path / "dist"))


def test_experts_in_act_order(tmp_path, monkeypatch):
    options = {"group": 64, "act_order": True}
    monkeypatch.setitem(qm.EXPERTS, "act-order", (qm.MIXTRAL_CASE, "gptq", options))
    qm.write(tmp_path / "checkpoint", "act-order")
    with pytest.raises(ConfigError, match=r"experts in act-order \(desc_act\) are not supported"):
        build(BuildOptions(str(tmp_path / "checkpoint"), tmp_path / "dist"))

    def alike(tensors, _module):
        order = tensors["model.layers.0.block_sparse_moe.experts.0.w1.g_idx"]
        for name in tensors:
            if name.endswith(("w1.g_idx", "w3.g_idx")):
                tensors[name] = order

    qm.write(tmp_path / "alike", "act-order", change=alike)
    with pytest.raises(ConfigError, match=r"experts in act-order \(desc_act\) are not supported"):
        build(BuildOptions(str(tmp_path / "alike"), tmp_path / "dist"))


def test_gates_and_values_in_two_formats(tmp_path):
    """GPTQModel's `dynamic` may give them different groups; one kernel multiplies with both."""
    eight = {}
    for i in range(qm.MIXTRAL["num_local_experts"]):
        name = f"model.layers.0.block_sparse_moe.experts.{i}.w3"
        qm.gptq(f"{name}.weight", (192, 128), eight, group=32)
    qm.write(tmp_path / "checkpoint", "mixtral-gptq", change=lambda t, _module: t.update(eight))
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {r"+:.*w3$": {"group_size": 32}}
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="are quantized in two formats"):
        build(BuildOptions(str(tmp_path / "checkpoint"), tmp_path / "dist"))
