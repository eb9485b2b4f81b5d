"""What all kernel generators share.

Every generator returns a scheduled `tirx.PrimFunc` in destination-passing style. The order of its
parameters is: tensors that are read (and those written in place), integer scalars, fresh outputs,
which is the order `relax.call_tir` and `relax.call_tir_inplace` call it in. A generator's `tokens`
is the static number of tokens, or None for a symbolic one taken from the shape of the arguments.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

SCHEDULED: dict[str, Any] = {
    # Neither dlight nor the default GPU schedule may touch it.
    "tirx.is_scheduled": True,
    # kOpaque: FuseOps leaves it alone.
    "op_pattern": 8,
    "tirx.noalias": True,
}


def extent(tokens: int | None) -> Any:
    """The number of tokens as a buffer extent: an int, or a fresh symbolic int64."""
    return tirx.Var("n", "int64") if tokens is None else tokens


def lanes_for(length: int, widest: int = 16) -> int:
    """The widest power of two up to `widest` that divides `length`."""
    lanes = widest
    while length % lanes:
        lanes //= 2
    return lanes


def is_gpu(target: Any) -> bool:
    """Whether `target` ("cpu", "cuda", "rocm", or an object with such a `kind`) is a GPU."""
    kind = target if isinstance(target, str) else getattr(target.kind, "name", target.kind)
    return kind in ("cuda", "rocm")
