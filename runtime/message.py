"""Commands to workers as text: JSON, in which arrays of tokens are base64 of their bytes.

A prompt of thousands of tokens as decimal numbers would take each side half a millisecond.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]


def int32(values: Sequence[int]) -> Int32:
    """Numbers as an array that `encode` takes."""
    return np.array(values, np.int32)


def encode(command: dict[str, Any]) -> str:
    """A command, of JSON's types and int32 arrays of one dimension."""
    return json.dumps(command, default=_array_to_json)


def decode(text: str) -> dict[str, Any]:
    """The command of `encode`'s text."""
    command: dict[str, Any] = json.loads(text, object_hook=_array_of_json)
    return command


def _array_to_json(value: Int32) -> dict[str, str]:
    data = np.ascontiguousarray(value, "<i4").tobytes()
    return {"int32": base64.b64encode(data).decode()}


def _array_of_json(found: dict[str, Any]) -> Any:
    if found.keys() != {"int32"}:
        return found
    return np.frombuffer(base64.b64decode(found["int32"]), "<i4")
