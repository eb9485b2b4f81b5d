"""Small checkpoints in the formats that people have, and the weights they stand for.

Written element by element from the formats' documentation (see compiler/format_*.py for the
sources), so that they share no code with what reads them. The logits that transformers computes
with the dequantized weights are in reference/formats.npz, written by scripts/make_reference.py.
"""

import json
from functools import reduce
from pathlib import Path

import ml_dtypes
import numpy as np
from reference import models
from safetensors.numpy import save_file

GOLDEN = Path(models.GOLDEN).with_name("formats.npz")

CONFIG = models._config(4, 2, 128, 384, head_dim=32, num_hidden_layers=1)
MIXTRAL = models._config(
    *(4, 2, 128, 192),
    architectures=["MixtralForCausalLM"],
    model_type="mixtral",
    head_dim=32,
    num_hidden_layers=1,
    num_local_experts=5,
    num_experts_per_tok=2,
    sliding_window=None,
)
QWEN3_MOE = models._config(
    *(4, 2, 128, 384),
    architectures=["Qwen3MoeForCausalLM"],
    model_type="qwen3_moe",
    head_dim=32,
    num_hidden_layers=1,
    num_experts=6,
    num_experts_per_tok=3,
    moe_intermediate_size=192,
    norm_topk_prob=True,
    rms_norm_eps=1e-6,
)
CASE, MIXTRAL_CASE, QWEN3_MOE_CASE = (
    models.make_case(f"quantized-{config['model_type']}", config, models.VOCAB, models.DECODE_STEPS)
    for config in (CONFIG, MIXTRAL, QWEN3_MOE)
)


def shapes_of(config):
    """Names and shapes of the tensors that transformers saves."""
    shapes = models._shapes(config)
    hidden, layer = config["hidden_size"], "model.layers.0."
    if config["model_type"] == "llama":
        return shapes
    shapes = {name: shape for name, shape in shapes.items() if ".mlp." not in name}
    if config["model_type"] == "mixtral":
        module, names = "block_sparse_moe.", ("w1", "w3", "w2")
        mlp, count = config["intermediate_size"], config["num_local_experts"]
    else:
        module, names = "mlp.", ("gate_proj", "up_proj", "down_proj")
        mlp, count = config["moe_intermediate_size"], config["num_experts"]
        for norm in ("q_norm", "k_norm"):
            shapes[f"{layer}self_attn.{norm}.weight"] = (config["head_dim"],)
    shapes[f"{layer}{module}gate.weight"] = (count, hidden)
    for i in range(count):
        for name, shape in zip(names, [(mlp, hidden)] * 2 + [(hidden, mlp)], strict=True):
            shapes[f"{layer}{module}experts.{i}.{name}.weight"] = shape
    return shapes


def weights(case):
    return models.weights(case, shapes_of(case.config))


def is_linear(name):
    """Whether weight `name` is quantized: not a router, an embedding or an output matrix."""
    return name.endswith(("proj.weight", "w1.weight", "w2.weight", "w3.weight"))


LINEARS = [name for name in weights(CASE) if is_linear(name)]


def uniform(name, shape, low=0.0, high=1.0):
    """Numbers from `name` alone, see reference/models.py."""
    bits = models._raw(name, int(np.prod(shape))) >> np.uint64(11)
    return (low + (high - low) * bits.astype(np.float64) * 2.0**-53).reshape(shape)


