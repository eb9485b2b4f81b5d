"""Bytes of weights that each kernel of a decode step reads, for `scripts/profile_decode.py`."""

from __future__ import annotations

import tvm
from tvm import relax

from shardwright.compiler.propagate import bindings_of
from shardwright.compiler.rules import op_name, shape_of
from shardwright.runtime.artifact import Kernel
from shardwright.runtime.memory import count_bytes


def kernels_of(func: relax.Function, weights: frozenset[str]) -> dict[str, Kernel]:
    """The kernels that a Relax function calls, with the bytes of `weights` that they read.

    A table in which rows are looked up counts as nothing.
    """
    params = {param.name: param for param in func.params}
    found: dict[str, Kernel] = {}
    for binding in bindings_of(func):
        call = binding.value
        if not isinstance(call, relax.Call) or not op_name(call).startswith("relax.call_tir"):
            continue
        if not isinstance(call.args[0], tvm.ir.GlobalVar):
            continue
        name = str(call.args[0].name_hint)
        read = {a.name for a in call.args[1].fields if isinstance(a, relax.Var)} & set(params)
        looked_up = "embed" in name or "take" in name
        size = sum(
            count_bytes(shape_of(params[n]), str(params[n].ty.dtype))
            for n in read & weights
            if not looked_up
        )
        before = found.get(name, Kernel(0, 0, False))
        found[name] = Kernel(
            before.calls + 1, before.weight_bytes + size, before.cache or "k_pages" in read
        )
    return found
