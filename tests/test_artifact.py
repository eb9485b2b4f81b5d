import dataclasses
import json
import os
import subprocess
import sys

import pytest

from shardwright.errors import ArtifactError
from shardwright.runtime.artifact import (
    SCHEMA,
    FileEntry,
    Function,
    Limits,
    Manifest,
    Mesh,
    Model,
    Target,
    TensorSpec,
    WeightSpec,
    file_entry,
    load_manifest,
    sha256_file,
    shard_name,
    verify_file,
    write_manifest,
)


def manifest(**changes):
    whole = Manifest(
        version="0.1.0",
        name="demo",
        model=Model(
            architecture="LlamaForCausalLM",
            config={"hidden_size": 8, "rope_scaling": {"type": "linear"}, "x": [1, None]},
            vocab_size=16,
            bos=None,
            eos=(2, 3),
            num_layers=1,
        ),
        target=Target("cuda", ("sm_89", "sm_90a")),
        mesh=Mesh(("tp",), (2,)),
        quantization="q4f16_1",
        dtype="float16",
        limits=Limits(64, 2, 16, 16, 8),
        use_cuda_graph=True,
        libraries=(),
        decode_buckets=(1, 2),
        workspace_bytes=4096,
        state=(TensorSpec("tokens", (2,), "int32"),),
        functions={
            "prefill": Function((TensorSpec("tokens", ("n",), "int32"),)),
            "sample": Function((TensorSpec("workspace", (), "object"),)),
        },
        weights=(WeightSpec("norm", (8,), "float16", "Replicate"),),
        has_weights=True,
        dummy_weights=False,
        files={"model.so": FileEntry("00" * 32, 5)},
    )
    return dataclasses.replace(whole, **changes)


def test_round_trip(tmp_path):
    write_manifest(tmp_path, manifest())
    assert load_manifest(tmp_path) == manifest()
    assert load_manifest(tmp_path).mesh.size == 2
    assert os.listdir(tmp_path) == ["manifest.json"]
    data = json.loads((tmp_path / "manifest.json").read_text())
    assert data["schema"] == SCHEMA
    assert data["functions"]["prefill"]["args"][0] == {
        "name": "tokens",
        "shape": ["n"],
        "dtype": "int32",
    }


def test_fields_of_a_newer_writer_are_ignored(tmp_path):
    write_manifest(tmp_path, manifest())
    data = json.loads((tmp_path / "manifest.json").read_text())
    data["later"] = data["model"]["later"] = 1
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    assert load_manifest(tmp_path) == manifest()


def test_writing_replaces_and_leaves_nothing_on_failure(tmp_path):
    write_manifest(tmp_path, manifest(name="old"))
    write_manifest(tmp_path, manifest(name="new"))
    assert load_manifest(tmp_path).name == "new"
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_manifest(tmp_path / "absent", manifest())
    (tmp_path / "other" / "manifest.json").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_manifest(tmp_path / "other", manifest())
    assert os.listdir(tmp_path / "other") == ["manifest.json"]


def test_no_such_directory(tmp_path):
    with pytest.raises(ArtifactError, match="absent: no such directory"):
        load_manifest(tmp_path / "absent")


def test_unfinished_build(tmp_path):
    with pytest.raises(ArtifactError, match=r"build did not finish; run `shardwright build"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), SCHEMA + 1, "newer Shardwright"),
        (("schema",), 0, "schema 0 does not exist"),
        (("schema",), "1", "`schema` is missing"),
        (("schema",), None, "`schema` is missing"),
        (("model", "eos"), None, "`model.eos` is missing"),
        (("model",), [], "`model` is no object"),
        (("workspace_bytes",), "much", "`workspace_bytes` has the wrong type"),
        (("workspace_bytes",), True, "`workspace_bytes` has the wrong type"),
        (("limits", "page_size"), 1.5, "`limits.page_size` has the wrong type"),
        (("functions", "prefill", "args"), 3, "`functions.prefill.args` has the wrong type"),
        (("state", 0, "shape"), [2.5], r"`state\[0\].shape\[0\]` has the wrong type"),
        (("files", "model.so", "sha256"), None, "`files.model.so.sha256` is missing"),
    ],
)
def test_damaged_manifests(tmp_path, path, value, message):
    write_manifest(tmp_path, manifest())
    data = json.loads((tmp_path / "manifest.json").read_text())
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=message):
        load_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff\xfe", "nul"])
def test_not_json(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError, match=r"manifest\.json: "):
        load_manifest(tmp_path)


def test_verify_file(tmp_path):
    path = tmp_path / "shards" / "a"
    path.parent.mkdir()
    path.write_bytes(b"0123456789")
    entry = file_entry(path)
    assert entry == FileEntry(sha256_file(path), 10)
    assert entry.sha256.startswith("84d89877f0d4041e")
    verify_file(tmp_path, "shards/a", entry)
    for content, message in [
        (b"01234", "truncated, 5 bytes instead of 10"),
        (b"0123456789x", "altered, 11 bytes"),
        (b"0123456780", "altered, its checksum"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=f"shards/a: {message}.*build the model again"):
            verify_file(tmp_path, "shards/a", entry)
    path.unlink()
    with pytest.raises(ArtifactError, match="shards/a: missing"):
        verify_file(tmp_path, "shards/a", entry)


def test_shard_name():
    assert shard_name(0, 2) == "shards/rank-00000-of-00002.safetensors"
    assert shard_name(15, 16) == "shards/rank-00015-of-00016.safetensors"


def test_imports_no_tvm():
    code = "import sys, shardwright.runtime.artifact; sys.exit('tvm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
