#ifndef SHARDWRIGHT_PEER_MANY
#define SHARDWRIGHT_PEER_MANY
// All-reduces of many rows between GPUs that map each other's memory. Included once in a module.
//
// For little data `peer.cuh` sends a flag with every word; here a whole row has one flag, which is
// set after its data, so that the links carry data alone.

// Comes after `ptx.cuh`, `peer.cuh` and `q4_image.cuh`.

#include <cuda_fp16.h>

namespace shardwright::peer {

// Where things are in a rank's buffer, in bytes from `kFirst`: two halves that calls use in turn,
// with the summands a rank receives and, in two shots, the sums that it receives; then flags, which
// are the numbers of calls and never cleared. As in `peer.cuh`, two halves are enough: a rank that
// has received call n of a row knows that its peers have read call n - 1.
template <int kRanks, int kRows, int kSize, bool kTwoShots>
struct Many {
  static constexpr size_t kOwned = kTwoShots ? (kRows + kRanks - 1) / kRanks : kRows;
  static constexpr size_t kSummands = (kRanks - 1) * kOwned;
  static constexpr size_t kHalf = kSummands + (kTwoShots ? kRows : 0);  // in rows of kSize halves
  static constexpr size_t kFlags = 2 * kHalf * kSize * sizeof(half);

  char* buffer;
  int half_used;

