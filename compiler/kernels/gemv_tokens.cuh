// Products of several tokens with a plain weight, whose rows a block streams through a ring in
// shared memory; gemv_tokens.py explains and calls them. Included once in a module, after
// gemv_mma.cuh and gemv_norm.cuh.
#ifndef SHARDWRIGHT_GEMV_TOKENS
#define SHARDWRIGHT_GEMV_TOKENS

namespace shardwright_gemv {

// Sizes, as `Plan` of gemv_tokens.py has them. kWarps multiply and one more copies. kParts blocks,
// or clusters of them, divide the outputs.
template <int kBatch_, int kOutputs_, int kInner_, bool kGated_, int kWarps_, int kDepth_,
          int kAhead_, int kPieces_, int kPhases_, int kCluster_, int kParts_, bool kStay_>
struct TokenSizes {
  static constexpr int kBatch = kBatch_, kOutputs = kOutputs_, kInner = kInner_, kWarps = kWarps_;
  static constexpr int kDepth = kDepth_, kAhead = kAhead_, kPieces = kPieces_;
  static constexpr int kCluster = kCluster_, kParts = kParts_, kPhases = kPhases_;
  static constexpr bool kStay = kStay_;
  static constexpr bool kGated = kGated_;
  static constexpr int kThreads = kWarps * 32, kBlocks = kParts * kCluster;
  static constexpr int kEights = (kBatch + 7) / 8;  // of tokens
  static constexpr int kTake = kGated ? 4 : 8;      // outputs of a place of the ring, of 8 rows
  static constexpr int kUnit = kGated ? 1 : 2, kWide = kUnit;  // outputs of a lane
  static constexpr int kMost = (kOutputs / kUnit + kParts - 1) / kParts * kUnit;
  static constexpr int kTiles = (kMost + kTake - 1) / kTake;
  // Groups of 32 columns: of a place of the ring, and of these those of a warp.
  static constexpr int kGroups = kInner / 32 / kCluster / kPieces / kPhases;
  static constexpr int kPer = (kGroups + kWarps - 1) / kWarps;
  static_assert(kGroups * 32 * kCluster * kPieces * kPhases == kInner, "pieces are even");
  // A row's piece in the ring. Two rows that are read together meet no bank twice.
  static constexpr int kBytes = kGroups * 64, kPitch = kBytes + (kBytes % 128 == 0 ? 64 : 0);
  static constexpr int kSlot = 8 * kPitch;
  // Places of the ring that x takes in a phase, if it comes through the ring.
  static constexpr int kOfX = kStay ? kPieces * kEights : 0;
  static_assert(kAhead + kOfX <= kDepth, "x does not wait for the weight");
  static_assert(kPhases == 1 || kStay, "the sums of all phases stay");
  // In shared memory, behind the ring: the warps' sums of two tiles in turn, a block's of all tiles
  // in clusters, and what outputs need.
  static constexpr int kSums = kEights * 256;
  static constexpr int kPartial = kDepth * kSlot;
  static constexpr int kTotals = kPartial + (kStay ? 0 : 2 * kWarps * kSums);
  static_assert(!kStay || kTiles * kWarps * kSums <= kPartial, "room for all sums");
  static constexpr int kScales = kTotals + (kCluster > 1 ? kTiles * kSums : 0);
  static constexpr int kBarriers = kScales + (kWarps + 1) * kEights * 32;
  static constexpr int kShared = kBarriers + (2 * kDepth + 1) * 8;

  static __device__ __forceinline__ void meet() { shardwright::meet(1, kThreads); }
};

// What a lane adds up of a tile: for tokens lane / 4 and 8 more, rows lane % 4 * 2 and the next.
template <class Z>
struct LaneSums {
  alignas(16) float v[Z::kEights * 2];

  __device__ __forceinline__ void read(const float* from) {
    shardwright_gemv::read(v, from);
  }
  __device__ __forceinline__ void write(float* to) const {
    if constexpr (Z::kEights == 2)
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(v);
    else
      *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(v);
  }
  __device__ __forceinline__ void add(const LaneSums& other) {
#pragma unroll
    for (int i = 0; i < Z::kEights * 2; ++i) v[i] += other.v[i];
  }
};

// Outputs of which a lane has `kUnit` of a token at a time, and of kEights tokens in turn.
template <class Z, class Out>
struct PlainTokens {
  using Type = Out;
  static constexpr bool kSends = false;  // what is put comes back as a sum over ranks
  Out* out;

