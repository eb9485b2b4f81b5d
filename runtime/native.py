"""Compile C++ sources of this package on first use, and keep the libraries in a user cache."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from shardwright.errors import BuildError

_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-Wall")


def cache_dir() -> Path:
    """Directory for compiled libraries: `$XDG_CACHE_HOME/shardwright`, or under the home."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "shardwright"


def load_native(
    source: Path, soname: str | None = None, flags: tuple[str, ...] = ()
) -> ctypes.CDLL:
    """Compile `source` unless the cache already has it, and load it.

    With `soname` it can stand in for the library of that name, its symbols visible to all. `flags`
    are more options for the compiler, such as libraries to link with.

    Several processes may do this at once: each compiles to a file of its own and renames it.
    Raises BuildError if there is no compiler, the source does not compile, or the result cannot be
    written or loaded.
    """
    text = source.read_bytes()
    if soname:
        flags = (f"-Wl,-soname,{soname}", *flags)
    parts = [*_FLAGS, *flags, platform.machine()]
    key = hashlib.sha256(b"\0".join([text, *map(str.encode, parts)]))
    library = cache_dir() / f"{source.stem}-{key.hexdigest()[:16]}.so"
    try:
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            _compile(source, library, flags)
        return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL if soname else ctypes.DEFAULT_MODE)
    except OSError as error:
        raise BuildError(
            f"{library}: cannot be written or loaded ({error}); "
            "set XDG_CACHE_HOME to a directory you can write and run programs from"
        ) from None


def _compile(source: Path, library: Path, flags: tuple[str, ...]) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise BuildError(
            "no C++ compiler found, collectives between CPU ranks and AMD GPUs need one; "
            "install g++ (Debian, Ubuntu: apt install g++) or set CXX"
        )
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        command = [compiler, *_FLAGS, "-o", temporary, str(source), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise BuildError(f"{source.name} does not compile with {compiler}:\n{done.stderr}")
        os.replace(temporary, library)
    finally:
        Path(temporary).unlink(missing_ok=True)
