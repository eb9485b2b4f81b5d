"""Text in, text out: conversations and batches on top of a `Session`.

`ChatModule` keeps the method names of MLC's 2023 API.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, overload

from shardwright.errors import InputError, UsageError
from shardwright.runtime.artifact import Manifest, load_manifest, verify_file
from shardwright.runtime.callback import ProgressCallback
from shardwright.runtime.chat_template import Message, check_messages
from shardwright.runtime.memory import gib
from shardwright.runtime.sampling import SamplingParams
from shardwright.runtime.session import Session
from shardwright.runtime.text_stream import TextStream
from shardwright.runtime.tokenizer import Tokenizer, read_json

_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class GenerationConfig:
    """Options of generation, as in `SamplingParams`; None takes the next place's value.

    A call's own configuration goes first, then the `ChatConfig`, then the model's
    generation_config.json.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    min_new_tokens: int | None = None
    max_new_tokens: int | None = None
    stop: Sequence[str] | None = None
    seed: int | None = None


@dataclass(frozen=True)
class ChatConfig(GenerationConfig):
    """How to run a model, and defaults of generation.

    `num_shards` must be the number of ranks the model was built for; None takes what it is.
    `system_prompt` begins every conversation.
    """

    num_shards: int | None = None
    system_prompt: str | None = None


_OPTIONS = tuple(field.name for field in fields(GenerationConfig))


