"""How the next token is chosen, for one row."""

import math
import secrets
from dataclasses import dataclass

from shardwright.errors import InputError

MAX_EOS = 16
"""End tokens a compiled program takes per row."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of one row. Values out of range raise InputError.

    The order is that of Hugging Face: penalties, then temperature, top-k, top-p.
    """

    temperature: float = 0.0
    """0 is greedy: the most likely token."""
    top_p: float = 1.0
    """Keep the most likely tokens up to this total probability; in (0, 1], 1 is off."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the row so far get less likely (Keskar et al. 2019, CTRL)."""
    no_repeat_ngram_size: int = 0
    """No sequence of this many tokens occurs twice in the row; 0 is off."""
    min_new_tokens: int = 0
    """No end token before this many new tokens."""
    max_new_tokens: int | None = None
    """The row ends after this many new tokens; None: when it is full."""
    seed: int | None = None
    """64 bits; the same seed gives the same tokens for any number of ranks. None: at random."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; for layers that have a tokenizer."""
    eos: tuple[int, ...] | None = None
    """Tokens that end the row; None: those of the model."""

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, 0 <= self.top_k < 1 << 31, "0 or more"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                0 < self.repetition_penalty < math.inf,
                "above 0",
            ),
            (
                "no_repeat_ngram_size",
                self.no_repeat_ngram_size,
                0 <= self.no_repeat_ngram_size < 1 << 31,
                "0 or more",
            ),
            (
                "min_new_tokens",
                self.min_new_tokens,
                0 <= self.min_new_tokens < 1 << 31,
                "0 or more",
            ),
            (
                "max_new_tokens",
                self.max_new_tokens,
                self.max_new_tokens is None or self.max_new_tokens >= 1,
                "1 or more",
            ),
            (
                "seed",
                self.seed,
                self.seed is None or -(1 << 63) <= self.seed < 1 << 64,
                "an integer of 64 bits",
            ),
            ("eos", self.eos, len(self.eos or ()) <= MAX_EOS, f"at most {MAX_EOS} tokens"),
        )
        for name, value, good, wanted in checks:
            if not good:
                raise InputError(f"{name} is {value}; it must be {wanted}")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"min_new_tokens is {self.min_new_tokens}, above max_new_tokens "
                f"{self.max_new_tokens}; lower it"
            )

    def float_row(self) -> list[float]:
        """Values for the state tensor `sampling_f`, for one row."""
        return [self.temperature, self.top_p, self.repetition_penalty, 0.0]

    def int_row(self, prompt_len: int) -> list[int]:
        """Values for the state tensor `sampling_i`, for one row, as signed 32-bit integers."""
        seed = secrets.randbits(64) if self.seed is None else self.seed
        return [
            self.top_k,
            self.no_repeat_ngram_size,
            self.min_new_tokens,
            prompt_len,
            _signed(seed),
            _signed(seed >> 32),
            0,
            0,
        ]


def _signed(value: int) -> int:
    value &= (1 << 32) - 1
    return value - (1 << 32) if value >= 1 << 31 else value
