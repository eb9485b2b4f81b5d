// Runs device functions of compiler/kernels/*.cuh on a CPU, to test what they compute: a block is a
// system thread, its CUDA threads are fibers of it that switch where they wait. So shared memory is
// thread-local, and another block's is as far from its anchor as this one's. Stands in for ptx.cuh.
// Asynchronous copies are done where they are issued.
#define SHARDWRIGHT_PTX

#include <sched.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __shared__ static thread_local
using std::max;
using std::min;

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// Half precision in its bits; rounding to nearest even of what is no NaN.
struct half {
  uint16_t bits;
};
struct half2 {
  half x, y;
};
inline float to_float(half h) {
  const unsigned sign = (h.bits & 0x8000u) << 16, rest = h.bits & 0x7FFFu;
  if (rest < 0x0400) return std::copysign(std::ldexp((float)rest, -24), __uint_as_float(sign | 1));
  return __uint_as_float(sign | (rest >= 0x7C00 ? 0x7F800000u : (rest << 13) + 0x38000000u));
}
inline half to_half(float x) {
  const uint16_t sign = __float_as_uint(x) >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (size >= 65520.f) return {(uint16_t)(sign | 0x7C00)};
  if (size < 6.103515625e-5f) return {(uint16_t)(sign | (int)std::nearbyint(size * 16777216.f))};
  const unsigned bits = __float_as_uint(size);
  const unsigned rounded = bits + 0x0FFF + (bits >> 13 & 1) - 0x38000000u;
  return {(uint16_t)(sign | rounded >> 13)};
}
inline float2 __half22float2(half2 h) { return {to_float(h.x), to_float(h.y)}; }
inline half2 __floats2half2_rn(float x, float y) { return {to_half(x), to_half(y)}; }
inline half2 __hadd2(half2 a, half2 b) {
  return {to_half(to_float(a.x) + to_float(b.x)), to_half(to_float(a.y) + to_float(b.y))};
}
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __half2float(half x) { return to_float(x); }
inline half __float2half(float x) { return to_half(x); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline unsigned atomicAdd(unsigned* at, unsigned more) { return (*at += more) - more; }

namespace host {

struct Barrier {
  int size, count = 0, turn = 0;
};

struct Cluster {
  std::vector<char*> anchors;
  std::atomic<int> started{0};
  std::atomic<long> arrived{0};
};

struct Block {
  Cluster* cluster;
  int threads, current = 0;
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<uint64_t> lanes;
  std::vector<long> meetings;
  // A fiber is entered by its context and switched by jumps, which need no system call.
  struct Fiber {
    ucontext_t context;
    jmp_buf place;
    bool started = false, ended = false;
  };
  std::vector<Fiber> fibers;
  jmp_buf home;
  std::function<void(int)> body;
};

static thread_local char anchor;
static thread_local Block* block;

inline void yield() {
  if (!_setjmp(block->fibers[block->current].place)) _longjmp(block->home, 1);
}

__attribute__((noinline)) inline void resume(Block& b) {
  Block::Fiber& fiber = b.fibers[b.current];
  if (_setjmp(b.home)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

inline void wait(Barrier& barrier) {
  const int turn = barrier.turn;
  if (++barrier.count == barrier.size) {
    barrier.count = 0;
    ++barrier.turn;
  }
  while (barrier.turn == turn) yield();
}

inline void enter() {
  block->body(block->current);
  block->fibers[block->current].ended = true;
  _longjmp(block->home, 1);
}

template <typename T>
T exchange(T value, int from, bool has) {
  Block& b = *block;
  const int tid = b.current;
  memcpy(&b.lanes[tid], &value, sizeof(T));
  wait(b.warps[tid / 32]);
  T other = value;
  if (has) memcpy(&other, &b.lanes[tid / 32 * 32 + from], sizeof(T));
  wait(b.warps[tid / 32]);
  return other;
}

// Runs `body(cluster, block in its cluster, thread)` for clusters of `blocks` blocks of `threads`.
inline void launch(int clusters, int blocks, int threads,
                   const std::function<void(int, int, int)>& body) {
  constexpr size_t kStack = 64 << 10;
  std::vector<std::unique_ptr<Cluster>> shared;
  std::vector<std::thread> running;
  for (int c = 0; c < clusters; ++c) {
    shared.push_back(std::make_unique<Cluster>());
    shared[c]->anchors.resize(blocks);
    for (int p = 0; p < blocks; ++p)
      running.emplace_back([&, c, p, cluster = shared[c].get()] {
        Block b{cluster, threads};
        b.all.size = threads;
        b.warps.assign(threads / 32, Barrier{32});
        b.lanes.resize(threads);
        b.meetings.resize(threads);
        b.fibers.resize(threads);
        b.body = [&](int tid) { body(c, p, tid); };
        block = &b;
        cluster->anchors[p] = &anchor;
        for (++cluster->started; cluster->started < blocks;) sched_yield();
        std::unique_ptr<char[]> stacks(new char[threads * kStack]);
        for (int i = 0; i < threads; ++i) {
          ucontext_t& context = b.fibers[i].context;
          getcontext(&context);
          context.uc_stack.ss_sp = stacks.get() + i * kStack;
          context.uc_stack.ss_size = kStack;
          makecontext(&context, enter, 0);
        }
        for (bool more = true; more; sched_yield()) {
          more = false;
          for (int i = 0; i < threads; ++i) {
            if (b.fibers[i].ended) continue;
            b.current = i;
            resume(b);
            more = more || !b.fibers[i].ended;
          }
        }
      });
  }
  for (std::thread& thread : running) thread.join();
}

}  // namespace host

inline void __syncthreads() { host::wait(host::block->all); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return host::exchange(value, host::block->current % 32 ^ mask, true);
}
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return host::exchange(value, from, true);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int from = host::block->current % 32 - delta;
  return host::exchange(value, from, from >= 0);
}
inline void __syncwarp() { host::wait(host::block->warps[host::block->current / 32]); }
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
// For a selector that takes the upper or the lower halves of both.
inline unsigned __byte_perm(unsigned a, unsigned b, int selector) {
  return selector == 0x5410 ? (a & 0xFFFF) | b << 16 : a >> 16 | (b & 0xFFFF0000u);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const int from = host::block->current % 32 + delta;
  return host::exchange(value, from, from < 32);
}

namespace shardwright {

inline void wait_for_inputs() {}

inline float exp2_fast(float x) { return std::exp2(x); }

// What the lanes of a warp hold, seen by all: between two calls `of(lane)` is what it gave.
template <typename T, typename F>
void with_lanes(const T& mine, F use) {
  static thread_local T of[32][32];
  host::Block& b = *host::block;
  T* const lanes = of[b.current / 32];
  lanes[b.current % 32] = mine;
  __syncwarp();
  use(lanes);
  __syncwarp();
}
inline float half_of(unsigned word, int i) { return to_float({(uint16_t)(word >> 16 * i)}); }
inline void mma_16n8k16(float* d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                        unsigned b1) {
  struct Fragments {
    unsigned a[4], b[2];
  };
  const int lane = host::block->current % 32;
  with_lanes(Fragments{{a0, a1, a2, a3}, {b0, b1}}, [&](const Fragments* of) {
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4, column = lane % 4 * 2 + e % 2;
      for (int k = 0; k < 16; ++k)
        d[e] += half_of(of[row * 4 + k % 8 / 2].a[e / 2 + k / 8 * 2], k % 2) *
                half_of(of[column * 4 + k % 8 / 2].b[k / 8], k % 2);
    }
  });
}
inline unsigned transposed_8x8(unsigned x) {
  const int lane = host::block->current % 32, row = lane / 4, column = lane % 4 * 2;
  unsigned y = 0;
  with_lanes(x, [&](const unsigned* of) {
    for (int i = 0; i < 2; ++i)
      y |= (of[(column + i) * 4 + row / 2] >> 16 * (row % 2) & 0xFFFF) << 16 * i;
  });
  return y;
}

// Another block of a cluster may count for a barrier too, so one lock guards all of them.
struct Phase {
  signed char arrivals, left;
  short parity;
  int bytes;  // that are expected and have not come, or the other way about
};
constexpr int kCopiers = 1;
inline std::mutex phases;
inline void phase_change(uint64_t* barrier, int arrivals, int bytes) {
  const std::lock_guard<std::mutex> guard(phases);
  Phase& phase = *(Phase*)barrier;
  phase.left -= arrivals;
  phase.bytes += bytes;
  if (phase.left == 0 && phase.bytes == 0) phase.left = phase.arrivals, phase.parity ^= 1;
}
inline void phase_start(uint64_t* barrier, int arrivals) {
  *(Phase*)barrier = {(signed char)arrivals, (signed char)arrivals, 0, 0};
}
inline void phases_started() {}
inline void phase_arrive(uint64_t* barrier) { phase_change(barrier, 1, 0); }
inline bool phase_done(uint64_t* barrier, int parity) {
  const std::lock_guard<std::mutex> guard(phases);
  return ((Phase*)barrier)->parity != parity;
}
inline void phase_wait(uint64_t* barrier, int parity) {
  while (!phase_done(barrier, parity)) host::yield();
}
inline void fence_copies() {}
inline void copies_expect(bool mine, uint64_t* barrier, int bytes) {
  if (mine) phase_change(barrier, 1, bytes);
}
inline void copy_each(bool mine, void* to, const void* from, int bytes, uint64_t* barrier) {
  if (!mine) return;
  memcpy(to, from, bytes);
  phase_change(barrier, 0, -bytes);
}
inline void copies_issued(bool, uint64_t*) {}
inline void meet(int barrier, int threads) {
  static thread_local host::Barrier barriers[16];
  barriers[barrier].size = threads;
  host::wait(barriers[barrier]);
}
template <int kWords>
void load_words(unsigned* to, const void* from) {
  memcpy(to, from, 4 * kWords);
}
inline unsigned count_up(unsigned* counter, unsigned last) {
  unsigned before = __atomic_load_n(counter, __ATOMIC_ACQUIRE);
  while (!__atomic_compare_exchange_n(counter, &before, before >= last ? 0 : before + 1, false,
                                      __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
  }
  return before;
}

inline void cluster_arrive() { ++host::block->cluster->arrived; }
inline void cluster_wait() {
  host::Block& b = *host::block;
  const long wanted = ++b.meetings[b.current] * b.threads * (long)b.cluster->anchors.size();
  while (b.cluster->arrived < wanted) host::yield();
}
inline void cluster_meet() {
  cluster_arrive();
  cluster_wait();
}
inline char* in_block(const void* here, int part) {
  return (char*)here + (host::block->cluster->anchors[part] - &host::anchor);
}
inline void fence_copies_to_both() {}
inline void copy_to_both(bool mine, void* to, const void* from, int bytes, uint64_t* barrier) {
  for (int part = 0; part < 2; ++part)
    copy_each(mine, in_block(to, part), from, bytes, (uint64_t*)in_block(barrier, part));
}
inline void phase_arrive_in_block(uint64_t* barrier, int part) {
  phase_arrive((uint64_t*)in_block(barrier, part));
}
inline void store_in_block(char* there, unsigned long long value) { memcpy(there, &value, 8); }
inline unsigned long long load_from_block(const char* there) {
  unsigned long long value;
  memcpy(&value, there, 8);
  return value;
}
inline void send(unsigned* to, uint2 data, unsigned flag) {
  __atomic_store_n(to, data.x, __ATOMIC_RELAXED);
  __atomic_store_n(to + 2, data.y, __ATOMIC_RELAXED);
  __atomic_store_n(to + 1, flag, __ATOMIC_RELEASE);
  __atomic_store_n(to + 3, flag, __ATOMIC_RELEASE);
}
inline bool receive(const unsigned* from, unsigned flag, uint2& data) {
  const bool both = __atomic_load_n(from + 1, __ATOMIC_ACQUIRE) == flag &&
                    __atomic_load_n(from + 3, __ATOMIC_ACQUIRE) == flag;
  data = {__atomic_load_n(from, __ATOMIC_RELAXED), __atomic_load_n(from + 2, __ATOMIC_RELAXED)};
  if (!both) host::yield();
  return both;
}

inline void publish(unsigned* flag, unsigned value) {
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);
}
inline bool published(const unsigned* flag, unsigned value) {
  const bool found = __atomic_load_n(flag, __ATOMIC_ACQUIRE) == value;
  if (!found) host::yield();
  return found;
}
inline uint4 load_l2(const uint4* from) { return *from; }

}  // namespace shardwright
