"""Hugging Face checkpoints: configuration, tokenizer files and safetensors, read piece by piece.

Tensors are read with `pread` and not mapped: the pages of a mapped file count as memory of the
process, so a build would seem to, and in a container would, grow with the checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from shardwright.compiler.hub import download
from shardwright.errors import CheckpointError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Files of a checkpoint that an artefact keeps beside the weights, where they exist."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # the format's own limit

_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_RAW: dict[str, npt.DTypeLike] = {
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I8": np.dtype("i1"), "U8": np.dtype("u1"),
    "U32": np.dtype("<u4"), "F8_E4M3": np.dtype("u1"),
}  # fmt: skip
_READABLE: dict[str, npt.DTypeLike] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `offset` in bytes from the start of `file`; `dtype` as safetensors'."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Length in the file."""
        return math.prod(self.shape) * _BYTES[self.dtype]


class Checkpoint:
    """An opened checkpoint. `tensors` maps names to places; `config` is config.json as it is.

    Use as a context manager, or call `close`. Reading is safe from several threads.
    """

    def __init__(
        self, root: Path, config: dict[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> None:
        self.root = root
        self.config = config
        self.tensors = dict(tensors)
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, model: str | os.PathLike[str], weights: bool = True) -> Checkpoint:
        """Open a local directory, or download a Hugging Face hub id, `ORG/NAME[@REVISION]`.

        With `weights` False only config.json and the tokenizer are fetched and needed, and
        `tensors` is empty. Raises CheckpointError if there is no such model, it holds no
        safetensors, or a file is missing or damaged.
        """
        root = Path(model).expanduser()
        if not root.is_dir():
            if root.exists():
                raise CheckpointError(f"{model}: is a file; pass the checkpoint's directory")
            root = download(str(model), weights)
        path = root / "config.json"
        if not path.is_file() and (root / "mlc-chat-config.json").is_file():
            from shardwright.compiler.format_mlc import open_mlc

            return open_mlc(root, weights)
        if not path.is_file():
            raise CheckpointError(f"{root}: no config.json, so this is no Hugging Face checkpoint")
        config = read_json(path)
        return cls(root, config, _find_tensors(root) if weights else {})

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer and generation files that exist; empty if there are none."""
        return [self.root / name for name in TOKENIZER_FILES if (self.root / name).is_file()]

    def read(self, name: str) -> npt.NDArray[Any]:
        """The whole tensor, as float16, float32 or ml_dtypes.bfloat16."""
        info = self._readable(name)
        rows = info.shape[0] if info.shape else 1
        return self.read_rows(name, 0, rows).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows `start` to `stop` along dimension 0, whose other dimensions are whole.

        Raises CheckpointError for a dtype that is no plain float, or if the file ends too early.
        """
        return self._rows(self._readable(name), _READABLE, start, stop)

    def read_raw(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """As `read_rows`, of integers and e4m3 codes (as uint8) too; all rows if `stop` is None."""
        info = self.tensors[name]
        if stop is None:
            rows = info.shape[0] if info.shape else 1
            return self._rows(info, _RAW | _READABLE, 0, rows).reshape(info.shape)
        return self._rows(info, _RAW | _READABLE, start, stop)

    def read_bytes(self, name: str, start: int, stop: int, width: int) -> npt.NDArray[np.uint8]:
        """Rows `start` to `stop` of a tensor of bytes, seen as a matrix of `width` columns."""
        info = self.tensors[name]
        matrix = replace(info, shape=(math.prod(info.shape) // width, width))
        return self._rows(matrix, {"U8": np.dtype("u1")}, start, stop)

    def _rows(
        self, info: TensorInfo, dtypes: dict[str, npt.DTypeLike], start: int, stop: int
    ) -> npt.NDArray[Any]:
        out = np.empty((stop - start, *info.shape[1:]), dtypes[info.dtype])
        if out.size:
            row = out.nbytes // (stop - start)
            buffer = out.reshape(-1).view(np.uint8).data
            self._pread(info.file, buffer, info.offset + start * row)
        return out

    def _readable(self, name: str) -> TensorInfo:
        info = self.tensors[name]
        if info.dtype not in _READABLE:
            raise CheckpointError(
                f"{info.file}: {name} has dtype {info.dtype}; only {', '.join(_READABLE)} are "
                "supported here. Use the checkpoint before its quantization."
            )
        return info

    def _pread(self, path: Path, buffer: memoryview, offset: int) -> None:
        try:
            with self._lock:
                if path not in self._files:
                    self._files[path] = os.open(path, os.O_RDONLY)
            while len(buffer):
                count = os.preadv(self._files[path], [buffer], offset)
                if not count:
                    raise CheckpointError(f"{path}: truncated while it was read; fetch it again")
                buffer, offset = buffer[count:], offset + count
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None

    def close(self) -> None:
        """Close all files. Reading again opens them anew."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError if there is none."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); fetch it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return data


def _find_tensors(root: Path) -> dict[str, TensorInfo]:
    """All tensors, of `model.safetensors`, the shards that the index names, or the only file."""
    if (root / _SINGLE).is_file():
        return read_header(root / _SINGLE)
    if not (root / _INDEX).is_file():
        only = list(root.glob("*.safetensors"))
        if len(only) == 1:
            return read_header(only[0])
        raise CheckpointError(f"{root}: {_why_no_weights(root)}")
    index = read_json(root / _INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(f, str) for f in index.values()):
        raise CheckpointError(f"{root / _INDEX}: has no weight_map; fetch it again")
    files = sorted(set(index.values()))
    if absent := [name for name in files if not (root / name).is_file()]:
        raise CheckpointError(f"{root}: missing {listing(absent)}; fetch the rest of the model")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(root / file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{root}: {name} is both in {tensors[name].file.name} and in {file}; "
                    "remove the shards of another save"
                )
            tensors[name] = info
    if absent := [f"{name} ({index[name]})" for name in index if name not in tensors]:
        raise CheckpointError(f"{root}: in the index but not in its shard: {listing(absent)}")
    return tensors


def _why_no_weights(root: Path) -> str:
    if any(root.glob("*.bin")) or any(root.glob("*.pth")) or any(root.glob("*.pt")):
        return (
            "holds PyTorch .bin files only, which run code when they are read; convert them: "
            "`model.save_pretrained(DIR)` of transformers writes safetensors"
        )
    return f"no weights, expected {_SINGLE} or {_INDEX}; `--build-model-only` needs none"


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, checked against its length.

    Raises CheckpointError, naming the file, if its header is damaged or data is missing. Format:
    https://huggingface.co/docs/safetensors: u64 length, JSON, data.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{path}: truncated or no safetensors file; its header would take {length} "
                    f"bytes of {size}. Fetch it again."
                )
            header = json.loads(file.read(length), object_pairs_hook=_unique)
        tensors = {
            name: _tensor_info(path, 8 + length, entry)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged safetensors header ({error!r})") from None
    end = max((info.offset + info.nbytes for info in tensors.values()), default=8 + length)
    if end > size:
        raise CheckpointError(f"{path}: truncated, {size} bytes instead of {end}; fetch it again")
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError if it names anything twice, of which JSON would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)} is there twice")
    return found


def _tensor_info(path: Path, base: int, entry: dict[str, Any]) -> TensorInfo:
    """One entry of the header; raises KeyError, TypeError or ValueError if it is malformed."""
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(isinstance(n, int) and n >= 0 for n in (begin, end, *shape)):
        raise ValueError("shape and data_offsets must be numbers")
    info = TensorInfo(path, base + begin, shape, entry["dtype"])
    if info.nbytes != end - begin:
        raise ValueError(f"{end - begin} bytes for shape {shape} of {info.dtype}")
    return info


def listing(names: list[str], limit: int = 20) -> str:
    """The first names, and how many more there are, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