  __device__ uint4* row(size_t at) const {
    return reinterpret_cast<uint4*>(buffer + (half_used * kHalf + at) * kSize * sizeof(half));
  }
  // Of `row`, from rank `source` to this buffer's rank.
  __device__ uint4* summand(int source, int rank, int r) const {
    const int place = (source - rank + kRanks) % kRanks - 1;
    return row(place * kOwned + (kTwoShots ? r / kRanks : r));
  }
  __device__ uint4* sum(int r) const { return row(kSummands + r); }
  // Set by rank `source` for its summand, by the row's owner, as `kRanks`, for the sum.
  __device__ unsigned* flag(int source, int r) const {
    return reinterpret_cast<unsigned*>(buffer + kFlags) +
           ((size_t)half_used * kRows + r) * (kRanks + 1) + source;
  }
};

// How the norm of a row is written, if at all: as it is, or as part of the image that q4_gemm.cuh
// multiplies, of `n` rows.
enum Norm { kNone, kPlain, kImage };

// The sum over ranks of row `row`, added to `residual` if a norm follows, by one block.
//
// One shot: everyone pushes to everyone, and adds in rank order. Two shots: each row has an owner,
// which alone receives the summands and pushes their sum. Blocks wait for those of the same row on
// other ranks, and a GPU starts blocks in their order, so not all of them need be there at once.
template <int kRanks, int kRows, int kSize, int kThreads, bool kTwoShots, Norm kNorm, size_t kFirst>
__device__ __forceinline__ void all_reduce_many(const half* x, const half* residual,
                                                const half* weight, const int64_t* peers,
                                                int* calls, const int* rank_of, half* sum,
                                                half* normed, float epsilon, int n, int row,
                                                int tid) {
  using Buffer = Many<kRanks, kRows, kSize, kTwoShots>;
  constexpr int kUnits = kSize / 8, kPer = (kUnits + kThreads - 1) / kThreads;
  constexpr bool kFused = kNorm != kNone;
  static_assert(kNorm != kImage || kUnits == 4 * kThreads, "as put_image has them");
  __shared__ float partial[kThreads / 32];
  const size_t first = (size_t)row * kUnits;
  const int rank = *rank_of, owner = kTwoShots ? row % kRanks : rank;
  const unsigned number = (unsigned)calls[row] + 1u;
  auto buffer = [&](int r) {
    return Buffer{reinterpret_cast<char*>(peers[r]) + kFirst, (int)(number & 1u)};
  };
  Patience patience(peers + kRanks);
  // The unit of 8 elements that is this thread's number j.
  auto unit = [&](int j) {
    return kNorm == kImage ? tid / 4 * 16 + tid % 4 + 4 * j : tid + j * kThreads;
  };
  auto inside = [&](int j) { return unit(j) < kUnits; };
  uint4 value[kPer], skip[kPer];
#pragma unroll
  for (int j = 0; j < kPer; ++j)
    if (inside(j)) value[j] = reinterpret_cast<const uint4*>(x)[first + unit(j)];
#pragma unroll
  for (int d = 1; d < kRanks; ++d) {
    const int to = kTwoShots ? owner : (rank + d) % kRanks;
    if (kTwoShots && (d > 1 || rank == owner)) break;
    uint4* const there = buffer(to).summand(rank, to, row);
#pragma unroll
    for (int j = 0; j < kPer; ++j)
      if (inside(j)) there[unit(j)] = value[j];
  }
  __syncthreads();
  if (kTwoShots && rank != owner) {
    if (tid == 0) publish(buffer(owner).flag(rank, row), number);
  } else if (!kTwoShots && tid > 0 && tid < kRanks) {
    publish(buffer((rank + tid) % kRanks).flag(rank, row), number);
  }
  // Read while the summands are on their way.
#pragma unroll
  for (int j = 0; j < kPer; ++j)
    if (kFused && inside(j))
      skip[j] = reinterpret_cast<const uint4*>(residual)[first + unit(j)];
  const Buffer mine = buffer(rank);
  if (rank == owner) {
    if (tid < kRanks && tid != rank)
      while (!published(mine.flag(tid, row), number) && !patience.ends()) {
      }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      if (!inside(j)) break;
      float2 total[4] = {};
#pragma unroll
      for (int source = 0; source < kRanks; ++source) {
        const uint4 got = source == rank ? value[j]
                                         : load_l2(mine.summand(source, rank, row) + unit(j));
        const half2* pairs = reinterpret_cast<const half2*>(&got);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 f = __half22float2(pairs[e]);
          total[e].x += f.x, total[e].y += f.y;
        }
      }
      half2* pairs = reinterpret_cast<half2*>(&value[j]);
#pragma unroll
      for (int e = 0; e < 4; ++e) pairs[e] = __floats2half2_rn(total[e].x, total[e].y);
      if (kTwoShots) {
#pragma unroll
        for (int d = 1; d < kRanks; ++d)
          buffer((rank + d) % kRanks).sum(row)[unit(j)] = value[j];
      }
    }
    if (kTwoShots) {
      __syncthreads();
      if (tid > 0 && tid < kRanks)
        publish(buffer((rank + tid) % kRanks).flag(kRanks, row), number);
    }
  } else {
    if (tid == 0)
      while (!published(mine.flag(kRanks, row), number) && !patience.ends()) {
      }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kPer; ++j)
      if (inside(j)) value[j] = load_l2(mine.sum(row) + unit(j));
  }
  // All threads have read it, before they met.
  if (tid == 0) calls[row] = (int)number;
  float squares = 0.f;
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    if (!inside(j)) break;
    half2* pairs = reinterpret_cast<half2*>(&value[j]);
    const half2* other = reinterpret_cast<const half2*>(&skip[j]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (kFused) pairs[e] = __hadd2(other[e], pairs[e]);
      const float2 f = __half22float2(pairs[e]);
      squares += f.x * f.x + f.y * f.y;
    }
    reinterpret_cast<uint4*>(sum)[first + unit(j)] = value[j];
  }
  if (!kFused) return;
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) squares += __shfl_xor_sync(~0u, squares, lane);
  if (tid % 32 == 0) partial[tid / 32] = squares;
  __syncthreads();
  float all = 0.f;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) all += partial[w];
  const float scale = rsqrtf(all / kSize + epsilon);
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    if (!inside(j)) break;
    const uint4 scales = reinterpret_cast<const uint4*>(weight)[unit(j)];
    half2* pairs = reinterpret_cast<half2*>(&value[j]);
    const half2* weights = reinterpret_cast<const half2*>(&scales);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 f = __half22float2(pairs[e]), w = __half22float2(weights[e]);
      pairs[e] = __floats2half2_rn(f.x * scale * w.x, f.y * scale * w.y);
    }
    if (kNorm == kPlain) reinterpret_cast<uint4*>(normed)[first + unit(j)] = value[j];
  }
  if constexpr (kNorm == kImage) shardwright_q4::put_image(normed, value, row, tid, n, kSize);
}

}  // namespace shardwright::peer
#endif
