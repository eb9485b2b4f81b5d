"""AMD targets, the linker, and what comes out, without an AMD GPU."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm
from amd.emulator import Device
from tvm.script import tirx as T

from shardwright.compiler import rocm, rocm_check
from shardwright.compiler.kernels import gemv_rocm, matmul_rocm, norm
from shardwright.compiler.kernels.common import SCHEDULED
from shardwright.compiler.options import BuildOptions, targets_of
from shardwright.errors import ArtifactError, BuildError, UsageError
from shardwright.runtime.code_object import CodeObject, Kernel, code_objects, occupancy

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


@pytest.mark.parametrize("arch", ARCHS)
def test_a_barrier_waits_for_shared_memory(arch: str) -> None:
    blocks = dict(rocm_check.read_assembly(assembly(add_norm(arch), arch)))["main_kernel"]
    names = [i.name for block in blocks for i in block.code]
    assert "s_barrier" in names and any(n.startswith(("ds_write", "ds_store")) for n in names)
    assert rocm_check.unwaited_barriers(blocks) == 0


def test_tvms_own_barrier_is_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare = tmp_path / "bare.ll"
    text = (Path(rocm.__file__).parent / rocm.BARRIER).read_text()
    bare.write_text("".join(x for x in text.splitlines(True) if "fence" not in x))
    monkeypatch.setattr(rocm, "BARRIER", bare)
    blocks = dict(rocm_check.read_assembly(assembly(add_norm("gfx90a"), "gfx90a")))["main_kernel"]
    assert rocm_check.unwaited_barriers(blocks) == 1


def code(text: str) -> list[rocm_check.Block]:
    body = "".join(
        f"{line}\n" if line.startswith(".") else f"\t{line}\n" for line in text.split(";")
    )
    return dict(rocm_check.read_assembly(f"k:\n{body}.Lfunc_end0:\n"))["k"]


@pytest.mark.parametrize(
    ("text", "unwaited"),
    [
        ("ds_write_b32 v0, v1;s_waitcnt lgkmcnt(0);s_barrier;s_endpgm", 0),
        ("ds_write_b32 v0, v1;s_waitcnt vmcnt(0);s_barrier;s_endpgm", 1),
        ("ds_write_b32 v0, v1;s_waitcnt lgkmcnt(1);s_barrier;s_endpgm", 1),
        ("ds_bpermute_b32 v0, v1, v2;s_barrier;s_endpgm", 0),
        # Outstanding along one of two ways only.
        (
            "s_cbranch_execz .LBB0_1;ds_write_b32 v0, v1;.LBB0_1:;s_barrier;s_endpgm",
            1,
        ),
        # Around a loop: the access comes after the barrier.
        (
            ".LBB0_1:;s_barrier;ds_read_b32 v0, v1;s_cbranch_scc1 .LBB0_1;s_endpgm",
            1,
        ),
        (
            ".LBB0_1:;s_barrier;ds_read_b32 v0, v1;s_waitcnt lgkmcnt(0);"
            "s_cbranch_scc1 .LBB0_1;s_endpgm",
            0,
        ),
        # gfx12 has other names for both.
        ("ds_store_b32 v0, v1;s_wait_dscnt 0x0;s_barrier_signal -1;s_endpgm", 0),
        ("ds_store_b32 v0, v1;s_barrier_signal -1;s_endpgm", 1),
    ],
)
def test_unwaited_barriers(text: str, unwaited: int) -> None:
    assert rocm_check.unwaited_barriers(code(text)) == unwaited


@T.prim_func(s_tir=True)
def two_buffers(x_h: T.handle, out_h: T.handle):
    T.func_attr(SCHEDULED)
    x = T.match_buffer(x_h, (64,), "float32")
    out = T.match_buffer(out_h, (64,), "float32")
    with T.sblock("root"):
        T.reads()
        T.writes()
        for _ in T.thread_binding(1, thread="blockIdx.x"):
            for tid in T.thread_binding(64, thread="threadIdx.x"):
                # One after the other, so that storage rewrite gives them the same place.
                a = T.alloc_buffer((64,), "float32", scope="shared")
                b = T.alloc_buffer((64,), "int32", scope="shared")
                kept = T.alloc_buffer((1,), "float32", scope="local")
                a[tid] = x[tid]
                T.tvm_storage_sync("shared")
                kept[0] = a[63 - tid]
                T.tvm_storage_sync("shared")
                b[tid] = T.cast(kept[0], "int32")
                T.tvm_storage_sync("shared")
                out[tid] = T.cast(b[tid // 2], "float32")


def test_a_pointer_into_shared_memory_that_becomes_global_is_caught(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    good = compiled(two_buffers, "gfx90a")
    found = [code_object(two_buffers, "gfx90a", tmp_path)]
    assert [k.name for k in rocm.check_modules(good.mod, found)] == ["main_kernel"]
    monkeypatch.setattr(rocm, "PASS_CONFIG", {})
    with pytest.raises(BuildError, match="cast to a global one"):
        rocm.check_modules(compiled(two_buffers, "gfx90a").mod, found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wave": 32}, "wave size 32 instead of 64"),
        ({"vgpr_spills": 3}, "spilled vector registers 3 instead of 0"),
        ({"max_threads": 1024}, "threads of a block 1024 instead of 256"),
        ({"shared_bytes": 70000}, "70000 bytes of shared memory"),
    ],
)
def test_metadata_that_is_not_as_asked_for_is_caught(
    change: dict[str, int], message: str, tmp_path: Path
) -> None:
    func = add_norm("gfx90a")
    found = code_object(func, "gfx90a", tmp_path)
    wrong = replace(found, kernels=(replace(found.kernels[0], **change),))
    text = assembly(func, "gfx90a")
    with pytest.raises(BuildError, match=message):
        rocm_check.check("gfx90a", 64, rocm.MAX_THREADS, "", text, wrong)
    with pytest.raises(BuildError, match="the linker made code for gfx90a"):
        rocm_check.check("gfx942", 64, rocm.MAX_THREADS, "", text, found)


def test_occupancy() -> None:
    kernel = Kernel("k", 32, 256, 0, 0, 0, 64, 0, 20, 0, 0, ())
    assert occupancy("gfx1100", kernel) == 16
    assert occupancy("gfx1102", replace(kernel, vgprs=100)) == 9
    assert occupancy("gfx1100", replace(kernel, vgprs=256)) == 5
    wide = replace(kernel, wave=64, vgprs=128)
    assert occupancy("gfx90a", wide) == 4
    # Two blocks of four waves on four units.
    assert occupancy("gfx90a", replace(wide, shared_bytes=32768)) == 2


def test_a_kernel_with_too_many_threads_is_refused() -> None:
    func = norm.add_rms_norm(tokens=None, features=8192, eps=1e-5, dtype="float16", target="cuda")
    assert rocm.block_threads(func) == 1024
    assert rocm.block_threads(add_norm("gfx1100")) == 64
    mod = tvm.IRModule({"main": func})
    with pytest.raises(BuildError, match="main has blocks of 1024 threads"):
        rocm.for_arch(mod, rocm.rocm_target("gfx1100"), "gfx1100")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("tokens", "features", "inner", "out_dtype"),
    [(70, 200, 72, "float16"), (3, 16, 8, "float32"), (64, 128, 96, "float32")],
)
def test_products_on_matrix_cores(
    arch: str, tokens: int, features: int, inner: int, out_dtype: str, tmp_path: Path
) -> None:
    sizes = dict(out_features=features, in_features=inner, out_dtype=out_dtype)
    func = matmul_rocm.matmul_rocm(tokens=None, **sizes, target=f"rocm:{arch}")
    text = assembly(func, arch)
    assert ("v_wmma_f32_16x16x16_f16" if arch == "gfx1100" else "v_mfma_f32_16x16x16") in text
    rng = np.random.default_rng(tokens)
    x, w = (rng.standard_normal((rows, inner)).astype("float16") for rows in (tokens, features))
    out = np.full((tokens, features), np.nan, out_dtype)
    grid = (-(-features // matmul_rocm.COLUMNS), -(-tokens // matmul_rocm.ROWS))
    device = Device(arch, code_object(func, arch, tmp_path).data)
    device.launch("main_kernel", grid, (matmul_rocm.THREADS,), out, w, x, np.int64(tokens))
    wanted = x.astype("float64") @ w.astype("float64").T
    tolerance = 1e-5 if out_dtype == "float32" else 1e-2
    np.testing.assert_allclose(out, wanted, rtol=1e-3, atol=tolerance)


def test_matrix_cores_are_those_of_the_architecture() -> None:
    sizes = dict(out_features=32, in_features=64, dtype="float16")
    assert matmul_rocm.supported(**sizes, target="rocm:gfx1102")
    assert not matmul_rocm.supported(**sizes, target="rocm:gfx1030")
    for change in ({"in_features": 12}, {"dtype": "float32"}, {"out_features": 8}):
        assert not matmul_rocm.supported(**{**sizes, **change}, target="rocm:gfx942")


def test_functions_for_the_host_stay_there() -> None:
    target = rocm.rocm_target("gfx1100")
    host = add_norm("gfx1100").with_attr(rocm.HOST, True)
    mod = rocm.for_arch(tvm.IRModule({"f": host, "k": add_norm("gfx1100")}), target, "gfx1100")
    assert "target" not in mod["f_gfx1100"].attrs
    assert mod["k_gfx1100"].attrs["target"].kind.name == "rocm"
