"""The built artefact on disk: `manifest.json`, and the checks that its files are whole.

A directory `dist/<name>/` holds `manifest.json`, `model.so`, `shards/rank-*.safetensors` and the
tokenizer files. The manifest is written last, so that a directory without one is an unfinished
build.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from shardwright.errors import ArtifactError

SCHEMA = 1
"""Version of the manifest's layout; a reader refuses newer ones."""

MANIFEST = "manifest.json"

SELFTEST = "selftest.json"
"""What a reference must know of each kernel of the library, see `references`."""

KERNELS = "kernels.json"
"""Of a library for AMD GPUs: what the build counted in each kernel, see `code_object`."""

CUBLAS = "cublas"
"""NVIDIA's library of matrix products, in `Manifest.libraries`."""

PIECE_BYTES = 16 << 20
"""Length of the pieces of a shard that have a checksum of their own."""

_MEND = "copy it again from where it was built, or build the model again"

T = TypeVar("T")


@dataclass(frozen=True)
class Model:
    """What was compiled. `config` is the Hugging Face `config.json` as read."""

    architecture: str
    config: dict[str, Any]
    vocab_size: int
    bos: int | None
    eos: tuple[int, ...]
    num_layers: int


@dataclass(frozen=True)
class Target:
    """Device kind, `cpu` or `cuda`, and the GPU architectures with compiled code."""

    kind: str
    archs: tuple[str, ...]


@dataclass(frozen=True)
class Mesh:
    """Named axes over the ranks and their lengths."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of ranks."""
        size = 1
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class Limits:
    """Fixed sizes the library was built for, in tokens, rows or pages."""

    max_seq_len: int
    max_batch_size: int
    prefill_chunk_size: int
    page_size: int
    num_pages: int


@dataclass(frozen=True)
class TensorSpec:
    """A state tensor or a function argument, local to one rank.

    A dimension `"n"` is known at call time only. dtype `"object"` is an opaque VM value.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class WeightSpec:
    """A tensor of a shard file: local shape, and the placement it was cut by, for display."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    placement: str


@dataclass(frozen=True)
class Kernel:
    """A kernel of a decode function: calls and bytes of weights in a step; whether it reads pages.

    One kernel here may be several launches on a GPU, whose names begin with its own.
    """

    calls: int
    weight_bytes: int
    cache: bool


@dataclass(frozen=True)
class Function:
    """A function of `model.so`; `args` in call order. `kernels` are told of decode functions."""

    args: tuple[TensorSpec, ...]
    kernels: dict[str, Kernel] = field(default_factory=dict)


