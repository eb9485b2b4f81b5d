"""Chat templates: a conversation as the text its model was trained on.

A template is Jinja code that comes with the checkpoint, so it runs in a sandbox. The environment is
the one of `transformers.PreTrainedTokenizerBase.apply_chat_template`, so that one template gives
one text in both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, TypeAlias

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from shardwright.errors import ConfigError, InputError

Message: TypeAlias = Mapping[str, Any]
"""One turn: `role` ("system", "user" or "assistant") and `content`."""


def check_messages(messages: Sequence[Any]) -> None:
    """Raise InputError unless each message is a mapping with `role` and `content`."""
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise InputError(
                f"message {index} is {message!r}; give {{'role': 'user', 'content': '...'}}"
            )


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training; here it is text as any other."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares the attribute so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(template: str) -> str:
    return datetime.now().strftime(template)


def _environment() -> jinja2.Environment:
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    env.filters["tojson"] = _tojson
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    env.globals.update(functions)
    return env


class ChatTemplate:
    """A compiled chat template.

    `special_tokens` are the variables the template may name, such as `bos_token`. Raises
    ConfigError if the source is not a valid template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any] | None = None) -> None:
        self.special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"chat template: {error}; mend chat_template in tokenizer_config.json or "
                "chat_template.jinja"
            ) from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Text of the conversation, ready to be encoded without further special tokens.

        With `add_generation_prompt` it ends where the assistant's answer begins. Raises InputError
        with the template's own message when the template refuses the conversation, for example
        because roles do not alternate.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InputError(f"the chat template refuses this conversation: {error}") from error
