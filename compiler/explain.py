"""`--explain`: what the partitioner decided, as text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from shardwright.compiler.axes import DeviceMesh
from shardwright.compiler.partition import Collective, Partitioned
from shardwright.compiler.placement import Placement, Shard, local_shape
from shardwright.compiler.propagate import bindings_of
from shardwright.compiler.rules import op_name, shape_of
from shardwright.compiler.weights import Weight


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
    lines = [
        f"DeviceMesh({axes})",
        "",
        "Weights (global -> local shape, placement)",
    ]
    shown = {s.name: (s.shape, s.placement) for w in weights for s in w.sources} | dict(model or {})
    lines += _merged(_placed(name, *where) for name, where in shown.items())
    formats = [f"  {w.name}  {_format(w)}" for w in weights if w.columns]
    if formats:
        lines += ["", "Quantized weights (local columns, codes, groups)", *_merged(formats)]
    if orders:
        lines += ["", "Act-order", *_merged(f"  {line}" for line in orders)]
    lines += ["", "State that is sharded"]
    lines += [
        _placed(name, shape, placement)
        for name, (shape, placement) in state.items()
        if isinstance(placement, Shard)
    ]
    for name in ("decode_1", "prefill"):
        lines += ["", f"Values of {name} (local shape, placement)", *_values(partitioned, name)]
        lines += ["", f"Collectives of {name}", *_collectives(partitioned.collectives[name], name)]
    return "\n".join(lines) + "\n"


def _placed(name: str, shape: tuple[int, ...], placement: Placement) -> str:
    return f"  {name}  {_dims(shape)} -> {_dims(local_shape(shape, placement))}  {placement}"


def _format(weight: Weight) -> str:
    assert weight.columns is not None
    packing, size = weight.columns.packing, weight.columns.size
    code = packing.code if packing.code == "e4m3" else f"int{packing.bits}"
    groups = "whole rows" if packing.group == size else f"groups of {packing.group}"
    zeros = ", zero points" if packing.zeros else ""
    moved = ", columns moved" if weight.columns.moved is not None else ""
    return f"{size} columns, {code}, {groups}, {packing.scale_dtype} scales{zeros}{moved}"


def _values(partitioned: Partitioned, function: str) -> list[str]:
    placements = partitioned.placements[function]
    rows = []
    for binding in bindings_of(partitioned.mod[function]):
        placement = placements.get(binding.var)
        if placement and hasattr(binding.value, "op") and hasattr(binding.var.ty, "shape"):
            op = op_name(binding.value).removeprefix("relax.")
            rows.append(f"  {op}  {_dims(shape_of(binding.var))}  {placement[0]}")
    return _runs(rows)


def _collectives(collectives: list[Collective], function: str) -> list[str]:
    if not collectives:
        return ["  none"]
    per_call = "per step" if function.startswith("decode") else "per chunk"
    units = {True: per_call, False: "per token"}
    fixed = [all(isinstance(d, int) for d in c.shape) for c in collectives]
    rows = _merged(
        f"  {c.kind}  {_dims(c.shape)} {c.dtype}  {c.bytes} bytes {units[f]}"
        for c, f in zip(collectives, fixed, strict=True)
    )
    for is_fixed, unit in units.items():
        some = [c for c, f in zip(collectives, fixed, strict=True) if f == is_fixed]
        if some:
            total = sum(c.bytes for c in some)
            rows.append(f"  total: {len(some)} collectives, {total} bytes {unit}")
    return rows


def _dims(shape: Iterable[object]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _merged(rows: Iterable[str]) -> list[str]:
    """Rows that differ only in a layer's number become one, with their count."""
    counts: dict[str, int] = {}
    for row in rows:
        key = re.sub(r"\.\d+\.", ".*.", row)
        counts[key] = counts.get(key, 0) + 1
    return [f"{row}  x{n}" if n > 1 else row for row, n in counts.items()]


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
