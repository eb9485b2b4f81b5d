# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""The sampler of `sampling.py` for CUDA GPUs with clusters: eight blocks share a row."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from .common import SCHEDULED, cuda_source, extent, launch_dependents

PARTS, THREADS = 8, 1024
"""Blocks of a row and threads of a block, as in `sample.cuh`."""


def sample(*, batch: int | None, vocab: int, max_len: int) -> tirx.PrimFunc:
    """`sampling.sample` for CUDA GPUs with clusters: the same arguments and tokens.

    The last two words of `sampling_i` are the address of the row's ring in an `Outbox` of the
    runtime, the lower half first, or 0: the token is written there too.
    Where weights differ by less than their rounding, top-p may cut one token earlier or later.
    """
    b = extent(batch, "b")
    name = f"shardwright::sampler::sample<{vocab}, {max_len}>"
    source = cuda_source("sample.cuh")

    @T.prim_func(s_tir=True)
    def sample_rows(
        logits_h: T.handle,
        scores_h: T.handle,
        tokens_h: T.handle,
        positions_h: T.handle,
        history_h: T.handle,
        sampling_f_h: T.handle,
        sampling_i_h: T.handle,
        eos_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        logits = T.match_buffer(logits_h, (b, vocab), "float32")
        scores = T.match_buffer(scores_h, (b, vocab), "float32")
        tokens = T.match_buffer(tokens_h, (b,), "int32")
        positions = T.match_buffer(positions_h, (b,), "int32")
        history = T.match_buffer(history_h, (b, max_len), "int32")
        sampling_f = T.match_buffer(sampling_f_h, (b, 4), "float32")
        sampling_i = T.match_buffer(sampling_i_h, (b, 8), "int32")
        eos = T.match_buffer(eos_h, (b, 16), "int32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for row in T.thread_binding(b, thread="blockIdx.y"):
                for part in T.thread_binding(PARTS, thread="blockIdx.x"):
                    for _ in T.thread_binding(PARTS, thread="clusterCtaIdx.x"):
                        for tid in T.thread_binding(THREADS, thread="threadIdx.x"):
                            launch_dependents("cuda")
                            T.evaluate(
                                T.cuda.func_call(
                                    name,
                                    logits.data,
                                    scores.data,
                                    tokens.data,
                                    positions.data,
                                    history.data,
                                    sampling_f.data,
                                    sampling_i.data,
                                    eos.data,
                                    T.cast(row, "int32"),
                                    part,
                                    tid,
                                    source_code=source,
                                )
                            )

    return sample_rows
