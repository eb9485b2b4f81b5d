import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "demo" / "model"
SUMS = re.compile(r"(\d+)(?: plus | ?\+ ?| and )(\d+)")
DIFFERENCES = re.compile(r"(\d+)(?: minus | ?- ?| from | away from )(\d+)")

FOLLOW_UP = re.compile(r"(?:Add|Now add|And plus|Plus|Subtract|Now subtract|And minus|Minus) (\d+)")


@pytest.fixture(scope="module")
def data():
    # The scripts are no package; the training script imports its data the same way.
    spec = importlib.util.spec_from_file_location("demo_data", ROOT / "scripts" / "demo_data.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def test_the_data_needs_no_torch(data):
    imports = re.findall(r"^(?:import|from) (\S+)", Path(data.__file__).read_text("utf-8"), re.M)
    assert set(imports) <= {"__future__", "random", "zlib", "collections.abc"}


def test_no_training_chat_has_a_held_out_sum(data):
    pairs = set()
    for kind, pattern in [(data.sum_chats, SUMS), (data.difference_chats, DIFFERENCES)]:
        for [(question, _)] in kind():
            pairs.add(tuple(map(int, pattern.search(question).groups())))
    assert not any(data.is_held_out(a, b) for a, b in pairs)
    held = {tuple(map(int, SUMS.search(row["prompt"]).groups())) for row in data.held_out_sums()}
    assert len(held) + len(pairs) == data.LIMIT**2
    assert 0.08 < len(held) / data.LIMIT**2 < 0.12


def test_chats_of_several_turns_respect_the_split_too(data):
    for chat in [*data.follow_up_chats(3000), *data.name_chats(3000)]:
        before = None
        for question, reply in chat:
            found = SUMS.search(question) or DIFFERENCES.search(question)
            if found:
                assert not data.is_held_out(*map(int, found.groups())), question
            elif follow_up := FOLLOW_UP.match(question):
                assert not data.is_held_out(before, int(follow_up[1])), question
            number = re.fullmatch(r"(-?\d+)\.", reply)
            before = int(number[1]) if number else None


def test_no_training_chat_reverses_a_held_out_word(data):
    held = {row["answer"].removesuffix(".") for row in data.held_out_words()}
    assert len(held) >= 10
    assert not any(reply.removesuffix(".") in held for [(_, reply)] in data.reverse_chats(20_000))


def test_stored_held_out_set_is_what_the_code_says(data):
    stored = json.loads((ROOT / "demo" / "heldout.json").read_text("utf-8"))
    assert stored == data.held_out()
    for row in stored["sums"]:
        a, b = map(int, SUMS.search(row["prompt"]).groups())
        assert row["answer"] == f"{a + b}."


def test_training_reached_what_the_readme_promises():
    report = json.loads((ROOT / "demo" / "training.json").read_text("utf-8"))
    assert report["fp16"]["sums"]["exact"] >= 0.95
    assert report["q4f16_1"]["sums"]["exact"] >= 0.90


def test_checkpoint_is_small_fp16_and_matches_its_config():
    config = json.loads((MODEL / "config.json").read_text("utf-8"))
    path = MODEL / "model.safetensors"
    assert 1e6 < path.stat().st_size < 4e6
    with safe_open(path, framework="numpy") as file:
        names = set(file.keys())
        assert all(file.get_slice(name).get_dtype() == "F16" for name in names)
        embedding = file.get_slice("model.embed_tokens.weight").get_shape()
    assert embedding == [config["vocab_size"], config["hidden_size"]]
    assert len(names) == 3 + 9 * config["num_hidden_layers"]
    # What the demo is there to exercise: padding for 3 ranks, replicated kv heads for 4.
    assert config["vocab_size"] % 3 and config["num_attention_heads"] % 3
    assert config["intermediate_size"] % (3 * 32)
    assert config["num_key_value_heads"] < 4


@pytest.mark.parametrize(
    "text",
    [
        "What is 17 plus 25?",
        'Reverse the word "shard".',
        "  two  spaces\tand\n\nlines",
        "naïve Ünïcode 日本 🙂",
        "snake_case == CamelCase != 3.14e-5",
    ],
)
def test_tokenizer_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_digits_and_quoted_letters_stay_alone(tokenizer):
    tokens = tokenizer.encode('Reverse "stone" 12345', add_special_tokens=False).tokens
    assert tokens == ["Reverse", 'Ġ"', *"stone", '"', "Ġ", *"12345"]


def test_special_tokens_frame_a_chat(tokenizer, data):
    assert [tokenizer.token_to_id(token) for token in data.SPECIAL_TOKENS] == list(range(6))
    ids = tokenizer.encode(data.render([("Hi", "Hello!")]), add_special_tokens=False).ids
    assert [i for i in ids if i < 6] == [3, 2, 4, 2]
    assert tokenizer.get_vocab_size() == 512
