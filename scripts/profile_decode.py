"""Per-kernel times of a decode step, from a trace of the replayed graph on rank 0's GPU.

    python scripts/profile_decode.py dist/NAME [--context 256] [--steps 64]
    python scripts/profile_decode.py dist/NAME --prompt 2048      of a prefill instead

Needs torch, whose profiler reads CUDA's activity records (CUPTI). Times of a kernel are from its
start to its end on the device; `gap` is the time in a step in which no kernel runs. Recording makes
a step a few per cent slower than `bench_decode.py` says.
"""

from __future__ import annotations

import re
from collections import defaultdict

import click
import numpy as np
from rich.console import Console
from rich.table import Table


def record(path: str, context: int, steps: int, prompts: int) -> list[tuple[str, float, float]]:
    """(name, start, duration) in microseconds of every kernel, in order.

    Of `steps` steps after a prompt of `context` tokens, or of `prompts` such prompts instead.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    from shardwright import Session
    from shardwright.runtime.sampling import SamplingParams

    torch.cuda.init()
    with Session(path) as session:
        vocab = session.manifest.model.vocab_size
        # Different ones, because a prompt's beginning that is in the cache is not computed again.
        drawn = np.random.default_rng(0).integers(3, vocab, (prompts + 1, context)).tolist()
        prompt, *others = drawn
        warm = SamplingParams(max_new_tokens=4, eos=())
        for _ in session.generate([prompt[::-1]], warm):
            pass
        one = SamplingParams(max_new_tokens=1, eos=())
        if prompts:
            with profile(activities=[ProfilerActivity.CUDA]) as trace:
                for other in others:
                    list(session.generate([other], one))
        else:
            several = SamplingParams(max_new_tokens=steps + 32, eos=())
            generation = session.generate([prompt], several)
            for _ in range(16):  # past the prefill, and with several steps in flight
                next(generation)
            with profile(activities=[ProfilerActivity.CUDA]) as trace:
                for _ in range(steps):
                    next(generation)
            for _ in generation:
                pass
    events = [
        (e.name, e.time_range.start, e.time_range.elapsed_us())
        for e in trace.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    ]
    return sorted(events, key=lambda event: event[1])


@click.command()
@click.argument("artefact")
@click.option("--context", default=256, show_default=True, help="Tokens in the cache at the start.")
@click.option("--steps", default=64, show_default=True, help="Steps to record.")
@click.option("--prompt", default=0, help="Record prefills of so many tokens instead of steps.")
def main(artefact: str, context: int, steps: int, prompt: int) -> None:
    """Print kernels by their time in a step, or in a prefill."""
    recorded = record(artefact, prompt or context, steps, 4 if prompt else 0)
    events = [e for e in recorded if not e[0].startswith("Mem")]
    # A step ends with its sampler; the first and the last may be cut off.
    ends = [i for i, e in enumerate(events) if "sample_kernel" in e[0]]
    inside = events[ends[0] + 1 : ends[-1] + 1]
    count = len(ends) - 1
    times: dict[str, list[float]] = defaultdict(list)
    for name, _, elapsed in inside:
        times[re.sub(r"<.*|\(.*", "", name)].append(elapsed)
    span = (inside[-1][1] + inside[-1][2] - inside[0][1]) / count
    busy = sum(e[2] for e in inside) / count
    what = f"prompts of {prompt} tokens" if prompt else "steps"
    table = Table(title=f"{artefact}: {count} {what}, {span:.1f} us each")
    for column in ("kernel", "per step", "us each", "us per step", "share"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for name, values in sorted(times.items(), key=lambda item: -sum(item[1])):
        each = float(np.median(values))
        total = sum(values) / count
        cells = (f"{len(values) / count:.0f}", f"{each:.2f}", f"{total:.1f}", f"{total / span:.1%}")
        table.add_row(name[:70], *cells)
    table.add_row("gap", "", "", f"{span - busy:.1f}", f"{(span - busy) / span:.1%}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
