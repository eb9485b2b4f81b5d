// Loading code objects and running kernels.
//
// Formats: the AMDGPU chapter of LLVM's user guide (code object, kernel descriptor, initial state
// of registers).

#include <elf.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "core.h"

namespace amd {

std::string format(const char *text, ...) {
    char out[1024];
    va_list values;
    va_start(values, text);
    vsnprintf(out, sizeof out, text, values);
    va_end(values);
    return out;
}

const Arch &arch_named(const std::string &name) {
    static const Arch archs[] = {{"gfx90a", Family::gfx9, false},
                                 {"gfx942", Family::gfx9, true},
                                 {"gfx1100", Family::gfx11, true}};
    for (const Arch &a : archs)
        if (a.name == name) return a;
    throw Fault("the emulator has no architecture " + name + "; it has gfx90a, gfx942 and gfx1100");
}

void fault(Wave &w, const Inst &in, const std::string &what) {
    const Group &g = *w.group;
    throw Fault(format("%s, group %u %u %u, wave %d: %s", describe(*g.launch.kernel->code, in).c_str(),
                       g.id[0], g.id[1], g.id[2], w.index, what.c_str()));
}

// ---- operations by name ----------------------------------------------------------------------

namespace {
std::unordered_map<std::string, const Op *> &registry() {
    static std::unordered_map<std::string, const Op *> ops;
    return ops;
}
}  // namespace

const Op *op_named(const std::string &name) {
    auto found = registry().find(name);
    return found == registry().end() ? nullptr : found->second;
}

Register::Register(std::initializer_list<Op> ops) {
    for (const Op &op : ops) registry()[op.name] = new Op(op);
}

// ---- half precision --------------------------------------------------------------------------

u16 to_half_toward_zero(f32 f) {
    u16 h = to_half(f);
    bool too_far = f == f && std::fabs(from_half(h)) > std::fabs(f);
    return too_far && !std::isinf(f) ? u16(h - 1) : h;
}

// ---- loading ---------------------------------------------------------------------------------

void decode_range(Code &code, u32 first, u32 last);
void resolve_branches(Code &code);

namespace {

constexpr u16 EM_AMDGPU_ = 224;

struct Descriptor {
    u32 lds, scratch, kernarg;
    u8 reserved0[4];
    i64 entry;
    u8 reserved1[20];
    u32 rsrc3, rsrc1, rsrc2;
    u16 properties, preload;
    u8 reserved2[4];
};
static_assert(sizeof(Descriptor) == 64);

template <class T> T at(const u8 *file, size_t size, u64 offset) {
    if (offset + sizeof(T) > size) throw Fault("the code object is cut short");
    T out;
    std::memcpy(&out, file + offset, sizeof out);
    return out;
}

const char *machine_of(u32 flags) {
    switch (flags & 0xff) {
        case 0x3f: return "gfx90a";
        case 0x4c: return "gfx942";
        case 0x41: return "gfx1100";
        default: return "another architecture";
    }
}

Kernel read_kernel(const Code &code, const std::string &name, u64 descriptor) {
    auto d = at<Descriptor>(code.image.data(), code.image.size(), descriptor);
    Kernel k;
    k.name = name;
    k.code = &code;
    k.lds = d.lds, k.scratch = d.scratch, k.kernarg = d.kernarg;
    u64 word = (descriptor + u64(d.entry)) / 4;
    if (word >= code.index.size() || code.index[word] < 0)
        throw Fault("kernel " + name + " has no code");
    k.entry = u32(code.index[word]);
    k.width = d.properties & 1 << 10 ? 32 : 64;
    for (int i = 0; i < 7; i++) k.user[i] = d.properties >> i & 1;
    k.user_count = d.rsrc2 >> 1 & 31;
    for (int i = 0; i < 3; i++) k.group_id[i] = d.rsrc2 >> (7 + i) & 1;
    k.wave_offset = d.rsrc2 & 1 && !code.arch->flat_scratch;
    k.work_item_ids = int(d.rsrc2 >> 11 & 3);
    if (d.preload & 127)
        throw Fault("kernel " + name + " has its arguments in registers, which is not emulated");
    return k;
}

}  // namespace

Code::~Code() { memory().remove(base); }

std::unique_ptr<Code> load(const Arch &arch, const u8 *file, size_t size) {
    auto elf = at<Elf64_Ehdr>(file, size, 0);
    if (std::memcmp(elf.e_ident, ELFMAG, SELFMAG) || elf.e_machine != EM_AMDGPU_)
        throw Fault("not an AMD GPU code object");
    if (arch.name != machine_of(elf.e_flags))
        throw Fault(format("the code object is for %s, the device is %s", machine_of(elf.e_flags),
                           arch.name.c_str()));
    auto code = std::make_unique<Code>();
    code->arch = &arch;
    std::vector<Elf64_Phdr> segments;
    u64 end = 0;
    for (int i = 0; i < elf.e_phnum; i++) {
        segments.push_back(at<Elf64_Phdr>(file, size, elf.e_phoff + u64(i) * elf.e_phentsize));
        if (segments.back().p_type == PT_LOAD)
            end = std::max(end, segments.back().p_vaddr + segments.back().p_memsz);
    }
    code->image.resize((end + 3) / 4 * 4 + 64);
    code->base = reinterpret_cast<u64>(code->image.data());
    for (const auto &s : segments)
        if (s.p_type == PT_LOAD && s.p_offset + s.p_filesz <= size)
            std::memcpy(code->image.data() + s.p_vaddr, file + s.p_offset, s.p_filesz);
    code->index.assign(code->image.size() / 4, -1);

    std::vector<std::pair<std::string, u64>> descriptors;
    std::vector<std::pair<u32, u32>> ranges;
    std::vector<Elf64_Rela> relocations;
    std::vector<Elf64_Sym> symbols;
    for (int i = 0; i < elf.e_shnum; i++) {
        auto section = at<Elf64_Shdr>(file, size, elf.e_shoff + u64(i) * elf.e_shentsize);
        if (section.sh_type == SHT_RELA)
            for (u64 p = 0; p + sizeof(Elf64_Rela) <= section.sh_size; p += sizeof(Elf64_Rela))
                relocations.push_back(at<Elf64_Rela>(file, size, section.sh_offset + p));
        if (section.sh_type != SHT_DYNSYM && section.sh_type != SHT_SYMTAB) continue;
        auto strings = at<Elf64_Shdr>(file, size, elf.e_shoff + u64(section.sh_link) * elf.e_shentsize);
        for (u64 p = 0; p + sizeof(Elf64_Sym) <= section.sh_size; p += sizeof(Elf64_Sym)) {
            auto symbol = at<Elf64_Sym>(file, size, section.sh_offset + p);
            if (section.sh_type == SHT_DYNSYM) symbols.push_back(symbol);
            std::string name = reinterpret_cast<const char *>(file + strings.sh_offset + symbol.st_name);
            int type = ELF64_ST_TYPE(symbol.st_info);
            if (symbol.st_value + symbol.st_size > code->image.size()) continue;
            if (type == STT_FUNC && symbol.st_size) {
                if (code->symbols.count(name)) continue;
                code->symbols[name] = {symbol.st_value, symbol.st_size};
                ranges.push_back({u32(symbol.st_value / 4), u32((symbol.st_value + symbol.st_size) / 4)});
                code->functions.push_back({u32(symbol.st_value / 4), name});
            } else if (type == STT_OBJECT && name.size() > 3 && !name.compare(name.size() - 3, 3, ".kd")) {
                descriptors.push_back({name.substr(0, name.size() - 3), symbol.st_value});
            }
        }
    }
    for (const auto &r : relocations) {
        u64 type = ELF64_R_TYPE(r.r_info), symbol = ELF64_R_SYM(r.r_info), value = u64(r.r_addend);
        if (type == 3 && symbol < symbols.size()) value += symbols[symbol].st_value;
        else if (type != 13) throw Fault(format("relocation %d is not known", int(type)));
        if (type == 3 && (symbol >= symbols.size() || !symbols[symbol].st_value))
            throw Fault("the code object has an undefined symbol");
        value += code->base;
        if (r.r_offset + 8 <= code->image.size())
            std::memcpy(code->image.data() + r.r_offset, &value, 8);
    }
    std::sort(ranges.begin(), ranges.end());
    std::sort(code->functions.begin(), code->functions.end());
    for (auto [first, last] : ranges) decode_range(*code, first, last);
    resolve_branches(*code);
    for (const auto &[name, address] : descriptors)
        code->kernels[name] = read_kernel(*code, name, address);
    memory().add(code->base, code->image.size(), false);
    return code;
}

// ---- running ---------------------------------------------------------------------------------

namespace {

u64 step_limit() {
    static const u64 limit = [] {
        const char *text = std::getenv("AMD_EMULATOR_STEPS");
        return text ? std::strtoull(text, nullptr, 10) : 1ull << 32;
    }();
    return limit;
}

std::unique_ptr<Wave> start_wave(Group &g, int index) {
    const Kernel &k = *g.launch.kernel;
    auto w = std::make_unique<Wave>();
    w->group = &g;
    w->index = index;
    w->width = k.width;
    w->pc = k.entry;
    // What was never written shows: all ones are NaN, and no address.
    w->v.resize(g.arch.family == Family::gfx9 ? 512 : 256);
    std::memset(w->v.data(), 0xff, w->v.size() * sizeof(Lanes));
    std::memset(w->s, 0xff, sizeof w->s);
    w->s[EXEC + 1] = 0;
    w->scratch_size = k.scratch;
    w->scratch.resize(size_t(k.scratch) * LANES);
    w->lanes_of(~0ull);

    u32 user = 0;
    static const u32 counts[] = {4, 2, 2, 2, 2, 2, 1};
    for (int i = 0; i < 7; i++) {
        if (!k.user[i]) continue;
        if (i == 3) {
            u64 address = reinterpret_cast<u64>(g.launch.arguments);
            w->s[user] = u32(address), w->s[user + 1] = u32(address >> 32);
        } else if (i == 1 || i == 2) {
            throw Fault("kernel " + k.name + " asks for its dispatch packet, which is not emulated");
        } else if (i == 6) {
            w->s[user] = k.scratch;
        }
        user += counts[i];
    }
    u32 next = k.user_count;
    for (int i = 0; i < 3; i++)
        if (k.group_id[i]) w->s[next++] = g.id[i];
    if (k.wave_offset) w->s[next++] = 0;

    const u32 *block = g.launch.block;
    u32 total = block[0] * block[1] * block[2];
    u64 active = 0;
    for (u32 lane = 0; lane < u32(k.width); lane++) {
        u32 item = u32(index) * u32(k.width) + lane;
        if (item >= total) break;
        active |= 1ull << lane;
        u32 x = item % block[0], y = item / block[0] % block[1], z = item / block[0] / block[1];
        w->v[0].x[lane] = x | (k.work_item_ids > 0 ? y << 10 : 0) | (k.work_item_ids > 1 ? z << 20 : 0);
    }
    w->s[EXEC] = u32(active), w->s[EXEC + 1] = u32(active >> 32);
    return w;
}

void run_wave(Wave &w) {
    const std::vector<Inst> &program = w.group->launch.kernel->code->program;
    const u64 limit = step_limit();
    while (!w.done && !w.at_barrier) {
        if (w.pc >= program.size()) throw Fault("ran past the end of the code");
        const Inst &in = program[w.pc++];
        if (++w.steps > limit) fault(w, in, "the kernel does not end");
        in.run(w, in);
    }
}

// Groups, and the waves of a group between barriers, are independent: any order must do.
bool reversed() {
    static const bool yes = std::getenv("AMD_EMULATOR_REVERSED") != nullptr;
    return yes;
}

void run_group(Group &g) {
    const u32 *block = g.launch.block;
    u32 width = u32(g.launch.kernel->width), total = block[0] * block[1] * block[2];
    for (u32 i = 0; i < (total + width - 1) / width; i++) g.waves.push_back(start_wave(g, int(i)));
    for (bool running = true; running;) {
        running = false;
        for (size_t i = 0; i < g.waves.size(); i++) {
            Wave &w = *g.waves[reversed() ? g.waves.size() - 1 - i : i];
            run_wave(w);
            running |= !w.done;
        }
        for (auto &w : g.waves) {  // all are at the barrier, or have ended
            if (w->at_barrier) w->epoch++;
            w->at_barrier = false;
        }
    }
}

unsigned thread_count() {
    static const unsigned count = [] {
        const char *text = std::getenv("AMD_EMULATOR_THREADS");
        int n = text ? std::atoi(text) : int(std::thread::hardware_concurrency());
        return unsigned(std::max(n, 1));
    }();
    return count;
}

}  // namespace

void run(const Arch &arch, const Launch &launch) {
    const Kernel &k = *launch.kernel;
    u64 items = u64(launch.block[0]) * launch.block[1] * launch.block[2];
    if (items == 0 || items > 1024)
        throw Fault(format("kernel %s: groups of %llu work-items; a group has 1 to 1024",
                           k.name.c_str(), (unsigned long long)items));
    u32 lds = k.lds + launch.dynamic_lds;
    if (lds > 65536) throw Fault(format("kernel %s: %u bytes of LDS; a group has 65536", k.name.c_str(), lds));
    u64 groups = u64(launch.grid[0]) * launch.grid[1] * launch.grid[2];
    std::atomic<u64> next{0};
    std::mutex lock;
    std::string error;
    auto work = [&] {
        for (u64 n; (n = next++) < groups;) {
            u64 i = reversed() ? groups - 1 - n : n;
            Group g{launch, arch, {u32(i % launch.grid[0]), u32(i / launch.grid[0] % launch.grid[1]),
                                   u32(i / launch.grid[0] / launch.grid[1])}, {}, {}, {}};
            g.lds.resize(lds);
            g.shadow.resize(lds / 2 + 1);
            try {
                run_group(g);
            } catch (const std::exception &e) {
                std::lock_guard hold(lock);
                if (error.empty()) error = e.what();
                next = groups;
            }
        }
    };
    std::vector<std::thread> threads;
    // A thread costs more than a few groups of most kernels.
    for (u64 i = 1; i < std::min<u64>(thread_count(), groups / 4); i++) threads.emplace_back(work);
    work();
    for (auto &t : threads) t.join();
    if (!error.empty()) throw Fault(error);
}

}  // namespace amd
