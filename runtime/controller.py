"""The controller of a session: sends commands to all ranks, and watches that they are alive."""

import contextlib
import ctypes
import json
import queue
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardwright import errors
from shardwright.errors import ArtifactError, WorkerError
from shardwright.runtime import message, tvm_runtime
from shardwright.runtime.artifact import Manifest
from shardwright.runtime.collectives import create_segment
from shardwright.runtime.device import POLL_SECONDS, Pending
from shardwright.runtime.processes import WorkerProcesses
from shardwright.runtime.worker import CALL, Results, add_worker, register, remove_worker

_CHECK_SECONDS = 0.05


class Controller:
    """N workers that have loaded an artefact.

    Any failure of a rank ends all of them and raises the error of the rank that failed first.
    """

    def __init__(
        self,
        artifact: Path,
        manifest: Manifest,
        timeout: float,
        progress: Callable[[int, int], None] | None,
        collectives: str = "auto",
    ) -> None:
        """Start the workers and wait until all have loaded.

        Args:
            artifact: directory of the artefact.
            manifest: its manifest.
            timeout: seconds after which a worker that does not answer counts as hung.
            progress: called with this rank's bytes loaded so far and in all.
            collectives: "auto" or "nccl", see `Session`.
        """
        world, kind = manifest.mesh.size, manifest.target.kind
        self._timeout = timeout
        self._progress = progress
        self._sent = 0
        self._closed = False
        self._segment: Path | None = None
        self._results: Results = queue.SimpleQueue()
        self._directory = Path(tempfile.mkdtemp(prefix="shardwright-"))
        self._processes = WorkerProcesses(self._directory, kind)
        self._worker = add_worker(self._directory, self._results)
        self._disco: Any = None
        self._call: Any = None
        try:
            tvm_runtime.load(kind)
            register(rank=0)
            # Here, so that the workers find it compiled.
            self._segment = create_segment(world) if world > 1 and kind == "cpu" else None
            self._disco = self._processes.create_session(world)
            self._call = self._disco.get_global_func(CALL)
            segment = None if self._segment is None else str(self._segment)
            self.send(
                "load",
                artifact=str(artifact.resolve()),
                segment=segment,
                collectives=collectives,
            )
            # Without a limit: how long it takes depends on the disk.
            self.receive("loaded", timeout=float("inf"))
            reports = [
                json.loads((self._directory / f"rank-{rank}.loaded").read_text())
                for rank in range(world)
            ]
            self.memory = [report["memory"] for report in reports]
            self.load_seconds = [report["seconds"] for report in reports]
            self.taken = [(report["predicted"], report["measured"]) for report in reports]
        except BaseException:
            self.close()
            raise
        finally:
            if self._segment is not None:
                # All ranks have mapped it. Nothing is left behind, however this process ends.
                self._segment.unlink(missing_ok=True)

    def send(self, op: str, **arguments: Any) -> None:
        """Send a command to all ranks; see `Worker` for what there is."""
        self._check_open()
        # Not to a dead worker: once its pipe is full, the write would never return.
        self._check()
        text = message.encode({"op": op, **arguments})
        # Ctrl-C may come before or after, but not while half of the command is written.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._sent += 1
            self._call(str(self._directory), text)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def receive(self, kind: str, timeout: float | None = None) -> Any:
        """Wait for worker 0's next result, which is of this kind.

        Raises the error of a rank that fails meanwhile, WorkerError for one that dies or hangs.
        """
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        while True:
            try:
                found, value = self._results.get(timeout=_CHECK_SECONDS)
            except queue.Empty:
                self._check()
                self._check_deadline(deadline)
                continue
            if found == "error":
                self._raise_failure()
            elif found == kind:
                return value
            elif found == "progress" and self._progress is not None:
                self._progress(*value)

    def receive_tokens(self) -> Any:
        """Wait for the tokens of the next step, int32 [rows]."""
        pending: Pending = self.receive("tokens")
        deadline = time.monotonic() + self._timeout
        next_check = time.monotonic() + _CHECK_SECONDS
        while not pending.ready():
            now = time.monotonic()
            if now > next_check:
                self._check()
                self._check_deadline(deadline)
                next_check = now + _CHECK_SECONDS
            time.sleep(POLL_SECONDS)
        return pending.value()

    def discard(self) -> None:
        """Wait for all commands, and drop results that nobody wants any more."""
        self._check_open()
        deadline = time.monotonic() + self._timeout
        while self._busy():
            self._check()
            self._check_deadline(deadline)
            time.sleep(POLL_SECONDS)
        self._check()
        with contextlib.suppress(queue.Empty):
            while True:
                self._results.get_nowait()

    def close(self) -> None:
        """End every worker. Does nothing the second time."""
        if self._closed:
            return
        try:
            if self._call is not None and not self._failed() and self._idle_within(1.0):
                self.send("close")
        except errors.ShardwrightError:
            return  # found a failure, and has closed the session
        orderly = self._call is not None and not self._failed() and self._idle_within(2.0)
        self._end(orderly)

    def _busy(self) -> bool:
        return self._worker.completed < self._sent

    def _idle_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self._busy() and time.monotonic() < deadline:
            time.sleep(0.001)
        return not self._busy()

    def _failed(self) -> bool:
        return self._processes.dead() is not None or any(self._directory.glob("*.error"))

    def _check_open(self) -> None:
        if self._closed:
            raise WorkerError("the session is closed; open a new one")

    def _check(self) -> None:
        if not self._closed and self._failed():
            self._raise_failure()

    def _check_deadline(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            self._end(orderly=False)
            raise WorkerError(
                f"no answer from the workers within {self._timeout:.0f} s; one of them hangs. "
                "If the model is just slow, give Session a longer timeout"
            )

    def _raise_failure(self) -> None:
        error = self._failure()
        self._end(orderly=False)
        raise error

    def _failure(self) -> Exception:
        """The error to raise: a rank's own, else a worker's death, else what followed from it."""
        # A rank that broke off because of another may be the first to say so.
        deadline = time.monotonic() + 1.0
        while True:
            reports = {
                path.stem: json.loads(path.read_text())
                for path in sorted(self._directory.glob("*.error"))
            }
            for name, report in reports.items():
                if report["type"] != "AbortedError":
                    return _as_error(name, report)
            dead = self._processes.dead()
            if dead is not None:
                return WorkerError(f"{dead}; open the session again")
            if time.monotonic() > deadline:
                return WorkerError("a collective was broken off; open the session again")
            time.sleep(0.01)

    def _end(self, orderly: bool) -> None:
        """End the workers and release everything."""
        self._closed = True
        if not orderly:
            self._processes.kill()
            # In a thread: the abort of a GPU library may itself wait for the GPU.
            thread = threading.Thread(target=self._worker.abort, daemon=True)
            thread.start()
            thread.join(3.0)
        if self._disco is not None:
            if self._idle_within(3.0):
                # Worker 0 must be out of Python: Disco joins its thread while it holds the
                # interpreter's lock.
                self._disco.sync_worker_0()
                self._disco.shutdown()
                self._processes.wait(3.0)
            else:
                # Worker 0 hangs, and the session's destructor would wait for it forever.
                self._processes.kill()
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._disco))
        self._call = None
        self._disco = None
        self._processes.close()
        remove_worker(self._directory)
        shutil.rmtree(self._directory, ignore_errors=True)


def _as_error(name: str, report: dict[str, str]) -> Exception:
    kind = getattr(errors, report["type"], None)
    if kind is not None and issubclass(kind, errors.ShardwrightError):
        found: Exception = kind(report["message"])
        return found
    first = report["message"].splitlines()[0] if report["message"] else ""
    error = WorkerError(f"{name} failed: {report['type']}: {first}")
    error.__cause__ = RuntimeError(report.get("traceback", report["message"]))
    return error


def check_manifest(directory: Path, manifest: Manifest, num_shards: int | None) -> None:
    """Raise ArtifactError if the artefact cannot run, or not with this number of ranks."""
    world = manifest.mesh.size
    if num_shards is not None and num_shards != world:
        raise ArtifactError(
            f"{directory} was built for {world} ranks, not {num_shards}; "
            f"build it again with --num-shards {num_shards}"
        )
    if not manifest.has_weights and not manifest.dummy_weights:
        raise ArtifactError(
            f"{directory} was built with --build-model-only and holds no weights; "
            "build it without, or with --dummy-weights"
        )
