"""Small checkpoints in the formats that people have, and the weights they stand for.

Written element by element from the formats' documentation (see compiler/format_*.py for the
sources), so that they share no code with what reads them.
"""

import json
from dataclasses import replace
from functools import reduce

import ml_dtypes
import numpy as np
from reference import models
from safetensors.numpy import save_file

CONFIG = models._config(4, 2, 128, 384, head_dim=32, num_hidden_layers=1)
CASE = replace(models.cases()[0], name="quantized", config=CONFIG)
LINEARS = [name for name in models.weights(CASE) if "proj" in name]


def rng_of(name):
    return np.random.default_rng(sum(map(ord, name)))


def words(codes, bits, order=None):
    """32-bit words of codes [rows, cols] along cols, the first code in the lowest bits."""
    per_word = 32 // bits
    order = order or range(per_word)
    rows, cols = codes.shape
    out = np.zeros((rows, -(-cols // per_word)), np.uint32)
    for c in range(cols):
        place = list(order).index(c % per_word)
        out[:, c // per_word] |= codes[:, c].astype(np.uint32) << np.uint32(bits * place)
    return out.view(np.int32)


def integers(name, shape, bits, group, sym, act_order=False, scale_dtype=np.float16):
    """Random codes, zero points, scales and groups of columns, and the weight."""
    rng = rng_of(name)
    n, k = shape
    group = k if group == -1 else group
    groups = -(-k // group)
    codes = rng.integers(0, 1 << bits, shape)
    spread = 2.0 / (1 << bits) / np.sqrt(k) * (1.5 if "q_proj" in name or "k_proj" in name else 1)
    scale = (rng.uniform(0.5, 1.5, (n, groups)) * spread * 1.7).astype(scale_dtype)
    zero = np.full((n, groups), 1 << (bits - 1))
    if not sym:
        zero = rng.integers(1, 1 << bits, (n, groups))
    of = np.arange(k) // group
    if act_order:
        # Queries, keys and values are quantized with the same activations, gate and up as well.
        same = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
        of = rng_of(reduce(lambda s, kv: s.replace(*kv), same.items(), name)).permutation(of)
    weight = (codes - zero[:, of]).astype(np.float32) * scale[:, of].astype(np.float32)
    return codes, zero, scale, of.astype(np.int32), weight


def gptq(name, shape, tensors, *, bits=4, group=128, sym=True, act_order=False, v2=False):
    codes, zero, scale, of, weight = integers(name, shape, bits, group, sym, act_order)
    module = name.removesuffix(".weight")
    tensors[f"{module}.qweight"] = words(codes, bits).T
    tensors[f"{module}.qzeros"] = words((zero - (0 if v2 else 1)).T, bits)
    tensors[f"{module}.scales"] = scale.T
    tensors[f"{module}.g_idx"] = of
    return weight


def gptq_config(*, bits=4, group=128, sym=True, act_order=False, v2=False):
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": sym,
        "desc_act": act_order,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
        "damp_percent": 0.01,
    }


def awq(name, shape, tensors, *, group=64):
    codes, zero, scale, _, weight = integers(name, shape, 4, group, False)
    module, order = name.removesuffix(".weight"), (0, 2, 4, 6, 1, 3, 5, 7)
    tensors[f"{module}.qweight"] = words(codes.T, 4, order)
    tensors[f"{module}.qzeros"] = words(zero.T, 4, order)
    tensors[f"{module}.scales"] = scale.T
    return weight


def awq_config(*, group=64):
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }


def floats(name, shape, scale_shape, repeat, scale_dtype=np.float32):
    """Random e4m3 codes and scales, and the weight; a scale serves `repeat` rows and columns."""
    rng = rng_of(name)
    values = rng.normal(0, 60, shape).astype(ml_dtypes.float8_e4m3fn)
    scale = (rng.uniform(0.5, 1.5, scale_shape) / 60 / np.sqrt(shape[1])).astype(scale_dtype)
    wide = scale.astype(np.float32).reshape(*scale_shape, *[1] * (2 - len(scale_shape)))
    wide = wide.repeat(repeat[0], 0).repeat(repeat[1], 1)[: shape[0], : shape[1]]
    return values, scale, values.astype(np.float32) * wide


def fp8(name, shape, tensors, *, block=None, per_row=False):
    module = name.removesuffix(".weight")
    if block:
        scales = tuple(-(-s // b) for s, b in zip(shape, block, strict=True))
        values, scale, weight = floats(name, shape, scales, block)
        tensors[f"{module}.weight_scale_inv"] = scale
    else:
        scales = (shape[0], 1) if per_row else (1,)
        values, scale, weight = floats(name, shape, scales, (1, 1))
        tensors[f"{module}.weight_scale"] = scale
        tensors[f"{module}.input_scale"] = np.ones(1, np.float32)
    tensors[f"{module}.weight"] = values
    return weight


def fp8_config(*, block=None, per_row=False):
    config = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    return config | ({"weight_block_size": list(block), "fmt": "e4m3"} if block else {})


def compressed(name, shape, tensors, *, kind="pack-quantized", bits=4, group=128, sym=True, act=0):
    module = name.removesuffix(".weight")
    scale_dtype = ml_dtypes.bfloat16
    if kind == "float-quantized":
        values, scale, weight = floats(name, shape, (shape[0], 1), (1, 1), scale_dtype)
        tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"] = values, scale
        return weight
    codes, zero, scale, of, weight = integers(name, shape, bits, group, sym, act, scale_dtype)
    half = 1 << (bits - 1)
    tensors[f"{module}.weight_scale"] = scale
    if kind == "int-quantized":
        tensors[f"{module}.weight"] = (codes - half).astype(np.int8)
        if not sym:
            tensors[f"{module}.weight_zero_point"] = (zero - half).astype(np.int8)
        return weight
    tensors[f"{module}.weight_packed"] = words(codes, bits)
    tensors[f"{module}.weight_shape"] = np.array(shape, np.int64)
    if not sym:
        tensors[f"{module}.weight_zero_point"] = words(zero.T, bits).T
    if act:
        tensors[f"{module}.weight_g_idx"] = of
    return weight


def compressed_config(*, kind="pack-quantized", bits=4, group=128, sym=True, act=0):
    weights = {
        "num_bits": 8 if kind == "float-quantized" else bits,
        "type": "float" if kind == "float-quantized" else "int",
        "symmetric": sym,
        "strategy": "channel" if group == -1 or kind == "float-quantized" else "group",
        "group_size": None if group == -1 else group,
        "actorder": "group" if act else None,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


WRITERS = {
    "gptq": (gptq, gptq_config),
    "awq": (awq, awq_config),
    "fp8": (fp8, fp8_config),
    "compressed": (compressed, compressed_config),
}
FORMATS = {
    "gptq-32": ("gptq", {"group": 32}),
    "gptq-64-asym": ("gptq", {"group": 64, "sym": False}),
    "gptq-128-v2": ("gptq", {"v2": True, "sym": False}),
    "gptq-rows": ("gptq", {"group": -1}),
    "gptq-8bit": ("gptq", {"bits": 8, "group": 128}),
    "gptq-8bit-asym": ("gptq", {"bits": 8, "group": 32, "sym": False, "v2": True}),
    "gptq-act-order": ("gptq", {"group": 64, "act_order": True}),
    "gptq-act-order-asym": ("gptq", {"group": 32, "sym": False, "act_order": True}),
    "gptq-act-order-8bit": ("gptq", {"bits": 8, "group": 64, "act_order": True}),
    "awq-64": ("awq", {"group": 64}),
    "awq-128": ("awq", {"group": 128}),
    "fp8-tensor": ("fp8", {}),
    "fp8-rows": ("fp8", {"per_row": True}),
    "fp8-blocks": ("fp8", {"block": (128, 128)}),
    "ct-int4": ("compressed", {"group": 128}),
    "ct-int4-asym": ("compressed", {"group": 32, "sym": False}),
    "ct-int4-act-order": ("compressed", {"group": 64, "act": 1}),
    "ct-int8": ("compressed", {"kind": "int-quantized", "bits": 8, "group": -1}),
    "ct-int8-asym": ("compressed", {"kind": "int-quantized", "bits": 8, "group": -1, "sym": False}),
    "ct-int8-packed": ("compressed", {"bits": 8, "group": 64}),
    "ct-fp8": ("compressed", {"kind": "float-quantized"}),
}


def write(folder, name, plain=(), change=None):
    """Write the checkpoint of format `name`; the dequantized weights in float32 by name.

    Weights in `plain` stay as they are; `change` may damage the tensors.
    """
    writer, config_of = WRITERS[FORMATS[name][0]]
    options = FORMATS[name][1]
    tensors, whole = {}, models.weights(CASE)
    for weight, values in list(whole.items()):
        if weight in LINEARS and weight not in plain:
            whole[weight] = writer(weight, values.shape, tensors, **options)
        else:
            tensors[weight] = values
    if change is not None:
        change(tensors, "model.layers.0.mlp.down_proj")
    save(folder, CONFIG | {"quantization_config": config_of(**options)}, tensors)
    return whole


def save(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: np.ascontiguousarray(t) for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
