#ifndef SHARDWRIGHT_DECODE_ATTENTION
#define SHARDWRIGHT_DECODE_ATTENTION
// Attention of one token of each row over the paged cache on CUDA GPUs; it can rotate and append
// that token as well. Included once in a module, whatever it is instantiated for; after ptx.cuh.
//
// An item is a kv head of a token, or a part of its query heads. A chunk is 16 positions of an item:
// keys and values, each in one piece of the cache. Some warps of a block, the loaders, copy the
// chunks that are the block's into a ring in shared memory, far ahead of the others, which take them
// in turn. So the memory stays busy whatever the others wait for. They work on tensor cores: scores^T
// = K q^T, then sum^T += V^T p^T, by mma m16n8k16. Positions and the head dimension fill the 16 rows,
// and up to 8 query heads each 8 columns. Which elements a product takes together is free, as long
// as both operands agree, so operands are read 16 bytes at a time.
//
// An item's chunks are dealt to as many blocks as its share of all contexts asks for. While contexts
// are so short that blocks are left over, the query heads are dealt to those as well. The other
// blocks leave at once. The last block to finish, of those with the same heads, joins their sums,
// always in the same order.
//
// With `Pair` two parts of a kv head's query heads are two blocks of a cluster, which copy half of
// each chunk for both: so it is read from the L2 cache once.

namespace shardwright {

constexpr float kLowest = -1e30f;  // finite, so that the difference of two of them is 0
constexpr float kLog2e = 1.4426950408889634f;
constexpr int kChunk = 16;
constexpr int kCounters = 65536, kSlices = 16;

// Blocks of the same heads that have finished. The last one sets it back to 0.
static __device__ unsigned decode_finished[kCounters];

template <int N>
struct Int {
  static constexpr int value = N;
};

// Within 2e-7 of tanh.
__device__ __forceinline__ float tanh_fast(float x) {
  return 1.f - 2.f / (exp2_fast(x * (2.f * kLog2e)) + 1.f);
}

__device__ __forceinline__ unsigned pack_halves(float low, float high) {
  const half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&both);
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

// 16 bytes from `from` to `near` and 16 from `from + apart` to `far`; half of the lanes read them the
// other way about, so that fewer read the same bank at the same time.
__device__ __forceinline__ void copy_in_turn(unsigned* near, unsigned* far, const half* from,
                                             int apart, bool far_first) {
  unsigned one[4], other[4];
  copy_words<4>(one, from + (far_first ? apart : 0));
  copy_words<4>(other, from + (far_first ? 0 : apart));
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    near[w] = far_first ? other[w] : one[w];
    far[w] = far_first ? one[w] : other[w];
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
      values[i] = float2{0.f, 0.f};
      stats[i] = float2{kLowest, 0.f};
      if (i < count) get(i, values[i], stats[i]);
      above = fmaxf(above, stats[i].x);
    }
    scale_to(above);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float share = exp2_fast(stats[i].x - above);
      value.x += share * values[i].x;
      value.y += share * values[i].y;
      total += share * stats[i].y;
    }
  }

  __device__ __forceinline__ void scale_to(float above) {
    const float old = exp2_fast(top - above);
    value.x *= old;
    value.y *= old;
    total *= old;
    top = above;
  }
};

// Four elements of a head, from `at` on; or the pairs of j and j + R / 2 and of the two next to them,
// turned by their angles of `table` [2, R / 2].
template <int R>
struct Quad {
  unsigned x[2], cosines[2], sines[2];

  __device__ __forceinline__ void load(const half* head, int at) { load_words<2>(x, head + at); }

  __device__ __forceinline__ void load_pairs(const half* head, const float* table, int j) {
    load_words<1>(x, head + j);
    load_words<1>(x + 1, head + j + R / 2);
    load_words<2>(cosines, table + j);
    load_words<2>(sines, table + j + R / 2);
  }

  __device__ __forceinline__ void store(half* to, int at) const {
    *reinterpret_cast<uint2*>(to + at) = uint2{x[0], x[1]};
  }

  __device__ __forceinline__ void store_turned(half* to, int j) const {
    const half* const low = reinterpret_cast<const half*>(x);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float a = __half2float(low[i]), b = __half2float(low[2 + i]);
      const float c = __uint_as_float(cosines[i]), s = __uint_as_float(sines[i]);
      to[j + i] = __float2half(a * c - b * s);
      to[j + i + R / 2] = __float2half(b * c + a * s);
    }
  }
};

