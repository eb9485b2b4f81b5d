"""One workspace for all functions: memory planned at build time, shown, and at fixed addresses.

TVM's planner gives each function a few storages that its temporaries share. This pass makes the
storages an argument called `workspace` of every function, a tuple that serves them all, and adds a
VM function `workspace` that allocates it. Nothing is allocated while a function runs, as a captured
graph requires. (One block with offsets would do, but kernels of TVM refuse tensors with an offset.)
"""

from __future__ import annotations

import math

import tvm
from tvm import relax

from shardwright.errors import BuildError

_ALLOC_STORAGE = "relax.memory.alloc_storage"


@tvm.transform.module_pass(opt_level=0, name="PlanWorkspace")
class PlanWorkspace:
    """After `StaticPlanBlockMemory`. `sizes` then holds the bytes of each storage."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    @property
    def bytes(self) -> int:
        """Bytes of the whole workspace."""
        return sum(self.sizes)

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of `mod`; raises BuildError for an unplanned temporary."""
        functions = {gv: f for gv, f in mod.functions_items() if isinstance(f, relax.Function)}
        # Largest first in each function, so that storages which share a place are of similar size.
        storages = {
            gv: sorted(_storages(gv.name_hint, func).items(), key=lambda item: -item[1])
            for gv, func in functions.items()
        }
        count = max(map(len, storages.values()), default=0)
        self.sizes = [max(s[i][1] for s in storages.values() if i < len(s)) for i in range(count)]
        for gv, func in functions.items():
            places = {var: i for i, (var, _) in enumerate(storages[gv])}
            mod.update_func(gv, _with_workspace(func, places, count))
        mod["workspace"] = _allocator(self.sizes)
        return mod


def _is_call(binding: relax.Binding, name: str) -> bool:
    value = getattr(binding, "value", None)
    return (
        isinstance(value, relax.Call)
        and isinstance(value.op, tvm.ir.Op)
        and str(value.op.name) == name
    )


def _storages(name: str, func: relax.Function) -> dict[relax.Var, int]:
    """The storages of a function and their bytes."""
    found = {}
    for block in func.body.blocks:
        for b in block.bindings:
            if _is_call(b, "relax.builtin.alloc_tensor"):
                raise BuildError(
                    f"{name}: the size of {b.var.name} is not known at build time; give its "
                    "symbolic dimensions an upper bound"
                )
            if _is_call(b, _ALLOC_STORAGE):
                found[b.var] = math.prod(int(d) for d in b.value.args[0].values)
    return found


def _with_workspace(func: relax.Function, places: dict[relax.Var, int], count: int) -> relax.Expr:
    """`func` with its storages taken from a new argument, after its other inputs."""
    workspace = relax.Var("workspace", relax.TupleType([relax.AnyType()] * count))
    blocks = []
    for block in func.body.blocks:
        bindings = []
        for b in block.bindings:
            if _is_call(b, _ALLOC_STORAGE):
                item = relax.TupleGetItem(workspace, places[b.var])
                b = relax.VarBinding(b.var, relax.BlockBuilder().normalize(item))
            bindings.append(b)
        blocks.append(relax.BindingBlock(bindings))
    num_input = int(func.attrs["num_input"])
    params = [*func.params[:num_input], workspace, *func.params[num_input:]]
    body = relax.SeqExpr(blocks, func.body.body)
    new = relax.Function(params, body, func.ret_ty, func.is_pure, func.attrs)
    return new.with_attr("num_input", num_input + 1)


def _allocator(sizes: list[int]) -> relax.Function:
    """`workspace()`, which allocates storages of `sizes` bytes on the VM's device."""
    bb = relax.BlockBuilder()
    with bb.function("workspace", []):
        storages = [
            bb.emit(relax.op.memory.alloc_storage(relax.ShapeExpr([size]), 0, "global", "uint8"))
            for size in sizes
        ]
        bb.emit_func_output(relax.Tuple(storages))
    (func,) = bb.finalize().functions.values()
    return func
