// Products of many tokens with a four-bit weight on Hopper's tensor cores; q4_gemm.py explains
// them. Guarded, because two kernels of a module include it; after ptx.cuh and wgmma.cuh.
#ifndef SHARDWRIGHT_Q4_GEMM
#define SHARDWRIGHT_Q4_GEMM

// The image of all of x: chunk `chunk` of a token's columns, zeros behind the last token.
__device__ __forceinline__ void shardwright_q4_image(
    const half* x, half* image, int n, int inner, int row, int chunk) {
  const int place = chunk % 16;
  half eight[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int column = 32 * (i / 2) + 8 * (place / 4) + place % 4 + 4 * (i % 2);
    eight[i] = row < n ? x[(size_t)row * inner + chunk / 16 * 128 + column] : __float2half(0.f);
  }
  *reinterpret_cast<uint4*>(image + shardwright_q4::image_at(row, chunk, n, inner)) =
      *reinterpret_cast<uint4*>(eight);
}
namespace shardwright_q4 {
constexpr int kStageBytes = 192 * 1024, kPitch = 272;  // of a row of 128 results, no multiple of 128

// Where the rows of a result go: to memory.
struct Here {
  static constexpr bool kGated = false;
  half* out;
  int rows;

  // One feature or eight, as T is a half or uint4.
  template <typename T>
  __device__ __forceinline__ void put(int token, int feature, T value) const {
    *reinterpret_cast<T*>(out + (size_t)token * rows + feature) = value;
  }
};

// silu(gate) * up, of the halves of a result's features, as an image.
struct Gated {
  static constexpr bool kGated = true;
  half* image;
};

// The rows of the weight that a lane reads: `row` and the one 8 below it.
struct Lanes {
  const uint4 *a, *b;
  const half *scale_a, *scale_b;
  int blocks, per_scale;
  uint4 words_a, words_b;
  half factor_a, factor_b;

