"""What the command line shows: progress bars, the table of an artefact, errors in one line."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from shardwright.errors import ArtifactError
from shardwright.runtime.artifact import KERNELS, Manifest, verify_file
from shardwright.runtime.code_object import code_objects, occupancy, read_kernels
from shardwright.runtime.memory import CACHE, tensor_bytes

_TEXT = ("name", "use", "sha256", "local shape", "dtype", "placement", "result")
"""Columns that are no numbers."""

_KERNEL_COLUMNS = (
    *("wave", "VGPRs", "SGPRs", "spills", "LDS", "scratch", "waves a SIMD"),
    *("instructions", "16-byte loads", "loads", "stores", "matrix"),
)


class TerminalProgress:
    """Progress bars on standard error, and nothing at all if that is not a terminal."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> TerminalProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    @contextmanager
    def step(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Show a step of `total` units (unknown if None); yields `advance(units)`."""
        with self._task(name, total) as task:

            def advance(units: int = 1) -> None:
                self._bars.advance(task, units)

            yield advance

    @contextmanager
    def bar(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Show a step whose size turns up on the way; yields `update(done, total)`."""
        with self._task(name, None) as task:

            def update(done: int, total: int) -> None:
                self._bars.update(task, completed=done, total=total)

            yield update

    @contextmanager
    def _task(self, name: str, total: int | None) -> Iterator[TaskID]:
        # Not before: until then the terminal is for the bars of a download.
        self._bars.start()
        task = self._bars.add_task(name, total=total)
        yield task
        # A step that came to its end is whole, however well its size was known before.
        whole = self._bars.tasks[task].total or 1
        self._bars.update(task, total=whole, completed=whole)


def size(count: int) -> str:
    """`count` bytes in the unit that fits, such as "1.5 MiB"."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def rank_memory(manifest: Manifest) -> dict[str, int]:
    """Bytes that each rank's tensors hold, by use: weights, cache, workspace, state."""
    cache = sum(tensor_bytes(t) for t in manifest.state if t.name in CACHE)
    return {
        "weights": sum(map(tensor_bytes, manifest.weights)),
        "cache": cache,
        "workspace": manifest.workspace_bytes,
        "state": sum(map(tensor_bytes, manifest.state)) - cache,
    }


def print_manifest(manifest: Manifest, tensors: bool = False) -> None:
    """Print what an artefact is and what it needs; with `tensors`, every weight too."""
    tables = [_summary(manifest), _memory(manifest)]
    tables.append(table("Functions", "name", "arguments"))
    for name, function in manifest.functions.items():
        tables[-1].add_row(name, str(len(function.args)))
    tables.append(table("Files", "name", "bytes", "", "sha256"))
    for name, entry in manifest.files.items():
        tables[-1].add_row(name, str(entry.bytes), size(entry.bytes), entry.sha256[:16])
    if tensors:
        tables.append(table("Tensors of each rank", "name", "local shape", "dtype", "placement"))
        for weight in manifest.weights:
            shape = str(list(weight.shape))
            tables[-1].add_row(weight.name, shape, weight.dtype, weight.placement)
    for part in tables[:-1]:
        show(part)
        print()
    show(tables[-1])


def show(part: Table | str) -> None:
    """Print a table or a line; nothing is cut off where there is no terminal with a width."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 240)
    with console.capture() as shown:
        console.print(part)
    # rich fills every line up to the table's width.
    print("\n".join(line.rstrip() for line in shown.get().rstrip().splitlines()))


def print_findings(manifest: Manifest, findings: Sequence[Any]) -> None:
    """Print what `selftest` found: an error is the largest, of the largest value there."""
    archs = " ".join([manifest.target.kind, *manifest.target.archs])
    print(f"{manifest.name}: {archs}, {manifest.mesh.size} ranks, Shardwright {manifest.version}")
    part = table("", "name", "error", "tolerance", "result")
    for f in findings:
        result = f.note or ("ok" if f.passed else "WRONG")
        figures = ("", "") if f.note else (f"{f.error:.1e}", f"{f.tolerance:.0e}")
        part.add_row(f.name, *figures, result)
    show(part)
    passed, unchecked = sum(f.passed for f in findings), sum(bool(f.note) for f in findings)
    print(
        f"\n{passed} right, {len(findings) - passed - unchecked} wrong, {unchecked} not checked; "
        f"{platform.platform()}, Python {platform.python_version()}"
    )


def print_kernels(directory: Path) -> None:
    """Print what a library for AMD GPUs and its build say of each kernel.

    Raises ArtifactError if the library or `kernels.json` is damaged.
    """
    counted = {(code.arch, code.name): code for code in read_kernels(directory)}
    for found in code_objects(directory / "model.so"):
        title = f"Kernels for {found.arch}, code object version {found.version}"
        part = table(title, "name", *_KERNEL_COLUMNS)
        for kernel in found.kernels:
            code = counted.get((found.arch, kernel.name))
            if code is None:
                raise ArtifactError(
                    f"{directory}: {kernel.name} is not in {KERNELS}; build the model again"
                )
            values = (
                *(kernel.wave, kernel.vgprs, kernel.sgprs, kernel.vgpr_spills + kernel.sgpr_spills),
                *(kernel.shared_bytes, kernel.private_bytes, occupancy(found.arch, kernel)),
                *(code.instructions, code.wide_loads, code.loads, code.stores, code.matrix),
            )
            part.add_row(kernel.name, *map(str, values))
        print()
        show(part)


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Check every file of an artefact; raises ArtifactError for the first that is not whole."""
    total = sum(entry.bytes for entry in manifest.files.values())
    with TerminalProgress() as progress, progress.step("Verify", total) as advance:
        for name, entry in manifest.files.items():
            verify_file(directory, name, entry)
            advance(entry.bytes)


def _summary(manifest: Manifest) -> Table:
    limits = manifest.limits
    mesh = ", ".join(
        f"{axis} {n}" for axis, n in zip(manifest.mesh.axes, manifest.mesh.shape, strict=True)
    )
    rows = {
        "model": f"{manifest.model.architecture}, {manifest.model.num_layers} layers, "
        f"vocabulary {manifest.model.vocab_size}",
        "target": " ".join([manifest.target.kind, *manifest.target.archs]),
        "mesh": mesh,
        "quantization": f"{manifest.quantization} ({manifest.dtype})",
        "limits": f"{limits.max_seq_len} tokens a row, {limits.max_batch_size} rows, "
        f"prefill in chunks of {limits.prefill_chunk_size}",
        "cache": f"{limits.num_pages} pages of {limits.page_size} tokens",
        "decode": f"buckets {', '.join(map(str, manifest.decode_buckets))}"
        + ("; one CUDA graph per step" if manifest.use_cuda_graph else ""),
        "weights": _weights(manifest),
        "built by": f"Shardwright {manifest.version}, manifest schema {manifest.schema}",
    }
    table = Table(
        title=manifest.name, title_justify="left", show_header=False, box=None, pad_edge=False
    )
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _memory(manifest: Manifest) -> Table:
    memory = rank_memory(manifest)
    found = table("Memory of each rank", "use", "bytes", "")
    for use, count in [*memory.items(), ("total", sum(memory.values()))]:
        found.add_row(use, str(count), size(count))
    return found


def _weights(manifest: Manifest) -> str:
    if manifest.dummy_weights:
        return "random on each rank (--dummy-weights)"
    return "in shards" if manifest.has_weights else "none (--build-model-only)"


def table(title: str, *columns: str) -> Table:
    """A plain table; columns of numbers are set to the right."""
    found = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    for column in columns:
        numeric = column not in _TEXT
        found.add_column(column, justify="right" if numeric else "left", overflow="fold")
    return found
