"""The sampler on the CPU: each filter against numpy, and the distribution of its draws."""

import numpy as np
import pytest
import tvm

from shardwright.compiler.kernels import sampling

VOCAB, MAX_LEN = 37, 24


def compiled(batch, vocab):
    """The sampler for a CPU."""
    func = sampling.sample(batch=batch, vocab=vocab, max_len=MAX_LEN, target="cpu")
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return tvm.compile(mod, target="llvm")["main"]


@pytest.fixture(scope="module")
def kernels():
    """Compiled samplers by (batch, vocab)."""
    cache = {}

    def get(batch, vocab):
        if (batch, vocab) not in cache:
            cache[batch, vocab] = compiled(batch, vocab)
        return cache[batch, vocab]

    return get


class Rows:
    """Sampler state of a batch; `run` returns the chosen tokens."""

    def __init__(self, logits, history=None, eos=(), **options):
        self.logits = np.asarray(logits, "float32")
        b, _ = self.logits.shape
        self.tokens = np.full(b, -7, "int32")
        self.history = np.full((b, MAX_LEN), -1, "int32")
        self.positions = np.zeros(b, "int32")
        for r, row in enumerate(history or [[0]] * b):
            self.history[r, : len(row)] = row
            self.positions[r] = len(row) - 1
        self.f = np.zeros((b, 4), "float32")
        self.i = np.zeros((b, 8), "int32")
        self.f[:, 1:3] = 1
        self.i[:, 3] = 1
        self.eos = np.full((b, 16), -1, "int32")
        self.eos[:, : len(eos)] = eos
        floats = {"temperature": 0, "top_p": 1, "repetition_penalty": 2}
        ints = {"top_k": 0, "ngram": 1, "min_new_tokens": 2, "prompt_len": 3, "seed": 4}
        for name, value in options.items():
            if name in floats:
                self.f[:, floats[name]] = value
            else:
                self.i[:, ints[name]] = value

    def run(self, kernels):
        names = ("tokens", "positions", "history")
        held = {n: tvm.runtime.tensor(getattr(self, n)) for n in names}
        scores = tvm.runtime.tensor(np.full_like(self.logits, np.nan))
        rest = [tvm.runtime.tensor(a) for a in (self.f, self.i, self.eos)]
        kernels(*self.logits.shape)(tvm.runtime.tensor(self.logits), scores, *held.values(), *rest)
        for name in names:
            setattr(self, name, held[name].numpy())
        return self.tokens.tolist()


def draws(kernels, logits, count=1024, **options):
    """Tokens drawn for `count` seeds, as frequencies."""
    repeated = np.repeat(np.asarray(logits, "float32")[None], count, 0)
    rows = Rows(repeated, **{"temperature": 1, **options})
    rows.i[:, 4] = np.arange(count)
    return np.bincount(rows.run(kernels), minlength=len(logits)) / count


def test_greedy_takes_the_lowest_of_equals_and_advances(kernels):
    logits = np.zeros((3, VOCAB))
    logits[0, [5, 9]] = 2
    logits[1, 36] = 1
    rows = Rows(logits, history=[[1, 2, 3], [4], [5, 6]])
    assert rows.run(kernels) == [5, 36, 0]
    assert rows.positions.tolist() == [3, 1, 2]
    assert rows.history[0, :5].tolist() == [1, 2, 3, 5, -1]


def test_inactive_and_full_rows_are_left_alone(kernels):
    rows = Rows(np.eye(3, VOCAB), history=[[], [1] * MAX_LEN, [2]])
    before = rows.history.copy()
    assert rows.run(kernels) == [-7, -7, 2]
    assert rows.positions.tolist() == [-1, MAX_LEN - 1, 1]
    np.testing.assert_array_equal(rows.history[:2], before[:2])


@pytest.mark.parametrize("temperature", [0, 1])
def test_bad_logits_end(kernels, temperature):
    logits = np.full((3, VOCAB), np.nan)
    logits[1, 4] = 1
    logits[2] = -np.inf
    options = dict(temperature=temperature, top_k=5, top_p=0.5)
    assert Rows(logits, **options).run(kernels) == [0, 4, 0]
    logits[0, 7] = np.inf
    assert Rows(logits, **options).run(kernels)[0] == 7


def test_repetition_penalty_counts_a_token_once(kernels):
    logits = np.zeros((2, VOCAB))
    logits[:, 3], logits[:, 4] = 4.0, 1.9
    logits[1] -= 5  # all negative: the penalty multiplies
    rows = Rows(logits, history=[[3, 3, 3, 3]] * 2, repetition_penalty=2.0)
    # 4 / 2 = 2 > 1.9 (divided four times it would lose); -1 * 2 = -2 > -3.1
    assert rows.run(kernels) == [3, 3]
    rows = Rows(logits, history=[[3, 9]] * 2, repetition_penalty=3.5)
    assert rows.run(kernels) == [4, 4]


