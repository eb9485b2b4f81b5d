"""Experts, which a checkpoint keeps apart and a rank's file as one matrix."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shardwright.compiler.checkpoint import Checkpoint
from shardwright.compiler.placement import PAD, Replicate, Shard, even_table
from shardwright.compiler.slicing import Plain, Stacked
from shardwright.compiler.stored import matrix_placement, matrix_shape
from shardwright.compiler.weights import Source, Weight, write_shards
from shardwright.errors import CheckpointError
from shardwright.runtime.artifact import shard_name

RNG = np.random.default_rng(0)


def checkpoint(path, tensors):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    save_file(tensors, path / "model.safetensors")
    return Checkpoint.open(path)


def test_stacked_tensors_read_rows_of_each(tmp_path):
    parts = [RNG.normal(size=(3, 4)).astype(np.float32) for _ in range(3)]
    stored = checkpoint(tmp_path, {f"w{i}": part for i, part in enumerate(parts)})
    reader = Stacked([Plain(stored, f"w{i}") for i in range(3)])
    assert reader.shape == (9, 4)
    whole = np.concatenate([*parts, np.zeros((1, 4), np.float32)])  # -1 is a row of zeros
    for index in ([0, 1, 2, 3], [4, 4, 8, 0], [2, PAD, PAD, 3], [PAD], [*range(9)]):
        (got,) = reader.read(np.array(index, np.int64))
        np.testing.assert_array_equal(got, whole[np.array(index, np.int64)])


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("dim", "unit"), [(0, 1), (1, 32), (2, 32)])
def test_experts_as_a_matrix_hold_what_they_held(dim, unit, ranks, tmp_path):
    """Cut as three dimensions or as a matrix, a rank has the same elements, in the same order."""
    shape = (5, 72, 40)
    whole = RNG.normal(size=shape).astype(np.float32)
    size = shape[dim]
    cut = Shard(dim, size, unit, even_table(-(-size // unit), ranks))
    placement = matrix_placement(shape, cut)
    source = Source("w", matrix_shape(shape), placement, joined="experts.{}.w")
    stored = checkpoint(tmp_path, {f"experts.{i}.w": whole[i] for i in range(5)})
    write_shards(stored, [Weight("w", (source,), "float32")], ranks, tmp_path)
    for rank in range(ranks):
        index = cut.index(rank)
        want = np.take(whole, np.maximum(index, 0), axis=dim)
        np.moveaxis(want, dim, 0)[index == PAD] = 0
        got = load_file(tmp_path / shard_name(rank, ranks))["w"]
        np.testing.assert_array_equal(got.reshape(want.shape), want)


def test_other_placements_stay():
    assert matrix_placement((5, 72, 40), Replicate()) == Replicate()
    rows = Shard(0, 72, 8, even_table(9, 3))
    assert matrix_placement((72, 40), rows) == rows


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(4, 8)] * 2, r"w is \(8, 8\), config.json says \(12, 8\)"),
        ([(4, 8), (4, 8), (5, 8)], r"experts.2.w is \(5, 8\), experts.0.w is \(4, 8\)"),
        ([], "missing w"),
    ],
)
def test_experts_that_do_not_fit_are_named(shapes, message, tmp_path):
    tensors = {f"experts.{i}.w": np.zeros(s, np.float32) for i, s in enumerate(shapes)}
    stored = checkpoint(tmp_path, tensors)
    source = Source("w", (12, 8), Replicate(), joined="experts.{}.w")
    with pytest.raises(CheckpointError, match=message):
        write_shards(stored, [Weight("w", (source,), "float32")], 1, tmp_path)
