"""An artefact for another number of ranks, made from an artefact and without its checkpoint.

The shards hold every weight, cut by the placements of the old number of ranks. A `Reader` puts the
pieces of each weight together again, codes and scales as they are, and the ordinary way of writing
shards cuts them anew; so the result has the bytes of a build from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shardwright.compiler import kept
from shardwright.compiler.build import (
    BuildResult,
    Progress,
    build_from,
    weight_specs,
)
from shardwright.compiler.checkpoint import Checkpoint, read_header
from shardwright.compiler.options import BuildOptions
from shardwright.compiler.packing import unpack
from shardwright.compiler.placement import PAD, Shard
from shardwright.compiler.program import partition_program
from shardwright.compiler.quantization import QUANTIZATIONS, quantization
from shardwright.compiler.scheme import OWN, Scheme, model_config, scheme_of
from shardwright.compiler.slicing import Index, Parts, Reader
from shardwright.compiler.trace import Limits
from shardwright.compiler.weights import Source, Weight
from shardwright.errors import UsageError
from shardwright.model_defs import family_of
from shardwright.runtime.artifact import (
    Manifest,
    check_size,
    load_manifest,
    shard_name,
)

Array = npt.NDArray[Any]

_DTYPES = {"F32": "<f4", "F16": "<f2", "U32": "<u4", "I32": "<i4", "U8": "u1"}


def reshard(
    directory: Path, out: Path, num_shards: int, progress: Progress | None = None
) -> BuildResult:
    """Write to `out` the artefact in `directory`, compiled and cut for `num_shards` ranks.

    All other options are the old build's. Raises UsageError if `out` is `directory` or the artefact
    cannot be taken apart, ArtifactError if it is unfinished or damaged, and what a build raises.
    """
    if out.resolve() == directory.resolve():
        raise UsageError(f"{out} is the artefact itself; give -o another directory")
    manifest = load_manifest(directory)
    limits = manifest.limits
    options = BuildOptions(
        model=str(directory),
        out=out,
        num_shards=num_shards,
        target=manifest.target.kind,
        archs=manifest.target.archs,
        max_seq_len=limits.max_seq_len,
        max_batch_size=limits.max_batch_size,
        prefill_chunk_size=limits.prefill_chunk_size,
        use_cuda_graph=manifest.use_cuda_graph,
        build_model_only=not manifest.has_weights,
        dummy_weights=manifest.dummy_weights,
        disable_pass=manifest.disable_pass,
        expert_parallel=manifest.expert_parallel,
    )
    source = _Artefact(directory, manifest)
    with source:
        readers = None
        if manifest.has_weights and not manifest.dummy_weights:
            readers = source.readers()
        return build_from(source, options, progress, readers, source.scheme)


class _Artefact(Checkpoint):
    """An artefact in place of the checkpoint that it was built from."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        super().__init__(directory, manifest.model.config, {})
        self._manifest = manifest
        self._shards: list[Checkpoint] = []
        self.scheme = self._scheme()

    def _scheme(self) -> Scheme:
        name, dtype = self._manifest.quantization, self._manifest.dtype
        if name in QUANTIZATIONS:
            return quantization(name)
        if self._manifest.dummy_weights or not self._manifest.has_weights:
            own = {dtype: name for name, dtype in OWN.items()}
            return scheme_of(own[dtype], self)
        if kept.FILE not in self._manifest.files:
            raise UsageError(
                f"{self.root}: built by a version that did not keep how the checkpoint was "
                "quantized; build the model again from its checkpoint"
            )
        check_size(self.root / kept.FILE, self._manifest.files[kept.FILE])
        return kept.Kept(name, dtype, kept.read(self.root / kept.FILE))

    def readers(self) -> dict[str, Reader]:
        """A reader of each weight of the checkpoint.

        Raises UsageError if this version cuts the model in another way than the one that built it.
        """
        manifest = self._manifest
        _, family = family_of(manifest.model.config)
        config = family.config.from_hf(model_config(self))
        page = manifest.limits.page_size
        program = partition_program(
            family.model(config, self.scheme.dtype),
            self.scheme,
            Limits(page, 1, page, page),
            manifest.mesh.size,
            expert_parallel=manifest.expert_parallel,
        )
        weights = list(program.weights.values())
        if set(weight_specs(weights)) != set(manifest.weights):
            raise UsageError(
                f"{self.root}: built by Shardwright {manifest.version}, whose shards this version "
                "cannot take apart; build the model again from its checkpoint"
            )
        for rank in range(manifest.mesh.size):
            name = shard_name(rank, manifest.mesh.size)
            check_size(self.root / name, manifest.files[name])
            self._shards.append(_Shard(self.root, {}, read_header(self.root / name)))
        found: dict[str, Reader] = {}
        for weight in weights:
            first = 0
            for source in weight.sources:
                found[source.name] = _Whole(self._shards, weight, source, first)
                first += source.local_shape[0]
        return found

    def close(self) -> None:
        """See `Checkpoint`."""
        for shard in self._shards:
            shard.close()
        super().close()


class _Shard(Checkpoint):
    """A rank's file, which holds words as well as numbers."""

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """See `Checkpoint`."""
        info = self.tensors[name]
        out = np.empty((stop - start, *info.shape[1:]), _DTYPES[info.dtype])
        if out.size:
            row = out.nbytes // (stop - start)
            self._pread(info.file, out.reshape(-1).view(np.uint8).data, info.offset + start * row)
        return out


