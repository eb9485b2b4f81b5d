"""Conversations as token ids, against those of transformers, for the templates of the families."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from reference import chat

from shardwright.errors import InputError
from shardwright.runtime.text_stream import StreamDecoder
from shardwright.runtime.tokenizer import Tokenizer


def tokenizer_of(name: str, folder: Path) -> Tokenizer:
    chat.write_tokenizer(name, folder)
    return Tokenizer.from_directory(folder)


def golden() -> dict[str, dict[str, Any]]:
    """Ids by family and conversation; None where the template refuses."""
    return json.loads(chat.GOLDEN.read_text())


def test_every_family_and_conversation_is_stored() -> None:
    stored = golden()
    assert list(stored) == chat.NAMES
    for family, ids in stored.items():
        assert list(ids) == list(chat.CONVERSATIONS)
        assert ids["one"], family
    # A system message is refused by one family, turns that do not alternate by five.
    refused = {(f, c) for f, ids in stored.items() for c in ids if ids[c] is None}
    assert {f for f, c in refused if c == "system"} == {"gemma-2"}
    assert {f for f, c in refused if c == "two users"} == {
        "llama-2", "mistral", "gemma-2", "gemma-3"
    }  # fmt: skip


@pytest.mark.parametrize("conversation", chat.CONVERSATIONS)
@pytest.mark.parametrize("name", chat.NAMES)
def test_conversations_have_the_ids_of_transformers(
    name: str, conversation: str, tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(name, tmp_path)
    want = golden()[name][conversation]
    messages = chat.CONVERSATIONS[conversation]
    if want is None:
        with pytest.raises(InputError, match="refuses this conversation"):
            tokenizer.encode_chat(messages)
    else:
        assert tokenizer.encode_chat(messages) == want


@pytest.mark.reference
@pytest.mark.parametrize("name", chat.NAMES)
def test_golden_values_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import jinja2

    chat.write_tokenizer(name, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found: dict[str, Any] = {}
    for conversation, messages in chat.CONVERSATIONS.items():
        try:
            encoded = theirs.apply_chat_template(messages, add_generation_prompt=True)
            found[conversation] = list(encoded["input_ids"])
        except jinja2.TemplateError:
            found[conversation] = None
    if os.environ.get("UPDATE_GOLDEN"):
        stored = golden() if chat.GOLDEN.exists() else {}
        stored[name] = found
        ordered = {key: stored[key] for key in chat.NAMES if key in stored}
        lines = [f'"{k}": {json.dumps(v, separators=(",", ":"))}' for k, v in ordered.items()]
        chat.GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert golden()[name] == found


@pytest.mark.parametrize("name", ["llama-2", "llama-3", "gemma-2", "qwen-3"])
def test_streams_show_no_broken_character(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(name, tmp_path)
    draw = random.Random(3)
    for text in (chat.TEXT, "".join(draw.choices("aé日😀👍🏽\u0301 \nß", k=80))):
        ids = tokenizer.encode(text, add_special_tokens=False)
        decoder = StreamDecoder(tokenizer)
        pieces = [decoder.feed(i) for i in ids]
        assert "".join(pieces) + decoder.flush() == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_added_tokens_that_are_no_special_ones_are_shown(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("qwen-3", tmp_path)
    ids = tokenizer.encode("<think>\na\n</think><|im_end|>", add_special_tokens=False)
    assert len(ids) == 6  # each added token is one
    assert tokenizer.decode(ids) == "<think>\na\n</think>"
