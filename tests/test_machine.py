"""Warnings of what makes several GPUs hang, from made-up machines."""

from pathlib import Path

import pytest

from shardwright.runtime import machine


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine without an IOMMU, whose /dev/shm is that of the file system."""
    for folder in ("dev/shm", "sys/class/iommu", "proc"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "proc/cmdline").write_text("BOOT_IMAGE=/vmlinuz ro quiet\n")
    return tmp_path


def test_one_gpu_and_data_centre_gpus_are_left_alone(root: Path) -> None:
    (root / "sys/class/iommu/ivhd0").mkdir()
    assert machine.problems("rocm", ["gfx1100"], {}, root) == []
    assert machine.problems("rocm", ["gfx942"] * 8, {}, root) == []
    assert machine.problems("cuda", ["sm_90"] * 8, {}, root) == []


def test_radeon_cards(root: Path) -> None:
    (found,) = machine.problems("rocm", ["gfx1100"] * 2, {}, root)
    assert "2 Radeon GPUs (gfx1100)" in found and "NCCL_P2P_DISABLE=1" in found
    assert machine.problems("rocm", ["gfx1100"] * 2, {"NCCL_P2P_DISABLE": "1"}, root) == []
    off = {"NCCL_P2P_DISABLE": "1"}
    (found,) = machine.problems("rocm", ["gfx1201"] * 2, off, root)
    assert "NCCL_PROTO=Simple" in found
    assert machine.problems("rocm", ["gfx1201"] * 2, off | {"NCCL_PROTO": "Simple"}, root) == []


@pytest.mark.parametrize("arch", ["gfx1100", "sm_89"])
def test_an_iommu_that_translates(root: Path, arch: str) -> None:
    (root / "sys/class/iommu/ivhd0").mkdir()
    found = machine.problems("cuda", [arch] * 2, {}, root)
    assert any("iommu=pt" in problem for problem in found)
    (root / "proc/cmdline").write_text("ro iommu=pt\n")
    assert not any("iommu" in p for p in machine.problems("cuda", [arch] * 2, {}, root))


def test_little_shared_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SHM_BYTES", 1 << 60)
    (found,) = machine.problems("cuda", ["sm_90"] * 2, {}, root)
    assert found.startswith("/dev/shm has ") and "--shm-size" in found


def test_warnings_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    machine.warn("rocm", ["gfx1201", "gfx1201"])
    assert any("docs/consumer-gpus.md" in record.message for record in caplog.records)
