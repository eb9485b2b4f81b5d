"""AMD GPU code ahead of time, on a build machine without a GPU and without ROCm.

TVM's code generator ends in two Python hooks: one names bitcode to link with, which is not needed
here and serves to choose the code object version and to bring a barrier of ours, the other links
the object file. Two miscompiles of this TVM have their remedies here: see `PASS_CONFIG` and
`rocm_barrier.ll`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx

from shardwright.compiler import rocm_check
from shardwright.errors import BuildError, UsageError
from shardwright.runtime.code_object import CodeObject, KernelCode, code_objects, write_kernels

MIN_LLD = 19
"""The first LLD that reads the objects of TVM's LLVM."""

BARRIER = Path(__file__).with_name("rocm_barrier.ll")

ROCM_LLD = "/opt/rocm/llvm/bin/ld.lld"

ABIS = (5, 6)
"""AMD code object versions; ROCm 5.5 and later load 5, ROCm 6.3 and later also 6."""

MAX_THREADS = 256
"""Threads of a block: what the code generator allows the kernels where it finds no GPU."""

HOST = "tirx.is_host_func"
"""Attribute of functions that compute shapes, on the CPU."""

SHARED_BYTES = 65536
"""Local data share of a block."""

PASS_CONFIG = {
    # Storage rewrite declares buffers on one shared allocation, and the code generator makes
    # pointers into global memory of them.
    "tirx.disable_storage_rewrite": True
}


@dataclass(frozen=True)
class Arch:
    """What the compiler must know of an architecture."""

    name: str
    wave: int
    matrix: str = ""
    """Matrix instructions of float16: "mfma", "wmma" or none."""

    @property
    def generation(self) -> int:
        """9, 10, 11 or 12."""
        return int(self.name[3:-2])

    @property
    def attributes(self) -> list[str]:
        """LLVM's target features that differ from the default."""
        features = []
        if self.generation >= 10:
            # A block stays on one compute unit, whose first-level cache its waves share.
            features.append("+cumode")
        if self.generation >= 11:
            # Keeps to instructions that other tools decode as well.
            features.append("-real-true16")
        return features


def _arch(name: str) -> Arch:
    matrix = ""
    if name in ("gfx908", "gfx90a", "gfx942"):
        matrix = "mfma"
    elif name.startswith("gfx11"):
        matrix = "wmma"
    return Arch(name, 64 if len(name) == 6 and name.startswith("gfx9") else 32, matrix)


ARCHS = {
    name: _arch(name)
    for name in (
        *("gfx908", "gfx90a", "gfx942"),
        *("gfx1030", "gfx1031", "gfx1032", "gfx1100", "gfx1101", "gfx1102", "gfx1103"),
    )
}
"""Architectures that this version compiles for."""


def rocm_target(arch: str) -> tvm.target.Target:
    """TVM's target for `arch`, such as "gfx1100". Raises UsageError for one that is not known."""
    known = ARCHS.get(arch)
    if known is None:
        raise UsageError(
            f"--arch {arch}: not an AMD architecture that this version compiles for; choose from "
            f"{', '.join(ARCHS)} (`rocminfo | grep gfx` names the machine's)"
        )
    with without_device_warnings():
        return tvm.target.Target(
            {
                "kind": "rocm",
                "mcpu": arch,
                "mattr": known.attributes,
                "thread_warp_size": known.wave,
                "max_num_threads": MAX_THREADS,
                "max_threads_per_block": MAX_THREADS,
                "max_shared_memory_per_block": SHARED_BYTES,
            },
            host="llvm",
        )


def rocm_targets(archs: tuple[str, ...]) -> tuple[tvm.target.Target, ...]:
    """A target for each of `archs`; UsageError if there are none, or unknown ones."""
    if not archs:
        raise UsageError("--target rocm needs --arch, for example --arch gfx1100,gfx942")
    return tuple(rocm_target(arch) for arch in dict.fromkeys(archs))


