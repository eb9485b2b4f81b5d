#ifndef SHARDWRIGHT_PTX
#define SHARDWRIGHT_PTX
// The PTX that kernels of several files use. Included once in a module. Tests have the same for CPUs.

namespace shardwright {

// Returns when the kernels before have ended, where this one was launched ahead of their end.
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// From here on the next kernel may start.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// A barrier of a cluster, in two halves, and as one.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_meet() {
  cluster_arrive();
  cluster_wait();
}

// The address in this block's shared memory, as instructions for it take it.
__device__ __forceinline__ unsigned address(const void* here) {
  return (unsigned)__cvta_generic_to_shared(here);
}

// That of another block of the cluster where this one has `here`.
__device__ __forceinline__ unsigned in_block(unsigned here, int block) {
  unsigned there = here;
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(block));
#endif
  return there;
}
__device__ __forceinline__ unsigned in_block(const void* here, int block) {
  return in_block(address(here), block);
}

__device__ __forceinline__ void store_in_block(unsigned there, unsigned long long value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(there), "l"(value) : "memory");
#endif
}

__device__ __forceinline__ unsigned long long load_from_block(unsigned there) {
  unsigned long long value = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(value) : "r"(there) : "memory");
#endif
  return value;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// d [16, 8] += a [16, 16] x b [16, 8], in the fragments of PTX's mma.m16n8k16.
__device__ __forceinline__ void mma_16n8k16(float* d, unsigned a0, unsigned a1, unsigned a2,
                                            unsigned a3, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same, kept in the order of the program.
__device__ __forceinline__ void mma_16n8k16(float* d, const unsigned* a, const unsigned* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of halves, 16 bytes at the address that a lane gives being a row of one.
__device__ __forceinline__ void load_matrices(unsigned* to, unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row));
}

// An 8 x 8 matrix of pairs of halves' rows, 4 lanes to a row, transposed.
__device__ __forceinline__ unsigned transposed_8x8(unsigned x) {
  unsigned y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Memory barriers in shared memory: `arrivals` and the bytes expected end a phase, of parity 0 at
// first. Known by their addresses there, or by pointers.
__device__ __forceinline__ void phase_start(unsigned barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void phase_start(uint64_t* barrier, int arrivals) {
  phase_start(address(barrier), arrivals);
}
// Makes them known to asynchronous copies.
__device__ __forceinline__ void phases_started() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void phase_arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void phase_arrive(uint64_t* barrier) { phase_arrive(address(barrier)); }
// An arrival, and bytes that `copy_bulk` is to bring before the phase ends.
__device__ __forceinline__ void phase_expect(unsigned barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#endif
}
// An arrival when the copies have come that this thread began with cp.async.
__device__ __forceinline__ void phase_arrive_copied(unsigned barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
// Whether the phase of this parity has ended; of the newest two, the other than the present one.
__device__ __forceinline__ bool phase_done(uint64_t* barrier, int parity) {
  int done = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
      : "=r"(done) : "r"(address(barrier)), "r"(parity) : "memory");
#else
  asm volatile(
      "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
      : "=r"(done) : "r"(address(barrier)), "r"(parity) : "memory");
#endif
  return done;
}
__device__ __forceinline__ void phase_wait(uint64_t* barrier, int parity) {
  while (!phase_done(barrier, parity)) {
  }
}
// By address the loop is PTX: the compiler sees none when it unrolls those around it.
__device__ __forceinline__ void phase_wait(unsigned barrier, int parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .pred done;\n"
               "again%=: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
               "@!done bra again%=;\n}" :: "r"(barrier), "r"(parity) : "memory");
#endif
}

// What was read from shared memory or written to it comes before asynchronous copies to it.
__device__ __forceinline__ void fence_copies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Begins to copy `bytes` to shared memory, both ends at multiples of 16; from sm_90 on.
__device__ __forceinline__ void copy_bulk(unsigned to, const void* from, int bytes,
                                          unsigned barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to), "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}

// Asynchronous copies to shared memory, by all lanes of a warp together: each with `mine` copies
// `bytes`, a multiple of 16, and counts for one of two such of its `barrier`'s phase, which counts
// kCopiers arrivals and the bytes. `copies_expect` comes before them, `copies_issued` behind.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kCopiers = 32;
#else
constexpr int kCopiers = 1;
#endif
__device__ __forceinline__ void copies_expect(bool mine, uint64_t* barrier, int bytes) {
  if (mine) phase_expect(address(barrier), bytes);
}
__device__ __forceinline__ void copy_each(bool mine, void* to, const void* from, int bytes,
                                          uint64_t* barrier) {
  const unsigned there = address(to);
#if __CUDA_ARCH__ >= 900
  if (mine) copy_bulk(there, from, bytes, address(barrier));
#else
  for (unsigned left = __ballot_sync(~0u, mine); left != 0; left &= left - 1) {
    const int lane = __ffs(left) - 1;
    const unsigned to = __shfl_sync(~0u, there, lane);
    const char* const at = (const char*)__shfl_sync(~0u, (unsigned long long)from, lane);
    for (int i = threadIdx.x % 32 * 16; i < bytes; i += 512)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i), "l"(at + i)
                   : "memory");
  }
