# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""What goes over peer memory on CUDA GPUs: all-reduces of few tokens, and logits; see `peer.cuh`.

Every rank pushes into buffers of the other ranks, and adds what it has received in rank order, so
that all ranks get the same bits. A row is cut into parts, a thread block each. The blocks of a row
are a cluster, which sums the squares for a norm in distributed shared memory; GPUs without clusters
(before sm_90) have one part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from .common import SCHEDULED, cuda_source, launch_dependents
from .q4_gemm import image_rows

MAX_PARTS = 8  # the largest cluster that every GPU with clusters can launch
TWO_SHOTS_FROM = 320 * 1024  # bytes that a rank would push in one shot; see docs/performance.md


# Sizes come as macros; `peers` holds the address of each rank's buffer [2, ranks, rows, features]
# of 4 bytes, as this process sees it, and last the address of a word that says "give up".
@dataclass(frozen=True)
class Plan:
    """How an all-reduce is done: blocks of a row, threads of a block, one shot or two."""

    parts: int
    threads: int
    two_shots: bool


def plan(*, tokens: int, features: int, ranks: int, clusters: bool) -> Plan:
    """The plan for `tokens` rows of `features` elements on GPUs that have `clusters` or not."""
    units = features // 4
    parts = 1
    while clusters and parts < MAX_PARTS and units // parts > 128:
        parts *= 2
    threads = 128 if units <= 256 * parts else 256 if clusters else 1024
    pushed = tokens * features * 2 * (ranks - 1)
    # Between two ranks both ways push the same, and one shot is sooner there.
    return Plan(parts, threads, ranks > 2 and pushed >= TWO_SHOTS_FROM)


def many_bytes(*, ranks: int, rows: int, features: int, two_shots: bool | None = None) -> int:
    """Bytes of each rank's buffer for all-reduces of up to `rows` rows; see `peer_many.cuh`."""
    two = ranks > 2 if two_shots is None else two_shots
    owned = -(-rows // ranks) if two else rows
    half = (ranks - 1) * owned + (rows if two else 0)
    return 2 * half * features * 2 + 2 * rows * (ranks + 1) * 4


def _call(name: str, *args: Any) -> Any:
    return T.cuda.func_call(name, *args, source_code=cuda_source("peer.cuh"))


def _name(fused: bool, ranks: int, rows: int, features: int, p: Plan) -> str:
    sizes = map(str, (ranks, rows, features, p.threads, p.parts))
    flags = [str(flag).lower() for flag in (p.two_shots, fused)]
    return f"shardwright::peer::all_reduce<{', '.join((*sizes, *flags))}>"


def all_reduce(
    *, tokens: int, features: int, ranks: int, rows: int, clusters: bool, tuned: Plan | None = None
) -> tirx.PrimFunc:
    """`(x [n,E] f16, peers [ranks+1] i64, calls [rows] i32, rank [1] i32) -> sum [n,E]`.

    n is at most `rows`, E a multiple of 8. `calls` counts the calls of each row, in place; `peers`
    and `rank` never change. `tuned` replaces the plan that the sizes suggest.
    """
    p = tuned or plan(tokens=tokens, features=features, ranks=ranks, clusters=clusters)
    name = _name(False, ranks, rows, features, p)

    @T.prim_func(s_tir=True)
    def all_reduce(
        x_h: T.handle, peers_h: T.handle, calls_h: T.handle, rank_h: T.handle, sum_h: T.handle
    ):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (tokens, features), "float16")
        peers = T.match_buffer(peers_h, (ranks + 1,), "int64")
        calls = T.match_buffer(calls_h, (rows,), "int32")
        rank = T.match_buffer(rank_h, (1,), "int32")
        total = T.match_buffer(sum_h, (tokens, features), "float16")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for row in T.thread_binding(tokens, thread="blockIdx.y"):
                for part in T.thread_binding(p.parts, thread="blockIdx.x"):
                    for _ in T.thread_binding(p.parts, thread="clusterCtaIdx.x"):
                        for tid in T.thread_binding(p.threads, thread="threadIdx.x"):
                            launch_dependents("cuda")
                            T.evaluate(
                                _call(
                                    name,
                                    x.data,
                                    x.data,
                                    x.data,
                                    peers.data,
                                    calls.data,
                                    rank.data,
                                    total.data,
                                    total.data,
                                    T.float32(0),
                                    row,
                                    part,
                                    tid,
                                )
                            )

    return all_reduce


