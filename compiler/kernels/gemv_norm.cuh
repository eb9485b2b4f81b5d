// The outputs of products of several tokens in front of a norm and behind it; gemv_norm.py explains and
// calls them. Included once in a module, after gemv_mma.cuh and patience.cuh.
#ifndef SHARDWRIGHT_GEMV_NORM
#define SHARDWRIGHT_GEMV_NORM

namespace shardwright_gemv {

#ifndef SHARDWRIGHT_EMULATED  // tests on a CPU bring their own of these
__device__ __forceinline__ void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}
// `kWords` words, one or two, to another GPU's memory or this one's, and a look at what comes so.
template <int kWords>
__device__ __forceinline__ void send_words(unsigned* to, const unsigned (&v)[kWords]) {
  if constexpr (kWords == 2)
    asm volatile("st.relaxed.sys.global.v2.u32 [%0], {%1,%2};" ::"l"(to), "r"(v[0]), "r"(v[1])
                 : "memory");
  else
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(to), "r"(v[0]) : "memory");
}
template <int kWords>
__device__ __forceinline__ void look_for_words(unsigned (&v)[kWords], const unsigned* from) {
  if constexpr (kWords == 2)
    asm volatile("ld.relaxed.sys.global.v2.u32 {%0,%1}, [%2];"
                 : "=r"(v[0]), "=r"(v[1]) : "l"(from) : "memory");
  else
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v[0]) : "l"(from) : "memory");
}
#endif  // SHARDWRIGHT_EMULATED

// What travels between the two is a 16th, lest products of large sums and weights be infinite. Those
// below 2^-10, where half precision then begins to lose bits, are small beside a row's others.
constexpr float kShare = 1.f / 16.f;

// A product plus `residual`, each rounded as by a kernel of its own, and what the norm of that needs.
template <class Z>
struct AddedOutput {
  using Type = half;
  static constexpr bool kNorms = true;
  static constexpr int kCount = Z::kWide, kBlocks = Z::kParts * Z::kCluster;
  const half *residual, *norm;
  half *sum, *weighted;
  float* squares;  // [tokens, kBlocks]
  alignas(8) half old[4], by[4];  // of the next values

  template <class>
  __device__ __forceinline__ void before() const {
    const int part = blockIdx.x / Z::kCluster, first = Z::kOutputs / kCount * part / Z::kParts;
    if (threadIdx.x == 0) prefetch(norm + first * kCount);
  }
  __device__ __forceinline__ void look() {}
  __device__ __forceinline__ void start(float*) const {}
  static __device__ __forceinline__ float scale(const float*, int) { return 1.f; }

  // What `put` needs for a token's values from column `output` on.
  __device__ __forceinline__ void fetch(int token, int output) {
    const long long at = (long long)token * Z::kOutputs + output;
    copy(old, residual + at), copy(by, norm + output);
  }
  // The i-th values of the block, which `fetch` was called for; `of_items` has a float for each.
  __device__ __forceinline__ void put(int i, int token, int output, const half (&values)[kCount],
                                      float* of_items) const {
    const long long at = (long long)token * Z::kOutputs + output;
    alignas(8) half total[4], more[4];
    float square = 0.f;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      total[j] = __float2half(__half2float(old[j]) + __half2float(values[j]));
      const float f = __half2float(total[j]);
      square += f * f;
      more[j] = __float2half(fmaxf(-65504.f, fminf(65504.f, f * __half2float(by[j]) * kShare)));
    }
    copy(sum + at, total), copy(weighted + at, more);
    of_items[i] = square;
  }
  // A token has `each` items in the cluster; those from `from` to `to` of all are this block's.
  __device__ __forceinline__ void end(const float* of_items, int each, int from, int to) const {
    __syncthreads();
    const int lane = threadIdx.x % 32;
    for (int token = threadIdx.x / 32; token < Z::kBatch; token += Z::kThreads / 32) {
      float total = 0.f;
      for (int i = token * each + lane; i < token * each + each; i += 32)
        if (i >= from && i < to) total += of_items[i];
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) total += __shfl_xor_sync(~0u, total, mask);
      if (lane == 0) squares[token * kBlocks + blockIdx.x] = total;
    }
  }

 private:
  static __device__ __forceinline__ void copy(half* to, const half* from) {
    if constexpr (kCount == 4) *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(from);
    else *to = *from;
  }
};

// Summands of all ranks, `kWords` words of two halves from each, in all ranks' buffers.
//
// An element travels alone: where it is to come there is a 0, and who sends a 0 sends -0. The thread
// that reads it sets it to 0 again. Summands have two places in turn: a rank that has received all of
// a sum knows that its peers have ended their kernel of the sum before, and so have cleared that.
//
// A block first sends all it has and then waits for no more than the same block of the other ranks
// sends. As its blocks, one to a multiprocessor at most, are all there at once, and kernels in front
// wait for no later ones, none waits for a block that cannot start.
template <int kRanks, int kWords>
struct Summands {
  const int64_t* peers;  // addresses of the buffers, and of a word that says "give up"
  const int* rank;
  int64_t first;  // word of the buffers
  unsigned *to[kRanks], *own;

