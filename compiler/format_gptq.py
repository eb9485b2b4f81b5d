"""GPTQ and AWQ checkpoints: codes packed along the first dimension of a `[K, N]` matrix.

GPTQ (AutoGPTQ, GPTQModel): `qweight` int32 [K * bits / 32, N] has codes of consecutive k, `qzeros`
int32 [groups, N * bits / 32] of consecutive n, less one in checkpoint_format "gptq" and as they are
in "gptq_v2"; `g_idx` [K] is the group of each k. AWQ (AutoAWQ, version "gemm"): `qweight` int32 [K,
N / 8] and `qzeros` hold n in the order 0 2 4 6 1 3 5 7. In both, w = (code - zero) * scale.
https://github.com/AutoGPTQ/AutoGPTQ, https://github.com/ModelCloud/GPTQModel,
https://github.com/casper-hansen/AutoAWQ
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

import numpy as np

from shardwright.compiler.checkpoint import Checkpoint
from shardwright.compiler.columns import Index
from shardwright.compiler.conversion import columns, nibbles
from shardwright.compiler.formats import Format, as_zero, flip, is_head
from shardwright.compiler.packing import Packing, unpack
from shardwright.compiler.slicing import Array, Parts, Reader
from shardwright.errors import CheckpointError

_GPTQ_IGNORED = """
    act_group_aware auto_map_quant_conf backend batch_size block_name_to_quantize
    cache_block_outputs damp_auto_increment damp_percent dataset disable_exllama exllama_config
    hyb_act max_input_length meta model_file_base_name model_name_or_path model_seqlen
    module_name_preceding_first_block modules_in_block_to_quantize mse pad_token_id static_groups
    tokenizer true_sequential use_cuda_fp16 use_exllama uuid offload_to_disk offload_to_disk_path
    adapter mock_quantization v2 v2_alpha quantizer
