import numpy as np
import pytest

from shardwright.errors import InputError
from shardwright.runtime.sampling import SamplingParams


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"no_repeat_ngram_size": -1},
        {"min_new_tokens": -1},
        {"max_new_tokens": 0},
        {"seed": 1 << 64},
        {"eos": tuple(range(17))},
    ],
)
def test_out_of_range(option):
    (name,) = option
    with pytest.raises(InputError, match=f"{name} is .*must be"):
        SamplingParams(**option)


def test_minimum_above_maximum():
    with pytest.raises(InputError, match="min_new_tokens is 5, above max_new_tokens 4"):
        SamplingParams(min_new_tokens=5, max_new_tokens=4)


def test_rows_for_the_device():
    params = SamplingParams(
        temperature=0.5, top_p=0.9, repetition_penalty=1.1, top_k=7, seed=0xFEDCBA9876543210
    )
    assert params.float_row() == [0.5, 0.9, 1.1, 0.0]
    row = params.int_row(prompt_len=12)
    assert row[:4] == [7, 0, 0, 12] and row[6:] == [0, 0]
    words = np.array(row[4:6], np.int32).view(np.uint32)
    assert [hex(word) for word in words] == ["0x76543210", "0xfedcba98"]


def test_no_seed_is_another_each_time():
    assert SamplingParams().int_row(1) != SamplingParams().int_row(1)
    assert SamplingParams(seed=-1).int_row(1)[4:6] == [-1, -1]
