"""Model definitions: one file a family, global shapes, no word about parallelism.

`FAMILIES` maps the `architectures` entry of a checkpoint's config.json to its family. A family is
a module class `Model(config, dtype)` with `forward` and `logits` as in `llama.py`, and a frozen
config class with `from_hf`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shardwright.errors import ConfigError
from shardwright.model_defs.config import LlamaConfig
from shardwright.model_defs.gemma import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
)
from shardwright.model_defs.gpt_oss import GptOssConfig, GptOssForCausalLM
from shardwright.model_defs.llama import LlamaForCausalLM
from shardwright.model_defs.mistral import MistralConfig
from shardwright.model_defs.moe import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from shardwright.model_defs.phi3 import Phi3Config, Phi3ForCausalLM
from shardwright.model_defs.qwen import Qwen2Config, Qwen3Config, Qwen3ForCausalLM


@dataclass(frozen=True)
class Family:
    """What the compiler needs to know of a model family."""

    config: type[LlamaConfig]
    model: type[LlamaForCausalLM]


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(LlamaConfig, LlamaForCausalLM),
    "Gemma2ForCausalLM": Family(Gemma2Config, Gemma2ForCausalLM),
    "Gemma3ForCausalLM": Family(Gemma3Config, Gemma3ForCausalLM),
    "GptOssForCausalLM": Family(GptOssConfig, GptOssForCausalLM),
    "MistralForCausalLM": Family(MistralConfig, LlamaForCausalLM),
    "MixtralForCausalLM": Family(MixtralConfig, MixtralForCausalLM),
    "Phi3ForCausalLM": Family(Phi3Config, Phi3ForCausalLM),
    "Qwen2ForCausalLM": Family(Qwen2Config, LlamaForCausalLM),
    "Qwen3ForCausalLM": Family(Qwen3Config, Qwen3ForCausalLM),
    "Qwen3MoeForCausalLM": Family(Qwen3MoeConfig, Qwen3MoeForCausalLM),
}


def family_of(config: dict[str, Any]) -> tuple[str, Family]:
    """The architecture's name and its family. Raises ConfigError for one that is not supported."""
    names = config.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return name, FAMILIES[name]
    raise ConfigError(
        f"config.json: architectures {names} is not supported; this version compiles "
        f"{', '.join(FAMILIES)}"
    )
