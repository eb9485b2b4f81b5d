"""FP8 and compressed-tensors checkpoints: codes in rows of the matrix `[N, K]`.

FP8: `weight` in e4m3 and a scale of the tensor, of each row, or of blocks (DeepSeek: 128 x 128,
`weight_scale_inv`, which multiplies as any other scale does). compressed-tensors: "float-quantized"
likewise; "int-quantized" int8; "pack-quantized" 4 or 8 bits, `weight_packed` int32 [N, K * bits /
32] of codes plus 2 ** (bits - 1), zero points packed likewise along N. w = (q - zero) * scale.
https://huggingface.co/deepseek-ai/DeepSeek-V3 (README_WEIGHTS.md),
https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from shardwright.compiler.checkpoint import Checkpoint
from shardwright.compiler.columns import Index
from shardwright.compiler.formats import (
    Format,
    as_zero,
    flip,
    matches,
    refuse_nan,
)
from shardwright.compiler.packing import Packing, unpack
from shardwright.compiler.slicing import Array, Parts, Reader, read_rows
from shardwright.errors import CheckpointError

_SCALES = "F16 BF16 F32"


class _RowReader:
    """Codes read by rows; scales, which are few, whole."""

    quantized = True

    def __init__(
        self, checkpoint: Checkpoint, module: str, shape: tuple[int, ...], packing: Packing
    ) -> None:
        self.shape, self._checkpoint, self._module = shape, checkpoint, module
        self._packing = packing
        self.name, self.scale, self.zero = f"{module}.weight", f"{module}.weight_scale", ""
        self.block_rows = 1

    @cached_property
    def _scales(self) -> Array:
        """[rows, groups], of which there may be one row, or one for several of the weight's."""
        scales = self._checkpoint.read_raw(self.scale)
        return scales.reshape(len(scales) if scales.ndim else 1, -1)

    @cached_property
    def _zeros(self) -> Array:
        zeros: Array = self._checkpoint.read_raw(self.zero)
        if self.name.endswith("weight"):  # int8, as the codes
            zeros = zeros.view(np.uint8).reshape(len(zeros), -1) ^ np.uint8(0x80)
        else:
            zeros = unpack(np.ascontiguousarray(zeros.T), self._packing.bits)
            zeros = zeros[:, : self.shape[0]].T
        return zeros

    def release(self) -> None:
        """See `Reader`."""
        for part in ("_scales", "_zeros"):
            self.__dict__.pop(part, None)

    def read(self, index: Index) -> Parts:
        """See `Reader`."""
        raw = read_rows(self._checkpoint.read_raw, self.name, index)
        rows = np.maximum(index, 0) // self.block_rows
        scale = self._scales[np.minimum(rows, len(self._scales) - 1)]
        if self._packing.code == "e4m3":
            codes = raw.view(np.uint8)
            refuse_nan(codes, f"{self._checkpoint.root}: {self.name}")
            return codes, scale
        if self.name.endswith("_packed"):
            codes = unpack(raw, self._packing.bits)
        else:
            codes = raw.view(np.uint8) ^ np.uint8(0x80)
        if self._packing.zeros:
            zero = self._zeros[np.minimum(rows, len(self._zeros) - 1)]
            return codes, scale, as_zero(zero)
        if self._packing.bits == 4:
            return flip(codes), -scale
        return codes, scale


