// peer.cuh, peer_many.cuh and sample.cuh for ctypes, see cuda_on_cpu.h.
#include "cuda_on_cpu.h"
#define __CUDA_FP16_H__
#include "../compiler/kernels/peer.cuh"
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

template <int kRanks, int kSize, bool kTwoShots, bool kFused>
void reduce_many(const Rank* ranks, int rows) {
  host::launch(kRanks * rows, 1, 32, [&](int block, int, int tid) {
    const Rank& r = ranks[block / rows];
    peer::all_reduce_many<kRanks, kRows, kSize, 32, kTwoShots, kFused, 16>(
        r.x, r.residual, r.weight, r.peers, r.calls, r.rank, r.sum, r.normed, 1e-5f, block % rows,
        tid);
  });
}

template <int kRanks, int kSize>
void reduce_many(const Rank* ranks, int rows, bool two_shots, bool fused) {
  auto f = two_shots ? fused ? reduce_many<kRanks, kSize, true, true>
                             : reduce_many<kRanks, kSize, true, false>
           : fused   ? reduce_many<kRanks, kSize, false, true>
                     : reduce_many<kRanks, kSize, false, false>;
  f(ranks, rows);
}

}  // namespace

extern "C" {

int all_reduce_many(int ranks, int size, bool two_shots, bool fused, const Rank* r, int rows) {
  if (ranks == 2 && size == 264) reduce_many<2, 264>(r, rows, two_shots, fused);
  else if (ranks == 3 && size == 1032) reduce_many<3, 1032>(r, rows, two_shots, fused);
  else if (ranks == 8 && size == 264) reduce_many<8, 264>(r, rows, two_shots, fused);
  else return 1;
  return 0;
}

int all_reduce(int ranks, int size, int parts, bool two_shots, bool fused, const Rank* r, int rows) {
  if (ranks == 2 && size == 264 && parts == 1) reduce<2, 264, 32, 1>(r, rows, two_shots, fused);
  else if (ranks == 3 && size == 1032 && parts == 4) reduce<3, 1032, 32, 4>(r, rows, two_shots, fused);
  else if (ranks == 8 && size == 264 && parts == 2) reduce<8, 264, 32, 2>(r, rows, two_shots, fused);
  else return 1;
  return 0;
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
