"""Shardwright: one single-device model definition in, one SPMD library for N GPUs out."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Loaded on first use: `shardwright.errors` must not pull in TVM, and the runtime must not pull in
# the compiler.
_PUBLIC = {
    "build": "shardwright.compiler.build",
    "BuildOptions": "shardwright.compiler.options",
    "ChatModule": "shardwright.runtime.chat",
    "ChatConfig": "shardwright.runtime.chat",
    "GenerationConfig": "shardwright.runtime.chat",
    "Session": "shardwright.runtime.session",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'shardwright' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
