"""AMD targets, the linker, and what comes out, without an AMD GPU."""

from pathlib import Path

import pytest
import tvm

from shardwright.compiler import rocm
from shardwright.compiler.build import BuildOptions, targets_of
from shardwright.compiler.kernels import gemv_rocm, norm
from shardwright.errors import ArtifactError, BuildError, UsageError
from shardwright.runtime.code_object import CodeObject, code_objects

ARCHS = ("gfx1100", "gfx90a", "gfx942")


def compiled(func, arch: str, abi: int = 5):
    """A library of one kernel, called `main`."""
    rocm.install_hooks(abi)
    target = rocm.rocm_target(arch)
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    with tvm.transform.PassContext(config=rocm.PASS_CONFIG), rocm.without_device_warnings():
        return tvm.compile(mod, target=target)


def code_object(func, arch: str, tmp_path: Path, abi: int = 5) -> CodeObject:
    """The code object of a kernel, read from a library."""
    path = tmp_path / "kernel.so"
    compiled(func, arch, abi).export_library(str(path))
    (found,) = code_objects(path)
    return found


def assembly(func, arch: str) -> str:
    pending = [compiled(func, arch).mod]
    while pending:
        module = pending.pop()
        if module.kind == "hip":
            return module.inspect_source("asm")
        pending.extend(module.imports)
    raise AssertionError("no AMD module")


def add_norm(arch: str):
    target = f"rocm:{arch}"
    return norm.add_rms_norm(tokens=None, features=512, eps=1e-5, dtype="float16", target=target)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("abi", rocm.ABIS)
def test_a_kernel_is_for_its_architecture(arch: str, abi: int, tmp_path: Path) -> None:
    found = code_object(add_norm(arch), arch, tmp_path, abi)
    (kernel,) = found.kernels
    assert (found.arch, found.version) == (arch, abi)
    assert kernel.wave == (32 if arch == "gfx1100" else 64)
    assert kernel.max_threads == rocm.MAX_THREADS
    assert kernel.shared_bytes > 0 and kernel.vgpr_spills == 0
    # Five tensors and the number of tokens.
    assert [kind for *_, kind in kernel.args].count("global_buffer") == 5
    assert kernel.kernarg_bytes >= 48


def test_a_damaged_code_object_is_refused(tmp_path: Path) -> None:
    data = code_object(add_norm("gfx1100"), "gfx1100", tmp_path).data
    path = tmp_path / "damaged.so"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match=r"damaged.*build the model again"):
        code_objects(path)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("q4", [False, True])
def test_products_read_16_bytes_at_a_time(arch: str, q4: bool) -> None:
    sizes = dict(batch=2, out_features=512, in_features=1024, out_dtype="float16")
    target = f"rocm:{arch}"
    if q4:
        func = gemv_rocm.q4_gemv(**sizes, group=32, target=target)
    else:
        func = gemv_rocm.gemv(**sizes, target=target)
    text = assembly(func, arch)
    assert ("global_load_b128" if arch == "gfx1100" else "global_load_dwordx4") in text
    assert "v_dot2" in text


def test_products_refuse_what_they_cannot_read_in_16_bytes() -> None:
    sizes = dict(batch=1, out_features=4, out_dtype="float16", target="rocm:gfx1100")
    with pytest.raises(UsageError, match="multiple of 8"):
        gemv_rocm.gemv(in_features=12, **sizes)
    with pytest.raises(UsageError, match="multiple of 32"):
        gemv_rocm.q4_gemv(in_features=64, group=16, **sizes)


@pytest.mark.parametrize("batch", range(1, 9))
@pytest.mark.parametrize("wave", [32, 64])
def test_product_plans(batch: int, wave: int) -> None:
    waves = gemv_rocm.THREADS // wave
    for out_features in (1, 7, 1280, 4096, 128256):
        for units in (1, 3, 64, 128, 512, 896, 3584):
            p = gemv_rocm.plan(batch=batch, out_features=out_features, units=units, wave=wave)
            assert p.split <= waves
            assert p.split == 1 or p.split * p.unroll * wave <= units
            # The waves that share rows write one sum a thread.
            assert p.split == 1 or p.rows * batch <= p.split * wave


@pytest.mark.parametrize("archs", [("gfx9999",), ("sm_90a",), ("gfx1100", "gfx7")])
def test_unknown_architectures_are_refused(archs: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=f"--arch {archs[-1]}: .*choose from.*gfx1100.*rocminfo"):
        targets_of(BuildOptions("m", Path("x"), target="rocm", archs=archs))


def test_rocm_needs_an_architecture_and_a_known_abi() -> None:
    with pytest.raises(UsageError, match="--target rocm needs --arch"):
        targets_of(BuildOptions("m", Path("x"), target="rocm"))
    with pytest.raises(UsageError, match="--rocm-abi 4: must be one of 5, 6"):
        targets_of(BuildOptions("m", Path("x"), target="rocm", archs=("gfx1100",), rocm_abi=4))


@pytest.mark.parametrize("old", [False, True])
def test_a_linker_that_is_missing_or_too_old(
    old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(rocm, "ROCM_LLD", str(tmp_path / "none"))
    monkeypatch.setattr(rocm.importlib.util, "find_spec", lambda name: None)
    if old:
        linker = tmp_path / "ld.lld"
        linker.write_text("#!/bin/sh\necho 'Debian LLD 14.0.6 (compatible with GNU linkers)'\n")
        linker.chmod(0o755)
    with pytest.raises(BuildError, match="pip install 'shardwright\\[rocm\\]'") as caught:
        rocm.find_linker()
    assert ("is LLD 14, too old" if old else "there is none") in str(caught.value)
