// peer.cuh, peer_many.cuh, sample.cuh and decode_attention.cuh for ctypes, see cuda_on_cpu.h.
#include "cuda_on_cpu.h"
#define __CUDA_FP16_H__
#include "../compiler/kernels/decode_attention.cuh"
#include "../compiler/kernels/gated_gemm.cuh"
#include "../compiler/kernels/patience.cuh"
#include "../compiler/kernels/peer.cuh"
#include "../compiler/kernels/q4_image.cuh"
#include "../compiler/kernels/peer_many.cuh"
#include "../compiler/kernels/sample.cuh"

using namespace shardwright;

namespace {

constexpr int kRows = 3;

struct Rank {
  half *x, *residual, *weight, *sum, *normed;
  const int64_t* peers;
  int *calls, *rank;
};

template <int kRanks, int kSize, int kThreads, int kParts, bool kTwoShots, bool kFused>
void reduce(const Rank* ranks, int rows) {
  host::launch(kRanks * rows, kParts, kThreads, [&](int cluster, int part, int tid) {
    const Rank& r = ranks[cluster / rows];
    peer::all_reduce<kRanks, kRows, kSize, kThreads, kParts, kTwoShots, kFused>(
        r.x, r.residual, r.weight, r.peers, r.calls, r.rank, r.sum, r.normed, 1e-5f,
        cluster % rows, part, tid);
  });
}

template <int kRanks, int kSize, int kThreads, int kParts>
void reduce(const Rank* ranks, int rows, bool two_shots, bool fused) {
  auto f = two_shots ? fused ? reduce<kRanks, kSize, kThreads, kParts, true, true>
                             : reduce<kRanks, kSize, kThreads, kParts, true, false>
           : fused   ? reduce<kRanks, kSize, kThreads, kParts, false, true>
                     : reduce<kRanks, kSize, kThreads, kParts, false, false>;
  f(ranks, rows);
}

template <int kRanks, int kSize, bool kTwoShots, peer::Norm kNorm>
void reduce_many(const Rank* ranks, int rows) {
  host::launch(kRanks * rows, 1, 32, [&](int block, int, int tid) {
    const Rank& r = ranks[block / rows];
    peer::all_reduce_many<kRanks, kRows, kSize, 32, kTwoShots, kNorm, 16>(
        r.x, r.residual, r.weight, r.peers, r.calls, r.rank, r.sum, r.normed, 1e-5f, rows,
        block % rows, tid);
  });
}

template <int kRanks, int kSize>
void reduce_many(const Rank* ranks, int rows, bool two_shots, bool fused) {
  // Rows of 1024 are written as an image.
  constexpr peer::Norm kNorm = kSize == 1024 ? peer::kImage : peer::kPlain;
  auto f = two_shots ? fused ? reduce_many<kRanks, kSize, true, kNorm>
                             : reduce_many<kRanks, kSize, true, peer::kNone>
           : fused   ? reduce_many<kRanks, kSize, false, kNorm>
                     : reduce_many<kRanks, kSize, false, peer::kNone>;
  f(ranks, rows);
}

template <typename Z>
void attend(const DecodeArgs& args) {
  constexpr int kCluster = Z::PAIR ? 2 : 1;
  host::launch(Z::N * Z::K * Z::P * Z::S / kCluster, kCluster, Z::THREADS,
               [&](int cluster, int rank, int tid) {
                 alignas(16) static thread_local char shared[Z::SHARED];
                 decode_attention<Z>(args, cluster * kCluster + rank, tid, shared);
               });
}

}  // namespace

