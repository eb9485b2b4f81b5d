"""Quantization schemes: what `--quantization` names, and how weights are quantized here.

`q4f16_1` and the others of that pattern are MLC's: symmetric, groups along a row, `scale = max|w| /
m` in float16 with `m` the largest integer of so many bits, code `clip(round(w / scale) + m, 0, 2
m)`. `fp8f16` has e4m3 codes and for each row a float32 scale, `max|w| / 448`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt

from shardwright.compiler import conversion
from shardwright.compiler.axes import BLOCK
from shardwright.compiler.columns import Quantized
from shardwright.compiler.packing import Codes, Packing
from shardwright.errors import CheckpointError, ConfigError, UsageError

E4M3_MAX = 448


@dataclass(frozen=True)
class Quantization:
    """How weights are stored: `dtype` of activations and plain weights; no `packing`, no codes.

    A group of 0 in `packing` is a whole row.
    """

    name: str
    dtype: str
    packing: Packing | None = None

    def quantized(
        self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], config: Any
    ) -> Quantized | None:
        """How weight `name` of global `shape` is quantized, None if it stays plain.

        A group is the scheme's, or what divides the blocks that its row is cut in: results must not
        depend on the number of ranks. Raises ConfigError if that leaves too small a group.
        """
        if self.packing is None or len(shape) != 2:
            return None
        group = self.packing.group or shape[1]
        if self.packing.group and self.packing.bits != 3:
            unit = {"heads": config.head_dim, "kv_heads": config.head_dim}.get(axes[1], BLOCK)
            group = gcd(group, unit)
            if group < 8:
                raise ConfigError(
                    f"config.json: head_dim {unit} leaves quantization groups of {group} elements "
                    f"in {name}; build with --quantization q0f16"
                )
        return Quantized(replace(self.packing, group=group))


def _mlc(name: str, bits: Any, group: int) -> Quantization:
    return Quantization(name, "float16", Packing(bits, group, offset=2 ** (bits - 1) - 1))


QUANTIZATIONS = {
    q.name: q
    for q in (
        Quantization("q0f16", "float16"),
        Quantization("q0f32", "float32"),
        _mlc("q4f16_1", 4, 32),
        # The same numbers: MLC's two layouts of a matrix differ in memory, and we have one.
        _mlc("q4f16_0", 4, 32),
        _mlc("q3f16_1", 3, 40),
        _mlc("q8f16_1", 8, 32),
        Quantization("fp8f16", "float16", Packing(8, 0, code="e4m3", scale_dtype="float32")),
    )
}


def quantization(name: str) -> Quantization:
    """The scheme called `name`. Raises UsageError, which lists the known ones."""
    if name not in QUANTIZATIONS:
        raise UsageError(
            f"quantization {name!r} is unknown; choose one of {', '.join(QUANTIZATIONS)}"
        )
    return QUANTIZATIONS[name]


def quantize(
    weight: npt.NDArray[Any], packing: Packing, name: str = "weight"
) -> tuple[Codes, npt.NDArray[Any]]:
    """Codes `[rows, padded]` and scales `[rows, padded / group]` of `weight` `[rows, cols]`.

    `weight` is float16, bfloat16 or float32; its rows are padded with zeros to whole groups. A
    scale is computed in float32 and rounded to its dtype before it divides, so that the error is
    that of the format alone. Raises CheckpointError, naming `name`, if the weight holds NaN or
    infinity or its scale is beyond float16.
    """
    rows, cols = weight.shape
    if cols % packing.group:
        weight = np.pad(weight, ((0, 0), (0, -cols % packing.group)))
    groups = np.ascontiguousarray(weight).reshape(-1, packing.group)
    e4m3 = packing.code == "e4m3"
    most = E4M3_MAX if e4m3 else packing.offset
    codes, scale, largest = conversion.quantize(groups, most, e4m3, packing.scale_dtype)
    if not np.isfinite(largest):
        raise CheckpointError(f"{name}: holds NaN or infinity; the checkpoint is damaged")
    with np.errstate(over="ignore"):
        if not np.isfinite(np.float32(largest / most).astype(packing.scale_dtype)):
            raise CheckpointError(
                f"{name}: value {largest:g} is too large for a float16 scale; "
                "build with --quantization q0f32"
            )
    return codes.reshape(rows, -1), scale.reshape(rows, -1)
