"""From the program in local view to `model.so`: lower, schedule, compile."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tvm
from tvm import relax

from shardwright.compiler import pipeline, rocm
from shardwright.compiler.kernel_bytes import kernels_of
from shardwright.compiler.lower import lower_abstract
from shardwright.compiler.lowering.common import NOTE
from shardwright.compiler.lowering.products import MATMUL
from shardwright.compiler.peer import PREFILL, PeerState
from shardwright.compiler.program import Program
from shardwright.compiler.propagate import bindings_of
from shardwright.compiler.rules import op_name, shape_of
from shardwright.compiler.script_speed import without_source_context
from shardwright.compiler.trace import Limits
from shardwright.compiler.workspace import PlanWorkspace
from shardwright.runtime import artifact


@dataclass(frozen=True)
class Compiled:
    """What `compile_program` tells of the library it wrote, in the manifest's terms.

    `notes` is, of each kernel, what its reference must know; see `lowering.common.NOTE`.
    """

    workspace_bytes: int
    functions: dict[str, artifact.Function]
    libraries: tuple[str, ...]
    notes: dict[str, dict[str, Any]]


def compile_program(
    program: Program,
    targets: tuple[tvm.target.Target, ...],
    limits: Limits,
    library: Path,
    peer: PeerState | None = None,
    dump_ir: Path | None = None,
    disable_pass: tuple[str, ...] = (),
) -> Compiled:
    """Lower and compile `program` to `library`.

    With `peer` there are functions that reduce over peer memory as well. AMD GPUs have a
    program for each architecture, since waves and with them the launches differ.
    """
    mods, found = [], []
    for target in targets:
        arch = str(target.attrs.get("mcpu", "")) if target.kind.name == "rocm" else ""
        with target, without_source_context():
            dump = dump_ir / arch if dump_ir else None
            mod, compiled = _to_vm(program, target, limits, peer, dump, frozenset(disable_pass))
        mods.append(rocm.for_arch(mod, target, arch) if arch else mod)
        found.append(compiled)
    mod = tvm.IRModule({gv: func for mod in mods for gv, func in mod.functions_items()})
    if arch:
        rocm.build(mod, targets, library)
    else:
        with targets[0]:
            executable = relax.build(mod, targets[0], relax_pipeline=None)
        executable.export_library(str(library))
    return replace(found[0], workspace_bytes=max(c.workspace_bytes for c in found))


def _to_vm(
    program: Program,
    target: tvm.target.Target,
    limits: Limits,
    peer: PeerState | None,
    dump_ir: Path | None,
    disabled: frozenset[str],
) -> tuple[tvm.IRModule, Compiled]:
    """VM code for `target`, and what there is to tell of it."""
    mod = lower_abstract(program.mod, target, peer, disabled)
    libraries = (artifact.CUBLAS,) if _calls(mod, MATMUL) else ()
    pipeline.dump(mod, dump_ir, "3-lowered")

    bound = {"n": limits.prefill_chunk_size}
    for gv, func in mod.functions_items():
        if isinstance(func, relax.Function) and gv.name_hint.startswith(PREFILL):
            mod.update_func(gv, func.with_attr("tir_var_upper_bound", bound))
    passes = pipeline.legalize(target) + pipeline.schedule(target, disabled)
    mod = tvm.transform.Sequential(passes)(mod)
    pipeline.dump(mod, dump_ir, "4-scheduled")
    weights = frozenset(n for w in program.weights.values() for n, _, _ in w.tensors())
    kernels = {
        gv.name_hint: kernels_of(func, weights)
        for gv, func in mod.functions_items()
        if isinstance(func, relax.Function) and gv.name_hint.startswith("decode_")
    }

    workspace = PlanWorkspace()
    mod = tvm.transform.Sequential(pipeline.plan_memory(workspace))(mod)
    functions = {
        gv.name_hint: artifact.Function(
            tuple(map(_argument, func.params)), kernels.get(gv.name_hint, {})
        )
        for gv, func in mod.functions_items()
        if isinstance(func, relax.Function)
    }
    mod = tvm.transform.Sequential(pipeline.to_vm())(mod)
    pipeline.dump(mod, dump_ir, "5-vm")
    notes = {
        gv.name_hint: json.loads(str(func.attrs.get(NOTE, "{}")))
        for gv, func in sorted(mod.functions_items(), key=lambda item: item[0].name_hint)
        if isinstance(func, tvm.tirx.PrimFunc)
    }
    return mod, Compiled(workspace.bytes, functions, libraries, notes)


def plan_workspace(
    program: Program, target: tvm.target.Target, limits: Limits, peer: PeerState | None
) -> int:
    """Bytes of the workspace that a build of `program` for `target` would have."""
    with target, without_source_context():
        return _to_vm(program, target, limits, peer, None, frozenset())[1].workspace_bytes


def _calls(mod: tvm.IRModule, name: str) -> bool:
    """Whether a function of `mod` calls an operation or packed function."""
    return any(
        isinstance(binding.value, relax.Call) and op_name(binding.value) == name
        for func in mod.functions.values()
        if isinstance(func, relax.Function)
        for binding in bindings_of(func)
    )


def _argument(param: relax.Var) -> artifact.TensorSpec:
    if not isinstance(param.ty, relax.TensorType):
        return artifact.TensorSpec(param.name, (), "object")
    shape = tuple(d if isinstance(d, int) else str(d) for d in shape_of(param))
    return artifact.TensorSpec(param.name, shape, str(param.ty.dtype))
