"""One workspace for all functions: memory planned at build time, shown, and at fixed addresses.

TVM's planner gives each function a few storages that its temporaries share. This pass lays them out
in one block, an argument called `workspace` of every function, and adds a VM function `workspace`
that allocates it. Nothing is allocated while a function runs, as a captured graph requires.
"""

from __future__ import annotations

import math

import tvm
from tvm import relax

from shardwright.errors import BuildError

ALIGNMENT = 256
"""Bytes; what cudaMalloc guarantees."""

_ALLOC_STORAGE = "relax.memory.alloc_storage"
_ALLOC_TENSOR = "relax.memory.alloc_tensor"


@tvm.transform.module_pass(opt_level=0, name="PlanWorkspace")
class PlanWorkspace:
    """After `StaticPlanBlockMemory`. `bytes` then holds the size of the workspace."""

    def __init__(self) -> None:
        self.bytes = 0

    def transform_module(
        self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Rewrite every Relax function of `mod`; raises BuildError for an unplanned temporary."""
        for gv, func in mod.functions_items():
            if isinstance(func, relax.Function):
                layout = _Layout(gv.name_hint, func)
                mod.update_func(gv, layout.rewrite())
                self.bytes = max(self.bytes, layout.bytes)
        mod["workspace"] = _allocator(max(self.bytes, ALIGNMENT))
        return mod


class _Layout:
    """Offsets of one function's storages in the workspace."""

    def __init__(self, name: str, func: relax.Function) -> None:
        self.name, self.func = name, func
        self.offsets: dict[relax.Var, int] = {}
        self.bytes = 0
        self.workspace = relax.Var("workspace", relax.AnyType())

    def rewrite(self) -> relax.Function:
        blocks = []
        for block in self.func.body.blocks:
            bindings = [new for b in block.bindings if (new := self._binding(b)) is not None]
            blocks.append(relax.BindingBlock(bindings))
        attrs = self.func.attrs
        num_input = int(attrs["num_input"])
        params = list(self.func.params)
        params.insert(num_input, self.workspace)
        func = relax.Function(
            params,
            relax.SeqExpr(blocks, self.func.body.body),
            self.func.ret_ty,
            self.func.is_pure,
            attrs,
        )
        return func.with_attr("num_input", num_input + 1)

    def _binding(self, binding: relax.Binding) -> relax.Binding | None:
        value = getattr(binding, "value", None)
        if not isinstance(value, relax.Call) or not isinstance(value.op, tvm.ir.Op):
            return binding
        name = str(value.op.name)
        if name == "relax.builtin.alloc_tensor":
            raise BuildError(
                f"{self.name}: the size of {binding.var.name} is not known at build time; give its "
                "symbolic dimensions an upper bound"
            )
        if name == _ALLOC_STORAGE:
            size = math.prod(int(d) for d in value.args[0].values)
            self.offsets[binding.var] = self.bytes
            self.bytes += -(-size // ALIGNMENT) * ALIGNMENT
            return None
        if name == _ALLOC_TENSOR:
            storage, offset, *rest = value.args
            start = relax.prim_value(tvm.tirx.IntImm("int64", self.offsets[storage] + int(offset)))
            call = relax.Call(value.op, [self.workspace, start, *rest], value.attrs, value.ty_args)
            return relax.VarBinding(binding.var, relax.BlockBuilder().normalize(call))
        return binding


def _allocator(size: int) -> relax.Function:
    """`workspace()`, which allocates `size` bytes on the VM's device."""
    bb = relax.BlockBuilder()
    with bb.function("workspace", []):
        size_expr = relax.ShapeExpr([size])
        storage = bb.emit(relax.op.memory.alloc_storage(size_expr, 0, "global", "uint8"))
        bb.emit_func_output(storage)
    (func,) = bb.finalize().functions.values()
    return func
