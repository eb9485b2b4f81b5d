"""The demo model, quantized, on one, two, three and four ranks."""

import json
import os

import pytest

import demo
from shardwright import ChatConfig, ChatModule
from shardwright.compiler.build import build
from shardwright.compiler.options import BuildOptions

REQUIRED = 0.90


@pytest.fixture(scope="module")
def sums():
    return json.loads((demo.DEMO / "heldout.json").read_text())["sums"][::8]


def built(ranks, folder, **options):
    out = folder / "demo"
    model = str(demo.DEMO / "model")
    build(BuildOptions(model, out, demo.QUANTIZATION, num_shards=ranks, **options))
    return out


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_demo_model_adds_numbers_it_has_not_seen(ranks, sums, tmp_path):
    out = built(ranks, tmp_path, max_batch_size=16)
    right = 0
    with ChatModule(out, ChatConfig(num_shards=ranks, max_new_tokens=16)) as chat:
        for i in range(0, len(sums), 16):
            batch = sums[i : i + 16]
            replies = chat.generate([item["prompt"] for item in batch])
            right += sum(r == item["answer"] for r, item in zip(replies, batch, strict=True))
    assert right >= REQUIRED * len(sums), f"{right} of {len(sums)}"


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_greedy_tokens_are_the_stored_ones_for_every_number_of_ranks(ranks, tmp_path):
    assert demo.answers(built(ranks, tmp_path, max_batch_size=demo.BATCH)) == demo.golden()


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "plain"])
@pytest.mark.parametrize("collectives", ["auto", "nccl"])
def test_gpus_give_the_greedy_tokens_of_a_cpu(ranks, graph, collectives, tmp_path):
    from shardwright.runtime.device import device_count

    if device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    archs = tuple(os.environ["SHARDWRIGHT_ARCHS"].split(","))
    options = {"target": "cuda", "archs": archs, "use_cuda_graph": graph}
    out = built(ranks, tmp_path, max_batch_size=demo.BATCH, **options)
    assert demo.answers(out, collectives) == demo.golden()
