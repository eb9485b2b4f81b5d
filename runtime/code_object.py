"""AMD code objects inside a built library: finding them, and what their metadata says.

Format: LLVM's "User Guide for AMDGPU Backend", sections on ELF code objects and on the metadata of
code object V3 and later: a note of type NT_AMDGPU_METADATA holds a MessagePack map.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shardwright.errors import ArtifactError
from shardwright.runtime.artifact import KERNELS

_EM_AMDGPU = 224
_ELFOSABI_AMDGPU_HSA = 64
_SHT_NOTE = 7
_NT_AMDGPU_METADATA = 32
# 64-bit little-endian ELF for HSA; the version byte of the ABI comes next.
_MAGIC = bytes((0x7F, *b"ELF", 2, 1, 1, _ELFOSABI_AMDGPU_HSA))
_MACHINES = {
    **{0x30: "gfx908", 0x3F: "gfx90a", 0x4C: "gfx942", 0x4F: "gfx950"},
    **{0x36: "gfx1030", 0x37: "gfx1031", 0x38: "gfx1032"},
    **{0x41: "gfx1100", 0x46: "gfx1101", 0x47: "gfx1102", 0x44: "gfx1103"},
    **{0x48: "gfx1200", 0x4E: "gfx1201"},
}
_ABI_VERSIONS = {1: 3, 2: 4, 3: 5, 4: 6}


@dataclass(frozen=True)
class Kernel:
    """What the metadata says of a kernel; sizes in bytes, registers per lane or wave."""

    name: str
    wave: int
    max_threads: int
    shared_bytes: int
    private_bytes: int
    kernarg_bytes: int
    vgprs: int
    agprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    args: tuple[tuple[int, int, str], ...]
    """Offset and size in bytes, and kind ("global_buffer", "by_value", hidden ones) of each."""


@dataclass(frozen=True)
class CodeObject:
    """One ELF file for one architecture, such as "gfx1100"."""

    arch: str
    version: int
    """Of the code object: 5 or 6."""
    kernels: tuple[Kernel, ...]
    data: bytes


@dataclass(frozen=True)
class KernelCode:
    """What the build counted in a kernel's instructions."""

    arch: str
    name: str
    instructions: int
    wide_loads: int
    """Loads of 16 bytes from global memory."""
    loads: int
    """All loads from global memory."""
    stores: int
    shared: int
    """Accesses to the local data share."""
    matrix: int
    """Matrix instructions: MFMA or WMMA."""
    barriers: int


def write_kernels(directory: Path, codes: Iterable[KernelCode]) -> None:
    """Write `kernels.json`, one kernel a line."""
    lines = ",\n".join(" " + json.dumps(asdict(code)) for code in codes)
    (directory / KERNELS).write_text(f"[\n{lines}\n]\n")


