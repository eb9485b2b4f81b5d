"""MLC's own repositories: `mlc-chat-config.json`, `ndarray-cache.json` and `params_shard_*.bin`.

A matrix is `q_weight` uint32 and `q_scale`, eight codes a word and 32 a scale: in q4f16_1 and
q4f32_1 [N, K / 8] and [N, K / 32]; in q4f16_0 transposed, but for the embedding. Queries, keys and
values are one matrix, as are gates and values. https://github.com/mlc-ai/mlc-llm, the cache's
format: https://github.com/apache/tvm, python/tvm/contrib/tvmjs.py
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from shardwright.compiler.checkpoint import Checkpoint, TensorInfo, read_json
from shardwright.compiler.columns import Index
from shardwright.compiler.conversion import columns
from shardwright.compiler.formats import Format
from shardwright.compiler.packing import Packing, unpack
from shardwright.compiler.slicing import Array, Parts, Plain, Reader, Rows, read_rows
from shardwright.errors import CheckpointError, ConfigError

CONFIG = "mlc-chat-config.json"
CACHES = ("ndarray-cache.json", "tensor-cache.json")
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}
QUANTIZATIONS = ("q4f16_1", "q4f16_0", "q4f32_1")

_JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint32": "U32"}
_DROPPED = """
    context_window_size prefill_chunk_size tensor_parallel_shards pipeline_parallel_stages
    max_batch_size disaggregation attention_sink_size sliding_window_size kwargs
