"""Products of many tokens on CUDA: who computes them, and how cuBLAS is called."""

import types

import pytest
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from shardwright.compiler.cuda import cuda_target
from shardwright.compiler.lower import lower_abstract
from shardwright.compiler.lowering.common import CUBLAS_PASS, GATED_GEMM_PASS, Q4_GEMM_PASS
from shardwright.compiler.lowering.products import MATMUL
from shardwright.compiler.propagate import bindings_of
from shardwright.compiler.rules import op_name
from shardwright.errors import DeviceError, WorkerError
from shardwright.runtime import cublas, tvm_runtime


@I.ir_module
class Product:
    @R.function
    def prefill(x: R.Tensor(("n", 64), "float16"), w: R.Tensor((32, 64), "float16")):
        n = T.int64()
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.call_dps_packed("shardwright.linear", (x, w), out_ty=R.Tensor((n, 32), "float16"))
            R.output(y)
        return y


@pytest.mark.parametrize(
    ("target", "disabled", "called"),
    [
        ({"kind": "cuda", "arch": "sm_90"}, frozenset(), True),
        ({"kind": "cuda", "arch": "sm_90"}, frozenset({CUBLAS_PASS}), False),
        ({"kind": "llvm"}, frozenset(), False),
    ],
)
def test_cublas_is_for_cuda_and_can_be_left_out(target, disabled, called):
    target = tvm.target.Target(target)
    with target:
        mod = lower_abstract(Product, target, disabled=disabled)
    calls = [b.value for b in bindings_of(mod["prefill"]) if isinstance(b.value, relax.Call)]
    assert (MATMUL in map(op_name, calls)) == called