  // Where they go; the addresses come while something else is waited for.
  __device__ __forceinline__ void find() {
    const int source = *rank;
    own = reinterpret_cast<unsigned*>(peers[source]) + first;
#pragma unroll
    for (int d = 0; d < kRanks; ++d)  // beginning with another rank than the others do
      to[d] = reinterpret_cast<unsigned*>(peers[(source + 1 + d) % kRanks]) + first + source * kWords;
  }
  // Pairs of values, to word `at` of this rank's summands.
  template <int kCount>
  __device__ __forceinline__ void send(int at, const half (&values)[kCount]) const {
    unsigned words[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      unsigned word;
      memcpy(&word, &values[2 * i], 4);
      words[i] = word | (~((word & 0x7fff7fffu) + 0x7fff7fffu) & 0x80008000u);
    }
#pragma unroll
    for (int d = 0; d < kRanks; ++d) send_words(to[d] + at, words);
  }
  // The sums of what all ranks have sent to words `at`, added in their order; where that is
  // negative, none.
  template <int kItems, int kCount>
  __device__ __forceinline__ void receive(const int (&at)[kItems],
                                          half (&values)[kItems][kCount]) const {
    shardwright::Patience patience(peers + kRanks);
    unsigned got[kItems][kRanks][kCount / 2], missing;
    do {
      missing = 0;
#pragma unroll
      for (int j = 0; j < kItems; ++j)
#pragma unroll
        for (int source = 0; source < kRanks; ++source)
          if (at[j] >= 0) look_for_words(got[j][source], own + source * kWords + at[j]);
#pragma unroll
      for (int j = 0; j < kItems; ++j)
#pragma unroll
        for (int source = 0; source < kRanks; ++source)
#pragma unroll
          for (int i = 0; i < kCount / 2; ++i)
            if (at[j] >= 0) {
              const unsigned word = got[j][source][i];
              missing |= (word - 0x00010001u) & ~word & 0x80008000u;
            }
    } while (missing && !patience.ends());
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (at[j] < 0) continue;
      float totals[kCount] = {};
      constexpr unsigned kNone[kCount / 2] = {};
#pragma unroll
      for (int source = 0; source < kRanks; ++source) {
        half of_rank[kCount];
        memcpy(of_rank, got[j][source], kCount * 2);
#pragma unroll
        for (int i = 0; i < kCount; ++i) totals[i] += __half2float(of_rank[i]);
        send_words(own + source * kWords + at[j], kNone);
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[j][i] = __float2half(totals[i]);
    }
  }
};

// As `AddedOutput`, of the sum over ranks of their products.
template <class Z, int kRanks>
struct SummedOutput : AddedOutput<Z> {
  using Base = AddedOutput<Z>;
  static_assert(Z::kWide == 4, "pairs of values travel");
  Summands<kRanks, Z::kBatch * Z::kOutputs / 2> summands;

  __device__ __forceinline__ void fetch(int, int) { summands.find(); }
  __device__ __forceinline__ void put(int i, int, int, const half (&values)[4], float*) const {
    summands.send(word(i), values);
  }
  __device__ __forceinline__ void end(float* of_items, int each, int from, int to) {
    for (int i = from + threadIdx.x; i < to; i += Z::kThreads) {
      const int token = i / each, output = (first() + i % each) * 4, at[1] = {word(i)};
      half values[1][4];
      Base::fetch(token, output);
      summands.receive(at, values);
      Base::put(i, token, output, values[0], of_items);
    }
    Base::end(of_items, each, from, to);
  }

 private:
  // Of a block's, or cluster's, units of four outputs.
  static __device__ __forceinline__ int first() {
    return Z::kOutputs / 4 * (blockIdx.x / Z::kCluster) / Z::kParts;
  }
  // What neighbouring threads send is neighbouring.
  static __device__ __forceinline__ int word(int i) { return (first() * Z::kBatch + i) * 2; }
};

// The results of a product, whose x is `weighted` of a sum, as if that had been its norm.
template <class Z, class Out, int kBlocks>
struct NormedOutput {
  using Type = Out;
  static constexpr bool kNorms = true;
  static constexpr int kWarps = Z::kThreads / 32, kTokens = (Z::kBatch + kWarps - 1) / kWarps;
  static constexpr int kPer = (kBlocks + 31) / 32;
  const float* squares;  // [tokens, kBlocks]
  float epsilon;
  PlainOutput<Out> plain;
  float pieces[kTokens][kPer];  // of the tokens that a warp sums up

  template <class>
  __device__ __forceinline__ void before() const {}
  __device__ __forceinline__ void look() {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const int token = t * kWarps + threadIdx.x / 32, at = i * 32 + lane;
        pieces[t][i] = token < Z::kBatch && at < kBlocks ? __ldcg(squares + token * kBlocks + at) : 0.f;
      }
  }
  // `scales`, of all tokens; the threads meet before they are read.
  __device__ __forceinline__ void start(float* scales) const {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int token = t * kWarps + threadIdx.x / 32;
      float total = 0.f;
#pragma unroll
      for (int i = 0; i < kPer; ++i) total += pieces[t][i];
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) total += __shfl_xor_sync(~0u, total, mask);
      if (threadIdx.x % 32 == 0 && token < Z::kBatch)
        scales[token] = rsqrtf(total / Z::kInner + epsilon) / kShare;
    }
  }
  static __device__ __forceinline__ float scale(const float* scales, int token) {
    return scales[token];
  }
  __device__ __forceinline__ void fetch(int, int) {}
  __device__ __forceinline__ void put(int, int token, int output, const Out (&values)[Z::kWide],
                                      float*) const {
    if constexpr (Z::kWide == 1) plain.template put<Z>(token, output, values[0]);
    else plain.template put<Z>(token, output, values);
  }
  __device__ __forceinline__ void end(const float*, int, int, int) const {}
};

}  // namespace shardwright_gemv
#endif
