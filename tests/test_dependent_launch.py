"""Programmatic dependent launch: the pass, and the source that nvcc is given."""

import pytest
import tvm
from tvm import relax
from tvm.script import tirx as T
from tvm.target import Target

from shardwright.compiler import cuda, pipeline
from shardwright.compiler.kernels import gemv_mma
from shardwright.compiler.kernels.common import SCHEDULED, launch_dependents, wait_for_inputs
from shardwright.compiler.lower import lower_abstract
from shardwright.compiler.options import BuildOptions, limits_of
from shardwright.compiler.program import partition_program
from shardwright.compiler.propagate import bindings_of
from shardwright.compiler.quantization import quantization
from shardwright.compiler.rules import op_name
from shardwright.compiler.script_speed import without_source_context
from shardwright.model_defs import family_of

WAITS = """
extern "C" __global__ void __launch_bounds__(32) a_kernel(half* __restrict__ x, int n);
extern "C" __global__ void __launch_bounds__(32) a_kernel(half* __restrict__ x, int n) {
  shardwright_launch_dependents();
}
"""
OTHER = 'extern "C" __global__ void b_kernel(half* __restrict__ x) { x[0] = 0; }\n'
HEAD = "__device__ void shardwright_launch_dependents() {}\n"


def kernel(target):
    @T.prim_func(s_tir=True)
    def doubled(x_h: T.handle, weight_h: T.handle, out_h: T.handle):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (64,), "float16")
        weight = T.match_buffer(weight_h, (64,), "float16")
        out = T.match_buffer(out_h, (64,), "float16")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for block in T.thread_binding(2, thread="blockIdx.x"):
                for tid in T.thread_binding(32, thread="threadIdx.x"):
                    launch_dependents(target)
                    scale = T.alloc_buffer((1,), "float16", scope="local")
                    scale[0] = weight[block * 32 + tid]
                    wait_for_inputs(target)
                    out[block * 32 + tid] = x[block * 32 + tid] * scale[0]

    return doubled


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_120"])
def test_kernels_that_wait_are_launched_early_from_sm_90(arch):
    waits, plain = kernel("cuda"), kernel("rocm")
    before = tvm.IRModule({"waits": waits, "plain": plain})
    with Target({"kind": "cuda", "arch": arch}, host="llvm"):
        after = pipeline.dependent_launch(before)
    tag = "tirx.use_programtic_dependent_launch"
    early = waits.with_attr("tirx.kernel_launch_params", [tag])
    expected = {"waits": waits if arch in ("sm_80", "sm_89") else early, "plain": plain}
    tvm.ir.assert_structural_equal(after, tvm.IRModule(expected))


def test_the_pass_can_be_left_out():
    target = Target({"kind": "cuda", "arch": "sm_90"}, host="llvm")
    name = frozenset([pipeline.DEPENDENT_LAUNCH])
    assert len(pipeline.schedule(target)) == len(pipeline.schedule(target, name)) + 1


def test_reads_keep_their_place_in_kernels_that_wait():
    source = HEAD + WAITS + OTHER
    assert cuda.in_order(source) == HEAD + WAITS.replace("__restrict__ ", "") + OTHER


def test_kernels_whose_device_function_launches_the_next_are_no_other():
    sizes = {"batch": 1, "out_features": 512, "in_features": 1024, "group": 32}
    tuned = gemv_mma.plan(gemv_mma.Product(**sizes), clusters=True)
    func = gemv_mma.gemv_mma(**sizes, out_dtype="float16", tuned=tuned)
    target = Target({"kind": "cuda", "arch": "sm_90a"}, host="llvm")
    with target:
        after = pipeline.dependent_launch(tvm.IRModule({"product": func}))
    assert "tirx.kernel_launch_params" in after["product"].attrs
    called = WAITS.replace("launch_dependents()", "launches_dependents()")
    assert called != WAITS
    assert cuda.in_order(HEAD + called) == HEAD + called.replace("__restrict__ ", "")


def test_a_module_without_such_kernels_is_left_alone():
    assert cuda.in_order(HEAD + OTHER) == HEAD + OTHER
    assert cuda.in_order("") == ""


@pytest.mark.parametrize("scheme", ["q0f16", "q4f16_1"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_first_kernel_of_a_step_is_launched_in_the_ordinary_way(scheme, ranks, tmp_path):
    # Attention relies on it: it reads tables and the cache ahead of the kernels before it.
    config = dict(
        architectures=["LlamaForCausalLM"], hidden_size=64, intermediate_size=96, vocab_size=100,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
        max_position_embeddings=64, rope_theta=1e4, hidden_act="silu", tie_word_embeddings=False,
    )  # fmt: skip
    _, family = family_of(config)
    config = family.config.from_hf(config)
    options = BuildOptions("", tmp_path, num_shards=ranks, target="cuda", max_batch_size=1)
    limits, scheme = limits_of(options, config), quantization(scheme)
    program = partition_program(family.model(config, scheme.dtype), scheme, limits, ranks)
    target = cuda.cuda_target(("sm_90a",))
    with target, without_source_context():
        mod = lower_abstract(program.mod, target)
        passes = pipeline.legalize(target) + pipeline.schedule(target)
        mod = tvm.transform.Sequential(passes)(mod)
    kernels = [
        mod[b.value.args[0]]
        for b in bindings_of(mod["decode_1"])
        if isinstance(b.value, relax.Call) and op_name(b.value).startswith("relax.call_tir")
    ]
    early = ["tirx.kernel_launch_params" in kernel.attrs for kernel in kernels]
    assert any(early) and not early[0]
