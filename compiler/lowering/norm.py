"""Lowering of the residual sum with its norm."""

from __future__ import annotations

from tvm import relax

from shardwright.compiler.kernels import norm, q4_gemm
from shardwright.compiler.lowering.common import Kernels, tokens_of, value_of
from shardwright.compiler.rules import shape_of


def lower_add_rms_norm(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """`(x, y [n, F], weight [F], eps) -> (x + y, its norm)`; one kernel on GPUs."""
    x, y, weight, eps = args
    if k.target == "cpu":
        total = k.bb.emit(relax.op.add(x, y))
        return relax.Tuple(
            [total, k.bb.emit(relax.op.nn.rms_norm(total, weight, [-1], value_of(eps)))]
        )
    if k.image:
        n, features = shape_of(x)
        image = relax.TensorType([q4_gemm.image_rows(n), features], "float16")
        kernel = k.kernel(q4_gemm.add_rms_norm_image, features=features, eps=value_of(eps))
        return relax.call_tir(kernel, [x, y, weight], [call.ty.fields[0], image])
    kernel = k.kernel(
        norm.add_rms_norm,
        tokens=tokens_of(k, x),
        features=shape_of(x)[1],
        eps=value_of(eps),
        dtype=str(x.ty.dtype),
        target=k.target,
    )
    return relax.call_tir(kernel, [x, y, weight], list(call.ty.fields))
