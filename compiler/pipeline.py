"""The pipeline from the lowered local view to VM code: phases, each a short list of passes."""

from __future__ import annotations

from pathlib import Path

import tvm
from tvm import relax
from tvm.s_tir import dlight

from shardwright.compiler.workspace import PlanWorkspace


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


def schedule(target: tvm.target.Target) -> list[tvm.transform.Pass]:
    """Kernels without a schedule of ours get dlight's."""
    if target.kind.name == "llvm":
        return []
    return [
        dlight.ApplyDefaultSchedule(
            dlight.gpu.Matmul(),
            dlight.gpu.GEMV(),
            dlight.gpu.Reduction(),
            dlight.gpu.GeneralReduction(),
            dlight.gpu.Fallback(),
        )
    ]


def to_vm(workspace: PlanWorkspace) -> list[tvm.transform.Pass]:
    """Explicit memory, one workspace, VM calls."""
    return [
        relax.transform.RewriteDataflowReshape(),
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        workspace,
        relax.transform.LowerAllocTensor(),
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
