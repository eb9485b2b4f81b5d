import json
import os
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardwright.errors import ConfigError
from shardwright.model_defs.config import LlamaConfig, RopeScaling, inv_freq
from shardwright.model_defs.gemma import Gemma3Config
from shardwright.model_defs.phi3 import Phi3Config
from shardwright.model_defs.qwen import Qwen2Config

# Values of transformers; UPDATE_GOLDEN=1 with the reference test below writes them anew.
GOLDEN = Path(__file__).parent / "golden" / "rope.json"

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn_betas": {**YARN, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
    "yarn_attention_factor": {**YARN, "attention_factor": 1.25},
    "yarn_mscale": {**YARN, "mscale": 0.75, "mscale_all_dim": 1.5},
    "yarn_mscale_alone": {**YARN, "mscale": 0.75},
    "yarn_no_factor": {**YARN, "factor": None},
    "yarn_no_length": {"rope_type": "yarn", "factor": 4.0},
}
THETAS = (10000.0, 500000.0)


def config(**changes: Any) -> LlamaConfig:
    return LlamaConfig.from_hf({**BASE, **changes})


def rope_cases() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{name}-{theta:g}", {**BASE, "rope_parameters": {**rope, "rope_theta": theta}})
        for name, rope in ROPES.items()
        for theta in THETAS
    ]


def test_fields():
    c = config(head_dim=32, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    assert (c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers) == (
        *(128, 96, 160),
        2,
    )
    assert (c.num_attention_heads, c.num_key_value_heads, c.head_dim) == (6, 2, 32)
    assert (c.max_position_embeddings, c.rms_norm_eps, c.hidden_act) == (2048, 1e-5, "silu")
    assert c.attention_bias and c.mlp_bias and c.tie_word_embeddings
    with pytest.raises(FrozenInstanceError):
        c.head_dim = 1


def test_defaults_are_those_of_transformers():
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    c = LlamaConfig.from_hf({k: BASE[k] for k in (*required, "num_attention_heads")})
    assert (c.num_key_value_heads, c.head_dim) == (6, 16)
    assert (c.max_position_embeddings, c.rms_norm_eps, c.hidden_act) == (2048, 1e-6, "silu")
    assert not (c.attention_bias or c.mlp_bias or c.tie_word_embeddings)
    assert (c.rope_theta, c.rope_scaling, c.dtype) == (10000.0, RopeScaling(), None)
    assert (c.bos_token_id, c.eos_token_id) == ((), ())


def test_null_counts_as_absent():
    c = config(head_dim=None, num_key_value_heads=None, rope_scaling=None, sliding_window=None)
    assert (c.head_dim, c.num_key_value_heads, c.rope_scaling) == (16, 6, RopeScaling())


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_both_styles_give_the_same_config(rope):
    new = config(rope_parameters={**rope, "rope_theta": 5e5}, dtype="bfloat16")
    old_rope = {k: v for k, v in rope.items() if k != "rope_type"}
    old = config(
        rope_scaling={**old_rope, "type": rope["rope_type"]},
        rope_theta=5e5,
        torch_dtype="bfloat16",
    )
    middle = config(rope_scaling=rope, rope_theta=5e5, torch_dtype="torch.bfloat16")
    assert new == old == middle
    assert (new.rope_theta, new.dtype, new.rope_scaling.type) == (
        5e5,
        "bfloat16",
        rope["rope_type"],
    )


def test_original_length_beside_the_rope_dict():
    beside = config(
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
        original_max_position_embeddings=512,
    )
    assert beside == config(rope_parameters={**YARN, "rope_theta": 1e4})


def test_token_ids():
    assert config(bos_token_id=1, eos_token_id=2).eos_token_id == (2,)
    assert config(bos_token_id=1, eos_token_id=[2, 7, 9]).eos_token_id == (2, 7, 9)
    assert config(bos_token_id=0).bos_token_id == (0,)


def test_keys_without_effect_are_ignored():
    ignored = {
        "use_cache": True,
        "initializer_range": 0.02,
        "transformers_version": "5.23.0",
        "_name_or_path": "x",
        "attention_dropout": 0.1,
        "pad_token_id": -1,
        "pretraining_tp": 2,
        "partial_rotary_factor": 1.0,
        "is_encoder_decoder": False,
    }
    assert config(**ignored) == config()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden_act": "gelu"}, "hidden_act.*'silu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"per_layer_config": {"0": {"num_attention_heads": 2}}}, "per_layer_config"),
        ({"logits_scaling": 8.0}, "logits_scaling: unknown"),
        ({"model_type": "mistral"}, "model_type"),
        ({"num_attention_heads": "6"}, "num_attention_heads"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_size": 96.0}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size: missing"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: 4 does not divide.*6"),
        ({"head_dim": 15}, "head_dim: 15 is odd"),
        ({"hidden_size": 100}, "hidden_size: 100 is no multiple.*set head_dim"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [2, None]}, "eos_token_id"),
        ({"dtype": "float8_e4m3fn"}, "dtype.*bfloat16"),
        ({"torch_dtype": 16}, "torch_dtype"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling: expected an object"),
        ({"rope_scaling": {"type": "fancy"}}, "rope_type: 'fancy'.*yarn"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: missing"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "alpha": 1}}, "rope_scaling.alpha"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "low_freq_factor: missing"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 0.5}}, "high_freq_factor"),
        ({"rope_scaling": {**YARN, "truncate": "no"}}, "truncate"),
        ({"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": YARN, "rope_parameters": LLAMA3}, "rope_scaling: differs"),
        ({"rope_scaling": {**YARN, "rope_theta": 2e4}, "rope_theta": 1e4}, "rope_theta"),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 7},
            "original_max_position_embeddings: 7",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}, "head_dim": 2}, "head_dim"),
    ],
)
def test_refusals_name_the_field(changes, field):
    with pytest.raises(ConfigError, match=field):
        config(**changes)


