# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Products of many tokens with gates and ups in fp16, and SiLU, on Hopper's tensor cores.

A library's product would write gates and ups to memory, for another kernel to read them there. Here
a block multiplies 128 tokens and the gates and ups of 128 features, `wgmma` taking 64 tokens and
256 rows of the weight from shared memory at a time, and writes `silu(gate) * up`. Tiles come
through tensor maps; that of the weight alternates between 8 gates and 8 ups, so that a thread has
both of a feature. Blocks go from tile to tile, and have the next one's first columns brought while
they write.

PTX for later GPUs has no `wgmma`; there `mma` multiplies.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from .common import SCHEDULED, cuda_source, launch_dependents
from .gemv_mma import PROCESSORS

TILE = 128
"""Features of a block; their number must be a multiple."""
COLUMNS = 64
"""K must be a multiple."""
MIN_FEATURES = PROCESSORS // 3 * TILE
"""With fewer, short prompts leave most multiprocessors idle; a library has smaller tiles."""
_TOKENS = 128
_THREADS = 384  # two warpgroups that multiply, one that loads
# Four stages of 64 columns, results, and what alignment and barriers need.
_SHARED_BYTES = 4 * (_TOKENS + 2 * TILE) * COLUMNS * 2 + _TOKENS * TILE * 2 + 1024 + 64


def gated_gemm(*, features: int, inner: int) -> tirx.PrimFunc:
    """`(x [n,K], w [2F,K]) -> silu(y[:, :F]) * y[:, F:] [n,F]` of y = x @ w.T, all f16, for any n.

    Sums are float32, y is rounded to fp16. F is a multiple of `TILE`, K of `COLUMNS`.
    """
    name = "shardwright::gated_gemm::product"
    text = cuda_source("gated_gemm.cuh")
    row, n = 2 * inner, tirx.Var("n", "int64")
    # Of cuTensorMapEncodeTiled: rows of 128 bytes swizzled, 256 bytes at a time into the L2 cache.
    options = {"descriptor_dtype": "float16", "swizzle": 3, "l2_promotion": 3}

    @T.prim_func(s_tir=True)
    def gated_gemm(x_h: T.handle, w_h: T.handle, out_h: T.handle):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (n, inner), "float16")
        w = T.match_buffer(w_h, (2 * features, inner), "float16")
        out = T.match_buffer(out_h, (n, features), "float16")
        # Lengths, bytes from one to the next but for the first, the tile, and steps in it.
        x_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(
            T.tensormap_encode_tiled(
                x_map, x.data, inner, n, row, COLUMNS, _TOKENS, 1, 1, rank=2, **options
            )
        )
        # Columns, 8 rows, gates or ups, and the next 8 rows.
        w_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(
            T.tensormap_encode_tiled(
                *(w_map, w.data, inner, 8, 2, features // 8, row, features * row, 8 * row),
                *(COLUMNS, 8, 2, TILE // 16, 1, 1, 1, 1),
                rank=4,
                **options,
            )
        )
        with T.sblock("root"):
            T.reads()
            T.writes()
            for block in T.thread_binding(PROCESSORS, thread="blockIdx.x"):
                for _cluster in T.thread_binding(2, thread="clusterCtaIdx.x"):
                    for _tid in T.thread_binding(_THREADS, thread="threadIdx.x"):
                        launch_dependents("cuda")
                        # CUDA code knows it by this name and one type in all kernels of a library.
                        gated_gemm_shared = T.alloc_buffer(
                            (_SHARED_BYTES,), "uint8", scope="shared.dyn"
                        )
                        T.evaluate(
                            T.cuda.func_call(
                                name,
                                T.address_of(x_map),
                                T.address_of(w_map),
                                out.data,
                                T.cast(n, "int32"),
                                features,
                                inner,
                                gated_gemm_shared.data,
                                T.cast(block, "int32"),
                                PROCESSORS,
                                source_code=text,
                            )
                        )

    return gated_gemm
