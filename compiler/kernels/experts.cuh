// Products with chosen experts in four bits, on tensor cores; experts_cuda.py explains and calls
// them. Guarded, because several kernels of a module include it; gemv_mma.cuh comes before.
#ifndef SHARDWRIGHT_EXPERTS
#define SHARDWRIGHT_EXPERTS

namespace shardwright_experts {

using shardwright_gemv::address;
using shardwright_gemv::commit_copies;
using shardwright_gemv::copy;
using shardwright_gemv::masked;
using shardwright_gemv::multiply;
using shardwright_gemv::wait_for_copies;

constexpr int kChunk = 128;  // columns that are copied at a time: four blocks of 32
constexpr int kTile = 16;    // rows of a multiplication

#ifndef SHARDWRIGHT_EMULATED  // tests on a CPU bring their own of these
__device__ __forceinline__ float from_lane(float value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
__device__ __forceinline__ float as_float(unsigned bits) { return __uint_as_float(bits); }
__device__ __forceinline__ unsigned as_bits(half2 v) { return *reinterpret_cast<unsigned*>(&v); }
__device__ __forceinline__ half2 as_halves(unsigned v) { return *reinterpret_cast<half2*>(&v); }
#endif

// A format of matrices with `kColumns_` columns, of which `kGroup_` share a scale: codes less 7 with
// scales in half precision, or e2m1 with e8m0. Codes are multiplied as halves, which they are
// exactly, and the sums of 32 scaled in single precision.
template <int kColumns_, int kGroup_, bool kMx_>
struct Format {
  static constexpr int kColumns = kColumns_, kGroup = kGroup_, kBlocks = kColumns / 32;
  static constexpr int kChunks = (kColumns + kChunk - 1) / kChunk;
  static constexpr bool kMx = kMx_;
  // A code of e2m1 is taken as a half with the same bits, which is 2^-14 of it.
  static constexpr float kFactor = kMx ? 16384.f : 1.f;

  // Codes i and i + 4 of a word.
  template <int i>
  static __device__ __forceinline__ unsigned pair(unsigned word) {
    const unsigned v = word >> 4 * i;
    if (kMx) return (v & 0x00080008u) << 12 | (v & 0x00070007u) << 9;
    return as_bits(__hsub2(as_halves(masked<0x000f000f>(v)), as_halves(0x64076407u)));
  }

  static __device__ __forceinline__ unsigned load_scale(const void* scales, long row, int block) {
    const long at = row * (kColumns / kGroup) + block * 32 / kGroup;
    if (kMx) return static_cast<const unsigned char*>(scales)[at];
    return static_cast<const unsigned short*>(scales)[at];
  }

  static __device__ __forceinline__ float scale(unsigned stored) {
    return kMx ? as_float(stored << 23) : __half2float(__ushort_as_half((unsigned short)stored));
  }
};

// Halves 0 to 7 in the order of `pair`: of the first multiplication, and of the second.
__device__ __forceinline__ uint4 in_pairs(uint4 v) {
  return make_uint4(__byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632),
                    __byte_perm(v.y, v.w, 0x5410), __byte_perm(v.y, v.w, 0x7632));
}

// Where 16 bytes, number `unit` of the four of a row's chunk, are among those of other rows, so that
// eight rows are read without conflicts.
__device__ __forceinline__ int place(int row, int unit) {
  return row * 64 + ((unit ^ (row >> 1 & 3)) << 4);
}

// 16 rows of the weight times 32 columns; a lane has a word of two rows.
template <class F>
struct Operand {
  unsigned w[8];
  __device__ __forceinline__ void load(const char* chunk, int row, int block, int t) {
    const unsigned low = *reinterpret_cast<const unsigned*>(chunk + place(row, block) + t * 4);
    const unsigned high = *reinterpret_cast<const unsigned*>(chunk + place(row + 8, block) + t * 4);
    w[0] = F::template pair<0>(low), w[1] = F::template pair<0>(high);
    w[2] = F::template pair<1>(low), w[3] = F::template pair<1>(high);
    w[4] = F::template pair<2>(low), w[5] = F::template pair<2>(high);
    w[6] = F::template pair<3>(low), w[7] = F::template pair<3>(high);
  }
  __device__ __forceinline__ void times(float (&sum)[4], uint4 x) const {
    multiply(sum, w[0], w[1], w[2], w[3], x.x, x.y);
    multiply(sum, w[4], w[5], w[6], w[7], x.z, x.w);
  }
};

template <int kMats>
struct Weights {
  const unsigned* words[kMats];
  const void* scales[kMats];
};

// A piece of a warp's work: a chunk of 16 rows from `row` on, of which `left` are real.
struct Piece {
  long row;
  int left, chunk;
  const half* x;
  float factor;
  bool valid;
};

constexpr int kStages = 4;
template <int kMats>
constexpr int kStageBytes = kMats * kTile * 64 + kChunk * 2;

// The sums over a warp's pieces of `factor * (row . x)`, of rows lane / 4 and 8 further on, valid in
// the lanes whose number is a multiple of 4.
template <class F, int kMats, class Where>
__device__ __forceinline__ void few(float (&acc)[kMats][2], const Weights<kMats>& weights, int count,
                                    const Where& where, char* shared) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  unsigned stored[kStages][kMats][2];
  float factor[kStages];

