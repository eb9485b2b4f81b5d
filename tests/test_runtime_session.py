import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_artifact import BATCH, EOS, LENGTH, VOCAB, expected_logits, expected_tokens

from shardwright.errors import InputError, UsageError, WorkerError
from shardwright.runtime import session as session_module
from shardwright.runtime.sampling import SamplingParams
from shardwright.runtime.session import Session

Fake = Callable[[int], Path]

# Of several lengths: shorter and longer than a chunk (8) and than a page (4), and one token.
PROMPTS = [[3, 15, 7] * 5, [9], [5, 6, 7, 8, 9, 10, 11]]
ENDLESS = SamplingParams(eos=())


@pytest.fixture(scope="module")
def sessions(fake_model: Fake):
    opened: dict[int, Session] = {}

    def get(world: int) -> Session:
        if world not in opened:
            opened[world] = Session(fake_model(world))
        opened[world].reset()
        return opened[world]

    yield get
    for session in opened.values():
        session.close()


def rows_of(steps: list[list[int | None]]) -> list[list[int]]:
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


def assert_logits(logits: np.ndarray, rows: list[list[int]], world: int) -> None:
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, [expected_logits(row, world) for row in rows])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_prefill_and_decode(sessions, world):
    session = sessions(world)
    assert_logits(session.prefill(PROMPTS), PROMPTS, world)
    rows = [[*row, token] for row, token in zip(PROMPTS, [42, 7, 100], strict=True)]
    assert_logits(session.decode([42, 7, 100]), rows, world)
    rows = [[*row, token] for row, token in zip(rows, [0, 1, 2], strict=True)]
    assert_logits(session.decode([0, 1, 2]), rows, world)
    # Rows go on, in a prefill of their own.
    more = [[3, 4], [5], list(range(20))]
    rows = [row + new for row, new in zip(rows, more, strict=True)]
    assert_logits(session.prefill(more, extend=True), rows, world)
    # And begin anew, with another number of them.
    assert_logits(session.prefill([[8, 8]]), [[8, 8]], world)
    assert_logits(session.decode([1]), [[8, 8, 1]], world)


@pytest.mark.parametrize("world", [1, 2])
def test_generate_fills_rows(sessions, world):
    found = rows_of(list(sessions(world).generate(PROMPTS, ENDLESS)))
    assert found == [expected_tokens(row, LENGTH - len(row)) for row in PROMPTS]


def test_generate_ends_rows_one_by_one(sessions):
    end = expected_tokens(PROMPTS[0], 5)[4]
    options = [
        SamplingParams(eos=(end,)),
        SamplingParams(eos=(), max_new_tokens=2),
        SamplingParams(eos=(), max_new_tokens=9),
    ]
    steps = list(sessions(2).generate(PROMPTS, options))
    assert len(steps) == 9
    assert rows_of(steps) == [
        expected_tokens(row, n) for row, n in zip(PROMPTS, (5, 2, 9), strict=True)
    ]
    assert steps[2][1] is None and steps[8][:2] == [None, None]


def test_generate_uses_the_end_tokens_of_the_model(sessions):
    # 7 * first = EOS (mod VOCAB), so the first new token ends the row.
    first = next(token for token in range(VOCAB) if 7 * token % VOCAB == EOS)
    assert list(sessions(1).generate([[first]])) == [[EOS]]


def test_generate_reuses_a_common_prefix(sessions):
    session = sessions(2)
    prompt, other = PROMPTS[0], PROMPTS[2]
    answers = rows_of(list(session.generate([prompt, other], SamplingParams(max_new_tokens=5))))
    before = session.stats()["prefill_tokens"]
    following = [prompt + answers[0] + [1, 2], [4, 4]]
    found = rows_of(list(session.generate(following, SamplingParams(eos=(), max_new_tokens=6))))
    assert found == [expected_tokens(row, 6) for row in following]
    # Row 0: the last answered token, which was never fed, and two new ones. Row 1: all.
    assert session.stats()["prefill_tokens"] - before == 3 + 2


def test_generate_may_be_left_early(sessions):
    session = sessions(2)
    steps = session.generate(PROMPTS, ENDLESS)
    assert next(steps) == [expected_tokens(row, 1)[0] for row in PROMPTS]
    next(steps)
    assert_logits(session.prefill([[1, 2]]), [[1, 2]], 2)
    with pytest.raises(UsageError, match="another call"):
        next(steps)


def test_decode_continues_what_was_generated(sessions):
    session = sessions(1)
    new = rows_of(list(session.generate(PROMPTS, SamplingParams(eos=(), max_new_tokens=3))))
    rows = [row + tokens for row, tokens in zip(PROMPTS, new, strict=True)]
    assert_logits(session.decode([row[-1] for row in rows]), rows, 1)


