"""The command line, with a compiler and a session that are not real."""

import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from shardwright import cli, console
from shardwright.errors import CheckpointError, WorkerError
from shardwright.runtime import artifact as artifacts
from shardwright.runtime import chat

Captured = pytest.CaptureFixture[str]


def write_artifact(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    (path / "model.so").write_bytes(b"code")
    spec = artifacts.TensorSpec
    manifest = artifacts.Manifest(
        version="0.1.0",
        name=path.name,
        model=artifacts.Model("LlamaForCausalLM", {}, 512, 1, (2,), 5),
        target=artifacts.Target("cuda", ("sm_89", "sm_90a")),
        mesh=artifacts.Mesh(("tp",), (2,)),
        quantization="q4f16_1",
        dtype="float16",
        limits=artifacts.Limits(64, 4, 16, 16, 16),
        use_cuda_graph=True,
        libraries=(),
        decode_buckets=(1, 2, 4),
        workspace_bytes=1 << 20,
        state=(spec("k_pages", (5, 16, 1, 16, 16), "float16"), spec("tokens", (4,), "int32")),
        functions={"prefill": artifacts.Function((spec("tokens", ("n",), "int32"),))},
        weights=(artifacts.WeightSpec("model.norm.weight", (128,), "float16", "Replicate"),),
        has_weights=True,
        dummy_weights=False,
        files={"model.so": artifacts.file_entry(path / "model.so")},
    )
    artifacts.write_manifest(path, manifest)
    return path


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Stands in for `build` and `options` of the compiler; `calls` are the options it was given."""
    fake = SimpleNamespace(calls=[], error=None, act=None)

    def build(options: Any, progress: Any) -> SimpleNamespace:
        fake.calls.append(options)
        with progress.step("Partition"), progress.step("Write weights", 100) as advance:
            advance(40)
            if fake.act is not None:
                fake.act()
            if fake.error is not None:
                raise fake.error
        write_artifact(options.out)
        return SimpleNamespace(path=options.out, explanation="placements\n")

    fakes = (
        ("build", "build", build),
        ("options", "BuildOptions", lambda **f: SimpleNamespace(**f)),
    )
    for name, attribute, fake_attribute in fakes:
        module = ModuleType(f"shardwright.compiler.{name}")
        setattr(module, attribute, fake_attribute)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield fake


class FakeChat:
    """Answers a prompt with its upper case; "fail" with an error."""

    instances: list["FakeChat"] = []

    def __init__(self, model: Path, chat_config: Any, progress: Any, collectives: str) -> None:
        self.collectives = collectives
        progress(5, 10)
        self.model, self.config = model, chat_config
        self.resets, self.closed = 0, False
        self.instances.append(self)

    def __enter__(self) -> "FakeChat":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def generate(self, prompt: str, progress_callback: Any) -> str:
        if prompt == "fail":
            raise WorkerError("worker 1 died\nwith a second line")
        if prompt == "interrupt":
            raise KeyboardInterrupt
        if prompt == "long":
            raise cli.InputError("the prompt is too long")
        progress_callback(prompt.upper())
        progress_callback(stopped=True)
        return prompt.upper()

    def reset_chat(self) -> None:
        self.resets += 1

    def stats(self, verbose: bool = False) -> str:
        return "decode: 10.0 tok/s"


@pytest.fixture
def fake_chat(monkeypatch: pytest.MonkeyPatch) -> type[FakeChat]:
    monkeypatch.setattr(FakeChat, "instances", [])
    monkeypatch.setattr(chat, "ChatModule", FakeChat)
    return FakeChat


def test_build_passes_every_option(
    compiler: SimpleNamespace, tmp_path: Path, capsys: Captured
) -> None:
    out, ir = tmp_path / "demo", tmp_path / "ir"
    args = f"build --model m -o {out} --quantization q0f16 --num-shards 3 --target cuda"
    args += " --arch sm_89,sm_90a --max-seq-len 2048 --max-batch-size 4 --prefill-chunk-size 128"
    args += f" --use-cuda-graph --build-model-only --dummy-weights --explain --dump-ir {ir}"
    args += " --disable-pass fuse_qkv --disable-pass fuse_add_norm --rocm-abi 6 --expert-parallel"
    assert cli.run(args.split()) == 0
    (options,) = compiler.calls
    assert vars(options) == {
        "model": "m",
        "out": out,
        "quantization": "q0f16",
        "expert_parallel": True,
        "num_shards": 3,
        "target": "cuda",
        "archs": ("sm_89", "sm_90a"),
        "rocm_abi": 6,
        "max_seq_len": 2048,
        "max_batch_size": 4,
        "prefill_chunk_size": 128,
        "use_cuda_graph": True,
        "build_model_only": True,
        "dummy_weights": True,
        "explain": True,
        "dump_ir": ir,
        "disable_pass": ("fuse_qkv", "fuse_add_norm"),
    }
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == "placements"
    assert f"{out}: LlamaForCausalLM, q4f16_1, 2 x cuda" in captured.out
    # Not a terminal: no progress bars.
    assert captured.err == ""


def test_build_options_are_those_of_the_compiler() -> None:
    options = pytest.importorskip("shardwright.compiler.options")
    fields = set(options.BuildOptions.__dataclass_fields__)
    params = {param.name for param in cli.build.params} - {"output", "arch"} | {"out", "archs"}
    assert params == fields


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--target tpu", "unknown target 'tpu'; use one of cpu, cuda, rocm"),
        ("--quantization q3", "unknown quantization 'q3'"),
        ("--num-shards 0", "Invalid value for '--num-shards'"),
        ("--no-such-option", "No such option"),
    ],
)
def test_wrong_usage_exits_with_2(
    compiler: SimpleNamespace, capsys: Captured, args: str, message: str
) -> None:
    assert cli.run(["build", "--model", "m", "-o", "x", *args.split()]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert captured.err.startswith("Error: ") and captured.err.count("\n") == 1
    assert compiler.calls == []


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CheckpointError("m: no config.json"), 1, "Error: m: no config.json"),
        (OSError(28, "No space left on device"), 1, "Error: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "Interrupted"),
    ],
)
def test_each_failure_is_one_line(
    compiler: SimpleNamespace,
    tmp_path: Path,
    capsys: Captured,
    error: BaseException,
    code: int,
    line: str,
) -> None:
    compiler.error = error
    assert cli.run(["build", "--model", "m", "-o", str(tmp_path / "x")]) == code
    assert capsys.readouterr().err == line + "\n"


def test_an_interrupt_is_one_line_whatever_it_becomes_in_the_compiler(
    compiler: SimpleNamespace, tmp_path: Path, capfd: Captured
) -> None:
    def act() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            os.write(2, b"a warning of what is unwound\n")
            raise RuntimeError("as TVM makes of it") from None

    compiler.act = act
    before = signal.getsignal(signal.SIGINT)
    assert cli.run(["build", "--model", "m", "-o", str(tmp_path / "x")]) == 130
    assert capfd.readouterr().err == "Interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_chat_answers_one_prompt_with_its_options(
    fake_chat: type[FakeChat], tmp_path: Path, capsys: Captured
) -> None:
    args = "--prompt hello --temperature 0.5 --top-p 0.9 --top-k 7 --repetition-penalty 1.1"
    args += " --no-repeat-ngram-size 3 --min-new-tokens 2 --max-new-tokens 9 --seed 11"
    args += " --stop A --stop B --system brief --stats --collectives nccl"
    assert cli.run(["chat", str(tmp_path), *args.split()]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("HELLO\n", "decode: 10.0 tok/s\n")
    (module,) = fake_chat.instances
    assert module.closed and module.model == tmp_path and module.collectives == "nccl"
    assert module.config == chat.ChatConfig(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        repetition_penalty=1.1,
        no_repeat_ngram_size=3,
        min_new_tokens=2,
        max_new_tokens=9,
        seed=11,
        stop=("A", "B"),
        system_prompt="brief",
    )


def test_a_conversation_reads_prompts_and_commands(
    fake_chat: type[FakeChat],
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = "hello\n\n/reset\n/stats\n/what\nlong\nbye\n/exit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert cli.run(["chat", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "HELLO\ndecode: 10.0 tok/s\nBYE\n"
    assert "unknown command /what" in captured.err
    assert "Error: the prompt is too long" in captured.err
    assert fake_chat.instances[0].resets == 1 and fake_chat.instances[0].closed


@pytest.mark.parametrize(
    ("prompt", "code", "line"),
    [
        ("fail", 1, "Error: worker 1 died; with a second line"),
        ("interrupt", 130, "Interrupted"),
    ],
)
def test_chat_failures_end_the_workers(
    fake_chat: type[FakeChat], tmp_path: Path, capsys: Captured, prompt: str, code: int, line: str
) -> None:
    assert cli.run(["chat", str(tmp_path), "--prompt", prompt]) == code
    assert capsys.readouterr().err == line + "\n"
    assert fake_chat.instances[0].closed


def test_missing_model_is_one_line(tmp_path: Path, capsys: Captured) -> None:
    for command in ("chat", "inspect"):
        assert cli.run([command, str(tmp_path / "none")]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("Error: ") and "no such directory" in line


def test_inspect_shows_the_model_and_verifies_files(tmp_path: Path, capsys: Captured) -> None:
    path = write_artifact(tmp_path / "demo")
    assert cli.run(["inspect", str(path), "--tensors", "--verify"]) == 0
    out = capsys.readouterr().out
    for text in (
        "LlamaForCausalLM, 5 layers",
        "cuda sm_89 sm_90a",
        "tp 2",
        "one CUDA graph per step",
        "model.norm.weight",
        "Replicate",
        "1 files verified",
    ):
        assert text in out
    rows = [line.split() for line in out.splitlines()]
    assert ["weights", "256", "256", "B"] in rows
    assert ["cache", "40960", "40.0", "KiB"] in rows
    assert ["workspace", "1048576", "1.0", "MiB"] in rows
    (path / "model.so").write_bytes(b"c0de")
    assert cli.run(["inspect", str(path), "--verify"]) == 1
    assert "altered" in capsys.readouterr().err


def test_inspect_refuses_a_newer_schema(tmp_path: Path, capsys: Captured) -> None:
    path = write_artifact(tmp_path / "demo")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "schema": 99}))
    assert cli.run(["inspect", str(path)]) == 1
    assert "newer Shardwright" in capsys.readouterr().err


def test_progress_bars_show_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    @contextmanager
    def terminal(value: bool) -> Iterator[None]:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: value, raising=False)
        yield

    for value in (True, False):
        with terminal(value), console.TerminalProgress() as progress:
            with progress.step("Compile", 4) as advance:
                advance(1)
            with progress.bar("Load") as update:
                update(1, 10)
        err = capsys.readouterr().err
        assert ("Compile" in err and "100%" in err) is value
        assert value or err == ""


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 40, "5.0 TiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert console.size(count) == text