  auto issue = [&](int i, int s) {
    if (i < count) {
      const Piece p = where(i);
      const int block = p.chunk * 4 + t;
      const bool inside = p.valid && block < F::kBlocks;
      char* to = shared + s * kStageBytes<kMats>;
#pragma unroll
      for (int m = 0; m < kMats; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const long row = p.row + (g + r * 8 < p.left ? g + r * 8 : p.left - 1);
          const unsigned* from = weights.words[m];
          stored[s][m][r] = 0;
          if (inside) {
            from += row * (F::kColumns / 8) + block * 4;
            stored[s][m][r] = F::load_scale(weights.scales[m], row, block);
          }
          copy<16>(address(to + m * kTile * 64 + place(g + r * 8, t)), from, inside);
        }
      }
      if (lane < 16) {
        const int column = p.chunk * kChunk + lane * 8;
        const bool there = p.valid && column < F::kColumns;
        copy<16>(address(to + kMats * kTile * 64 + lane * 16), p.x + (there ? column : 0), there);
      }
      factor[s] = p.factor;
    }
    commit_copies();
  };

#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) issue(s, s);
  for (int first = 0; first < count; first += kStages) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      if (first + s >= count) break;
      wait_for_copies<kStages - 2>();
      issue(first + s + kStages - 1, (s + kStages - 1) % kStages);
      const char* at = shared + s * kStageBytes<kMats>;
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        uint4 x = make_uint4(0, 0, 0, 0);  // one column of eight
        if (g == 0) x = *reinterpret_cast<const uint4*>(at + kMats * kTile * 64 + (b * 4 + t) * 16);
        x = in_pairs(x);
#pragma unroll
        for (int m = 0; m < kMats; ++m) {
          Operand<F> w;
          w.load(at + m * kTile * 64, g, b, t);
          float sum[4] = {0, 0, 0, 0};
          w.times(sum, x);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float scale = from_lane(F::scale(stored[s][m][r]) * factor[s], g * 4 + b);
            acc[m][r] += scale * sum[r * 2];
          }
        }
      }
    }
  }
}

// What an expert makes of its two products; clamped, if there is a limit.
__device__ __forceinline__ half activate(float gate, float up, float alpha, float limit) {
  if (limit > 0) {
    const float g = fminf(gate, limit), u = fmaxf(fminf(up, limit), -limit);
    return __float2half(g / (1.f + expf(-alpha * g)) * (u + 1.f));
  }
  const float g = __half2float(__float2half(gate)), u = __half2float(__float2half(up));
  return __float2half(g / (1.f + expf(-g)) * u);
}

// The sums of a block's warps, of 16 rows of each matrix; for threads below 16, by row.
template <int kMats, int kWarps>
__device__ __forceinline__ void join(float (&sum)[kMats], const float (&acc)[kMats][2], char* shared) {
  float* sums = reinterpret_cast<float*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kMats; ++m)
    if (lane % 4 == 0) {
      sums[(m * kWarps + warp) * kTile + lane / 4] = acc[m][0];
      sums[(m * kWarps + warp) * kTile + lane / 4 + 8] = acc[m][1];
    }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kMats; ++m) {
    sum[m] = 0;
    if (threadIdx.x < kTile)
      for (int w = 0; w < kWarps; ++w) sum[m] += sums[(m * kWarps + w) * kTile + threadIdx.x];
  }
}

