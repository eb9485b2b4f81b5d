"""A small GPT-OSS with experts in MXFP4, and the same with what they stand for."""

import json

import numpy as np
from reference import families
from safetensors.numpy import save_file

CASE = next(case for case in families.cases() if case.name == "gpt-oss")
CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        *("model.layers.*.self_attn", "model.layers.*.mlp.router"),
        *("model.embed_tokens", "lm_head"),
    ],
}
VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def checkpoints(folder, change=None):
    """The model in MXFP4, and with the same weights in float32; the latter's tensors."""
    packed, plain = {}, families.weights(CASE)
    for name in [n for n in plain if n.endswith(("gate_up_proj", "down_proj"))]:
        rng = np.random.default_rng(len(packed))
        experts, inner, outer = plain[name].shape
        codes = rng.integers(0, 16, (experts, outer, inner // 32, 32), dtype=np.uint8)
        scales = rng.integers(121, 125, codes.shape[:3], dtype=np.uint8)
        scales[0, 0, 0], scales[1, 2, 1] = 1, 100  # less than half precision has
        packed[f"{name}_blocks"] = codes[..., 0::2] | codes[..., 1::2] << 4
        packed[f"{name}_scales"] = scales
        table = np.array([*VALUES, *(-v for v in VALUES)])
        values = table[codes] * 2.0 ** (scales[..., None].astype(int) - 127)
        plain[name] = values.reshape(experts, outer, inner).transpose(0, 2, 1).astype(np.float32)
    packed |= {n: t for n, t in plain.items() if f"{n}_blocks" not in packed}
    if change is not None:
        change(packed)
    for kind, tensors, more in (("mxfp4", packed, CONFIG), ("plain", plain, None)):
        (folder / kind).mkdir(parents=True)
        config = CASE.config | ({"quantization_config": more} if more else {})
        (folder / kind / "config.json").write_text(json.dumps(config))
        arrays = {n: np.ascontiguousarray(t) for n, t in tensors.items()}
        save_file(arrays, folder / kind / "model.safetensors")
    return plain
