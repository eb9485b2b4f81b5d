"""Per-kernel times of a decode step, from a trace of the replayed graph on rank 0's GPU.

    python scripts/profile_decode.py dist/NAME [--context 256] [--steps 64] [--batch 1]
        [--bandwidth 4.24]
    python scripts/profile_decode.py dist/NAME --prompt 2048      of a prefill instead

Needs torch, whose profiler reads CUDA's activity records (CUPTI). Times of a kernel are from its
start to its end on the device. Bytes are the weights and the cache that it reads; its floor is
these bytes over the bandwidth, in TB/s of a copy, read and written (see `bench_decode.py`). `gap`
is the time between the end of the kernel before, whichever it was, and the start; negative where
the two overlap. Recording makes a step a few per cent slower than `bench_decode.py` says.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import NamedTuple

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from shardwright.runtime.artifact import Kernel, Manifest, load_manifest

COMMUNICATION = re.compile(r"all_?reduce|all_?gather|nccl|peer", re.IGNORECASE)


class Event(NamedTuple):
    """A kernel on the device or a call of the CUDA library on the host, in microseconds."""

    name: str
    start: float
    elapsed: float


def record(
    path: str, context: int, steps: int, batch: int, prompts: int
) -> tuple[list[Event], list[Event]]:
    """Kernels, and the host's calls of CUDA, in order.

    Of `steps` steps of `batch` rows, each after a prompt of `context` tokens, or of `prompts` such
    prompts instead.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    from shardwright import Session
    from shardwright.runtime.sampling import SamplingParams

    torch.cuda.init()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with Session(path) as session:
        vocab = session.manifest.model.vocab_size
        # Different ones, because a prompt's beginning that is in the cache is not computed again.
        drawn = np.random.default_rng(0).integers(3, vocab, (batch + prompts, context)).tolist()
        rows, others = drawn[:batch], drawn[batch:]
        warm = SamplingParams(max_new_tokens=4, eos=())
        for _ in session.generate([row[::-1] for row in rows], warm):
            pass
        one = SamplingParams(max_new_tokens=1, eos=())
        if prompts:
            with profile(activities=activities) as trace:
                for other in others:
                    list(session.generate([other], one))
        else:
            several = SamplingParams(max_new_tokens=steps + 32, eos=())
            generation = session.generate(rows, several)
            for _ in range(16):  # past the prefill, and with several steps in flight
                next(generation)
            with profile(activities=activities) as trace:
                for _ in range(steps):
                    next(generation)
            for _ in generation:
                pass
    kernels, calls = [], []
    for e in trace.events():
        event = Event(e.name, e.time_range.start, e.time_range.elapsed_us())
        if e.device_type == torch.autograd.DeviceType.CUDA:
            kernels.append(event)
        elif e.name.startswith("cu"):
            calls.append(event)
    return sorted(kernels, key=lambda e: e.start), sorted(calls, key=lambda e: e.start)


def owner(name: str, kernels: dict[str, Kernel]) -> str:
    """The kernel of the manifest that a launch belongs to, or the launch's own short name."""
    short = re.sub(r"<.*|\(.*", "", name)
    match = re.fullmatch(r"(.+)_kernel(_\d+)?", short)
    return match[1] if match and match[1] in kernels else short


def cache_bytes(manifest: Manifest, tokens: float) -> float:
    """Bytes of a rank's cache that attention reads in a step of one row of `tokens` tokens."""
    pages = [s for s in manifest.state if s.name in ("k_pages", "v_pages")]
    sizes = [[int(d) for d in s.shape] for s in pages]
    return sum(
        layers * heads * dim * np.dtype(s.dtype).itemsize * tokens
        for s, (layers, _, heads, _, dim) in zip(pages, sizes, strict=True)
    )


