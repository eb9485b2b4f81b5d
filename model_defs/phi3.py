"""Phi-3, Phi-3.5-mini and Phi-4 (arXiv:2404.14219, arXiv:2412.08905).

A Llama whose checkpoint has one tensor for q, k, v and one for gate, up. Of each head, Phi-4-mini
rotates the first three quarters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from shardwright.model_defs.config import LlamaConfig, read_windows
from shardwright.model_defs.fields import Reader
from shardwright.model_defs.layers import stored_joined
from shardwright.model_defs.llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
)


@dataclass(frozen=True)
class Phi3Config(LlamaConfig):
    """Configuration of Phi-3 and 4."""

    model_type = "phi3"
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    reads = frozenset({"partial_rotary_factor", "sliding_window"})
    ignores = frozenset({"embd_pdrop", "full_attn_mod", "interpolate_factor", "resid_pdrop"})

    partial_rotary_factor: float = 1.0

    @classmethod
    def values(cls, get: Reader) -> dict[str, Any]:
        """See `LlamaConfig.values`."""
        windows = read_windows(get, lambda layer: True)
        return super().values(get) | windows | {"partial_rotary_factor": _partial(get)}

    @classmethod
    def read_rotary_dim(cls, get: Reader, head_dim: int) -> int:
        """See `LlamaConfig`."""
        return int(head_dim * _partial(get))

    @property
    def rotary_dim(self) -> int:
        """See `LlamaConfig`."""
        return int(self.head_dim * self.partial_rotary_factor)


def _partial(get: Reader) -> float:
    """The share of a head that is rotated, also from where transformers 5 writes it."""
    inner = (get.values.get("rope_parameters") or {}).get("partial_rotary_factor")
    return get.number("partial_rotary_factor", 1.0 if inner is None else inner)


class Phi3Attention(LlamaAttention):
    """Attention whose weights are stored as one tensor."""

    def __init__(self, config: Phi3Config, dtype: str, layer: int) -> None:
        super().__init__(config, dtype, layer)
        stored_joined("../qkv_proj.weight", [self.q_proj, self.k_proj, self.v_proj])


class Phi3MLP(LlamaMLP):
    """A feed-forward layer whose gate and up are stored as one tensor."""

    def __init__(self, config: Phi3Config, dtype: str) -> None:
        super().__init__(config, dtype)
        stored_joined("../gate_up_proj.weight", [self.gate_proj, self.up_proj])


class Phi3DecoderLayer(LlamaDecoderLayer):
    """A layer of Phi-3."""

    attention_class = Phi3Attention

    def feed_forward(self, config: Phi3Config, dtype: str, layer: int) -> nn.Module:
        """See `LlamaDecoderLayer`."""
        return Phi3MLP(config, dtype)


class Phi3ForCausalLM(LlamaForCausalLM):
    """The whole model."""

    layer_class = Phi3DecoderLayer
