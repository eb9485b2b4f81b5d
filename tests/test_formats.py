"""Quantized checkpoints: packings against the tools that write them, shards, logits, bad input."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import quantized_models as qm
from safetensors.numpy import load_file

from shardwright.compiler.build import build
from shardwright.compiler.checkpoint import Checkpoint
from shardwright.compiler.options import BuildOptions
from shardwright.compiler.packing import dequantize, pack, unpack
from shardwright.compiler.placement import PAD, Shard
from shardwright.compiler.program import partition_program
from shardwright.compiler.quantization import QUANTIZATIONS, quantize
from shardwright.compiler.scheme import model_config, scheme_of
from shardwright.compiler.trace import Limits
from shardwright.compiler.weights import stored_shapes, write_shards
from shardwright.errors import CheckpointError, ConfigError, UsageError
from shardwright.model_defs import family_of
from shardwright.runtime.artifact import shard_name

# Made by AutoGPTQ 0.8 (QuantLinear.pack), AutoAWQ 0.2.9 (WQLinear_GEMM.from_linear),
# compressed-tensors 0.20 (pack_to_int32), MLC-LLM (quantize_np of its tests) and torch's float8.
GOLDEN = Path(__file__).parent / "golden" / "formats.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def open_format(folder, config, tensors, name="checkpoint-f32"):
    qm.save(folder, {"quantization_config": config}, tensors)
    return scheme_of(name, Checkpoint.open(folder))


def values_of(scheme, name, shape):
    """The weight as its reader and its format give it."""
    reader = scheme.readers({name: shape})[name]
    quantized = scheme.quantized(name, shape, ("mlp", "embed"), None)
    codes, scale, *zero = reader.read(np.arange(shape[0]))
    of = quantized.groups(shape[1])
    values = codes.astype(np.float32) - np.float32(quantized.packing.offset)
    if quantized.packing.code == "e4m3":
        values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    if zero:
        values -= zero[0].astype(np.float32)[:, of]
    return values * scale.astype(np.float32)[:, of]


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_as_its_tool_packs_it(golden, bits, tmp_path):
    g = {key.split("/")[1]: value for key, value in golden.items() if f"gptq{bits}/" in key}
    tensors = {f"m.{part}": g[part] for part in ("qweight", "qzeros", "scales", "g_idx")}
    config = qm.gptq_config(bits=bits, group=32, sym=False)
    scheme = open_format(tmp_path, config, tensors)
    np.testing.assert_array_equal(values_of(scheme, "m.weight", g["weight"].shape), g["weight"])
    # The writer of the other tests, against the same tool.
    np.testing.assert_array_equal(qm.words(g["codes"], bits).T, g["qweight"])
    np.testing.assert_array_equal(qm.words(g["zeros"].T - 1, bits), g["qzeros"])


def test_awq_as_its_tool_packs_it(golden, tmp_path):
    g = {key.split("/")[1]: value for key, value in golden.items() if "awq/" in key}
    tensors = {f"m.{part}": g[part] for part in ("qweight", "qzeros", "scales")}
    scheme = open_format(tmp_path, qm.awq_config(group=32), tensors)
    np.testing.assert_array_equal(values_of(scheme, "m.weight", g["weight"].shape), g["weight"])
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    np.testing.assert_array_equal(qm.words(g["codes"].T, 4, order), g["qweight"])


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_as_its_tool_packs_them(golden, bits, tmp_path):
    values, zeros = golden[f"ct{bits}/values"], golden[f"ct{bits}/zeros"]
    scale = np.random.default_rng(0).uniform(0.5, 1, zeros.shape).astype(np.float32)
    tensors = {
        "m.weight_packed": golden[f"ct{bits}/packed"],
        "m.weight_zero_point": golden[f"ct{bits}/packed_zeros"],
        "m.weight_scale": scale,
        "m.weight_shape": np.array(values.shape),
    }
    config = qm.compressed_config(bits=bits, group=32, sym=False)
    got = values_of(open_format(tmp_path, config, tensors), "m.weight", values.shape)
    want = values.astype(np.float32) - zeros.repeat(32, 1).astype(np.float32)
    np.testing.assert_array_equal(got, want * scale.repeat(32, 1))


def test_every_float_of_eight_bits(golden):
    codes = np.arange(256, dtype=np.uint8)
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(values, golden["e4m3"])


@pytest.mark.parametrize(("name", "scheme"), [("q4", "q4f16_1"), ("q3", "q3f16_1")])
def test_mlc_as_its_tests_quantize(golden, name, scheme):
    packing = QUANTIZATIONS[scheme].packing
    weight = golden[f"mlc_{name}/weight"]
    codes, scale = quantize(weight, packing)
    np.testing.assert_array_equal(scale, golden[f"mlc_{name}/scale"])
    theirs = unpack(golden[f"mlc_{name}/words"], packing.bits)
    # They round halves of a scale that is not rounded to float16, so a code may differ by one.
    assert (codes != theirs).mean() < 0.01 and np.abs(codes.astype(int) - theirs).max() <= 1


# Shards: every rank's tensors decode to exactly its slice of the weight. ------------------------


def shards(folder, ranks, name="checkpoint-f32"):
    """The program's weights, and each rank's tensors."""
    checkpoint = Checkpoint.open(folder)
    scheme = scheme_of(name, checkpoint)
    _, family = family_of(checkpoint.config)
    config = family.config.from_hf(model_config(checkpoint))
    model = family.model(config, scheme.dtype)
    program = partition_program(model, scheme, Limits(16, 1, 16, 16), ranks)
    weights = list(program.weights.values())
    readers = scheme.readers(stored_shapes(checkpoint.tensors, weights))
    write_shards(checkpoint, weights, ranks, folder, readers=readers)
    return program, [load_file(folder / shard_name(r, ranks)) for r in range(ranks)]


def whole_of(source, rank, whole):
    """A rank's slice of the dequantized weight, in the order of the program's activations."""
    values = whole[source.name]
    if source.rows is not None:
        values = values[source.rows]
    if source.order is not None:
        values = values[:, source.order]
    if not isinstance(source.placement, Shard):
        return values
    index = source.placement.index(rank)
    out = np.take(values, np.maximum(index, 0), axis=source.placement.dim)
    np.moveaxis(out, source.placement.dim, 0)[index == PAD] = 0
    return out


def decoded(weight, tensors, cols):
    """A rank's tensors as a matrix over the activations as the program has them."""
    columns, names = weight.columns, [name for name, _, _ in weight.tensors()]
    zero = tensors.get(f"{weight.name}.zero")
    values = dequantize(tensors[names[0]], tensors[names[1]], zero, columns.packing)
    if columns.moved is None:
        assert not values[:, cols:].any()
        return values[:, :cols]
    out = np.zeros((len(values), cols), np.float32)
    moved = tensors[f"{weight.name}.columns"]
    assert not values[:, moved == PAD].any()
    out[:, moved[moved != PAD]] = values[:, moved != PAD]
    return out


