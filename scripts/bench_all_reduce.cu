// All-reduce + residual + norm over peer memory against NCCL's all-reduce alone: right, and how fast.
//
//   nvcc -O3 -std=c++17 -arch=sm_90a -o bench_all_reduce scripts/bench_all_reduce.cu -ldl
//   ./bench_all_reduce RANKS            as many GPUs, in one process
//   ./bench_all_reduce RANKS emulate    that many ranks on one GPU; checks only
//
// Rows of 8192 fp16. Times are a replayed graph's, of the slowest rank, for each of 20 calls in a
// row, launched ahead of each other's end. NCCL is left out where there is no libnccl.so.2
// (NCCL_LIB names it).
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../compiler/kernels/ptx.cuh"
#include "../compiler/kernels/patience.cuh"
#include "../compiler/kernels/peer.cuh"

#define CHECK(call)                                                                 \
  do {                                                                              \
    cudaError_t status = call;                                                      \
    if (status != cudaSuccess) {                                                    \
      fprintf(stderr, "line %d: %s\n", __LINE__, cudaGetErrorString(status));       \
      exit(1);                                                                      \
    }                                                                               \
  } while (0)

constexpr int kSize = 8192, kRows = 256, kParts = 8, kThreads = 128, kCalls = 20;
constexpr float kEpsilon = 1e-5f;

struct Arguments {
  const half *x, *residual, *weight;
  const int64_t* peers;
  int* calls;
  const int* rank;
  half *sum, *normed;
};

template <int kRanks, bool kTwoShots>
__global__ void __launch_bounds__(kThreads) __cluster_dims__(kParts, 1, 1) reduce(Arguments a) {
  asm volatile("griddepcontrol.launch_dependents;");
  shardwright::peer::all_reduce<kRanks, kRows, kSize, kThreads, kParts, kTwoShots, true>(
      a.x, a.residual, a.weight, a.peers, a.calls, a.rank, a.sum, a.normed, kEpsilon, blockIdx.y,
      blockIdx.x, threadIdx.x);
}

using Kernel = void (*)(Arguments);

Kernel kernel_of(int ranks, bool two_shots) {
  switch (ranks) {
    case 2: return two_shots ? reduce<2, true> : reduce<2, false>;
    case 3: return two_shots ? reduce<3, true> : reduce<3, false>;
    case 4: return two_shots ? reduce<4, true> : reduce<4, false>;
    case 8: return two_shots ? reduce<8, true> : reduce<8, false>;
  }
  fprintf(stderr, "RANKS is 2, 3, 4 or 8\n");
  exit(1);
}

struct Rank {
  int device;
  cudaStream_t stream;
  cudaEvent_t begin, end;
  Arguments a;
  std::vector<half> x, residual, weight;
};

template <typename T>
T* upload(const std::vector<T>& values) {
  T* device;
  CHECK(cudaMalloc(&device, values.size() * sizeof(T)));
  CHECK(cudaMemcpy(device, values.data(), values.size() * sizeof(T), cudaMemcpyDefault));
  return device;
}

std::vector<half> random_values(size_t count, unsigned seed) {
  std::vector<half> values(count);
  for (half& value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = __float2half((seed >> 16) / 32768.f - 1.f);
  }
  return values;
}

void launch(const Rank& r, Kernel kernel, int rows) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kParts, rows);
  config.blockDim = dim3(kThreads);
  config.stream = r.stream;
  config.attrs = &early;
  config.numAttrs = 1;
  CHECK(cudaLaunchKernelEx(&config, kernel, r.a));
}

