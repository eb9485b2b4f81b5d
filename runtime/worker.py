"""What runs on each rank, and the entry point of a worker process.

Disco broadcasts commands as calls of one function, `shardwright.worker.call`. Worker 0 is a thread
of the controller and hands its results to it through a queue; the others are processes that run
`python -m shardwright.runtime.worker`. A command never raises, because an exception in a thread of
Disco ends the process: errors go to the file `rank-K.error` in the session's directory.
"""

import functools
import json
import logging
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from shardwright import errors
from shardwright.runtime import cublas, message, tvm_runtime
from shardwright.runtime.artifact import CUBLAS, Manifest, load_manifest
from shardwright.runtime.collectives import (
    AbortedError,
    Collectives,
    HostCollectives,
    activate,
    install,
)
from shardwright.runtime.cuda_device import CudaDevice
from shardwright.runtime.device import CpuDevice, Device
from shardwright.runtime.memory import check_fits, of_manifest
from shardwright.runtime.nccl import NcclCollectives
from shardwright.runtime.peer import PeerMemory
from shardwright.runtime.program import Clock, Program
from shardwright.runtime.rows import Piece

_log = logging.getLogger("shardwright")

CALL = "shardwright.worker.call"
DEVICE_VARIABLE = "SHARDWRIGHT_WORKER_DEVICE"

Results = queue.SimpleQueue[tuple[str, Any]]