// Sizes of an instance. `Parts` items share the query heads of a kv head. A block has `Warps` warps
// and `Loaders`, and room for `Stages` chunks, of which at most `Ahead` are under way at a time. At
// most `Splits` blocks share an item, as many as have about `Few` chunks or
// more; about `Blocks` fill the GPU. With `Append`, `Rotary` elements of each head are turned, and
// with `Joined` queries, keys and values lie in one matrix. `Window` is 0 for none.
template <int Tokens, int Heads, int KvHeads, int HeadDim, int Page, int Parts, int Warps,
          int Loaders, int Stages, int Ahead, bool Pair, int Few, int Splits, int Blocks,
          bool Append, bool Joined, int Rotary, int Window, bool Capped, bool Sinks>
struct DecodeSizes {
  static constexpr int N = Tokens, H = Heads, K = KvHeads, D = HeadDim, PAGE = Page, P = Parts,
                       W = Warps, LOADERS = Loaders, STAGES = Stages, AHEAD = Ahead, FEW = Few,
                       S = Splits, BLOCKS = Blocks, R = Rotary, WINDOW = Window;
  static constexpr bool PAIR = Pair, APPEND = Append, JOINED = Joined, CAPPED = Capped,
                        SINKS = Sinks;
  static constexpr int GROUP = H / K, Q = (GROUP + P - 1) / P, NT = (Q + 7) / 8;
  static constexpr int LOADS = W / LOADERS;  // chunks that a loader copies at a time
  static constexpr int THREADS = (W + LOADERS) * 32;
  // In shared memory, in halves: a chunk, a head, and where the heads begin.
  static constexpr int STAGE = 2 * kChunk * D, LINE = D + 8;  // so that reads meet no bank twice
  static constexpr int HEADS = STAGES * STAGE;
  static constexpr int SHARED = 2 * HEADS + 2 * (Q + 2) * LINE;  // in bytes
  // In the end a warp's sums take the place of a chunk of its own; then shares take the first places.
  static_assert(2 * Q * D <= STAGE && 2 * S * Q <= HEADS, "the ring has room for them");
  // So a place in the ring is always the same warp's, which therefore sees each of its phases end.
  static_assert(STAGES % W == 0, "warps take the places of the ring in turn");
  static_assert(W % LOADERS == 0 && W <= AHEAD && AHEAD <= STAGES, "loaders copy W chunks at a time");
  // Another one may have filled the place once more before this one looks, and then it would wait for
  // good: phases are known by their parity.
  static_assert(LOADERS == 1 || AHEAD % W == 0, "a loader waits for a chunk of its own");
  static_assert(!PAIR || P == 2, "a pair shares the query heads of a kv head");
  static_assert(!APPEND || R % 4 == 0, "pairs are turned two at a time");
};

struct DecodeArgs {
  const half *q, *k, *v;  // of the new token; k and v only with APPEND, and not if JOINED
  const float* table;     // [N, 2, R / 2], with APPEND
  half *k_pages, *v_pages;
  const int *page_table, *rows, *positions;
  const float* sinks;  // [H], with SINKS
  half* out;
  float *sums, *stats;
  int64_t layer;
  int pages, table_rows, max_pages;
  float scale, softcap;
};

