// A residual's sum and norm in front of a product of one token, and products whose rows go to all
// ranks as summands of it; gemv_sum.py calls them. Included once in a module, after gemv_mma.cuh.
//
// Between ranks an element travels alone: where it is to come there is a 0, and who sends a 0 sends -0.
// So a reader polls its own memory. It sets to 0 again what it had read before that, which no block
// needs any more, since what it has read now was sent behind that by all blocks of its own GPU.
#ifndef SHARDWRIGHT_GEMV_SUM
#define SHARDWRIGHT_GEMV_SUM

namespace shardwright_gemv {

#ifndef SHARDWRIGHT_EMULATED  // tests on a CPU bring their own of these
__device__ __forceinline__ void send_half(unsigned short* to, unsigned short bits) {
  asm volatile("st.relaxed.sys.global.u16 [%0], %1;" ::"l"(to), "h"(bits) : "memory");
}
__device__ __forceinline__ void send_words(uint4* to, uint4 w) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(w.x), "r"(w.y),
               "r"(w.z), "r"(w.w) : "memory");
}
__device__ __forceinline__ uint4 look_at_words(const uint4* from) {
  uint4 w;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(from) : "memory");
  return w;
}
#endif  // SHARDWRIGHT_EMULATED

// One of the places for summands in the ranks' buffers, each [ranks, features].
struct Exchange {
  const int64_t* peers;  // addresses of the buffers, and of a word that says "give up"
  const int* rank;
  unsigned first_word;
  int place;

  template <int kRanks, int kFeatures>
  __device__ __forceinline__ unsigned short* halves(int owner, int source) const {
    return reinterpret_cast<unsigned short*>(peers[owner]) + 2 * first_word +
           (place * kRanks + source) * kFeatures;
  }
};

// The result of a product, sent to all ranks.
template <int kRanks>
struct SentOutput {
  using Type = half;
  static constexpr bool kNorms = false;
  Exchange exchange;
  unsigned short* to[kRanks];

  template <class Z>
  __device__ __forceinline__ void before() {
    const int rank = *exchange.rank;
#pragma unroll
    for (int d = 0; d < kRanks; ++d)  // beginning with another rank than the others do
      to[d] = exchange.halves<kRanks, Z::kOutputs>((rank + 1 + d) % kRanks, rank);
  }
  template <class Z>
  __device__ __forceinline__ void put(int, int output, half value) const {
    unsigned short bits;
    memcpy(&bits, &value, 2);
#pragma unroll
    for (int d = 0; d < kRanks; ++d) send_half(to[d] + output, bits ? bits : 0x8000);
  }
};

// Eight elements of a row, of number `piece`, sent to all ranks.
template <int kRanks, int kFeatures>
__device__ __forceinline__ void send_piece(const half* values, const int64_t* peers,
                                           const int* rank_of, unsigned first_word, int64_t place,
                                           int piece) {
  const Exchange exchange{peers, rank_of, first_word, (int)place};
  unsigned short bits[8];
  memcpy(bits, values, 16);
#pragma unroll
  for (int e = 0; e < 8; ++e) bits[e] = bits[e] ? bits[e] : 0x8000;
  uint4 words;
  memcpy(&words, bits, 16);
  const int rank = *rank_of;
#pragma unroll
  for (int d = 0; d < kRanks; ++d) {
    const int owner = (rank + 1 + d) % kRanks;
    send_words(reinterpret_cast<uint4*>(exchange.halves<kRanks, kFeatures>(owner, rank)) + piece,
               words);
  }
}

// x is the RMS norm of `residual` plus the sum over ranks of what `SentOutput` sent, or of one rank plus
// `y`. Every block computes all of it; each writes a part of the new residual.
template <class Z, int kRanks>
struct SumInput {
  // What kernels in front of the product that sent have written is there: it has waited for them.
  static constexpr bool kWaits = kRanks == 1;
  static constexpr int kRowPieces = Z::kInner / 8;  // without those that pad x
  static constexpr int kPer = (Z::kPieces + Z::kThreads - 1) / Z::kThreads;
  static_assert(Z::kWholeX, "all of x is in a block");

  const half *residual, *y, *norm;
  half* sum;
  float epsilon;
  Exchange exchange;
  int last_place;  // of the sum before
  uint4 weight[kPer];

  static __device__ __forceinline__ int piece(int j) { return threadIdx.x + j * Z::kThreads; }
  // Whether this block writes what all compute of a piece.
  static __device__ __forceinline__ bool mine(int j) { return piece(j) % Z::kParts == blockIdx.x; }

  __device__ __forceinline__ void before() {
#pragma unroll
    for (int j = 0; j < kPer; ++j)
      if (piece(j) < kRowPieces) weight[j] = reinterpret_cast<const uint4*>(norm)[piece(j)];
  }