class Worker:
    """One rank of one session. Commands are the methods `do_*`, in the order of arrival."""

    def __init__(self, rank: int, directory: Path, results: Results | None = None) -> None:
        self.rank = rank
        self.completed = 0
        """Number of commands done; the controller compares it with what it has sent."""
        self._directory = directory
        self._results = results
        self._failed = False
        self._collectives: Collectives | None = None
        self._device: Device = CpuDevice()
        self._peers: PeerMemory | None = None
        self._artifact: Path
        self._checks: Any = None  # of a self-test
        self._manifest: Manifest
        self._program: Program

    def call(self, command: dict[str, Any]) -> None:
        """Run a command. After the first failure all others are ignored."""
        try:
            if not self._failed:
                with activate(self._collectives), self._device.scope():
                    self._run(command)
        except BaseException as error:
            self._fail(error)
        finally:
            self.completed += 1

    def _run(self, command: dict[str, Any]) -> None:
        getattr(self, "do_" + command.pop("op"))(**command)

    def abort(self) -> None:
        """Break off what this rank waits for. For any thread."""
        self._device.abort()
        if self._peers is not None:
            self._peers.abort()
        if self._collectives is not None:
            self._collectives.abort()

    def _fail(self, error: BaseException) -> None:
        self._failed = True
        report = {"type": type(error).__name__, "message": str(error).strip()}
        if not isinstance(error, errors.ShardwrightError):
            report["traceback"] = traceback.format_exc()
        part = self._directory / f"rank-{self.rank}.error.part"
        try:
            part.write_text(json.dumps(report))
            part.rename(part.with_suffix(""))
        except OSError:
            pass  # the controller has closed the session and removed its directory
        self.abort()
        self._publish("error", None)

    def _publish(self, kind: str, value: Any) -> None:
        if self._results is not None:
            self._results.put((kind, value))

    def do_load(self, artifact: str, segment: str | None, collectives: str) -> None:
        """Load this rank's program and weights, and join the other ranks.

        `segment` is the host collectives' shared memory. `collectives` is "auto", or "nccl" for
        NCCL alone.
        """
        clock = Clock()
        manifest = self._manifest = load_manifest(artifact)
        self._artifact = Path(artifact)
        world = manifest.mesh.size
        join: type[NcclCollectives] = NcclCollectives
        if manifest.target.kind == "cpu":
            _use_threads(world)
        else:
            open_gpu: type[CudaDevice] = CudaDevice
            if manifest.target.kind == "rocm":
                from shardwright.runtime.hip import HipDevice, RcclCollectives

                open_gpu, join = HipDevice, RcclCollectives
            self._device = gpu = open_gpu(self.rank, manifest.use_cuda_graph)
            if CUBLAS in manifest.libraries:
                with gpu.scope():
                    cublas.install(self.rank)
        free = self._device.free_memory()
        need = of_manifest(manifest)
        if free is not None:
            where = f"GPU {self.rank} has, beside what other programs hold,"
            check_fits(manifest.name, need, free, where)
        with self._device.scope():
            if segment is not None:
                self._collectives = HostCollectives(Path(segment), self.rank, world)
            elif world > 1:
                self._collectives = join(
                    self._directory, self.rank, world, gpu.tvm, lambda: gpu.aborted
                )
            clock.lap("join")
            self._program = Program(
                Path(artifact),
                manifest,
                self.rank,
                self._device,
                lambda done, total: self._publish("progress", (done, total)),
                clock,
            )
            buffer = self._program.peer_buffer
            if buffer is not None and collectives == "auto":
                self._peers = PeerMemory(
                    self._directory, self.rank, world, buffer, lambda: gpu.aborted
                )
                if self._peers.addresses is not None:
                    self._program.use_peers(self._peers.addresses)
                elif self.rank == 0:
                    _log.warning("GPUs cannot map each other's memory: all-reduces use NCCL")
            clock.lap("peers")
            left = self._device.free_memory()
            report = {
                "memory": self._program.memory(),
                "seconds": clock.seconds,
                "predicted": need.total,
                "measured": None if free is None or left is None else free - left,
            }
            (self._directory / f"rank-{self.rank}.loaded").write_text(json.dumps(report))
            if self._collectives is not None:
                self._collectives.barrier()
            self._device.wait()
        # The barrier is behind: every rank has loaded, and written its memory.
        self._publish("loaded", None)

    def do_several(self, commands: list[dict[str, Any]]) -> None:
        """Run commands one after the other: each message takes about 0.2 ms on the way."""
        for command in commands:
            self._run(command)

    def do_prefill(self, pieces: list[Piece], last: list[int]) -> None:
        """Feed a chunk; `last` is each row's final token in it, by index, or -1."""
        # Copying the inputs blocks until the previous chunk is done, without an end if a peer died.
        self._device.wait()
        counts = [len(tokens) for *_, tokens in pieces]
        self._program.prefill(
            {
                "tokens": _int32(np.concatenate([piece[3] for piece in pieces])),
                "rows": _int32(np.repeat([piece[0] for piece in pieces], counts)),
                "positions": _int32(
                    np.concatenate([np.arange(p[1], p[1] + len(p[3])) for p in pieces])
                ),
                "lengths": _int32(np.repeat([piece[2] for piece in pieces], counts)),
                "last": _int32(last),
            }
        )

    def do_write(self, state: dict[str, list[Any]]) -> None:
        """Overwrite state tensors. `history` is given as ragged rows."""
        self._device.wait()
        limits = self._manifest.limits
        for name, values in state.items():
            if name == "history":
                array = np.zeros((limits.max_batch_size, limits.max_seq_len), np.int32)
                for row, tokens in zip(array, values, strict=True):
                    row[: len(tokens)] = tokens
            else:
                array = np.array(values, np.float32 if name == "sampling_f" else np.int32)
            self._program.write(name, array)

    def do_sample(self, rows: int) -> None:
        """Choose tokens from the logits and publish those of the first `rows` rows."""
        self._program.sample()
        self._publish_tokens(rows)

    def do_decode(self, bucket: int, rows: int, steps: int) -> None:
        """Run steps. Publishes each step's tokens of the first `rows` rows, if any, unawaited."""
        for _ in range(steps):
            self._program.decode(bucket)
            if rows:
                self._publish_tokens(rows)

    def _publish_tokens(self, rows: int) -> None:
        if self._results is not None:
            self._publish("tokens", self._program.tokens(rows))

    def do_logits(self, rows: int) -> None:
        """Publish the logits of the first `rows` rows, float32 [rows, vocab]."""
        self._device.wait()
        if self._results is not None:
            self._publish("logits", self._program.view("logits", rows).numpy())

    def do_watch(self) -> None:
        """From now on compare what kernels write with their references."""
        from shardwright.runtime.selftest import Checks

        self._checks = Checks(self._artifact, self._device.arch, self._device.wait)
        self._program.watch(self._checks)

    def do_findings(self) -> None:
        """Check the collectives, and publish all ranks' findings since `do_watch`."""
        from shardwright.runtime.selftest import check_collectives, write_findings

        findings, world = self._checks.findings(), self._manifest.mesh.size
        if self._collectives is not None:
            findings += check_collectives(
                self._collectives, self.rank, world, self._device.tvm, self._device.wait
            )
        path = self._directory / "rank-{}.findings"
        write_findings(Path(str(path).format(self.rank)), findings)
        if self._collectives is not None:
            self._collectives.barrier()
            self._device.wait()
        if self._results is not None:
            files = [Path(str(path).format(rank)) for rank in range(world)]
            self._publish("findings", [json.loads(file.read_text()) for file in files])

    def do_close(self) -> None:
        """Release the collectives and the memory."""
        self._device.wait()
        if self._peers is not None:
            self._peers.close()
        if self._collectives is not None:
            self._collectives.close()
            self._collectives = None
        del self._program