  __device__ __forceinline__ void look() {}
  __device__ __forceinline__ void start(float*) const {}
  static __device__ __forceinline__ float scale(const float*, int) { return 1.f; }
  __device__ __forceinline__ void fetch(int, int, int) {}
  __device__ __forceinline__ void put(int, int token, int output,
                                      const Out (&values)[Z::kUnit]) const {
    Out* const to = out + (long long)token * Z::kOutputs + output;
    if constexpr (Z::kUnit == 1)
      *to = values[0];
    else if constexpr (sizeof(Out) == 4)
      *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(values);
    else
      *reinterpret_cast<unsigned*>(to) = *reinterpret_cast<const unsigned*>(values);
  }
  __device__ __forceinline__ void end(float*) const {}
};

// The same as `AddedOutput`.
template <class Z>
struct AddedTokens {
  using Type = half;
  static constexpr bool kSends = false;
  const half *residual, *norm;
  half *sum, *weighted;
  float* squares;  // [tokens, kBlocks]
  half2 old[2], by;  // of the next values
  float mine[2];     // sums of squares

  __device__ __forceinline__ void look() { mine[0] = mine[1] = 0.f; }
  __device__ __forceinline__ void start(float*) const {}
  static __device__ __forceinline__ float scale(const float*, int) { return 1.f; }
  // What `put` needs for a token's values from column `output` on.
  __device__ __forceinline__ void fetch(int eight, int token, int output) {
    const half* const from = residual + (long long)token * Z::kOutputs + output;
    old[eight] = *reinterpret_cast<const half2*>(from);
    by = *reinterpret_cast<const half2*>(norm + output);
  }
  __device__ __forceinline__ void put(int eight, int token, int output, const half (&values)[2]) {
    const long long at = (long long)token * Z::kOutputs + output;
    const half* const before = reinterpret_cast<const half*>(&old[eight]);
    alignas(4) half total[2], more[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      total[j] = __float2half(__half2float(before[j]) + __half2float(values[j]));
      const float f = __half2float(total[j]);
      mine[eight] += f * f;
      const float w = f * __half2float(reinterpret_cast<const half*>(&by)[j]) * kShare;
      more[j] = __float2half(fmaxf(-65504.f, fminf(65504.f, w)));
    }
    *reinterpret_cast<unsigned*>(sum + at) = *reinterpret_cast<const unsigned*>(total);
    *reinterpret_cast<unsigned*>(weighted + at) = *reinterpret_cast<const unsigned*>(more);
  }
  // `of_warps` has a float for each token of each warp.
  __device__ __forceinline__ void end(float* of_warps) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int h = 0; h < Z::kEights; ++h) {
      float total = mine[h];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      if (lane % 4 == 0) of_warps[(warp * Z::kEights + h) * 8 + lane / 4] = total;
    }
    Z::meet();
    if (threadIdx.x >= Z::kBatch) return;
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < Z::kWarps; ++w) total += of_warps[w * Z::kEights * 8 + threadIdx.x];
    squares[threadIdx.x * Z::kBlocks + blockIdx.x] = total;
  }
};

// The same as `SummedOutput`.
template <class Z, int kRanks>
struct SummedTokens : AddedTokens<Z> {
  using Base = AddedTokens<Z>;
  static constexpr bool kSends = true;
  Summands<kRanks, Z::kBatch * Z::kOutputs / 2> summands;

  __device__ __forceinline__ void fetch(int, int, int) { summands.find(); }
  __device__ __forceinline__ void put(int, int token, int output, const half (&values)[2]) const {
    summands.send(word(token, output), values);
  }
  // The sums of a lane's tokens, from column `output` on.
  __device__ __forceinline__ void take(int output) {
    int at[Z::kEights];
    half values[Z::kEights][2];
#pragma unroll
    for (int h = 0; h < Z::kEights; ++h) {
      const int token = threadIdx.x % 32 / 4 + 8 * h;
      at[h] = token < Z::kBatch ? word(token, output) : -1;
      if (at[h] >= 0) Base::fetch(h, token, output);
    }
    summands.receive(at, values);
#pragma unroll
    for (int h = 0; h < Z::kEights; ++h)
      if (at[h] >= 0) Base::put(h, threadIdx.x % 32 / 4 + 8 * h, output, values[h]);
  }

 private:
  // Those of eight tokens are neighbours.
  static __device__ __forceinline__ int word(int token, int output) {
    return output / 2 * Z::kBatch + token;
  }
};

