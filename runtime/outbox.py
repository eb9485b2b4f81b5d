"""Tokens that the sampler writes to the host's memory itself: no copy lies between two steps."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

SLOTS = 256
"""Words of a row, as in `sample.cuh`: more steps than the session ever keeps in flight."""


class Outbox:
    """For each row a ring of its latest tokens, which the sampler of rank 0 fills.

    The token at position p of a row is in word p % SLOTS, below p itself in the upper half. So
    a word says what it is, and is written at once.
    """

    def __init__(
        self, words: npt.NDArray[np.uint64], length: int, check: Callable[[], object]
    ) -> None:
        """`words` [rows, SLOTS] is memory that the device can write.

        Rows have no tokens from position `length` on. `check` raises if the device has failed.
        """
        self._words, self._length, self._check = words, length, check
        self._positions = np.zeros(len(words), np.int64)  # of the next step's tokens

    def address(self) -> npt.NDArray[np.int32]:
        """Where each row's ring is, int32 [rows, 2], the lower half first."""
        first, size = self._words.ctypes.data, SLOTS * self._words.itemsize
        addresses = first + size * np.arange(len(self._words), dtype=np.uint64)
        return addresses.astype("<u8").view("<i4").reshape(-1, 2)

    def begin(self, positions: npt.NDArray[np.int32]) -> None:
        """Rows go on behind `positions` [rows], -1 for an inactive one. The device must be idle."""
        self._words[:] = 0
        self._positions = np.where(positions < 0, self._length, positions + 1)

    def next(self, rows: int) -> "Written":
        """The tokens of the next step, of the first `rows` rows."""
        positions = self._positions[:rows].copy()
        self._positions += 1
        active = positions < self._length
        return Written(self._words[:rows], positions, active, self._check)


class Written:
    """A `Pending` of one step's tokens; 0 for a row that has none."""

    def __init__(
        self,
        words: npt.NDArray[np.uint64],
        positions: npt.NDArray[np.int64],
        active: npt.NDArray[np.bool_],
        check: Callable[[], object],
    ) -> None:
        self._words, self._positions, self._active, self._check = words, positions, active, check
        self._slots = np.arange(len(words)), positions % SLOTS

    def ready(self) -> bool:
        """See `Pending`."""
        there = self._words[self._slots] >> 32 == self._positions
        if bool((there | ~self._active).all()):
            return True
        self._check()
        return False

    def value(self) -> npt.NDArray[np.int32]:
        """See `Pending`."""
        tokens = self._words[self._slots] & 0xFFFFFFFF
        return np.where(self._active, tokens, 0).astype(np.int32)
