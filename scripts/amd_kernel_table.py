"""Bytes, instructions and occupancy of the main AMD kernels, from compiled code, without a GPU.

python scripts/amd_kernel_table.py [ARCH ...]

Bytes are those of the operands of one call, read or written once. Shapes: a layer of Llama-3-8B on
one GPU, one token (decode) or 512 (prefill).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import tvm

from shardwright.compiler import rocm
from shardwright.compiler.kernels import attention_gpu, gemv_rocm, matmul_rocm, norm
from shardwright.runtime.code_object import CodeObject, KernelCode, code_objects, occupancy

EMBED, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 4096, 14336, 32, 8, 128, 1024
TOKENS = 512


def cases(target: str) -> dict[str, tuple[Any, int]]:
    """Name, kernel and bytes of its operands."""
    q4 = dict(batch=1, group=32, out_dtype="float16", target=target)
    wide = dict(tokens=TOKENS, out_dtype="float16", target=target)
    cache = dict(layers=32, pages=512, page_size=16, batch=None, max_pages=256)
    heads = dict(heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, scale=0.088, dtype="float16")
    splits = attention_gpu.num_splits(tokens=1, kv_heads=KV_HEADS, max_len=4096)

    def weight(out: int, inner: int, bits: float) -> int:
        return int(out * inner * bits / 8)

    partial = attention_gpu.attention_partial(
        tokens=1, splits=splits, target=target, **cache, **heads
    )
    return {
        "q4_gemv 28672 x 4096, gated": (
            gemv_rocm.q4_gemv(out_features=2 * HIDDEN, in_features=EMBED, gated=True, **q4),
            weight(2 * HIDDEN, EMBED, 4.5) + 2 * (EMBED + HIDDEN),
        ),
        "q4_gemv 4096 x 14336": (
            gemv_rocm.q4_gemv(out_features=EMBED, in_features=HIDDEN, **q4),
            weight(EMBED, HIDDEN, 4.5) + 2 * (EMBED + HIDDEN),
        ),
        "gemv 6144 x 4096": (
            gemv_rocm.gemv(
                batch=1, out_features=6144, in_features=EMBED, out_dtype="float16", target=target
            ),
            weight(6144, EMBED, 16) + 2 * (EMBED + 6144),
        ),
        f"attention_partial, {CONTEXT} tokens": (
            partial,
            2 * CONTEXT * KV_HEADS * HEAD_DIM * 2 + (2 + 4 * splits) * HEADS * HEAD_DIM,
        ),
        "add_rms_norm": (
            norm.add_rms_norm(tokens=1, features=EMBED, eps=1e-5, dtype="float16", target=target),
            5 * 2 * EMBED,
        ),
        f"matmul 28672 x 4096, {TOKENS} tokens": (
            matmul_rocm.matmul_rocm(out_features=2 * HIDDEN, in_features=EMBED, **wide),
            weight(2 * HIDDEN, EMBED, 16) + 2 * TOKENS * (EMBED + 2 * HIDDEN),
        ),
    }


def compiled(func: Any, arch: str) -> tuple[CodeObject, KernelCode]:
    """The code of one kernel, checked, and what was counted in it."""
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    with (
        tempfile.TemporaryDirectory() as directory,
        tvm.transform.PassContext(config=rocm.PASS_CONFIG),
        rocm.without_device_warnings(),
    ):
        built = tvm.compile(mod, target=rocm.rocm_target(arch))
        library = Path(directory) / "kernel.so"
        built.export_library(str(library))
        found = code_objects(library)
        (code,) = rocm.check_modules(built.mod, found)
        return found[0], code


def main() -> None:
    """Print a Markdown table for each architecture."""
    rocm.install_hooks(rocm.ABIS[0])
    columns = ("kernel", "MB", "instructions", "16-byte loads", "loads", "matrix", "VGPRs", "LDS")
    for arch in sys.argv[1:] or ("gfx1100", "gfx90a", "gfx942"):
        print(f"\n{arch}\n\n| {' | '.join((*columns, 'waves a SIMD'))} |")
        print("|---|" + "---:|" * len(columns))
        for name, (func, size) in cases(f"rocm:{arch}").items():
            found, code = compiled(func, arch)
            (kernel,) = found.kernels
            values = (
                *(f"{size / 1e6:.2f}", code.instructions, code.wide_loads, code.loads),
                *(code.matrix, kernel.vgprs, kernel.shared_bytes, occupancy(arch, kernel)),
            )
            print(f"| {name} | {' | '.join(map(str, values))} |")


if __name__ == "__main__":
    main()
