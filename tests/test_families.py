"""Model families other than Llama against stored logits of transformers."""

import numpy as np
import pytest
from parity import built, check
from reference import families, models

from shardwright import Session

CASES = {case.name: case for case in families.cases()}
RANKS = (1, 2, 3, 4, 8)


def _grid():
    """Every case at every number of ranks; one of them outside the marker `matrix`."""
    for i, name in enumerate(CASES):
        for ranks in RANKS:
            marks = () if ranks == RANKS[(i + 2) % len(RANKS)] else pytest.mark.matrix
            yield pytest.param(name, ranks, marks=marks)


@pytest.mark.parametrize(("name", "ranks"), [*_grid()])
def test_every_family(name, ranks, tmp_path):
    check(CASES[name], built(CASES[name], ranks, tmp_path, families), families, rounds=1)


EXPERTS = [name for name in CASES if "num_experts_per_tok" in CASES[name].config]


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        pytest.param(
            n, r, marks=() if (n, r) in {("mixtral", 3), ("gpt-oss", 2)} else pytest.mark.matrix
        )
        for n in EXPERTS
        for r in RANKS
    ],
)
def test_whole_experts_on_each_rank(name, ranks, tmp_path):
    # Five experts on 2, 3, 4 and 8 ranks: some have fewer than others, some none.
    out = built(CASES[name], ranks, tmp_path, families, expert_parallel=True)
    check(CASES[name], out, families, rounds=1)


@pytest.mark.matrix
@pytest.mark.parametrize("options", [{}, {"expert_parallel": True}])
@pytest.mark.parametrize("name", ["gemma2", "phi3", "mixtral", "qwen3-moe", "gpt-oss"])
def test_four_bits_agree_for_every_number_of_ranks(name, options, tmp_path):
    if options and name not in EXPERTS:
        pytest.skip("has no experts")
    case, logits = CASES[name], []
    for ranks in (1, 3):
        (tmp_path / str(ranks)).mkdir()
        more = {"quantization": "q4f16_1", **options}
        with Session(built(case, ranks, tmp_path / str(ranks), families, **more)) as session:
            steps = [session.prefill([list(p) for p in case.prompts])]
            steps += [session.decode(list(tokens)) for tokens in case.decode[:4]]
        logits.append(np.stack(steps))
    # fp16 rounds partial sums differently; a wrong slice or scale would be off by far more.
    assert models.relative_error(logits[1], logits[0]) < 1e-2
