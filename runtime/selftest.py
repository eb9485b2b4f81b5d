"""Check every kernel of an artefact, and the collectives, on this machine's devices.

`Checks` watches the virtual machine: the first time a program calls a kernel, what it wrote is
compared with a reference in float64 (`references.py`) of the same arguments. So kernels meet the
shapes, pages and positions that they meet in use. `run` lets a session go through a few rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shardwright.runtime.artifact import SELFTEST, Manifest
from shardwright.runtime.collectives import Collectives
from shardwright.runtime.reference_values import Array
from shardwright.runtime.references import reference_of
from shardwright.runtime.sampling import SamplingParams
from shardwright.runtime.session import Session

SIZES = (1, 7, 1024, 65536, 1 << 20)
"""Elements of the collectives tried."""

_TOLERANCES = {"float16": 4e-3, "bfloat16": 2e-2, "float32": 2e-4}


@dataclass(frozen=True)
class Finding:
    """One kernel or collective on one rank: the largest error, of the largest value there."""

    name: str
    error: float
    tolerance: float
    note: str = ""
    """Why there is no figure; empty if there is one."""

    @property
    def passed(self) -> bool:
        """Whether it was checked and is right."""
        return not self.note and self.error <= self.tolerance


def _compare(name: str, pairs: list[tuple[Array, Array]]) -> Finding:
    """The pair that is worst by its tolerance; anything that is not finite is wrong."""
    findings = [Finding(name, 0.0, 0.0)]
    for got, wanted in pairs:
        tolerance = _TOLERANCES.get(str(got.dtype), 0.0)
        if got.dtype == np.float64:  # computed from what the kernel wrote
            tolerance = _TOLERANCES["float32"]
        if got.shape != wanted.shape:
            return Finding(name, float("inf"), tolerance)
        if got.size == 0:
            continue
        # Where both are infinite of the same sign, there is no difference.
        with np.errstate(invalid="ignore"):
            difference = np.where(got == wanted, 0, np.abs(got.astype(np.float64) - wanted))
        scale = max(float(np.abs(np.where(np.isfinite(wanted), wanted, 0)).max()), 1e-30)
        error = float(difference.max()) / (scale if tolerance else 1.0)
        findings.append(Finding(name, error if np.isfinite(error) else float("inf"), tolerance))
    return max(findings, key=_badness)


class Checks:
    """An instrument for the virtual machine of one rank."""

    def __init__(self, directory: Path, arch: str, wait: Callable[[], None]) -> None:
        self._suffix = f"_{arch}" if arch else ""
        self._notes: dict[str, dict[str, Any]] = json.loads((directory / SELFTEST).read_text())
        self._wait = wait
        self._before: list[Any] = []
        self._findings: dict[str, Finding] = {}

    def __call__(self, _function: Any, name: str, before: bool, _result: Any, *args: Any) -> int:
        """Called before and after each call of the virtual machine; 0 lets it go on."""
        kernel = name.removesuffix(self._suffix) if self._suffix else name
        note = self._notes.get(kernel)
        if note is None or kernel in self._findings:
            return 0
        reference = reference_of(kernel)
        if reference is None:
            self._findings[kernel] = Finding(kernel, 0.0, 0.0, "no reference")
        elif before:
            self._before = self._read(args)
        else:
            pairs = reference(self._before, self._read(args), {**note, "name": kernel})
            self._findings[kernel] = _compare(kernel, pairs)
        return 0

    def _read(self, args: tuple[Any, ...]) -> list[Any]:
        self._wait()
        return [np.array(arg.numpy()) if hasattr(arg, "numpy") else arg for arg in args]

    def findings(self) -> list[Finding]:
        """Of every kernel in the library, whether it was called or not."""
        return [
            self._findings.get(name, Finding(name, 0.0, 0.0, "not called")) for name in self._notes
        ]


def check_collectives(
    collectives: Collectives, rank: int, world: int, device: Any, wait: Callable[[], None]
) -> list[Finding]:
    """Sum and gather between all ranks, in each dtype and several sizes, against numpy."""
    import tvm

    found = []
    for dtype in ("float16", "float32", "int32"):
        for size in SIZES:
            rng = np.random.default_rng(size)
            parts = (rng.standard_normal((world, size)) * 8).astype(dtype)
            x = tvm.runtime.tensor(parts[rank], device)
            out = tvm.runtime.empty((size,), dtype, device)
            collectives.all_reduce(x, out)
            wait()
            wanted = parts.astype(np.float64).sum(0)
            found.append(_compare(f"all_reduce {dtype} {size}", [(out.numpy(), wanted)]))
            whole = tvm.runtime.empty((world, size), dtype, device)
            collectives.all_gather(x, whole)
            wait()
            found.append(_compare(f"all_gather {dtype} {size}", [(whole.numpy(), parts)]))
    return found


def _badness(finding: Finding) -> tuple[bool, float]:
    return not finding.passed and not finding.note, finding.error


def write_findings(path: Path, findings: list[Finding]) -> None:
    """Write one rank's findings where `run` reads them."""
    path.write_text(json.dumps([asdict(finding) for finding in findings]))


def run(session: Session) -> list[Finding]:
    """Check what `session` runs; the worst finding of all ranks for each kernel and collective.

    Raises WorkerError if a rank fails in it.
    """
    manifest: Manifest = session.manifest
    controller = session._controller
    controller.send("watch")
    space, vocab = manifest.limits.max_seq_len, manifest.model.vocab_size
    chunk = manifest.limits.prefill_chunk_size
    for rows in manifest.decode_buckets:
        # Rows of different lengths, all in one chunk; no token ends them.
        length = max(1, min(space - 4, 40, chunk // rows))
        prompts = [
            [(7 * row + 3 * t + 1) % vocab for t in range(max(length - 3 * row, 1))]
            for row in range(rows)
        ]
        for _ in session.generate(prompts, SamplingParams(max_new_tokens=3, eos=())):
            pass
    controller.send("findings")
    per_rank: list[list[dict[str, Any]]] = controller.receive("findings")
    worst: dict[str, Finding] = {}
    for findings in per_rank:
        for entry in findings:
            finding = Finding(**entry)
            other = worst.get(finding.name)
            if other is None or _badness(finding) > _badness(other):
                worst[finding.name] = finding
    return list(worst.values())
