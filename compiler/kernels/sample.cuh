#ifndef SHARDWRIGHT_SAMPLE
#define SHARDWRIGHT_SAMPLE
// From the logits of a row to its next token, by a cluster of blocks. Included once in a module.
//
// Every thread keeps its scores in registers, and the blocks meet through distributed shared
// memory. The thresholds of top-k and top-p come from one radix select: histograms of eight bits
// of the keys, four times, of how many or of how much. Weights are counted in small parts of the
// largest, in integers, so that no order of addition shows in the result.

namespace shardwright::sampler {

constexpr int kParts = 8;  // the largest cluster that every GPU with clusters can launch
constexpr int kThreads = 1024;
constexpr int kSlots = 256;  // of a row's latest tokens on the host, see runtime/outbox.py
constexpr float kLowest = -3.0e38f;  // logits are clamped at this; NaN and below become -infinity

// Integers in the order of floats.
__device__ __forceinline__ unsigned key_of(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// "lowbias32" by Chris Wellons.
__device__ __forceinline__ unsigned absorb(unsigned h, unsigned value) {
  h = (h ^ value) + 0x9E3779B9u;
  h = (h ^ h >> 16) * 0x7FEB352Du;
  h = (h ^ h >> 15) * 0x846CA68Bu;
  return h ^ h >> 16;
}

struct Shared {
  unsigned long long warps[32], parts[2][kParts], passed;
  // By digit: how many, or how much in two halves, as additions of 64 bits are slow here. Eight
  // copies, for as many lanes, as most keys have few digits among them.
  uint2 copies[256][8], histogram[2][256];
  unsigned digit;
};

// The largest of the cluster's values, for every thread. Of two calls in a row one is the `turn` 0
// and one 1, so that none writes what a slower block still reads.
__device__ __forceinline__ unsigned long long largest(
    Shared& s, unsigned long long value, int turn, int part, int tid) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2)
    value = max(value, __shfl_xor_sync(~0u, value, lane));
  __syncthreads();
  if (tid % 32 == 0) s.warps[tid / 32] = value;
  __syncthreads();
  if (tid < 32) {
    value = tid < kThreads / 32 ? s.warps[tid] : 0;
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2)
      value = max(value, __shfl_xor_sync(~0u, value, lane));
    if (tid < kParts) store_in_block(in_block(&s.parts[turn][part], tid), value);
  }
  cluster_meet();
  value = s.parts[turn][0];
#pragma unroll
  for (int p = 1; p < kParts; ++p) value = max(value, s.parts[turn][p]);
  return value;
}

// The largest key such that the keys that reach it have at least `wanted` of the masses, or of
// all of them the part `share`, if that is not negative. A mass has two halves of `kBits` bits, or
// a power of two more; the sum of a block's halves has 32.
template <int kBits, int kPer>
__device__ __forceinline__ unsigned select(Shared& s, const unsigned (&key)[kPer],
                                           const uint2 (&mass)[kPer], unsigned long long wanted,
                                           float share, int part, int tid) {
  unsigned threshold = 0;
#pragma unroll 1
  for (int shift = 24; shift >= 0; shift -= 8) {
    const unsigned above = shift == 24 ? 0 : ~0u << (shift + 8);
    // Another block may still read the histogram of the digit before.
    uint2* const histogram = s.histogram[shift / 8 % 2];
    for (int i = tid; i < 2048; i += kThreads) s.copies[i / 8][i % 8] = {};
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      if ((key[j] ^ threshold) & above) continue;
      uint2& bin = s.copies[key[j] >> shift & 255][tid % 8];
      if (mass[j].x) atomicAdd(&bin.x, mass[j].x);
      if (mass[j].y) atomicAdd(&bin.y, mass[j].y);
    }
    __syncthreads();
    if (tid < 256) {
      uint2 sum = {};
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        sum.x += s.copies[tid][c].x;
        sum.y += s.copies[tid][c].y;
      }
      histogram[tid] = sum;
    }
    cluster_meet();
    // Four threads add up a digit of all blocks, and what is above it in their warp.
    const int digit = tid / 4;
    unsigned long long sum = 0;
