"""A built model, running: token ids in, logits or token ids out."""

import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from shardwright.errors import InputError, UsageError
from shardwright.runtime import tvm_runtime
from shardwright.runtime.artifact import load_manifest
from shardwright.runtime.controller import Controller, check_manifest
from shardwright.runtime.device import check_devices
from shardwright.runtime.rows import (
    Row,
    Tokens,
    check_length,
    check_prompts,
    chunks,
    common_prefix,
    sampling_state,
)
from shardwright.runtime.sampling import SamplingParams

Command = dict[str, Any]
"""One for the workers: `op` and its arguments."""

MIN_AHEAD, MAX_AHEAD = 16, 160
"""Fewest and most decode steps that a GPU has waiting."""

SECONDS_AHEAD = 0.15
"""For so long the host may be kept from running: by other programs, or by a limit on its cores."""


def steps_ahead(received: int, seconds: float) -> int:
    """Decode steps that a GPU should have waiting, after `received` took `seconds`.

    On a machine whose cores are all busy the host may not run for tens of milliseconds. But a row
    may end at any step, and what was sent beyond it delays the next call: so no more than half of
    what it has taken so far.
    """
    most = SECONDS_AHEAD * received / seconds if seconds > 0 else 0
    return int(max(MIN_AHEAD, min(MAX_AHEAD, received / 2, most)))


