// A residual's sum and norm in front of a product of one token, and products whose rows go to all
// ranks as summands of it; gemv_mma.py calls them. Included once in a module, after gemv_mma.cuh.
//
// Between ranks an element travels as a word: a half, and the low half of a number that no call before
// has given it. So a reader polls its own memory, and nothing is ever cleared. A buffer has room for
// two sums, used in turn, each [ranks, features]: who sends the next but one has had all ranks'
// summands of the next, which they sent behind reading this one.
#ifndef SHARDWRIGHT_GEMV_SUM
#define SHARDWRIGHT_GEMV_SUM

namespace shardwright_gemv {

#ifndef SHARDWRIGHT_EMULATED  // tests on a CPU bring their own of these
__device__ __forceinline__ void send_word(unsigned* to, unsigned word) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}
__device__ __forceinline__ uint4 look_at_words(const unsigned* from) {
  uint4 w;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(from) : "memory");
  return w;
}
#endif  // SHARDWRIGHT_EMULATED

// Where the summands of all-reduce `index` of a step's `count` go. All-reduces are numbered through
// all steps; the lower half of that number is the flag.
struct Exchange {
  const int64_t* peers;  // addresses of the ranks' buffers, and of a word that says "give up"
  const int* calls;      // counts steps
  const int* rank;
  int index, count;
  unsigned first_word;

  __device__ __forceinline__ unsigned number() const {
    return (unsigned)*calls * count + index + 1;
  }
  // Of the first of the two sums.
  template <int kFeatures>
  __device__ __forceinline__ unsigned* words(int owner, int source) const {
    return reinterpret_cast<unsigned*>(peers[owner]) + first_word + source * kFeatures;
  }
};

// The result of a product, sent to all ranks.
template <int kRanks>
struct SentOutput {
  using Type = half;
  Exchange exchange;
  unsigned* to[kRanks];
  unsigned flag, place;

  template <class Z>
  __device__ __forceinline__ void before() {
    const int rank = *exchange.rank;
#pragma unroll
    for (int d = 0; d < kRanks; ++d)  // beginning with another rank than the others do
      to[d] = exchange.words<Z::kOutputs>((rank + 1 + d) % kRanks, rank);
  }
  template <class Z>
  __device__ __forceinline__ void after() {
    const unsigned number = exchange.number();
    flag = number << 16, place = number % 2 * kRanks * Z::kOutputs;
  }
  template <class Z>
  __device__ __forceinline__ void put(int, int output, half value) const {
    unsigned short bits;
    memcpy(&bits, &value, 2);
#pragma unroll
    for (int d = 0; d < kRanks; ++d) send_word(to[d] + place + output, bits | flag);
  }
};

// x is the RMS norm of `residual` plus the sum over ranks of what `SentOutput` sent, or of one rank plus
// `y`. Every block computes all of it; each writes a part of the new residual.
template <class Z, int kRanks>
struct SumInput {
  // What kernels in front of the product that sent have written is there: it has waited for them.
  static constexpr bool kWaits = kRanks == 1;
  static constexpr int kPer = (Z::kPieces + Z::kThreads - 1) / Z::kThreads;
  static_assert(Z::kColumns && Z::kPhases == 1 && Z::kCluster == 1, "all of x is in a block");

  const half *residual, *y, *norm;
  half* sum;
  float epsilon;
  Exchange exchange;
  uint4 weight[kPer];

  static __device__ __forceinline__ int piece(int j) { return threadIdx.x + j * Z::kThreads; }

  __device__ __forceinline__ void before() {
#pragma unroll
    for (int j = 0; j < kPer; ++j)
      if (piece(j) < Z::kInner / 8) weight[j] = reinterpret_cast<const uint4*>(norm)[piece(j)];
  }

  __device__ __forceinline__ void stage(Staged<Z> staged, int, int) {
    uint4 held[kPer];
    add(held);
    float squares = 0.f;
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      if (piece(j) >= Z::kInner / 8) break;
      if (piece(j) % gridDim.x == blockIdx.x) reinterpret_cast<uint4*>(sum)[piece(j)] = held[j];
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
    __syncthreads();
    squares = 0.f;
#pragma unroll
    for (int w = 0; w < Z::kThreads / 32; ++w) squares += of_warps[w];
    const float scale = rsqrtf(squares / Z::kInner + epsilon);
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      if (piece(j) >= Z::kPieces) break;
      uint4 x = make_uint4(0, 0, 0, 0);
      if (piece(j) < Z::kInner / 8) {
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
  __device__ __forceinline__ void add(uint4 (&held)[kPer]) const {
    const uint4* const old = reinterpret_cast<const uint4*>(residual);
    if constexpr (kRanks == 1) {
      uint4 more[kPer];
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        if (piece(j) >= Z::kInner / 8) break;
        held[j] = __ldcg(old + piece(j));
        more[j] = __ldcg(reinterpret_cast<const uint4*>(y) + piece(j));
      }
#pragma unroll
      for (int j = 0; j < kPer; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          half2& to = reinterpret_cast<half2*>(&held[j])[e];
          to = __hadd2(to, reinterpret_cast<const half2*>(&more[j])[e]);
        }
    } else {
      const unsigned number = exchange.number(), flag = (number & 0xFFFFu) * 0x10001u;
      shardwright::Patience patience(exchange.peers + kRanks);
      const unsigned* const words = exchange.words<Z::kInner>(*exchange.rank, 0) +
                                    number % 2 * kRanks * Z::kInner;
#pragma unroll
      for (int j = 0; j < kPer; ++j)
        if (piece(j) < Z::kInner / 8) held[j] = __ldcg(old + piece(j));
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        if (piece(j) >= Z::kInner / 8) break;
        uint2 got[kRanks][2];
        bool all;
        do {
          all = true;
#pragma unroll
          for (int source = 0; source < kRanks; ++source)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const uint4 w = look_at_words(words + source * Z::kInner + piece(j) * 8 + h * 4);
              got[source][h].x = __byte_perm(w.x, w.y, 0x5410);
              got[source][h].y = __byte_perm(w.z, w.w, 0x5410);
              all = all && __byte_perm(w.x, w.y, 0x7632) == flag &&
                    __byte_perm(w.z, w.w, 0x7632) == flag;
            }
        } while (!all && !patience.ends());
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float2 total = {0.f, 0.f};
#pragma unroll
          for (int source = 0; source < kRanks; ++source) {
            const uint2& four = got[source][e / 2];
            const float2 f =
                __half22float2(*reinterpret_cast<const half2*>(e % 2 ? &four.y : &four.x));
            total.x += f.x, total.y += f.y;
          }
          half2& to = reinterpret_cast<half2*>(&held[j])[e];
          to = __hadd2(to, __floats2half2_rn(total.x, total.y));
        }
      }
    }
  }
};

}  // namespace shardwright_gemv
#endif
