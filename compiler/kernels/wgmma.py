"""Calls of Hopper's `wgmma`, for `wgmma.cuh`: PTX names each of the registers of a result."""

from __future__ import annotations


def specializations() -> str:
    """The CUDA text of the templates `wgmma` for every width that kernels use."""
    registers = (*range(8, 72, 8), 128, 256)
    return "".join(
        (
            *(_specialization(width) for width in (64, 128, 256)),
            *(_specialization(width, across=False) for width in registers),
            *(_specialization(width, across=True) for width in (16, 32, 64, 128)),
        )
    )


def _specialization(width: int, across: bool | None = None) -> str:
    """One of them, where `across` is None with both operands in shared memory."""
    if across is None:
        template, a, operands, flags = f"{width}", "uint64_t a", ['"l"(a)'], "0, 0"
    else:
        template, a, flags = f"{width}, {str(across).lower()}", "const unsigned* a", f"{across:d}"
        operands = [f'"r"(a[{i}])' for i in range(4)]
    sums = width // 2
    names = [f"%{i}" for i in range(sums + len(operands) + 2)]
    results, factor, (b, add) = names[:sums], names[sums:-2], names[-2:]
    braced = f"{{{','.join(factor)}}}" if len(factor) > 1 else factor[0]
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(sums))
    return (
        f"template <>\n__device__ __forceinline__ void wgmma<{template}>"
        f"(float* d, {a}, uint64_t b, int add) {{\n"
        f'  asm volatile("{{ .reg .pred p; setp.ne.b32 p, {add}, 0; "\n'
        f'    "wgmma.mma_async.sync.aligned.m64n{width}k16.f32.f16.f16 "\n'
        f'    "{{{",".join(results)}}}, {braced}, {b}, p, 1, 1, {flags}; }}"\n'
        f'    : {outputs}\n    : {", ".join(operands)}, "l"(b), "r"(add));\n}}\n'
    )
