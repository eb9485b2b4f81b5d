"""What references compute with: numbers in float64, and the weights that codes stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Note = dict[str, Any]
Pairs = list[tuple[Array, Array]]

_FOUR_BITS = {"bits": 4, "offset": 7, "code": "int", "zeros": False}
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def wide(x: Array) -> Array:
    """`x` in float64."""
    return x.astype(np.float64)


def silu(x: Array) -> Array:
    """`x * sigmoid(x)`."""
    found: Array = x / (1 + np.exp(-x))
    return found


def weight(operands: Sequence[Array], note: Note) -> Array:
    """The weight `[N, K]` that words, scales and perhaps zero points stand for.

    `note["packing"]` has the fields of the compiler's `Packing`; without it, four bits less 7.
    """
    words, scale, *zero = operands
    packing = note.get("packing", _FOUR_BITS)
    bits = packing["bits"]
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    codes = ((words[..., None] >> shifts) & np.uint32((1 << bits) - 1)).reshape(len(words), -1)
    factor = wide(scale)
    if packing["code"] == "e4m3":
        values = wide(codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn))
    elif packing["code"] == "e2m1":
        values = np.where(codes & 8, -1, 1) * _E2M1[codes & 7]
        factor = np.where(scale == 0, 0, np.exp2(factor - 127))
    else:
        values = codes.astype(np.float64) - packing["offset"]
    group = values.shape[1] // scale.shape[1]
    if packing["zeros"]:
        values -= np.repeat(wide(zero[0]), group, axis=1)
    found: Array = values * np.repeat(factor, group, axis=1)
    return found
