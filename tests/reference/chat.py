"""Chat templates and tokenizers in the manner of the families, and conversations.

The templates are ours: they write the text that the published ones write for these conversations
(without tools), and use the parts of Jinja that those use. The tokenizers are tiny, of the two
kinds that the families have: byte-level BPE, and BPE over words with a space mark that falls back
to bytes. tests/golden/chat.json has the token ids that transformers gives for each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

GOLDEN = Path(__file__).parents[1] / "golden" / "chat.json"

TEXT = "Grüße an 日本 😀👍🏽, <b>\"q\" & 'x'</b>\n\n  two lines  "
SYSTEM = {"role": "system", "content": " Be brief.\n"}
HELLO = {"role": "user", "content": "Hello, how are you?"}
TURNS = [
    HELLO,
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFine, and the others? "},
    {"role": "user", "content": TEXT},
]
CONVERSATIONS: dict[str, list[dict[str, str]]] = {
    "one": [HELLO],
    "system": [SYSTEM, HELLO],
    "turns": TURNS,
    "system and turns": [SYSTEM, *TURNS],
    "two users": [HELLO, HELLO],
}

_LLAMA2 = """\
{%- set first = messages[0] %}
{%- set ns = namespace(system='') %}
{%- if first['role'] == 'system' %}
    {%- set ns.system = '<<SYS>>\\n' + first['content'] + '\\n<</SYS>>\\n\\n' %}
{%- endif %}
{%- for turn in messages if turn['role'] != 'system' %}
    {%- if (turn['role'] == 'user') != (loop.index0 is divisibleby 2) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- endif %}
    {%- set text = ns.system + turn['content'] if loop.first else turn['content'] %}
    {%- if turn['role'] == 'user' %}
        {{- bos_token ~ '[INST] ' ~ text | trim ~ ' [/INST]' }}
    {%- else %}
        {{- ' ' ~ text | trim ~ ' ' ~ eos_token }}
    {%- endif %}
{%- endfor %}
"""

_LLAMA3 = """\
{%- macro header(role) %}
{{- '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' }}
{%- endmacro %}
{{- bos_token }}
{%- if strftime_now is defined %}{% set year = strftime_now('%Y') %}{% endif %}
{%- for turn in messages %}
    {{- header(turn.role) + turn.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif %}
"""

_MISTRAL = """\
{%- if messages[0].role == 'system' %}
    {%- set system, rest = messages[0].content, messages[1:] %}
{%- else %}
    {%- set system, rest = none, messages %}
{%- endif %}
{{- bos_token }}
{%- for turn in rest %}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if turn.role == 'user' and loop.last and system is not none %}
        {{- '[INST] ' + system + '\\n\\n' + turn.content + '[/INST]' }}
    {%- elif turn.role == 'user' %}
        {{- '[INST] ' + turn.content + '[/INST]' }}
    {%- else %}
        {{- ' ' + turn.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""

_QWEN2 = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for turn in messages %}
{{- '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for turn in messages[::-1] %}
    {%- if turn.role == 'user' and not ns.last %}
        {%- set ns.last = messages | length - loop.index0 - 1 %}
    {%- endif %}
{%- endfor %}
{%- for turn in messages %}
    {%- set text = turn.content if turn.content is string else '' %}
    {%- if turn.role == 'assistant' and '</think>' in text and loop.index0 < ns.last %}
        {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + turn.role + '\\n' + text + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

_GEMMA2 = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}\
{% endif %}{% for turn in messages %}{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('user and model must take turns') }}{% endif %}\
{{ '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else turn['role']) + '\\n'\
 + turn['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

_GEMMA3 = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set before = messages[0]['content'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set before, turns = '', messages -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('user and model must take turns') }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else turn['role']) + '\\n'
       + (before if loop.first else '') }}
    {%- if turn['content'] is string -%}
        {{ turn['content'] | trim }}
    {%- elif turn['content'] is iterable -%}
        {%- for item in turn['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""

_PHI3 = """\
{% for turn in messages %}{% if turn['role'] in ('system', 'user', 'assistant') %}\
{{ '<|' ~ turn['role'] ~ '|>\\n' ~ turn['content'] ~ '<|end|>\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

_PHI4 = """\
{% for turn in messages %}{{ '<|im_start|>' ~ turn['role'] ~ '<|im_sep|>' ~ turn['content'] ~\
 '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}\
{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

# GPT-OSS's "harmony". It writes the date, of which only the century is kept here.
_HARMONY = """\
{%- macro turn(role, text, channel='') -%}
    {{- '<|start|>' ~ role ~ ('<|channel|>' ~ channel if channel else '') }}
    {{- '<|message|>' ~ text }}
{%- endmacro %}
{%- macro about() -%}
    {{- model_identity | default('You are ChatGPT, a large language model trained by OpenAI.') }}
    {{- '\\nKnowledge cutoff: 2024-06\\nCurrent date: ' ~ strftime_now('%Y-%m-%d')[:2] }}
    {{- '\\n\\nReasoning: ' ~ reasoning_effort | default('medium') }}
    {{- '\\n\\n# Valid channels: analysis, commentary, final.' }}
    {{- ' Channel must be included for every message.' }}
{%- endmacro %}
{{- turn('system', about()) ~ '<|end|>' }}
{%- set system = messages[0].role in ['system', 'developer'] %}
{%- if system and messages[0].content %}
    {{- turn('developer', '# Instructions\\n\\n' ~ messages[0].content ~ '\\n\\n') ~ '<|end|>' }}
{%- endif %}
{%- for message in (messages[1:] if system else messages) %}
    {%- if message.role == 'assistant' %}
        {%- if '<|channel|>final<|message|>' in message.content %}
            {{- raise_exception('content holds a channel; give the text alone') }}
        {%- endif %}
        {{- turn('assistant', message.content, 'final') }}
        {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
    {%- else %}
        {{- turn(message.role, message.content) ~ '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

_CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"]

# Template, kind of tokenizer, bos, eos, other added tokens.
_FAMILIES: dict[str, tuple[str, str, str | None, str, list[str]]] = {
    "llama-2": (_LLAMA2, "words", "<s>", "</s>", []),
    "llama-3": (
        _LLAMA3,
        "bytes",
        "<|begin_of_text|>",
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>"],
    ),
    "mistral": (_MISTRAL, "words", "<s>", "</s>", ["[INST]", "[/INST]"]),
    "qwen-2": (_QWEN2, "bytes", None, "<|im_end|>", _CHATML),
    "qwen-3": (_QWEN3, "bytes", None, "<|im_end|>", [*_CHATML, "<think>", "</think>"]),
    "gemma-2": (_GEMMA2, "marks", "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "gemma-3": (_GEMMA3, "marks", "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "phi-3": (
        _PHI3,
        "words",
        "<s>",
        "<|endoftext|>",
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    ),
    "gpt-oss": (
        _HARMONY,
        "bytes",
        "<|startoftext|>",
        "<|return|>",
        ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|endoftext|>"],
    ),
    "phi-4": (_PHI4, "bytes", "<|endoftext|>", "<|im_end|>", _CHATML),
}
NAMES = list(_FAMILIES)

_WORDS = "Hello , how are you ? Fine and the others two lines Be brief . INST SYS".split()


def _byte_level() -> Tokenizer:
    """Every byte is a token, and a few pairs of them are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("l", "l"), ("Ġ", "a"), ("t", "h"), ("th", "e"), ("Ã", "¼"), ("Ċ", "Ċ"), ("o", "u")]
    vocab = {token: i for i, token in enumerate([*alphabet, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(prefix: bool) -> Tokenizer:
    """Words with a mark for the space before them; with `prefix` a text begins with one, too."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    merges = []
    for word in _WORDS:
        piece = "▁"
        for letter in word:
            for token in (piece, letter, piece + letter):
                vocab.setdefault(token, len(vocab))
            if (piece, letter) not in merges:
                merges.append((piece, letter))
            piece += letter
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    marks = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*marks, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def write_tokenizer(name: str, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json of a family into `folder`."""
    template, kind, bos, eos, others = _FAMILIES[name]
    tokenizer = _byte_level() if kind == "bytes" else _sentencepiece(prefix=kind == "words")
    special = dict.fromkeys([token for token in (bos, eos) if token] + others)
    # The marks of reasoning are added tokens, but text like any other.
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special if "<t" not in t
                                  and "</t" not in t])  # fmt: skip
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in special if "think>" in t])
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
