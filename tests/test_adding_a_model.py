"""The example of docs/adding-a-model.md works as it stands there."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from parity import built
from reference import models

from shardwright import Session, model_defs
from shardwright.compiler.options import BuildOptions, limits_of
from shardwright.compiler.program import partition_program
from shardwright.compiler.quantization import quantization

PAGE = Path(__file__).parent.parent / "docs/adding-a-model.md"
LLAMA = models.cases()[0]
MULTIPLIERS = dict(
    embedding_multiplier=1.5, attention_multiplier=0.3, residual_multiplier=0.7, logits_scaling=2.5
)


@pytest.fixture
def granite(monkeypatch):
    module = ModuleType("shardwright.model_defs.granite")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look for names
    exec("\n\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)), vars(module))
    family = model_defs.Family(module.GraniteConfig, module.GraniteForCausalLM)
    monkeypatch.setitem(model_defs.FAMILIES, "GraniteForCausalLM", family)


def case(**changes):
    kind = {"architectures": ["GraniteForCausalLM"], "model_type": "granite"}
    return replace(LLAMA, config={**LLAMA.config, **kind, **MULTIPLIERS, **changes})


def logits(case, ranks, tmp_path):
    tmp_path.mkdir(exist_ok=True)
    with Session(built(case, ranks, tmp_path)) as session:
        steps = [session.prefill([list(p) for p in case.prompts])]
        return np.stack(steps + [session.decode(list(tokens)) for tokens in case.decode])


def test_it_gives_the_same_logits_on_any_number_of_ranks(granite, tmp_path):
    one, three = (logits(case(), n, tmp_path / str(n)) for n in (1, 3))
    assert models.relative_error(three, one) < 1e-4
    # The last of the constants only divides.
    halved = logits(case(logits_scaling=5.0), 1, tmp_path / "halved")
    assert models.relative_error(2 * halved, one) < 1e-5


@pytest.mark.reference
def test_transformers_gives_the_same_logits(granite, tmp_path):
    from test_reference import make_reference

    prefill, decode = make_reference().compute(case(), models)
    got = logits(case(), 2, tmp_path)
    assert models.relative_error(got, np.stack([prefill, *decode])) < 1e-4


def test_a_scaled_partial_sum_is_reduced_after_it_is_scaled(granite, tmp_path):
    _, family = model_defs.family_of(case().config)
    config = family.config.from_hf(case().config)
    limits = limits_of(BuildOptions("", tmp_path, max_batch_size=2), config)
    model = family.model(config, "float32")
    text = partition_program(model, quantization("q0f32"), limits, ranks=2).explanation()
    rows = [line.split() for line in text.splitlines()]
    at = next(i for i, row in enumerate(rows) if row[0:1] == ["matmul"] and "o_proj" in row[-1])
    kinds = [(row[0], row[-1]) for row in rows[at + 1 : at + 4]]
    assert kinds == [
        ("multiply", "Partial(sum)"),
        ("all-reduce", "Replicate"),
        ("add", "Replicate"),
    ]
