"""What AMD code must satisfy before it is written: checked on every build.

TVM gives the LLVM IR and the assembly of what it compiled, the code object holds each kernel's
metadata. No tool of ROCm is needed. Sources: LLVM's "User Guide for AMDGPU Backend", AMD's
"Instinct MI200" and "RDNA3" Instruction Set Architecture guides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from shardwright.errors import BuildError
from shardwright.runtime.code_object import CodeObject, Kernel, KernelCode

_REPORT = "please report it as a bug of Shardwright"
_SHARED_TO_GLOBAL = re.compile(r"addrspacecast\s*\(?\s*ptr addrspace\(3\)")
_KERNEL = re.compile(r"^(\w+):\s*(?:;.*)?$")
_LABEL = re.compile(r"^\.L(\w+):")
_INSTRUCTION = re.compile(r"^\s+([a-z]\w+)\s*([^;]*)")
# Instructions of the local data share that only move values between lanes.
_LANES = ("ds_bpermute", "ds_permute", "ds_swizzle")
_WIDE = ("global_load_dwordx4", "global_load_b128")
_MATRIX = ("v_mfma", "v_wmma")


@dataclass(frozen=True)
class Instruction:
    """One line of assembly."""

    name: str
    operands: str


@dataclass(frozen=True)
class Block:
    """Instructions that run one after the other, and the labels of the blocks that may follow."""

    label: str
    code: tuple[Instruction, ...]
    following: tuple[str, ...]


def check(
    arch: str, wave: int, max_threads: int, ir: str, assembly: str, found: CodeObject
) -> list[KernelCode]:
    """Check the code of one architecture and say what is in it.

    Raises BuildError for a pointer into shared memory that became a global one, metadata that is
    not as asked for, registers spilled to memory, and a barrier that does not wait for shared
    memory.
    """
    if _SHARED_TO_GLOBAL.search(ir):
        raise BuildError(
            f"{arch}: a pointer into shared memory is cast to a global one, which would fault; "
            + _REPORT
        )
    if found.arch != arch:
        raise BuildError(f"{arch}: the linker made code for {found.arch}; {_REPORT}")
    functions = dict(read_assembly(assembly))
    codes = []
    for kernel in found.kernels:
        where = f"{arch}, kernel {kernel.name}"
        if kernel.name not in functions:
            raise BuildError(f"{where}: is not in the assembly; {_REPORT}")
        _check_metadata(where, kernel, wave, max_threads)
        blocks = functions[kernel.name]
        if any(i.name.startswith("s_swappc") for block in blocks for i in block.code):
            raise BuildError(f"{where}: calls a function, which is not checked; {_REPORT}")
        unwaited = unwaited_barriers(blocks)
        if unwaited:
            raise BuildError(
                f"{where}: {unwaited} barriers do not wait for shared memory, which is a race; "
                + _REPORT
            )
        codes.append(_describe(arch, kernel, blocks))
    return codes


def _check_metadata(where: str, kernel: Kernel, wave: int, max_threads: int) -> None:
    wanted = {
        "wave size": (kernel.wave, wave),
        "threads of a block": (kernel.max_threads, max_threads),
        "spilled vector registers": (kernel.vgpr_spills, 0),
        "spilled scalar registers": (kernel.sgpr_spills, 0),
    }
    for what, (is_, should) in wanted.items():
        if is_ != should:
            raise BuildError(f"{where}: {what} {is_} instead of {should}; {_REPORT}")
    if kernel.shared_bytes > 65536:
        raise BuildError(
            f"{where}: {kernel.shared_bytes} bytes of shared memory, a block has 65536; {_REPORT}"
        )


def read_assembly(text: str) -> Iterator[tuple[str, list[Block]]]:
    """Name and blocks of each function in LLVM's assembly for AMD GPUs."""
    name, label, code = "", "", []  # type: str, str, list[Instruction]
    blocks: list[Block] = []

    def close(next_label: str) -> None:
        if name:
            blocks.append(Block(label, tuple(code), _following(code, next_label)))

    for line in text.splitlines():
        if match := _KERNEL.match(line):
            name, label, code, blocks = match[1], "", [], []
        elif line.startswith(".Lfunc_end") or line.startswith("\t.section"):
            close("")
            if name:
                yield name, blocks
            name = ""
        elif match := _LABEL.match(line):
            close(match[1])
            label, code = match[1], []
        elif name and (match := _INSTRUCTION.match(line)):
            code.append(Instruction(match[1], match[2].strip()))
            if _target(code[-1]):
                # Blocks end at branches: what follows has a name of its own.
                inner = f"{label}+{len(blocks)}"
                close(inner)
                label, code = inner, []


def _target(instruction: Instruction) -> str:
    """The label that an instruction may jump to."""
    if instruction.name.startswith(("s_branch", "s_cbranch")):
        return instruction.operands.removeprefix(".L")
    return ""


def _following(code: list[Instruction], next_label: str) -> tuple[str, ...]:
    last = code[-1] if code else Instruction("", "")
    if last.name in ("s_endpgm", "s_setpc_b64"):
        return ()
    jump = (_target(last),) if _target(last) else ()
    falls = () if last.name == "s_branch" or not next_label else (next_label,)
    return (*jump, *falls)


def unwaited_barriers(blocks: list[Block]) -> int:
    """Barriers that can be reached with an access to shared memory not waited for."""
    by_label = {block.label: block for block in blocks}
    # Blocks that can begin with an access outstanding.
    pending_in: set[str] = set()
    work = list(blocks)
    while work:
        block = work.pop()
        if _run(block, block.label in pending_in)[0]:
            for label in block.following:
                if label not in pending_in:
                    pending_in.add(label)
                    work.append(by_label[label])
    return sum(_run(block, block.label in pending_in)[1] for block in blocks)


def _run(block: Block, pending: bool) -> tuple[bool, int]:
    """Whether an access is outstanding at the end of a block, and the barriers that met one."""
    met = 0
    for instruction in block.code:
        name = instruction.name
        if name.startswith("ds_") and not name.startswith(_LANES):
            pending = True
        elif name == "s_waitcnt" and "lgkmcnt(0)" in instruction.operands:
            pending = False
        elif name in ("s_wait_dscnt", "s_wait_idle") and instruction.operands in ("0x0", "0", ""):
            pending = False
        elif name in ("s_barrier", "s_barrier_signal"):
            met += pending
    return pending, met


def _describe(arch: str, kernel: Kernel, blocks: list[Block]) -> KernelCode:
    names = Counter(i.name for block in blocks for i in block.code)

    def count(*prefixes: str) -> int:
        return sum(n for name, n in names.items() if name.startswith(prefixes))

    return KernelCode(
        arch=arch,
        name=kernel.name,
        instructions=sum(names.values()),
        wide_loads=count(*_WIDE),
        loads=count("global_load", "flat_load", "buffer_load"),
        stores=count("global_store", "flat_store", "buffer_store"),
        shared=count("ds_") - count(*_LANES),
        matrix=count(*_MATRIX),
        barriers=count("s_barrier"),
    )
