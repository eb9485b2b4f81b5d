// Products of many tokens with fp16 gates and ups, and SiLU, on Hopper; gated_gemm.py explains
// them. After ptx.cuh and wgmma.cuh.
#ifndef SHARDWRIGHT_GATED_GEMM
#define SHARDWRIGHT_GATED_GEMM

namespace shardwright {
namespace gated_gemm {

constexpr int kTokens = 128, kFeatures = 128, kStages = 4;
constexpr int kX = kTokens * 128, kW = 2 * kFeatures * 128, kStage = kX + kW;  // 64 columns
constexpr int kOut = kTokens * kFeatures * 2;

// What a block multiplies: tiles from `first` on, `step` apart. The two of a cluster share a band of
// the weight and have tokens of their own; unless there are so few that it takes longer.
struct Share {
  int sharing, rank, tiles, total, first, step;

  __device__ __forceinline__ Share(int n, int features, int block, int blocks) {
    const int bands = features / kFeatures;
    auto of_tokens = [=](int tokens) { return (n + tokens - 1) / tokens; };
    auto rounds = [=](int sharing) {
      return (of_tokens(kTokens * sharing) * sharing * bands + blocks - 1) / blocks;
    };
    sharing = rounds(2) <= rounds(1) ? 2 : 1;
    rank = block % sharing;
    tiles = of_tokens(kTokens * sharing);
    total = tiles * bands;
    first = block / sharing;
    step = blocks / sharing;
  }
  __device__ __forceinline__ int token(int tile) const {
    return (tile % tiles * sharing + rank) * kTokens;
  }
  __device__ __forceinline__ int band(int tile) const { return tile / tiles; }
};

#ifdef __CUDACC__
// silu(gate) * up of two results, which are rounded to fp16 before.
__device__ __forceinline__ unsigned gated(const float* gate, const float* up) {
  const float2 g = __half22float2(__floats2half2_rn(gate[0], gate[1]));
  const float2 u = __half22float2(__floats2half2_rn(up[0], up[1]));
  const half2 both = __floats2half2_rn(__fdividef(g.x, 1.f + __expf(-g.x)) * u.x,
                                       __fdividef(g.y, 1.f + __expf(-g.y)) * u.y);
  return *reinterpret_cast<const unsigned*>(&both);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Begins to add 64 columns, where `add`, or to set the sums to them; returns when those before are
// added.
__device__ __forceinline__ void multiply(float (&sums)[128], unsigned x, unsigned w, bool add) {
  wgmma_fence();
#pragma unroll
  for (int s = 0; s < 4; ++s)
    wgmma<256>(sums, matrix_at(x, 16) + s * 2, matrix_at(w, 16) + s * 2, add || s > 0);
  wgmma_commit();
  wgmma_wait<1>();
}

__device__ __forceinline__ void finish(float (&sums)[128]) {
  wgmma_wait<0>();
  pin<128>(sums);
}
#else
// A lane gives a piece of 8 columns of a swizzled row.
__device__ __forceinline__ void load(unsigned (&to)[4], unsigned rows, int row, int piece) {
  load_matrices(to, rows + row * 128 + (piece ^ row % 8) * 16);
}

// The same, at once.
__device__ __forceinline__ void multiply(float (&sums)[128], unsigned x, unsigned w, bool add) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
  for (int i = 0; i < 128; ++i) sums[i] = add ? sums[i] : 0.f;
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    unsigned a[4], b[4];
    load(a, x, warp * 16 + lane % 16, s * 2 + lane / 16);
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      load(b, w, j * 16 + lane / 16 * 8 + lane % 8, s * 2 + lane / 8 % 2);
#pragma unroll
      for (int i = 0; i < 2; ++i) mma_16n8k16(sums + j * 8 + i * 4, a, b + i * 2);
    }
  }
  meet(1 + threadIdx.x / 128, 128);
}

__device__ __forceinline__ void finish(float (&)[128]) {}
#endif

