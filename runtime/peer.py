"""Memory of the other ranks' GPUs, mapped into this process through CUDA IPC."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

from shardwright.errors import WorkerError
from shardwright.runtime.collectives import AbortedError
from shardwright.runtime.cudart import call, cudart

_TIMEOUT_SECONDS = 120


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * 64)]


class PeerMemory:
    """One buffer of every rank, as this process sees it, and a word that makes kernels give up.

    `addresses` is None where some rank cannot map another's memory: then no rank uses it.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        world: int,
        buffer: int,
        aborted: Callable[[], bool],
    ) -> None:
        """Exchange handles of `buffer`, a device address, through files in `directory`.

        Every rank must call this. Raises AbortedError if another rank fails meanwhile.
        """
        self._cuda = cudart()
        self._directory, self._rank, self._world = directory, rank, world
        self._aborted = aborted
        self._opened: list[ctypes.c_void_p] = []
        self._word = ctypes.c_void_p()
        portable_mapped = 3
        call(
            self._cuda,
            "cudaHostAlloc",
            ctypes.byref(self._word),
            ctypes.c_size_t(4),
            portable_mapped,
        )
        ctypes.c_int.from_address(self._word.value or 0).value = 0
        found = self._open_all(buffer)
        agreed = self._exchange("peer-mapped", b"1" if found else b"0")
        self.addresses: list[int] | None = None
        if found and all(answer == b"1" for answer in agreed):
            self.addresses = [*found, self._word.value or 0]

    def _open_all(self, buffer: int) -> list[int] | None:
        handle = _Handle()
        status = self._cuda.cudaIpcGetMemHandle(ctypes.byref(handle), ctypes.c_void_p(buffer))
        handles = self._exchange("peer-handle", bytes(handle) if status == 0 else b"")
        addresses = []
        for peer, data in enumerate(handles):
            if peer == self._rank:
                addresses.append(buffer)
                continue
            address = ctypes.c_void_p()
            enable_peer_access = 1
            if not data or self._cuda.cudaIpcOpenMemHandle(
                ctypes.byref(address), _Handle.from_buffer_copy(data), enable_peer_access
            ):
                self._cuda.cudaGetLastError()  # or the next call would report it
                return None
            self._opened.append(address)
            addresses.append(address.value or 0)
        return addresses

    def _exchange(self, name: str, data: bytes) -> list[bytes]:
        """Publish `data` and collect every rank's."""
        part = self._directory / f"{name}-{self._rank}.part"
        part.write_bytes(data)
        part.rename(part.with_suffix(""))
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        found = []
        for peer in range(self._world):
            path = self._directory / f"{name}-{peer}"
            while not path.exists():
                if self._aborted():
                    raise AbortedError("mapping peer memory was broken off: another rank failed")
                if time.monotonic() > deadline:
                    raise WorkerError(f"rank {peer} did not offer its memory within 120 s")
                time.sleep(0.002)
            found.append(path.read_bytes())
        return found

    def abort(self) -> None:
        """Make kernels that wait for a peer give up. For any thread."""
        ctypes.c_int.from_address(self._word.value or 0).value = 1

    def close(self) -> None:
        """Unmap the peers' memory. The device must be idle."""
        for address in self._opened:
            self._cuda.cudaIpcCloseMemHandle(address)
        self._opened = []
