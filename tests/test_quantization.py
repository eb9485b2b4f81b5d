import numpy as np
import pytest

from shardwright.compiler.quantization import (
    QUANTIZATIONS,
    dequantize_q4,
    quantization,
    quantize_q4,
)
from shardwright.errors import CheckpointError, UsageError


def reference(weight, group):
    """The format element by element, as the module's docstring defines it."""
    rows, cols = weight.shape
    words = np.zeros((rows, cols // 8), np.uint32)
    scales = np.zeros((rows, cols // group), np.float16)
    for r in range(rows):
        for g in range(cols // group):
            largest = max(abs(float(w)) for w in weight[r, g * group : (g + 1) * group])
            scales[r, g] = np.float16(np.float32(largest) / np.float32(7))
        for c in range(cols):
            scale = np.float32(scales[r, c // group])
            value = np.float32(weight[r, c]) / scale if scale else np.float32(0)
            nibble = int(min(max(np.rint(value) + 7, 0), 14))
            words[r, c // 8] |= np.uint32(nibble << 4 * (c % 8))
    return words, scales


def test_registry():
    assert set(QUANTIZATIONS) == {"q0f16", "q0f32", "q4f16_1"}
    q4 = quantization("q4f16_1")
    assert (q4.dtype, q4.bits, q4.group) == ("float16", 4, 32)
    assert (quantization("q0f32").dtype, quantization("q0f32").bits) == ("float32", None)
    with pytest.raises(UsageError, match=r"'q3f16'.*q0f16, q0f32, q4f16_1"):
        quantization("q3f16")


def test_golden_vector():
    """Written by hand from the definition: scale 1, so that nibble = w + 7."""
    row = np.zeros(32, np.float32)
    row[:16] = [-7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 0.4]
    words, scales = quantize_q4(row[None])
    assert words.dtype == np.uint32 and scales.dtype == np.float16
    assert [hex(w) for w in words[0]] == ["0x76543210", "0x7edcba98", "0x77777777", "0x77777777"]
    assert scales.tolist() == [[1.0]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("group", [8, 32, 64])
def test_equals_the_definition(dtype, group):
    weight = np.random.default_rng(0).normal(size=(5, 192)).astype(dtype)
    weight[2] *= 100
    weight[3, :64] = 0
    words, scales = quantize_q4(weight, group)
    expected_words, expected_scales = reference(weight, group)
    np.testing.assert_array_equal(words, expected_words)
    np.testing.assert_array_equal(scales, expected_scales)


def test_blocks_do_not_show(monkeypatch):
    weight = np.random.default_rng(1).normal(size=(7, 96)).astype(np.float32)
    whole = quantize_q4(weight)
    monkeypatch.setattr("shardwright.compiler.quantization._BLOCK", 64)
    for a, b in zip(whole, quantize_q4(weight), strict=True):
        np.testing.assert_array_equal(a, b)


def test_round_trip_is_within_half_a_step():
    weight = np.random.default_rng(2).normal(size=(64, 256)).astype(np.float32)
    words, scales = quantize_q4(weight)
    step = np.repeat(scales.astype(np.float32), 32, axis=1)
    # The rounded scale may be a little small for the largest element, hence the margin.
    assert (np.abs(dequantize_q4(words, scales) - weight) <= step * 0.505).all()


def test_values_of_the_format_survive_exactly():
    rng = np.random.default_rng(3)
    scale = np.float16(2.0) ** rng.integers(-8, 8, (4, 3))
    values = rng.integers(-7, 8, (4, 96)).astype(np.float32)
    values[:, ::32] = 7
    weight = values * np.repeat(scale, 32, axis=1).astype(np.float32)
    words, scales = quantize_q4(weight)
    np.testing.assert_array_equal(dequantize_q4(words, scales), weight)
    again = quantize_q4(dequantize_q4(words, scales))
    np.testing.assert_array_equal(again[0], words)


def test_zero_and_tiny_groups_are_zero():
    weight = np.zeros((1, 64), np.float32)
    weight[0, 32:] = 1e-9  # its scale is zero in float16
    words, scales = quantize_q4(weight)
    assert (words == 0x77777777).all()
    assert (scales == 0).all()


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "NaN or infinity"), (np.inf, "NaN or infinity"), (1e6, "1e\\+06 is too large")],
)
def test_values_that_do_not_fit(value, message):
    weight = np.ones((3, 64), np.float32)
    weight[1, 40] = -value
    with pytest.raises(CheckpointError, match=f"^mlp.up: .*{message}"):
        quantize_q4(weight, name="mlp.up")


def test_columns_must_be_whole_groups():
    with pytest.raises(ValueError, match="40 columns"):
        quantize_q4(np.ones((1, 40), np.float32))
