"""Time the way from an artefact to its first token, from page cache.

    python scripts/bench_load.py dist/NAME --shards DIR

`dist/NAME` is built with --build-model-only (or --dummy-weights). A copy of it in DIR gets shards
of random values, as large as the real ones; then it is loaded twice, the second time surely from
page cache, and the seconds of each phase and the bytes per second of the weights are printed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click
import numpy as np

from shardwright.runtime.artifact import (
    FileEntry,
    Manifest,
    load_manifest,
    shard_name,
    write_manifest,
)
from shardwright.runtime.memory import gib

BLOCK = 1 << 22  # elements of random values, used again and again


def write_shard(manifest: Manifest, directory: Path, rank: int) -> tuple[str, FileEntry]:
    """A shard of random values of ordinary size."""
    from shardwright.compiler.shard_writer import ShardWriter

    rng = np.random.default_rng(0)
    blocks = {
        "uint32": rng.integers(0, 1 << 32, BLOCK, dtype=np.uint32),
        "float16": rng.normal(0, 0.02, BLOCK).astype(np.float16),
        "float32": rng.normal(0, 0.02, BLOCK).astype(np.float32),
    }
    name = shard_name(rank, manifest.mesh.size)
    with ShardWriter(directory / name, [(w.name, w.shape, w.dtype) for w in manifest.weights]) as w:
        for spec in manifest.weights:
            left = math.prod(spec.shape)
            while left:
                piece = blocks[spec.dtype][: min(left, BLOCK)]
                w.write(spec.name, piece)
                left -= len(piece)
        return name, w.finish()


def fill(artefact: Path, directory: Path) -> None:
    """Copy the artefact and give the copy shards."""
    manifest = load_manifest(artefact)
    shutil.copytree(artefact, directory, ignore=shutil.ignore_patterns("shards", "manifest.json"))
    (directory / "shards").mkdir()
    world = manifest.mesh.size
    with ProcessPoolExecutor(min(world, os.cpu_count() or 1)) as pool:
        jobs = [pool.submit(write_shard, manifest, directory, rank) for rank in range(world)]
        files = {**manifest.files, **dict(job.result() for job in jobs)}
    changed = dataclasses.replace(manifest, files=files, has_weights=True, dummy_weights=False)
    write_manifest(directory, changed)


def load(directory: str) -> None:
    """Print a line of JSON about one load."""
    began = time.perf_counter()
    from shardwright import Session
    from shardwright.runtime.sampling import SamplingParams

    with Session(directory) as session:
        loaded = time.perf_counter() - began
        next(session.generate([[3, 4, 5]], SamplingParams(max_new_tokens=1, eos=())))
        first = time.perf_counter() - began
        stats = session.stats()
    figures = {"load_s": loaded, "first_token_s": first, "phases": stats["load_phases"]}
    figures |= {"weights": stats["ranks"][0]["weights"], "taken": stats["taken"]}
    print(json.dumps(figures))


@click.command()
@click.argument("artefact", type=click.Path(path_type=Path))
@click.option("--shards", type=click.Path(path_type=Path), help="Directory to make for the copy.")
@click.option("--times", default=2, show_default=True, help="Loads to time.")
def main(artefact: Path, shards: Path | None, times: int) -> None:
    """Print the seconds from the start of the process to the first token, and of each phase."""
    if shards is not None:
        began = time.perf_counter()
        fill(artefact, shards)
        print(f"shards written in {time.perf_counter() - began:.1f} s")
    for _ in range(times):
        command = [
            sys.executable,
            "-c",
            f"import bench_load; bench_load.load({str(shards or artefact)!r})",
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        }
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise click.ClickException(done.stderr.strip()[-1500:])
        found = json.loads(done.stdout.splitlines()[-1])
        phases = ", ".join(f"{name} {value:.2f}" for name, value in found["phases"].items())
        rate = found["weights"] / found["phases"]["weights"] / 1e9
        print(
            f"first token {found['first_token_s']:.2f} s after the start, "
            f"loaded {found['load_s']:.2f} s ({phases}); "
            f"{found['weights'] / 1e9:.1f} GB a rank at {rate:.1f} GB/s"
        )
        for rank, (predicted, measured) in enumerate(found["taken"]):
            if measured is not None:
                print(f"rank {rank}: {gib(measured)} taken, {gib(predicted)} predicted")


if __name__ == "__main__":
    main()
