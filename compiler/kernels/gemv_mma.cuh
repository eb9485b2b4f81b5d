// Products of few tokens with a large weight on tensor cores; gemv_mma.py explains and calls them.
// Guarded, because several kernels of a module include it; ptx.cuh comes before.
#ifndef SHARDWRIGHT_GEMV_MMA
#define SHARDWRIGHT_GEMV_MMA

namespace shardwright_gemv {

#ifndef SHARDWRIGHT_EMULATED  // tests on a CPU bring their own of these
__device__ __forceinline__ unsigned address(const void* p) {
  return (unsigned)__cvta_generic_to_shared(p);
}

// An asynchronous copy of `kBytes` to shared memory, or of as many zeros.
template <int kBytes>
__device__ __forceinline__ void copy(unsigned to, const void* from, bool valid) {
  if (kBytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :: "r"(to), "l"(from), "r"(valid ? 16 : 0));
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :: "r"(to), "l"(from), "n"(kBytes), "r"(valid ? kBytes : 0));
}

// Those issued since the last call are a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

// Until all but the last `kLeft` groups of this warp have arrived.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
  __syncwarp();
}

// The rows of four 8 x 8 matrices, 16 bytes each; a lane names one of them.
__device__ __forceinline__ uint4 load_matrices(unsigned row) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(row));
  return v;
}

// c [16 x 8] += w [16 x 16] * x [16 x 8]
__device__ __forceinline__ void multiply(float (&c)[4], unsigned w0, unsigned w1, unsigned w2,
                                         unsigned w3, unsigned x0, unsigned x1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(w0), "r"(w1), "r"(w2), "r"(w3), "r"(x0), "r"(x1));
}

// c [16 x 8] += w [16 x 32], without sign, * x [32 x 8], with one.
__device__ __forceinline__ void multiply_bytes(int (&c)[4], unsigned w0, unsigned w1, unsigned w2,
                                               unsigned w3, unsigned x0, unsigned x1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(w0), "r"(w1), "r"(w2), "r"(w3), "r"(x0), "r"(x1));
}

// word & mask | 0x64006400, which the compiler would make two instructions of.
template <unsigned kMask>
__device__ __forceinline__ unsigned masked(unsigned word) {
  unsigned out;
  asm("lop3.b32 %0, %1, %2, 0x64006400, 0xea;" : "=r"(out) : "r"(word), "n"(kMask));
  return out;
}

// `kCount` floats, four or one, at `p` in shared memory of block `rank` of the cluster.
template <int kCount>
__device__ __forceinline__ void cluster_load(float (&v)[kCount], const float* p, int rank) {
#if __CUDA_ARCH__ >= 900
  const unsigned at = shardwright::in_block(p, rank);
  if constexpr (kCount == 4)
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "r"(at));
  else
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v[0]) : "r"(at));
#endif
}
#endif  // SHARDWRIGHT_EMULATED

// `kCount` scales with one instruction.
template <int kCount>
__device__ __forceinline__ void read(half (&out)[kCount], const char* from) {
  if (kCount == 4) *reinterpret_cast<uint2*>(out) = *reinterpret_cast<const uint2*>(from);
  else if (kCount == 2) *reinterpret_cast<unsigned*>(out) = *reinterpret_cast<const unsigned*>(from);
  else out[0] = *reinterpret_cast<const half*>(from);
}

template <int kCount>
__device__ __forceinline__ void read(float (&out)[kCount], const float* from) {
  if (kCount == 4) *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(from);
  else if (kCount == 2) *reinterpret_cast<uint2*>(out) = *reinterpret_cast<const uint2*>(from);
  else out[0] = *from;
}

// Eight elements less their scale as four pairs: 0 4, 1 5, 2 6, 3 7. 0x6400 is 1024 in half
// precision, whose last bits count ones, and those above them sixteens.
__device__ __forceinline__ void unpack(unsigned word, unsigned (&out)[4]) {
  const half2 low = __half2half2(__ushort_as_half(0x6407));        // 1024 + 7
  const half2 high = __half2half2(__ushort_as_half(0xd470));       // -(1024 / 16 + 7)
  const half2 sixteenth = __half2half2(__ushort_as_half(0x2c00));  // 1 / 16
  const unsigned later = word >> 8;
  out[0] = masked<0x000f000f>(word);
  out[1] = masked<0x00f000f0>(word);
  out[2] = masked<0x000f000f>(later);
  out[3] = masked<0x00f000f0>(later);
  half2* pairs = reinterpret_cast<half2*>(out);
  pairs[0] = __hsub2(pairs[0], low);
  pairs[1] = __hfma2(pairs[1], sixteenth, high);
  pairs[2] = __hsub2(pairs[2], low);
  pairs[3] = __hfma2(pairs[3], sixteenth, high);
}

template <class Out>
__device__ __forceinline__ Out rounded(float v);
template <>
__device__ __forceinline__ float rounded<float>(float v) { return v; }
template <>
__device__ __forceinline__ half rounded<half>(float v) { return __float2half(v); }

