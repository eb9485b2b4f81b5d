"""Verify: what every partitioned module must satisfy. Runs on every build.

It does not trust the rewrite: it walks the local module, follows placements from the arguments
through the rules and the collectives, and demands that nothing has to move any more.
"""

from __future__ import annotations

import tvm
from tvm import relax

from shardwright.compiler.partition import Partitioned
from shardwright.compiler.placement import Partial, Placement, Replicate, Shard
from shardwright.compiler.propagate import Plan, bindings_of, step_of
from shardwright.compiler.rules import op_name, operands_of, shape_of
from shardwright.errors import ShardingError


def verify(partitioned: Partitioned, params: dict[str, Placement], ranks: int) -> None:
    """Raise ShardingError if the local view can be wrong on some rank.

    Checked: no control flow, so that every rank runs the same collectives in the same order; every
    operation has a rule and gets its operands where the rule wants them; a sharded dimension has
    its local length; an all-reduce sums a Partial value and an all-gather joins a sharded one;
    nothing Partial is returned.
    """
    for gv, func in partitioned.mod.functions_items():
        _Verifier(gv.name_hint, ranks).run(func, params)


class _Verifier:
    """Placements of one local function, derived again."""

    def __init__(self, name: str, ranks: int) -> None:
        self.name, self.ranks = name, ranks
        self.plan = Plan()
        self.stacked: dict[relax.Var, Shard] = {}

    def run(self, func: relax.Function, params: dict[str, Placement]) -> None:
        """Check the whole function."""
        for p in func.params:
            self._place(p, (params.get(p.name, Replicate()),))
        for binding in bindings_of(func):
            var, value = binding.var, binding.value
            if isinstance(value, relax.Call):
                self._place(var, self._call(var, value))
            elif isinstance(value, relax.TupleGetItem):
                self._place(var, (self.plan.placements[value.tuple_value][value.index],))
            elif isinstance(value, relax.Tuple):
                self._place(var, tuple(self.plan.of(f) for f in value.fields))
            else:
                self._place(var, self.plan.placements[value])
        result = func.body.body
        fields = result.fields if isinstance(result, relax.Tuple) else [result]
        if any(isinstance(p, Partial) for f in fields for p in self.plan.placements.get(f, ())):
            raise self._fault("it returns a Partial value, which no collective has summed")

    def _fault(self, message: str) -> ShardingError:
        return ShardingError(f"{self.name}: {message}; the partitioner is at fault")

    def _place(self, var: relax.Var, placements: tuple[Placement, ...]) -> None:
        self.plan.placements[var] = placements
        if not isinstance(var.ty, relax.TensorType):
            return
        placement = placements[0]
        if isinstance(placement, Shard):
            local = shape_of(var)[placement.dim]
            if local != placement.local_size:
                raise self._fault(
                    f"{var.name} has {local} elements along dimension {placement.dim}, its "
                    f"placement {placement} means {placement.local_size}"
                )

    def _call(self, var: relax.Var, call: relax.Call) -> tuple[Placement, ...]:
        name = op_name(call)
        if name == "relax.ccl.allreduce":
            if not isinstance(self.plan.of(call.args[0]), Partial):
                raise self._fault(f"{var.name} sums a value that is whole already")
            return (Replicate(),)
        if name == "relax.ccl.allgather":
            return (self._gather(var, call.args[0]),)
        if name == "relax.take" and call.args[0] in self.stacked:
            return self._unstack(var, call)
        step = step_of(call, self.plan, set())
        for operand, want in zip(operands_of(call), step.operands, strict=True):
            if self.plan.of(operand) != want:
                raise self._fault(
                    f"{name} reads {operand.name} as {self.plan.of(operand)}, which must be {want}"
                )
        return step.results

    def _gather(self, var: relax.Var, operand: relax.Var) -> Placement:
        shard = self.plan.of(operand)
        if not isinstance(shard, Shard) or shard.dim != 0:
            raise self._fault(f"{var.name} gathers {operand.name}, which is {shard}")
        if shard.is_contiguous and shard.local_size * self.ranks == shard.size:
            return Replicate()
        # Padding and copies are still in it. Nothing but the take that drops them may read it:
        # as Partial, any other use is refused.
        self.stacked[var] = shard
        return Partial()

    def _unstack(self, var: relax.Var, call: relax.Call) -> tuple[Placement, ...]:
        shard, picked = self.stacked[call.args[0]], call.args[1]
        if not isinstance(picked, tvm.ir.GenericConst):
            raise self._fault(f"{var.name} does not drop the padding of a gathered value")
        stacked = [i for r in range(self.ranks) for i in shard.index(r)]
        if [stacked[i] for i in picked.value.numpy()] != list(range(shard.size)):
            raise self._fault(f"{var.name} does not restore the order of a gathered value")
        return (Replicate(),)