template <typename Z>
__device__ __forceinline__ void decode_attention(const DecodeArgs& a, int block, int tid,
                                                 void* shared) {
  constexpr int D = Z::D, NT = Z::NT, W = Z::W, FEW = Z::FEW, Q = Z::Q, PAGE = Z::PAGE;
  constexpr int WORDS_K = D / 8, WORDS_V = D / 16, KP = Z::K * Z::P, STAGES = Z::STAGES;
  constexpr int LINE = Z::LINE, THREADS = W * 32;
  constexpr int LEAST_HEADS = D > 128 ? 2 : 4;  // with fewer a block is hardly faster
  constexpr bool QUERY_HELD = NT * D <= 256;
  // Where each line of a chunk begins at the same bank of shared memory.
  constexpr bool IN_TURN = D % 64 == 0, VALUES_IN_TURN = D % 128 == 0;
  __shared__ uint64_t filled[STAGES], emptied[STAGES];
  __shared__ int page_of[STAGES];
  __shared__ float2 joint[W][NT * 8];
  __shared__ bool is_last;
  half* const ring = static_cast<half*>(shared);
  half* const heads = ring + Z::HEADS;  // with APPEND the key and the value, then queries
  constexpr int NEW = Z::APPEND ? 2 : 0;
  float* const staged = static_cast<float*>(shared);
  const int warp = __shfl_sync(~0u, tid / 32, 0), lane = tid % 32, g = lane / 4, c = lane % 4;

  auto begin_of = [](int length) { return Z::WINDOW > 0 ? max(0, length - Z::WINDOW) : 0; };
  auto chunks_of = [&](int length) {
    return length > 0 ? (length + kChunk - 1) / kChunk - begin_of(length) / kChunk : 0;
  };
  // The tables, and with APPEND what of the cache is read, change between steps only. So they may be
  // read ahead of the kernels before, since the first of a step is launched after all of the last
  // one's have ended. Most often token t's row is t and each lane's chunk the one guessed here, which
  // saves waiting for loads one after the other.
  const int number = block / (Z::N * KP), item = block % (Z::N * KP);
  const int t = item / KP, kv_head = item % KP / Z::P, part = item % Z::P;
  const int length = a.positions[t] + 1;
  int all = 0;  // chunks of all tokens
  if constexpr (Z::N > 1)
    for (int i = lane; i < Z::N; i += 32) all += chunks_of(a.positions[i] + 1);
  const int guess = min((lane * Z::S + number) * kChunk / PAGE, a.max_pages - 1);
  int row = 0, near = 0, page = 0;
  if (warp >= W) {
    row = a.rows[t];
    const int* const pages = a.page_table + (int64_t)min(t, a.table_rows - 1) * a.max_pages;
    near = pages[min(lane, a.max_pages - 1)];
    page = pages[guess];
  } else if (lane == 0) {
#pragma unroll
    for (int i = 0; i < STAGES; i += W) {  // its places in the ring
      phase_start(filled + i + warp, kCopiers);
      phase_start(emptied + i + warp, Z::PAIR ? 2 : 1);
    }
    phases_started();
  }
  if constexpr (Z::PAIR) cluster_meet();
  else __syncthreads();
  const int begin = begin_of(length), chunk0 = begin / kChunk, chunks = chunks_of(length);
  int share = FEW;  // of a block
  if constexpr (Z::N > 1) {
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) all += __shfl_xor_sync(~0u, all, mask);
    share = max(FEW, (all * KP + Z::BLOCKS - 1) / Z::BLOCKS);
  }
  if (chunks == 0) {  // an inactive token
    wait_for_inputs();
    if (number == 0 && part == 0)
      for (int i = tid; i < Z::GROUP * D; i += Z::THREADS)
        a.out[((int64_t)t * Z::H + kv_head * Z::GROUP) * D + i] = __float2half(0.f);
    return;
  }
  const int most = (int)(1.5f * sqrtf(chunks));  // joining more sums would take longer
  const int blocks = min(min(Z::S, most), max(1, (chunks + share / 2) / share));
  int split = number, slice = 0, before = part * Q, queries = min(Q, Z::GROUP - before);
  int most_queries = Q;  // of a slice of either part
  if constexpr (Z::N == 1 && Q > LEAST_HEADS)
    if (2 * blocks <= Z::S) {  // blocks are left over: they share the query heads
      const int slices = Z::S / blocks, each = max(LEAST_HEADS, (Q + slices - 1) / slices);
      slice = number / blocks, split = number % blocks;
      before += slice * each;
      queries = min(queries - slice * each, each);
      most_queries = min(Q - slice * each, each);
    }
  if (split >= blocks || (Z::PAIR ? most_queries : queries) <= 0) {
    wait_for_inputs();
    return;
  }
  const int count = (chunks - split + blocks - 1) / blocks;  // of this block's chunks
  auto chunk_of = [&](int i) { return i * blocks + split; };  // the block's i-th of the item

  if (warp >= W) {  // a loader
    if (!Z::APPEND) wait_for_inputs();
    // Each lane copies a chunk, as many lanes at a time as there are warps to take them. Lanes of a
    // warp would issue their copies one after the other, so several warps share them.
    const int* const pages = a.page_table + (int64_t)row * a.max_pages;
    auto index_of = [&](int i) { return (chunk0 + chunk_of(min(i, count - 1))) * kChunk / PAGE; };
    const int index = index_of(lane), found = __shfl_sync(~0u, near, index % 32);
    if (row == t && index < 32) page = found;
    else if (row != t || index != guess) page = pages[index];
    constexpr int LANES = 32 / W * W;  // so a place in the ring is always the same loader's
    for (int i0 = 0; i0 < count; i0 += LANES) {
      const int i = i0 + lane, stage = i % STAGES, now = page, some = min(LANES, count - i0);
      if (i0 + LANES < count) page = pages[index_of(i + LANES)];
      const int64_t line = ((a.layer * a.pages + now) * Z::K + kv_head) * PAGE +
                           (chunk0 + chunk_of(i)) * kChunk % PAGE;
      half* const keys = ring + stage * Z::STAGE;
      for (int first = 0; first < some; first += W) {
        const int from = first + (warp - W) * Z::LOADS;
        const bool mine = lane >= from && lane < min(some, from + Z::LOADS);
        if (mine) {
          if (i >= STAGES) {
            phase_wait(emptied + stage, (i / STAGES - 1) % 2);
            // Warps that compute would wait longer for it, behind what they read.
            if constexpr (Z::PAIR) fence_copies_to_both();
            else fence_copies();
          }
          // With many copies under way all other reads would take longer too.
          if (Z::AHEAD < STAGES && i >= Z::AHEAD)
            phase_wait(filled + (i - Z::AHEAD) % STAGES, (i - Z::AHEAD) / STAGES % 2);
          page_of[stage] = now;
        }
        __syncwarp();
        copies_expect(mine, filled + stage, 2 * kChunk * D * 2);
        if constexpr (Z::PAIR) {
          const bool values = part != 0;  // the one copies keys, the other values
          copy_to_both(mine, keys + (values ? kChunk * D : 0),
                       (values ? a.v_pages : a.k_pages) + line * D, kChunk * D * 2,
                       filled + stage);
        } else {
          copy_each(mine, keys, a.k_pages + line * D, kChunk * D * 2, filled + stage);
          copy_each(mine, keys + kChunk * D, a.v_pages + line * D, kChunk * D * 2, filled + stage);
        }
        copies_issued(mine, filled + stage);
      }
    }
    if (Z::APPEND) wait_for_inputs();
    return;
  }

  wait_for_inputs();
  const int head0 = kv_head * Z::GROUP + before;
  half* const out = a.out + ((int64_t)t * Z::H + head0) * D;
  constexpr int LONG = (Z::H + 2 * Z::K) * D;  // of a token's queries, keys and values
  const half* const q = a.q + (int64_t)t * (Z::JOINED ? LONG : Z::H * D) + head0 * D;
  if constexpr (Z::APPEND) {
    const float* const table = a.table + t * Z::R;
    const int64_t token = (int64_t)t * (Z::JOINED ? LONG : Z::K * D) + kv_head * D;
    const half* const key = Z::JOINED ? a.q + token + Z::H * D : a.k + token;
    const half* const value = Z::JOINED ? a.q + token + (Z::H + Z::K) * D : a.v + token;
    constexpr int EACH = ((Q + 2) * (D / 4) + THREADS - 1) / THREADS, AT_ONCE = EACH < 4 ? EACH : 4;
    for (int first = tid; first < (queries + 2) * (D / 4); first += AT_ONCE * THREADS) {
      Quad<Z::R> quads[AT_ONCE];
      auto each = [&](auto f) {
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
          const int i = first + n * THREADS, head = i / (D / 4), j = i % (D / 4) * 2;
          if (head < queries + 2) f(quads[n], head, j, head != 1 && j < Z::R / 2);
        }
      };
      each([&](Quad<Z::R>& quad, int head, int j, bool turned) {
        const half* const from = head > 1 ? q + (head - 2) * D : head == 0 ? key : value;
        if (turned) quad.load_pairs(from, table, j);
        else quad.load(from, 2 * j);
      });
      each([&](Quad<Z::R>& quad, int head, int j, bool turned) {
        if (turned) quad.store_turned(heads + head * LINE, j);
        else quad.store(heads + head * LINE, 2 * j);
      });
    }
  } else {
    for (int i = tid; i < queries * (D / 8); i += THREADS)
      load_words<4>(reinterpret_cast<unsigned*>(heads + i / (D / 8) * LINE + i % (D / 8) * 8),
                    q + i * 8);
  }
  meet(1, THREADS);
  unsigned query[QUERY_HELD ? NT : 1][WORDS_K];
  auto take_query = [&](auto words, unsigned* to, int n, int d) {
    copy_words<words.value>(to, heads + (NEW + min(n * 8 + g, queries - 1)) * LINE + d +
                                    c * 2 * words.value);
  };
  if constexpr (QUERY_HELD)