// One thread starts the barriers of a ring that a warp fills for kWarps others, and that of their first
// look at x.
template <class Z>
__device__ __forceinline__ void start_ring(uint64_t* full, uint64_t* empty, uint64_t* looked) {
  for (int slot = 0; slot < Z::kDepth; ++slot) {
    shardwright::phase_start(full + slot, 1);
    shardwright::phase_start(empty + slot, Z::kWarps);
  }
  shardwright::phase_start(looked, Z::kWarps);
  shardwright::phases_started();
  shardwright::fence_copies();
}

// Sizes, as `Plan` of gemv_mma.py has them; kGroup is 0 for an fp16 weight. kParts blocks, or clusters
// of them, divide the outputs.
template <int kBatch_, int kOutputs_, int kInner_, int kGroup_, bool kGated_, int kChunk_,
          int kTiles_, int kDepth_, int kSplit_, int kTeams_, int kPhases_, int kCluster_, int kParts_>
struct Sizes {
  static constexpr int kBatch = kBatch_, kOutputs = kOutputs_, kInner = kInner_, kGroup = kGroup_;
  static constexpr int kChunk = kChunk_, kDepth = kDepth_, kSplit = kSplit_, kTeams = kTeams_;
  static constexpr int kTiles = kTiles_, kPhases = kPhases_, kCluster = kCluster_, kParts = kParts_;
  static constexpr bool kGated = kGated_, kQ4 = kGroup > 0;
  static constexpr int kThreads = kSplit * kTeams * 32;
  static constexpr int kRows = kTiles * 16;               // that a warp takes at a time
  static constexpr int kRowBytes = kQ4 ? kInner / 2 : kInner * 2;
  static constexpr int kElements = kQ4 ? kChunk * 2 : kChunk / 2;  // of a chunk
  static constexpr int kPitch = kChunk + 16;              // eight rows meet no bank twice
  static constexpr int kScaleBytes = kQ4 ? kElements / (kQ4 ? kGroup : 1) * 2 : 0;
  static constexpr int kScaleRow = kQ4 ? kInner / (kQ4 ? kGroup : 1) * 2 : 0;
  static constexpr int kScalePitch = kScaleBytes + (kScaleBytes == 32 ? 16 : 0);
  static constexpr int kScalePiece = (kScaleRow | kScaleBytes) % 16 == 0  ? 16
                                     : (kScaleRow | kScaleBytes) % 8 == 0 ? 8
                                                                          : 4;
  static constexpr int kSlot = kRows * (kPitch + kScalePitch);
  static constexpr int kChunks = (kInner + kElements - 1) / kElements;
  // Chunks of a row that a warp takes in a phase.
  static constexpr int kSteps = (kChunks + kSplit * kPhases * kCluster - 1) /
                                (kSplit * kPhases * kCluster);
  static constexpr bool kWhole = kSteps * kSplit * kPhases * kCluster * kChunk == kRowBytes;
  static constexpr int kBlocks32 = kElements / 32;        // pieces of 32 elements of a chunk
  static constexpr int kPieces = kSteps * kSplit * kBlocks32 * 4;  // 16 bytes of x, of a token
  static constexpr int kTokens8 = (kBatch + 7) / 8;
  static constexpr int kRing = kSplit * kTeams * kDepth * kSlot;
  // One token is multiplied with four bits as integers: see `consume_integers`.
  static constexpr bool kIntegers = kBatch == 1 && kQ4;
  static constexpr int kGroups = kIntegers ? kPieces / 4 : 0;  // of x, of 32 elements
  static constexpr int kLaneGroups = kBlocks32 / 4;       // of a chunk, that a lane sums up
  static_assert(!kIntegers || (kTiles == 1 && kBlocks32 % 8 == 0), "a chunk fills columns");
  // Where the lanes of `consume_integers` find the upper bytes of the piece `e` of x, and behind them
  // the lower ones.
  static constexpr int kLowerBytes = 64;
  static __device__ __forceinline__ int place_of_x(int e) {
    const int group = e / 4, c = e % 4;
    const int place = group % kLaneGroups, t = group / kLaneGroups % 4, chunk = group / kBlocks32;
    return (chunk * (kLaneGroups / 2) + place / 2) * 512 + place % 2 * 8 + (t * 8 + c) * 16;
  }
  // Else x lies in shared memory as in memory, a phase ahead, where there are several. Eight lanes
  // that read together meet no bank twice.
  static constexpr int kStepBytes = kSplit * kElements * 2, kPhaseBytes = kSteps * kStepBytes;
  static constexpr int kXPitch = kPhaseBytes + (kQ4 ? 64 : 16);
  static constexpr int kBuffers = kPhases > 1 ? 2 : 1;
  static constexpr int kBarriers = kRing + kBuffers * kBatch * kXPitch;
  static constexpr int kPartial = kBarriers + (kBuffers * kSteps + 1) / 2 * 16;
  // Whether x is put into the order of a four-bit weight on its way there. Else that is done where it
  // is read, and copies need no registers: so of several phases, of 5 to 8 tokens, and of more than 12
  // with few rows of a block, where the one was seen to cost less than the other.
  static constexpr int kMostRows = (kOutputs + kParts - 1) / kParts * (kGated ? 2 : 1);
  static constexpr bool kReadSeldom = kBatch > 12 && kWhole && kMostRows <= 64;
  static constexpr bool kOrdered = kQ4 && !kIntegers && kPhases == 1 &&
                                   (kBatch <= 4 || (kTokens8 > 1 && !kReadSeldom));
  static constexpr int kOutputsOf = kGated ? 8 : 16;      // a tile has
  // Outputs that a thread writes at once.
  static constexpr int kWide = kBatch == 1 || kOutputs % 4 ? 1 : 4;
  static constexpr bool kWholeX = kIntegers && kPhases == 1 && kCluster == 1;  // is in a block

