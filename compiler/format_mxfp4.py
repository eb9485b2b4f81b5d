"""MXFP4 checkpoints of GPT-OSS: experts in e2m1, 32 elements of a row to an e8m0 scale.

The experts' matrices are `NAME_blocks` uint8 [experts, out, in / 32, 16], two codes to a byte, the
first in the lower bits, and `NAME_scales` uint8 [experts, out, in / 32]: element = code * 2 **
(scale - 127). All else is plain.
https://huggingface.co/openai/gpt-oss-20b, https://github.com/openai/gpt-oss (README, "Precision
format"), https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from functools import partial
from typing import Any

from shardwright.compiler.checkpoint import Checkpoint
from shardwright.compiler.columns import Index, Quantized
from shardwright.compiler.formats import Format
from shardwright.compiler.packing import Packing, unpack
from shardwright.compiler.slicing import Parts, Reader, read_rows
from shardwright.errors import CheckpointError

GROUP = 32
LARGEST = 252
"""The largest scale whose products with all codes are float32 numbers; 255 would be NaN."""

_EXPERTS = ("gate_up_proj", "down_proj")


class _Mxfp4Reader:
    """The rows of all experts as a matrix."""

    quantized = True

    def __init__(self, checkpoint: Checkpoint, module: str, shape: tuple[int, ...]) -> None:
        self.shape, self._checkpoint, self._module = shape, checkpoint, module

    def read(self, index: Index) -> Parts:
        """See `Reader`."""
        groups = self.shape[1] // GROUP
        blocks, scales = (
            read_rows(partial(self._read, width), f"{self._module}_{part}", index)
            for part, width in (("blocks", groups * GROUP // 2), ("scales", groups))
        )
        codes = unpack(blocks.view("<u4"), 4)
        if scales.max(initial=0) > LARGEST:
            raise CheckpointError(
                f"{self._checkpoint.root}: {self._module}_scales: holds NaN, or a scale of "
                f"2^{int(scales.max()) - 127}; the checkpoint is damaged"
            )
        return codes, scales

    def _read(self, width: int, name: str, start: int, stop: int) -> Any:
        return self._checkpoint.read_bytes(name, start, stop, width)

    def release(self) -> None:
        """See `Reader`."""


class Mxfp4(Format):
    """`quant_method` mxfp4."""

    mark = "_blocks"

    def read_config(self) -> None:
        """See `Format`."""
        self.known("quant_method", "modules_to_not_convert", "dequantize")
        self.only(dequantize=(False, None))
        self.name = "mxfp4"

    def converts(self, module: str) -> bool:
        """See `Format`."""
        names = self.config.get("modules_to_not_convert") or []
        plain = any(fnmatch(module, name) or fnmatch(module, f"{name}.*") for name in names)
        return module.endswith(_EXPERTS) and ".experts." in module and not plain

    def quantized(
        self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], config: Any
    ) -> Quantized | None:
        """See `Format`; names of the checkpoint's experts are those of its modules."""
        if len(shape) != 2 or not self.is_quantized(name):
            return None
        return Quantized(Packing(4, GROUP, code="e2m1", scale_dtype="uint8"))

    def readers(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Reader]:
        """See `Format`."""
        found = super().readers({f"{name}.weight": shape for name, shape in shapes.items()})
        for name, reader in list(found.items()):
            if isinstance(reader, _Mxfp4Reader):
                found[name.removesuffix(".weight")] = found.pop(name)
            elif name.endswith("_scales") and self.is_quantized(name.removesuffix("_scales")):
                found.pop(name)
        return found

    def reader(self, module: str, shape: tuple[int, ...]) -> Reader:
        """See `Format`."""
        rows, columns = shape
        experts = int(self.checkpoint.config.get("num_local_experts") or 1)
        if columns % GROUP or rows % experts:
            raise CheckpointError(
                f"{self.checkpoint.root}: {module}_blocks: {experts} experts of {rows} rows in all "
                f"and {columns} columns have no blocks of {GROUP}; config.json does not fit"
            )
        outer = (experts, rows // experts, columns // GROUP)
        self.expect(f"{module}_blocks", (*outer, GROUP // 2), "U8")
        self.expect(f"{module}_scales", outer, "U8")
        return _Mxfp4Reader(self.checkpoint, module, shape)
