"""Gemma 2 and 3, text (arXiv:2408.00118, arXiv:2503.19786).

The values that pass from layer to layer outgrow float16, so they and the norms' weights are
float32, whatever the dtype of the model; products are of its dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op

from shardwright.model_defs.config import LlamaConfig, inv_freq, read_windows
from shardwright.model_defs.fields import Reader
from shardwright.model_defs.layers import Cache, RMSNorm, Stored, as_type, rotary_table
from shardwright.model_defs.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from shardwright.model_defs.rope import RopeScaling, read_rope


@dataclass(frozen=True)
class Gemma2Config(LlamaConfig):
    """Configuration of Gemma 2: every second layer has a sliding window, scores are capped."""

    model_type = "gemma2"
    defaults: ClassVar[Mapping[str, Any]] = {
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    reads = frozenset(
        {
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "hidden_activation",
            "layer_types",
            "query_pre_attn_scalar",
            "sliding_window",
        }
    )
    ignores = frozenset({"cache_implementation"})
    activations = ("gelu_pytorch_tanh",)

    query_pre_attn_scalar: float = 256.0
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None

    @classmethod
    def values(cls, get: Reader) -> dict[str, Any]:
        """See `LlamaConfig.values`."""
        # `hidden_act` of the first checkpoints is not the one in use.
        activation = get.choice("hidden_activation", cls.activations, cls.activations[0])
        values = super().values(Reader({**get.values, "hidden_act": activation}, get.prefix))
        get.integer("sliding_window")  # null would leave open which rope such layers have
        return (
            values
            | read_windows(get, cls.slides(get))
            | {
                "query_pre_attn_scalar": get.number("query_pre_attn_scalar"),
                "attn_logit_softcapping": get.maybe_number("attn_logit_softcapping"),
                "final_logit_softcapping": get.maybe_number("final_logit_softcapping"),
            }
        )

    @classmethod
    def slides(cls, get: Reader) -> Callable[[int], bool]:
        """Which layers have a sliding window."""
        return lambda layer: layer % 2 == 0

    @property
    def attention_scale(self) -> float:
        """See `LlamaConfig`."""
        return float(self.query_pre_attn_scalar**-0.5)

    @property
    def attention_softcap(self) -> float | None:
        """See `LlamaConfig`."""
        return self.attn_logit_softcapping


@dataclass(frozen=True)
class Gemma3Config(Gemma2Config):
    """Configuration of Gemma 3: five layers of six have a sliding window and their own rope."""

    model_type = "gemma3_text"
    defaults: ClassVar[Mapping[str, Any]] = {
        **Gemma2Config.defaults,
        "max_position_embeddings": 131072,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
    reads = Gemma2Config.reads | {"rope_local_base_freq", "sliding_window_pattern"}
    ignores = Gemma2Config.ignores | {"_sliding_window_pattern"}
    default_theta = 1000000.0

    local_rope_theta: float = 10000.0
    local_rope_scaling: RopeScaling = field(default_factory=RopeScaling)

    @classmethod
    def values(cls, get: Reader) -> dict[str, Any]:
        """See `LlamaConfig.values`. transformers 5 has a set of rope parameters by layer type."""
        local: dict[str, Any] = {"rope_theta": get.number("rope_local_base_freq", 10000.0)}
        outer = dict(get.values)
        nested = outer.get("rope_parameters")
        if isinstance(nested, dict) and "full_attention" in nested:
            outer["rope_parameters"] = nested["full_attention"]
            local = {"rope_parameters": nested.get("sliding_attention") or local}
        values = super().values(Reader(outer, get.prefix))
        theta, scaling = read_rope(local, values["max_position_embeddings"], values["head_dim"])
        return values | {"local_rope_theta": theta, "local_rope_scaling": scaling}

    @classmethod
    def slides(cls, get: Reader) -> Callable[[int], bool]:
        """See `Gemma2Config`."""
        pattern = get.integer("sliding_window_pattern", 6)
        return lambda layer: (layer + 1) % pattern != 0


class GemmaRMSNorm(RMSNorm):
    """A norm in float32 whose weight the checkpoint stores less one; the result is of `dtype`."""

    def __init__(self, size: int, eps: float, dtype: str, axis: str = "embed") -> None:
        super().__init__(size, eps, "float32", axis)
        self.weight.attrs["stored"] = Stored(plus=1.0)
        self.dtype = dtype

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """x [..., size] -> the same shape."""
        return as_type(super().forward(as_type(x, "float32")), self.dtype)


class Gemma2DecoderLayer(LlamaDecoderLayer):
    """Norms before and after attention and feed-forward; x is float32."""

    def __init__(self, config: Gemma2Config, dtype: str, layer: int) -> None:
        super().__init__(config, dtype, layer)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = GemmaRMSNorm(size, eps, dtype)
        self.post_attention_layernorm = GemmaRMSNorm(size, eps, "float32")
        self.pre_feedforward_layernorm = GemmaRMSNorm(size, eps, dtype)
        self.post_feedforward_layernorm = GemmaRMSNorm(size, eps, "float32")

    def forward(self, x: nn.Tensor, rotary: nn.Tensor, cache: Cache) -> nn.Tensor:
        """x float32 [n, embed] -> the same."""
        y = self.self_attn(self.input_layernorm(x), rotary, cache)
        x = op.add(x, self.post_attention_layernorm(y))
        y = self.mlp(self.pre_feedforward_layernorm(x))
        return op.add(x, self.post_feedforward_layernorm(y))


class Gemma2ForCausalLM(LlamaForCausalLM):
    """Scaled embeddings, capped logits."""

    layer_class = Gemma2DecoderLayer
    norm_class = GemmaRMSNorm

    def embed(self, tokens: nn.Tensor) -> nn.Tensor:
        """tokens int32 [n] -> float32 [n, embed]."""
        scale = nn.Tensor.from_scalar(self.config.hidden_size**0.5, "float32")
        return op.multiply(as_type(self.model.embed_tokens(tokens), "float32"), scale)

    def logits(self, hidden: nn.Tensor) -> nn.Tensor:
        """hidden [n, embed] -> float32 [n, vocab]."""
        logits = super().logits(hidden)
        cap = self.config.final_logit_softcapping
        if cap is None:
            return logits
        down, up = (nn.Tensor.from_scalar(c, "float32") for c in (1 / cap, cap))
        return op.multiply(op.tanh(op.multiply(logits, down)), up)


class Gemma3Attention(LlamaAttention):
    """Attention with a norm of each head's queries and keys."""

    def __init__(self, config: Gemma3Config, dtype: str, layer: int) -> None:
        super().__init__(config, dtype, layer)
        self.q_norm = GemmaRMSNorm(config.head_dim, config.rms_norm_eps, dtype, axis="head_dim")
        self.k_norm = GemmaRMSNorm(config.head_dim, config.rms_norm_eps, dtype, axis="head_dim")

    def normalize(self, q: nn.Tensor, k: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        """See `LlamaAttention`."""
        return self.q_norm(q), self.k_norm(k)


class Gemma3DecoderLayer(Gemma2DecoderLayer):
    """A layer with `Gemma3Attention`."""

    attention_class = Gemma3Attention


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """Layers with a window have a rotary table of their own."""

    layer_class = Gemma3DecoderLayer

    def rotary_tables(self, positions: nn.Tensor, lengths: nn.Tensor) -> list[nn.Tensor]:
        """See `LlamaForCausalLM`."""
        c = self.config
        local = replace(c, rope_theta=c.local_rope_theta, rope_scaling=c.local_rope_scaling)
        slide = rotary_table(positions, lengths, *inv_freq(local))
        full = rotary_table(positions, lengths, *inv_freq(c))
        layers = range(c.num_hidden_layers)
        return [full if c.window(layer) is None else slide for layer in layers]
