// Products of 17 to 64 tokens with a four-bit weight; q4_batch.py explains and calls them.
// Guarded, because several kernels of a module include it; ptx.cuh comes before.
#ifndef SHARDWRIGHT_Q4_BATCH
#define SHARDWRIGHT_Q4_BATCH

namespace shardwright_q4_batch {

using shardwright_gemv::address;
using shardwright_gemv::commit_copies;
using shardwright_gemv::copy;
using shardwright_gemv::rounded;
using shardwright_gemv::wait_for_copies;

#ifndef SHARDWRIGHT_EMULATED  // tests on a CPU bring their own of these
__device__ __forceinline__ unsigned load_shared(unsigned at) {
  unsigned v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
  return v;
}
#endif  // SHARDWRIGHT_EMULATED

// One arrival of a warp.
__device__ __forceinline__ void arrive(unsigned barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) shardwright::phase_arrive(barrier);
}

// multiply: sums [64 x kTokens] += a [64 x 16] * x [16 x kTokens], by a warpgroup of which each warp
// has 16 rows in registers. x are columns 16 * `step` of the 64 at `x` in shared memory, where each
// token has a row of 128 bytes, its pieces of 16 bytes swizzled.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <int kTokens>
__device__ __forceinline__ void multiply(float (&sums)[kTokens / 2], const unsigned (&a)[4],
                                         unsigned x, int step) {
  shardwright::wgmma<kTokens>(sums, a, shardwright::panel_at(x) + step * 2);
}
#else  // PTX for later GPUs has no wgmma; and tests on a CPU
template <int kTokens>
__device__ __forceinline__ void multiply(float (&sums)[kTokens / 2], const unsigned (&a)[4],
                                         unsigned x, int step) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    const unsigned row = x + (j * 8 + g) * 128 + t * 4;
    shardwright_gemv::multiply(reinterpret_cast<float(&)[4]>(sums[j * 4]), a[0], a[1], a[2], a[3],
                               load_shared(row + (step * 2 ^ g) * 16),
                               load_shared(row + (step * 2 + 1 ^ g) * 16));
  }
}
#endif

// A word's eight elements times their scale, as four pairs: 0 4, 1 5, 2 6, 3 7.
__device__ __forceinline__ void unpack(unsigned word, half2 scale, unsigned (&out)[4]) {
  shardwright_gemv::unpack(word, out);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const half2 value = __hmul2(*reinterpret_cast<const half2*>(&out[i]), scale);
    out[i] = *reinterpret_cast<const unsigned*>(&value);
  }
}

// Sizes, as `Plan` of q4_batch.py has them.
template <int kBatch_, int kOutputs_, int kInner_, int kGroup_, bool kGated_, int kSplit_,
          int kTeams_, int kTiles_, int kDepth_, int kStages_, int kBringers_, int kCluster_>
struct Sizes {
  static constexpr int kBatch = kBatch_, kOutputs = kOutputs_, kInner = kInner_, kGroup = kGroup_;
  static constexpr bool kGated = kGated_;
  // Warpgroups: `kSplit` share rows, `kTeams` times as many multiply.
  static constexpr int kSplit = kSplit_, kTeams = kTeams_, kGroups = kSplit * kTeams;
  static constexpr int kTiles = kTiles_;                  // of 64 rows, for each of them
  static constexpr int kBlockTiles = kTeams * kTiles;
  static constexpr int kDepth = kDepth_, kStages = kStages_, kCluster = kCluster_;
  static constexpr int kTokens = (kBatch + 7) / 8 * 8;
  static constexpr int kConsumers = kGroups * 128, kThreads = kConsumers + kBringers_ * 32;
  static constexpr int kRowBytes = kInner / 2, kScaleRow = kInner / kGroup * 2;
  static constexpr int kScaleBytes = 512 / kGroup;        // of 256 columns of a row
  static constexpr int kSlot = 16 * (128 + kScaleBytes);  // 16 rows of 256 columns
  static constexpr int kStage = kTokens * 256;            // 128 columns of x
  static constexpr int kChunks = kInner / 256;
  static constexpr int kTake = kGated ? 32 : 64;          // outputs of a tile
  static constexpr int kRing = kStages * kStage;          // where the weight's begins
  static constexpr int kBarriers = kRing + kGroups * 4 * kDepth * kSlot;
  static constexpr int kPitch = 68;                       // floats, of 64 partial sums
  static constexpr int kBringers = kBringers_;            // warps that bring x
  // A warp that waits for a stage must not be able to be two turns behind.
  static_assert(kBringers <= kStages && kStages % 2 == 0 && kStages >= 2 * kSplit);
  // Registers that threads start with, and what those have that bring x and that multiply.
  static constexpr int kStart = 65536 / kThreads / 8 * 8;
  static constexpr int kLess = kStart < 96 ? kStart : 96;
  static constexpr int kMore =
      (kStart * kThreads - kLess * kBringers * 32) / kConsumers / 8 * 8;
  static_assert(kBringers % 4 == 0);  // else a warp starts with less, as whole warpgroups do
};