def check_shards(folder, ranks, whole):
    program, files = shards(folder, ranks)
    quantized = [w for w in program.weights.values() if w.columns is not None]
    assert {s.name for w in quantized for s in w.sources} == set(qm.LINEARS)
    for rank, tensors in enumerate(files):
        for weight in quantized:
            want = np.concatenate([whole_of(s, rank, whole) for s in weight.sources])
            got = decoded(weight, tensors, weight.local_shape[1])
            np.testing.assert_array_equal(got, want)
    return program


@pytest.mark.parametrize("name", qm.FORMATS)
def test_shards_are_slices_of_the_dequantized_weight(name, tmp_path):
    for ranks in (1, 2, 3, 4):
        folder = tmp_path / str(ranks)
        check_shards(folder, ranks, qm.write(folder, name))


def test_act_order_is_said_and_costs_nothing_where_it_can(tmp_path):
    program = check_shards(tmp_path, 2, qm.write(tmp_path, "gptq-act-order-asym"))
    orders = "\n".join(program.orders)
    assert "mlp.down_proj.weight: rows of" in orders and "nothing at run time" in orders
    assert "o_proj.weight: each rank permutes the activations of its own columns" in orders
    down = program.weights["model.layers.0.mlp.down_proj.weight"]
    attention = next(w for w in program.weights.values() if "q_proj" in w.name)
    assert down.columns.moved is None and attention.columns.moved is not None
    assert len(attention.sources) == 3  # one permutation for all three


def test_four_bit_symmetric_weights_take_the_four_bit_kernels(tmp_path):
    for name in ("gptq-32", "gptq-rows", "ct-int4"):
        qm.write(tmp_path / name, name)
        program, _ = shards(tmp_path / name, 2, "checkpoint")
        for weight in program.weights.values():
            assert weight.columns is None or weight.columns.packing.is_q4("float16")


