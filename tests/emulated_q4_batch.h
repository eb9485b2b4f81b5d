// What q4_batch.cuh needs of CUDA besides emulated_gemv.h.
#pragma once
#include "emulated_gemv.h"

inline float __expf(float x) { return std::exp(x); }

namespace shardwright {
inline uint64_t* barrier_at(unsigned at) { return reinterpret_cast<uint64_t*>(base() + at); }
inline void phase_start(unsigned at, int arrivals) { phase_start(barrier_at(at), arrivals); }
inline void phase_arrive(unsigned at) { phase_arrive(barrier_at(at)); }
inline void phase_wait(unsigned at, int parity) { phase_wait(barrier_at(at), parity); }
}  // namespace shardwright

namespace shardwright_q4_batch {
inline unsigned load_shared(unsigned at) { unsigned v; memcpy(&v, base() + at, 4); return v; }
}  // namespace shardwright_q4_batch
