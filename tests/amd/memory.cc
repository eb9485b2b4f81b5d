// Memory instructions: LDS, global, scratch and scalar loads, each access checked.

#include <mutex>

#include "core.h"

namespace amd {

// ---- what was allocated ----------------------------------------------------------------------

Memory &memory() {
    static Memory all;
    return all;
}

void Memory::add(u64 begin, u64 size, bool writable) {
    std::unique_lock lock(mutex_);
    ranges_[begin] = {begin, begin + size, writable};
}
void Memory::remove(u64 begin) {
    std::unique_lock lock(mutex_);
    ranges_.erase(begin);
}
Range Memory::find(u64 address) const {
    std::shared_lock lock(mutex_);
    auto after = ranges_.upper_bound(address);
    if (after == ranges_.begin()) return {};
    Range r = std::prev(after)->second;
    return address < r.end ? r : Range{};
}
u64 Memory::size_of(u64 begin) const {
    std::shared_lock lock(mutex_);
    auto found = ranges_.find(begin);
    return found == ranges_.end() ? 0 : found->second.end - begin;
}
std::string Memory::nearest(u64 address) const {
    std::shared_lock lock(mutex_);
    auto after = ranges_.upper_bound(address);
    if (after == ranges_.begin()) return "no allocation is below it";
    Range r = std::prev(after)->second;
    return format("%llu bytes past the end of an allocation of %llu bytes",
                  (unsigned long long)(address - r.end), (unsigned long long)(r.end - r.begin));
}

namespace {

// ---- checked accesses ------------------------------------------------------------------------

template <class F> inline void each_lane(u64 live, F f) {
    for (; live; live &= live - 1) f(__builtin_ctzll(live));
}

u8 *global(Wave &w, const Inst &in, int lane, u64 address, u32 size, bool write) {
    if (address < w.near.begin || address + size > w.near.end || (write && !w.near.writable)) {
        Range r = memory().find(address);
        if (address + size > r.end || r.end == 0) {
            const char *what = write ? "writes" : "reads";
            if (address >= SHARED_BASE && address < SHARED_BASE + (1ull << 32))
                fault(w, in, format("lane %d %s global memory through an LDS pointer (0x%llx)",
                                    lane, what, (unsigned long long)address));
            fault(w, in, format("lane %d %s %u bytes out of bounds at 0x%llx: %s", lane, what, size,
                                (unsigned long long)address,
                                memory().nearest(r.end ? r.end : address).c_str()));
        }
        if (write && !r.writable)
            fault(w, in, format("lane %d writes to memory that is read-only", lane));
        w.near = r;
    }
    return reinterpret_cast<u8 *>(address);
}

enum class Access { read, write, atomic };

u8 *shared(Wave &w, const Inst &in, int lane, u32 address, u32 size, Access access, const u8 *value) {
    Group &g = *w.group;
    if (u64(address) + size > g.lds.size())
        fault(w, in, format("lane %d %s %u bytes of LDS out of bounds at %u: the group has %zu",
                            lane, access == Access::read ? "reads" : "writes", size, address,
                            g.lds.size()));
    u8 *at = g.lds.data() + address;
    u32 me = w.epoch * 64 + u32(w.index);
    auto other = [&](u32 tag) { return tag / 64 == w.epoch && tag % 64 != u32(w.index); };
    for (u32 i = address / 2; i <= (address + size - 1) / 2; i++) {
        Shadow &shadow = g.shadow[i];
        if (access != Access::write && !shadow.written)
            fault(w, in, format("lane %d reads LDS at %u, which nothing has written", lane, i * 2));
        if (access == Access::atomic) {
            shadow.written |= 1;
            continue;
        }
        if (access == Access::read) {
            if (size > 1 && other(shadow.written))
                fault(w, in, format("lane %d reads LDS at %u, which wave %u wrote with no barrier "
                                    "between", lane, i * 2, shadow.written % 64));
            shadow.read = other(shadow.read) ? w.epoch * 64 + SEVERAL : me;
            continue;
        }
        // A write of what is there already harms nobody.
        bool same = shadow.written && size > 1 &&
                    !std::memcmp(g.lds.data() + 2 * i, value + (2 * i - address), 2);
        if (same) continue;
        if (size > 1 && other(shadow.read))
            fault(w, in, format("lane %d writes LDS at %u, which another wave read with no barrier "
                                "between", lane, i * 2));
        if (size > 1 && other(shadow.written))
            fault(w, in, format("lane %d writes LDS at %u, which wave %u wrote with no barrier "
                                "between", lane, i * 2, shadow.written % 64));
        shadow.written = me;
    }
    return at;
}

u8 *private_memory(Wave &w, const Inst &in, int lane, i64 address, u32 size) {
    if (address < 0 || u64(address) + size > w.scratch_size)
        fault(w, in, format("lane %d accesses %u bytes of scratch out of bounds at %lld: it has %u",
                            lane, size, (long long)address, w.scratch_size));
    return w.scratch.data() + u64(lane) * w.scratch_size + u64(address);
}

// Where a flat, global or scratch instruction of a lane goes.
enum Segment { FLAT, SCRATCH, GLOBAL, BUFFER };

u8 *flat(Wave &w, const Inst &in, int lane, u32 size, bool write, const u8 *value) {
    const Lanes *v = in.address >= VGPR ? &w.v[in.address - VGPR] : nullptr;
    Segment segment = Segment(in.immediate);
    i64 offset = in.offset;
    if (segment == SCRATCH || segment == BUFFER) {
        // Offsets of waves count the bytes of all lanes.
        u32 scale = segment == BUFFER ? u32(w.width) : 1;
        if (in.scalar_address < 128) offset += i32(w.s[in.scalar_address] / scale);
        if (v) offset += i32(v->x[lane]);
        return private_memory(w, in, lane, offset, size);
    }
    u64 address;
    if (in.scalar_address < 128)
        address = (w.s[in.scalar_address] | u64(w.s[in.scalar_address + 1]) << 32) + v->x[lane];
    else
        address = v[0].x[lane] | u64(v[1].x[lane]) << 32;
    address += u64(offset);
    if (segment == FLAT && address >> 32 == SHARED_BASE >> 32)
        return shared(w, in, lane, u32(address), size, write ? Access::write : Access::read, value);
    if (segment == FLAT && address >> 32 == PRIVATE_BASE >> 32)
        return private_memory(w, in, lane, u32(address), size);
    return global(w, in, lane, address, size, write);
}

void store_lane(Wave &w, u32 reg, int lane, u32 value) { w.v[reg - VGPR].x[lane] = value; }
u32 lane_value(Wave &w, u32 reg, int lane) { return w.v[reg - VGPR].x[lane]; }

// A value narrower than a register, as it arrives there.
enum Part { WHOLE, LOW, HIGH };

template <u32 Size, bool Signed, Part P> u32 widened(const u8 *from, u32 old) {
    u32 x = 0;
    std::memcpy(&x, from, Size < 4 ? Size : 4);
    if (Signed) x = Size == 1 ? u32(i32(int8_t(x))) : u32(i32(i16(x)));
    if (P == LOW) return (old & 0xffff0000) | (x & 0xffff);
    if (P == HIGH) return (old & 0xffff) | x << 16;
    return x;
}

template <u32 Size, bool Signed = false, Part P = WHOLE> void flat_load(Wave &w, const Inst &in) {
    Lanes loaded[Size < 4 ? 1 : Size / 4];
    each_lane(w.exec(), [&](int i) {
        const u8 *from = flat(w, in, i, Size, false, nullptr);
        if constexpr (Size < 4) {
            loaded[0].x[i] = widened<Size, Signed, P>(from, lane_value(w, in.dst, i));
        } else {
            u32 x[Size / 4];
            std::memcpy(x, from, Size);
            for (u32 k = 0; k < Size / 4; k++) loaded[k].x[i] = x[k];
        }
    });
    for (u32 k = 0; k < (Size < 4 ? 1 : Size / 4); k++)
        write_lanes(w, in, in.dst - VGPR + k, loaded[k], w.exec());
}

template <u32 Size, Part P = WHOLE> void flat_store(Wave &w, const Inst &in) {
    each_lane(w.exec(), [&](int i) {
        u32 x[Size < 4 ? 1 : Size / 4];
        for (u32 k = 0; k < (Size < 4 ? 1 : Size / 4); k++) x[k] = lane_value(w, in.data + k, i);
        if (P == HIGH) x[0] >>= 16;
        const u8 *value = reinterpret_cast<const u8 *>(x);
        std::memcpy(flat(w, in, i, Size, true, value), x, Size);
    });
}

template <class T> T from_lanes(Wave &w, u32 reg, int lane) {
    if constexpr (sizeof(T) == 4) return bits<T>(lane_value(w, reg, lane));
    else return bits<T>(lane_value(w, reg, lane) | u64(lane_value(w, reg + 1, lane)) << 32);
}
template <class T> void to_lanes(Wave &w, u32 reg, int lane, T value) {
    if constexpr (sizeof(T) == 4) {
        store_lane(w, reg, lane, bits<u32>(value));
    } else {
        store_lane(w, reg, lane, u32(bits<u64>(value)));
        store_lane(w, reg + 1, lane, u32(bits<u64>(value) >> 32));
    }
}

// F(old, operand, compared with) is the new value. Groups run on several threads.
template <class T, class F> T update(u8 *at, T operand, T compare, F f) {
    using Word = std::conditional_t<sizeof(T) == 4, u32, u64>;
    Word *word = reinterpret_cast<Word *>(at), old = __atomic_load_n(word, __ATOMIC_SEQ_CST);
    while (!__atomic_compare_exchange_n(word, &old, bits<Word>(f(bits<T>(old), operand, compare)),
                                        false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
    return bits<T>(old);
}

template <class T, class F> void flat_atomic(Wave &w, const Inst &in, F f) {
    // One lane after another; the order is hardware's choice.
    each_lane(w.exec(), [&](int i) {
        T operand = from_lanes<T>(w, in.data, i);
        T compare = from_lanes<T>(w, in.data + sizeof(T) / 4, i);
        u8 *at = flat(w, in, i, sizeof(T), true, reinterpret_cast<u8 *>(&operand));
        if (reinterpret_cast<u64>(at) % sizeof(T))
            fault(w, in, format("lane %d: an atomic access that is not aligned", i));
        T old = update<T>(at, operand, compare, f);
        if (in.returns) to_lanes(w, in.dst, i, old);
    });
}

template <class T, class F> void lds_atomic(Wave &w, const Inst &in, F f, bool swapped = false) {
    w.pending = w.pending << 1 | 1;
    each_lane(w.exec(), [&](int i) {
        T operand = from_lanes<T>(w, swapped ? in.data1 : in.data, i);
        T compare = from_lanes<T>(w, swapped ? in.data : in.data1, i);
        u32 address = lane_value(w, in.address, i) + u32(in.offset);
        u8 *at = shared(w, in, i, address, sizeof(T), Access::atomic, nullptr);
        T old = update<T>(at, operand, compare, f);
        if (in.returns) to_lanes(w, in.dst, i, old);
    });
}

u32 lds_address(Wave &w, const Inst &in, int lane, u32 offset) {
    return lane_value(w, in.address, lane) + offset;
}

template <u32 Size, bool Signed = false, Part P = WHOLE> void lds_load(Wave &w, const Inst &in) {
    w.pending = w.pending << 1 | 1;
    Lanes loaded[Size < 4 ? 1 : Size / 4];
    each_lane(w.exec(), [&](int i) {
        const u8 *from = shared(w, in, i, lds_address(w, in, i, u32(in.offset)), Size, Access::read, nullptr);
        if constexpr (Size < 4) {
            loaded[0].x[i] = widened<Size, Signed, P>(from, lane_value(w, in.dst, i));
        } else {
            u32 x[Size / 4];
            std::memcpy(x, from, Size);
            for (u32 k = 0; k < Size / 4; k++) loaded[k].x[i] = x[k];
        }
    });
    for (u32 k = 0; k < (Size < 4 ? 1 : Size / 4); k++)
        write_lanes(w, in, in.dst - VGPR + k, loaded[k], w.exec());
}

template <u32 Size, Part P = WHOLE> void lds_store(Wave &w, const Inst &in) {
    w.pending = w.pending << 1 | 1;
    each_lane(w.exec(), [&](int i) {
        u32 x[Size < 4 ? 1 : Size / 4];
        for (u32 k = 0; k < (Size < 4 ? 1 : Size / 4); k++) x[k] = lane_value(w, in.data + k, i);
        if (P == HIGH) x[0] >>= 16;
        const u8 *value = reinterpret_cast<const u8 *>(x);
        std::memcpy(shared(w, in, i, lds_address(w, in, i, u32(in.offset)), Size, Access::write, value), x, Size);
    });
}

// Two values at offsets counted in values, or in 64 values.
template <u32 Words, u32 Stride> void lds_load2(Wave &w, const Inst &in) {
    w.pending = w.pending << 1 | 1;
    Lanes loaded[2 * Words];
    u32 offsets[2] = {u32(in.offset) & 255, in.offset1};
    each_lane(w.exec(), [&](int i) {
        for (u32 k = 0; k < 2; k++) {
            u32 address = lds_address(w, in, i, offsets[k] * Words * 4 * Stride), x[Words];
            std::memcpy(x, shared(w, in, i, address, Words * 4, Access::read, nullptr), Words * 4);
            for (u32 j = 0; j < Words; j++) loaded[k * Words + j].x[i] = x[j];
        }
    });
    for (u32 k = 0; k < 2 * Words; k++) write_lanes(w, in, in.dst - VGPR + k, loaded[k], w.exec());
}

template <u32 Words, u32 Stride> void lds_store2(Wave &w, const Inst &in) {
    w.pending = w.pending << 1 | 1;
    u32 offsets[2] = {u32(in.offset) & 255, in.offset1};
    each_lane(w.exec(), [&](int i) {
        for (u32 k = 0; k < 2; k++) {
            u32 address = lds_address(w, in, i, offsets[k] * Words * 4 * Stride), x[Words];
            for (u32 j = 0; j < Words; j++) x[j] = lane_value(w, (k ? in.data1 : in.data) + j, i);
            const u8 *value = reinterpret_cast<const u8 *>(x);
            std::memcpy(shared(w, in, i, address, Words * 4, Access::write, value), x, Words * 4);
        }
    });
}

// ---- exchanges between lanes, which use LDS hardware and no LDS ---------------------------------

void bpermute(Wave &w, const Inst &in) {
    w.pending <<= 1;
    const Lanes from = w.v[in.data - VGPR], &at = w.v[in.address - VGPR];
    Lanes out;
    u64 exec = w.exec();
    for (int i = 0; i < w.width; i++) {
        u32 lane = (at.x[i] + u32(in.offset)) / 4 & u32(w.width - 1);
        out.x[i] = exec >> lane & 1 ? from.x[lane] : 0;
    }
    write_lanes(w, in, in.dst - VGPR, out, exec);
}

void permute(Wave &w, const Inst &in) {
    w.pending <<= 1;
    const Lanes from = w.v[in.data - VGPR], &at = w.v[in.address - VGPR];
    Lanes out = {};
    each_lane(w.exec(), [&](int i) {
        out.x[(at.x[i] + u32(in.offset)) / 4 & u32(w.width - 1)] = from.x[i];
    });
    write_lanes(w, in, in.dst - VGPR, out, w.exec());
}

void swizzle(Wave &w, const Inst &in) {
    w.pending <<= 1;
    const Lanes from = w.v[in.address - VGPR];
    Lanes out;
    u32 pattern = u32(in.offset);
    if (pattern >= 0xc000) fault(w, in, "this mode of ds_swizzle is not emulated");
    for (u32 i = 0; i < u32(w.width); i++) {
        u32 lane = pattern & 0x8000
                       ? (i & ~3u) + (pattern >> 2 * (i & 3) & 3)
                       : (i & ~31u) + ((((i & 31) & (pattern & 31)) | (pattern >> 5 & 31)) ^ (pattern >> 10 & 31));
        out.x[i] = w.exec() >> lane & 1 ? from.x[lane] : 0;
    }
    write_lanes(w, in, in.dst - VGPR, out, w.exec());
}

// ---- scalar loads ----------------------------------------------------------------------------

template <u32 Words> void scalar_load(Wave &w, const Inst &in) {
    u64 address = w.s[in.address] | u64(w.s[in.address + 1]) << 32;
    address += u64(i64(in.offset));
    if (in.scalar_address < 128) address += read_scalar(w, {in.scalar_address});
    u32 x[Words];
    std::memcpy(x, global(w, in, 0, address & ~3ull, Words * 4, false), Words * 4);
    for (u32 k = 0; k < Words; k++) write_scalar(w, in.dst + k, x[k]);
}

void nothing(Wave &, const Inst &) {}

// ---- tables ----------------------------------------------------------------------------------

#define ATOMICS(NAME, T, EXPR)                                                                  \
    {"flat_atomic_" #NAME, [](Wave &w, const Inst &in) {                                        \
         flat_atomic<T>(w, in, [](T a, T b, T c) -> T { (void)a, (void)b, (void)c; return EXPR; }); \
     }},                                                                                        \
    {"ds_" #NAME, [](Wave &w, const Inst &in) {                                                 \
         lds_atomic<T>(w, in, [](T a, T b, T c) -> T { (void)a, (void)b, (void)c; return EXPR; }); \
     }}
#define LOADS(SEGMENT, FN)                                                                      \
    {SEGMENT "_load_u8", FN##_load<1>}, {SEGMENT "_load_i8", FN##_load<1, true>},               \
    {SEGMENT "_load_u16", FN##_load<2>}, {SEGMENT "_load_i16", FN##_load<2, true>},             \
    {SEGMENT "_load_b32", FN##_load<4>}, {SEGMENT "_load_b64", FN##_load<8>},                   \
    {SEGMENT "_load_b96", FN##_load<12>}, {SEGMENT "_load_b128", FN##_load<16>},                \
    {SEGMENT "_store_b8", FN##_store<1>}, {SEGMENT "_store_b16", FN##_store<2>},                \
    {SEGMENT "_store_b32", FN##_store<4>}, {SEGMENT "_store_b64", FN##_store<8>},               \
    {SEGMENT "_store_b96", FN##_store<12>}, {SEGMENT "_store_b128", FN##_store<16>}

const Register memory_ops{
    LOADS("flat", flat),
    {"flat_load_d16_u8", flat_load<1, false, LOW>}, {"flat_load_d16_i8", flat_load<1, true, LOW>},
    {"flat_load_d16_b16", flat_load<2, false, LOW>},
    {"flat_load_d16_hi_u8", flat_load<1, false, HIGH>},
    {"flat_load_d16_hi_i8", flat_load<1, true, HIGH>},
    {"flat_load_d16_hi_b16", flat_load<2, false, HIGH>},
    {"flat_store_d16_hi_b8", flat_store<1, HIGH>}, {"flat_store_d16_hi_b16", flat_store<2, HIGH>},

    LOADS("ds", lds),
    {"ds_load_u8_d16", lds_load<1, false, LOW>}, {"ds_load_i8_d16", lds_load<1, true, LOW>},
    {"ds_load_u16_d16", lds_load<2, false, LOW>},
    {"ds_load_u8_d16_hi", lds_load<1, false, HIGH>}, {"ds_load_i8_d16_hi", lds_load<1, true, HIGH>},
    {"ds_load_u16_d16_hi", lds_load<2, false, HIGH>},
    {"ds_store_b8_d16_hi", lds_store<1, HIGH>}, {"ds_store_b16_d16_hi", lds_store<2, HIGH>},
    {"ds_load_2addr_b32", lds_load2<1, 1>}, {"ds_load_2addr_b64", lds_load2<2, 1>},
    {"ds_load_2addr_stride64_b32", lds_load2<1, 64>},
    {"ds_load_2addr_stride64_b64", lds_load2<2, 64>},
    {"ds_store_2addr_b32", lds_store2<1, 1>}, {"ds_store_2addr_b64", lds_store2<2, 1>},
    {"ds_store_2addr_stride64_b32", lds_store2<1, 64>},
    {"ds_store_2addr_stride64_b64", lds_store2<2, 64>},
    {"ds_bpermute_b32", bpermute}, {"ds_permute_b32", permute}, {"ds_swizzle_b32", swizzle},
    {"ds_nop", nothing},

    ATOMICS(add_u32, u32, a + b), ATOMICS(sub_u32, u32, a - b),
    ATOMICS(min_i32, i32, a < b ? a : b), ATOMICS(max_i32, i32, a > b ? a : b),
    ATOMICS(min_u32, u32, a < b ? a : b), ATOMICS(max_u32, u32, a > b ? a : b),
    ATOMICS(and_b32, u32, a &b), ATOMICS(or_b32, u32, a | b), ATOMICS(xor_b32, u32, a ^ b),
    ATOMICS(swap_b32, u32, b), ATOMICS(cmpswap_b32, u32, a == c ? b : a),
    ATOMICS(add_f32, f32, a + b), ATOMICS(min_f32, f32, a < b ? a : b),
    ATOMICS(max_f32, f32, a > b ? a : b), ATOMICS(add_u64, u64, a + b),
    ATOMICS(swap_b64, u64, b), ATOMICS(cmpswap_b64, u64, a == c ? b : a),
    ATOMICS(min_i64, i64, a < b ? a : b), ATOMICS(max_i64, i64, a > b ? a : b),
    ATOMICS(min_u64, u64, a < b ? a : b), ATOMICS(max_u64, u64, a > b ? a : b),
    ATOMICS(inc_u32, u32, a >= b ? 0 : a + 1),
    ATOMICS(dec_u32, u32, a == 0 || a > b ? b : a - 1),

    {"ds_cmpst_b32", [](Wave &w, const Inst &in) {  // operands the other way round
         lds_atomic<u32>(w, in, [](u32 a, u32 b, u32 c) { return a == c ? b : a; }, true);
     }},

    {"s_load_b32", scalar_load<1>}, {"s_load_b64", scalar_load<2>},
    {"s_load_b128", scalar_load<4>}, {"s_load_b256", scalar_load<8>},
    {"s_load_b512", scalar_load<16>},

    // There are no caches.
    {"buffer_gl0_inv", nothing}, {"buffer_gl1_inv", nothing}, {"buffer_inv", nothing},
    {"buffer_wbl2", nothing}, {"buffer_wbinvl1", nothing}, {"buffer_wbinvl1_vol", nothing},
};

}  // namespace
}  // namespace amd
