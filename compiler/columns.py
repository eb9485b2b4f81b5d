"""Where the columns of a quantized weight lie on each rank.

A rank's columns are those its placement gives it. Codes come in groups that share a scale, and a
cut may fall inside a group, or act-order quantization may have scattered a group over the row. Then
groups are made smaller, which repeats scales and moves nothing, or a rank's columns are sorted by
group and each group padded; the activations are permuted alike before the product, on that rank
alone, since a product sums over columns in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from shardwright.compiler.packing import Packing
from shardwright.compiler.placement import PAD, Placement, Shard

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Quantized:
    """How a weight is quantized, before any cut.

    `packing.group` elements of a row share a scale; with `group_of` `[K]` (act-order) element k
    takes scale `group_of[k]` instead of `k // packing.group`.
    """

    packing: Packing
    group_of: Index | None = None

    def groups(self, size: int) -> Index:
        """Group of each of the `size` elements of a row."""
        if self.group_of is not None:
            return self.group_of
        return np.arange(size, dtype=np.int64) // self.packing.group


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns of a weight by rank: `codes[r]` of the checkpoint's row, `groups[r]` its scales.

    PAD (-1) is a column of zeros, or a group of nothing else. `packing.group` is the size of the
    groups here. `moved[r]`, where there is one, says which element of the rank's activations each
    column multiplies; else element i multiplies column i.
    """

    packing: Packing
    codes: tuple[Index, ...]
    groups: tuple[Index, ...]
    moved: tuple[Index, ...] | None = None

    @property
    def size(self) -> int:
        """Columns on every rank."""
        return len(self.codes[0])

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for weights that can be joined: of one format, multiplied with one activation."""
        return self.packing, self.size, *(m.tobytes() for m in self.moved or ())


def plan(quantized: Quantized, size: int, order: Index | None, placement: Placement) -> Columns:
    """Columns of a weight of global row length `size`, cut by `placement`.

    `order`, if any, permutes the columns before the cut.
    """
    order = np.arange(size, dtype=np.int64) if order is None else order
    ranks = [np.arange(size, dtype=np.int64)]
    if isinstance(placement, Shard) and placement.dim == 1:
        ranks = [placement.index(r) for r in range(len(placement.table))]
    columns = [_pick(order, index) for index in ranks]
    if quantized.packing.group >= size and quantized.group_of is None:
        return _whole_rows(quantized.packing, columns)
    groups = [_pick(quantized.groups(size), index) for index in columns]
    for group in _sizes(quantized.packing):
        whole = [w for g in groups if (w := _by_group(_padded(g, group), group)) is not None]
        if len(whole) == len(groups):
            packing = replace(quantized.packing, group=group)
            return Columns(packing, tuple(_padded(c, group) for c in columns), tuple(whole))
    return _sorted(quantized.packing, columns, groups)


def _pick(values: Index, index: Index) -> Index:
    return np.where(index == PAD, PAD, values[np.maximum(index, 0)])


def _padded(index: Index, multiple: int) -> Index:
    return np.pad(index, (0, -len(index) % multiple), constant_values=PAD)


def _whole_rows(packing: Packing, columns: list[Index]) -> Columns:
    """One scale a row: any cut will do, padded for wide reads."""
    wide = 4 * packing.per_word
    codes = tuple(_padded(c, wide) for c in columns)
    groups = tuple(np.zeros(1, np.int64) for _ in columns)
    return Columns(replace(packing, group=len(codes[0])), codes, groups)


def _sizes(packing: Packing) -> Iterator[int]:
    """Group sizes that hold whole words and divide the format's, largest first."""
    for count in range(1, packing.group // packing.per_word + 1):
        size, rest = divmod(packing.group, count)
        if rest == 0 and size % packing.per_word == 0:
            yield size


def _by_group(groups: Index, size: int) -> Index | None:
    """The group of each run of `size` elements; None if a run holds elements of two."""
    runs = groups.reshape(-1, size)
    largest = runs.max(axis=1)
    same = (runs == largest[:, None]) | (runs == PAD)
    return largest if same.all() else None


def _sorted(packing: Packing, columns: list[Index], groups: list[Index]) -> Columns:
    """Columns sorted by group, each group padded, in the group size that takes the least memory."""
    side_bits = 8 * np.dtype(packing.scale_dtype).itemsize * (2 if packing.zeros else 1)

    def padded_size(group: int) -> int:
        counts = [np.unique(g[g != PAD], return_counts=True)[1] for g in groups]
        return max(int((-(-c // group)).sum()) for c in counts) * group

    def bits(group: int) -> float:
        return padded_size(group) * (packing.bits + side_bits / group)

    group = min(_sizes(packing), key=bits)
    size = padded_size(group)
    codes, scales, moved = [], [], []
    for column, of in zip(columns, groups, strict=True):
        positions = np.full(size, PAD, np.int64)
        of_run = np.full(size // group, PAD, np.int64)
        at = 0
        for g in np.unique(of[of != PAD]):
            members = np.flatnonzero(of == g)
            positions[at : at + len(members)] = members
            runs = -(-len(members) // group)
            of_run[at // group : at // group + runs] = g
            at += runs * group
        codes.append(_pick(column, positions))
        scales.append(of_run)
        moved.append(positions)
    return Columns(replace(packing, group=group), tuple(codes), tuple(scales), tuple(moved))