  __device__ __forceinline__ Lanes(const uint4* packed, const half* scale, int row, int rows,
                                   int inner, int group) {
    const int t = threadIdx.x % 4, first = min(row, rows - 1), second = min(row + 8, rows - 1);
    a = packed + (size_t)first * (inner / 32) + t;
    b = packed + (size_t)second * (inner / 32) + t;
    scale_a = scale + (size_t)first * (inner / group);
    scale_b = scale + (size_t)second * (inner / group);
    blocks = inner / 128;
    per_scale = group / 32;
  }
  __device__ __forceinline__ void load(int block) {
    const int at = min(block, blocks - 1) * 4, s = (at + (int)threadIdx.x % 4) / per_scale;
    words_a = __ldg(a + at);
    words_b = __ldg(b + at);
    factor_a = __ldg(scale_a + s);
    factor_b = __ldg(scale_b + s);
  }
  // Operands of the two steps of 16 columns that word `i` of each row is for.
  __device__ __forceinline__ void operands(int i, unsigned (*out)[4]) const {
    const unsigned a4[4] = {words_a.x, words_a.y, words_a.z, words_a.w};
    const unsigned b4[4] = {words_b.x, words_b.y, words_b.z, words_b.w};
    unsigned x[4], y[4];
    shardwright_q4_unpack(a4[i], factor_a, x);
    shardwright_q4_unpack(b4[i], factor_b, y);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      out[s][0] = x[2 * s];
      out[s][1] = y[2 * s];
      out[s][2] = x[2 * s + 1];
      out[s][3] = y[2 * s + 1];
    }
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <int kTokens, class Sink>
__device__ __forceinline__ void product(
    const half* image, const uint4* packed, const half* scale, const Sink& sink,
    unsigned char* shared, int n, int rows, int inner, int group, int tile, int band) {
  constexpr int kStage = kTokens * 128, kStages = kStageBytes / kStage;
  const unsigned stages = shardwright::address(shared), barriers = stages + kStages * kStage;
  const int tid = threadIdx.x, warpgroup = tid / 128, blocks = inner / 64;
  if (tid == 0) {
    for (int i = 0; i < kStages; ++i) {  // loaded, and read by both warpgroups
      shardwright::phase_start(barriers + i * 16, 1);
      shardwright::phase_start(barriers + i * 16 + 8, 2);
    }
    shardwright::phases_started();
  }
  __syncthreads();
  if (warpgroup == 2) {
    shardwright::give_registers<40>();
    if (tid == 256) {
      const unsigned char* from =
          reinterpret_cast<const unsigned char*>(image) + (size_t)tile * blocks * kStage;
      for (int i = 0; i < blocks; ++i) {
        const int stage = i % kStages;
        const unsigned loaded = barriers + stage * 16;
        if (i >= kStages) shardwright::phase_wait(loaded + 8, (i / kStages + 1) & 1);
        shardwright::phase_expect(loaded, kStage);
        shardwright::copy_bulk(stages + stage * kStage, from + (size_t)i * kStage, kStage, loaded);
      }
    }
    shardwright::meet<1, 384>();
    return;
  }
  shardwright::take_registers<232>();
  float sums[kTokens / 2];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0.f;
  const int lane = tid % 32, corner = warpgroup * 64 + tid / 32 % 4 * 16;
  const int first = Sink::kGated ? gated_row(band, corner, rows / 2) : band * 128 + corner;
  Lanes now(packed, scale, first + lane / 4, rows, inner, group);
  now.load(0);
  unsigned a[8][4];
  now.operands(0, a);
  int stage = 0, parity = 0;
  for (int block = 0; block < now.blocks; ++block) {
    Lanes next = now;
    next.load(block + 1);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      if (word % 2 == 0) shardwright::phase_wait(barriers + stage * 16, parity);
      const uint64_t x = shardwright::panel_at(stages + stage * kStage) + word % 2 * 4;
      shardwright::wgmma_fence();
      shardwright::wgmma<kTokens>(sums, a[word * 2], x);
      shardwright::wgmma<kTokens>(sums, a[word * 2 + 1], x + 2);
      shardwright::wgmma_commit();
      shardwright::wgmma_wait<1>();
      // All but the newest products are done, and so is reading the stage before.
      if (word % 2 == 0 && block + word > 0 && tid % 128 == 0)
        shardwright::phase_arrive(barriers + (stage == 0 ? kStages - 1 : stage - 1) * 16 + 8);
      if (word < 3)
        now.operands(word + 1, a + word * 2 + 2);
      else
        next.operands(0, a);
      if (word % 2 == 1 && ++stage == kStages) stage = 0, parity ^= 1;
    }
    now = next;
  }
  shardwright::wgmma_wait<0>();
  shardwright::meet<1, 384>();  // nothing is left in the stages
  // Lanes hold columns of the result; shared memory turns them to rows of 128 features.
  const int m = lane / 8;
#pragma unroll
  for (int j = 0; j < kTokens / 16; ++j) {
    unsigned r[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* s = sums + (j * 2 + i / 2) * 4 + i % 2 * 2;
      const half2 pair = __floats2half2_rn(s[0], s[1]);
      r[i] = *reinterpret_cast<const unsigned*>(&pair);
    }
    const int token = j * 16 + m / 2 * 8 + lane % 8;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
                 :: "r"(stages + token * kPitch + (corner + m % 2 * 8) * 2), "r"(r[0]), "r"(r[1]),
                    "r"(r[2]), "r"(r[3]) : "memory");
  }
  shardwright::meet<2, 256>();
  if constexpr (Sink::kGated) {
    put_gated<kTokens, kPitch>(shared, sink.image, n, rows / 2, band, tile * kTokens, tid);
  } else {
    for (int i = tid; i < kTokens * 16; i += 256) {
      const int token = tile * kTokens + i / 16, feature = band * 128 + i % 16 * 8;
      if (token < n && feature < rows)
        sink.put(token, feature,
                 *reinterpret_cast<const uint4*>(shared + i / 16 * kPitch + i % 16 * 16));
    }
  }
}
#else
// Eight warps of 16 rows; x comes from memory (the cache) as it is needed, 64 tokens at a time.
template <int kTokens, class Sink>
__device__ __forceinline__ void product(
    const half* image, const uint4* packed, const half* scale, const Sink& sink,
    unsigned char* shared, int n, int rows, int inner, int group, int tile, int band) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, corner = threadIdx.x / 32 * 16;
  const int row = g + (Sink::kGated ? gated_row(band, corner, rows / 2) : band * 128 + corner);
  if (threadIdx.x >= 256) return;
  for (int part = 0; part < kTokens / 64; ++part) {
    float sums[8][4] = {};
    Lanes weight(packed, scale, row, rows, inner, group);
    for (int block = 0; block < weight.blocks; ++block) {
      weight.load(block);
      for (int word = 0; word < 4; ++word) {
        unsigned a[2][4];
        weight.operands(word, a);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const int token = part * 64 + j * 8 + g;
          const size_t line =
              ((size_t)tile * (inner / 64) + block * 2 + word / 2) * kTokens + token;
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            unsigned b[2];
#pragma unroll
            for (int high = 0; high < 2; ++high) {
              const int chunk = word % 2 * 4 + s * 2 + high;
              b[high] = *reinterpret_cast<const unsigned*>(
                  image + line * 64 + (chunk ^ token % 8) * 8 + 2 * t);
            }
            shardwright::mma_16n8k16(sums[j], a[s], b);
          }
        }
      }
    }
    if constexpr (Sink::kGated) {
      for (int j = 0; j < 8; ++j)
        for (int i = 0; i < 4; ++i) {
          unsigned char* const to = shared + (j * 8 + 2 * t + i % 2) * kPitch;
          reinterpret_cast<half*>(to)[corner + g + i / 2 * 8] = __float2half_rn(sums[j][i]);
        }
      shardwright::meet<2, 256>();
      put_gated<64, kPitch>(shared, sink.image, n, rows / 2, band, tile * kTokens + part * 64,
                            threadIdx.x);
      shardwright::meet<2, 256>();
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = tile * kTokens + part * 64 + j * 8 + 2 * t + i % 2;
          const int feature = row + i / 2 * 8;
          if (token < n && feature < rows) sink.put(token, feature, __float2half_rn(sums[j][i]));
        }
    }
  }
}
#endif
}  // namespace shardwright_q4