  static __device__ __forceinline__ void meet() { __syncthreads(); }
};

// Where a warp's next chunk is read from and written to.
template <class Z>
struct Copies {
  const char *weight, *scale;  // the lane's first bytes of the next chunk
  const char *weight_start, *scale_start;
  unsigned to, scale_to;
  int left, all_left;  // outputs, from the next chunk's on
  int step = 0, phase = 0, slot = 0;

  static constexpr int kLanes = Z::kChunk / 16;            // that share a row
  static constexpr int kScaleLanes = Z::kQ4 ? Z::kScaleBytes / Z::kScalePiece : 1;

  // Rows are counted as a tile has them: of a gated product 8 gates, then their 8 values.
  static __device__ __forceinline__ int row_of(int slot) {
    return Z::kGated ? slot / 16 * 8 + slot % 8 : slot;
  }

  __device__ __forceinline__ void issue(int rank, int split) {
    const int lane = threadIdx.x % 32;
    const int chunk = ((phase * Z::kCluster + rank) * Z::kSteps + step) * Z::kSplit + split;
    const bool in = Z::kWhole || chunk * Z::kChunk + lane % kLanes * 16 < Z::kRowBytes;
    constexpr int kStep = 32 / kLanes;
#pragma unroll
    for (int i = 0; i < Z::kRows / kStep; ++i) {
      // kStep divides 8, so i * kStep is on one side of a gated tile for all lanes.
      const int at = i * kStep, row = row_of(at);
      const bool value = Z::kGated && at % 16 >= 8;
      const char* from = weight + (row + (value ? (long long)Z::kOutputs : 0)) * Z::kRowBytes;
      copy<16>(to + slot * Z::kSlot + at * Z::kPitch, from, in && row + lane / kLanes < left);
    }
    if (Z::kQ4) {
      const int place = chunk * Z::kScaleBytes + lane % kScaleLanes * Z::kScalePiece;
      const bool scale_in = Z::kWhole || place < Z::kScaleRow;
      constexpr int kScaleStep = 32 / kScaleLanes;  // rows at once
#pragma unroll
      for (int i = 0; i < (Z::kRows + kScaleStep - 1) / kScaleStep; ++i) {
        const int at = i * kScaleStep + lane / kScaleLanes;
        const int row = row_of(at);
        const bool value = Z::kGated && at % 16 >= 8;
        const char* from = scale + (row + (value ? (long long)Z::kOutputs : 0)) * Z::kScaleRow;
        if (Z::kRows % kScaleStep == 0 || at < Z::kRows)
          copy<Z::kScalePiece>(scale_to + slot * Z::kSlot + i * kScaleStep * Z::kScalePitch, from,
                               scale_in && row < left);
      }
    }
    if (++slot == Z::kDepth) slot = 0;
    constexpr int kRow = Z::kSteps * Z::kSplit;  // chunks of a row that a block takes in a phase
    weight += Z::kSplit * Z::kChunk, scale += Z::kSplit * Z::kScaleBytes;
    if (++step == Z::kSteps) {
      constexpr long long kDown = Z::kTeams * Z::kTiles * Z::kOutputsOf;
      step = 0, left -= kDown;
      weight += kDown * Z::kRowBytes - kRow * Z::kChunk;
      scale += kDown * Z::kScaleRow - kRow * Z::kScaleBytes;
      if (Z::kPhases > 1 && left <= 0) {
        ++phase, left = all_left;
        weight = weight_start + phase * kRow * Z::kCluster * Z::kChunk;
        scale = scale_start + phase * kRow * Z::kCluster * Z::kScaleBytes;
      }
    }
  }
};

// Eight elements in the order in which those of a word of four bits are unpacked.
__device__ __forceinline__ uint4 ordered(uint4 v) {
  return make_uint4(__byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632),
                    __byte_perm(v.y, v.w, 0x5410), __byte_perm(v.y, v.w, 0x7632));
}

// x of one token as integers of 16 bits, each group of 32 elements to a scale of its own, so that none
// is off by more than 2^-16 of the group's largest.
template <class Z>
struct Staged {
  char* pieces;

