"""Propagate: from the placements of a function's arguments to those of all its values.

An analysis: it changes nothing. For each call it decides where the operands must lie and where the
results then lie, from the call's rule alone. Partition carries the decisions out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tvm import relax

from shardwright.compiler.placement import Partial, Placement, Replicate, Shard
from shardwright.compiler.rules import Rule, Term, op_name, operands_of, rule_of
from shardwright.errors import ShardingError


@dataclass(frozen=True)
class Step:
    """One call: placements its operands must have, and its results will have."""

    call: relax.Call
    operands: tuple[Placement, ...]
    results: tuple[Placement, ...]


@dataclass
class Plan:
    """Placement of every variable of one function, and the step of every call."""

    placements: dict[relax.Var, tuple[Placement, ...]] = field(default_factory=dict)
    steps: dict[relax.Var, Step] = field(default_factory=dict)
    moved: dict[relax.Var, Placement] = field(default_factory=dict)

    def of(self, expr: relax.Expr) -> Placement:
        """Placement of one operand; constants and attributes are replicated."""
        return self.placements[expr][0] if isinstance(expr, relax.Var) else Replicate()

    def available(self, expr: relax.Expr) -> Placement:
        """As `of`, but where an earlier call already moved the value, the placement it moved to."""
        return self.moved.get(expr) or self.of(expr)


def propagate(func: relax.Function, params: dict[str, Placement]) -> Plan:
    """Placements of all values of `func`, given those of its parameters by name (else Replicate).

    Raises ShardingError where an operation has no rule, or a parameter would have to move.
    """
    plan = Plan({p: (params.get(p.name, Replicate()),) for p in func.params})
    # Values made of sharded parameters alone: weights, which must never move at run time.
    weights = {p for p in func.params if isinstance(plan.of(p), Shard)}
    for binding in bindings_of(func):
        var, value = binding.var, binding.value
        if isinstance(value, relax.Call):
            step = step_of(value, plan, weights)
            if all(x in weights for x in operands_of(value)):
                weights.add(var)
            plan.steps[var] = step
            for x, placement in zip(operands_of(value), step.operands, strict=True):
                if isinstance(x, relax.Var) and placement != plan.of(x):
                    plan.moved[x] = placement
            plan.placements[var] = step.results
        elif isinstance(value, relax.TupleGetItem):
            plan.placements[var] = (plan.placements[value.tuple_value][value.index],)
        elif isinstance(value, relax.Tuple):
            plan.placements[var] = tuple(plan.of(f) for f in value.fields)
        elif isinstance(value, relax.Var):
            plan.placements[var] = plan.placements[value]
        else:
            raise ShardingError(f"{type(value).__name__} has no sharding rule")
    return plan


def bindings_of(func: relax.Function) -> Iterator[relax.VarBinding]:
    """The bindings of a function in order. Raises ShardingError for control flow."""
    if not isinstance(func.body, relax.SeqExpr):
        raise ShardingError("only straight-line functions can be partitioned")
    for block in func.body.blocks:
        yield from block.bindings


def step_of(call: relax.Call, plan: Plan, weights: set[relax.Var]) -> Step:
    """Where the operands of `call` must lie, given `plan` so far, and where its results will.

    Raises ShardingError if it has no rule, or if one of `weights` would have to move.
    """
    rule, name = rule_of(call), op_name(call)
    operands = operands_of(call)
    if len(operands) != len(rule.operands):
        raise ShardingError(f"{name}: {len(operands)} operands, its rule has {len(rule.operands)}")
    have = [plan.available(x) for x in operands]
    want = [_settle_partial(p, rule, have) for p in have]
    cuts = _factor_cuts(rule, want)
    for i, (placement, term) in enumerate(zip(want, rule.operands, strict=True)):
        if not isinstance(placement, Shard):
            continue
        dim = term[placement.dim]
        if not dim or cuts.get(dim[0]) is None:
            if operands[i] in weights:
                raise ShardingError(
                    f"{name}: the cut of weight {operands[i].name} ({placement}) does not fit "
                    "its other operands; change AXIS_RULES or the parameter's logical axes"
                )
            want[i] = Replicate()
    if rule.check:
        rule.check({f: cuts.get(f) for term in rule.operands for dim in term for f in dim})
    return Step(call, tuple(want), _results(rule, want, cuts, name))


def _settle_partial(placement: Placement, rule: Rule, have: list[Placement]) -> Placement:
    """A Partial operand stays so if the operation is linear in it; else it must be summed."""
    partial = [p for p in have if isinstance(p, Partial)]
    stays = (rule.linear == "all" and len(partial) == len(have)) or (
        rule.linear == "one" and len(partial) == 1 and not any(isinstance(p, Shard) for p in have)
    )
    return Replicate() if isinstance(placement, Partial) and not stays else placement


def _factor_cuts(rule: Rule, placements: list[Placement]) -> dict[str, Shard | None]:
    """The cut of each factor on which all operands that have it agree; None where they differ."""
    cuts: dict[str, Shard | None] = {}
    for term, placement in zip(rule.operands, placements, strict=True):
        for d, dim in enumerate(term):
            if not dim or not dim[0][0].islower():
                continue
            cut = None
            if isinstance(placement, Shard) and placement.dim == d:
                cut = _as_factor(placement, dim, rule)
            cuts[dim[0]] = cut if cuts.get(dim[0], cut) == cut else None
    return cuts


def _as_factor(shard: Shard, dim: tuple[str, ...], rule: Rule) -> Shard | None:
    """The cut of a dimension seen as a cut of its major factor; None if it cuts a minor one."""
    minor = 1
    for factor in dim[1:]:
        minor *= rule.sizes[factor]
    if shard.unit % minor:
        return None
    return shard.scaled(minor, divide=True).with_dim(0)


def _results(
    rule: Rule, operands: list[Placement], cuts: dict[str, Shard | None], name: str
) -> tuple[Placement, ...]:
    summed = any(cuts.get(f) is not None for f in rule.sums)
    if summed or any(isinstance(p, Partial) for p in operands):
        return tuple(Partial() for _ in rule.results)
    return tuple(_result(term, rule, cuts, name) for term in rule.results)


def _result(term: Term, rule: Rule, cuts: dict[str, Shard | None], name: str) -> Placement:
    found = []
    for d, dim in enumerate(term):
        cut = cuts.get(dim[0]) if dim else None
        if cut is not None:
            for factor in dim[1:]:
                cut = cut.scaled(rule.sizes[factor])
            found.append(cut.with_dim(d))
    if len(found) > 1:
        raise ShardingError(f"{name}: two dimensions of its result would be sharded")
    return found[0] if found else Replicate()
