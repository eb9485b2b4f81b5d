"""Lowerings of the step from logits to the next token."""

from __future__ import annotations

from tvm import relax

from shardwright.compiler.kernels import sampling, sampling_cuda
from shardwright.compiler.lowering.common import Kernels
from shardwright.compiler.rules import op_name, shape_of


def lower_store_logits(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """Keep the new logits [b, V] of the rows that have some, in place.

    In a decode step, where nobody reads those of other rows, their product writes them there.
    """
    new, _, logits = args
    in_place = _written_in_place(k, new, logits) if k.decodes else None
    if in_place is not None:
        return in_place
    vocab = shape_of(logits)[1]
    kernel = k.kernel(sampling.store_logits, batch=None, vocab=vocab, target=k.target)
    return relax.call_tir_inplace(kernel, args, [2], call.ty)


def _written_in_place(k: Kernels, new: relax.Expr, logits: relax.Expr) -> relax.Expr | None:
    """The kernel whose first result is `new` with `logits` in its place, None if none is."""
    made = k.bb.lookup_binding(new)
    several = isinstance(made, relax.TupleGetItem) and made.index == 0
    product = k.bb.lookup_binding(made.tuple_value) if several else made
    if not isinstance(product, relax.Call) or op_name(product) != "relax.call_tir":
        return None
    kernel, given, *_ = product.args
    operands, at = [*given.fields, logits], len(given.fields)
    if not several:
        return relax.call_tir_inplace(kernel, operands, at, logits.ty)
    others = list(product.ty.fields)[1:]
    places, types = [at] + [-1] * len(others), [logits.ty, *others]
    return relax.TupleGetItem(k.bb.emit(relax.call_tir_inplace(kernel, operands, places, types)), 0)


def lower_sample(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """The next token of each row, in place; on sm_90 and later by clusters of blocks."""
    vocab, max_len = shape_of(args[0])[1], shape_of(args[4])[1]
    sizes = {"batch": None, "vocab": vocab, "max_len": max_len}
    if k.arch >= 90:
        kernel = k.kernel(sampling_cuda.sample, **sizes)
    else:
        kernel = k.kernel(sampling.sample, **sizes, target=k.target)
    return relax.call_tir_inplace(kernel, args, [1, 2, 3, 4], list(call.ty.fields))