  // Of a group: what its sum of products is multiplied by, and what is added then.
  __device__ __forceinline__ float* factors() const {
    return reinterpret_cast<float*>(pieces + Z::kPieces * 16);
  }
  __device__ __forceinline__ float* offsets() const { return factors() + Z::kGroups; }
  __device__ __forceinline__ float* partial() const {  // what lies behind x
    return offsets() + Z::kGroups;
  }

  // Elements 8 e to 8 e + 7; by four lanes together, which have a group.
  __device__ __forceinline__ void put(int e, uint4 v) const {
    constexpr float kMost = 32512.f;  // so that the upper byte, rounded, fits as well
    float f[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __half22float2(reinterpret_cast<const half2*>(&v)[i]);
      f[2 * i] = pair.x, f[2 * i + 1] = pair.y;
    }
    // Without signs their bits are in order, infinity and what is no number last.
    constexpr unsigned kBits = 0x7fff7fff;
    unsigned most = __vmaxu2(__vmaxu2(v.x & kBits, v.y & kBits),
                             __vmaxu2(v.z & kBits, v.w & kBits));
    most = __vmaxu2(most, __shfl_xor_sync(~0u, most, 1));
    most = __vmaxu2(most, __shfl_xor_sync(~0u, most, 2));
    const float top = __half2float(__ushort_as_half(max(most & 0xffff, most >> 16)));
    const float by = top > 0.f ? __fdividef(kMost, top) : 0.f;
    // The integers plus 32768 are the last halves of floats from 1.5 * 2^23 on. Words have those of
    // elements 0 and 2, 4 and 6, and of 1 and 3, 5 and 7.
    auto rounded = [&](int i) { return __float_as_uint(fmaf(f[i], by, 12582912.f + 32768.f)); };
    unsigned even[2], odd[2], sum = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      even[i] = __byte_perm(rounded(4 * i), rounded(4 * i + 2), 0x5410);
      odd[i] = __byte_perm(rounded(4 * i + 1), rounded(4 * i + 3), 0x5410);
      sum = __dp2a_lo(odd[i], 0x0101u, __dp2a_lo(even[i], 0x0101u, sum));  // of all halves
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int group = e / 4;
    if (e % 4 == 0) {
      const float one = top * (1.f / kMost);
      factors()[group] = one / 16.f;
      offsets()[group] = one * -7.f * (float)((int)sum - 32 * 32768);
    }
    // Both bytes get a sign: 128 is added for the upper to be the nearest.
    auto upper = [](const unsigned (&n)[2]) {
      return __byte_perm(n[0] + 0x00800080u, n[1] + 0x00800080u, 0x7531) ^ 0x80808080u;
    };
    auto lower = [](const unsigned (&n)[2]) { return __byte_perm(n[0], n[1], 0x6420); };
    char* const to = pieces + Z::place_of_x(e);
    *reinterpret_cast<uint2*>(to) = uint2{upper(even), upper(odd)};
    *reinterpret_cast<uint2*>(to + Z::kLowerBytes) = uint2{lower(even), lower(odd)};
  }
};

// x of a product as it lies in memory.
struct PlainInput {
  static constexpr bool kWaits = true;  // for the kernels in front, before x
  const half* x;

