"""How the codes of a quantized weight lie in memory: the formats that the kernels read.

A weight `[N, K]` is words uint32 `[N, K / per_word]`, the first code in the lowest bits, a scale
`[N, K / group]` and, where the format has them, zero points of the scale's shape and dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import ml_dtypes
import numpy as np
import numpy.typing as npt

from shardwright.compiler import conversion

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the codes 0 to 7 of "e2m1"; 8 to 15 are these with a minus sign."""

Code: TypeAlias = Literal["int", "e4m3", "e2m1"]
CODES: tuple[Code, ...] = get_args(Code)

Codes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Packing:
    """One format. Element = `(code - offset) * scale`, or `(code - zero) * scale` with `zeros`.

    `code` "e4m3" is a float of 4 exponent and 3 mantissa bits (arXiv:2209.05433, without infinity)
    in place of an integer: element = `code * scale`. "e2m1" is one of 2 and 1, of `E2M1`, and its
    scales are e8m0: element = `code * 2 ** (scale - 127)`, with scale 0 for zero (MXFP4 of
    https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf).
    `group` elements of a row share a scale.
    """

    bits: Literal[3, 4, 8]
    group: int
    code: Code = "int"
    offset: int = 0
    zeros: bool = False
    scale_dtype: str = "float16"

    @property
    def per_word(self) -> int:
        """Codes in a word; with three bits two bits of a word are left over."""
        return 32 // self.bits

    @property
    def unit(self) -> int:
        """Elements that kernels take at a time: whole words, sixteen bytes, within one group."""
        unit = 4 * self.per_word
        while self.group % unit:
            unit //= 2
        return unit

    @property
    def suffix(self) -> str:
        """Last part of the name of the words' tensor."""
        return f"q{self.bits}" if self.code == "int" else self.code

    def is_q4(self, dtype: str) -> bool:
        """Whether it is the format of the four-bit kernels, for activations of `dtype`."""
        int4 = (self.bits, self.code, self.offset, self.zeros) == (4, "int", 7, False)
        return int4 and self.scale_dtype == dtype

    def attributes(self) -> tuple[int, int, int]:
        """Bits, offset and which of `CODES`: with the tensors' shapes and dtypes all there is."""
        return self.bits, self.offset, CODES.index(self.code)


def pack(codes: Codes, bits: int) -> Words:
    """Words `[rows, cols / per_word]` of `codes` `[rows, cols]`; cols must be whole words."""
    if bits == 8:
        return np.ascontiguousarray(codes).view("<u4")
    words: Words = conversion.pack(codes, bits)
    return words


def unpack(words: npt.NDArray[Any], bits: int) -> Codes:
    """Codes `[rows, cols * per_word]` of 32-bit words `[rows, cols]`, the reverse of `pack`."""
    if bits == 8:
        return np.ascontiguousarray(words).view(np.uint8)
    codes: Codes = conversion.unpack(words, bits)
    return codes


def decode(codes: Codes, packing: Packing) -> npt.NDArray[np.float32]:
    """The numbers that codes stand for before zero points and scales."""
    if packing.code == "e2m1":
        table = np.array([*E2M1, *(-x for x in E2M1)], np.float32)
        found: npt.NDArray[np.float32] = table[codes]
        return found
    floats = packing.code == "e4m3"
    plain = codes.view(ml_dtypes.float8_e4m3fn) if floats else codes
    values: npt.NDArray[np.float32] = plain.astype(np.float32)
    return values if floats else values - np.float32(packing.offset)


def scales(stored: npt.NDArray[Any], packing: Packing) -> npt.NDArray[np.float32]:
    """The numbers that stored scales stand for."""
    values: npt.NDArray[np.float32] = stored.astype(np.float32)
    if packing.code == "e2m1":
        values = (stored.astype(np.uint32) << np.uint32(23)).view(np.float32)
    return values


def dequantize(
    words: Words,
    scale: npt.NDArray[Any],
    zero: npt.NDArray[Any] | None,
    packing: Packing,
) -> npt.NDArray[np.float32]:
    """The weight `[N, K]` that the tensors stand for, computed in float32."""
    values = decode(unpack(words, packing.bits), packing)
    if zero is not None:
        values -= np.repeat(zero.astype(np.float32), packing.group, axis=1)
    values *= np.repeat(scales(scale, packing), packing.group, axis=1)
    return values
