import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


def load(name, path):
    # Neither the scripts nor the reference models belong to a package.
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


models = load("reference_models", "tests/reference/models.py")
CASES = models.cases()
NAMES = [case.name for case in CASES]
PARTS = ("prefill", "decode")


def test_every_case_has_golden_values():
    with np.load(models.GOLDEN) as file:
        assert sorted(file) == sorted(
            f"{n}/{part}" for n in NAMES for part in ("prefill", "decode")
        )
    assert models.GOLDEN.stat().st_size < 2e6


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_golden_values_tell_rows_and_steps_apart(case):
    golden = models.golden(case)
    rows = np.concatenate([golden.prefill, golden.decode.reshape(-1, models.VOCAB)])
    assert rows.shape == (10, models.VOCAB) and rows.dtype == np.float32
    assert 0.3 < rows.std() < 5
    for i, row in enumerate(rows):
        assert all(models.relative_error(row, other) > 0.1 for other in rows[:i])


def test_weights_are_the_same_everywhere():
    # These numbers were written down once; golden.npz is worthless if they ever change.
    weights = models.weights(CASES[0])
    embedding = weights["model.embed_tokens.weight"]
    assert embedding.shape == (131, 64)
    np.testing.assert_array_equal(
        embedding[0, :3], np.float32([-0.5430073738098145, 0.8038257360458374, 0.18074478209018707])
    )
    assert CASES[0].prompts[1] == (1, 64, 97, 75, 34, 16, 16)


@pytest.mark.reference
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_transformers_still_computes_the_golden_values(case):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    prefill, decode = load("make_reference", "scripts/make_reference.py").compute(case)
    golden = models.golden(case)
    assert models.relative_error(prefill, golden.prefill) < 2e-5
    assert models.relative_error(decode, golden.decode) < 2e-5
