# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""What all kernel generators share.

Every generator returns a scheduled `tirx.PrimFunc` in destination-passing style. The order of its
parameters is: tensors that are read (and those written in place), integer scalars, fresh outputs,
which is the order `relax.call_tir` and `relax.call_tir_inplace` call it in. A generator's `tokens`
is the static number of tokens, `batch` of rows, or None for a symbolic one taken from the shape of
the arguments.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T

SCHEDULED: dict[str, Any] = {
    # Neither dlight nor the default GPU schedule may touch it.
    "tirx.is_scheduled": True,
    # kOpaque: FuseOps leaves it alone.
    "op_pattern": 8,
    "tirx.noalias": True,
}


def extent(count: int | None, name: str = "n") -> Any:
    """A number of tokens or rows as a buffer extent: an int, or a fresh symbolic int64."""
    return tirx.Var(name, "int64") if count is None else count


def lanes_for(length: int, widest: int = 16) -> int:
    """The widest power of two up to `widest` that divides `length`."""
    lanes = widest
    while length % lanes:
        lanes //= 2
    return lanes


def window_start(position: Any, window: int) -> Any:
    """The first position that a token at `position` attends to; 0 where there is no window."""
    return T.max(position - (window - 1), 0) if window else T.int32(0)


def is_gpu(target: Any) -> bool:
    """Whether `target` ("cpu", "cuda", "rocm", or an object with such a `kind`) is a GPU."""
    kind = target if isinstance(target, str) else getattr(target.kind, "name", target.kind)
    return kind in ("cuda", "rocm")


def warp_size_of(target: Any) -> int:
    """Threads that run in lockstep: 64 for ROCm data-centre GPUs, 32 for CUDA, 1 for a CPU."""
    if not is_gpu(target):
        return 1
    kind = target if isinstance(target, str) else getattr(target.kind, "name", target.kind)
    return 64 if kind == "rocm" else 32


def for_blocks(count: Any, gpu: bool) -> Any:
    """Loop over independent pieces of work: GPU blocks, or CPU threads."""
    return T.thread_binding(count, thread="blockIdx.x") if gpu else T.parallel(count)


def for_threads(count: int, gpu: bool) -> Any:
    """Loop over the threads of a block; on a CPU it is one iteration."""
    return T.thread_binding(count, thread="threadIdx.x") if gpu else T.serial(1)


def shuffle_xor(value: Any, lane_mask: int, warp: int) -> Any:
    """`value` of the lane whose number differs by `lane_mask`."""
    return T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), value, lane_mask, warp, warp)
