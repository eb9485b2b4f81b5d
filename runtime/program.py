"""One rank's program: the compiled library, this rank's weights, and the state in device memory."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shardwright.errors import ArtifactError
from shardwright.runtime.artifact import (
    Manifest,
    TensorSpec,
    check_size,
    shard_name,
    verify_file,
)
from shardwright.runtime.device import Device, Pending
from shardwright.runtime.outbox import Outbox
from shardwright.runtime.shard_reader import Progress, locate, read_shard

LIBRARY = "model.so"
_TEMPLATE_ELEMENTS = 1 << 20


class Clock:
    """Seconds of the phases of a load, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, phase: str) -> None:
        """A phase ends here."""
        now = time.monotonic()
        self.seconds[phase] = now - self._last
        self._last = now


class Program:
    """The functions of `model.so`, bound to tensors that stay at fixed addresses.

    Everything runs on `device` and is asynchronous there.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        rank: int,
        device: Device,
        progress: Progress,
        clock: Clock,
    ) -> None:
        from tvm.runtime import load_module
        from tvm.runtime.vm import VirtualMachine

        self._manifest = manifest
        self._rank = rank
        self._device = device
        self._fill = _Filler(device)
        # Checked before it is loaded: mapping a truncated library is a bus error later.
        verify_file(directory, LIBRARY, _entry(manifest, directory, LIBRARY))
        self._vm = VirtualMachine(load_module(str(directory / LIBRARY)), device.tvm)
        clock.lap("library")
        self._weights = self._load_weights(directory, progress)
        clock.lap("weights")
        self._state = {spec.name: self._make_state(spec) for spec in manifest.state}
        self._workspace = self._function("workspace")()
        chunk, rows = manifest.limits.prefill_chunk_size, manifest.limits.max_batch_size
        self._inputs = {
            name: self._empty((chunk,), "int32")
            for name in ("tokens", "rows", "positions", "lengths")
        } | {"last": self._empty((rows,), "int32")}
        self._prefill = "prefill"
        self._decode: dict[int, Callable[[], None]] = {}
        self._bind_decode("")
        self._sample_arguments = self._arguments("sample", {})
        self._outbox: Outbox | None = None
        if manifest.tokens_to_host and rank == 0:
            self._outbox = device.outbox(rows, manifest.limits.max_seq_len)
        del self._fill  # and its templates
        clock.lap("state")

    # Running

    def prefill(self, chunk: dict[str, npt.NDArray[np.int32]]) -> None:
        """Run one chunk. `chunk` holds tokens, rows, positions, lengths [n] and last [B]."""
        views = {}
        for name, array in chunk.items():
            buffer = self._inputs[name]
            view = buffer if buffer.shape == array.shape else buffer._create_view(array.shape)
            views[name] = view.copyfrom(array)
        function, arguments, places = self._prefill_call
        for name, place in places.items():
            arguments[place] = views[name]
        function(*arguments)

    @property
    def peer_buffer(self) -> int | None:
        """Device address of the buffer for all-reduces over peer memory, if there is one."""
        tensor = self._state.get("peer_buffer")
        return None if tensor is None else int(tensor.data_ptr())

    def use_peers(self, addresses: list[int]) -> None:
        """From now on use functions with all-reduces over peer memory at `addresses`."""
        self._state["peers"].copyfrom(np.array(addresses, dtype=np.int64))
        self._bind_decode("_peer")
        if "prefill_peer" in self._manifest.functions:
            self._prefill = "prefill_peer"

    @functools.cached_property
    def _prefill_call(self) -> tuple[Callable[..., Any], list[Any], dict[str, int]]:
        """The function, all of its arguments, and the places among them of a call's inputs."""
        arguments = self._arguments(self._prefill, self._inputs)
        names = [spec.name for spec in self._manifest.functions[self._prefill].args]
        places = {name: names.index(name) for name in self._inputs}
        return self._function(self._prefill), arguments, places

    def _bind_decode(self, suffix: str) -> None:
        """Bind the decode functions with `suffix`, or without where there is none of a bucket."""
        self._decode = {}
        for bucket in self._manifest.decode_buckets:
            name = f"decode_{bucket}{suffix}"
            if name not in self._manifest.functions:
                name = f"decode_{bucket}"
            self._decode[bucket] = functools.partial(
                self._function(name), *self._arguments(name, {})
            )

    def watch(self, instrument: Callable[..., int]) -> None:
        """Call `instrument` before and after every call of a program, see `selftest`."""
        self._vm.set_instrument(instrument)

    def sample(self) -> None:
        """Choose the next token of every active row from its logits."""
        self._function("sample")(*self._sample_arguments)

    def decode(self, bucket: int) -> None:
        """Run one step for the first `bucket` rows: feed `tokens`, and choose the next ones."""
        self._device.replay(bucket, self._decode[bucket])

    def write(self, name: str, array: npt.NDArray[Any]) -> None:
        """Overwrite a state tensor. The device must be idle."""
        if self._outbox is not None and name == "positions":
            self._outbox.begin(array)
        if self._outbox is not None and name == "sampling_i":
            array = np.concatenate([array[:, :6], self._outbox.address()], 1)
        self._state[name].copyfrom(array)

    def tokens(self, rows: int) -> Pending:
        """The tokens of the first `rows` rows that the last step, or `sample`, will have chosen.

        To be called after each of them, where `write` gave the positions they began with.
        """
        if self._outbox is not None:
            return self._outbox.next(rows)
        return self._device.fetch(self.view("tokens", rows))

    def view(self, name: str, rows: int) -> Any:
        """The first `rows` rows of a state tensor."""
        tensor = self._state[name]
        return tensor._create_view((rows, *tensor.shape[1:]))

    def memory(self) -> dict[str, int]:
        """Bytes on the device: weights, cache, workspace, and other state."""
        cache = sum(_nbytes(self._state[name]) for name in ("k_pages", "v_pages"))
        return {
            "weights": sum(map(_nbytes, self._weights.values())),
            "cache": cache,
            "workspace": self._manifest.workspace_bytes,
            "other": sum(map(_nbytes, (*self._state.values(), *self._inputs.values()))) - cache,
        }

    def _function(self, name: str) -> Callable[..., Any]:
        """A function of the library; for AMD GPUs it has one for each architecture."""
        arch = self._device.arch
        return self._vm[f"{name}_{arch}" if arch else name]  # type: ignore[no-any-return]

    def _arguments(self, function: str, inputs: dict[str, Any]) -> list[Any]:
        """Values for a function's arguments; inputs of the call take precedence over state."""
        return [self._argument(spec, inputs) for spec in self._manifest.functions[function].args]

    def _argument(self, spec: TensorSpec, inputs: dict[str, Any]) -> Any:
        if spec.name == "workspace":
            return self._workspace
        for tensors in (inputs, self._weights):
            if spec.name in tensors:
                return tensors[spec.name]
        tensor = self._state[spec.name]
        return tensor if tensor.shape == spec.shape else tensor._create_view(spec.shape)

    # Memory

    def _empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        import tvm

        return tvm.runtime.empty(shape, dtype, self._device.tvm)

    def _make_state(self, spec: TensorSpec) -> Any:
        tensor = self._empty(tuple(int(length) for length in spec.shape), spec.dtype)
        initial = self._initial(spec.name, tensor.shape)
        if initial is None:
            # The cache too: a NaN in a page not yet written would pass through a masked softmax.
            self._fill.zeros(tensor)
        else:
            tensor.copyfrom(initial.astype(np.int32))
        return tensor

    def _initial(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any] | None:
        if name == "rows":
            return np.arange(shape[0])
        if name in ("positions", "eos"):
            return np.full(shape, -1)
        if name == "rank":
            return np.full(shape, self._rank)
        if name == "page_table":
            return np.arange(shape[0] * shape[1]).reshape(shape)
        return None

    def _load_weights(self, directory: Path, progress: Progress) -> dict[str, Any]:
        if self._manifest.dummy_weights:
            return {
                spec.name: self._fill.dummy(spec.name, self._empty(spec.shape, spec.dtype))
                for spec in self._manifest.weights
            }
        name = shard_name(self._rank, self._manifest.mesh.size)
        path, entry = directory / name, _entry(self._manifest, directory, name)
        check_size(path, entry)
        if not entry.crc32:
            verify_file(directory, name, entry)
        places = locate(path, self._manifest.weights)
        weights = {
            spec.name: self._empty(spec.shape, spec.dtype) for spec in self._manifest.weights
        }
        addresses = {name: int(tensor.data_ptr()) for name, tensor in weights.items()}
        read_shard(path, entry, places, addresses, self._device, self._manifest.mesh.size, progress)
        return weights