class Fp8(Format):
    """`quant_method` fp8: e4m3 with a scale of the tensor, of each row or of blocks."""

    mark = ".weight"
    parts = ("weight_scale", "weight_scale_inv")
    ignored = ("input_scale", "activation_scale", "k_scale", "v_scale")

    def read_config(self) -> None:
        """See `Format`."""
        self.known(
            *("quant_method", "activation_scheme", "weight_block_size", "fmt", "scale_fmt"),
            *("modules_to_not_convert", "ignored_layers", "kv_cache_scheme", "dequantize"),
        )
        self.only(fmt=("e4m3", None), scale_fmt=(None, "float"))
        block = self.config.get("weight_block_size")
        if block is not None and not (
            isinstance(block, list)
            and len(block) == 2
            and all(isinstance(b, int) and b >= 8 and b % 8 == 0 for b in block)
        ):
            raise self.refuse("weight_block_size", "is no pair of multiples of 8")
        self.block = block
        self.name = f"fp8 e4m3, {f'blocks of {block[0]} x {block[1]}' if block else 'scales'}"

    def converts(self, module: str) -> bool:
        """See `Format`."""
        ignored = self.config.get("ignored_layers") or []
        return super().converts(module) and not matches(module, ignored)

    def is_quantized(self, module: str) -> bool:
        """See `Format`: by the dtype of the weight."""
        info = self.checkpoint.tensors.get(f"{module}.weight")
        if info is None:
            return not self.checkpoint.tensors and self.converts(module)
        return info.dtype.startswith("F8")

    def scale_name(self, module: str) -> str:
        """The tensor of the scales; both names are in use."""
        inverse = f"{module}.weight_scale_inv"
        known = self.checkpoint.tensors
        return inverse if inverse in known or self.block else f"{module}.weight_scale"

    def packing(self, module: str, shape: tuple[int, ...]) -> Packing:
        """See `Format`."""
        group = min(self.block[1], shape[1]) if self.block else shape[1]
        return Packing(8, group, code="e4m3", scale_dtype="float32")

    def reader(self, module: str, shape: tuple[int, ...]) -> Reader:
        """See `Format`."""
        name = self.scale_name(module)
        self.expect(f"{module}.weight", shape, "F8_E4M3")
        found = self.checkpoint.tensors.get(name)
        if self.block:
            expected: tuple[int, ...] = tuple(
                -(-size // b) for size, b in zip(shape, self.block, strict=True)
            )
        elif found is not None and found.shape in ((), (1,), (shape[0],), (shape[0], 1)):
            expected = found.shape
        else:
            expected = (shape[0], 1)
        self.expect(name, expected, _SCALES)
        reader = _RowReader(self.checkpoint, module, shape, self.packing(module, shape))
        reader.scale = name
        reader.block_rows = self.block[0] if self.block else 1
        return reader


class CompressedTensors(Format):
    """`quant_method` compressed-tensors: int4 and int8, packed or not, and fp8."""

    parts = ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    ignored = ("input_scale", "input_zero_point", "output_scale", "k_scale", "v_scale")
    formats = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")

    def read_config(self) -> None:
        """See `Format`."""
        self.known(
            *("quant_method", "config_groups", "format", "ignore", "kv_cache_scheme", "version"),
            *("quantization_status", "global_compression_ratio", "sparsity_config"),
            *("transform_config", "moe_sparsity_config"),
        )
        self.only(
            quantization_status=("compressed", "frozen", None),
            transform_config=({}, None),
            sparsity_config=({}, None),
            moe_sparsity_config=({}, None),
        )
        groups = self.config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise self.refuse("config_groups", "has no groups")
        self.groups: list[tuple[list[str], dict[str, Any], str]] = []
        for key, group in groups.items():
            where = f"config_groups.{key}"
            if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
                raise self.refuse("config_groups", f"is not supported: {where} has no weights")
            kind = group.get("format") or self.config.get("format")
            if kind not in self.formats:
                raise self.refuse("format", f"is not supported; one of {self.formats} is")
            self.check(group["weights"], where)
            self.groups.append((list(group.get("targets") or []), group["weights"], str(kind)))
        self.name = "compressed-tensors " + " and ".join(
            dict.fromkeys(
                f"{args.get('type', 'int')}{args['num_bits']}, {args.get('strategy')}"
                + (f" of {args['group_size']}" if args.get("strategy") == "group" else "")
                for _, args, _ in self.groups
            )
        )

    def check(self, args: dict[str, Any], where: str) -> None:
        """Raise ConfigError for weights that are quantized in a way we cannot read."""
        wrong = {
            "num_bits": args.get("num_bits") in ((8,) if args.get("type") == "float" else (4, 8)),
            "type": args.get("type", "int") in ("int", "float"),
            "strategy": args.get("strategy") in ("tensor", "channel", "group", "block"),
            "dynamic": args.get("dynamic") in (False, None),
            "symmetric": args.get("symmetric", True) or args.get("type") != "float",
            "group_size": args.get("strategy") != "group"
            or (isinstance(args.get("group_size"), int) and args["group_size"] % 8 == 0),
            "block_structure": args.get("strategy") != "block"
            or isinstance(args.get("block_structure"), list),
        }
        for key, good in wrong.items():
            if not good:
                raise self.refuse(
                    "config_groups", f"is not supported: {where}.weights.{key} {args.get(key)!r}"
                )
        self.act_order |= args.get("actorder") in ("group", True)

    def group_of(self, module: str) -> tuple[dict[str, Any], str]:
        """The arguments of the weights of `module`, and the form they are stored in."""
        named = [g for g in self.groups if matches(module, g[0])]
        for targets, args, kind in named or self.groups:
            if named or "Linear" in targets:
                return args, kind
        raise self.refuse("config_groups", f"has no group for {module}, which is quantized")

    def converts(self, module: str) -> bool:
        """See `Format`."""
        if module.endswith("embed_tokens") or matches(module, self.config.get("ignore") or []):
            return False
        return any("Linear" in targets or matches(module, targets) for targets, *_ in self.groups)

    mark = ".weight_scale"

    def packing(self, module: str, shape: tuple[int, ...]) -> Packing:
        """See `Format`."""
        args, _ = self.group_of(module)
        strategy = args["strategy"]
        group = {"group": args.get("group_size"), "block": (args.get("block_structure") or [0])[-1]}
        size = min(group.get(strategy) or shape[1], shape[1])
        if args.get("type") == "float":
            return Packing(8, size, code="e4m3", scale_dtype="float32")
        zeros = not args.get("symmetric", True)
        narrow = args["num_bits"] == 4 and not zeros
        dtype = self.scale_dtype(f"{module}.weight_scale", narrow)
        offset = 0 if zeros else 7 if args["num_bits"] == 4 else 128
        return Packing(args["num_bits"], size, offset=offset, zeros=zeros, scale_dtype=dtype)

    def order(self, module: str, size: int) -> Index | None:
        """See `Format`."""
        name = f"{module}.weight_g_idx"
        if name not in self.checkpoint.tensors:
            return None
        self.expect(name, (size,), "I32 I64")
        group = self.group_of(module)[0]["group_size"]
        of = self.checkpoint.read_raw(name).astype(np.int64)
        if (of == -1).all() or (of == np.arange(size) // group).all():
            return None
        if of.min() < 0 or of.max() > (size - 1) // group:
            raise CheckpointError(f"{self.checkpoint.root}: {name} names groups that do not exist")
        return of

    def reader(self, module: str, shape: tuple[int, ...]) -> Reader:
        """See `Format`."""
        args, kind = self.group_of(module)
        packing = self.packing(module, shape)
        reader = _RowReader(self.checkpoint, module, shape, packing)
        n, groups = shape[0], -(-shape[1] // packing.group)
        scale = {"tensor": (1,), "channel": (n, 1), "group": (n, groups)}.get(args["strategy"])
        if args["strategy"] == "block":
            reader.block_rows = args["block_structure"][0]
            scale = (-(-n // reader.block_rows), groups)
        assert scale is not None
        self.expect(reader.scale, scale, _SCALES)
        if kind == "pack-quantized":
            reader.name = f"{module}.weight_packed"
            words = -(-shape[1] * packing.bits // 32)
            self.expect(reader.name, (n, words), "I32")
        elif packing.code == "e4m3":
            self.expect(reader.name, shape, "F8_E4M3")
        elif packing.bits == 8:
            self.expect(reader.name, shape, "I8")
        else:
            raise self.refuse("format", f"has {packing.bits} bits; only pack-quantized has")
        if packing.zeros:
            reader.zero = f"{module}.weight_zero_point"
            if kind == "pack-quantized":
                packed = (-(-n * packing.bits // 32), scale[-1])
                self.expect(reader.zero, packed, "I32")
            else:
                self.expect(reader.zero, scale, "I8")
        return reader

    def readers(self, shapes: Any) -> dict[str, Reader]:
        """See `Format`; the codes are a part too."""
        found = super().readers(shapes)
        return {name: r for name, r in found.items() if not name.endswith(".weight_packed")}