// A block of image [n, inner] x weight [rows, inner].
template <class Sink>
__device__ __forceinline__ void shardwright_q4_gemm_to(
    const Sink& sink, const half* image, const unsigned* words, const half* scale,
    unsigned char* buffer, int n, int rows, int inner, int group, int block) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(buffer);
  unsigned char* shared = buffer + ((start + 1023) / 1024 * 1024 - start);
  const int size = 1 << shardwright_q4::tile_bits(n), tiles = (n + 255) / 256;
  const int tile = block % tiles, band = block / tiles;  // neighbours share the weight
  const uint4* packed = reinterpret_cast<const uint4*>(words);
#define PRODUCT(k) \
  shardwright_q4::product<k>(image, packed, scale, sink, shared, n, rows, inner, group, tile, band)
  if (size == 64) PRODUCT(64);
  else if (size == 128) PRODUCT(128);
  else PRODUCT(256);
#undef PRODUCT
}

__device__ __forceinline__ void shardwright_q4_gemm(
    const half* image, const unsigned* words, const half* scale, half* out, unsigned char* buffer,
    int n, int rows, int inner, int group, int block) {
  shardwright_q4_gemm_to(shardwright_q4::Here{out, rows}, image, words, scale, buffer, n, rows,
                         inner, group, block);
}

__device__ __forceinline__ void shardwright_q4_gemm_gated(
    const half* image, const unsigned* words, const half* scale, half* gated, unsigned char* buffer,
    int n, int rows, int inner, int group, int block) {
  shardwright_q4_gemm_to(shardwright_q4::Gated{gated}, image, words, scale, buffer, n, rows, inner,
                         group, block);
}
#endif
