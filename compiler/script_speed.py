"""TVMScript parses kernels several times faster when stack frames carry no source lines."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_source_context() -> Iterator[None]:
    """Within it, `inspect.stack` and `inspect.getouterframes` leave source lines out.

    TVMScript walks the stack for each function it parses, and reads only the frames; looking up the
    source of every frame took nine tenths of the time to load TVM's tensor-core intrinsics (66 s of
    84 s of a small CUDA build).
    """
    original = inspect.getouterframes

    def quick(frame: Any, context: int = 1) -> list[inspect.FrameInfo]:
        frames = []
        while frame:
            code = frame.f_code
            where = (code.co_filename, frame.f_lineno, code.co_name)
            frames.append(inspect.FrameInfo(frame, *where, None, None))
            frame = frame.f_back
        return frames

    inspect.getouterframes = quick
    try:
        yield
    finally:
        inspect.getouterframes = original