#pragma unroll
    for (int n = 0; n < NT; ++n)
      for_pieces<D, 4>(
          [&](auto words, int word, int d) { take_query(words, &query[n][word], n, d); });
  float sum[NT][WORDS_V][4] = {}, high[NT][2], mass[NT][2] = {};
#pragma unroll
  for (int n = 0; n < NT; ++n) high[n][0] = high[n][1] = kLowest;

  const float scale = (Z::CAPPED ? a.softcap : a.scale) * kLog2e;
  const float before_cap = Z::CAPPED ? a.scale / a.softcap : 0.f;
  auto take_chunks = [&](auto tiles) {  // of 8 query heads
    constexpr int NT = tiles.value;
    for (int i = warp; i < count; i += W) {
      const int stage = i % STAGES, chunk = chunk_of(i);
      const int position = (chunk0 + chunk) * kChunk;
      half* const keys = ring + stage * Z::STAGE;
      half* const values = keys + kChunk * D;
      phase_wait(filled + stage, i / STAGES % 2);
      const int slot = length - 1 - position;  // of the newest token
      if (slot < kChunk) {
        if constexpr (Z::APPEND) {  // into this chunk and, once, into the cache
          const unsigned* const key = reinterpret_cast<unsigned*>(heads);
          const unsigned* const value = key + LINE / 2;
          const int64_t line = ((a.layer * a.pages + page_of[stage]) * Z::K + kv_head) * PAGE +
                               (length - 1) % PAGE;
          for (int j = lane; j < D / 2; j += 32) {
            reinterpret_cast<unsigned*>(keys + slot * D)[j] = key[j];
            reinterpret_cast<unsigned*>(values + slot * D)[j] = value[j];
            if (before == 0) {
              reinterpret_cast<unsigned*>(a.k_pages + line * D)[j] = key[j];
              reinterpret_cast<unsigned*>(a.v_pages + line * D)[j] = value[j];
            }
          }
        }
        for (int j = lane; j < (kChunk - 1 - slot) * (D / 8); j += 32)  // no numbers yet
          *reinterpret_cast<uint4*>(values + (slot + 1 + j / (D / 8)) * D +
                                    j % (D / 8) * 8) = uint4{0, 0, 0, 0};
        __syncwarp();  // no copy comes to this place of the ring any more
      }
      float score[NT][4] = {}, more[NT][4] = {};  // two sums, which do not wait for each other
      auto multiply = [&](auto words, int word, int d, const unsigned* key, const unsigned* below) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          unsigned now[words.value];
          if constexpr (!QUERY_HELD) take_query(words, now, n, d);
          const unsigned* const of = QUERY_HELD ? &query[n][word] : now;
#pragma unroll
          for (int w = 0; w < words.value; w += 2)
            mma_16n8k16(w == 0 ? score[n] : more[n], key[w], below[w], key[w + 1], below[w + 1], of[w],
                        of[w + 1]);
        }
      };
      if constexpr (IN_TURN) {
#pragma unroll
        for (int d = 0; d < D; d += 64) {
          unsigned key[2][2][4];
#pragma unroll
          for (int h = 0; h < 2; ++h)
            copy_in_turn(key[0][h], key[1][h], keys + (g + 8 * h) * D + d + c * 8, 32, g % 2 != 0);
#pragma unroll
          for (int i = 0; i < 2; ++i)
            multiply(Int<4>(), d / 8 + i * 4, d + i * 32, key[i][0], key[i][1]);
        }
      } else {
        for_pieces<D, 4>([&](auto words, int word, int d) {
          unsigned key[2][words.value];
#pragma unroll
          for (int h = 0; h < 2; ++h)
            copy_words<words.value>(key[h], keys + (g + 8 * h) * D + d + c * 2 * words.value);
          multiply(words, word, d, key[0], key[1]);
        });
      }
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float x = score[n][e] + more[n][e];
          score[n][e] = Z::CAPPED ? tanh_fast(x * before_cap) * scale : x * scale;
        }
      if (position + kChunk > length || position < begin) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int p = position + g + 8 * h;
          if (p < length && p >= begin) continue;
