"""Text to token ids and back, by the tokenizer files of the checkpoint.

Reads the files as `transformers` writes them: tokenizer.json, tokenizer_config.json,
special_tokens_map.json, added_tokens.json, chat_template.jinja. Only the first is required.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from shardwright.errors import ArtifactError
from shardwright.runtime.chat_template import ChatTemplate, Message

_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")


class Tokenizer:
    """A tokenizer with its special tokens and its chat template.

    `special_tokens` maps names such as "bos_token" to text. `template` is None if the checkpoint
    has no chat template.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, Any] | None = None,
        template: ChatTemplate | None = None,
    ) -> None:
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.template = template

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """Read the tokenizer files in directory `path`.

        Raises ArtifactError if tokenizer.json is missing or a file cannot be read.
        """
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ArtifactError(
                f"{path} has no tokenizer.json, and chat needs one: add it to the checkpoint and "
                "build again (Session works on token ids)"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        # tokenizers raises plain Exception for anything it cannot parse.
        except Exception as error:
            raise ArtifactError(f"{file} is not a tokenizer: {error}; build again") from error
        config = read_json(path / "tokenizer_config.json")
        special = _special_tokens({**read_json(path / "special_tokens_map.json"), **config})
        _add_missing_tokens(backend, path, config, special)
        source = _template_source(path, config)
        template = None if source is None else ChatTemplate(source, special)
        return cls(backend, special, template)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special_tokens`, the ones of a fresh document (bos)."""
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the assistant's next answer begins.

        Without a template, the contents follow each other as plain text, which the model completes.
        Raises InputError if the template refuses the conversation.
        """
        if self.template is None:
            return self.encode("".join(str(message["content"]) for message in messages))
        # The template writes bos and the other special tokens itself.
        return self.encode(self.template.render(messages), add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token `ids`; bytes that are no UTF-8 come out as U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; empty if there is no such file. Raises ArtifactError if it is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} is not JSON: {error}; build again") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{file} holds no JSON object; build again")
    return value


def _text(token: Any) -> str | None:
    """Spelling of a token written as a string or as an `AddedToken` object."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every `*_token` of the configuration as text, and the lists of further ones."""
    special: dict[str, Any] = {}
    for name, value in config.items():
        if name.endswith("_token") and (text := _text(value)) is not None:
            special[name] = text
        elif name in _TOKEN_LISTS and isinstance(value, list):
            special[name] = [text for token in value if (text := _text(token)) is not None]
    return special


def _add_missing_tokens(
    backend: tokenizers.Tokenizer,
    path: Path,
    config: Mapping[str, Any],
    special: Mapping[str, Any],
) -> None:
    """Add tokens that stand beside tokenizer.json only, as older fine-tunes wrote them."""
    decoder = config.get("added_tokens_decoder", {})
    wanted = {int(i): token for i, token in decoder.items()}
    for content, i in read_json(path / "added_tokens.json").items():
        wanted.setdefault(int(i), {"content": content})
    spelled = {value for value in special.values() if isinstance(value, str)}
    for i, token in sorted(wanted.items()):
        text = _text(token)
        if text is None or backend.token_to_id(text) is not None:
            continue
        is_special = text in spelled or (isinstance(token, Mapping) and bool(token.get("special")))
        added = tokenizers.AddedToken(text, special=is_special, normalized=not is_special)
        (backend.add_special_tokens if is_special else backend.add_tokens)([added])
        if backend.token_to_id(text) != i:
            raise ArtifactError(
                f"{path}: token {text!r} should have id {i} and gets {backend.token_to_id(text)}; "
                "save the tokenizer again with transformers, so that tokenizer.json holds it"
            )


def _template_source(path: Path, config: Mapping[str, Any]) -> str | None:
    """The default chat template; chat_template.jinja wins over tokenizer_config.json."""
    try:
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default")
    return source if isinstance(source, str) else None