// Microseconds of a call of `enqueue`, which enqueues one on every rank.
template <typename Enqueue>
double timed(std::vector<Rank>& ranks, Enqueue enqueue) {
  std::vector<cudaGraphExec_t> graphs(ranks.size());
  for (Rank& r : ranks) {
    CHECK(cudaSetDevice(r.device));
    CHECK(cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeRelaxed));
  }
  for (int i = 0; i < kCalls; ++i) enqueue();
  for (size_t i = 0; i < ranks.size(); ++i) {
    cudaGraph_t graph;
    CHECK(cudaSetDevice(ranks[i].device));
    CHECK(cudaStreamEndCapture(ranks[i].stream, &graph));
    CHECK(cudaGraphInstantiate(&graphs[i], graph, 0));
    CHECK(cudaGraphDestroy(graph));
  }
  double best = INFINITY;
  for (int repeat = 0; repeat < 5; ++repeat) {
    for (size_t i = 0; i < ranks.size(); ++i) {
      CHECK(cudaSetDevice(ranks[i].device));
      CHECK(cudaEventRecord(ranks[i].begin, ranks[i].stream));
      CHECK(cudaGraphLaunch(graphs[i], ranks[i].stream));
      CHECK(cudaEventRecord(ranks[i].end, ranks[i].stream));
    }
    double slowest = 0;
    for (Rank& r : ranks) {
      float milliseconds;
      CHECK(cudaEventSynchronize(r.end));
      CHECK(cudaEventElapsedTime(&milliseconds, r.begin, r.end));
      slowest = std::max(slowest, milliseconds * 1e3 / kCalls);
    }
    best = std::min(best, slowest);
  }
  for (cudaGraphExec_t graph : graphs) CHECK(cudaGraphExecDestroy(graph));
  return best;
}

// Sums must be those of the host, bit for bit, and norms near, and both the same on all ranks.
bool right(std::vector<Rank>& ranks, Kernel kernel, int rows) {
  const size_t count = (size_t)rows * kSize;
  for (int repeat = 0; repeat < 3; ++repeat)
    for (Rank& r : ranks) {
      CHECK(cudaSetDevice(r.device));
      launch(r, kernel, rows);
    }
  std::vector<half> sum(count), normed(count), other(count);
  for (Rank& r : ranks) CHECK(cudaStreamSynchronize(r.stream));
  CHECK(cudaMemcpy(sum.data(), ranks[0].a.sum, count * 2, cudaMemcpyDefault));
  CHECK(cudaMemcpy(normed.data(), ranks[0].a.normed, count * 2, cudaMemcpyDefault));
  for (Rank& r : ranks) {
    CHECK(cudaMemcpy(other.data(), r.a.sum, count * 2, cudaMemcpyDefault));
    if (memcmp(other.data(), sum.data(), count * 2)) return false;
    CHECK(cudaMemcpy(other.data(), r.a.normed, count * 2, cudaMemcpyDefault));
    if (memcmp(other.data(), normed.data(), count * 2)) return false;
  }
  for (int row = 0; row < rows; ++row) {
    double squares = 0;
    for (int i = 0; i < kSize; ++i) {
      const size_t at = (size_t)row * kSize + i;
      float total = 0;
      for (Rank& r : ranks) total += __half2float(r.x[at]);
      const float reduced = __half2float(__float2half(total));
      const half expected = __float2half(reduced + __half2float(ranks[0].residual[at]));
      if (memcmp(&expected, &sum[at], 2)) return false;
      squares += std::pow(__half2float(expected), 2);
    }
    const double scale = 1 / std::sqrt(squares / kSize + kEpsilon);
    for (int i = 0; i < kSize; ++i) {
      const size_t at = (size_t)row * kSize + i;
      const double expected = __half2float(sum[at]) * scale * __half2float(ranks[0].weight[i]);
      if (std::abs(expected - __half2float(normed[at])) > 1e-3 * std::abs(expected) + 1e-4)
        return false;
    }
  }
  return true;
}