def read_kernels(directory: Path) -> list[KernelCode]:
    """Read `kernels.json`; ArtifactError if it is missing or damaged."""
    path = directory / KERNELS
    try:
        return [KernelCode(**entry) for entry in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: missing or damaged ({error}); build it again") from None


def occupancy(arch: str, kernel: Kernel) -> int:
    """Waves of a kernel that a SIMD unit can hold, as its registers and shared memory allow.

    Blocks are taken to have `kernel.max_threads` threads. Register files, waves and shared memory
    are those of LLVM's GCNSubtarget and AMD's ISA guides: 512 registers a lane and 8 waves on
    CDNA 2 and 3, 1024 and 16 on RDNA 2 and RDNA 3, and 1536 on gfx1100 and gfx1101.
    """
    if arch.startswith("gfx9"):
        unified = arch != "gfx908"
        registers, unit, most, simds = (512 if unified else 256), (8 if unified else 4), None, 4
        most = 8 if unified else 10
    else:
        large = arch in ("gfx1100", "gfx1101")
        registers, unit, simds = (1536 if large else 1024), (24 if large else 16), 2
        most = 16
        if arch.startswith("gfx103"):
            unit = 8
    by_registers = registers // (-(-max(kernel.vgprs, 1) // unit) * unit)
    waves = -(-kernel.max_threads // kernel.wave)
    by_shared = most
    if kernel.shared_bytes:
        by_shared = max(65536 // kernel.shared_bytes * waves // simds, 1)
    return min(most, by_registers, by_shared)


def code_objects(library: str | os.PathLike[str]) -> list[CodeObject]:
    """The AMD code objects inside a library, in order; none in one for another target.

    Raises ArtifactError if one is damaged.
    """
    path = Path(library)
    found = []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(_MAGIC)
        while start >= 0:
            if struct.unpack_from("<H", data, start + 18)[0] == _EM_AMDGPU:
                try:
                    found.append(read_code_object(data[start : start + _elf_size(data, start)]))
                except (struct.error, ValueError, KeyError) as error:
                    raise ArtifactError(
                        f"{path}: an AMD code object in it is damaged ({error}); "
                        "build the model again"
                    ) from None
            start = data.find(_MAGIC, start + 1)
    return found


def read_code_object(data: bytes) -> CodeObject:
    """Read an ELF code object; ValueError, KeyError or struct.error if it is damaged."""
    machine = struct.unpack_from("<I", data, 48)[0] & 0xFF
    metadata = _metadata(data)
    kernels = tuple(map(_kernel, metadata["amdhsa.kernels"]))
    arch = _MACHINES.get(machine, f"0x{machine:02x}")
    return CodeObject(arch, _ABI_VERSIONS.get(data[8], 0), kernels, data)


def _sections(data: bytes) -> list[tuple[int, int, int]]:
    """Type, offset and size of each section."""
    offset = struct.unpack_from("<Q", data, 40)[0]
    entry, count = struct.unpack_from("<HH", data, 58)
    out = []
    for i in range(count):
        kind = struct.unpack_from("<I", data, offset + i * entry + 4)[0]
        at, size = struct.unpack_from("<QQ", data, offset + i * entry + 24)
        out.append((kind, at, size))
    return out


def _elf_size(data: mmap.mmap, start: int) -> int:
    """Bytes of the ELF file at `start`: its table of sections is its end."""
    offset = struct.unpack_from("<Q", data, start + 40)[0]
    entry, count = struct.unpack_from("<HH", data, start + 58)
    size = int(offset + entry * count)
    if start + size > len(data):
        raise ValueError("truncated")
    return size


def _metadata(data: bytes) -> dict[str, Any]:
    import msgpack

    for kind, at, size in _sections(data):
        end = at + size
        while kind == _SHT_NOTE and at < end:
            name_size, desc_size, note = struct.unpack_from("<III", data, at)
            desc = at + 12 + -(-name_size // 4) * 4
            if note == _NT_AMDGPU_METADATA and data[at + 12 : at + 18] == b"AMDGPU":
                metadata: dict[str, Any] = msgpack.unpackb(data[desc : desc + desc_size])
                return metadata
            at = desc + -(-desc_size // 4) * 4
    raise ValueError("no metadata")


def _kernel(entry: dict[str, Any]) -> Kernel:
    return Kernel(
        name=entry[".name"],
        wave=entry[".wavefront_size"],
        max_threads=entry[".max_flat_workgroup_size"],
        shared_bytes=entry[".group_segment_fixed_size"],
        private_bytes=entry[".private_segment_fixed_size"],
        kernarg_bytes=entry[".kernarg_segment_size"],
        vgprs=entry[".vgpr_count"],
        agprs=entry.get(".agpr_count", 0),
        sgprs=entry[".sgpr_count"],
        vgpr_spills=entry.get(".vgpr_spill_count", 0),
        sgpr_spills=entry.get(".sgpr_spill_count", 0),
        args=tuple((a[".offset"], a[".size"], a[".value_kind"]) for a in entry.get(".args", ())),
    )
