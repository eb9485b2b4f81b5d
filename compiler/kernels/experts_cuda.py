# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Products with chosen experts in four bits on CUDA's tensor cores, in experts.cuh.

The kernels take what those of `experts.py` of the same names take. A warp copies chunks of 16 rows
to shared memory of its own, several ahead, and multiplies them with one column of activations; the
warps of a block share the columns. Of many tokens a block takes 64 rows and 64 slots of an expert.
Codes are multiplied as they are, and sums of 32 columns scaled in float32: nothing is rounded.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from shardwright.compiler.packing import Packing

from .common import SCHEDULED, cuda_source, extent, launch_dependents
from .experts import Buffer

OLDEST_ARCH = 80
WARPS_UP, WARPS_DOWN = 4, 8
_TILE, _STAGES, _CHUNK = 16, 4, 128
_ROWS, _SLOTS, _DEPTH = 64, 64, 3  # of a block with many tokens


def supported(*, packing: Packing | None, dtype: str, target: Any, arch: int) -> bool:
    """Whether there are kernels for experts in a format: q4f16 or MXFP4, groups of 32 or more."""
    if packing is None or target != "cuda" or arch < OLDEST_ARCH or dtype != "float16":
        return False
    return packing.group % 32 == 0 and (packing.code == "e2m1" or packing.is_q4(dtype))


def format_of(packing: Packing, cols: int) -> str:
    """The template `Format` of experts.cuh."""
    mx = "true" if packing.code == "e2m1" else "false"
    return f"shardwright_experts::Format<{cols}, {packing.group}, {mx}>"


def shared_bytes(mats: int, warps: int) -> int:
    """Bytes of shared memory of a block of few tokens."""
    return warps * _STAGES * (mats * _TILE * 64 + _CHUNK * 2) + mats * warps * _TILE * 4


def _name(
    kind: str | int, rows: int, experts: int, top: int, cols: int, packing: Packing, flags: str
) -> str:
    """Of the device function: another for each that differs, since a name is emitted once."""
    sizes = f"{rows}_{experts}_{top}_{cols}_{packing.group}_{packing.code}"
    return f"shardwright_experts_{kind}_{sizes}{flags}"


def _source(call: str, parameters: str, body: str) -> str:
    return (
        cuda_source("gemv_mma.cuh", "experts.cuh")
        + f"__device__ __forceinline__ void {call}({parameters}) {{\n  {body}\n}}\n"
    )


