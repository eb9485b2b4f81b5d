"""`--explain`: what the partitioner decided, as text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import tvm
from tvm import relax

from shardwright.compiler.axes import DeviceMesh
from shardwright.compiler.partition import Collective, Partitioned
from shardwright.compiler.placement import Placement, Shard, local_shape
from shardwright.compiler.propagate import bindings_of
from shardwright.compiler.rules import op_name, operands_of
from shardwright.compiler.weights import Weight

LAYER = r"\.\d+\."
"""The number of a layer in a parameter's name."""

COLLECTIVES = {"relax.ccl.allreduce": "all-reduce", "relax.ccl.allgather": "all-gather"}


def explain(
    mesh: DeviceMesh,
    weights: Iterable[Weight],
    state: dict[str, tuple[tuple[int, ...], Placement]],
    partitioned: Partitioned,
    model: Mapping[str, tuple[tuple[int, ...], Placement]] | None = None,
    orders: Iterable[str] = (),
) -> str:
    """Placements of weights, state and values, and collectives with their bytes for each call.

    `model` has shapes and placements of parameters where they differ from those of the weights.
    `orders` says how weights in act-order get their activations.
    """
    weights = list(weights)
    axes = ", ".join(f"{a}={n}" for a, n in zip(mesh.axes, mesh.shape, strict=True))
    shown = {s.name: (s.shape, s.placement) for w in weights for s in w.sources} | dict(model or {})
    lines = [f"DeviceMesh({axes})", "", "Weights: global -> local shape, placement"]
    lines += _table(_placed(name, *where) for name, where in shown.items())
    formats = [(w.name, _format(w)) for w in weights if w.columns]
    if formats:
        lines += ["", "Quantized weights: local columns, codes, groups", *_table(formats)]
    if orders:
        lines += ["", "Act-order", *_table((line,) for line in orders)]
    lines += ["", "State that is sharded"]
    lines += _table(
        _placed(name, shape, placement)
        for name, (shape, placement) in state.items()
        if isinstance(placement, Shard)
    )
    for name in ("decode_1", "prefill"):
        values = _values(partitioned, name, shown.keys())
        lines += ["", f"Values of {name}: local shape, placement, weight", *values]
        lines += ["", f"Collectives of {name}", *_collectives(partitioned.collectives[name], name)]
    return "\n".join(lines) + "\n"


def _placed(name: str, shape: tuple[int, ...], placement: Placement) -> tuple[str, ...]:
    local = local_shape(shape, placement)
    return name, f"{_dims(shape)} -> {_dims(local)}", str(placement)


def _format(weight: Weight) -> str:
    assert weight.columns is not None
    packing, size = weight.columns.packing, weight.columns.size
    code = packing.code if packing.code == "e4m3" else f"int{packing.bits}"
    groups = "whole rows" if packing.group == size else f"groups of {packing.group}"
    zeros = ", zero points" if packing.zeros else ""
    moved = ", columns moved" if weight.columns.moved is not None else ""
    return f"{size} columns, {code}, {groups}, {packing.scale_dtype} scales{zeros}{moved}"


def _values(partitioned: Partitioned, function: str, weights: Collection[str]) -> list[str]:
    """A row for each call, in order, with the weights that it reads."""
    placements, func = partitioned.placements[function], partitioned.mod[function]
    read = {p: re.sub(LAYER, ".*.", p.name) for p in func.params if p.name in weights}
    rows = []
    for binding in bindings_of(func):
        if not isinstance(binding.value, relax.Call):
            continue
        op, operands = op_name(binding.value), operands_of(binding.value)
        placement = placements.get(binding.var)
        if placement is None and op not in COLLECTIVES:
            continue  # a transpose that a collective needs
        if op == "relax.permute_dims" and operands[0] in read:
            read[binding.var] = read[operands[0]]  # a product's own view of its weight
            continue
        ty = binding.var.ty
        shape = (ty.fields[0] if isinstance(ty, relax.TupleType) else ty).shape.values
        names = " ".join(read[x] for x in operands if x in read)
        label = COLLECTIVES.get(op, op.removeprefix("relax."))
        rows.append((label, _dims(shape), str(placement[0]) if placement else "", names))
    return _runs(_aligned(rows))


def _collectives(collectives: list[Collective], function: str) -> list[str]:
    if not collectives:
        return ["  none"]
    per_call = "per step" if function.startswith("decode") else "per chunk"
    units = {True: per_call, False: "per token"}
    fixed = [all(isinstance(d, int) for d in c.shape) for c in collectives]
    rows = _table(
        (c.kind, f"{_dims(c.shape)} {c.dtype}", f"{c.bytes} bytes {units[f]}")
        for c, f in zip(collectives, fixed, strict=True)
    )
    for is_fixed, unit in units.items():
        some = [c for c, f in zip(collectives, fixed, strict=True) if f == is_fixed]
        if some:
            total = sum(c.bytes for c in some)
            noun = "collective" if len(some) == 1 else "collectives"
            rows.append(f"  total: {len(some)} {noun}, {total} bytes {unit}")
    return rows


def _dims(shape: Iterable[object]) -> str:
    dims = (int(d) if isinstance(d, tvm.tirx.IntImm) else d for d in shape)
    return f"[{', '.join(map(str, dims))}]"


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Aligned; rows that differ only in a layer's number become one, with their count."""
    counts = Counter((re.sub(LAYER, ".*.", name), *rest) for name, *rest in rows)
    return _aligned([(*row, f"x{n}" if n > 1 else "") for row, n in counts.items()])


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _runs(rows: list[str]) -> list[str]:
    """A repeated run of rows, as of identical layers, is shown once with its count."""
    for length in range(4, len(rows) // 2 + 1):
        for start in range(len(rows) - 2 * length + 1):
            block = rows[start : start + length]
            count = 1
            while rows[start + count * length : start + (count + 1) * length] == block:
                count += 1
            if count > 1:
                rest = rows[start + count * length :]
                return [*rows[:start], f"  {count} times:", *["  " + r for r in block], *rest]
    return rows
