"""Small random Llamas that between them use every supported configuration, and their logits.

A case is rebuilt from its name alone, without torch: `write_checkpoint` writes config.json and
model.safetensors (fp32). The logits that transformers computes for it are in golden.npz, written
by scripts/make_reference.py.

Weights are uniform numbers from the raw 64-bit stream of PCG64, seeded with the CRC-32 of
"<case>/<tensor>". numpy promises that stream for ever, unlike that of `Generator.normal`.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

GOLDEN = Path(__file__).with_name("golden.npz")

VOCAB = 131
PROMPT_LENGTHS = (13, 7)
DECODE_STEPS = 4

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """One model and the tokens it is run on.

    `config` is the content of its config.json. `prompts` are two rows of 13 and 7 tokens,
    `decode[step][row]` the tokens fed one at a time after them.
    """

    name: str
    config: dict[str, Any]
    prompts: tuple[tuple[int, ...], ...]
    decode: tuple[tuple[int, ...], ...]

    @property
    def max_len(self) -> int:
        """Positions in use at the end: the longest prompt and the decoded tokens."""
        return max(map(len, self.prompts)) + len(self.decode)


@dataclass(frozen=True)
class Golden:
    """Logits of transformers in fp32, each row computed alone, so without padding or masks.

    `prefill [2, vocab]` at the last prompt position of each row; `decode [4, 2, vocab]` after each
    fed token.
    """

    prefill: Array
    decode: Array


def _config(heads: int, kv_heads: int, hidden: int, mlp: int, **more: Any) -> dict[str, Any]:
    """A config.json in the style of transformers 4; `more` adds and overrides keys."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    return config | more


