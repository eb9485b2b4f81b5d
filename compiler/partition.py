"""Partition: rewrite the global view into the local view that every rank runs.

Shapes become local, and a collective is inserted wherever a value must move from the placement it
has to the one that `propagate` asks for. The program stays one for all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relax

from shardwright.compiler.placement import Partial, Placement, Replicate, Shard, local_shape
from shardwright.compiler.propagate import Plan, Step, bindings_of, propagate
from shardwright.compiler.rules import op_name, shape_of
from shardwright.errors import ShardingError


@dataclass(frozen=True)
class Collective:
    """One collective of a function: what moves, and its size per call (per token if symbolic)."""

    kind: str
    value: str
    shape: tuple[Any, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Bytes of the whole value, symbolic dimensions counted as 1."""
        count = int(np.prod([d if isinstance(d, int) else 1 for d in self.shape], dtype=np.int64))
        return count * int(tvm.DataType(self.dtype).bits) // 8


@dataclass
class Partitioned:
    """The local view: module, placement of every local variable, collectives, by function."""

    mod: tvm.IRModule
    placements: dict[str, dict[relax.Var, tuple[Placement, ...]]] = field(default_factory=dict)
    collectives: dict[str, list[Collective]] = field(default_factory=dict)


def partition(mod: tvm.IRModule, params: dict[str, Placement], ranks: int) -> Partitioned:
    """Local view of all functions of `mod` on `ranks` ranks.

    `params` gives placements of arguments by name; all others are replicated. With more than one
    rank, functions that look up a row-sharded table, or have experts that differ by rank, take one
    more argument, `rank` int32 [1].
    """
    out = Partitioned(tvm.IRModule({}))
    for gv, func in mod.functions_items():
        name = gv.name_hint
        plan = propagate(func, params)
        rewriter = _Rewriter(func, plan, ranks)
        out.mod[name] = rewriter.run(name)
        out.placements[name] = rewriter.placements
        out.collectives[name] = rewriter.collectives
    return out