class _Filler:
    """Fills tensors on the device: a small block is uploaded once and copied there."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._templates: dict[tuple[str, str], Any] = {}

    def zeros(self, tensor: Any) -> None:
        self._tile(tensor, "zeros")

    def dummy(self, name: str, tensor: Any) -> Any:
        """Random values of ordinary size; the same on every rank, as replicated weights must be."""
        if str(tensor.dtype) == "uint32":
            kind = "bits"
        elif str(tensor.dtype) == "uint8":
            kind = "exponents"
        elif "scale" in name.rsplit(".", 1)[-1]:
            kind = "scales"
        elif "norm" in name and len(tensor.shape) == 1:
            kind = "ones"
        else:
            kind = "normal"
        self._tile(tensor, kind)
        return tensor

    def _tile(self, tensor: Any, kind: str) -> None:
        total = tensor.numel()
        template = self._template(kind, str(tensor.dtype))
        size = tensor.dtype.bits // 8
        done = min(total, _TEMPLATE_ELEMENTS)
        template._create_view((done,)).copyto(tensor._create_view((done,)))
        while done < total:
            step = min(done, total - done)
            target = tensor._create_view((step,), relative_byte_offset=done * size)
            tensor._create_view((step,)).copyto(target)
            done += step

    def _template(self, kind: str, dtype: str) -> Any:
        import tvm

        if (kind, dtype) not in self._templates:
            rng = np.random.default_rng(0)
            count = _TEMPLATE_ELEMENTS
            values: dict[str, Callable[[], npt.NDArray[Any]]] = {
                "zeros": lambda: np.zeros(count),
                "ones": lambda: np.ones(count),
                "bits": lambda: _nibbles(rng.integers(0, 15, 8 * count, dtype=np.uint8)),
                "exponents": lambda: rng.integers(119, 121, count),
                "scales": lambda: rng.uniform(0.004, 0.006, count),
                "normal": lambda: rng.normal(0, 0.02, count),
            }
            array = values[kind]().astype(dtype)
            self._templates[kind, dtype] = tvm.runtime.tensor(array, self._device.tvm)
        return self._templates[kind, dtype]


def _nibbles(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """Eight values to a word. 0 to 14, as weights have them, whose mean stands for zero.

    Another mean would grow from layer to layer, beyond float16.
    """
    return (values[0::2] | values[1::2] << 4).view("<u4").astype(np.uint32)


def _entry(manifest: Manifest, directory: Path, name: str) -> Any:
    if name not in manifest.files:
        raise ArtifactError(f"{directory}: the manifest has no file {name}; build the model again")
    return manifest.files[name]


def _nbytes(tensor: Any) -> int:
    return int(tensor.numel()) * int(tensor.dtype.bits) // 8
