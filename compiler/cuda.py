"""CUDA code ahead of time, on a build machine without a GPU.

TVM's CUDA module factory calls a Python hook with the source of all kernels and stores what it
returns. Ours runs nvcc for every architecture asked for and adds PTX for later ones. The factory
lives in TVM's CUDA runtime, which wants the driver's library; where there is none, a stand-in whose
functions all fail satisfies the loader, since building calls none of them.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tvm
import tvm_ffi

from shardwright.compiler.kernels.common import EARLY_LAUNCHES
from shardwright.errors import BuildError, UsageError
from shardwright.runtime.native import load_native
from shardwright.runtime.tvm_runtime import load_cuda_library

_ARCH = re.compile(r"sm_(\d+)([af]?)")
_KERNEL = re.compile(r"(\w+)\(\w+\*? ")  # its name, before the first parameter


def cuda_target(archs: tuple[str, ...]) -> tvm.target.Target:
    """TVM's target for kernels that must run on all of `archs`, such as `("sm_89", "sm_90a")`.

    Raises UsageError for a name that is no CUDA architecture, or one below sm_80.
    """
    if not archs:
        raise UsageError("--target cuda needs --arch, for example --arch sm_89,sm_90a")
    for arch in archs:
        match = _ARCH.fullmatch(arch)
        if not match or int(match[1]) < 80:
            raise UsageError(
                f"--arch {arch}: not a CUDA architecture of sm_80 or later, such as sm_86, sm_90a"
            )
    oldest = min(archs, key=_version)
    return tvm.target.Target(
        {
            "kind": "cuda",
            "arch": f"sm_{_version(oldest)}",
            "max_threads_per_block": 1024,
            "max_shared_memory_per_block": 49152,
            "thread_warp_size": 32,
            "keys": ["cuda", "gpu", *_abilities(archs)],
        },
        host="llvm",
    )


def from_sm_90(target: tvm.target.Target) -> bool:
    """Whether all GPUs that `target` is for have thread block clusters and dependent launch."""
    return target.kind.name == "cuda" and _version(str(target.attrs["arch"])) >= 90


def _abilities(archs: tuple[str, ...]) -> list[str]:
    """What all of `archs` have beyond sm_80, as keys of a target.

    "wgmma" are Hopper's own instructions; with "clusters" of blocks comes 227 KB of shared memory
    for a block.
    """
    wgmma = ["wgmma"] if set(archs) == {"sm_90a"} else []
    return wgmma + (["clusters"] if {_version(arch) for arch in archs} <= {90, 100, 103} else [])


def install_hook(archs: tuple[str, ...]) -> None:
    """Make TVM compile CUDA source for `archs` with nvcc. Raises BuildError without nvcc."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise BuildError("nvcc is not on PATH; install the CUDA toolkit 13 (a GPU is not needed)")
    _load_module_factory()

    def compile_source(source: str) -> bytes:
        return _compile(nvcc, in_order(source), archs)

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compile_source, override=True)


def in_order(source: str) -> str:
    """`source` with reads kept behind `wait_for_inputs` in the kernels that call it.

    Their pointers lose `__restrict__`: nvcc moves reads of memory that a kernel is said not to
    write across the wait, in both directions, whatever that clobbers.
    """
    head, *kernels = re.split(r'(?=^extern "C" __global__)', source, flags=re.MULTILINE)
    waiting = {
        match[1]
        for kernel in kernels
        if any(f"{name}()" in kernel for name in EARLY_LAUNCHES)
        and (match := _KERNEL.search(kernel))
    }
    for i, kernel in enumerate(kernels):
        match = _KERNEL.search(kernel)
        if match and match[1] in waiting:
            kernels[i] = kernel.replace("__restrict__ ", "")
    return "".join([head, *kernels])


def _load_module_factory() -> None:
    if tvm_ffi.get_global_func("ffi.Module.create.cuda", allow_missing=True) is not None:
        return
    load_cuda_library("libcudart.so.13")
    try:
        ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        load_native(Path(__file__).with_name("cuda_driver_stub.cc"), soname="libcuda.so.1")
    library = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise BuildError(f"TVM's CUDA runtime cannot be loaded: {error}") from None


def _version(arch: str) -> int:
    match = _ARCH.fullmatch(arch)
    assert match is not None
    return int(match[1])


def _compile(nvcc: str, source: str, archs: tuple[str, ...]) -> bytes:
    """A fat binary with code for each of `archs`, and PTX for what comes after.

    Nearly all of the time is in the step from source to PTX, so each PTX is made once and the
    architectures side by side. PTX for later GPUs is that of the latest architecture without a
    suffix: that of sm_90a runs on sm_90a only.
    """
    plain = [arch for arch in archs if _ARCH.fullmatch(arch)[2] == ""]  # type: ignore[index]
    portable = max(plain, key=_version) if plain else f"sm_{max(map(_version, archs))}"
    tools = {name: str(Path(nvcc).with_name(name)) for name in ("ptxas", "fatbinary")}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernels.cu"
        path.write_text(source)

        def images(arch: str) -> list[str]:
            number = arch.removeprefix("sm_")
            ptx, cubin = path.with_suffix(f".{number}.ptx"), path.with_suffix(f".{number}.cubin")
            options = ["-ptx", f"-arch=compute_{number}", "-O3", "-std=c++17", "-w"]
            _run([nvcc, *options, "-o", str(ptx), str(path)])
            found = []
            if arch in archs:
                _run([tools["ptxas"], f"-arch={arch}", "-O3", "-o", str(cubin), str(ptx)])
                found.append(f"--image3=kind=elf,sm={number},file={cubin}")
            if arch == portable:
                found.append(f"--image3=kind=ptx,sm={number},file={ptx}")
            return found

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = [i for f in pool.map(images, dict.fromkeys((*archs, portable))) for i in f]
        out = path.with_suffix(".fatbin")
        _run([tools["fatbinary"], f"--create={out}", "-64", *made])
        return out.read_bytes()


def _run(command: list[str]) -> None:
    """Run a tool of the CUDA toolkit; BuildError with its first errors if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(
            f"{command[0]} cannot be run ({error.strerror}); reinstall the CUDA toolkit"
        ) from None
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        tool = Path(command[0]).name
        raise BuildError(f"{tool} failed: " + "; ".join(errors[:3] or [done.stderr[-500:]]))
