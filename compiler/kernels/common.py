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

from pathlib import Path
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from shardwright.compiler.packing import Packing

from .wgmma import specializations

SCHEDULED: dict[str, Any] = {
    # Neither dlight nor the default GPU schedule may touch it.
    "tirx.is_scheduled": True,
    # kOpaque: FuseOps leaves it alone.
    "op_pattern": 8,
    "tirx.noalias": True,
}


# The instructions of programmatic dependent launch, which need sm_90. Where the kernel was launched
# in the ordinary way they do nothing.
_SM90 = """
__device__ __forceinline__ void {name}() {{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  {body}
#endif
}}
"""
LAUNCH_DEPENDENTS = "shardwright_launch_dependents"
"""What a kernel that may start before the one before it has ended calls first."""
_LAUNCH = _SM90.format(
    name=LAUNCH_DEPENDENTS, body='asm volatile("griddepcontrol.launch_dependents;");'
)
_WAIT = _SM90.format(
    name="shardwright_wait_for_inputs",
    body='asm volatile("griddepcontrol.wait;" ::: "memory");',
)


LAUNCHES_DEPENDENTS = "shardwright_launches_dependents"
"""What a kernel calls whose device function does so at a time of its own; it does nothing."""
EARLY_LAUNCHES = (LAUNCH_DEPENDENTS, LAUNCHES_DEPENDENTS)
"""By which a kernel is known to let the next one start, and to wait itself."""


def cuda_source(*names: str | None) -> str:
    """The text of `.cuh` files of this folder, with those that several use before it."""
    folder = Path(__file__).parent
    files = ("ptx.cuh", "wgmma.cuh", "patience.cuh", *filter(None, names))
    text = "".join((folder / file).read_text() for file in files)
    return text.replace("\nWGMMA\n", f"\n{specializations()}")


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


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


def kind_of(target: Any) -> str:
    """The kind of a target: "cpu", "cuda", "rocm" or, with an architecture, "rocm:gfx1100".

    An object with such a `kind` will do as well.
    """
    if isinstance(target, str):
        return target.partition(":")[0]
    return str(getattr(target.kind, "name", target.kind))


def is_gpu(target: Any) -> bool:
    """Whether `target` is a GPU."""
    return kind_of(target) in ("cuda", "rocm")


def warp_size_of(target: Any) -> int:
    """Threads that run in lockstep: 32, or 64 on AMD's gfx9 GPUs; 1 for a CPU."""
    if not is_gpu(target):
        return 1
    arch = target.partition(":")[2] if isinstance(target, str) else ""
    return 64 if kind_of(target) == "rocm" and not arch.startswith("gfx1") else 32


def max_threads_of(target: Any) -> int:
    """Most threads of a block; 1 for a CPU."""
    return {"cuda": 1024, "rocm": 256}.get(kind_of(target), 1)


def for_blocks(count: Any, gpu: bool) -> Any:
    """Loop over independent pieces of work: GPU blocks, or CPU threads."""
    return T.thread_binding(count, thread="blockIdx.x") if gpu else T.parallel(count)


def for_threads(count: int, gpu: bool) -> Any:
    """Loop over the threads of a block; on a CPU it is one iteration."""
    return T.thread_binding(count, thread="threadIdx.x") if gpu else T.serial(1)


def shuffle_xor(value: Any, lane_mask: int, warp: int) -> Any:
    """`value` of the lane whose number differs by `lane_mask`."""
    return T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), value, lane_mask, warp, warp)


# Programmatic dependent launch: a kernel that calls `launch_dependents` before all else lets the
# next kernel of the stream start while it still runs, and is itself started so by the pass
# `dependent_launch`. Every thread of it must call `wait_for_inputs` before it touches anything that
# another kernel writes, or reads and is to find unchanged. What never changes (weights, tables) may
# be read earlier. Neither does anything for targets other than CUDA.