std::vector<Rank> make_ranks(int count, bool emulate) {
  std::vector<Rank> ranks(count);
  std::vector<int64_t> peers;
  const size_t elements = (size_t)kRows * kSize;
  for (int i = 0; i < count; ++i) {
    Rank& r = ranks[i];
    r.device = emulate ? 0 : i;
    CHECK(cudaSetDevice(r.device));
    for (int j = 0; j < count && !emulate; ++j)
      if (j != i) CHECK(cudaDeviceEnablePeerAccess(j, 0));
    CHECK(cudaStreamCreateWithFlags(&r.stream, cudaStreamNonBlocking));
    CHECK(cudaEventCreate(&r.begin));
    CHECK(cudaEventCreate(&r.end));
    r.x = random_values(elements, i + 1);
    r.residual = random_values(elements, 100);
    r.weight = random_values(kSize, 200);
    unsigned* buffer;
    CHECK(cudaMalloc(&buffer, 2 * count * elements * 4));
    CHECK(cudaMemset(buffer, 0, 2 * count * elements * 4));
    peers.push_back((int64_t)buffer);
    r.a = {upload(r.x), upload(r.residual), upload(r.weight), nullptr,
           upload(std::vector<int>(kRows)), upload(std::vector<int>{i}), upload(r.x), upload(r.x)};
  }
  int* give_up;
  CHECK(cudaHostAlloc(&give_up, 4, cudaHostAllocPortable | cudaHostAllocMapped));
  *give_up = 0;
  peers.push_back((int64_t)give_up);
  for (Rank& r : ranks) {
    CHECK(cudaSetDevice(r.device));
    r.a.peers = upload(peers);
    CHECK(cudaDeviceSynchronize());
  }
  return ranks;
}

// NCCL by its C functions, so that its header is not needed. Types: ncclFloat16 6, ncclSum 0.
struct Nccl {
  int (*init)(void**, int, const int*) = nullptr;
  int (*start)() = nullptr;
  int (*end)() = nullptr;
  int (*all_reduce)(const void*, void*, size_t, int, int, void*, cudaStream_t) = nullptr;
  std::vector<void*> comms;

  explicit Nccl(int ranks) : comms(ranks) {
    const char* path = getenv("NCCL_LIB");
    void* library = dlopen(path ? path : "libnccl.so.2", RTLD_NOW);
    if (!library) return;
    *(void**)&init = dlsym(library, "ncclCommInitAll");
    *(void**)&start = dlsym(library, "ncclGroupStart");
    *(void**)&end = dlsym(library, "ncclGroupEnd");
    *(void**)&all_reduce = dlsym(library, "ncclAllReduce");
    if (init(comms.data(), ranks, nullptr)) init = nullptr;
  }
};

int main(int argc, char** argv) {
  const int count = argc > 1 ? atoi(argv[1]) : 2;
  const bool emulate = argc > 2;
  std::vector<Rank> ranks = make_ranks(count, emulate);
  // Blocks that wait for each other must all be resident, of all the ranks on one GPU too.
  for (int rows : {1, 3, emulate ? 2 : 64})
    for (bool two_shots : {false, true})
      if (!right(ranks, kernel_of(count, two_shots), rows)) {
        printf("%d ranks, %d rows, %d shots: WRONG\n", count, rows, 1 + two_shots);
        return 1;
      }
  printf("%d ranks: sums and norms are right, the same on all ranks\n", count);
  if (emulate) return 0;
  Nccl nccl(count);
  printf("%8s %10s %10s %10s  us\n", "KB", "one shot", "two shots", "NCCL");
  for (int rows : {1, 2, 4, 8, 16, 32, 64, 128, 256}) {
    printf("%8d", rows * kSize / 512);
    for (bool two_shots : {false, true})
      printf(" %10.1f", timed(ranks, [&] {
               for (Rank& r : ranks) {
                 CHECK(cudaSetDevice(r.device));
                 launch(r, kernel_of(count, two_shots), rows);
               }
             }));
    if (nccl.init)
      printf(" %10.1f", timed(ranks, [&] {
               nccl.start();
               for (int i = 0; i < count; ++i)
                 nccl.all_reduce(ranks[i].a.x, ranks[i].a.sum, (size_t)rows * kSize, 6, 0,
                                 nccl.comms[i], ranks[i].stream);
               nccl.end();
             }));
    printf("\n");
  }
}
