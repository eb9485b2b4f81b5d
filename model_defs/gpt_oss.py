"""GPT-OSS 20b and 120b (arXiv:2508.10925)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op

from shardwright.errors import ConfigError
from shardwright.model_defs.config import LlamaConfig, read_windows
from shardwright.model_defs.fields import Reader
from shardwright.model_defs.layers import Experts, Stored, abstract, parameter
from shardwright.model_defs.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from shardwright.model_defs.moe import TRAINING, Router, read_experts

_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@dataclass(frozen=True)
class GptOssConfig(LlamaConfig):
    """Configuration of GPT-OSS. Every other layer has a sliding window, the first does.

    The activation of an expert is `(u + 1) * g * sigmoid(swiglu_alpha * g)`, with g, the gate, cut
    off above `swiglu_limit`, and u, its other half, on both sides.
    """

    model_type = "gpt_oss"
    defaults: ClassVar[Mapping[str, Any]] = {
        "attention_bias": True,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "rms_norm_eps": 1e-5,
        "sliding_window": 128,
    }
    reads = frozenset(
        {
            "experts_per_token",
            "layer_types",
            "num_experts_per_tok",
            "num_local_experts",
            "sliding_window",
            "swiglu_alpha",
            "swiglu_limit",
        }
    )
    ignores = TRAINING | {"initial_context_length"}
    default_theta = 150000.0

    num_experts: int = 128
    num_experts_per_tok: int = 4
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0

    @classmethod
    def values(cls, get: Reader) -> dict[str, Any]:
        """See `LlamaConfig.values`."""
        if not (get.values.get("rope_parameters") or get.values.get("rope_scaling")):
            get = Reader({**get.values, "rope_scaling": _ROPE})
        experts = read_experts(get, "num_local_experts")
        again, top = get.maybe_integer("experts_per_token"), experts["num_experts_per_tok"]
        if again not in (None, top):
            raise ConfigError(f"experts_per_token: {again}, but num_experts_per_tok is {top}")
        return {
            **super().values(get),
            **read_windows(get, lambda layer: layer % 2 == 0),
            **experts,
            "swiglu_alpha": get.number("swiglu_alpha", 1.702),
            "swiglu_limit": get.number("swiglu_limit", 7.0),
        }


class GptOssAttention(LlamaAttention):
    """Attention in which every head has a sink."""

    def __init__(self, config: GptOssConfig, dtype: str, layer: int) -> None:
        super().__init__(config, dtype, layer)
        self.sinks = parameter((config.num_attention_heads,), ("heads",), "float32")


class GptOssRouter(Router):
    """A router with biases."""

    def __init__(self, count: int, embed: int, dtype: str) -> None:
        super().__init__(count, embed, dtype)
        self.bias = parameter((count,), ("router",), "float32")

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """x [n, embed] -> float32 [n, count]."""
        return op.add(super().forward(x), self.bias)


class GptOssExperts(Experts):
    """Experts with biases and `GptOssConfig`'s activation; gate and up take turns in one tensor."""

    def __init__(self, config: GptOssConfig, dtype: str) -> None:
        gate = Stored("gate_up_proj", step=2, transposed=True)
        up = Stored("gate_up_proj", first=1, step=2, transposed=True)
        count, embed, mlp = config.num_experts, config.hidden_size, config.intermediate_size
        super().__init__(
            count=count,
            top=config.num_experts_per_tok,
            normalize=True,
            embed=embed,
            mlp=mlp,
            stored=(gate, up, Stored("down_proj", transposed=True)),
            dtype=dtype,
        )
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        inner = ("experts", "expert_mlp", None)
        self.gate_proj_bias = parameter((count, mlp, 1), inner, "float32")
        self.up_proj_bias = parameter((count, mlp, 1), inner, "float32")
        self.down_proj_bias = parameter((count, embed, 1), ("experts", "embed", None), "float32")
        for bias, weight in zip(self._biases(), self._weights(), strict=True):
            where = weight.attrs["stored"]
            bias.attrs["stored"] = Stored(f"{where.path}_bias", where.first, 0.0, where.step, True)

    def _biases(self) -> tuple[nn.Parameter, ...]:
        return self.gate_proj_bias, self.up_proj_bias, self.down_proj_bias

    def forward(self, x: nn.Tensor, scores: nn.Tensor) -> nn.Tensor:
        """See `Experts`."""
        operands = [x, *self._weights(), *self.route(scores), *self._biases()]
        (out,) = abstract("biased_experts", [*operands, self.alpha, self.limit], like=[x])
        return out


class GptOssMLP(nn.Module):
    """A router and its experts."""

    def __init__(self, config: GptOssConfig, dtype: str) -> None:
        self.router = GptOssRouter(config.num_experts, config.hidden_size, dtype)
        self.experts = GptOssExperts(config, dtype)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """x [n, embed] -> [n, embed]."""
        return self.experts(x, self.router(x))


class GptOssDecoderLayer(LlamaDecoderLayer):
    """A layer with sinks and experts."""

    attention_class = GptOssAttention

    def feed_forward(self, config: GptOssConfig, dtype: str, layer: int) -> nn.Module:
        """See `LlamaDecoderLayer`."""
        return GptOssMLP(config, dtype)


class GptOssForCausalLM(LlamaForCausalLM):
    """The whole model."""

    layer_class = GptOssDecoderLayer
