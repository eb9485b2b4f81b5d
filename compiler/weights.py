"""Weights: from a checkpoint's tensors to each rank's file, cut by the partitioner's placements."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardwright.compiler.placement import Partial, Placement, local_shape

from shardwright.errors import ShardingError


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint: its name there, its global shape, and how the ranks share it."""

    name: str
    shape: tuple[int, ...]
    placement: Placement

    def __post_init__(self) -> None:
        if isinstance(self.placement, Partial):
            raise ShardingError(f"{self.name}: a weight cannot be {self.placement}")

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of one rank's slice."""
        return local_shape(self.shape, self.placement)


@dataclass(frozen=True)
class Weight:
    """A weight of the program: the local slices of its sources, joined along dimension 0.

    With `group` None it is one tensor of type `dtype`. Else it is quantized to four bits with a
    scale of type `dtype` for each `group` elements of a row, see `quantization.quantize_q4`.
    Raises ShardingError if the slices cannot be joined, or are no matrices and to be quantized.
    """

    name: str
    sources: tuple[Source, ...]
    dtype: str
    group: int | None = None

    def __post_init__(self) -> None:
        tails = {source.local_shape[1:] for source in self.sources}
        if len(tails) != 1:
            shapes = ", ".join(f"{s.name} {s.local_shape}" for s in self.sources)
            raise ShardingError(f"{self.name}: cannot join slices along dimension 0: {shapes}")
        if self.group is not None and len(self.local_shape) != 2:
            raise ShardingError(f"{self.name}: only matrices are quantized, not {self.local_shape}")

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape on one rank, before quantization."""
        rows = sum(source.local_shape[0] for source in self.sources)
        return (rows, *self.sources[0].local_shape[1:])

    @property
    def padded_cols(self) -> int:
        """Columns of a quantized weight on one rank, filled with zeros to whole groups and words."""
        assert self.group is not None
        multiple = math.lcm(8, self.group)
        return -(-self.local_shape[1] // multiple) * multiple

    def tensors(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Name, local shape and dtype of the tensors that hold this weight in a rank's file.

        One, or `NAME.q4` uint32 `[rows, padded_cols / 8]` and `NAME.scale` `[rows, padded_cols /
        group]`.
        """
        if self.group is None:
            return [(self.name, self.local_shape, self.dtype)]
        rows, cols = self.local_shape[0], self.padded_cols
        return [
            (f"{self.name}.q4", (rows, cols // 8), "uint32"),
            (f"{self.name}.scale", (rows, cols // self.group), self.dtype),
        ]
