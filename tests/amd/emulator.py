"""Emulated AMD GPUs: a library that stands in for libamdhip64 and librccl, and a device.

`library_dir()` holds the library under the names that ROCm's have; with that folder on
LD_LIBRARY_PATH and `environment(arch, devices)` a process finds emulated GPUs. `Device` launches
kernels of a code object from Python, with numpy arrays for arguments.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from shardwright.runtime.native import cache_dir

SOURCES = Path(__file__).parent
NAMES = ("libamdhip64.so.7", "libamdhip64.so.6", "librccl.so.1")
ARCHS = ("gfx1100", "gfx90a", "gfx942")
_FLAGS = (
    *("-std=c++20", "-O2", "-ftree-vectorize", "-march=native", "-fno-math-errno"),
    # One rounding for each instruction, as on the device.
    *("-ffp-contract=off", "-fPIC", "-pthread", "-Wall"),
)


@functools.cache
def library_dir() -> Path:
    """The folder with the compiled emulator, compiled on first use and kept in the user's cache."""
    sources = sorted(SOURCES.glob("*.cc"))
    key = hashlib.sha256(platform.machine().encode() + _cpu() + " ".join(_FLAGS).encode())
    for path in (*sources, *sorted(SOURCES.glob("*.h"))):
        key.update(path.read_bytes())
    folder = cache_dir() / f"amd-emulator-{key.hexdigest()[:16]}"
    if not folder.exists():
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir()) as work:
            _compile(sources, Path(work))
            try:
                os.rename(Path(work) / "lib", folder)
            except OSError:  # another process was faster
                if not folder.exists():
                    raise
    return folder


def _cpu() -> bytes:
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    return next((line for line in lines if line.startswith(b"flags")), b"")


def _compile(sources: list[Path], work: Path) -> None:
    compiler = os.environ.get("CXX", "g++")

    def object_of(source: Path) -> Path:
        out = work / f"{source.stem}.o"
        subprocess.run([compiler, *_FLAGS, "-c", str(source), "-o", str(out)], check=True)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(object_of, sources))
    (work / "lib").mkdir()
    library = work / "lib" / NAMES[0]
    command = [compiler, "-shared", "-pthread", *map(str, objects), "-o", str(library)]
    subprocess.run(command, check=True)
    for name in NAMES[1:]:
        (work / "lib" / name).symlink_to(NAMES[0])


def environment(arch: str, devices: int = 1) -> dict[str, str]:
    """Variables with which a process has `devices` emulated GPUs of the architecture `arch`."""
    path = os.pathsep.join(filter(None, [str(library_dir()), os.environ.get("LD_LIBRARY_PATH")]))
    return {
        "LD_LIBRARY_PATH": path,
        "AMD_EMULATOR_ARCH": arch,
        "AMD_EMULATOR_DEVICES": str(devices),
    }


class EmulatorError(Exception):
    """What the emulator said."""


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_dir() / NAMES[0]))
    library.hipGetErrorString.restype = ctypes.c_char_p
    library.amd_emulator_listing.restype = ctypes.c_char_p
    library.amd_emulator_listing.argtypes = [ctypes.c_void_p]
    return library


class Device:
    """An emulated GPU in this process with the kernels of one code object."""

    def __init__(self, arch: str, code: bytes) -> None:
        self.library = _library()
        self.library.amd_emulator_reset()
        os.environ["AMD_EMULATOR_ARCH"] = arch
        self.module = ctypes.c_void_p()
        self._check(self.library.hipModuleLoadData(ctypes.byref(self.module), code))

    def listing(self) -> list[str]:
        """The code: "  kernel+0x10: v_add_f32"; "?" in front if it is not known."""
        return self.library.amd_emulator_listing(self.module).decode().splitlines()

    def launch(self, kernel: str, grid, block, *args, dynamic_lds: int = 0) -> None:
        """Run a kernel. Arguments are numpy arrays, which it reads and writes, and numpy scalars.

        Raises EmulatorError for what the kernel must not do.
        """
        function = ctypes.c_void_p()
        self._check(
            self.library.hipModuleGetFunction(ctypes.byref(function), self.module, kernel.encode())
        )
        packed, buffers = bytearray(), []
        for arg in args:
            if isinstance(arg, np.ndarray):
                pointer = ctypes.c_void_p()
                size = ctypes.c_size_t(arg.nbytes)
                self._check(self.library.hipMalloc(ctypes.byref(pointer), size))
                ctypes.memmove(pointer, arg.ctypes.data, arg.nbytes)
                buffers.append((arg, pointer))
                arg = np.uint64(pointer.value)
            packed += bytes(-len(packed) % arg.dtype.itemsize) + arg.tobytes()
        data = ctypes.create_string_buffer(bytes(packed), max(len(packed), 1))
        size = ctypes.c_size_t(len(packed))
        extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(data), 2, ctypes.addressof(size), 3)
        dims = [*grid, *(1,) * (3 - len(grid)), *block, *(1,) * (3 - len(block))]
        try:
            self._check(
                self.library.hipModuleLaunchKernel(function, *dims, dynamic_lds, None, None, extra)
            )
        finally:
            for arg, pointer in buffers:
                ctypes.memmove(arg.ctypes.data, pointer, arg.nbytes)
                self.library.hipFree(pointer)

    def _check(self, status: int) -> None:
        if status:
            message = self.library.hipGetErrorString(status).decode()
            self.library.amd_emulator_reset()
            raise EmulatorError(message)

    def __del__(self) -> None:
        if getattr(self, "module", None):
            self.library.hipModuleUnload(self.module)


if __name__ == "__main__":
    for name, value in environment(sys.argv[1], int(sys.argv[2])).items():
        print(f"export {name}={shlex.quote(value)}")
