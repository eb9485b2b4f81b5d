import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from shardwright.compiler.checkpoint import Checkpoint, listing, read_header
from shardwright.errors import CheckpointError

RNG = np.random.default_rng(0)
TENSORS = {
    "a": RNG.normal(size=(6, 4)).astype(np.float32),
    "b": RNG.normal(size=(5,)).astype(np.float16),
    "c": RNG.normal(size=(3, 2, 2)).astype(ml_dtypes.bfloat16),
    "scalar": np.array(3, np.float32),
}


@pytest.fixture
def single(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    files = {
        "model-00001-of-00002.safetensors": ["a"],
        "model-00002-of-00002.safetensors": ["b", "c"],
    }
    for file, names in files.items():
        save_file({name: TENSORS[name] for name in names}, tmp_path / file)
    write_index(tmp_path, {name: file for file, names in files.items() for name in names})
    return tmp_path


def write_index(path, weight_map):
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_single_file(single):
    with Checkpoint.open(single) as checkpoint:
        assert checkpoint.config == {"hidden_size": 4}
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
            name: tensor.shape for name, tensor in TENSORS.items()
        }
        assert checkpoint.tensors["c"].dtype == "BF16"
        for name, tensor in TENSORS.items():
            read = checkpoint.read(name)
            assert read.dtype == tensor.dtype
            np.testing.assert_array_equal(read, tensor)


def test_rows(single):
    with Checkpoint.open(str(single)) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read_rows("a", 2, 5), TENSORS["a"][2:5])
        np.testing.assert_array_equal(checkpoint.read_rows("b", 4, 5), TENSORS["b"][4:])
        np.testing.assert_array_equal(checkpoint.read_rows("c", 1, 3), TENSORS["c"][1:])
        assert checkpoint.read_rows("c", 1, 1).shape == (0, 2, 2)


def test_sharded(sharded):
    with Checkpoint.open(sharded) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b", "c"}
        for name in checkpoint.tensors:
            np.testing.assert_array_equal(checkpoint.read(name), TENSORS[name])


def test_reads_after_close(single):
    checkpoint = Checkpoint.open(single)
    checkpoint.read("a")
    checkpoint.close()
    np.testing.assert_array_equal(checkpoint.read("a"), TENSORS["a"])
    checkpoint.close()


def test_tokenizer_files(single):
    assert Checkpoint.open(single).tokenizer_files() == []
    (single / "tokenizer.json").write_text("{}")
    (single / "generation_config.json").write_text("{}")
    names = [path.name for path in Checkpoint.open(single).tokenizer_files()]
    assert names == ["tokenizer.json", "generation_config.json"]


def test_config_alone_is_enough_without_weights(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1}')
    checkpoint = Checkpoint.open(tmp_path, weights=False)
    assert (checkpoint.config, checkpoint.tensors) == ({"a": 1}, {})
    with pytest.raises(CheckpointError, match=r"no weights.*--build-model-only"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["absent", "/absent/model", "./a/b/c", "~/absent-model", "a b/c"])
def test_no_such_model(name):
    with pytest.raises(CheckpointError, match="no such model; expected a directory"):
        Checkpoint.open(name)


def test_a_hub_id_that_cannot_be_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"nobody/nothing: no such directory.*HF_HUB_OFFLINE"):
        Checkpoint.open("nobody/nothing")


def test_the_only_safetensors_file_may_have_any_name(single):
    (single / "model.safetensors").rename(single / "gptq_model-4bit-128g.safetensors")
    assert set(Checkpoint.open(single).tensors) == set(TENSORS)


def test_a_file_is_no_checkpoint(single):
    with pytest.raises(CheckpointError, match="is a file; pass the checkpoint's directory"):
        Checkpoint.open(single / "model.safetensors")


def test_config_is_missing_or_damaged(single):
    (single / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        Checkpoint.open(single)
    (single / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json: expected a JSON object"):
        Checkpoint.open(single)
    (single / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config.json"):
        Checkpoint.open(single)


def test_pytorch_files_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"run code.*save_pretrained"):
        Checkpoint.open(tmp_path)


def test_missing_shards_are_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing model-00002-of-00002.safetensors"):
        Checkpoint.open(sharded)


def test_tensor_in_two_shards(sharded):
    save_file({"a": TENSORS["a"], "c": TENSORS["c"]}, sharded / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"c is both in model-00001.* and in model-00002"):
        Checkpoint.open(sharded)


def test_index_names_an_absent_tensor(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(sharded, {**index, "d": "model-00001-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"not in its shard: d \(model-00001"):
        Checkpoint.open(sharded)


def test_index_without_a_map(sharded):
    (sharded / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        Checkpoint.open(sharded)


def test_truncated_file(single):
    path = single / "model.safetensors"
    data = path.read_bytes()
    for length in (0, 5, 100, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
            Checkpoint.open(single)


def test_truncated_while_open(single):
    path = single / "model.safetensors"
    with Checkpoint.open(single) as checkpoint:
        checkpoint.read("b")
        data = path.read_bytes()
        with open(path, "r+b") as file:
            file.truncate(len(data) - 120)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
            for name in TENSORS:
                checkpoint.read(name)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}',
        b"\xff\xff\xff",
    ],
)
def test_damaged_header(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged safetensors header"):
        read_header(path)


def test_quantized_dtypes_are_refused(single):
    save_file({"w": np.ones((2, 2), np.int8)}, single / "model.safetensors")
    with (
        Checkpoint.open(single) as checkpoint,
        pytest.raises(CheckpointError, match="w has dtype I8; only F32, F16, BF16"),
    ):
        checkpoint.read("w")


def test_listing():
    assert listing(["a", "b"]) == "a, b"
    assert listing([str(i) for i in range(23)]).endswith("18, 19 and 3 more")


def test_a_tensor_twice_in_a_file(single):
    entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    header = f"{{{entry}, {entry}}}".encode()
    path = single / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"damaged safetensors header.*a is there twice"):
        Checkpoint.open(single)
