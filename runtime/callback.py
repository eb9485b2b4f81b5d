"""Where `ChatModule.generate` sends text while it generates.

The classes keep the names of MLC's 2023 API. A callback is called with each new piece of text, and
once with `stopped=True` at the end, also when generation failed.
"""

from __future__ import annotations

import queue
import sys
from collections.abc import Iterator
from typing import Protocol, TextIO

from shardwright.errors import UsageError


class ProgressCallback(Protocol):
    """What `ChatModule.generate` calls."""

    @property
    def callback_interval(self) -> int:
        """Number of tokens between two calls."""

    def __call__(self, delta: str = "", stopped: bool = False) -> None:
        """Take the new text `delta`; `stopped` marks the end."""


class DeltaCallback:
    """Base of callbacks; a subclass says what to do with new text and at the end.

    `callback_interval` is the number of tokens between two calls. Raises UsageError if it is below
    1.
    """

    def __init__(self, callback_interval: int = 2) -> None:
        if callback_interval < 1:
            raise UsageError(f"callback_interval is {callback_interval}; use 1 or more")
        self.callback_interval = callback_interval

    def __call__(self, delta: str = "", stopped: bool = False) -> None:
        """Take the new text `delta`; `stopped` marks the end."""
        if delta:
            self.delta_callback(delta)
        if stopped:
            self.stopped_callback()

    def delta_callback(self, delta: str) -> None:
        """Take the new text `delta`."""
        raise NotImplementedError

    def stopped_callback(self) -> None:
        """Take note that no more text comes."""
        raise NotImplementedError


class StreamToStdout(DeltaCallback):
    """Print the text as it comes, and a line break after it.

    `file` is standard output as it is at the time of the call if None.
    """

    def __init__(self, callback_interval: int = 2, file: TextIO | None = None) -> None:
        super().__init__(callback_interval)
        self._file = file
        self._open_line = False

    def delta_callback(self, delta: str) -> None:
        """Print `delta`."""
        self._open_line = True
        print(delta, end="", file=self._file or sys.stdout, flush=True)

    def stopped_callback(self) -> None:
        """End the line, if there is one."""
        if self._open_line:
            print(file=self._file or sys.stdout, flush=True)
        self._open_line = False


class StreamIterator(DeltaCallback):
    """The text as an iterator, for a thread other than the one that generates.

    Iteration ends with the generation. `timeout` is the time in seconds to wait for the next piece;
    `queue.Empty` is raised after it. None waits without limit.
    """

    def __init__(self, callback_interval: int = 2, timeout: float | None = None) -> None:
        super().__init__(callback_interval)
        self._timeout = timeout
        self._pieces: queue.Queue[str | None] = queue.Queue()

    def delta_callback(self, delta: str) -> None:
        """Hand `delta` to the iterating thread."""
        self._pieces.put(delta)

    def stopped_callback(self) -> None:
        """End the iteration."""
        self._pieces.put(None)

    def __iter__(self) -> Iterator[str]:
        while (piece := self._pieces.get(timeout=self._timeout)) is not None:
            yield piece