  __device__ __forceinline__ void before() {}  // what may be read before the kernels in front end
  // A phase's part of x as integers.
  // `arriving()` is called once its first pieces are on their way.
  template <class Z, class Arriving>
  __device__ __forceinline__ void stage(Staged<Z> staged, int phase, Arriving arriving) const {
    each<Z>(phase * Z::kPieces, [&](int, int piece, uint4 v) { staged.put(piece, v); }, arriving);
  }
  // x of several tokens, in order.
  template <class Z>
  __device__ __forceinline__ void bring_ordered(char* shared, int rank) const {
    each<Z>(rank * Z::kPieces, [&](int token, int piece, uint4 v) {
      *reinterpret_cast<uint4*>(shared + Z::kRing + token * Z::kXPitch + piece * 16) = ordered(v);
    }, [] {});
  }
  // A phase's part of x as it is, the columns of each step with a barrier of their own.
  template <class Z>
  __device__ __forceinline__ void bring(char* shared, int phase, int rank) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, buffer = phase % Z::kBuffers;
    uint64_t* barriers = reinterpret_cast<uint64_t*>(shared + Z::kBarriers) + buffer * Z::kSteps;
    const int first = (phase * Z::kCluster + rank) * Z::kPhaseBytes;
    // Copies of a warp are issued one after the other. So all warps issue some of each step, but where
    // a barrier waits for the lanes of one warp.
    constexpr bool kOne = shardwright::kCopiers > 1;
    constexpr int kWarps = Z::kThreads / 32, kTokens = kOne ? 32 : Z::kBatch;
    for (int i = kOne ? threadIdx.x : lane * kWarps + warp; i / Z::kThreads * Z::kThreads <
         Z::kSteps * kTokens; i += Z::kThreads) {
      const int step = i / kTokens, token = i % kTokens, at = step * Z::kStepBytes;
      const int bytes = Z::kWhole ? Z::kStepBytes
                                  : max(0, min(Z::kStepBytes, Z::kInner * 2 - first - at));
      const bool in = step < Z::kSteps && token < Z::kBatch, one = in && token == 0;
      shardwright::copies_expect(one, barriers + step, bytes * Z::kBatch);
      shardwright::copy_each(in && bytes > 0,
                             shared + Z::kRing + (buffer * Z::kBatch + token) * Z::kXPitch + at,
                             reinterpret_cast<const char*>(x + (long long)token * Z::kInner) +
                                 first + at,
                             bytes, barriers + step);
      shardwright::copies_issued(one, barriers + step);
    }
  }

 private:
  // put(token, piece, eight elements) for all pieces of a phase, of which `first` is the first.
  template <class Z, class Put, class Arriving>
  __device__ __forceinline__ void each(int first, Put put, Arriving arriving) const {
    constexpr int kCount = Z::kBatch * Z::kPieces;
    constexpr int kMost = (kCount + Z::kThreads - 1) / Z::kThreads, kUnroll = kMost < 8 ? kMost : 8;
    if constexpr (kCount < Z::kThreads) {
      // Of whole warps, which have none. (A loop that all warps enter costs 70B's steps 2 %.)
      if (threadIdx.x >= kCount) arriving();
    }
    // Blocks start at different places: all reading the same bytes at once would be slow.
    const int turn = blockIdx.x * 37 % (kCount / 4) * 4;
    for (int base = threadIdx.x; base < kCount; base += Z::kThreads * kUnroll) {
      uint4 pieces[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        int i = base + u * Z::kThreads + turn;
        i = i < kCount ? i : i - kCount;
        const int token = i / Z::kPieces, at = first + i % Z::kPieces;
        pieces[u] = make_uint4(0, 0, 0, 0);
        if (base + u * Z::kThreads < kCount && (Z::kWhole || at < Z::kInner / 8))
          pieces[u] = *reinterpret_cast<const uint4*>(x + token * Z::kInner + at * 8);
      }
      if (base == threadIdx.x) arriving();
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        int i = base + u * Z::kThreads + turn;
        i = i < kCount ? i : i - kCount;
        if (base + u * Z::kThreads < kCount) put(i / Z::kPieces, i % Z::kPieces, pieces[u]);
      }
    }
  }
};

// One chunk of a tile times one token: `sums` of rows lane / 4 and 8 more, of each lane a part.
//
// The eight columns of a product on tensor cores are the upper and the lower bytes of x of four
// groups of 32 elements; a column has zeros for the other groups' elements. So a lane gets the sums of
// both bytes of a group, and what is done for each row and group is done once. Codes are not
// unpacked: the lower ones of a word's bytes are one operand and the upper ones, 16 times as large,
// another. Sums are exact.
template <class Z>
__device__ __forceinline__ void consume_integers(float (&sums)[2], unsigned source,
                                                 const char* scales, Staged<Z> x,
                                                 int first_group) {
  constexpr int kEach = Z::kLaneGroups, kSpan = kEach * 32;  // elements that a lane sums up
  constexpr int kScales = kSpan > Z::kGroup ? kSpan / Z::kGroup : 1;
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  source += lane % 16 * Z::kPitch + lane / 16 * (kEach * 16);
  const char* const mine = x.pieces + first_group * 64 + lane * 16;
  alignas(16) float factor[kEach], offset[kEach];
  alignas(8) half scale[2][kScales];
#pragma unroll
  for (int h = 0; h < 2; ++h)
    read<kScales>(scale[h], scales + (8 * h + g) * Z::kScalePitch + c * kSpan / Z::kGroup * 2);
  read<kEach>(factor, x.factors() + first_group + c * kEach);
  read<kEach>(offset, x.offsets() + first_group + c * kEach);
#pragma unroll
  for (int two = 0; two < kEach / 2; ++two) {
    const uint4 bytes = *reinterpret_cast<const uint4*>(mine + two * 512);
#pragma unroll
    for (int one = 0; one < 2; ++one) {
      const int place = two * 2 + one;
      const unsigned even = one ? bytes.z : bytes.x, odd = one ? bytes.w : bytes.y;
      int sum[2][4] = {};  // of the codes as they are and of those times 16
#pragma unroll
      for (int pair = 0; pair < 4; pair += 2) {
        const uint4 w = load_matrices(source + (pair * kEach + place) * 16);
        const bool first = g / 2 == pair, second = g / 2 == pair + 1;
        constexpr unsigned kLow = 0x0f0f0f0f, kHigh = 0xf0f0f0f0;
        multiply_bytes(sum[0], w.x & kLow, w.y & kLow, w.z & kLow, w.w & kLow, first ? even : 0,
                       second ? even : 0);
        multiply_bytes(sum[1], w.x & kHigh, w.y & kHigh, w.z & kHigh, w.w & kHigh,
                       first ? odd : 0, second ? odd : 0);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int upper = sum[0][2 * h] * 16 + sum[1][2 * h];
        const int lower = sum[0][2 * h + 1] * 16 + sum[1][2 * h + 1];
        sums[h] += fmaf((float)(upper * 256 + lower), factor[place], offset[place]) *
                   __half2float(scale[h][place * kScales / kEach]);
      }
    }
  }
}

