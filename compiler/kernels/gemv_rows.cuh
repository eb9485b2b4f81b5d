// A product of one token, of whose weight a block streams its rows through a ring in shared memory;
// gemv_rows.py explains and calls it. Included once in a module, after gemv_mma.cuh.
#ifndef SHARDWRIGHT_GEMV_ROWS
#define SHARDWRIGHT_GEMV_ROWS

namespace shardwright_gemv {

#ifndef SHARDWRIGHT_EMULATED  // tests on a CPU bring their own of these
// sum + four bytes of `codes`, without sign, times those of `x`, with one.
__device__ __forceinline__ int dot(unsigned codes, unsigned x, int sum) {
  int d;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(codes), "r"(x), "r"(sum));
  return d;
}
#endif  // SHARDWRIGHT_EMULATED

// Sizes, as `Plan` of gemv_rows.py has them; kGroup is 0 for an fp16 weight. kThreads multiply and 32
// more copy. kParts blocks divide the outputs.
template <int kOutputs_, int kInner_, int kGroup_, bool kGated_, int kThreads_, int kUnits_,
          int kDepth_, int kAhead_, int kWindow_, int kParts_>
struct RowSizes {
  static constexpr int kOutputs = kOutputs_, kInner = kInner_, kThreads = kThreads_;
  static constexpr int kUnits = kUnits_, kDepth = kDepth_, kAhead = kAhead_;
  static constexpr int kWindow = kWindow_, kParts = kParts_;
  static constexpr bool kGated = kGated_, kQ4 = kGroup_ > 0;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kElements = kQ4 ? 32 : 8;  // of a piece of 16 bytes
  static constexpr int kRowPieces = kInner / kElements, kRowBytes = kRowPieces * 16;
  static constexpr int kGroup = kQ4 ? kGroup_ : 1, kScaleRow = kQ4 ? kInner / kGroup * 2 : 0;
  // Threads that a row has, whole warps of them; rows that all read at once; and pieces of a row
  // that a thread has.
  static constexpr int kLanes = (kRowPieces + 31) / 32 * 32;
  static constexpr int kRows = kThreads % kLanes == 0 ? kThreads / kLanes : 1;
  static constexpr int kPer = (kRowPieces + kThreads - 1) / kThreads;
  // Pieces of x, of 8 elements.
  static constexpr int kPieces = kQ4 ? kInner / 8 : kPer * kThreads;
  static constexpr bool kWholeX = kQ4 || kRows == 1, kWhole = true;
  // With four bits x passes through shared memory, where it becomes integers: see `Staged`.
  static constexpr int kGroups = kQ4 ? kInner / 32 : 0, kLowerBytes = 8, kBatch = 1;
  static __device__ __forceinline__ int place_of_x(int e) { return e * 16; }
  // A place of the ring has kUnits times kRows rows, of a gated product half of them gates, and
  // behind them their scales.
  static constexpr int kHalf = kGated ? kUnits / 2 : kUnits, kTake = kHalf * kRows;
  static constexpr int kScales = kUnits * kRows * kRowBytes;
  static constexpr int kSlot = kScales + kUnits * kRows * kScaleRow;
  static constexpr int kSums = 8, kJoined = kSums / kUnits;  // sums, and places, joined together
  static constexpr int kSlots = ((kOutputs + kParts - 1) / kParts + kTake - 1) / kTake;
  // In shared memory, behind the ring.
  static constexpr int kX = kDepth * kSlot;
  static constexpr int kSquares = kX + (kQ4 ? kPieces * 16 + kGroups * 8 : 0);
  static constexpr int kPartial = kSquares + kWarps * 4;
  static constexpr int kBarriers =
      (kPartial + (kSlots + kJoined) * kUnits * kWarps * 4 + 15) / 16 * 16;

  static __device__ __forceinline__ void meet() { shardwright::meet(1, kThreads); }
};

// A thread's pieces of x: of its number, and kThreads more each.
template <class Z>
struct HeldX {
  float* squares;
  uint4 pieces[Z::kPer];