class ChatModule:
    """A built model that answers text; a context manager, the end of which ends every worker.

    `model` is the directory that `shardwright build` wrote. `progress` is called during loading
    with the bytes that rank 0 has read and their total; `collectives` is "auto" or "nccl", see
    `Session`. Raises ArtifactError if it is missing, damaged or has no tokenizer, UsageError if
    `chat_config.num_shards` is not the model's, and what `Session` raises.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        chat_config: ChatConfig | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        collectives: str = "auto",
    ) -> None:
        self.config = chat_config or ChatConfig()
        directory = Path(model)
        manifest = load_manifest(directory)
        _check_ranks(directory, manifest, self.config.num_shards)
        # All that can be wrong with text is found before workers start, which takes seconds.
        for name in _TEXT_FILES:
            if name in manifest.files:
                verify_file(directory, name, manifest.files[name])
        self.tokenizer = Tokenizer.from_directory(directory)
        if self.tokenizer.template is None:
            warnings.warn(
                f"{directory} has no chat template; prompts are completed as plain text",
                stacklevel=2,
            )
        defaults = read_json(directory / "generation_config.json")
        self._defaults = _model_defaults(defaults)
        self._eos = _eos_ids(manifest, defaults)
        self._messages: list[Message] = []
        self.session = Session(directory, progress=progress, collectives=collectives)

    def __enter__(self) -> ChatModule:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every worker. Calling it again does nothing."""
        self.session.close()

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, answers included."""
        return list(self._messages)

    @overload
    def generate(
        self,
        prompt: str | Sequence[Message],
        generation_config: GenerationConfig | SamplingParams | None = None,
        progress_callback: ProgressCallback | None = None,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: list[str],
        generation_config: GenerationConfig | SamplingParams | None = None,
        progress_callback: ProgressCallback | None = None,
    ) -> list[str]: ...

    def generate(
        self,
        prompt: str | Sequence[str] | Sequence[Message],
        generation_config: GenerationConfig | SamplingParams | None = None,
        progress_callback: ProgressCallback | None = None,
    ) -> str | list[str]:
        """Answer a prompt, and return the answer.

        A string is the next turn of the conversation. A list of messages (`role`, `content`)
        replaces the conversation. A list of strings is a batch: a conversation of one turn each,
        which leaves the current one alone; the answers come as a list. A `SamplingParams` as
        `generation_config` is complete, no default applies. `progress_callback` gets the text as it
        comes, of one answer only. A turn that fails or is interrupted does not count.

        Raises InputError for a prompt that is empty, too long or refused by the chat template, and
        for a callback with a batch.
        """
        params = self._params(generation_config)
        if isinstance(prompt, str):
            return self._turn([*self._messages, _user(prompt)], params, progress_callback)
        if not prompt:
            raise InputError("the list of prompts is empty; give at least one")
        texts = [item for item in prompt if isinstance(item, str)]
        if not texts:
            messages = [item for item in prompt if not isinstance(item, str)]
            check_messages(messages)
            return self._turn(messages, params, progress_callback)
        if len(texts) < len(prompt):
            raise InputError("prompts and messages are mixed; give a list of one of them")
        if progress_callback is not None:
            raise InputError("a progress callback follows one answer; give one prompt, or none")
        rows = [self._encode([_user(text)]) for text in texts]
        return self._answers(rows, params, None)

    def reset_chat(self) -> None:
        """Forget the conversation."""
        self._messages = []
        self.session.reset()

    def benchmark_generate(self, prompt: str, generate_length: int) -> str:
        """Generate exactly `generate_length` tokens, past any end, and return the text.

        The conversation is left alone. `stats` tells the speed. Raises InputError if prompt and
        answer are longer than the model's maximum.
        """
        params = SamplingParams(
            min_new_tokens=generate_length, max_new_tokens=generate_length, eos=self._eos
        )
        return self._answers([self._encode([_user(prompt)])], params, None)[0]

    def stats(self, verbose: bool = False) -> str:
        """Tokens per second of prefill and decode, and the bytes of device memory of each rank.

        With `verbose`, also the number of tokens, the seconds they took, and the time of loading.
        """
        figures = self.session.stats()
        lines = []
        for phase in ("prefill", "decode"):
            line = f"{phase}: {figures[f'{phase}_tokens_per_second']:.1f} tok/s"
            if verbose:
                tokens, seconds = figures[f"{phase}_tokens"], figures[f"{phase}_seconds"]
                line += f" ({tokens} tokens in {seconds:.3f} s)"
            lines.append(line)
        if verbose:
            lines.append(f"load: {figures['load_seconds']:.2f} s")
        for rank, memory in enumerate(figures["ranks"]):
            uses = ", ".join(f"{use} {count / 2**20:.1f} MiB" for use, count in memory.items())
            lines.append(f"rank {rank}: {uses}")
        for rank, (predicted, measured) in enumerate(figures["taken"] if verbose else ()):
            if measured is not None:
                share = f"({measured / predicted - 1:+.1%})"
                lines.append(
                    f"rank {rank}: {gib(measured)} taken, {gib(predicted)} predicted {share}"
                )
        return "\n".join(lines)

    def _turn(
        self,
        messages: list[Message],
        params: SamplingParams,
        callback: ProgressCallback | None,
    ) -> str:
        (answer,) = self._answers([self._encode(messages)], params, callback)
        self._messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def _encode(self, messages: list[Message]) -> list[int]:
        system = self.config.system_prompt
        if system and not any(message["role"] == "system" for message in messages):
            messages = [{"role": "system", "content": system}, *messages]
        tokens = self.tokenizer.encode_chat(messages)
        if not tokens:
            raise InputError("the prompt is empty; give at least one character")
        return tokens

    def _params(self, config: GenerationConfig | SamplingParams | None) -> SamplingParams:
        if isinstance(config, SamplingParams):
            return config if config.eos is not None else replace(config, eos=self._eos)
        values: dict[str, Any] = {"eos": self._eos, **self._defaults}
        for given in (self.config, config):
            for name in _OPTIONS if given else ():
                if (value := getattr(given, name)) is not None:
                    values[name] = tuple(value) if name == "stop" else value
        return SamplingParams(**values)

    def _answers(
        self,
        rows: list[list[int]],
        params: SamplingParams,
        callback: ProgressCallback | None,
    ) -> list[str]:
        """Generate for `rows` of token ids; streams the first row's text to `callback`."""
        streams = [TextStream(self.tokenizer, params.stop) for _ in rows]
        ends = set(params.eos or ())
        unsent = ""
        try:
            for count, tokens in enumerate(self.session.generate(rows, params), 1):
                for stream, token in zip(streams, tokens, strict=True):
                    if token is not None and token not in ends:
                        unsent += stream.feed(token)
                if callback and count % callback.callback_interval == 0:
                    callback(unsent)
                    unsent = ""
                if all(stream.stopped for stream in streams):
                    break
            for stream in streams:
                unsent += stream.finish()
        finally:
            if callback:
                callback(unsent, stopped=True)
        return [stream.text for stream in streams]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _check_ranks(directory: Path, manifest: Manifest, wanted: int | None) -> None:
    built = manifest.mesh.size
    if wanted is not None and wanted != built:
        raise UsageError(
            f"{directory} was built for {built} ranks and num_shards is {wanted}; "
            f"build it again with --num-shards {wanted}, or leave num_shards out"
        )


def _model_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options that a generation_config.json sets, read as `transformers` reads it."""
    values = {
        name: config[name]
        for name in _OPTIONS
        if name not in ("stop", "seed") and config.get(name) is not None
    }
    if not config.get("do_sample", False):
        # Without sampling, transformers ignores these and takes the most likely token.
        return {**values, "temperature": 0.0, "top_p": 1.0, "top_k": 0}
    return {"temperature": 1.0, **values}


def _eos_ids(manifest: Manifest, config: Mapping[str, Any]) -> tuple[int, ...]:
    """End tokens of generation_config.json, then those the manifest has from config.json."""
    listed = config.get("eos_token_id")
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    return tuple(dict.fromkeys([*map(int, ids), *manifest.model.eos]))