// One chunk of kTiles tiles: sums += w * x.
template <class Z>
__device__ __forceinline__ void consume(float (&sums)[Z::kTiles][Z::kTokens8][4], unsigned source,
                                        const char* scales, const char* x) {
  const int lane = threadIdx.x % 32, g = lane / 4;
  source += lane % 16 * Z::kPitch + lane / 16 * 16;
#pragma unroll
  for (int q = 0; q < Z::kChunk / 64; ++q) {
    uint4 w[Z::kTiles][2];
    constexpr int kScales = !Z::kQ4 || Z::kGroup >= 128 ? 1 : 128 / (Z::kQ4 ? Z::kGroup : 1);
    alignas(8) half factor[Z::kTiles][2][kScales];  // of rows g and g + 8
#pragma unroll
    for (int r = 0; r < Z::kTiles; ++r)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        w[r][i] = load_matrices(source + r * 16 * Z::kPitch + q * 64 + i * 32);
        const char* at = scales + (r * 16 + i * 8 + g) * Z::kScalePitch;
        if (Z::kQ4) read<kScales>(factor[r][i], at + q * 128 / (Z::kQ4 ? Z::kGroup : 1) * 2);
      }
#pragma unroll
    for (int p = 0; p < (Z::kQ4 ? 4 : 1); ++p) {
      uint4 tokens[Z::kTokens8];
#pragma unroll
      for (int n = 0; n < Z::kTokens8; ++n) {
        if (Z::kQ4) {
          const char* at = x + min(g + 8 * n, Z::kBatch - 1) * Z::kXPitch + lane % 4 * 16;
          tokens[n] = *reinterpret_cast<const uint4*>(at + (q * 4 + p) * 64);
          if (!Z::kOrdered) tokens[n] = ordered(tokens[n]);
        } else {
          const char* at = x + min(lane % 8 + 8 * n, Z::kBatch - 1) * Z::kXPitch + lane / 8 * 16;
          tokens[n] = load_matrices(address(at) + q * 64);
        }
      }
#pragma unroll
      for (int r = 0; r < Z::kTiles; ++r) {
        if (Z::kQ4) {
          unsigned a[4], b[4];
          unpack(p % 2 ? w[r][p / 2].z : w[r][p / 2].x, a);
          unpack(p % 2 ? w[r][p / 2].w : w[r][p / 2].y, b);
          const float upper = __half2float(factor[r][0][p * kScales / 4]);
          const float lower = __half2float(factor[r][1][p * kScales / 4]);
#pragma unroll
          for (int n = 0; n < Z::kTokens8; ++n) {
            float c[4] = {0.f, 0.f, 0.f, 0.f};
            multiply(c, a[0], b[0], a[1], b[1], tokens[n].x, tokens[n].y);
            multiply(c, a[2], b[2], a[3], b[3], tokens[n].z, tokens[n].w);
            sums[r][n][0] += c[0] * upper;
            if (Z::kBatch > 1) sums[r][n][1] += c[1] * upper;
            sums[r][n][2] += c[2] * lower;
            if (Z::kBatch > 1) sums[r][n][3] += c[3] * lower;
          }
        } else {
#pragma unroll
          for (int n = 0; n < Z::kTokens8; ++n) {
            multiply(sums[r][n], w[r][0].x, w[r][0].y, w[r][0].z, w[r][0].w, tokens[n].x,
                     tokens[n].y);
            multiply(sums[r][n], w[r][1].x, w[r][1].y, w[r][1].z, w[r][1].w, tokens[n].z,
                     tokens[n].w);
          }
        }
      }
    }
  }
}

// The result of a product in memory.
template <class Out>
struct PlainOutput {
  using Type = Out;
  static constexpr bool kNorms = false;  // has part in a norm, as outputs of gemv_norm.cuh do
  Out* out;

  template <class Z>
  __device__ __forceinline__ void before() {}  // what may be read before the kernels in front end
  template <class Z>
  __device__ __forceinline__ void put(int token, int output, Out value) const {
    out[(long long)token * Z::kOutputs + output] = value;
  }
  template <class Z>
  __device__ __forceinline__ void put(int token, int output, const Out (&values)[4]) const {
    Out* const to = out + (long long)token * Z::kOutputs + output;
    if (sizeof(Out) == 4)
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(values);
    else
      *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(values);
  }
};