def all_reduce_add_rms_norm(
    *,
    tokens: int,
    features: int,
    ranks: int,
    rows: int,
    eps: float,
    clusters: bool,
    tuned: Plan | None = None,
) -> tirx.PrimFunc:
    """All-reduce of x, plus the residual, and the RMS norm of that.

    `(residual [n,E] f16, x [n,E] f16, weight [E] f16, peers, calls, rank) -> (sum [n,E], normed
    [n,E])`, the other arguments as for `all_reduce`. The reduced value is rounded to float16 before
    the residual is added, and the sum before the norm, as separate kernels would.
    """
    p = tuned or plan(tokens=tokens, features=features, ranks=ranks, clusters=clusters)
    name = _name(True, ranks, rows, features, p)

    @T.prim_func(s_tir=True)
    def all_reduce_add_rms_norm(
        residual_h: T.handle,
        x_h: T.handle,
        weight_h: T.handle,
        peers_h: T.handle,
        calls_h: T.handle,
        rank_h: T.handle,
        sum_h: T.handle,
        normed_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        residual = T.match_buffer(residual_h, (tokens, features), "float16")
        x = T.match_buffer(x_h, (tokens, features), "float16")
        weight = T.match_buffer(weight_h, (features,), "float16")
        peers = T.match_buffer(peers_h, (ranks + 1,), "int64")
        calls = T.match_buffer(calls_h, (rows,), "int32")
        rank = T.match_buffer(rank_h, (1,), "int32")
        total = T.match_buffer(sum_h, (tokens, features), "float16")
        normed = T.match_buffer(normed_h, (tokens, features), "float16")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for row in T.thread_binding(tokens, thread="blockIdx.y"):
                for part in T.thread_binding(p.parts, thread="blockIdx.x"):
                    for _ in T.thread_binding(p.parts, thread="clusterCtaIdx.x"):
                        for tid in T.thread_binding(p.threads, thread="threadIdx.x"):
                            launch_dependents("cuda")
                            T.evaluate(
                                _call(
                                    name,
                                    x.data,
                                    residual.data,
                                    weight.data,
                                    peers.data,
                                    calls.data,
                                    rank.data,
                                    total.data,
                                    normed.data,
                                    T.float32(eps),
                                    row,
                                    part,
                                    tid,
                                )
                            )

    return all_reduce_add_rms_norm


def gather_logits(
    *, tokens: int, local: int, vocab: int, ranks: int, rows: int, first: int
) -> tirx.PrimFunc:
    """`(new [n,L] f32, last [n] i32, peers [ranks+1] i64, calls [rows] i32, rank [1] i32, logits
    [n,V] f32)`: `logits[i] = new[i] of all ranks, in rank order`, in place, where `last[i] >= 0`.

    n is at most `rows`, L even, V at most L * ranks: what is beyond it is padding. `first` is the
    word of the peer buffer where [rows, ranks, L] pairs of a logit and a flag begin.
    """
    name = f"shardwright::peer::gather_logits<{ranks}, {local}, {vocab}, {first}>"
    threads = 256

    @T.prim_func(s_tir=True)
    def gather_logits(
        new_h: T.handle,
        last_h: T.handle,
        peers_h: T.handle,
        calls_h: T.handle,
        rank_h: T.handle,
        logits_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        new = T.match_buffer(new_h, (tokens, local), "float32")
        last = T.match_buffer(last_h, (tokens,), "int32")
        peers = T.match_buffer(peers_h, (ranks + 1,), "int64")
        calls = T.match_buffer(calls_h, (rows,), "int32")
        rank = T.match_buffer(rank_h, (1,), "int32")
        logits = T.match_buffer(logits_h, (tokens, vocab), "float32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for row in T.thread_binding(tokens, thread="blockIdx.y"):
                for block in T.thread_binding(-(-local // (2 * threads)), thread="blockIdx.x"):
                    for tid in T.thread_binding(threads, thread="threadIdx.x"):
                        launch_dependents("cuda")
                        T.evaluate(
                            _call(
                                name,
                                new.data,
                                last.data,
                                peers.data,
                                calls.data,
                                rank.data,
                                logits.data,
                                row,
                                (block * threads + tid) * 2,
                            )
                        )

    return gather_logits


@dataclass(frozen=True)
class _Many:
    """The device function for all-reduces of up to `rows` rows, and the threads of its blocks."""

    norm: str
    ranks: int
    rows: int
    features: int
    first: int

    @property
    def threads(self) -> int:
        if self.norm == "kImage":
            return self.features // 32
        return min(256, max(64, self.features // 8 // 32 * 32))

    def call(self, *args: Any) -> Any:
        """Its call in a kernel."""
        sizes = (self.ranks, self.rows, self.features, self.threads, str(self.ranks > 2).lower())
        values = ", ".join(map(str, (*sizes, f"shardwright::peer::{self.norm}", self.first)))
        return T.cuda.func_call(
            f"shardwright::peer::all_reduce_many<{values}>",
            *args,
            source_code=cuda_source("peer.cuh", "q4_image.cuh", "peer_many.cuh"),
        )


def all_reduce_many(*, features: int, ranks: int, rows: int, first: int) -> tirx.PrimFunc:
    """`(x [n,E] f16, peers [ranks+1] i64, calls [rows] i32, rank [1] i32) -> sum [n,E]`.

    For any n up to `rows`, E a multiple of 8. Arguments as for `all_reduce`; what is exchanged
    begins `first` bytes into the buffers, at a multiple of 16.
    """
    many = _Many("kNone", ranks, rows, features, first)
    threads = many.threads
    n = tirx.Var("n", "int64")

    @T.prim_func(s_tir=True)
    def all_reduce_many(
        x_h: T.handle, peers_h: T.handle, calls_h: T.handle, rank_h: T.handle, sum_h: T.handle
    ):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (n, features), "float16")
        peers = T.match_buffer(peers_h, (ranks + 1,), "int64")
        calls = T.match_buffer(calls_h, (rows,), "int32")
        rank = T.match_buffer(rank_h, (1,), "int32")
        total = T.match_buffer(sum_h, (n, features), "float16")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for row in T.thread_binding(n, thread="blockIdx.x"):
                for tid in T.thread_binding(threads, thread="threadIdx.x"):
                    T.evaluate(
                        many.call(
                            x.data,
                            x.data,
                            x.data,
                            peers.data,
                            calls.data,
                            rank.data,
                            total.data,
                            total.data,
                            T.float32(0),
                            T.cast(n, "int32"),
                            T.cast(row, "int32"),
                            tid,
                        )
                    )

    return all_reduce_many


def all_reduce_many_add_rms_norm(
    *, features: int, ranks: int, rows: int, first: int, eps: float, image: bool = False
) -> tirx.PrimFunc:
    """As `all_reduce_add_rms_norm`, for any number of rows up to `rows`; see `all_reduce_many`.

    With `image` the norm is written as `q4_gemm.add_rms_norm_image` writes it, for the same E.
    """
    many = _Many("kImage" if image else "kPlain", ranks, rows, features, first)
    threads = many.threads
    n = tirx.Var("n", "int64")
    written = image_rows(n) if image else n

    @T.prim_func(s_tir=True)
    def all_reduce_many_add_rms_norm(
        residual_h: T.handle,
        x_h: T.handle,
        weight_h: T.handle,
        peers_h: T.handle,
        calls_h: T.handle,
        rank_h: T.handle,
        sum_h: T.handle,
        normed_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        residual = T.match_buffer(residual_h, (n, features), "float16")
        x = T.match_buffer(x_h, (n, features), "float16")
        weight = T.match_buffer(weight_h, (features,), "float16")
        peers = T.match_buffer(peers_h, (ranks + 1,), "int64")
        calls = T.match_buffer(calls_h, (rows,), "int32")
        rank = T.match_buffer(rank_h, (1,), "int32")
        total = T.match_buffer(sum_h, (n, features), "float16")
        normed = T.match_buffer(normed_h, (written, features), "float16")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for row in T.thread_binding(n, thread="blockIdx.x"):
                for tid in T.thread_binding(threads, thread="threadIdx.x"):
                    T.evaluate(
                        many.call(
                            x.data,
                            residual.data,
                            weight.data,
                            peers.data,
                            calls.data,
                            rank.data,
                            total.data,
                            normed.data,
                            T.float32(eps),
                            T.cast(n, "int32"),
                            T.cast(row, "int32"),
                            tid,
                        )
                    )

    return all_reduce_many_add_rms_norm
