"""Token ids to text as they arrive, with nothing shown that would have to be taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_BROKEN = "\ufffd"

# A character is at most four bytes of UTF-8, so at most four tokens. More broken tokens in a row
# than this are not the start of a character, and waiting longer would hold the text back forever.
_MAX_HELD_TOKENS = 8


class Decoder(Protocol):
    """What a `StreamDecoder` needs of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token `ids`."""


class StreamDecoder:
    """Text of a growing list of token ids, piece by piece.

    A token may be part of a character (byte fallback, byte-level BPE), and its text may depend on
    the token before it (leading spaces). So each piece is the difference between two decodings
    that begin at the same earlier token, and it is held back while it ends in U+FFFD. The method
    is the one of text-generation-inference and vLLM.
    """

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        # Tokens from the start of the last piece shown, which give the next one its context.
        self._ids: list[int] = []
        self._shown = 0
        self._broken = 0

    def feed(self, token: int) -> str:
        """The text that `token` completes; often empty."""
        self._ids.append(token)
        piece = self._pending()
        self._broken = self._broken + 1 if piece.endswith(_BROKEN) else 0
        if not piece or 0 < self._broken <= _MAX_HELD_TOKENS:
            return ""
        self._ids = self._ids[self._shown :]
        self._shown, self._broken = len(self._ids), 0
        return piece

    def flush(self) -> str:
        """The text still held back, at the end of the sequence; an unfinished character is lost."""
        piece = self._pending().rstrip(_BROKEN)
        self._ids, self._shown, self._broken = [], 0, 0
        return piece

    def _pending(self) -> str:
        context = self._tokenizer.decode(self._ids[: self._shown])
        return self._tokenizer.decode(self._ids)[len(context) :]


class StopMatcher:
    """Text up to the first stop string, of which no part is ever shown.

    `feed` returns what can be shown; `stopped` is True once a stop string is complete, and nothing
    more comes out then.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Add `text`; return what can no longer become part of a stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = self._open_suffix(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text held back, once no more can come."""
        text, self._held = self._held, ""
        return text

    def _open_suffix(self, text: str) -> int:
        """Length of the longest end of `text` that begins some stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


class TextStream:
    """Tokens of one row in, text to show out: `StreamDecoder` then `StopMatcher`."""

    def __init__(self, tokenizer: Decoder, stops: Sequence[str] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._matcher = StopMatcher(stops)
        self.text = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._matcher.stopped

    def feed(self, token: int) -> str:
        """The text that can be shown after `token`."""
        return self._show(self._matcher.feed(self._decoder.feed(token)))

    def finish(self) -> str:
        """The rest, after the last token."""
        rest = self._matcher.feed(self._decoder.flush())
        return self._show(rest + self._matcher.flush())

    def _show(self, text: str) -> str:
        self.text += text
        return text
