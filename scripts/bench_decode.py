"""Time decoding of built models, compare it with the floor, and print a table of models x N.

    python scripts/bench_decode.py dist/NAME ... [--batch 1 --batch 8] [--context 256]
        [--prompt 2048] [--stress] [--peers scripts/peers.json] [--json FILE]

The floor of a step is the bytes one GPU must read (its weights but the embedding, of which one row
is looked up, and its part of the cache) over the bandwidth of a large device-to-device copy that is
measured in the same run, bytes read and written both counted. Communication is not in the floor.
Each artefact runs in a process of its own. `scripts/plot_performance.py` draws the JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from shardwright.runtime.artifact import Manifest, load_manifest

COPY_BYTES = 4 << 30
WINDOW = 32  # steps: the host may see tokens in bursts, so a step's time is a slope
REST = 0.3  # seconds; from 0.1 to 1 makes no difference


def copy_bandwidth(kind: str) -> float:
    """Bytes per second of a device-to-device copy, read and written: the best of ten.

    `kind` is "cuda" or "rocm", whose library has the same functions.
    """
    from shardwright.runtime.cudart import call, cudart
    from shardwright.runtime.hip import hip

    cuda: Any = hip() if kind == "rocm" else cudart()
    buffers = [ctypes.c_void_p(), ctypes.c_void_p()]
    events = [ctypes.c_void_p(), ctypes.c_void_p()]
    for buffer in buffers:
        call(cuda, "cudaMalloc", ctypes.byref(buffer), ctypes.c_size_t(COPY_BYTES))
        call(cuda, "cudaMemset", buffer, 1, ctypes.c_size_t(COPY_BYTES))
    for event in events:
        call(cuda, "cudaEventCreate", ctypes.byref(event))
    times = []
    for _ in range(10):
        call(cuda, "cudaEventRecord", events[0], None)
        size, device_to_device = ctypes.c_size_t(COPY_BYTES), 3
        call(cuda, "cudaMemcpyAsync", *buffers, size, device_to_device, None)
        call(cuda, "cudaEventRecord", events[1], None)
        call(cuda, "cudaEventSynchronize", events[1])
        elapsed = ctypes.c_float()
        call(cuda, "cudaEventElapsedTime", ctypes.byref(elapsed), *events)
        times.append(elapsed.value / 1e3)
    for buffer in buffers:
        call(cuda, "cudaFree", buffer)
    return 2 * COPY_BYTES / min(times)


def step_bytes(manifest: Manifest, context: float, batch: int = 1) -> float:
    """Bytes that one rank must read for one token of each of `batch` rows at `context` tokens."""
    weights, config = 0.0, manifest.model.config
    count = config.get("num_local_experts") or config.get("num_experts") or 1
    # Rows choose experts independently, so together they read less than the sum.
    chosen = 1 - (1 - min(1.0, config.get("num_experts_per_tok", 1) / count)) ** batch
    for weight in manifest.weights:
        looked_up = weight.name.startswith("model.embed_tokens.")
        tied = bool(config.get("tie_word_embeddings"))
        if tied or not looked_up:
            size = int(np.prod(weight.shape)) * np.dtype(weight.dtype).itemsize
            weights += size * (chosen if ".experts." in weight.name else 1.0)
    cache = 0.0
    for spec in manifest.state:
        if spec.name in ("k_pages", "v_pages"):
            layers, _pages, heads, _page, dim = (int(d) for d in spec.shape)
            cache += layers * heads * dim * np.dtype(spec.dtype).itemsize * context
    return weights + batch * cache


def model_label(name: str, ranks: int) -> str:
    """The artefact's name without its number of ranks: `llama-8b-q4-n2` -> `llama-8b-q4`."""
    return re.sub(rf"[-_.](n|tp|x)?{ranks}$", "", name)