class Session:
    """N workers with a built model, and a cache of `max_batch_size` rows.

    A context manager; leaving it, or the end of the program, ends every worker. Not for several
    threads at once. Any failure of a worker ends the session and raises within seconds.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        num_shards: int | None = None,
        *,
        timeout: float = 300.0,
        progress: Callable[[int, int], None] | None = None,
        collectives: str = "auto",
    ) -> None:
        """Start the workers and load the model.

        Args:
            path: directory that `shardwright build` has written.
            num_shards: number of ranks; it is fixed at build time, so this is a check only.
            timeout: seconds without an answer after which a worker counts as hung.
            progress: called during loading with the bytes read by rank 0 and their total.
            collectives: "auto" lets GPUs that can map each other's memory sum small messages
                there; "nccl" uses NCCL for everything.

        Raises:
            UsageError: `collectives` is neither.
            ArtifactError: the artefact is missing, unfinished, damaged, of a newer version, holds
                no weights, or was built for another number of ranks.
            DeviceError: the machine has too few GPUs, or others than the artefact was built for.
            WorkerError: a worker failed or died.
        """
        if collectives not in ("auto", "nccl"):
            raise UsageError(f"collectives {collectives!r}: choose auto or nccl")
        began = time.monotonic()
        directory = Path(path)
        self.manifest = load_manifest(directory)
        check_manifest(directory, self.manifest, num_shards)
        tvm_runtime.load(self.manifest.target.kind)
        check_devices(self.manifest)
        self._controller = Controller(directory, self.manifest, timeout, progress, collectives)
        self._finalizer = weakref.finalize(self, self._controller.close)
        self._rows: list[Row] = []
        self._call = 0
        self._load_seconds = time.monotonic() - began
        self._counts = {"prefill": (0, 0.0), "decode": (0, 0.0)}

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every worker. Does nothing the second time."""
        self._finalizer()

    def reset(self) -> None:
        """Forget all rows."""
        self._begin()
        self._rows = []

    def prefill(
        self, prompts: Sequence[Tokens], *, extend: bool = False
    ) -> npt.NDArray[np.float32]:
        """Feed a prompt to each row, from row 0 on, and return the logits at its last position.

        Args:
            prompts: token ids, one list per row, of any lengths.
            extend: append to the rows as they are, instead of beginning anew.

        Returns:
            float32 [len(prompts), vocab].

        Raises InputError for an empty or too long row, too many rows, or an unknown token.
        """
        rows = check_prompts(self.manifest, prompts)
        if extend and len(rows) != len(self._rows):
            raise InputError(f"{len(rows)} rows to extend, the session has {len(self._rows)}")
        before = [row.fed for row in self._rows] if extend else [[] for _ in rows]
        after = [old + new for old, new in zip(before, rows, strict=True)]
        for index, row in enumerate(after):
            check_length(self.manifest, index, len(row))
        self._begin()
        self._rows = []  # until it has succeeded
        began = time.monotonic()
        # Plain sampling, so that `decode` spends no time on penalties.
        found = [Row(row) for row in after]
        feed = self._feed(after, [len(row) for row in before])
        self._send([*feed, self._write_sampling(found)])
        logits = self._logits(len(rows))
        self._count("prefill", sum(map(len, rows)), began)
        self._rows = found
        return logits

    def decode(self, tokens: Tokens) -> npt.NDArray[np.float32]:
        """Feed one more token to each row and return the logits after it.

        Args:
            tokens: one token id per row of the last `prefill` or `generate`.

        Returns:
            float32 [len(tokens), vocab].

        Raises InputError if the number of tokens is not that of rows, for an unknown token, or if
        a row is full.
        """
        if not tokens or len(tokens) != len(self._rows):
            raise InputError(
                f"{len(tokens)} tokens for {len(self._rows)} rows; give one per row, after prefill"
            )
        new = check_prompts(self.manifest, [[token] for token in tokens])
        fed = [row.fed for row in self._rows]
        for index, row in enumerate(fed):
            check_length(self.manifest, index, len(row) + 1)
        self._begin()
        began = time.monotonic()
        count = len(new)
        state = {
            "tokens": self._pad([row[0] for row in new], 0),
            "positions": self._pad([len(row) for row in fed], -1),
        }
        self._controller.send("write", state=state)
        self._controller.send("decode", bucket=self._bucket(count), rows=0, steps=1)
        logits = self._logits(count)
        self._count("decode", count, began)
        self._rows = [Row(old + one) for old, one in zip(fed, new, strict=True)]
        return logits

    def generate(
        self,
        prompts: Sequence[Tokens],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[list[int | None]]:
        """Continue prompts, one per row from row 0 on.

        What a row has in common with the same row of the call before is not computed again.

        Args:
            prompts: token ids, one list per row, of any lengths.
            params: options for all rows or one for each; None is greedy.

        Returns:
            An iterator over steps. Each gives every row's new token, or None for a row that has
            ended: with an end token (which is given), after `max_new_tokens`, or because the row is
            full. It ends when all rows have. It may be left at any step; it is invalid after
            another call.

        Raises InputError as `prefill`, at once and not at the first step.
        """
        rows = check_prompts(self.manifest, prompts)
        options = (
            [params or SamplingParams()] * len(rows)
            if params is None or isinstance(params, SamplingParams)
            else list(params)
        )
        if len(options) != len(rows):
            raise InputError(f"{len(options)} sampling options for {len(rows)} prompts")
        found = []
        for index, (row, option) in enumerate(zip(rows, options, strict=True)):
            check_length(self.manifest, index, len(row))
            eos = self.manifest.model.eos if option.eos is None else option.eos
            space = self.manifest.limits.max_seq_len - len(row)
            limit = space if option.max_new_tokens is None else min(space, option.max_new_tokens)
            found.append(Row(row, option, frozenset(eos), limit))
        self._begin()
        return self._generate(found, self._call)

    def stats(self) -> dict[str, Any]:
        """Figures since the session began.

        Returns:
            load_seconds, and `load_phases`, for each phase the seconds of the slowest rank;
            prefill_tokens, prefill_seconds, prefill_tokens_per_second, and the same
            for decode; `ranks`, for each rank the bytes of device memory in weights, cache,
            workspace and other; and `taken`, for each rank the bytes that the memory plan predicts
            and those that were seen to go while it loaded, None on a CPU.
        """
        phases = self._controller.load_seconds
        figures: dict[str, Any] = {
            "load_seconds": self._load_seconds,
            "load_phases": {name: max(rank[name] for rank in phases) for name in phases[0]},
        }
        for name, (tokens, seconds) in self._counts.items():
            figures[f"{name}_tokens"] = tokens
            figures[f"{name}_seconds"] = seconds
            figures[f"{name}_tokens_per_second"] = tokens / seconds if seconds else 0.0
        return figures | {"ranks": self._controller.memory, "taken": self._controller.taken}

    def _generate(self, rows: list[Row], call: int) -> Iterator[list[int | None]]:
        self._check_call(call)
        before = [row.fed for row in self._rows] + [[]] * len(rows)
        cached = [common_prefix(old, row.prompt) for old, row in zip(before, rows, strict=False)]
        self._rows = []
        began = time.monotonic()
        feed = self._feed([row.prompt for row in rows], cached)
        # What writes waits for the device, so it comes first: the sampler then follows at once.
        self._send([self._write_sampling(rows), *feed, {"op": "sample", "rows": len(rows)}])
        steps = self._steps(len(rows), max(row.limit for row in rows) - 1)
        phase, fed = "prefill", sum(len(row.prompt) for row in rows) - sum(cached)
        while not all(row.done for row in rows):
            next(steps, None)
            tokens = self._controller.receive_tokens()
            self._count(phase, fed, began)
            out: list[int | None] = []
            for row, token in zip(rows, tokens.tolist(), strict=True):
                out.append(None if row.done else token)
                if not row.done:
                    row.new.append(token)
            self._rows = rows
            yield out
            self._check_call(call)
            began, phase, fed = time.monotonic(), "decode", sum(not row.done for row in rows)
        if not self._rows:  # no row had room for a token
            self._rows = rows

    def _steps(self, count: int, total: int) -> Iterator[None]:
        """Before each received step, send enough decode steps to keep the device busy."""
        bucket, sent, received = self._bucket(count), 0, 0
        began = time.monotonic()
        while True:
            ahead = 1
            if self.manifest.target.kind != "cpu":
                ahead = steps_ahead(received, time.monotonic() - began)
            while sent < total and sent - received < ahead:
                steps = min((ahead + 1) // 2, total - sent)
                self._controller.send("decode", bucket=bucket, rows=count, steps=steps)
                sent += steps
            yield
            received += 1

    def _begin(self) -> None:
        """Begin a call: earlier iterators end, and steps in flight are waited for."""
        self._call += 1
        self._controller.discard()

    def _check_call(self, call: int) -> None:
        if call != self._call:
            raise UsageError("this generation ended when another call on the session began")

    def _send(self, commands: list[Command]) -> None:
        self._controller.send("several", commands=commands)

    def _feed(self, rows: list[list[int]], cached: list[int]) -> Iterator[Command]:
        """Prefill each row from its first token that is not cached, in chunks over all rows."""
        limits = self.manifest.limits
        for pieces in chunks(rows, cached, limits.prefill_chunk_size):
            last, end = self._pad([], -1), 0
            for row, start, length, tokens in pieces:
                end += len(tokens)
                if start + len(tokens) == length:
                    last[row] = end - 1
            yield {"op": "prefill", "pieces": pieces, "last": last}

    def _write_sampling(self, rows: list[Row]) -> Command:
        state = sampling_state(rows, self.manifest.limits.max_batch_size)
        return {"op": "write", "state": state}

    def _logits(self, rows: int) -> npt.NDArray[np.float32]:
        self._controller.send("logits", rows=rows)
        logits: npt.NDArray[np.float32] = self._controller.receive("logits")
        return logits

    def _bucket(self, rows: int) -> int:
        return min(bucket for bucket in self.manifest.decode_buckets if bucket >= rows)

    def _pad(self, values: list[int], filler: int) -> list[int]:
        return values + [filler] * (self.manifest.limits.max_batch_size - len(values))

    def _count(self, phase: str, tokens: int, began: float) -> None:
        count, seconds = self._counts[phase]
        self._counts[phase] = count + tokens, seconds + time.monotonic() - began
