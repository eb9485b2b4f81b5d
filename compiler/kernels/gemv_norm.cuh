// The outputs of products of several tokens in front of a norm and behind it; gemv_norm.py explains and
// calls them. Included once in a module, after gemv_mma.cuh.
#ifndef SHARDWRIGHT_GEMV_NORM
#define SHARDWRIGHT_GEMV_NORM

namespace shardwright_gemv {

#ifndef SHARDWRIGHT_EMULATED  // tests on a CPU bring their own of these
__device__ __forceinline__ void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
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
