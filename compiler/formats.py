"""Quantized checkpoints, read as they are: which format one has, and what all formats share.

A format says of each matrix how it is quantized, and reads it. Which modules are quantized is
seen from their tensors, so that exceptions (`modules_to_not_convert`, `ignore`) are those that
the checkpoint has; without weights it is read from the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from shardwright.compiler.checkpoint import Checkpoint
from shardwright.compiler.columns import Index, Quantized
from shardwright.compiler.packing import Packing
from shardwright.compiler.slicing import Array, Plain, Reader
from shardwright.errors import CheckpointError, ConfigError

KEY = "config.json: quantization_config."


class Format:
    """A checkpoint's format; also the scheme of a build that takes it over as it is.

    `name` goes into the manifest, `dtype` is that of activations and plain weights, "float16" or
    "float32". In float32 scales are float32 as well, and nothing is ever rounded.
    """

    name: str
    mark: str  # the tensor that a quantized module has and a plain one has not
    parts: tuple[str, ...] = ()  # the other tensors of a quantized module
    ignored: tuple[str, ...] = ()  # tensors without effect on the weight
    act_order = False  # whether groups may be scattered over a row; only the weights say how

    def __init__(self, checkpoint: Checkpoint, dtype: str) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        self.config: dict[str, Any] = checkpoint.config["quantization_config"]
        self.read_config()

    def read_config(self) -> None:
        """Check the configuration and set `name`. Raises ConfigError, which names the field."""
        raise NotImplementedError

    def converts(self, module: str) -> bool:
        """Whether the configuration has `module` quantized; asked where there are no weights."""
        names = self.config.get("modules_to_not_convert") or []
        return not is_head(module) and not any(name in module for name in names)

    def packing(self, module: str, shape: tuple[int, ...]) -> Packing:
        """The format of the matrix of `module`, `shape` [N, K]."""
        raise NotImplementedError

    def reader(self, module: str, shape: tuple[int, ...]) -> Reader:
        """Reads it. Raises CheckpointError for parts that are missing or do not fit `shape`."""
        raise NotImplementedError

    def order(self, module: str, size: int) -> Index | None:
        """The group of each column, where it is not the column's number over the group."""
        return None

    # What a build asks. ----------------------------------------------------------------------

    def quantized(
        self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], config: Any
    ) -> Quantized | None:
        """How weight `name`, of `shape` in the checkpoint, is quantized; None if it is plain."""
        if len(shape) != 2 or not name.endswith(".weight"):
            return None
        first, *others = self._modules(name.removesuffix(".weight"))
        how = self._module_quantized(first, shape)
        for module in others:
            other = self._module_quantized(module, shape)
            if other and how and other[1] != how[1]:
                raise ConfigError(
                    f"{self.checkpoint.root}: {module}: experts in act-order (desc_act) are not "
                    "supported; use a quantization of the model without it"
                )
            if other != how:
                raise ConfigError(
                    f"{self.checkpoint.root}: {module} is quantized otherwise than {first}; "
                    "experts of one layer must be quantized alike"
                )
        if how is None:
            return None
        packing, order = how
        return Quantized(packing, None if order is None else np.frombuffer(order, np.int64))

    def _modules(self, name: str) -> list[str]:
        """The modules that `name` stands for: with `{}` in it those of all experts."""
        if "{}" not in name:
            return [name]
        found = [name.format(0)]
        while name.format(len(found)) in self._known_modules:
            found.append(name.format(len(found)))
        return found

    @cached_property
    def _known_modules(self) -> frozenset[str]:
        return frozenset(tensor.rpartition(".")[0] for tensor in self.checkpoint.tensors)

    def _module_quantized(
        self, module: str, shape: tuple[int, ...]
    ) -> tuple[Packing, bytes | None] | None:
        """Format and act-order of a module, None if it is plain."""
        if not self.is_quantized(module):
            return None
        packing = self.packing(module, shape)
        if self.dtype == "float32":
            packing = replace(packing, scale_dtype="float32")
        order = self.order(module, shape[1])
        return packing, None if order is None else order.tobytes()

    def is_quantized(self, module: str) -> bool:
        """Whether `module` is quantized."""
        tensors = self.checkpoint.tensors
        return module + self.mark in tensors if tensors else self.converts(module)

    def readers(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Reader]:
        """A reader of every weight; `shapes` gives those of the model's matrices by name."""
        found: dict[str, Reader] = {}
        for name in self.checkpoint.tensors:
            module, _, last = name.rpartition(".")
            if name.endswith(self.mark) and self.is_quantized(name.removesuffix(self.mark)):
                module = name.removesuffix(self.mark)
                weight = f"{module}.weight"
                if weight not in shapes:
                    raise CheckpointError(
                        f"{self.checkpoint.root}: tensors do not fit config.json: not in the "
                        f"model: {name}"
                    )
                found[weight] = self.reader(module, shapes[weight])
            elif last in self.ignored:
                continue
            elif last in self.parts and self.is_quantized(module):
                continue
            else:
                found.setdefault(name, Plain(self.checkpoint, name))
        return found

    # For the formats. ------------------------------------------------------------------------

    def expect(self, name: str, shape: tuple[int, ...], dtypes: str) -> str:
        """The dtype of tensor `name`. Raises CheckpointError if it is not there or not so."""
        root, tensors = self.checkpoint.root, self.checkpoint.tensors
        if name not in tensors:
            raise CheckpointError(
                f"{root}: missing {name}, which the quantization of its module needs"
            )
        info = tensors[name]
        if info.shape != shape:
            raise CheckpointError(
                f"{root}: wrong shapes: {name} is {info.shape}, quantization_config and the "
                f"model's sizes say {shape}"
            )
        if info.dtype not in dtypes.split():
            raise CheckpointError(
                f"{root}: {name} has dtype {info.dtype}; in this format {dtypes} are supported"
            )
        return info.dtype

    def scale_dtype(self, name: str, narrow: bool = True) -> str:
        """The dtype that scales `name` are kept in, which must hold them exactly.

        float32 for float32; for bfloat16 too, unless `narrow`: the four-bit kernels want float16.
        """
        info = self.checkpoint.tensors.get(name)
        wide = ("F32",) if narrow else ("F32", "BF16")
        return "float32" if info and info.dtype in wide else "float16"

    def refuse(self, key: str, why: str) -> ConfigError:
        """The error for a field that is not supported as it is."""
        return ConfigError(
            f"{KEY}{key}: {self.config.get(key)!r} {why}. "
            "Use the model before its quantization, or another quantization of it."
        )

    def only(self, **neutral: tuple[Any, ...]) -> None:
        """Raise ConfigError for a field that is set and not one of the values that we support."""
        for key, values in neutral.items():
            if key in self.config and self.config[key] not in values:
                expected = " or ".join(map(repr, values))
                raise self.refuse(key, f"is not supported; only {expected} is")

    def known(self, *keys: str) -> None:
        """Raise ConfigError for a field not in `keys`, whose effect is unknown."""
        for key in self.config:
            if key not in keys:
                raise ConfigError(
                    f"{KEY}{key}: unknown field, so its effect on the weights is unknown. "
                    "Remove it if it has none."
                )


def is_head(module: str) -> bool:
    """Whether `module` is the embedding or the output matrix, which most formats leave plain."""
    return module.endswith(("lm_head", "embed_tokens"))


def matches(module: str, patterns: list[str]) -> bool:
    """Whether one of `patterns` is `module`, its last part, or a regular expression `re:` of it."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], module):
                return True
        elif module == pattern or module.endswith(f".{pattern}"):
            return True
    return False


def flip(codes: Array) -> Array:
    """Four-bit codes whose zero is 8 as codes whose zero is 7, of the negative number.

    -(c - 8) = (15 - c) - 7, so that with a negative scale the four-bit kernels read them.
    """
    flipped: Array = codes ^ np.uint8(15)
    return flipped


def refuse_nan(codes: Array, name: str) -> None:
    """Raise CheckpointError if e4m3 `codes` hold NaN."""
    if ((codes & 0x7F) == 0x7F).any():
        raise CheckpointError(f"{name}: holds NaN; the checkpoint is damaged")


def as_zero(codes: Array) -> Array:
    """Zero points as the scales are kept; float16 holds integers up to 2048 exactly."""
    halves: Array = codes.astype(np.float16)
    return halves