// Where a warp's next 16 rows of 256 columns are read from and written to.
template <class Z>
struct Copies {
  const char *weight, *scale;  // the lane's first bytes
  unsigned to, scale_to;
  int left;  // outputs from the first tile's on
  int tile = 0, slot = 0;

  __device__ __forceinline__ void issue() {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Of a gated product a warp takes 8 gates, then their 8 values.
      const int row = Z::kGated ? i % 2 * 4 : i * 4;
      const long long at = row + (Z::kGated && i >= 2 ? Z::kOutputs : 0) + tile * Z::kTake;
      copy<16>(to + slot * Z::kSlot + i * 4 * 128, weight + at * Z::kRowBytes,
               tile * Z::kTake + row + lane / 8 < left);
    }
    if (lane < 16)
      copy<Z::kScaleBytes>(scale_to + slot * Z::kSlot,
                           scale + (long long)tile * Z::kTake * Z::kScaleRow,
                           tile * Z::kTake + (Z::kGated ? lane % 8 : lane) < left);
    if (++slot == Z::kDepth) slot = 0;
    if (++tile == Z::kTiles)
      tile = 0, weight += 128 * Z::kSplit, scale += Z::kScaleBytes * Z::kSplit;
  }
};

// Brings x to shared memory as wgmma reads it, 128 columns at a time, each of them where the lanes
// of a warp that multiplies hold the weight's. Warps take stages in turn, because publishing what
// one wrote waits for all that it has under way.
template <class Z>
__device__ __forceinline__ void bring(const half* x, char* shared, unsigned barriers, int first,
                                      int count) {
  constexpr int kTasks = Z::kTokens / 8, kOnce = kTasks < 4 ? kTasks : 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - Z::kConsumers / 32;
  // A lane takes word `w` of the four of each lane that multiplies, of one token. The order is one
  // in which eight lanes write to all banks.
  const int w = lane % 2 + lane / 8 % 2 * 2, token = lane / 16 * 4 + lane / 2 % 4;
  x += (first * 2 + warp) * 128 + w * 8;
  for (int n = warp; n < count; n += Z::kBringers, x += Z::kBringers * 128) {
    const int stage = n % Z::kStages;
    char* const to = shared + stage * Z::kStage + w / 2 * Z::kTokens * 128 + token * 128;
#pragma unroll
    for (int task = 0; task < kTasks; task += kOnce) {
      uint4 v[kOnce][4];
#pragma unroll
      for (int u = 0; u < kOnce; ++u)
#pragma unroll
        for (int t = 0; t < 4; ++t)
          if (task + u < kTasks)
            v[u][t] = __ldcg(reinterpret_cast<const uint4*>(
                x + (long long)min((task + u) * 8 + token, Z::kBatch - 1) * Z::kInner + t * 32));
      if (task == 0) shardwright::phase_wait(barriers + stage * 16 + 8, n / Z::kStages % 2 ^ 1);
#pragma unroll
      for (int u = 0; u < kOnce; ++u)
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          if (task + u >= kTasks) continue;
          const unsigned selector = pair % 2 ? 0x7632 : 0x5410;
          unsigned out[4];
#pragma unroll
          for (int t = 0; t < 4; ++t)
            out[t] = pair < 2 ? __byte_perm(v[u][t].x, v[u][t].z, selector)
                              : __byte_perm(v[u][t].y, v[u][t].w, selector);
          *reinterpret_cast<uint4*>(to + (task + u) * 1024 + ((w % 2 * 4 + pair) ^ token) * 16) =
              make_uint4(out[0], out[1], out[2], out[3]);
        }
    }
    shardwright::fence_copies();
    arrive(barriers + stage * 16);
  }
}

