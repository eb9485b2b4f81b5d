"""The commands of the README, as processes, with the demo model on two CPU ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-c", "from shardwright.cli import main; main()"]


def start(*args: str | Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [*COMMAND, *map(str, args)]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str], text: str = "") -> tuple[int, str, str]:
    try:
        out, err = process.communicate(text, timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def children(pid: int) -> list[int]:
    """Processes started by process `pid`."""
    listed = [Path(f"/proc/{pid}/task/{pid}/children").read_text()]
    return [int(child) for text in listed for child in text.split()]


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, built over a build that was killed."""
    out = tmp_path_factory.mktemp("dist") / "demo"
    args = ("build", "--model", ROOT / "demo/model", "--num-shards", "2", "-o", out)
    process = start(*args)
    deadline = time.monotonic() + 60
    while not out.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert out.exists() and not (out / "manifest.json").exists()
    code, _, err = finish(start("chat", out, "--prompt", "hello"))
    assert code == 1 and "its build did not finish" in err

    code, printed, err = finish(start(*args))
    assert (code, err) == (0, "")
    assert f"{out}: LlamaForCausalLM, q4f16_1, 2 x cpu" in printed
    return out


def test_one_prompt(demo: Path) -> None:
    code, out, err = finish(start("chat", demo, "--prompt", "What is 17 plus 25?", "--stats"))
    assert (code, out) == (0, "42.\n")
    assert "decode: " in err and "rank 1: weights" in err


def test_conversation(demo: Path) -> None:
    text = "What is 3 plus 4?\nWhat is 81 minus 46?\n/reset\nWhat is 3 plus 4?\n/exit\n"
    code, out, err = finish(start("chat", demo), text)
    assert (code, out, err) == (0, "7.\n35.\n7.\n", "")


def test_inspect(demo: Path) -> None:
    code, out, err = finish(start("inspect", demo, "--verify"))
    assert (code, err) == (0, "")
    assert "5 layers" in out and "files verified" in out


def test_a_prompt_that_is_too_long(demo: Path) -> None:
    code, _, err = finish(start("chat", demo, "--prompt", "17 plus " * 500))
    assert code == 1
    (line,) = err.splitlines()
    assert line.startswith("Error: ") and "512" in line


def test_ctrl_c_while_answering(demo: Path) -> None:
    process = start("chat", demo, "--prompt", "hello", "--min-new-tokens", "400")
    assert process.stdout is not None
    process.stdout.read(1)
    workers = children(process.pid)
    assert workers
    os.kill(process.pid, signal.SIGINT)
    began = time.monotonic()
    code, _, err = finish(process)
    assert (code, err) == (130, "Interrupted\n")
    assert time.monotonic() - began < 10
    assert not any(map(alive, workers))


def test_a_worker_killed_while_answering(demo: Path) -> None:
    process = start("chat", demo, "--prompt", "hello", "--min-new-tokens", "400")
    assert process.stdout is not None
    process.stdout.read(1)
    workers = children(process.pid)
    os.kill(workers[0], signal.SIGKILL)
    began = time.monotonic()
    code, _, err = finish(process)
    assert code == 1 and time.monotonic() - began < 10
    (line,) = err.splitlines()
    assert line.startswith("Error: ")
    assert not any(map(alive, workers))