#pragma unroll
    for (int p = 0; p < kParts; p += 4) {
      const unsigned long long halves =
          load_from_block(in_block(histogram + digit, p + tid % 4));
      sum += (halves & 0xFFFFFFFFu) + (halves >> 32 << kBits);
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    unsigned long long reached = sum;
#pragma unroll
    for (int lane = 4; lane < 32; lane *= 2) {
      const unsigned long long more = __shfl_down_sync(~0u, reached, lane);
      if (tid % 32 + lane < 32) reached += more;
    }
    if (tid % 32 == 0) s.warps[tid / 32] = reached;
    __syncthreads();
    unsigned long long all = 0;
    for (int w = 0; w < kThreads / 32; ++w) {
      all += s.warps[w];
      if (w > tid / 32) reached += s.warps[w];
    }
    if (shift == 24 && share >= 0)
      wanted = (unsigned long long)ceil((double)all * share);
    const unsigned long long higher = reached - sum;
    if (tid % 4 == 0 && higher < wanted && reached >= wanted) {
      s.digit = digit;
      s.passed = higher;
    }
    __syncthreads();
    threshold |= s.digit << shift;
    wanted -= s.passed;
  }
  return threshold;
}

template <int kVocab, int kMax>
__device__ __forceinline__ void sample(
    const float* logits, float* scores, int* tokens, int* positions, int* history,
    const float* sampling_f, const int* sampling_i, const int* eos, int row, int part, int tid) {
  constexpr int kLocal = (kVocab + kParts - 1) / kParts;
  constexpr int kPer = (kLocal + kThreads - 1) / kThreads;
  // Bits of half a weight such that the sum of a block's fits into a word.
  constexpr int kBits = 31 - (32 - __builtin_clz(kLocal));
  constexpr float kHalf = 1u << kBits;
  __shared__ Shared s;
  const int first = part * kLocal, last = min(first + kLocal, kVocab);
  logits += (size_t)row * kVocab;
  wait_for_inputs();
  // Read first of all, not behind the position.
  float score[kPer];
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    const int token = first + j * kThreads + tid;
    score[j] = token < last ? logits[token] : -INFINITY;
  }
  const int position = positions[row];
  if (position < 0 || position + 1 >= kMax) return;
  scores += (size_t)row * kVocab;
  history += (size_t)row * kMax;
  sampling_f += row * 4;
  sampling_i += row * 8;
  const float temperature = sampling_f[0], top_p = sampling_f[1], penalty = sampling_f[2];
  const int top_k = sampling_i[0], ngram = sampling_i[1];
  const bool early = position + 1 - sampling_i[3] < sampling_i[2];
  volatile uint64_t* const ring = reinterpret_cast<volatile uint64_t*>(
      (uint64_t)(unsigned)sampling_i[7] << 32 | (unsigned)sampling_i[6]);
#pragma unroll
  for (int j = 0; j < kPer; ++j)
    // Zero is added for the sake of its sign, which a comparison would not see.
    score[j] = score[j] >= kLowest ? fminf(score[j], -kLowest) + 0.f : -INFINITY;
  if (penalty != 1.f || (ngram > 0 && position + 1 >= ngram) || early) {
    // Filters that name tokens; each block sees to those of its own part.
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      const int token = first + j * kThreads + tid;
      if (token < last) scores[token] = score[j];
    }
    __syncthreads();
    if (penalty != 1.f) {
      for (int i = tid; i <= position; i += kThreads) {
        const int token = history[i];
        if (token < first || token >= last) continue;
        const float x = logits[token];
        // From the logits, so a token that occurs twice is penalised once.
        if (x >= kLowest) scores[token] = fminf(x > 0.f ? x / penalty : x * penalty, -kLowest);
      }
    }
    __syncthreads();
    if (ngram > 0 && position + 1 >= ngram) {
      for (int i = tid; i <= position + 1 - ngram; i += kThreads) {
        bool matches = true;
        for (int g = 0; g + 1 < ngram; ++g)
          matches = matches && history[i + g] == history[position + 2 - ngram + g];
        const int token = matches ? history[i + ngram - 1] : -1;
        if (token >= first && token < last) scores[token] = -INFINITY;
      }
    }
    if (early && tid < 16) {
      const int token = eos[row * 16 + tid];
      if (token >= first && token < last) scores[token] = -INFINITY;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      const int token = first + j * kThreads + tid;
      if (token < last) score[j] = scores[token] + 0.f;
    }
  }
  // Largest value, lowest token, as one number.
  auto ranked = [&](float value, int token) {
    return (unsigned long long)key_of(value) << 32 | ~(unsigned)token;
  };
  float high = -INFINITY;
  int at = 0;  // of a thread's tokens, which rise, the first of those with the largest score
