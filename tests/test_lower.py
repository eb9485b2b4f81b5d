"""Lowering: every operation of a model has kernels, whatever is left out."""

import pytest
from tvm import relax

from shardwright.compiler import cuda, fuse
from shardwright.compiler.fuse_norm import FUSE_NORM_PASS
from shardwright.compiler.linear import is_call
from shardwright.compiler.lower import LOWERINGS, lower_abstract
from shardwright.compiler.lowering.common import CUBLAS_PASS, GATED_GEMM_PASS, Q4_GEMM_PASS
from shardwright.compiler.options import BuildOptions, limits_of
from shardwright.compiler.peer import peer_state
from shardwright.compiler.program import partition_program
from shardwright.compiler.propagate import bindings_of
from shardwright.compiler.quantization import quantization
from shardwright.compiler.rules import op_name
from shardwright.compiler.script_speed import without_source_context
from shardwright.model_defs import family_of

CONFIG = dict(
    architectures=["LlamaForCausalLM"], hidden_size=128, intermediate_size=96, vocab_size=100,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
    max_position_embeddings=64, rope_theta=1e4, hidden_act="silu", tie_word_embeddings=False,
    head_dim=64,
)  # fmt: skip


def partitioned(data, folder, ranks=2):
    _, family = family_of(data)
    config = family.config.from_hf(data)
    options = BuildOptions("", folder, target="cuda", max_batch_size=2)
    scheme = quantization("q4f16_1")
    limits = limits_of(options, config)
    return partition_program(family.model(config, scheme.dtype), scheme, limits, ranks)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return partitioned(CONFIG, tmp_path_factory.getbasetemp())


EVERY = (*fuse.FUSIONS, FUSE_NORM_PASS, CUBLAS_PASS, Q4_GEMM_PASS, GATED_GEMM_PASS)


@pytest.mark.parametrize("peers", [False, True])
@pytest.mark.parametrize("left_out", [*EVERY, "all", "nothing"])
def test_whatever_is_left_out_no_operation_stays_abstract(program, left_out, peers):
    target = cuda.cuda_target(("sm_90a",))
    every = set(EVERY)
    peer = peer_state(program.mod, 2, 16) if peers else None
    disabled = every if left_out == "all" else every & {left_out}
    with target, without_source_context():
        mod = lower_abstract(program.mod, target, peer, frozenset(disabled))
    calls = {
        op_name(binding.value)
        for func in mod.functions.values()
        if isinstance(func, relax.Function)
        for binding in bindings_of(func)
        if isinstance(binding.value, relax.Call)
    }
    # Collectives without peer memory are calls of the runtime, under names of their own.
    assert "relax.call_tir" in calls
    assert not calls & LOWERINGS.keys()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_writes_what_the_product_behind_it_reads(tmp_path, head_dim):
    target = cuda.cuda_target(("sm_90a",))
    # Two layers: of the last one few rows are read.
    other = dict(head_dim=head_dim, num_attention_heads=8, num_hidden_layers=2)
    program = partitioned(CONFIG | other, tmp_path)
    with target, without_source_context():
        mod = lower_abstract(program.mod, target)
    calls = [b.value for b in bindings_of(mod["prefill"]) if isinstance(b.value, relax.Call)]
    names = [str(c.args[0].name_hint) for c in calls if op_name(c) == "relax.call_tir"]
    images = head_dim == 128
    assert ("prefill_attention_image_kernel" in names) == images
    # The others are of norms: one for each layer's attention, one for the first layer's MLP.
    assert names.count("q4_gemm_image_kernel") == (3 if images else 4)


@pytest.mark.parametrize("arch", ["sm_89", "sm_90a"])
def test_products_of_decode_steps_write_logits_where_they_stay(tmp_path, arch):
    program = partitioned(CONFIG, tmp_path, ranks=1)
    target = cuda.cuda_target((arch,))
    with target, without_source_context():
        mod = lower_abstract(program.mod, target)
    for function, kernel in (("decode_1", "gemv"), ("decode_2", "gemv"), ("prefill", "store")):
        (logits,) = [param for param in mod[function].params if param.name == "logits"]
        values = [b.value for b in bindings_of(mod[function])]
        calls = [v for v in values if is_call(v, "relax.call_tir_inplace")]
        (writer,) = [c for c in calls if logits in c.args[1].fields]
        assert kernel in writer.args[0].name_hint
        place = [*writer.args[1].fields].index(logits)
        assert int(writer.attrs.inplace_indices[0]) == place


@pytest.mark.parametrize("arch", ["sm_89", "sm_90a"])
def test_the_sampler_that_writes_to_the_host_is_in_builds_that_say_so(program, arch):
    target = cuda.cuda_target((arch,))
    with target, without_source_context():
        mod = lower_abstract(program.mod, target)
    text = mod["sample_kernel"].script()
    assert ("shardwright::sampler::sample" in text) == cuda.from_sm_90(target) == (arch == "sm_90a")
