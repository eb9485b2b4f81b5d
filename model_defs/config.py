"""Configuration of Llama-like models, read from a Hugging Face `config.json`.

Reads what transformers 4 writes (`rope_theta`, `rope_scaling`, `torch_dtype`) and what transformers
5 writes (`rope_parameters`, `dtype`). A key that could change the result and is not supported is an
error that names it; keys known not to matter are listed in `IGNORED`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from shardwright.errors import ConfigError
from shardwright.model_defs.fields import Reader
from shardwright.model_defs.rope import RopeScaling, inv_freq, read_rope

__all__ = ["LlamaConfig", "RopeScaling", "inv_freq", "read_windows"]

DTYPES = ("float32", "float16", "bfloat16")

SLIDING, FULL = "sliding_attention", "full_attention"
"""The entries of `layer_types`."""

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
    "partial_rotary_factor": (1.0, None),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "use_mrope": (False, None),
    "use_sliding_window": (False, None),
}
"""Keys that are supported at these values only, but for the families that read them."""


Config = TypeVar("Config", bound="LlamaConfig")


@dataclass(frozen=True)
class LlamaConfig:
    """Everything the Llama model definition depends on. Lengths are in elements, global.

    Other families derive from it and state what differs: the value of a key that is absent
    (`defaults`), the keys they read besides these fields (`reads`) and know to be without effect
    (`ignores`), and, in `values`, how fields are read. `layer_types` says for each layer whether
    `sliding_window`, the positions a token sees, applies; empty is for none.
    """

    model_type: ClassVar[str] = "llama"
    defaults: ClassVar[Mapping[str, Any]] = {}
    reads: ClassVar[frozenset[str]] = frozenset()
    ignores: ClassVar[frozenset[str]] = frozenset()
    activations: ClassVar[tuple[str, ...]] = ("silu",)
    default_theta: ClassVar[float] = 10000.0

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
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    bos_token_id: tuple[int, ...] = ()
    eos_token_id: tuple[int, ...] = ()
    dtype: str | None = None

    @classmethod
    def from_hf(cls: type[Config], config: Mapping[str, Any]) -> Config:
        """Read the contents of a `config.json`; missing optional keys take transformers' defaults.

        Raises ConfigError, naming the field, for a value of the wrong type or out of range and for
        any key that is neither supported nor listed in `IGNORED`.
        """
        _refuse_unsupported(cls, config)
        return cls(**cls.values(Reader({**cls.defaults, **config})))

    @classmethod
    def values(cls, get: Reader) -> dict[str, Any]:
        """The fields by name, as `from_hf` reads them."""
        heads = get.integer("num_attention_heads")
        hidden = get.integer("hidden_size")
        kv_heads = get.integer("num_key_value_heads", heads)
        if heads % kv_heads:
            raise ConfigError(
                f"num_key_value_heads: {kv_heads} does not divide num_attention_heads {heads}"
            )
        head_dim = _head_dim(get, hidden, heads)
        max_positions = get.integer("max_position_embeddings", 2048)
        partial = "partial_rotary_factor" in cls.reads
        rotary_dim = cls.read_rotary_dim(get, head_dim)
        theta, scaling = read_rope(
            get.values, max_positions, rotary_dim, cls.default_theta, partial=partial
        )
        return {
            "vocab_size": get.integer("vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": get.integer("intermediate_size"),
            "num_hidden_layers": get.integer("num_hidden_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": max_positions,
            "rms_norm_eps": get.number("rms_norm_eps", 1e-6),
            "hidden_act": get.choice("hidden_act", cls.activations, cls.activations[0]),
            "attention_bias": get.boolean("attention_bias", False),
            "mlp_bias": get.boolean("mlp_bias", False),
            "tie_word_embeddings": get.boolean("tie_word_embeddings", False),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "bos_token_id": get.tokens("bos_token_id"),
            "eos_token_id": get.tokens("eos_token_id"),
            "dtype": _read_dtype(get),
        }

    @classmethod
    def read_rotary_dim(cls, get: Reader, head_dim: int) -> int:
        """Elements of a head that are rotated, the first ones."""
        return head_dim

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that are rotated, the first ones."""
        return self.head_dim

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have biases."""
        return self.attention_bias

    @property
    def output_bias(self) -> bool:
        """Whether the projection after attention has a bias."""
        return self.attention_bias

    @property
    def attention_scale(self) -> float:
        """What the products of queries and keys are multiplied with."""
        return float(self.head_dim**-0.5)

    @property
    def attention_softcap(self) -> float | None:
        """The cap of the scores of attention, see `layers.Cache.attend`."""
        return None

    def window(self, layer: int) -> int | None:
        """Positions that a token sees in `layer`, its own the last; None for all before it."""
        slides = bool(self.layer_types) and self.layer_types[layer] == SLIDING
        return self.sliding_window if slides else None


def read_windows(get: Reader, slides: Callable[[int], bool]) -> dict[str, Any]:
    """`sliding_window` and `layer_types`; `slides` tells of a layer where the file does not."""
    count, listed = get.integer("num_hidden_layers"), get.values.get("layer_types")
    types = listed or [SLIDING if slides(i) else FULL for i in range(count)]
    if not isinstance(types, list) or len(types) != count or not set(types) <= {SLIDING, FULL}:
        raise get.fail("layer_types", f"{count} entries, each {SLIDING!r} or {FULL!r}")
    window = get.maybe_integer("sliding_window")
    return {"sliding_window": window, "layer_types": tuple(types) if window else ()}


_COMMON = frozenset(f.name for f in fields(LlamaConfig)) | {
    "original_max_position_embeddings",
    "rope_parameters",
    "torch_dtype",
}
_WINDOWS = {"sliding_window", "layer_types"}


def _refuse_unsupported(family: type[LlamaConfig], config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that is unknown, or known and at an unsupported value."""
    expected = family.model_type
    if config.get("model_type", expected) != expected:
        raise ConfigError(f"model_type: expected {expected!r}, got {config['model_type']!r}")
    for key, neutral in _NEUTRAL.items():
        if key in config and key not in family.reads and config[key] not in neutral:
            value = str(config[key])
            shown = value if len(value) < 40 else value[:37] + "..."
            raise ConfigError(
                f"{key}: {shown} is not supported; only {neutral[0]!r} is. "
                "Use a checkpoint without it."
            )
    known = (_COMMON - _WINDOWS) | _NEUTRAL.keys() | family.reads | family.ignores | IGNORED
    for key in config:
        if key not in known:
            raise ConfigError(
                f"{key}: unknown field in config.json, so its effect on the model is unknown. "
                "Remove it if it has none."
            )


def _head_dim(get: Reader, hidden: int, heads: int) -> int:
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


def _read_dtype(get: Reader) -> str | None:
    """`dtype` (transformers 5) or `torch_dtype` (4), with or without the prefix `torch.`."""
    key = "dtype" if get.values.get("dtype") is not None else "torch_dtype"
    value = get.values.get(key)
    if value is None:
        return None
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name not in DTYPES:
        raise get.fail(key, " or ".join(DTYPES))
    return str(name)
