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
_COLLECTIVES = 512 << 20


def of_manifest(manifest: Manifest) -> RankMemory:
    """What each rank of an artefact takes."""
    kind = manifest.target.kind
    limits = manifest.limits
    inputs = [4 * limits.prefill_chunk_size] * 4 + [4 * limits.max_batch_size]
    cache = [tensor_bytes(t) for t in manifest.state if t.name in CACHE]
    state = [tensor_bytes(t) for t in manifest.state if t.name not in CACHE]
    return RankMemory(
        weights=on_device(map(tensor_bytes, manifest.weights), kind),
        cache=on_device(cache, kind),
        workspace=on_device([manifest.workspace_bytes], kind),
        state=on_device([*state, *inputs], kind),
        reserved=reserved_bytes(kind, manifest.mesh.size),
    )


def check_fits(name: str, rank: int, need: RankMemory, free: int) -> None:
    """Raise DeviceError, naming the mend, if a rank needs more than is free on its device."""
    if need.total <= free:
        return
    parts = {
        "weights": "--quantization q4f16_1 or a larger --num-shards",
        "cache": "a smaller --max-seq-len or --max-batch-size",
        "workspace": "a smaller --prefill-chunk-size",
    }
    largest = max(parts, key=lambda part: int(getattr(need, part)))
    raise DeviceError(
        f"rank {rank}: {name} needs {gib(need.total)} of GPU memory (weights {gib(need.weights)}, "
        f"cache {gib(need.cache)}, workspace {gib(need.workspace)}, the rest "
        f"{gib(need.state + need.reserved)}) and {gib(free)} are free; end other programs on the "
        f"GPU, or build it with {parts[largest]}; `shardwright plan` shows what fits"
    )


def gib(count: float) -> str:
    """Bytes in GiB, for messages."""
    return f"{count / 2**30:.2f} GiB"