  __device__ __forceinline__ void put(int e, uint4 v) {
    pieces[(e - (int)threadIdx.x) / Z::kThreads] = v;
  }
  __device__ __forceinline__ float* partial() const { return squares; }
};

// x of a product as it lies in memory.
struct RowInput {
  static constexpr bool kWaits = true;
  const half* x;

  __device__ __forceinline__ void before() {}
  template <class Z, class Arriving>
  __device__ __forceinline__ void stage(HeldX<Z>& held, int, Arriving arriving) const {
#pragma unroll
    for (int j = 0; j < Z::kPer; ++j) {
      const int piece = Z::kRows > 1 ? threadIdx.x % Z::kLanes : threadIdx.x + j * Z::kThreads;
      held.pieces[j] = make_uint4(0, 0, 0, 0);
      if (piece < Z::kRowPieces) held.pieces[j] = at(piece);
    }
    arriving();
  }
  template <class Z, class Arriving>
  __device__ __forceinline__ void stage(Staged<Z>& staged, int, Arriving arriving) const {
    constexpr int kCount = (Z::kPieces + Z::kThreads - 1) / Z::kThreads;
    uint4 pieces[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int piece = threadIdx.x + j * Z::kThreads;
      if (piece < Z::kPieces) pieces[j] = at(piece);
    }
    arriving();
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int piece = threadIdx.x + j * Z::kThreads;
      if (piece < Z::kPieces) staged.put(piece, pieces[j]);
    }
  }

 private:
  __device__ __forceinline__ uint4 at(int piece) const {
    return __ldcg(reinterpret_cast<const uint4*>(x) + piece);
  }
};

// Of a piece of a row, the elements of x that it is multiplied with.
template <class Z, bool kQ4 = Z::kQ4>
struct PieceOfX {
  float x[8];

  __device__ __forceinline__ void read(const HeldX<Z>& held, int j, int) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 f = __half22float2(reinterpret_cast<const half2*>(&held.pieces[j])[e]);
      x[2 * e] = f.x, x[2 * e + 1] = f.y;
    }
  }
  __device__ __forceinline__ void multiply(float (&sums)[2], uint4 w, const char*) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 f = __half22float2(reinterpret_cast<const half2*>(&w)[e]);
      sums[0] = fmaf(f.x, x[2 * e], sums[0]), sums[1] = fmaf(f.y, x[2 * e + 1], sums[1]);
    }
  }
};

// The same as integers, of which codes are multiplied as they are: sums are exact.
template <class Z>
struct PieceOfX<Z, true> {
  uint4 bytes[4];  // of eight elements each: the upper ones of those with even numbers and of the
  float factor, offset;  // others, and the lower ones

  __device__ __forceinline__ void read(const Staged<Z>& staged, int, int piece) {
#pragma unroll
    for (int q = 0; q < 4; ++q)
      bytes[q] = reinterpret_cast<const uint4*>(staged.pieces)[piece * 4 + q];
    factor = staged.factors()[piece], offset = staged.offsets()[piece];
  }
  __device__ __forceinline__ void multiply(float (&sums)[2], uint4 w, const char* scale) const {
    const unsigned words[4] = {w.x, w.y, w.z, w.w};
    int upper[2] = {}, lower[2] = {};  // of the codes as they are and of those times 16
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const unsigned even = words[q] & 0x0f0f0f0f, odd = words[q] & 0xf0f0f0f0;
      upper[0] = dot(even, bytes[q].x, upper[0]), upper[1] = dot(odd, bytes[q].y, upper[1]);
      lower[0] = dot(even, bytes[q].z, lower[0]), lower[1] = dot(odd, bytes[q].w, lower[1]);
    }
    const int total = (upper[0] * 16 + upper[1]) * 256 + lower[0] * 16 + lower[1];
    sums[0] += fmaf((float)total, factor, offset) *
               __half2float(*reinterpret_cast<const half*>(scale));
  }
};

