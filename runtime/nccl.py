"""NCCL through its C interface: collectives between NVIDIA GPUs."""

import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardwright.errors import DeviceError, WorkerError
from shardwright.runtime.collectives import AbortedError
from shardwright.runtime.cudart import call, cudart
from shardwright.runtime.tvm_runtime import load_cuda_library


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * 128)]


class NcclCollectives:
    """NCCL through its C interface, on TVM's current stream, so that a CUDA graph captures it."""

    # ncclDataType_t of nccl.h
    _DTYPES = {"int32": 2, "float16": 6, "float32": 7}  # noqa: RUF012
    _SUM = 0
    _FUNCTIONS = (
        *("ncclGetUniqueId", "ncclCommInitRank", "ncclCommAbort", "ncclCommDestroy"),
        *("ncclAllReduce", "ncclAllGather", "ncclGetErrorString"),
    )
    _NEEDED = "NCCL 2.19 or later: pip install nvidia-nccl-cu13"

    def __init__(
        self, directory: Path, rank: int, world: int, device: Any, aborted: Callable[[], bool]
    ) -> None:
        self._device = device
        self._aborted = aborted
        self._library, self._cuda = self._open()
        for name in self._FUNCTIONS:
            if not hasattr(self._library, name):
                raise DeviceError(
                    f"{self._library._name} has no function {name}; install {self._NEEDED}"
                )
        pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        self._library.ncclGetErrorString.restype = ctypes.c_char_p
        # Older versions have none.
        self._last_error = getattr(self._library, "ncclGetLastError", None)
        if self._last_error is not None:
            self._last_error.restype = ctypes.c_char_p
            self._last_error.argtypes = [pointer]
        self._library.ncclCommInitRank.argtypes = [pointer, integer, _UniqueId, integer]
        self._library.ncclAllReduce.argtypes = [
            *(pointer, pointer, size, integer, integer),
            *(pointer, pointer),
        ]
        self._library.ncclAllGather.argtypes = [pointer, pointer, size, integer, pointer, pointer]
        self._library.ncclCommAbort.argtypes = [pointer]
        self._library.ncclCommDestroy.argtypes = [pointer]
        self._lock = threading.Lock()
        self._communicator: int | None = None
        self._communicator = self._join(self._exchange_id(directory / "nccl-id", rank), rank, world)

    def _open(self) -> tuple[Any, Any]:
        """The library, and the one with the functions of the CUDA runtime."""
        return load_cuda_library("libnccl.so.2"), cudart()

    def _join(self, unique: _UniqueId, rank: int, world: int) -> int | None:
        """Create the communicator, in a thread of its own.

        The call does not return if a peer fails in it. The thread is left behind then, and cannot
        keep this process from ending.
        """
        communicator, status = ctypes.c_void_p(), ctypes.c_int(-1)

        def create() -> None:
            call(self._cuda, "cudaSetDevice", self._device.index)
            status.value = self._library.ncclCommInitRank(
                ctypes.byref(communicator), world, unique, rank
            )

        thread = threading.Thread(target=create, daemon=True)
        thread.start()
        while thread.is_alive():
            if self._aborted():
                raise AbortedError("joining NCCL was broken off: another rank failed")
            thread.join(0.01)
        self._check(status.value, "ncclCommInitRank")
        return communicator.value

    def _exchange_id(self, path: Path, rank: int) -> _UniqueId:
        unique = _UniqueId()
        if rank == 0:
            self._check(
                self._library.ncclGetUniqueId(ctypes.byref(unique)),
                "ncclGetUniqueId",
            )
            part = path.with_suffix(".part")
            part.write_bytes(bytes(unique))
            part.rename(path)
            return unique
        deadline = time.monotonic() + 120
        while not path.exists():
            if time.monotonic() > deadline:
                raise WorkerError(f"rank {rank}: no NCCL id from rank 0 within 120 s")
            time.sleep(0.005)
        return _UniqueId.from_buffer_copy(path.read_bytes())

    def all_reduce(self, x: Any, out: Any) -> None:
        """See `Collectives`. Enqueues; raises WorkerError if NCCL refuses."""
        status = self._library.ncclAllReduce(
            x.data_ptr(),
            out.data_ptr(),
            x.numel(),
            self._dtype(x),
            self._SUM,
            self._communicator,
            self._stream(),
        )
        self._check(status, "ncclAllReduce")

    def all_gather(self, x: Any, out: Any) -> None:
        """See `Collectives`. Enqueues; raises WorkerError if NCCL refuses."""
        status = self._library.ncclAllGather(
            x.data_ptr(),
            out.data_ptr(),
            x.numel(),
            self._dtype(x),
            self._communicator,
            self._stream(),
        )
        self._check(status, "ncclAllGather")

    def barrier(self) -> None:
        """Enqueue a small all-reduce: the stream passes it when every rank's stream got there."""
        import tvm

        # Kept on the object: the kernel may run after this call returns.
        self._token = tvm.runtime.empty((1,), "int32", self._device)
        self.all_reduce(self._token, self._token)

    def abort(self) -> None:
        """See `Collectives`. Kernels on this rank's device end; the communicator is gone."""
        with self._lock:
            if self._communicator is not None:
                self._library.ncclCommAbort(self._communicator)
            self._communicator = None

    def close(self) -> None:
        """See `Collectives`."""
        with self._lock:
            if self._communicator is not None:
                self._library.ncclCommDestroy(self._communicator)
            self._communicator = None

    def _dtype(self, x: Any) -> int:
        if self._communicator is None:
            raise AbortedError("a collective was broken off: another rank failed")
        dtype = self._DTYPES.get(str(x.dtype))
        if dtype is None:
            raise WorkerError(f"NCCL collectives have no dtype {x.dtype}")
        return dtype

    def _stream(self) -> int:
        import tvm_ffi

        return int(tvm_ffi.get_raw_stream(self._device) or 0)

    def _check(self, status: int, what: str) -> None:
        if status != 0:
            reason = self._library.ncclGetErrorString(status).decode()
            last = (self._last_error(None) if self._last_error else b"") or b""
            detail = last.decode(errors="replace").strip()
            raise WorkerError(f"{what} failed: {reason}: {detail}; NCCL_DEBUG=INFO prints more")
