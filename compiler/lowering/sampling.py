"""Lowerings of the step from logits to the next token."""

from __future__ import annotations

from tvm import relax

from shardwright.compiler.kernels import sampling, sampling_cuda
from shardwright.compiler.lowering.common import Kernels
from shardwright.compiler.rules import shape_of


def lower_store_logits(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """Keep the new logits [b, V] of the rows that have some, in place."""
    vocab = shape_of(args[2])[1]
    kernel = k.kernel(sampling.store_logits, batch=None, vocab=vocab, target=k.target)
    return relax.call_tir_inplace(kernel, args, [2], call.ty)


def lower_sample(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """The next token of each row, in place; on sm_90 and later by clusters of blocks."""
    vocab, max_len = shape_of(args[0])[1], shape_of(args[4])[1]
    sizes = {"batch": None, "vocab": vocab, "max_len": max_len}
    if k.arch >= 90:
        kernel = k.kernel(sampling_cuda.sample, **sizes)
    else:
        kernel = k.kernel(sampling.sample, **sizes, target=k.target)
    return relax.call_tir_inplace(kernel, args, [1, 2, 3, 4], list(call.ty.fields))
