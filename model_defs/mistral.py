"""Mistral 7B to Nemo (arXiv:2310.06825): Llama, with a sliding window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from shardwright.model_defs.config import LlamaConfig, read_windows
from shardwright.model_defs.fields import Reader


@dataclass(frozen=True)
class MistralConfig(LlamaConfig):
    """Configuration of Mistral."""

    model_type = "mistral"
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    }
    reads = frozenset({"sliding_window"})

    @classmethod
    def values(cls, get: Reader) -> dict[str, Any]:
        """See `LlamaConfig.values`."""
        return super().values(get) | read_windows(get, lambda layer: True)
