"""Configuration of Llama-like models, read from a Hugging Face `config.json`.

Reads what transformers 4 writes (`rope_theta`, `rope_scaling`, `torch_dtype`) and what transformers
5 writes (`rope_parameters`, `dtype`). A key that could change the result and is not supported is an
error that names it; keys known not to matter are listed in `IGNORED`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from shardwright.errors import ConfigError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
DTYPES = ("float32", "float16", "bfloat16")

IGNORED = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled
    _name_or_path architectures attention_dropout attn_implementation auto_map bad_words_ids
    begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder label2id
    length_penalty max_length max_sequence_length min_length model_type no_repeat_ngram_size
    num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torchscript transformers.js_config transformers_version typical_p
    unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()
)
"""Keys without effect on inference: training, classification, generation defaults, provenance.

`pretraining_tp` only split matrix products in transformers 4; transformers 5 ignores it.
"""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
}
"""Keys that are supported at these values only."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched; field names as in transformers' `rope_parameters`.

    `factor` applies to all types but `default`, `low_freq_factor` and `high_freq_factor` to
    `llama3`, `original_max_position_embeddings` to `llama3` and `yarn`, the rest to `yarn`.
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


@dataclass(frozen=True)
class LlamaConfig:
    """Everything the Llama model definition depends on. Lengths are in elements, global."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    bos_token_id: tuple[int, ...] = ()
    eos_token_id: tuple[int, ...] = ()
    dtype: str | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read the contents of a `config.json`; missing optional keys take transformers' defaults.

        Raises ConfigError, naming the field, for a value of the wrong type or out of range and for
        any key that is neither supported nor listed in `IGNORED`.
        """
        get = _Reader(config)
        _refuse_unsupported(config)
        heads = get.integer("num_attention_heads")
        hidden = get.integer("hidden_size")
        kv_heads = get.integer("num_key_value_heads", heads)
        if heads % kv_heads:
            raise ConfigError(
                f"num_key_value_heads: {kv_heads} does not divide num_attention_heads {heads}"
            )
        head_dim = _head_dim(get, hidden, heads)
        max_positions = get.integer("max_position_embeddings", 2048)
        theta, scaling = _read_rope(config, max_positions, head_dim)
        return cls(
            vocab_size=get.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=get.integer("intermediate_size"),
            num_hidden_layers=get.integer("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=get.number("rms_norm_eps", 1e-6),
            hidden_act=get.choice("hidden_act", ("silu",), "silu"),
            attention_bias=get.boolean("attention_bias", False),
            mlp_bias=get.boolean("mlp_bias", False),
            tie_word_embeddings=get.boolean("tie_word_embeddings", False),
            rope_theta=theta,
            rope_scaling=scaling,
            bos_token_id=get.tokens("bos_token_id"),
            eos_token_id=get.tokens("eos_token_id"),
            dtype=_read_dtype(get),
        )


class _Reader:
    """Typed access to a config; `prefix` goes before field names in messages.

    A key that is null counts as absent, as in transformers.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values = values
        self.prefix = prefix

    def fail(self, key: str, expected: str) -> ConfigError:
        if self.values.get(key) is None:
            return ConfigError(f"{self.prefix}{key}: missing; expected {expected}")
        return ConfigError(f"{self.prefix}{key}: expected {expected}, got {self.values[key]!r}")

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.fail(key, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.fail(key, "a positive number")
        if not 0 < value < math.inf:
            raise self.fail(key, "a positive number")
        return float(value)

    def maybe_number(self, key: str) -> float | None:
        return None if self.values.get(key) is None else self.number(key)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        value = self.values.get(key)
        value = default if value is None else value
        if value not in choices:
            raise self.fail(key, f"{' or '.join(map(repr, choices))}, which is all we support")
        return str(value)

    def tokens(self, key: str) -> tuple[int, ...]:
        """A token id or a list of them."""
        value = self.values.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.fail(key, "a token id or a list of token ids")
        return tuple(ids)


_FIELDS = frozenset(LlamaConfig.__dataclass_fields__) | {
    "original_max_position_embeddings",
    "rope_parameters",
    "torch_dtype",
}


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that is unknown, or known and at an unsupported value."""
    if config.get("model_type", "llama") != "llama":
        raise ConfigError(f"model_type: expected 'llama', got {config['model_type']!r}")
    for key, neutral in _NEUTRAL.items():
        if key in config and config[key] not in neutral:
            value = str(config[key])
            shown = value if len(value) < 40 else value[:37] + "..."
            raise ConfigError(
                f"{key}: {shown} is not supported; only {neutral[0]!r} is. "
                "Use a checkpoint without it."
            )
    for key in config:
        if key not in _FIELDS and key not in _NEUTRAL and key not in IGNORED:
            raise ConfigError(
                f"{key}: unknown field in config.json, so its effect on the model is unknown. "
                "Remove it if it has none."
            )


def _head_dim(get: _Reader, hidden: int, heads: int) -> int:
    if get.values.get("head_dim") is None and hidden % heads:
        raise ConfigError(
            f"hidden_size: {hidden} is no multiple of num_attention_heads {heads}; set head_dim"
        )
    head_dim = get.integer("head_dim", hidden // heads)
    if head_dim % 2:
        raise ConfigError(
            f"head_dim: {head_dim} is odd; rotary embedding turns pairs of elements, so only even "
            "sizes are supported"
        )
    return head_dim


def _read_dtype(get: _Reader) -> str | None:
    """`dtype` (transformers 5) or `torch_dtype` (4), with or without the prefix `torch.`."""
    key = "dtype" if get.values.get("dtype") is not None else "torch_dtype"
    value = get.values.get(key)
    if value is None:
        return None
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name not in DTYPES:
        raise get.fail(key, " or ".join(DTYPES))
    return str(name)


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


def _read_rope(
    config: Mapping[str, Any], max_positions: int, head_dim: int
) -> tuple[float, RopeScaling]:
    """`rope_theta` and scaling, from `rope_parameters` (transformers 5) or `rope_scaling` (4)."""
    key, values = _rope_dict(config)
    get = _Reader(values, f"{key}.")
    inner, outer = values.get("rope_theta"), config.get("rope_theta")
    if inner is not None and outer is not None and inner != outer:
        raise ConfigError(f"rope_theta: {outer!r}, but {key}.rope_theta is {inner!r}; drop one")
    theta = (get if inner is not None else _Reader(config)).number("rope_theta", 10000.0)
    if theta <= 1:
        raise ConfigError(f"rope_theta: expected a number above 1, got {theta!r}")

    name = values.get("rope_type")
    name = values.get("type", "default") if name is None else name
    if name not in ROPE_TYPES:
        raise ConfigError(
            f"{key}.rope_type: {name!r} is not supported; supported are {', '.join(ROPE_TYPES)}"
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
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise get.fail("partial_rotary_factor", "1.0, which is all we support")
    if name == "dynamic" and head_dim <= 2:
        raise ConfigError(f"head_dim: dynamic rope needs more than 2, got {head_dim}")
    return theta, _read_scaling(name, get, config, max_positions)


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
    name: str, get: _Reader, config: Mapping[str, Any], max_positions: int
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
    source = get if inner is not None else _Reader(config)
    original = source.integer("original_max_position_embeddings", max_positions)
    if name == "llama3":
        low, high = get.number("low_freq_factor"), get.number("high_freq_factor")
        if high <= low:
            raise ConfigError(
                f"{get.prefix}high_freq_factor: {high} must be above low_freq_factor {low}"
            )
        return RopeScaling(name, get.number("factor"), low, high, original)
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

    Returns `(frequencies [head_dim / 2] in radians per position, scale, ntk)`. Cosine and sine are
    multiplied by `scale`. `ntk` is None but for type `dynamic`, where it is `(factor, length)`, the
    frequencies are the unscaled ones, and a sequence of `n > length` tokens uses the base
    `rope_theta * (factor * n / length - (factor - 1)) ** (head_dim / (head_dim - 2))`.
    """
    rope, dim = config.rope_scaling, config.head_dim
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    wavelength = np.float32(config.rope_theta) ** exponent
    base = np.float32(1) / wavelength
    if rope.type == "linear":
        return base / np.float32(rope.factor), 1.0, None
    if rope.type == "dynamic":
        return base, 1.0, (rope.factor, config.max_position_embeddings)
    if rope.type == "llama3":
        return _llama3(base, rope), 1.0, None
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
    return (stretched * (1 - keep) + (1 / wavelength) * keep).astype(np.float32)


def _yarn_scale(rope: RopeScaling) -> float:
    """The attention temperature of YaRN, applied to cosine and sine."""

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
