"""cuBLAS through its C interface: products of many tokens on NVIDIA GPUs.

`install` registers the packed function that compiled programs call, `shardwright.matmul(x, w,
out)`.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from shardwright.errors import WorkerError
from shardwright.runtime.tvm_runtime import load_cuda_library

_WORKSPACE_BYTES = 32 << 20  # what NVIDIA recommends for Hopper
_FLOAT32, _FLOAT16, _BFLOAT16 = 0, 2, 14  # cudaDataType
_TYPES = {"float32": _FLOAT32, "float16": _FLOAT16, "bfloat16": _BFLOAT16}
_COMPUTE_FLOAT32 = 68  # cublasComputeType_t
_PLAIN, _TRANSPOSED = 0, 1  # cublasOperation_t
_DEFAULT_ALGORITHM = -1


def library() -> ctypes.CDLL:
    """The library. Raises DeviceError, naming the package, if it is not found."""
    loaded = load_cuda_library("libcublas.so.13")
    loaded.cublasGetStatusString.restype = ctypes.c_char_p
    return loaded


class Cublas:
    """A handle for one GPU."""

    def __init__(self, device: Any) -> None:
        import tvm

        self._library = library()
        self._device = device
        self._handle = ctypes.c_void_p()
        self._check(self._library.cublasCreate_v2(ctypes.byref(self._handle)), "cublasCreate")
        # A workspace of ours, because the library's own is not allowed to grow inside a graph.
        self._workspace = tvm.runtime.empty((_WORKSPACE_BYTES,), "uint8", device)
        self._one, self._zero = ctypes.c_float(1), ctypes.c_float(0)
        self._stream: int | None = None

    def matmul(self, x: Any, w: Any, out: Any) -> None:
        """`out [n,N] = x [n,K] @ w [N,K].T`, float32 accumulation, on TVM's current stream.

        Raises WorkerError if cuBLAS refuses.
        """
        self._use_current_stream()
        tokens, inner = x.shape
        features = w.shape[0]
        # cuBLAS sees columns where we see rows: out.T [N,n] = w [N,K] @ x.T [K,n].
        status = self._library.cublasGemmEx(
            self._handle,
            *(_TRANSPOSED, _PLAIN, features, tokens, inner, ctypes.byref(self._one)),
            *(ctypes.c_void_p(w.data_ptr()), _TYPES[str(w.dtype)], inner),
            *(ctypes.c_void_p(x.data_ptr()), _TYPES[str(x.dtype)], inner),
            ctypes.byref(self._zero),
            *(ctypes.c_void_p(out.data_ptr()), _TYPES[str(out.dtype)], features),
            *(_COMPUTE_FLOAT32, _DEFAULT_ALGORITHM),
        )
        self._check(status, f"a product of {tokens} x {inner} and {inner} x {features}")

    def _use_current_stream(self) -> None:
        import tvm_ffi

        stream = int(tvm_ffi.get_raw_stream(self._device) or 0)
        if stream != self._stream:
            status = self._library.cublasSetStream_v2(self._handle, ctypes.c_void_p(stream))
            self._check(status, "cublasSetStream")
            # Setting the stream puts the library's own workspace back.
            status = self._library.cublasSetWorkspace_v2(
                self._handle,
                ctypes.c_void_p(self._workspace.data_ptr()),
                ctypes.c_size_t(_WORKSPACE_BYTES),
            )
            self._check(status, "cublasSetWorkspace")
            self._stream = stream

    def _check(self, status: int, what: str) -> None:
        if status != 0:
            reason = self._library.cublasGetStatusString(status).decode()
            raise WorkerError(f"cuBLAS, {what}: {reason}")


@functools.cache
def _of_device(index: int) -> Cublas:
    import tvm

    return Cublas(tvm.cuda(index))


def install(index: int) -> None:
    """Register the packed function, and create the handle of GPU `index`.

    Raises DeviceError if cuBLAS is not installed.
    """
    import tvm_ffi

    _of_device(index)

    def matmul(x: Any, w: Any, out: Any) -> None:
        _of_device(x.device.index).matmul(x, w, out)

    tvm_ffi.register_global_func("shardwright.matmul", matmul, override=True)
