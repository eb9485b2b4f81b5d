"""Lowerings of products with a weight, plain or quantized."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, te

from shardwright.compiler.kernels import (
    activation,
    gated_gemm,
    gemv,
    gemv_mma,
    gemv_norm,
    gemv_rocm,
    gemv_rows,
    gemv_sum,
    gemv_tokens,
    matmul,
    matmul_rocm,
    q4_batch,
    q4_gemm,
    quantized,
)
from shardwright.compiler.lowering.common import (
    GEMV_MAX_BATCH,
    Kernels,
    packing_of,
    product_of,
    tokens_of,
    value_of,
)
from shardwright.compiler.lowering.images import fits_q4_gemm, is_image
from shardwright.compiler.packing import Packing
from shardwright.compiler.rules import op_name, shape_of

MATMUL = "shardwright.matmul"
"""Packed function of the runtime, `(x [n,K], w [N,K], out [n,N])`."""


def lower_linear(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """`(x [n, K], weight [N, K]) -> [n, N]`; on GPUs a matrix-vector kernel for few tokens."""
    x, weight = args
    if k.target == "cpu":
        shapes = _shapes(k, call, x, weight)
        kernel = k.kernel(matmul.matmul_cpu, **shapes, dtype=str(x.ty.dtype))
        return relax.call_tir(kernel, [x, weight], call.ty)
    few = _matrix_vector(k, call, args)
    return _tensor_core_linear(k, call, x, weight) if few is None else few


def lower_q4_linear(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """`(x [n, K], packed uint32 [N, K/8], scale [N, K/group]) -> [n, N]`, the q4f16_1 format.

    Of many tokens: one kernel that unpacks on the way to the tensor cores, or a dequantized copy.
    """
    x, packed, scale = _padded(k, args)
    shapes = _shapes(k, call, x, packed)
    cols = shapes["in_features"]
    group = cols // shape_of(scale)[1]
    if k.target == "cpu":
        packing = Packing(4, group, offset=7, scale_dtype=str(scale.ty.dtype))
        return _quantized_matmul_cpu(k, call, [x, packed, scale], packing)
    few = _matrix_vector(k, call, [x, packed, scale])
    if few is not None:
        return few
    if shapes["out_dtype"] == "float16" and fits_q4_gemm(k, x, packed, scale):
        x = _image(k, x, shape_of(call)[0])
        kernel = k.kernel(q4_gemm.q4_gemm, group=group)
        return relax.call_tir(kernel, [x, packed, scale], call.ty)
    kernel = k.kernel(
        matmul.q4_dequantize,
        out_features=shapes["out_features"],
        in_features=cols,
        group=group,
        dtype=str(x.ty.dtype),
        target=k.target,
    )
    whole = relax.TensorType([shapes["out_features"], cols], x.ty.dtype)
    weight = k.bb.emit(relax.call_tir(kernel, [packed, scale], whole))
    return _tensor_core_linear(k, call, x, weight)


def lower_quantized_linear(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """A product with a weight of another format than the four-bit kernels'."""
    x, words, *sides = args[:-3]
    packing, columns = packing_of(words, sides, args[-3:])
    missing = columns - shape_of(x)[1]
    x = k.bb.emit(relax.op.nn.pad(x, [0, 0, 0, missing])) if missing else x
    if k.target == "cpu":
        return _quantized_matmul_cpu(k, call, [x, words, *sides], packing)
    shapes = _shapes(k, call, x, words) | {"packing": packing, "dtype": str(x.ty.dtype)}
    batch = shapes.pop("tokens")
    if batch is not None and batch <= GEMV_MAX_BATCH:
        kernel = k.kernel(quantized.quantized_gemv, batch=batch, **shapes, target=k.target)
        return relax.call_tir(kernel, [x, words, *sides], call.ty)
    shapes.pop("out_dtype")
    kernel = k.kernel(quantized.dequantize, **shapes, target=k.target)
    whole = relax.TensorType([shapes["out_features"], columns], x.ty.dtype)
    weight = k.bb.emit(relax.call_tir(kernel, [words, *sides], whole))
    return _tensor_core_linear(k, call, x, weight)