def build(mod: tvm.IRModule, targets: tuple[tvm.target.Target, ...], library: Path) -> None:
    """Compile VM code and kernels, which `for_arch` has bound to their targets, to `library`.

    What came out is checked, see `rocm_check`, and not written if it is not right (BuildError).
    `kernels.json` beside the library says what is in it.
    """
    with (
        tvm.transform.PassContext(config=PASS_CONFIG),
        targets[0],
        without_device_warnings(),
    ):
        executable = relax.build(mod, targets[0], relax_pipeline=None)
    with tempfile.TemporaryDirectory(prefix=".shardwright-", dir=library.parent) as directory:
        unchecked = Path(directory) / library.name
        executable.export_library(str(unchecked))
        codes = check_modules(executable.mod, code_objects(unchecked))
        unchecked.rename(library)
    write_kernels(library.parent, codes)


def check_modules(root: tvm.runtime.Module, found: list[CodeObject]) -> list[KernelCode]:
    """Check every AMD module below `root` against its code object; see `rocm_check.check`."""
    modules, pending = [], [root]
    while pending:
        module = pending.pop()
        if module.kind == "hip":
            modules.append(module)
        pending.extend(module.imports)
    codes = []
    for module in modules:
        assembly = module.inspect_source("asm")
        match = re.search(r"\.amdgcn_target \"\S*(gfx\w+)\"", assembly)
        arch = ARCHS[match[1]] if match else None
        objects = [o for o in found if arch is not None and o.arch == arch.name]
        if arch is None or len(objects) != 1:
            raise BuildError("the library does not hold one code object for each architecture")
        ir = module.inspect_source("llvm")
        codes += rocm_check.check(arch.name, arch.wave, MAX_THREADS, ir, assembly, objects[0])
    return codes


@contextlib.contextmanager
def without_device_warnings() -> Iterator[None]:
    """Drop TVM's warnings, one for each kernel, that there is no GPU to ask for its limits.

    They come from C++, so the process's standard error is filtered meanwhile.
    """
    saved = os.dup(2)
    read, write = os.pipe()
    os.dup2(write, 2)
    pipe = os.fstat(write).st_ino
    os.close(write)

    def forward() -> None:
        with os.fdopen(read, "rb") as lines:
            for line in lines:
                if b"Cannot get maximum number of threads" in line or b"ROCm version" in line:
                    continue
                with contextlib.suppress(OSError):
                    os.write(saved, line)

    thread = threading.Thread(target=forward, daemon=True)
    thread.start()
    try:
        yield
    finally:
        # Something else may have taken standard error meanwhile, as Ctrl-C does.
        if os.fstat(2).st_ino == pipe:
            os.dup2(saved, 2)
            thread.join()
            os.close(saved)


def for_arch(mod: tvm.IRModule, target: tvm.target.Target, arch: str) -> tvm.IRModule:
    """`mod`, VM code, with `target` bound to its kernels and every name ending in "_" and `arch`.

    So the programs of several architectures fit into one library. Raises BuildError for a kernel
    with too many threads.
    """
    names = {}
    for gv, _ in mod.functions_items():
        names[gv] = relax.GlobalVar(f"{gv.name_hint}_{arch}")
        relax.expr._update_type(names[gv], gv.ty)
    rename = _Rename({gv.name_hint: new for gv, new in names.items()})
    functions = {}
    for gv, func in mod.functions_items():
        if isinstance(func, relax.Function):
            func = rename.visit_expr(func)
        else:
            threads = block_threads(func)
            if threads > MAX_THREADS:
                raise BuildError(
                    f"kernel {gv.name_hint} has blocks of {threads} threads, AMD GPUs run "
                    f"{MAX_THREADS} here; please report it as a bug of Shardwright"
                )
            if HOST not in func.attrs:
                func = func.with_attr("target", target)
        functions[names[gv]] = func.with_attr("global_symbol", names[gv].name_hint)
    return tvm.IRModule(functions)


def block_threads(func: tirx.PrimFunc) -> int:
    """Threads of a block of a scheduled kernel; the largest of its launches."""
    extents: dict[str, int] = {}

    def visit(loop: tirx.For) -> None:
        tag = str(loop.thread_binding.thread_tag) if loop.thread_binding is not None else ""
        if tag.startswith("threadIdx."):
            extents[tag] = max(extents.get(tag, 1), int(loop.extent))

    tvm_ffi.structural_walk(func.body, [(tirx.For, visit)], order="pre")
    return math.prod(extents.values())