def _v5(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration as transformers 5 writes it: `rope_parameters` and `dtype`."""
    config = dict(config)
    scaling = config.pop("rope_scaling") or {"rope_type": "default"}
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), **scaling}
    config["dtype"] = config.pop("torch_dtype")
    return config


# With 64 positions and theta 10000, the 8 pairs of a head fall into all three of llama3's bands.
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

_CONFIGS: dict[str, dict[str, Any]] = {
    "mha": _config(4, 4, 64, 104),
    "mha-v5": _v5(_config(4, 4, 64, 104, eos_token_id=[2, 5])),
    "gqa-8-2": _config(8, 2, 96, 176, head_dim=12),
    "gqa-6-3": _v5(_config(6, 3, 96, 168, rope_theta=500000.0)),
    "mqa": _config(4, 1, 64, 120),
    "heads-7": _config(7, 7, 84, 140),
    "head-dim": _config(5, 5, 80, 136, head_dim=24),
    "head-dim-gqa": _v5(_config(6, 2, 72, 112, head_dim=32)),
    "eps": _config(4, 2, 64, 104, rms_norm_eps=0.05),
    "attention-bias": _config(8, 2, 64, 104, attention_bias=True),
    "mlp-bias": _config(4, 2, 64, 104, mlp_bias=True),
    "tied": _config(4, 2, 64, 104, tie_word_embeddings=True),
    "rope-linear": _config(4, 2, 64, 104, rope_scaling={"type": "linear", "factor": 2.5}),
    "rope-linear-v5": _v5(
        _config(4, 2, 64, 104, rope_scaling={"rope_type": "linear", "factor": 4.0})
    ),
    # The first prompt is longer than max_position_embeddings, the second grows past it.
    "rope-dynamic": _config(
        4, 2, 64, 104, max_position_embeddings=8, rope_scaling={"type": "dynamic", "factor": 2.0}
    ),
    "rope-dynamic-v5": _v5(
        _config(
            8,
            2,
            64,
            104,
            head_dim=16,
            max_position_embeddings=10,
            rope_scaling={"rope_type": "dynamic", "factor": 4.0},
        )
    ),
    "rope-llama3": _config(4, 2, 64, 104, max_position_embeddings=512, rope_scaling=_LLAMA3),
    "rope-llama3-v5": _v5(
        _config(4, 1, 64, 104, max_position_embeddings=512, rope_scaling=_LLAMA3)
    ),
    "rope-yarn": _config(4, 2, 64, 104, max_position_embeddings=256, rope_scaling=_YARN),
    "rope-yarn-mscale": _v5(
        _config(
            4,
            2,
            64,
            104,
            max_position_embeddings=256,
            rope_scaling=_YARN
            | {
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "mscale": 1.5,
                "mscale_all_dim": 0.75,
                "truncate": False,
            },
        )
    ),
    "rope-yarn-attention-factor": _config(
        4,
        2,
        64,
        104,
        max_position_embeddings=256,
        rope_scaling=_YARN | {"attention_factor": 1.25, "beta_fast": 8.0},
    ),
    "everything": _v5(
        _config(
            6,
            2,
            84,
            148,
            head_dim=16,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            max_position_embeddings=512,
            rope_scaling=_LLAMA3,
            eos_token_id=[2, 5],
        )
    ),
}


def _raw(name: str, count: int) -> npt.NDArray[np.uint64]:
    raw: npt.NDArray[np.uint64] = np.random.PCG64(zlib.crc32(name.encode())).random_raw(count)
    return raw


def _tokens(name: str, count: int, vocab: int) -> tuple[int, ...]:
    """`count` token ids from 3 up, so neither padding, bos nor eos."""
    return tuple(int(3 + value) for value in _raw(name, count) % np.uint64(vocab - 3))


def make_case(name: str, config: dict[str, Any], vocab: int, steps: int) -> Case:
    """The case `name`, whose tokens come from its name."""
    rows = len(PROMPT_LENGTHS)
    return Case(
        name=name,
        config=config,
        prompts=tuple((1, *_tokens(f"{name}/{n}", n - 1, vocab)) for n in PROMPT_LENGTHS),
        decode=tuple(_tokens(f"{name}/step{i}", rows, vocab) for i in range(steps)),
    )


def cases() -> list[Case]:
    """Return all cases, in a fixed order."""
    return [make_case(name, config, VOCAB, DECODE_STEPS) for name, config in _CONFIGS.items()]


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint's tensors, as transformers writes them."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    linear = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    vocab = config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, shape in linear.items():
            shapes[f"{layer}{name}.weight"] = shape
            if config["attention_bias" if name.startswith("self") else "mlp_bias"]:
                shapes[f"{layer}{name}.bias"] = shape[:1]
        shapes[f"{layer}input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def weights(case: Case, shapes: dict[str, tuple[int, ...]] | None = None) -> dict[str, Array]:
    """Return the tensors of the checkpoint, fp32; `shapes` are those of a Llama if None.

    Uniform, with a standard deviation that keeps activations and logits O(1) and attention far
    from flat, so that a wrong position or head shows; norms around 1, biases about 0.3.
    """
    tensors = {}
    tied = case.config.get("tie_word_embeddings", True)
    for name, shape in (shapes or _shapes(case.config)).items():
        bits = _raw(f"{case.name}/{name}", int(np.prod(shape))) >> np.uint64(11)
        unit = bits.astype(np.float64) * 2.0**-52 - 1.0  # uniform in [-1, 1)
        if "norm" in name:
            values = 1.0 + 0.5 * unit
        elif name.endswith(".bias"):
            values = 0.5 * unit
        else:
            # A tied embedding is the output layer too, so it is scaled as one.
            deviation = 1.0 if name == "model.embed_tokens.weight" else shape[-1] ** -0.5
            if tied and "embed" in name:
                deviation = shape[-1] ** -0.5
            if "q_proj" in name or "k_proj" in name or "qkv_proj" in name:
                deviation *= 1.5
            values = 3**0.5 * deviation * unit
        tensors[name] = values.reshape(shape).astype(np.float32)
    return tensors


def write_checkpoint(case: Case, folder: Path) -> None:
    """Write config.json and model.safetensors into `folder`, which is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(case.config, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    save_file(weights(case), str(folder / "model.safetensors"), metadata={"format": "pt"})


def golden(case: Case) -> Golden:
    """Return the stored logits of a case."""
    with np.load(GOLDEN) as file:
        return Golden(file[f"{case.name}/prefill"], file[f"{case.name}/decode"])


def relative_error(got: Array, want: Array) -> float:
    """Return max |got - want| / max |want|, the measure that is kept under 1e-4 in fp32."""
    return float(np.abs(got.astype(np.float64) - want).max() / np.abs(want).max())
