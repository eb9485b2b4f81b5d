"""Each failure gives one clear line, leaves no worker, and does so within 10 seconds."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_artifact import LENGTH

from shardwright.errors import ArtifactError, DeviceError, InputError, WorkerError
from shardwright.runtime import device
from shardwright.runtime.sampling import SamplingParams
from shardwright.runtime.session import Session

Fake = Callable[[int], Path]

ENDLESS = SamplingParams(eos=())


def workers_of(parent: int | None = None) -> list[int]:
    """Process ids of the workers that a controller, by default this process, has started."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
            command = (directory / "cmdline").read_bytes()
        except OSError:
            continue  # it has just ended
        if int(fields[1]) == (parent or os.getpid()) and b"shardwright.runtime.worker" in command:
            found.append(int(directory.name))
    return found


def wait_until_gone(workers: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(
        Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()
        for pid in workers
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def no_worker_left_and_quick() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 10
    assert workers_of() == []


def edit_manifest(directory: Path, edit: Callable[[dict], None]) -> None:
    path = directory / "manifest.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def assert_fails(error: type[Exception], message: str, directory: Path) -> None:
    with pytest.raises(error, match=message) as caught:
        Session(directory)
    assert "\n" not in str(caught.value)


# The artefact


def test_no_such_model(tmp_path):
    assert_fails(ArtifactError, "no such directory.*shardwright build", tmp_path / "none")


def test_unfinished_build(fake_copy: Fake):
    directory = fake_copy(2)
    (directory / "manifest.json").unlink()
    assert_fails(ArtifactError, "no manifest.json.*did not finish", directory)


def test_newer_schema(fake_copy: Fake):
    directory = fake_copy(2)
    edit_manifest(directory, lambda data: data.update(schema=2))
    assert_fails(ArtifactError, "newer Shardwright", directory)


@pytest.mark.parametrize("name", ["model.so", "shards/rank-00001-of-00002.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_file(fake_copy: Fake, name, damage):
    directory = fake_copy(2)
    path = directory / name
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-7])
    elif damage == "altered":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path.unlink()
    assert_fails(ArtifactError, f"{name}: {damage}", directory)


def test_shard_of_another_model(fake_copy: Fake):
    directory = fake_copy(1)
    edit_manifest(directory, lambda data: data["weights"][0].update(shape=[2]))
    assert_fails(ArtifactError, r"weight is float32\[1\], not float32\[2\]", directory)


def test_build_without_weights(fake_copy: Fake):
    directory = fake_copy(1)
    edit_manifest(directory, lambda data: data.update(has_weights=False))
    assert_fails(ArtifactError, "--build-model-only.*--dummy-weights", directory)


def test_another_number_of_ranks(fake_model: Fake):
    with pytest.raises(ArtifactError, match=r"built for 2 ranks, not 3.*--num-shards 3"):
        Session(fake_model(2), num_shards=3)


# Devices, of which this test machine has none


def cuda_model(fake_copy: Fake, monkeypatch: pytest.MonkeyPatch, archs: list[str]) -> Path:
    directory = fake_copy(2)
    edit_manifest(directory, lambda data: data.update(target={"kind": "cuda", "archs": archs}))
    monkeypatch.setattr("shardwright.runtime.tvm_runtime.load", lambda kind="cpu": None)
    return directory


def test_fewer_gpus_than_ranks(fake_copy: Fake, monkeypatch):
    directory = cuda_model(fake_copy, monkeypatch, ["sm_90a"])
    monkeypatch.setattr(device, "device_count", lambda: 1)
    assert_fails(DeviceError, "built for 2 GPUs and this machine has 1.*--num-shards 1", directory)


def test_library_without_code_for_this_gpu(fake_copy: Fake, monkeypatch):
    directory = cuda_model(fake_copy, monkeypatch, ["sm_89", "sm_90a"])
    monkeypatch.setattr(device, "device_count", lambda: 8)
    monkeypatch.setattr(
        device, "compute_capability", lambda index: (9, 0) if index == 0 else (8, 6)
    )
    assert_fails(DeviceError, "code for sm_89, sm_90a, and GPU 1 is sm_86.*--arch sm_86", directory)


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (("sm_90a",), (9, 0), True),
        (("sm_90a",), (10, 0), True),  # through PTX
        (("sm_90a",), (8, 9), False),
        (("sm_80", "sm_90a"), (8, 9), True),
        (("sm_89",), (8, 6), False),
        (("sm_80", "sm_100"), (9, 0), False),
        (("sm_100a",), (10, 0), True),
        (("sm_100a",), (10, 3), True),
        ((), (9, 0), False),
    ],
)
def test_runs_on(archs, capability, runs):
    assert device.runs_on(archs, capability) == runs


