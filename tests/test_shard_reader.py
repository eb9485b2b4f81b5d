"""Shards on their way into memory: pieces, checks, threads."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from shardwright.compiler import shard_writer
from shardwright.compiler.shard_writer import ShardWriter
from shardwright.errors import ArtifactError
from shardwright.runtime import shard_reader
from shardwright.runtime.artifact import FileEntry, WeightSpec, file_entry
from shardwright.runtime.device import CpuDevice
from shardwright.runtime.shard_reader import locate, read_shard

PIECE = 1000
WEIGHTS = {
    "a": np.arange(700, dtype=np.float32).reshape(7, 100),
    "b": np.arange(3, dtype=np.float16),
    "c": np.arange(1234, dtype=np.uint32),
    "d": np.arange(5, dtype=np.float32),
}
SPECS = tuple(WeightSpec(n, a.shape, str(a.dtype), "Replicate") for n, a in WEIGHTS.items())


@pytest.fixture
def shard(tmp_path, monkeypatch) -> tuple[Path, FileEntry]:
    for module in (shard_reader, shard_writer):
        monkeypatch.setattr(module, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(shard_reader, "BUFFER_BYTES", 300)
    path = tmp_path / "shard.safetensors"
    tensors = [(spec.name, spec.shape, spec.dtype) for spec in SPECS]
    with ShardWriter(path, tensors) as writer:
        for name, array in WEIGHTS.items():
            for start in range(0, array.size, 7):
                writer.write(name, array.reshape(-1)[start : start + 7])
        entry = writer.finish()
    assert entry.sha256 == file_entry(path).sha256
    assert len(entry.crc32) == -(-entry.bytes // PIECE) > 8
    return path, entry


def load(path: Path, entry: FileEntry, progress=lambda done, total: None) -> dict[str, np.ndarray]:
    arrays = {name: np.full_like(array, 77) for name, array in WEIGHTS.items()}
    addresses = {name: array.ctypes.data for name, array in arrays.items()}
    read_shard(path, entry, locate(path, SPECS), addresses, CpuDevice(), 1, progress)
    return arrays


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_every_tensor_arrives(shard, monkeypatch, threads):
    monkeypatch.setattr(shard_reader, "MAX_THREADS", threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    path, entry = shard
    seen: list[int] = []
    arrays = load(path, entry, lambda done, total: seen.append(done))
    for name, array in WEIGHTS.items():
        np.testing.assert_array_equal(arrays[name], array)
    assert len(seen) == len(entry.crc32) and max(seen) == entry.bytes


@pytest.mark.parametrize("at", [0, PIECE, -1])
def test_a_changed_byte_in_any_piece_is_found(shard, at):
    path, entry = shard
    data = bytearray(path.read_bytes())
    data[at] ^= 1 if at else 0  # the first byte is the header's length
    data[9] ^= 0 if at else 4
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"altered, its checksum|damaged header"):
        load(path, entry)


def test_a_file_of_another_length_or_none(shard):
    path, entry = shard
    with pytest.raises(ArtifactError, match=r"altered, .* instead of"):
        load(path, dataclasses.replace(entry, bytes=entry.bytes - 1))
    with pytest.raises(ArtifactError, match="truncated"):
        load(path, dataclasses.replace(entry, bytes=entry.bytes + 1))
    path.unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        locate(path, SPECS)


def test_what_the_header_must_hold(shard):
    path, _ = shard
    wrong = dataclasses.replace(SPECS[0], shape=(100, 7))
    with pytest.raises(ArtifactError, match=r"a is float32\[7, 100\], not float32\[100, 7\]"):
        locate(path, (wrong,))
    with pytest.raises(ArtifactError, match="damaged header"):
        locate(path, (dataclasses.replace(SPECS[0], name="e"),))
