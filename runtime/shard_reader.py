"""Read a rank's shard into device memory: several threads, each piece checked on its way.

A thread takes a piece of the file, `PIECE_BYTES`, and reads `BUFFER_BYTES` of it at a time into a
buffer (pinned memory for a GPU), adds them to the checksum, and starts the copies of the parts of
tensors that they hold; meanwhile it fills a second buffer. So the disk or page cache, the check and
the link to the GPU work at the same time.
"""

from __future__ import annotations

import bisect
import json
import os
import threading
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from shardwright.errors import ArtifactError
from shardwright.runtime.artifact import PIECE_BYTES, FileEntry, WeightSpec, check_size
from shardwright.runtime.device import Device, Uploader

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

MAX_THREADS = 16
BUFFER_BYTES = 4 << 20  # in the processor's cache when it is checked

_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "uint8": "U8",
}


@dataclass(frozen=True)
class Part:
    """`nbytes` at `offset` in the file belong at `address` on the device."""

    offset: int
    nbytes: int
    address: int


def locate(path: Path, weights: tuple[WeightSpec, ...]) -> dict[str, tuple[int, int]]:
    """Offset in the file and length in bytes of each weight's data.

    Raises ArtifactError if the file cannot be read, is no safetensors file, or does not hold the
    weights in the shapes and dtypes of the manifest.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, path.stat().st_size)))
        found = {}
        for spec in weights:
            entry = header[spec.name]
            begin, end = entry["data_offsets"]
            if (tuple(entry["shape"]), entry["dtype"]) != (spec.shape, _DTYPES.get(spec.dtype)):
                code = {code: name for name, code in _DTYPES.items()}.get(entry["dtype"], "unknown")
                raise ArtifactError(
                    f"{path}: {spec.name} is {code}{entry['shape']}, not "
                    f"{spec.dtype}{list(spec.shape)}; build the model again"
                )
            found[spec.name] = (8 + length + int(begin), int(end) - int(begin))
    except OSError as error:
        reason = error.strerror
    except (ValueError, KeyError, TypeError) as error:
        reason = f"damaged header: {error!r}"
    else:
        return found
    raise ArtifactError(f"{path}: cannot be read ({reason}); build the model again")


def read_shard(
    path: Path,
    entry: FileEntry,
    places: Mapping[str, tuple[int, int]],
    addresses: Mapping[str, int],
    device: Device,
    ranks: int,
    progress: Progress,
) -> None:
    """Copy the data at `places` (see `locate`) to device addresses, and check the whole file.

    Returns when everything has arrived. Raises ArtifactError if the file is not the one that was
    built; which of its pieces were copied is not known then. `ranks` share this machine's cores.
    """
    check_size(path, entry)
    parts = sorted(
        (Part(offset, nbytes, addresses[name]) for name, (offset, nbytes) in places.items()),
        key=lambda part: part.offset,
    )
    pieces = -(-entry.bytes // PIECE_BYTES)
    cores = len(os.sched_getaffinity(0)) // ranks
    threads = max(1, min(MAX_THREADS, pieces, max(2, cores)))
    job = _Job(path, entry, parts, pieces, progress)
    try:
        job.descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(job.work, device) for _ in range(threads)]:
                done.result()
    finally:
        os.close(job.descriptor)


class _Job:
    """The pieces of one file, handed out to threads in order."""

    def __init__(
        self, path: Path, entry: FileEntry, parts: list[Part], pieces: int, progress: Progress
    ) -> None:
        self.path, self.entry, self.parts, self.pieces = path, entry, parts, pieces
        self.progress = progress
        self.starts = [part.offset for part in parts]
        self.descriptor = -1
        self._next, self._done = count(), 0
        self._lock = threading.Lock()
        self._failed = False

    def work(self, device: Device) -> None:
        """Read pieces until none is left or another thread has failed."""
        try:
            with device.uploader(BUFFER_BYTES) as uploader:
                while not self._failed and (piece := next(self._next)) < self.pieces:
                    self._read_piece(piece, uploader)
        except BaseException:
            self._failed = True
            raise

    def _read_piece(self, piece: int, uploader: Uploader) -> None:
        crc, start = 0, piece * PIECE_BYTES
        end = min(start + PIECE_BYTES, self.entry.bytes)
        for begin in range(start, end, BUFFER_BYTES):
            buffer = uploader.buffer()[: min(BUFFER_BYTES, end - begin)]
            self._fill(buffer, begin)
            crc = zlib.crc32(buffer, crc)
            self._copy(begin, begin + len(buffer), uploader)
            uploader.flip()
        if self.entry.crc32 and crc != self.entry.crc32[piece]:
            raise ArtifactError(
                f"{self.path}: altered, its checksum is not the manifest's; copy it again from "
                "where it was built, or build the model again"
            )
        with self._lock:
            self._done += end - start
            done = self._done
        self.progress(done, self.entry.bytes)

    def _fill(self, buffer: memoryview, offset: int) -> None:
        while len(buffer):
            try:
                read = os.preadv(self.descriptor, [buffer], offset)
            except OSError as error:
                raise ArtifactError(f"{self.path}: cannot be read ({error.strerror})") from None
            if read == 0:
                raise ArtifactError(f"{self.path}: truncated while it was read; build it again")
            buffer, offset = buffer[read:], offset + read

    def _copy(self, start: int, end: int, uploader: Uploader) -> None:
        """Start the copies of what lies between two offsets of the file."""
        first = bisect.bisect_right(self.starts, start) - 1
        for part in self.parts[max(first, 0) :]:
            if part.offset >= end:
                break
            low, high = max(part.offset, start), min(part.offset + part.nbytes, end)
            if low < high:
                uploader.put(low - start, part.address + low - part.offset, high - low)
