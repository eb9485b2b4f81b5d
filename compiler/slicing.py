"""Reads a checkpoint tensor in pieces, already cut into the ranks' slices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shardwright.compiler.checkpoint import Checkpoint
from shardwright.compiler.placement import PAD, Placement, Shard
from shardwright.errors import ShardingError

Array: TypeAlias = npt.NDArray[Any]
Index: TypeAlias = npt.NDArray[np.int64]
Ranks: TypeAlias = tuple[int, ...]

Read: TypeAlias = Callable[[], list[tuple[Ranks, Array]]]
"""Reads one piece: slices, each with the ranks that hold it. May run on any thread."""

CHUNK = 1 << 22
"""Elements in a piece, whatever the size of the tensor; a longer row is a piece of its own."""


def reads(checkpoint: Checkpoint, name: str, placement: Placement, world: int) -> Iterator[Read]:
    """The pieces of tensor `name`; a rank's slices, joined along dimension 0, are its local tensor.

    Ranks that hold the same share a slice. Raises ShardingError if `placement` is not for `world`
    ranks.
    """
    shape = checkpoint.tensors[name].shape
    rows = max(1, CHUNK // max(1, math.prod(shape[1:])))
    everyone = tuple(range(world))
    if not isinstance(placement, Shard):
        for start in range(0, shape[0], rows):
            index = np.arange(start, min(start + rows, shape[0]))
            yield partial(_rows, checkpoint, name, everyone, index)
        return
    groups = _same_slices(placement, world)
    if placement.dim == 0:
        for ranks in groups:
            index = placement.index(ranks[0])
            for start in range(0, len(index), rows):
                yield partial(_rows, checkpoint, name, ranks, index[start : start + rows])
        return
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        yield partial(_columns, checkpoint, name, groups, placement, start, stop)


def _same_slices(placement: Shard, world: int) -> list[Ranks]:
    """The ranks, those with equal slices together."""
    if len(placement.table) != world:
        raise ShardingError(f"{placement} is for {len(placement.table)} ranks, not {world}")
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, row in enumerate(placement.table):
        groups.setdefault(row, []).append(rank)
    return [tuple(ranks) for ranks in groups.values()]


def _rows(
    checkpoint: Checkpoint, name: str, ranks: Ranks, index: Index
) -> list[tuple[Ranks, Array]]:
    """Rows `index`, read in runs of consecutive ones; rows of zeros where it is -1."""
    padding = index == PAD
    follows = (np.diff(index) == 1) & ~padding[:-1] | padding[:-1] & padding[1:]
    cuts = [0, *(int(i) + 1 for i in np.flatnonzero(~follows)), len(index)]
    parts = []
    for start, stop in pairwise(cuts):
        first = int(index[start])
        if padding[start]:
            none = checkpoint.read_rows(name, 0, 0)
            parts.append(np.zeros((stop - start, *none.shape[1:]), none.dtype))
        else:
            parts.append(checkpoint.read_rows(name, first, first + stop - start))
    return [(ranks, parts[0] if len(parts) == 1 else np.concatenate(parts))]


def _columns(
    checkpoint: Checkpoint,
    name: str,
    groups: list[Ranks],
    placement: Shard,
    start: int,
    stop: int,
) -> list[tuple[Ranks, Array]]:
    """Rows `start` to `stop`, read once and cut along a later dimension."""
    rows = checkpoint.read_rows(name, start, stop)
    return [(ranks, take(rows, placement.index(ranks[0]), placement.dim)) for ranks in groups]


def take(values: Array, index: Index, dim: int) -> Array:
    """Elements `index` of `values` along `dim`, with zeros where the index is -1."""
    if len(index) and index[0] != PAD and (np.diff(index) == 1).all():
        which = [slice(None)] * values.ndim
        which[dim] = slice(int(index[0]), int(index[-1]) + 1)
        return values[tuple(which)]
    out: Array = np.take(values, np.maximum(index, 0), axis=dim)
    np.moveaxis(out, dim, 0)[index == PAD] = 0
    return out
