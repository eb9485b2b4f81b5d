"""Llama 1, 2, 3 and what shares their definition (arXiv:2302.13971, arXiv:2407.21783)."""

from __future__ import annotations

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op

from shardwright.model_defs.config import LlamaConfig, inv_freq
from shardwright.model_defs.layers import (
    Cache,
    Embedding,
    Linear,
    RMSNorm,
    output_logits,
    rotary_table,
)


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, dtype: str) -> None:
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        embed, bias = config.hidden_size, config.attention_bias
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = Linear((q_size, embed), ("heads", "embed"), bias, dtype)
        self.k_proj = Linear((kv_size, embed), ("kv_heads", "embed"), bias, dtype)
        self.v_proj = Linear((kv_size, embed), ("kv_heads", "embed"), bias, dtype)
        self.o_proj = Linear((embed, q_size), ("embed", "heads"), bias, dtype)

    def forward(self, x: nn.Tensor, rotary: nn.Tensor, cache: Cache, layer: int) -> nn.Tensor:
        """x [n, embed] -> [n, embed]."""
        n = x.shape[0]
        q = op.reshape(self.q_proj(x), (n, self.heads, self.head_dim))
        k = op.reshape(self.k_proj(x), (n, self.kv_heads, self.head_dim))
        v = op.reshape(self.v_proj(x), (n, self.kv_heads, self.head_dim))
        q = cache.append(q, k, v, rotary, layer)
        y = cache.attend(q, layer, scale=self.head_dim**-0.5)
        return self.o_proj(op.reshape(y, (n, self.heads * self.head_dim)))


class LlamaMLP(nn.Module):
    """SiLU-gated feed-forward layer."""

    def __init__(self, config: LlamaConfig, dtype: str) -> None:
        embed, mlp, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear((mlp, embed), ("mlp", "embed"), bias, dtype)
        self.up_proj = Linear((mlp, embed), ("mlp", "embed"), bias, dtype)
        self.down_proj = Linear((embed, mlp), ("embed", "mlp"), bias, dtype)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """x [n, embed] -> [n, embed]."""
        return self.down_proj(op.multiply(op.silu(self.gate_proj(x)), self.up_proj(x)))


class LlamaDecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward with residuals."""

    def __init__(self, config: LlamaConfig, dtype: str) -> None:
        self.self_attn = LlamaAttention(config, dtype)
        self.mlp = LlamaMLP(config, dtype)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def forward(self, x: nn.Tensor, rotary: nn.Tensor, cache: Cache, layer: int) -> nn.Tensor:
        """x [n, embed] -> [n, embed]."""
        x = op.add(x, self.self_attn(self.input_layernorm(x), rotary, cache, layer))
        return op.add(x, self.mlp(self.post_attention_layernorm(x)))


class LlamaModel(nn.Module):
    """Embedding, decoder layers and the last norm."""

    def __init__(self, config: LlamaConfig, dtype: str) -> None:
        self.embed_tokens = Embedding((config.vocab_size, config.hidden_size), dtype)
        self.layers = nn.ModuleList(
            [LlamaDecoderLayer(config, dtype) for _ in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)


class LlamaForCausalLM(nn.Module):
    """The whole model for one device; parameter names are those of the Hugging Face checkpoint."""

    def __init__(self, config: LlamaConfig, dtype: str) -> None:
        self.config = config
        self.model = LlamaModel(config, dtype)
        if not config.tie_word_embeddings:
            shape = (config.vocab_size, config.hidden_size)
            self.lm_head = Linear(shape, ("vocab", "embed"), bias=False, dtype=dtype)

    def forward(self, tokens: nn.Tensor, lengths: nn.Tensor, cache: Cache) -> nn.Tensor:
        """tokens int32 [n], lengths int32 [n] (of each token's sequence) -> hidden [n, embed]."""
        rotary = rotary_table(cache.positions, lengths, *inv_freq(self.config))
        x = self.model.embed_tokens(tokens)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, rotary, cache, i)
        return self.model.norm(x)

    def logits(self, hidden: nn.Tensor) -> nn.Tensor:
        """hidden [n, embed] -> float32 [n, vocab]."""
        tied = self.config.tie_word_embeddings
        head = self.model.embed_tokens if tied else self.lm_head
        return output_logits(hidden, head.weight)
