"""What the runtime needs of a device beyond running programs: waiting, reading back, replaying.

Nothing here blocks without polling: a GPU whose peer died never becomes idle.
"""

import contextlib
import ctypes
import re
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shardwright.errors import DeviceError
from shardwright.runtime import machine
from shardwright.runtime.artifact import Manifest
from shardwright.runtime.cudart import call, check, cudart
from shardwright.runtime.outbox import SLOTS, Outbox

POLL_SECONDS = 50e-6


class Pending(Protocol):
    """A small array on its way from the device."""

    def ready(self) -> bool:
        """Whether it has arrived. Raises WorkerError if the device failed."""

    def value(self) -> npt.NDArray[np.int32]:
        """The array, once it is ready."""


class Uploader(Protocol):
    """Two host buffers of one thread: one is filled while the other is copied to the device."""

    def buffer(self) -> memoryview:
        """The buffer to fill; waits until what `put` copies from it has left."""

    def put(self, offset: int, address: int, nbytes: int) -> None:
        """Start to copy `nbytes` at `offset` in the buffer to the device's memory at `address`."""

    def flip(self) -> None:
        """Go on with the other buffer."""


class Device(Protocol):
    """One rank's device, used from one thread; `Pending` may be polled from another."""

    tvm: Any
    arch: str
    """Of an AMD GPU, such as "gfx1100"; empty elsewhere."""

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which programs run on this device's stream."""

    def wait(self) -> None:
        """Return when all work is done; AbortedError after `abort`."""

    def abort(self) -> None:
        """Make `wait` fail. For any thread."""

    def fetch(self, tensor: Any) -> Pending:
        """Start to copy an int32 tensor to the host, after the work enqueued so far."""

    def outbox(self, rows: int, length: int) -> Outbox:
        """For rows of at most `length` tokens, in host memory that the device can write."""

    def free_memory(self) -> int | None:
        """Bytes that are free on the device, None if it has no memory of its own."""

    def uploader(self, nbytes: int) -> contextlib.AbstractContextManager[Uploader]:
        """Copies to new memory from buffers of `nbytes`, for one thread; its end waits for all."""

    def replay(self, key: Any, program: Callable[[], None]) -> None:
        """Run `program`, whose addresses and launches never change, in the cheapest way."""


class _Arrived:
    def __init__(self, array: npt.NDArray[np.int32]) -> None:
        self._array = array

    def ready(self) -> bool:
        return True

    def value(self) -> npt.NDArray[np.int32]:
        return self._array


class _HostUploader:
    def __init__(self, nbytes: int) -> None:
        self._memory = (ctypes.c_char * nbytes)()

    def buffer(self) -> memoryview:
        return memoryview(self._memory).cast("B")

    def put(self, offset: int, address: int, nbytes: int) -> None:
        ctypes.memmove(address, ctypes.addressof(self._memory) + offset, nbytes)

    def flip(self) -> None:
        pass  # copies are done when `put` returns


class CpuDevice:
    """Programs run synchronously in the calling thread and TVM's thread pool."""

    arch = ""

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

    def outbox(self, rows: int, length: int) -> Outbox:
        """See `Device`."""
        return Outbox(np.zeros((rows, SLOTS), np.uint64), length, lambda: None)

    def free_memory(self) -> int | None:
        """See `Device`."""
        return None

    def uploader(self, nbytes: int) -> contextlib.AbstractContextManager[Uploader]:
        """See `Device`."""
        return contextlib.nullcontext(_HostUploader(nbytes))

    def replay(self, key: Any, program: Callable[[], None]) -> None:
        """See `Device`."""
        program()


def device_count() -> int:
    """Number of NVIDIA GPUs that this process may use."""
    count = ctypes.c_int()
    cuda = cudart()
    status = cuda.cudaGetDeviceCount(ctypes.byref(count))
    no_device, no_driver = 100, 35
    if status in (no_device, no_driver):
        return 0
    check(cuda, "cudaGetDeviceCount", status)
    return count.value


def compute_capability(index: int) -> tuple[int, int]:
    """Compute capability of a GPU, for example (9, 0) for an H200."""
    cuda = cudart()
    major, minor = ctypes.c_int(), ctypes.c_int()
    attribute_major, attribute_minor = 75, 76
    call(cuda, "cudaDeviceGetAttribute", ctypes.byref(major), attribute_major, index)
    call(cuda, "cudaDeviceGetAttribute", ctypes.byref(minor), attribute_minor, index)
    return major.value, minor.value


def check_devices(manifest: Manifest) -> None:
    """Check that the machine has a GPU with compiled code for every rank.

    Raises DeviceError otherwise, and warns of what makes several GPUs hang. A model for the CPU
    always passes.
    """
    if manifest.target.kind == "cpu":
        return
    archs = _check_amd(manifest) if manifest.target.kind == "rocm" else _check_nvidia(manifest)
    machine.warn(manifest.target.kind, archs)


def _check_nvidia(manifest: Manifest) -> list[str]:
    _check_count(manifest, device_count(), "CUDA_VISIBLE_DEVICES")
    names = []
    for index in range(manifest.mesh.size):
        capability = compute_capability(index)
        name = "sm_{}{}".format(*capability)
        names.append(name)
        if not runs_on(manifest.target.archs, capability):
            raise DeviceError(
                f"{manifest.name} holds code for {', '.join(manifest.target.archs)}, and GPU "
                f"{index} is {name}; build it again with --arch {name}"
            )
    return names


def _check_count(manifest: Manifest, found: int, variable: str) -> None:
    if found < manifest.mesh.size:
        raise DeviceError(
            f"{manifest.name} was built for {manifest.mesh.size} GPUs and this machine has {found};"
            f" build it again with --num-shards {max(found, 1)}, or check {variable}"
        )


def _check_amd(manifest: Manifest) -> list[str]:
    from shardwright.runtime import hip

    _check_count(manifest, hip.device_count(), "HIP_VISIBLE_DEVICES")
    archs = [hip.architecture(index) for index in range(manifest.mesh.size)]
    for index, arch in enumerate(archs):
        if arch not in manifest.target.archs:
            raise DeviceError(
                f"{manifest.name} holds code for {', '.join(manifest.target.archs)}, and GPU "
                f"{index} is {arch}; build it again with --arch {arch}"
            )
    return archs


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
