// Stand-ins for libamdhip64 and librccl, one library under both names.
//
// A device is this process; its memory is host memory, filled with 0xff (NaN) when allocated.
// Work is done before the call that enqueues it returns, or, while a graph is captured, at its
// launch. Variables: AMD_EMULATOR_ARCH (gfx1100), AMD_EMULATOR_DEVICES (1).

#include <elf.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <ctime>
#include <mutex>

#include "core.h"

namespace {

using namespace amd;

enum {
    OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
    NOT_FOUND = 500, LAUNCH_FAILURE = 719,
};
// RCCL's; the last says that the communicator was aborted, and is no code of HIP
enum { NCCL_OK = 0, NCCL_SYSTEM = 2, NCCL_INVALID = 4, NCCL_ABORTED = 5 };

std::mutex lock;
std::string message = "no error";
int sticky = OK;  // after a fault nothing works any more, as on a real device

int failed(int code, const std::string &text) {
    std::lock_guard hold(lock);
    message = text;
    fprintf(stderr, "AMD emulator: %s\n", text.c_str());
    if (code == LAUNCH_FAILURE) sticky = code;
    return code;
}

const char *setting(const char *name, const char *otherwise) {
    const char *value = std::getenv(name);
    return value && *value ? value : otherwise;
}
int devices() { return std::atoi(setting("AMD_EMULATOR_DEVICES", "1")); }
const Arch &architecture() { return arch_named(setting("AMD_EMULATOR_ARCH", "gfx1100")); }
thread_local int current_device = 0;

using Work = std::function<int()>;
struct Stream {
    bool capturing = false;
    std::vector<Work> captured;
};
Stream default_stream;
Stream *stream_of(void *stream) { return stream ? static_cast<Stream *>(stream) : &default_stream; }

// Do it, or put it into the graph that is being captured. Returns HIP's or RCCL's status.
int enqueue(void *stream, Work work) {
    Stream *s = stream_of(stream);
    if (!s->capturing) return work();
    s->captured.push_back(std::move(work));
    return OK;
}

struct Function {
    const Kernel *kernel;
};
struct Module {
    std::unique_ptr<Code> code;
    std::map<std::string, Function> functions;
};

size_t image_size(const u8 *image) {
    Elf64_Ehdr elf;
    std::memcpy(&elf, image, sizeof elf);
    u64 end = elf.e_shoff + u64(elf.e_shnum) * elf.e_shentsize;
    for (int i = 0; i < elf.e_phnum; i++) {
        Elf64_Phdr segment;
        std::memcpy(&segment, image + elf.e_phoff + u64(i) * elf.e_phentsize, sizeof segment);
        end = std::max(end, segment.p_offset + segment.p_filesz);
    }
    return end;
}

bool allocated(const void *address, size_t size) {
    u64 at = reinterpret_cast<u64>(address);
    return size == 0 || memory().find(at).end >= at + size;
}

constexpr size_t GUARD = 4096;

int allocate(void **out, size_t size, int fill) {
    u8 *all = static_cast<u8 *>(std::aligned_alloc(4096, (size + 2 * GUARD + 4095) / 4096 * 4096));
    if (!all) return failed(OUT_OF_MEMORY, format("cannot allocate %zu bytes", size));
    std::memset(all + GUARD, fill, size);
    memory().add(reinterpret_cast<u64>(all + GUARD), size, true);
    *out = all + GUARD;
    return OK;
}
int release(void *address) {
    if (!address) return OK;
    if (memory().size_of(reinterpret_cast<u64>(address)) == 0)
        return failed(INVALID_VALUE, "frees what was not allocated");
    memory().remove(reinterpret_cast<u64>(address));
    std::free(static_cast<u8 *>(address) - GUARD);
    return OK;
}

int copy(void *to, const void *from, size_t size, int kind) {
    if (sticky) return sticky;
    bool to_device = kind == 1 || kind == 3, from_device = kind == 2 || kind == 3;
    if ((to_device && !allocated(to, size)) || (from_device && !allocated(from, size)))
        return failed(INVALID_VALUE, format("a copy of %zu bytes is out of bounds", size));
    std::memmove(to, from, size);
    return OK;
}

int launch(const Kernel *kernel, const u32 *grid, const u32 *block, u32 lds, std::vector<u8> arguments) {
    if (sticky) return sticky;
    u64 address = reinterpret_cast<u64>(arguments.data());
    try {
        memory().add(address, arguments.size(), false);
        Launch l{kernel, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, arguments.data(), lds};
        run(*kernel->code->arch, l);
        memory().remove(address);
    } catch (const std::exception &e) {
        memory().remove(address);
        return failed(LAUNCH_FAILURE, e.what());
    }
    return OK;
}

}  // namespace

