import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from reference import families, models

ROOT = Path(__file__).parents[1]


def make_reference():
    # Scripts belong to no package.
    if "make_reference" not in sys.modules:
        path = ROOT / "scripts" / "make_reference.py"
        spec = importlib.util.spec_from_file_location("make_reference", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return sys.modules["make_reference"]


SOURCES = (models, families)
CASES = [(source, case) for source in SOURCES for case in source.cases()]
NAMES = [case.name for _, case in CASES]


@pytest.mark.parametrize("source", SOURCES, ids=["models", "families"])
def test_every_case_has_golden_values(source):
    names = [case.name for case in source.cases()]
    with np.load(source.GOLDEN) as file:
        assert sorted(file) == sorted(
            f"{n}/{part}" for n in names for part in ("prefill", "decode")
        )
    assert source.GOLDEN.stat().st_size < 2e6


@pytest.mark.parametrize(("source", "case"), CASES, ids=NAMES)
def test_golden_values_tell_rows_and_steps_apart(source, case):
    golden = source.golden(case)
    rows = np.concatenate([golden.prefill, golden.decode.reshape(-1, source.VOCAB)])
    steps = source.DECODE_STEPS
    assert rows.shape == (2 + 2 * steps, source.VOCAB) and rows.dtype == np.float32
    assert 0.3 < rows.std() < 5
    for i, row in enumerate(rows):
        assert all(models.relative_error(row, other) > 0.1 for other in rows[:i])


def test_weights_are_the_same_everywhere():
    # These numbers were written down once; golden.npz is worthless if they ever change.
    case = models.cases()[0]
    weights = models.weights(case)
    embedding = weights["model.embed_tokens.weight"]
    assert embedding.shape == (131, 64)
    np.testing.assert_array_equal(
        embedding[0, :3], np.float32([-0.5430073738098145, 0.8038257360458374, 0.18074478209018707])
    )
    assert case.prompts[1] == (1, 64, 97, 75, 34, 16, 16)


@pytest.mark.reference
@pytest.mark.parametrize(("source", "case"), CASES, ids=NAMES)
def test_transformers_still_computes_the_golden_values(source, case):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    prefill, decode = make_reference().compute(case, source)
    golden = source.golden(case)
    assert models.relative_error(prefill, golden.prefill) < 2e-5
    assert models.relative_error(decode, golden.decode) < 2e-5


@pytest.mark.reference
@pytest.mark.parametrize("case", families.cases(), ids=lambda case: case.name)
def test_transformers_still_saves_these_tensors(case):
    pytest.importorskip("transformers")
    stored = json.loads(families.SHAPES.read_text())[case.name]
    assert make_reference().saved_shapes(case) == stored
