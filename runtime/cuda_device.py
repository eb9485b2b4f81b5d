"""An NVIDIA GPU as a `Device`: a stream, captured graphs, reads through pinned memory."""

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from shardwright.runtime.collectives import AbortedError
from shardwright.runtime.cudart import call, check, cudart, done
from shardwright.runtime.device import POLL_SECONDS, Pending, Uploader
from shardwright.runtime.outbox import SLOTS, Outbox


class CudaDevice:
    """An NVIDIA GPU with a stream of its own."""

    arch = ""

    _SLOTS = 256  # more reads than the session ever keeps in flight
    _SLOT_BYTES = 4096

    def __init__(self, index: int, use_graph: bool) -> None:
        import tvm_ffi

        self.tvm, self._cuda = self._open(index)
        self._use_raw_stream = tvm_ffi.use_raw_stream
        self._use_graph = use_graph
        self.aborted = False
        self._seen: set[Any] = set()
        self._graphs: dict[Any, ctypes.c_void_p] = {}
        call(self._cuda, "cudaSetDevice", index)
        self._stream = ctypes.c_void_p()
        # Flags 0: ordered with the legacy stream, on which TVM copies to and from the host. A
        # stream that is not ordered with it would need a synchronisation around every copy.
        call(self._cuda, "cudaStreamCreateWithFlags", ctypes.byref(self._stream), 0)
        self._events = [self._new_event() for _ in range(self._SLOTS + 1)]
        self._pinned: list[ctypes.c_void_p] = []
        self._slots = self._pin(self._SLOTS * self._SLOT_BYTES)
        self._next = 0

    def _open(self, index: int) -> tuple[Any, Any]:
        """The device as TVM has it, and the library with the functions of the CUDA runtime."""
        import tvm

        return tvm.cuda(index), cudart()

    def _new_event(self) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        disable_timing = 2
        call(self._cuda, "cudaEventCreateWithFlags", ctypes.byref(event), disable_timing)
        return event

    def _pin(self, nbytes: int) -> int:
        """Address of new memory on the host that the device can reach."""
        memory = ctypes.c_void_p()
        call(self._cuda, "cudaHostAlloc", ctypes.byref(memory), ctypes.c_size_t(nbytes), 0)
        self._pinned.append(memory)
        return memory.value or 0

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """See `Device`."""
        scope: contextlib.AbstractContextManager[Any] = self._use_raw_stream(
            self.tvm, self._stream.value
        )
        return scope

    def wait(self) -> None:
        """See `Device`."""
        event = self._events[self._SLOTS]
        call(self._cuda, "cudaEventRecord", event, self._stream)
        while not done(self._cuda, event):
            if self.aborted:
                raise AbortedError("waiting for the GPU was broken off: another rank failed")
            time.sleep(POLL_SECONDS)

    def abort(self) -> None:
        """See `Device`."""
        self.aborted = True

    def fetch(self, tensor: Any) -> Pending:
        """See `Device`."""
        slot, self._next = self._next, (self._next + 1) % self._SLOTS
        address = self._slots + slot * self._SLOT_BYTES
        count = tensor.numel()
        to_host = 2
        call(
            self._cuda,
            "cudaMemcpyAsync",
            ctypes.c_void_p(address),
            ctypes.c_void_p(tensor.data_ptr()),
            ctypes.c_size_t(4 * count),
            to_host,
            self._stream,
        )
        call(self._cuda, "cudaEventRecord", self._events[slot], self._stream)
        return _CudaRead(self._cuda, self._events[slot], address, count)

    def outbox(self, rows: int, length: int) -> Outbox:
        """See `Device`."""
        size = 8 * rows * SLOTS
        memory = (ctypes.c_char * size).from_address(self._pin(size))
        words = np.frombuffer(memoryview(memory).cast("B"), np.uint64).reshape(rows, SLOTS)
        # Any event tells of a failure of the GPU.
        return Outbox(words, length, lambda: done(self._cuda, self._events[self._SLOTS]))

    def free_memory(self) -> int | None:
        """See `Device`."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        call(self._cuda, "cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value

    @contextlib.contextmanager
    def uploader(self, nbytes: int) -> Iterator[Uploader]:
        """See `Device`."""
        call(self._cuda, "cudaSetDevice", self.tvm.index)  # it is a property of the thread
        uploader = _CudaUploader(self._cuda, nbytes)
        try:
            yield uploader
            uploader.wait()
        finally:
            uploader.close()

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
        call(self._cuda, "cudaGraphLaunch", self._graphs[key], self._stream)

    def _capture(self, program: Callable[[], None]) -> ctypes.c_void_p:
        # Relaxed: another thread of this process, the controller, polls events meanwhile.
        relaxed = 2
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        call(self._cuda, "cudaStreamBeginCapture", self._stream, relaxed)
        try:
            program()
        finally:
            status = self._cuda.cudaStreamEndCapture(self._stream, ctypes.byref(graph))
        check(self._cuda, "cudaStreamEndCapture", status)
        call(
            self._cuda,
            "cudaGraphInstantiate",
            ctypes.byref(executable),
            graph,
            ctypes.c_ulonglong(0),
        )
        call(self._cuda, "cudaGraphDestroy", graph)
        return executable

    def close(self) -> None:
        """Release the stream, the graphs and the pinned memory. The device must be idle."""
        for executable in self._graphs.values():
            self._cuda.cudaGraphExecDestroy(executable)
        for event in self._events:
            self._cuda.cudaEventDestroy(event)
        for memory in self._pinned:
            self._cuda.cudaFreeHost(memory)
        self._cuda.cudaStreamDestroy(self._stream)


class _CudaUploader:
    """Pinned buffers and a stream of its own, so that threads do not wait for each other."""

    def __init__(self, cuda: Any, nbytes: int) -> None:
        self._cuda = cuda
        self._nbytes = nbytes
        self._memory, self._stream = ctypes.c_void_p(), ctypes.c_void_p()
        call(cuda, "cudaHostAlloc", ctypes.byref(self._memory), ctypes.c_size_t(2 * nbytes), 0)
        # Not ordered with the legacy stream, whose work would make all threads' copies wait.
        call(cuda, "cudaStreamCreateWithFlags", ctypes.byref(self._stream), 1)
        self._events = [ctypes.c_void_p(), ctypes.c_void_p()]
        blocking, disable_timing = 1, 2
        for event in self._events:
            call(cuda, "cudaEventCreateWithFlags", ctypes.byref(event), blocking | disable_timing)
        self._current = 0

    def buffer(self) -> memoryview:
        # An event that was never recorded is complete.
        call(self._cuda, "cudaEventSynchronize", self._events[self._current])
        memory = (ctypes.c_char * self._nbytes).from_address(self._address())
        return memoryview(memory).cast("B")

    def put(self, offset: int, address: int, nbytes: int) -> None:
        to_device = 1
        call(
            self._cuda,
            "cudaMemcpyAsync",
            ctypes.c_void_p(address),
            ctypes.c_void_p(self._address() + offset),
            ctypes.c_size_t(nbytes),
            to_device,
            self._stream,
        )

    def flip(self) -> None:
        call(self._cuda, "cudaEventRecord", self._events[self._current], self._stream)
        self._current ^= 1

    def wait(self) -> None:
        call(self._cuda, "cudaStreamSynchronize", self._stream)

    def close(self) -> None:
        # After an error too, nothing may be copying from the memory that is freed.
        self._cuda.cudaStreamSynchronize(self._stream)
        for event in self._events:
            self._cuda.cudaEventDestroy(event)
        self._cuda.cudaStreamDestroy(self._stream)
        self._cuda.cudaFreeHost(self._memory)

    def _address(self) -> int:
        return (self._memory.value or 0) + self._current * self._nbytes


class _CudaRead:
    def __init__(self, cuda: Any, event: ctypes.c_void_p, address: int, count: int) -> None:
        self._cuda, self._event, self._address, self._count = cuda, event, address, count

    def ready(self) -> bool:
        return done(self._cuda, self._event)

    def value(self) -> npt.NDArray[np.int32]:
        buffer = (ctypes.c_int32 * self._count).from_address(self._address)
        return np.array(buffer, dtype=np.int32)
