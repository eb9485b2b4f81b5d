#ifndef SHARDWRIGHT_DECODE_ATTENTION
#define SHARDWRIGHT_DECODE_ATTENTION
// Attention of one token of each row over the paged cache on CUDA GPUs; it can rotate and append
// that token as well. Included once in a module, whatever it is instantiated for.
//
// A warp takes a chunk of 16 positions at a time, with all query heads of a kv head, on tensor
// cores: scores^T = K q^T, then sum^T += V^T p^T, by mma m16n8k16. Positions and the head dimension
// fill the 16 rows, and up to 8 query heads each 8 columns. Keys and values go from the cache
// straight into the operands' registers, 16 bytes a load: which elements a product takes together
// is free, as long as both operands agree.
//
// The chunks of a row are dealt to the warps of as many blocks as the row's length asks for; the
// other blocks leave at once. The last block of a (token, kv head) to finish joins their sums,
// always in the same order.

namespace shardwright {

constexpr float kLowest = -1e30f;  // finite, so that the difference of two of them is 0
constexpr float kLog2e = 1.4426950408889634f;
constexpr int kChunk = 16;
constexpr int kCounters = 65536;

// Blocks of a (token, kv head) that have finished. The last one sets it back to 0.
static __device__ unsigned decode_finished[kCounters];

template <int N>
struct Int {
  static constexpr int value = N;
};

// Returns when the kernels before are done, where this one was launched ahead of their end.
__device__ __forceinline__ void wait_for_predecessors() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void mma_16n8k16(float* d, unsigned a0, unsigned a1, unsigned a2,
                                            unsigned a3, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Within 2e-7 of tanh.
__device__ __forceinline__ float tanh_fast(float x) {
  return 1.f - __fdividef(2.f, exp2_fast(x * (2.f * kLog2e)) + 1.f);
}

// An 8 x 8 matrix of halves, a row of which 4 lanes hold, transposed.
__device__ __forceinline__ unsigned transposed_8x8(float low, float high) {
  const half2 both = __floats2half2_rn(low, high);
  unsigned out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;"
      : "=r"(out) : "r"(*reinterpret_cast<const unsigned*>(&both)));
  return out;
}

// 4, 8 or 16 bytes. Volatile, because nothing may move above `wait_for_predecessors`.
template <int WORDS>
__device__ __forceinline__ void load_words(unsigned* to, const half* from) {
  if constexpr (WORDS == 4)
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
  else if constexpr (WORDS == 2)
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1]) : "l"(from));
  else
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(to[0]) : "l"(from));
}

template <int WORDS>
__device__ __forceinline__ void copy_words(unsigned* to, const half* from) {
  if constexpr (WORDS == 4) {
    const uint4 x = *reinterpret_cast<const uint4*>(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else if constexpr (WORDS == 2) {
    const uint2 x = *reinterpret_cast<const uint2*>(from);
    to[0] = x.x, to[1] = x.y;
  } else {
    to[0] = *reinterpret_cast<const unsigned*>(from);
  }
}

// How LANES lanes share D elements: calls f(Int<words>, word, first) for each piece of up to 16
// bytes, of which a lane holds the elements from first + lane * 2 * words on, as words from `word`.
template <int D, int LANES, typename F>
__device__ __forceinline__ void for_pieces(F f) {
  constexpr int kWhole = D / (LANES * 8), kRest = D % (LANES * 8);
#pragma unroll
  for (int p = 0; p < kWhole; ++p) f(Int<4>(), p * 4, p * LANES * 8);
  if constexpr ((kRest & (LANES * 4)) != 0) f(Int<2>(), kWhole * 4, kWhole * LANES * 8);
  if constexpr ((kRest & (LANES * 2)) != 0)
    f(Int<1>(), kWhole * 4 + (kRest & (LANES * 4) ? 2 : 0), D - LANES * 2);
}

// A sum of values weighted by exp2 of scores less `top`, and the weights' total.
struct Piece {
  float2 value = {0.f, 0.f};
  float top = kLowest, total = 0.f;

  // Add up to N pieces: `get(i, value, stats)` for i < count, stats being a top and a total.
  template <int N, typename F>
  __device__ __forceinline__ void add(int count, F get) {
    float2 values[N], stats[N];
    float above = top;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values[i] = make_float2(0.f, 0.f);
      stats[i] = make_float2(kLowest, 0.f);
      if (i < count) get(i, values[i], stats[i]);
      above = fmaxf(above, stats[i].x);
    }
    const float old = exp2_fast(top - above);
    value.x *= old;
    value.y *= old;
    total *= old;
    top = above;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float share = exp2_fast(stats[i].x - above);
      value.x += share * values[i].x;
      value.y += share * values[i].y;
      total += share * stats[i].y;
    }
  }
};