#pragma unroll
          for (int n = 0; n < NT; ++n) score[n][2 * h] = score[n][2 * h + 1] = -INFINITY;
        }
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
          for (int mask = 4; mask < 32; mask *= 2)
            top = fmaxf(top, __shfl_xor_sync(~0u, top, mask));
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
        weight[n][0] = transposed_8x8(pack_halves(score[n][0], score[n][1]));
        weight[n][1] = transposed_8x8(pack_halves(score[n][2], score[n][3]));
      }
      auto add = [&](auto words, int word, const auto* value) {
#pragma unroll
        for (int w = 0; w < words.value; ++w) {
          const unsigned a0 = __byte_perm(value[0][w], value[1][w], 0x5410);
          const unsigned a1 = __byte_perm(value[0][w], value[1][w], 0x7632);
          const unsigned a2 = __byte_perm(value[2][w], value[3][w], 0x5410);
          const unsigned a3 = __byte_perm(value[2][w], value[3][w], 0x7632);
#pragma unroll
          for (int n = 0; n < NT; ++n)
            mma_16n8k16(sum[n][word + w], a0, a1, a2, a3, weight[n][0], weight[n][1]);
        }
      };
      auto line = [&](int i) { return values + (2 * c + i % 2 + i / 2 * 8) * D; };
      if constexpr (VALUES_IN_TURN) {
#pragma unroll
        for (int d = 0; d < D; d += 128) {
          unsigned value[2][4][4];
          const int near = d + g * 8, far = d + 64 + (g ^ 4) * 8;
#pragma unroll
          for (int i = 0; i < 4; ++i)
            copy_in_turn(value[0][i], value[1][i], line(i) + near, far - near, c % 2 != 0);
          add(Int<4>(), d / 16, value[0]);
          add(Int<4>(), d / 16 + 4, value[1]);
        }
      } else {
        for_pieces<D, 8>([&](auto words, int word, int d) {
          unsigned value[4][words.value];
#pragma unroll
          for (int i = 0; i < 4; ++i)
            copy_words<words.value>(value[i], line(i) + d + g * 2 * words.value);
          add(words, word, value);
        });
      }
      __syncwarp();
      if constexpr (Z::PAIR) {
        // At both blocks, but only where one still waits for it, so never at one that has ended.
        if (lane < 2 && i + STAGES < count) phase_arrive_in_block(emptied + stage, lane);
      } else if (lane == 0) {
        phase_arrive(emptied + stage);
      }
    }
  };
  if (NT > 1 && queries <= 8) take_chunks(Int<1>());
  else take_chunks(Int<NT>());

  // Join the warps. Elements of a staged sum are permuted, so that stores meet no bank twice.
  const int busy = min(W, count);
  auto place = [&](int w, int head, int d) {
    return w * (Z::STAGE / 2) + head * D + (d ^ (head / 2 % 4 * 2));
  };
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2)
        mass[n][h] += __shfl_xor_sync(~0u, mass[n][h], mask);
      const int head = n * 8 + 2 * c + h;
      if (g == 0) joint[warp][head] = float2{high[n][h], mass[n][h]};
      if (warp < busy && head < queries)
        for_pieces<D, 8>([&](auto words, int word, int d) {
          const bool far = VALUES_IN_TURN && word % 8 == 4;
#pragma unroll
          for (int w = 0; w < words.value; ++w)
            *reinterpret_cast<float2*>(
                &staged[place(warp, head, d + ((far ? g ^ 4 : g) * words.value + w) * 2)]) =
                float2{sum[n][word + w][h], sum[n][word + w][2 + h]};
        });
    }
  }
  meet(1, THREADS);
  // Pairs of elements are counted over all query heads.
  constexpr int PAIRS = Q * D / 2;
  const int pairs = queries * (D / 2);
  const int64_t of_slice = (int64_t)item * Z::S + number - split;
  float2* const sums = reinterpret_cast<float2*>(a.sums) + of_slice * PAIRS;
  float2* const stats = reinterpret_cast<float2*>(a.stats) + of_slice * Q;
  auto write = [&](int i, Piece& piece) {
    if constexpr (Z::SINKS) {  // a score whose value is 0
      const float sink = a.sinks[head0 + i / (D / 2)] * kLog2e;
      piece.scale_to(fmaxf(piece.top, sink));
      piece.total += exp2_fast(sink - piece.top);
    }
    *reinterpret_cast<half2*>(out + 2 * i) =
        __floats2half2_rn(piece.value.x / piece.total, piece.value.y / piece.total);
  };
  for (int i = tid; i < pairs; i += THREADS) {
    const int head = i / (D / 2), d = i % (D / 2) * 2;
    Piece piece;
    piece.add<W>(busy, [&](int w, float2& value, float2& of) {
      value = *reinterpret_cast<const float2*>(&staged[place(w, head, d)]);
      of = joint[w][head];
    });
    if (blocks == 1) {
      write(i, piece);
    } else {
      sums[split * PAIRS + i] = piece.value;
      if (d == 0) stats[split * Q + head] = float2{piece.top, piece.total};
    }
  }
  if (blocks == 1) return;

  meet(1, THREADS);
  if (tid == 0)
    is_last = count_up(decode_finished + item * kSlices + slice, blocks - 1) ==
              (unsigned)blocks - 1;
  meet(1, THREADS);
  if (!is_last) return;
  if (pairs <= THREADS && blocks <= 8) {
    for (int i = tid; i < pairs; i += THREADS) {
      Piece piece;
      piece.add<8>(blocks, [&](int j, float2& value, float2& of) {
        value = __ldcg(sums + j * PAIRS + i);
        of = __ldcg(stats + j * Q + i / (D / 2));
      });
      write(i, piece);
    }
    return;
  }
  // Join more than that: shares of their sums from the tops and totals, while the first sums come.
  constexpr int QUADS = Q * D / 4, AT_ONCE = 16, MINE = (Z::S + 31) / 32;
  const int quads = queries * (D / 4);
  float4 values[AT_ONCE];
  auto load = [&](int i, int first) {
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j)
      if (first + j < blocks)
        values[j] = __ldcg(reinterpret_cast<const float4*>(sums) + (first + j) * QUADS + i);
  };
  if (tid < quads) load(tid, 0);
  float* const shares = staged;  // [blocks, Q]
  for (int head = warp; head < queries; head += W) {
    float2 of[MINE];
    const float sink = Z::SINKS ? a.sinks[head0 + head] * kLog2e : kLowest;
    float top = sink, total = 0.f;
#pragma unroll
    for (int j = 0; j < MINE; ++j) {
      const int i = lane + 32 * j;
      of[j] = float2{kLowest, 0.f};
      if (i < blocks) of[j] = __ldcg(stats + i * Q + head);
      top = fmaxf(top, of[j].x);
    }
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, mask));
#pragma unroll
    for (int j = 0; j < MINE; ++j) {
      of[j].x = exp2_fast(of[j].x - top);
      total += of[j].x * of[j].y;
    }
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) total += __shfl_xor_sync(~0u, total, mask);
    if (Z::SINKS) total += exp2_fast(sink - top);