extern "C" {

const char *hipGetErrorString(int code) {
    static thread_local std::string text;
    std::lock_guard hold(lock);
    return (text = code == OK ? "no error" : message).c_str();
}
int hipGetLastError() { return sticky; }
int hipGetDeviceCount(int *count) { return *count = devices(), OK; }
int hipSetDevice(int device) {
    if (device < 0 || device >= devices()) return failed(INVALID_DEVICE, format("there is no device %d", device));
    return current_device = device, OK;
}
int hipGetDevice(int *device) { return *device = current_device, OK; }

int hipDeviceGetAttribute(int *value, int attribute, int) {
    switch (attribute) {
        case 23: *value = architecture().family == Family::gfx9 ? 9 : 11; break;  // capability
        case 61: *value = 0; break;
        case 56: *value = 1024; break;  // work-items of a group
        case 63: *value = 4; break;  // compute units
        case 74: *value = 65536; break;  // bytes of LDS
        case 87: *value = architecture().family == Family::gfx9 ? 64 : 32; break;
        default: *value = 0;
    }
    return OK;
}
int hipGetDevicePropertiesR0600(char *properties, int) {
    std::strcpy(properties, "Emulated AMD GPU");
    std::strcpy(properties + 1160, architecture().name.c_str());
    return OK;
}
int hipRuntimeGetVersion(int *version) { return *version = 60300000, OK; }
int hipDriverGetVersion(int *version) { return *version = 60300000, OK; }

int hipMalloc(void **memory, size_t size) { return sticky ? sticky : allocate(memory, size, 0xff); }
int hipFree(void *memory) { return release(memory); }
int hipHostMalloc(void **memory, size_t size, unsigned) { return sticky ? sticky : allocate(memory, size, 0); }
int hipHostFree(void *memory) { return release(memory); }
int hipMemcpy(void *to, const void *from, size_t size, int kind) { return copy(to, from, size, kind); }
int hipMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    return enqueue(stream, [=] { return copy(to, from, size, kind); });
}
int hipMemcpyPeerAsync(void *to, int, const void *from, int, size_t size, void *stream) {
    return enqueue(stream, [=] { return copy(to, from, size, 3); });
}
int hipMemset(void *to, int value, size_t size) {
    if (!allocated(to, size)) return failed(INVALID_VALUE, "a fill is out of bounds");
    return std::memset(to, value, size), OK;
}
int hipMemsetAsync(void *to, int value, size_t size, void *stream) {
    return enqueue(stream, [=] { return hipMemset(to, value, size); });
}
int hipMemGetInfo(size_t *free, size_t *total) { return *free = *total = size_t(8) << 30, OK; }

int hipStreamCreateWithFlags(void **stream, unsigned) { return *stream = new Stream, OK; }
int hipStreamDestroy(void *stream) { return delete static_cast<Stream *>(stream), OK; }
int hipStreamSynchronize(void *) { return sticky; }
int hipStreamQuery(void *) { return sticky; }
int hipDeviceSynchronize() { return sticky; }
int hipStreamWaitEvent(void *, void *, unsigned) { return OK; }
int hipEventCreateWithFlags(void **event, unsigned) { return *event = new char, OK; }
int hipEventDestroy(void *event) { return delete static_cast<char *>(event), OK; }
int hipEventRecord(void *, void *) { return OK; }
int hipEventQuery(void *) { return sticky; }
int hipEventSynchronize(void *) { return sticky; }
int hipEventElapsedTime(float *milliseconds, void *, void *) { return *milliseconds = 0, OK; }

int hipStreamBeginCapture(void *stream, int) { return stream_of(stream)->capturing = true, OK; }
int hipStreamEndCapture(void *stream, void **graph) {
    Stream *s = stream_of(stream);
    *graph = new std::vector<Work>(std::move(s->captured));
    s->captured.clear();
    return s->capturing = false, OK;
}
int hipGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long) {
    return *executable = new std::vector<Work>(*static_cast<std::vector<Work> *>(graph)), OK;
}
int hipGraphLaunch(void *executable, void *) {
    for (const Work &work : *static_cast<std::vector<Work> *>(executable)) {
        int status = work();
        if (status == NCCL_ABORTED) return LAUNCH_FAILURE;
        if (status) return status == LAUNCH_FAILURE ? status : failed(LAUNCH_FAILURE, "a graph failed");
    }
    return sticky;
}
int hipGraphDestroy(void *graph) { return delete static_cast<std::vector<Work> *>(graph), OK; }
int hipGraphExecDestroy(void *graph) { return hipGraphDestroy(graph); }

