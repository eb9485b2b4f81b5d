"""Lowerings of look-ups: rows of a table by number, plain or quantized."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, te

from shardwright.compiler.kernels import matmul, quantized, send_embed
from shardwright.compiler.lowering.common import (
    Kernels,
    packing_of,
    product_of,
    tokens_of,
    value_of,
)
from shardwright.compiler.rules import shape_of


def lower_embed(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """Rows of a table cut along its rows; zeros for a row that another rank holds."""
    rows = shape_of(args[0])[0]

    def lookup(table: te.Tensor, ids: te.Tensor, rank: te.Tensor) -> te.Tensor:
        def element(i: Any, j: Any) -> Any:
            row = ids[i] - rank[0] * rows
            inside = tvm.tirx.all(row >= 0, row < rows)
            # An address is formed in any case, so it must lie inside the table.
            safe = tvm.tirx.if_then_else(inside, row, 0)
            return tvm.tirx.if_then_else(inside, table[safe, j], tvm.tirx.const(0, table.dtype))

        return te.compute((ids.shape[0], table.shape[1]), element, name="embed")

    return k.bb.call_te(lookup, *args, primfunc_name_hint="embed")


def lower_q4_embed(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """`lower_embed` of a four-bit table, `(packed [V, E/8], scale, ids [n]) -> [n, E]`.

    A fourth operand is the rank's number, where the table is cut along its rows.
    """
    packed, scale, ids, *rank = args
    rows, words = shape_of(packed)
    n, features = shape_of(call)
    kernel = k.kernel(
        matmul.q4_take,
        tokens=tokens_of(k, ids),
        vocab_rows=rows,
        features=words * 8,
        group=words * 8 // shape_of(scale)[1],
        dtype=str(call.ty.dtype),
        target=k.target,
    )
    # A table that is not sharded starts at row 0, as rank 0's does.
    first = rank[0] if rank else relax.const([0], "int32")
    whole = relax.TensorType([n, words * 8], call.ty.dtype)
    found = relax.call_tir(kernel, [packed, scale, ids, first], whole)
    if features == words * 8:
        return found
    return relax.op.strided_slice(k.bb.emit(found), [1], [0], [features])


def lower_send_embed(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """The look-up of one row, sent to all ranks as a summand: zeros from those without it."""
    *operands, first = args
    *table, _ids, peers, _rank, calls, _place = operands
    sizes = product_of(table, gated=False)
    kernel = k.kernel(
        send_embed.send_embed,
        table_rows=sizes.out_features,
        features=sizes.in_features,
        group=sizes.group,
        ranks=shape_of(peers)[0] - 1,
        rows=shape_of(calls)[0],
        first_word=value_of(first),
    )
    return relax.call_tir(kernel, operands, call.ty)


def lower_quantized_embed(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """`lower_embed` of a table in any other format, whose attributes are the last operands."""
    words, *rest = args[:-3]
    sides = [t for t in rest if len(shape_of(t)) == 2]
    ids, *rank = rest[len(sides) :]
    packing, columns = packing_of(words, sides, args[-3:])
    n, features = shape_of(call)
    kernel = k.kernel(
        quantized.quantized_take,
        tokens=tokens_of(k, ids),
        vocab_rows=shape_of(words)[0],
        features=columns,
        packing=packing,
        dtype=str(call.ty.dtype),
        target=k.target,
    )
    first = rank[0] if rank else relax.const([0], "int32")
    whole = relax.TensorType([n, columns], call.ty.dtype)
    found = relax.call_tir(kernel, [words, *sides, ids, first], whole)
    if features == columns:
        return found
    return relax.op.strided_slice(k.bb.emit(found), [1], [0], [features])


def lower_take(k: Kernels, _call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """Slices along dimension 0 by indices that are known to be in range."""

    def pick(data: te.Tensor, ids: te.Tensor) -> te.Tensor:
        def element(i: Any, *rest: Any) -> Any:
            index = (ids[i], *rest)
            return data[index]

        return te.compute((ids.shape[0], *data.shape[1:]), element, name="take")

    return k.bb.call_te(pick, *args, primfunc_name_hint="take")
