"""The memory model that planning, building and loading share."""

import pytest

from shardwright.errors import DeviceError
from shardwright.runtime.memory import RankMemory, check_fits, count_bytes, on_device

GIB = 1 << 30


def test_bytes_of_tensors():
    assert count_bytes((3, 5), "float16") == 30 and count_bytes((7,), "uint32") == 28
    assert count_bytes((4, 2), "bfloat16") == 16 and count_bytes((4,), "float8_e4m3fn") == 4


def test_a_gpu_gives_out_memory_in_pieces():
    sizes = [1, 100, (2 << 20) + 1, 3 << 20]
    assert on_device(sizes, "cpu") == sum(sizes)
    assert on_device(sizes, "cuda") == (2 + 4 + 4) << 20
    assert on_device([], "cuda") == 0


@pytest.mark.parametrize(
    ("need", "mend"),
    [
        (RankMemory(9 * GIB, GIB, 0, 0), "--quantization q4f16_1 or a larger --num-shards"),
        (RankMemory(GIB, 8 * GIB, 0, GIB), "a smaller --max-seq-len or --max-batch-size"),
        (RankMemory(GIB, GIB, 7 * GIB, GIB), "a smaller --prefill-chunk-size"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_mend(need, mend):
    check_fits("model", need, 10 * GIB, "GPU 3 has")
    with pytest.raises(DeviceError, match=r"model needs 10.00 GiB.*GPU 3 has 9.50 GiB; ") as caught:
        check_fits("model", need, 10 * GIB - GIB // 2, "GPU 3 has")
    assert f"build it with {mend}, " in str(caught.value)
