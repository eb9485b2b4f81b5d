// What gemv_mma.cuh and experts.cuh need of CUDA, on a CPU: a thread for each CUDA thread of a cluster, which meet
// at barriers where those of a warp, a block or a cluster do.
#pragma once
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>
#define SHARDWRIGHT_EMULATED
#define __device__
#define __forceinline__ inline
using std::max;
using std::min;

typedef unsigned uint;
typedef _Float16 half;
struct half2 { half x, y; };
struct float2 { float x, y; };
struct uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline half __ushort_as_half(unsigned short v) { half h; memcpy(&h, &v, 2); return h; }
inline half2 __half2half2(half v) { return {v, v}; }
inline half2 __hsub2(half2 a, half2 b) { return {half(a.x - b.x), half(a.y - b.y)}; }
inline half2 __hfma2(half2 a, half2 b, half2 c) {
  return {half((float)a.x * (float)b.x + (float)c.x), half((float)a.y * (float)b.y + (float)c.y)};
}
inline half2 __hmul2(half2 a, half2 b) { return {half(a.x * b.x), half(a.y * b.y)}; }
inline half2 __hadd2(half2 a, half2 b) { return {half(a.x + b.x), half(a.y + b.y)}; }
inline float2 __half22float2(half2 v) { return {(float)v.x, (float)v.y}; }
inline half2 __floats2half2_rn(float x, float y) { return {half(x), half(y)}; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
template <class T>
T __ldcg(const T* from) { return *from; }
inline float __half2float(half v) { return v; }
inline half __float2half(float v) { return v; }
inline float __fdividef(float x, float y) { return x / y; }
inline unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
inline unsigned __vmaxu2(unsigned x, unsigned y) {
  return max(x & 0xffff, y & 0xffff) | max(x >> 16, y >> 16) << 16;
}
inline int dot(unsigned codes, unsigned x, int sum) {
  for (int i = 0; i < 32; i += 8) sum += (int)(codes >> i & 255) * (signed char)(x >> i & 255);
  return sum;
}
inline unsigned __dp2a_lo(unsigned x, unsigned bytes, unsigned sum) {
  return sum + (x & 0xffff) * (bytes & 255) + (x >> 16) * (bytes >> 8 & 255);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const unsigned long long both = (unsigned long long)y << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= (both >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return out;
}

struct Index { int x; };
thread_local Index threadIdx, blockIdx, gridDim;

struct Warp {
  std::barrier<> meet{32};
  const char* rows[32];
  unsigned w[32][4], x[32][2];
};
struct Meeting { std::atomic<int> here = 0, turn = 0; };
struct Block {
  explicit Block(int threads, size_t bytes) : meet(threads), shared(bytes), warps(threads / 32) {}
  std::barrier<> meet;
  Meeting meetings[16];
  std::vector<uint4> shared;  // for its alignment, more than needed
  std::vector<Warp> warps;
};
struct Cluster { std::vector<std::unique_ptr<Block>> blocks; std::unique_ptr<std::barrier<>> meet; };
thread_local Cluster* cluster;
thread_local Block* block;
inline Warp& warp() { return block->warps[threadIdx.x / 32]; }
inline char* base() { return reinterpret_cast<char*>(block->shared.data()); }
inline void __syncthreads() { block->meet.arrive_and_wait(); }
inline void __syncwarp() { warp().meet.arrive_and_wait(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const int lane = threadIdx.x % 32;
  memcpy(warp().x[lane], &value, 4);
  __syncwarp();
  T other;
  memcpy(&other, warp().x[lane ^ mask], 4);
  __syncwarp();
  return other;
}

namespace shardwright {
inline void wait_for_inputs() {}
inline void launch_dependents() {}
inline void cluster_meet() { cluster->meet->arrive_and_wait(); }
inline void meet(int barrier, int threads) {
  Meeting& m = block->meetings[barrier];
  const int turn = m.turn;
  if (++m.here == threads) m.here = 0, ++m.turn;
  else while (m.turn == turn) std::this_thread::yield();
}
// The phase, arrivals of it to come, of each, and bytes expected that have not come.
struct Phase { std::atomic<short> phase; signed char left, arrivals; int bytes; };
static_assert(sizeof(Phase) == sizeof(uint64_t));
constexpr int kCopiers = 1;
inline std::mutex phases;
inline Phase& phase_at(uint64_t* barrier) { return *reinterpret_cast<Phase*>(barrier); }
inline void phase_start(uint64_t* barrier, int arrivals) {
  Phase& p = phase_at(barrier);
  p.phase = 0, p.left = p.arrivals = arrivals, p.bytes = 0;
}
inline void phase_change(uint64_t* barrier, int arrivals, int bytes) {
  const std::lock_guard lock(phases);
  Phase& p = phase_at(barrier);
  p.left -= arrivals, p.bytes += bytes;
  if (p.left == 0 && p.bytes == 0) p.left = p.arrivals, ++p.phase;
}
inline void phase_arrive(uint64_t* barrier) { phase_change(barrier, 1, 0); }
inline void phases_started() {}
inline void fence_copies() {}
inline void phase_wait(uint64_t* barrier, int parity) {
  while (phase_at(barrier).phase % 2 == parity) std::this_thread::yield();
}
inline void copies_expect(bool mine, uint64_t* barrier, int bytes) {
  if (mine) phase_change(barrier, 1, bytes);
}
// Copies arrive where they are issued.
inline void copy_each(bool mine, void* to, const void* from, int bytes, uint64_t* barrier) {
  if (!mine) return;
  memcpy(to, from, bytes);
  phase_change(barrier, 0, -bytes);
}
inline void copies_issued(bool, uint64_t*) {}
template <int kWords>
void load_words(unsigned* to, const void* from) { memcpy(to, from, kWords * 4); }
}  // namespace shardwright

namespace shardwright_gemv {
inline void prefetch(const void*) {}
struct Copy { char* to; const void* from; int bytes; bool valid; };
// A copy arrives when it is waited for, and no sooner.
thread_local std::vector<std::vector<Copy>> groups(1);
inline unsigned address(const void* p) { return static_cast<const char*>(p) - base(); }
template <int kBytes>
void copy(unsigned to, const void* from, bool valid) {
  groups.back().push_back({base() + to, from, kBytes, valid});
}
inline void commit_copies() { groups.emplace_back(); }
template <int kLeft>
void wait_for_copies() {
  while (groups.size() > kLeft + 1) {
    for (const Copy& c : groups.front())
      c.valid ? (void)memcpy(c.to, c.from, c.bytes) : (void)memset(c.to, 0, c.bytes);
    groups.erase(groups.begin());
  }
  __syncwarp();
}
inline uint4 load_matrices(unsigned row) {
  const int lane = threadIdx.x % 32;
  warp().rows[lane] = base() + row;
  __syncwarp();
  unsigned out[4];
  for (int i = 0; i < 4; ++i) memcpy(&out[i], warp().rows[i * 8 + lane / 4] + lane % 4 * 4, 4);
  __syncwarp();
  return {out[0], out[1], out[2], out[3]};
}
inline float half_of(unsigned pair, int i) { half h[2]; memcpy(h, &pair, 4); return h[i]; }
// Adds to the lane's four sums `term(row, column, k)` for k < `kInner`, of what the warp's lanes hold.
template <int kInner, class T, class Term>
void multiply_fragments(T (&c)[4], const unsigned (&w)[4], const unsigned (&x)[2], Term term) {
  const int lane = threadIdx.x % 32;
  memcpy(warp().w[lane], w, 16), memcpy(warp().x[lane], x, 8);
  __syncwarp();
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < kInner; ++k)
      c[i] += term(lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2, k);
  __syncwarp();
}
inline void multiply(float (&c)[4], unsigned w0, unsigned w1, unsigned w2, unsigned w3, unsigned x0,
                     unsigned x1) {
  multiply_fragments<16>(c, {w0, w1, w2, w3}, {x0, x1}, [](int row, int column, int k) {
    const unsigned pw = warp().w[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
    return half_of(pw, k % 2) * half_of(warp().x[column * 4 + k % 8 / 2][k / 8], k % 2);
  });
}
inline void multiply_bytes(int (&c)[4], unsigned w0, unsigned w1, unsigned w2, unsigned w3,
                           unsigned x0, unsigned x1) {
  multiply_fragments<32>(c, {w0, w1, w2, w3}, {x0, x1}, [](int row, int column, int k) {
    const int from = k % 16 / 4, shift = k % 4 * 8;
    const unsigned pw = warp().w[row % 8 * 4 + from][row / 8 + k / 16 * 2] >> shift & 255;
    return (int)pw * (signed char)(warp().x[column * 4 + from][k / 16] >> shift);
  });
}
template <unsigned kMask>
unsigned masked(unsigned word) { return (word & kMask) | 0x64006400; }
// Of ranks that run one after another: all has been sent before any looks.
inline void send_half(unsigned short* to, unsigned short bits) { *to = bits; }
inline void send_words(uint4* to, uint4 words) { *to = words; }
inline uint4 look_at_words(const uint4* from) { return *from; }
// Of ranks that run at the same time.
template <int kWords>
void send_words(unsigned* to, const unsigned (&v)[kWords]) {
  for (int i = 0; i < kWords; ++i) __atomic_store_n(to + i, v[i], __ATOMIC_RELEASE);
}
template <int kWords>
void look_for_words(unsigned (&v)[kWords], const unsigned* from) {
  for (int i = 0; i < kWords; ++i) v[i] = __atomic_load_n(from + i, __ATOMIC_ACQUIRE);
  if (!v[0]) std::this_thread::yield();
}
template <int kCount>
void cluster_load(float (&v)[kCount], const float* p, int rank) {
  memcpy(v, reinterpret_cast<char*>(cluster->blocks[rank]->shared.data()) + address(p), sizeof(v));
}
}  // namespace shardwright_gemv

namespace shardwright_experts {
inline float from_lane(float value, int lane) {
  memcpy(warp().x[threadIdx.x % 32], &value, 4);
  __syncwarp();
  memcpy(&value, warp().x[lane], 4);
  __syncwarp();
  return value;
}
inline float as_float(unsigned bits) { float f; memcpy(&f, &bits, 4); return f; }
inline unsigned as_bits(half2 v) { unsigned u; memcpy(&u, &v, 4); return u; }
inline half2 as_halves(unsigned v) { half2 h; memcpy(&h, &v, 4); return h; }
}  // namespace shardwright_experts

// Runs `body(shared memory)` in every thread of a grid of clusters, one cluster after another.
template <class Body>
void run_grid(int blocks, int of_cluster, int threads, size_t bytes, Body body) {
  for (int first = 0; first < blocks; first += of_cluster) {
    Cluster c;
    for (int b = 0; b < of_cluster; ++b)
      c.blocks.push_back(std::make_unique<Block>(threads, bytes / 16 + 1));
    c.meet = std::make_unique<std::barrier<>>(of_cluster * threads);
    std::vector<std::thread> all;
    for (int i = 0; i < of_cluster * threads; ++i)
      all.emplace_back([&, i] {
        cluster = &c, block = c.blocks[i / threads].get();
        threadIdx = {i % threads}, blockIdx = {first + i / threads}, gridDim = {blocks};
        body(base());
        c.meet->arrive_and_drop();  // the others of a cluster wait for no thread that has ended
      });
    for (auto& t : all) t.join();
  }
}
