// Eight codes of four bits of a word, less 7 and scaled, as four pairs of fp16: 0 4, 1 5, 2 6, 3 7.
// 0x6400 is 1024 in half precision, whose last bits count ones, and those above them sixteens: or-ing
// four bits into it makes 1024 + code without a conversion. Guarded, because several kernels of a
// module include it.
#ifndef SHARDWRIGHT_Q4_UNPACK
#define SHARDWRIGHT_Q4_UNPACK
__device__ __forceinline__ void shardwright_q4_unpack(unsigned w, half s, unsigned* out) {
  const half2 scale = __half2half2(s);
  const half2 low = __half2half2(__ushort_as_half(0x6407));        // 1024 + 7
  const half2 high = __half2half2(__ushort_as_half(0xd470));       // -(1024 / 16 + 7)
  const half2 sixteenth = __half2half2(__ushort_as_half(0x2c00));  // 1 / 16
  unsigned bits[4];
  asm("lop3.b32 %0, %1, 0x000f000f, 0x64006400, 0xea;" : "=r"(bits[0]) : "r"(w));
  asm("lop3.b32 %0, %1, 0x00f000f0, 0x64006400, 0xea;" : "=r"(bits[1]) : "r"(w));
  asm("lop3.b32 %0, %1, 0x000f000f, 0x64006400, 0xea;" : "=r"(bits[2]) : "r"(w >> 8));
  asm("lop3.b32 %0, %1, 0x00f000f0, 0x64006400, 0xea;" : "=r"(bits[3]) : "r"(w >> 8));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const half2 v = *reinterpret_cast<half2*>(&bits[i]);
    const half2 value = __hmul2(i % 2 ? __hfma2(v, sixteenth, high) : __hsub2(v, low), scale);
    out[i] = *reinterpret_cast<const unsigned*>(&value);
  }
}
#endif