// Pair j of a head's D / 2 pairs. The first R / 2 are the elements j and j + R / 2, turned by the
// angle j of `table` [2, R / 2]; the others are neighbours, and stay as they are.
template <int D, int R>
__device__ __forceinline__ void turn(half* to, const half* head, const float* table, int j) {
  if (j >= R / 2) {
    load_words<1>(reinterpret_cast<unsigned*>(to + 2 * j), head + 2 * j);
    return;
  }
  float c, s;
  unsigned short low, high;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(c) : "l"(table + j));
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(s) : "l"(table + j + R / 2));
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(low) : "l"(head + j));
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(high) : "l"(head + j + R / 2));
  const float x = __half2float(__ushort_as_half(low)), y = __half2float(__ushort_as_half(high));
  to[j] = __float2half(x * c - y * s);
  to[j + R / 2] = __float2half(y * c + x * s);
}

// Sizes of an instance. A block has `Warps` warps; a row's context is cut among at most `Splits`
// blocks for each kv head, and one with few chunks uses only `Few` warps of each, so that its loads
// spread over the GPU. `Blocks` blocks keep the GPU busy. `Parts` blocks share the query heads of a
// kv head. With `Append`, `Rotary` elements of each head are turned, and with `Joined` queries,
// keys and values lie in one matrix. `Window` is 0 for none.
template <int Tokens, int Heads, int KvHeads, int HeadDim, int Page, int Parts, int Warps, int Few,
          int Splits, int Blocks, bool Append, bool Joined, int Rotary, int Window, bool Capped>
struct DecodeSizes {
  static constexpr int N = Tokens, H = Heads, K = KvHeads, D = HeadDim, PAGE = Page, P = Parts,
                       W = Warps, FEW = Few, S = Splits, BLOCKS = Blocks, R = Rotary,
                       WINDOW = Window;
  static constexpr bool APPEND = Append, JOINED = Joined, CAPPED = Capped;
  static constexpr int GROUP = H / K, Q = (GROUP + P - 1) / P, NT = (Q + 7) / 8;
  static constexpr int LINE = D + 2;  // of a staged sum, so that stores meet no bank twice
  static constexpr int THREADS = W * 32;
};

struct DecodeArgs {
  const half *q, *k, *v;  // of the new token; k and v only with APPEND, and not if JOINED
  const float* table;     // [N, 2, R / 2], with APPEND
  half *k_pages, *v_pages;
  const int *page_table, *rows, *positions;
  half* out;
  float *sums, *stats;
  int64_t layer;
  int pages, table_rows, max_pages;
  float scale, softcap;
};

