# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""One-shot all-reduce of few tokens over peer memory, alone or with residual add and RMS norm.

Every rank pushes its summand into a buffer of every other rank, and adds what it has received in
rank order, so that all ranks get the same bits. As in NCCL's low-latency protocol, each 8 bytes
travel with a 4-byte flag after each 4, in stores of 16 bytes: the reader polls its own memory and
needs no other signal. The flag is the number of the call, so nothing is ever cleared. Two halves
of the buffer are used in turn: a rank that has received call n knows that its peers have read call
n - 1. One block serves one token.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from .common import SCHEDULED, WAIT_FOR_INPUTS, launch_dependents

# Sizes come as macros; `peers` holds the address of each rank's buffer [2, ranks, rows, features]
# of 4 bytes, as this process sees it, and last the address of a word that says "give up".
_SOURCE = """
__device__ __forceinline__ void NAME(
    const half* x, const half* residual, const half* weight, const int64_t* peers, int* calls,
    const int* rank_of, half* sum, half* normed, int row, int tid) {
  constexpr int kRanks = RANKS, kRows = ROWS, kSize = FEATURES, kThreads = THREADS;
  constexpr int kVectors = kSize / 8, kPer = (kVectors + kThreads - 1) / kThreads;
  WAIT
  const int rank = *rank_of;
  const unsigned flag = (unsigned)calls[row] + 1u;
  const size_t half_of = flag & 1u;
  uint4 mine[kPer], skip[kPer], scales[kPer];
  auto slot = [&](int owner, int source, int at) {
    size_t index = ((half_of * kRanks + source) * kRows + row) * kSize + (size_t)at * 8;
    return reinterpret_cast<unsigned*>(peers[owner]) + index;
  };
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    const int at = tid + j * kThreads;
    if (at >= kVectors) break;
    mine[j] = reinterpret_cast<const uint4*>(x + (size_t)row * kSize)[at];
    for (int d = 1; d < kRanks; ++d) {
      unsigned* to = slot(rank + d < kRanks ? rank + d : rank + d - kRanks, rank, at);
      asm volatile("st.volatile.global.v4.u32 [%0], {%1,%3,%2,%3};"
                   :: "l"(to), "r"(mine[j].x), "r"(mine[j].y), "r"(flag) : "memory");
      asm volatile("st.volatile.global.v4.u32 [%0], {%1,%3,%2,%3};"
                   :: "l"(to + 4), "r"(mine[j].z), "r"(mine[j].w), "r"(flag) : "memory");
    }
  }
  // Read while the summands are on their way.
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    const int at = tid + j * kThreads;
    if (at >= kVectors || !kFused) break;
    skip[j] = reinterpret_cast<const uint4*>(residual + (size_t)row * kSize)[at];
    scales[j] = reinterpret_cast<const uint4*>(weight)[at];
  }
  float squares = 0.f;
  half2 value[kPer][4];
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    const int at = tid + j * kThreads;
    if (at >= kVectors) break;
    float2 total[4] = {};
    for (int source = 0; source < kRanks; ++source) {
      uint4 got = mine[j];
      if (source != rank) {
        unsigned* from = slot(rank, source, at);
        unsigned a, b, tries = 0;
        do {
          asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                       : "=r"(got.x), "=r"(a), "=r"(got.y), "=r"(b) : "l"(from) : "memory");
          if (++tries % 4096 == 0 && *reinterpret_cast<volatile int*>(peers[kRanks])) break;
        } while (a != flag || b != flag);
        do {
          asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                       : "=r"(got.z), "=r"(a), "=r"(got.w), "=r"(b) : "l"(from + 4) : "memory");
          if (++tries % 4096 == 0 && *reinterpret_cast<volatile int*>(peers[kRanks])) break;
        } while (a != flag || b != flag);
      }
      const half2* part = reinterpret_cast<const half2*>(&got);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 f = __half22float2(part[e]);
        total[e].x += f.x;
        total[e].y += f.y;
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) value[j][e] = __floats2half2_rn(total[e].x, total[e].y);
    if (kFused) {
      const half2* part = reinterpret_cast<const half2*>(&skip[j]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        value[j][e] = __hadd2(part[e], value[j][e]);
        const float2 f = __half22float2(value[j][e]);
        squares += f.x * f.x + f.y * f.y;
      }
    }
    reinterpret_cast<uint4*>(sum + (size_t)row * kSize)[at] = *reinterpret_cast<uint4*>(value[j]);
  }
  __shared__ float partial[32];
  if (kFused) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) squares += __shfl_xor_sync(~0u, squares, lane);
    if (tid % 32 == 0) partial[tid / 32] = squares;
  }
  __syncthreads();  // every thread has read `calls` by now
  if (tid == 0) calls[row] = (int)flag;
  if (kFused) {
    float all = 0.f;
    for (int w = 0; w < kThreads / 32; ++w) all += partial[w];
    const float scale = rsqrtf(all / kSize + EPSILON);
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      const int at = tid + j * kThreads;
      if (at >= kVectors) break;
      const half2* part = reinterpret_cast<const half2*>(&scales[j]);
      half2 out[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 f = __half22float2(value[j][e]), w = __half22float2(part[e]);
        out[e] = __floats2half2_rn(f.x * scale * w.x, f.y * scale * w.y);
      }
      reinterpret_cast<uint4*>(normed + (size_t)row * kSize)[at] = *reinterpret_cast<uint4*>(out);
    }
  }
}
"""