  // `staged` is a `Staged` or `HeldX`.
  template <class X, class Arriving>
  __device__ __forceinline__ void stage(X& staged, int, Arriving arriving) {
    uint4 held[kPer];
    add(held, arriving);
    float squares = 0.f;
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      if (piece(j) >= kRowPieces) break;
      if (mine(j)) reinterpret_cast<uint4*>(sum)[piece(j)] = held[j];
      const half2* const pair = reinterpret_cast<const half2*>(&held[j]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 f = __half22float2(pair[e]);
        squares += f.x * f.x + f.y * f.y;
      }
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) squares += __shfl_xor_sync(~0u, squares, mask);
    float* const of_warps = staged.partial();
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = squares;
    Z::meet();
    squares = 0.f;
#pragma unroll
    for (int w = 0; w < Z::kThreads / 32; ++w) squares += of_warps[w];
    const float scale = rsqrtf(squares / Z::kInner + epsilon);
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      if (piece(j) >= Z::kPieces) break;
      uint4 x = make_uint4(0, 0, 0, 0);
      if (piece(j) < kRowPieces) {
        const half2* const pair = reinterpret_cast<const half2*>(&held[j]);
        const half2* const by = reinterpret_cast<const half2*>(&weight[j]);
        half2* const to = reinterpret_cast<half2*>(&x);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 f = __half22float2(pair[e]), w = __half22float2(by[e]);
          to[e] = __floats2half2_rn(f.x * scale * w.x, f.y * scale * w.y);
        }
      }
      staged.put(piece(j), x);
    }
  }

  // The new residual.
  template <class Arriving>
  __device__ __forceinline__ void add(uint4 (&held)[kPer], Arriving arriving) const {
    const uint4* const old = reinterpret_cast<const uint4*>(residual);
    if constexpr (kRanks == 1) {
      uint4 more[kPer];
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        if (piece(j) >= kRowPieces) break;
        held[j] = __ldcg(old + piece(j));
        more[j] = __ldcg(reinterpret_cast<const uint4*>(y) + piece(j));
      }
      arriving();
#pragma unroll
      for (int j = 0; j < kPer; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          half2& to = reinterpret_cast<half2*>(&held[j])[e];
          to = __hadd2(to, reinterpret_cast<const half2*>(&more[j])[e]);
        }
    } else {
      // As many at once as registers allow.
      constexpr int kAtOnce = kPer * kRanks <= 8 ? kPer : 1;
      shardwright::Patience patience(exchange.peers + kRanks);
      const uint4* const from = reinterpret_cast<const uint4*>(
          exchange.halves<kRanks, Z::kInner>(*exchange.rank, 0));
#pragma unroll
      for (int j = 0; j < kPer; ++j)
        if (piece(j) < kRowPieces) held[j] = __ldcg(old + piece(j));
#pragma unroll
      for (int first = 0; first < kPer; first += kAtOnce) {
        uint4 got[kAtOnce][kRanks];
        unsigned missing;
        do {
          missing = 0;
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
            for (int source = 0; source < kRanks; ++source)
              if (piece(first + j) < kRowPieces)
                got[j][source] = look_at_words(from + source * kRowPieces + piece(first + j));
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
            for (int source = 0; source < kRanks; ++source)
              if (piece(first + j) < kRowPieces) missing |= zeros(got[j][source]);
        } while (missing && !patience.ends());
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          if (piece(first + j) >= kRowPieces) break;
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float2 total = {0.f, 0.f};
#pragma unroll
            for (int source = 0; source < kRanks; ++source) {
              const float2 f = __half22float2(reinterpret_cast<const half2*>(&got[j][source])[e]);
              total.x += f.x, total.y += f.y;
            }
            half2& to = reinterpret_cast<half2*>(&held[first + j])[e];
            to = __hadd2(to, __floats2half2_rn(total.x, total.y));
          }
        }
      }
      arriving();
      uint4* const last =
          const_cast<uint4*>(from) + (last_place - exchange.place) * kRanks * kRowPieces;
#pragma unroll
      for (int j = 0; j < kPer; ++j)
        if (piece(j) < kRowPieces && mine(j))
#pragma unroll
          for (int source = 0; source < kRanks; ++source)
            last[source * kRowPieces + piece(j)] = make_uint4(0, 0, 0, 0);
    }
  }

  // Not 0 if one of eight halves is 0.
  static __device__ __forceinline__ unsigned zeros(uint4 v) {
    auto of = [](unsigned word) { return (word - 0x00010001u) & ~word; };
    return (of(v.x) | of(v.y) | of(v.z) | of(v.w)) & 0x80008000u;
  }
};

}  // namespace shardwright_gemv
#endif
