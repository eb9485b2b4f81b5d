"""Mixtures of experts: Mixtral and Qwen 3 (arXiv:2401.04088, arXiv:2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from shardwright.errors import ConfigError
from shardwright.model_defs.fields import Reader
from shardwright.model_defs.layers import Experts, Stored, output_logits, parameter
from shardwright.model_defs.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP
from shardwright.model_defs.mistral import MistralConfig
from shardwright.model_defs.qwen import Qwen3Config, Qwen3DecoderLayer

TRAINING = frozenset({"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"})


@dataclass(frozen=True)
class MixtralConfig(MistralConfig):
    """Configuration of Mixtral."""

    model_type = "mixtral"
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 131072,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-5,
    }
    reads = MistralConfig.reads | {"num_experts_per_tok", "num_local_experts"}
    ignores = TRAINING
    default_theta = 1000000.0

    num_experts: int = 8
    num_experts_per_tok: int = 2

    @classmethod
    def values(cls, get: Reader) -> dict[str, Any]:
        """See `LlamaConfig.values`."""
        return super().values(get) | read_experts(get, "num_local_experts")


@dataclass(frozen=True)
class Qwen3MoeConfig(Qwen3Config):
    """Configuration of Qwen 3 with experts. Layers of `mlp_only_layers` have none."""

    model_type = "qwen3_moe"
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 32768,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
    }
    reads = Qwen3Config.reads | {
        "decoder_sparse_step",
        "mlp_only_layers",
        "moe_intermediate_size",
        "norm_topk_prob",
        "num_experts",
        "num_experts_per_tok",
    }
    ignores = TRAINING

    num_experts: int = 128
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    norm_topk_prob: bool = False
    plain_layers: tuple[int, ...] = ()

    @classmethod
    def values(cls, get: Reader) -> dict[str, Any]:
        """See `LlamaConfig.values`."""
        values = super().values(get) | read_experts(get, "num_experts")
        step, layers = get.integer("decoder_sparse_step", 1), values["num_hidden_layers"]
        plain = set(get.tokens("mlp_only_layers")) | {i for i in range(layers) if (i + 1) % step}
        return values | {
            "moe_intermediate_size": get.integer("moe_intermediate_size"),
            "norm_topk_prob": get.boolean("norm_topk_prob", False),
            "plain_layers": tuple(sorted(plain)),
        }


def read_experts(get: Reader, count_key: str) -> dict[str, Any]:
    """The fields `num_experts`, which a config.json has as `count_key`, and how many are chosen."""
    count, top = get.integer(count_key), get.integer("num_experts_per_tok")
    if top > count:
        raise ConfigError(f"num_experts_per_tok: {top} is more than {count_key}, {count}")
    return {"num_experts": count, "num_experts_per_tok": top}


class Router(nn.Module):
    """Scores of the experts, in float32; its weight is never quantized."""

    def __init__(self, count: int, embed: int, dtype: str) -> None:
        self.weight = parameter((count, embed), ("router", "embed"), dtype)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """x [n, embed] -> float32 [n, count]."""
        return output_logits(x, self.weight)


class SparseMLP(nn.Module):
    """A router and its experts. `names` are those of an expert's gate, up and down."""

    def __init__(
        self, config: Any, mlp: int, normalize: bool, names: tuple[str, str, str], dtype: str
    ) -> None:
        gate, up, down = (Stored(f"{{}}.{name}.weight") for name in names)
        self.gate = Router(config.num_experts, config.hidden_size, dtype)
        self.experts = Experts(
            count=config.num_experts,
            top=config.num_experts_per_tok,
            normalize=normalize,
            embed=config.hidden_size,
            mlp=mlp,
            stored=(gate, up, down),
            dtype=dtype,
        )

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """x [n, embed] -> [n, embed]."""
        return self.experts(x, self.gate(x))


class MixtralDecoderLayer(LlamaDecoderLayer):
    """A layer with experts."""

    feed_forward_name = "block_sparse_moe"

    def feed_forward(self, config: MixtralConfig, dtype: str, layer: int) -> nn.Module:
        """See `LlamaDecoderLayer`."""
        return SparseMLP(config, config.intermediate_size, True, ("w1", "w3", "w2"), dtype)


class MixtralForCausalLM(LlamaForCausalLM):
    """The whole model."""

    layer_class = MixtralDecoderLayer


class Qwen3MoeDecoderLayer(Qwen3DecoderLayer):
    """A layer with experts, or with one feed-forward layer."""

    def feed_forward(self, config: Qwen3MoeConfig, dtype: str, layer: int) -> nn.Module:
        """See `LlamaDecoderLayer`."""
        if layer in config.plain_layers:
            return LlamaMLP(config, dtype)
        names = ("gate_proj", "up_proj", "down_proj")
        return SparseMLP(config, config.moe_intermediate_size, config.norm_topk_prob, names, dtype)


class Qwen3MoeForCausalLM(LlamaForCausalLM):
    """The whole model."""

    layer_class = Qwen3MoeDecoderLayer
