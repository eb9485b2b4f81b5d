"""What `shardwright plan` shows: sizes read from text, and the tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from shardwright.console import size, table
from shardwright.errors import UsageError
from shardwright.runtime.memory import CONTEXT

if TYPE_CHECKING:
    from shardwright.compiler.plan import Estimate, Machine

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("KMGT", 1)}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?)B?(/s)?", re.IGNORECASE)


def parse_amount(text: str, option: str) -> int:
    """Bytes, or bytes per second, of text such as 24GiB, 80GB or 3.35TB/s.

    Raises UsageError, naming `option`, for anything else.
    """
    match = _AMOUNT.fullmatch(text.strip())
    unit = (match[2][:1].upper() + match[2][1:].lower()) if match else ""
    if match is None or unit not in _UNITS:
        raise UsageError(f"{option} {text}: no amount such as 24GiB, 80GB or 3.35TB/s")
    return int(float(match[1]) * _UNITS[unit])


def parse_counts(text: str, option: str) -> list[int]:
    """Positive numbers separated by commas. Raises UsageError, naming `option`, for others."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"{option} {text}: give numbers above 0 such as 1,2,4")
    return sorted({int(part) for part in parts})


def tables(
    estimates: Sequence[Estimate],
    machine: Machine,
    batches: Sequence[int],
    length: int,
    context: int,
) -> list[Table]:
    """What each GPU holds, and what fits and how fast for each number of rows."""
    usable = machine.memory - CONTEXT
    row = f"rows of {length}"
    fixed = table(
        f"Each GPU of {size(machine.memory)}, of which {size(CONTEXT)} are the driver's",
        *("GPUs", "weights", "workspace", "state and libraries", "left for cache"),
        *("cache per token", "tokens that fit", row),
    )
    rows = table(
        f"Rows of {length} tokens; speed at {context}",
        *("GPUs", "rows", "weights", "cache", "the rest", "total", "left", "", "ms per token"),
    )
    for e in estimates:
        need = e.memory(max(batches), length)
        rest = need.state + need.reserved
        left = usable - need.weights - need.workspace - rest
        tokens = e.tokens(usable, max(batches))
        fixed.add_row(
            *(str(e.ranks), size(need.weights), size(need.workspace), size(rest)),
            *(size(left) if left > 0 else "none", size(int(e.token_bytes)), f"{tokens:,}"),
            f"{tokens // (-(-length // 16) * 16):,}",
        )
        for batch in batches:
            need = e.memory(batch, length)
            fits = need.total <= usable
            speed = ""
            if fits and machine.bandwidth is not None:
                speed = f"{e.seconds(machine, batch, context) * 1e3:.2f}"
            rows.add_row(
                *(str(e.ranks), str(batch), size(need.weights), size(need.cache)),
                *(size(need.total - need.weights - need.cache), size(need.total)),
                size(usable - need.total) if fits else "-" + size(need.total - usable),
                "fits" if fits else "OUT OF MEMORY",
                speed,
            )
    return [fixed, rows]


def show(
    estimates: Sequence[Estimate],
    machine: Machine,
    batches: Sequence[int],
    length: int,
    context: int,
    notes: Sequence[str],
    echo: Callable[[Table | str], None],
) -> None:
    """Print the tables, and the notes after them."""
    for part in tables(estimates, machine, batches, length, context):
        echo(part)
    if machine.bandwidth is None:
        echo("Give --bandwidth (and --link) for a predicted time per token.")
    for note in notes:
        echo(note)
