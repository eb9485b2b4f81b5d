"""ChatModule on a session that answers from a script."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from shardwright.callback import StreamIterator, StreamToStdout
from shardwright.errors import ArtifactError, InputError, UsageError
from shardwright.runtime import chat
from shardwright.runtime.artifact import (
    Limits,
    Manifest,
    Mesh,
    Model,
    Target,
    file_entry,
    write_manifest,
)
from shardwright.runtime.chat import ChatConfig, ChatModule, GenerationConfig
from shardwright.runtime.sampling import SamplingParams

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content + eos_token }}{% endfor %}<a>"
)


class FakeSession:
    """Gives out the answers in `script`, byte by byte, each with an end token."""

    script: ClassVar[list[str]] = []

    def __init__(self, directory: Path, progress: Any = None, collectives: str = "auto") -> None:
        self.collectives = collectives
        self.tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.calls: list[tuple[list[str], SamplingParams]] = []
        self.steps = self.resets = 0
        self.closed = False

    def generate(
        self, prompts: list[list[int]], params: SamplingParams
    ) -> Iterator[list[int | None]]:
        texts = [self.tokenizer.decode(p, skip_special_tokens=False) for p in prompts]
        self.calls.append((texts, params))
        answers = [self.tokenizer.encode(self.script.pop(0) + "</s>").ids for _ in prompts]
        for i in range(max(map(len, answers))):
            self.steps += 1
            yield [row[i] if i < len(row) else None for row in answers]

    def stats(self) -> dict[str, Any]:
        memory = {"weights": 3 << 20, "cache": 1 << 20, "workspace": 1 << 19, "other": 0}
        figures: dict[str, Any] = {"load_seconds": 0.5, "ranks": [memory, memory]}
        figures["taken"] = [(4 << 30, 5 << 30), (4 << 30, None)]
        for phase, tokens in (("prefill", 100), ("decode", 20)):
            figures[f"{phase}_tokens"] = tokens
            figures[f"{phase}_seconds"] = 2.0
            figures[f"{phase}_tokens_per_second"] = tokens / 2.0
        return figures

    def reset(self) -> None:
        self.resets += 1

    def close(self) -> None:
        self.closed = True


def write_artifact(
    path: Path, template: str | None = TEMPLATE, generation: dict[str, Any] | None = None
) -> Path:
    """An artefact with a byte tokenizer and nothing to run."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"eos_token": "</s>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    names = sorted(file.name for file in path.iterdir() if file.name != "manifest.json")
    manifest = Manifest(
        version="0.1.0",
        name="fake",
        model=Model("LlamaForCausalLM", {}, 258, None, (1,), 2),
        target=Target("cpu", ()),
        mesh=Mesh(("tp",), (2,)),
        quantization="q4f16_1",
        dtype="float16",
        limits=Limits(64, 4, 16, 16, 16),
        use_cuda_graph=False,
        libraries=(),
        decode_buckets=(1, 2, 4),
        workspace_bytes=0,
        state=(),
        functions={},
        weights=(),
        has_weights=True,
        dummy_weights=False,
        files={name: file_entry(path / name) for name in names},
    )
    write_manifest(path, manifest)
    return path


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(chat, "Session", FakeSession)
    return write_artifact(tmp_path)


def test_a_conversation_is_rendered_whole_at_each_turn(artifact: Path) -> None:
    with ChatModule(model=artifact, chat_config=ChatConfig(num_shards=2)) as cm:
        FakeSession.script = ["42", "wörld", "again"]
        assert cm.generate(prompt="17 + 25?") == "42"
        assert cm.generate(prompt="héllo") == "wörld"
        assert cm.session.collectives == "auto"
        prompts = [call[0] for call in cm.session.calls]
        assert prompts == [["<u>17 + 25?</s><a>"], ["<u>17 + 25?</s><a>42</s><u>héllo</s><a>"]]
        assert [m["content"] for m in cm.messages] == ["17 + 25?", "42", "héllo", "wörld"]
        cm.reset_chat()
        assert cm.messages == [] and cm.session.resets == 1
        assert cm.generate(prompt="x") == "again"
        assert cm.session.calls[-1][0] == ["<u>x</s><a>"]
        session = cm.session
    assert session.closed


def test_messages_replace_the_conversation_and_the_system_prompt_begins_it(artifact: Path) -> None:
    cm = ChatModule(artifact, ChatConfig(system_prompt="be brief"))
    FakeSession.script = ["a", "b", "c"]
    cm.generate("one")
    cm.generate([{"role": "user", "content": "two"}])
    assert cm.session.calls[-1][0] == ["<s>be brief</s><u>two</s><a>"]
    assert [m["content"] for m in cm.messages] == ["two", "b"]
    cm.generate([{"role": "system", "content": "other"}, {"role": "user", "content": "three"}])
    assert cm.session.calls[-1][0] == ["<s>other</s><u>three</s><a>"]


def test_a_batch_is_rows_of_one_turn(artifact: Path) -> None:
    cm = ChatModule(artifact, collectives="nccl")
    assert cm.session.collectives == "nccl"
    FakeSession.script = ["first", "1", "a longer answer", ""]
    cm.generate("turn")
    assert cm.generate(["a", "bcd", "ef"]) == ["1", "a longer answer", ""]
    assert cm.session.calls[-1][0] == ["<u>a</s><a>", "<u>bcd</s><a>", "<u>ef</s><a>"]
    assert [m["content"] for m in cm.messages] == ["turn", "first"]