// h [slots, kRows]: 16 rows of one slot's gated product. `shared` has kWarps * kStages stages, then
// a float for each row, matrix and warp; so it is in `down`.
template <class F, int kRows, int kExperts, int kTop, int kWarps, bool kBiased>
__device__ __forceinline__ void up(const half* x, Weights<2> weights, const float* gate_bias,
                                   const float* up_bias, const int* ids, const int* rank, half* h,
                                   float alpha, float limit, char* shared, int tile, int slot) {
  shardwright::wait_for_inputs();
  const int expert = ids[slot] - rank[0] * kExperts, warp = threadIdx.x / 32;
  if (expert < 0 || expert >= kExperts) return;
  float acc[2][2] = {};
  const int left = min(kTile, kRows - tile * kTile);
  const half* mine = x + (long)(slot / kTop) * F::kColumns;
  auto where = [&](int i) {
    return Piece{(long)expert * kRows + tile * kTile, left, warp + i * kWarps, mine, F::kFactor, true};
  };
  char* own = shared + warp * kStages * kStageBytes<2>;
  few<F, 2>(acc, weights, (F::kChunks - warp + kWarps - 1) / kWarps, where, own);
  float sum[2];
  join<2, kWarps>(sum, acc, shared + kWarps * kStages * kStageBytes<2>);
  const int row = tile * kTile + threadIdx.x;
  if (threadIdx.x < left) {
    if (kBiased) {
      sum[0] += gate_bias[(long)expert * kRows + row];
      sum[1] += up_bias[(long)expert * kRows + row];
    }
    h[(long)slot * kRows + row] = activate(sum[0], sum[1], alpha, limit);
  }
}

// out [tokens, kRows]: 16 rows of one token's weighted sum over its experts.
template <class F, int kRows, int kExperts, int kTop, int kWarps, bool kBiased, bool kSplit>
__device__ __forceinline__ void down(const half* h, Weights<1> weights, const float* bias,
                                     const int* ids, const float* shares, const int* rank, half* out,
                                     char* shared, int tile, int token) {
  shardwright::wait_for_inputs();
  const int start = kSplit ? 0 : rank[0] * kExperts, warp = threadIdx.x / 32;
  int expert[kTop];
  float share[kTop];
#pragma unroll
  for (int k = 0; k < kTop; ++k) {
    expert[k] = ids[token * kTop + k] - start;
    share[k] = shares[token * kTop + k];
  }
  float acc[1][2] = {};
  const int left = min(kTile, kRows - tile * kTile);
  auto where = [&](int i) {
    const int at = warp + i * kWarps, which = at / F::kChunks;
    int e = 0;
    float s = 0;
#pragma unroll
    for (int k = 0; k < kTop; ++k)
      if (k == which) e = expert[k], s = share[k];
    return Piece{(long)e * kRows + tile * kTile, left, at % F::kChunks,
                 h + (long)(token * kTop + which) * F::kColumns, s * F::kFactor,
                 e >= 0 && e < kExperts};
  };
  char* own = shared + warp * kStages * kStageBytes<1>;
  few<F, 1>(acc, weights, (kTop * F::kChunks - warp + kWarps - 1) / kWarps, where, own);
  float sum[1];
  join<1, kWarps>(sum, acc, shared + kWarps * kStages * kStageBytes<1>);
  const int row = tile * kTile + threadIdx.x;
  if (threadIdx.x < left) {
    if (kBiased && !(kSplit && rank[0] != 0))
#pragma unroll
      for (int k = 0; k < kTop; ++k)
        if (expert[k] >= 0 && expert[k] < kExperts)
          sum[0] += share[k] * bias[(long)expert[k] * kRows + row];
    out[(long)token * kRows + row] = __float2half(sum[0]);
  }
}

constexpr int kSlots = 64, kRowsOfBlock = 64, kWarpsOfBlock = 4, kDepth = 3;
template <int kMats>
constexpr int kDepthBytes = kMats * kRowsOfBlock * 64 + kSlots * kChunk * 2;

