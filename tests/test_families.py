"""Model families other than Llama against stored logits of transformers."""

import pytest
from parity import built, check
from reference import families

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


EXPERTS = [name for name in CASES if "mixtral" in name or "moe" in name]


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        pytest.param(n, r, marks=() if (n, r) in {("mixtral", 3)} else pytest.mark.matrix)
        for n in EXPERTS
        for r in RANKS
    ],
)
def test_whole_experts_on_each_rank(name, ranks, tmp_path):
    # Five experts on 2, 3, 4 and 8 ranks: some have fewer than others, some none.
    out = built(CASES[name], ranks, tmp_path, families, expert_parallel=True)
    check(CASES[name], out, families, rounds=1)
