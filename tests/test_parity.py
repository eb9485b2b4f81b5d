"""Every number of ranks against stored logits of transformers, through real worker processes."""

from pathlib import Path

import numpy as np
import pytest
from parity import TOLERANCE, built, check
from reference import models

from shardwright import Session

CASES = {case.name: case for case in models.cases()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [1, 3])
def test_every_configuration(name, ranks, tmp_path):
    check(CASES[name], built(CASES[name], ranks, tmp_path))


@pytest.mark.parametrize("ranks", [2, *range(4, 17)])
def test_every_number_of_ranks(ranks, tmp_path):
    # Grouped queries, biases and tied embeddings: everything that is cut or replicated.
    check(CASES["everything"], built(CASES["everything"], ranks, tmp_path))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_chunked_prefill_equals_one_prefill(ranks, tmp_path):
    case = CASES["gqa-6-3"]
    golden = models.golden(case)
    out = built(case, ranks, tmp_path, prefill_chunk_size=5)  # 13 + 7 tokens in four chunks
    check(case, out)
    with Session(out) as session:
        first = [list(p[:4]) for p in case.prompts]
        rest = [list(p[4:]) for p in case.prompts]
        session.prefill(first)
        got = session.prefill(rest, extend=True)
        assert models.relative_error(got, golden.prefill) < TOLERANCE


@pytest.mark.parametrize("quantization", ["q4f16_1", "q0f16"])
def test_half_precision_agrees_for_every_number_of_ranks(quantization, tmp_path):
    case = CASES["head-dim-gqa"]
    logits = {}
    for ranks in (1, 2, 3, 5):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        with Session(built(case, ranks, folder, quantization=quantization)) as session:
            steps = [session.prefill([list(p) for p in case.prompts])]
            steps += [session.decode(list(tokens)) for tokens in case.decode]
        logits[ranks] = np.stack(steps)
    for ranks, got in logits.items():
        # fp16 rounds partial sums differently; a wrong slice or scale would be off by far more.
        assert models.relative_error(got, logits[1]) < 1e-2, ranks


def test_builds_are_repeatable(tmp_path: Path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    shards = [
        sorted(
            (built(CASES["head-dim-gqa"], 2, folder, quantization="q4f16_1") / "shards").iterdir()
        )
        for folder in folders
    ]
    for a, b in zip(*shards, strict=True):
        assert a.read_bytes() == b.read_bytes()