#pragma unroll
    for (int j = 0; j < MINE; ++j)
      if (lane + 32 * j < blocks) shares[(lane + 32 * j) * Q + head] = of[j].x / total;
  }
  meet(1, THREADS);
  for (int i = tid; i < quads; i += THREADS) {
    float4 sum = {0.f, 0.f, 0.f, 0.f};
    for (int first = 0; first < blocks; first += AT_ONCE) {
      if (i != tid || first > 0) load(i, first);
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        if (first + j >= blocks) continue;
        const float share = shares[(first + j) * Q + i / (D / 4)];
        sum.x += share * values[j].x;
        sum.y += share * values[j].y;
        sum.z += share * values[j].z;
        sum.w += share * values[j].w;
      }
    }
    half2* const to = reinterpret_cast<half2*>(out + 4 * i);
    to[0] = __floats2half2_rn(sum.x, sum.y);
    to[1] = __floats2half2_rn(sum.z, sum.w);
  }
}

template <typename Z>
__device__ __forceinline__ void decode_attention(
    const half* q, const half* k, const half* v, const float* table, half* k_pages, half* v_pages,
    const int* page_table, const int* rows, const int* positions, const float* sinks, half* out,
    float* sums, float* stats, int64_t layer, int pages, int table_rows, int max_pages, float scale,
    float softcap, int block, int tid, void* shared) {
  decode_attention<Z>({q, k, v, table, k_pages, v_pages, page_table, rows, positions, sinks, out,
                       sums, stats, layer, pages, table_rows, max_pages, scale, softcap},
                      block, tid, shared);
}

}  // namespace shardwright
#endif
