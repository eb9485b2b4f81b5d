"""Callbacks for `ChatModule.generate`."""

from shardwright.runtime.callback import (
    DeltaCallback,
    ProgressCallback,
    StreamIterator,
    StreamToStdout,
)

__all__ = ["DeltaCallback", "ProgressCallback", "StreamIterator", "StreamToStdout"]
