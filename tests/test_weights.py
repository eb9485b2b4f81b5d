import hashlib
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shardwright.compiler import slicing
from shardwright.compiler.checkpoint import Checkpoint
from shardwright.compiler.columns import Quantized
from shardwright.compiler.packing import Packing, dequantize, pack
from shardwright.compiler.placement import (
    PAD,
    Partial,
    Replicate,
    Shard,
    even_table,
    head_tables,
)
from shardwright.compiler.quantization import quantize
from shardwright.compiler.shard_writer import ShardWriter
from shardwright.compiler.weights import (
    Source,
    Weight,
    check_names,
    plain_readers,
    write_shards,
)
from shardwright.errors import BuildError, CheckpointError, ShardingError
from shardwright.runtime.artifact import shard_name, verify_file

RNG = np.random.default_rng(0)
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB, MLP = 12, 4, 8, 96, 101, 224
TENSORS = {
    "embed": RNG.normal(size=(VOCAB, HIDDEN)).astype(np.float32),
    "q": RNG.normal(size=(HEADS * HEAD_DIM, HIDDEN)).astype(np.float32),
    "k": RNG.normal(size=(KV_HEADS * HEAD_DIM, HIDDEN)).astype(np.float32),
    "q.bias": RNG.normal(size=(HEADS * HEAD_DIM,)).astype(np.float32),
    "k.bias": RNG.normal(size=(KV_HEADS * HEAD_DIM,)).astype(np.float32),
    "down": RNG.normal(size=(HIDDEN, MLP)).astype(np.float32),
    "norm": RNG.normal(size=(HIDDEN,)).astype(np.float32),
    "experts": RNG.normal(size=(3, 10, 16)).astype(np.float32),
}


def checkpoint(path, tensors):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    save_file(tensors, path / "model.safetensors")
    return Checkpoint.open(path)


Q4 = Packing(4, 32, offset=7)


def source(name, placement, quantized=None):
    return Source(name, TENSORS[name].shape, placement, quantized)