def _buffers(experts: int, rows: int, cols: int, packing: Packing, biased: bool) -> list[Buffer]:
    """Shapes and dtypes of words, scales and biases."""
    bias: Buffer = ((experts * rows, 1), "float32") if biased else ((1,), "int32")
    side = ((experts * rows, cols // packing.group), packing.scale_dtype)
    return [((experts * rows, cols // 8), "uint32"), side, bias]


_UP = (
    "const half* x, const void* w, const void* w_scale, const void* w_bias, const void* up, "
    "const void* up_scale, const void* up_bias"
)
_TWO = "{{(const unsigned*)w, (const unsigned*)up}, {w_scale, up_scale}}"
_ONE = "{{(const unsigned*)w}, {w_scale}}"
_BIASES = "(const float*)w_bias, (const float*)up_bias"


def experts_up(
    *,
    tokens: int,
    top: int,
    experts: int,
    rows: int,
    cols: int,
    packing: Packing,
    dtype: str,
    target: Any,
    biased: bool = False,
    alpha: float = 0.0,
    limit: float = 0.0,
) -> tirx.PrimFunc:
    """As `experts.experts_up`, for few tokens."""
    words, scales, bias = _buffers(experts, rows, cols, packing, biased)
    sizes = [format_of(packing, cols), rows, experts, top, WARPS_UP, str(biased).lower()]
    name = _name("up", rows, experts, top, cols, packing, "_biased" if biased else "")
    source = _source(
        name,
        f"{_UP}, const int* ids, const int* rank, half* h, float alpha, float limit, "
        "void* shared, int tile, int slot",
        f"shardwright_experts::up<{', '.join(map(str, sizes))}>(x, {_TWO}, {_BIASES}, ids, rank, "
        "h, alpha, limit, (char*)shared, tile, slot);",
    )
    shared = shared_bytes(2, WARPS_UP)

    @T.prim_func(s_tir=True)
    def experts_up(
        x_h: T.handle,
        gate_h: T.handle,
        gate_scale_h: T.handle,
        gate_zero_h: T.handle,
        up_h: T.handle,
        up_scale_h: T.handle,
        up_zero_h: T.handle,
        gate_bias_h: T.handle,
        up_bias_h: T.handle,
        ids_h: T.handle,
        rank_h: T.handle,
        h_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (tokens, cols), "float16")
        gate = T.match_buffer(gate_h, *words)
        gate_scale = T.match_buffer(gate_scale_h, *scales)
        _gate_zero = T.match_buffer(gate_zero_h, *scales)
        up = T.match_buffer(up_h, *words)
        up_scale = T.match_buffer(up_scale_h, *scales)
        _up_zero = T.match_buffer(up_zero_h, *scales)
        gate_bias = T.match_buffer(gate_bias_h, *bias)
        up_bias = T.match_buffer(up_bias_h, *bias)
        ids = T.match_buffer(ids_h, (tokens, top), "int32")
        rank = T.match_buffer(rank_h, (1,), "int32")
        h = T.match_buffer(h_h, (tokens * top, rows), "float16")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for block in T.thread_binding((rows + _TILE - 1) // _TILE, thread="blockIdx.x"):
                for slot in T.thread_binding(tokens * top, thread="blockIdx.y"):
                    for _tid in T.thread_binding(WARPS_UP * 32, thread="threadIdx.x"):
                        launch_dependents("cuda")
                        experts_shared = T.alloc_buffer((shared,), "uint8", scope="shared.dyn")
                        T.evaluate(
                            T.cuda.func_call(
                                name,
                                x.data,
                                gate.data,
                                gate_scale.data,
                                gate_bias.data,
                                up.data,
                                up_scale.data,
                                up_bias.data,
                                ids.data,
                                rank.data,
                                h.data,
                                T.float32(alpha),
                                T.float32(limit),
                                experts_shared.data,
                                block,
                                slot,
                                source_code=source,
                            )
                        )

    return experts_up


def experts_down(
    *,
    tokens: int,
    top: int,
    experts: int,
    rows: int,
    cols: int,
    packing: Packing,
    dtype: str,
    target: Any,
    biased: bool = False,
    split: bool = False,
) -> tirx.PrimFunc:
    """As `experts.experts_down`, for few tokens."""
    words, scales, biases = _buffers(experts, rows, cols, packing, biased)
    flags = [str(biased).lower(), str(split).lower()]
    sizes = [format_of(packing, cols), rows, experts, top, WARPS_DOWN, *flags]
    name = _name("down", rows, experts, top, cols, packing, "_".join(["", *flags]))
    source = _source(
        name,
        "const half* h, const void* w, const void* w_scale, const void* bias, const int* ids, "
        "const float* shares, const int* rank, half* out, void* shared, int tile, int token",
        f"shardwright_experts::down<{', '.join(map(str, sizes))}>(h, {_ONE}, (const float*)bias, "
        "ids, shares, rank, out, (char*)shared, tile, token);",
    )
    shared = shared_bytes(1, WARPS_DOWN)

    @T.prim_func(s_tir=True)
    def experts_down(
        h_h: T.handle,
        down_h: T.handle,
        down_scale_h: T.handle,
        down_zero_h: T.handle,
        bias_h: T.handle,
        ids_h: T.handle,
        weights_h: T.handle,
        rank_h: T.handle,
        out_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        h = T.match_buffer(h_h, (tokens * top, cols), "float16")
        down = T.match_buffer(down_h, *words)
        down_scale = T.match_buffer(down_scale_h, *scales)
        _down_zero = T.match_buffer(down_zero_h, *scales)
        bias = T.match_buffer(bias_h, *biases)
        ids = T.match_buffer(ids_h, (tokens, top), "int32")
        weights = T.match_buffer(weights_h, (tokens, top), "float32")
        rank = T.match_buffer(rank_h, (1,), "int32")
        out = T.match_buffer(out_h, (tokens, rows), "float16")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for block in T.thread_binding((rows + _TILE - 1) // _TILE, thread="blockIdx.x"):
                for t in T.thread_binding(tokens, thread="blockIdx.y"):
                    for _tid in T.thread_binding(WARPS_DOWN * 32, thread="threadIdx.x"):
                        launch_dependents("cuda")
                        experts_shared = T.alloc_buffer((shared,), "uint8", scope="shared.dyn")
                        T.evaluate(
                            T.cuda.func_call(
                                name,
                                h.data,
                                down.data,
                                down_scale.data,
                                bias.data,
                                ids.data,
                                weights.data,
                                rank.data,
                                out.data,
                                experts_shared.data,
                                block,
                                t,
                                source_code=source,
                            )
                        )

    return experts_down


def experts_grouped(
    *,
    tokens: int | None,
    top: int,
    experts: int,
    rows: int,
    cols: int,
    packing: Packing,
    dtype: str,
    gated: bool,
    target: Any,
    biased: bool = False,
    alpha: float = 0.0,
    limit: float = 0.0,
) -> tirx.PrimFunc:
    """As `experts.experts_grouped`, for many tokens."""
    slots = extent(tokens and tokens * top, "slots")
    x_rows = extent(tokens) if gated else slots
    words, scales, bias = _buffers(experts, rows, cols, packing, biased)
    mats = 2 if gated else 1
    sizes = [format_of(packing, cols), mats, rows, top, str(biased).lower()]
    name = _name(mats, rows, experts, top, cols, packing, "_biased" if biased else "")
    source = _source(
        name,
        f"{_UP}, const int* order, const int* begin, half* y, float alpha, float limit, "
        "void* shared, int expert, int tile",
        f"shardwright_experts::many<{', '.join(map(str, sizes))}>(x, {_TWO if gated else _ONE}, "
        f"{_BIASES}, order, begin, y, alpha, limit, (char*)shared, expert, tile);",
    )
    shared = _DEPTH * (mats * _ROWS * 64 + _SLOTS * _CHUNK * 2)

    @T.prim_func(s_tir=True)
    def experts_grouped(
        x_h: T.handle,
        w_h: T.handle,
        w_scale_h: T.handle,
        w_zero_h: T.handle,
        up_h: T.handle,
        up_scale_h: T.handle,
        up_zero_h: T.handle,
        w_bias_h: T.handle,
        up_bias_h: T.handle,
        order_h: T.handle,
        begin_h: T.handle,
        y_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (x_rows, cols), "float16")
        w = T.match_buffer(w_h, *words)
        w_scale = T.match_buffer(w_scale_h, *scales)
        _w_zero = T.match_buffer(w_zero_h, *scales)
        up = T.match_buffer(up_h, *words)
        up_scale = T.match_buffer(up_scale_h, *scales)
        _up_zero = T.match_buffer(up_zero_h, *scales)
        w_bias = T.match_buffer(w_bias_h, *bias)
        up_bias = T.match_buffer(up_bias_h, *bias)
        order = T.match_buffer(order_h, (slots,), "int32")
        begin = T.match_buffer(begin_h, (experts + 1,), "int32")
        y = T.match_buffer(y_h, (slots, rows), "float16")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for e in T.thread_binding(experts, thread="blockIdx.y"):
                for block in T.thread_binding((rows + _ROWS - 1) // _ROWS, thread="blockIdx.x"):
                    for _tid in T.thread_binding(128, thread="threadIdx.x"):
                        experts_shared = T.alloc_buffer((shared,), "uint8", scope="shared.dyn")
                        T.evaluate(
                            T.cuda.func_call(
                                name,
                                x.data,
                                w.data,
                                w_scale.data,
                                w_bias.data,
                                up.data,
                                up_scale.data,
                                up_bias.data,
                                order.data,
                                begin.data,
                                y.data,
                                T.float32(alpha),
                                T.float32(limit),
                                experts_shared.data,
                                e,
                                block,
                                source_code=source,
                            )
                        )

    return experts_grouped
