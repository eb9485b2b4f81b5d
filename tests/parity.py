"""Builds a reference case and compares its logits, through real worker processes."""

from pathlib import Path
from typing import Any

from reference import models

from shardwright import Session
from shardwright.compiler.build import build
from shardwright.compiler.options import BuildOptions

TOLERANCE = 1e-4


def built(
    case: models.Case, ranks: int, tmp_path: Path, source: Any = models, **options: Any
) -> Path:
    """The case's artefact for `ranks` CPU ranks; `source` is `models` or `families`."""
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "dist"
    checkpoint.mkdir()
    source.write_checkpoint(case, checkpoint)
    defaults = {"quantization": "q0f32", "max_batch_size": 2, "max_seq_len": case.max_len}
    build(BuildOptions(str(checkpoint), out, num_shards=ranks, **(defaults | options)))
    return out


def check(case: models.Case, out: Path, source: Any = models, rounds: int = 2) -> None:
    """Compare prefill and every decode step with the stored logits of transformers."""
    golden = source.golden(case)
    with Session(out) as session:
        for _ in range(rounds):  # again after a reset: nothing of the first round may be left
            got = [session.prefill([list(p) for p in case.prompts])]
            got += [session.decode(list(tokens)) for tokens in case.decode]
            for have, want in zip(got, [golden.prefill, *golden.decode], strict=True):
                assert models.relative_error(have, want) < TOLERANCE
            session.reset()
