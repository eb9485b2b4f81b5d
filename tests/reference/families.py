"""Small random models of the families other than Llama, and their logits.

As in models.py, a case is rebuilt from its name alone: config.json as its publisher writes it,
weights from a stream of numbers. Names and shapes of the tensors are those that transformers saves,
stored in families.json beside the logits in families.npz. scripts/make_reference.py writes both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from reference import models
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent
GOLDEN, SHAPES = FOLDER / "families.npz", FOLDER / "families.json"

VOCAB = 99
DECODE_STEPS = 32

_TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def _config(architecture: str, model_type: str, **more: Any) -> dict[str, Any]:
    """A config.json; `more` adds and overrides keys."""
    return {"architectures": [architecture], "model_type": model_type, **_TINY, **more}


_CONFIGS: dict[str, dict[str, Any]] = {
    # Windows are shorter than the prompts, and rows grow past them.
    "mistral": _config(
        "MistralForCausalLM",
        "mistral",
        num_attention_heads=8,
        sliding_window=6,
        tie_word_embeddings=False,
    ),
    "mistral-nemo": _config(
        "MistralForCausalLM",
        "mistral",
        hidden_size=80,
        head_dim=24,
        rope_theta=1000000.0,
        sliding_window=None,
        tie_word_embeddings=False,
    ),
    "qwen2": _config(
        "Qwen2ForCausalLM",
        "qwen2",
        num_attention_heads=6,
        hidden_size=96,
        rope_theta=1000000.0,
        sliding_window=32768,
        use_sliding_window=False,
        max_window_layers=21,
        use_mrope=False,
        tie_word_embeddings=True,
    ),
    "qwen2-window": _config(
        "Qwen2ForCausalLM",
        "qwen2",
        sliding_window=5,
        use_sliding_window=True,
        max_window_layers=1,
        tie_word_embeddings=False,
    ),
    "qwen3": _config(
        "Qwen3ForCausalLM",
        "qwen3",
        head_dim=32,
        num_attention_heads=8,
        rope_theta=1000000.0,
        attention_bias=False,
        sliding_window=None,
        use_sliding_window=False,
        max_window_layers=2,
        tie_word_embeddings=True,
    ),
    "gemma2": _config(
        "Gemma2ForCausalLM",
        "gemma2",
        head_dim=24,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=20,
        sliding_window=6,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        cache_implementation="hybrid",
        num_hidden_layers=3,
    ),
    "gemma3": _config(
        "Gemma3ForCausalLM",
        "gemma3_text",
        head_dim=32,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=32,
        num_key_value_heads=1,
        sliding_window=5,
        sliding_window_pattern=3,
        num_hidden_layers=4,
        rope_theta=1000000.0,
        rope_local_base_freq=10000.0,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
    ),
    "phi3": _config(
        "Phi3ForCausalLM",
        "phi3",
        num_key_value_heads=4,
        original_max_position_embeddings=64,
        sliding_window=9,
        pad_token_id=0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        rope_scaling=None,
        tie_word_embeddings=False,
    ),
    # Rows grow past the original length, where the other factors begin.
    "phi3-longrope": _config(
        "Phi3ForCausalLM",
        "phi3",
        num_attention_heads=8,
        original_max_position_embeddings=20,
        pad_token_id=0,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0, 1.25, 1.5, 2.0],
            "long_factor": [1.5, 3.0, 6.0, 12.0],
        },
        sliding_window=262144,
        tie_word_embeddings=False,
    ),
    # Phi-4-mini; the first prompt is longer than the original length.
    "phi4-mini": _config(
        "Phi3ForCausalLM",
        "phi3",
        num_attention_heads=6,
        hidden_size=96,
        partial_rotary_factor=0.75,
        original_max_position_embeddings=10,
        pad_token_id=0,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.4],
            "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0],
        },
        sliding_window=262144,
        tie_word_embeddings=True,
    ),
    "mixtral": _config(
        "MixtralForCausalLM",
        "mixtral",
        num_local_experts=5,
        num_experts_per_tok=2,
        rope_theta=1000000.0,
        sliding_window=None,
        output_router_logits=False,
        router_aux_loss_coef=0.02,
        tie_word_embeddings=False,
    ),
    # A plain layer between two with experts; more experts chosen than a rank of eight has.
    "qwen3-moe": _config(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        head_dim=16,
        num_hidden_layers=3,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=40,
        decoder_sparse_step=1,
        mlp_only_layers=[1],
        norm_topk_prob=False,
        rope_theta=1000000.0,
        sliding_window=None,
        use_sliding_window=False,
        max_window_layers=3,
        tie_word_embeddings=False,
    ),
    "qwen3-moe-normalized": _config(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        num_attention_heads=8,
        head_dim=16,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        tie_word_embeddings=True,
    ),
    # A low limit, so that it cuts; sizes that MXFP4 has blocks for.
    "gpt-oss": _config(
        "GptOssForCausalLM",
        "gpt_oss",
        num_attention_heads=8,
        head_dim=16,
        intermediate_size=96,
        num_hidden_layers=3,
        num_local_experts=5,
        num_experts_per_tok=2,
        experts_per_token=2,
        attention_bias=True,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=6,
        swiglu_limit=0.75,
        initial_context_length=20,
        rope_theta=150000,
        rope_scaling={
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 20,
            "rope_type": "yarn",
            "truncate": False,
        },
        output_router_logits=False,
        router_aux_loss_coef=0.9,
        tie_word_embeddings=False,
    ),
}


def cases() -> list[models.Case]:
    """Return all cases, in a fixed order."""
    return [
        models.make_case(name, config, VOCAB, DECODE_STEPS) for name, config in _CONFIGS.items()
    ]


def weights(case: models.Case) -> dict[str, models.Array]:
    """Return the tensors of the checkpoint, fp32, see `models.weights`."""
    shapes = json.loads(SHAPES.read_text())[case.name]
    return models.weights(case, {name: tuple(shape) for name, shape in shapes.items()})


def write_checkpoint(case: models.Case, folder: Path) -> None:
    """Write config.json and model.safetensors into `folder`, which is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case.config, indent=2) + "\n", encoding="utf-8")
    save_file(weights(case), str(folder / "model.safetensors"), metadata={"format": "pt"})


def golden(case: models.Case) -> models.Golden:
    """Return the stored logits of a case."""
    with np.load(GOLDEN) as file:
        return models.Golden(file[f"{case.name}/prefill"], file[f"{case.name}/decode"])