@relax.expr_functor.mutator
class _Rename(relax.PyExprMutator):  # type: ignore[misc]
    """Replaces global variables, by their names."""

    def __init__(self, names: dict[str, relax.GlobalVar]) -> None:
        super().__init__()
        self._names = names

    def visit_global_var_(self, op: relax.GlobalVar) -> relax.Expr:
        return self._names[op.name_hint]


def install_hooks(abi: int) -> None:
    """Make TVM's code generator use our linker and code object version `abi`.

    Raises UsageError for another ABI, and BuildError without a linker that can do it.
    """
    if abi not in ABIS:
        raise UsageError(f"--rocm-abi {abi}: must be one of {', '.join(map(str, ABIS))}")
    linker = find_linker()

    def bitcode() -> list[str]:
        return [str(Path(__file__).with_name(f"rocm_abi_{abi}.ll")), str(BARRIER)]

    def link(code: bytes) -> bytes:
        return _link(linker, bytes(code))

    tvm_ffi.register_global_func("tvm_callback_rocm_bitcode_path", bitcode, override=True)
    tvm_ffi.register_global_func("tvm_callback_rocm_link", link, override=True)
    _register_shuffle()
    _register_barrier()


def find_linker() -> list[str]:
    """The command of an LLD that is new enough.

    An `ld.lld` on PATH comes first, then that of the package ziglang. Raises BuildError.
    """
    found = []
    newest = [f"ld.lld-{version}" for version in range(30, MIN_LLD - 1, -1)]
    for name in (*newest, "ld.lld", ROCM_LLD):
        path = shutil.which(name)
        if path:
            found.append([path])
    if importlib.util.find_spec("ziglang"):
        found.append([sys.executable, "-m", "ziglang", "ld.lld"])
    too_old = []
    for command in found:
        version = _lld_version(command)
        if version >= MIN_LLD:
            return command
        too_old.append(f"{command[-1]} is LLD {version}")
    reason = f"{'; '.join(too_old)}, too old" if too_old else "there is none"
    raise BuildError(
        f"linking for AMD GPUs needs LLD {MIN_LLD} or later, and {reason}; "
        "pip install 'shardwright[rocm]' brings one, or put a newer ld.lld on PATH"
    )


def _lld_version(command: list[str]) -> int:
    """The major version that a linker says it is, 0 if it says none."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.SubprocessError):
        return 0
    match = re.search(r"LLD (\d+)\.", done.stdout)
    return int(match[1]) if match else 0


def _link(linker: list[str], code: bytes) -> bytes:
    with tempfile.TemporaryDirectory(prefix="shardwright-") as directory:
        source, out = Path(directory) / "kernels.o", Path(directory) / "kernels.co"
        source.write_bytes(code)
        command = [*linker, "--no-undefined", "-shared", str(source), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise BuildError(f"{linker[-1]} failed: {done.stderr.strip()[-500:]}")
        return out.read_bytes()


@functools.cache
def _register_shuffle() -> None:
    """`tvm_warp_shuffle_xor`, for which TVM has no rule for AMD GPUs."""

    def lower(call: Any) -> Any:
        _mask, value, lane_mask, _width, _wave = call.args
        lane = _lane()
        moved = tirx.call_llvm_pure_intrin(
            "int32",
            "llvm.amdgcn.ds.bpermute",
            tirx.bitwise_xor(lane, tirx.Cast("int32", lane_mask)) * 4,
            tirx.reinterpret("int32", value),
        )
        return tirx.reinterpret(value.ty.dtype, moved)

    tirx.register_intrin_lowering("tirx.tvm_warp_shuffle_xor", target="rocm", f=lower, level=11)


@functools.cache
def _register_barrier() -> None:
    """`tvm_storage_sync` of shared memory becomes the barrier of `rocm_barrier.ll`."""

    def lower(call: Any) -> Any:
        if call.args[0].value != "shared":
            return call
        return tirx.call_extern("int32", "shardwright_barrier")

    tirx.register_intrin_lowering("tirx.tvm_storage_sync", target="rocm", f=lower, level=11)


def _lane() -> Any:
    """The number of a thread in its wave."""
    low = tirx.call_llvm_pure_intrin(
        "int32", "llvm.amdgcn.mbcnt.lo", tirx.const(-1, "int32"), tirx.const(0, "int32")
    )
    return tirx.call_llvm_pure_intrin("int32", "llvm.amdgcn.mbcnt.hi", tirx.const(-1, "int32"), low)
