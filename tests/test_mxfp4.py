"""GPT-OSS with experts in MXFP4: shards, logits, bad input."""

import numpy as np
import pytest
from mxfp4_models import CASE, CONFIG, checkpoints
from reference import models
from safetensors.numpy import load_file, save_file

from shardwright import Session
from shardwright.compiler.build import build
from shardwright.compiler.checkpoint import Checkpoint
from shardwright.compiler.options import BuildOptions
from shardwright.compiler.packing import dequantize
from shardwright.compiler.placement import PAD, Shard
from shardwright.compiler.program import partition_program
from shardwright.compiler.scheme import model_config, scheme_of
from shardwright.compiler.trace import Limits
from shardwright.compiler.weights import stored_shapes, write_shards
from shardwright.errors import CheckpointError, ConfigError
from shardwright.model_defs import family_of
from shardwright.runtime.artifact import shard_name


def written(folder, ranks, expert_parallel):
    """The program's weights and each rank's tensors."""
    checkpoint = Checkpoint.open(folder)
    scheme = scheme_of("checkpoint", checkpoint)
    config = family_of(checkpoint.config)[1].config.from_hf(model_config(checkpoint))
    model = family_of(checkpoint.config)[1].model(config, scheme.dtype)
    program = partition_program(
        model, scheme, Limits(16, 1, 16, 16), ranks, expert_parallel=expert_parallel
    )
    weights = list(program.weights.values())
    readers = scheme.readers(stored_shapes(checkpoint.tensors, weights))
    write_shards(checkpoint, weights, ranks, folder, readers=readers)
    return program, [load_file(folder / shard_name(r, ranks)) for r in range(ranks)]


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_shards_are_slices_of_the_dequantized_weight(ranks, expert_parallel, tmp_path):
    """Three blocks of a row over 2, 4 and 8 ranks; some ranks hold padding, some nothing else."""
    plain = checkpoints(tmp_path)
    program, files = written(tmp_path / "mxfp4", ranks, expert_parallel)
    found = 0
    for weight in program.weights.values():
        (source, *others) = weight.sources
        if ".experts." not in source.name:
            assert weight.columns is None
            continue
        assert not others and source.joined and source.experts == 5
        whole = plain[source.joined]
        whole = whole.transpose(0, 2, 1) if whole.ndim == 3 else whole[..., None]
        whole = whole.reshape(-1, whole.shape[-1])[source.first :: source.step]
        for rank, tensors in enumerate(files):
            want = whole
            if isinstance(source.placement, Shard):
                index = source.placement.index(rank)
                want = np.take(whole, np.maximum(index, 0), axis=source.placement.dim)
                np.moveaxis(want, source.placement.dim, 0)[index == PAD] = 0
            if weight.columns is None:
                np.testing.assert_array_equal(tensors[weight.name], want)
                continue
            words, scale = (tensors[n] for n, _, _ in weight.tensors())
            assert scale.dtype == np.uint8 and weight.columns.packing.group == 32
            got = dequantize(words, scale, None, weight.columns.packing)
            np.testing.assert_array_equal(got, want)
        found += 1
    assert found == 3 * 6


def logits(folder, out, quantization, ranks, **options):
    defaults = {"max_batch_size": 2, "max_seq_len": CASE.max_len, "num_shards": ranks}
    build(BuildOptions(str(folder), out, quantization, **defaults, **options))
    with Session(out) as session:
        steps = [session.prefill([list(p) for p in CASE.prompts])]
        return np.stack([*steps, *(session.decode(list(t)) for t in CASE.decode)])


@pytest.mark.parametrize(
    ("ranks", "whole"),
    [
        pytest.param(r, w, marks=() if (r, w) == (2, False) else pytest.mark.matrix)
        for r in (1, 2, 3, 4, 8)
        for w in (False, True)
    ],
)
def test_logits_are_those_of_the_dequantized_model(ranks, whole, tmp_path):
    checkpoints(tmp_path)
    want = logits(tmp_path / "plain", tmp_path / "a", "q0f32", 1)
    options = {"expert_parallel": whole}
    got = logits(tmp_path / "mxfp4", tmp_path / "b", "checkpoint-f32", ranks, **options)
    assert models.relative_error(got, want) < 2e-6
    if ranks == 4:  # activations in half precision
        got = logits(tmp_path / "mxfp4", tmp_path / "c", None, ranks, **options)
        errors = np.abs(got - want).max(-1) / np.abs(want).max()
        # Where two experts are as good as equal a token may take the other.
        assert np.sort(errors, axis=None)[-3] < 1e-2


EXPERTS = "model.layers.1.mlp.experts."


def lie(name, shape):
    def change(tensors):
        tensors[EXPERTS + name] = tensors[EXPERTS + name].reshape(shape)

    return change


def nan(tensors):
    tensors[EXPERTS + "down_proj_scales"][2, 1, 0] = 255


def no_scales(tensors):
    del tensors[EXPERTS + "down_proj_scales"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # As many bytes, but experts and rows, rows and blocks, or a block's bytes changed over.
        (lie("gate_up_proj_blocks", (10, 96, 2, 16)), r"gate_up_proj_blocks is \(10, 96, 2, 16\)"),
        (lie("down_proj_blocks", (5, 48, 4, 16)), r"down_proj_blocks is \(5, 48, 4, 16\)"),
        (lie("down_proj_blocks", (5, 64, 6, 8)), r"down_proj_blocks is \(5, 64, 6, 8\)"),
        (lie("down_proj_scales", (5, 96, 2)), r"down_proj_scales is \(5, 96, 2\)"),
        (lie("gate_up_proj_bias", (10, 96)), r"gate_up_proj_bias is \(10, 96\)"),
        (no_scales, "missing model.layers.1.mlp.experts.down_proj_scales"),
        (nan, "down_proj_scales: holds NaN"),
    ],
)
def test_a_checkpoint_that_lies_is_refused(change, message, tmp_path):
    checkpoints(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        written(tmp_path / "mxfp4", 2, False)


def test_plain_experts_that_lie_are_refused(tmp_path):
    checkpoints(tmp_path)
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    name = EXPERTS + "down_proj"
    tensors[name] = tensors[name].reshape(10, 48, 64)
    save_file(tensors, tmp_path / "plain" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj is \(10, 48, 64\), config.json says \(5"):
        build(BuildOptions(str(tmp_path / "plain"), tmp_path / "dist", "q0f32"))


def test_an_unknown_field_of_the_format_is_refused(tmp_path):
    checkpoint = Checkpoint(tmp_path, {"quantization_config": CONFIG | {"block_size": 16}}, {})
    with pytest.raises(ConfigError, match="block_size: unknown field"):
        scheme_of(None, checkpoint)


@pytest.mark.reference
def test_the_writer_of_these_tests_agrees_with_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    plain = checkpoints(tmp_path)
    tensors = load_file(tmp_path / "mxfp4" / "model.safetensors")
    for part in ("gate_up_proj", "down_proj"):
        blocks, scales = (
            torch.tensor(tensors[f"{EXPERTS}{part}_{x}"]) for x in ("blocks", "scales")
        )
        theirs = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        np.testing.assert_array_equal(theirs.numpy(), plain[EXPERTS + part])
