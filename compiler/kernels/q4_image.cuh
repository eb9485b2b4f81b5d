#ifndef SHARDWRIGHT_Q4_IMAGE
#define SHARDWRIGHT_Q4_IMAGE
// The image of x that q4_gemm.cuh multiplies, written by the kernels that compute x. Guarded,
// because several kernels of a module include it.

namespace shardwright_q4 {

// Tokens of a tile of the image, as a power of two.
__device__ __forceinline__ int tile_bits(int n) { return n <= 64 ? 6 : n <= 128 ? 7 : 8; }

// Where the 8 columns `chunk` of a token are: [tile][64 columns][token][column], the 16 bytes of a
// row swizzled as wgmma reads them.
__device__ __forceinline__ size_t image_at(int token, int chunk, int n, int inner) {
  const int bits = tile_bits(n);
  const size_t piece = (size_t)(token >> bits) * (inner / 64) + chunk / 8;
  const size_t line = (piece << bits) + (token & ((1 << bits) - 1));
  return line * 64 + (chunk % 8 ^ token % 8) * 8;
}

// Position 8 * place + i of 128 columns holds column 32 * (i / 2) + 8 * (place / 4) + place % 4 +
// 4 * (i % 2): the element that a lane multiplies there, in the order in which two nibbles are
// unpacked together. So 8 columns each of four neighbours, 32 apart, make four chunks: `columns`
// of a token are those from 128 * (part / 4) + 8 * (part % 4).
__device__ __forceinline__ void put_image(half* image, const uint4 (&columns)[4], int token,
                                          int part, int n, int inner) {
#pragma unroll
  for (int place = 0; place < 4; ++place) {
    unsigned words[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {  // halves `place` and `place + 4` of the neighbour's columns
      const uint4 x = columns[q];
      const unsigned low = place < 2 ? x.x : x.y, high = place < 2 ? x.z : x.w;
      words[q] = place % 2 ? low >> 16 | (high & 0xffff0000u) : (low & 0xffffu) | high << 16;
    }
    const int chunk = part / 4 * 16 + part % 4 * 4 + place;
    *reinterpret_cast<uint4*>(image + image_at(token, chunk, n, inner)) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Columns `part` (see put_image) of silu(gate) * up, of the halves of y [n, 2 * inner].
__device__ __forceinline__ void silu_mul_image(const half* y, half* image, int n, int inner,
                                               int token, int part) {
  const half* from = y + (size_t)token * 2 * inner + part / 4 * 128 + part % 4 * 8;
  uint4 gate[4], up[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) gate[q] = *reinterpret_cast<const uint4*>(from + 32 * q);
#pragma unroll
  for (int q = 0; q < 4; ++q) up[q] = *reinterpret_cast<const uint4*>(from + inner + 32 * q);
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    half2* g = reinterpret_cast<half2*>(&gate[q]);
    const half2* u = reinterpret_cast<const half2*>(&up[q]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 a = __half22float2(g[e]), b = __half22float2(u[e]);
      g[e] = __floats2half2_rn(__fdividef(a.x, 1.f + __expf(-a.x)) * b.x,
                               __fdividef(a.y, 1.f + __expf(-a.y)) * b.y);
    }
  }
  put_image(image, gate, token, part, n, inner);
}

// `sum = x + y` and the image of its norm, of one token by a block of kInner / 32 threads.
template <int kInner>
__device__ __forceinline__ void add_rms_norm_image(const half* x, const half* y,
                                                   const half* weight, half* sum, half* image,
                                                   float epsilon, int n, int token, int tid) {
  constexpr int kWarps = kInner / 1024;
  static_assert(kInner % 1024 == 0, "whole warps");
  __shared__ float partial[kWarps];
  const size_t first = (size_t)token * kInner + tid / 4 * 128 + tid % 4 * 8;
  uint4 value[4], other[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) value[q] = *reinterpret_cast<const uint4*>(x + first + 32 * q);
#pragma unroll
  for (int q = 0; q < 4; ++q) other[q] = *reinterpret_cast<const uint4*>(y + first + 32 * q);
  float squares = 0.f;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    half2* v = reinterpret_cast<half2*>(&value[q]);
    const half2* o = reinterpret_cast<const half2*>(&other[q]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      v[e] = __hadd2(v[e], o[e]);
      const float2 f = __half22float2(v[e]);
      squares += f.x * f.x + f.y * f.y;
    }
    *reinterpret_cast<uint4*>(sum + first + 32 * q) = value[q];
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) squares += __shfl_xor_sync(~0u, squares, lane);
  if (tid % 32 == 0) partial[tid / 32] = squares;
  __syncthreads();
  float all = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) all += partial[w];
  const float factor = rsqrtf(all / kInner + epsilon);
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const uint4 scales =
        *reinterpret_cast<const uint4*>(weight + tid / 4 * 128 + tid % 4 * 8 + 32 * q);
    half2* v = reinterpret_cast<half2*>(&value[q]);
    const half2* s = reinterpret_cast<const half2*>(&scales);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 f = __half22float2(v[e]), w = __half22float2(s[e]);
      v[e] = __floats2half2_rn(factor * f.x * w.x, factor * f.y * w.y);
    }
  }
  put_image(image, value, token, tid, n, kInner);
}

}  // namespace shardwright_q4
#endif
