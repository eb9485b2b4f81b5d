"""What is known to make several GPUs hang or crawl, looked for before they are used.

Sources: NVIDIA's NCCL documentation ("Troubleshooting" and "Environment Variables"), AMD's ROCm
documentation on multi-GPU systems, and reports of users of several consumer cards.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

_log = logging.getLogger("shardwright")

_PCIE = ("sm_86", "sm_89", "sm_120")
"""NVIDIA's architectures whose cards, as a rule, are linked by PCIe."""

SHM_BYTES = 64 << 20
"""Shared memory that NCCL and RCCL want for the ranks of one machine."""


def warn(kind: str, archs: Sequence[str]) -> None:
    """Warn of what `problems` finds, each with its remedy."""
    for problem in problems(kind, archs, os.environ, Path("/")):
        _log.warning("%s", problem)


def problems(
    kind: str, archs: Sequence[str], environment: Mapping[str, str], root: Path
) -> list[str]:
    """What may make the GPUs of `archs`, one for each rank, hang or crawl together.

    Args:
        kind: "cuda" or "rocm".
        archs: of each rank's GPU, such as "gfx1100" or "sm_89".
        environment: variables of the process.
        root: where /proc, /sys and /dev are.
    """
    if len(archs) < 2:
        return []
    found = []
    library = "RCCL" if kind == "rocm" else "NCCL"
    shared = _shared_memory(root)
    if shared is not None and shared < SHM_BYTES:
        found.append(
            f"/dev/shm has {shared >> 20} MiB, {library} may need more between {len(archs)} GPUs; "
            "in a container give it --shm-size=1g"
        )
    radeon = [arch for arch in archs if arch.startswith("gfx1")]
    pcie = radeon or [arch for arch in archs if arch in _PCIE]
    direct = environment.get("NCCL_P2P_DISABLE") != "1"
    if radeon and direct:
        found.append(
            f"{len(radeon)} Radeon GPUs ({radeon[0]}): where they cannot reach each other over "
            "PCIe, loading hangs; if it does, set NCCL_P2P_DISABLE=1 (docs/consumer-gpus.md)"
        )
    if any(arch.startswith("gfx120") for arch in archs) and not environment.get("NCCL_PROTO"):
        found.append(
            "gfx1200 and gfx1201 were seen to hang with RCCL's low-latency protocols; "
            "set NCCL_PROTO=Simple (docs/consumer-gpus.md)"
        )
    if pcie and direct and _iommu_translates(root):
        found.append(
            "the IOMMU translates every access between GPUs, which can make them hang or crawl; "
            "boot with iommu=pt, or set NCCL_P2P_DISABLE=1 (docs/consumer-gpus.md)"
        )
    return found


def _shared_memory(root: Path) -> int | None:
    """Bytes of /dev/shm, None if there is none."""
    try:
        info = os.statvfs(root / "dev/shm")
    except OSError:
        return None
    return info.f_frsize * info.f_blocks


def _iommu_translates(root: Path) -> bool:
    """Whether an IOMMU is on and was not told to let devices pass."""
    try:
        if not any((root / "sys/class/iommu").iterdir()):
            return False
        options = (root / "proc/cmdline").read_text().split()
    except OSError:
        return False
    return not {"iommu=pt", "iommu=off", "intel_iommu=off", "amd_iommu=off"} & set(options)