def test_callbacks_get_the_text_piece_by_piece(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cm = ChatModule(artifact)
    FakeSession.script = ["añb日c", "xyz", ""]
    cm.generate("q", progress_callback=StreamToStdout(callback_interval=2))
    assert capsys.readouterr().out == "añb日c\n"
    pieces: list[str] = []
    stream = StreamIterator(callback_interval=2, timeout=10)
    reader = threading.Thread(target=lambda: pieces.extend(stream))
    reader.start()
    cm.generate("q", progress_callback=stream)
    reader.join(10)
    assert pieces == ["xy", "z"]
    cm.generate("q", progress_callback=StreamToStdout())
    assert capsys.readouterr().out == ""


def test_stop_strings_end_the_row_and_are_not_shown(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cm = ChatModule(artifact, ChatConfig(stop=["END"]))
    FakeSession.script = ["one END" + "x" * 50, "twoENDx", "three"]
    assert cm.generate("q", progress_callback=StreamToStdout(callback_interval=1)) == "one "
    assert capsys.readouterr().out == "one \n"
    assert cm.session.steps == len("one END")
    assert cm.generate(["q", "r"]) == ["two", "three"]


def test_options_come_from_the_call_then_the_chat_then_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "Session", FakeSession)
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [5, 1]}
    cm = ChatModule(write_artifact(tmp_path, generation=generation), ChatConfig(top_p=0.8, seed=3))
    FakeSession.script = ["a"] * 4
    cm.generate("q")
    expected = SamplingParams(temperature=0.6, top_p=0.8, seed=3, eos=(5, 1))
    assert cm.session.calls[-1][1] == expected
    cm.generate("q", GenerationConfig(temperature=0.0, max_new_tokens=7, stop=["x"]))
    expected = SamplingParams(
        temperature=0.0, top_p=0.8, max_new_tokens=7, stop=("x",), seed=3, eos=(5, 1)
    )
    assert cm.session.calls[-1][1] == expected
    cm.generate("q", SamplingParams(top_k=4))
    assert cm.session.calls[-1][1] == SamplingParams(top_k=4, eos=(5, 1))
    generation = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "top_k": 20}
    cm = ChatModule(write_artifact(tmp_path, generation=generation))
    cm.generate("q")
    assert cm.session.calls[-1][1] == SamplingParams(eos=(1,))


def test_a_turn_that_fails_does_not_count(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> Iterator[list[int | None]]:
        yield [40]
        raise KeyboardInterrupt

    cm = ChatModule(artifact)
    monkeypatch.setattr(cm.session, "generate", fail)
    with pytest.raises(KeyboardInterrupt):
        cm.generate("q", progress_callback=StreamToStdout(callback_interval=1))
    assert cm.messages == []
    assert capsys.readouterr().out.endswith("\n")


def test_benchmark_generates_past_the_end(artifact: Path) -> None:
    cm = ChatModule(artifact)
    FakeSession.script = ["abc"]
    assert cm.benchmark_generate("q", 5) == "abc"
    params = cm.session.calls[-1][1]
    assert (params.min_new_tokens, params.max_new_tokens, params.temperature) == (5, 5, 0.0)
    assert cm.messages == []


def test_stats_name_speed_and_memory_of_each_rank(artifact: Path) -> None:
    cm = ChatModule(artifact)
    lines = cm.stats().splitlines()
    assert lines[:2] == ["prefill: 50.0 tok/s", "decode: 10.0 tok/s"]
    assert lines[3].startswith("rank 1: weights 3.0 MiB, cache 1.0 MiB, workspace 0.5 MiB")
    assert "decode: 10.0 tok/s (20 tokens in 2.000 s)" in cm.stats(verbose=True)


def test_refusals_name_the_mend(artifact: Path) -> None:
    with pytest.raises(UsageError, match=r"built for 2 ranks.*--num-shards 3"):
        ChatModule(artifact, ChatConfig(num_shards=3))
    cm = ChatModule(artifact)
    with pytest.raises(InputError, match="prompts is empty"):
        cm.generate([])
    with pytest.raises(InputError, match="mixed"):
        cm.generate(["a", {"role": "user", "content": "b"}])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"message 1 is .*'content': '\.\.\.'"):
        cm.generate([{"role": "user", "content": "a"}, {"role": "user"}])
    with pytest.raises(InputError, match="one answer"):
        cm.generate(["a", "b"], progress_callback=StreamToStdout())
    with pytest.raises(InputError, match="top_p is 7"):
        cm.generate("a", GenerationConfig(top_p=7))
    (artifact / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer.json: truncated"):
        ChatModule(artifact)


def test_missing_tokenizer_and_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "Session", FakeSession)
    write_artifact(tmp_path, template=None)
    with pytest.warns(UserWarning, match="no chat template"):
        cm = ChatModule(tmp_path)
    FakeSession.script = [" there"]
    assert cm.generate("hello") == " there"
    assert cm.session.calls[-1][0] == ["hello"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["files"] = {}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="Session works on token ids"):
        ChatModule(tmp_path)
