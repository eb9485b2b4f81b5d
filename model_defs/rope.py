"""Rotary position embedding: its configuration and its frequencies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shardwright.errors import ConfigError
from shardwright.model_defs.fields import Reader

if TYPE_CHECKING:
    from shardwright.model_defs.config import LlamaConfig


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched; field names as in transformers' `rope_parameters`.

    `factor` applies to all types but `default`, `low_freq_factor` and `high_freq_factor` to
    `llama3`, `original_max_position_embeddings` to `llama3`, `yarn` and `longrope`, `short_factor`
    and `long_factor` to `longrope`, `attention_factor` to it and `yarn`, the rest to `yarn`.
    """

    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


_ALIASES = {"su": "longrope"}  # as the first checkpoints of Phi-3 call it

_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "longrope": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
        "long_factor",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


def read_rope(
    config: Mapping[str, Any],
    max_positions: int,
    head_dim: int,
    default_theta: float = 10000.0,
    partial: bool = False,
) -> tuple[float, RopeScaling]:
    """`rope_theta` and scaling, from `rope_parameters` (transformers 5) or `rope_scaling` (4).

    `head_dim` counts the elements that are rotated. Unless `partial`, they must be all of a head.
    """
    key, values = _rope_dict(config)
    get = Reader(values, f"{key}.")
    inner, outer = values.get("rope_theta"), config.get("rope_theta")
    if inner is not None and outer is not None and inner != outer:
        raise ConfigError(f"rope_theta: {outer!r}, but {key}.rope_theta is {inner!r}; drop one")
    theta = (get if inner is not None else Reader(config)).number("rope_theta", default_theta)
    if theta <= 1:
        raise ConfigError(f"rope_theta: expected a number above 1, got {theta!r}")

    name = values.get("rope_type")
    name = values.get("type", "default") if name is None else name
    name = _ALIASES.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in _ROPE_KEYS:
        raise ConfigError(
            f"{key}.rope_type: {name!r} is not supported; supported are {', '.join(_ROPE_KEYS)}"
        )
    # `finetuned` says how the weights came about, not how they are used.
    common = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
    for name_in_dict, value in values.items():
        if (
            name_in_dict not in common
            and name_in_dict not in _ROPE_KEYS[name]
            and value is not None
        ):
            allowed = ", ".join(_ROPE_KEYS[name]) or "none"
            raise ConfigError(
                f"{key}.{name_in_dict}: unknown for rope type {name!r}, which takes: {allowed}"
            )
    if not partial and values.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise get.fail("partial_rotary_factor", "1.0, which is all we support")
    if name == "dynamic" and head_dim <= 2:
        raise ConfigError(f"head_dim: dynamic rope needs more than 2, got {head_dim}")
    scaling = _read_scaling(name, get, config, max_positions)
    if name == "longrope":
        for key in ("short_factor", "long_factor"):
            if len(getattr(scaling, key)) != head_dim // 2:
                raise get.fail(key, f"{head_dim // 2} numbers, one for each rotated pair")
    return theta, scaling


