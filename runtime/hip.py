"""AMD GPUs: the HIP library, TVM's device API on top of it, a GPU as a `Device`, and RCCL.

HIP and RCCL have CUDA's and NCCL's functions under other names, so the code for NVIDIA GPUs serves
here as well. No part of this has run on AMD silicon yet.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from shardwright.errors import DeviceError
from shardwright.runtime.cuda_device import CudaDevice
from shardwright.runtime.native import load_native
from shardwright.runtime.nccl import NcclCollectives

HIP_NAMES = tuple(f"libamdhip64.so.{version}" for version in (7, 6, 5))
RCCL_NAMES = ("librccl.so.1", "librccl.so")
_PLUGIN = Path(__file__).with_name("rocm_plugin.cc")

_RENAMED = {
    "cudaHostAlloc": "hipHostMalloc",
    "cudaFreeHost": "hipHostFree",
    "cudaGraphInstantiate": "hipGraphInstantiateWithFlags",
}


class Hip:
    """The HIP library, its functions by their CUDA names: `cudaMalloc` is `hipMalloc`.

    Flags and error codes in use have the same numbers in both.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        found = _RENAMED.get(name) or name.replace("cuda", "hip", 1)
        try:
            return getattr(self._library, found)
        except AttributeError:
            raise DeviceError(
                f"{self._library._name} has no function {found}; install ROCm 5.5 or later"
            ) from None


@functools.cache
def hip() -> Hip:
    """The HIP library of ROCm 7, 6 or 5. Raises DeviceError if there is none."""
    return Hip(_load(HIP_NAMES, "the HIP runtime"))


@functools.cache
def load_plugin() -> None:
    """Make TVM's runtime, which must be loaded, run programs on AMD GPUs.

    Raises DeviceError without HIP, BuildError if the plugin cannot be compiled.
    """
    path = hip()._library._name
    plugin = load_native(_PLUGIN, flags=_plugin_flags())
    plugin.shardwright_rocm_load.restype = ctypes.c_char_p
    plugin.shardwright_rocm_load.argtypes = [ctypes.c_char_p]
    problem = plugin.shardwright_rocm_load(path.encode())
    if problem:
        raise DeviceError(f"{problem.decode()}; install ROCm 5.5 or later")


def _plugin_flags() -> tuple[str, ...]:
    """Compiler options: headers and libraries of the installed TVM."""
    import tvm
    import tvm_ffi

    tvm_root, ffi_root = Path(tvm.__file__).parent, Path(tvm_ffi.__file__).parent
    flags = [f"-I{root / 'include'}" for root in (tvm_root, ffi_root)]
    libraries = [tvm_root / "lib" / "libtvm_runtime.so", ffi_root / "lib" / "libtvm_ffi.so"]
    # The versions make a new library of it when TVM changes in place.
    versions = f"-DSHARDWRIGHT_TVM={tvm.__version__}-{tvm_ffi.__version__}"
    return (*flags, versions, *map(str, libraries))


def _load(names: tuple[str, ...], what: str) -> ctypes.CDLL:
    """Load the first library of `names` from the library path, ROCm's folder or pip packages."""
    reason = ""
    for name in names:
        for candidate in (name, *(str(folder / name) for folder in _folders())):
            try:
                return ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                if "cannot open shared object file" not in str(error) or not reason:
                    reason = str(error)
    raise DeviceError(
        f"{what} cannot be loaded ({reason}); this model was built for AMD GPUs: install ROCm 5.5 "
        "or later, or put its libraries on LD_LIBRARY_PATH, or build the model with --target cpu"
    )


def _folders() -> list[Path]:
    found = [Path(os.environ.get("ROCM_PATH", "/opt/rocm")) / "lib"]
    # AMD's pip packages of ROCm, and what PyTorch for ROCm brings along.
    for package in ("_rocm_sdk_core", "_rocm_sdk_libraries", "torch"):
        spec = importlib.util.find_spec(package)
        roots = spec.submodule_search_locations if spec else None
        found += [Path(root) / "lib" for root in roots or ()]
    return found


def device_count() -> int:
    """Number of AMD GPUs that this process may use."""
    count = ctypes.c_int()
    status = hip().cudaGetDeviceCount(ctypes.byref(count))
    return count.value if status == 0 else 0


def architecture(index: int) -> str:
    """Architecture of a GPU, such as "gfx90a".

    The struct of its properties differs between versions of HIP, so the name is searched for in it.
    """
    properties = ctypes.create_string_buffer(16384)
    library = hip()._library
    name = "hipGetDevicePropertiesR0600"
    get = getattr(library, name, None) or library.hipGetDeviceProperties
    if get(properties, index) == 0:
        found = re.search(rb"gfx[0-9a-f]{3,4}", properties.raw)
        if found:
            return found[0].decode()
    raise DeviceError(f"HIP does not say what architecture GPU {index} is; check `rocminfo`")


class HipDevice(CudaDevice):
    """An AMD GPU with a stream of its own."""

    def __init__(self, index: int, use_graph: bool) -> None:
        super().__init__(index, use_graph)
        self.arch = architecture(index)

    def _open(self, index: int) -> tuple[Any, Any]:
        import tvm

        return tvm.rocm(index), hip()


class RcclCollectives(NcclCollectives):
    """RCCL, which is NCCL for AMD GPUs."""

    _NEEDED = "ROCm 5.5 or later, with its RCCL"

    def _open(self) -> tuple[Any, Any]:
        return _load(RCCL_NAMES, "RCCL"), hip()