@contextlib.contextmanager
def busy_cores() -> Iterator[int]:
    """A process that computes without end on every core that this process may use."""
    cores = sorted(os.sched_getaffinity(0))
    code = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    busy = [subprocess.Popen([sys.executable, "-c", code, str(core)]) for core in cores]
    try:
        time.sleep(1.0)
        yield len(busy)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def time_decode(session: Any, context: int, tokens: int, batch: int) -> dict[str, float]:
    """Milliseconds a step: median over windows, mean, slowest window."""
    from shardwright.runtime.sampling import SamplingParams

    vocab = session.manifest.model.vocab_size
    rng = np.random.default_rng(batch)
    prompts = rng.integers(3, vocab, (batch, context)).tolist()
    params = SamplingParams(max_new_tokens=tokens + WINDOW, eos=())
    stamps = []
    for _ in session.generate(prompts, params):
        stamps.append(time.perf_counter())
    steps = stamps[WINDOW // 2 :]  # past the prefill, with several steps in flight
    slopes = [(b - a) / WINDOW for a, b in zip(steps, steps[WINDOW:], strict=False)]
    return {
        "steps": len(steps) - 1,
        "ms_per_token": statistics.median(slopes) * 1e3,
        "mean_ms_per_token": (steps[-1] - steps[0]) / (len(steps) - 1) * 1e3,
        "slowest_window_ms_per_token": max(slopes) * 1e3,
    }


def time_first_token(session: Any, length: int) -> dict[str, float]:
    """Seconds from a prompt of `length` tokens to the first token: medians of five prompts.

    Prompt after prompt, and `rested`, each behind `REST` seconds without work: a prompt is bound by
    the power that a hot GPU has left.
    """
    from shardwright.runtime.sampling import SamplingParams

    rng = np.random.default_rng(length)

    def one(rest: float) -> float:
        prompt = rng.integers(3, session.manifest.model.vocab_size, length).tolist()
        session.reset()
        time.sleep(rest)
        began = time.perf_counter()
        next(session.generate([prompt], SamplingParams(max_new_tokens=1, eos=())))
        return time.perf_counter() - began

    one(0)  # loads kernels
    rests = {"seconds": 0.0, "rested_seconds": REST}
    return {kind: statistics.median(one(rest) for _ in range(5)) for kind, rest in rests.items()}


def measure(
    path: str, context: int, tokens: int, batches: tuple[int, ...], prompts: tuple[int, ...],
    stress: bool, collectives: str,
) -> dict[str, Any]:  # fmt: skip
    """Load an artefact and time it; batches and prompts beyond its limits are left out."""
    from shardwright import Session
    from shardwright.runtime.sampling import SamplingParams

    manifest = load_manifest(path)
    limits = manifest.limits
    if context + tokens + WINDOW > limits.max_seq_len:
        raise SystemExit(
            f"--context {context} and --tokens {tokens} need --max-seq-len "
            f"{context + tokens + WINDOW} at build time, not {limits.max_seq_len}"
        )
    began = time.perf_counter()
    with Session(path, collectives=collectives) as session:
        loaded = time.perf_counter() - began
        next(session.generate([[3, 4, 5]], SamplingParams(max_new_tokens=1, eos=())))
        first = time.perf_counter() - began
        batches = tuple(b for b in batches if b <= limits.max_batch_size)
        for batch in batches:
            # Loads kernels, captures the graph, replays it.
            params = SamplingParams(max_new_tokens=6, eos=())
            for _ in session.generate([[5, 4, 3 + i] for i in range(batch)], params):
                pass
        decode = []
        for batch in batches:
            need = step_bytes(manifest, context + tokens / 2, batch)
            timed = time_decode(session, context, tokens, batch)
            decode.append({"batch": batch, "bytes_per_step": need, **timed})
        if stress:
            with busy_cores() as cores:
                for entry in decode:
                    timed = time_decode(session, context, tokens, int(entry["batch"]))
                    entry["busy_cores"] = cores
                    entry["busy_ms_per_token"] = timed["ms_per_token"]
                    entry["busy_mean_ms_per_token"] = timed["mean_ms_per_token"]
        fitting = [n for n in prompts if n < limits.max_seq_len]
        seconds = [{"prompt": n, **time_first_token(session, n)} for n in fitting]
        stats = session.stats()
    return {
        "artefact": manifest.name,
        "model": model_label(manifest.name, manifest.mesh.size),
        "layers": manifest.model.num_layers,
        "hidden_size": manifest.model.config.get("hidden_size"),
        "quantization": manifest.quantization,
        "ranks": manifest.mesh.size,
        "context": context,
        "decode": decode,
        "first_token": seconds,
        "load_s": loaded,
        "load_to_first_token_s": first,
        "load_phases": stats["load_phases"],
        "memory": stats["ranks"][0],
        "taken": stats["taken"],
    }


def _isolated(*arguments: str) -> Any:
    """Run a part of this script in a process of its own: a GPU's memory is free after it."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"error": (done.stderr.strip() or done.stdout.strip())[-1500:]}
    return json.loads(done.stdout.splitlines()[-1])


def peer_of(peers: list[dict[str, Any]], result: dict[str, Any], batch: int) -> str:
    """The peers' figures for a cell, the fastest first."""
    same = ("layers", "hidden_size", "ranks")
    bits = 4 if result["quantization"].startswith("q4") else 16
    found = [
        p
        for p in peers
        if p["batch"] == batch and p["bits"] == bits and all(p[k] == result[k] for k in same)
    ]
    return ", ".join(f"{p['ms']:g} {p['engine']}" for p in sorted(found, key=lambda p: p["ms"]))


def tables(report: dict[str, Any], peers: list[dict[str, Any]]) -> list[Table]:
    """Models x N, and a line for each measurement."""
    good = [r for r in report["results"] if "error" not in r]
    ranks = sorted({r["ranks"] for r in good})
    copied = report["copy_bytes_per_s"]
    title = f"ms per token / floor (copy {copied / 1e12:.2f} TB/s), context {report['context']}"
    grid = Table("model", "batch", *(f"N = {n}" for n in ranks), title=title)
    cells: dict[tuple[str, int], dict[int, str]] = {}
    lines = Table(
        *("artefact", "N", "batch", "ms/token", "floor", "share", "GB/s a GPU", "busy cores"),
        *("first token ms", "load s", "peers, ms"),
        title="each measurement",
    )
    for r in good:
        prompts = ", ".join(
            f"{1e3 * f['seconds']:.1f}, rested {1e3 * f['rested_seconds']:.1f} ({f['prompt']})"
            for f in r["first_token"]
        )
        for d in r["decode"]:
            ms, floor = d["ms_per_token"], d["bytes_per_step"] / copied * 1e3
            cells.setdefault((r["model"], d["batch"]), {})[r["ranks"]] = f"{ms:.2f} / {floor:.2f}"
            busy = d.get("busy_mean_ms_per_token")
            slower = f"{busy / d['mean_ms_per_token'] - 1:+.1%}" if busy else ""
            speed = f"{d['bytes_per_step'] / ms / 1e6:.0f}"
            lines.add_row(
                *(r["artefact"], str(r["ranks"]), str(d["batch"]), f"{ms:.3f}", f"{floor:.3f}"),
                *(f"{floor / ms:.0%}", speed, slower, prompts, f"{r['load_s']:.1f}"),
                peer_of(peers, r, d["batch"]),
            )
    for (model, batch), row in cells.items():
        grid.add_row(model, str(batch), *(row.get(n, "") for n in ranks))
    return [grid, lines]


@click.command()
@click.argument("artefacts", nargs=-1)
@click.option("--context", default=256, show_default=True, help="Tokens in the cache at the start.")
@click.option("--tokens", default=256, show_default=True, help="Steps to time.")
@click.option("--batch", "batches", multiple=True, default=(1,), type=int, help="Rows. Repeatable.")
@click.option("--prompt", "prompts", multiple=True, type=int, help="Time a prompt's first token.")
@click.option("--stress", is_flag=True, help="Again with a busy process on every core.")
@click.option("--collectives", default="auto", show_default=True, help="auto or nccl.")
@click.option("--peers", type=click.Path(path_type=Path, exists=True), help="Others' figures.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write results there.")
@click.option("--one", hidden=True, is_flag=True)
@click.option("--copy", hidden=True, is_flag=True)
def main(
    artefacts: tuple[str, ...], context: int, tokens: int, batches: tuple[int, ...],
    prompts: tuple[int, ...], stress: bool, collectives: str, peers: Path | None,
    json_path: Path | None, one: bool, copy: bool,
) -> None:  # fmt: skip
    """Print ms/token, floor and share of the copy bandwidth for each artefact and batch."""
    if copy:
        print(json.dumps(copy_bandwidth(artefacts[0])))
        return
    if one:
        found = measure(artefacts[0], context, tokens, batches, prompts, stress, collectives)
        print(json.dumps(found))
        return
    if not artefacts:
        raise click.UsageError("name an artefact")
    copied = _isolated("--copy", load_manifest(artefacts[0]).target.kind)
    if isinstance(copied, dict):
        raise click.ClickException(copied["error"])
    options = [f"--context={context}", f"--tokens={tokens}", f"--collectives={collectives}"]
    options += [f"--batch={b}" for b in batches] + [f"--prompt={p}" for p in prompts]
    options += ["--stress"] if stress else []
    report: dict[str, Any] = {"copy_bytes_per_s": copied, "context": context, "results": []}
    for path in artefacts:
        result = _isolated("--one", path, *options)
        report["results"].append({"path": path, **result})
        if "error" in result:
            print(f"{path}: {result['error']}", file=sys.stderr)
        if json_path is not None:  # after each: a run that is cut short leaves what it has
            json_path.write_text(json.dumps(report, indent=1) + "\n")
    for table in tables(report, json.loads(peers.read_text())["figures"] if peers else []):
        Console(width=160).print(table)
    if any("error" in r for r in report["results"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
