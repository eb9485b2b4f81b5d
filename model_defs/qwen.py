"""Qwen 2, 2.5 and 3 (arXiv:2407.10671, arXiv:2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from shardwright.model_defs.config import LlamaConfig, read_windows
from shardwright.model_defs.fields import Reader
from shardwright.model_defs.layers import RMSNorm
from shardwright.model_defs.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM

_WINDOWS = frozenset({"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"})


@dataclass(frozen=True)
class Qwen2Config(LlamaConfig):
    """Configuration of Qwen 2 and 2.5: queries, keys and values have biases, the output has none.

    The last layers may have a sliding window.
    """

    model_type = "qwen2"
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }
    reads = _WINDOWS

    @classmethod
    def values(cls, get: Reader) -> dict[str, Any]:
        """See `LlamaConfig.values`."""
        windows = {}
        if get.boolean("use_sliding_window", False):
            first = get.count("max_window_layers")
            windows = read_windows(get, lambda layer: layer >= first)
        return super().values(get) | windows

    @property
    def qkv_bias(self) -> bool:
        """See `LlamaConfig`."""
        return True

    @property
    def output_bias(self) -> bool:
        """See `LlamaConfig`."""
        return False


@dataclass(frozen=True)
class Qwen3Config(Qwen2Config):
    """Configuration of Qwen 3: biases only where config.json asks for them."""

    model_type = "qwen3"
    defaults: ClassVar[Mapping[str, Any]] = {**Qwen2Config.defaults, "head_dim": 128}

    @property
    def qkv_bias(self) -> bool:
        """See `LlamaConfig`."""
        return self.attention_bias

    @property
    def output_bias(self) -> bool:
        """See `LlamaConfig`."""
        return self.attention_bias


class Qwen3Attention(LlamaAttention):
    """Attention with a norm of each head's queries and keys."""

    def __init__(self, config: Qwen3Config, dtype: str, layer: int) -> None:
        super().__init__(config, dtype, layer)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype, axis="head_dim")
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype, axis="head_dim")

    def normalize(self, q: nn.Tensor, k: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        """See `LlamaAttention`."""
        return self.q_norm(q), self.k_norm(k)


class Qwen3DecoderLayer(LlamaDecoderLayer):
    """A layer with `Qwen3Attention`."""

    attention_class = Qwen3Attention


class Qwen3ForCausalLM(LlamaForCausalLM):
    """The whole model."""

    layer_class = Qwen3DecoderLayer