// The same as `NormedOutput`.
template <class Z, class Out, int kBlocks>
struct NormedTokens : NormedOutput<Z, Out, kBlocks> {
  static constexpr bool kSends = false;
  __device__ __forceinline__ void fetch(int, int, int) {}
  __device__ __forceinline__ void put(int eight, int token, int output,
                                      const Out (&values)[Z::kUnit]) const {
    PlainTokens<Z, Out>{this->plain.out}.put(eight, token, output, values);
  }
  __device__ __forceinline__ void end(float*) const {}
};

// What the last warp does: lanes 0 to 7 copy a row of each place of the ring. Where x comes through
// the ring it is behind the first kAhead places, and in front of all of later phases.
template <class Z>
__device__ __forceinline__ void copy_tiles(const char* x, const char* weight, int first, int count,
                                           char* shared, uint64_t* full, uint64_t* empty,
                                           uint64_t* looked) {
  const int lane = threadIdx.x % 32, rank = blockIdx.x % Z::kCluster;
  if (lane == 0) start_ring<Z>(full, empty, looked);
  __syncwarp();
  const int tiles = (count + Z::kTake - 1) / Z::kTake, items = tiles * Z::kPieces;
  int slot = 0, parity = 1;
  bool again = false;
  // Eight rows, or fewer; a lane's is `row`.
  auto issue = [&](int rows, const char* from, int phase, int piece) {
    if (again) shardwright::phase_wait(empty + slot, parity);
    shardwright::copies_expect(lane == 0, full + slot, rows * Z::kBytes);
    shardwright::copy_each(
        lane < rows, shared + slot * Z::kSlot + lane * Z::kPitch,
        from + ((phase * Z::kCluster + rank) * Z::kPieces + piece) * (long long)Z::kBytes,
        Z::kBytes, full + slot);
    if (++slot == Z::kDepth) slot = 0, parity ^= 1, again = true;
  };
  auto weights = [&](int phase, int begin, int end) {
    for (int i = begin; i < end; ++i) {
      const int tile = i / Z::kPieces, rows = min(Z::kTake, count - tile * Z::kTake);
      // Of a gated product a gate and its value take turns.
      const int output = tile * Z::kTake + (Z::kGated ? lane / 2 : lane);
      const long long row = first + output + (Z::kGated && lane % 2 ? Z::kOutputs : 0);
      issue(rows * (Z::kGated ? 2 : 1), weight + row * (Z::kInner * 2), phase, i % Z::kPieces);
    }
  };
  auto tokens = [&](int phase) {
    for (int i = 0; i < Z::kOfX; ++i) {
      const int eight = i % Z::kEights * 8;
      issue(min(8, Z::kBatch - eight), x + (long long)(eight + lane) * (Z::kInner * 2), phase,
            i / Z::kEights);
    }
  };
  const int ahead = min(items, Z::kAhead);
  weights(0, 0, ahead);
  shardwright::meet(2, Z::kThreads + 32);
  if constexpr (Z::kStay) {
    shardwright::wait_for_inputs();
    tokens(0);
  } else {
    shardwright::phase_wait(looked, 0);  // else x would wait for what comes now
  }
  weights(0, ahead, items);
  for (int phase = 1; phase < Z::kPhases; ++phase) tokens(phase), weights(phase, 0, items);
  shardwright::launch_dependents();
}

