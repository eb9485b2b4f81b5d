"""Collectives between ranks, behind one small interface.

`HostCollectives` works over shared memory between CPU ranks of one machine; `NcclCollectives`, in
a module of its own, between NVIDIA GPUs. `install` registers the packed functions that compiled
programs call, `shardwright.all_reduce(x, out)` and `shardwright.all_gather(x, out)`; they use the
collectives that the calling thread has activated.
"""

import contextlib
import ctypes
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from shardwright.errors import DeviceError, WorkerError
from shardwright.runtime.native import load_native

SLOT_BYTES = 256 << 10
"""Shared memory of one rank's slot; larger tensors go in several chunks."""


class AbortedError(WorkerError):
    """A collective was broken off because another rank failed; the cause is that rank's error."""


class Collectives(Protocol):
    """What a program needs of a communication library.

    Every rank makes the same calls in the same order. Tensors are contiguous, of dtype float32,
    float16 or int32, and may be the same for input and output of `all_reduce`.
    """

    def all_reduce(self, x: Any, out: Any) -> None:
        """Write the sum of all ranks' `x` to `out`, of the same shape."""

    def all_gather(self, x: Any, out: Any) -> None:
        """Write all ranks' `x`, in rank order, to `out`, which holds world x `x`."""

    def barrier(self) -> None:
        """Return when every rank has called it."""

    def abort(self) -> None:
        """Make calls in progress fail on this rank (host: on every rank). For any thread."""

    def close(self) -> None:
        """Release everything. No call may be in progress."""


def create_segment(world: int) -> Path:
    """Create the zeroed shared file for `HostCollectives`; whoever calls removes it.

    It lies in memory (/dev/shm) where that has room, else in the temporary directory.
    """
    size = _host_library().sw_segment_bytes(world, SLOT_BYTES)
    for directory in ("/dev/shm", tempfile.gettempdir()):
        try:
            handle, name = tempfile.mkstemp(prefix="shardwright-", dir=directory)
        except OSError:
            continue
        try:
            # Reserves the memory: a write to a full /dev/shm would be a SIGBUS later.
            os.posix_fallocate(handle, 0, size)
            return Path(name)
        except OSError:
            os.unlink(name)
        finally:
            os.close(handle)
    raise DeviceError(
        f"no room for {size >> 10} KiB of shared memory in /dev/shm or {tempfile.gettempdir()}; "
        "make room, or in a container give it --shm-size=64m"
    )


def _host_library() -> ctypes.CDLL:
    library = load_native(Path(__file__).with_name("host_collectives.cc"))
    library.sw_segment_bytes.restype = ctypes.c_size_t
    library.sw_segment_bytes.argtypes = [ctypes.c_int, ctypes.c_size_t]
    library.sw_attach.restype = ctypes.c_void_p
    library.sw_attach.argtypes = [
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_size_t,
        ctypes.c_int,
    ]
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.sw_all_reduce.argtypes = [pointer, pointer, pointer, size, ctypes.c_int]
    library.sw_all_gather.argtypes = [pointer, pointer, pointer, size]
    for name in ("sw_barrier", "sw_abort", "sw_detach"):
        getattr(library, name).argtypes = [pointer]
    return library


class HostCollectives:
    """Sums in float32 in rank order, so that every rank gets the same bits."""

    _DTYPES = {"float32": 0, "float16": 1, "int32": 2}  # noqa: RUF012

    def __init__(self, segment: Path, rank: int, world: int) -> None:
        self._library = _host_library()
        # Spinning only helps while every rank has a core of its own.
        spins = 2000 if world <= len(os.sched_getaffinity(0)) else 0
        group = self._library.sw_attach(str(segment).encode(), rank, world, SLOT_BYTES, spins)
        if not group:
            raise WorkerError(f"rank {rank}: cannot map the shared memory {segment}")
        self._group: int | None = group
        self._lock = threading.Lock()

    def all_reduce(self, x: Any, out: Any) -> None:
        """See `Collectives`. Raises AbortedError."""
        dtype = self._DTYPES.get(str(x.dtype))
        if dtype is None:
            raise WorkerError(f"all_reduce has no dtype {x.dtype}")
        size = x.numel()
        self._check(
            self._library.sw_all_reduce(self._group, x.data_ptr(), out.data_ptr(), size, dtype)
        )

    def all_gather(self, x: Any, out: Any) -> None:
        """See `Collectives`. Raises AbortedError."""
        size = x.numel() * x.dtype.bits // 8
        self._check(self._library.sw_all_gather(self._group, x.data_ptr(), out.data_ptr(), size))

    def barrier(self) -> None:
        """See `Collectives`. Raises AbortedError."""
        self._check(self._library.sw_barrier(self._group))

    def abort(self) -> None:
        """See `Collectives`."""
        with self._lock:
            if self._group is not None:
                self._library.sw_abort(self._group)

    def close(self) -> None:
        """See `Collectives`."""
        with self._lock:
            if self._group is not None:
                self._library.sw_detach(self._group)
            self._group = None

    @staticmethod
    def _check(status: int) -> None:
        if status != 0:
            raise AbortedError("a collective was broken off: another rank failed")


_active = threading.local()


@contextlib.contextmanager
def activate(collectives: Collectives | None) -> Iterator[None]:
    """Let programs called from this thread use `collectives` while the context is open."""
    _active.collectives = collectives
    try:
        yield
    finally:
        _active.collectives = None


def install() -> None:
    """Register the packed functions of compiled programs in this process. Repeating is harmless."""
    import tvm_ffi

    def current() -> Collectives:
        collectives: Collectives | None = getattr(_active, "collectives", None)
        if collectives is None:
            raise WorkerError("a program for one rank called a collective; build it again")
        return collectives

    def all_reduce(x: Any, out: Any) -> None:
        current().all_reduce(x, out)

    def all_gather(x: Any, out: Any) -> None:
        current().all_gather(x, out)

    tvm_ffi.register_global_func("shardwright.all_reduce", all_reduce, override=True)
    tvm_ffi.register_global_func("shardwright.all_gather", all_gather, override=True)
