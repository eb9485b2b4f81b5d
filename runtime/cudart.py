"""The few functions of the CUDA runtime library that the runtime calls itself."""

import ctypes
from typing import Any

from shardwright.errors import WorkerError
from shardwright.runtime.tvm_runtime import load_cuda_library


def cudart() -> ctypes.CDLL:
    """The library. Raises DeviceError if it is not found."""
    return load_cuda_library("libcudart.so.13")


def call(cuda: Any, name: str, *arguments: Any) -> None:
    """Call a function; WorkerError if it fails."""
    check(cuda, name, getattr(cuda, name)(*arguments))


def check(cuda: Any, what: str, status: int) -> None:
    """Raise WorkerError with CUDA's reason unless `status` is success."""
    if status != 0:
        cuda.cudaGetErrorString.restype = ctypes.c_char_p
        raise WorkerError(f"{what} failed: {cuda.cudaGetErrorString(status).decode()}")


def done(cuda: Any, event: ctypes.c_void_p) -> bool:
    """Whether the GPU has passed an event. Raises WorkerError if the GPU has failed."""
    status = cuda.cudaEventQuery(event)
    not_ready = 600
    if status == not_ready:
        return False
    check(cuda, "the GPU", status)
    return True
