# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""The residual sum and the root-mean-square norm of it, in one kernel, for GPUs."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx
from tvm.script import tirx as T

from .common import (
    SCHEDULED,
    extent,
    lanes_for,
    launch_dependents,
    max_threads_of,
    shuffle_xor,
    wait_for_inputs,
    warp_size_of,
)


def add_rms_norm(
    *, tokens: int | None, features: int, eps: float, dtype: str, target: Any
) -> tirx.PrimFunc:
    """`(x [n,E], y [n,E], weight [E]) -> (sum [n,E], normed [n,E])`, all of `dtype`.

    `sum` is x + y rounded to `dtype`, `normed` its norm (arXiv:1910.07467) with float32 statistics.
    """
    n = extent(tokens)
    warp = warp_size_of(target)
    lanes = lanes_for(features, 16 * 8 // tvm.DataType(dtype).bits)
    units = features // lanes
    # Warps of a block are a power of two, which the second step of the sum needs.
    threads = warp
    while threads < min(units, max_threads_of(target)):
        threads *= 2
    warps = threads // warp
    rounds = -(-units // threads)

    @T.inline
    def block_sum(value, scratch, tid):
        for s in T.unroll(warp.bit_length() - 1):
            value = value + shuffle_xor(value, T.shift_right(warp // 2, s), warp)
        if tid % warp == 0:
            scratch[tid // warp] = value
        T.tvm_storage_sync("shared")
        value = scratch[tid % warps]
        for s in T.unroll(warps.bit_length() - 1):
            value = value + shuffle_xor(value, T.shift_right(warps // 2, s), warp)

    @T.prim_func(s_tir=True)
    def add_rms_norm(
        x_h: T.handle, y_h: T.handle, weight_h: T.handle, sum_h: T.handle, normed_h: T.handle
    ):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (n, features), dtype)
        y = T.match_buffer(y_h, (n, features), dtype)
        weight = T.match_buffer(weight_h, (features,), dtype)
        total = T.match_buffer(sum_h, (n, features), dtype)
        normed = T.match_buffer(normed_h, (n, features), dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            # One block per token; a thread keeps what it read until the norm is known.
            for t in T.thread_binding(n, thread="blockIdx.x"):
                for tid in T.thread_binding(threads, thread="threadIdx.x"):
                    launch_dependents(target)
                    scratch = T.alloc_buffer((warps,), "float32", scope="shared")
                    kept = T.alloc_buffer((rounds * lanes,), dtype, scope="local")
                    other = T.alloc_buffer((rounds * lanes,), dtype, scope="local")
                    scale = T.alloc_buffer((rounds * lanes,), dtype, scope="local")
                    square: T.float32 = T.float32(0)
                    for i in T.unroll(rounds):
                        if i * threads + tid < units:
                            for e in T.vectorized(lanes):
                                scale[i * lanes + e] = weight[(i * threads + tid) * lanes + e]
                    wait_for_inputs(target)
                    for i in T.unroll(rounds):
                        if i * threads + tid < units:
                            for e in T.vectorized(lanes):
                                kept[i * lanes + e] = x[t, (i * threads + tid) * lanes + e]
                            for e in T.vectorized(lanes):
                                other[i * lanes + e] = y[t, (i * threads + tid) * lanes + e]
                    for i in T.unroll(rounds):
                        if i * threads + tid < units:
                            for e in T.unroll(lanes):
                                kept[i * lanes + e] = kept[i * lanes + e] + other[i * lanes + e]
                            for e in T.vectorized(lanes):
                                total[t, (i * threads + tid) * lanes + e] = kept[i * lanes + e]
                            for e in T.unroll(lanes):
                                square = square + T.cast(kept[i * lanes + e], "float32") * T.cast(
                                    kept[i * lanes + e], "float32"
                                )
                    block_sum(square, scratch, tid)
                    factor: T.let[T.float32] = T.rsqrt(
                        square / T.float32(features) + T.float32(eps)
                    )
                    for i in T.unroll(rounds):
                        if i * threads + tid < units:
                            for e in T.unroll(lanes):
                                other[i * lanes + e] = T.cast(
                                    factor
                                    * T.cast(kept[i * lanes + e], "float32")
                                    * T.cast(scale[i * lanes + e], "float32"),
                                    dtype,
                                )
                            for e in T.vectorized(lanes):
                                normed[t, (i * threads + tid) * lanes + e] = other[i * lanes + e]

    return add_rms_norm
