# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""`silu(gate) * up` of many tokens, for GPUs; for few, the product's own kernel does it."""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.script import tirx as T

from .common import SCHEDULED, extent, lanes_for
from .common import silu_mul as _silu_mul


def silu_mul(*, tokens: int | None, features: int, dtype: str) -> tirx.PrimFunc:
    """`y [n,2F] -> silu(y[:, :F]) * y[:, F:] [n,F]`, computed in float32, rounded once."""
    n = extent(tokens)
    lanes = lanes_for(features, 16 * 8 // tvm.DataType(dtype).bits)
    units, threads = features // lanes, 256

    @T.prim_func(s_tir=True)
    def silu_mul(y_h: T.handle, out_h: T.handle):
        T.func_attr(SCHEDULED)
        y = T.match_buffer(y_h, (n, 2 * features), dtype)
        out = T.match_buffer(out_h, (n, features), dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            for block in T.thread_binding(T.ceildiv(n * units, threads), thread="blockIdx.x"):
                for tid in T.thread_binding(threads, thread="threadIdx.x"):
                    gate = T.alloc_buffer((lanes,), dtype, scope="local")
                    up = T.alloc_buffer((lanes,), dtype, scope="local")
                    at: T.let[T.int64] = T.cast(block, "int64") * threads + tid
                    t: T.let[T.int64] = at // units
                    first: T.let[T.int64] = at % units * lanes
                    if t < n:
                        for e in T.vectorized(lanes):
                            gate[e] = y[t, first + e]
                        for e in T.vectorized(lanes):
                            up[e] = y[t, features + first + e]
                        for e in T.unroll(lanes):
                            gate[e] = _silu_mul(gate[e], up[e], dtype)
                        for e in T.vectorized(lanes):
                            out[t, first + e] = gate[e]

    return silu_mul