def _rope_dict(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name and contents of the rope dictionary in use; the contents may be empty."""
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    if new and old and new != old:
        raise ConfigError("rope_scaling: differs from rope_parameters; drop one of the two")
    key, values = ("rope_parameters", new) if new else ("rope_scaling", old or {})
    if not isinstance(values, Mapping):
        raise ConfigError(f"{key}: expected an object or null, got {values!r}")
    for name, value in values.items():
        if isinstance(value, Mapping):
            raise ConfigError(f"{key}.{name}: rope parameters by layer type are not supported")
    return key, values


def _read_scaling(
    name: str, get: Reader, config: Mapping[str, Any], max_positions: int
) -> RopeScaling:
    if name == "default":
        return RopeScaling()
    if name in ("linear", "dynamic"):
        return RopeScaling(name, get.number("factor"))

    outer = config.get("original_max_position_embeddings")
    inner = get.values.get("original_max_position_embeddings")
    if outer is not None and inner is not None and outer != inner:
        raise ConfigError(
            f"original_max_position_embeddings: {outer!r}, but "
            f"{get.prefix}original_max_position_embeddings is {inner!r}; drop one"
        )
    source = get if inner is not None else Reader(config)
    original = source.integer("original_max_position_embeddings", max_positions)
    if name == "llama3":
        low, high = get.number("low_freq_factor"), get.number("high_freq_factor")
        if high <= low:
            raise ConfigError(
                f"{get.prefix}high_freq_factor: {high} must be above low_freq_factor {low}"
            )
        return RopeScaling(name, get.number("factor"), low, high, original)
    if name == "longrope":
        return RopeScaling(
            type=name,
            factor=get.number("factor", max_positions / original),
            original_max_position_embeddings=original,
            attention_factor=get.maybe_number("attention_factor"),
            short_factor=get.numbers("short_factor"),
            long_factor=get.numbers("long_factor"),
        )
    return RopeScaling(
        type=name,
        # DeepSeek leaves the factor out; transformers then takes the ratio of the lengths.
        factor=get.number("factor", max_positions / original),
        original_max_position_embeddings=original,
        attention_factor=get.maybe_number("attention_factor"),
        beta_fast=get.number("beta_fast", 32.0),
        beta_slow=get.number("beta_slow", 1.0),
        mscale=get.maybe_number("mscale"),
        mscale_all_dim=get.maybe_number("mscale_all_dim"),
        truncate=get.boolean("truncate", True),
    )


def inv_freq(
    config: LlamaConfig,
) -> tuple[npt.NDArray[np.float32], float, tuple[float, int] | None]:
    """Rotary frequencies as transformers' `modeling_rope_utils` computes them, in float32.

    Returns `(frequencies [rotary_dim / 2] in radians per position, scale, ntk)`. Cosine and sine
    are multiplied by `scale`. `ntk` is None but for two types. For `dynamic` it is
    `(factor, length)`, the frequencies are the unscaled ones, and a sequence of `n > length` tokens
    uses the base `rope_theta * (factor * n / length - (factor - 1)) ** (dim / (dim - 2))`. For
    `longrope` it is `(1, length)`, and the frequencies are two rows: of sequences up to `length`
    tokens, and of longer ones.
    """
    rope, dim = config.rope_scaling, config.rotary_dim
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    wavelength = np.float32(config.rope_theta) ** exponent
    base = np.float32(1) / wavelength
    if rope.type == "linear":
        return base / np.float32(rope.factor), 1.0, None
    if rope.type == "dynamic":
        return base, 1.0, (rope.factor, config.max_position_embeddings)
    if rope.type == "llama3":
        return _llama3(base, rope), 1.0, None
    if rope.type == "longrope":
        return _longrope(wavelength, rope)
    if rope.type == "yarn":
        return _yarn(wavelength, rope, config.rope_theta), _yarn_scale(rope), None
    return base, 1.0, None


def _llama3(base: npt.NDArray[np.float32], rope: RopeScaling) -> npt.NDArray[np.float32]:
    """Divide low frequencies by `factor`, keep high ones, blend in between (Llama 3.1)."""
    assert rope.low_freq_factor and rope.high_freq_factor
    assert rope.original_max_position_embeddings
    length = rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelength = np.float32(2 * math.pi) / base
    smooth = (length / wavelength - low) / (high - low)
    blended = (1 - smooth) * base / rope.factor + smooth * base
    long_waves = wavelength > length / low
    scaled = np.where(long_waves, base / rope.factor, base)
    medium = ~(wavelength < length / high) & ~long_waves
    result: npt.NDArray[np.float32] = np.where(medium, blended, scaled).astype(np.float32)
    return result


def _longrope(
    wavelength: npt.NDArray[np.float32], rope: RopeScaling
) -> tuple[npt.NDArray[np.float32], float, tuple[float, int]]:
    """A factor for each frequency, one list for short and one for long sequences.

    Source: arXiv:2402.13753; the temperature is that of Phi-3, section 2 of arXiv:2404.14219.
    """
    length = rope.original_max_position_embeddings
    assert length
    factors = np.asarray([rope.short_factor, rope.long_factor], np.float32)
    scale = rope.attention_factor
    if scale is None:
        stretched = rope.factor > 1
        scale = math.sqrt(1 + math.log(rope.factor) / math.log(length)) if stretched else 1.0
    return np.float32(1) / (factors * wavelength), scale, (1.0, length)


def _yarn(
    wavelength: npt.NDArray[np.float32], rope: RopeScaling, theta: float
) -> npt.NDArray[np.float32]:
    """Blend of scaled and unscaled frequencies by rotations in the original context (YaRN).

    `wavelength` is `theta ** (2 i / dim)`, `[dim / 2]`. Source: arXiv:2309.00071, section 3.2.
    """
    assert rope.original_max_position_embeddings
    dim = 2 * len(wavelength)
    length = rope.original_max_position_embeddings

    def dimension(rotations: float) -> float:
        """The pair, as a real number, that turns `rotations` times in the original context."""
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = 1 - np.clip(ramp, 0, 1)
    stretched = 1 / (np.float32(rope.factor) * wavelength)
    blended = stretched * (1 - keep) + (1 / wavelength) * keep
    result: npt.NDArray[np.float32] = blended.astype(np.float32)
    return result


def _yarn_scale(rope: RopeScaling) -> float:
    """The attention temperature of YaRN, applied to cosine and sine."""

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
