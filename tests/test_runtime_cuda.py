"""The CUDA and NCCL bindings against stand-ins for their libraries. Real GPUs: scripts/."""

import contextlib
import ctypes
import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest
import tvm_ffi
from fake_artifact import LENGTH, expected_tokens
from tvm.runtime import tensor

from shardwright.errors import WorkerError
from shardwright.runtime import cuda_device, nccl
from shardwright.runtime.collectives import AbortedError
from shardwright.runtime.cuda_device import CudaDevice
from shardwright.runtime.native import load_native
from shardwright.runtime.sampling import SamplingParams
from shardwright.runtime.session import Session

CUDART = """
#include <cstdlib>
#include <cstring>
#include <cstdint>
extern "C" {
int launches, captures, mode, events_until_ready, fail, waits, freed;
int cudaSetDevice(int) { return 0; }
int cudaStreamCreateWithFlags(void** s, unsigned flags) {
  *s = flags ? (void*)0x999999999 : (void*)0x123456789a; return 0; }
int cudaEventCreateWithFlags(void** e, unsigned flags) { *e = malloc(1); return !(flags & 2); }
int cudaMemGetInfo(size_t* f, size_t* t) { *f = 3; *t = 5; return 0; }
int cudaEventSynchronize(void*) { ++waits; return 0; }
int cudaStreamSynchronize(void* s) { return s != (void*)0x999999999; }
int cudaEventDestroy(void*) { ++freed; return 0; }
int cudaStreamDestroy(void*) { ++freed; return 0; }
int cudaFreeHost(void*) { ++freed; return 0; }
int cudaHostAlloc(void** p, size_t n, unsigned) { *p = malloc(n); return 0; }
int cudaEventRecord(void*, void* s) { return (unsigned long)s < 0x100; }
int cudaEventQuery(void*) { return fail ? fail : events_until_ready-- > 0 ? 600 : 0; }
int cudaMemcpyAsync(void* to, const void* from, size_t n, int kind, void*) {
  memcpy(to, from, n); return kind != 2 && kind != 1; }
int cudaStreamBeginCapture(void*, int m) { mode = m; return 0; }
int cudaStreamEndCapture(void*, void** g) { *g = (void*)0xbbbbbbbbbb; ++captures; return 0; }
int cudaGraphInstantiate(void** e, void* g, unsigned long long flags) {
  *e = (void*)0xcccccccccc; return flags || g != (void*)0xbbbbbbbbbb; }
int cudaGraphDestroy(void*) { return 0; }
int cudaGraphLaunch(void* e, void* s) {
  ++launches; return e != (void*)0xcccccccccc || s != (void*)0x123456789a; }
const char* cudaGetErrorString(int) { return "a reason"; }
}
"""

NCCL = """
#include <cstring>
#include <cstddef>
#include <unistd.h>
struct Id { char bytes[128]; };
extern "C" {
int aborted, destroyed;
void* stream;
int ncclGetUniqueId(Id* id) {
  memset(id, 0, 128); id->bytes[3] = 'x'; id->bytes[127] = 7; return 0; }
int ncclCommInitRank(void** comm, int world, Id id, int rank) {
  *comm = (void*)0xdddddddddd;
  if (world == 3) sleep(60);  // a peer never comes
  return !(world == 2 && rank < 2 && id.bytes[3] == 'x' && id.bytes[127] == 7); }
int ncclAllReduce(const void* x, void* out, size_t n, int type, int op, void* comm, void* s) {
  stream = s;
  if (type != 7 || op != 0 || comm != (void*)0xdddddddddd) return 5;
  for (size_t i = 0; i < n; ++i) ((float*)out)[i] = 2 * ((const float*)x)[i];
  return 0; }
int ncclAllGather(const void* x, void* out, size_t n, int type, void* comm, void* s) {
  stream = s;
  if (type != 6 || comm != (void*)0xdddddddddd) return 5;
  memcpy(out, x, 2 * n); memcpy((char*)out + 2 * n, x, 2 * n);
  return 0; }
int ncclCommAbort(void* comm) { aborted += comm == (void*)0xdddddddddd; return 0; }
int ncclCommDestroy(void* comm) { destroyed += comm == (void*)0xdddddddddd; return 0; }
const char* ncclGetErrorString(int) { return "a reason"; }
const char* ncclGetLastError(void*) { return "more of it"; }
}
"""


