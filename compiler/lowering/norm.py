"""Lowering of the residual sum with its norm."""

from __future__ import annotations

from tvm import relax

from shardwright.compiler.kernels import norm
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
    kernel = k.kernel(
        norm.add_rms_norm,
        tokens=tokens_of(k, x),
        features=shape_of(x)[1],
        eps=value_of(eps),
        dtype=str(x.ty.dtype),
        target=k.target,
    )
    return relax.call_tir(kernel, [x, y, weight], list(call.ty.fields))
