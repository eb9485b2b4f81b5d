"""From a model definition to its program in local view, before any kernel exists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from shardwright.compiler import linear, pipeline
from shardwright.compiler.axes import AXIS_RULES, EXPERT_PARALLEL, AxisRules, DeviceMesh
from shardwright.compiler.columns import Quantized
from shardwright.compiler.early_rows import EARLY_ROWS_PASS, early_rows
from shardwright.compiler.explain import explain
from shardwright.compiler.partition import Partitioned, partition
from shardwright.compiler.placement import Placement, Shard
from shardwright.compiler.rules import shape_of
from shardwright.compiler.scheme import Scheme
from shardwright.compiler.stored import experts_as_matrices, matrix_placement, matrix_shape
from shardwright.compiler.trace import Limits, Traced, trace
from shardwright.compiler.verify import verify
from shardwright.compiler.weights import Source, Weight
from shardwright.errors import UsageError
from shardwright.model_defs.layers import Stored

MAX_UNIT = 256
"""A quantization group up to this size is not cut, at the price of padding."""


@dataclass(frozen=True)
class Program:
    """A partitioned program before lowering: what `compile_program` takes.

    `orders` says in text how each weight in act-order gets its activations.
    """

    traced: Traced
    partitioned: Partitioned
    mod: tvm.IRModule
    weights: dict[str, Weight]
    placements: dict[str, Placement]
    mesh: DeviceMesh
    orders: tuple[str, ...] = ()
    quantized: Mapping[str, Quantized] = field(default_factory=dict)
    """How weights are quantized, by their names in the checkpoint."""

    def explanation(self) -> str:
        """The text of `--explain`."""
        state = {name: (s.shape, self.placements[name]) for name, s in self.traced.state.items()}
        shapes = {p.name: shape_of(p) for p in self.traced.mod["prefill"].params}
        # As the model has them: experts are matrices in the weights.
        model = {name: (shapes[name], self.placements[name]) for name in self.traced.param_axes}
        weights, local = self.weights.values(), self.partitioned
        return explain(self.mesh, weights, state, local, model, self.orders)


def partition_program(
    model: Any,
    scheme: Scheme,
    limits: Limits,
    ranks: int,
    dump_ir: Path | None = None,
    expert_parallel: bool = False,
    disable_pass: tuple[str, ...] = (),
) -> Program:
    """Trace, partition, verify, join and quantize: the local program before any kernel exists.

    With `expert_parallel` a rank has whole experts; UsageError if the model has none.
    """
    traced = trace(model, scheme.dtype, limits)
    pipeline.dump(traced.mod, dump_ir, "0-traced")
    mesh = DeviceMesh(("tp",), (ranks,))
    if expert_parallel and not any("experts" in axes for axes in traced.param_axes.values()):
        raise UsageError("--expert-parallel: this model has no experts; leave it out")
    shapes = {p.name: shape_of(p) for p in traced.mod["prefill"].params}
    dtypes = {p.name: str(p.ty.dtype) for p in traced.mod["prefill"].params}
    quantized = {
        # A router is small, and what it says must not change.
        name: scheme.quantized(
            _checkpoint_name(name, traced.stored.get(name)),
            matrix_shape(shapes[name]),
            axes[-2:],
            model.config,
        )
        if axes[0] != "router" and dtypes[name] == scheme.dtype
        else None
        for name, axes in traced.param_axes.items()
    }
    rules = AxisRules(
        mesh,
        model.config,
        _units(traced.param_axes, shapes, quantized),
        EXPERT_PARALLEL if expert_parallel else AXIS_RULES,
    )
    placements = {n: rules.placement(shapes[n], axes) for n, axes in traced.param_axes.items()}
    placements |= {s.name: rules.placement(s.shape, s.axes) for s in traced.state.values()}
    # A prefill's tokens are the chunk's, and share names with per-row state; none is sharded.
    whole = traced.mod if EARLY_ROWS_PASS in disable_pass else early_rows(traced.mod)
    partitioned = partition(whole, placements, ranks)
    verify(partitioned, placements, ranks)
    pipeline.dump(partitioned.mod, dump_ir, "1-partitioned")

    table = {
        n: Weight(
            n,
            (_source(n, shapes[n], placements[n], traced.stored.get(n), quantized[n]),),
            dtypes[n],
        )
        for n in traced.param_axes
    }
    mod = linear.name_linears(experts_as_matrices(partitioned.mod))
    orders = _plan_orders(mod, table)
    weights = linear.Weights(table)
    mod = linear.join_linears(mod, weights)
    mod = linear.quantize(mod, weights)
    pipeline.dump(mod, dump_ir, "2-linear")
    kept = {
        _checkpoint_name(name, traced.stored.get(name)): how
        for name, how in quantized.items()
        if how is not None
    }
    return Program(traced, partitioned, mod, weights.table, placements, mesh, tuple(orders), kept)


def _source(
    name: str,
    shape: tuple[int, ...],
    placement: Placement,
    stored: Stored | None,
    quantized: Quantized | None,
) -> Source:
    """The tensor of the checkpoint that parameter `name` is."""
    experts = shape[0]
    shape, placement = matrix_shape(shape), matrix_placement(shape, placement)
    if stored is None or stored.path is None:
        return Source(name, shape, placement, quantized, plus=stored.plus if stored else 0.0)
    return Source(
        name,
        shape,
        placement,
        quantized,
        stored.plus,
        joined=_checkpoint_name(name, stored),
        first=stored.first,
        step=stored.step,
        experts=experts if stored.transposed else 0,
    )


def _checkpoint_name(name: str, stored: Stored | None) -> str:
    """The tensor of the checkpoint that parameter `name` is, or is part of."""
    if stored is None or stored.path is None:
        return name
    module = name.split(".")[:-1]
    path = stored.path
    while path.startswith("../"):
        module, path = module[:-1], path[3:]
    return ".".join([*module, path])


def _plan_orders(mod: tvm.IRModule, table: dict[str, Weight]) -> list[str]:
    """Decide for each weight in act-order how its activations come in the order of its groups.

    Where only elementwise operations lie between it and the products before, their rows are
    permuted once and for all. Else every rank permutes its own activations before the product.
    """
    lines = []
    for name, weight in table.items():
        (source,) = weight.sources
        if source.quantized is None or source.quantized.group_of is None:
            continue
        before = linear.producers(mod, name)
        if before and all(table[p].sources[0].rows is None for p in before):
            order = np.argsort(source.quantized.group_of, kind="stable")
            table[name] = replace(weight, sources=(replace(source, order=order),))
            for p in before:
                rows = replace(table[p].sources[0], rows=order)
                table[p] = replace(table[p], sources=(rows,))
            lines.append(f"{name}: rows of {', '.join(before)} permuted; nothing at run time")
            continue
        cut = isinstance(source.placement, Shard) and source.placement.dim == 1
        where = "its own columns, sorted by group and padded" if cut else "all of its columns"
        lines.append(f"{name}: each rank permutes the activations of {where}; nothing is sent")
    return lines


def _units(
    axes: dict[str, tuple[str, ...]],
    shapes: dict[str, tuple[int, ...]],
    quantized: dict[str, Quantized | None],
) -> dict[str, int]:
    """Elements that a cut should not part, by logical axis: the largest group along it."""
    units: dict[str, int] = {}
    for name, how in quantized.items():
        if how is not None and how.packing.group < min(shapes[name][-1], MAX_UNIT + 1):
            axis = axes[name][-1]
            units[axis] = max(units.get(axis, 0), how.packing.group)
    return units
