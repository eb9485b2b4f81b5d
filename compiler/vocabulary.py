"""Whether a checkpoint's tokenizer and its model speak of the same tokens."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from shardwright.compiler.checkpoint import listing
from shardwright.errors import CheckpointError


def check_vocabulary(root: Path, vocab_size: int, special: tuple[int, ...]) -> None:
    """Compare tokenizer.json in `root` with the rows of the embedding.

    Raises CheckpointError if a token of the vocabulary, or an id of `special` (begin and end tokens
    of config.json), has no row, or if tokenizer.json is damaged. Tokens that were added later and
    have no row are a warning: many checkpoints have them, and only a prompt that spells one fails.
    """
    if beyond := [str(token) for token in special if not 0 <= token < vocab_size]:
        raise CheckpointError(
            f"{root / 'config.json'}: token ids {listing(beyond)} of bos_token_id and eos_token_id "
            f"are beyond vocab_size {vocab_size}; take config.json and weights of one model"
        )
    path = root / "tokenizer.json"
    if not path.is_file():
        return
    try:
        data = json.loads(path.read_bytes())
        vocabulary = _ids(data["model"].get("vocab") or {})
        added = {str(token["content"]): int(token["id"]) for token in data.get("added_tokens", [])}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({error!r}); fetch it again") from None
    lost = [t for t, i in vocabulary.items() if i >= vocab_size and t not in added]
    if lost:
        raise CheckpointError(
            f"{path}: {len(lost)} tokens have ids beyond vocab_size {vocab_size} of config.json, "
            f"such as {listing([repr(token) for token in lost], 3)}; take tokenizer and weights of "
            "one model"
        )
    unusable = [repr(token) for token, i in added.items() if i >= vocab_size]
    if unusable:
        warnings.warn(
            f"{path}: the model has no row for the added tokens {listing(unusable, 5)}; a prompt "
            "with one of them will be refused",
            stacklevel=2,
        )


def _ids(vocabulary: Any) -> dict[str, int]:
    """Tokens and their ids: a table, or, of a unigram model, a list of (token, score)."""
    if isinstance(vocabulary, list):
        return {str(token): i for i, (token, _) in enumerate(vocabulary)}
    return {str(token): int(i) for token, i in vocabulary.items()}