// `shared` is 16-byte aligned; every thread calls it.
template <class Z, class Output>
__device__ __forceinline__ void product_of_tokens(const half* x, const void* weight, const half*,
                                                  Output output_to, char* shared) {
  using Out = typename Output::Type;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int rank = blockIdx.x % Z::kCluster, part = blockIdx.x / Z::kCluster;
  constexpr int kUnits = Z::kOutputs / Z::kUnit;
  const int first = (int)((long long)kUnits * part / Z::kParts) * Z::kUnit;
  const int count = (int)((long long)kUnits * (part + 1) / Z::kParts) * Z::kUnit - first;
  const int tiles = (count + Z::kTake - 1) / Z::kTake;
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared + Z::kBarriers);
  uint64_t *const empty = full + Z::kDepth, *const looked = empty + Z::kDepth;
  if (warp == Z::kWarps) {
    copy_tiles<Z>(reinterpret_cast<const char*>(x), static_cast<const char*>(weight), first, count,
                  shared, full, empty, looked);
    return;
  }
  // Warps have their columns in turns from block to block, lest all ask for the same bytes at once.
  const int share = Z::kStay ? warp : (warp + blockIdx.x) % Z::kWarps;
  const auto has = [&](int j) {
    return Z::kPer * Z::kWarps == Z::kGroups || share * Z::kPer + j < Z::kGroups;
  };
  shardwright::meet(2, Z::kThreads + 32);  // the barriers have started
  shardwright::wait_for_inputs();
  output_to.look();
  alignas(16) unsigned held[Z::kPieces][Z::kPer][Z::kEights][4];
  int slot = 0, parity = 0;
  auto pass = [&](int places) {
    if ((slot += places) >= Z::kDepth) slot -= Z::kDepth, parity ^= 1;
  };
  auto done = [&](int place) {
    shardwright::fence_copies();  // which come behind what was read
    __syncwarp();
    if (lane == 0) shardwright::phase_arrive(empty + place);
  };
  const int mine_in_place = lane / 4 * Z::kPitch + share * Z::kPer * 64 + lane % 4 * 16;
  // The part of x that `read(token, columns from the warp's first on, to)` gives.
  auto hold = [&](auto read, auto before, auto after) {
#pragma unroll
    for (int p = 0; p < Z::kPieces; ++p)
#pragma unroll
      for (int h = 0; h < Z::kEights; ++h) {
        before();
#pragma unroll
        for (int j = 0; j < Z::kPer; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) held[p][j][h][i] = 0;
          if (lane / 4 + 8 * h < Z::kBatch && has(j)) read(held[p][j][h], p, j, h);
        }
        after();
      }
  };
  auto hold_from_ring = [&] {
    hold(
        [&](unsigned (&to)[4], int, int j, int) {
          *reinterpret_cast<uint4*>(to) =
              *reinterpret_cast<const uint4*>(shared + slot * Z::kSlot + mine_in_place + j * 64);
        },
        [&] { shardwright::phase_wait(full + slot, parity); }, [&] { done(slot), pass(1); });
  };
  const int ahead = min(tiles * Z::kPieces, Z::kAhead);
  if constexpr (!Z::kStay) {
    const half* const from = x + (rank * Z::kPieces * Z::kGroups + share * Z::kPer) * 32;
    hold(
        [&](unsigned (&to)[4], int p, int j, int h) {
          const int at = (p * Z::kGroups + j) * 32 + lane % 4 * 8;
          shardwright::load_words<4>(to, from + (lane / 4 + 8 * h) * (long long)Z::kInner + at);
        },
        [] {}, [] {});
    __syncwarp();
    if (lane == 0) shardwright::phase_arrive(looked);
  }
  float* const scales = reinterpret_cast<float*>(shared + Z::kScales);
  output_to.start(scales);
  float* const partial = reinterpret_cast<float*>(shared + Z::kPartial);
  float* const totals = reinterpret_cast<float*>(shared + Z::kTotals);
  constexpr int kSums = Z::kSums / 4, kLane = Z::kEights * 2;  // floats of a warp, and of a lane
  auto fetch = [&](int tile) {
    const int output = tile * Z::kTake + lane % 4 * Z::kUnit;
#pragma unroll
    for (int h = 0; h < Z::kEights; ++h)
      if (output < count && lane / 4 + 8 * h < Z::kBatch)
        output_to.fetch(h, lane / 4 + 8 * h, first + output);
  };
  auto finish = [&](int tile, const LaneSums<Z>& sums) {
    const int output = tile * Z::kTake + lane % 4 * Z::kUnit;
#pragma unroll
    for (int h = 0; h < Z::kEights; ++h) {
      const int token = lane / 4 + 8 * h;
      if (output >= count || token >= Z::kBatch) continue;
      const float by = output_to.scale(scales, token);
      const Out a = rounded<Out>(sums.v[2 * h] * by), b = rounded<Out>(sums.v[2 * h + 1] * by);
      alignas(8) Out results[Z::kUnit];
      if constexpr (Z::kGated) {
        const float gate = (float)a;
        results[0] = rounded<Out>(gate / (1.f + expf(-gate)) * (float)b);
      } else {
        results[0] = a, results[1] = b;
      }
      output_to.put(h, token, first + output, results);
    }
  };
  if constexpr (Z::kStay) {
    slot = ahead;
    hold_from_ring();
    slot = 0, parity = 0;
  }
  // sums += a tile of the weight times x. `left` places are in front of x in the ring, 0 if none.
  int left = ahead;
  auto consume = [&](float (&sums)[4]) {
    float more[4] = {};
#pragma unroll
    for (int p = 0; p < Z::kPieces; ++p) {
      shardwright::phase_wait(full + slot, parity);
      const char* const place = shared + slot * Z::kSlot + mine_in_place;
#pragma unroll
      for (int j = 0; j < Z::kPer; ++j) {
        if (!has(j)) break;
        const uint4 w = *reinterpret_cast<const uint4*>(place + j * 64);
        constexpr int kMore = Z::kEights - 1;
        const unsigned(&a)[4] = held[p][j][0];
        const unsigned(&b)[4] = held[p][j][kMore];
        multiply(sums, a[0], kMore ? b[0] : 0, a[1], kMore ? b[1] : 0, w.x, w.y);
        multiply(more, a[2], kMore ? b[2] : 0, a[3], kMore ? b[3] : 0, w.z, w.w);
      }
      done(slot);
      pass(1);
      if (Z::kStay && left && --left == 0) pass(Z::kOfX);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += more[i];
  };
  auto write = [&](float* of_warps, const float (&sums)[4]) {
    LaneSums<Z> joined;
#pragma unroll
    for (int i = 0; i < kLane; ++i) joined.v[i] = sums[i];
    joined.write(of_warps + share * kSums + lane * kLane);
  };
  auto join = [&](const float* of_warps, int tile) {
    LaneSums<Z> joined;
    joined.read(of_warps + lane * kLane);
#pragma unroll 3
    for (int w = 1; w < Z::kWarps; ++w) {
      LaneSums<Z> more;
      more.read(of_warps + w * kSums + lane * kLane);
      joined.add(more);
    }
    if (Z::kCluster == 1) finish(tile, joined);
    else joined.write(totals + tile * kSums + lane * kLane);
  };
  if constexpr (Z::kStay) {
    float sums[Z::kTiles][4] = {};
    for (int phase = 0; phase < Z::kPhases; ++phase) {
      if (phase) hold_from_ring();
#pragma unroll
      for (int tile = 0; tile < Z::kTiles; ++tile)
        if (tile < tiles) consume(sums[tile]);
    }
    if (warp < tiles && Z::kCluster == 1) fetch(warp);
    float* const all = reinterpret_cast<float*>(shared);  // the ring has served
    Z::meet();
#pragma unroll
    for (int tile = 0; tile < Z::kTiles; ++tile) write(all + tile * Z::kWarps * kSums, sums[tile]);
    Z::meet();
    for (int tile = warp; tile < tiles; tile += Z::kWarps) {
      if (tile != warp && Z::kCluster == 1) fetch(tile);
      join(all + tile * Z::kWarps * kSums, tile);
    }
  } else {
    for (int tile = 0; tile < tiles; ++tile) {
      const bool mine = tile % Z::kWarps == warp;
      if (mine && Z::kCluster == 1) fetch(tile);
      float sums[4] = {};
      consume(sums);
      float* const of_warps = partial + tile % 2 * Z::kWarps * kSums;
      write(of_warps, sums);
      // The warp that reads them comes to the next meeting only when it has.
      Z::meet();
      if (mine) join(of_warps, tile);
    }
  }
  if constexpr (Z::kCluster > 1) {
    // The blocks of a cluster take tiles in turn.
    constexpr int kAtOnce = kLane == 4 ? 4 : 1;  // floats, as `cluster_load` has them
    const int tile_of_warp = warp * Z::kCluster + rank;
    if (tile_of_warp < tiles) fetch(tile_of_warp);
    shardwright::cluster_meet();
    for (int tile = tile_of_warp; tile < tiles; tile += Z::kWarps * Z::kCluster) {
      if (tile != tile_of_warp) fetch(tile);
      LaneSums<Z> sums = {};
#pragma unroll
      for (int c = 0; c < Z::kCluster; ++c) {
        LaneSums<Z> of_block;
        const float* const from = totals + tile * kSums + lane * kLane;
#pragma unroll
        for (int i = 0; i < kLane; i += kAtOnce) {
          float some[kAtOnce];
          cluster_load(some, from + i, c);
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) of_block.v[i + k] = some[k];
        }
        sums.add(of_block);
      }
      finish(tile, sums);
    }
  }
  if constexpr (Output::kSends) {
    // A warp takes what it has sent, all of which is under way.
    for (int tile = warp * Z::kCluster + rank; tile < tiles; tile += Z::kWarps * Z::kCluster) {
      const int output = tile * Z::kTake + lane % 4 * Z::kUnit;
      if (output < count) output_to.take(first + output);
    }
  }
  output_to.end(scales + Z::kEights * 8);
  if constexpr (Z::kCluster > 1) shardwright::cluster_meet();
}

}  // namespace shardwright_gemv
#endif
