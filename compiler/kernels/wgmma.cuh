#ifndef SHARDWRIGHT_WGMMA
#define SHARDWRIGHT_WGMMA
// Hopper's `wgmma`, which PTX for other GPUs has not: products of a warpgroup, of 64 rows, 16 to a
// warp. Included once in a module.

namespace shardwright {

// From here on each thread of a warpgroup has so many registers: more, of those that other
// warpgroups of the block gave, or fewer.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// Products read and add to what registers held before the fence. Those begun between two commits
// are a group.
__device__ __forceinline__ void wgmma_fence() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wgmma_commit() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until all but the last `kPending` groups have ended.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Keeps the compiler from moving what is done with registers across a wait: reads of what a wgmma
// writes upward, and work that is to run beside a wgmma downward.
template <int kCount>
__device__ __forceinline__ void pin(float* x) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// For wgmma, halves in shared memory with the 128-byte swizzle: lines of 64, 8 of which are 1024
// bytes; a panel of such lines, or a matrix of panels that are `panel` bytes apart. In a cluster
// the upper bits of an address are the block's number, which would come to lie in the field for
// `panel`; of a single one that is not read.
__device__ __forceinline__ uint64_t panel_at(unsigned address, unsigned panel = 16) {
  return address >> 4 | (uint64_t)(panel >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | 1ull << 62;
}
__device__ __forceinline__ uint64_t matrix_at(unsigned address, unsigned panel) {
  return panel_at(address & 0x3ffff, panel);
}

// Begins d [64, kWidth] (+)= a [64, 16] x b [16, kWidth], adding where `add`. In registers a and d
// are as mma has them. In shared memory a line is a row of a, and a column of b or, `kAcross`, a
// row of b. wgmma.py writes them, one for each width, in the place of WGMMA.
template <int kWidth>
void wgmma(float* d, uint64_t a, uint64_t b, int add);
template <int kWidth, bool kAcross = false>
void wgmma(float* d, const unsigned* a, uint64_t b, int add = 1);
WGMMA
#endif

}  // namespace shardwright
#endif
