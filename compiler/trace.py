"""Trace: a model definition and the limits of a build become Relax IR, global view.

The module holds `prefill`, one `decode_<batch>` per bucket and `sample`. A decode function is a
whole step: embedding, layers, logits, sampling and the state's advance, so that nothing comes from
the host between two steps. State tensors (`StateSpec`) are arguments that are updated in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from types import MethodType
from typing import Any

import tvm
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op, spec

from shardwright.model_defs.layers import Cache, Stored, abstract

SAMPLING_FLOATS, SAMPLING_INTS, MAX_EOS = 4, 8, 16
PREFILL_INPUTS = ("tokens", "rows", "positions", "lengths")


@dataclass(frozen=True)
class Limits:
    """Sizes fixed at build time: tokens per row, rows, tokens per prefill call, tokens per page."""

    max_seq_len: int
    max_batch_size: int
    prefill_chunk_size: int
    page_size: int

    @property
    def pages_per_row(self) -> int:
        """Pages that hold `max_seq_len` tokens."""
        return -(-self.max_seq_len // self.page_size)

    @property
    def num_pages(self) -> int:
        """Pages of the whole cache."""
        return self.pages_per_row * self.max_batch_size

    @property
    def buckets(self) -> list[int]:
        """Batch sizes that get a decode function of their own: powers of two, and the maximum."""
        powers = [1 << i for i in range(self.max_batch_size.bit_length())]
        return sorted({b for b in powers if b <= self.max_batch_size} | {self.max_batch_size})


@dataclass(frozen=True)
class StateSpec:
    """A tensor that lives on the device across calls; `axes` are logical names, as of weights."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]


def state_specs(model: nn.Module, dtype: str, limits: Limits) -> list[StateSpec]:
    """State of the program, global shapes. The first dimension is the batch, except for pages."""
    config, batch = model.config, limits.max_batch_size
    pages = (
        config.num_hidden_layers,
        limits.num_pages,
        config.num_key_value_heads,
        limits.page_size,
        config.head_dim,
    )
    page_axes = (None, None, "kv_heads", None, None)

    def rows(name: str, dtype: str, *shape: int) -> StateSpec:
        return StateSpec(name, (batch, *shape), dtype, (None,) * (1 + len(shape)))

    return [
        rows("tokens", "int32"),
        rows("rows", "int32"),
        rows("positions", "int32"),
        rows("page_table", "int32", limits.pages_per_row),
        StateSpec("k_pages", pages, dtype, page_axes),
        StateSpec("v_pages", pages, dtype, page_axes),
        rows("history", "int32", limits.max_seq_len),
        rows("sampling_f", "float32", SAMPLING_FLOATS),
        rows("sampling_i", "int32", SAMPLING_INTS),
        rows("eos", "int32", MAX_EOS),
        rows("logits", "float32", config.vocab_size),
        rows("scores", "float32", config.vocab_size),
    ]


def _prefill(
    net: nn.Module,
    tokens: nn.Tensor,
    rows: nn.Tensor,
    positions: nn.Tensor,
    lengths: nn.Tensor,
    last: nn.Tensor,
    page_table: nn.Tensor,
    k_pages: nn.Tensor,
    v_pages: nn.Tensor,
    logits: nn.Tensor,
) -> tuple[nn.Tensor, ...]:
    """A chunk of tokens of any rows; logits of the rows whose last token it holds."""
    cache = Cache(k_pages, v_pages, page_table, rows, positions)
    hidden = net.forward(tokens, lengths, cache)
    zero = nn.Tensor.from_scalar(0, "int32")
    picked = op.take(hidden, op.maximum(last, zero), axis=0)
    logits = _store_logits(net.logits(picked), last, logits)
    return cache.k_pages, cache.v_pages, logits


def _decode(
    net: nn.Module,
    tokens: nn.Tensor,
    rows: nn.Tensor,
    positions: nn.Tensor,
    page_table: nn.Tensor,
    k_pages: nn.Tensor,
    v_pages: nn.Tensor,
    logits: nn.Tensor,
    scores: nn.Tensor,
    history: nn.Tensor,
    sampling_f: nn.Tensor,
    sampling_i: nn.Tensor,
    eos: nn.Tensor,
) -> tuple[nn.Tensor, ...]:
    """One token of each row, from embedding to the next token."""
    cache = Cache(k_pages, v_pages, page_table, rows, positions)
    lengths = op.add(positions, nn.Tensor.from_scalar(1, "int32"))
    hidden = net.forward(tokens, lengths, cache)
    logits = _store_logits(net.logits(hidden), positions, logits)
    sampled = _sample(net, logits, scores, tokens, positions, history, sampling_f, sampling_i, eos)
    return cache.k_pages, cache.v_pages, logits, *sampled


def _sample(
    net: nn.Module,
    logits: nn.Tensor,
    scores: nn.Tensor,
    tokens: nn.Tensor,
    positions: nn.Tensor,
    history: nn.Tensor,
    sampling_f: nn.Tensor,
    sampling_i: nn.Tensor,
    eos: nn.Tensor,
) -> tuple[nn.Tensor, ...]:
    """Next token of each row from its logits."""
    updated = [scores, tokens, positions, history]
    return tuple(abstract("sample", [logits, *updated, sampling_f, sampling_i, eos], like=updated))


def _store_logits(new: nn.Tensor, gate: nn.Tensor, logits: nn.Tensor) -> nn.Tensor:
    return abstract("store_logits", [new, gate, logits], like=[logits])[0]


@dataclass
class Traced:
    """The global program: IR, parameters in argument order with their logical axes, and state.

    `stored` has the parameters that a checkpoint keeps otherwise than under their own name.
    """

    mod: tvm.IRModule
    param_axes: dict[str, tuple[str, ...]]
    state: dict[str, StateSpec]
    stored: dict[str, Stored]


def trace(model: nn.Module, dtype: str, limits: Limits) -> Traced:
    """Trace `model` (a family's module) into a Relax module of abstract operations."""
    state = {s.name: s for s in state_specs(model, dtype, limits)}
    batch = limits.max_batch_size

    def view(name: str, rows: int) -> Any:
        s = state[name]
        shape = s.shape if name in ("k_pages", "v_pages") else (rows, *s.shape[1:])
        return spec.Tensor(list(shape), s.dtype)

    def arguments(function: Callable[..., Any], rows: int) -> dict[str, Any]:
        return {name: view(name, rows) for name in list(signature(function).parameters)[1:]}

    chunk = {name: spec.Tensor(["n"], "int32") for name in PREFILL_INPUTS}
    state_args = {n: view(n, batch) for n in ("page_table", "k_pages", "v_pages", "logits")}
    functions: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "prefill": (_prefill, chunk | {"last": spec.Tensor([batch], "int32")} | state_args),
        "sample": (_sample, arguments(_sample, batch)),
    }
    for rows in limits.buckets:
        functions[f"decode_{rows}"] = (_decode, arguments(_decode, rows))
    raw = {}
    for name, (function, args) in functions.items():
        # As a method of the model, so that parameters keep the names of the checkpoint.
        setattr(model, name, MethodType(function, model))
        mode = "none" if name == "sample" else "plain"
        raw[name] = {**args, "$": {"param_mode": mode, "effect_mode": "none"}}
    mod, params = model.export_tvm(spec.ModuleSpec.from_raw(raw, model))
    axes = {name: tuple(p.attrs["axes"]) for name, p in params}
    stored = {name: p.attrs["stored"] for name, p in params if "stored" in p.attrs}
    return Traced(mod, axes, state, stored)
