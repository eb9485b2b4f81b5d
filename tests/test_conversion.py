"""The compiled conversions give, bit for bit, what their definitions in numpy give."""

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from shardwright.compiler import conversion

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]


def values(shape, dtype, seed=0):
    """Numbers of all magnitudes, zeros of both signs, groups of zeros, halves between codes."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=shape) * np.exp2(rng.integers(-20, 8, (shape[0], 1)))
    found[::5] = 0
    found[3::5, ::3] = -0.0
    found[4::5] = rng.integers(-14, 15, found[4::5].shape) / 2
    found[4::5, 0] = 7
    return found.astype(dtype)


def quantized(groups, most, e4m3, scale_dtype):
    wide = groups.astype(np.float32)
    largest = np.abs(wide).max(axis=1)
    scale = (largest / np.float32(most)).astype(scale_dtype)
    divisor = scale.astype(np.float32)
    divisor[divisor == 0] = 1
    wide /= divisor[:, None]
    if e4m3:
        codes = wide.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    else:
        codes = np.clip(np.rint(wide) + most, 0, 2 * most).astype(np.uint8)
    return codes, scale, float(largest.max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("group", "most", "e4m3", "scale_dtype"),
    [
        *[(32, most, False, "float16") for most in (3, 7, 127)],
        (40, 3, False, "float16"),
        (8, 7, False, "float32"),
        (13, 7, False, "float16"),
        (64, 448, True, "float32"),
        (1000, 448, True, "float32"),
        (1001, 7, False, "float16"),
    ],
)
def test_quantize(dtype, group, most, e4m3, scale_dtype):
    groups = values((60, group), dtype)
    got = conversion.quantize(groups, most, e4m3, scale_dtype)
    for a, b in zip(got, quantized(groups, most, e4m3, scale_dtype), strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_e4m3_number_and_what_lies_between():
    """Next to each boundary of rounding, on both sides and on it; 448 makes the scale 1."""
    numbers = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middles = (numbers[1:] + numbers[:-1]) / 2
    near = [np.nextafter(middles, np.float32(side)) for side in (0, 1000)]
    row = np.concatenate([numbers, middles, *near])
    groups = np.stack([row, -row])
    codes, scale, _ = conversion.quantize(groups, 448, True, "float32")
    assert scale.tolist() == [1, 1]
    np.testing.assert_array_equal(codes, groups.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", ["float16", "float32"])
def test_cast(dtype, out):
    whole = values((7, 1001), dtype)
    for part in (whole, whole[1:], whole[:, 3:], whole[::2].T):
        got, largest = conversion.cast(part, out)
        expected = np.ascontiguousarray(part.astype(np.float32).astype(out))
        np.testing.assert_array_equal(got.view(np.uint8), expected.view(np.uint8))
        assert got.flags.c_contiguous and largest == np.abs(expected).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_the_maximum(dtype, bad):
    groups = np.ones((5, 32), dtype)
    groups[3, 7] = bad
    assert not np.isfinite(conversion.quantize(groups, 7, False, "float16")[2])
    assert not np.isfinite(conversion.cast(groups, "float16")[1])


def test_overflow_of_a_cast_shows_in_the_maximum():
    assert conversion.cast(np.float32([1, -65519]), "float16")[1] == 65504
    assert conversion.cast(np.float32([1, -65520]), "float16")[1] == np.inf


@pytest.mark.parametrize("bits", [3, 4])
def test_pack(bits):
    per_word = 32 // bits
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 1 << bits, (9, 21 * per_word + 1)).astype(np.uint8)
    # Rows that begin anywhere, rows apart, columns in another order.
    parts = [whole[:, :-1], whole[:, 1:], whole[1::2, per_word:-1], whole[:, -2::-1]]
    for codes in parts:
        codes = codes[:, : codes.shape[1] // per_word * per_word]
        words = conversion.pack(codes, bits)
        expected = np.zeros(words.shape, np.uint32)
        for i in range(per_word):
            expected |= codes[:, i::per_word].astype(np.uint32) << np.uint32(bits * i)
        np.testing.assert_array_equal(words, expected)
        np.testing.assert_array_equal(conversion.unpack(words, bits), codes)
        np.testing.assert_array_equal(
            conversion.unpack(words[:, 1:].view(np.int32), bits), codes[:, per_word:]
        )


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, ml_dtypes.bfloat16, np.int32])
def test_columns(dtype):
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 100, (33, 50)).astype(dtype)
    for index in (np.arange(50), np.arange(7, 28), rng.permutation(50), np.zeros(3, np.int64)):
        np.testing.assert_array_equal(conversion.columns(whole, index), whole[:, index].T)
    part = whole[1:, ::2]
    np.testing.assert_array_equal(conversion.columns(part, np.arange(9)), part[:, :9].T)


def test_nibbles():
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1 << 32, (37, 11)).astype(np.uint32)
    index, place = rng.integers(0, 37, 40), rng.integers(0, 8, 40)
    got = conversion.nibbles(words.view(np.int32), index, (4 * place).astype(np.uint32))
    np.testing.assert_array_equal(got, words[index] >> (4 * place)[:, None] & 15)


def test_nothing_is_converted_to_nothing():
    none = np.zeros((0, 32), np.float32)
    assert conversion.quantize(none, 7, False, "float16")[0].shape == (0, 32)
    assert conversion.cast(none, "float16")[0].shape == (0, 32)
    assert conversion.pack(none.astype(np.uint8), 4).shape == (0, 4)


def test_threads_convert_at_once():
    groups = values((500, 24), np.float32)
    expected = quantized(groups, 5, False, "float16")
    conversion._compiled.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda _: conversion.quantize(groups, 5, False, "float16"), range(16))
        for got in found:
            np.testing.assert_array_equal(got[0], expected[0])
