"""Which values four-bit products alone read: their kernels write what `q4_gemm` multiplies."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import tvm
from tvm import relax

from shardwright.compiler.kernels import attention_cuda, q4_gemm
from shardwright.compiler.linear import reads
from shardwright.compiler.lowering.common import Kernels
from shardwright.compiler.propagate import bindings_of
from shardwright.compiler.rules import op_name, operands_of, shape_of

_GATED = ("shardwright.gated_linear", "shardwright.q4_gated_linear")
_NORMS = ("shardwright.add_rms_norm", "shardwright.peer_all_reduce_many_add_rms_norm")
_ATTENTION = ("shardwright.append_attention", "shardwright.append_attention_joined")
_READERS = ("shardwright.q4_linear", "shardwright.q4_gated_linear")


def calls_of_images(k: Kernels, func: relax.Function) -> set[relax.Var]:
    """Variables of the calls of `func` whose result, or norm, is to be written as an image.

    And of reshapes of such results of attention, which are images already.
    """
    if not k.wgmma:
        return set()
    values = {b.var: b.value for b in bindings_of(func)}
    readers: dict[relax.Var, list[relax.Expr]] = defaultdict(list)
    for value in [*values.values(), func.body.body]:
        for x in reads(value):
            readers[x].append(value)
    found = set()
    for var, value in values.items():
        call, unit = value, q4_gemm.COLUMNS
        if _is_call(value, "relax.reshape") and _is_heads(k, value, values, readers):
            if readers[var] and all(_multiplies(k, var, reader) for reader in readers[var]):
                found |= {var, values[value.args[0]].tuple_value}
            continue
        if isinstance(value, relax.TupleGetItem) and value.index == 1:
            call, unit = values.get(value.tuple_value), q4_gemm.NORM_FEATURES
        if not isinstance(call, relax.Call) or op_name(call) not in (
            _NORMS if isinstance(value, relax.TupleGetItem) else _GATED
        ):
            continue
        n, features = shape_of(var)
        fits = not isinstance(n, int) and features % unit == 0
        if unit == q4_gemm.NORM_FEATURES:
            fits = fits and features <= 32 * unit
        if fits and readers[var] and all(_multiplies(k, var, reader) for reader in readers[var]):
            found.add(var if call is value else value.tuple_value)
    return found


def _is_heads(
    k: Kernels,
    reshape: relax.Call,
    values: dict[relax.Var, relax.Expr],
    readers: dict[relax.Var, list[relax.Expr]],
) -> bool:
    """Whether a reshape joins the heads of attention of many tokens, and alone reads them."""
    heads = reshape.args[0]
    item = values.get(heads)
    if not isinstance(item, relax.TupleGetItem) or item.index != 0:
        return False
    call = values.get(item.tuple_value)
    if not any(_is_call(call, name) for name in _ATTENTION) or len(readers[heads]) != 1:
        return False
    n, _, dim = shape_of(heads)
    page = next(shape_of(x)[3] for x in operands_of(call) if len(shape_of(x)) == 5)
    sizes = {"head_dim": dim, "page_size": page, "dtype": str(heads.ty.dtype)}
    supported = attention_cuda.prefill_supported(**sizes, target=k.target, arch=k.arch)
    joined = not isinstance(n, int) and len(shape_of(reshape)) == 2
    return supported and joined and dim % q4_gemm.COLUMNS == 0


def _is_call(value: relax.Expr, name: str) -> bool:
    return isinstance(value, relax.Call) and op_name(value) == name


def fits_q4_gemm(k: Kernels, x: relax.Expr, packed: relax.Expr, scale: relax.Expr) -> bool:
    """Whether `q4_gemm` multiplies x [n, K], or its image, with a weight."""
    (rows, words), columns = shape_of(packed), shape_of(x)[1]
    whole = columns == words * 8 and columns % q4_gemm.COLUMNS == 0 and rows % 8 == 0
    group = columns // shape_of(scale)[1]
    return k.wgmma and whole and group % 32 == 0 and str(x.ty.dtype) == "float16"


def is_image(x: relax.Expr, tokens: Any) -> bool:
    """Whether `x` is the image of a value of `tokens` rows, which it has more of."""
    return not isinstance(tokens, int) and not tvm.sym.Analyzer().can_prove_equal(
        shape_of(x)[0], tokens
    )


def _multiplies(k: Kernels, x: relax.Var, reader: relax.Expr) -> bool:
    if not isinstance(reader, relax.Call) or op_name(reader) not in _READERS:
        return False
    operand, packed, scale = operands_of(reader)
    half = str(reader.ty.dtype) == "float16"
    return half and operand == x and fits_q4_gemm(k, x, packed, scale)