def lower_gated_linear(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """`silu(gate) * up` of the halves of a product, in its own kernel if that is for few tokens."""
    if len(args) == 3:
        args = _padded(k, args)
    few = None if k.target == "cpu" else _matrix_vector(k, call, args, gated=True)
    if few is not None:
        return few
    n, half = shape_of(call)
    if k.image and len(args) == 3 and fits_q4_gemm(k, *args):
        group = shape_of(args[0])[1] // shape_of(args[2])[1]
        kernel = k.kernel(q4_gemm.q4_gemm_gated, group=group, features=half)
        image = relax.TensorType([q4_gemm.image_rows(n), half], "float16")
        operands = [_image(k, args[0], n), *args[1:], relax.prim_value(n)]
        return relax.call_tir(kernel, operands, image)
    if len(args) == 2 and not k.image and _fits_gated_gemm(k, call, *args):
        inner = shape_of(args[0])[1]
        kernel = k.kernel(gated_gemm.gated_gemm, features=half, inner=inner)
        return relax.call_tir(kernel, args, call.ty)
    whole = relax.TensorType([n, 2 * half], call.ty.dtype)
    name, lowering = ("linear", lower_linear) if len(args) == 2 else ("q4_linear", lower_q4_linear)
    product = k.bb.normalize(
        relax.call_dps_packed(f"shardwright.{name}", relax.Tuple(args), out_ty=whole)
    )
    y = k.bb.emit(lowering(k, product, args))
    if k.image:
        image = relax.TensorType([q4_gemm.image_rows(n), half], "float16")
        return relax.call_tir(k.kernel(q4_gemm.silu_mul_image, features=half), [y], image)
    if k.target != "cpu":
        kernel = k.kernel(
            activation.silu_mul, tokens=tokens_of(k, y), features=half, dtype=str(call.ty.dtype)
        )
        return relax.call_tir(kernel, [y], call.ty)
    gate = k.bb.emit(relax.op.strided_slice(y, [1], [0], [half]))
    up = k.bb.emit(relax.op.strided_slice(y, [1], [half], [2 * half]))
    return relax.op.multiply(k.bb.emit(relax.op.nn.silu(gate)), up)


def _fits_gated_gemm(k: Kernels, call: relax.Call, x: relax.Expr, weight: relax.Expr) -> bool:
    half = {str(y.ty.dtype) for y in (call, x, weight)} == {"float16"}
    features, inner = shape_of(call)[1], shape_of(x)[1]
    whole = features % gated_gemm.TILE == 0 and inner % gated_gemm.COLUMNS == 0
    return k.gated_gemm and half and whole and features >= gated_gemm.MIN_FEATURES


def lower_add_norm_linear(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """The residual sum, its norm and a product of that, of one token, in one kernel."""
    *tensors, eps = args
    shapes = _normed_shapes(call, tensors[3:])
    kernel = k.kernel(gemv_sum.add_norm_gemv, **shapes, eps=value_of(eps))
    return _sum_and_product(k, kernel, tensors, call)


def lower_add_linear(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """A product of several tokens and the residual's sum with it, in one kernel."""
    x, *weight, _residual, _norm = args
    product = product_of(weight, gated=False, batch=shape_of(x)[0])
    shapes = _planned(product, gemv_norm.added_plan(product))
    kernel = k.kernel(gemv_norm.add_gemv, batch=product.batch, **shapes)
    return relax.call_tir(kernel, args, list(call.ty.fields))


def lower_sum_add_linear(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """As `lower_add_linear`, of the sum over ranks of their products."""
    x, *weight, _residual, _norm, peers, _rank, _first = args
    product = product_of(weight, gated=False, batch=shape_of(x)[0])
    kernel = k.kernel(
        gemv_norm.sum_add_gemv,
        batch=product.batch,
        **_planned(product, gemv_norm.added_plan(product)),
        ranks=shape_of(peers)[0] - 1,
    )
    return relax.call_tir(kernel, args, list(call.ty.fields))


def lower_norm_linear(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """A product of the norms of several tokens, from what the product in front leaves."""
    *tensors, eps = args
    x, squares, *weight = tensors
    product = product_of(weight, gated=_is_gated(call), batch=shape_of(x)[0])
    kernel = k.kernel(
        gemv_norm.norm_gemv,
        batch=product.batch,
        **_planned(product, gemv_norm.scaled_plan(product)),
        out_dtype=str(call.ty.dtype),
        eps=value_of(eps),
        pieces=shape_of(squares)[1],
        gated=product.gated,
    )
    return relax.call_tir(kernel, tensors, call.ty)


def lower_send_linear(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """A product of one token whose result goes to all ranks, as a summand."""
    *operands, first = args
    _x, *weight, peers, _rank, _place = operands
    product = product_of(weight, gated=False)
    kernel = k.kernel(
        gemv_sum.send_gemv,
        **_planned(product, gemv_sum.sent_plan(product)),
        ranks=shape_of(peers)[0] - 1,
        first_word=value_of(first),
    )
    return relax.call_tir(kernel, operands, call.ty)


def lower_sum_norm_linear(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """As `lower_add_norm_linear`, of the sum over ranks of what `lower_send_linear` sends."""
    *operands, eps, first = args
    _residual, _norm, *weight, _done, _x, peers, _rank, _place, _last = operands
    kernel = k.kernel(
        gemv_sum.sum_norm_gemv,
        **_normed_shapes(call, weight),
        eps=value_of(eps),
        ranks=shape_of(peers)[0] - 1,
        first_word=value_of(first),
    )
    return _sum_and_product(k, kernel, operands, call)


def _sum_and_product(
    k: Kernels, kernel: relax.GlobalVar, operands: list[relax.Expr], call: relax.Call
) -> relax.Expr:
    """Both results of a kernel that gives the product first."""
    both = k.bb.emit(relax.call_tir(kernel, operands, list(call.ty.fields)[::-1]))
    return relax.Tuple([k.bb.emit(relax.TupleGetItem(both, i)) for i in (1, 0)])


def _normed_shapes(call: relax.Call, weight: list[relax.Expr]) -> dict[str, Any]:
    product = product_of(weight, gated=_is_gated(call))
    out_dtype = str(call.ty.fields[1].dtype)
    shapes = _planned(product, gemv_sum.normed_plan(product))
    return shapes | {"out_dtype": out_dtype, "gated": product.gated}


def _planned(
    product: gemv_mma.Product, tuned: gemv_sum.Plan | gemv_norm.Plan | None
) -> dict[str, Any]:
    """What the kernels of few tokens around norms all take."""
    return {
        "out_features": product.out_features,
        "in_features": product.in_features,
        "group": product.group,
        "tuned": tuned,
    }


def _is_gated(call: relax.Call) -> bool:
    return op_name(call).endswith("gated_linear")


def lower_take_columns(k: Kernels, _call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """Columns by index, zeros where it is -1."""

    def pick(x: te.Tensor, index: te.Tensor) -> te.Tensor:
        def element(i: Any, j: Any) -> Any:
            safe = tvm.tirx.max(index[j], 0)
            return tvm.tirx.if_then_else(index[j] >= 0, x[i, safe], tvm.tirx.const(0, x.dtype))

        return te.compute((x.shape[0], index.shape[0]), element, name="take_columns")

    return k.bb.call_te(pick, *args, primfunc_name_hint="take_columns")


def _matrix_vector(
    k: Kernels, call: relax.Call, args: list[relax.Expr], gated: bool = False
) -> relax.Expr | None:
    """A kernel for few tokens on a GPU, or None if there is none.

    `args` are x and the one or two tensors of the weight.
    """
    x, weight, *scale = args
    shapes = _shapes(k, call, x, weight) | {"gated": gated}
    batch, unit = shapes.pop("tokens"), 8
    if scale:
        shapes["group"] = shapes["in_features"] // shape_of(scale[0])[1]
        unit = 32
        if shapes["group"] % unit:
            return None
    if batch is None or shapes["in_features"] % unit or str(x.ty.dtype) != "float16":
        return None
    if k.target == "cuda":
        sizes = {name: size for name, size in shapes.items() if name != "out_dtype"}
        product = gemv_mma.Product(batch=batch, **sizes)
        rows = gemv_rows.plan(product) if k.clusters else None
        if rows is not None:
            kernel = k.kernel(gemv_rows.gemv_rows, **shapes, tuned=rows)
            return relax.call_tir(kernel, args, call.ty)
        tokens = gemv_tokens.plan(product) if k.clusters else None
        if tokens is not None:
            kernel = k.kernel(gemv_tokens.gemv_tokens, batch=batch, **shapes, tuned=tokens)
            return relax.call_tir(kernel, args, call.ty)
        tuned = gemv_mma.plan(product, clusters=k.clusters)
        if tuned is not None:
            kernel = k.kernel(gemv_mma.gemv_mma, batch=batch, **shapes, tuned=tuned)
            return relax.call_tir(kernel, args, call.ty)
        several = q4_batch.plan(product) if k.wgmma else None
        if several is not None:
            kernel = k.kernel(q4_batch.q4_batch, batch=batch, **shapes, tuned=several)
            return relax.call_tir(kernel, args, call.ty)
    if batch > GEMV_MAX_BATCH:
        return None
    if k.target == "cuda":
        kernel = k.kernel(gemv.q4_gemv if scale else gemv.gemv, batch=batch, **shapes)
    else:
        generate = gemv_rocm.q4_gemv if scale else gemv_rocm.gemv
        kernel = k.kernel(generate, batch=batch, **shapes, target=k.target)
    return relax.call_tir(kernel, args, call.ty)


def _tensor_core_linear(
    k: Kernels, call: relax.Call, x: relax.Expr, weight: relax.Expr
) -> relax.Expr:
    """cuBLAS, a kernel for AMD's matrix cores, or Relax operations that dlight schedules.

    Sums are in float32.
    """
    dtype, (out_features, in_features) = str(x.ty.dtype), shape_of(weight)
    sizes = {"out_features": out_features, "in_features": in_features}
    if matmul_rocm.supported(**sizes, dtype=dtype, target=k.target):
        shapes = _shapes(k, call, x, weight)
        kernel = k.kernel(matmul_rocm.matmul_rocm, **shapes, target=k.target)
        return relax.call_tir(kernel, [x, weight], call.ty)
    if k.cublas and dtype == "float16":
        return relax.call_dps_packed(MATMUL, relax.Tuple([x, weight]), out_ty=call.ty)
    transposed = k.bb.emit(relax.op.permute_dims(weight))
    y = relax.op.matmul(x, transposed, out_dtype="float32")
    if str(call.ty.dtype) == "float32":
        return y
    return relax.op.astype(k.bb.emit(y), call.ty.dtype)


def _quantized_matmul_cpu(
    k: Kernels, call: relax.Call, args: list[relax.Expr], packing: Packing
) -> relax.Expr:
    shapes = _shapes(k, call, args[0], args[1])
    dtype = str(args[0].ty.dtype)
    kernel = k.kernel(quantized.quantized_matmul_cpu, **shapes, packing=packing, dtype=dtype)
    return relax.call_tir(kernel, args, call.ty)


def _image(k: Kernels, x: relax.Expr, tokens: Any) -> relax.Expr:
    """x [tokens, K] as `q4_gemm` reads it, if it is not so already."""
    if is_image(x, tokens):
        return x
    image = relax.TensorType([q4_gemm.image_rows(tokens), shape_of(x)[1]], "float16")
    return k.bb.emit(relax.call_tir(k.kernel(q4_gemm.q4_gemm_image), [x], image))


def _padded(k: Kernels, args: list[relax.Expr]) -> list[relax.Expr]:
    """Operands of a four-bit product, x as wide as the weight, which has whole groups."""
    x, packed, scale = args
    missing = shape_of(packed)[1] * 8 - shape_of(x)[1]
    return [k.bb.emit(relax.op.nn.pad(x, [0, 0, 0, missing])) if missing else x, packed, scale]


def _shapes(k: Kernels, call: relax.Call, x: relax.Expr, weight: relax.Expr) -> dict[str, Any]:
    return {
        "tokens": tokens_of(k, x),
        "out_features": shape_of(weight)[0],
        "in_features": shape_of(x)[1],
        "out_dtype": str(call.ty.dtype),
    }
