#ifndef SHARDWRIGHT_PATIENCE
#define SHARDWRIGHT_PATIENCE
// How long to look for what another rank sends. Included once in a module.

namespace shardwright {

// Until the host has set a word, whose address is `*last`, the one behind those of the buffers.
//
// The word is in the host's memory, so it is looked at seldom. Who gives up takes the address away:
// the kernels of all steps that are queued behind it, some thousands, then do not wait at all.
struct Patience {
  volatile int64_t* last;
  const volatile int* give_up;
  unsigned tries = 0;

  __device__ explicit Patience(const int64_t* last)
      : last(const_cast<int64_t*>(last)),
        give_up(reinterpret_cast<const volatile int*>(*this->last)) {}
  __device__ bool ends() {
    if (give_up && (++tries % 4096 != 0 || !*give_up)) return false;
    *last = 0;
    give_up = nullptr;
    return true;
  }
};

}  // namespace shardwright
#endif