int hipModuleLoadData(void **module, const void *image) {
    const u8 *file = static_cast<const u8 *>(image);
    if (std::memcmp(file, ELFMAG, SELFMAG)) return failed(INVALID_IMAGE, "not a code object");
    try {
        auto m = std::make_unique<Module>();
        m->code = load(architecture(), file, image_size(file));
        for (const auto &[name, kernel] : m->code->kernels) m->functions[name] = {&kernel};
        *module = m.release();
    } catch (const std::exception &e) {
        return failed(INVALID_IMAGE, e.what());
    }
    return OK;
}
int hipModuleUnload(void *module) { return delete static_cast<Module *>(module), OK; }
int hipModuleGetFunction(void **function, void *module, const char *name) {
    auto &functions = static_cast<Module *>(module)->functions;
    auto found = functions.find(name);
    if (found == functions.end()) return failed(NOT_FOUND, format("no kernel is called %s", name));
    return *function = &found->second, OK;
}
int hipModuleLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                          unsigned by, unsigned bz, unsigned lds, void *stream, void **parameters,
                          void **extra) {
    if (sticky) return sticky;
    const Kernel *kernel = static_cast<Function *>(function)->kernel;
    if (parameters || !extra || extra[0] != reinterpret_cast<void *>(1) || extra[2] != reinterpret_cast<void *>(2))
        return failed(INVALID_VALUE, "arguments that are not packed are not emulated");
    const u8 *packed = static_cast<const u8 *>(extra[1]);
    size_t size = *static_cast<size_t *>(extra[3]);
    if (size < kernel->kernarg)
        return failed(INVALID_VALUE, format("kernel %s: %zu bytes of arguments, it has %u",
                                            kernel->name.c_str(), size, kernel->kernarg));
    std::vector<u8> arguments(packed, packed + size);
    return enqueue(stream, [=] {
        u32 grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
        return launch(kernel, grid, block, lds, arguments);
    });
}

// For tests: one line for each instruction, and those without an emulation marked by "?".
const char *amd_emulator_listing(void *module) {
    static thread_local std::string text;
    const Code &code = *static_cast<Module *>(module)->code;
    text.clear();
    for (const Inst &in : code.program) text += (in.run == unknown ? "? " : "  ") + describe(code, in) + "\n";
    return text.c_str();
}
// For tests: forget a fault.
void amd_emulator_reset() { sticky = OK; }

// ---- RCCL ------------------------------------------------------------------------------------

struct ncclUniqueId {
    char name[128];
};

}  // extern "C"

namespace {

constexpr size_t SLOT = 1 << 20;

struct Shared {
    std::atomic<u32> arrived, generation, joined, left;
    alignas(4096) u8 slots[];
};

struct Communicator {
    Shared *shared = nullptr;
    size_t bytes = 0;
    int rank = 0, world = 0;
    std::atomic<bool> aborted{false};

    // All ranks come here before any goes on; false if the collective was broken off.
    bool barrier() {
        u32 generation = shared->generation;
        if (++shared->arrived == u32(world)) {
            shared->arrived = 0;
            ++shared->generation;
            return true;
        }
        for (u64 spins = 0; shared->generation == generation; spins++) {
            if (aborted) return false;
            timespec pause{0, spins < 100 ? 1000 : 50000};
            nanosleep(&pause, nullptr);
        }
        return true;
    }
};

size_t size_of(int dtype) {
    static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
    return dtype >= 0 && dtype < 10 ? sizes[dtype] : 0;
}

template <class T> void sum(const Communicator &c, u8 *out, size_t bytes) {
    T *to = reinterpret_cast<T *>(out);
    for (size_t i = 0; i < bytes / sizeof(T); i++) {
        T total = 0;
        for (int r = 0; r < c.world; r++) total += reinterpret_cast<T *>(c.shared->slots + SLOT * size_t(r))[i];
        to[i] = total;
    }
}
void sum_halves(const Communicator &c, u8 *out, size_t bytes) {
    u16 *to = reinterpret_cast<u16 *>(out);
    for (size_t i = 0; i < bytes / 2; i++) {
        f32 total = 0;
        for (int r = 0; r < c.world; r++) total += from_half(reinterpret_cast<u16 *>(c.shared->slots + SLOT * size_t(r))[i]);
        to[i] = to_half(total);
    }
}

int collective(Communicator *c, const void *send, size_t bytes, const std::function<void(size_t, size_t)> &take) {
    for (size_t done = 0; done < bytes; done += SLOT) {
        size_t part = std::min(SLOT, bytes - done);
        std::memcpy(c->shared->slots + SLOT * size_t(c->rank), static_cast<const u8 *>(send) + done, part);
        if (!c->barrier()) return NCCL_ABORTED;
        take(done, part);
        if (!c->barrier()) return NCCL_ABORTED;
    }
    return NCCL_OK;
}

}  // namespace