def test_layers_of_other_bits(tmp_path):
    """GPTQModel's `dynamic`: a regular expression of modules, and what differs there."""
    down = "model.layers.0.mlp.down_proj.weight"
    whole = {}

    def eight_bits(tensors, module):
        whole[down] = qm.gptq(down, (128, 384), tensors, bits=8, group=64)

    whole = qm.write(tmp_path, "gptq-32", change=eight_bits) | whole
    config = json.loads((tmp_path / "config.json").read_text())
    dynamic = {r"+:.*\.down_proj$": {"bits": 8, "group_size": 64}, r"-:.*\.k_proj$": {}}
    config["quantization_config"]["dynamic"] = dynamic
    (tmp_path / "config.json").write_text(json.dumps(config))
    program = check_shards(tmp_path, 2, whole)
    assert program.weights[down].columns.packing.bits == 8
    scheme = scheme_of(None, Checkpoint.open(tmp_path, weights=False))
    assert not scheme.is_quantized("model.layers.0.self_attn.k_proj")


def test_a_scale_that_would_be_rounded(tmp_path):
    def tiny(tensors, module):
        scale = tensors[f"{module}.weight_scale"].copy()
        scale[0] = 1.0078125 * 2.0**-20  # eight bits of mantissa, beyond float16's last
        tensors[f"{module}.weight_scale"] = scale

    qm.write(tmp_path, "ct-int4", change=tiny)
    with pytest.raises(CheckpointError, match=r"down_proj.*is no float16 number.*checkpoint-f32"):
        shards(tmp_path, 1, "checkpoint")
    shards(tmp_path, 1, "checkpoint-f32")


def test_modules_that_stay_plain(tmp_path):
    plain = {n for n in qm.LINEARS if "k_proj" in n or "down_proj" in n}
    qm.write(tmp_path, "gptq-64-asym", plain=plain)
    program, files = shards(tmp_path, 2)
    quantized = {s.name for w in program.weights.values() if w.columns for s in w.sources}
    assert quantized == set(qm.LINEARS) - plain
    (down,) = plain - {n for n in plain if "k_proj" in n}
    assert files[0][down].shape == (128, 192)


# MLC's repositories. ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["q4f16_1", "q4f16_0"])
def test_mlc_repositories(kind, tmp_path):
    for ranks in (1, 2, 3):
        whole = qm.write_mlc(tmp_path / str(ranks), kind)
        program, files = shards(tmp_path / str(ranks), ranks)
        for rank, tensors in enumerate(files):
            for weight in (w for w in program.weights.values() if w.columns):
                want = np.concatenate([whole_of(s, rank, whole) for s in weight.sources])
                got = decoded(weight, tensors, weight.local_shape[1])
                np.testing.assert_array_equal(got, want)
        assert any("embed_tokens" in w.name for w in program.weights.values() if w.columns)


def test_mlc_repositories_that_are_damaged(tmp_path):
    qm.write_mlc(tmp_path, "q4f16_1")
    shard = tmp_path / "params_shard_0.bin"
    data = shard.read_bytes()
    shard.write_bytes(data[:-5])
    with pytest.raises(CheckpointError, match=r"params_shard_0\.bin: truncated"):
        Checkpoint.open(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"missing params_shard_0\.bin"):
        Checkpoint.open(tmp_path)
    (tmp_path / "ndarray-cache.json").write_text('{"records": [{}]}')
    with pytest.raises(CheckpointError, match=r"ndarray-cache\.json: damaged"):
        Checkpoint.open(tmp_path)
    (tmp_path / "ndarray-cache.json").unlink()
    with pytest.raises(CheckpointError, match=r"no ndarray-cache\.json"):
        Checkpoint.open(tmp_path)
    chat = json.loads((tmp_path / "mlc-chat-config.json").read_text())
    for key, value in (("quantization", "q4f16_ft"), ("model_type", "rwkv")):
        (tmp_path / "mlc-chat-config.json").write_text(json.dumps(chat | {key: value}))
        with pytest.raises(ConfigError, match=f"{key} '{value}' is not supported"):
            Checkpoint.open(tmp_path)