class _Rewriter:
    """Builds the local version of one function."""

    def __init__(self, func: relax.Function, plan: Plan, ranks: int) -> None:
        self.func, self.plan, self.ranks = func, plan, ranks
        self.bb = relax.BlockBuilder()
        self.local: dict[relax.Var, relax.Expr] = {}
        self.moved: dict[tuple[relax.Var, Placement], relax.Expr] = {}
        self.placements: dict[relax.Var, tuple[Placement, ...]] = {}
        self.collectives: list[Collective] = []
        self.rank = relax.Var("rank", relax.TensorType([1], "int32"))

    def run(self, name: str) -> relax.Function:
        """The local function, to be called `name`."""
        params = []
        for p in self.func.params:
            shape = local_shape(shape_of(p), self.plan.of(p))
            local = relax.Var(p.name, relax.TensorType(shape, p.ty.dtype))
            self._bind(p, local)
            params.append(local)
        num_input = int(self.func.attrs["num_input"])
        if self.ranks > 1 and any(map(_needs_rank, self.plan.steps.values())):
            params.insert(num_input, self.rank)
            num_input += 1
        with self.bb.function("local", params, attrs={"num_input": num_input}):
            with self.bb.dataflow():
                for binding in bindings_of(self.func):
                    self._rewrite(binding)
                out = self.bb.emit_output(self._whole_result())
            self.bb.emit_func_output(out)
        (local_func,) = self.bb.get().functions.values()
        return local_func.with_attr("global_symbol", name)

    def _bind(self, var: relax.Var, local: relax.Expr) -> None:
        self.local[var] = local
        if isinstance(local, relax.Var):
            self.placements[local] = self.plan.placements[var]

    def _rewrite(self, binding: relax.VarBinding) -> None:
        var, value = binding.var, binding.value
        if isinstance(value, relax.Call):
            local: relax.Expr = self.bb.emit(self._call(self.plan.steps[var]), var.name)
        elif isinstance(value, relax.TupleGetItem):
            item = relax.TupleGetItem(self.local[value.tuple_value], value.index)
            local = self.bb.emit(item, var.name)
        elif isinstance(value, relax.Tuple):
            local = relax.Tuple([self.local.get(f, f) for f in value.fields])
        else:
            local = self.local[value]
        self._bind(var, local)

    def _whole_result(self) -> relax.Expr:
        """The function's result: what a caller sees must not be Partial."""
        result = self.func.body.body
        placements = self.plan.placements[result]
        if any(isinstance(p, Partial) for p in placements):
            raise ShardingError(f"{self.func.attrs}: a result is Partial; nothing sums it")
        return self.local[result]

    def _call(self, step: Step) -> relax.Expr:
        call = step.call
        packed = isinstance(call.args[0], relax.ExternFunc)
        operands = call.args[1].fields if packed else call.args
        args = [self._moved(x, p) for x, p in zip(operands, step.operands, strict=True)]
        if packed:
            types = call.ty_args[0].fields if len(step.results) > 1 else call.ty_args
            local = [
                relax.TensorType(local_shape(tuple(t.shape.values), p), t.dtype)
                for t, p in zip(types, step.results, strict=True)
            ]
            name = str(call.args[0].global_symbol)
            if local_name := _experts_by_rank(step):
                name, args = local_name, [*args, self.rank]
            return relax.call_dps_packed(name, relax.Tuple(args), local)
        if op_name(call) == "relax.reshape":
            shape = local_shape(shape_of(call), step.results[0])
            return relax.op.reshape(args[0], shape)
        if _is_row_lookup(step):
            return self._lookup(args[0], args[1])
        return relax.Call(call.op, args, call.attrs, call.ty_args)

    def _lookup(self, table: relax.Expr, ids: relax.Expr) -> relax.Expr:
        """Rows this rank holds, zeros for the others: a summand of the lookup."""
        out = relax.TensorType([*shape_of(ids), shape_of(table)[1]], table.ty.dtype)
        return relax.call_dps_packed(
            "shardwright.embed", relax.Tuple([table, ids, self.rank]), out_ty=out
        )

    def _moved(self, expr: relax.Expr, want: Placement) -> relax.Expr:
        """`expr` in placement `want`; a value is moved once, however many calls need it."""
        if not isinstance(expr, relax.Var):
            return expr
        have, local = self.plan.of(expr), self.local[expr]
        if have == want:
            return local
        if (expr, want) not in self.moved:
            if not isinstance(want, Replicate):
                raise ShardingError(f"{expr.name}: no collective turns {have} into {want}")
            move = self._all_reduce if isinstance(have, Partial) else self._all_gather
            moved = move(expr, local)
            self.placements[moved] = (want,)
            self.moved[expr, want] = moved
        return self.moved[expr, want]

    def _record(self, kind: str, expr: relax.Var) -> None:
        self.collectives.append(Collective(kind, expr.name, shape_of(expr), str(expr.ty.dtype)))

    def _all_reduce(self, expr: relax.Var, local: relax.Expr) -> relax.Expr:
        self._record("all-reduce", expr)
        return self.bb.emit(relax.op.ccl.allreduce(local, "sum", True), f"{expr.name}_sum")

    def _all_gather(self, expr: relax.Var, local: relax.Expr) -> relax.Expr:
        """Gather along the sharded dimension, then drop padding and copies.

        The collective stacks ranks along dimension 0, so another dimension is brought there first.
        """
        self._record("all-gather", expr)
        shard = self.plan.of(expr)
        assert isinstance(shard, Shard)
        order = [shard.dim, *[d for d in range(len(shape_of(expr))) if d != shard.dim]]
        back = [order.index(d) for d in range(len(order))]
        x = local if shard.dim == 0 else self.bb.emit(relax.op.permute_dims(local, order))
        x = self.bb.emit(relax.op.ccl.allgather(x, self.ranks, True))
        if shard.local_size * self.ranks != shard.size or not shard.is_contiguous:
            x = self.bb.emit(relax.op.take(x, _owners(shard, self.ranks), axis=0))
        if shard.dim != 0:
            x = self.bb.emit(relax.op.permute_dims(x, back))
        return x


def _needs_rank(step: Step) -> bool:
    return _is_row_lookup(step) or _experts_by_rank(step) is not None


def _experts_by_rank(step: Step) -> str | None:
    """The operation on experts for one rank, where what it does depends on the rank's number.

    It does with whole experts, and where rank 0 alone may add a bias to what all ranks sum.
    """
    name = op_name(step.call)
    if name not in ("shardwright.experts", "shardwright.biased_experts"):
        return None
    weight = step.operands[1]
    if not isinstance(weight, Shard):
        return None
    if weight.dim == 0:
        return name.replace("experts", "local_experts")
    return "shardwright.biased_split_experts" if "biased" in name else None


def _is_row_lookup(step: Step) -> bool:
    if op_name(step.call) != "relax.take":
        return False
    table = step.operands[0]
    if not isinstance(table, Shard) or table.dim != 0:
        return False
    if not table.is_contiguous:
        raise ShardingError("take: a table's rows must be cut in rank order; use even_table")
    return True


def _owners(shard: Shard, ranks: int) -> relax.Expr:
    """For each global element, where the stacked slices of all ranks hold it first."""
    stacked = np.concatenate([shard.index(r) for r in range(ranks)])
    owners = np.full(shard.size, -1, dtype=np.int32)
    for position in range(len(stacked) - 1, -1, -1):
        if stacked[position] >= 0:
            owners[stacked[position]] = position
    if (owners < 0).any():
        raise ShardingError(f"no rank holds some elements of {shard}")
    return relax.const(owners)