""".split()


def open_mlc(root: Path, weights: bool) -> Checkpoint:
    """MLC's repository as a checkpoint with the configuration that Hugging Face would have.

    Raises ConfigError for a model or a quantization that is not supported, CheckpointError for a
    file that is missing or damaged.
    """
    chat = read_json(root / CONFIG)
    model = chat.get("model_config")
    kind, name = chat.get("model_type"), chat.get("quantization")
    if not isinstance(model, dict):
        raise ConfigError(f"{CONFIG}: model_config is missing; fetch it again")
    if kind not in ARCHITECTURES:
        raise ConfigError(
            f"{CONFIG}: model_type {kind!r} is not supported; {', '.join(ARCHITECTURES)} are. "
            "Use the model's checkpoint from before MLC's conversion."
        )
    if name not in QUANTIZATIONS:
        raise ConfigError(
            f"{CONFIG}: quantization {name!r} is not supported; {', '.join(QUANTIZATIONS)} are. "
            "Use the model's checkpoint from before its quantization."
        )
    config = {k: v for k, v in model.items() if k not in (*_DROPPED, "position_embedding_base")}
    config |= model.get("kwargs") or {}
    config |= {"architectures": [ARCHITECTURES[kind]], "model_type": kind}
    if base := model.get("position_embedding_base"):
        config["rope_theta"] = float(base)
    length = model.get("context_window_size") or chat.get("context_window_size")
    if length:
        config.setdefault("max_position_embeddings", length)
    for key in ("bos_token_id", "eos_token_id"):
        if chat.get(key) is not None:
            config[key] = chat[key]
    config["quantization_config"] = {"quant_method": "mlc", "name": name}
    return Checkpoint(root, config, _tensors(root) if weights else {})


def _tensors(root: Path) -> dict[str, TensorInfo]:
    cache = next((root / name for name in CACHES if (root / name).is_file()), None)
    if cache is None:
        raise CheckpointError(f"{root}: no {CACHES[0]}; fetch the rest of the model")
    tensors = {}
    try:
        for shard in read_json(cache)["records"]:
            file = root / shard["dataPath"]
            if not file.is_file():
                raise CheckpointError(f"{root}: missing {file.name}; fetch the rest of the model")
            size = file.stat().st_size
            for record in shard["records"]:
                half = record["format"] == "f32-to-bf16" and record["dtype"] == "float32"
                dtype = "BF16" if half else _DTYPES[record["dtype"]]
                shape = tuple(int(d) for d in record["shape"])
                info = TensorInfo(file, int(record["byteOffset"]), shape, dtype)
                if info.nbytes != record["nbytes"]:
                    raise ValueError(f"{record['nbytes']} bytes for {record['name']}")
                if info.offset + info.nbytes > size:
                    raise CheckpointError(f"{file}: truncated, {size} bytes; fetch it again")
                tensors[str(record["name"])] = info
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{cache}: damaged ({error!r}); fetch it again") from None
    return tensors


class Mlc(Format):
    """MLC's own formats."""

    mark = ".q_weight"
    parts = ("q_scale",)

    def read_config(self) -> None:
        """See `Format`."""
        self.kind = self.config["name"]
        self.name = f"mlc {self.kind}"

    def is_quantized(self, module: str) -> bool:
        """See `Format`: every matrix is."""
        return True

    def packing(self, module: str, shape: tuple[int, ...]) -> Packing:
        """See `Format`."""
        dtype = "float32" if self.kind == "q4f32_1" else "float16"
        return Packing(4, 32, offset=7, scale_dtype=dtype)

    def reader(self, module: str, shape: tuple[int, ...]) -> Reader:
        """See `Format`."""
        n, k = shape
        groups = -(-k // 32)
        transposed = self.kind.endswith("_0") and not module.endswith("embed_tokens")
        words, scales = (n, 4 * groups), (n, groups)
        if transposed:
            words, scales = words[::-1], scales[::-1]
        self.expect(f"{module}.q_weight", words, "U32")
        self.expect(f"{module}.q_scale", scales, "F16 BF16 F32")
        return _MlcReader(self.checkpoint, module, shape, transposed)

    def readers(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Reader]:
        """See `Format`; joined matrices are taken apart as the model has them."""
        found: dict[str, Reader] = {}
        for name in self.checkpoint.tensors:
            module, _, last = name.rpartition(".")
            if last == "q_scale":
                continue
            weight = f"{module}.weight" if last == "q_weight" else name
            pieces = _pieces(weight, shapes)
            whole: Reader
            if last != "q_weight":
                whole = Plain(self.checkpoint, name)
            else:
                known = [shapes[piece] for piece in pieces if piece in shapes]
                if len(known) != len(pieces):
                    raise CheckpointError(
                        f"{self.checkpoint.root}: tensors do not fit {CONFIG}: not in the model: "
                        f"{name}"
                    )
                rows = sum(shape[0] for shape in known)
                whole = self.reader(module, (rows, known[0][1]))
            first = 0
            for piece in pieces:
                count = shapes[piece][0] if len(pieces) > 1 else whole.shape[0]
                found[piece] = Rows(whole, first, count) if len(pieces) > 1 else whole
                first += count
        return found


def _pieces(name: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The model's weights that are joined in `name`."""
    for joined, parts in _JOINED.items():
        if f".{joined}." in name and name not in shapes:
            return [name.replace(joined, part) for part in parts]
    return [name]


class _MlcReader:
    quantized = True

    def __init__(
        self, checkpoint: Checkpoint, module: str, shape: tuple[int, ...], transposed: bool
    ) -> None:
        self.shape, self._checkpoint, self._module = shape, checkpoint, module
        self._transposed = transposed
        self._whole: dict[str, Array] = {}

    def _rows(self, part: str, index: Index) -> Array:
        name = f"{self._module}.{part}"
        if not self._transposed:
            return read_rows(self._checkpoint.read_raw, name, np.maximum(index, 0))
        whole = self._whole.get(part)
        if whole is None:
            whole = self._whole[part] = self._checkpoint.read_raw(name)
        return columns(whole, np.maximum(index, 0))

    def read(self, index: Index) -> Parts:
        """See `Reader`."""
        codes = unpack(self._rows("q_weight", index), 4)
        return codes, self._rows("q_scale", index)

    def release(self) -> None:
        """See `Reader`."""
        self._whole.clear()
