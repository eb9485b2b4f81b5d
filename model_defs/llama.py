"""Llama 1, 2, 3 and what shares their definition (arXiv:2302.13971, arXiv:2407.21783).

Other families derive from these classes and state only what differs.
"""

from __future__ import annotations

from typing import Any

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op

from shardwright.model_defs.config import LlamaConfig, inv_freq
from shardwright.model_defs.layers import (
    ACTIVATIONS,
    Cache,
    Embedding,
    Linear,
    RMSNorm,
    output_logits,
    rotary_table,
)


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions; `sinks` as in `Cache.attend`."""

    sinks: nn.Parameter | None = None

    def __init__(self, config: LlamaConfig, dtype: str, layer: int) -> None:
        self.config, self.layer = config, layer
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        embed, bias = config.hidden_size, config.qkv_bias
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = Linear((q_size, embed), ("heads", "embed"), bias, dtype)
        self.k_proj = Linear((kv_size, embed), ("kv_heads", "embed"), bias, dtype)
        self.v_proj = Linear((kv_size, embed), ("kv_heads", "embed"), bias, dtype)
        self.o_proj = Linear((embed, q_size), ("embed", "heads"), config.output_bias, dtype)

    def normalize(self, q: nn.Tensor, k: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        """Queries and keys, [n, heads, head_dim], before they are rotated."""
        return q, k

    def forward(self, x: nn.Tensor, rotary: nn.Tensor, cache: Cache) -> nn.Tensor:
        """x [n, embed] -> [n, embed]."""
        n = x.shape[0]
        q = op.reshape(self.q_proj(x), (n, self.heads, self.head_dim))
        k = op.reshape(self.k_proj(x), (n, self.kv_heads, self.head_dim))
        v = op.reshape(self.v_proj(x), (n, self.kv_heads, self.head_dim))
        q, k = self.normalize(q, k)
        q = cache.append(q, k, v, rotary, self.layer)
        y = cache.attend(
            q,
            self.layer,
            scale=self.config.attention_scale,
            window=self.config.window(self.layer),
            softcap=self.config.attention_softcap,
            sinks=self.sinks,
        )
        return self.o_proj(op.reshape(y, (n, self.heads * self.head_dim)))


class LlamaMLP(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, config: LlamaConfig, dtype: str) -> None:
        embed, mlp, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = ACTIVATIONS[config.hidden_act]
        self.gate_proj = Linear((mlp, embed), ("mlp", "embed"), bias, dtype)
        self.up_proj = Linear((mlp, embed), ("mlp", "embed"), bias, dtype)
        self.down_proj = Linear((embed, mlp), ("embed", "mlp"), bias, dtype)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """x [n, embed] -> [n, embed]."""
        return self.down_proj(op.multiply(self.activation(self.gate_proj(x)), self.up_proj(x)))


class LlamaDecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward with residuals."""

    attention_class: type[LlamaAttention] = LlamaAttention
    feed_forward_name = "mlp"

    def __init__(self, config: Any, dtype: str, layer: int) -> None:
        self.self_attn = self.attention_class(config, dtype, layer)
        setattr(self, self.feed_forward_name, self.feed_forward(config, dtype, layer))
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def feed_forward(self, config: Any, dtype: str, layer: int) -> nn.Module:
        """The second half of layer number `layer`: x [n, embed] -> [n, embed]."""
        return LlamaMLP(config, dtype)

    def forward(self, x: nn.Tensor, rotary: nn.Tensor, cache: Cache) -> nn.Tensor:
        """x [n, embed] -> [n, embed]."""
        x = op.add(x, self.self_attn(self.input_layernorm(x), rotary, cache))
        feed_forward = getattr(self, self.feed_forward_name)
        return op.add(x, feed_forward(self.post_attention_layernorm(x)))


class LlamaModel(nn.Module):
    """Embedding, decoder layers and the last norm."""

    def __init__(
        self,
        config: LlamaConfig,
        dtype: str,
        layer_class: type[LlamaDecoderLayer],
        norm_class: type[RMSNorm],
    ) -> None:
        self.embed_tokens = Embedding((config.vocab_size, config.hidden_size), dtype)
        self.layers = nn.ModuleList(
            [layer_class(config, dtype, i) for i in range(config.num_hidden_layers)]
        )
        self.norm = norm_class(config.hidden_size, config.rms_norm_eps, dtype)


class LlamaForCausalLM(nn.Module):
    """The whole model for one device; parameter names are those of the Hugging Face checkpoint."""

    layer_class: type[LlamaDecoderLayer] = LlamaDecoderLayer
    norm_class: type[RMSNorm] = RMSNorm

    def __init__(self, config: Any, dtype: str) -> None:
        self.config, self.dtype = config, dtype
        self.model = LlamaModel(config, dtype, self.layer_class, self.norm_class)
        if not config.tie_word_embeddings:
            shape = (config.vocab_size, config.hidden_size)
            self.lm_head = Linear(shape, ("vocab", "embed"), bias=False, dtype=dtype)

    def forward(self, tokens: nn.Tensor, lengths: nn.Tensor, cache: Cache) -> nn.Tensor:
        """tokens int32 [n], lengths int32 [n] (of each token's sequence) -> hidden [n, embed]."""
        x = self.embed(tokens)
        tables = self.rotary_tables(cache.positions, lengths)
        for layer, table in zip(self.model.layers, tables, strict=True):
            x = layer(x, table, cache)
        return self.model.norm(x)

    def embed(self, tokens: nn.Tensor) -> nn.Tensor:
        """tokens int32 [n] -> [n, embed]."""
        return self.model.embed_tokens(tokens)

    def rotary_tables(self, positions: nn.Tensor, lengths: nn.Tensor) -> list[nn.Tensor]:
        """The table of `layers.rotary_table` for each layer."""
        table = rotary_table(positions, lengths, *inv_freq(self.config))
        return [table] * self.config.num_hidden_layers

    def logits(self, hidden: nn.Tensor) -> nn.Tensor:
        """hidden [n, embed] -> float32 [n, vocab]."""
        tied = self.config.tie_word_embeddings
        head = self.model.embed_tokens if tied else self.lm_head
        return output_logits(hidden, head.weight)