def four_bit(columns):
    """A product of n tokens with a packed weight of 64 rows."""
    n = tvm.tirx.Var("n", "int64")
    shapes = [(n, columns), (64, columns // 8), (64, columns // 32)]
    types = ["float16", "uint32", "float16"]
    operands = [
        relax.Var(name, relax.TensorType(shape, dtype))
        for name, shape, dtype in zip(("x", "packed", "scale"), shapes, types, strict=True)
    ]
    bb = relax.BlockBuilder()
    with bb.function("prefill", operands, attrs={"num_input": 1}):
        with bb.dataflow():
            call = relax.call_dps_packed(
                "shardwright.q4_linear",
                relax.Tuple(operands),
                out_ty=relax.TensorType((n, 64), "float16"),
            )
            y = bb.emit_output(call)
        bb.emit_func_output(y)
    return bb.get()


@pytest.mark.parametrize(
    ("archs", "columns", "disabled", "kernel"),
    [
        (("sm_90a",), 256, frozenset(), "q4_gemm"),
        (("sm_90a",), 256, frozenset({Q4_GEMM_PASS}), "q4_dequantize"),
        (("sm_90a",), 96, frozenset(), "q4_dequantize"),
        (("sm_89", "sm_90a"), 256, frozenset(), "q4_dequantize"),
    ],
)
def test_four_bit_weights_go_to_hoppers_tensor_cores_unpacked_on_the_way(
    archs, columns, disabled, kernel
):
    target = cuda_target(archs)
    with target:
        mod = lower_abstract(four_bit(columns), target, disabled=disabled)
    kernels = {gv.name_hint for gv, f in mod.functions_items() if not isinstance(f, relax.Function)}
    wanted = {"q4_gemm": {"q4_gemm_kernel", "q4_gemm_image_kernel"}}
    assert kernels == wanted.get(kernel, {f"{kernel}_kernel"})


def feed_forward(others_read):
    """Residual sum and norm, gate and up with SiLU, down; `others_read` the values between."""
    n = tvm.tirx.Var("n", "int64")

    def half(*shape):
        return relax.TensorType(shape, "float16")

    def weight(name, rows, columns):
        packed = relax.Var(f"{name}_packed", relax.TensorType((rows, columns // 8), "uint32"))
        return [packed, relax.Var(f"{name}_scale", half(rows, columns // 32))]

    x, y = relax.Var("x", half(n, 1024)), relax.Var("y", half(n, 1024))
    scale = relax.Var("scale", half(1024))
    up, down = weight("up", 512, 1024), weight("down", 1024, 256)
    bb = relax.BlockBuilder()
    with bb.function("prefill", [x, y, scale, *up, *down], attrs={"num_input": 2}):
        with bb.dataflow():
            eps = relax.prim_value(tvm.tirx.FloatImm("float64", 1e-5))

            def call(name, args, out):
                args = relax.Tuple(args)
                return bb.emit(relax.call_dps_packed(f"shardwright.{name}", args, out_ty=out))

            both = call("add_rms_norm", [x, y, scale, eps], [half(n, 1024), half(n, 1024)])
            total, normed = (bb.emit(relax.TupleGetItem(both, i)) for i in range(2))
            gated = call("q4_gated_linear", [normed, *up], half(n, 256))
            out = call("q4_linear", [gated, *down], half(n, 1024))
            results = [total, out, *([normed, gated] if others_read else [])]
            out = bb.emit_output(relax.Tuple(results))
        bb.emit_func_output(out)
    return bb.get()


@pytest.mark.parametrize("others_read", [False, True])
def test_what_four_bit_products_alone_read_is_written_in_their_order(others_read):
    target = cuda_target(("sm_90a",))
    before = feed_forward(others_read)
    with target:
        mod = lower_abstract(before, target)
    kernels = {gv.name_hint for gv, f in mod.functions_items() if not isinstance(f, relax.Function)}
    written = {"add_rms_norm_image_kernel", "q4_gemm_gated_kernel"}
    plain = {"add_rms_norm_kernel", "silu_mul_kernel", "q4_gemm_image_kernel"}
    assert kernels == {"q4_gemm_kernel", *(plain if others_read else written)}
    tvm.ir.assert_structural_equal(mod["prefill"].ret_ty, before["prefill"].ret_ty, True)


@pytest.mark.parametrize(
    ("archs", "shape", "disabled", "fused"),
    [
        (("sm_90a",), (5632, 64), frozenset(), True),
        (("sm_90a",), (5632, 64), frozenset({GATED_GEMM_PASS}), False),
        (("sm_90a",), (5696, 64), frozenset(), False),
        (("sm_90a",), (5504, 64), frozenset(), False),
        (("sm_90a",), (5632, 96), frozenset(), False),
        (("sm_89", "sm_90a"), (5632, 64), frozenset(), False),
    ],
)
def test_gates_and_ups_of_many_tokens_end_with_silu_on_hopper(archs, shape, disabled, fused):
    (features, columns), n = shape, tvm.tirx.Var("n", "int64")
    shapes = (n, columns), (2 * features, columns)
    x, w = (
        relax.Var(name, relax.TensorType(s, "float16"))
        for name, s in zip("xw", shapes, strict=True)
    )
    bb = relax.BlockBuilder()
    with bb.function("prefill", [x, w], attrs={"num_input": 1}):
        with bb.dataflow():
            out = relax.TensorType((n, features), "float16")
            call = relax.call_dps_packed(
                "shardwright.gated_linear", relax.Tuple([x, w]), out_ty=out
            )
            y = bb.emit_output(call)
        bb.emit_func_output(y)
    target = cuda_target(archs)
    with target:
        mod = lower_abstract(bb.get(), target, disabled=disabled)
    kernels = {gv.name_hint for gv, f in mod.functions_items() if not isinstance(f, relax.Function)}
    assert kernels == {"gated_gemm_kernel" if fused else "silu_mul_kernel"}


def test_a_missing_cublas_names_its_package(monkeypatch):
    monkeypatch.setattr(tvm_runtime, "_pip_candidates", lambda name: [])
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    with pytest.raises(DeviceError, match="pip install nvidia-cublas"):
        cublas.library()


class Stub:
    """cuBLAS that notes its calls and answers with a status."""

    def __init__(self, status=0):
        self.calls, self.status = [], status

    def __getattr__(self, name):
        def function(*args):
            self.calls.append((name, args))
            return self.status if name == "cublasGemmEx" else 0

        return function

    def cublasGetStatusString(self, status):
        return b"the reason"


def tensor(shape, dtype, address):
    return types.SimpleNamespace(shape=shape, dtype=dtype, data_ptr=lambda: address)


def handle(monkeypatch, stub):
    monkeypatch.setattr(cublas, "library", lambda: stub)
    monkeypatch.setattr(cublas, "_WORKSPACE_BYTES", 16)
    return cublas.Cublas(tvm.cpu())


def test_rows_are_given_as_columns(monkeypatch):
    stub = Stub()
    operands = (
        tensor((5, 64), "float16", 100),
        tensor((32, 64), "float16", 200),
        tensor((5, 32), "float32", 300),
    )
    handle(monkeypatch, stub).matmul(*operands)
    args = [a.value if hasattr(a, "value") else a for _, call in stub.calls[-1:] for a in call]
    # transa, transb, m, n, k; A, type, lda; B, type, ldb; C, type, ldc; compute type, algorithm
    assert args[1:6] == [1, 0, 32, 5, 64]
    assert args[7:13] == [200, 2, 64, 100, 2, 64]
    assert args[14:] == [300, 0, 32, 68, -1]


def test_a_refusal_says_which_product(monkeypatch):
    operands = (tensor((5, 64), "float16", 1), tensor((32, 64), "float16", 2), None)
    out = tensor((5, 32), "float16", 3)
    with pytest.raises(WorkerError, match="5 x 64 and 64 x 32: the reason"):
        handle(monkeypatch, Stub(status=7)).matmul(*operands[:2], out)