def stand_in(source: str, directory: Path, name: str) -> ctypes.CDLL:
    path = directory / f"{name}.cc"
    path.write_text(source)
    return load_native(path)


@pytest.fixture
def cuda(tmp_path, monkeypatch) -> ctypes.CDLL:
    library = stand_in(CUDART, tmp_path, "cudart_stand_in")
    monkeypatch.setattr(cuda_device, "cudart", lambda: library)
    monkeypatch.setattr(nccl, "cudart", lambda: library)
    for name in ("launches", "captures", "events_until_ready", "fail", "waits", "freed"):
        ctypes.c_int.in_dll(library, name).value = 0
    return library


def counter(library: ctypes.CDLL, name: str) -> ctypes.c_int:
    return ctypes.c_int.in_dll(library, name)


def test_a_step_is_captured_once_and_replayed(cuda):
    gpu = CudaDevice(0, use_graph=True)
    runs: list[int] = []
    for step in range(5):
        gpu.replay(1, lambda step=step: runs.append(step))
    gpu.replay(2, lambda: runs.append(100))
    # The first run is plain, the second is captured, and from it on the graph is launched.
    assert runs == [0, 1, 100]
    assert counter(cuda, "captures").value == 1 and counter(cuda, "launches").value == 4
    assert counter(cuda, "mode").value == 2


def test_without_graphs_every_step_runs(cuda):
    gpu = CudaDevice(0, use_graph=False)
    runs: list[int] = []
    for step in range(3):
        gpu.replay(1, lambda step=step: runs.append(step))
    assert runs == [0, 1, 2] and counter(cuda, "launches").value == 0


def test_an_error_in_a_captured_step_ends_the_capture(cuda):
    gpu = CudaDevice(0, use_graph=True)
    gpu.replay(1, lambda: None)
    with pytest.raises(ZeroDivisionError):
        gpu.replay(1, lambda: 1 / 0)
    assert counter(cuda, "captures").value == 1


def test_reads_arrive_later(cuda):
    gpu = CudaDevice(0, use_graph=True)
    reads = [gpu.fetch(tensor(np.array([i, i + 1], np.int32))) for i in range(40)]
    counter(cuda, "events_until_ready").value = 1
    assert not reads[0].ready() and reads[0].ready()
    assert [read.value().tolist() for read in reads] == [[i, i + 1] for i in range(40)]
    counter(cuda, "fail").value = 700
    with pytest.raises(WorkerError, match="the GPU failed: a reason"):
        reads[0].ready()


def test_tokens_that_the_gpu_writes(cuda):
    gpu = CudaDevice(0, use_graph=True)
    outbox = gpu.outbox(rows=2, length=9)
    outbox.begin(np.array([3, 4], np.int32))
    step = outbox.next(2)
    assert not step.ready()
    for address, word in zip(
        outbox.address().view(np.uint64), (4 << 32 | 6, 5 << 32 | 7), strict=True
    ):
        ctypes.c_uint64.from_address(int(address[0]) + 8 * (word >> 32)).value = word
    assert step.ready() and step.value().tolist() == [6, 7]
    counter(cuda, "fail").value = 700
    with pytest.raises(WorkerError, match="the GPU failed: a reason"):
        outbox.next(2).ready()
    gpu.close()
    assert counter(cuda, "freed").value == 256 + 1 + 2 + 1


def test_wait_polls_and_can_be_aborted(cuda):
    gpu = CudaDevice(0, use_graph=True)
    counter(cuda, "events_until_ready").value = 5
    gpu.wait()
    counter(cuda, "events_until_ready").value = 1 << 30
    gpu.abort()
    with pytest.raises(AbortedError):
        gpu.wait()


def test_programs_run_on_the_stream_of_the_device(cuda):
    gpu = CudaDevice(0, use_graph=True)
    with gpu.scope():
        assert tvm_ffi.get_raw_stream(gpu.tvm) == 0x123456789A
    assert tvm_ffi.get_raw_stream(gpu.tvm) == 0