def whole_numbers(name, shape, low, high):
    """Integers from `low` up to, and without, `high`."""
    return np.floor(uniform(name, shape, low, high)).astype(np.int64)


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
    n, k = shape
    group = k if group == -1 else group
    groups = -(-k // group)
    codes = whole_numbers(f"{name}/codes", shape, 0, 1 << bits)
    spread = 2.0 / (1 << bits) / np.sqrt(k) * (1.5 if "q_proj" in name or "k_proj" in name else 1)
    scale = (uniform(f"{name}/scale", (n, groups), 0.5, 1.5) * spread * 1.7).astype(scale_dtype)
    zero = np.full((n, groups), 1 << (bits - 1))
    if not sym:
        zero = whole_numbers(f"{name}/zero", (n, groups), 1, 1 << bits)
    of = np.arange(k) // group
    if act_order:
        # Queries, keys and values are quantized with the same activations, gate and up as well.
        same = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
        seed = reduce(lambda s, kv: s.replace(*kv), same.items(), name)
        of = of[np.argsort(uniform(f"{seed}/order", k))]
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
    # The third power has many small numbers, subnormal ones among them.
    values = (240 * uniform(f"{name}/codes", shape, -1, 1) ** 3).astype(ml_dtypes.float8_e4m3fn)
    scale = uniform(f"{name}/scale", scale_shape, 0.5, 1.5) / 90 / np.sqrt(shape[1])
    scale = scale.astype(scale_dtype)
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
        "ignore": ["lm_head", "re:.*gate$"],
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
# Formats of mixtures of experts: their case, and as above.
EXPERTS = {
    "mixtral-gptq": (MIXTRAL_CASE, "gptq", {"group": 64}),
    # All of a row is one group, so act-order moves nothing.
    "mixtral-gptq-rows": (MIXTRAL_CASE, "gptq", {"group": -1, "sym": False, "act_order": True}),
    "mixtral-awq": (MIXTRAL_CASE, "awq", {"group": 64}),
    "mixtral-fp8": (MIXTRAL_CASE, "fp8", {}),
    "mixtral-ct-int8": (
        MIXTRAL_CASE,
        "compressed",
        {"kind": "int-quantized", "bits": 8, "group": -1},
    ),
    "qwen3-moe-gptq": (QWEN3_MOE_CASE, "gptq", {"group": 32}),
    "qwen3-moe-gptq-8bit": (QWEN3_MOE_CASE, "gptq", {"bits": 8, "group": 64}),
    "qwen3-moe-awq": (QWEN3_MOE_CASE, "awq", {"group": 32}),
    "qwen3-moe-fp8-blocks": (QWEN3_MOE_CASE, "fp8", {"block": (64, 64)}),
    "qwen3-moe-ct-int4": (QWEN3_MOE_CASE, "compressed", {"group": 32, "sym": False}),
    "qwen3-moe-ct-fp8": (QWEN3_MOE_CASE, "compressed", {"kind": "float-quantized"}),
}


def case_of(name):
    """The model that format `name` is tried on."""
    return EXPERTS[name][0] if name in EXPERTS else CASE


def write(folder, name, plain=(), change=None, case=None):
    """Write the checkpoint of format `name`; the dequantized weights in float32 by name.

    Weights in `plain` stay as they are; `change` may damage the tensors.
    """
    case = case or case_of(name)
    method, options = EXPERTS[name][1:] if name in EXPERTS else FORMATS[name]
    writer, config_of = WRITERS[method]
    tensors, whole = {}, weights(case)
    for weight, values in list(whole.items()):
        if is_linear(weight) and weight not in plain:
            whole[weight] = writer(weight, values.shape, tensors, **options)
        else:
            tensors[weight] = values
    if change is not None:
        change(tensors, "model.layers.0.mlp.down_proj")
    save(folder, case.config | {"quantization_config": config_of(**options)}, tensors)
    return whole


def save(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: np.ascontiguousarray(t) for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors")


def write_mlc(folder, kind):
    """A repository as MLC makes it, with joined matrices; the dequantized weights."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = weights(CASE)
    layer = "model.layers.0."
    for joined, parts in (
        ("self_attn.qkv_proj", [f"self_attn.{p}_proj" for p in "qkv"]),
        ("mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"]),
    ):
        pieces = [whole[f"{layer}{p}.weight"] for p in parts]
        whole[f"{layer}{joined}.weight"] = np.concatenate(pieces)
    records, data, back = [], bytearray(), {}
    for name, values in whole.items():
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            continue
        tensors = {name: values.astype(np.float16)}
        if values.ndim == 2:
            module = name.removesuffix(".weight")
            scale = np.abs(values.reshape(len(values), -1, 32)).max(-1) / 7
            scale = scale.astype(np.float16)
            wide = scale.repeat(32, 1).astype(np.float32)
            codes = np.clip(np.rint(values / wide) + 7, 0, 14).astype(int)
            back[name] = (codes - 7).astype(np.float32) * wide
            packed = words(codes, 4).view(np.uint32)
            if kind == "q4f16_0" and "embed" not in name:
                packed, scale = packed.T, scale.T
            tensors = {f"{module}.q_weight": packed, f"{module}.q_scale": scale}
        for part, tensor in tensors.items():
            raw = np.ascontiguousarray(tensor).tobytes()
            records.append(
                {
                    "name": part,
                    "shape": list(tensor.shape),
                    "dtype": str(tensor.dtype),
                    "format": "f32-to-bf16",
                    "nbytes": len(raw),
                    "byteOffset": len(data),
                }
            )
            data += raw
    (folder / "params_shard_0.bin").write_bytes(data)
    shard = {"dataPath": "params_shard_0.bin", "format": "raw-shard", "nbytes": len(data)}
    cache = {"metadata": {}, "records": [shard | {"records": records}]}
    (folder / "ndarray-cache.json").write_text(json.dumps(cache))
    c = CONFIG
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    keys += ("rms_norm_eps", "vocab_size", "num_key_value_heads", "head_dim")
    model = {key: c[key] for key in keys} | {
        "tie_word_embeddings": False,
        "position_embedding_base": 10000.0,
        "rope_scaling": None,
        "context_window_size": 64,
        "prefill_chunk_size": 64,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "max_batch_size": 128,
        "disaggregation": False,
    }
    chat = {"version": "0.1.0", "model_type": "llama", "quantization": kind}
    chat |= {"model_config": model, "vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "mlc-chat-config.json").write_text(json.dumps(chat))
    for joined, parts in (("qkv_proj", "qkv"), ("gate_up_proj", ("gate", "up"))):
        where = "self_attn" if joined == "qkv_proj" else "mlp"
        first = 0
        for p in parts:
            name = f"{layer}{where}.{p}_proj.weight"
            back[name] = back[f"{layer}{where}.{joined}.weight"][first : first + len(whole[name])]
            first += len(whole[name])
    return back


MLC = {"mlc-q4f16_1": "q4f16_1", "mlc-q4f16_0": "q4f16_0"}
ALL = [*FORMATS, *MLC, *EXPERTS]


def write_any(folder, name):
    """Write the checkpoint of any format; see `write`."""
    if name not in MLC:
        return write(folder, name)
    whole, back = weights(CASE), write_mlc(folder, MLC[name])
    halves = {name: values.astype(np.float16).astype(np.float32) for name, values in whole.items()}
    return {name: back.get(name, halves[name]) for name in whole}


def golden(name):
    """Logits of transformers with the dequantized weights, prefill and steps after each other."""
    with np.load(GOLDEN) as file:
        return file[name]