@pytest.mark.parametrize(
    ("ngram", "history", "banned"),
    [
        (1, [3, 5], [3, 5]),
        (2, [1, 2, 3, 1], [2]),
        (2, [4, 4], [4]),
        (3, [1, 2, 3, 1, 2], [3]),
        (3, [1, 2, 3, 4, 2], []),
        (3, [1, 2, 9, 1, 2, 8, 1, 2], [8, 9]),
        (4, [1, 2, 3], []),
    ],
)
def test_no_repeat_ngram(kernels, ngram, history, banned):
    logits = np.linspace(1, 0, VOCAB)[None]
    logits[0, banned] += 5
    expected = min(set(range(VOCAB)) - set(banned))
    assert Rows(logits, history=[history], ngram=ngram).run(kernels) == [expected]


def test_min_new_tokens_bans_all_end_tokens(kernels):
    logits = np.zeros((1, VOCAB))
    logits[0, [6, 30]] = 5
    logits[0, 2] = 1
    options = dict(eos=[30, 6], prompt_len=2, min_new_tokens=3)
    assert Rows(logits, history=[[1] * 4], **options).run(kernels) == [2]  # two so far
    assert Rows(logits, history=[[1] * 5], **options).run(kernels) == [6]  # three


def test_draws_follow_the_softmax(kernels):
    logits = np.array([0.0, 1.0, -1.0, 2.0, -np.inf, 0.5])
    for temperature in (0.7, 1.0, 2.0):
        p = np.exp(logits / temperature)
        p /= p.sum()
        got = draws(kernels, logits, temperature=temperature)
        assert got[4] == 0
        np.testing.assert_allclose(got, p, atol=4 * 0.5 / np.sqrt(1024))


@pytest.mark.parametrize("k", [1, 2, 3, 5, 100])
def test_top_k_keeps_ties(kernels, k):
    logits = np.array([-3.0, 0.1, 0.3, 0.3, -0.2, 0.0])
    kept = {1: {2, 3}, 2: {2, 3}, 3: {1, 2, 3}, 5: {1, 2, 3, 4, 5}, 100: set(range(6))}[k]
    got = draws(kernels, logits, top_k=k)
    assert set(np.flatnonzero(got).tolist()) == kept


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.0, {3}),
        (0.3, {3}),
        (0.41, {3, 1}),
        (0.69, {3, 1}),
        (0.71, {3, 1, 0}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_token_that_crosses(kernels, top_p, kept):
    logits = np.log([0.2, 0.3, 0.1, 0.4]) + 7
    got = draws(kernels, logits, top_p=top_p)
    assert set(np.flatnonzero(got).tolist()) == kept


def test_top_p_applies_to_what_top_k_left(kernels):
    # Of 0.4 and 0.3 the first holds 4/7 = 0.571.
    logits = np.log([0.2, 0.3, 0.1, 0.4])
    assert set(np.flatnonzero(draws(kernels, logits, top_k=2, top_p=0.56))) == {3}
    assert set(np.flatnonzero(draws(kernels, logits, top_k=2, top_p=0.58))) == {1, 3}


def test_draws_depend_on_seed_and_position_alone(kernels):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((1, 1000)).repeat(64, 0)
    rows = Rows(logits, temperature=1.0, seed=5)
    assert len(set(rows.run(kernels))) == 1
    rows.positions[:] = 0
    first = rows.run(kernels)
    rows.positions[:] = 0
    assert rows.run(kernels) == first
    assert rows.run(kernels) != first  # the next position
    rows = Rows(logits, temperature=1.0)
    rows.i[:, 4] = np.arange(64)
    low = rows.run(kernels)
    rows = Rows(logits, temperature=1.0)
    rows.i[:, 5] = np.arange(64)
    high = rows.run(kernels)
    assert len(set(low)) > 40 and len(set(high)) > 40 and low[1:] != high[1:]


def test_large_vocabulary(kernels):
    vocab = 128_003
    logits = np.random.default_rng(0).standard_normal((2, vocab)).astype("float32")
    assert Rows(logits).run(kernels) == logits.argmax(1).tolist()
    rows = Rows(logits, temperature=1.0, top_k=50, top_p=0.9)
    for r, token in enumerate(rows.run(kernels)):
        assert token in np.argsort(logits[r])[-50:]


def test_store_logits_skips_rows_without_a_last_token():
    func = sampling.store_logits(batch=3, vocab=VOCAB, target="cpu")
    mod = tvm.compile(
        tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), target="llvm"
    )
    new = np.random.default_rng(0).standard_normal((3, VOCAB)).astype("float32")
    logits = tvm.runtime.tensor(np.zeros_like(new))
    last = tvm.runtime.tensor(np.array([4, -1, 0], "int32"))
    mod["main"](tvm.runtime.tensor(new), last, logits)
    expected = new.copy()
    expected[1] = 0
    np.testing.assert_array_equal(logits.numpy(), expected)
