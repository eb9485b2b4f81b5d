#ifndef SHARDWRIGHT_PREFILL_ATTENTION
#define SHARDWRIGHT_PREFILL_ATTENTION
// Attention of many tokens over the paged cache on the tensor cores of CUDA GPUs. Included once in
// a module, whatever it is instantiated for; after ptx.cuh, wgmma.cuh and q4_image.cuh.
//
// A block takes 128 or 192 tokens and one query head, and walks over the keys in tiles, as in
// FlashAttention (arXiv:2205.14135, arXiv:2307.08691): scores, an online softmax in float32, and
// the weighted sum of the values stay in registers, 16 tokens to a warp. Tokens of several rows in
// one tile are served row after row, each with its own keys. Tiles lie in shared memory in panels
// of 64 elements (128 bytes) whose 16-byte pieces are permuted by the line's number, so that
// reading them meets no bank twice; it is the 128-byte swizzle of wgmma. Compiled for sm_90a the
// products are wgmma, the one with the values running beside the next softmax as in
// FlashAttention-3 (arXiv:2407.08608); for others, mma m16n8k16.

namespace shardwright {
namespace prefill {

constexpr float kLowest = -1e30f;  // finite, so that the difference of two of them is 0
constexpr float kLog2e = 1.4426950408889634f;

template <int N>
struct Int {
  static constexpr int value = N;
};

// Within 2e-7 of tanh.
__device__ __forceinline__ float tanh_fast(float x) {
  return 1.f - __fdividef(2.f, exp2_fast(x * (2.f * kLog2e)) + 1.f);
}

__device__ __forceinline__ unsigned pack(float low, float high) {
  const half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&both);
}

// 16 bytes to shared memory, or as many zeros.
__device__ __forceinline__ void copy_async(unsigned to, const half* from, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copies_issued() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
__device__ __forceinline__ void copies_done() {
  asm volatile("cp.async.wait_group 0;" ::: "memory");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  fence_copies();
#endif
}

// Byte offset of 16-byte piece `piece` of line `line` in a tile of `lines` lines.
__device__ __forceinline__ unsigned place(int line, int piece, int lines) {
  return (piece / 8) * (lines * 128) + line * 128 + ((piece % 8) ^ (line % 8)) * 16;
}

#ifndef __CUDA_ARCH_FEAT_SM90_ALL
__device__ __forceinline__ void load_transposed(unsigned* r, unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
#endif

// Sizes of an instance: `Groups` warpgroups with 64 tokens each, `Keys` positions in a tile, and a
// window of positions, 0 for all. With `Image` the result is what q4_gemm.cuh multiplies.
template <int Heads, int KvHeads, int HeadDim, int Page, int Groups, int Keys, int Window,
          bool Capped, bool Image, bool Sinks>
struct Sizes {
  static constexpr int H = Heads, K = KvHeads, D = HeadDim, PAGE = Page, B = Keys,
                       WINDOW = Window;
  static constexpr bool CAPPED = Capped, SINKS = Sinks, IMAGE = Image;
  static constexpr int GROUPS = Groups, TOKENS = 64 * Groups;
  static constexpr int WORKERS = 128 * Groups, THREADS = WORKERS + 128;
  static constexpr int PANELS = (D + 63) / 64;
  static constexpr int Q_BYTES = PANELS * TOKENS * 128, TILE = PANELS * B * 128;
  static constexpr int SHARED = 1024 + Q_BYTES + 4 * TILE;  // aligned, and two of keys and values
};

struct Args {
  const half *q, *k_pages, *v_pages;
  const int *page_table, *rows, *positions;
  const float* sinks;  // [H], with SINKS
  half* out;
  int64_t layer;
  int pages, tokens, max_pages;
  float scale, softcap;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// sum [16 tokens of a warp, D] += weight [16, B] x values [B, D], without waiting for it.
template <typename Z>
__device__ __forceinline__ void add_values(float* sum, const unsigned* weight, unsigned values) {
  constexpr int D = Z::D, PANEL = Z::B * 128;
#pragma unroll
  for (int s = 0; s < Z::B / 16; ++s) {
    const unsigned* w = weight + 4 * s;
    const unsigned lines = values + s * 16 * 128;
#pragma unroll
    for (int n = 0; n + 128 <= D; n += 128)
      wgmma<128, true>(sum + n / 2, w, matrix_at(lines + n / 64 * PANEL, PANEL));
    if constexpr (D % 128 >= 64)
      wgmma<64, true>(sum + D / 128 * 64, w, matrix_at(lines + D / 128 * 2 * PANEL, PANEL));
    const unsigned rest = lines + D / 64 * PANEL;  // 64, 32 and 16 of the last panel
    if constexpr (D % 64 >= 32)
      wgmma<32, true>(sum + D / 64 * 32, w, matrix_at(rest, PANEL));
    if constexpr (D % 32 == 16)
      wgmma<16, true>(sum + D / 32 * 16, w, matrix_at(rest + D % 64 / 32 * 64, PANEL));
  }
}
#else
template <typename Z>
__device__ __forceinline__ void multiply_keys(float* score, unsigned q, unsigned keys, int warp,
                                              int lane) {
#pragma unroll
  for (int i = 0; i < Z::B / 2; ++i) score[i] = 0.f;
#pragma unroll
  for (int s = 0; s < Z::D / 16; ++s) {
    unsigned a[4];
    load_matrices(a, q + place(warp * 16 + lane % 16, s * 2 + lane / 16, Z::TOKENS));
#pragma unroll
    for (int n = 0; n < Z::B / 16; ++n) {
      unsigned b[4];
      const int line = n * 16 + lane / 16 * 8 + lane % 8;
      load_matrices(b, keys + place(line, s * 2 + lane / 8 % 2, Z::B));
      mma_16n8k16(score + n * 8, a, b);
      mma_16n8k16(score + n * 8 + 4, a, b + 2);
    }
  }
}

template <typename Z>
__device__ __forceinline__ void add_values(float* sum, const unsigned* weight, unsigned values,
                                           int lane) {
#pragma unroll
  for (int s = 0; s < Z::B / 16; ++s)
#pragma unroll
    for (int n = 0; n < Z::D / 16; ++n) {
      unsigned b[4];
      load_transposed(b, values + place(s * 16 + lane % 16, n * 2 + lane / 16, Z::B));
      mma_16n8k16(sum + n * 8, weight + 4 * s, b);
      mma_16n8k16(sum + n * 8 + 4, weight + 4 * s, b + 2);
    }
}
#endif

// From a tile's scores to its weights, of the thread's tokens, which see positions up to `limits`;
// `rescale` is what older sums are to be multiplied by.
template <typename Z>
__device__ __forceinline__ void softmax(const Args& a, float* score, int begin, const int* limits,
                                        int lane, float* high, float* mass, float* rescale) {
  constexpr int B = Z::B;
  if (Z::CAPPED) {
#pragma unroll
    for (int i = 0; i < B / 2; ++i)
      score[i] = tanh_fast(score[i] * (a.scale / a.softcap)) * (a.softcap * kLog2e);
  }
  const float scale = Z::CAPPED ? 1.f : a.scale * kLog2e;
  bool some = begin + B > min(limits[0], limits[1]) + 1;
  if (Z::WINDOW > 0) some |= begin <= max(limits[0], limits[1]) - Z::WINDOW;
  if (__any_sync(~0u, some)) {
#pragma unroll
    for (int i = 0; i < B / 2; ++i) {
      const int p = begin + i / 4 * 8 + lane % 4 * 2 + i % 2, limit = limits[i / 2 % 2];
      if (p > limit || (Z::WINDOW > 0 && p <= limit - Z::WINDOW)) score[i] = -INFINITY;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float most = score[2 * r];
#pragma unroll
    for (int i = 0; i < B / 4; ++i) most = fmaxf(most, score[i / 2 * 4 + 2 * r + i % 2]);
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    most = fmaxf(most * scale, high[r]);
    rescale[r] = exp2_fast(high[r] - most);
    high[r] = most;
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < B / 4; ++i) {
      float& x = score[i / 2 * 4 + 2 * r + i % 2];
      x = exp2_fast(fmaf(x, scale, -most));
      total += x;
    }
    mass[r] = mass[r] * rescale[r] + total;
  }
}

// Words 4 * i .. are the first operand of m16k16 for 16 positions.
template <int B>
__device__ __forceinline__ void weigh(unsigned* weight, const float* score) {
#pragma unroll
  for (int i = 0; i < B / 4; ++i) weight[i] = pack(score[2 * i], score[2 * i + 1]);
}

// The tokens of a tile, and those of them that are served together, being of one row.
template <int N>
struct Tokens {
  int row_of[N], position_of[N], limit_of[N], first, top, bottom;
};

// The first N threads have a token each. Returns whether it waits to be served.
template <int N>
__device__ __forceinline__ bool take_tokens(Tokens<N>& s, const Args& a, int tile, int tid) {
  if (tid >= N) return false;
  const int t = tile * N + tid;
  s.row_of[tid] = t < a.tokens ? a.rows[t] : 0;
  s.position_of[tid] = t < a.tokens ? a.positions[t] : -1;
  return s.position_of[tid] >= 0;
}

// Chooses the tokens of the row of the first one that waits; returns the row, or -1.
template <int THREADS, int N>
__device__ __forceinline__ int next_row(Tokens<N>& s, bool& waiting, int tid) {
  if (tid == 0) s.first = N, s.top = -1, s.bottom = 0x7fffffff;
  meet<0, THREADS>();
  if (waiting) atomicMin(&s.first, tid);
  meet<0, THREADS>();
  if (s.first == N) return -1;
  const int row = s.row_of[s.first];
  if (tid < N) {
    const bool served = waiting && s.row_of[tid] == row;
    s.limit_of[tid] = served ? s.position_of[tid] : -1;
    if (served) {
      atomicMax(&s.top, s.position_of[tid]);
      atomicMin(&s.bottom, s.position_of[tid]);
      waiting = false;
    }
  }
  meet<0, THREADS>();
  return row;
}

// Queries to shared memory, by the threads that work.
template <typename Z>
__device__ __forceinline__ void load_queries(const Args& a, unsigned to, int tile, int head,
                                             int tid) {
  constexpr int PIECES = Z::D / 8;
  for (int i = tid; i < Z::TOKENS * PIECES; i += Z::WORKERS) {
    const int line = i / PIECES, t = tile * Z::TOKENS + line;
    const half* from = a.q + ((int64_t)min(t, a.tokens - 1) * Z::H + head) * Z::D + i % PIECES * 8;
    copy_async(to + place(line, i % PIECES, Z::TOKENS), from, t < a.tokens);
  }
}

__host__ __device__ constexpr int power_of_two(int limit) {
  int power = 1;
  while (2 * power <= limit) power *= 2;
  return power;
}

// Keys or values of a tile's positions from `begin` to `end` to shared memory, by THREADS threads;
// lane i has the page of the tile's i-th. Most addresses are sums of few numbers and constants.
template <typename Z, int THREADS>
__device__ __forceinline__ void load_tile(unsigned to, const half* cache, int begin, int end,
                                          int page_of_lane, int tid) {
  constexpr int D = Z::D, PIECES = D / 8, PAGE = Z::PAGE;
  constexpr int LINES = power_of_two(THREADS / PIECES < Z::B ? THREADS / PIECES : Z::B);
  constexpr int kAtOnce = LINES >= PAGE ? 4 : 8;  // the addresses of more take too many registers
  const int piece = tid % PIECES, line0 = tid / PIECES;
  unsigned at[2] = {to + place(line0, piece, Z::B), to + place(line0 + 4, piece, Z::B) - 4 * 128};
  const half* from = nullptr;
  auto copy = [&](auto whole) {
#pragma unroll kAtOnce
    for (int k = 0; k < Z::B / LINES; ++k) {
      const int line = line0 + k * LINES;
      if (LINES >= PAGE || k % (PAGE / LINES) == 0) {
        const int page = __shfl_sync(~0u, page_of_lane, line / PAGE % 32);
        from = cache + (int64_t)page * (Z::K * PAGE * D) + (line % PAGE * D + piece * 8);
      }
      const int further = LINES >= PAGE ? 0 : k % (PAGE / LINES) * LINES * D;
      if (LINES * PIECES == THREADS || line0 < LINES)
        copy_async(at[k * LINES / 4 % 2] + k * LINES * 128, from + further,
                   whole.value || begin + line < end);
    }
  };
  if (begin + Z::B <= end)
    copy(Int<1>());
  else
    copy(Int<0>());
}

template <typename Z>
__device__ __forceinline__ void write(const Args& a, const float* sum, const float* high,
                                      float* mass, int tile, int line0, int head, int lane) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    mass[r] += __shfl_xor_sync(~0u, mass[r], 1);
    mass[r] += __shfl_xor_sync(~0u, mass[r], 2);
    float inverse = mass[r] > 0.f ? 1.f / mass[r] : 0.f;
    if constexpr (Z::SINKS) {  // a score whose value is 0
      const float sink = a.sinks[head] * kLog2e, top = fmaxf(high[r], sink);
      const float share = exp2_fast(high[r] - top);
      inverse = share / (mass[r] * share + exp2_fast(sink - top));
    }
    const int t = tile * Z::TOKENS + line0 + 8 * r;
    if constexpr (Z::IMAGE) {
      static_assert(Z::D % 128 == 0, "whole pieces of an image");
#pragma unroll
      for (int k = 0; k < Z::D / 128; ++k) {
        const float* const from = sum + k * 64 + 2 * r;
        shardwright_q4::put_pairs(
            a.out, [=](int i) { return pack(from[i * 4] * inverse, from[i * 4 + 1] * inverse); },
            lane, t, head * (Z::D / 128) + k, a.tokens, Z::H * Z::D);
      }
    } else if (t < a.tokens) {
      half* const out = a.out + ((int64_t)t * Z::H + head) * Z::D + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < Z::D / 8; ++i)
        *reinterpret_cast<half2*>(out + i * 8) =
            __floats2half2_rn(sum[i * 4 + 2 * r] * inverse, sum[i * 4 + 2 * r + 1] * inverse);
    }
  }
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Warpgroups of workers take 64 tokens each, and another one copies tiles for all. The workers take
// turns at the tensor cores: while one multiplies, another is at its softmax.
template <typename Z>
__device__ __forceinline__ void attention(const Args& a, int tile, int head, int tid,
                                          void* shared) {
  constexpr int D = Z::D, B = Z::B;
  __shared__ Tokens<Z::TOKENS> tokens;
  __shared__ uint64_t filled[4], emptied[4];  // of keys and of values, two each
  const unsigned base = (address(shared) + 1023) / 1024 * 1024;
  const unsigned q_at = base, k_at = base + Z::Q_BYTES, v_at = k_at + 2 * Z::TILE;
  const int warp = __shfl_sync(~0u, tid / 32, 0), lane = tid % 32, kv_head = head / (Z::H / Z::K);
  if (tid == 0) {
    for (int i = 0; i < 4; ++i) {
      phase_start(filled + i, Z::THREADS - Z::WORKERS);
      phase_start(emptied + i, Z::WORKERS / 32);
    }
  }
  wait_for_inputs();
  bool waiting = take_tokens(tokens, a, tile, tid);
  auto lowest_of = [&](int bottom) {
    return Z::WINDOW > 0 ? max(0, bottom + 1 - Z::WINDOW) / B * B : 0;
  };
  int before = 0, row;  // tiles of the rows before

  if (tid >= Z::WORKERS) {
    give_registers<Z::GROUPS == 2 ? 40 : 32>();
    const int64_t first_page = (a.layer * a.pages * Z::K + kv_head) * Z::PAGE * D;
    while ((row = next_row<Z::THREADS>(tokens, waiting, tid)) >= 0) {
      const int end = tokens.top + 1, lowest = lowest_of(tokens.bottom);
      const int tiles = (end - lowest + B - 1) / B;
      const int* const pages = a.page_table + (int64_t)row * a.max_pages;
      auto pages_of = [&](int j) {
        const int p = lowest + j * B + lane % (B / Z::PAGE) * Z::PAGE;
        return pages[min(p, end - 1) / Z::PAGE];
      };
      auto load = [&](int values, int j, int page) {
        const int stage = (before + j) % 2, use = (before + j) / 2, slot = 2 * values + stage;
        if (use > 0) phase_wait(emptied + slot, (use - 1) % 2);
        load_tile<Z, Z::THREADS - Z::WORKERS>((values ? v_at : k_at) + stage * Z::TILE,
                                          (values ? a.v_pages : a.k_pages) + first_page,
                                          lowest + j * B, end, page, tid - Z::WORKERS);
        // The thread arrives when its copies have.
        phase_arrive_copied(address(filled + slot));
      };
      int page = pages_of(0), next = pages_of(1);
      load(0, 0, page);
      for (int j = 0; j < tiles; ++j) {
        const int after = pages_of(j + 2);
        if (j + 1 < tiles) load(0, j + 1, next);
        load(1, j, page);
        page = next;
        next = after;
      }
      before += tiles;
      meet<0, Z::THREADS>();
    }
    copies_done();
    return;
  }

  take_registers<Z::GROUPS == 2 ? 232 : 160>();
  const int line0 = warp * 16 + lane / 4;  // this thread's tokens: line0 and line0 + 8
  load_queries<Z>(a, q_at, tile, head, tid);
  copies_issued();
  // A barrier for each warpgroup's turn; the first one's comes first.
  const int group = warp / 4;
  auto await_turn = [&] {
    if (group == 0) meet<2, 256>();
    if (group == 1) meet<3, 256>();
    if (group == 2) meet<4, 256>();
  };
  auto give_turn = [&] {
    const int next = (group + 1) % Z::GROUPS;
    if (next == 0) asm volatile("bar.arrive 2, 256;" ::: "memory");
    if (next == 1) asm volatile("bar.arrive 3, 256;" ::: "memory");
    if (next == 2) asm volatile("bar.arrive 4, 256;" ::: "memory");
  };
  if (group == Z::GROUPS - 1) give_turn();
  float sum[D / 2], high[2] = {kLowest, kLowest}, mass[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < D / 2; ++i) sum[i] = 0.f;
  copies_done();
  meet<1, Z::WORKERS>();

  while ((row = next_row<Z::THREADS>(tokens, waiting, tid)) >= 0) {
    const int end = tokens.top + 1, lowest = lowest_of(tokens.bottom);
    const int limits[2] = {tokens.limit_of[line0], tokens.limit_of[line0 + 8]};
    const int tiles = (end - lowest + B - 1) / B;
    auto await = [&](int values, int j) {
      phase_wait(filled + 2 * values + (before + j) % 2, (before + j) / 2 % 2);
      // What others copied comes before this thread's wgmma.
      fence_copies();
    };
    auto release = [&](int values, int j) {
      if (lane == 0) phase_arrive(emptied + 2 * values + (before + j) % 2);
    };
    float score[B / 2], rescale[2];
    unsigned weight[B / 4];
    auto multiply_keys = [&](int j) {
      const unsigned q_lines = q_at + group * 64 * 128;
      const unsigned keys = k_at + (before + j) % 2 * Z::TILE;
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < D / 16; ++s)
        wgmma<B>(score, matrix_at(q_lines + s / 4 * (Z::TOKENS * 128) + s % 4 * 32, 16),
                 matrix_at(keys + s / 4 * (B * 128) + s % 4 * 32, 16), s > 0);
      wgmma_commit();
    };
    auto values_of = [&](int j) { return v_at + (before + j) % 2 * Z::TILE; };

    await(0, 0);
    multiply_keys(0);
    wgmma_wait<0>();
    pin<B / 2>(score);
    release(0, 0);
    softmax<Z>(a, score, lowest, limits, lane, high, mass, rescale);  // the sum is 0, or goes on
#pragma unroll
    for (int i = 0; i < D / 2; ++i) sum[i] *= rescale[i / 2 % 2];
    weigh<B>(weight, score);
    for (int j = 1; j < tiles; ++j) {
      await(0, j);
      await_turn();
      multiply_keys(j);
      await(1, j - 1);
      wgmma_fence();
      add_values<Z>(sum, weight, values_of(j - 1));
      wgmma_commit();
      give_turn();
      wgmma_wait<1>();
      pin<B / 2>(score);
      release(0, j);
      softmax<Z>(a, score, lowest + j * B, limits, lane, high, mass, rescale);
      // Never so, but ptxas does not know, and leaves the wait behind the softmax.
      if (mass[0] + mass[1] < 0.f) asm volatile("nanosleep.u32 0;");
      wgmma_wait<0>();
      pin<D / 2>(sum);
      release(1, j - 1);
      // After the first tiles the highest score seldom changes.
      if (__any_sync(~0u, rescale[0] != 1.f || rescale[1] != 1.f))
#pragma unroll
        for (int i = 0; i < D / 2; ++i) sum[i] *= rescale[i / 2 % 2];
      weigh<B>(weight, score);
    }
    await(1, tiles - 1);
    wgmma_fence();
    add_values<Z>(sum, weight, values_of(tiles - 1));
    wgmma_commit();
    wgmma_wait<0>();
    pin<D / 2>(sum);
    release(1, tiles - 1);
    before += tiles;
    meet<0, Z::THREADS>();
  }
  write<Z>(a, sum, high, mass, tile, line0, head, lane);
}
#else
template <typename Z>
__device__ __forceinline__ void attention(const Args& a, int tile, int head, int tid,
                                          void* shared) {
  constexpr int D = Z::D, B = Z::B;
  __shared__ Tokens<Z::TOKENS> tokens;
  wait_for_inputs();
  if (tid >= Z::WORKERS) return;  // the others have work with wgmma only
  const unsigned base = (address(shared) + 1023) / 1024 * 1024;
  const unsigned q_at = base, k_at = base + Z::Q_BYTES, v_at = k_at + 2 * Z::TILE;
  const int warp = __shfl_sync(~0u, tid / 32, 0), lane = tid % 32, kv_head = head / (Z::H / Z::K);
  const int line0 = warp * 16 + lane / 4;  // this thread's tokens: line0 and line0 + 8

  bool waiting = take_tokens(tokens, a, tile, tid);
  load_queries<Z>(a, q_at, tile, head, tid);
  float sum[D / 2], high[2] = {kLowest, kLowest}, mass[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < D / 2; ++i) sum[i] = 0.f;

  int row;
  while ((row = next_row<Z::WORKERS>(tokens, waiting, tid)) >= 0) {
    const int end = tokens.top + 1;
    const int lowest = Z::WINDOW > 0 ? max(0, tokens.bottom + 1 - Z::WINDOW) / B * B : 0;
    const int limits[2] = {tokens.limit_of[line0], tokens.limit_of[line0 + 8]};
    const int* const pages = a.page_table + (int64_t)row * a.max_pages;
    const int64_t first_page = (a.layer * a.pages * Z::K + kv_head) * Z::PAGE * D;
    // The pages of a tile, one in each lane.
    auto pages_of = [&](int begin) {
      return pages[min(begin + lane % (B / Z::PAGE) * Z::PAGE, end - 1) / Z::PAGE];
    };
    auto load = [&](unsigned to, const half* cache, int begin, int page) {
      load_tile<Z, Z::WORKERS>(to, cache + first_page, begin, end, page, tid);
    };
    auto rescale_sum = [&](const float* rescale) {
#pragma unroll
      for (int i = 0; i < D / 2; ++i) sum[i] *= rescale[i / 2 % 2];
    };
    const int tiles = (end - lowest + B - 1) / B;
    int pages_now = pages_of(lowest), pages_next = pages_of(lowest + B);
    load(k_at, a.k_pages, lowest, pages_now);
    copies_issued();
    // Values of tile j, and keys of the next, to where keys j - 1 and values j - 2 were.
    auto load_next = [&](int j) {
      load(v_at + j % 2 * Z::TILE, a.v_pages, lowest + j * B, pages_now);
      pages_now = pages_next;
      if (j + 1 < tiles)
        load(k_at + (j + 1) % 2 * Z::TILE, a.k_pages, lowest + (j + 1) * B, pages_now);
      pages_next = pages_of(lowest + (j + 2) * B);
      copies_issued();
    };
    float score[B / 2], rescale[2];
    unsigned weight[B / 4];

    copies_done();
    meet<0, Z::WORKERS>();
    load_next(0);
    multiply_keys<Z>(score, q_at, k_at, warp, lane);
    softmax<Z>(a, score, lowest, limits, lane, high, mass, rescale);
    rescale_sum(rescale);
    weigh<B>(weight, score);
    for (int j = 1; j < tiles; ++j) {
      copies_done();
      meet<0, Z::WORKERS>();
      load_next(j);
      add_values<Z>(sum, weight, v_at + (j + 1) % 2 * Z::TILE, lane);
      multiply_keys<Z>(score, q_at, k_at + j % 2 * Z::TILE, warp, lane);
      softmax<Z>(a, score, lowest + j * B, limits, lane, high, mass, rescale);
      rescale_sum(rescale);
      weigh<B>(weight, score);
    }
    copies_done();
    meet<0, Z::WORKERS>();
    add_values<Z>(sum, weight, v_at + (tiles + 1) % 2 * Z::TILE, lane);
    meet<0, Z::WORKERS>();
  }
  copies_done();
  write<Z>(a, sum, high, mass, tile, line0, head, lane);
}
#endif

template <typename Z>
__device__ __forceinline__ void attention(
    const half* q, const half* k_pages, const half* v_pages, const int* page_table,
    const int* rows, const int* positions, const void* sinks, half* out, int64_t layer, int pages,
    int tokens, int max_pages, float scale, float softcap, int tile, int head, int tid,
    void* shared) {
  attention<Z>({q, k_pages, v_pages, page_table, rows, positions, static_cast<const float*>(sinks),
                out, layer, pages, tokens, max_pages, scale, softcap},
               tile, head, tid, shared);
}

}  // namespace prefill
}  // namespace shardwright
#endif
