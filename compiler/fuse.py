"""Fusions: chains of operations of the local view become one abstract operation.

Each is a pass of its own, which can be left out to find what changed a result. What a target has
no kernel for, `lower` takes apart again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeAlias

import tvm
from tvm import relax, tirx

from shardwright.compiler.linear import Rewriter, is_call, reads
from shardwright.compiler.propagate import bindings_of
from shardwright.compiler.rules import op_name, operands_of, shape_of

Rewrite: TypeAlias = Callable[[Rewriter, relax.Var, relax.Call], relax.Expr | None]

GATED = {
    "shardwright.linear": "shardwright.gated_linear",
    "shardwright.q4_linear": "shardwright.q4_gated_linear",
}

APPENDING = {
    "shardwright.rotary_append": "shardwright.append_attention",
    "shardwright.rotary_append_joined": "shardwright.append_attention_joined",
}


def fuse_qkv(mod: tvm.IRModule) -> tvm.IRModule:
    """`rotary_append` of three adjacent slices of one value reads them from it.

    It becomes `shardwright.rotary_append_joined(qkv [n, (H + 2K) * D], table, ...)`.
    """

    def rewrite(rw: Rewriter, _var: relax.Var, call: relax.Call) -> relax.Expr | None:
        if op_name(call) != "shardwright.rotary_append":
            return None
        args = operands_of(call)
        whole = _adjacent(rw, [_source(rw, x, "relax.reshape") for x in args[:3]])
        if whole is None:
            return None
        return relax.call_dps_packed(
            "shardwright.rotary_append_joined",
            relax.Tuple([rw.local(whole), *map(rw.local, args[3:])]),
            out_ty=list(call.ty.fields),
        )

    return _for_each(mod, lambda _: rewrite)


def fuse_append_attention(mod: tvm.IRModule) -> tvm.IRModule:
    """`rotary_append`, and the attention of the tokens that it appends, become one operation.

    It is `shardwright.append_attention(q, k, v, table, k_pages, v_pages, page_table, rows,
    positions, layer, scale, window, softcap) -> (out, k_pages, v_pages)`, or
    `append_attention_joined(qkv, table, ...)`.
    """

    def fuse(func: relax.Function) -> Rewrite:
        uses = _uses(func)

        def rewrite(rw: Rewriter, _var: relax.Var, call: relax.Call) -> relax.Expr | None:
            if op_name(call) != "shardwright.attention":
                return None
            q, k_pages, v_pages, *rest = operands_of(call)
            items = [rw.values.get(x) for x in (q, k_pages, v_pages)]
            found = [x for x in items if isinstance(x, relax.TupleGetItem)]
            if [x.index for x in found] != [0, 1, 2] or uses[q] != 1:
                return None
            append = rw.value_of(found[0].tuple_value)
            if append is None or op_name(append) not in APPENDING:
                return None
            where, masks, appended = rest[:4], rest[4:], operands_of(append)[-4:]
            if any(x.tuple_value != found[0].tuple_value for x in found[1:]):
                return None
            # Of the same tokens, and of the same layer.
            if appended[:3] != where[:3] or appended[3].value != where[3].value:
                return None
            fused = relax.call_dps_packed(
                APPENDING[op_name(append)],
                relax.Tuple([rw.local(x) for x in [*operands_of(append), *masks]]),
                out_ty=[call.ty, k_pages.ty, v_pages.ty],
            )
            results = rw.bb.emit(fused)
            # The append itself is left without a reader, and is dropped.
            for i, pages in enumerate((k_pages, v_pages), 1):
                rw.vars[pages] = rw.bb.emit(relax.TupleGetItem(results, i), pages.name)
            return relax.TupleGetItem(results, 0)

        return rewrite

    return _for_each(mod, fuse)


def fuse_add_norm(mod: tvm.IRModule) -> tvm.IRModule:
    """`s = add(x, y); h = rms_norm(s, w)` becomes one operation with both results.

    It is `shardwright.add_rms_norm(x, y, w, eps) -> (s, h)`.
    """

    def fuse(func: relax.Function) -> Rewrite:
        norms: dict[relax.Var, tuple[relax.Var, relax.Call]] = {}
        for b in bindings_of(func):
            if is_call(b.value, "relax.nn.rms_norm") and [int(a) for a in b.value.attrs.axes] == [
                -1
            ]:
                norms.setdefault(b.value.args[0], (b.var, b.value))
        results: dict[relax.Var, relax.Expr] = {}

        def rewrite(rw: Rewriter, var: relax.Var, call: relax.Call) -> relax.Expr | None:
            if var in results:
                return results[var]
            if op_name(call) != "relax.add" or var not in norms:
                return None
            normed, norm = norms[var]
            (x, y), weight = call.args, norm.args[1]
            # The norm's weight must be known where the sum stands, and nothing be broadcast.
            if weight not in rw.params or not shape_of(x) == shape_of(y):
                return None
            eps = relax.prim_value(tirx.FloatImm("float64", float(norm.attrs.epsilon)))
            fused = relax.call_dps_packed(
                "shardwright.add_rms_norm",
                relax.Tuple([*map(rw.local, (x, y, weight)), eps]),
                out_ty=[call.ty, normed.ty],
            )
            both = rw.bb.emit(fused, f"{var.name}_norm")
            results[normed] = rw.bb.emit(relax.TupleGetItem(both, 1), normed.name)
            return relax.TupleGetItem(both, 0)

        return rewrite

    return _for_each(mod, fuse)


def fuse_silu_mul(mod: tvm.IRModule) -> tvm.IRModule:
    """`silu(gate) * up`, of the halves of one product that serves nothing else, joins the product.

    `shardwright.linear` becomes `shardwright.gated_linear`, with half as many columns.
    """

    def fuse(func: relax.Function) -> Rewrite:
        uses = _uses(func)

        def rewrite(rw: Rewriter, _var: relax.Var, call: relax.Call) -> relax.Expr | None:
            if op_name(call) != "relax.multiply":
                return None
            gate, up = _source(rw, call.args[0], "relax.nn.silu"), call.args[1]
            whole = _adjacent(rw, [gate, up])
            product = rw.value_of(whole)
            if product is None or op_name(product) not in GATED or shape_of(gate) != shape_of(up):
                return None
            # Halves or a whole that something else reads would be computed a second time.
            if (uses[whole], uses[gate], uses[up]) != (2, 1, 1):
                return None
            args = relax.Tuple([rw.local(x) for x in operands_of(product)])
            return relax.call_dps_packed(GATED[op_name(product)], args, out_ty=call.ty)

        return rewrite

    return _for_each(mod, fuse)


def _for_each(mod: tvm.IRModule, fuse: Callable[[relax.Function], Rewrite]) -> tvm.IRModule:
    return tvm.IRModule(
        {gv: Rewriter(f, fuse(f)).run(gv.name_hint) for gv, f in mod.functions_items()}
    )


def _uses(func: relax.Function) -> Counter[relax.Var]:
    """How many times each variable is read."""
    values = [binding.value for binding in bindings_of(func)]
    return Counter(var for value in [*values, func.body.body] for var in reads(value))


def _source(rw: Rewriter, expr: relax.Expr, op: str) -> relax.Expr:
    """The operand of the `op` that made `expr`, or `expr` if another did."""
    call = rw.value_of(expr)
    return call.args[0] if call is not None and op_name(call) == op else expr


def _adjacent(rw: Rewriter, parts: list[relax.Expr]) -> relax.Expr | None:
    """The matrix whose columns `parts` are, in order and without a gap, if there is one."""
    whole, end = None, 0
    for part in parts:
        call = rw.value_of(part)
        if call is None or op_name(call) != "relax.strided_slice" or len(call.args) != 4:
            return None
        source, axes, begins, ends = call.args
        if [int(a) for a in axes.fields] != [1] or int(begins.fields[0]) != end:
            return None
        if whole is not None and source != whole:
            return None
        whole, end = source, int(ends.fields[0])
    return whole if whole is not None and shape_of(whole)[1:] == (end,) else None


FUSIONS: dict[str, Callable[[tvm.IRModule], tvm.IRModule]] = {
    "fuse_qkv": fuse_qkv,
    "fuse_append_attention": fuse_append_attention,
    "fuse_add_norm": fuse_add_norm,
    "fuse_silu_mul": fuse_silu_mul,
}
"""The fusions by the name that leaves them out, in the order they run."""
