"""What all lowerings share: `Kernels`, which generates each kernel once, and its target."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

import tvm
from tvm import relax

from shardwright.compiler.kernels import gemv_mma
from shardwright.compiler.packing import CODES, Packing
from shardwright.compiler.rules import shape_of

CUBLAS_PASS = "cublas"
"""Leaves products of many tokens on CUDA to cuBLAS; without it dlight schedules them."""

Q4_GEMM_PASS = "q4_gemm"
"""Unpacks four-bit weights on their way to the tensor cores; without it, into memory before."""

GATED_GEMM_PASS = "gated_gemm"
"""Lets products of many tokens end with SiLU on Hopper; without it, that is another kernel."""

GEMV_MAX_BATCH = 8
"""Largest batch of the matrix-vector kernels without tensor cores."""

NOTE = "shardwright.note"
"""Attribute of a kernel: the sizes it was generated for, as JSON, for its reference."""


class Kernels:
    """Generates kernels for one target on demand, once for each set of shapes.

    `target` is "cpu", "cuda", or "rocm:" and the architecture, as kernel generators take it.
    `bb` holds the kernels, and lowerings emit intermediate values through it.
    """

    def __init__(
        self, bb: relax.BlockBuilder, target: tvm.target.Target, disabled: frozenset[str]
    ) -> None:
        cuda = target.kind.name == "cuda"
        self.bb, self.target = bb, target_name(target)
        self.cublas = cuda and CUBLAS_PASS not in disabled
        self.clusters = "clusters" in target.keys
        self.wgmma = "wgmma" in target.keys and Q4_GEMM_PASS not in disabled
        self.gated_gemm = "wgmma" in target.keys and GATED_GEMM_PASS not in disabled
        # The oldest CUDA architecture, such as 89; 0 on other targets.
        self.arch = int(str(target.attrs["arch"])[3:]) if cuda else 0
        # Whether the call that is being lowered writes an image; see `images.py`.
        self.image = False
        # Whether the function that is being lowered is a decode step.
        self.decodes = False
        self.generated: dict[tuple[Any, ...], relax.GlobalVar] = {}

    def kernel(self, generate: Callable[..., Any], **shapes: Any) -> relax.GlobalVar:
        """The kernel `generate(**shapes)`, generated once."""
        key = (generate, *sorted(shapes.items(), key=lambda kv: kv[0]))
        if key not in self.generated:
            func = generate(**shapes).with_attr(NOTE, _note(shapes))
            self.generated[key] = self.bb.add_func(func, f"{generate.__name__}_kernel")
        return self.generated[key]


Lowering: TypeAlias = Callable[[Kernels, relax.Call, list[relax.Expr]], relax.Expr]
"""Takes an abstract operation's call and its operands; gives the expression that replaces it."""


def target_name(target: tvm.target.Target) -> str:
    """A target as kernel generators take it: "cpu", "cuda", or "rocm:" and the architecture."""
    kind = str(target.kind.name)
    return {"llvm": "cpu", "rocm": f"rocm:{target.attrs.get('mcpu', '')}"}.get(kind, kind)


def _note(shapes: dict[str, Any]) -> str:
    plain = (int, float, str, tuple, type(None))
    note: dict[str, Any] = {
        name: value for name, value in shapes.items() if isinstance(value, plain)
    }
    if isinstance(shapes.get("packing"), Packing):
        note["packing"] = asdict(shapes["packing"])
    return json.dumps(note)


def tokens_of(k: Kernels, x: relax.Expr) -> int | None:
    """Number of tokens of `x` [n, ...] to generate a kernel for, None if symbolic.

    On a CPU one kernel for any number serves as well, and compiles once.
    """
    n = shape_of(x)[0]
    return n if isinstance(n, int) and k.target != "cpu" else None


def value_of(x: relax.Expr) -> Any:
    """A number known at compile time."""
    return x.value


def packing_of(
    words: relax.Expr, sides: list[relax.Expr], attributes: list[relax.Expr]
) -> tuple[Packing, int]:
    """The format of a weight of `words` [N, W], and how many columns those words hold.

    `sides` are its scale and maybe its zero points, `attributes` those of `Packing.attributes`.
    """
    bits, offset, code = map(value_of, attributes)
    columns = shape_of(words)[1] * (32 // bits)
    return Packing(
        bits,
        columns // shape_of(sides[0])[1],
        code=CODES[code],
        offset=offset,
        zeros=len(sides) == 2,
        scale_dtype=str(sides[0].ty.dtype),
    ), columns


def product_of(weight: Sequence[relax.Expr], *, gated: bool, batch: int = 1) -> gemv_mma.Product:
    """The product of tokens with a weight [N, K], or uint32 [N, K/8] and scale [N, K/group]."""
    rows, columns = shape_of(weight[0])
    if len(weight) == 1:
        return gemv_mma.Product(batch, rows, columns, 0, gated)
    columns *= 8
    return gemv_mma.Product(batch, rows, columns, columns // shape_of(weight[1])[1], gated)
