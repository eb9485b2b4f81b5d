# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Kernels that convert weights on the build machine: TVM compiles them for its CPU on first use.

They run without Python's lock, so that several threads convert at once. What they compute is
defined in `quantization` and `packing`; `tests/test_conversion.py` has it in numpy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
import tvm_ffi
from tvm import tirx
from tvm.script import tirx as T

from shardwright.compiler.script_speed import without_source_context

Array = npt.NDArray[Any]

_STATIC_GROUP = 256
"""Groups up to this length have a kernel of their own, longer ones (whole rows) share one."""

ALIGN = 1
"""Alignment of buffers in bytes: numpy's have less than the 64 that TVM takes for granted."""

_MAGNITUDE = 0x7FFFFFFF

_CODES = {3: "u1", 4: "<u8"}
"""How the kernels see codes: one by one, or those of a word as one number."""

_lock = threading.Lock()


def quantize(groups: Array, most: int, e4m3: bool, scale_dtype: str) -> tuple[Array, Array, float]:
    """Codes uint8 `[n, group]` and scales `[n]` of `groups` `[n, group]`, and max|w| of all.

    `groups` are float16, bfloat16 or float32; `most` is the largest code, or the largest e4m3
    number. The maximum is not finite if any element is not.
    """
    groups, dtype = _bits(groups)
    count, length = groups.shape
    codes, scale = np.empty((count, length), np.uint8), np.empty(count, scale_dtype)
    largest = np.zeros(1, np.uint32)
    if groups.size:
        static = length if length <= _STATIC_GROUP else None
        _kernel(_quantize, dtype, static, most, e4m3, scale_dtype)(groups, codes, scale, largest)
    return codes, scale, float(largest.view(np.float32)[0])


def cast(values: Array, dtype: str) -> tuple[Array, float]:
    """`values`, as in `quantize`, in float16 or float32 and C order, and the result's max|w|."""
    values, given = _bits(values)
    out = np.empty(values.shape, dtype)
    largest = np.zeros(1, np.uint32)
    if values.size:
        _kernel(_cast, given, dtype)(values.reshape(-1), out.reshape(-1), largest)
    return out, float(largest.view(np.float32)[0])


