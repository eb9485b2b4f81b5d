"""Decode the same prompts twice and compare tokens and final logits, bit for bit.

    python scripts/check_repeat.py dist/NAME ... [--steps 2000]

Greedy and sampled rows side by side, as many as the artefact holds up to --rows. The second run is
in a session of its own. Exit code 1 if anything differs.
"""

from __future__ import annotations

from typing import Any

import click
import numpy as np


def run(path: str, steps: int, rows: int, collectives: str) -> tuple[list[list[Any]], Any]:
    """Tokens of each step, and the float32 logits `[rows, vocab]` after the last one."""
    from shardwright import Session
    from shardwright.runtime.sampling import SamplingParams

    with Session(path, collectives=collectives) as session:
        limits = session.manifest.limits
        rows = min(rows, limits.max_batch_size)
        rng = np.random.default_rng(7)
        prompts = [
            rng.integers(3, session.manifest.model.vocab_size, 5 + 3 * row).tolist()
            for row in range(rows)
        ]
        room = limits.max_seq_len - max(map(len, prompts)) - 1
        if steps > room:
            raise click.ClickException(
                f"{path}: {steps} steps need --max-seq-len {limits.max_seq_len + steps - room}"
            )
        params = [
            SamplingParams(
                max_new_tokens=steps,
                eos=(),
                temperature=float(row % 2),
                top_p=1 - row / 100,
                seed=row,
            )
            for row in range(rows)
        ]
        tokens = [list(step) for step in session.generate(prompts, params)]
        return tokens, session.decode([int(t) for t in tokens[-1]])


@click.command()
@click.argument("artefacts", nargs=-1, required=True)
@click.option("--steps", default=2000, show_default=True, help="Decode steps of each run.")
@click.option("--rows", default=2, show_default=True, help="Rows, every second one sampled.")
@click.option("--collectives", default="auto", show_default=True, help="auto or nccl.")
def main(artefacts: tuple[str, ...], steps: int, rows: int, collectives: str) -> None:
    """Check that a run repeats bit for bit."""
    failed = False
    for path in artefacts:
        (tokens, logits), (again, logits_again) = (
            run(path, steps, rows, collectives) for _ in range(2)
        )
        same_tokens = tokens == again
        same_logits = logits.tobytes() == logits_again.tobytes()
        finite = bool(np.isfinite(logits).all())
        failed |= not (same_tokens and same_logits and finite)
        distinct = len({t for step in tokens for t in step})
        print(
            f"{path}: {len(tokens)} steps x {len(tokens[0])} rows, {distinct} distinct tokens: "
            f"tokens {'equal' if same_tokens else 'DIFFER'}, "
            f"logits {'equal bit for bit' if same_logits else 'DIFFER'}"
            f"{'' if finite else ', NOT FINITE'}"
        )
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
