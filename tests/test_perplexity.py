"""What quantizing costs: the demo model on conversations that it was not trained on.

It is sure of its answers, so that their perplexity hardly moves. The questions before them it
cannot know, and there the divergence of its predictions from those in float32 tells the formats
apart.
"""

import json
from dataclasses import dataclass

import numpy as np
import pytest

import demo
from shardwright import Session
from shardwright.compiler import weights
from shardwright.compiler.build import build
from shardwright.compiler.options import BuildOptions
from shardwright.compiler.quantization import QUANTIZATIONS
from shardwright.runtime.tokenizer import Tokenizer

# Mean Kullback-Leibler divergence from float32 over all tokens, in nats: least and most that a
# format may have. Measured on one CPU rank: 7.8e-6, 2.8e-4, 4.9e-3, 0.080 and 0.49; with the scales
# of `test_a_broken_quantizer_is_seen` 0.63 (q8f16_1), 6.2, 0.72 and 1.8.
DIVERGENCE = {
    "q0f16": (1e-6, 2e-5),
    "q8f16_1": (1e-4, 6e-4),
    "fp8f16": (2e-3, 1.2e-2),
    "q4f16_1": (0.04, 0.16),
    "q3f16_1": (0.25, 1.0),
}
# Largest rise of the answers' perplexity. Measured on one CPU rank it is 1 + 1.4e-6 in float32, and
# with these schemes higher by -6e-9, -1.1e-6, 1.4e-7, 5e-7 and 1.2e-4.
PERPLEXITY = {"q0f16": 1e-5, "q4f16_1": 1e-5, "q8f16_1": 1e-5, "fp8f16": 1e-5, "q3f16_1": 2e-4}
ROWS = 14


@dataclass(frozen=True)
class Predictions:
    """Of every token after a conversation's first, log probabilities `[tokens, vocab]`."""

    logs: np.ndarray
    tokens: np.ndarray
    answers: np.ndarray
    """Whether each token is of an answer."""

    def perplexity(self):
        """Of the answers' tokens."""
        losses = -self.logs[np.arange(len(self.tokens)), self.tokens]
        return float(np.exp(losses[self.answers].mean()))

    def divergence(self, other):
        """Mean over all tokens of that of `other` from this, in nats."""
        return float((np.exp(self.logs) * (self.logs - other.logs)).sum(-1).mean())


def predict(quantization, out):
    """The predictions of the demo model, quantized so."""
    options = {"max_batch_size": ROWS, "max_seq_len": 64}
    build(BuildOptions(str(demo.DEMO / "model"), out, quantization, **options))
    tokenizer = Tokenizer.from_directory(out)
    held_out = json.loads((demo.DEMO / "heldout.json").read_text())
    items = [item for kind in ("sums", "differences") for item in held_out[kind][5::250]]
    items += held_out["words"][::12] + held_out["about"][::31]
    rows, first = [], []
    for item in items:
        rows.append(tokenizer.encode_chat([{"role": "user", "content": item["prompt"]}]))
        first.append(len(rows[-1]))
        rows[-1] += tokenizer.encode(item["answer"], add_special_tokens=False)
    assert len(rows) == ROWS
    steps = max(map(len, rows)) - 1
    with Session(out) as session:
        logits = [session.prefill([row[:1] for row in rows])]
        for i in range(1, steps):
            logits.append(session.decode([row[min(i, len(row) - 1)] for row in rows]))
    logs = np.stack(logits, 1).astype(np.float64)
    logs -= logs.max(-1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(-1, keepdims=True))
    lengths = np.array([len(row) - 1 for row in rows])
    used = np.arange(steps) < lengths[:, None]
    answers = np.arange(1, steps + 1) >= np.array(first)[:, None]
    tokens = np.concatenate([np.array(row[1:]) for row in rows])
    return Predictions(logs[used], tokens, answers[used])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return predict("q0f32", tmp_path_factory.mktemp("plain") / "dist")


@pytest.mark.parametrize("quantization", DIVERGENCE)
def test_each_format_costs_what_it_should(quantization, plain, tmp_path):
    got = predict(quantization, tmp_path / "dist")
    least, most = DIVERGENCE[quantization]
    assert least < plain.divergence(got) < most
    assert 1 <= got.perplexity() < plain.perplexity() + PERPLEXITY[quantization]


@pytest.mark.parametrize("quantization", ["q4f16_1", "fp8f16"])
def test_a_broken_quantizer_is_seen(quantization, plain, tmp_path, monkeypatch):
    quantize = weights.quantize

    def shifted(*args):
        """Scales of the next group, or where a row has one, of the next row."""
        codes, scale = quantize(*args)
        return codes, np.roll(scale, 1, axis=int(scale.shape[1] > 1))

    monkeypatch.setattr(weights, "quantize", shifted)
    got = predict(quantization, tmp_path / "dist")
    assert plain.divergence(got) > 2 * DIVERGENCE[quantization][1]


def test_both_layouts_of_mlc_are_the_same_numbers():
    assert QUANTIZATIONS["q4f16_0"].packing == QUANTIZATIONS["q4f16_1"].packing
