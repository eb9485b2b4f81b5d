"""Quantizing here: the codes by their definition, the error of a round trip."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from shardwright.compiler.packing import Packing, dequantize, pack, unpack
from shardwright.compiler.quantization import QUANTIZATIONS, quantization, quantize
from shardwright.errors import CheckpointError, UsageError

NAMES = ["q4f16_1", "q4f16_0", "q3f16_1", "q8f16_1"]


def packing_of(name, group=None):
    packing = QUANTIZATIONS[name].packing
    return packing if group is None else replace(packing, group=group)


def round_trip(weight, packing):
    codes, scale = quantize(weight, packing)
    whole = dequantize(pack(codes, packing.bits), scale, None, packing)
    return whole[:, : weight.shape[1]], scale


def reference(weight, packing):
    """The format element by element, as the module's docstring defines it."""
    rows, cols = weight.shape
    group, most = packing.group, 2 ** (packing.bits - 1) - 1
    per_word = 32 // packing.bits
    words = np.zeros((rows, cols // per_word), np.uint32)
    scales = np.zeros((rows, cols // group), np.float16)
    for r in range(rows):
        for g in range(cols // group):
            largest = max(abs(float(w)) for w in weight[r, g * group : (g + 1) * group])
            scales[r, g] = np.float16(np.float32(largest) / np.float32(most))
        for c in range(cols):
            scale = np.float32(scales[r, c // group])
            value = np.float32(weight[r, c]) / scale if scale else np.float32(0)
            code = int(min(max(np.rint(value) + most, 0), 2 * most))
            words[r, c // per_word] |= np.uint32(code << packing.bits * (c % per_word))
    return words, scales


def test_registry():
    assert set(QUANTIZATIONS) == {"q0f16", "q0f32", *NAMES, "fp8f16"}
    q4 = quantization("q4f16_1")
    assert (q4.dtype, q4.packing) == ("float16", Packing(4, 32, offset=7))
    assert (quantization("q0f32").dtype, quantization("q0f32").packing) == ("float32", None)
    with pytest.raises(UsageError, match=r"'q3f16'.*q0f16, q0f32, q4f16_1"):
        quantization("q3f16")


def test_the_command_line_knows_the_same_names():
    from shardwright import cli

    assert set(cli.QUANTIZATIONS) == {*QUANTIZATIONS, "checkpoint", "checkpoint-f32"}


def test_golden_vector():
    """Written by hand from the definition: scale 1, so that nibble = w + 7."""
    row = np.zeros(32, np.float32)
    row[:16] = [-7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 0.4]
    codes, scales = quantize(row[None], packing_of("q4f16_1"))
    assert codes.dtype == np.uint8 and scales.dtype == np.float16
    words = pack(codes, 4)
    assert words.dtype == np.uint32
    assert [hex(w) for w in words[0]] == ["0x76543210", "0x7edcba98", "0x77777777", "0x77777777"]
    assert scales.tolist() == [[1.0]]


def test_golden_vector_of_three_bits():
    """Ten codes a word, the first in its lowest bits; two bits are left over."""
    row = np.zeros(40, np.float32)
    row[:10] = [-3, -2, -1, 0, 1, 2, 3, 0, 0, -3]
    codes, _ = quantize(row[None], packing_of("q3f16_1"))
    zeros = int("011" * 10, 2)
    first = sum(code << 3 * i for i, code in enumerate([0, 1, 2, 3, 4, 5, 6, 3, 3, 0]))
    assert pack(codes, 3).tolist() == [[first, zeros, zeros, zeros]]


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_packing_and_back(bits):
    per_word = 32 // bits
    codes = np.random.default_rng(0).integers(0, 1 << bits, (5, 7 * per_word)).astype(np.uint8)
    np.testing.assert_array_equal(unpack(pack(codes, bits), bits), codes)
    np.testing.assert_array_equal(unpack(pack(codes, bits).view(np.int32), bits), codes)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(
    ("name", "group"),
    [*[("q4f16_1", group) for group in (8, 32, 64)], ("q3f16_1", 40), ("q8f16_1", 32)],
)
def test_equals_the_definition(dtype, name, group):
    weight = np.random.default_rng(0).normal(size=(5, 960)).astype(dtype)
    weight[2] *= 100
    weight[3, :64] = 0
    packing = packing_of(name, group)
    codes, scales = quantize(weight, packing)
    expected_words, expected_scales = reference(weight, packing)
    np.testing.assert_array_equal(pack(codes, packing.bits), expected_words)
    np.testing.assert_array_equal(scales, expected_scales)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_within_half_a_step(name):
    packing = packing_of(name)
    weight = np.random.default_rng(2).normal(size=(64, 320)).astype(np.float32)
    back, scales = round_trip(weight, packing)
    step = np.repeat(scales.astype(np.float32), packing.group, axis=1)
    # The rounded scale may be a little small for the largest element, hence the margin.
    margin = 0.5 + 2.0**-11 * packing.offset
    assert (np.abs(back - weight) <= step * margin).all()


def test_round_trip_of_floats_is_within_half_of_the_last_bit():
    packing = packing_of("fp8f16", 320)
    weight = np.random.default_rng(2).normal(size=(64, 320)).astype(np.float32)
    back, scales = round_trip(weight, packing)
    assert scales.dtype == np.float32
    # Four bits of mantissa with the leading one; below 2 ** -6 of the scale the step is fixed.
    bound = np.maximum(np.abs(weight) * 2.0**-4, scales * 2.0**-10)
    assert (np.abs(back - weight) <= bound * (1 + 1e-6)).all()
    assert np.abs(back).max() == pytest.approx(np.abs(weight).max(), rel=1e-6)


def test_float_codes_are_those_of_ml_dtypes():
    values = np.float32([[448, -448, 1, 0.3, -0.0019, 17, 0, 200]])
    codes, scale = quantize(values, Packing(8, 8, code="e4m3", scale_dtype="float32"))
    assert scale.tolist() == [[1.0]]
    np.testing.assert_array_equal(codes, values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


def test_rows_are_padded_to_whole_groups():
    codes, scale = quantize(np.ones((3, 44), np.float16), packing_of("q4f16_1"))
    assert codes.shape == (3, 64) and scale.shape == (3, 2)
    assert (codes[:, :44] == 14).all() and (codes[:, 44:] == 7).all()


@pytest.mark.parametrize("name", NAMES)
def test_values_of_the_format_survive_exactly(name):
    packing = packing_of(name)
    rng = np.random.default_rng(3)
    scale = np.float16(2.0) ** rng.integers(-6, 6, (4, 3))
    values = rng.integers(-packing.offset, packing.offset + 1, (4, 3 * packing.group))
    values[:, :: packing.group] = packing.offset
    weight = values * np.repeat(scale, packing.group, axis=1).astype(np.float32)
    np.testing.assert_array_equal(round_trip(weight, packing)[0], weight)


def test_zero_and_tiny_groups_are_zero():
    weight = np.zeros((1, 64), np.float32)
    weight[0, 32:] = 1e-9  # its scale is zero in float16
    codes, scales = quantize(weight, packing_of("q4f16_1"))
    assert (codes == 7).all()
    assert (scales == 0).all()


@pytest.mark.parametrize("name", [*NAMES, "fp8f16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers(name, value):
    weight = np.ones((3, 320), np.float32)
    weight[1, 40] = -value
    with pytest.raises(CheckpointError, match=r"^mlp.up: .*NaN or infinity"):
        quantize(weight, packing_of(name, 40 if name == "fp8f16" else None), name="mlp.up")


def test_values_that_do_not_fit():
    weight = np.full((3, 64), -1e6, np.float32)
    with pytest.raises(CheckpointError, match=r"^mlp.up: .*1e\+06 is too large"):
        quantize(weight, packing_of("q4f16_1"), name="mlp.up")
