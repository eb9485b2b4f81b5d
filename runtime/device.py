"""What the runtime needs of a device beyond running programs: waiting, reading back, replaying.

Nothing here blocks without polling: a GPU whose peer died never becomes idle.
"""

import contextlib
import ctypes
import re
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from shardwright.runtime.artifact import Manifest
from shardwright.runtime.collectives import AbortedError
from shardwright.runtime.tvm_runtime import load_cuda_library

from shardwright.errors import DeviceError, WorkerError

POLL_SECONDS = 50e-6


class Pending(Protocol):
    """A small array on its way from the device."""

    def ready(self) -> bool:
        """Whether it has arrived. Raises WorkerError if the device failed."""

    def value(self) -> npt.NDArray[np.int32]:
        """The array, once it is ready."""


class Device(Protocol):
    """One rank's device, used from one thread; `Pending` may be polled from another."""

    tvm: Any

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which programs run on this device's stream."""

    def wait(self) -> None:
        """Return when all work is done; AbortedError after `abort`."""

    def abort(self) -> None:
        """Make `wait` fail. For any thread."""

    def fetch(self, tensor: Any) -> Pending:
        """Start to copy an int32 tensor to the host, after the work enqueued so far."""

    def replay(self, key: Any, program: Callable[[], None]) -> None:
        """Run `program`, whose addresses and launches never change, in the cheapest way."""


class _Arrived:
    def __init__(self, array: npt.NDArray[np.int32]) -> None:
        self._array = array

    def ready(self) -> bool:
        return True

    def value(self) -> npt.NDArray[np.int32]:
        return self._array


class CpuDevice:
    """Programs run synchronously in the calling thread and TVM's thread pool."""

    def __init__(self) -> None:
        import tvm

        self.tvm = tvm.cpu(0)

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """See `Device`."""
        return contextlib.nullcontext()

    def wait(self) -> None:
        """See `Device`."""

    def abort(self) -> None:
        """See `Device`."""

    def fetch(self, tensor: Any) -> Pending:
        """See `Device`."""
        return _Arrived(tensor.numpy())

    def replay(self, key: Any, program: Callable[[], None]) -> None:
        """See `Device`."""
        program()


class CudaDevice:
    """An NVIDIA GPU with a stream of its own."""

    _SLOTS = 64  # more reads than the session ever keeps in flight
    _SLOT_BYTES = 4096

    def __init__(self, index: int, use_graph: bool) -> None:
        import tvm
        import tvm_ffi

        self.tvm = tvm.cuda(index)
        self._use_raw_stream = tvm_ffi.use_raw_stream
        self._cuda = _cudart()
        self._use_graph = use_graph
        self._aborted = False
        self._seen: set[Any] = set()
        self._graphs: dict[Any, ctypes.c_void_p] = {}
        _call(self._cuda, "cudaSetDevice", index)
        self._stream = ctypes.c_void_p()
        # Flags 0: ordered with the legacy stream, on which TVM copies to and from the host. A
        # stream that is not ordered with it would need a synchronisation around every copy.
        _call(self._cuda, "cudaStreamCreateWithFlags", ctypes.byref(self._stream), 0)
        self._events = [self._new_event() for _ in range(self._SLOTS + 1)]
        self._pinned = ctypes.c_void_p()
        size = self._SLOTS * self._SLOT_BYTES
        _call(self._cuda, "cudaHostAlloc", ctypes.byref(self._pinned), ctypes.c_size_t(size), 0)
        self._next = 0

    def _new_event(self) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        disable_timing = 2
        _call(self._cuda, "cudaEventCreateWithFlags", ctypes.byref(event), disable_timing)
        return event

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """See `Device`."""
        scope: contextlib.AbstractContextManager[Any] = self._use_raw_stream(
            self.tvm, self._stream.value
        )
        return scope

    def wait(self) -> None:
        """See `Device`."""
        event = self._events[self._SLOTS]
        _call(self._cuda, "cudaEventRecord", event, self._stream)
        while not _done(self._cuda, event):
            if self._aborted:
                raise AbortedError("waiting for the GPU was broken off: another rank failed")
            time.sleep(POLL_SECONDS)

    def abort(self) -> None:
        """See `Device`."""
        self._aborted = True

    def fetch(self, tensor: Any) -> Pending:
        """See `Device`."""
        slot, self._next = self._next, (self._next + 1) % self._SLOTS
        address = (self._pinned.value or 0) + slot * self._SLOT_BYTES
        count = tensor.numel()
        to_host = 2
        _call(
            self._cuda,
            "cudaMemcpyAsync",
            ctypes.c_void_p(address),
            ctypes.c_void_p(tensor.data_ptr()),
            ctypes.c_size_t(4 * count),
            to_host,
            self._stream,
        )
        _call(self._cuda, "cudaEventRecord", self._events[slot], self._stream)
        return _CudaRead(self._cuda, self._events[slot], address, count)

    def replay(self, key: Any, program: Callable[[], None]) -> None:
        """See `Device`. The first run loads kernels, the second is captured, later ones replay.

        Every rank makes the same calls, so that all capture the collectives in the same order.
        """
        if not self._use_graph or key not in self._seen:
            self._seen.add(key)
            program()
            return
        if key not in self._graphs:
            self._graphs[key] = self._capture(program)
        _call(self._cuda, "cudaGraphLaunch", self._graphs[key], self._stream)

    def _capture(self, program: Callable[[], None]) -> ctypes.c_void_p:
        # Relaxed: another thread of this process, the controller, polls events meanwhile.
        relaxed = 2
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        _call(self._cuda, "cudaStreamBeginCapture", self._stream, relaxed)
        try:
            program()
        finally:
            status = self._cuda.cudaStreamEndCapture(self._stream, ctypes.byref(graph))
        _check(self._cuda, "cudaStreamEndCapture", status)
        _call(
            self._cuda,
            "cudaGraphInstantiate",
            ctypes.byref(executable),
            graph,
            ctypes.c_ulonglong(0),
        )
        _call(self._cuda, "cudaGraphDestroy", graph)
        return executable

    def close(self) -> None:
        """Release the stream, the graphs and the pinned memory. The device must be idle."""
        for executable in self._graphs.values():
            self._cuda.cudaGraphExecDestroy(executable)
        for event in self._events:
            self._cuda.cudaEventDestroy(event)
        self._cuda.cudaFreeHost(self._pinned)
        self._cuda.cudaStreamDestroy(self._stream)


