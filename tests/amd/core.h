// The machine: waves, workgroups, instructions, and what every part of the emulator shares.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace amd {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;
using f32 = float;
using f64 = double;

// A kernel did what it must not, or the emulator cannot go on. The message names the instruction.
struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

std::string format(const char *text, ...) __attribute__((format(printf, 1, 2)));

template <class To, class From>
inline To bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To out;
    std::memcpy(&out, &value, sizeof out);
    return out;
}

// Two families of encodings: gfx90a and gfx942, and gfx1100.
enum class Family { gfx9, gfx11 };

struct Arch {
    std::string name;
    Family family;
    bool flat_scratch;  // scratch instructions need no base register
};

const Arch &arch_named(const std::string &name);

// ---- registers -------------------------------------------------------------------------------

constexpr int LANES = 64;  // of a register; a wave of 32 uses the first half

struct alignas(64) Lanes {
    u32 x[LANES];
};

constexpr u32 VCC = 106, EXEC = 126, VGPR = 256, AGPR = 512;  // operand codes
constexpr u64 SHARED_BASE = 1ull << 48, PRIVATE_BASE = 2ull << 48;  // windows of flat addresses

struct Inst;
struct Group;
struct Wave;
using Run = void (*)(Wave &, const Inst &);

// ---- memory ----------------------------------------------------------------------------------

struct Range {
    u64 begin = 0, end = 0;
    bool writable = true;
};

// Device memory is host memory; what a kernel may touch is what was allocated.
class Memory {
  public:
    void add(u64 begin, u64 size, bool writable);
    void remove(u64 begin);
    // The allocation that holds `address`; an empty range if none does.
    Range find(u64 address) const;
    u64 size_of(u64 begin) const;
    std::string nearest(u64 address) const;

  private:
    mutable std::shared_mutex mutex_;
    std::map<u64, Range> ranges_;
};

Memory &memory();

// Who wrote and who read two bytes of LDS last: (barriers passed + 1) * 64 + wave.
struct Shadow {
    u32 written = 0, read = 0;
};
constexpr u32 SEVERAL = 63;  // as a wave: more than one reader

// ---- code ------------------------------------------------------------------------------------

struct Code;

struct Kernel {
    std::string name;
    const Code *code = nullptr;
    u32 entry = 0;  // index of its first instruction
    u32 lds = 0, scratch = 0, kernarg = 0;  // bytes; scratch per lane
    int width = 64;  // lanes of a wave
    // Scalar registers at the start: private buffer, dispatch, queue, kernarg, id, scratch, size.
    bool user[7] = {};
    u32 user_count = 0;
    bool group_id[3] = {}, wave_offset = false;
    int work_item_ids = 0;
};

struct Launch {
    const Kernel *kernel;
    u32 grid[3], block[3];  // groups, and work-items of a group
    const u8 *arguments;
    u32 dynamic_lds;
};

struct Group {
    const Launch &launch;
    const Arch &arch;
    u32 id[3];
    std::vector<u8> lds;
    std::vector<Shadow> shadow;
    std::vector<std::unique_ptr<Wave>> waves;
};

struct Wave {
    Group *group;
    int index, width;
    u32 pc = 0;  // index of the next instruction
    bool scc = false, done = false, at_barrier = false;
    u32 epoch = 1;  // barriers passed, from one
    u64 pending = 0;  // outstanding LDS operations, newest lowest; a bit is set for real accesses
    u64 steps = 0;
    u32 s[128] = {};
    std::vector<Lanes> v;  // 256 and, where there are any, 256 accumulation registers
    std::vector<u8> scratch;  // scratch_size bytes for each lane
    u32 scratch_size = 0;
    Range near;  // the allocation touched last
    Lanes mask;  // of the lanes that `masked` enables: all ones or zero
    u64 masked = 0;

    u64 all() const { return width == 64 ? ~0ull : 0xffffffffull; }
    u64 exec() const { return (s[EXEC] | u64(s[EXEC + 1]) << 32) & all(); }
    void set_exec(u64 m) { put_mask(EXEC, m); }
    u64 vcc() const { return get_mask(VCC); }
    u64 get_mask(u32 reg) const {
        return width == 64 ? s[reg] | u64(s[reg + 1]) << 32 : s[reg];
    }
    void put_mask(u32 reg, u64 m);
    const Lanes &lanes_of(u64 m);
};

