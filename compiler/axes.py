"""From logical axes to placements: the one place that says what is sharded over which mesh axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from shardwright.compiler.placement import (
    Placement,
    Replicate,
    Shard,
    Table,
    even_table,
    head_tables,
)
from shardwright.errors import ShardingError

AXIS_RULES: dict[str, str | None] = {
    "vocab": "tp",
    "heads": "tp",
    "kv_heads": "tp",
    "mlp": "tp",
    "embed": None,
    "head_dim": None,
    "experts": None,
    "expert_mlp": "tp",
    "router": None,
}
"""Logical axis of a parameter's dimension -> mesh axis, None for not sharded."""

EXPERT_PARALLEL: dict[str, str | None] = {**AXIS_RULES, "experts": "tp", "expert_mlp": None}
"""The same with whole experts on a rank."""

BLOCK = 32
"""Elements in a block of an axis without inner structure: a wide read of a kernel, never cut."""


@dataclass(frozen=True)
class DeviceMesh:
    """Ranks arranged along named axes."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]

    def size(self, axis: str) -> int:
        """Ranks along `axis`."""
        return self.shape[self.axes.index(axis)]


class HeadCounts(Protocol):
    """What the cut of attention needs of a model's configuration."""

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads."""


@dataclass(frozen=True)
class AxisRules:
    """Cuts the dimensions of one model on one mesh.

    `units` gives, for an axis without inner structure, elements that must stay together.
    """

    mesh: DeviceMesh
    config: HeadCounts
    units: Mapping[str, int] = field(default_factory=dict)
    mesh_axes: Mapping[str, str | None] = field(default_factory=lambda: AXIS_RULES)

    def placement(self, shape: Sequence[int], axes: Sequence[str | None]) -> Placement:
        """Placement of a tensor of global `shape` whose dimensions carry the names `axes`.

        Raises ShardingError for an unknown axis, or if two dimensions would be sharded.
        """
        found = [cut for i, a in enumerate(axes) if a and (cut := self._cut(i, shape[i], a))]
        if len(found) > 1:
            raise ShardingError(f"two dimensions of a tensor with axes {tuple(axes)} are sharded")
        return found[0] if found else Replicate()

    def _cut(self, dim: int, size: int, axis: str) -> Shard | None:
        if axis not in self.mesh_axes:
            raise ShardingError(
                f"logical axis {axis!r} has no rule; add it to AXIS_RULES in compiler/axes.py"
            )
        mesh_axis = self.mesh_axes[axis]
        if mesh_axis is None or self.mesh.size(mesh_axis) == 1:
            return None
        unit, table = self._blocks(size, axis, self.mesh.size(mesh_axis))
        return Shard(dim, size, unit, table)

    def _blocks(self, size: int, axis: str, ranks: int) -> tuple[int, Table]:
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        if axis == "heads":
            return size // heads, head_tables(heads, kv_heads, ranks)[0]
        if axis == "experts":
            return 1, even_table(size, ranks)
        if axis == "kv_heads":
            return size // kv_heads, head_tables(heads, kv_heads, ranks)[1]
        unit = max(BLOCK, self.units.get(axis, 0))
        return unit, even_table(-(-size // unit), ranks)
