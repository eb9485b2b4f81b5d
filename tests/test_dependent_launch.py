"""Programmatic dependent launch: the pass, and the source that nvcc is given."""

import pytest
import tvm
from tvm.script import tirx as T
from tvm.target import Target

from shardwright.compiler import cuda, pipeline
from shardwright.compiler.kernels.common import SCHEDULED, launch_dependents, wait_for_inputs

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


def test_a_module_without_such_kernels_is_left_alone():
    assert cuda.in_order(HEAD + OTHER) == HEAD + OTHER
    assert cuda.in_order("") == ""
