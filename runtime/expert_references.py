"""References of the kernels of `compiler/kernels/experts.py`, see `references.py`.

A weight of experts is three tensors, `[experts * rows, ...]`, and where there are no biases
something else stands in their place. Only what a rank has an expert for is compared.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shardwright.runtime.reference_values import Array, Note, Pairs, silu, weight, wide


def _expert(tensors: list[Any], bias: Any, number: int, rows: int, note: Note) -> tuple[Array, Any]:
    """Weight `[rows, cols]` and bias `[rows]`, or 0, of one expert."""
    mine = slice(number * rows, (number + 1) * rows)
    parts = [tensor[mine] for tensor in tensors]
    values = wide(parts[0]) if note["packing"] is None else weight(parts, note)
    return values, wide(bias[mine, 0]) if note.get("biased") else 0.0


def _activated(gate: Array, up: Array, note: Note) -> Array:
    limit, alpha = note.get("limit"), note.get("alpha", 0.0)
    if not limit:
        return silu(gate) * up
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    found: Array = gate / (1 + np.exp(-alpha * gate)) * (up + 1)
    return found


def route(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`scores [n,E] -> (ids [n,top], weights [n,top])`."""
    scores, top = wide(before[0]), note["top"]
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    parts = np.exp(scores - scores.max(1, keepdims=True))
    chosen = np.take_along_axis(parts, ids, 1)
    mass = chosen if note["normalize"] else parts
    return [(after[1], ids), (after[2], chosen / mass.sum(1, keepdims=True))]


def experts_up(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(x, gate (3), up (3), gate_bias, up_bias, ids, rank) -> h [n*top, rows]`."""
    x, ids, rank = wide(before[0]), before[9], int(before[10][0])
    count, rows, top = note["experts"], note["rows"], note["top"]
    local = ids.reshape(-1) - rank * count
    pairs = []
    for e in np.unique(local[(local >= 0) & (local < count)]):
        slots = np.flatnonzero(local == e)
        gate, gate_bias = _expert(before[1:4], before[7], e, rows, note)
        up, up_bias = _expert(before[4:7], before[8], e, rows, note)
        token = x[slots // top]
        wanted = _activated(token @ gate.T + gate_bias, token @ up.T + up_bias, note)
        pairs.append((after[-1][slots], wanted))
    return pairs


def _weighted(y: Array, ids: Array, weights: Array, local: Array, count: int) -> Array:
    """Sum over the slots of each token that belong to one of `count` experts from 0 on."""
    mine = (local >= 0) & (local < count)
    factors = np.where(mine, wide(weights), 0)[..., None]
    # What is written of other slots is not read.
    parts = np.where(mine[..., None], y.reshape(*ids.shape, -1), 0)
    found: Array = (factors * parts).sum(1)
    return found


def experts_down(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(h [n*top,cols], down (3), bias, ids, weights, rank) -> out [n, rows]`."""
    h, bias, ids, weights, rank = wide(before[0]), before[4], before[5], before[6], before[7]
    count, rows, number = note["experts"], note["rows"], int(rank[0])
    local = ids - (0 if note.get("split") else number * count)
    y = np.zeros((len(h), rows))
    for e in np.unique(local[(local >= 0) & (local < count)]):
        slots = np.flatnonzero(local.reshape(-1) == e)
        down, shift = _expert(before[1:4], bias, e, rows, note)
        # Where each rank has a part of an expert, the first adds the bias.
        y[slots] = h[slots] @ down.T + (0 if note.get("split") and number else shift)
    return [(after[-1], _weighted(y, ids, weights, local, count))]


def expert_order(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(ids, rank) -> (order [n*top], begin [E+1])`."""
    count = note["experts"]
    local = before[0].reshape(-1) - int(before[1][0]) * count
    order = [np.flatnonzero(local == e) for e in range(count)]
    begin = np.cumsum([0, *map(len, order)])
    return [(after[2][: begin[-1]], np.concatenate(order)), (after[3], begin)]


def experts_grouped(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(x, w (3), up (3), w_bias, up_bias, order, begin) -> y [n*top, rows]`."""
    x, order, begin, rows = wide(before[0]), before[9], before[10], note["rows"]
    pairs = []
    for e in range(note["experts"]):
        slots = order[begin[e] : begin[e + 1]]
        if not len(slots):
            continue
        w, bias = _expert(before[1:4], before[7], e, rows, note)
        if note["gated"]:
            token = x[slots // note["top"]]
            up, up_bias = _expert(before[4:7], before[8], e, rows, note)
            wanted = _activated(token @ w.T + bias, token @ up.T + up_bias, note)
        else:
            wanted = x[slots] @ w.T
        pairs.append((after[-1][slots], wanted))
    return pairs


def experts_sum(before: list[Any], after: list[Any], note: Note) -> Pairs:
    """`(y [n*top,F], bias, ids, weights, rank) -> out [n,F]`."""
    y, bias, ids, weights, rank = before[:5]
    count, number, split = note["experts"], int(rank[0]), note.get("split")
    local = ids - (0 if split else number * count)
    y = wide(y)
    if note.get("biased") and not (split and number):
        shifts = wide(bias[:, 0]).reshape(count, -1)
        y = y + shifts[np.clip(local.reshape(-1), 0, count - 1)]
    return [(after[-1], _weighted(y, ids, weights, local, count))]
