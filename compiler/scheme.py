"""The scheme of a build: one of ours, the checkpoint's own format, or that of an artefact."""

from __future__ import annotations

import json
from typing import Any, TypeAlias

from shardwright.compiler.checkpoint import Checkpoint
from shardwright.compiler.format_gptq import Awq, Gptq
from shardwright.compiler.format_mlc import Mlc
from shardwright.compiler.format_mxfp4 import Mxfp4
from shardwright.compiler.format_rows import CompressedTensors, Fp8
from shardwright.compiler.formats import KEY, Format
from shardwright.compiler.kept import Kept
from shardwright.compiler.quantization import QUANTIZATIONS, Quantization, quantization
from shardwright.errors import ConfigError, UsageError

Scheme: TypeAlias = Quantization | Format | Kept

METHODS: dict[str, type[Format]] = {
    "gptq": Gptq,
    "awq": Awq,
    "fp8": Fp8,
    "compressed-tensors": CompressedTensors,
    "mlc": Mlc,
    "mxfp4": Mxfp4,
}
DEFAULT = "q4f16_1"
OWN = {"checkpoint": "float16", "checkpoint-f32": "float32"}
"""Names of the checkpoint's own format, and the dtype of the activations with it."""


def scheme_of(name: str | None, checkpoint: Checkpoint) -> Scheme:
    """The scheme that `--quantization` names; without a name the checkpoint's own, or `DEFAULT`.

    Raises UsageError for a name that does not fit the checkpoint, ConfigError for a format that is
    not supported as it is.
    """
    check_name(name)
    _find_config(checkpoint)
    config = checkpoint.config.get("quantization_config")
    if config is None and name in OWN:
        raise UsageError(
            f"--quantization {name}: this checkpoint is not quantized; choose one of "
            f"{', '.join(QUANTIZATIONS)}"
        )
    if config is None:
        return quantization(name or DEFAULT)
    method = config.get("quant_method")
    if method not in METHODS:
        raise ConfigError(
            f"{KEY}quant_method: {method!r} is not supported; {', '.join(METHODS)} are. "
            "Use the model before its quantization, or another quantization of it."
        )
    if name is not None and name not in OWN and name != config.get("name"):
        raise UsageError(
            f"--quantization {name}: this checkpoint is quantized already ({method}); leave the "
            "option out, or use the model before its quantization"
        )
    return METHODS[method](checkpoint, OWN.get(name or "checkpoint", "float16"))


def check_name(name: str | None) -> None:
    """Raise UsageError for a name that no checkpoint could make right."""
    if name is not None and name not in (*QUANTIZATIONS, *OWN):
        known = ", ".join((*QUANTIZATIONS, *OWN))
        raise UsageError(f"quantization {name!r} is unknown; choose one of {known}")


def model_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration without what `scheme_of` has read."""
    return {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}


def _find_config(checkpoint: Checkpoint) -> None:
    """Put the configuration where newer checkpoints have it: older ones have a file for it."""
    if checkpoint.config.get("quantization_config") is not None:
        return
    gptq, awq = (checkpoint.root / f for f in ("quantize_config.json", "quant_config.json"))
    try:
        if gptq.is_file():
            found = {"quant_method": "gptq", **json.loads(gptq.read_bytes())}
        elif awq.is_file():
            old = json.loads(awq.read_bytes())
            renamed = {"w_bit": "bits", "q_group_size": "group_size"}
            found = {"quant_method": "awq", **{renamed.get(k, k): v for k, v in old.items()}}
        else:
            return
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{checkpoint.root}: damaged quantization config ({error})") from None
    checkpoint.config["quantization_config"] = found
