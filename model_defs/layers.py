"""Layers and abstract operations shared by the model families.

Every parameter names its dimensions with logical axes (`vocab`, `embed`, `heads`, `kv_heads`,
`mlp`); the compiler decides what a logical axis means on N devices. An abstract operation is a
`call_dps_packed` of a name the compiler knows: it has a sharding rule there and no kernel yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tvm import relax, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op

Axes = tuple[str | None, ...]


def parameter(shape: tuple[int, ...], axes: Axes, dtype: str) -> nn.Parameter:
    """A parameter of global `shape` whose dimensions carry the logical names `axes`.

    One in another dtype than the model's is never quantized.
    """
    param = nn.Parameter(shape, dtype)
    param.attrs["axes"] = axes
    return param


@dataclass(frozen=True)
class Stored:
    """How a checkpoint keeps a parameter, where it is not simply there under its own name.

    It is rows `first` and on of the tensor `path`, each row or every `step`th. The path is relative
    to the module that holds the parameter, as a path among files: `../qkv_proj.weight`. A path with
    `{}` names a tensor for each number below the length of the parameter's first dimension.
    `transposed` is for experts that are one tensor [experts, in, out], or [experts, out] for a
    bias, and counts rows over all of them as if it were [experts, out, in]. `plus` is added to what
    is stored.
    """

    path: str | None = None
    first: int = 0
    plus: float = 0.0
    step: int = 1
    transposed: bool = False


def stored_joined(path: str, linears: list[Linear]) -> None:
    """The checkpoint keeps the weights of `linears` as one tensor, one after the other."""
    first = 0
    for linear in linears:
        linear.weight.attrs["stored"] = Stored(path, first)
        first += linear.weight.shape[0]


class Linear(nn.Module):
    """`x @ weight.T + bias`, weight [out, in] with logical axes (out, in)."""

    def __init__(self, shape: tuple[int, int], axes: Axes, bias: bool, dtype: str) -> None:
        self.weight = parameter(shape, axes, dtype)
        self.bias = parameter(shape[:1], axes[:1], dtype) if bias else None

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """x [n, in] -> [n, out]."""
        y = op.matmul(x, op.permute_dims(self.weight))
        return y if self.bias is None else op.add(y, self.bias)


def gelu_tanh(x: nn.Tensor) -> nn.Tensor:
    """GELU in its approximation by tanh, in float32 (arXiv:1606.08415, section 2)."""
    return as_type(op.gelu(as_type(x, "float32"), approximate="tanh"), x.dtype)


def as_type(x: nn.Tensor, dtype: str) -> nn.Tensor:
    """`x`, cast where it has another dtype."""
    return x if x.dtype == dtype else op.astype(x, dtype)


ACTIVATIONS: dict[str, Callable[[nn.Tensor], nn.Tensor]] = {
    "silu": op.silu,
    "gelu_pytorch_tanh": gelu_tanh,
}
"""By the name that config.json has for them."""


class Experts(nn.Module):
    """Gated feed-forward layers, to the best `top` of which a router sends each token.

    `stored` says where the checkpoint has their gate, up and down. Their outputs are summed with
    the router's probabilities, made to sum to one with `normalize`.
    """

    def __init__(
        self,
        *,
        count: int,
        top: int,
        normalize: bool,
        embed: int,
        mlp: int,
        stored: tuple[Stored, Stored, Stored],
        dtype: str,
    ) -> None:
        self.top, self.normalize = top, normalize
        into, out = ("experts", "expert_mlp", "embed"), ("experts", "embed", "expert_mlp")
        self.gate_proj = parameter((count, mlp, embed), into, dtype)
        self.up_proj = parameter((count, mlp, embed), into, dtype)
        self.down_proj = parameter((count, embed, mlp), out, dtype)
        for weight, where in zip(self._weights(), stored, strict=True):
            weight.attrs["stored"] = where

    def _weights(self) -> tuple[nn.Parameter, ...]:
        return self.gate_proj, self.up_proj, self.down_proj

    def forward(self, x: nn.Tensor, scores: nn.Tensor) -> nn.Tensor:
        """x [n, embed], scores of the experts float32 [n, count] -> [n, embed]."""
        (out,) = abstract("experts", [x, *self._weights(), *self.route(scores)], like=[x])
        return out

    def route(self, scores: nn.Tensor) -> list[nn.Tensor]:
        """The numbers int32 [n, top] of the experts chosen, and their weights float32 [n, top]."""
        chosen = [scores.shape[0], self.top]
        kinds = [nn.Tensor.placeholder(chosen, dtype) for dtype in ("int32", "float32")]
        return abstract("route", [scores, self.top, int(self.normalize)], like=kinds)


class Embedding(nn.Module):
    """A table [vocab, embed]: looks rows up, and serves as the output matrix where tied."""

    def __init__(self, shape: tuple[int, int], dtype: str) -> None:
        self.weight = parameter(shape, ("vocab", "embed"), dtype)

    def forward(self, ids: nn.Tensor) -> nn.Tensor:
        """ids int32 [n] -> [n, embed]."""
        return op.take(self.weight, ids, axis=0)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float, dtype: str, axis: str = "embed") -> None:
        self.weight = parameter((size,), (axis,), dtype)
        self.eps = eps

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """x [..., size] -> the same shape."""
        return op.rms_norm(x, self.weight, axes=-1, epsilon=self.eps)


def output_logits(x: nn.Tensor, weight: nn.Tensor) -> nn.Tensor:
    """Logits float32 [n, vocab] of hidden states x [n, embed]."""
    return op.matmul(x, op.permute_dims(weight), out_dtype="float32")


def abstract(
    name: str, args: list[nn.Tensor | int | float], like: list[nn.Tensor]
) -> list[nn.Tensor]:
    """Emit the abstract operation `shardwright.<name>`; its results have the types of `like`.

    Integers and floats among `args` are attributes, known at compile time.
    """

    def convert(arg: nn.Tensor | int | float) -> relax.Expr:
        if isinstance(arg, int):
            return relax.prim_value(tirx.IntImm("int64", arg))
        if isinstance(arg, float):
            return relax.prim_value(tirx.FloatImm("float64", arg))
        return arg._expr

    call = relax.call_dps_packed(
        f"shardwright.{name}",
        relax.Tuple([convert(arg) for arg in args]),
        out_ty=[x._expr.ty for x in like],
    )
    out = op.wrap_nested(call, name)
    return [out] if isinstance(out, nn.Tensor) else list(out)


@dataclass
class Cache:
    """The paged KV cache as one forward pass sees it.

    k_pages, v_pages: [layers, pages, kv_heads, page, head_dim], updated in place;
    page_table: int32 [batch, max_pages]; rows, positions: int32 [n], the batch row of each token
    and its index in that row, -1 for a token to ignore.
    """

    k_pages: nn.Tensor
    v_pages: nn.Tensor
    page_table: nn.Tensor
    rows: nn.Tensor
    positions: nn.Tensor

    def _where(self) -> tuple[nn.Tensor, ...]:
        return self.page_table, self.rows, self.positions

    def append(
        self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, rotary: nn.Tensor, layer: int
    ) -> nn.Tensor:
        """Rotate q [n, heads, head_dim] and k, store k and v [n, kv_heads, head_dim]; rotated q."""
        out, self.k_pages, self.v_pages = abstract(
            "rotary_append",
            [q, k, v, rotary, self.k_pages, self.v_pages, *self._where(), layer],
            like=[q, self.k_pages, self.v_pages],
        )
        return out

    def attend(
        self,
        q: nn.Tensor,
        layer: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: nn.Tensor | None = None,
    ) -> nn.Tensor:
        """Causal attention of q [n, heads, head_dim] over the cache; same shape.

        With a `window` a token sees that many positions, its own the last. With a `softcap` c a
        score s, after `scale`, becomes `c * tanh(s / c)`. `sinks` float32 [heads] are scores that
        take part in a head's softmax and have no value (arXiv:2309.17453).
        """
        masks: list[int | float] = [window or 0, softcap or 0.0]
        read = [q, self.k_pages, self.v_pages, *self._where()]
        if sinks is None:
            (out,) = abstract("attention", [*read, layer, scale, *masks], like=[q])
        else:
            (out,) = abstract("attention_sinks", [*read, sinks, layer, scale, *masks], like=[q])
        return out


def rotary_table(
    positions: nn.Tensor,
    lengths: nn.Tensor,
    inv_freq: npt.NDArray[np.float32],
    scale: float,
    ntk: tuple[float, int] | None,
) -> nn.Tensor:
    """Cosines and sines, float32 [n, 2, rotary_dim / 2], of the tokens' rotary angles.

    `scale` multiplies both (yarn). `ntk` = (factor, trained length) grows the base with each
    token's sequence length in `lengths` int32 [n] once that exceeds the trained length. With two
    rows of `inv_freq`, the second is for such sequences.
    """
    factor, trained = ntk if ntk else (1.0, 0)
    table = nn.Tensor.placeholder([positions.shape[0], 2, inv_freq.shape[-1]], "float32")
    args = [positions, lengths, nn.Tensor.from_const(inv_freq), float(scale)]
    if inv_freq.ndim == 2:
        (out,) = abstract("rotary_table_long", [*args, trained], like=[table])
    else:
        (out,) = abstract("rotary_table", [*args, float(factor), trained], like=[table])
    return out
