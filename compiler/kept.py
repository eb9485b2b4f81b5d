"""How the weights of a quantized checkpoint are quantized, kept beside them for `reshard`.

The shards have the groups of one cut, which may be smaller than the checkpoint's or sorted, so
they do not say it. A safetensors file does: in its metadata, `weights` is JSON with the `Packing`
of each weight by its name in the checkpoint and, where it is in act-order, the number of the tensor
`[K]` int32 that has the group of each column.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from shardwright.compiler.columns import Quantized
from shardwright.compiler.packing import Packing
from shardwright.errors import ArtifactError

FILE = "quantized.safetensors"


@dataclass(frozen=True)
class Kept:
    """The scheme of an artefact whose checkpoint was quantized; see `formats.Format`."""

    name: str
    dtype: str
    weights: Mapping[str, Quantized]

    def quantized(
        self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], config: Any
    ) -> Quantized | None:
        """How weight `name` of the checkpoint is quantized; None if it is plain."""
        return self.weights.get(name)


def write(path: Path, weights: Mapping[str, Quantized]) -> None:
    """Write how `weights` are quantized; weights with equal groups of columns share a tensor."""
    orders: dict[bytes, int] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, how in weights.items():
        entries[name] = {"packing": dataclasses.asdict(how.packing)}
        if how.group_of is not None:
            key = how.group_of.astype(np.int32).tobytes()
            entries[name]["order"] = orders.setdefault(key, len(orders))
    tensors = {str(i): np.frombuffer(key, np.int32) for key, i in orders.items()}
    save_file(tensors, path, {"weights": json.dumps(entries)})


def read(path: Path) -> dict[str, Quantized]:
    """What `write` wrote. Raises ArtifactError for a file that is damaged."""
    try:
        with safe_open(path, "numpy") as file:
            entries = json.loads(file.metadata()["weights"])
            orders = {key: file.get_tensor(key).astype(np.int64) for key in file.keys()}
        return {
            name: Quantized(Packing(**entry["packing"]), orders.get(str(entry.get("order"))))
            for name, entry in entries.items()
        }
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path}: damaged ({error}); copy it again from where it was built, or build the model "
            "again from its checkpoint"
        ) from None
