"""What a build is asked for: options, their checks, the targets and sizes they mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm

from shardwright.compiler import cuda, pipeline, rocm
from shardwright.compiler.early_rows import EARLY_ROWS_PASS
from shardwright.compiler.fuse import FUSIONS
from shardwright.compiler.fuse_norm import FUSE_NORM_PASS
from shardwright.compiler.lowering.common import CUBLAS_PASS, GATED_GEMM_PASS, Q4_GEMM_PASS
from shardwright.compiler.peer import PEER_PASS
from shardwright.compiler.trace import Limits
from shardwright.errors import UsageError

MAX_RANKS = 16
DEFAULT_MAX_SEQ_LEN = 4096
DEFAULT_CHUNK = {"cpu": 256, "cuda": 2048, "rocm": 2048}
PAGE_SIZE = 16
PASSES = (
    *FUSIONS,
    EARLY_ROWS_PASS,
    PEER_PASS,
    FUSE_NORM_PASS,
    pipeline.DEPENDENT_LAUNCH,
    CUBLAS_PASS,
    Q4_GEMM_PASS,
    GATED_GEMM_PASS,
)
"""What `--disable-pass` takes."""


@dataclass(frozen=True)
class BuildOptions:
    """What to build. `model` is a directory or a Hugging Face name; `out` the artefact directory.

    `quantization` is a scheme's name; left out, the checkpoint's own or else q4f16_1. `archs` are
    GPU architectures, such as sm_90a. `max_seq_len` and `prefill_chunk_size` are in tokens,
    `max_batch_size` in rows. Left out, they are the model's length up to 4096, and 256 (CPU) or
    2048 (GPU). `build_model_only` writes the library alone; with `dummy_weights` each rank fills
    its memory at random. `disable_pass` names passes of `PASSES` to leave out, which helps to find
    what changed a result. `rocm_abi` is the version of AMD code objects, 5 or 6. With `gpu_memory`,
    bytes of one GPU, what will not fit is not built. `expert_parallel` gives a rank whole experts.
    """

    model: str
    out: Path
    quantization: str | None = None
    num_shards: int = 1
    target: str = "cpu"
    archs: tuple[str, ...] = ()
    rocm_abi: int = rocm.ABIS[0]
    max_seq_len: int | None = None
    max_batch_size: int = 8
    prefill_chunk_size: int | None = None
    use_cuda_graph: bool = False
    build_model_only: bool = False
    dummy_weights: bool = False
    explain: bool = False
    dump_ir: Path | None = None
    disable_pass: tuple[str, ...] = ()
    gpu_memory: int | None = None
    expert_parallel: bool = False


def targets_of(options: BuildOptions) -> tuple[tvm.target.Target, ...]:
    """TVM's targets for the options: one, or one for each architecture of AMD GPUs.

    Raises UsageError for what cannot be built, BuildError for a missing tool.
    """
    for name in options.disable_pass:
        if name not in PASSES:
            known = ", ".join(PASSES)
            raise UsageError(f"--disable-pass {name} is unknown; choose one of {known}")
    if not 1 <= options.num_shards <= MAX_RANKS:
        raise UsageError(f"--num-shards {options.num_shards}: must be from 1 to {MAX_RANKS}")
    if options.target == "cuda":
        target = cuda.cuda_target(options.archs)
        cuda.install_hook(options.archs)
        return (target,)
    if options.target == "rocm":
        targets = rocm.rocm_targets(options.archs)
        rocm.install_hooks(options.rocm_abi)
        return targets
    if options.target != "cpu":
        raise UsageError(f"--target {options.target} is unknown; choose cpu, cuda or rocm")
    if options.archs:
        raise UsageError("--arch is for --target cuda and --target rocm")
    if options.use_cuda_graph:
        raise UsageError("--use-cuda-graph is for --target cuda and --target rocm")
    return (tvm.target.Target({"kind": "llvm", "mcpu": _host_cpu()}),)


def _host_cpu() -> str:
    cpu = tvm.get_global_func("target.llvm_get_system_cpu", allow_missing=True)
    return str(cpu()) if cpu else "generic"


def limits_of(options: BuildOptions, config: Any) -> Limits:
    """Sizes of the build. Raises UsageError for lengths beyond what the model was trained for."""
    trained = config.max_position_embeddings
    # Only "dynamic" scaling is meant to go on beyond the trained length.
    extends = config.rope_scaling.type == "dynamic"
    seq = options.max_seq_len or min(trained, DEFAULT_MAX_SEQ_LEN)
    if seq > trained and not extends:
        raise UsageError(f"--max-seq-len {seq}: the model was trained for at most {trained} tokens")
    chunk = min(options.prefill_chunk_size or DEFAULT_CHUNK[options.target], seq)
    return Limits(seq, options.max_batch_size, chunk, PAGE_SIZE)