// `scale` may be anything for an fp16 weight; `shared` is 16-byte aligned; every thread calls it.
template <class Z, class Input, class Output>
__device__ __forceinline__ void product(Input input, const void* weight, const half* scale,
                                        Output output_to, char* shared) {
  using Out = typename Output::Type;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int split = warp % Z::kSplit, team = warp / Z::kSplit;
  const int rank = blockIdx.x % Z::kCluster, part = blockIdx.x / Z::kCluster;
  // The outputs of this block, or cluster.
  constexpr int kUnits = Z::kOutputs / Z::kWide;
  const int first = kUnits * part / Z::kParts * Z::kWide;
  const int count = kUnits * (part + 1) / Z::kParts * Z::kWide - first;
  constexpr int kTake = Z::kTiles * Z::kOutputsOf;  // outputs a warp takes at a time
  const int takes = (count + kTake - 1) / kTake;
  const int mine = takes > team ? (takes - team + Z::kTeams - 1) / Z::kTeams : 0;
  constexpr int most = (kUnits + Z::kParts - 1) / Z::kParts * Z::kWide;
  // Of the sums of a token. Lanes that write together meet no bank twice.
  constexpr int pitch = (most + kTake - 1) / kTake * Z::kRows + 4;
  const Staged<Z> integers{shared + Z::kRing};
  float* const partial =
      Z::kIntegers ? integers.partial() : reinterpret_cast<float*>(shared + Z::kPartial);

  using Ahead = Copies<Z>;
  Ahead ahead;
  char* const ring = shared + warp * Z::kDepth * Z::kSlot;
  const int row = first + team * kTake;
  ahead.to = address(ring) + lane / Ahead::kLanes * Z::kPitch + lane % Ahead::kLanes * 16;
  ahead.scale_to = address(ring) + Z::kRows * Z::kPitch +
                   lane / Ahead::kScaleLanes * Z::kScalePitch +
                   lane % Ahead::kScaleLanes * Z::kScalePiece;
  const int at = rank * Z::kSteps * Z::kSplit + split;
  ahead.weight_start = static_cast<const char*>(weight) +
                       (long long)(row + lane / Ahead::kLanes) * Z::kRowBytes + at * Z::kChunk +
                       lane % Ahead::kLanes * 16;
  ahead.scale_start = reinterpret_cast<const char*>(scale) + (long long)row * Z::kScaleRow +
                      at * Z::kScaleBytes + lane % Ahead::kScaleLanes * Z::kScalePiece;
  ahead.weight = ahead.weight_start, ahead.scale = ahead.scale_start;
  ahead.left = ahead.all_left = count - team * kTake;

  const int of_phase = mine * Z::kSteps, items = of_phase * Z::kPhases;
#pragma unroll
  for (int d = 0; d < Z::kDepth - 1; ++d) {
    if (d < items) ahead.issue(rank, split);
    commit_copies();
  }
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(shared + Z::kBarriers);
  if constexpr (!Z::kIntegers && !Z::kOrdered) {
    for (int i = tid; i < Z::kBuffers * Z::kSteps; i += Z::kThreads)
      shardwright::phase_start(barriers + i, shardwright::kCopiers);
    if (!Z::kWhole) {
      // What weights past the end, which are zeros, are multiplied with is no NaN.
      for (int i = Z::kRing + tid * 16; i < Z::kBarriers; i += Z::kThreads * 16)
        *reinterpret_cast<uint4*>(shared + i) = make_uint4(0, 0, 0, 0);
      shardwright::fence_copies();
    }
    shardwright::phases_started();
    __syncthreads();
  }
  input.before(), output_to.template before<Z>();
  if (Input::kWaits) shardwright::wait_for_inputs();
  if constexpr (Output::kNorms) output_to.look();
  if constexpr (Z::kOrdered) {
    input.template bring_ordered<Z>(shared, rank);
    __syncthreads();
  } else if constexpr (!Z::kIntegers) {
    for (int phase = 0; phase < Z::kBuffers; ++phase) input.template bring<Z>(shared, phase, rank);
  }
  float* const scales = partial + pitch * Z::kSplit * Z::kBatch;
  if constexpr (Output::kNorms) output_to.start(scales);
  // The next kernel may start once all copies are under way: sooner its own would only delay them.
  // What it reads of kernels in front of this one is there, as this one has waited.
  if (items < Z::kDepth) shardwright::launch_dependents();
  int slot = 0;
  float sums[Z::kTiles][Z::kTokens8][4] = {};
  float rows[2] = {};  // of integers
  // The sums of one tile stay where they are from phase to phase.
  const bool stay = !Z::kIntegers && mine == 1;
  for (int phase = 0; phase < Z::kPhases; ++phase) {
    const int buffer = phase % Z::kBuffers;
    const char* const x = shared + Z::kRing + buffer * Z::kBatch * Z::kXPitch;
    if constexpr (Z::kIntegers) {
      if (phase) __syncthreads();
      // The ring's last place is filled behind the first look at x, which would else come later.
      input.stage(integers, phase, [&] {
        if (phase) return;
        if (Z::kDepth - 1 < items) ahead.issue(rank, split);
        commit_copies();
      });
      __syncthreads();
    } else if (phase && phase + 1 < Z::kPhases) {
      __syncthreads();  // the other buffer is read no more
      input.template bring<Z>(shared, phase + 1, rank);
    }
    int step = 0, take = team;
    for (int i = 0; i < of_phase; ++i) {
      const int next = phase * of_phase + i + Z::kDepth - 1;
      if (Z::kIntegers && next == Z::kDepth - 1) {
        wait_for_copies<Z::kDepth - 1>();
      } else {
        wait_for_copies<Z::kDepth - 2>();
        // Into the place of the chunk before, which all lanes have read by now.
        if (next < items) ahead.issue(rank, split);
        commit_copies();
      }
      if (next + 1 == items) shardwright::launch_dependents();
      const char* source = ring + slot * Z::kSlot;
      if (++slot == Z::kDepth) slot = 0;
      const int at = (step * Z::kSplit + split) * Z::kElements;  // of the phase's columns
      if constexpr (Z::kIntegers) {
        consume_integers<Z>(rows, address(source), source + Z::kRows * Z::kPitch, integers, at / 32);
      } else {
        if (!Z::kOrdered && take == team)
          shardwright::phase_wait(barriers + buffer * Z::kSteps + step, phase / Z::kBuffers % 2);
        consume<Z>(sums, address(source), source + Z::kRows * Z::kPitch, x + at * 2);
      }
      if (++step < Z::kSteps) continue;
      step = 0;
      if (stay && phase + 1 < Z::kPhases) continue;
      if constexpr (Z::kIntegers) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          rows[h] += __shfl_xor_sync(~0u, rows[h], 1);
          rows[h] += __shfl_xor_sync(~0u, rows[h], 2);
          // To where those of one column are.
          sums[0][0][2 * h] = rows[h], rows[h] = 0.f;
        }
      }
#pragma unroll
      for (int r = 0; r < Z::kTiles; ++r)
#pragma unroll
        for (int n = 0; n < Z::kTokens8; ++n)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int local = take * Z::kRows + r * 16 + lane / 4 + 8 * (j / 2);
            const int token = n * 8 + lane % 4 * 2 + j % 2;
            if (token < Z::kBatch) {
              float* p = partial + (split * Z::kBatch + token) * pitch + local;
              *p = phase && !stay ? *p + sums[r][n][j] : sums[r][n][j];
            }
            sums[r][n][j] = 0.f;
          }
      take += Z::kTeams;
    }
  }
  // The blocks of a cluster write a part of the outputs each.
  const int units = count / Z::kWide, total = units * Z::kBatch;
  const int from = total * rank / Z::kCluster, to = total * (rank + 1) / Z::kCluster;
  const auto fetch = [&](int i) {
    if constexpr (Output::kNorms)
      if (i < to) output_to.fetch(i / units, first + i % units * Z::kWide);
  };
  fetch(from + tid);
  if (Z::kCluster > 1) shardwright::cluster_meet();
  else __syncthreads();
  float* const of_items = reinterpret_cast<float*>(shared);  // in the ring, which has served
  // The warps' sums in a fixed order.
  for (int i = from + tid; i < to; i += Z::kThreads) {
    const int output = i % units * Z::kWide, token = i / units;
    const int local = Z::kGated ? output / 8 * 16 + output % 8 : output;
    float sum[2][Z::kWide] = {};  // and of a gated product that of the value
#pragma unroll
    for (int c = 0; c < Z::kCluster; ++c)
#pragma unroll
      for (int s = 0; s < Z::kSplit; ++s)
#pragma unroll
        for (int half = 0; half < (Z::kGated ? 2 : 1); ++half) {
          const float* p = partial + (s * Z::kBatch + token) * pitch + local + half * 8;
          float v[Z::kWide];
          if (Z::kCluster > 1) cluster_load(v, p, c);
          else read(v, p);
#pragma unroll
          for (int j = 0; j < Z::kWide; ++j) sum[half][j] += v[j];
        }
    if constexpr (Output::kNorms) {
      const float by = output_to.scale(scales, token);
#pragma unroll
      for (int j = 0; j < Z::kWide; ++j) sum[0][j] *= by, sum[1][j] *= by;
    }
    alignas(16) Out results[Z::kWide];
#pragma unroll
    for (int j = 0; j < Z::kWide; ++j) {
      // silu(gate) * value of the sums rounded as if written.
      const float gate = (float)rounded<Out>(sum[0][j]);
      const float value = (float)rounded<Out>(sum[1][j]);
      results[j] = rounded<Out>(Z::kGated ? gate / (1.f + expf(-gate)) * value : sum[0][j]);
    }
    if constexpr (Output::kNorms) output_to.put(i, token, first + output, results, of_items);
    else if constexpr (Z::kWide == 1) output_to.template put<Z>(token, first + output, results[0]);
    else output_to.template put<Z>(token, first + output, results);
    fetch(i + Z::kThreads);
  }
  if constexpr (Output::kNorms) output_to.end(of_items, units, from, to);
  if (Z::kCluster > 1) shardwright::cluster_meet();  // its blocks still read this one's memory
}

}  // namespace shardwright_gemv
#endif