// ---- instructions ----------------------------------------------------------------------------

// How an operand of a vector instruction is read or written.
enum class Type : u8 {
    none, b16, f16, b32, f32, b64, i64, f64,
    mask,  // one bit a lane, in scalar registers
    pk16,  // two halves
    pk32,  // two words
    mix,  // f32, or f16 as op_sel_hi says
};

inline bool is_wide(Type t) {
    return t == Type::b64 || t == Type::i64 || t == Type::f64 || t == Type::pk32;
}
inline bool is_half(Type t) { return t == Type::b16 || t == Type::f16; }

// Lane by lane: d and the 64-bit operands are two registers, low words first.
using Compute = void (*)(Lanes *d, const u32 *a, const u32 *b, const u32 *c, int n);

struct Op {
    const char *name;
    Run run;
    Compute compute = nullptr;
    Type d = Type::none, src[3] = {Type::none, Type::none, Type::none};
    bool carries = false;  // a mask goes out as well
    bool accumulates = false;  // the destination is the third operand
};

struct Operand {
    u32 code = 0;  // 0-127 scalar, 128-255 constant, 256+ vector
    u64 value = 0;  // of a constant
    bool absolute = false, negate = false, negate_high = false;
    bool low_from_high = false, high_from_high = true;  // op_sel, op_sel_hi
    bool plain = true;  // a vector register, as it is
};

struct Inst {
    Run run = nullptr;
    const Op *op = nullptr;
    Operand src[3];
    u32 dst = 0;  // vector register, or scalar for masks
    u32 sdst = 0;
    u32 literal = 0;
    i32 offset = 0;  // bytes; of branches the index of the target
    u32 offset1 = 0;
    u32 address = VGPR, scalar_address = 0x7f, data = VGPR, data1 = VGPR;
    u8 size = 0, omod = 0, dst_select = 6, dst_unused = 0, row_mask = 15, bank_mask = 15;
    bool clamp = false, dst_high = false, writes_exec = false, returns = false, gds = false;
    bool branches = false;  // `offset` is where to
    bool zero_high = false;  // a 16-bit result clears the other half
    bool sdwa = false, dpp = false, dpp8 = false, bound_ctrl = false, fetch_inactive = false;
    u32 dpp_control = 0;
    u8 src_select[2] = {6, 6};
    bool src_sext[2] = {};
    u32 immediate = 0;  // simm16, matrix modifiers
    u32 word = 0;  // place in the code, in words
    u32 raw[2] = {};
    const Inst *second = nullptr;  // of a dual instruction
};

struct Code {
    const Arch *arch = nullptr;
    std::vector<u8> image;  // the segments as loaded
    u64 base = 0;  // address of the image
    std::vector<Inst> program;
    std::vector<std::unique_ptr<Inst>> seconds;
    std::vector<i32> index;  // of the instruction at a word of the image, -1 where none begins
    std::map<std::string, Kernel> kernels;
    std::vector<std::pair<u32, std::string>> functions;  // first word and name, in order
    std::unordered_map<std::string, std::pair<u64, u64>> symbols;  // address and size
    ~Code();
};

std::unique_ptr<Code> load(const Arch &arch, const u8 *file, size_t size);
std::string describe(const Code &code, const Inst &inst);
void run(const Arch &arch, const Launch &launch);
void unknown(Wave &, const Inst &);

// The operation of an encoding; null if the emulator has none. Names are those of gfx11.
const Op *find_op(Family family, const char *encoding, u32 opcode);

[[noreturn]] void fault(Wave &w, const Inst &in, const std::string &what);

// ---- operands, for the files with operations -------------------------------------------------

u32 read_scalar(Wave &w, const Operand &o);
u64 read_scalar64(Wave &w, const Operand &o);
void write_scalar(Wave &w, u32 reg, u32 value);
void write_scalar64(Wave &w, u32 reg, u64 value);
void write_lanes(Wave &w, const Inst &in, u32 reg, const Lanes &value, u64 live);
void run_vector(Wave &w, const Inst &in);

// The registered operations by name.
const Op *op_named(const std::string &name);
struct Register {
    Register(std::initializer_list<Op> ops);
};

inline f32 from_half(u32 h) { return _cvtsh_ss(u16(h)); }
inline u16 to_half(f32 f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
u16 to_half_toward_zero(f32 f);

}  // namespace amd
