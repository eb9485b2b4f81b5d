"""Load TVM's runtime libraries without its compiler, and the CUDA libraries beside them."""

import ctypes
import importlib
import importlib.util
import os
import sys
from pathlib import Path

from shardwright.errors import DeviceError

_PACKAGES = {
    "libcublas.so.13": "nvidia-cublas",
    "libcudart.so.13": "nvidia-cuda-runtime",
    "libnccl.so.2": "nvidia-nccl-cu13",
}


def load(kind: str = "cpu") -> None:
    """Make `import tvm`, `tvm.runtime.disco` and `tvm.runtime.vm` work in this process.

    TVM comes in runtime-only mode (7 MB instead of the compiler's 150), unless this process has
    imported the compiler before. For the kinds of device "cuda" and "rocm", their runtime is loaded
    too.

    Raises DeviceError if a CUDA or ROCm library or the driver is missing.
    """
    if "tvm" not in sys.modules:
        _import_ffi()  # its library must come before TVM's
        lib = _tvm_lib()
        for name in ("libtvm_runtime.so", "libtvm_runtime_extra.so"):
            ctypes.CDLL(str(lib / name), mode=ctypes.RTLD_GLOBAL)
        if kind == "cuda":
            _load_cuda(lib)
        _import_runtime_only()
    elif kind == "cuda":
        _load_cuda(_tvm_lib())
    if kind == "rocm":
        from shardwright.runtime.hip import load_plugin

        load_plugin()
    _repair_disco()


def load_cuda_library(name: str) -> ctypes.CDLL:
    """Load a CUDA library from NVIDIA's pip packages, or from the library path.

    In this order, because a process that has imported torch already has the pip package's NCCL,
    and NCCL refuses ranks of different versions.

    Raises DeviceError, with the package to install, if it is in neither place.
    """
    reason = ""
    for candidate in (*_pip_candidates(name), name):
        try:
            return ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            reason = str(error)
    package = _PACKAGES[name]
    raise DeviceError(
        f"{name} cannot be loaded ({reason}); install it: pip install {package}, "
        "or put the CUDA toolkit's libraries on LD_LIBRARY_PATH"
    )


def _pip_candidates(name: str) -> list[str]:
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else None
    return [str(path) for root in roots or () for path in sorted(Path(root).glob(f"**/{name}"))]


def _tvm_lib() -> Path:
    spec = importlib.util.find_spec("tvm")
    if spec is None or spec.origin is None:
        raise DeviceError("TVM is not installed; pip install apache-tvm==0.27.0.post1")
    return Path(spec.origin).parent / "lib"


def _load_cuda(lib: Path) -> None:
    load_cuda_library("libcudart.so.13")
    try:
        ctypes.CDLL(str(lib / "libtvm_runtime_cuda.so"), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise DeviceError(
            f"the CUDA runtime cannot be loaded ({error}); this model was built for NVIDIA GPUs: "
            "install the NVIDIA driver, or build it with --target cpu"
        ) from None


def _import_runtime_only() -> None:
    # TVM reads the variable at import only. It must not stay set: a child process of ours or of
    # the user may want the compiler.
    variable = "TVM_USE_RUNTIME_LIB"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        importlib.import_module("tvm")
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _import_ffi() -> None:
    """Import tvm_ffi without torch, which it imports where it is installed: that takes seconds."""
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("tvm_ffi")
    finally:
        if absent:
            del sys.modules["torch"]


def _repair_disco() -> None:
    """Import `tvm.runtime.disco`, which fails inside `import tvm` with the full compiler.

    There the library that defines it is loaded only after the import.
    """
    import tvm
    import tvm_ffi

    if tvm.runtime.disco is None:
        ctypes.CDLL(str(_tvm_lib() / "libtvm_runtime_extra.so"), mode=ctypes.RTLD_GLOBAL)
        # Not its process_pool: that one was imported, and registers a name once only.
        for name in ("tvm.runtime.disco", "tvm.runtime.disco.session"):
            sys.modules.pop(name, None)
        tvm_ffi.init_ffi_api("runtime.disco", "tvm.runtime.disco._ffi_api")
        tvm.runtime.disco = importlib.import_module("tvm.runtime.disco")