// What the last warp does: its first lane copies the block's rows, all of a place of the ring with one
// copy, or two of a gated product, and their scales.
template <class Z>
__device__ __forceinline__ void copy_rows(const char* weight, const char* scale, int first,
                                          int count, char* shared, uint64_t* full, uint64_t* empty,
                                          uint64_t* looked) {
  const bool copies = threadIdx.x % 32 == 0;
  const int slots = (count + Z::kTake - 1) / Z::kTake;
  auto issue = [&](int i) {
    uint64_t* const barrier = full + i % Z::kDepth;
    const int rows = min(Z::kTake, count - i * Z::kTake), bytes = rows * Z::kRowBytes;
    char* const to = shared + i % Z::kDepth * Z::kSlot;
    shardwright::copies_expect(true, barrier,
                               (bytes + rows * Z::kScaleRow) * (Z::kGated ? 2 : 1));
#pragma unroll
    for (int half = 0; half < (Z::kGated ? 2 : 1); ++half) {
      const long long row = first + i * Z::kTake + half * (long long)Z::kOutputs;
      shardwright::copy_each(true, to + half * Z::kTake * Z::kRowBytes, weight + row * Z::kRowBytes,
                             bytes, barrier);
      if (Z::kQ4)
        shardwright::copy_each(true, to + Z::kScales + half * Z::kTake * Z::kScaleRow,
                               scale + row * Z::kScaleRow, rows * Z::kScaleRow, barrier);
    }
  };
  int i = 0;
  if (copies) {
    start_ring<Z>(full, empty, looked);
    // The rest comes behind the first look at x, which would else wait for it.
    for (; i < min(slots, Z::kAhead); ++i) issue(i);
  }
  shardwright::meet(2, Z::kThreads + 32);
  if (!copies) return;
  shardwright::phase_wait(looked, 0);
  for (; i < slots; ++i) {
    if (i >= Z::kDepth) shardwright::phase_wait(empty + i % Z::kDepth, (i / Z::kDepth - 1) % 2);
    const int last = i - Z::kWindow;  // With more under way, x itself would wait behind them.
    if (Z::kWindow < Z::kDepth && last >= 0)
      shardwright::phase_wait(full + last % Z::kDepth, last / Z::kDepth % 2);
    issue(i);
  }
  // Sooner its copies would only delay these. What it reads of kernels in front of this one is there,
  // as this one has looked at x.
  shardwright::launch_dependents();
}

// Of eight sums of each lane those of all lanes: a lane gets that of number lane / 4.
__device__ __forceinline__ float joined(const float (&sums)[8]) {
  const int lane = threadIdx.x % 32;
  float four[4], two[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool upper = lane & 16;
    four[i] = (upper ? sums[i + 4] : sums[i]) +
              __shfl_xor_sync(~0u, upper ? sums[i] : sums[i + 4], 16);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool upper = lane & 8;
    two[i] = (upper ? four[i + 2] : four[i]) +
             __shfl_xor_sync(~0u, upper ? four[i] : four[i + 2], 8);
  }
  const bool upper = lane & 4;
  float one = (upper ? two[1] : two[0]) + __shfl_xor_sync(~0u, upper ? two[0] : two[1], 4);
  one += __shfl_xor_sync(~0u, one, 2);
  return one + __shfl_xor_sync(~0u, one, 1);
}