def pack(codes: Array, bits: int) -> Array:
    """Words uint32 `[rows, cols / per_word]` of codes uint8 `[rows, cols]` of 3 or 4 bits."""
    words = np.empty((codes.shape[0], codes.shape[1] // (32 // bits)), np.uint32)
    if words.size:
        _kernel(_pack4 if bits == 4 else _pack3)(_rows_of(codes, _CODES[bits]), words)
    return words


def unpack(words: Array, bits: int) -> Array:
    """Codes uint8 `[rows, cols * per_word]` of 32-bit words `[rows, cols]`; undoes `pack`."""
    words = _rows_of(words, "<u4")
    codes = np.empty((words.shape[0], words.shape[1] * (32 // bits)), np.uint8)
    if words.size:
        _kernel(_unpack4 if bits == 4 else _unpack3)(words, _rows_of(codes, _CODES[bits]))
    return codes


def columns(matrix: Array, index: Array) -> Array:
    """Columns `index` int64 of `matrix` `[k, n]` as rows `[len(index), k]`, in C order."""
    same_size = np.dtype(f"u{matrix.itemsize}")
    out = np.empty((len(index), len(matrix)), matrix.dtype)
    if out.size:
        _kernel(_columns, str(same_size))(
            np.ascontiguousarray(matrix).view(same_size), index, out.view(same_size)
        )
    return out


def nibbles(words: Array, index: Array, shift: Array) -> Array:
    """Codes uint8 `[m, k]`: four bits of rows `index` int64 `[m]` of 32-bit words `[n, k]`.

    The lowest is bit `shift` uint32 `[m]`, of each row its own.
    """
    out = np.empty((len(index), words.shape[1]), np.uint8)
    if out.size:
        _kernel(_nibbles)(np.ascontiguousarray(words).view(np.uint32), index, shift, out)
    return out


def _bits(values: Array) -> tuple[Array, str]:
    """`values` in C order, bfloat16 as uint16, which DLPack of numpy has not; and its dtype."""
    values = np.ascontiguousarray(values)
    dtype = str(values.dtype)
    return (values.view(np.uint16) if dtype == "bfloat16" else values), dtype


def _rows_of(values: Array, dtype: str) -> Array:
    """A matrix seen as `dtype`; copied if its rows are not whole elements of it, one by one."""
    size = np.dtype(dtype).itemsize
    if values.strides[1] != values.itemsize or values.strides[0] % size:
        values = np.ascontiguousarray(values)
    return values.view(dtype)


@lru_cache
def _compiled(generator: Callable[..., tirx.PrimFunc], *parameters: Any) -> Any:
    cpu = tvm.get_global_func("target.llvm_get_system_cpu")()
    target = tvm.target.Target({"kind": "llvm", "mcpu": str(cpu)})
    with target, without_source_context():
        func = generator(*parameters).with_attr("global_symbol", "kernel")
        return tvm.compile(tvm.IRModule({"kernel": func}), target=target)["kernel"]


def _kernel(generator: Callable[..., tirx.PrimFunc], *parameters: Any) -> Callable[..., None]:
    """The compiled kernel, called with numpy's arrays."""
    with _lock:  # the parsing of scripts is not for several threads
        kernel = _compiled(generator, *parameters)

    def call(*arrays: Array) -> None:
        kernel(*(tvm_ffi.from_dlpack(array) for array in arrays))

    return call


def _wide(value: Any, dtype: str) -> Any:
    """The bits, uint32, of `value` as float32."""
    if dtype == "bfloat16":
        return T.shift_left(T.cast(value, "uint32"), T.uint32(16))
    return T.reinterpret("uint32", T.cast(value, "float32"))


def _magnitude(bits: Any) -> Any:
    """|w|, compared as an integer: NaN is the largest, and the loop becomes vector code."""
    return T.bitwise_and(bits, T.uint32(_MAGNITUDE))


def _integer_code(value: Any, most: int) -> Any:
    code = T.nearbyint(value) + T.float32(most)
    code = T.max(T.min(code, T.float32(2 * most)), T.float32(0))
    return T.cast(T.cast(code, "int32"), "uint8")


def _e4m3_code(value: Any) -> Any:
    """Rounded to nearest even, of at most 448 up to rounding.

    From 2 ** -6 on the float's own bits are rounded to three of mantissa; below, numbers are
    multiples of 2 ** -9.
    """
    bits = T.reinterpret("uint32", value)
    magnitude = _magnitude(bits)
    last = T.bitwise_and(T.shift_right(magnitude, T.uint32(20)), T.uint32(1))
    normal = T.shift_right(magnitude + T.uint32(0x7FFFF) + last, T.uint32(20)) - T.uint32(120 << 3)
    multiple = T.nearbyint(T.reinterpret("float32", magnitude) * T.float32(512))
    small = T.cast(T.cast(T.min(multiple, T.float32(8)), "int32"), "uint32")
    sign = T.bitwise_and(T.shift_right(bits, T.uint32(24)), T.uint32(0x80))
    code = T.Select(magnitude < T.uint32(121 << 23), small, normal)
    return T.cast(T.bitwise_or(code, sign), "uint8")


def _quantize(
    dtype: str, group: int | None, most: int, e4m3: bool, scale_dtype: str
) -> tirx.PrimFunc:
    """`(groups [n, group], codes, scale, largest [1])`; `largest` is uint32, a float's bits."""
    length = tirx.Var("group", "int64") if group is None else group
    bits_dtype = "uint16" if dtype == "bfloat16" else dtype

    def code(value: Any) -> Any:
        return _e4m3_code(value) if e4m3 else _integer_code(value, most)

    @T.prim_func(s_tir=True)
    def kernel(groups_h: T.handle, codes_h: T.handle, scale_h: T.handle, largest_h: T.handle):
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        groups = T.match_buffer(groups_h, (n, length), bits_dtype, align=ALIGN)
        codes = T.match_buffer(codes_h, (n, length), "uint8", align=ALIGN)
        scale = T.match_buffer(scale_h, (n,), scale_dtype, align=ALIGN)
        largest = T.match_buffer(largest_h, (1,), "uint32", align=ALIGN)
        overall: T.uint32 = T.uint32(0)
        for g in T.serial(n):
            most_bits: T.uint32 = T.uint32(0)
            for i in T.serial(length):
                most_bits = T.max(most_bits, _magnitude(_wide(groups[g, i], dtype)))
            overall = T.max(overall, most_bits)
            scale[g] = T.cast(T.reinterpret("float32", most_bits) / T.float32(most), scale_dtype)
            stored: T.let[T.float32] = T.cast(scale[g], "float32")
            divisor: T.let[T.float32] = T.Select(stored == T.float32(0), T.float32(1), stored)
            for i in T.serial(length):
                codes[g, i] = code(T.reinterpret("float32", _wide(groups[g, i], dtype)) / divisor)
        largest[0] = overall

    return kernel


def _cast(given: str, dtype: str) -> tirx.PrimFunc:
    """`(values [n], out [n], largest [1])`; `largest` is uint32, a float's bits."""
    bits_dtype = "uint16" if given == "bfloat16" else given

    @T.prim_func(s_tir=True)
    def kernel(values_h: T.handle, out_h: T.handle, largest_h: T.handle):
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        values = T.match_buffer(values_h, (n,), bits_dtype, align=ALIGN)
        out = T.match_buffer(out_h, (n,), dtype, align=ALIGN)
        largest = T.match_buffer(largest_h, (1,), "uint32", align=ALIGN)
        overall: T.uint32 = T.uint32(0)
        for i in T.serial(n):
            value: T.let[T.float32] = T.reinterpret("float32", _wide(values[i], given))
            out[i] = T.cast(value, dtype)
            overall = T.max(overall, _magnitude(_wide(T.cast(value, dtype), dtype)))
        largest[0] = overall

    return kernel


def _spread(value: Any, shift: int, mask: int) -> Any:
    return T.bitwise_and(T.bitwise_or(value, T.shift_left(value, T.uint64(shift))), T.uint64(mask))


def _squeeze(value: Any, shift: int, mask: int) -> Any:
    return T.bitwise_and(T.bitwise_or(value, T.shift_right(value, T.uint64(shift))), T.uint64(mask))


def _pack4() -> tirx.PrimFunc:
    """`(codes, words)`: eight codes, a byte each, seen as one number; pairs, then fours move."""

    @T.prim_func(s_tir=True)
    def kernel(codes_h: T.handle, words_h: T.handle):
        T.func_attr({"tirx.noalias": True})
        rows, cols, stride = T.int64(), T.int64(), T.int64()
        codes = T.match_buffer(
            codes_h, (rows, cols), "uint64", strides=(stride, T.int64(1)), align=ALIGN
        )
        words = T.match_buffer(words_h, (rows, cols), "uint32", align=ALIGN)
        for r in T.serial(rows):
            for c in T.serial(cols):
                words[r, c] = T.cast(
                    _squeeze(
                        _squeeze(
                            _squeeze(codes[r, c], 4, 0x00FF00FF00FF00FF), 8, 0x0000FFFF0000FFFF
                        ),
                        16,
                        0xFFFFFFFF,
                    ),
                    "uint32",
                )

    return kernel


def _unpack4() -> tirx.PrimFunc:
    """`(words, codes)`, as `_pack4` backwards."""

    @T.prim_func(s_tir=True)
    def kernel(words_h: T.handle, codes_h: T.handle):
        T.func_attr({"tirx.noalias": True})
        rows, cols, stride = T.int64(), T.int64(), T.int64()
        words = T.match_buffer(
            words_h, (rows, cols), "uint32", strides=(stride, T.int64(1)), align=ALIGN
        )
        codes = T.match_buffer(codes_h, (rows, cols), "uint64", align=ALIGN)
        for r in T.serial(rows):
            for c in T.serial(cols):
                codes[r, c] = _spread(
                    _spread(
                        _spread(T.cast(words[r, c], "uint64"), 16, 0x0000FFFF0000FFFF),
                        8,
                        0x00FF00FF00FF00FF,
                    ),
                    4,
                    0x0F0F0F0F0F0F0F0F,
                )

    return kernel


def _pack3() -> tirx.PrimFunc:
    """`(codes, words)`, ten codes to a word."""

    @T.prim_func(s_tir=True)
    def kernel(codes_h: T.handle, words_h: T.handle):
        T.func_attr({"tirx.noalias": True})
        rows, cols, stride = T.int64(), T.int64(), T.int64()
        codes = T.match_buffer(
            codes_h, (rows, cols * 10), "uint8", strides=(stride, T.int64(1)), align=ALIGN
        )
        words = T.match_buffer(words_h, (rows, cols), "uint32", align=ALIGN)
        for r in T.serial(rows):
            for c in T.serial(cols):
                word: T.uint32 = T.uint32(0)
                for i in T.unroll(10):
                    code: T.let[T.uint32] = T.cast(codes[r, c * 10 + i], "uint32")
                    word = T.bitwise_or(word, T.shift_left(code, T.cast(3 * i, "uint32")))
                words[r, c] = word

    return kernel


def _unpack3() -> tirx.PrimFunc:
    """`(words, codes)`, as `_pack3` backwards."""

    @T.prim_func(s_tir=True)
    def kernel(words_h: T.handle, codes_h: T.handle):
        T.func_attr({"tirx.noalias": True})
        rows, cols, stride = T.int64(), T.int64(), T.int64()
        words = T.match_buffer(
            words_h, (rows, cols), "uint32", strides=(stride, T.int64(1)), align=ALIGN
        )
        codes = T.match_buffer(codes_h, (rows, cols * 10), "uint8", align=ALIGN)
        for r in T.serial(rows):
            for c in T.serial(cols):
                for i in T.unroll(10):
                    code: T.let[T.uint32] = T.shift_right(words[r, c], T.cast(3 * i, "uint32"))
                    codes[r, c * 10 + i] = T.cast(T.bitwise_and(code, T.uint32(7)), "uint8")

    return kernel


_TILE = 16  # rows and columns at a time, so that both sides stay in the nearest cache


def _columns(dtype: str) -> tirx.PrimFunc:
    """`(matrix [k, n], index [m], out [m, k])`."""

    @T.prim_func(s_tir=True)
    def kernel(matrix_h: T.handle, index_h: T.handle, out_h: T.handle):
        T.func_attr({"tirx.noalias": True})
        k, n, m = T.int64(), T.int64(), T.int64()
        matrix = T.match_buffer(matrix_h, (k, n), dtype, align=ALIGN)
        index = T.match_buffer(index_h, (m,), "int64", align=ALIGN)
        out = T.match_buffer(out_h, (m, k), dtype, align=ALIGN)
        for j0 in T.serial(T.ceildiv(m, _TILE)):
            for i0 in T.serial(T.ceildiv(k, _TILE)):
                for j in T.serial(T.min(_TILE, m - j0 * _TILE)):
                    for i in T.serial(T.min(_TILE, k - i0 * _TILE)):
                        out[j0 * _TILE + j, i0 * _TILE + i] = matrix[
                            i0 * _TILE + i, index[j0 * _TILE + j]
                        ]

    return kernel


def _nibbles() -> tirx.PrimFunc:
    """`(words [n, k], index [m], shift [m], out [m, k])`."""

    @T.prim_func(s_tir=True)
    def kernel(words_h: T.handle, index_h: T.handle, shift_h: T.handle, out_h: T.handle):
        T.func_attr({"tirx.noalias": True})
        n, k, m = T.int64(), T.int64(), T.int64()
        words = T.match_buffer(words_h, (n, k), "uint32", align=ALIGN)
        index = T.match_buffer(index_h, (m,), "int64", align=ALIGN)
        shift = T.match_buffer(shift_h, (m,), "uint32", align=ALIGN)
        out = T.match_buffer(out_h, (m, k), "uint8", align=ALIGN)
        for j in T.serial(m):
            for i in T.serial(k):
                code: T.let[T.uint32] = T.shift_right(words[index[j], i], shift[j])
                out[j, i] = T.cast(T.bitwise_and(code, T.uint32(15)), "uint8")

    return kernel