@dataclass(frozen=True)
class FileEntry:
    """Checksum (lower-case hexadecimal) and length of a file of the artefact.

    `crc32` are the checksums of its pieces of `PIECE_BYTES`, of shards only: loading checks the
    pieces as they pass, in several threads, where SHA-256 of the whole would be slower than the
    link to a GPU. Empty in artefacts of earlier versions.
    """

    sha256: str
    bytes: int
    crc32: tuple[int, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """Contents of `manifest.json`, field for field."""

    version: str
    name: str
    model: Model
    target: Target
    mesh: Mesh
    quantization: str
    dtype: str
    limits: Limits
    use_cuda_graph: bool
    decode_buckets: tuple[int, ...]
    workspace_bytes: int
    state: tuple[TensorSpec, ...]
    functions: dict[str, Function]
    weights: tuple[WeightSpec, ...]
    has_weights: bool
    dummy_weights: bool
    files: dict[str, FileEntry]
    libraries: tuple[str, ...] = ()
    """Vendor libraries that the program calls besides the collectives: `CUBLAS`, or none."""
    disable_pass: tuple[str, ...] = ()
    """Fusions that the build left out."""
    expert_parallel: bool = False
    """Whether a rank has whole experts and not parts of each."""
    tokens_to_host: bool = False
    """Whether the sampler writes tokens to the host's memory, see `outbox`."""
    schema: int = SCHEMA


def shard_name(rank: int, world: int) -> str:
    """Path of a rank's weights inside the artefact."""
    return f"shards/rank-{rank:05d}-of-{world:05d}.safetensors"


def load_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read and check `manifest.json` of an artefact.

    Raises ArtifactError if there is no such directory, no manifest, a manifest of a newer schema,
    or one that is damaged. Files are not checked here; see `verify_file`.
    """
    root = Path(directory)
    if not root.is_dir():
        raise ArtifactError(
            f"{root}: no such directory; `shardwright build -o {root} ...` makes a model"
        )
    path = root / MANIFEST
    if not path.is_file():
        raise ArtifactError(
            f"{root}: no {MANIFEST}, so this is no model or its build did not finish; "
            f"run `shardwright build -o {root} ...` again"
        )
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise ArtifactError(f"{path}: damaged, not JSON ({error}); build the model again") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise ArtifactError(f"{path}: no Shardwright manifest, field `schema` is missing")
    if schema > SCHEMA:
        raise ArtifactError(
            f"{path}: schema {schema} was written by a newer Shardwright, this one reads up to "
            f"{SCHEMA}; update Shardwright or build the model again"
        )
    if schema < 1:
        raise ArtifactError(f"{path}: schema {schema} does not exist; build the model again")
    try:
        return _decode(Manifest, data, "")
    except _MalformedError as error:
        raise ArtifactError(f"{path}: damaged, {error}; build the model again") from None


def write_manifest(directory: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write `manifest.json` so that it appears complete or not at all, even after a power cut.

    Raises ArtifactError if the directory cannot be written.
    """
    root = Path(directory)
    text = json.dumps(asdict(manifest), indent=1) + "\n"
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{MANIFEST}.", dir=root)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, root / MANIFEST)
        temporary = None
        _sync_directory(root)
    except OSError as error:
        raise ArtifactError(f"{root / MANIFEST}: cannot be written ({error.strerror})") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file's contents."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def file_entry(path: str | os.PathLike[str]) -> FileEntry:
    """The manifest's entry for a file that is complete on disk."""
    return FileEntry(sha256_file(path), os.stat(path).st_size)


def verify_file(directory: str | os.PathLike[str], name: str, entry: FileEntry) -> None:
    """Check that file `name` of the artefact is the one that was built: length, then contents.

    Raises ArtifactError if it is missing, truncated or altered.
    """
    path = Path(directory) / name
    check_size(path, entry)
    try:
        if sha256_file(path) != entry.sha256:
            raise ArtifactError(f"{path}: altered, its checksum is not the manifest's; {_MEND}")
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); {_MEND}") from None


def check_size(path: Path, entry: FileEntry) -> None:
    """Raise ArtifactError unless the file is there and has the manifest's length."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing; {_MEND}") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); {_MEND}") from None
    if size != entry.bytes:
        what = "truncated" if size < entry.bytes else "altered"
        raise ArtifactError(f"{path}: {what}, {size} bytes instead of {entry.bytes}; {_MEND}")


class _MalformedError(Exception):
    """A field of the manifest is missing or of the wrong type."""


def _decode(kind: type[T], data: Any, where: str) -> T:
    """Build dataclass `kind` from parsed JSON. Unknown fields are ignored.

    A newer writer of the same schema may add fields that an older reader can do without.
    """
    if not isinstance(data, Mapping):
        raise _MalformedError(f"`{where}` is no object")
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for entry in fields(kind):  # type: ignore[arg-type]
        path = f"{where}.{entry.name}" if where else entry.name
        if entry.name not in data:
            if (
                entry.default is not MISSING or entry.default_factory is not MISSING
            ):  # a field that earlier versions did not have
                continue
            raise _MalformedError(f"field `{path}` is missing")
        values[entry.name] = _convert(hints[entry.name], data[entry.name], path)
    return kind(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as type `hint`: a dataclass, scalar, union, homogeneous tuple or dict."""
    origin = get_origin(hint)
    if hint is Any:
        return value
    if is_dataclass(hint) and isinstance(hint, type):
        return _decode(hint, value, where)
    if origin is tuple and isinstance(value, list):
        item = get_args(hint)[0]
        return tuple(_convert(item, entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if origin is dict and isinstance(value, dict):
        item = get_args(hint)[1]
        return {key: _convert(item, entry, f"{where}.{key}") for key, entry in value.items()}
    allowed = get_args(hint) if origin in (Union, types.UnionType) else (hint,)
    # type() and not isinstance: true is no number.
    if type(value) in allowed:
        return value
    raise _MalformedError(f"field `{where}` has the wrong type")
