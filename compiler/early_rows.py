"""Rows that a program takes of a result are taken as early as possible.

A prefill needs the logits of each sequence's last token alone. What the last layer does after its
attention it does for every token by itself, so `take` may come before it, and all of that is
computed for a few rows instead of thousands.
"""

from __future__ import annotations

from collections import defaultdict

import tvm
from tvm import relax

from shardwright.compiler.linear import Rewriter, is_call, reads
from shardwright.compiler.propagate import bindings_of
from shardwright.compiler.rules import operands_of, rule_of, shape_of
from shardwright.errors import ShardingError

EARLY_ROWS_PASS = "early_rows"


def early_rows(mod: tvm.IRModule) -> tvm.IRModule:
    """Move `take(x, index, axis=0)` of computed values before operations that work by rows.

    By their sharding rules, in the global view. Only values that nothing but the `take` needs are
    computed of its rows alone; a function may have one such `take`.
    """
    return tvm.IRModule({gv: _rewritten(f, gv.name_hint) for gv, f in mod.functions_items()})


def _rewritten(func: relax.Function, name: str) -> relax.Function:
    values = {b.var: b.value for b in bindings_of(func)}
    takes = [var for var, value in values.items() if _takes_rows(value, values)]
    if len(takes) != 1:
        return func
    last = values[takes[0]]
    index = values.get(last.args[1])
    # The index moves to the front, so it must come from arguments alone.
    if isinstance(index, relax.Call) and any(x in values for x in reads(index)):
        return func
    few = _of_few_rows(func, takes[0], values)
    taken: dict[relax.Expr, relax.Var] = {}

    def rows_of(rw: Rewriter, x: relax.Expr) -> relax.Expr:
        if x in few:
            return rw.local(x)
        if x not in taken:
            if last.args[1] not in rw.vars and isinstance(index, relax.Call):
                rw.vars[last.args[1]] = rw.bb.emit(rw.copy(index), last.args[1].name)
            taken[x] = rw.bb.emit(relax.op.take(rw.local(x), rw.local(last.args[1]), axis=0))
        return taken[x]

    def rewrite(rw: Rewriter, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        if var == takes[0] and call.args[0] in few:
            return rw.local(call.args[0])
        if var in rw.vars:
            return rw.vars[var]  # the index, which has moved
        if var not in few:
            return None
        by_row = _row_operands(call)
        assert by_row is not None
        args = [
            rows_of(rw, x) if rows else rw.local(x)
            for x, rows in zip(operands_of(call), by_row, strict=True)
        ]
        if not isinstance(call.args[0], relax.ExternFunc):
            return relax.Call(call.op, args, call.attrs, call.ty_args)
        shape = [shape_of(last)[0], *shape_of(call)[1:]]
        out = relax.TensorType(shape, call.ty.dtype)
        return relax.call_dps_packed(call.args[0], relax.Tuple(args), out_ty=out)

    return Rewriter(func, rewrite).run(name) if few else func


def _takes_rows(value: relax.Expr, values: dict[relax.Var, relax.Expr]) -> bool:
    return (
        is_call(value, "relax.take")
        and value.args[0] in values
        and int(value.attrs.axis) == 0
        and len(shape_of(value.args[1])) == 1
    )


def _of_few_rows(
    func: relax.Function, take: relax.Var, values: dict[relax.Var, relax.Expr]
) -> set[relax.Var]:
    """Values of operations by rows of which nothing but `take` needs any row."""
    uses: dict[relax.Var, list[relax.Var | None]] = defaultdict(list)
    for var, value in [*values.items(), (None, func.body.body)]:
        for x in reads(value):
            uses[x].append(var)
    few: set[relax.Var] = set()
    for var, value in reversed(values.items()):
        if not isinstance(value, relax.Call) or _row_operands(value) is None or not uses[var]:
            continue
        if all(
            (user == take and values[take].args[1] != var)
            or (user in few and _only_by_rows(var, values[user]))
            for user in uses[var]
        ):
            few.add(var)
    return few


def _only_by_rows(var: relax.Var, call: relax.Call) -> bool:
    by_row = _row_operands(call)
    assert by_row is not None
    return all(rows for x, rows in zip(operands_of(call), by_row, strict=True) if x == var)


def _row_operands(call: relax.Call) -> list[bool] | None:
    """Which operands have a row for each row of the result; None if that is not the operation."""
    try:
        rule = rule_of(call)
    except ShardingError:
        return None
    # A result's shape that is given as an operand would have to change.
    if len(rule.results) != 1 or any(isinstance(x, relax.ShapeExpr) for x in operands_of(call)):
        return None
    (result,) = rule.results
    if not result or len(result[0]) != 1 or len(rule.operands) != len(operands_of(call)):
        return None
    (row,) = result[0]
    by_row = [bool(term) and term[0] == (row,) for term in rule.operands]
    inside = [
        any(row in dim for dim in term[rows:])
        for term, rows in zip(rule.operands, by_row, strict=True)
    ]
    return by_row if any(by_row) and not any(inside) else None