def _source(fused: bool, ranks: int, rows: int, features: int, threads: int, eps: float) -> Any:
    name = f"shardwright_all_reduce_{'norm_' if fused else ''}{ranks}_{features}"
    text = _SOURCE.replace("kFused", "true" if fused else "false").replace("NAME", name)
    text = text.replace("WAIT", WAIT_FOR_INPUTS)
    sizes = {"RANKS": ranks, "ROWS": rows, "FEATURES": features, "THREADS": threads}
    for macro, size in sizes.items():
        text = text.replace(f"= {macro}", f"= {size}")
    return name, text.replace("EPSILON", f"{eps!r}f")


def _threads(features: int) -> int:
    return min(1024, -(-features // 8 // 32) * 32)


def all_reduce(*, tokens: int, features: int, ranks: int, rows: int) -> tirx.PrimFunc:
    """`(x [n,E] f16, peers [ranks+1] i64, calls [rows] i32, rank [1] i32) -> sum [n,E]`.

    n is at most `rows`, E a multiple of 8. `calls` counts the calls of each row, in place.
    """
    threads = _threads(features)
    name, source = _source(False, ranks, rows, features, threads, 0.0)

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
            for row in T.thread_binding(tokens, thread="blockIdx.x"):
                for tid in T.thread_binding(threads, thread="threadIdx.x"):
                    launch_dependents("cuda")
                    T.evaluate(
                        T.cuda.func_call(
                            name,
                            x.data,
                            x.data,
                            x.data,
                            peers.data,
                            calls.data,
                            rank.data,
                            total.data,
                            total.data,
                            row,
                            tid,
                            source_code=source,
                        )
                    )

    return all_reduce


def all_reduce_add_rms_norm(
    *, tokens: int, features: int, ranks: int, rows: int, eps: float
) -> tirx.PrimFunc:
    """All-reduce of x, plus the residual, and the RMS norm of that.

    `(residual [n,E] f16, x [n,E] f16, weight [E] f16, peers, calls, rank) -> (sum [n,E], normed
    [n,E])`, the other arguments as for `all_reduce`. The reduced value is rounded to float16 before
    the residual is added, and the sum before the norm, as separate kernels would.
    """
    threads = _threads(features)
    name, source = _source(True, ranks, rows, features, threads, eps)

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
            for row in T.thread_binding(tokens, thread="blockIdx.x"):
                for tid in T.thread_binding(threads, thread="threadIdx.x"):
                    launch_dependents("cuda")
                    T.evaluate(
                        T.cuda.func_call(
                            name,
                            x.data,
                            residual.data,
                            weight.data,
                            peers.data,
                            calls.data,
                            rank.data,
                            total.data,
                            normed.data,
                            row,
                            tid,
                            source_code=source,
                        )
                    )

    return all_reduce_add_rms_norm
