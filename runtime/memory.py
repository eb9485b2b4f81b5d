"""What a rank needs of its device's memory: one model for `plan`, `build` and loading."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from shardwright.errors import DeviceError
from shardwright.runtime.artifact import Manifest, TensorSpec, WeightSpec

CACHE = ("k_pages", "v_pages", "page_table")
"""State tensors that grow with the tokens a model can hold."""

GRANULE = 2 << 20
"""CUDA gives out memory in pieces of this many bytes, except for small tensors, which share one."""

CONTEXT = 600 << 20
"""What the driver and a process's context take of a GPU before anything is allocated (H200)."""

_SMALL = 1 << 20
_BITS = {"bool": 8, "bfloat16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8}


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank by use. `reserved` is what libraries take beside our tensors."""

    weights: int
    cache: int
    workspace: int
    state: int
    reserved: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.workspace + self.state + self.reserved


def tensor_bytes(tensor: TensorSpec | WeightSpec) -> int:
    """Bytes of a tensor of known shape, local to one rank."""
    return count_bytes([int(extent) for extent in tensor.shape], tensor.dtype)


def count_bytes(shape: Iterable[int], dtype: str) -> int:
    """Bytes of a tensor of `shape` and `dtype`."""
    digits = "".join(c for c in dtype if c.isdigit())
    return math.prod(shape) * (_BITS.get(dtype) or int(digits)) // 8


def on_device(sizes: Iterable[int], kind: str) -> int:
    """Bytes that tensors of these sizes take on a device of `kind`, "cpu", "cuda" or "rocm"."""
    found = list(sizes)
    if kind == "cpu":
        return sum(found)
    small = sum(size for size in found if size < _SMALL)
    large = [size for size in found if size >= _SMALL]
    return sum(-(-size // GRANULE) * GRANULE for size in [small, *large])


def reserved_bytes(kind: str, ranks: int) -> int:
    """What libraries take on a GPU after its context exists: kernels, and buffers of NCCL.

    Measured on H200s, see docs/performance.md.
    """
    if kind == "cpu":
        return 0
    return _KERNELS + (_COLLECTIVES if ranks > 1 else 0)


_KERNELS = 64 << 20
_COLLECTIVES = 320 << 20


def of_manifest(manifest: Manifest) -> RankMemory:
    """What each rank of an artefact takes."""
    kind, ranks = manifest.target.kind, manifest.mesh.size
    limits = manifest.limits
    inputs = [TensorSpec("input", (limits.prefill_chunk_size,), "int32")] * 4
    inputs.append(TensorSpec("last", (limits.max_batch_size,), "int32"))
    state = [*manifest.state, *inputs]
    return needed(kind, ranks, manifest.weights, state, manifest.workspace_bytes)


def needed(
    kind: str,
    ranks: int,
    weights: Iterable[WeightSpec],
    state: Iterable[TensorSpec],
    workspace: int,
) -> RankMemory:
    """What each rank takes that holds these tensors on a device of `kind`."""
    found = [(tensor.name in CACHE, tensor_bytes(tensor)) for tensor in state]
    return RankMemory(
        weights=on_device(map(tensor_bytes, weights), kind),
        cache=on_device((size for in_cache, size in found if in_cache), kind),
        workspace=on_device([workspace], kind),
        state=on_device((size for in_cache, size in found if not in_cache), kind),
        reserved=reserved_bytes(kind, ranks),
    )


def check_fits(name: str, need: RankMemory, free: int, where: str) -> None:
    """Raise DeviceError, naming the mend, if a rank needs more than is free; `where` says where."""
    if need.total <= free:
        return
    parts = {
        "weights": "--quantization q4f16_1 or a larger --num-shards",
        "cache": "a smaller --max-seq-len or --max-batch-size",
        "workspace": "a smaller --prefill-chunk-size",
    }
    largest = max(parts, key=lambda part: int(getattr(need, part)))
    raise DeviceError(
        f"{name} needs {gib(need.total)} of memory on each GPU (weights {gib(need.weights)}, "
        f"cache {gib(need.cache)}, workspace {gib(need.workspace)}, the rest "
        f"{gib(need.state + need.reserved)}) and {where} {gib(free)}; build it with "
        f"{parts[largest]}, `shardwright plan` shows what fits"
    )


def gib(count: float) -> str:
    """Bytes in GiB, for messages."""
    return f"{count / 2**30:.2f} GiB"
