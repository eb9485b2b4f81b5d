#ifndef SHARDWRIGHT_PEER
#define SHARDWRIGHT_PEER
// Exchange of little data between GPUs that map each other's memory. Included once in a module.
//
// Flags that travel with the data (`send` and `receive` of `ptx.cuh`) are the numbers of calls, so
// nothing is ever cleared.

#include <cuda_fp16.h>

namespace shardwright::peer {

// The sum over ranks of a part of a row, with `kFused` added to `residual` and normed.
//
// `peers` has the address of each rank's buffer, and of the word that says "give up". A buffer has
// two halves that are used in turn: a rank that has received call n knows that its peers have read
// call n - 1. A half is [ranks, rows, size] words. One shot: everyone pushes to everyone, and adds
// in rank order. Two shots: each part of a row has an owner, which alone receives the summands and
// pushes their sum.
template <int kRanks, int kRows, int kSize, int kThreads, int kParts, bool kTwoShots, bool kFused>
__device__ __forceinline__ void all_reduce(const half* x, const half* residual, const half* weight,
                                           const int64_t* peers, int* calls, const int* rank_of,
                                           half* sum, half* normed, float epsilon, int row,
                                           int part, int tid) {
  // A unit is four elements. Threads take turns at the units of their part.
  constexpr int kUnits = (kSize / 4 + kParts - 1) / kParts;
  constexpr int kPer = (kUnits + kThreads - 1) / kThreads, kWarps = kThreads / 32;
  __shared__ unsigned long long partial[kParts * kWarps];
  const size_t first = (size_t)row * kSize;
  auto unit = [&](int j) { return part * kUnits + tid + j * kThreads; };
  auto inside = [&](int j) { return tid + j * kThreads < kUnits && unit(j) < kSize / 4; };
  uint2 scales[kPer], skip[kPer], mine[kPer];
#pragma unroll
  for (int j = 0; j < kPer; ++j)
    if (kFused && inside(j)) scales[j] = reinterpret_cast<const uint2*>(weight)[unit(j)];
  const int rank = *rank_of;
  const int owner = kTwoShots ? (row * kParts + part) % kRanks : rank;
  // The buffers in the order in which they are sent to; the first is this rank's.
  unsigned* buffer[kRanks];
#pragma unroll
  for (int d = 0; d < kRanks; ++d)
    buffer[d] = reinterpret_cast<unsigned*>(peers[(rank + d) % kRanks]);
  unsigned* const owned = reinterpret_cast<unsigned*>(peers[owner]);
  Patience patience(peers + kRanks);
  wait_for_inputs();
  const unsigned flag = (unsigned)calls[row] + 1u;
  auto slot = [&](int source, int j) {
    return (((flag & 1u) * kRanks + source) * kRows + row) * (size_t)kSize + (size_t)unit(j) * 4;
  };
#pragma unroll
  for (int j = 0; j < kPer; ++j)
    if (inside(j)) mine[j] = reinterpret_cast<const uint2*>(x + first)[unit(j)];
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    if (!inside(j)) break;
    if (kTwoShots) {
      if (rank != owner) send(owned + slot(rank, j), mine[j], flag);
    } else {
#pragma unroll
      for (int d = 1; d < kRanks; ++d) send(buffer[d] + slot(rank, j), mine[j], flag);
    }
  }
  if (kParts > 1) cluster_arrive();
  // Read while the summands are on their way.
#pragma unroll
  for (int j = 0; j < kPer; ++j)
    if (kFused && inside(j)) skip[j] = reinterpret_cast<const uint2*>(residual + first)[unit(j)];
  float squares = 0.f;
  half2 value[kPer][2];
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    if (!inside(j)) break;
    uint2 reduced;
    if (rank == owner) {
      // All sources are looked at together, so that their latencies overlap.
      uint2 got[kRanks];
      bool all;
      do {
        all = true;
#pragma unroll
        for (int source = 0; source < kRanks; ++source) {
          if (source == rank) {
            got[source] = mine[j];
          } else {
            all = receive(buffer[0] + slot(source, j), flag, got[source]) && all;
          }
        }
      } while (!all && !patience.ends());
      float2 low = {}, high = {};
#pragma unroll
      for (int source = 0; source < kRanks; ++source) {
        const half2* pair = reinterpret_cast<const half2*>(&got[source]);
        const float2 l = __half22float2(pair[0]), h = __half22float2(pair[1]);
        low.x += l.x, low.y += l.y, high.x += h.x, high.y += h.y;
      }
      half2* pair = reinterpret_cast<half2*>(&reduced);
      pair[0] = __floats2half2_rn(low.x, low.y);
      pair[1] = __floats2half2_rn(high.x, high.y);
      if (kTwoShots) {
#pragma unroll
        for (int d = 1; d < kRanks; ++d) send(buffer[d] + slot(rank, j), reduced, flag);
      }
    } else {
      while (!receive(buffer[0] + slot(owner, j), flag, reduced) && !patience.ends()) {
      }
    }
    const half2* pair = reinterpret_cast<const half2*>(&reduced);
    const half2* other = reinterpret_cast<const half2*>(&skip[j]);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      value[j][e] = kFused ? __hadd2(other[e], pair[e]) : pair[e];
      const float2 f = __half22float2(value[j][e]);
      squares += f.x * f.x + f.y * f.y;
    }
    reinterpret_cast<uint2*>(sum + first)[unit(j)] = *reinterpret_cast<uint2*>(value[j]);
  }
  // All blocks of the row have read `calls` by now, and are there to be written to.
  if (kParts > 1) {
    cluster_wait();
  } else {
    __syncthreads();
  }
  if (part == 0 && tid == 0) calls[row] = (int)flag;
  if (!kFused) return;
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) squares += __shfl_xor_sync(~0u, squares, lane);
  unsigned long long* const place = partial + part * kWarps + tid / 32;
  if (kParts > 1) {
    if (tid % 32 < kParts) store_in_block(in_block(place, tid % 32), __float_as_uint(squares));
    cluster_meet();
  } else {
    if (tid % 32 == 0) *place = __float_as_uint(squares);
    __syncthreads();
  }
  float all = 0.f;