template <typename Z>
__device__ __forceinline__ void decode_attention(const DecodeArgs& a, int t, int kp, int split,
                                                 int tid) {
  constexpr int D = Z::D, NT = Z::NT, W = Z::W, FEW = Z::FEW, Q = Z::Q, PAGE = Z::PAGE;
  constexpr int WORDS_K = D / 8, WORDS_V = D / 16;
  constexpr int LINE = D + 8;  // of heads in shared memory, so that reads meet no bank twice
  __shared__ __align__(16) float staged[W * NT * 8 * Z::LINE];
  __shared__ float2 joint[W][NT * 8];
  const int kv_head = kp / Z::P, part = kp % Z::P;
  const int warp = __shfl_sync(~0u, tid / 32, 0), lane = tid % 32, g = lane / 4, c = lane % 4;
  const int queries = min(Q, Z::GROUP - part * Q);  // of this block
  const int head0 = kv_head * Z::GROUP + part * Q;

  // The tables, and with APPEND what of the cache is read, change between steps only. So they may be
  // read ahead of the kernels before, since the first of a step is launched after all of the last
  // one's have ended. Most often row t is token t's and its chunk the one guessed here, which saves
  // waiting for three loads one after the other.
  const int guess = min((split * FEW + warp) * kChunk / PAGE, a.max_pages - 1);
  int page = a.page_table[min(t, a.table_rows - 1) * a.max_pages + guess];
  const int row = a.rows[t];
  const int length = a.positions[t] + 1;
  const int begin = Z::WINDOW > 0 ? max(0, length - Z::WINDOW) : 0;
  const int chunk0 = begin / kChunk;
  const int chunks = length > 0 ? (length + kChunk - 1) / kChunk - chunk0 : 0;
  int per_block = FEW;
  if constexpr (Z::N > 1) {  // a share of all rows' work
    int all = 0;
    for (int i = lane; i < Z::N; i += 32) {
      const int other = a.positions[i] + 1;
      all += (min(other, Z::WINDOW > 0 ? Z::WINDOW : other) + kChunk - 1) / kChunk;
    }
    all = __reduce_add_sync(~0u, all) * (Z::K * Z::P);
    per_block = max(FEW, (all + Z::BLOCKS - 1) / Z::BLOCKS);
  }
  const int splits = min(Z::S, (chunks + per_block - 1) / per_block);
  half* const out = a.out + ((int64_t)t * Z::H + head0) * D;
  if (split >= splits) {
    if (split == 0) {  // no context: an inactive token
      wait_for_predecessors();
      for (int i = tid; i < queries * D; i += Z::THREADS) out[i] = __float2half(0.f);
    }
    return;
  }
  // The first FEW warps of all blocks take the first chunks, and so on.
  const int first = (warp / FEW) * (FEW * splits) + split * FEW + warp % FEW;
  const int stride = W * splits;
  int count = first < chunks;
  if (chunks - first > stride) count = (chunks - first + stride - 1) / stride;
  const int last = first + (count - 1) * stride;  // the chunk taken first: it may be the new one
  const int* const page_row = a.page_table + (int64_t)row * a.max_pages;
  auto page_of = [&](int chunk) { return page_row[(chunk0 + chunk) * kChunk / PAGE]; };
  if (count > 0 && (row != t || (chunk0 + last) * kChunk / PAGE != guess)) page = page_of(last);
  int ahead = 0;  // pages of the next 32 chunks, one in each lane
  auto base_of = [&](int page, int chunk) {
    const int64_t at = ((a.layer * a.pages + page) * Z::K + kv_head) * PAGE;
    return (at + (chunk0 + chunk) * kChunk % PAGE) * D;
  };

  unsigned keys[2][WORDS_K], values[4][WORDS_V], query[NT][WORDS_K];
  float sum[NT][WORDS_V][4] = {}, high[NT][2], mass[NT][2] = {};
#pragma unroll
  for (int n = 0; n < NT; ++n) high[n][0] = high[n][1] = kLowest;
  auto load_keys = [&](int64_t base) {
    const half* const at = a.k_pages + base + g * D;
    for_pieces<D, 4>([&](auto words, int word, int d) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        load_words<words.value>(&keys[i][word], at + c * 2 * words.value + (8 * i * D + d));
    });
  };
  auto position_of = [&](int i) { return 2 * c + i % 2 + i / 2 * 8; };
  auto load_values = [&](int64_t base) {
    const half* const at = a.v_pages + base + 2 * c * D;
    for_pieces<D, 8>([&](auto words, int word, int d) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        load_words<words.value>(&values[i][word],
                                at + g * 2 * words.value + ((i % 2 + i / 2 * 8) * D + d));
    });
  };

  if (!Z::APPEND) wait_for_predecessors();
  int64_t base = 0;
  if (count > 0) {
    base = base_of(page, last);
    load_keys(base);
    load_values(base);
    if (count > 1) ahead = page_of(first + min(lane, count - 1) * stride);
  }
  if (Z::APPEND) wait_for_predecessors();
  constexpr int LONG = (Z::H + 2 * Z::K) * D;  // of a token's queries, keys and values
  const half* const q = a.q + (int64_t)t * (Z::JOINED ? LONG : Z::H * D) + head0 * D;
  half* const heads = reinterpret_cast<half*>(staged);  // queries; with APPEND the key and value
  if constexpr (Z::APPEND) {
    const float* const table = a.table + t * Z::R;
    const int64_t token = (int64_t)t * (Z::JOINED ? LONG : Z::K * D) + kv_head * D;
    const half* const key = Z::JOINED ? a.q + token + Z::H * D : a.k + token;
    const half* const value = Z::JOINED ? a.q + token + (Z::H + Z::K) * D : a.v + token;
    for (int i = tid; i < (queries + 1) * (D / 2); i += Z::THREADS) {
      const int head = i / (D / 2), j = i % (D / 2);
      turn<D, Z::R>(heads + head * LINE, head < queries ? q + head * D : key, table, j);
    }
    for (int i = tid; i < D / 2; i += Z::THREADS)
      load_words<1>(reinterpret_cast<unsigned*>(heads + (queries + 1) * LINE) + i, value + 2 * i);
  } else {
    for (int i = tid; i < queries * (D / 8); i += Z::THREADS)
      load_words<4>(reinterpret_cast<unsigned*>(heads + i / (D / 8) * LINE + i % (D / 8) * 8),
                    q + i * 8);
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < NT; ++n)
    for_pieces<D, 4>([&](auto words, int word, int d) {
      copy_words<words.value>(&query[n][word],
                              heads + min(n * 8 + g, queries - 1) * LINE + d + c * 2 * words.value);
    });
  if (Z::APPEND && count > 0 && last == chunks - 1) {
    // The new token's key and value: into this warp's registers and, once, into the cache.
    const int slot = (length - 1) % kChunk;
    const half *const key = heads + queries * LINE, *const value = key + LINE;
    for_pieces<D, 4>([&](auto words, int word, int d) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (g + 8 * i == slot)
          copy_words<words.value>(&keys[i][word], key + d + c * 2 * words.value);
    });
    for_pieces<D, 8>([&](auto words, int word, int d) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (position_of(i) == slot)
          copy_words<words.value>(&values[i][word], value + d + g * 2 * words.value);
    });
    if (part == 0)
      for (int i = lane; i < D / 2; i += 32) {
        reinterpret_cast<unsigned*>(a.k_pages + base + slot * D)[i] =
            reinterpret_cast<const unsigned*>(key)[i];
        reinterpret_cast<unsigned*>(a.v_pages + base + slot * D)[i] =
            reinterpret_cast<const unsigned*>(value)[i];
      }
  }
  __syncthreads();  // `staged` has another use

  for (int it = 0; it < count; ++it) {
    const int chunk = it == 0 ? last : first + (it - 1) * stride;
    float score[NT][4] = {}, more[NT][4] = {};  // two sums, which do not wait for each other
    for_pieces<D, 4>([&](auto words, int word, int) {
#pragma unroll
      for (int w = 0; w < words.value; w += 2)
#pragma unroll
        for (int n = 0; n < NT; ++n)
          mma_16n8k16(w == 0 ? score[n] : more[n], keys[0][word + w], keys[1][word + w],
                      keys[0][word + w + 1], keys[1][word + w + 1], query[n][word + w],
                      query[n][word + w + 1]);
    });
    int64_t next = 0;
    if (it + 1 < count) {
      if (it > 0 && it % 32 == 0) ahead = page_of(first + min(it + lane, count - 1) * stride);
      next = base_of(__shfl_sync(~0u, ahead, it % 32), first + it * stride);
      load_keys(next);
    }
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float x = (score[n][e] + more[n][e]) * a.scale;
        score[n][e] = (Z::CAPPED ? tanh_fast(x * (1.f / a.softcap)) * a.softcap : x) * kLog2e;
      }
    const int position = (chunk0 + chunk) * kChunk;
    if (position + kChunk > length || position < begin) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int p = position + g + 8 * i;
        if (p < length && p >= begin) continue;
