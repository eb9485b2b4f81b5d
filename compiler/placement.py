"""Placements: how one value lies on the ranks of a mesh axis.

A placement is `Replicate`, `Partial` (the sum over ranks is the value) or `Shard`. A `Shard` cuts
one dimension into blocks and says in a table which blocks each rank holds. The same object gives
local shapes, weight slices and the collectives between two placements, so that they cannot differ.
Terms as in GSPMD (arXiv:2105.04663) and PyTorch DTensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from shardwright.errors import ShardingError

PAD = -1
"""Block id of a block of zeros, which fills a rank up to the largest one."""

_SHOWN = 64  # blocks of a rank

Table: TypeAlias = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Replicate:
    """Every rank holds the whole value."""

    def __str__(self) -> str:
        return "Replicate"


@dataclass(frozen=True)
class Partial:
    """Every rank holds a summand of the value."""

    def __str__(self) -> str:
        return "Partial(sum)"


@dataclass(frozen=True)
class Shard:
    """Dimension `dim` is cut into blocks of `unit` elements; rank r holds blocks `table[r]`.

    `size` is the global length of the dimension. The last block may be cut short by `size`; what is
    missing, and every block with id `PAD`, is zero. All ranks hold the same number of blocks.
    """

    dim: int
    size: int
    unit: int
    table: Table

    def __post_init__(self) -> None:
        if len({len(row) for row in self.table}) != 1:
            raise ShardingError(f"ranks hold different numbers of blocks: {self.table}")

    @property
    def local_size(self) -> int:
        """Length of the dimension on every rank, padding included."""
        return len(self.table[0]) * self.unit

    @property
    def is_contiguous(self) -> bool:
        """Whether the ranks' slices joined in rank order, cut at `size`, are the global value."""
        flat = [block for row in self.table for block in row]
        count = -(-self.size // self.unit)
        return flat == list(range(count)) + [PAD] * (len(flat) - count)

    def with_dim(self, dim: int) -> Shard:
        """The same cut on another dimension."""
        return Shard(dim, self.size, self.unit, self.table)

    def scaled(self, factor: int, divide: bool = False) -> Shard:
        """The same cut after each element became `factor` elements (or the reverse)."""
        if not divide:
            return Shard(self.dim, self.size * factor, self.unit * factor, self.table)
        if self.unit % factor or self.size % factor:
            raise ShardingError(
                f"a shard of blocks of {self.unit} elements cannot be seen as rows of {factor}; "
                "the split would cut through a row"
            )
        return Shard(self.dim, self.size // factor, self.unit // factor, self.table)

    def index(self, rank: int) -> npt.NDArray[np.int64]:
        """Global index of each local element of `rank`; -1 where it is padding."""
        blocks = np.asarray(self.table[rank], dtype=np.int64)
        index = blocks[:, None] * self.unit + np.arange(self.unit)
        index[blocks == PAD] = PAD
        index[index >= self.size] = PAD
        return index.reshape(-1)

    def __str__(self) -> str:
        if self.is_contiguous:
            pad = self.local_size * len(self.table) - self.size
            return f"Shard({self.dim})" + (f"+{pad} pad" if pad else "")

        def listed(row: tuple[int, ...]) -> str:
            ids = ["-" if b == PAD else str(b) for b in row]
            return ",".join(ids if len(ids) <= _SHOWN else [*ids[:_SHOWN], "..."])

        rows = " | ".join(map(listed, self.table))
        return f"Shard({self.dim}, blocks of {self.unit}: {rows})"


Placement: TypeAlias = Replicate | Partial | Shard


def local_shape(shape: tuple[int, ...], placement: Placement) -> tuple[int, ...]:
    """Shape of the value on one rank, given its global `shape`."""
    if not isinstance(placement, Shard):
        return shape
    return (*shape[: placement.dim], placement.local_size, *shape[placement.dim + 1 :])


def even_table(blocks: int, ranks: int) -> Table:
    """Blocks in order, as many on each rank as on the first; the last ranks may be padded."""
    per_rank = -(-blocks // ranks)
    ids = [*range(blocks), *[PAD] * (per_rank * ranks - blocks)]
    return tuple(tuple(ids[r * per_rank : (r + 1) * per_rank]) for r in range(ranks))


@lru_cache
def head_tables(heads: int, kv_heads: int, ranks: int) -> tuple[Table, Table]:
    """Tables of the query heads and of the key/value heads for grouped-query attention.

    A rank holds the query heads of its own kv heads only. With at least as many kv heads as ranks,
    a rank gets whole groups. With fewer, each kv head is replicated on a run of ranks, which share
    out its query heads. Local query head i always reads local kv head i // (local heads / local kv
    heads). Raises ShardingError if `heads` is no multiple of `kv_heads`.
    """
    if heads % kv_heads:
        raise ShardingError(f"{heads} query heads are no multiple of {kv_heads} kv heads")
    group = heads // kv_heads
    if kv_heads >= ranks:
        per_rank = -(-kv_heads // ranks)
        # Balanced, so that padding is spread over ranks instead of emptying the last ones.
        bounds = [r * kv_heads // ranks for r in range(ranks + 1)]
        if kv_heads % ranks == 0:
            per_rank = kv_heads // ranks
        owned = [list(range(bounds[r], bounds[r + 1])) for r in range(ranks)]
        kv = [row + [PAD] * (per_rank - len(row)) for row in owned]
        q = [[PAD if b == PAD else b * group + j for b in row for j in range(group)] for row in kv]
        return tuple(map(tuple, q)), tuple(map(tuple, kv))
    owner = [r * kv_heads // ranks for r in range(ranks)]
    runs = [[r for r in range(ranks) if owner[r] == head] for head in range(kv_heads)]
    local = max(-(-group // len(run)) for run in runs)
    q_rows: list[tuple[int, ...]] = []
    for head, run in enumerate(runs):
        for row in even_table(group, len(run)):
            ids = [PAD if b == PAD else head * group + b for b in row]
            q_rows.append(tuple(ids + [PAD] * (local - len(ids))))
    return tuple(q_rows), tuple((head,) for head in owner)