class _CudaRead:
    def __init__(self, cuda: ctypes.CDLL, event: ctypes.c_void_p, address: int, count: int) -> None:
        self._cuda, self._event, self._address, self._count = cuda, event, address, count

    def ready(self) -> bool:
        return _done(self._cuda, self._event)

    def value(self) -> npt.NDArray[np.int32]:
        buffer = (ctypes.c_int32 * self._count).from_address(self._address)
        return np.array(buffer, dtype=np.int32)


def device_count() -> int:
    """Number of NVIDIA GPUs that this process may use."""
    count = ctypes.c_int()
    cuda = _cudart()
    status = cuda.cudaGetDeviceCount(ctypes.byref(count))
    no_device, no_driver = 100, 35
    if status in (no_device, no_driver):
        return 0
    _check(cuda, "cudaGetDeviceCount", status)
    return count.value


def compute_capability(index: int) -> tuple[int, int]:
    """Compute capability of a GPU, for example (9, 0) for an H200."""
    cuda = _cudart()
    major, minor = ctypes.c_int(), ctypes.c_int()
    attribute_major, attribute_minor = 75, 76
    _call(cuda, "cudaDeviceGetAttribute", ctypes.byref(major), attribute_major, index)
    _call(cuda, "cudaDeviceGetAttribute", ctypes.byref(minor), attribute_minor, index)
    return major.value, minor.value


def check_devices(manifest: Manifest) -> None:
    """Check that the machine has a GPU with compiled code for every rank.

    Raises DeviceError otherwise. A model for the CPU always passes.
    """
    if manifest.target.kind != "cuda":
        return
    world, found = manifest.mesh.size, device_count()
    if found < world:
        raise DeviceError(
            f"{manifest.name} was built for {world} GPUs and this machine has {found}; "
            f"build it again with --num-shards {max(found, 1)}, or check CUDA_VISIBLE_DEVICES"
        )
    for index in range(world):
        capability = compute_capability(index)
        if not runs_on(manifest.target.archs, capability):
            name = "sm_{}{}".format(*capability)
            raise DeviceError(
                f"{manifest.name} holds code for {', '.join(manifest.target.archs)}, and GPU "
                f"{index} is {name}; build it again with --arch {name}"
            )


def runs_on(archs: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code compiled for `archs` runs on a GPU of this compute capability.

    The library holds PTX of the latest architecture, which every later GPU compiles. Besides,
    `sm_80` runs on 8.0 and later 8.x, and `sm_90a` on 9.0 only.
    """
    compiled = []
    for arch in archs:
        match = re.fullmatch(r"sm_(\d+)(\d)([a-z]?)", arch)
        if match is None:
            continue
        major, minor = int(match[1]), int(match[2])
        compiled.append((major, minor))
        if not match[3] and major == capability[0] and minor <= capability[1]:
            return True
    return capability in compiled or capability > max(compiled, default=capability)


def _cudart() -> ctypes.CDLL:
    return load_cuda_library("libcudart.so.13")


def _call(cuda: ctypes.CDLL, name: str, *arguments: Any) -> None:
    _check(cuda, name, getattr(cuda, name)(*arguments))


def _check(cuda: ctypes.CDLL, what: str, status: int) -> None:
    if status != 0:
        cuda.cudaGetErrorString.restype = ctypes.c_char_p
        raise WorkerError(f"{what} failed: {cuda.cudaGetErrorString(status).decode()}")


def _done(cuda: ctypes.CDLL, event: ctypes.c_void_p) -> bool:
    status = cuda.cudaEventQuery(event)
    not_ready = 600
    if status == not_ready:
        return False
    _check(cuda, "the GPU", status)
    return True
