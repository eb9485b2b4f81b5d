"""A safetensors file written in order, a piece at a time, with its checksums.

SHA-256 takes longer than anything else that is done with a piece on its way, so it has a thread of
its own beside the one that writes.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from shardwright.errors import BuildError
from shardwright.runtime.artifact import PIECE_BYTES, FileEntry

_DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "float32": ("F32", np.dtype("<f4")),
    "float16": ("F16", np.dtype("<f2")),
    "uint32": ("U32", np.dtype("<u4")),
    "int32": ("I32", np.dtype("<i4")),
    "uint8": ("U8", np.dtype("u1")),
}


_PENDING = 2
"""Pieces that are not written yet before `write` waits for the first of them."""


class ShardWriter:
    """Writes tensors whose names, shapes and dtypes are known beforehand.

    The header goes out first, so nothing is held back: `write` takes pieces of each tensor in the
    order of `tensors`, which must not change afterwards: they are written while the caller goes on.
    As a context manager it closes the file; only `finish` completes it. Raises BuildError if the
    file cannot be written.
    """

    def __init__(self, path: Path, tensors: list[tuple[str, tuple[int, ...], str]]) -> None:
        self.path = path
        self._digest = hashlib.sha256()
        self._crc, self._pieces = 0, list[int]()
        self._digesting, self._writing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._pending: deque[tuple[Future[None], Future[None]]] = deque()
        self._bytes = 0
        header: dict[str, Any] = {"__metadata__": {"format": "shardwright"}}
        self._plan: list[tuple[str, np.dtype[Any], int]] = []
        offset = 0
        for name, shape, dtype in tensors:
            code, kind = _DTYPES[dtype]
            count = math.prod(shape)
            end = offset + count * kind.itemsize
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
            self._plan.append((name, kind, count))
            offset = end
        # The format asks for data that starts at a multiple of 8.
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._plan.reverse()
        try:
            # A new file: a session may still have the old one mapped.
            path.unlink(missing_ok=True)
            self._file = open(path, "wb")
        except OSError as error:
            raise self._failed(error) from None
        self._emit(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, data: npt.NDArray[Any]) -> None:
        """Append `data`, any shape, to tensor `name`, which must be the next unfinished one."""
        while self._plan and self._plan[-1][2] == 0:
            self._plan.pop()
        if data.size == 0:
            return
        expected, kind, left = self._plan.pop() if self._plan else ("the end", data.dtype, 0)
        if (name, data.dtype) != (expected, kind) or data.size > left:
            raise AssertionError(
                f"{self.path}: {data.size} {data.dtype} of {name}, expected {left} {kind} of "
                f"{expected}"
            )
        self._plan.append((name, kind, left - data.size))
        self._emit(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)

    def finish(self) -> FileEntry:
        """Close the complete file; its checksum and length."""
        self._wait(0)
        missing = [(name, left) for name, _, left in self._plan if left]
        if missing:
            raise AssertionError(f"{self.path}: elements not written: {missing[::-1]}")
        self.close()
        if self._bytes % PIECE_BYTES:
            self._pieces.append(self._crc)
        return FileEntry(self._digest.hexdigest(), self._bytes, tuple(self._pieces))

    def close(self) -> None:
        """Close the file, complete or not."""
        self._digesting.shutdown()
        self._writing.shutdown()
        try:
            self._file.close()
        except OSError as error:
            raise self._failed(error) from None

    def _emit(self, data: bytes | memoryview) -> None:
        self._wait(_PENDING - 1)
        digested = self._digesting.submit(self._digest.update, data)
        self._pending.append((digested, self._writing.submit(self._append, data)))

    def _wait(self, count: int) -> None:
        """Until no more than `count` pieces are pending."""
        while len(self._pending) > count:
            for done in self._pending.popleft():
                done.result()

    def _append(self, data: bytes | memoryview) -> None:
        self._count_pieces(memoryview(data))
        try:
            self._file.write(data)
        except OSError as error:
            raise self._failed(error) from None
        self._bytes += len(data)

    def _count_pieces(self, data: memoryview) -> None:
        """Advance the checksum of the current piece, and begin the next where it ends."""
        position = self._bytes
        while len(data):
            room = PIECE_BYTES - position % PIECE_BYTES
            part, data = data[:room], data[room:]
            self._crc = zlib.crc32(part, self._crc)
            position += len(part)
            if len(part) == room:
                self._pieces.append(self._crc)
                self._crc = 0

    def _failed(self, error: OSError) -> BuildError:
        return BuildError(
            f"{self.path}: cannot be written ({error.strerror}); free space or rights"
        )

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