def test_full_prompt_generates_nothing(sessions):
    assert list(sessions(1).generate([[1] * LENGTH], ENDLESS)) == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        ([[1], []], "row 1 is empty"),
        ([[1] * (LENGTH + 1)], f"built for {LENGTH}.*--max-seq-len {LENGTH + 1}"),
        ([[1]] * (BATCH + 1), f"built for {BATCH}.*--max-batch-size {BATCH + 1}"),
        ([[1, VOCAB]], f"token {VOCAB} is outside 0..{VOCAB - 1}"),
        ([[-1]], "token -1 is outside"),
    ],
)
def test_bad_prompts(sessions, prompts, message):
    session = sessions(1)
    with pytest.raises(InputError, match=message):
        session.prefill(prompts)
    with pytest.raises(InputError, match=message):
        session.generate(prompts)
    # The session lives on.
    assert_logits(session.prefill([[1]]), [[1]], 1)


def test_bad_decode(sessions):
    session = sessions(1)
    with pytest.raises(InputError, match="1 tokens for 0 rows"):
        session.decode([1])
    session.prefill([[1] * LENGTH, [2]])
    with pytest.raises(InputError, match="1 tokens for 2 rows"):
        session.decode([1])
    with pytest.raises(InputError, match=f"row 0 would be {LENGTH + 1} tokens"):
        session.decode([1, 1])


def test_stats(sessions):
    session = sessions(2)
    session.prefill(PROMPTS)
    stats = session.stats()
    assert set(stats["load_phases"]) == {"join", "library", "weights", "state", "peers"}
    assert 0 < sum(stats["load_phases"].values()) <= stats["load_seconds"]
    assert stats["prefill_tokens_per_second"] > 0
    assert [measured for _, measured in stats["taken"]] == [None, None]
    assert [sorted(rank) for rank in stats["ranks"]] == [
        ["cache", "other", "weights", "workspace"]
    ] * 2


def test_progress_and_two_sessions_at_once(fake_model):
    calls: list[tuple[int, int]] = []
    with (
        Session(fake_model(2), 2, progress=lambda *call: calls.append(call)) as one,
        Session(fake_model(1)) as other,
    ):
        steps = one.generate([[5, 6]], ENDLESS)
        next(steps)
        assert_logits(other.prefill([[1, 2]]), [[1, 2]], 1)
        assert next(steps) == [expected_tokens([5, 6], 2)[1]]
    assert calls and calls[-1][0] <= calls[-1][1]


def test_close_ends_workers_and_leaves_nothing(fake_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    descriptors, shared = len(os.listdir("/proc/self/fd")), os.listdir("/dev/shm")
    session = Session(fake_model(3))
    processes = list(session._controller._processes._processes.values())
    assert len(processes) == 2
    session.close()
    session.close()
    assert all(process.returncode == 0 for process in processes)
    assert list(tmp_path.iterdir()) == [] and os.listdir("/dev/shm") == shared
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with pytest.raises(WorkerError, match="session is closed"):
        session.prefill([[1]])


def test_session_of_a_thread_that_ends(fake_model):
    made: list[Session] = []
    thread = threading.Thread(target=lambda: made.append(Session(fake_model(2))))
    thread.start()
    thread.join()
    with made[0] as session:
        assert_logits(session.prefill([[1, 2]]), [[1, 2]], 2)


def test_runs_without_the_compiler(fake_model):
    """In a fresh process, which also ends without closing the session."""
    code = """
import sys
from shardwright.runtime import session as session_module
from shardwright.runtime.session import Session
session = Session(sys.argv[1])
print(session.prefill([[1, 2, 3]]).argmax())
assert "tvm.relax" not in sys.modules
assert "compiler" not in open("/proc/self/maps").read()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(fake_model(2))], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(expected_tokens([1, 2, 3], 1)[0])


def test_how_many_steps_a_gpu_has_waiting():
    ahead = session_module.steps_ahead
    assert ahead(0, 0.0) == ahead(20, 0.04) == 16  # at first few, for short answers
    assert ahead(100, 0.2) == 50  # half of what was received
    assert ahead(1000, 2.0) == 75 and ahead(1000, 10.0) == 16  # 0.15 s of them
    assert ahead(10_000, 2.0) == 160


def test_rows_keep_what_was_fed(sessions):
    session = sessions(1)
    generation = session.generate(PROMPTS, SamplingParams(max_new_tokens=3, eos=()))
    tokens = [next(generation), next(generation)]
    # The next call finds the cache of both rows with the first new token, the second is not fed.
    assert [row.fed for row in session._rows] == [
        [*prompt, new] for prompt, new in zip(PROMPTS, tokens[0], strict=True)
    ]