@T.inline
def launch_dependents(target):
    """From here on the next kernel may start. The first statement of a thread."""
    if kind_of(target) == "cuda":
        T.evaluate(T.cuda.func_call(LAUNCH_DEPENDENTS, source_code=_LAUNCH))


@T.inline
def launches_dependents():
    """The device function that a CUDA kernel calls lets the next kernel start, and waits itself."""
    T.evaluate(
        T.cuda.func_call(
            LAUNCHES_DEPENDENTS,
            source_code="__device__ __forceinline__ void shardwright_launches_dependents() {}\n",
        )
    )


@T.inline
def wait_for_inputs(target):
    """Wait until all kernels before this one have ended and their writes can be seen."""
    if kind_of(target) == "cuda":
        T.evaluate(T.cuda.func_call("shardwright_wait_for_inputs", source_code=_WAIT))


def silu_mul(gate: Any, up: Any, dtype: str) -> Any:
    """`silu(gate) * up` of float32 sums, rounded as if they had been written as `dtype`."""
    g = T.cast(T.cast(gate, dtype), "float32")
    u = T.cast(T.cast(up, dtype), "float32")
    return T.cast(g / (T.float32(1) + T.exp(-g)) * u, dtype)


def clamped_swiglu(gate: Any, up: Any, dtype: str, alpha: float, limit: float) -> Any:
    """`(u + 1) * g * sigmoid(alpha * g)`, g at most `limit`, u at most so far from zero."""
    g = T.min(gate, T.float32(limit))
    u = T.max(T.min(up, T.float32(limit)), T.float32(-limit))
    return T.cast(g / (T.float32(1) + T.exp(g * T.float32(-alpha))) * (u + T.float32(1)), dtype)


def nibble(word: Any, i: Any) -> Any:
    """Four-bit element i of a word of `matmul.py`'s format as float32, before its scale."""
    bits = T.bitwise_and(T.shift_right(word, T.cast(i * 4, "uint32")), T.uint32(15))
    return T.cast(T.cast(bits, "int32") - 7, "float32")


def element(word: Any, index: Any, packing: Packing) -> Any:
    """Element `index` of a word as float32, before its zero point and scale.

    Small integers are or-ed into the last bits of 1024 in half precision, since conversions from
    integers are slow on GPUs. The bits of an e4m3 number, moved, are a half that is 2 ** -8 of it,
    those of an e2m1 number 2 ** -14.
    """
    bits = T.shift_right(word, T.cast(index * packing.bits, "uint32"))
    if packing.code == "e4m3":
        sign = T.shift_left(T.bitwise_and(bits, T.uint32(0x80)), T.uint32(8))
        rest = T.shift_left(T.bitwise_and(bits, T.uint32(0x7F)), T.uint32(7))
        half = T.reinterpret("float16", T.cast(T.bitwise_or(sign, rest), "uint16"))
        return T.cast(half, "float32") * T.float32(256)
    if packing.code == "e2m1":
        sign = T.shift_left(T.bitwise_and(bits, T.uint32(8)), T.uint32(12))
        rest = T.shift_left(T.bitwise_and(bits, T.uint32(7)), T.uint32(9))
        half = T.reinterpret("float16", T.cast(T.bitwise_or(sign, rest), "uint16"))
        return T.cast(half, "float32") * T.float32(16384)
    masked = T.bitwise_and(bits, T.uint32((1 << packing.bits) - 1))
    half = T.reinterpret("float16", T.cast(T.bitwise_or(masked, T.uint32(0x6400)), "uint16"))
    return T.cast(half, "float32") - T.float32(1024 + packing.offset)


def scale_of(stored: Any, packing: Packing) -> Any:
    """A scale as float32; the eight bits of an e8m0 number are the exponent of one."""
    if packing.code == "e2m1":
        return T.reinterpret("float32", T.shift_left(T.cast(stored, "uint32"), T.uint32(23)))
    return T.cast(stored, "float32")