// y [slots, kRows]: 64 rows of the products of an expert with all slots that chose it, for many
// tokens. With two matrices it is the gated product of `up`, where slot s has row s / kTop of x.
template <class F, int kMats, int kRows, int kTop, bool kBiased>
__device__ __forceinline__ void many(const half* x, Weights<kMats> weights, const float* gate_bias,
                                     const float* up_bias, const int* order, const int* begin,
                                     half* y, float alpha, float limit, char* shared, int expert,
                                     int tile) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int end = begin[expert + 1];
  for (int first = begin[expert]; first < end; first += kSlots) {
    unsigned stored[kDepth][kMats][2];
    const half* source[kSlots / 8];
#pragma unroll
    for (int j = 0; j < kSlots / 8; ++j) {
      const int at = first + j * 8 + threadIdx.x / 16;
      source[j] = nullptr;
      if (at < end) source[j] = x + (long)(order[at] / (kMats == 2 ? kTop : 1)) * F::kColumns;
    }
    auto row_of = [&](int r) {
      const int row = tile * kRowsOfBlock + r;
      return (long)expert * kRows + (row < kRows ? row : kRows - 1);
    };
    auto issue = [&](int chunk, int s) {
      if (chunk < F::kChunks) {
        char* to = shared + s * kDepthBytes<kMats>;
        const int block = chunk * 4 + t;
        const bool inside = block < F::kBlocks;
#pragma unroll
        for (int m = 0; m < kMats; ++m) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int mine = threadIdx.x / 4 + r * 32;
            const unsigned* from = weights.words[m];
            if (inside) from += row_of(mine) * (F::kColumns / 8) + block * 4;
            copy<16>(address(to + m * kRowsOfBlock * 64 + place(mine, t)), from, inside);
            stored[s][m][r] = 0;
            if (inside)
              stored[s][m][r] =
                  F::load_scale(weights.scales[m], row_of(warp * kTile + g + r * 8), block);
          }
        }
        const int unit = threadIdx.x % 16, column = chunk * kChunk + unit * 8;
#pragma unroll
        for (int j = 0; j < kSlots / 8; ++j) {
          const int slot = j * 8 + threadIdx.x / 16;
          const bool there = source[j] != nullptr && column < F::kColumns;
          copy<16>(address(to + kMats * kRowsOfBlock * 64 + slot * 256 +
                           ((unit ^ (slot & 1) << 2) << 4)),
                   there ? source[j] + column : x, there);
        }
      }
      commit_copies();
    };

    float acc[kMats][kSlots / 8][4] = {};
    __syncthreads();  // the slots before are read
#pragma unroll
    for (int s = 0; s < kDepth - 1; ++s) issue(s, s);
    for (int chunk = 0; chunk < F::kChunks; chunk += kDepth) {
#pragma unroll
      for (int s = 0; s < kDepth; ++s) {
        if (chunk + s >= F::kChunks) break;
        wait_for_copies<kDepth - 2>();
        __syncthreads();
        issue(chunk + s + kDepth - 1, (s + kDepth - 1) % kDepth);
        const char* at = shared + s * kDepthBytes<kMats>;
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          Operand<F> w[kMats];
          float scale[kMats][2];
#pragma unroll
          for (int m = 0; m < kMats; ++m) {
            w[m].load(at + m * kRowsOfBlock * 64, warp * kTile + g, b, t);
#pragma unroll
            for (int r = 0; r < 2; ++r)
              scale[m][r] = from_lane(F::scale(stored[s][m][r]), g * 4 + b);
          }
          const char* xs = at + kMats * kRowsOfBlock * 64 + (((b * 4 + t) ^ (g & 1) << 2) << 4);
#pragma unroll
          for (int n = 0; n < kSlots / 8; ++n) {
            const uint4 v = in_pairs(*reinterpret_cast<const uint4*>(xs + (n * 8 + g) * 256));
#pragma unroll
            for (int m = 0; m < kMats; ++m) {
              float sum[4] = {0, 0, 0, 0};
              w[m].times(sum, v);
#pragma unroll
              for (int i = 0; i < 4; ++i) acc[m][n][i] += scale[m][i / 2] * sum[i];
            }
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = tile * kRowsOfBlock + warp * kTile + g + i / 2 * 8;
      if (row >= kRows) continue;
#pragma unroll
      for (int n = 0; n < kSlots / 8; ++n) {
        const int at = first + n * 8 + t * 2 + i % 2;
        if (at >= end) continue;
        float value = acc[0][n][i] * F::kFactor;
        half* to = y + (long)order[at] * kRows + row;
        if (kMats == 2) {
          float other = acc[kMats - 1][n][i] * F::kFactor;
          if (kBiased) {
            value += gate_bias[(long)expert * kRows + row];
            other += up_bias[(long)expert * kRows + row];
          }
          *to = activate(value, other, alpha, limit);
        } else {
          *to = __float2half(value);
        }
      }
    }
  }
}

}  // namespace shardwright_experts
#endif