extern "C" {

const char *ncclGetErrorString(int code) {
    return code == NCCL_OK ? "no error" : code == NCCL_ABORTED ? "aborted" : "RCCL stand-in failed";
}
const char *ncclGetLastError(void *) { return hipGetErrorString(INVALID_VALUE); }
int ncclGetVersion(int *version) { return *version = 22203, NCCL_OK; }
int ncclGetUniqueId(ncclUniqueId *id) {
    timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    static std::atomic<int> count{0};
    snprintf(id->name, sizeof id->name, "/amd-emulator-%d-%ld-%ld-%d", getpid(), long(now.tv_sec), now.tv_nsec, count++);
    return NCCL_OK;
}

int ncclCommInitRank(void **out, int world, ncclUniqueId id, int rank) {
    auto c = std::make_unique<Communicator>();
    c->rank = rank, c->world = world;
    c->bytes = sizeof(Shared) + SLOT * size_t(world);
    int file = shm_open(id.name, O_CREAT | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, off_t(c->bytes))) return failed(NCCL_SYSTEM, "no shared memory");
    void *at = mmap(nullptr, c->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (at == MAP_FAILED) return failed(NCCL_SYSTEM, "no shared memory");
    c->shared = static_cast<Shared *>(at);
    // A rank that never comes is for the caller's time limit.
    if (++c->shared->joined == u32(world)) shm_unlink(id.name);
    if (!c->barrier()) return NCCL_ABORTED;
    *out = c.release();
    return NCCL_OK;
}
int ncclCommDestroy(void *comm) {
    auto *c = static_cast<Communicator *>(comm);
    munmap(c->shared, c->bytes);
    return delete c, NCCL_OK;
}
// The communicator is left behind: a thread may still be waiting in it.
int ncclCommAbort(void *comm) { return static_cast<Communicator *>(comm)->aborted = true, NCCL_OK; }
int ncclCommCount(void *comm, int *count) { return *count = static_cast<Communicator *>(comm)->world, NCCL_OK; }

int ncclAllReduce(const void *send, void *receive, size_t count, int dtype, int op, void *comm, void *stream) {
    size_t bytes = count * size_of(dtype);
    if (op != 0 || (dtype != 2 && dtype != 6 && dtype != 7))
        return failed(NCCL_INVALID, "only sums of int32, float16 and float32 are emulated");
    if (!allocated(send, bytes) || !allocated(receive, bytes))
        return failed(NCCL_INVALID, "an all-reduce is out of bounds");
    return enqueue(stream, [=] {
        auto *c = static_cast<Communicator *>(comm);
        return collective(c, send, bytes, [&](size_t at, size_t part) {
            u8 *to = static_cast<u8 *>(receive) + at;
            if (dtype == 2) sum<i32>(*c, to, part);
            else if (dtype == 7) sum<f32>(*c, to, part);
            else sum_halves(*c, to, part);
        });
    });
}
int ncclAllGather(const void *send, void *receive, size_t count, int dtype, void *comm, void *stream) {
    auto *c = static_cast<Communicator *>(comm);
    size_t bytes = count * size_of(dtype);
    if (!bytes || !allocated(send, bytes) || !allocated(receive, bytes * size_t(c->world)))
        return failed(NCCL_INVALID, "an all-gather is out of bounds");
    return enqueue(stream, [=] {
        return collective(c, send, bytes, [&](size_t at, size_t part) {
            for (size_t r = 0; r < size_t(c->world); r++)
                std::memcpy(static_cast<u8 *>(receive) + r * bytes + at, c->shared->slots + SLOT * r, part);
        });
    });
}

}  // extern "C"
