"""The worker processes 1..N-1 of a session, as Disco's process pool."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardwright.runtime.worker import DEVICE_VARIABLE

_POOL = "shardwright.create_process_pool"
_F_SETPIPE_SZ = 1031  # in module fcntl from Python 3.10 on Linux only
_PIPE_BYTES = 1 << 20


class WorkerProcesses:
    """Starts, watches and ends worker processes. They also end when this process does."""

    def __init__(self, directory: Path, kind: str) -> None:
        self._directory = directory
        self._environment = {**os.environ, DEVICE_VARIABLE: kind}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._descriptors: list[int] = []

    def create_session(self, world: int) -> Any:
        """Start a Disco session of `world` workers, worker 0 as a thread of this process."""
        import tvm_ffi
        from tvm.runtime.disco import _ffi_api

        def create_pool(world: int, groups: int, entrypoint: str) -> Callable[[int], Any]:
            def start(rank: int) -> Any:
                if rank == 0:
                    # The last act of the session's destructor. Until then it writes to the pipes,
                    # and a traceback may keep it alive beyond `close`.
                    return self._close_descriptors()
                return tvm_ffi.Shape(self._start(rank, world, groups, entrypoint))

            return start

        tvm_ffi.register_global_func(_POOL, create_pool, override=True)
        return _ffi_api.SessionProcess(world, 1, _POOL, "shardwright.runtime.worker")

    def _start(self, rank: int, world: int, groups: int, entrypoint: str) -> tuple[int, int]:
        """Start a worker; returns the descriptors (read, write) of the controller's side."""
        replies, worker_write = os.pipe()
        worker_read, commands = os.pipe()
        fcntl.fcntl(commands, _F_SETPIPE_SZ, _PIPE_BYTES)
        arguments = map(str, (rank, world, groups, worker_read, worker_write))
        with open(self._log(rank), "wb") as log:
            self._processes[rank] = subprocess.Popen(
                [sys.executable, "-m", entrypoint, *arguments],
                # Never written to; the worker ends when it closes.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(worker_read, worker_write),
                env=self._environment,
                # Ctrl-C in the terminal reaches the controller only.
                start_new_session=True,
            )
        os.close(worker_write)
        # The reading end of the commands stays open here, so that Disco, which takes a failed
        # write for a fatal error even in a destructor, may write to a worker that has died.
        self._descriptors += [replies, commands, worker_read]
        return replies, commands

    def dead(self) -> str | None:
        """Describe the first worker that has ended, if any has."""
        for rank, process in sorted(self._processes.items()):
            code = process.poll()
            if code is not None:
                how = _signal_name(-code) if code < 0 else f"exit code {code}"
                last = self._last_line(rank)
                return f"the worker of rank {rank} ended unexpectedly ({how})" + (
                    f": {last}" if last else ""
                )
        return None

    def wait(self, seconds: float) -> None:
        """Wait for workers that were told to end, and kill those that have not after `seconds`."""
        deadline = time.monotonic() + seconds
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()

    def kill(self) -> None:
        """Kill every worker."""
        for process in self._processes.values():
            process.kill()

    def close(self) -> None:
        """Wait for the workers, which are ending."""
        for process in self._processes.values():
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        self._processes = {}

    def _close_descriptors(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []

    def _log(self, rank: int) -> Path:
        return self._directory / f"rank-{rank}.log"

    def _last_line(self, rank: int) -> str:
        lines = self._log(rank).read_text(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
