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

// The address that `here`, in this block's shared memory, has in that of another of the cluster.
__device__ __forceinline__ unsigned in_block(const void* here, int block) {
  unsigned there = (unsigned)__cvta_generic_to_shared(here);
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(there), "r"(block));
#endif
  return there;
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
