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