def _int32(values: Any) -> Any:
    return np.ascontiguousarray(values, dtype=np.int32)


_threads_of_user = os.environ.get("TVM_NUM_THREADS")


def _use_threads(world: int) -> None:
    """Share the cores between the ranks, unless the user has set TVM_NUM_THREADS.

    TVM reads these variables at every parallel loop, and would bind the threads of all ranks to
    the same first cores.
    """
    if _threads_of_user is None:
        threads = max(1, len(os.sched_getaffinity(0)) // world)
        os.environ["TVM_NUM_THREADS"] = str(threads)
    os.environ.setdefault("TVM_BIND_THREADS", "0")


_workers: dict[str, Worker] = {}
_lock = threading.Lock()


def register(rank: int) -> None:
    """Register the packed functions of this process, which is rank `rank` of its sessions."""
    import tvm_ffi

    install()
    # So that the error of a collective passes through the virtual machine as it is.
    tvm_ffi.register_error("AbortedError", AbortedError)
    tvm_ffi.register_global_func(CALL, functools.partial(_call, rank), override=True)


def _call(rank: int, session: str, text: str) -> None:
    with _lock:
        worker = _workers.get(session)
        if worker is None:
            worker = _workers[session] = Worker(rank, Path(session))
    worker.call(message.decode(text))


def add_worker(directory: Path, results: Results) -> Worker:
    """Create worker 0 of a session in this process, before any command is sent."""
    worker = Worker(0, directory, results)
    with _lock:
        _workers[str(directory)] = worker
    return worker


def remove_worker(directory: Path) -> None:
    """Forget worker 0 of a session that has ended."""
    with _lock:
        _workers.pop(str(directory), None)


def _end_with_controller() -> None:
    """End this process when the controller is gone, however it ended and whatever runs here.

    The controller holds the other end of standard input and never writes to it. (A death signal
    would come from the end of the thread that opened the session, which is something else.)
    """
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> None:
    """Serve one rank until Disco says shutdown."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the controller's
    threading.Thread(target=_end_with_controller, daemon=True).start()
    rank, world, groups, read, write = map(int, sys.argv[1:6])
    # tvm_ffi imports torch where it is installed: seconds and memory that no worker needs.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    tvm_runtime.load(os.environ.get(DEVICE_VARIABLE, "cpu"))
    import tvm_ffi

    register(rank)
    tvm_ffi.get_global_func("runtime.disco.WorkerProcess")(rank, world, groups, read, write)
    # Without the interpreter's and TVM's teardown: nothing is left to save.
    os._exit(0)


if __name__ == "__main__":
    main()
