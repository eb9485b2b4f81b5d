"""The pipeline from the lowered local view to VM code: phases, each a short list of passes."""

from __future__ import annotations

from pathlib import Path

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.s_tir import dlight

from shardwright.compiler.cuda import from_sm_90
from shardwright.compiler.kernels.common import EARLY_LAUNCHES
from shardwright.compiler.workspace import PlanWorkspace

DEPENDENT_LAUNCH = "dependent_launch"
"""Name of the pass of that name, which `--disable-pass` takes."""


def legalize(target: tvm.target.Target) -> list[tvm.transform.Pass]:
    """Relax operations become kernels; neighbours are fused."""
    return [
        relax.transform.FuseTransposeMatmul(),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    ]


def schedule(
    target: tvm.target.Target, disabled: frozenset[str] = frozenset()
) -> list[tvm.transform.Pass]:
    """Kernels without a schedule of ours get dlight's; `dependent_launch` may be `disabled`."""
    if target.kind.name == "llvm":
        return []
    dependent = [] if DEPENDENT_LAUNCH in disabled else [dependent_launch]
    return [
        dlight.ApplyDefaultSchedule(
            dlight.gpu.Matmul(),
            dlight.gpu.GEMV(),
            dlight.gpu.Reduction(),
            dlight.gpu.GeneralReduction(),
            dlight.gpu.Fallback(),
        ),
        *dependent,
    ]


@tvm.transform.module_pass(opt_level=0, name=DEPENDENT_LAUNCH)  # type: ignore[untyped-decorator]
def dependent_launch(mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Start kernels that wait for their inputs themselves before the kernel in front has ended.

    This is programmatic dependent launch: such a kernel calls `launch_dependents` of
    `kernels/common.py`. It needs sm_90; for older architectures the module is returned as it is.
    """
    target = tvm.target.Target.current()
    if target is None or not from_sm_90(target):
        return mod
    launched = {
        # TVM adds the thread axes itself.
        gv: func.with_attr("tirx.kernel_launch_params", ["tirx.use_programtic_dependent_launch"])
        for gv, func in mod.functions_items()
        if isinstance(func, tirx.PrimFunc) and _launches_dependents(func)
    }
    return tvm.IRModule({**dict(mod.functions_items()), **launched})


def _launches_dependents(func: tirx.PrimFunc) -> bool:
    names: set[str] = set()
    visit = [(tvm.ir.StringImm, lambda node: names.add(str(node.value)))]
    tvm_ffi.structural_walk(func.body, visit, order="pre")
    return not names.isdisjoint(EARLY_LAUNCHES)


def plan_memory(workspace: PlanWorkspace) -> list[tvm.transform.Pass]:
    """Memory becomes explicit: temporaries share one workspace, an argument of each function."""
    return [
        relax.transform.RewriteDataflowReshape(),
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        workspace,
        relax.transform.LowerAllocTensor(),
    ]


def to_vm() -> list[tvm.transform.Pass]:
    """Calls of TVM's virtual machine."""
    return [
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    ]


def dump(mod: tvm.IRModule, directory: Path | None, name: str) -> None:
    """Write `mod` as TVMScript to `directory`, where one was asked for."""
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{name}.py").write_text(mod.script(show_meta=False))
