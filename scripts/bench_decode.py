"""Time single-stream decoding of built models and compare it with the floor.

    python scripts/bench_decode.py dist/NAME ... [--context 256] [--tokens 256] [--json FILE]

The floor of a step is the bytes one GPU must read (its weights but the embedding, of which one row
is looked up, and its part of the cache) over the bandwidth of a large device-to-device copy that is
measured in the same run, bytes read and written both counted. Communication is not in the floor.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from shardwright.runtime.artifact import Manifest, load_manifest

COPY_BYTES = 4 << 30


def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy, read and written: the best of ten."""
    from shardwright.runtime.cudart import call, cudart

    cuda = cudart()
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


def step_bytes(manifest: Manifest, context: float) -> float:
    """Bytes that one rank must read for one token of one row at `context` tokens."""
    weights = 0
    for weight in manifest.weights:
        looked_up = weight.name.startswith("model.embed_tokens.")
        tied = bool(manifest.model.config.get("tie_word_embeddings"))
        if tied or not looked_up:
            weights += int(np.prod(weight.shape)) * np.dtype(weight.dtype).itemsize
    cache = 0.0
    for spec in manifest.state:
        if spec.name in ("k_pages", "v_pages"):
            layers, _pages, heads, _page, dim = (int(d) for d in spec.shape)
            cache += layers * heads * dim * np.dtype(spec.dtype).itemsize * context
    return weights + cache


def measure(path: str, context: int, tokens: int) -> dict[str, Any]:
    """Load an artefact and generate; milliseconds of each step, load and prefill seconds."""
    from shardwright import Session
    from shardwright.runtime.sampling import SamplingParams

    manifest = load_manifest(path)
    rng = np.random.default_rng(0)
    prompt = rng.integers(3, manifest.model.vocab_size, context).tolist()
    began = time.perf_counter()
    with Session(path) as session:
        loaded = time.perf_counter() - began
        params = SamplingParams(max_new_tokens=tokens + 32, eos=())
        for _ in session.generate([prompt[::-1]], SamplingParams(max_new_tokens=4, eos=())):
            pass  # the first run loads kernels and captures the graph
        began = time.perf_counter()
        stamps = []
        for _ in session.generate([prompt], params):
            stamps.append(time.perf_counter())
        memory = session.stats()["ranks"][0]
    # The host sees tokens in bursts, so a step's time is the slope over windows of 32 steps.
    first_token = stamps[0] - began
    steps = stamps[16:]
    slopes = [(b - a) / 32 for a, b in zip(steps, steps[32:], strict=False)]
    ms = statistics.median(slopes) * 1e3
    need = step_bytes(manifest, context + tokens / 2)
    return {
        "artefact": Path(path).name,
        "quantization": manifest.quantization,
        "ranks": manifest.mesh.size,
        "context": context,
        "steps": len(stamps) - 1,
        "ms_per_token": ms,
        "mean_ms_per_token": (stamps[-1] - stamps[0]) / (len(stamps) - 1) * 1e3,
        "bytes_per_step": need,
        "gb_per_s": need / ms / 1e6,
        "first_token_s": first_token,
        "load_s": loaded,
        "memory": memory,
    }


def _isolated(*arguments: str) -> Any:
    """Run a part of this script in a process of its own: a GPU's memory is free after it."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"error": (done.stderr.strip() or done.stdout.strip())[-1500:]}
    return json.loads(done.stdout.splitlines()[-1])


@click.command()
@click.argument("artefacts", nargs=-1)
@click.option("--context", default=256, show_default=True, help="Tokens in the cache at the start.")
@click.option("--tokens", default=256, show_default=True, help="Tokens to generate.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write results there.")
@click.option("--one", hidden=True, is_flag=True)
@click.option("--copy", hidden=True, is_flag=True)
def main(
    artefacts: tuple[str, ...],
    context: int,
    tokens: int,
    json_path: Path | None,
    one: bool,
    copy: bool,
) -> None:
    """Print ms/token, GB/s per GPU and the share of the copy bandwidth for each artefact."""
    if copy:
        print(json.dumps(copy_bandwidth()))
        return
    if one:
        print(json.dumps(measure(artefacts[0], context, tokens)))
        return
    copied = _isolated("--copy")
    if isinstance(copied, dict):
        raise click.ClickException(copied["error"])
    table = Table(title=f"decode, batch 1, context {context}, copy {copied / 1e12:.2f} TB/s")
    for column in ("model", "N", "ms/token", "floor", "GB/s per GPU", "share", "TTFT s", "load s"):
        table.add_column(column, justify="right")
    results = []
    sizes = ("--context", str(context), "--tokens", str(tokens))
    for path in artefacts:
        result = _isolated("--one", path, *sizes)
        results.append({"path": path, **result})
        if "error" in result:
            table.add_row(Path(path).name, "", "failed")
            print(f"{path}: {result['error']}", file=sys.stderr)
            continue
        floor = result["bytes_per_step"] / copied * 1e3
        table.add_row(
            result["artefact"],
            str(result["ranks"]),
            f"{result['ms_per_token']:.2f}",
            f"{floor:.2f}",
            f"{result['gb_per_s']:.0f}",
            f"{floor / result['ms_per_token']:.0%}",
            f"{result['first_token_s']:.2f}",
            f"{result['load_s']:.1f}",
        )
    Console(width=110).print(table)
    if json_path is not None:
        text = json.dumps({"copy_bytes_per_s": copied, "results": results}, indent=1)
        json_path.write_text(text + "\n")
    if any("error" in r for r in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