#pragma unroll
        for (int n = 0; n < NT; ++n) score[n][2 * i] = score[n][2 * i + 1] = -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (position + position_of(i) >= length)  // no number yet
#pragma unroll
          for (int w = 0; w < WORDS_V; ++w) values[i][w] = 0;
    }
    unsigned weight[NT][2];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& x = score[n][h];
        float& y = score[n][2 + h];
        float top = fmaxf(x, y);
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, mask));
        top = fmaxf(top, high[n][h]);
        const float rescale = exp2_fast(high[n][h] - top);
        high[n][h] = top;
        x = exp2_fast(x - top);
        y = exp2_fast(y - top);
        mass[n][h] = mass[n][h] * rescale + x + y;
#pragma unroll
        for (int w = 0; w < WORDS_V; ++w) {
          sum[n][w][h] *= rescale;
          sum[n][w][2 + h] *= rescale;
        }
      }
      weight[n][0] = transposed_8x8(score[n][0], score[n][1]);
      weight[n][1] = transposed_8x8(score[n][2], score[n][3]);
    }
#pragma unroll
    for (int w = 0; w < WORDS_V; ++w) {
      const unsigned a0 = __byte_perm(values[0][w], values[1][w], 0x5410);
      const unsigned a1 = __byte_perm(values[0][w], values[1][w], 0x7632);
      const unsigned a2 = __byte_perm(values[2][w], values[3][w], 0x5410);
      const unsigned a3 = __byte_perm(values[2][w], values[3][w], 0x7632);
#pragma unroll
      for (int n = 0; n < NT; ++n)
        mma_16n8k16(sum[n][w], a0, a1, a2, a3, weight[n][0], weight[n][1]);
    }
    if (it + 1 < count) load_values(next);
  }

  // Join the warps. Even query heads are staged in one half of shared memory, odd in the other.
  constexpr int HALF = W * NT * 4 * Z::LINE;
  auto place = [&](int w, int head) {
    return head % 2 * HALF + (w * NT * 4 + head / 2) * Z::LINE;
  };
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2)
        mass[n][h] += __shfl_xor_sync(~0u, mass[n][h], mask);
      const int head = n * 8 + 2 * c + h;
      if (g == 0) {
        joint[warp][head] = make_float2(high[n][h], mass[n][h]);
      }
      if (count > 0)
        for_pieces<D, 8>([&](auto words, int word, int d) {
#pragma unroll
          for (int w = 0; w < words.value; ++w)
            *reinterpret_cast<float2*>(
                &staged[place(warp, head) + d + (g * words.value + w) * 2]) =
                make_float2(sum[n][word + w][h], sum[n][word + w][2 + h]);
        });
    }
  }
  __syncthreads();
  // Warps in the order of their first chunks: those with a chunk come first.
  const int left = chunks - split * FEW, per_round = FEW * splits;
  int busy = 0;
  for (int r = 0; r < W / FEW; ++r) busy += max(0, min(FEW, left - r * per_round));
  // Pairs of elements are counted over all query heads.
  constexpr int PAIRS = Q * D / 2;
  const int pairs = queries * (D / 2);
  const int64_t item = (int64_t)t * Z::K * Z::P + kp;
  float2* const sums = reinterpret_cast<float2*>(a.sums) + item * Z::S * PAIRS;
  float2* const stats = reinterpret_cast<float2*>(a.stats) + item * Z::S * Q;
  auto write = [&](int i, const Piece& piece) {
    *reinterpret_cast<half2*>(out + 2 * i) =
        __floats2half2_rn(piece.value.x / piece.total, piece.value.y / piece.total);
  };
  for (int i = tid; i < pairs; i += Z::THREADS) {
    const int head = i / (D / 2), d = i % (D / 2) * 2;
    Piece piece;
    piece.add<W>(busy, [&](int w, float2& value, float2& of) {
      value = *reinterpret_cast<const float2*>(&staged[place(w, head) + d]);
      of = joint[w][head];
    });
    if (splits == 1) {
      write(i, piece);
    } else {
      sums[split * PAIRS + i] = piece.value;
      if (d == 0) stats[split * Q + head] = make_float2(piece.top, piece.total);
    }
  }
  if (splits == 1) return;

  __shared__ bool is_last;
  __syncthreads();
  if (tid == 0) {
    unsigned before;
    // Ordered behind this block's sums, and before the reading of all.
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(before) : "l"(decode_finished + item), "r"(splits - 1) : "memory");
    is_last = before == splits - 1;
  }
  __syncthreads();
  if (!is_last) return;
  for (int i = tid; i < pairs; i += Z::THREADS) {
    Piece piece;
    for (int first = 0; first < splits; first += 8)
      piece.add<8>(splits - first, [&](int j, float2& value, float2& of) {
        value = __ldcg(sums + (first + j) * PAIRS + i);
        of = __ldcg(stats + (first + j) * Q + i / (D / 2));
      });
    write(i, piece);
  }
}

template <typename Z>
__device__ __forceinline__ void decode_attention(
    const half* q, const half* k, const half* v, const float* table, half* k_pages, half* v_pages,
    const int* page_table, const int* rows, const int* positions, half* out, float* sums,
    float* stats, int64_t layer, int pages, int table_rows, int max_pages, float scale,
    float softcap, int t, int kp, int split, int tid) {
  decode_attention<Z>({q, k, v, table, k_pages, v_pages, page_table, rows, positions, out, sums,
                       stats, layer, pages, table_rows, max_pages, scale, softcap},
                      t, kp, split, tid);
}

}  // namespace shardwright
#endif
