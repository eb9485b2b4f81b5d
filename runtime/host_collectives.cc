// Collectives between processes of one machine, over a shared memory file.
//
// Each rank owns a sequence number and two slots. A collective works in chunks of at most one slot.
// For chunk number e a rank copies its input to slot e % 2, publishes e as its sequence number,
// waits until every rank has published e, and reads all slots. Two slots suffice: a rank that
// writes chunk e + 2 has seen every rank publish e + 1, and so finish reading chunk e.
//
// Every rank adds the same numbers in rank order in float32, so results are bitwise equal.
// A wait ends with an error once the abort flag is set; the controller sets it when a rank dies.

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <cstring>
#include <new>

namespace {

constexpr int kMaxRanks = 64;
constexpr size_t kBlock = 1024;  // elements added at once, so that sums stay in the L1 cache

enum Status : int { kOk = 0, kAborted = 1, kUnsupported = 2 };
enum DType : int { kFloat32 = 0, kFloat16 = 1, kInt32 = 2 };

struct alignas(64) Sequence {
  std::atomic<uint32_t> value;
};

struct Header {
  std::atomic<uint32_t> abort;
  alignas(64) std::atomic<uint32_t> sleepers;
  Sequence sequence[kMaxRanks];
};

struct Group {
  Header* header;
  unsigned char* slots;
  size_t slot_bytes;
  size_t mapped_bytes;
  int rank;
  int world;
  int spins;
  uint32_t chunk;  // number of the last chunk

  unsigned char* slot(int r) const {
    return slots + (static_cast<size_t>(r) * 2 + chunk % 2) * slot_bytes;
  }
};

float HalfToFloat(uint16_t half) {
  uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  uint32_t rest = half & 0x7fff;
  uint32_t bits;
  float value;
  if (rest >= 0x7c00) {
    bits = 0x7f800000 | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    bits = (rest << 13) + (112u << 23);
  } else {  // subnormal: an integer times 2^-24
    value = static_cast<float>(rest) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint16_t FloatToHalf(float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint16_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x47800000) return sign | 0x7c00;
  if (bits < 0x38800000) {  // subnormal: adding 0.5 makes the hardware round at 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000);
  }
  bits += 0xfff + ((bits >> 13) & 1) - (112u << 23);
  return sign | static_cast<uint16_t>(bits >> 13);
}

long Futex(std::atomic<uint32_t>* word, int op, uint32_t value, const timespec* timeout) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), op, value, timeout, nullptr, 0);
}

void Relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

Status WaitFor(Group* g, int r) {
  std::atomic<uint32_t>& sequence = g->header->sequence[r].value;
  // A signed difference, so that the counter may wrap.
  auto seen = [&](uint32_t now) { return static_cast<int32_t>(now - g->chunk) >= 0; };
  for (int i = 0; i < g->spins; ++i) {
    if (seen(sequence.load(std::memory_order_acquire))) return kOk;
    Relax();
  }
  for (int i = 0; i < 8; ++i) {
    if (seen(sequence.load(std::memory_order_acquire))) return kOk;
    sched_yield();
  }
  while (true) {
    g->header->sleepers.fetch_add(1);
    uint32_t now = sequence.load();
    if (!seen(now) && g->header->abort.load() == 0) {
      // The timeout bounds the wait when the flag is set between the check and the sleep.
      timespec timeout{0, 50 * 1000 * 1000};
      Futex(&sequence, FUTEX_WAIT, now, &timeout);
    }
    g->header->sleepers.fetch_sub(1);
    if (seen(sequence.load(std::memory_order_acquire))) return kOk;
    if (g->header->abort.load() != 0) return kAborted;
  }
}

// Publish that this rank's slot holds the present chunk, and wait for all ranks.
Status Exchange(Group* g) {
  if (g->header->abort.load(std::memory_order_relaxed) != 0) return kAborted;
  std::atomic<uint32_t>& own = g->header->sequence[g->rank].value;
  own.store(g->chunk);  // sequentially consistent: ordered before the read of `sleepers`
  if (g->header->sleepers.load() != 0) Futex(&own, FUTEX_WAKE, INT_MAX, nullptr);
  for (int r = 0; r < g->world; ++r) {
    if (r == g->rank) continue;
    Status status = WaitFor(g, r);
    if (status != kOk) return status;
  }
  return kOk;
}

void SumFloat(const Group* g, float* out, size_t count) {
  std::memcpy(out, g->slot(0), count * sizeof(float));
  for (size_t begin = 0; begin < count; begin += kBlock) {
    size_t n = count - begin < kBlock ? count - begin : kBlock;
    float* sum = out + begin;
    for (int r = 1; r < g->world; ++r) {
      const float* x = reinterpret_cast<const float*>(g->slot(r)) + begin;
      for (size_t i = 0; i < n; ++i) sum[i] += x[i];
    }
  }
}