def placements(world):
    """Placements as the partitioner makes them: heads in groups, padded tails, groups of 32."""
    q, kv = head_tables(HEADS, KV_HEADS, world)
    return {
        "embed": Shard(0, VOCAB, 8, even_table(-(-VOCAB // 8), world)),
        "q": Shard(0, HEADS * HEAD_DIM, HEAD_DIM, q),
        "k": Shard(0, KV_HEADS * HEAD_DIM, HEAD_DIM, kv),
        "down": Shard(1, MLP, 32, even_table(MLP // 32, world)),
        "norm": Replicate(),
        "experts": Shard(2, 16, 1, even_table(16, world)),
    }


def program(world, dtype="float32", quantized=None):
    p = placements(world)
    qk = (source("q", p["q"], quantized), source("k", p["k"], quantized))
    bias = (source("q.bias", p["q"]), source("k.bias", p["k"]))
    return [
        Weight("embed.weight", (source("embed", p["embed"], quantized),), dtype),
        Weight("qk.weight", qk, dtype),
        Weight("qk.bias", bias, dtype),
        Weight("down.weight", (source("down", p["down"], quantized),), dtype),
        Weight("norm.weight", (source("norm", p["norm"]),), dtype),
        Weight("experts.weight", (source("experts", p["experts"]),), dtype),
    ]


def expected(src, rank):
    """A rank's slice, by the index of its placement alone."""
    whole = TENSORS[src.name]
    if not isinstance(src.placement, Shard):
        return whole
    index = src.placement.index(rank)
    out = np.zeros(src.local_shape, whole.dtype)
    dim = src.placement.dim
    np.moveaxis(out, dim, 0)[index != PAD] = np.moveaxis(whole, dim, 0)[index[index != PAD]]
    return out


@pytest.mark.parametrize("chunk", [64, 1 << 22])
@pytest.mark.parametrize("world", range(1, 17))
def test_slices_of_every_world_size(tmp_path, monkeypatch, world, chunk):
    monkeypatch.setattr(slicing, "CHUNK", chunk)
    weights = program(world)
    with checkpoint(tmp_path / "model", TENSORS) as opened:
        entries = write_shards(opened, weights, world, tmp_path)
    assert list(entries) == [shard_name(rank, world) for rank in range(world)]
    ranks = [load_file(tmp_path / name) for name in entries]
    for rank, tensors in enumerate(ranks):
        assert set(tensors) == {weight.name for weight in weights}
        for weight in weights:
            slices = [expected(src, rank) for src in weight.sources]
            np.testing.assert_array_equal(tensors[weight.name], np.concatenate(slices))
    for weight in weights:
        assert_reassembles(weight, [tensors[weight.name] for tensors in ranks])


def assert_reassembles(weight, locals_):
    """Put the ranks' slices back at their global indices; nothing may be missing."""
    first = 0
    for src in weight.sources:
        last = first + src.local_shape[0]
        whole = np.full(src.shape, np.nan, np.float32)
        for rank, values in enumerate(locals_):
            part = values[first:last]
            if not isinstance(src.placement, Shard):
                whole[...] = part
                continue
            index = src.placement.index(rank)
            part = np.moveaxis(part, src.placement.dim, 0)
            np.moveaxis(whole, src.placement.dim, 0)[index[index != PAD]] = part[index != PAD]
            assert not part[index == PAD].any()
        np.testing.assert_array_equal(whole, TENSORS[src.name])
        first = last


@pytest.mark.parametrize("chunk", [1000, 1 << 22])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 8, 16])
def test_quantized_slices_are_slices_of_the_quantized(tmp_path, monkeypatch, world, chunk):
    monkeypatch.setattr(slicing, "CHUNK", chunk)
    weights = program(world, "float16", Quantized(Q4))[:4]
    with checkpoint(tmp_path / "model", TENSORS) as opened:
        write_shards(opened, weights, world, tmp_path, ignored=lambda name: True)
    for rank in range(world):
        tensors = load_file(tmp_path / shard_name(rank, world))
        for weight in (weights[0], weights[1], weights[3]):
            words, scale = (tensors[f"{weight.name}.{part}"] for part in ("q4", "scale"))
            assert [words.shape, scale.shape] == [shape for _, shape, _ in weight.tensors()]
            wide = np.concatenate([expected(src, rank) for src in weight.sources])
            codes, scales = quantize(wide, Q4)
            np.testing.assert_array_equal(scale, scales)
            np.testing.assert_array_equal(words, pack(codes, 4))


def test_quantized_columns_are_padded_to_whole_groups(tmp_path):
    whole = RNG.normal(size=(5, 44)).astype(np.float16)
    weight = Weight("w", (Source("w", (5, 44), Replicate(), Quantized(Q4)),), "float16")
    assert weight.tensors() == [("w.q4", (5, 8), "uint32"), ("w.scale", (5, 2), "float16")]
    with checkpoint(tmp_path / "model", {"w": whole}) as opened:
        write_shards(opened, [weight], 1, tmp_path)
    tensors = load_file(tmp_path / shard_name(0, 1))
    values = dequantize(tensors["w.q4"], tensors["w.scale"], None, Q4)
    np.testing.assert_allclose(values[:, :44], whole, atol=np.abs(whole).max() / 13)
    assert not values[:, 44:].any()


@pytest.mark.parametrize("kept", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", ["float16", "float32"])
def test_casts(tmp_path, kept, wanted):
    values = RNG.normal(size=(7, 3)).astype(kept)
    with checkpoint(tmp_path / "model", {"w": values}) as opened:
        write_shards(
            opened, [Weight("w", (Source("w", (7, 3), Replicate()),), wanted)], 2, tmp_path
        )
    for rank in range(2):
        out = load_file(tmp_path / shard_name(rank, 2))["w"]
        np.testing.assert_array_equal(out, values.astype(np.float32).astype(wanted), strict=True)


def test_entries_verify_and_hash_the_files(tmp_path):
    with checkpoint(tmp_path / "model", TENSORS) as opened:
        entries = write_shards(opened, program(3), 3, tmp_path)
    for name, entry in entries.items():
        data = (tmp_path / name).read_bytes()
        assert (entry.sha256, entry.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
        verify_file(tmp_path, name, entry)


def test_writing_again_does_not_touch_a_mapped_file(tmp_path):
    with checkpoint(tmp_path / "model", TENSORS) as opened:
        write_shards(opened, program(1), 1, tmp_path)
        path = tmp_path / shard_name(0, 1)
        before = path.stat().st_ino
        with open(path, "rb") as file:
            write_shards(opened, program(1), 1, tmp_path)
            assert os.fstat(file.fileno()).st_ino == before != path.stat().st_ino


def test_progress_reaches_its_total(tmp_path):
    seen = []
    with checkpoint(tmp_path / "model", TENSORS) as opened:
        write_shards(
            opened, program(3), 3, tmp_path, lambda done, total: seen.append((done, total))
        )
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_missing_and_leftover_tensors_are_listed(tmp_path):
    tensors = {name: TENSORS[name] for name in TENSORS if name not in ("norm", "k")}
    tensors["lora_a"] = tensors["rotary_emb.inv_freq"] = np.ones(2, np.float32)
    with checkpoint(tmp_path / "model", tensors) as opened:
        with pytest.raises(CheckpointError, match=r"missing k, norm; not in the model: lora_a$"):
            write_shards(opened, program(1), 1, tmp_path)
        assert not (tmp_path / "shards").exists()
    tensors |= TENSORS
    tensors |= {f"x{i:02}": np.ones(1, np.float32) for i in range(25)}
    with (
        checkpoint(tmp_path / "model", tensors) as opened,
        pytest.raises(CheckpointError, match="x18 and 6 more"),
    ):
        check_names(plain_readers(opened), program(1), opened.root)


def test_ignored_leftovers(tmp_path):
    with checkpoint(tmp_path / "model", {**TENSORS, "lm_head.weight": TENSORS["embed"]}) as opened:
        with pytest.raises(CheckpointError, match=r"not in the model: lm_head\.weight"):
            check_names(plain_readers(opened), program(1), opened.root)
        check_names(
            plain_readers(opened), program(1), opened.root, lambda name: name == "lm_head.weight"
        )


def test_wrong_shapes_are_named(tmp_path):
    with (
        checkpoint(tmp_path / "model", {**TENSORS, "norm": np.ones(95, np.float32)}) as opened,
        pytest.raises(CheckpointError, match=r"norm is \(95,\), config.json says \(96,\)"),
    ):
        write_shards(opened, program(1), 1, tmp_path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quantized", [None, Quantized(Q4)])
def test_damaged_values_name_the_tensor(tmp_path, dtype, value, quantized):
    values = np.ones((64, 64), dtype)
    values[63, 17] = value
    bad = Source("bad", (64, 64), Shard(0, 64, 1, even_table(64, 2)), quantized)
    weight = Weight("w", (bad,), "float16")
    with (
        checkpoint(tmp_path / "model", {"bad": values}) as opened,
        pytest.raises(CheckpointError, match=r"^bad: holds NaN or infinity"),
    ):
        write_shards(opened, [weight], 2, tmp_path)


def test_values_beyond_float16_name_the_tensor(tmp_path):
    values = np.full((4, 4), -1e5, np.float32)
    source = Source("big", (4, 4), Replicate())
    with checkpoint(tmp_path / "model", {"big": values}) as opened:
        with pytest.raises(CheckpointError, match=r"^big: value 100000 .*float16.*q0f32"):
            write_shards(opened, [Weight("w", (source,), "float16")], 1, tmp_path)
        write_shards(opened, [Weight("w", (source,), "float32")], 1, tmp_path)


def test_truncation_while_reading(tmp_path):
    with checkpoint(tmp_path / "model", TENSORS) as opened:
        with open(tmp_path / "model" / "model.safetensors", "r+b") as file:
            file.truncate(20_000)
        with pytest.raises(CheckpointError, match="truncated while it was read"):
            write_shards(opened, program(2), 2, tmp_path)


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "shards").write_text("in the way")
    with (
        checkpoint(tmp_path / "model", TENSORS) as opened,
        pytest.raises(BuildError, match="cannot be written"),
    ):
        write_shards(opened, program(1), 1, tmp_path)


def test_placements_that_do_not_fit(tmp_path):
    with pytest.raises(ShardingError, match=r"w: a weight cannot be Partial"):
        Source("w", (4, 4), Partial())
    with pytest.raises(ShardingError, match=r"w: cannot join .*a \(4, 8\), b \(4, 4\)"):
        Weight("w", (Source("a", (4, 8), Replicate()), Source("b", (4, 4), Replicate())), "float16")
    with pytest.raises(ShardingError, match="w: only matrices are quantized"):
        Source("w", (64,), Replicate(), Quantized(Q4))
    with pytest.raises(ShardingError, match="w: cannot join weights of different formats: a, b"):
        pair = (Source("a", (4, 8), Replicate()), Source("b", (4, 8), Replicate(), Quantized(Q4)))
        Weight("w", pair, "float16")
    with (
        checkpoint(tmp_path / "model", TENSORS) as opened,
        pytest.raises(ShardingError, match="is for 2 ranks, not 3"),
    ):
        write_shards(opened, program(2), 3, tmp_path)


def test_writer_checks_its_caller(tmp_path):
    tensors = [("a", (2, 2), "float32"), ("empty", (0, 3), "float16"), ("b", (3,), "uint32")]
    path = tmp_path / "x.safetensors"
    with ShardWriter(path, tensors) as writer:
        with pytest.raises(AssertionError, match=r"2 float32 of b, expected 4 float32 of a"):
            writer.write("b", np.zeros(2, np.float32))
    with ShardWriter(path, tensors) as writer:
        writer.write("a", np.arange(4, dtype=np.float32))
        with pytest.raises(AssertionError, match=r"not written: \[\('b', 3\)\]"):
            writer.finish()
    with ShardWriter(path, tensors) as writer:
        writer.write("a", np.array([[0, 1]], np.float32))
        writer.write("a", np.array([[2, 4], [3, 5]], np.float32)[:, 0])
        writer.write("b", np.array([7, 8, 9], np.uint32))
        with pytest.raises(AssertionError, match="the end"):
            writer.write("b", np.zeros(1, np.uint32))
        writer.finish()
    loaded = load_file(path)
    np.testing.assert_array_equal(loaded["a"], [[0, 1], [2, 3]])
    np.testing.assert_array_equal(loaded["b"], np.array([7, 8, 9], np.uint32))
    assert loaded["empty"].shape == (0, 3)


def test_parts_of_a_joined_tensor_are_cut_apart(tmp_path):
    """As Phi-3 stores q, k and v: each part is cut by its own placement."""
    world = 3
    p = placements(world)
    joined = np.concatenate([TENSORS["q"], TENSORS["k"]])
    first = HEADS * HEAD_DIM
    parts = (
        Source("q", TENSORS["q"].shape, p["q"], joined="qk"),
        Source("k", TENSORS["k"].shape, p["k"], joined="qk", first=first),
    )
    quantized = checkpoint(tmp_path / "joined", {"qk": joined})
    write_shards(quantized, [Weight("w", parts, "float32")], world, tmp_path)
    for rank in range(world):
        got = load_file(tmp_path / shard_name(rank, world))["w"]
        want = np.concatenate([expected(part, rank) for part in parts])
        np.testing.assert_array_equal(got, want)


def test_a_joined_tensor_of_another_length_is_named(tmp_path):
    short = Source("q", (8, HIDDEN), Replicate(), joined="qk")
    with (
        checkpoint(tmp_path, {"qk": TENSORS["q"]}) as quantized,
        pytest.raises(CheckpointError, match=r"qk is \(96, 96\), config.json says \(8, 96\)"),
    ):
        write_shards(quantized, [Weight("w", (short,), "float32")], 1, tmp_path)


def test_a_constant_added_to_what_is_quantized(tmp_path):
    norm = Source("norm", (HIDDEN,), Replicate(), plus=1.0)
    quantized = checkpoint(tmp_path, {"norm": TENSORS["norm"]})
    write_shards(quantized, [Weight("norm.weight", (norm,), "float32")], 1, tmp_path)
    got = load_file(tmp_path / shard_name(0, 1))["norm.weight"]
    np.testing.assert_array_equal(got, TENSORS["norm"] + np.float32(1))
