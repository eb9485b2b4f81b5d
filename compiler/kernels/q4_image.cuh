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

// Lane `l` of four neighbours gets what the others have in x[l]: a transposed matrix.
__device__ __forceinline__ void transpose_four(uint4 (&x)[4], int l) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = l & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      uint4 &low = x[i], &high = x[i + step], give = upper ? low : high;
      give.x = __shfl_xor_sync(~0u, give.x, step);
      give.y = __shfl_xor_sync(~0u, give.y, step);
      give.z = __shfl_xor_sync(~0u, give.z, step);
      give.w = __shfl_xor_sync(~0u, give.w, step);
      (upper ? low : high) = give;
    }
  }
}

// Position 8 * place + i of 128 columns holds column 32 * (i / 2) + 8 * (place / 4) + place % 4 +
// 4 * (i % 2): the element that a lane multiplies there, in the order in which two nibbles are
// unpacked together. So 8 columns each of four neighbours, 32 apart, make four chunks: `columns`
// of part p are those from 128 * (p / 4) + 8 * (p % 4). All lanes of a warp come here, of which
// each four share out their chunks so as to write 64 bytes in a row: `token` and `part` say whose
// columns the one of number i has.
template <class Token, class Part>
__device__ __forceinline__ void put_image(half* image, const uint4 (&columns)[4], int lane,
                                          Token token, Part part, int n, int inner) {
  uint4 chunks[4];
#pragma unroll
  for (int place = 0; place < 4; ++place) {
    unsigned words[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {  // halves `place` and `place + 4` of the neighbour's columns
      const uint4 x = columns[q];
      const unsigned low = place < 2 ? x.x : x.y, high = place < 2 ? x.z : x.w;
      words[q] = place % 2 ? low >> 16 | (high & 0xffff0000u) : (low & 0xffffu) | high << 16;
    }
    chunks[place] = make_uint4(words[0], words[1], words[2], words[3]);
  }
  transpose_four(chunks, lane % 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int chunk = part(i) / 4 * 16 + part(i) % 4 * 4 + lane % 4;
    if (token(i) < n)
      *reinterpret_cast<uint4*>(image + image_at(token(i), chunk, n, inner)) = chunks[i];
  }
}
// The same where the four have the parts of 128 columns of one token.
__device__ __forceinline__ void put_image(half* image, const uint4 (&columns)[4], int token,
                                          int part, int n, int inner) {
  put_image(image, columns, part, [=](int) { return token; },
            [=](int i) { return part - part % 4 + i; }, n, inner);
}

// The same of lanes that hold results as mma leaves them: of 128 columns of a token, number `piece`,
// four lanes have two neighbours in each 8, and pair(i) are those from column 8 * i + 2 * (lane % 4).
// Two lanes share two chunks, of which each makes one.
template <class Pair>
__device__ __forceinline__ void put_pairs(half* image, Pair pair, int lane, int token, int piece,
                                          int n, int inner) {
  const bool upper = lane & 2;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    unsigned words[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const unsigned mine = pair(q * 4 + k);
      const unsigned other = __shfl_xor_sync(~0u, upper ? mine & 0xffffu : mine >> 16, 2);
      words[q] = upper ? other | (mine & 0xffff0000u) : (mine & 0xffffu) | other << 16;
    }
    const int chunk = piece * 16 + k * 4 + lane % 2 * 2 + lane / 2 % 2;
    if (token < n)
      *reinterpret_cast<uint4*>(image + image_at(token, chunk, n, inner)) =
          make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// gate = silu(gate) * up
__device__ __forceinline__ void silu_mul(uint4 (&gate)[4], const uint4 (&up)[4]) {
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
}

// The row of a weight of `features` gates and as many ups that the 16 rows of a warp begin with,
// `corner` in a block of 128: the upper 64 are the ups of the lower, and these are such as make
// whole chunks, 16 of each 32.
__device__ __forceinline__ int gated_row(int band, int corner, int features) {
  return corner / 64 * features + band / 2 * 128 + corner % 64 * 2 + band % 2 * 16;
}

// silu(gate) * up of such a block's results, `tile` [kTokens, kPitch bytes], whose first token is
// number `first`; by 256 threads.
template <int kTokens, int kPitch>
__device__ __forceinline__ void put_gated(const unsigned char* tile, half* image, int n,
                                          int features, int band, int first, int tid) {
  static_assert(kTokens * 2 % 32 == 0, "whole warps");
  for (int at = tid; at < kTokens * 2; at += 256) {
    const unsigned char* from = tile + at / 2 * kPitch + at % 2 * 16;
    uint4 gate[4], up[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      gate[q] = *reinterpret_cast<const uint4*>(from + q * 32);
      up[q] = *reinterpret_cast<const uint4*>(from + q * 32 + 128);
    }
    silu_mul(gate, up);
    put_image(image, gate, at, [=](int i) { return first + at / 4 * 2 + i / 2; },
              [=](int i) { return band * 2 + i % 2; }, n, features);
  }
}

// Columns `part` (see put_image) of silu(gate) * up, of the halves of y [n, 2 * inner]; for
// tokens behind the last one nothing is read or written.
__device__ __forceinline__ void silu_mul_image(const half* y, half* image, int n, int inner,
                                               int token, int part) {
  const half* from = y + (size_t)token * 2 * inner + part / 4 * 128 + part % 4 * 8;
  uint4 gate[4], up[4];
#pragma unroll
  for (int q = 0; q < 4; ++q)
    gate[q] = token < n ? *reinterpret_cast<const uint4*>(from + 32 * q) : uint4{};
#pragma unroll
  for (int q = 0; q < 4; ++q)
    up[q] = token < n ? *reinterpret_cast<const uint4*>(from + inner + 32 * q) : uint4{};
  silu_mul(gate, up);
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
