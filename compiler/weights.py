"""Weights: from a checkpoint's tensors to each rank's file, cut by the partitioner's placements."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shardwright.compiler.checkpoint import Checkpoint, listing
from shardwright.compiler.placement import Partial, Placement, local_shape
from shardwright.compiler.quantization import quantize_q4
from shardwright.compiler.shard_writer import ShardWriter
from shardwright.compiler.slicing import Read, reads
from shardwright.errors import BuildError, CheckpointError, ShardingError
from shardwright.runtime.artifact import FileEntry, shard_name

Array: TypeAlias = npt.NDArray[Any]

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the elements done and the elements there are."""

_THREADS = 2


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint: its name there, its global shape, and how the ranks share it.

    `plus` is added to its values. It is part of the tensor `joined`, from row `first` on, where the
    checkpoint has it joined with others.
    """

    name: str
    shape: tuple[int, ...]
    placement: Placement
    plus: float = 0.0
    joined: str | None = None
    first: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.placement, Partial):
            raise ShardingError(f"{self.name}: a weight cannot be {self.placement}")

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of one rank's slice."""
        return local_shape(self.shape, self.placement)


@dataclass(frozen=True)
class Weight:
    """A weight of the program: the local slices of its sources, joined along dimension 0.

    With `group` None it is one tensor of type `dtype`. Else it is quantized to four bits with a
    scale of type `dtype` for each `group` elements of a row, see `quantization.quantize_q4`.
    Raises ShardingError if the slices cannot be joined, or are no matrices and to be quantized.
    """

    name: str
    sources: tuple[Source, ...]
    dtype: str
    group: int | None = None

    def __post_init__(self) -> None:
        tails = {source.local_shape[1:] for source in self.sources}
        if len(tails) != 1:
            shapes = ", ".join(f"{s.name} {s.local_shape}" for s in self.sources)
            raise ShardingError(f"{self.name}: cannot join slices along dimension 0: {shapes}")
        if self.group is not None and len(self.local_shape) != 2:
            raise ShardingError(f"{self.name}: only matrices are quantized, not {self.local_shape}")

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape on one rank, before quantization."""
        rows = sum(source.local_shape[0] for source in self.sources)
        return (rows, *self.sources[0].local_shape[1:])

    @property
    def padded_cols(self) -> int:
        """Columns of a quantized weight on one rank, padded to whole groups and words."""
        assert self.group is not None
        multiple = math.lcm(8, self.group)
        return -(-self.local_shape[1] // multiple) * multiple

    def tensors(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Name, local shape and dtype of the tensors that hold this weight in a rank's file.

        One, or `NAME.q4` uint32 `[rows, padded_cols / 8]` and `NAME.scale` `[rows, padded_cols /
        group]`.
        """
        if self.group is None:
            return [(self.name, self.local_shape, self.dtype)]
        rows, cols = self.local_shape[0], self.padded_cols
        return [
            (f"{self.name}.q4", (rows, cols // 8), "uint32"),
            (f"{self.name}.scale", (rows, cols // self.group), self.dtype),
        ]


def ignore_buffers(name: str) -> bool:
    """Whether checkpoint tensor `name` is a constant that old exports saved among the weights."""
    return name.endswith(("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias"))


def check_names(
    checkpoint: Checkpoint,
    weights: Sequence[Weight],
    ignored: Callable[[str], bool] = ignore_buffers,
) -> None:
    """Compare the checkpoint's tensors with the sources of `weights`.

    Raises CheckpointError, which lists them, for sources that are missing, for tensors that no
    weight uses and `ignored` does not excuse, and for shapes that differ.
    """
    sources = {source.name: source for weight in weights for source in weight.sources}
    problems = []
    if missing := [name for name in sources if name not in checkpoint.tensors]:
        problems.append(f"missing {listing(missing)}")
    extra = [name for name in checkpoint.tensors if name not in sources and not ignored(name)]
    if extra:
        problems.append(f"not in the model: {listing(extra)}")
    if problems:
        raise CheckpointError(
            f"{checkpoint.root}: tensors do not fit config.json: {'; '.join(problems)}"
        )
    wrong = [
        f"{name} is {checkpoint.tensors[name].shape}, config.json says {source.shape}"
        for name, source in sources.items()
        if checkpoint.tensors[name].shape != source.shape
    ]
    if wrong:
        raise CheckpointError(f"{checkpoint.root}: wrong shapes: {listing(wrong)}")


def split_joined(checkpoint: Checkpoint, weights: Sequence[Weight]) -> None:
    """Let `checkpoint` have the sources that are part of a tensor as tensors of their own.

    Raises CheckpointError if such a tensor is missing or its parts do not make up its shape.
    """
    parts: dict[str, list[Source]] = {}
    for source in (s for weight in weights for s in weight.sources if s.joined):
        parts.setdefault(str(source.joined), []).append(source)
    for name, sources in parts.items():
        whole = checkpoint.tensors.pop(name, None)
        if whole is None:
            continue  # perhaps someone took it apart; else the parts are found missing
        rows = sum(source.shape[0] for source in sources)
        expected = (rows, *sources[0].shape[1:])
        if whole.shape != expected:
            raise CheckpointError(
                f"{checkpoint.root}: wrong shapes: {name} is {whole.shape}, config.json says "
                f"{expected}"
            )
        row = whole.nbytes // rows
        for source in sources:
            offset = whole.offset + source.first * row
            checkpoint.tensors[source.name] = replace(whole, offset=offset, shape=source.shape)


def write_shards(
    checkpoint: Checkpoint,
    weights: Sequence[Weight],
    world: int,
    out_dir: Path,
    progress: Progress | None = None,
    ignored: Callable[[str], bool] = ignore_buffers,
) -> dict[str, FileEntry]:
    """Write every rank's weights under `out_dir` in one pass over the checkpoint.

    Sources are read in pieces of rows, and each piece is sliced, cast or quantized, and appended to
    the files of the ranks that hold it, so that memory does not grow with the checkpoint. Returns
    the manifest's entry of each file. Raises CheckpointError as `check_names` does, and for values
    that are NaN, infinite or beyond the range of the dtype; BuildError if a file cannot be written.
    """
    split_joined(checkpoint, weights)
    check_names(checkpoint, weights, ignored)
    paths = [shard_name(rank, world) for rank in range(world)]
    try:
        (out_dir / paths[0]).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"{out_dir}: cannot be written ({error.strerror})") from None
    tensors = [tensor for weight in weights for tensor in weight.tensors()]
    total = sum(math.prod(s.local_shape) for w in weights for s in w.sources) * world
    done = 0
    with ExitStack() as stack:
        writers = [stack.enter_context(ShardWriter(out_dir / path, tensors)) for path in paths]
        pool = stack.enter_context(ThreadPoolExecutor(_THREADS))
        for weight in weights:
            scales: list[list[Array]] = [[] for _ in writers]
            for piece in _converted(pool, checkpoint, weight, world):
                for rank in piece.ranks:
                    writers[rank].write(weight.tensors()[0][0], piece.data)
                    if piece.scale is not None:
                        scales[rank].append(piece.scale)
                    done += piece.elements
                if progress is not None:
                    progress(done, total)
            if weight.group is not None:
                # An eighth of the words' bytes, kept because the file has them after all words.
                for writer, parts in zip(writers, scales, strict=True):
                    for part in parts:
                        writer.write(weight.tensors()[1][0], part)
        return {path: writer.finish() for path, writer in zip(paths, writers, strict=True)}


@dataclass(frozen=True)
class _Piece:
    """Rows of a weight as stored, the same for all of `ranks`; `elements` before quantization."""

    ranks: tuple[int, ...]
    data: Array
    scale: Array | None
    elements: int


def _converted(
    pool: ThreadPoolExecutor, checkpoint: Checkpoint, weight: Weight, world: int
) -> Iterator[_Piece]:
    """The pieces of a weight, in order for each rank, converted a few ahead on `pool`."""
    waiting: deque[Future[list[_Piece]]] = deque()
    for source in weight.sources:
        for read in reads(checkpoint, source.name, source.placement, world):
            waiting.append(pool.submit(_convert, weight, source, read))
            if len(waiting) > _THREADS:
                yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


def _convert(weight: Weight, source: Source, read: Read) -> list[_Piece]:
    pieces, name = [], source.name
    for ranks, values in read():
        if source.plus:
            values = _as_float(values) + np.float32(source.plus)
        if weight.group is None:
            data, scale = cast(values, weight.dtype, name), None
        else:
            pad = weight.padded_cols - values.shape[1]
            padded = np.pad(_as_float(values), ((0, 0), (0, pad))) if pad else _as_float(values)
            data, scale = quantize_q4(padded, weight.group, name)
        pieces.append(_Piece(ranks, data, scale, values.size))
    return pieces


def _as_float(values: Array) -> npt.NDArray[np.floating[Any]]:
    """bfloat16 as float32, by its bits, many times faster than a cast; others as they are."""
    if values.dtype in (np.float16, np.float32):
        return values
    bits = values.view(np.uint16).astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def cast(values: Array, dtype: str, name: str) -> Array:
    """`values` as `dtype`. Raises CheckpointError, naming `name`, for NaN, infinity or overflow."""
    floats = _as_float(values)
    with np.errstate(over="ignore"):
        out = np.ascontiguousarray(floats, dtype=dtype)
    if np.isfinite(out).all():
        return out
    if not np.isfinite(floats).all():
        raise CheckpointError(f"{name}: holds NaN or infinity; the checkpoint is damaged")
    raise CheckpointError(
        f"{name}: value {np.abs(floats).max():g} is beyond the range of {dtype}; "
        "build with --quantization q0f32"
    )
