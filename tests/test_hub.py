"""Models from a hub: which files are fetched, resuming, and what is said when it fails."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hub_server import COMMIT, Hub
from safetensors.numpy import save

SHARDS = {
    f"model-0000{i}-of-00002.safetensors": save({name: np.full((4, 4), i, np.float32)})
    for i, name in enumerate(("a", "b"), 1)
}
INDEX = {"weight_map": {"a": sorted(SHARDS)[0], "b": sorted(SHARDS)[1]}}
SMALL = {
    "config.json": b'{"hidden_size": 4}',
    "generation_config.json": b'{"top_k": 1}',
    "tokenizer.json": b"{}",
    "tokenizer.model": b"model",
    "chat_template.jinja": b"{{ messages }}",
}
JUNK = {
    "README.md": b"hello",
    "pytorch_model.bin": b"pickle",
    "model-q4.gguf": b"GGUF",
    "consolidated.safetensors": b"the same again",
    "original/consolidated.00.pth": b"pickle",
    "onnx/model.onnx": b"onnx",
}
REPOSITORIES = {
    "some/sharded": {
        **SMALL,
        **SHARDS,
        **JUNK,
        "model.safetensors.index.json": json.dumps(INDEX).encode(),
        "left-over.safetensors": b"of an earlier save",
    },
    "some/single": {
        **SMALL,
        **JUNK,
        "model.safetensors": SHARDS[sorted(SHARDS)[0]],
        "model.fp32.safetensors": b"another precision",
    },
    "some/renamed": {**SMALL, **JUNK, "gptq-4bit.safetensors": SHARDS[sorted(SHARDS)[0]]},
    "some/pickles": {**SMALL, "pytorch_model.bin": b"pickle"},
    "some/gguf": {**SMALL, "model-q4.gguf": b"GGUF"},
    "some/nothing": SMALL,
    "some/big": {**SMALL, "model.safetensors": save({"a": np.zeros(6 << 20, np.float32)})},
    "some/gated": SMALL,
}
OPEN = """
import sys
from shardwright.compiler.checkpoint import Checkpoint
from shardwright.errors import CheckpointError
code = 0
for model in sys.argv[2:]:
    try:
        with Checkpoint.open(model, weights=sys.argv[1] == "True") as found:
            print(found.root.name, *sorted(found.tensors))
    except CheckpointError as error:
        print(error, file=sys.stderr)
        code = 1
sys.exit(code)
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub(REPOSITORIES)
    server.gated = {"some/gated"}
    yield server
    server.close()


def start(url: str, home: Path, *models: str, weights: bool = True) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", OPEN, str(weights), *models]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def fetch(url: str, home: Path, *models: str, weights: bool = True) -> tuple[int, str, str]:
    process = start(url, home, *models, weights=weights)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("model", "files", "tensors"),
    [
        ("some/sharded", {*SHARDS, "model.safetensors.index.json"}, "a b"),
        ("some/single@v2", {"model.safetensors"}, "a"),
        ("some/renamed", {"gptq-4bit.safetensors"}, "a"),
    ],
)
def test_only_what_is_needed_is_fetched(hub, tmp_path, model, files, tensors):
    code, out, err = fetch(hub.url, tmp_path, model)
    assert (code, out) == (0, f"{COMMIT} {tensors}\n"), err
    assert hub.downloaded() == sorted(files | set(SMALL))
    # The second time everything is in the cache, and without a network at all.
    count = len(hub.downloaded())
    assert fetch("http://127.0.0.1:9", tmp_path, model)[:2] == (0, f"{COMMIT} {tensors}\n")
    assert len(hub.downloaded()) == count


def test_without_weights_only_small_files_are_fetched(hub, tmp_path):
    code, out, err = fetch(hub.url, tmp_path, "some/single", weights=False)
    assert (code, out) == (0, f"{COMMIT}\n"), err
    assert hub.downloaded() == sorted(SMALL)


def test_a_broken_connection_goes_on_where_it_was(hub, tmp_path):
    size = len(REPOSITORIES["some/big"]["model.safetensors"])
    hub.cut_at["model.safetensors"] = size * 3 // 4  # huggingface-hub resumes at whole 10 MB
    code, out, err = fetch(hub.url, tmp_path, "some/big")
    assert (code, out) == (0, f"{COMMIT} a\n"), err
    ranges = [r for _, path, r in hub.requests if r and path.endswith("model.safetensors")]
    assert len(ranges) == 1 and 0 < int(ranges[0].removeprefix("bytes=").split("-")[0]) < size


def test_what_a_killed_download_had_is_kept(hub, tmp_path):
    first, hub.hold = sorted(SHARDS)
    process = start(hub.url, tmp_path, "some/sharded")
    deadline = time.monotonic() + 60
    while hub.hold or not list(tmp_path.glob(f"hub/*/snapshots/*/{first}")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    code, out, err = fetch(hub.url, tmp_path, "some/sharded")
    assert (code, out) == (0, f"{COMMIT} a b\n"), err
    assert [hub.downloaded().count(name) for name in sorted(SHARDS)] == [1, 2]


def test_what_cannot_be_fetched_is_explained(hub, tmp_path):
    messages = {
        "some/gated": "access is restricted.*hf auth login.*Access to model some/gated",
        "some/absent": "no such model.*Repository Not Found",
        "some/single@v9": "no revision v9.*Invalid rev id: v9",
        "some/pickles": "pickles: reading them runs code.*save_pretrained",
        "some/gguf": "GGUF files only",
        "some/nothing": "holds no safetensors",
    }
    code, out, err = fetch(hub.url, tmp_path, *messages)
    assert (code, out) == (1, "")
    for line, (model, message) in zip(err.splitlines(), messages.items(), strict=True):
        assert re.match(f"{model}: .*{message}", line), line


def test_no_network(tmp_path):
    code, _, err = fetch("http://127.0.0.1:9", tmp_path, "some/single")
    assert code == 1 and len(err.splitlines()) == 1
    assert "some/single: no such directory" in err and "check the network" in err