// `shared` is 16-byte aligned; every thread calls it.
template <class Z, class Input, class Output>
__device__ __forceinline__ void product_of_rows(Input input, const void* weight, const half* scale,
                                                Output output_to, char* shared) {
  using Out = typename Output::Type;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int first = (int)((long long)Z::kOutputs * blockIdx.x / Z::kParts);  // output of this block
  const int count = (int)((long long)Z::kOutputs * (blockIdx.x + 1) / Z::kParts) - first;
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared + Z::kBarriers);
  uint64_t *const empty = full + Z::kDepth, *const looked = empty + Z::kDepth;
  if (warp == Z::kWarps) {
    copy_rows<Z>(static_cast<const char*>(weight), reinterpret_cast<const char*>(scale), first, count,
                 shared, full, empty, looked);
    return;
  }
  input.before(), output_to.template before<Z>();
  shardwright::meet(2, Z::kThreads + 32);  // the barriers have started
  if (Input::kWaits) shardwright::wait_for_inputs();
  const auto arriving = [&] {
    __syncwarp();
    if (lane == 0) shardwright::phase_arrive(looked);
  };
  PieceOfX<Z> x[Z::kPer];
  const int piece = Z::kRows > 1 ? tid % Z::kLanes : tid, row = Z::kRows > 1 ? tid / Z::kLanes : 0;
  if constexpr (Z::kQ4) {
    Staged<Z> staged{shared + Z::kX};
    input.stage(staged, 0, arriving);
    Z::meet();
#pragma unroll
    for (int j = 0; j < Z::kPer; ++j) {
      const int at = piece + j * Z::kThreads;
      x[j].read(staged, j, min(at, Z::kRowPieces - 1));
      // Threads behind a row's end read its last piece, times 0: without a branch, which would
      // keep the loads of several rows apart.
      if (at >= Z::kRowPieces) x[j].factor = x[j].offset = 0.f;
    }
  } else {
    HeldX<Z> held;
    held.squares = reinterpret_cast<float*>(shared + Z::kSquares);
    input.stage(held, 0, arriving);
#pragma unroll
    for (int j = 0; j < Z::kPer; ++j) x[j].read(held, j, 0);
  }
  // Of a row, all that a warp has of it.
  float* const partial = reinterpret_cast<float*>(shared + Z::kPartial);
  const int slots = (count + Z::kTake - 1) / Z::kTake;
  int slot = 0, parity = 0;
  for (int i = 0; i < slots; i += Z::kJoined) {
    float sums[Z::kSums] = {};
#pragma unroll
    for (int g = 0; g < Z::kJoined; ++g) {
      if (i + g >= slots) break;
      shardwright::phase_wait(full + slot, parity);
      const char* const place = shared + slot * Z::kSlot;
      const char* const weights = place + row * Z::kRowBytes;
      const char* const scales = place + Z::kScales + row * Z::kScaleRow;
#pragma unroll
      for (int u = 0; u < Z::kUnits; ++u) {
        float both[2] = {};
#pragma unroll
        for (int j = 0; j < Z::kPer; ++j) {
          constexpr int kAcross = Z::kRows > 1 ? Z::kLanes : Z::kThreads;
          const bool all = (j + 1) * kAcross <= Z::kRowPieces;
          int at = piece + j * Z::kThreads;
          if (!all && Z::kQ4) at = min(at, Z::kRowPieces - 1);
          else if (!all && at >= Z::kRowPieces) break;
          x[j].multiply(
              both,
              *reinterpret_cast<const uint4*>(weights + u * Z::kRows * Z::kRowBytes + at * 16),
              scales + u * Z::kRows * Z::kScaleRow + at * Z::kElements / Z::kGroup * 2);
        }
        sums[g * Z::kUnits + u] = both[0] + both[1];
      }
      shardwright::fence_copies();  // which come behind what was read
      __syncwarp();
      if (lane == 0) shardwright::phase_arrive(empty + slot);
      if (++slot == Z::kDepth) slot = 0, parity ^= 1;
    }
    const float sum = joined(sums);
    if (lane % 4 == 0) partial[(i * Z::kUnits + lane / 4) * Z::kWarps + warp] = sum;
  }
  Z::meet();
  constexpr int kShare = Z::kWarps / Z::kRows;  // warps of a row
  for (int output = tid; output < count; output += Z::kThreads) {
    const int unit = output / Z::kRows;
    const float* const of_row =
        partial + (unit / Z::kHalf * Z::kUnits + unit % Z::kHalf) * Z::kWarps +
        output % Z::kRows * kShare;
    float sum[2] = {};  // and of a gated product that of the value
#pragma unroll
    for (int half = 0; half < (Z::kGated ? 2 : 1); ++half)
#pragma unroll
      for (int w = 0; w < kShare; ++w) sum[half] += of_row[half * Z::kHalf * Z::kWarps + w];
    const float gate = (float)rounded<Out>(sum[0]), value = (float)rounded<Out>(sum[1]);
    output_to.template put<Z>(
        0, first + output, rounded<Out>(Z::kGated ? gate / (1.f + expf(-gate)) * value : sum[0]));
  }
}

}  // namespace shardwright_gemv
#endif