// What the warpgroups do that multiply: `chunks` times 256 columns from the `first` on. They leave
// their sums in shared memory.
template <class Z>
__device__ __forceinline__ void consume(const unsigned* packed, const half* scale, char* shared,
                                        int part, int first, int chunks) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  const int split = warp / 4 % Z::kSplit, first_tile = warp / 4 / Z::kSplit * Z::kTiles;
  const unsigned base = address(shared), barriers = base + Z::kBarriers;
  char* const ring = shared + Z::kRing + warp * Z::kDepth * Z::kSlot;
  const int row = (part * Z::kBlockTiles + first_tile) * Z::kTake + warp % 4 * (Z::kTake / 4);
  Copies<Z> ahead;
  // The halves of 128 bytes of odd rows change places, so that two rows meet no bank twice.
  ahead.to = address(ring) + lane / 8 * 128 + (lane % 8 ^ lane / 8 % 2 * 4) * 16;
  ahead.weight = reinterpret_cast<const char*>(packed) +
                 (long long)(row + lane / 8) * Z::kRowBytes + (first + split) * 128 + lane % 8 * 16;
  const int scale_row = Z::kGated ? lane % 8 + lane / 8 % 2 * Z::kOutputs : lane % 16;
  ahead.scale = reinterpret_cast<const char*>(scale) +
                (long long)(row + scale_row) * Z::kScaleRow + (first + split) * Z::kScaleBytes;
  ahead.scale_to = address(ring) + 16 * 128 + lane % 16 * Z::kScaleBytes;
  ahead.left = Z::kOutputs - row;
  int items = (chunks - split + Z::kSplit - 1) / Z::kSplit * Z::kTiles;  // left to copy
#pragma unroll
  for (int d = 0; d < Z::kDepth - 1; ++d) {
    if (items-- > 0) ahead.issue();
    commit_copies();
  }
  shardwright::wait_for_inputs();
  float sums[Z::kTiles][Z::kTokens / 2];
#pragma unroll
  for (int r = 0; r < Z::kTiles; ++r)
#pragma unroll
    for (int i = 0; i < Z::kTokens / 2; ++i) sums[r][i] = 0.f;
  unsigned a[2][2][4];
  int slot = 0, stage = split * 2 % Z::kStages, parity = split * 2 / Z::kStages % 2;
  for (int chunk = split; chunk < chunks; chunk += Z::kSplit) {
#pragma unroll
    for (int r = 0; r < Z::kTiles; ++r) {
      wait_for_copies<Z::kDepth - 2>();
      // Into the place of those before, which all lanes have read by now.
      if (items-- > 0) ahead.issue();
      commit_copies();
      const char* source = ring + slot * Z::kSlot;
      if (++slot == Z::kDepth) slot = 0;
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        unsigned words[2][4];
        half2 factor[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint4 v = *reinterpret_cast<const uint4*>(
              source + (g + i * 8) * 128 + ((q * 4 + t) ^ g % 2 * 4) * 16);
          words[i][0] = v.x, words[i][1] = v.y, words[i][2] = v.z, words[i][3] = v.w;
          factor[i] = __half2half2(*reinterpret_cast<const half*>(
              source + 16 * 128 + (g + i * 8) * Z::kScaleBytes +
              (q * 128 + t * 32) / Z::kGroup * 2));
        }
        if (r == 0) shardwright::phase_wait(barriers + (stage + q) * 16, parity);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          unsigned upper[4], lower[4];
          shardwright::wgmma_wait<1>();  // those that read this half of a are done
          unpack(words[0][i], factor[0], upper);
          unpack(words[1][i], factor[1], lower);
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            a[i % 2][s][0] = upper[2 * s], a[i % 2][s][1] = lower[2 * s];
            a[i % 2][s][2] = upper[2 * s + 1], a[i % 2][s][3] = lower[2 * s + 1];
          }
          shardwright::wgmma_fence();
          const unsigned tokens = base + (stage + q) * Z::kStage + i / 2 * Z::kTokens * 128;
          multiply<Z::kTokens>(sums[r], a[i % 2][0], tokens, i % 2 * 2);
          multiply<Z::kTokens>(sums[r], a[i % 2][1], tokens, i % 2 * 2 + 1);
          shardwright::wgmma_commit();
        }
      }
    }
    shardwright::wgmma_wait<0>();
    arrive(barriers + stage * 16 + 8);
    arrive(barriers + stage * 16 + 24);
    stage += 2 * Z::kSplit;
    while (stage >= Z::kStages) stage -= Z::kStages, parity ^= 1;
  }
  __syncthreads();  // nothing is read any more of what the partial sums take the place of
  float* partial = reinterpret_cast<float*>(shared) +
                   (split * Z::kBlockTiles + first_tile) * Z::kTokens * Z::kPitch;
#pragma unroll
  for (int r = 0; r < Z::kTiles; ++r)