#pragma unroll
  for (int j = 0; j < kPer; ++j)
    if (score[j] > high) high = score[j], at = j;
  const int token = first + at * kThreads + tid;
  unsigned long long best = largest(s, token < last ? ranked(high, token) : 0, 0, part, tid);
  const unsigned top = (unsigned)(best >> 32);
  const float highest = __uint_as_float(top >> 31 ? top & 0x7FFFFFFFu : ~top);
  if (temperature > 0.f && highest >= kLowest) {
    unsigned key[kPer];
    uint2 mass[kPer];
    unsigned threshold = 0;
    if (top_k > 0 && top_k < kVocab) {
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        key[j] = key_of(score[j]);
        mass[j] = {first + j * kThreads + tid < last, 0};
      }
      threshold = select<kBits>(s, key, mass, top_k, -1.f, part, tid);
    }
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      const bool kept = key_of(score[j]) >= threshold;
      score[j] = kept ? expf((score[j] - highest) / temperature) : 0.f;
    }
    threshold = 0;
    if (top_p < 1.f) {
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        key[j] = __float_as_uint(score[j]);
        const unsigned high = (unsigned)(score[j] * kHalf);
        mass[j] = {(unsigned)((score[j] * kHalf - (float)high) * kHalf), high};
      }
      // Of nothing there is no largest: that leaves the best token alone.
      threshold = top_p > 0.f ? select<kBits>(s, key, mass, 0, top_p, part, tid) : ~0u;
    }
    unsigned seed = absorb(0, sampling_i[4]);
    seed = absorb(seed, sampling_i[5]);
    seed = absorb(seed, position);
    // The earliest ring of all clocks, as the largest of minus the time.
    float earliest = -INFINITY;
    int winner = -1;
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      if (!(score[j] > 0.f) || __float_as_uint(score[j]) < threshold) continue;
      const int token = first + j * kThreads + tid;
      const unsigned h = absorb(seed, token);
      const float u = fminf(((float)h + 0.5f) * 2.3283064365386963e-10f, 0.99999994f);
      // A time is at least u, so most tokens lose without a logarithm.
      if (u > -earliest * score[j] * 1.001f) continue;
      // -log(1 - u), by its series where 1 - u would round.
      float time = u * (1.f + u * (0.5f + u * (1.f / 3)));
      if (u >= 0.01f) time = -logf(1.f - u);
      time = -time / score[j];
      if (time > earliest) earliest = time, winner = token;
    }
    const unsigned long long drawn = winner < 0 ? 0 : ranked(earliest, winner);
    const unsigned long long found = largest(s, drawn, 1, part, tid);
    if (found) best = found;
  }
  if (part == 0 && tid == 0) {
    const int winner = (int)~(unsigned)best;
    history[position + 1] = winner;
    tokens[row] = winner;
    positions[row] = position + 1;
    // To the host as well, without a copy behind this kernel.
    if (ring) ring[(position + 1) % kSlots] = (uint64_t)(position + 1) << 32 | (unsigned)winner;
  }
}

}  // namespace shardwright::sampler
#endif
