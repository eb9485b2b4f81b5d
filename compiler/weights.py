"""Weights: from a checkpoint's tensors to each rank's file, cut by the partitioner's placements."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shardwright.compiler import conversion
from shardwright.compiler.checkpoint import Checkpoint, listing
from shardwright.compiler.columns import Columns, Index, Quantized, plan
from shardwright.compiler.packing import Packing, pack
from shardwright.compiler.placement import Partial, Placement, local_shape
from shardwright.compiler.quantization import quantize
from shardwright.compiler.shard_writer import ShardWriter
from shardwright.compiler.slicing import Plain, Read, Reader, Rows, Stacked, reads
from shardwright.errors import BuildError, CheckpointError, ShardingError
from shardwright.runtime.artifact import FileEntry, shard_name

Array: TypeAlias = npt.NDArray[Any]

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the elements done and the elements there are."""

_THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Source:
    """A weight of the checkpoint: its name there, its global shape, and how the ranks share it.

    With `quantized` it is to be quantized, or is so already. `plus` is added to its values. It is
    part of the tensor `joined`, from row `first` on, where the checkpoint has it joined with
    others, each or every `step`th row; or it is all tensors that `joined` names with 0, 1 and so on
    in the place of `{}`. With `experts`, their number, `joined` is [experts, in, out], or [experts,
    out] for one column, unless it is quantized. `rows` and `order` permute its rows and its columns
    before the cut.
    """

    name: str
    shape: tuple[int, ...]
    placement: Placement
    quantized: Quantized | None = field(default=None, compare=False)
    plus: float = 0.0
    joined: str | None = None
    first: int = 0
    step: int = 1
    experts: int = 0
    rows: Index | None = field(default=None, compare=False)
    order: Index | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.placement, Partial):
            raise ShardingError(f"{self.name}: a weight cannot be {self.placement}")
        if self.quantized is not None and len(self.shape) != 2:
            raise ShardingError(f"{self.name}: only matrices are quantized, not {self.shape}")

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of one rank's slice, before quantization."""
        return local_shape(self.shape, self.placement)

    @cached_property
    def columns(self) -> Columns | None:
        """Where the columns go, if it is quantized."""
        if self.quantized is None:
            return None
        return plan(self.quantized, self.shape[1], self.order, self.placement)


