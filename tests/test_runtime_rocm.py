"""Running on AMD GPUs, as far as it goes without one: a stub stands in for the HIP library."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardwright.errors import DeviceError
from shardwright.runtime import hip
from shardwright.runtime.nccl import NcclCollectives

STUB = Path(__file__).with_name("stub_hip.cc")


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stub as libamdhip64.so.7, and one that lacks a function as .6."""
    folder = tmp_path_factory.mktemp("stub")
    for version, options in (("7", []), ("6", ["-DSTUB_WITHOUT_LAUNCH"])):
        out = folder / f"libamdhip64.so.{version}"
        subprocess.run(["g++", "-shared", "-fPIC", *options, "-o", out, STUB], check=True)
    return folder


def run(code: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process that finds HIP in `folder`: TVM's device API can be set only once."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "STUB_HIP_ARCH": "gfx90a"}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment | variables,
    )


LAUNCH = """
import ctypes, numpy, sys
import tvm
from shardwright.compiler import rocm
from shardwright.compiler.kernels import norm
from shardwright.runtime import tvm_runtime

rocm.install_hooks(5)
func = norm.add_rms_norm(tokens=None, features=512, eps=1e-5, dtype="float16", target="rocm:gfx90a")
mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
with tvm.transform.PassContext(config=rocm.PASS_CONFIG), rocm.without_device_warnings():
    tvm.compile(mod, target=rocm.rocm_target("gfx90a")).export_library(LIBRARY)

tvm_runtime.load("rocm")
device = tvm.rocm(0)
assert device.exist
values = numpy.arange(3 * 512).reshape(3, 512).astype("float16")
x = tvm.runtime.tensor(values, device)
assert (x.numpy() == values).all()
others = [tvm.runtime.empty(s, "float16", device) for s in ((3, 512), (512,), (3, 512), (3, 512))]
tvm.runtime.load_module(LIBRARY)["main"](x, *others)
stub = ctypes.CDLL("libamdhip64.so.7")
for name in ("stub_grid", "stub_block"):
    print(*(ctypes.c_uint * 3).in_dll(stub, name))
print((ctypes.c_char * 128).in_dll(stub, "stub_kernel").value.decode())
size = ctypes.c_size_t.in_dll(stub, "stub_size").value
*pointers, tokens = (ctypes.c_uint64 * (size // 8)).in_dll(stub, "stub_arguments")
print(sorted(pointers) == sorted(t.data_ptr() for t in (x, *others)), tokens)
"""


def test_a_launch_has_the_kernel_s_arguments(stub: Path, tmp_path: Path) -> None:
    done = run(LAUNCH.replace("LIBRARY", repr(str(tmp_path / "kernel.so"))), stub)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["3 1 1", "64 1 1", "main_kernel", "True 3"]


CHECK = """
from types import SimpleNamespace
from shardwright.runtime import device
manifest = SimpleNamespace(
    name="m", mesh=SimpleNamespace(size={world}),
    target=SimpleNamespace(kind="rocm", archs={archs}),
)
try:
    device.check_devices(manifest)
    print("fits")
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("world", "archs", "message"),
    [
        (2, ("gfx1100", "gfx90a"), "fits"),
        (2, ("gfx1100",), "m holds code for gfx1100, and GPU 0 is gfx90a; build it again with"),
        (3, ("gfx90a",), "m was built for 3 GPUs and this machine has 2; build it again with"),
    ],
)
def test_devices_are_checked(stub: Path, world: int, archs: tuple[str, ...], message: str) -> None:
    done = run(CHECK.format(world=world, archs=archs), stub)
    assert message in done.stdout, done.stderr
    assert message == "fits" or done.stdout.startswith("DeviceError ")


def test_without_hip_one_error_names_the_remedy(tmp_path: Path) -> None:
    done = run(CHECK.format(world=1, archs=("gfx90a",)), tmp_path, ROCM_PATH=str(tmp_path))
    assert done.stdout.startswith("DeviceError the HIP runtime cannot be loaded"), done.stderr
    assert "install ROCm" in done.stdout and done.stdout.count("\n") == 1


def test_a_hip_without_a_needed_function(stub: Path, tmp_path: Path) -> None:
    (tmp_path / "libamdhip64.so.6").symlink_to(stub / "libamdhip64.so.6")
    code = "from shardwright.runtime import tvm_runtime\ntvm_runtime.load('rocm')"
    done = run(code, tmp_path, ROCM_PATH=str(tmp_path))
    last = done.stderr.strip().splitlines()[-1]
    assert "DeviceError" in last and "has no function hipModuleLaunchKernel" in last
    assert "install ROCm 5.5 or later" in last


def test_an_rccl_without_a_needed_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "rccl.cc"
    source.write_text('extern "C" int ncclGetUniqueId(void*) { return 0; }\n')
    library = tmp_path / "librccl.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-o", library, source], check=True)
    rccl = ctypes.CDLL(str(library))
    monkeypatch.setattr(hip.RcclCollectives, "_open", lambda self: (rccl, None))
    assert issubclass(hip.RcclCollectives, NcclCollectives)
    with pytest.raises(DeviceError, match=r"librccl.so has no function ncclCommInitRank.*ROCm 5.5"):
        hip.RcclCollectives(tmp_path, 0, 2, None, lambda: False)
