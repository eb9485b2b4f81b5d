"""Reads a checkpoint's weights in pieces, already cut into the ranks' slices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from threading import Lock
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from shardwright.compiler.checkpoint import Checkpoint
from shardwright.compiler.columns import Columns
from shardwright.compiler.placement import PAD, Placement, Shard
from shardwright.errors import ShardingError

Array: TypeAlias = npt.NDArray[Any]
Index: TypeAlias = npt.NDArray[np.int64]
Ranks: TypeAlias = tuple[int, ...]
Parts: TypeAlias = tuple[Array, ...]

Read: TypeAlias = Callable[[], list[tuple[Ranks, Parts]]]
"""Reads one piece: slices, each with the ranks that hold it. May run on any thread."""

CHUNK = 1 << 20
"""Elements in a piece, whatever the size of the tensor; a longer row is a piece of its own."""


class Reader(Protocol):
    """A weight of the checkpoint, in whatever form it has there.

    Its parts are the plain values alone or, where it is quantized, codes uint8 `[rows, cols]`,
    scales `[rows, groups]` and, if the format has them, zero points like the scales.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, as the model has it."""

    @property
    def quantized(self) -> bool:
        """Whether the parts are codes and what belongs to them."""

    def read(self, index: Index) -> Parts:
        """Rows `index` along dimension 0. May run on any thread.

        Where it is -1 plain rows are zeros; of quantized ones any will do.
        """

    def release(self) -> None:
        """Forget what reading kept in memory."""


class Plain:
    """A tensor of the checkpoint as it is."""

    quantized = False

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.shape = checkpoint.tensors[name].shape
        self._checkpoint, self._name = checkpoint, name

    def read(self, index: Index) -> Parts:
        """See `Reader`."""
        return (read_rows(self._checkpoint.read_rows, self._name, index),)

    def transposed_experts(self) -> TransposedExperts:
        """The same tensor, read otherwise."""
        return TransposedExperts(self._checkpoint, self._name)

    def release(self) -> None:
        """See `Reader`."""


class Rows:
    """`count` rows of a weight from `first` on, each or every `step`th."""

    def __init__(self, whole: Reader, first: int, count: int, step: int = 1) -> None:
        self.shape = (count, *whole.shape[1:])
        self.quantized = whole.quantized
        self._whole, self._first, self._step = whole, first, step

    def read(self, index: Index) -> Parts:
        """See `Reader`."""
        if self._step == 1:
            return self._whole.read(np.where(index == PAD, PAD, index + self._first))
        # The rows between are read as well: a few long reads instead of many short ones.
        step = self._step
        start = index * step + self._first // step * step
        all_rows = np.where((index == PAD)[:, None], PAD, start[:, None] + np.arange(step))
        parts = self._whole.read(all_rows.reshape(-1))
        return tuple(part[self._first % step :: step] for part in parts)

    def release(self) -> None:
        """See `Reader`."""
        self._whole.release()


class Stacked:
    """Weights of one shape, the rows of one after those of the other."""

    def __init__(self, weights: Sequence[Reader]) -> None:
        self._weights, self._rows = weights, weights[0].shape[0]
        self.shape = (len(weights) * self._rows, *weights[0].shape[1:])
        self.quantized = weights[0].quantized

    def read(self, index: Index) -> Parts:
        """See `Reader`."""
        which = np.where(index == PAD, PAD, index // self._rows)
        starts = [0, *(int(i) + 1 for i in np.flatnonzero(np.diff(which))), len(index)]
        read = []
        for start, stop in pairwise(starts):
            rows = index[start:stop]
            weight = self._weights[max(int(which[start]), 0)]
            read.append(weight.read(np.where(rows == PAD, PAD, rows % self._rows)))
        return tuple(np.concatenate(parts) for parts in zip(*read, strict=True))

    def release(self) -> None:
        """See `Reader`."""
        for weight in self._weights:
            weight.release()


class TransposedExperts:
    """A tensor [experts, in, out] as a matrix [experts * out, in]; [experts, out] has one column.

    An expert is read whole, and kept until another is asked for.
    """

    quantized = False

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        experts, *inner = checkpoint.tensors[name].shape
        self._rows, columns = inner[-1], math.prod(inner[:-1])
        self.shape = (experts * self._rows, columns)
        self._checkpoint, self._name = checkpoint, name
        self._lock = Lock()
        self._kept: tuple[int, Array] | None = None

    def _expert(self, number: int) -> Array:
        with self._lock:
            kept = self._kept
            if kept is None or kept[0] != number:
                values = self._checkpoint.read_rows(self._name, number, number + 1)
                kept = number, np.ascontiguousarray(values.reshape(-1, self._rows).T)
                self._kept = kept
            return kept[1]

    def read(self, index: Index) -> Parts:
        """See `Reader`."""

        def read(_name: str, start: int, stop: int) -> Array:
            first, last = start // self._rows, max(stop - 1, start) // self._rows
            experts = [self._expert(e) for e in range(first, last + 1)]
            rows = experts[0] if len(experts) == 1 else np.concatenate(experts)
            return rows[start - first * self._rows : stop - first * self._rows]

        return (read_rows(read, self._name, index),)

    def release(self) -> None:
        """See `Reader`."""
        self._kept = None


def read_rows(read: Callable[[str, int, int], Array], name: str, index: Index) -> Array:
    """Rows `index` of a tensor, in runs of consecutive ones; zeros where it is -1.

    `read(name, start, stop)` reads rows.
    """
    padding = index == PAD
    follows = (np.diff(index) == 1) & ~padding[:-1] | padding[:-1] & padding[1:]
    cuts = [0, *(int(i) + 1 for i in np.flatnonzero(~follows)), len(index)]
    parts = []
    for start, stop in pairwise(cuts):
        if padding[start]:
            none = read(name, 0, 0)
            parts.append(np.zeros((stop - start, *none.shape[1:]), none.dtype))
        else:
            row = int(index[start])
            parts.append(read(name, row, row + stop - start))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def reads(
    reader: Reader,
    placement: Placement,
    world: int,
    order: Index | None = None,
    columns: Columns | None = None,
) -> Iterator[Read]:
    """The pieces of a weight; a rank's slices, joined along dimension 0, are its local tensor.

    Ranks that hold the same share a slice. `order` permutes rows before the cut; `columns` says
    where the columns of a quantized weight go. Raises ShardingError if `placement` is not for
    `world` ranks.
    """
    shape = reader.shape
    rows = max(1, CHUNK // max(1, math.prod(shape[1:])))
    whole = np.arange(shape[0], dtype=np.int64) if order is None else order
    groups = [tuple(range(world))]
    if isinstance(placement, Shard):
        groups = _same_slices(placement, world)
        if placement.dim == 0:
            for ranks in groups:
                index = placement.index(ranks[0])
                index = np.where(index == PAD, PAD, whole[np.maximum(index, 0)])
                for start in range(0, len(index), rows):
                    piece = index[start : start + rows]
                    yield partial(_read, reader, piece, [ranks], placement, columns)
            return
    for start in range(0, shape[0], rows):
        yield partial(_read, reader, whole[start : start + rows], groups, placement, columns)


def _same_slices(placement: Shard, world: int) -> list[Ranks]:
    """The ranks, those with equal slices together."""
    if len(placement.table) != world:
        raise ShardingError(f"{placement} is for {len(placement.table)} ranks, not {world}")
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, row in enumerate(placement.table):
        groups.setdefault(row, []).append(rank)
    return [tuple(ranks) for ranks in groups.values()]


def _read(
    reader: Reader,
    index: Index,
    groups: list[Ranks],
    placement: Placement,
    columns: Columns | None,
) -> list[tuple[Ranks, Parts]]:
    """Rows `index`, read once and cut along a later dimension where `placement` or `columns` do."""
    parts = reader.read(index)
    if columns is not None:
        parts = _without_padding(parts, index, columns)
        return [(ranks, _cut_columns(parts, columns, ranks[0])) for ranks in groups]
    (values,) = parts
    if isinstance(placement, Shard) and placement.dim > 0:
        return [(r, (take(values, placement.index(r[0]), placement.dim),)) for r in groups]
    return [(ranks, (values,)) for ranks in groups]


def _without_padding(parts: Parts, index: Index, columns: Columns) -> Parts:
    """Quantized rows, zeros where `index` is -1, whatever a reader gave there."""
    padding = index == PAD
    if not padding.any():
        return parts
    fills = (columns.packing.offset, *(0 for _ in parts[1:]))
    return tuple(
        np.where(padding[:, None], np.asarray(fill, part.dtype), part)
        for fill, part in zip(fills, parts, strict=True)
    )


def _cut_columns(parts: Parts, columns: Columns, rank: int) -> Parts:
    """One rank's codes, scales and zero points. A padded column decodes to 0.

    It must: what it multiplies is not always 0. A head that only pads attends to real values.
    """
    at = min(rank, len(columns.codes) - 1)  # a weight cut along its rows has one plan
    codes, *sides = parts
    index = columns.codes[at]
    cut = take(codes, index, 1, fill=columns.packing.offset)
    sides = [take(side, columns.groups[at], 1) for side in sides]
    padding = np.flatnonzero(index == PAD)
    if columns.packing.zeros and len(padding):
        cut[:, padding] = sides[1][:, padding // columns.packing.group]
    return cut, *sides


def take(values: Array, index: Index, dim: int, fill: int = 0) -> Array:
    """Elements `index` of `values` along `dim`, with `fill` where the index is -1."""
    if len(index) and index[0] != PAD and (np.diff(index) == 1).all():
        which = [slice(None)] * values.ndim
        which[dim] = slice(int(index[0]), int(index[-1]) + 1)
        return values[tuple(which)]
    out: Array = np.take(values, np.maximum(index, 0), axis=dim)
    np.moveaxis(out, dim, 0)[index == PAD] = fill
    return out
