"""config.json of published models, as far as it concerns the model. Written from memory."""

from __future__ import annotations

from typing import Any


def _config(
    architecture: str,
    model_type: str,
    *,
    vocab: int,
    hidden: int,
    mlp: int,
    layers: int,
    heads: tuple[int, int],
    length: int,
    **more: Any,
) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "max_position_embeddings": length,
        "torch_dtype": "bfloat16",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        **more,
    }


def _llama(**kwargs: Any) -> dict[str, Any]:
    more = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }
    return _config("LlamaForCausalLM", "llama", **{**more, **kwargs})


def _llama2(**kwargs: Any) -> dict[str, Any]:
    more = {"rope_theta": 10000.0, "rope_scaling": None, "bos_token_id": 1, "eos_token_id": 2}
    return _llama(**{**more, **kwargs})


def _llama3_scaling(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _mistral(**kwargs: Any) -> dict[str, Any]:
    more = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    return _config("MistralForCausalLM", "mistral", **{**more, **kwargs})


def _qwen2(**kwargs: Any) -> dict[str, Any]:
    more = {
        "vocab": 151936,
        "length": 32768,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }
    return _config("Qwen2ForCausalLM", "qwen2", **{**more, **kwargs})


def _qwen3(**kwargs: Any) -> dict[str, Any]:
    more = {
        "vocab": 151936,
        "length": 40960,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "attention_bias": False,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": kwargs["layers"],
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }
    return _config("Qwen3ForCausalLM", "qwen3", **{**more, **kwargs})


def _gemma2(**kwargs: Any) -> dict[str, Any]:
    more = {
        "vocab": 256000,
        "length": 8192,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "cache_implementation": "hybrid",
        "sliding_window": 4096,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return _config("Gemma2ForCausalLM", "gemma2", **{**more, **kwargs})


def _gemma3(**kwargs: Any) -> dict[str, Any]:
    more = {
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "sliding_window_pattern": 6,
        "bos_token_id": 2,
        "eos_token_id": [1, 106],
        "pad_token_id": 0,
    }
    return _config("Gemma3ForCausalLM", "gemma3_text", **{**more, **kwargs})


def _phi3(**kwargs: Any) -> dict[str, Any]:
    more = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
    }
    return _config("Phi3ForCausalLM", "phi3", **{**more, **kwargs})


def _mixtral(**kwargs: Any) -> dict[str, Any]:
    more = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return _config("MixtralForCausalLM", "mixtral", **{**more, **kwargs})


def _qwen3_moe(**kwargs: Any) -> dict[str, Any]:
    more = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
    }
    return {**_qwen3(**kwargs), **more}


def _longrope(pairs: int) -> dict[str, Any]:
    """With factors of our own: the published lists are long, and only their length matters here."""
    long_factor = [1.0 + i for i in range(pairs)]
    return {"type": "longrope", "short_factor": [1.0] * pairs, "long_factor": long_factor}


def _gpt_oss(**kwargs: Any) -> dict[str, Any]:
    layers = kwargs["layers"]
    more = {
        "vocab": 201088,
        "hidden": 2880,
        "mlp": 2880,
        "heads": (64, 8),
        "length": 131072,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "initial_context_length": 4096,
        "attention_bias": True,
        "experts_per_token": 4,
        "num_experts_per_tok": 4,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.9,
        "tie_word_embeddings": False,
        "eos_token_id": 200002,
        "pad_token_id": 199999,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    }
    return _config("GptOssForCausalLM", "gpt_oss", **{**more, **kwargs})


PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7b": _llama2(
        vocab=32000, hidden=4096, mlp=11008, layers=32, heads=(32, 32), length=4096
    ),
    "Llama-2-70b": _llama2(
        vocab=32000, hidden=8192, mlp=28672, layers=80, heads=(64, 8), length=4096
    ),
    "CodeLlama-34b": _llama2(
        vocab=32000, hidden=8192, mlp=22016, layers=48, heads=(64, 8), length=16384,
        rope_theta=1000000.0,
    ),
    "Llama-3-8B": _llama(
        vocab=128256, hidden=4096, mlp=14336, layers=32, heads=(32, 8), length=8192
    ),
    "Llama-3.1-70B": _llama(
        vocab=128256, hidden=8192, mlp=28672, layers=80, heads=(64, 8), length=131072,
        rope_scaling=_llama3_scaling(8.0),
    ),
    "Llama-3.2-1B": _llama(
        vocab=128256, hidden=2048, mlp=8192, layers=16, heads=(32, 8), length=131072, head_dim=64,
        rope_scaling=_llama3_scaling(32.0), tie_word_embeddings=True,
    ),
    "Mistral-7B-v0.1": _mistral(
        vocab=32000, hidden=4096, mlp=14336, layers=32, heads=(32, 8), length=32768,
        rope_theta=10000.0, sliding_window=4096,
    ),
    "Mistral-7B-v0.3": _mistral(
        vocab=32768, hidden=4096, mlp=14336, layers=32, heads=(32, 8), length=32768,
        rope_theta=1000000.0, sliding_window=None,
    ),
    "Mistral-Nemo-12B": _mistral(
        vocab=131072, hidden=5120, mlp=14336, layers=40, heads=(32, 8), length=131072,
        rope_theta=1000000.0, sliding_window=None, head_dim=128,
    ),
    "Qwen2.5-0.5B": _qwen2(
        hidden=896, mlp=4864, layers=24, heads=(14, 2), tie_word_embeddings=True, use_mrope=False
    ),
    "Qwen2.5-7B": _qwen2(
        vocab=152064, hidden=3584, mlp=18944, layers=28, heads=(28, 4), tie_word_embeddings=False
    ),
    "Qwen2.5-32B": _qwen2(
        vocab=152064, hidden=5120, mlp=27648, layers=64, heads=(40, 8), tie_word_embeddings=False
    ),
    "Qwen2.5-72B": _qwen2(
        vocab=152064, hidden=8192, mlp=29568, layers=80, heads=(64, 8), tie_word_embeddings=False
    ),
    "Qwen3-0.6B": _qwen3(
        hidden=1024, mlp=3072, layers=28, heads=(16, 8), tie_word_embeddings=True
    ),
    "Qwen3-8B": _qwen3(
        hidden=4096, mlp=12288, layers=36, heads=(32, 8), tie_word_embeddings=False
    ),
    "Qwen3-32B": _qwen3(
        hidden=5120, mlp=25600, layers=64, heads=(64, 8), tie_word_embeddings=False
    ),
    "Gemma-2-2b": _gemma2(
        hidden=2304, mlp=9216, layers=26, heads=(8, 4), head_dim=256, query_pre_attn_scalar=256
    ),
    "Gemma-2-9b": _gemma2(
        hidden=3584, mlp=14336, layers=42, heads=(16, 8), head_dim=256, query_pre_attn_scalar=256
    ),
    "Gemma-2-27b": _gemma2(
        hidden=4608, mlp=36864, layers=46, heads=(32, 16), head_dim=128, query_pre_attn_scalar=144
    ),
    "Gemma-3-1b": _gemma3(
        vocab=262144, hidden=1152, mlp=6912, layers=26, heads=(4, 1), length=32768, head_dim=256,
        query_pre_attn_scalar=256, sliding_window=512,
    ),
    "Gemma-3-27b": _gemma3(
        vocab=262208, hidden=5376, mlp=21504, layers=62, heads=(32, 16), length=131072,
        head_dim=128, query_pre_attn_scalar=168, sliding_window=1024,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
    ),
    "Phi-3-mini-4k": _phi3(
        vocab=32064, hidden=3072, mlp=8192, layers=32, heads=(32, 32), length=4096,
        original_max_position_embeddings=4096, sliding_window=2047,
    ),
    "Phi-3-mini-128k": _phi3(
        vocab=32064, hidden=3072, mlp=8192, layers=32, heads=(32, 32), length=131072,
        original_max_position_embeddings=4096, sliding_window=262144, rope_scaling=_longrope(48),
    ),
    "Phi-4": _phi3(
        vocab=100352, hidden=5120, mlp=17920, layers=40, heads=(40, 10), length=16384,
        original_max_position_embeddings=16384, sliding_window=None, rope_theta=250000,
        bos_token_id=100257, eos_token_id=100265, pad_token_id=100349,
    ),
    "Phi-4-mini": _phi3(
        vocab=200064, hidden=3072, mlp=8192, layers=32, heads=(24, 8), length=131072,
        original_max_position_embeddings=4096, sliding_window=262144, rope_scaling=_longrope(48),
        partial_rotary_factor=0.75, full_attn_mod=1, interpolate_factor=1,
        tie_word_embeddings=True, bos_token_id=199999, eos_token_id=199999, pad_token_id=199999,
    ),
    "Mixtral-8x7B": _mixtral(
        vocab=32000, hidden=4096, mlp=14336, layers=32, heads=(32, 8), length=32768,
        router_aux_loss_coef=0.02,
    ),
    "Mixtral-8x22B": _mixtral(
        vocab=32768, hidden=6144, mlp=16384, layers=56, heads=(48, 8), length=65536,
        router_aux_loss_coef=0.001, router_jitter_noise=0.0,
    ),
    "Qwen3-30B-A3B": _qwen3_moe(
        hidden=2048, mlp=6144, layers=48, heads=(32, 4), moe_intermediate_size=768
    ),
    "Qwen3-235B-A22B": _qwen3_moe(
        hidden=4096, mlp=12288, layers=94, heads=(64, 4), moe_intermediate_size=1536
    ),
    "gpt-oss-20b": _gpt_oss(layers=24, num_local_experts=32),
    "gpt-oss-120b": _gpt_oss(layers=36, num_local_experts=128),
}  # fmt: skip