def test_nccl_calls(tmp_path, monkeypatch, cuda):
    library = stand_in(NCCL, tmp_path, "nccl_stand_in")
    monkeypatch.setattr(nccl, "load_cuda_library", lambda name: library)
    gpu = CudaDevice(0, use_graph=True)
    groups = [nccl.NcclCollectives(tmp_path, rank, 2, gpu.tvm, lambda: False) for rank in range(2)]
    assert (tmp_path / "nccl-id").stat().st_size == 128
    x, out = tensor(np.arange(5, dtype=np.float32)), tensor(np.zeros(5, np.float32))
    half = tensor(np.arange(3, dtype=np.float16))
    both = tensor(np.zeros(6, np.float16))
    with gpu.scope():
        groups[0].all_reduce(x, out)
        groups[0].all_gather(half, both)
    assert out.numpy().tolist() == [0, 2, 4, 6, 8]
    assert both.numpy().tolist() == [0, 1, 2, 0, 1, 2]
    assert ctypes.c_void_p.in_dll(library, "stream").value == 0x123456789A
    with pytest.raises(WorkerError, match=r"ncclAllReduce failed: a reason.*NCCL_DEBUG"):
        groups[0].all_reduce(tensor(np.zeros(1, np.int32)), out)
    with pytest.raises(WorkerError, match="no dtype int64"):
        groups[0].all_reduce(tensor(np.zeros(1, np.int64)), out)
    groups[0].abort()
    groups[0].close()
    groups[1].close()
    assert counter(library, "aborted").value == 1 and counter(library, "destroyed").value == 1
    with pytest.raises(AbortedError):
        groups[0].all_reduce(x, out)


def test_joining_nccl_ends_when_a_peer_fails(tmp_path, monkeypatch, cuda):
    library = stand_in(NCCL, tmp_path, "nccl_stand_in")
    monkeypatch.setattr(nccl, "load_cuda_library", lambda name: library)
    began = time.monotonic()
    with pytest.raises(AbortedError, match="another rank failed"):
        nccl.NcclCollectives(
            tmp_path, 0, 3, CudaDevice(0, False).tvm, lambda: time.monotonic() > began + 0.1
        )
    assert time.monotonic() < began + 5


@pytest.mark.parametrize("count", [1, 2, 9, 30, None])
def test_steps_sent_ahead(fake_model, count):
    """As on a GPU, several steps a command and several commands ahead of the reader."""
    with Session(fake_model(2)) as session:
        target = dataclasses.replace(session.manifest.target, kind="cuda")
        session.manifest = dataclasses.replace(session.manifest, target=target)
        params = SamplingParams(eos=(), max_new_tokens=count)
        for prompt in ([1, 2, 3], [4] * 20):
            steps = list(session.generate([prompt], params))
            expected = expected_tokens(prompt, min(count or LENGTH, LENGTH - len(prompt)))
            assert [token for (token,) in steps] == expected
            # And left early, with steps in flight.
            with contextlib.closing(session.generate([prompt], params)) as left:
                assert next(left) == [expected[0]]


def test_uploads_alternate_between_two_pinned_buffers(cuda):
    gpu = CudaDevice(0, use_graph=False)
    assert gpu.free_memory() == 3
    target = np.zeros(10, np.uint8)
    with gpu.uploader(4) as uploader:
        for start in range(0, 10, 4):
            buffer = uploader.buffer()
            size = min(4, 10 - start)
            buffer[:size] = bytes(range(start, start + size))
            uploader.put(1, target.ctypes.data + start + 1, size - 1)
            uploader.put(0, target.ctypes.data + start, 1)
            uploader.flip()
    assert target.tolist() == list(range(10))
    # Each buffer is waited for before it is filled; two events, a stream and the memory are freed.
    assert counter(cuda, "waits").value == 3 and counter(cuda, "freed").value == 4
    with pytest.raises(KeyError), gpu.uploader(4):
        raise KeyError
    assert counter(cuda, "freed").value == 8
