"""Rows of a batch: checks of what the user gave, cutting into chunks, and sampling state."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardwright.errors import InputError
from shardwright.runtime.artifact import Manifest
from shardwright.runtime.message import Int32, int32
from shardwright.runtime.sampling import MAX_EOS, SamplingParams

Tokens = Sequence[int]

Piece = tuple[int, int, int, Int32]
"""Part of a row to prefill: row, position of the first token, final length of the row, tokens."""

PLAIN = SamplingParams(seed=0)
"""Greedy, without penalties."""


@dataclass
class Row:
    """A row while it generates."""

    prompt: list[int]
    params: SamplingParams = PLAIN
    eos: frozenset[int] = frozenset()
    limit: int = 0
    """New tokens at most."""
    new: list[int] = field(default_factory=list)

    @property
    def fed(self) -> list[int]:
        """The tokens in the cache: the last new one has not been fed."""
        return self.prompt + self.new[:-1]

    @property
    def done(self) -> bool:
        """Whether the row has ended."""
        return len(self.new) >= self.limit or bool(self.new and self.new[-1] in self.eos)


def sampling_state(rows: list[Row], batch: int) -> dict[str, list[Any]]:
    """State tensors for rows that have been prefilled; the rest of the batch is inactive."""
    everyone = rows + [Row([])] * (batch - len(rows))
    return {
        # A row without room for a token stays inactive.
        "positions": [len(row.prompt) - 1 if row.limit else -1 for row in everyone],
        "history": [int32(row.prompt) for row in everyone],
        "sampling_f": [row.params.float_row() for row in everyone],
        "sampling_i": [row.params.int_row(len(row.prompt)) for row in everyone],
        "eos": [sorted(row.eos) + [-1] * (MAX_EOS - len(row.eos)) for row in everyone],
    }


def check_prompts(manifest: Manifest, prompts: Sequence[Tokens]) -> list[list[int]]:
    """Prompts as lists of int. Raises InputError; lengths are left to `check_length`."""
    most, vocab = manifest.limits.max_batch_size, manifest.model.vocab_size
    if not prompts:
        raise InputError("no prompts; give at least one")
    if len(prompts) > most:
        raise InputError(
            f"{len(prompts)} rows, the model was built for {most}; "
            f"give fewer, or build it with --max-batch-size {len(prompts)}"
        )
    rows = [[int(token) for token in prompt] for prompt in prompts]
    for index, row in enumerate(rows):
        if not row:
            raise InputError(f"the prompt of row {index} is empty; give at least one token")
        if min(row) < 0 or max(row) >= vocab:
            token = next(token for token in row if not 0 <= token < vocab)
            raise InputError(f"row {index}: token {token} is outside 0..{vocab - 1}")
    return rows


def check_length(manifest: Manifest, index: int, length: int) -> None:
    """Raise InputError if a row of this length is too long."""
    most = manifest.limits.max_seq_len
    if length > most:
        raise InputError(
            f"row {index} would be {length} tokens long, the model was built for {most}; "
            f"shorten it, or build the model with --max-seq-len {length}"
        )


def common_prefix(cached: list[int], prompt: list[int]) -> int:
    """Tokens of the prompt that need not be fed. At least the last one is, for its logits."""
    count = 0
    for old, new in zip(cached, prompt[:-1], strict=False):
        if old != new:
            break
        count += 1
    return count


def chunks(rows: list[list[int]], cached: list[int], size: int) -> Iterator[list[Piece]]:
    """Cut what is not cached of the rows into chunks of at most `size` tokens."""
    pieces: list[Piece] = []
    room = size
    for index, (row, start) in enumerate(zip(rows, cached, strict=True)):
        while start < len(row):
            tokens = int32(row[start : start + room])
            pieces.append((index, start, len(row), tokens))
            start += len(tokens)
            room -= len(tokens)
            if room == 0:
                yield pieces
                pieces, room = [], size
    if pieces:
        yield pieces