""".split()


class Gptq(Format):
    """`quant_method` gptq, 4 or 8 bits, with and without act-order."""

    mark = ".qweight"
    parts = ("qzeros", "scales", "g_idx")

    def read_config(self) -> None:
        """See `Format`."""
        self.known(
            *("quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format"),
            *("format", "dynamic", "lm_head", "pack_dtype", "is_marlin_format", "rotation"),
            *("modules_to_not_convert", *_GPTQ_IGNORED),
        )
        self.only(pack_dtype=("int32",), is_marlin_format=(False, None), rotation=(None, ""))
        self.only(bits=(4, 8))
        kind = self.config.get("checkpoint_format") or self.config.get("format") or "gptq"
        if kind not in ("gptq", "gptq_v2"):
            key = "checkpoint_format" if self.config.get("checkpoint_format") else "format"
            raise self.refuse(key, "is not supported; only 'gptq' or 'gptq_v2' is")
        self.v2 = kind == "gptq_v2"
        for key in ("bits", "group_size"):
            if not isinstance(self.config.get(key), int):
                raise self.refuse(key, "is no number")
        bits, group = self.config["bits"], self.config["group_size"]
        if group != -1 and (group < 8 or group % 8):
            raise self.refuse("group_size", "is neither -1 nor a multiple of 8")
        whole = "whole rows" if group == -1 else f"groups of {group}"
        order = ", act-order" if self.config.get("desc_act") else ""
        self.name = f"{kind} int{bits}, {whole}{order}"
        self.act_order = bool(order)

    def setting(self, module: str, key: str) -> Any:
        """A field of the configuration, or what `dynamic` has in its place for `module`."""
        for pattern, values in (self.config.get("dynamic") or {}).items():
            if re.match(pattern.removeprefix("+:"), module) and not pattern.startswith("-:"):
                return values.get(key, self.config.get(key))
        return self.config.get(key)

    def converts(self, module: str) -> bool:
        """See `Format`."""
        if is_head(module):
            return bool(self.config.get("lm_head")) and module.endswith("lm_head")
        excluded = [p[2:] for p in self.config.get("dynamic") or {} if p.startswith("-:")]
        return super().converts(module) and not any(re.match(p, module) for p in excluded)

    def packing(self, module: str, shape: tuple[int, ...]) -> Packing:
        """See `Format`."""
        bits, group = self.setting(module, "bits"), self.setting(module, "group_size")
        if bits not in (4, 8):
            raise self.refuse("dynamic", f"has {bits!r} bits for {module}; only 4 or 8 are read")
        sym = self.setting(module, "sym") in (True, None)
        offset = (7 if bits == 4 else 128) if sym else 0
        dtype = self.scale_dtype(f"{module}.scales", narrow=sym and bits == 4)
        group = shape[1] if group == -1 else group
        return Packing(bits, group, offset=offset, zeros=not sym, scale_dtype=dtype)

    def order(self, module: str, size: int) -> Index | None:
        """See `Format`."""
        name = f"{module}.g_idx"
        if name not in self.checkpoint.tensors:
            return None
        self.expect(name, (size,), "I32 I64")
        group = self.setting(module, "group_size")
        group = size if group == -1 else group
        of = self.checkpoint.read_raw(name).astype(np.int64)
        if (of == np.arange(size) // group).all():
            return None
        if of.min() < 0 or of.max() > (size - 1) // group:
            raise CheckpointError(f"{self.checkpoint.root}: {name} names groups that do not exist")
        return of

    def reader(self, module: str, shape: tuple[int, ...]) -> Reader:
        """See `Format`."""
        packing = self.packing(module, shape)
        (n, k), per_word = shape, packing.per_word
        groups = -(-k // packing.group)
        self.expect(f"{module}.qweight", (k // per_word, n), "I32 U32")
        self.expect(f"{module}.qzeros", (groups, -(-n // per_word)), "I32 U32")
        self.expect(f"{module}.scales", (groups, n), "F16 BF16 F32")
        return _GptqReader(self.checkpoint, module, shape, packing, self.v2)


class _KMajor:
    """A packed matrix that is read whole, one at a time, since its columns are our rows."""

    quantized = True

    def __init__(
        self, checkpoint: Checkpoint, module: str, shape: tuple[int, ...], packing: Packing
    ) -> None:
        self.shape, self._checkpoint, self._module = shape, checkpoint, module
        self._packing = packing

    def _read(self, part: str) -> Array:
        return self._checkpoint.read_raw(f"{self._module}.{part}")

    @cached_property
    def _words(self) -> Array:
        return self._read("qweight")

    @cached_property
    def _scales(self) -> Array:
        return self._read("scales")

    @cached_property
    def _zeros(self) -> Array:
        raise NotImplementedError

    def release(self) -> None:
        """See `Reader`."""
        for part in ("_words", "_scales", "_zeros"):
            self.__dict__.pop(part, None)

    def _codes(self, rows: Index) -> Array:
        raise NotImplementedError

    def read(self, index: Index) -> Parts:
        """See `Reader`."""
        rows = np.maximum(index, 0)
        codes, scale = self._codes(rows), columns(self._scales, rows)
        zeros = self._zeros  # read in any case: they are checked
        if self._packing.zeros:
            return codes, scale, as_zero(columns(zeros, rows))
        if self._packing.bits == 4:
            return flip(codes), -scale
        return codes, scale


class _GptqReader(_KMajor):
    def __init__(
        self,
        checkpoint: Checkpoint,
        module: str,
        shape: tuple[int, ...],
        packing: Packing,
        v2: bool,
    ) -> None:
        super().__init__(checkpoint, module, shape, packing)
        self._v2 = v2

    @cached_property
    def _zeros(self) -> Array:
        bits = self._packing.bits
        zeros = unpack(self._read("qzeros"), bits)[:, : self.shape[0]].astype(np.int16)
        name = f"{self._checkpoint.root}: {self._module}.qzeros"
        if not self._v2:
            if (zeros == (1 << bits) - 1).any():
                raise CheckpointError(
                    f"{name} holds {(1 << bits) - 1}, which checkpoint_format gptq gives no "
                    "agreed meaning; save it as gptq_v2"
                )
            zeros += 1
        if not self._packing.zeros and (zeros != 1 << (bits - 1)).any():
            raise CheckpointError(
                f"{name} is not that of a symmetric quantization, as sym says; set sym to false in "
                "quantization_config"
            )
        return zeros

    def _codes(self, rows: Index) -> Array:
        return unpack(columns(self._words, rows), self._packing.bits)


_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_SHIFT = np.array([4 * _AWQ_ORDER.index(row) for row in range(8)], np.uint32)


class Awq(Format):
    """`quant_method` awq, version gemm, 4 bits."""

    mark = ".qweight"
    parts = ("qzeros", "scales")

    def read_config(self) -> None:
        """See `Format`."""
        self.known(
            *("quant_method", "bits", "group_size", "zero_point", "version", "backend", "do_fuse"),
            *("modules_to_not_convert", "modules_to_fuse", "fuse_max_seq_len", "exllama_config"),
        )
        if str(self.config.get("version", "gemm")).lower() != "gemm":
            raise self.refuse("version", "is not supported; only 'gemm' is")
        self.only(bits=(4,), zero_point=(True,))
        group = self.config.get("group_size")
        if not isinstance(group, int) or (group != -1 and (group < 8 or group % 8)):
            raise self.refuse("group_size", "is neither -1 nor a multiple of 8")
        self.group = group
        self.name = f"awq int4, {'whole rows' if group == -1 else f'groups of {group}'}"

    def packing(self, module: str, shape: tuple[int, ...]) -> Packing:
        """See `Format`."""
        group = shape[1] if self.group == -1 else self.group
        dtype = self.scale_dtype(f"{module}.scales", narrow=False)
        return Packing(4, group, zeros=True, scale_dtype=dtype)

    def reader(self, module: str, shape: tuple[int, ...]) -> Reader:
        """See `Format`."""
        packing = self.packing(module, shape)
        n, k = shape
        groups = -(-k // packing.group)
        self.expect(f"{module}.qweight", (k, n // 8), "I32 U32")
        self.expect(f"{module}.qzeros", (groups, n // 8), "I32 U32")
        self.expect(f"{module}.scales", (groups, n), "F16 BF16 F32")
        return _AwqReader(self.checkpoint, module, shape, packing)


class _AwqReader(_KMajor):
    @cached_property
    def _zeros(self) -> Array:
        zeros: Array = self._unpack(self._read("qzeros"), np.arange(self.shape[0])).T
        return zeros

    def _codes(self, rows: Index) -> Array:
        return self._unpack(self._words, rows)

    @staticmethod
    def _unpack(words: Array, rows: Index) -> Array:
        """Codes `[len(rows), K]` of words `[K, N / 8]`."""
        some, where = np.unique(rows // 8, return_inverse=True)
        codes: Array = nibbles(columns(words, some), where, _AWQ_SHIFT[rows % 8])
        return codes
