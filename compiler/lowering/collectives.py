"""Lowerings of collectives: calls of the runtime, or kernels over peer memory."""

from __future__ import annotations

from tvm import relax

from shardwright.compiler.kernels import all_reduce, q4_gemm
from shardwright.compiler.lowering.common import Kernels, value_of
from shardwright.compiler.rules import shape_of


def lower_all_reduce(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """The sum over all ranks, by the runtime."""
    return relax.call_dps_packed("shardwright.all_reduce", relax.Tuple(args), out_ty=call.ty)


def lower_all_gather(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """The parts of all ranks, one after the other along dimension 0, by the runtime."""
    return relax.call_dps_packed("shardwright.all_gather", relax.Tuple(args), out_ty=call.ty)


def lower_peer_all_reduce(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """The sum over all ranks of x [n, features], over peer memory."""
    kernel = k.kernel(all_reduce.all_reduce, **_peer_shapes(k, *args[:3]))
    return relax.call_tir(kernel, args, call.ty)


def lower_peer_all_reduce_add_rms_norm(
    k: Kernels, call: relax.Call, args: list[relax.Expr]
) -> relax.Expr:
    """The same with the residual sum and the norm behind it, in one kernel."""
    *tensors, eps = args
    shapes = _peer_shapes(k, tensors[1], *tensors[3:5])
    kernel = k.kernel(all_reduce.all_reduce_add_rms_norm, **shapes, eps=value_of(eps))
    return relax.call_tir(kernel, tensors, list(call.ty.fields))


def lower_peer_all_reduce_many(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """The sum over all ranks of x [n, features] of a prefill, over peer memory."""
    *tensors, first = args
    shapes = _peer_many_shapes(tensors[0], tensors[1], tensors[2], first)
    kernel = k.kernel(all_reduce.all_reduce_many, **shapes)
    return relax.call_tir(kernel, tensors, call.ty)


def lower_peer_all_reduce_many_add_rms_norm(
    k: Kernels, call: relax.Call, args: list[relax.Expr]
) -> relax.Expr:
    """The same with the residual sum and the norm behind it, in one kernel."""
    *tensors, eps, first = args
    shapes = _peer_many_shapes(tensors[1], tensors[3], tensors[4], first)
    kernel = k.kernel(
        all_reduce.all_reduce_many_add_rms_norm, **shapes, eps=value_of(eps), image=k.image
    )
    total, normed = call.ty.fields
    if k.image:
        n, features = shape_of(tensors[1])
        normed = relax.TensorType([q4_gemm.image_rows(n), features], "float16")
    return relax.call_tir(kernel, tensors, [total, normed])


def lower_peer_store_logits(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """The logits [n, V / ranks] of all ranks into each rank's [batch, V], over peer memory."""
    *tensors, first = args
    new, _, peers, calls, _, logits = map(shape_of, tensors)
    kernel = k.kernel(
        all_reduce.gather_logits,
        tokens=new[0],
        local=new[1],
        vocab=logits[1],
        ranks=peers[0] - 1,
        rows=calls[0],
        first=value_of(first),
    )
    return relax.call_tir_inplace(kernel, tensors, [5], call.ty)


def _peer_shapes(k: Kernels, x: relax.Expr, peers: relax.Expr, calls: relax.Expr) -> dict[str, int]:
    tokens, features = shape_of(x)
    ranks, rows = shape_of(peers)[0] - 1, shape_of(calls)[0]
    sizes = {"tokens": tokens, "features": features, "ranks": ranks, "rows": rows}
    return sizes | {"clusters": k.arch >= 90}


def _peer_many_shapes(
    x: relax.Expr, peers: relax.Expr, calls: relax.Expr, first: relax.Expr
) -> dict[str, int]:
    ranks, rows = shape_of(peers)[0] - 1, shape_of(calls)[0]
    return {"features": shape_of(x)[1], "ranks": ranks, "rows": rows, "first": value_of(first)}
