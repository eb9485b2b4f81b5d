"""Tokens that the sampler writes to the host, and a session that reads them there."""

import ctypes
import json

import numpy as np
import pytest
from fake_artifact import LENGTH, expected_tokens

from shardwright.errors import WorkerError
from shardwright.runtime.outbox import SLOTS, Outbox
from shardwright.runtime.program import Program
from shardwright.runtime.sampling import SamplingParams
from shardwright.runtime.session import Session


def put(words, positions, tokens):
    """What the sampler does for active rows."""
    for row, (position, token) in enumerate(zip(positions, tokens, strict=True)):
        words[row, position % SLOTS] = position << 32 | token


def test_a_step_is_there_when_all_of_its_rows_are():
    words = np.full((3, SLOTS), 9, np.uint64)
    outbox = Outbox(words, 1000, lambda: None)
    outbox.begin(np.array([254, 4, 70], np.int32))
    first, second = outbox.next(3), outbox.next(2)
    put(words, [255, 5], [11, 12])
    assert not first.ready()
    put(words, [256, 6], [21, 22])  # the device is ahead
    assert second.ready() and not first.ready()
    put(words[2:], [71], [13])
    assert first.ready() and first.value().tolist() == [11, 12, 13]
    assert second.value().tolist() == [21, 22] and second.value().dtype == np.int32
    # Another generation, some of it at the same positions.
    outbox.begin(np.array([254, 5, 70], np.int32))
    assert not outbox.next(1).ready()


def test_rows_without_a_token_are_not_waited_for():
    words = np.zeros((3, SLOTS), np.uint64)
    outbox = Outbox(words, 10, lambda: None)
    outbox.begin(np.array([-1, 8, 7], np.int32))
    first, second = outbox.next(3), outbox.next(3)
    put(words[1:], [9, 8], [5, 6])
    assert first.ready() and first.value().tolist() == [0, 5, 6]
    assert not second.ready()
    put(words[2:], [9], [7])
    assert second.ready() and second.value().tolist() == [0, 0, 7]
    assert outbox.next(3).ready()  # all are full


def test_a_failed_device_is_told():
    def check():
        raise WorkerError("the GPU failed")

    outbox = Outbox(np.zeros((1, SLOTS), np.uint64), 10, check)
    outbox.begin(np.array([3], np.int32))
    with pytest.raises(WorkerError):
        outbox.next(1).ready()


def test_addresses_of_rows():
    words = np.zeros((2, SLOTS), np.uint64)
    found = Outbox(words, 10, lambda: None).address().view(np.uint64)
    assert found.tolist() == [[words[row].ctypes.data] for row in range(2)]


def test_generating(fake_copy, monkeypatch):
    """With a sampler that finds the addresses in its state, as on a GPU."""
    directory = fake_copy(2)
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps(manifest | {"tokens_to_host": True}))

    def writing(run):
        def step(self, *arguments):
            before = self._state["positions"].numpy()
            run(self, *arguments)
            state = {n: self._state[n].numpy() for n in ("tokens", "positions", "sampling_i")}
            for row, position in enumerate(state["positions"].tolist()):
                if position != before[row]:
                    address = int(state["sampling_i"][row, 6:].view(np.uint64)[0])
                    word = ctypes.c_uint64.from_address(address + 8 * (position % SLOTS))
                    word.value = position << 32 | int(state["tokens"][row])

        return step

    for name in ("sample", "decode"):
        monkeypatch.setattr(Program, name, writing(getattr(Program, name)))
    monkeypatch.setattr(
        "shardwright.runtime.device.CpuDevice.fetch",
        lambda *_: pytest.fail("tokens are not copied"),
    )
    prompts = [[1, 2, 3], [4] * (LENGTH - 5), [5]]
    counts = [9, 5, 1]
    params = [SamplingParams(eos=(), max_new_tokens=count) for count in (9, None, 1)]
    with Session(directory) as session:
        for _ in range(2):
            steps = list(session.generate(prompts, params))
            for row, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
                tokens = [step[row] for step in steps]
                assert tokens[:count] == expected_tokens(prompt, count)
                assert tokens[count:] == [None] * (9 - count)
            session.prefill([[1, 2], [3]])
            session.decode([5, 6])