#endif
}
__device__ __forceinline__ void copies_issued(bool mine, uint64_t* barrier) {
#if __CUDA_ARCH__ < 900
  const unsigned at = address(barrier);
  for (unsigned left = __ballot_sync(~0u, mine); left != 0; left &= left - 1)
    phase_arrive_copied(__shfl_sync(~0u, at, __ffs(left) - 1));
#endif
}

// As copy_each, to the same place of both blocks of a cluster and counted by both barriers. Such have
// GPUs from sm_90 on.
__device__ __forceinline__ void copy_to_both(bool mine, void* to, const void* from, int bytes,
                                             uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  if (mine)
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1], %2, [%3], %4;" ::"r"(address(to)), "l"(from), "r"(bytes),
        "r"(address(barrier)), "h"((short)3)
        : "memory");
#endif
}
// As fence_copies, and before copies to the other block.
__device__ __forceinline__ void fence_copies_to_both() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cluster;" ::: "memory");
#endif
}
// At another block's barrier, or this one's, by its place in the cluster.
__device__ __forceinline__ void phase_arrive_in_block(unsigned barrier, int block) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(in_block(barrier, block))
               : "memory");
#endif
}
__device__ __forceinline__ void phase_arrive_in_block(uint64_t* barrier, int block) {
  phase_arrive_in_block(address(barrier), block);
}

// A barrier of `threads` of a block, whole warps; 0 is __syncthreads.
__device__ __forceinline__ void meet(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
template <int kBarrier, int kThreads>
__device__ __forceinline__ void meet() {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

// 4, 8 or 16 bytes. Volatile, because nothing may move above `wait_for_inputs`.
template <int WORDS>
__device__ __forceinline__ void load_words(unsigned* to, const void* from) {
  if constexpr (WORDS == 4)
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
  else if constexpr (WORDS == 2)
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1]) : "l"(from));
  else
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(to[0]) : "l"(from));
}
// One more has come to `counter`; the number before it, which `last` brings back to 0. Ordered
// behind the block's writes before a barrier, and before its reads after the next.
__device__ __forceinline__ unsigned count_up(unsigned* counter, unsigned last) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before) : "l"(counter), "r"(last) : "memory");
  return before;
}

// As in NCCL's low-latency protocol, each 8 bytes travel with a 4-byte flag after each 4, in stores
// of 16 bytes: the reader polls its own memory and needs no other signal.

// Eight bytes to `to`, four words in a peer's memory.
__device__ __forceinline__ void send(unsigned* to, uint2 data, unsigned flag) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1,%3,%2,%3};" ::"l"(to), "r"(data.x),
               "r"(data.y), "r"(flag)
               : "memory");
}

// One look at what a peer sends to `from`; whether it has come.
__device__ __forceinline__ bool receive(const unsigned* from, unsigned flag, uint2& data) {
  unsigned a, b;
  asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(data.x), "=r"(a), "=r"(data.y), "=r"(b)
               : "l"(from)
               : "memory");
  return a == flag && b == flag;
}

// Tells a peer, by a word of its memory, that what this thread has seen written can be read.
__device__ __forceinline__ void publish(unsigned* flag, unsigned value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// One look at a word of `publish`; whether it has come.
__device__ __forceinline__ bool published(const unsigned* flag, unsigned value) {
  unsigned found;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(found) : "l"(flag) : "memory");
  return found == value;
}

// What a peer has written, past the L1 cache.
__device__ __forceinline__ uint4 load_l2(const uint4* from) { return __ldcg(from); }

}  // namespace shardwright
#endif