void SumHalf(const Group* g, uint16_t* out, size_t count) {
  float sum[kBlock];
  for (size_t begin = 0; begin < count; begin += kBlock) {
    size_t n = count - begin < kBlock ? count - begin : kBlock;
    for (int r = 0; r < g->world; ++r) {
      const uint16_t* x = reinterpret_cast<const uint16_t*>(g->slot(r)) + begin;
      for (size_t i = 0; i < n; ++i) sum[i] = r == 0 ? HalfToFloat(x[i]) : sum[i] + HalfToFloat(x[i]);
    }
    for (size_t i = 0; i < n; ++i) out[begin + i] = FloatToHalf(sum[i]);
  }
}

void SumInt(const Group* g, int32_t* out, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    uint32_t sum = 0;  // unsigned, so that overflow wraps
    for (int r = 0; r < g->world; ++r) {
      sum += static_cast<uint32_t>(reinterpret_cast<const int32_t*>(g->slot(r))[i]);
    }
    out[i] = static_cast<int32_t>(sum);
  }
}

size_t HeaderBytes() { return (sizeof(Header) + 4095) / 4096 * 4096; }

}  // namespace

extern "C" {

size_t sw_segment_bytes(int world, size_t slot_bytes) {
  return HeaderBytes() + static_cast<size_t>(world) * 2 * slot_bytes;
}

// Map the file at `path`, which has sw_segment_bytes() zero bytes. Null on failure, see errno.
void* sw_attach(const char* path, int rank, int world, size_t slot_bytes, int spins) {
  if (world > kMaxRanks) return nullptr;
  int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return nullptr;
  size_t bytes = sw_segment_bytes(world, slot_bytes);
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (base == MAP_FAILED) return nullptr;
  return new (std::nothrow) Group{static_cast<Header*>(base),
                                  static_cast<unsigned char*>(base) + HeaderBytes(),
                                  slot_bytes, bytes, rank, world, spins, 0};
}

void sw_detach(void* group) {
  Group* g = static_cast<Group*>(group);
  munmap(g->header, g->mapped_bytes);
  delete g;
}

void sw_abort(void* group) {
  Group* g = static_cast<Group*>(group);
  g->header->abort.store(1);
  for (int r = 0; r < g->world; ++r) {
    Futex(&g->header->sequence[r].value, FUTEX_WAKE, INT_MAX, nullptr);
  }
}

int sw_barrier(void* group) {
  Group* g = static_cast<Group*>(group);
  ++g->chunk;
  return Exchange(g);
}

int sw_all_reduce(void* group, const void* input, void* output, size_t count, int dtype) {
  Group* g = static_cast<Group*>(group);
  if (dtype != kFloat32 && dtype != kFloat16 && dtype != kInt32) return kUnsupported;
  const size_t size = dtype == kFloat16 ? 2 : 4;
  const size_t step = g->slot_bytes / size;
  for (size_t begin = 0; begin < count; begin += step) {
    size_t n = count - begin < step ? count - begin : step;
    unsigned char* out = static_cast<unsigned char*>(output) + begin * size;
    ++g->chunk;
    std::memcpy(g->slot(g->rank), static_cast<const unsigned char*>(input) + begin * size, n * size);
    Status status = Exchange(g);
    if (status != kOk) return status;
    if (dtype == kFloat32) SumFloat(g, reinterpret_cast<float*>(out), n);
    if (dtype == kFloat16) SumHalf(g, reinterpret_cast<uint16_t*>(out), n);
    if (dtype == kInt32) SumInt(g, reinterpret_cast<int32_t*>(out), n);
  }
  return kOk;
}

// `output` is world x `bytes`, rank by rank.
int sw_all_gather(void* group, const void* input, void* output, size_t bytes) {
  Group* g = static_cast<Group*>(group);
  for (size_t begin = 0; begin < bytes; begin += g->slot_bytes) {
    size_t n = bytes - begin < g->slot_bytes ? bytes - begin : g->slot_bytes;
    ++g->chunk;
    std::memcpy(g->slot(g->rank), static_cast<const unsigned char*>(input) + begin, n);
    Status status = Exchange(g);
    if (status != kOk) return status;
    for (int r = 0; r < g->world; ++r) {
      std::memcpy(static_cast<unsigned char*>(output) + r * bytes + begin, g->slot(r), n);
    }
  }
  return kOk;
}

}  // extern "C"