# Bad input. -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, r"quant_method: 'bitsandbytes' is not supported; gptq"),
        (qm.gptq_config(bits=3), r"bits: 3 is not supported; only 4 or 8 is"),
        (qm.gptq_config() | {"checkpoint_format": "marlin"}, r"checkpoint_format: 'marlin'"),
        (qm.gptq_config(group=20), r"group_size: 20 is neither"),
        (qm.gptq_config() | {"rotation": "hadamard"}, r"rotation: 'hadamard'"),
        (qm.gptq_config() | {"surprise": 1}, r"surprise: unknown field"),
        (qm.awq_config() | {"version": "gemv"}, r"version: 'gemv' is not supported; only 'gemm'"),
        (qm.awq_config() | {"zero_point": False}, r"zero_point: False is not supported"),
        (qm.fp8_config() | {"fmt": "e5m2"}, r"fmt: 'e5m2'"),
        (qm.fp8_config() | {"weight_block_size": [3]}, r"weight_block_size"),
        (qm.compressed_config() | {"format": "nvfp4-pack-quantized"}, r"format: 'nvfp4"),
        (qm.compressed_config(bits=3), r"config_groups\.group_0\.weights\.num_bits 3"),
        (qm.compressed_config() | {"transform_config": {"a": 1}}, r"transform_config"),
    ],
)
def test_configurations_that_are_not_supported(config, message, tmp_path):
    qm.save(tmp_path, qm.CONFIG | {"quantization_config": config}, {"x": np.ones(1, np.float32)})
    with pytest.raises(ConfigError, match=message):
        scheme_of(None, Checkpoint.open(tmp_path))


def test_names_that_do_not_fit_the_checkpoint(tmp_path):
    qm.write(tmp_path, "gptq-32")
    with pytest.raises(UsageError, match=r"q4f16_1: this checkpoint is quantized already \(gptq\)"):
        scheme_of("q4f16_1", Checkpoint.open(tmp_path))
    qm.save(tmp_path, qm.CONFIG, {"x": np.ones(1, np.float32)})
    with pytest.raises(UsageError, match="checkpoint: this checkpoint is not quantized"):
        scheme_of("checkpoint", Checkpoint.open(tmp_path))
    assert scheme_of(None, Checkpoint.open(tmp_path)).name == "q4f16_1"


def test_a_library_alone_cannot_know_the_order_of_weights(tmp_path):
    qm.write(tmp_path, "gptq-act-order")
    options = BuildOptions(str(tmp_path), tmp_path / "dist", build_model_only=True)
    with pytest.raises(UsageError, match=r"--build-model-only: .*act-order"):
        build(options)


def damaged(tmp_path, name, change):
    qm.write(tmp_path, name, change=change)
    shards(tmp_path, 2)


def test_parts_that_are_missing_or_wrong(tmp_path):
    def drop(part):
        return lambda tensors, module: tensors.pop(f"{module}.{part}")

    for name, part in (
        ("gptq-32", "scales"),
        ("gptq-32", "qzeros"),
        ("awq-64", "scales"),
        ("fp8-tensor", "weight_scale"),
        ("fp8-blocks", "weight_scale_inv"),
        ("ct-int4", "weight_packed"),
        ("ct-int4-asym", "weight_zero_point"),
    ):
        with pytest.raises(CheckpointError, match=rf"missing .*down_proj\.{part}"):
            damaged(tmp_path, name, drop(part))

    def short(tensors, module):
        tensors[f"{module}.scales"] = tensors[f"{module}.scales"][1:]

    with pytest.raises(CheckpointError, match=r"wrong shapes: .*down_proj\.scales is \(11, 128\)"):
        damaged(tmp_path, "gptq-32", short)


def test_values_that_cannot_be_read_exactly(tmp_path):
    def nan(tensors, module):
        codes = tensors[f"{module}.weight"].view(np.uint8).copy()
        codes[3, 5] = 0x7F
        tensors[f"{module}.weight"] = codes.view(ml_dtypes.float8_e4m3fn)

    with pytest.raises(CheckpointError, match=r"down_proj\.weight: holds NaN"):
        damaged(tmp_path, "fp8-tensor", nan)

    def asymmetric(tensors, module):
        tensors[f"{module}.qzeros"] = tensors[f"{module}.qzeros"] ^ 1

    with pytest.raises(CheckpointError, match=r"qzeros is not that of a symmetric.*sym to false"):
        damaged(tmp_path, "gptq-32", asymmetric)

    def wrapped(tensors, module):
        tensors[f"{module}.qzeros"] = tensors[f"{module}.qzeros"] | 15

    with pytest.raises(CheckpointError, match=r"qzeros holds 15.*gptq_v2"):
        damaged(tmp_path, "gptq-64-asym", wrapped)

    def scattered(tensors, module):
        tensors[f"{module}.g_idx"] = tensors[f"{module}.g_idx"] + 1

    with pytest.raises(CheckpointError, match="groups that do not exist"):
        damaged(tmp_path, "gptq-64-asym", scattered)


def test_words_of_the_test_writer_are_ours():
    codes = np.random.default_rng(0).integers(0, 16, (3, 64)).astype(np.uint8)
    np.testing.assert_array_equal(qm.words(codes, 4).view(np.uint32), pack(codes, 4))