extern "C" {

int all_reduce_many(int ranks, int size, bool two_shots, bool fused, const Rank* r, int rows) {
  if (ranks == 2 && size == 264) reduce_many<2, 264>(r, rows, two_shots, fused);
  else if (ranks == 3 && size == 1032) reduce_many<3, 1032>(r, rows, two_shots, fused);
  else if (ranks == 3 && size == 1024) reduce_many<3, 1024>(r, rows, two_shots, fused);
  else if (ranks == 8 && size == 264) reduce_many<8, 264>(r, rows, two_shots, fused);
  else return 1;
  return 0;
}

// Sizes as tests/test_cuda_on_cpu.py names them, heads and so on as in DECODE there.
int decode_attention_case(int number, const DecodeArgs* args) {
  // tokens, heads, kv heads, head dim, page, parts, warps, loaders, stages, ahead; pair; few, splits,
  // blocks;
  // append, joined, rotary, window, capped, sinks
  switch (number) {
    case 0: attend<DecodeSizes<1, 4, 1, 32, 16, 1, 2, 1, 4, 3, false, 2, 3, 3, true, true, 32, 0, false, false>>(*args); break;
    case 1: attend<DecodeSizes<4, 6, 2, 48, 16, 1, 2, 1, 4, 2, false, 1, 4, 5, true, false, 32, 0, false, false>>(*args); break;
    case 2: attend<DecodeSizes<4, 9, 1, 16, 32, 2, 3, 1, 3, 3, false, 1, 1, 4, false, false, 16, 0, false, true>>(*args); break;
    case 3: attend<DecodeSizes<4, 16, 1, 64, 16, 1, 2, 1, 2, 2, false, 2, 2, 3, true, true, 64, 20, true, true>>(*args); break;
    case 4: attend<DecodeSizes<1, 12, 1, 144, 16, 1, 1, 1, 2, 2, false, 1, 2, 2, true, true, 144, 0, false, false>>(*args); break;
    case 5: attend<DecodeSizes<4, 6, 2, 48, 16, 1, 2, 1, 4, 4, false, 2, 3, 12, true, false, 32, 0, false, true>>(*args); break;
    case 6: attend<DecodeSizes<1, 9, 1, 128, 64, 1, 2, 1, 2, 2, false, 1, 12, 12, false, false, 128, 0, false, false>>(*args); break;
    case 7: attend<DecodeSizes<2, 2, 1, 256, 16, 1, 2, 1, 2, 2, false, 1, 2, 2, true, true, 256, 0, false, false>>(*args); break;
    case 8: attend<DecodeSizes<1, 12, 1, 48, 16, 1, 8, 4, 16, 8, false, 2, 8, 8, true, true, 48, 0, false, true>>(*args); break;
    case 9: attend<DecodeSizes<1, 4, 1, 16, 64, 1, 8, 4, 16, 8, false, 4, 1, 1, true, true, 16, 0, false, false>>(*args); break;
    case 10: attend<DecodeSizes<1, 9, 1, 64, 16, 2, 2, 1, 4, 2, true, 2, 3, 6, true, true, 64, 0, false, false>>(*args); break;
    case 11: attend<DecodeSizes<1, 24, 2, 32, 64, 2, 12, 4, 24, 12, true, 24, 4, 16, false, false, 32, 0, false, true>>(*args); break;
    default: return 1;
  }
  return 0;
}

int all_reduce(int ranks, int size, int parts, bool two_shots, bool fused, const Rank* r, int rows) {
  if (ranks == 2 && size == 264 && parts == 1) reduce<2, 264, 32, 1>(r, rows, two_shots, fused);
  else if (ranks == 3 && size == 1032 && parts == 4) reduce<3, 1032, 32, 4>(r, rows, two_shots, fused);
  else if (ranks == 8 && size == 264 && parts == 2) reduce<8, 264, 32, 2>(r, rows, two_shots, fused);
  else return 1;
  return 0;
}

void silu_mul_image(const half* y, half* image, int n, int inner) {
  const int parts = inner / 32;
  host::launch((n * parts + 31) / 32, 1, 32, [&](int block, int, int tid) {
    const int at = block * 32 + tid;
    shardwright_q4::silu_mul_image(y, image, n, inner, at / parts, at % parts);
  });
}

// Of x [n, 256], as a warp holds 8 tokens of it behind mma.
void pairs_image(const half* x, half* image, int n) {
  host::launch((n + 7) / 8, 1, 32, [&](int block, int, int tid) {
    const int token = block * 8 + tid / 4;
    for (int piece = 0; piece < 2; ++piece) {
      auto pair = [&](int i) {
        unsigned both = 0;
        if (token < n) memcpy(&both, x + token * 256 + piece * 128 + 8 * i + 2 * (tid % 4), 4);
        return both;
      };
      shardwright_q4::put_pairs(image, pair, tid, token, piece, n, 256);
    }
  });
}

// From y [n, 2 * inner] by way of blocks of results, as q4_gemm.cuh makes them.
void gated_image(const half* y, half* image, int n, int inner) {
  constexpr int kTokens = 64, kPitch = 272;
  const int bands = inner / 64, tiles = (n + kTokens - 1) / kTokens;
  host::launch(tiles * bands, 1, 256, [&](int block, int, int tid) {
    static thread_local unsigned char tile[kTokens * kPitch];
    const int first = block % tiles * kTokens, band = block / tiles;
    for (int at = tid; at < kTokens * 128; at += 256) {
      const int token = at / 128, corner = at % 128 / 16 * 16, of = corner + at % 16;
      const int row = shardwright_q4::gated_row(band, corner, inner) + at % 16;
      reinterpret_cast<half*>(tile + token * kPitch)[of] =
          first + token < n ? y[(first + token) * 2 * inner + row] : half{0x7E00};
    }
    __syncthreads();
    shardwright_q4::put_gated<kTokens, kPitch>(tile, image, n, inner, band, first, tid);
  });
}

// How often each tile of 128 tokens and 128 features is multiplied; returns how many share a band.
int gated_gemm_tiles(int n, int features, int blocks, int* counts) {
  int sharing = 0;
  for (int block = 0; block < blocks; ++block) {
    const gated_gemm::Share share(n, features, block, blocks);
    for (int tile = share.first; tile < share.total; tile += share.step)
      if (share.token(tile) < n)
        ++counts[share.token(tile) / 128 * (features / 128) + share.band(tile)];
    sharing = share.sharing;
  }
  return sharing;
}

void add_rms_norm_image(const half* x, const half* y, const half* weight, half* sum, half* image,
                        int n) {
  host::launch(n, 1, 64, [&](int token, int, int tid) {
    shardwright_q4::add_rms_norm_image<2048>(x, y, weight, sum, image, 1e-5f, n, token, tid);
  });
}

// 3 ranks, 22 logits each, a vocabulary of 64.
void gather(const float* const* local, const int* last, const int64_t* peers, const int* calls,
            const int* const* rank, float* const* logits, int rows) {
  host::launch(3 * rows, 1, 32, [&](int block, int, int tid) {
    const int r = block / rows;
    peer::gather_logits<3, 22, 64, 16>(local[r], last, peers, calls, rank[r], logits[r],
                                       block % rows, tid * 2);
  });
}

void sample(const float* logits, float* scores, int* tokens, int* positions, int* history,
            const float* sampling_f, const int* sampling_i, const int* eos, int rows) {
  host::launch(rows, sampler::kParts, sampler::kThreads, [&](int row, int part, int tid) {
    sampler::sample<9001, 24>(logits, scores, tokens, positions, history, sampling_f, sampling_i,
                              eos, row, part, tid);
  });
}
}