def kernel_table(
    events: list[Event], count: int, kernels: dict[str, Kernel], cached: float, bandwidth: float
) -> Table:
    """A line for each kernel by its time in a step, then communication, gaps and the whole."""
    times: dict[str, list[float]] = defaultdict(list)
    gaps: dict[str, list[float]] = defaultdict(list)
    # Overlapping kernels count once: what is not covered by any is a gap.
    covered, end = 0.0, events[0].start
    for event in events:
        name = owner(event.name, kernels)
        times[name].append(event.elapsed)
        gaps[name].append(event.start - end)
        after = max(end, event.start + event.elapsed)
        covered += after - max(end, event.start)
        end = after
    span = (end - events[0].start) / count
    table = Table(title=f"{count} of {span:.1f} us")
    columns = (
        "kernel",
        "launches",
        "us each",
        "us",
        "share",
        "MB",
        "floor us",
        "of floor",
        "gap us",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "kernel" else "right")
    readers = sum(k.cache and "attention" in n for n, k in kernels.items()) or 1
    for name, values in sorted(times.items(), key=lambda item: -sum(item[1])):
        total = sum(values) / count
        kernel = kernels.get(name, Kernel(0, 0, False))
        reads = kernel.weight_bytes
        if kernel.cache and "attention" in name:
            reads += cached / readers
        floor = reads / bandwidth / 1e6
        table.add_row(
            name[:60],
            f"{len(values) / count:.0f}",
            f"{float(np.median(values)):.2f}",
            f"{total:.1f}",
            f"{total / span:.1%}",
            *(
                (f"{reads / 1e6:.1f}", f"{floor:.1f}", f"{floor / total:.0%}")
                if reads
                else ("",) * 3
            ),
            f"{float(np.median(gaps[name])):.2f}",
        )
    sums = sum(sum(v) for n, v in times.items() if COMMUNICATION.search(n)) / count
    idle = span - covered / count
    table.add_section()
    table.add_row("communication", "", "", f"{sums:.1f}", f"{sums / span:.1%}")
    table.add_row("gaps", "", "", f"{idle:.1f}", f"{idle / span:.1%}")
    whole = (sum(k.weight_bytes for k in kernels.values()) + cached) if kernels else 0.0
    if whole:
        floor = whole / bandwidth / 1e6
        cells = (f"{whole / 1e6:.1f}", f"{floor:.1f}", f"{floor / span:.0%}")
        table.add_row("whole", "", "", f"{span:.1f}", "", *cells)
    return table


def host_lines(calls: list[Event], count: int) -> list[str]:
    """The host's calls of CUDA for each step, and how many of them launch single kernels."""
    times: dict[str, list[float]] = defaultdict(list)
    for call in calls:
        times[call.name].append(call.elapsed)
    number = Counter({name: len(values) for name, values in times.items()})
    lines = [
        f"host: {name} {n / count:.2f} a step, {float(np.median(times[name])):.1f} us each"
        for name, n in number.most_common()
    ]
    single = sum(n for name, n in number.items() if re.search("Launch(?!.*Graph)", name))
    single -= sum(n for name, n in number.items() if "GraphLaunch" in name)
    return [*lines, f"host: {single / count:.2f} launches of single kernels a step"]


@click.command()
@click.argument("artefact")
@click.option("--context", default=256, show_default=True, help="Tokens in the cache at the start.")
@click.option("--steps", default=64, show_default=True, help="Steps to record.")
@click.option("--batch", default=1, show_default=True, help="Rows.")
@click.option("--prompt", default=0, help="Record prefills of so many tokens instead of steps.")
@click.option("--bandwidth", default=4.24, show_default=True, help="Of a copy, in TB/s.")
def main(
    artefact: str, context: int, steps: int, batch: int, prompt: int, bandwidth: float
) -> None:
    """Print kernels by their time in a step, or in a prefill."""
    recorded, calls = record(artefact, prompt or context, steps, batch, 4 if prompt else 0)
    events = [e for e in recorded if not e.name.startswith("Mem")]
    # A step ends with its sampler; the first and the last may be cut off.
    ends = [i for i, e in enumerate(events) if "sample_kernel" in e.name]
    if len(ends) < 2:
        # The device may have finished all of them before the recording began.
        raise click.ClickException(f"no whole step in the recording of {steps}; take more --steps")
    inside = events[ends[0] + 1 : ends[-1] + 1]
    count = len(ends) - 1
    manifest = load_manifest(artefact)
    functions = manifest.functions
    bucket = min(b for b in manifest.decode_buckets if b >= batch)
    decode = functions.get(f"decode_{bucket}_peer", functions[f"decode_{bucket}"])
    kernels = {} if prompt else decode.kernels
    cached = 0.0 if prompt else batch * cache_bytes(manifest, context + 16 + steps / 2)
    table = kernel_table(inside, count, kernels, cached, bandwidth)
    what = f"prefills of {prompt} tokens" if prompt else f"decode steps of {batch} rows"
    table.title = f"{manifest.name}: {what}, {table.title}"
    Console(width=140).print(table)
    first, last = inside[0].start, inside[-1].start
    for line in host_lines([c for c in calls if first <= c.start <= last], count):
        print(line)


if __name__ == "__main__":
    main()
