"""`--explain`: sections of the text for a small model."""

import pytest

from shardwright.compiler.options import BuildOptions, limits_of
from shardwright.compiler.program import partition_program
from shardwright.compiler.quantization import quantization
from shardwright.model_defs import family_of

CONFIG = dict(
    architectures=["LlamaForCausalLM"], hidden_size=64, intermediate_size=80, vocab_size=100,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
    max_position_embeddings=64, rope_theta=1e4, hidden_act="silu", tie_word_embeddings=False,
)  # fmt: skip

EXPECTED = {
    "Weights: global -> local shape, placement": """
  model.embed_tokens.weight                       [100, 64] -> [64, 64]  Shard(0)+28 pad
  model.layers.*.self_attn.q_proj.weight          [64, 64] -> [32, 64]   Shard(0)         x2
  model.layers.*.self_attn.k_proj.weight          [32, 64] -> [16, 64]   Shard(0)         x2
  model.layers.*.self_attn.v_proj.weight          [32, 64] -> [16, 64]   Shard(0)         x2
  model.layers.*.self_attn.o_proj.weight          [64, 64] -> [64, 32]   Shard(1)         x2
  model.layers.*.mlp.gate_proj.weight             [80, 64] -> [64, 64]   Shard(0)+48 pad  x2
  model.layers.*.mlp.up_proj.weight               [80, 64] -> [64, 64]   Shard(0)+48 pad  x2
  model.layers.*.mlp.down_proj.weight             [64, 80] -> [64, 64]   Shard(1)+48 pad  x2
  model.layers.*.input_layernorm.weight           [64] -> [64]           Replicate        x2
  model.layers.*.post_attention_layernorm.weight  [64] -> [64]           Replicate        x2
  model.norm.weight                               [64] -> [64]           Replicate
  lm_head.weight                                  [100, 64] -> [64, 64]  Shard(0)+28 pad
""",
    "State that is sharded": """
  k_pages  [2, 8, 2, 16, 16] -> [2, 8, 1, 16, 16]  Shard(2)
  v_pages  [2, 8, 2, 16, 16] -> [2, 8, 1, 16, 16]  Shard(2)
""",
    "Values of decode_1: local shape, placement, weight": """
  add                        [1]         Replicate
  shardwright.embed          [1, 64]     Partial(sum)     model.embed_tokens.weight
  shardwright.rotary_table   [1, 2, 8]   Replicate
  all-reduce                 [1, 64]     Replicate
  2 times:
    nn.rms_norm                [1, 64]     Replicate        model.layers.*.input_layernorm.weight
    matmul                     [1, 32]     Shard(1)         model.layers.*.self_attn.q_proj.weight
    reshape                    [1, 2, 16]  Shard(1)
    matmul                     [1, 16]     Shard(1)         model.layers.*.self_attn.k_proj.weight
    reshape                    [1, 1, 16]  Shard(1)
    matmul                     [1, 16]     Shard(1)         model.layers.*.self_attn.v_proj.weight
    reshape                    [1, 1, 16]  Shard(1)
    shardwright.rotary_append  [1, 2, 16]  Shard(1)
    shardwright.attention      [1, 2, 16]  Shard(1)
    reshape                    [1, 32]     Shard(1)
    matmul                     [1, 64]     Partial(sum)     model.layers.*.self_attn.o_proj.weight
    all-reduce                 [1, 64]     Replicate
    add                        [1, 64]     Replicate
    nn.rms_norm                [1, 64]     Replicate        POST_NORM
    matmul                     [1, 64]     Shard(1)+48 pad  model.layers.*.mlp.gate_proj.weight
    nn.silu                    [1, 64]     Shard(1)+48 pad
    matmul                     [1, 64]     Shard(1)+48 pad  model.layers.*.mlp.up_proj.weight
    multiply                   [1, 64]     Shard(1)+48 pad
    matmul                     [1, 64]     Partial(sum)     model.layers.*.mlp.down_proj.weight
    all-reduce                 [1, 64]     Replicate
    add                        [1, 64]     Replicate
  nn.rms_norm                [1, 64]     Replicate        model.norm.weight
  matmul                     [1, 64]     Shard(1)+28 pad  lm_head.weight
  all-gather                 [128, 1]
  permute_dims               [1, 100]    Replicate
  shardwright.store_logits   [1, 100]    Replicate
  shardwright.sample         [1, 100]    Replicate
""".replace("POST_NORM", "model.layers.*.post_attention_layernorm.weight"),
    "Collectives of decode_1": """
  all-reduce  [1, 64] float16   128 bytes per step  x5
  all-gather  [1, 100] float32  400 bytes per step
  total: 6 collectives, 1040 bytes per step
""",
    "Collectives of prefill": """
  all-reduce  [n, 64] float16   128 bytes per token  x3
  all-reduce  [2, 64] float16   256 bytes per chunk  x2
  all-gather  [2, 100] float32  800 bytes per chunk
  total: 3 collectives, 1312 bytes per chunk
  total: 3 collectives, 384 bytes per token
""",
}


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    _, family = family_of(CONFIG)
    config = family.config.from_hf(CONFIG)
    options = BuildOptions("", tmp_path_factory.getbasetemp(), max_batch_size=2)
    scheme = quantization("q4f16_1")
    model = family.model(config, scheme.dtype)
    text = partition_program(model, scheme, limits_of(options, config), ranks=2).explanation()
    return dict(part.split("\n", 1) for part in text.split("\n\n")[1:])


@pytest.mark.parametrize("title", EXPECTED)
def test_each_section(sections, title):
    assert sections[title].strip("\n") == EXPECTED[title].strip("\n")