# Workers


@pytest.mark.parametrize("victim", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_worker_killed_in_mid_generation(fake_model: Fake, victim, number):
    session = Session(fake_model(3))
    # Between steps rank 0 and the other worker wait in a collective, or for a command.
    session.prefill([[1, 2]])
    steps = session.generate([[1, 2]], ENDLESS)
    next(steps)
    os.kill(session._controller._processes._processes[victim].pid, number)
    with pytest.raises(WorkerError, match=rf"rank {victim} ended.*{number.name}") as caught:
        for _ in range(LENGTH):
            next(steps)
            time.sleep(0.005)
    assert "\n" not in str(caught.value)
    with pytest.raises(WorkerError, match="closed"):
        session.reset()


def test_worker_killed_while_idle(fake_model: Fake):
    with Session(fake_model(2)) as session:
        session.prefill([[1]])
        os.kill(workers_of()[0], signal.SIGKILL)
        time.sleep(0.2)
        with pytest.raises(WorkerError, match=r"rank 1 ended.*SIGKILL"):
            session.decode([1])


def test_worker_that_hangs(fake_model: Fake):
    with Session(fake_model(2), timeout=1.0) as session:
        session.prefill([[1]])
        os.kill(workers_of()[0], signal.SIGSTOP)
        with pytest.raises(WorkerError, match=r"no answer.*within 1 s"):
            session.decode([1])


def test_worker_that_cannot_start(fake_model: Fake, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert_fails(WorkerError, "rank 1 ended unexpectedly .exit code 1", fake_model(2))


def test_error_inside_a_program(fake_copy: Fake):
    directory = fake_copy(2)

    def break_it(data: dict) -> None:
        # A state tensor of another length than the program was compiled for.
        next(spec for spec in data["state"] if spec["name"] == "summed")["shape"] = [1, 1]

    edit_manifest(directory, break_it)
    with Session(directory) as session, pytest.raises(WorkerError, match=r"rank-. failed"):
        session.prefill([[1]])


def test_input_error_does_not_end_the_session(fake_model: Fake):
    with Session(fake_model(2)) as session:
        with pytest.raises(InputError, match="--max-seq-len"):
            session.prefill([[1] * (LENGTH + 1)])
        assert session.prefill([[1]]).shape == (1, session.manifest.model.vocab_size)


# The controller, as a process of its own

PROGRAM = textwrap.dedent(
    """
    import sys
    from shardwright.runtime.sampling import SamplingParams
    from shardwright.runtime.session import Session

    with Session(sys.argv[1]) as session:
        print("ready", flush=True)
        while True:
            for step in session.generate([[1, 2, 3]], SamplingParams(eos=())):
                pass
    """
)


@pytest.fixture
def program(fake_model: Fake) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(fake_model(2))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    workers = workers_of(process.pid)
    assert len(workers) == 1
    yield process, workers
    process.kill()
    process.communicate()


def test_ctrl_c_in_mid_generation(program):
    process, workers = program
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=8)
    assert process.returncode == -signal.SIGINT
    assert errors.strip().splitlines()[-1] == "KeyboardInterrupt"
    wait_until_gone(workers, 1)


@pytest.fixture
def shared_before() -> set[str]:
    """What others have in /dev/shm, before `program` starts."""
    return set(os.listdir("/dev/shm"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_controller(shared_before, program, number):
    process, workers = program
    shared = set(os.listdir("/dev/shm")) - shared_before
    process.send_signal(number)
    assert process.wait(timeout=5) == -number
    wait_until_gone(workers, 3)
    assert {name for name in shared if name.startswith("shardwright-")} == set()