class _Whole:
    """One weight of the checkpoint, put together from the ranks' slices; see `Reader`.

    `first` is the row at which the weight's slice begins in the tensors of each rank.
    """

    def __init__(
        self, shards: list[Checkpoint], weight: Weight, source: Source, first: int
    ) -> None:
        self.shape = source.shape
        self.quantized = source.columns is not None
        self._shards, self._weight, self._source = shards, weight, source
        placement = source.placement
        self._by_rows = isinstance(placement, Shard) and placement.dim == 0
        # For each row of the whole: the rank that has it, and where.
        self._rank = np.zeros(self.shape[0], np.int64)
        self._row = np.arange(self.shape[0], dtype=np.int64) + first
        if isinstance(placement, Shard) and placement.dim == 0:
            for rank in range(len(shards)):
                index = placement.index(rank)
                local = np.flatnonzero(index != PAD)
                self._rank[index[local]], self._row[index[local]] = rank, local + first
        if source.rows is not None:  # the whole's rows were permuted before the cut
            inverse = np.argsort(source.rows)
            self._rank, self._row = self._rank[inverse], self._row[inverse]

    def read(self, index: Index) -> Parts:
        """See `Reader`."""
        names = [name for name, _, _ in self._weight.tensors()]
        if not self.quantized:
            return (self._read(names[0], index, self._place_plain),)
        columns = self._source.columns
        assert columns is not None and self._source.quantized is not None
        codes = self._read(names[0], index, self._place_codes, columns.packing.offset)
        sides = [n for n in names[1:] if not n.endswith(".columns")]
        return codes, *(self._read(name, index, self._place_side) for name in sides)

    def release(self) -> None:
        """See `Reader`."""

    def _read(
        self,
        name: str,
        index: Index,
        place: Callable[[Array | None, Array, int], Array],
        padding: int = 0,
    ) -> Array:
        """Rows `index` of a tensor of the whole; `padding` where the index is -1."""
        real = np.flatnonzero(index != PAD)
        picked = index[real]
        whole: Array | None = None
        if self._by_rows:
            parts = [
                place(None, self._shards[rank].read_rows(name, start, stop), rank)
                for rank, start, stop in self._runs(picked)
            ]
            whole = np.concatenate(parts) if len(parts) != 1 else parts[0]
        else:
            every = range(len(self._shards)) if isinstance(self._source.placement, Shard) else (0,)
            for rank in every:
                parts = [
                    self._shards[rank].read_rows(name, start, stop)
                    for _, start, stop in self._runs(picked)
                ]
                rows = np.concatenate(parts) if len(parts) != 1 else parts[0]
                whole = place(whole, rows, rank)
        assert whole is not None
        if len(real) == len(index):
            return whole
        out = np.full((len(index), *whole.shape[1:]), padding, whole.dtype)
        out[real] = whole
        return out

    def _runs(self, index: Index) -> Iterator[tuple[int, int, int]]:
        """(rank, first row, end) of consecutive rows of one rank; if none, one without rows."""
        if len(index) == 0:
            yield 0, 0, 0
            return
        rank, row = self._rank[index], self._row[index]
        breaks = np.flatnonzero((np.diff(rank) != 0) | (np.diff(row) != 1)) + 1
        for start, stop in zip([0, *breaks], [*breaks, len(index)], strict=True):
            yield int(rank[start]), int(row[start]), int(row[start]) + int(stop - start)

    def _place_plain(self, whole: Array | None, local: Array, rank: int) -> Array:
        placement = self._source.placement
        if not isinstance(placement, Shard) or placement.dim == 0:
            return local
        if whole is None:
            whole = np.zeros((len(local), *self.shape[1:]), local.dtype)
        index = placement.index(rank)
        mine = np.flatnonzero(index != PAD)
        moved = np.moveaxis(whole, placement.dim, 0)
        moved[index[mine]] = np.moveaxis(local, placement.dim, 0)[mine]
        return whole

    def _place_codes(self, whole: Array | None, local: Array, rank: int) -> Array:
        columns = self._source.columns
        assert columns is not None
        empty = np.zeros((0, columns.size), np.uint8)
        codes = unpack(local, columns.packing.bits) if len(local) else empty
        at = columns.codes[min(rank, len(columns.codes) - 1)]
        return _scatter(whole, codes, at, self.shape[1])

    def _place_side(self, whole: Array | None, local: Array, rank: int) -> Array:
        columns, quantized = self._source.columns, self._source.quantized
        assert columns is not None and quantized is not None
        at = columns.groups[min(rank, len(columns.groups) - 1)]
        count = int(quantized.groups(self.shape[1]).max()) + 1
        return _scatter(whole, local, at, count)


def _scatter(whole: Array | None, local: Array, at: Index, count: int) -> Array:
    """Columns of `local` at their places `at` among `count`; -1 is none."""
    if whole is None:
        whole = np.zeros((len(local), count), local.dtype)
    mine = np.flatnonzero(at != PAD)
    if len(mine) and (np.diff(at[mine]) == 1).all() and mine[-1] - mine[0] + 1 == len(mine):
        start = int(at[mine[0]])
        whole[:, start : start + len(mine)] = local[:, mine[0] : mine[-1] + 1]
    else:
        whole[:, at[mine]] = local[:, mine]
    return whole