#pragma unroll
  for (int w = 0; w < kParts * kWarps; ++w) all += __uint_as_float((unsigned)partial[w]);
  const float scale = rsqrtf(all / kSize + epsilon);
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    if (!inside(j)) break;
    const half2* pair = reinterpret_cast<const half2*>(&scales[j]);
    half2 out[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float2 f = __half22float2(value[j][e]), w = __half22float2(pair[e]);
      out[e] = __floats2half2_rn(f.x * scale * w.x, f.y * scale * w.y);
    }
    reinterpret_cast<uint2*>(normed + first)[unit(j)] = *reinterpret_cast<uint2*>(out);
  }
}

// Two logits of each rank to their places in a row of `logits` on every rank.
//
// They go through the words from `kFirst` of a buffer, [rows, ranks, kLocal] pairs of a logit and a
// flag, the number of the row's last all-reduce. Once is enough: a rank that takes part in the next
// step's all-reduces has read what it was sent in this one, and no rank sends before those end.
template <int kRanks, int kLocal, int kVocab, size_t kFirst>
__device__ __forceinline__ void gather_logits(const float* local, const int* last,
                                              const int64_t* peers, const int* calls,
                                              const int* rank_of, float* logits, int row, int at) {
  const int rank = *rank_of;
  unsigned* buffer[kRanks];
#pragma unroll
  for (int d = 0; d < kRanks; ++d)
    buffer[d] = reinterpret_cast<unsigned*>(peers[(rank + d) % kRanks]) + kFirst;
  Patience patience(peers + kRanks);
  wait_for_inputs();
  if (at >= kLocal) return;
  const unsigned flag = (unsigned)calls[row];
  auto slot = [&](int source) { return (((size_t)row * kRanks + source) * kLocal + at) * 2; };
  uint2 got[kRanks];
  const uint2 mine = *reinterpret_cast<const uint2*>(local + (size_t)row * kLocal + at);
  if (last[row] < 0) return;
#pragma unroll
  for (int d = 1; d < kRanks; ++d) send(buffer[d] + slot(rank), mine, flag);
  bool all;
  do {
    all = true;
#pragma unroll
    for (int source = 0; source < kRanks; ++source) {
      if (source == rank) {
        got[source] = mine;
      } else {
        all = receive(buffer[0] + slot(source), flag, got[source]) && all;
      }
    }
  } while (!all && !patience.ends());
#pragma unroll
  for (int source = 0; source < kRanks; ++source) {
    // What is beyond the vocabulary is padding of the last ranks.
    const int token = source * kLocal + at;
    float* to = logits + (size_t)row * kVocab + token;
    if (token < kVocab) to[0] = __uint_as_float(got[source].x);
    if (token + 1 < kVocab) to[1] = __uint_as_float(got[source].y);
  }
}

}  // namespace shardwright::peer
#endif
