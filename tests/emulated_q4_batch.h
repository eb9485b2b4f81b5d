// What q4_batch.cuh needs of CUDA besides emulated_gemv.h.
#pragma once
#include <atomic>

#include "emulated_gemv.h"

struct float4 { float x, y, z, w; };
inline float __expf(float x) { return std::exp(x); }

namespace shardwright_q4_batch {
// The phase, arrivals of it to come and of each.
struct Barrier { std::atomic<int> phase; std::atomic<short> left; short count; };
static_assert(sizeof(Barrier) == 8);
inline Barrier& barrier_at(unsigned at) { return *reinterpret_cast<Barrier*>(base() + at); }
inline void make_barrier(unsigned at, int count) {
  Barrier& b = barrier_at(at);
  b.phase = 0, b.left = b.count = count;
}
inline void wait(unsigned at, int parity) {
  while (barrier_at(at).phase % 2 == parity) std::this_thread::yield();
}
inline void publish() {}
inline void launch_dependents() {}
inline void arrive(unsigned at) {
  __syncwarp();
  Barrier& b = barrier_at(at);
  if (threadIdx.x % 32 == 0 && --b.left == 0) b.left = b.count, ++b.phase;
  __syncwarp();
}
inline uint4 load(const half* from) { uint4 v; memcpy(&v, from, 16); return v; }
inline unsigned load_shared(unsigned at) { unsigned v; memcpy(&v, base() + at, 4); return v; }
inline float4 cluster_load(const float* p, int rank) {
  char* other = reinterpret_cast<char*>(cluster->blocks[rank]->shared.data());
  return *reinterpret_cast<const float4*>(other + shardwright_gemv::address(p));
}
}  // namespace shardwright_q4_batch