#pragma unroll
    for (int i = 0; i < Z::kTokens / 2; ++i) {
      const int token = i / 4 * 8 + t * 2 + i % 2, local = warp % 4 * 16 + g + i / 2 % 2 * 8;
      partial[(r * Z::kTokens + token) * Z::kPitch + local] = sums[r][i];
    }
}

__device__ __forceinline__ char* aligned(unsigned char* shared) {
  return reinterpret_cast<char*>(shared) + -reinterpret_cast<unsigned long long>(shared) % 1024;
}

// `shared` is 1024-byte aligned; every thread calls it.
template <class Z, class Out>
__device__ __forceinline__ void product(const half* x, const unsigned* packed, const half* scale,
                                        Out* out, char* shared) {
  const int tid = threadIdx.x, warp = tid / 32;
  const int rank = blockIdx.x % Z::kCluster, part = blockIdx.x / Z::kCluster;
  const int first = Z::kChunks * rank / Z::kCluster;
  const int chunks = Z::kChunks * (rank + 1) / Z::kCluster - first;
  const unsigned base = address(shared), barriers = base + Z::kBarriers;
  if (tid == 0) {
    for (int i = 0; i < Z::kStages; ++i) {
      shardwright::phase_start(barriers + i * 16, 1);                   // x is there
      shardwright::phase_start(barriers + i * 16 + 8, Z::kTeams * 4);   // and has been read
    }
  }
  __syncthreads();
  if (warp >= Z::kGroups * 4) {
    shardwright::wait_for_inputs();
    if (Z::kMore > Z::kStart) shardwright::give_registers<Z::kLess>();
    bring<Z>(x, shared, barriers, first, chunks * 2);
    __syncthreads();
  } else {
    if (Z::kMore > Z::kStart) shardwright::take_registers<Z::kMore>();
    consume<Z>(packed, scale, shared, part, first, chunks);
  }
  shardwright::launch_dependents();
  if (Z::kCluster > 1) shardwright::cluster_meet();
  else __syncthreads();
  // The blocks of a cluster add a part of the outputs each, eight at a time, in a fixed order.
  const float* partial = reinterpret_cast<const float*>(shared);
  constexpr int kEights = Z::kTake / 8, kOfToken = Z::kBlockTiles * kEights;
  constexpr int kTotal = Z::kBatch * kOfToken;
  for (int i = kTotal * rank / Z::kCluster + tid; i < kTotal * (rank + 1) / Z::kCluster;
       i += Z::kThreads) {
    const int token = i / kOfToken, at = i % kOfToken, tile = at / kEights, eight = at % kEights;
    const int output = (part * Z::kBlockTiles + tile) * Z::kTake + eight * 8;
    if (output >= Z::kOutputs) continue;
    const float* p = partial + (tile * Z::kTokens + token) * Z::kPitch +
                     eight * (Z::kGated ? 16 : 8);
    float sum[8 * (Z::kGated ? 2 : 1)] = {};
#pragma unroll
    for (int c = 0; c < Z::kCluster * Z::kSplit; ++c)
#pragma unroll
      for (int j = 0; j < (Z::kGated ? 4 : 2); ++j) {
        const float* from =
            p + c % Z::kSplit * (Z::kBlockTiles * Z::kTokens * Z::kPitch) + j * 4;
        float4 v;
        if (Z::kCluster > 1)
          shardwright_gemv::cluster_load(reinterpret_cast<float(&)[4]>(v), from, c / Z::kSplit);
        else
          v = *reinterpret_cast<const float4*>(from);
        sum[j * 4] += v.x, sum[j * 4 + 1] += v.y, sum[j * 4 + 2] += v.z, sum[j * 4 + 3] += v.w;
      }
    alignas(16) Out results[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float value = sum[j];
      if (Z::kGated) {
        // silu(gate) * value of the sums rounded as if written.
        const float gate = (float)rounded<Out>(value);
        value = gate / (1.f + __expf(-gate)) * (float)rounded<Out>(sum[Z::kGated ? j + 8 : j]);
      }
      results[j] = rounded<Out>(value);
    }
#pragma unroll
    for (int j = 0; j < (int)sizeof(Out) / 2; ++j)
      reinterpret_cast<uint4*>(out + (long long)token * Z::kOutputs + output)[j] =
          reinterpret_cast<const uint4*>(results)[j];
  }
  if (Z::kCluster > 1) shardwright::cluster_meet();  // its blocks still read this one's memory
}

}  // namespace shardwright_q4_batch
#endif