@dataclass(frozen=True)
class Weight:
    """A weight of the program: the local slices of its sources, joined along dimension 0.

    Its sources are plain, and it is one tensor of type `dtype`; or they are quantized in one
    format. Raises ShardingError if the slices cannot be joined.
    """

    name: str
    sources: tuple[Source, ...]
    dtype: str

    def __post_init__(self) -> None:
        tails = {source.local_shape[1:] for source in self.sources}
        if len(tails) != 1:
            shapes = ", ".join(f"{s.name} {s.local_shape}" for s in self.sources)
            raise ShardingError(f"{self.name}: cannot join slices along dimension 0: {shapes}")
        if len({s.columns and s.columns.key for s in self.sources}) != 1:
            names = ", ".join(s.name for s in self.sources)
            raise ShardingError(f"{self.name}: cannot join weights of different formats: {names}")

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape on one rank, before quantization."""
        rows = sum(source.local_shape[0] for source in self.sources)
        return (rows, *self.sources[0].local_shape[1:])

    @property
    def columns(self) -> Columns | None:
        """Where the columns of its sources go, if they are quantized."""
        return self.sources[0].columns

    def tensors(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Name, local shape and dtype of the tensors that hold this weight in a rank's file.

        One, or the words `NAME.q4` (or another `Packing.suffix`), `NAME.scale` and, as the format
        has them, `NAME.zero` and `NAME.columns` int32, the activations that the columns multiply.
        """
        if self.columns is None:
            return [(self.name, self.local_shape, self.dtype)]
        packing, rows, cols = self.columns.packing, self.local_shape[0], self.columns.size
        side = ((rows, cols // packing.group), packing.scale_dtype)
        found: list[tuple[str, tuple[int, ...], str]] = [
            (f"{self.name}.{packing.suffix}", (rows, cols // packing.per_word), "uint32"),
            (f"{self.name}.scale", *side),
        ]
        if packing.zeros:
            found.append((f"{self.name}.zero", *side))
        if self.columns.moved is not None:
            found.append((f"{self.name}.columns", (cols,), "int32"))
        return found


def ignore_buffers(name: str) -> bool:
    """Whether checkpoint tensor `name` is a constant that old exports saved among the weights."""
    return name.endswith(("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias"))


def check_names(
    readers: Mapping[str, Reader],
    weights: Sequence[Weight],
    root: Path,
    ignored: Callable[[str], bool] = ignore_buffers,
) -> None:
    """Compare the checkpoint's weights (see `readers_of`) with the sources of `weights`.

    Raises CheckpointError, which lists them, for sources that are missing, for tensors that no
    weight uses and `ignored` does not excuse, and for shapes that differ.
    """
    sources = {source.name: source for weight in weights for source in weight.sources}
    problems = []
    if missing := [name for name in sources if name not in readers]:
        problems.append(f"missing {listing(missing)}")
    extra = [name for name in readers if name not in sources and not ignored(name)]
    if extra:
        problems.append(f"not in the model: {listing(extra)}")
    if problems:
        raise CheckpointError(f"{root}: tensors do not fit config.json: {'; '.join(problems)}")
    wrong = [
        f"{name} is {readers[name].shape}, config.json says {source.shape}"
        for name, source in sources.items()
        if readers[name].shape != source.shape
    ]
    if wrong:
        raise CheckpointError(f"{root}: wrong shapes: {listing(wrong)}")


def plain_readers(checkpoint: Checkpoint) -> dict[str, Reader]:
    """A reader of each tensor of a checkpoint that is not quantized."""
    return {name: Plain(checkpoint, name) for name in checkpoint.tensors}


def stored_shapes(names: Iterable[str], weights: Sequence[Weight]) -> dict[str, tuple[int, ...]]:
    """Shapes of the checkpoint's weights by name, as the model's `weights` ask for them."""
    shapes: dict[str, tuple[int, ...]] = {}
    joint: dict[str, int] = {}  # rows of each joined tensor
    modules = {name.rpartition(".")[0] for name in names}
    for source in (s for weight in weights for s in weight.sources):
        shapes[source.name] = source.shape
        joined = str(source.joined or "")
        if "{}" in joined:
            module = joined.rpartition(".")[0]
            count = 0
            while module.format(count) in modules:
                count += 1
            for i in range(count):
                shapes[joined.format(i)] = (source.shape[0] // count, *source.shape[1:])
        elif joined:
            joint[joined] = joint.get(joined, 0) + source.shape[0]
            shapes[joined] = (joint[joined], *source.shape[1:])
    return shapes


def split_joined(readers: dict[str, Reader], weights: Sequence[Weight], root: Path) -> None:
    """Let `readers` have the sources that are part of a tensor as weights of their own.

    Raises CheckpointError if the parts of such a tensor do not make up its shape.
    """
    parts: dict[str, list[Source]] = {}
    for source in (s for weight in weights for s in weight.sources if s.joined):
        parts.setdefault(str(source.joined), []).append(source)
    for name, sources in parts.items():
        if "{}" in name:
            _stack(readers, sources[0], root)
            continue
        whole = readers.pop(name, None)
        if whole is None:
            continue  # perhaps someone took it apart; else the parts are found missing
        expected = (sum(source.shape[0] for source in sources), *sources[0].shape[1:])
        experts = sources[0].experts if isinstance(whole, Plain) else 0
        if experts:
            inner = expected[1:] if expected[1] > 1 else ()
            expected = (experts, *inner, expected[0] // experts)
        if whole.shape != expected:
            raise CheckpointError(
                f"{root}: wrong shapes: {name} is {whole.shape}, config.json says {expected}"
            )
        if experts and isinstance(whole, Plain):
            whole = whole.transposed_experts()
        for source in sources:
            readers[source.name] = Rows(whole, source.first, source.shape[0], source.step)


def _stack(readers: dict[str, Reader], source: Source, root: Path) -> None:
    """Let `readers` have `source`, whose rows are those of one tensor after the other."""
    names: list[str] = []
    while str(source.joined).format(len(names)) in readers:
        names.append(str(source.joined).format(len(names)))
    stacked = [readers.pop(name) for name in names]
    if stacked:
        readers[source.name] = Stacked(stacked)
        for name, reader in zip(names, stacked, strict=True):
            if reader.shape != stacked[0].shape:
                raise CheckpointError(
                    f"{root}: wrong shapes: {name} is {reader.shape}, {names[0]} is "
                    f"{stacked[0].shape}"
                )


def write_shards(
    checkpoint: Checkpoint,
    weights: Sequence[Weight],
    world: int,
    out_dir: Path,
    progress: Progress | None = None,
    ignored: Callable[[str], bool] = ignore_buffers,
    readers: Mapping[str, Reader] | None = None,
) -> dict[str, FileEntry]:
    """Write every rank's weights under `out_dir` in one pass over the checkpoint.

    Sources are read in pieces of rows, and each piece is sliced, cast or quantized, and appended to
    the files of the ranks that hold it, so that memory does not grow with the checkpoint. `readers`
    are those of a quantized checkpoint. Returns the manifest's entry of each file. Raises
    CheckpointError as `check_names` does, and for values that are NaN, infinite or beyond the range
    of the dtype; BuildError if a file cannot be written.
    """
    readers = dict(plain_readers(checkpoint) if readers is None else readers)
    split_joined(readers, weights, checkpoint.root)
    check_names(readers, weights, checkpoint.root, ignored)
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
        for weight, pieces in groupby(_converted(pool, readers, weights, world), itemgetter(0)):
            names = [name for name, _, _ in weight.tensors()]
            # A fraction of the words' bytes, kept because the file has them after all words.
            later: list[list[tuple[Array, ...]]] = [[] for _ in writers]
            for _, piece in pieces:
                for rank in piece.ranks:
                    writers[rank].write(names[0], piece.parts[0])
                    later[rank].append(piece.parts[1:])
                    done += piece.elements
                if progress is not None:
                    progress(done, total)
            for rank, writer in enumerate(writers):
                for name, parts in zip(names[1:], zip(*later[rank], strict=True), strict=False):
                    for part in parts:
                        writer.write(name, part)
                if weight.columns is not None and weight.columns.moved is not None:
                    moved = weight.columns.moved
                    writer.write(names[-1], moved[min(rank, len(moved) - 1)].astype(np.int32))
        return {path: writer.finish() for path, writer in zip(paths, writers, strict=True)}


@dataclass(frozen=True)
class _Piece:
    """Rows of each tensor of a weight, the same for all of `ranks`; `elements` of the weight."""

    ranks: tuple[int, ...]
    parts: tuple[Array, ...]
    elements: int


def _converted(
    pool: ThreadPoolExecutor,
    readers: Mapping[str, Reader],
    weights: Iterable[Weight],
    world: int,
) -> Iterator[tuple[Weight, _Piece]]:
    """The pieces of all weights, in order for each rank, converted a few ahead on `pool`."""
    waiting: deque[tuple[Weight, Future[list[_Piece]]]] = deque()

    def first() -> Iterator[tuple[Weight, _Piece]]:
        weight, pieces = waiting.popleft()
        for piece in pieces.result():
            yield weight, piece
        if not waiting or waiting[0][0] is not weight:
            for source in weight.sources:
                readers[source.name].release()

    for weight in weights:
        for source in weight.sources:
            reader = readers[source.name]
            if source.quantized is not None and not reader.quantized:
                reader = _Quantizing(reader, source.quantized.packing, source.name)
            for read in reads(reader, source.placement, world, source.rows, source.columns):
                waiting.append((weight, pool.submit(_convert, weight, source, read)))
                if len(waiting) > _THREADS:
                    yield from first()
    while waiting:
        yield from first()


def _convert(weight: Weight, source: Source, read: Read) -> list[_Piece]:
    pieces = []
    for ranks, parts in read():
        if source.columns is None:
            values = _as_float(parts[0]) + np.float32(source.plus) if source.plus else parts[0]
            kept: tuple[Array, ...] = (cast(values, weight.dtype, source.name),)
        else:
            packing = source.columns.packing
            sides = (_exactly(p, packing.scale_dtype, source.name) for p in parts[1:])
            kept = pack(parts[0], packing.bits), *sides
        pieces.append(_Piece(ranks, kept, len(parts[0]) * math.prod(source.local_shape[1:])))
    return pieces


class _Quantizing:
    """A plain weight, quantized as it is read."""

    quantized = True

    def __init__(self, plain: Reader, packing: Packing, name: str) -> None:
        self.shape, self._plain = plain.shape, plain
        self._packing, self._name = packing, name

    def read(self, index: Index) -> tuple[Array, ...]:
        """See `Reader`."""
        return quantize(self._plain.read(index)[0], self._packing, self._name)

    def release(self) -> None:
        """See `Reader`."""


def _exactly(values: Array, dtype: str, name: str) -> Array:
    """Scales or zero points as `dtype`, which must not change them.

    Raises CheckpointError, naming `name`, for NaN, infinity or a value that `dtype` cannot hold.
    """
    if values.dtype == np.uint8 == np.dtype(dtype):
        return values  # exponents
    out = cast(values, dtype, name)
    if values.dtype != out.dtype and (out.astype(np.float32) != _as_float(values)).any():
        raise CheckpointError(
            f"{name}: a scale of it is no {dtype} number, and would be rounded; "
            "build with --quantization checkpoint-f32"
        )
    return out


def _as_float(values: Array) -> npt.NDArray[np.floating[Any]]:
    """bfloat16 as float32, by its bits, many times faster than a cast; others as they are."""
    if values.dtype in (np.float16, np.float32):
        return values
    bits = values.view(np.uint16).astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def cast(values: Array, dtype: str, name: str) -> Array:
    """`values` as `dtype`. Raises CheckpointError, naming `name`, for NaN, infinity or overflow."""
    out, largest = conversion.cast(values, dtype)
    if np.isfinite(largest):
        return out
    floats = _as_float(values)
    if not np.isfinite(floats).all():
        raise CheckpointError(f"{name}: holds NaN or infinity; the checkpoint is damaged")
    raise CheckpointError(
        f"{name}: value {np.abs(floats).max():g} is beyond the range of {dtype}; "
        "build with --quantization q0f32"
    )
