"""Tokenizers and configurations that disagree."""

import json
import warnings

import pytest

from shardwright.compiler.vocabulary import check_vocabulary
from shardwright.errors import CheckpointError


def write(path, vocab, added=()):
    tokens = [{"content": content, "id": i} for content, i in added]
    (path / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": vocab}, "added_tokens": tokens})
    )
    return path


@pytest.mark.parametrize("vocab", [{"a": 0, "b": 4}, [["a", 0.0], ["b", -1.5]], {}])
def test_tokenizers_that_fit(tmp_path, vocab):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_vocabulary(write(tmp_path, vocab, [("</s>", 3)]), 5, (0, 4))
        check_vocabulary(tmp_path / "without", 5, ())


@pytest.mark.parametrize(
    "vocab", [{"a": 0, "b": 5, "c": 6}, [["x", 0.0]] * 5 + [["b", 0], ["c", 0]]]
)
def test_a_vocabulary_beyond_the_embedding(tmp_path, vocab):
    with pytest.raises(CheckpointError, match=r"2 tokens have ids beyond vocab_size 5.*'b', 'c'"):
        check_vocabulary(write(tmp_path, vocab), 5, ())


def test_added_tokens_without_a_row_are_a_warning(tmp_path):
    # Some tokenizers list added tokens in the vocabulary as well.
    write(tmp_path, {"a": 0, "[PAD]": 5}, [("[PAD]", 5)])
    with pytest.warns(UserWarning, match=r"no row for the added tokens '\[PAD\]'"):
        check_vocabulary(tmp_path, 5, ())


def test_end_tokens_beyond_the_embedding(tmp_path):
    with pytest.raises(CheckpointError, match="token ids 5, -2 of bos_token_id and eos_token_id"):
        check_vocabulary(tmp_path, 5, (1, 5, -2))


@pytest.mark.parametrize("text", ["{", "{}", '{"model": 3}', '{"model": {"vocab": {"a": "b"}}}'])
def test_a_damaged_tokenizer(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: damaged"):
        check_vocabulary(tmp_path, 5, ())
