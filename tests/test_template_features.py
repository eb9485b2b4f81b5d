"""What published chat templates use of Jinja, rendered as transformers renders it.

Each template of tests/golden/templates.json uses one thing that those of Llama 2 to 3.3, Mistral,
Mixtral, Qwen 2.5 and 3, Gemma 2 and 3, Phi-3 and 4 or GPT-OSS use. Beside it is what transformers
makes of it, null where it refuses; `UPDATE_GOLDEN=1 pytest -m reference` writes that.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from shardwright.errors import InputError
from shardwright.runtime.chat_template import ChatTemplate

GOLDEN = Path(__file__).with_name("golden") / "templates.json"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = [
    {"role": "system", "content": '  Be <brief> & "kind".\n'},
    {"role": "user", "content": "Grüße, 日本 😀"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFine. "},
    {"role": "user", "content": "It's\ttwo\\n lines\n\n"},
]


def golden() -> dict[str, dict[str, Any]]:
    return json.loads(GOLDEN.read_text())


def ours(source: str) -> str | None:
    try:
        return ChatTemplate(source, TOKENS).render(MESSAGES)
    except InputError:
        return None


@pytest.mark.parametrize("name", golden())
def test_text_is_that_of_transformers(name: str) -> None:
    case = golden()[name]
    assert ours(case["template"]) == case["text"]


def test_refusals_are_those_of_transformers() -> None:
    assert {name for name, case in golden().items() if case["text"] is None} == {
        *("an absent name's attribute", "raise_exception", "raise_exception in a branch"),
        *("changes of what is given", "private names", "arithmetic on text"),
    }


@pytest.mark.reference
def test_golden_values_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    import jinja2
    from tokenizers import Tokenizer, models

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])), **TOKENS
    )

    def theirs(source: str) -> str | None:
        try:
            text: str = tokenizer.apply_chat_template(
                MESSAGES, chat_template=source, tokenize=False, add_generation_prompt=True
            )
            return text
        except (jinja2.TemplateError, TypeError):
            return None

    found = {
        name: {"template": case["template"], "text": theirs(case["template"])}
        for name, case in golden().items()
    }
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    assert golden() == found
