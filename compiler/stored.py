"""Parameters of experts as matrices.

A model has them as [experts, out, in]. A rank's file and its kernels have [experts * out, in], so
that slicing and quantization need not know of experts.
"""

from __future__ import annotations

from math import gcd

import tvm
from tvm import relax

from shardwright.compiler.linear import Rewriter
from shardwright.compiler.placement import PAD, Placement, Shard
from shardwright.compiler.rules import shape_of


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a parameter as it is stored: of experts, a matrix."""
    return (shape[0] * shape[1], shape[2]) if len(shape) == 3 else shape


def matrix_placement(shape: tuple[int, ...], placement: Placement) -> Placement:
    """The placement of a parameter of `shape` as it is stored: of experts, of a matrix."""
    if len(shape) != 3 or not isinstance(placement, Shard):
        return placement
    experts, rows, _ = shape
    if placement.dim == 0:
        return placement.scaled(rows)
    if placement.dim == 2:
        return placement.with_dim(1)
    # The last block of an expert may be cut short, so blocks must divide an expert's rows.
    unit = gcd(placement.unit, rows)
    pieces, count = placement.unit // unit, rows // unit

    def blocks(expert: int, held: tuple[int, ...]) -> list[int]:
        ids = [PAD if b == PAD else b * pieces + i for b in held for i in range(pieces)]
        return [PAD if not 0 <= i < count else expert * count + i for i in ids]

    table = tuple(
        tuple(block for expert in range(experts) for block in blocks(expert, held))
        for held in placement.table
    )
    return Shard(0, experts * rows, unit, table)


def experts_as_matrices(mod: tvm.IRModule) -> tvm.IRModule:
    """Parameters of three dimensions become matrices, in all functions of the local view."""

    def split(param: relax.Var) -> list[relax.Var] | None:
        if not isinstance(param.ty, relax.TensorType) or not _is_expert(param):
            return None
        return [
            relax.Var(param.name, relax.TensorType(matrix_shape(shape_of(param)), param.ty.dtype))
        ]

    def rewrite(rw: Rewriter, _var: relax.Var, call: relax.Call) -> relax.Expr | None:
        if not isinstance(call.args[0], relax.ExternFunc):
            return None
        fields = call.args[1].fields
        if not any(x in rw.replaced for x in fields):
            return None
        args = [rw.replaced[x][0] if x in rw.replaced else rw.local(x) for x in fields]
        return relax.call_dps_packed(call.args[0].global_symbol, relax.Tuple(args), out_ty=call.ty)

    return tvm.IRModule(
        {gv: Rewriter(f, rewrite, split).run(gv.name_hint) for gv, f in mod.functions_items()}
    )


def _is_expert(param: relax.Var) -> bool:
    return len(shape_of(param)) == 3
