import multiprocessing
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from tvm.runtime import tensor

from shardwright.errors import BuildError, DeviceError, WorkerError
from shardwright.runtime import collectives, native, tvm_runtime
from shardwright.runtime.collectives import (
    SLOT_BYTES,
    AbortedError,
    HostCollectives,
    activate,
    create_segment,
)

# One element; less than a slot; several slots and a rest.
SIZES = [1, 1000, SLOT_BYTES + 333]


def _input(rank: int, size: int, dtype: str) -> np.ndarray:
    rng = np.random.default_rng([rank, size])
    if dtype == "int32":
        return rng.integers(-(1 << 30), 1 << 30, size).astype(np.int32)
    return rng.normal(0, 3, size).astype(dtype)


def _rank(segment: Path, rank: int, world: int, results) -> None:
    found = {}
    group = HostCollectives(segment, rank, world)
    for dtype in ("float32", "float16", "int32"):
        for size in SIZES:
            x = tensor(_input(rank, size, dtype))
            out = tensor(np.zeros(size, dtype))
            gathered = tensor(np.zeros(world * size, dtype))
            group.all_reduce(x, out)
            group.all_gather(x, gathered)
            group.all_reduce(x, x)  # in place
            found[dtype, size] = out.numpy(), gathered.numpy(), x.numpy()
            group.barrier()
    group.close()
    results.put((rank, found))


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_host_collectives(world):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    segment = create_segment(world)
    arguments = [(segment, rank, world, results) for rank in range(world)]
    processes = [context.Process(target=_rank, args=a, daemon=True) for a in arguments]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    segment.unlink()
    for dtype in ("float32", "float16", "int32"):
        for size in SIZES:
            inputs = [_input(rank, size, dtype) for rank in range(world)]
            total = inputs[0].astype(np.float32 if dtype == "float16" else dtype)
            for x in inputs[1:]:
                total = total + x  # in rank order, in float32 or wrapping
            for rank in range(world):
                reduced, gathered, in_place = found[rank][dtype, size]
                # Bitwise, on every rank.
                np.testing.assert_array_equal(reduced, total.astype(dtype))
                np.testing.assert_array_equal(in_place, total.astype(dtype))
                np.testing.assert_array_equal(gathered, np.concatenate(inputs))


def test_half_precision_values():
    """Every half-precision number survives a sum over one rank; sums round to nearest even."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    segment = create_segment(1)
    group = HostCollectives(segment, 0, 1)
    x = tensor(every)
    group.all_reduce(x, x)
    np.testing.assert_array_equal(x.numpy(), every)
    group.close()
    segment.unlink()


def _reduce_after(segment: Path, rank: int, delay: float, pipe) -> None:
    group = HostCollectives(segment, rank, 2)
    time.sleep(delay)
    x = tensor(np.ones(4, np.float32))
    try:
        group.all_reduce(x, x)
        pipe.send("done")
    except AbortedError as error:
        pipe.send(str(error))


def test_abort_from_another_process():
    context = multiprocessing.get_context("fork")
    segment = create_segment(2)
    ours, theirs = context.Pipe()
    process = context.Process(target=_reduce_after, args=(segment, 1, 0.0, theirs), daemon=True)
    process.start()
    assert not ours.poll(0.5)  # it waits for rank 0
    group = HostCollectives(segment, 0, 2)
    began = time.monotonic()
    group.abort()
    assert ours.poll(5)
    assert time.monotonic() - began < 1
    assert "another rank failed" in ours.recv()
    with pytest.raises(AbortedError):
        group.barrier()
    process.join()
    group.close()
    segment.unlink()


def test_unsupported_dtype():
    segment = create_segment(1)
    group = HostCollectives(segment, 0, 1)
    with pytest.raises(WorkerError, match="no dtype int64"):
        group.all_reduce(tensor(np.ones(2, np.int64)), tensor(np.ones(2, np.int64)))
    group.close()
    segment.unlink()


def test_packed_functions_use_the_active_collectives():
    import tvm_ffi

    collectives.install()
    collectives.install()
    segment = create_segment(1)
    group = HostCollectives(segment, 0, 1)
    all_reduce = tvm_ffi.get_global_func("shardwright.all_reduce")
    x, out = tensor(np.arange(3, dtype=np.float32)), tensor(np.zeros(3, np.float32))
    with activate(group):
        all_reduce(x, out)
    np.testing.assert_array_equal(out.numpy(), [0, 1, 2])
    with pytest.raises(Exception, match="for one rank called a collective"):
        all_reduce(x, out)
    group.close()
    segment.unlink()


def test_no_room_for_shared_memory(monkeypatch):
    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    before = sorted(Path("/dev/shm").iterdir())
    with pytest.raises(DeviceError, match="--shm-size"):
        create_segment(2)
    assert sorted(Path("/dev/shm").iterdir()) == before


def test_native_library_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "answer.cc"
    source.write_text('extern "C" int answer() { return 42; }\n')
    context = multiprocessing.get_context("fork")
    racing = [context.Process(target=native.load_native, args=(source,)) for _ in range(4)]
    for process in racing:
        process.start()
    for process in racing:
        process.join()
        assert process.exitcode == 0
    assert len(list((tmp_path / "cache").rglob("*"))) == 2  # the directory and one library
    monkeypatch.setattr(subprocess, "run", None)
    assert native.load_native(source).answer() == 42


def test_native_library_without_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    source = tmp_path / "a.cc"
    source.write_text("int a;\n")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler.*install g\+\+"):
        native.load_native(source)


def test_native_source_that_does_not_compile(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "a.cc"
    source.write_text("nonsense\n")
    with pytest.raises(BuildError, match=r"a\.cc does not compile"):
        native.load_native(source)
    assert [path.name for path in (tmp_path / "cache").rglob("*")] == ["shardwright"]


def test_missing_cuda_library(monkeypatch):
    monkeypatch.setattr(tvm_runtime, "_pip_candidates", lambda name: [])
    monkeypatch.setitem(tvm_runtime._PACKAGES, "libnone.so.2", "nvidia-none")
    with pytest.raises(DeviceError, match="pip install nvidia-none"):
        tvm_runtime.load_cuda_library("libnone.so.2")