def test_each_family_refuses_what_only_another_reads():
    with pytest.raises(ConfigError, match="model_type: expected 'qwen2', got 'llama'"):
        Qwen2Config.from_hf(BASE)
    with pytest.raises(ConfigError, match="query_pre_attn_scalar: unknown field"):
        config(query_pre_attn_scalar=20)
    with pytest.raises(ConfigError, match="sliding_window: 4096 is not supported"):
        config(sliding_window=4096)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types: expected 2 entries"),
        ({"layer_types": ["full_attention", "other"]}, "layer_types: expected 2 entries"),
        ({"sliding_window": -1}, "sliding_window: expected a positive integer"),
        ({"max_window_layers": -1}, "max_window_layers: expected a positive integer"),
    ],
)
def test_refusals_of_windows(changes, message):
    hf = {**BASE, "model_type": "qwen2", "use_sliding_window": True, **changes}
    with pytest.raises(ConfigError, match=message):
        Qwen2Config.from_hf(hf)


def test_windows_of_some_layers():
    hf = {**BASE, "model_type": "qwen2", "sliding_window": 5, "max_window_layers": 1}
    assert Qwen2Config.from_hf(hf).window(1) is None  # use_sliding_window is not set
    c = Qwen2Config.from_hf(hf | {"use_sliding_window": True})
    assert [c.window(i) for i in range(2)] == [None, 5]


def test_longrope_needs_a_factor_for_each_rotated_pair():
    scaling = {"type": "su", "short_factor": [1.0] * 7, "long_factor": [2.0] * 8}
    hf = {**BASE, "model_type": "phi3", "rope_scaling": scaling}
    with pytest.raises(ConfigError, match="short_factor: expected 8 numbers"):
        Phi3Config.from_hf(hf)
    with pytest.raises(ConfigError, match="short_factor: expected 6 numbers"):
        Phi3Config.from_hf(hf | {"partial_rotary_factor": 0.75})
    scaling["short_factor"] = [1.0] * 8
    frequencies, scale, ntk = inv_freq(Phi3Config.from_hf(hf | {"max_position_embeddings": 8192}))
    assert frequencies.shape == (2, 8) and ntk == (1.0, 4096)
    np.testing.assert_array_equal(frequencies[1] * 2, frequencies[0])
    assert scale == pytest.approx((1 + np.log(2) / np.log(4096)) ** 0.5)


def test_gemma_3_has_two_kinds_of_rope_in_either_style():
    hf = {**BASE, "model_type": "gemma3_text", "hidden_act": "gelu_pytorch_tanh", "head_dim": 16}
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = hf | {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": scaling}
    nested = {
        "full_attention": {"rope_theta": 5e5, **scaling},
        "sliding_attention": {"rope_theta": 2e4, "rope_type": "default"},
    }
    a, b = Gemma3Config.from_hf(old), Gemma3Config.from_hf(hf | {"rope_parameters": nested})
    assert a == b and a.rope_theta == 5e5 and a.local_rope_theta == 2e4
    assert Gemma3Config.from_hf(hf).rope_theta == 1e6


def test_frequencies_equal_the_golden_values():
    golden = json.loads(GOLDEN.read_text())
    cases = rope_cases()
    assert golden.keys() == {name for name, _ in cases}
    for name, hf in cases:
        frequencies, scale, _ = inv_freq(LlamaConfig.from_hf(hf))
        assert frequencies.dtype == np.float32
        np.testing.assert_allclose(
            frequencies, golden[name]["inv_freq"], rtol=5e-7, atol=0, err_msg=name
        )
        assert scale == pytest.approx(golden[name]["scale"], rel=1e-12)


def test_dynamic_gives_the_base_and_its_parameters():
    dynamic = config(rope_scaling={"type": "dynamic", "factor": 3.0})
    frequencies, scale, ntk = inv_freq(dynamic)
    np.testing.assert_array_equal(frequencies, inv_freq(config())[0])
    assert (scale, ntk) == (1.0, (3.0, 2048))
    assert inv_freq(config())[2] is None


@pytest.mark.reference
def test_golden_values_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    golden = {}
    for name, hf in rope_cases():
        rotary = LlamaRotaryEmbedding(transformers.LlamaConfig.from_dict(hf))
        golden[name] = {
            "inv_freq": [float(f) for f in rotary.inv_freq],
            "scale": float(rotary.attention_scaling),
        }
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    stored = json.loads(GOLDEN.read_text())
    assert stored.keys() == golden.keys()
    for name, values in golden.items():
        # PyTorch's power function differs by a unit in the last place between processors.
        np.testing.assert_allclose(stored[name]["inv_freq"], values["inv_freq"], rtol=5e-7)
        assert stored[name]["scale"] == pytest.approx(values["scale"], rel=1e-12)


@pytest.mark.reference
def test_dynamic_formula_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    hf = {**BASE, "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}}
    c = LlamaConfig.from_hf(hf)
    _, _, ntk = inv_freq(c)
    assert ntk is not None
    factor, length = ntk
    for n in (1, 2048, 2049, 5000):
        expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](
            transformers.LlamaConfig.from_dict(hf), "cpu", seq_len=n
        )
        stretch = factor * max(n, length) / length - (factor - 1)
        base = c.rope_theta * stretch ** (c.head_dim / (c.head_dim - 2))
        ours = base ** -(np.arange(0, c.head_dim, 2) / c.head_dim)
        np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)
