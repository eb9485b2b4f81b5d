"""Tokenizer files, chat templates, streamed text."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from shardwright.errors import ArtifactError, ConfigError, InputError
from shardwright.runtime.chat_template import ChatTemplate
from shardwright.runtime.text_stream import StopMatcher, StreamDecoder, TextStream
from shardwright.runtime.tokenizer import Tokenizer

TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {{- '<|' + message.role + '|>' + message.content + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""
MESSAGES = [
    {"role": "user", "content": "héllo"},
    {"role": "assistant", "content": "日本"},
    {"role": "user", "content": "bye"},
]


def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer without merges: one token per byte."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=260,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """A Llama-2-like tokenizer: words with a leading space mark, and bytes for all else."""
    vocab = {"<unk>": 0, "▁Hi": 1, "▁you": 2, "!": 3}
    vocab |= {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def write(path: Path, **config: object) -> Path:
    byte_level().save(str(path / "tokenizer.json"))
    defaults = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    (path / "tokenizer_config.json").write_text(json.dumps({**defaults, **config}))
    return path


def test_encodes_text_with_bos_and_chat_by_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write(tmp_path, chat_template=TEMPLATE))
    (bos,) = tokenizer.encode("<s>", add_special_tokens=False)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    ids = tokenizer.encode("héllo")
    assert ids[0] == bos and tokenizer.decode(ids) == "héllo"
    ids = tokenizer.encode_chat(MESSAGES)
    expected = "<s><|user|>héllo</s><|assistant|>日本</s><|user|>bye</s><|assistant|>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected
    assert ids.count(bos) == 1


def test_template_file_wins_and_a_list_gives_its_default(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "plain"}]
    tokenizer = Tokenizer.from_directory(write(tmp_path, chat_template=named))
    assert tokenizer.template is not None and tokenizer.template.render(MESSAGES) == "plain"
    (tmp_path / "chat_template.jinja").write_text("file")
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.template is not None and tokenizer.template.render(MESSAGES) == "file"


def test_without_template_contents_are_plain_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write(tmp_path))
    assert tokenizer.template is None
    assert tokenizer.encode_chat(MESSAGES) == tokenizer.encode("héllo日本bye")


def test_tokens_beside_tokenizer_json_are_added(tmp_path: Path) -> None:
    size = byte_level().get_vocab_size()
    decoder = {str(size): {"content": "<|end|>", "special": True}}
    write(tmp_path, added_tokens_decoder=decoder)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"word": size + 1, "<s>": 0}))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("a<|end|>word", add_special_tokens=False)[1:] == [size, size + 1]
    assert tokenizer.decode([size, size + 1]) == "word"
    (tmp_path / "added_tokens.json").write_text(json.dumps({"word": size + 7}))
    with pytest.raises(ArtifactError, match=f"'word' should have id {size + 7}"):
        Tokenizer.from_directory(tmp_path)


def test_missing_or_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no tokenizer.json.*Session works on token ids"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ArtifactError, match="is not a tokenizer"):
        Tokenizer.from_directory(tmp_path)
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"tokenizer_config.json is not JSON"):
        Tokenizer.from_directory(tmp_path)


def test_template_environment_is_that_of_transformers() -> None:
    source = (
        "{% for m in messages %}\n"
        "    {% if loop.index > 2 %}{% break %}{% endif %}\n"
        "{{ m.content | tojson }}{% generation %}!{% endgeneration %}\n"
        "{% endfor %}\n"
        "{{ strftime_now('%Y') | length }}"
    )
    assert ChatTemplate(source).render(MESSAGES) == '"héllo"!"日本"!4'


@pytest.mark.reference
@pytest.mark.parametrize("source", [TEMPLATE, "{{ messages | tojson }}{{ bos_token }}"])
def test_template_renders_as_transformers_does(source: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>", chat_template=source
    )
    ours = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ours.render(MESSAGES) == expected


def test_template_refusals() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="roles must alternate"):
        template.render(MESSAGES)
    with pytest.raises(InputError, match="refuses this conversation"):
        ChatTemplate("{{ messages.append(1) }}").render(MESSAGES)
    with pytest.raises(InputError, match="unsafe"):
        ChatTemplate("{{ ''.__class__.__mro__ }}").render(MESSAGES)
    with pytest.raises(ConfigError, match="chat template"):
        ChatTemplate("{% if %}")


def stream(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[str], str]:
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.feed(token) for token in ids]
    return pieces, decoder.flush()


def test_stream_holds_back_unfinished_characters() -> None:
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode("aé日😀", add_special_tokens=False)
    pieces, rest = stream(tokenizer, ids)
    assert [piece for piece in pieces if piece] == ["a", "é", "日", "😀"]
    assert rest == ""
    pieces, rest = stream(tokenizer, ids[:-1])
    assert "".join(pieces) + rest == "aé日"


def test_stream_keeps_spaces_between_sentencepiece_words() -> None:
    tokenizer = Tokenizer(byte_fallback())
    smile = [4 + byte for byte in "😀😀".encode()]
    pieces, rest = stream(tokenizer, [1, 2, *smile, 3])
    assert "".join(pieces) + rest == "Hi you😀😀!"
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[1] == " you"


def test_stream_equals_decoding_at_once() -> None:
    tokenizer = Tokenizer(byte_level())
    alphabet = "ab é日本😀\n\u0301"
    draw = random.Random(7)
    for length in (1, 2, 17, 63):
        text = "".join(draw.choices(alphabet, k=length))
        pieces, rest = stream(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) + rest == text


def test_stream_does_not_wait_forever_on_invalid_bytes() -> None:
    tokenizer = Tokenizer(byte_fallback())
    pieces, _ = stream(tokenizer, [4 + 0xFF] * 20)
    assert any(pieces)


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        (["END"], ["abE", "N", "Dxx"], ["ab", "", ""]),
        (["END"], ["aEN", "X", "E"], ["a", "ENX", ""]),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""]),
        (["\n\n", "."], ["one\n", "two\n", "\n."], ["one", "\ntwo", ""]),
        ([], ["E", "N"], ["E", "N"]),
    ],
)
def test_no_part_of_a_stop_string_is_shown(
    stops: list[str], pieces: list[str], shown: list[str]
) -> None:
    matcher = StopMatcher(stops)
    assert [matcher.feed(piece) for piece in pieces] == shown


def test_text_stream_shows_what_was_held_back_at_the_end() -> None:
    tokenizer = Tokenizer(byte_level())
    text = TextStream(tokenizer, ["STOP"])
    shown = "".join(text.feed(token) for token in tokenizer.encode("go ST"))
    assert shown == "go " and not text.stopped
    assert text.finish() == "ST" and text.text == "go ST"
    for token in tokenizer.encode("OP STOP"):
        text.feed(token)
    assert text.stopped and text.finish() == ""
