"""The demo model through `ChatModule`, quantized, on one, two and three ranks."""

import json
from pathlib import Path

import pytest

from shardwright import ChatConfig, ChatModule
from shardwright.compiler.build import BuildOptions, build

DEMO = Path(__file__).parents[1] / "demo"
REQUIRED = 0.90


@pytest.fixture(scope="module")
def sums():
    return json.loads((DEMO / "heldout.json").read_text())["sums"][::8]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_demo_model_adds_numbers_it_has_not_seen(ranks, sums, tmp_path):
    out = tmp_path / "demo"
    build(BuildOptions(str(DEMO / "model"), out, num_shards=ranks, max_batch_size=16))
    right = 0
    with ChatModule(out, ChatConfig(num_shards=ranks, max_new_tokens=16)) as chat:
        for i in range(0, len(sums), 16):
            batch = sums[i : i + 16]
            replies = chat.generate([item["prompt"] for item in batch])
            right += sum(r == item["answer"] for r, item in zip(replies, batch, strict=True))
    assert right >= REQUIRED * len(sums), f"{right} of {len(sums)}"
