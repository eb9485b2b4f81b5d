"""Quantization schemes and the four-bit format.

`q4f16_1` is MLC's: symmetric, groups of 32 along a row, `scale = max|w| / 7` in float16, stored
value `clip(round(w / scale) + 7, 0, 14)`, eight to a 32-bit word, the first in the lowest bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardwright.errors import CheckpointError, UsageError

# Elements converted at a time, so that the temporaries of a block stay in the processor's cache.
_BLOCK = 1 << 17


@dataclass(frozen=True)
class Quantization:
    """How weights are stored: `dtype` of activations and plain weights; `bits` None is no packing.

    `group` is the number of elements of a row that share a scale.
    """

    name: str
    dtype: str
    bits: int | None = None
    group: int = 32


QUANTIZATIONS = {
    q.name: q
    for q in (
        Quantization("q0f16", "float16"),
        Quantization("q0f32", "float32"),
        Quantization("q4f16_1", "float16", bits=4),
    )
}


def quantization(name: str) -> Quantization:
    """The scheme called `name`. Raises UsageError, which lists the known ones."""
    if name not in QUANTIZATIONS:
        raise UsageError(
            f"quantization {name!r} is unknown; choose one of {', '.join(QUANTIZATIONS)}"
        )
    return QUANTIZATIONS[name]


def quantize_q4(
    weight: npt.NDArray[np.floating], group: int = 32, name: str = "weight"
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float16]]:
    """Pack `weight` `[rows, cols]`, float16 or float32, into four bits an element.

    Returns words `[rows, cols / 8]` and scales `[rows, cols / group]`. `cols` must be a multiple of
    8 and of `group`. The scale is computed in float32 and rounded to float16 before it divides, so
    that the error is that of the format alone. Raises CheckpointError, naming `name`, if the weight
    holds NaN or infinity or its scale is beyond float16.
    """
    rows, cols = weight.shape
    if cols % 8 or cols % group:
        raise ValueError(f"{cols} columns are no multiple of 8 and of the group {group}")
    flat = np.ascontiguousarray(weight).reshape(-1, group)
    packed = np.empty((flat.shape[0], group // 2), np.uint8)
    scale = np.empty(flat.shape[0], np.float16)
    step = max(1, _BLOCK // group)
    for start in range(0, len(flat), step):
        block = slice(start, start + step)
        _quantize_block(flat[block], packed[block], scale[block], name)
    words = packed.reshape(rows, cols // 2).view("<u4").astype(np.uint32, copy=False)
    return words, scale.reshape(rows, cols // group)


def _quantize_block(
    weight: npt.NDArray[np.floating],
    packed: npt.NDArray[np.uint8],
    scale: npt.NDArray[np.float16],
    name: str,
) -> None:
    """Quantize groups `weight` `[n, group]` into `packed` `[n, group / 2]` and `scale` `[n]`."""
    values = weight.astype(np.float32)
    largest = np.abs(values).max(axis=1)
    if not np.isfinite(largest).all():
        raise CheckpointError(f"{name}: holds NaN or infinity; the checkpoint is damaged")
    with np.errstate(over="ignore"):
        scale[:] = largest / np.float32(7)
    if not np.isfinite(scale).all():
        raise CheckpointError(
            f"{name}: value {largest.max():g} is too large for a float16 scale; "
            "build with --quantization q0f32"
        )
    divisor = scale.astype(np.float32)
    divisor[divisor == 0] = 1
    np.divide(values, divisor[:, None], out=values)
    np.rint(values, out=values)
    values += 7
    np.clip(values, 0, 14, out=values)
    # Two elements, a byte each, seen as one 16-bit number; the high byte's four bits move down.
    pairs = values.astype(np.uint8).view("<u2")
    pairs |= pairs >> 4
    packed[:] = pairs  # the cast keeps the low byte


def dequantize_q4(
    packed: npt.NDArray[np.uint32], scale: npt.NDArray[np.float16], group: int = 32
) -> npt.NDArray[np.float32]:
    """The weight `[rows, cols]` that words `[rows, cols / 8]` and scales stand for."""
    nibbles = (packed[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & np.uint32(15)
    values: npt.NDArray[np.float32] = nibbles.reshape(len(packed), -1).astype(np.float32)
    values -= 7
    values *= np.repeat(scale.astype(np.float32), group, axis=1)
    return values