// All tiles of a block. Those that share a band of the weight bring a half of it each, for both.
__device__ __forceinline__ void product(
    unsigned long long x_map, unsigned long long w_map, half* out, int n, int features, int inner,
    unsigned char* buffer, int block, int blocks) {
  const unsigned base = (address(buffer) + 1023) / 1024 * 1024;
  const unsigned store = base + kStages * kStage, barriers = store + kOut;
  const int tid = threadIdx.x, warpgroup = tid / 128, columns = inner / 64;
  unsigned processors;  // blocks that have none would come behind all others
  asm volatile("mov.u32 %0, %%nsmid;" : "=r"(processors));
  blocks = min(blocks, (int)processors / 2 * 2);
  const Share share(n, features, block, blocks);
  if (tid == 0) {
    for (int i = 0; i < kStages; ++i) {  // filled, and read by both warpgroups of who shares it
      phase_start(barriers + i * 16, 1);
      phase_start(barriers + i * 16 + 8, 2 * share.sharing);
    }
    phases_started();
  }
  cluster_meet();
  wait_for_inputs();
  if (block >= blocks) return;
  int stage = 0, parity = 0;
  auto advance = [&] {
    if (++stage == kStages) stage = 0, parity ^= 1;
  };
  if (warpgroup == 2) {
    give_registers<40>();
    if (tid == 256) {
      const unsigned short readers = share.sharing == 2 ? 3 : 1 << block % 2;
      for (int tile = share.first; tile < share.total; tile += share.step) {
        for (int i = 0; i < columns; ++i, advance()) {
          const unsigned to = base + stage * kStage, filled = barriers + stage * 16;
          phase_wait(filled + 8, parity ^ 1);
          phase_expect(filled, kStage);
          asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::"
                       "bytes [%0], [%1, {%2, %3}], [%4];"
                       :: "r"(to), "l"(x_map), "r"(i * 64), "r"(share.token(tile)), "r"(filled)
                       : "memory");
          for (int half = 0; half < 2; ++half) {
            if (share.sharing == 2 && half != share.rank) continue;
            const int octet = share.band(tile) * (kFeatures / 8) + half * (kFeatures / 16);
            asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::"
                         "complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3, %3, %4}], "
                         "[%5], %6;"
                         :: "r"(to + kX + half * (kW / 2)), "l"(w_map), "r"(i * 64), "r"(0),
                            "r"(octet), "r"(filled), "h"(readers) : "memory");
          }
        }
      }
    }
  } else {
    take_registers<232>();
    const int lane = tid % 32, warp = tid / 32 % 4;
    // Without a scope of a cluster, which would be a fence for all of memory.
    auto release = [&](int stage) {
      if (tid % 128 < share.sharing)
        phase_arrive_in_block(barriers + stage * 16 + 8,
                              share.sharing == 2 ? tid % 128 : block % 2);
    };
    for (int tile = share.first; tile < share.total; tile += share.step) {
      float sums[128];
      int before = 0;
      for (int i = 0; i < columns; ++i, advance()) {
        phase_wait(barriers + stage * 16, parity);
        const unsigned at = base + stage * kStage;
        multiply(sums, at + warpgroup * (kX / 2), at + kX, i > 0);
        if (i > 0) release(before);
        before = stage;
      }
      finish(sums);
      release(before);
      // By way of shared memory: rows of 256 bytes whose pieces of 16 are permuted.
      const unsigned rows = store + warpgroup * (kOut / 2);
      meet(1 + warpgroup, 128);  // the tile before is written
#pragma unroll
      for (int j = 0; j < kFeatures / 16; ++j) {
        const float* s = sums + j * 16;  // gates and ups of 8 features, twice
        const int row = warp * 16 + lane % 16, piece = j * 2 + lane / 16;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                     :: "r"(rows + row * 256 + (piece ^ row % 8) * 16), "r"(gated(s, s + 4)),
                        "r"(gated(s + 2, s + 6)), "r"(gated(s + 8, s + 12)),
                        "r"(gated(s + 10, s + 14)) : "memory");
      }
      meet(1 + warpgroup, 128);
      half* const to = out + share.band(tile) * kFeatures + tid % 16 * 8;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = i * 8 + tid % 128 / 16, token = share.token(tile) + warpgroup * 64 + row;
        uint4 value;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                     : "r"(rows + row * 256 + (tid % 16 ^ row % 8) * 16));
        if (token < n) *reinterpret_cast<uint4*>(to + (size_t)token * features) = value;
      }
    }
  }
  cluster_meet();  // nothing is on its way to a block that has ended
}
#endif
}  // namespace gated_gemm
}  // namespace shardwright
#endif
