// Reading and writing operands, the frame of vector instructions, and scalar instructions.

#include "core.h"

namespace amd {

// ---- scalar operands -------------------------------------------------------------------------

namespace {

bool is_null(const Wave &w, u32 reg) {
    return reg == (w.group->arch.family == Family::gfx11 ? 124u : 125u);
}

}  // namespace

u32 read_scalar(Wave &w, const Operand &o) {
    if (o.code < 128) return is_null(w, o.code) ? 0 : w.s[o.code];
    switch (o.code) {
        case 235: return 0;
        case 237: return 0;
        case 251: return w.vcc() == 0;
        case 252: return w.exec() == 0;
        case 253: return w.scc;
        default: return u32(o.value);
    }
}

u64 read_scalar64(Wave &w, const Operand &o) {
    if (o.code < 128) return is_null(w, o.code) ? 0 : w.s[o.code] | u64(w.s[o.code + 1]) << 32;
    if (o.code == 235) return SHARED_BASE;
    if (o.code == 237) return PRIVATE_BASE;
    return o.code >= 251 && o.code <= 253 ? read_scalar(w, o) : o.value;
}

void write_scalar(Wave &w, u32 reg, u32 value) {
    if (!is_null(w, reg)) w.s[reg] = value;
}

void write_scalar64(Wave &w, u32 reg, u64 value) {
    if (is_null(w, reg)) return;
    w.s[reg] = u32(value);
    w.s[reg + 1] = u32(value >> 32);
}

void Wave::put_mask(u32 reg, u64 m) {
    if (is_null(*this, reg)) return;
    s[reg] = u32(m);
    if (width == 64) s[reg + 1] = u32(m >> 32);
}

const Lanes &Wave::lanes_of(u64 m) {
    if (m != masked) {
        for (int i = 0; i < LANES; i++) mask.x[i] = u32(-i32(m >> i & 1));
        masked = m;
    }
    return mask;
}

// ---- vector operands -------------------------------------------------------------------------

namespace {

// Which lane each lane reads through DPP, and -1 where there is none.
int dpp_lane(const Inst &in, int lane, int width) {
    int row = lane & ~15, in_row = lane & 15;
    if (in.dpp8) return (lane & ~7) + int(in.dpp_control >> 3 * (lane & 7) & 7);
    u32 c = in.dpp_control;
    int amount = int(c & 15), to;
    if (c < 0x100) return (lane & ~3) + int(c >> 2 * (lane & 3) & 3);  // quad_perm
    switch (c & 0x1f0) {
        case 0x100: to = in_row + amount; return to < 16 ? row + to : -1;  // row_shl
        case 0x110: to = in_row - amount; return to >= 0 ? row + to : -1;  // row_shr
        case 0x120: return row + ((in_row - amount) & 15);  // row_ror
        case 0x130:
            if (c == 0x130) return lane + 1 < width ? lane + 1 : -1;  // wave_shl
            if (c == 0x134) return (lane + 1) % width;  // wave_rol
            if (c == 0x138) return lane - 1;  // wave_shr
            return (lane + width - 1) % width;  // wave_ror
        case 0x140:
            if (c == 0x140) return row + 15 - in_row;  // row_mirror
            if (c == 0x141) return (lane & ~7) + 7 - (lane & 7);  // row_half_mirror
            if (c == 0x142) return row ? row - 1 : -1;  // row_bcast:15
            return lane >= 32 ? 31 : -1;  // row_bcast:31
        case 0x150: return row + amount;  // row_share or row_newbcast
        default: return row + (in_row ^ amount);  // row_xmask
    }
}

// Lanes that an instruction with DPP writes.
u64 dpp_live(const Wave &w, const Inst &in) {
    u64 live = 0, exec = w.exec();
    for (int i = 0; i < w.width; i++) {
        if (!in.dpp8 && !(in.row_mask >> (i / 16) & 1 && in.bank_mask >> (i / 4 % 4) & 1)) continue;
        int from = dpp_lane(in, i, w.width);
        bool valid = from >= 0 && (in.fetch_inactive || (exec >> from & 1));
        if (valid || in.bound_ctrl || in.dpp8) live |= 1ull << i;
    }
    return live & exec;
}

u32 selected(u32 x, u8 select, bool sext) {
    if (select < 4) return sext ? u32(i32(int8_t(x >> 8 * select))) : x >> 8 * select & 255;
    if (select < 6) return sext ? u32(i32(i16(x >> 16 * (select - 4)))) : x >> 16 * (select - 4) & 0xffff;
    return x;
}

template <class F> inline void each(int n, F f) {
    for (int j = 0; j < n; j += 32)
        for (int i = j; i < j + 32; i++) f(i);
}

// The values of operand k; `space` is two registers to make them in.
const u32 *fetch(Wave &w, const Inst &in, int k, Lanes *space) {
    const Operand &o = in.src[k];
    Type type = in.op->src[k];
    int n = w.width;
    bool vector = o.code >= VGPR, wide = is_wide(type);
    if (vector && o.plain && !(k == 0 && in.dpp)) return w.v[o.code - VGPR].x;
    Lanes *out = space;
    if (type == Type::mask) {
        u64 m = w.get_mask(o.code);
        each(n, [&](int i) { out->x[i] = m >> i & 1; });
        return out->x;
    }
    if (vector) {
        const Lanes *from = &w.v[o.code - VGPR];
        out[0] = from[0];
        if (wide) out[1] = from[1];
        if (k == 0 && in.dpp)
            for (int i = 0; i < n; i++) {
                int lane = dpp_lane(in, i, n);
                bool valid = lane >= 0 && (in.fetch_inactive || (w.exec() >> lane & 1));
                out->x[i] = valid ? from->x[lane] : 0;
            }
    } else {
        u64 value = wide ? read_scalar64(w, o) : read_scalar(w, o);
        each(n, [&](int i) { out->x[i] = u32(value); });
        if (wide) each(n, [&](int i) { out[1].x[i] = u32(value >> 32); });
        if (o.plain) return out->x;
    }
    if (in.sdwa && k < 2 && (in.src_select[k] != 6 || in.src_sext[k]))
        each(n, [&](int i) { out->x[i] = selected(out->x[i], in.src_select[k], in.src_sext[k]); });
    if (type == Type::pk16) {
        u32 sign = (o.negate ? 0x8000u : 0) | (o.negate_high ? 0x80000000u : 0);
        u32 low = o.low_from_high ? 16 : 0, high = o.high_from_high ? 16 : 0;
        each(n, [&](int i) {
            u32 x = out->x[i];
            out->x[i] = ((x >> low & 0xffff) | (x >> high) << 16) ^ sign;
        });
        return out->x;
    }
    if (type == Type::pk32) {
        u32 low = o.negate ? 1u << 31 : 0, high = o.negate_high ? 1u << 31 : 0;
        each(n, [&](int i) {
            u32 x[2] = {out[0].x[i], out[1].x[i]};
            out[0].x[i] = x[o.low_from_high] ^ low;
            out[1].x[i] = x[o.high_from_high] ^ high;
        });
        return out->x;
    }
    if (type == Type::mix) {
        bool half = o.high_from_high;
        u32 shift = o.low_from_high ? 16 : 0;
        u32 keep = o.negate_high ? 0x7fffffffu : ~0u, sign = o.negate ? 1u << 31 : 0;
        if (half) each(n, [&](int i) { out->x[i] = bits<u32>(from_half(u16(out->x[i] >> shift))); });
        each(n, [&](int i) { out->x[i] = (out->x[i] & keep) ^ sign; });
        return out->x;
    }
    if (is_half(type) && o.low_from_high) each(n, [&](int i) { out->x[i] >>= 16; });
    if (o.absolute || o.negate) {
        u32 sign = type == Type::f16 ? 0x8000u : 0x80000000u;
        Lanes &top = out[type == Type::f64];
        u32 keep = o.absolute ? ~sign : ~0u, flip = o.negate ? sign : 0;
        each(n, [&](int i) { top.x[i] = (top.x[i] & keep) ^ flip; });
    }
    return out->x;
}

void modify_output(const Inst &in, Lanes &out, int n) {
    static const f32 factor[] = {1, 2, 4, 0.5f};
    if (in.op->d == Type::f32) {
        each(n, [&](int i) {
            f32 x = bits<f32>(out.x[i]) * factor[in.omod];
            if (in.clamp) x = x > 0 ? (x < 1 ? x : 1) : 0;
            out.x[i] = bits<u32>(x);
        });
    } else if (in.op->d == Type::f16) {
        each(n, [&](int i) {
            f32 x = from_half(u16(out.x[i])) * factor[in.omod];
            if (in.clamp) x = x > 0 ? (x < 1 ? x : 1) : 0;
            out.x[i] = to_half(x);
        });
    }
}

u64 gather(const Lanes &flags, int n) {
    u64 out = 0;
    for (int j = 0; j < n; j += 32) {
        u32 m = 0;
        for (int i = 0; i < 32; i++) m |= (flags.x[j + i] & 1) << i;
        out |= u64(m) << j;
    }
    return out;
}

}  // namespace

void write_lanes(Wave &w, const Inst &, u32 reg, const Lanes &value, u64 live) {
    Lanes &d = w.v[reg];
    if (live == w.all()) {
        std::memcpy(d.x, value.x, size_t(w.width) * 4);
        return;
    }
    const Lanes &m = w.lanes_of(live);
    each(w.width, [&](int i) { d.x[i] = (value.x[i] & m.x[i]) | (d.x[i] & ~m.x[i]); });
}

namespace {

// A 16-bit result, or one selected by SDWA, changes a part of the register.
void write_part(Wave &w, const Inst &in, Lanes &out, u64 live) {
    const Lanes &old = w.v[in.dst];
    int n = w.width;
    if (in.sdwa && in.dst_select != 6) {
        u32 shift = in.dst_select < 4 ? 8 * in.dst_select : 16 * (in.dst_select - 4u);
        u32 field = (in.dst_select < 4 ? 0xffu : 0xffffu) << shift;
        each(n, [&](int i) {
            u32 x = out.x[i] << shift & field;
            if (in.dst_unused == 1)  // sign extension
                x = (x & field) == 0 || !(x >> (31 - __builtin_clz(field)) & 1) ? x : x | ~(field | (field - 1));
            out.x[i] = in.dst_unused == 2 ? (old.x[i] & ~field) | x : x;
        });
    } else if (in.dst_high) {
        each(n, [&](int i) { out.x[i] = (old.x[i] & 0xffff) | out.x[i] << 16; });
    } else if (!in.zero_high && !in.sdwa) {
        each(n, [&](int i) { out.x[i] = (old.x[i] & 0xffff0000) | (out.x[i] & 0xffff); });
    }
    write_lanes(w, in, in.dst, out, live);
}

void finish(Wave &w, const Inst &in, Lanes *out) {
    u64 live = in.dpp ? dpp_live(w, in) : w.exec();
    Type d = in.op->d;
    if (d == Type::mask) {
        u64 m = gather(out[0], w.width) & live;
        if (!in.writes_exec || w.group->arch.family == Family::gfx9) w.put_mask(in.sdst, m);
        if (in.writes_exec) w.set_exec(m);
        return;
    }
    if (in.op->carries) w.put_mask(in.sdst, gather(out[is_wide(d) ? 2 : 1], w.width) & live);
    if (in.omod || in.clamp) modify_output(in, out[0], w.width);
    if (is_half(d) || (in.sdwa && in.dst_select != 6)) {
        write_part(w, in, out[0], live);
        return;
    }
    write_lanes(w, in, in.dst, out[0], live);
    if (is_wide(d)) write_lanes(w, in, in.dst + 1, out[1], live);
}

void compute(Wave &w, const Inst &in, Lanes *out) {
    Lanes space[3][2];
    const u32 *operand[3] = {};
    for (int k = 0; k < 3; k++)
        if (in.op->src[k] != Type::none) operand[k] = fetch(w, in, k, space[k]);
    in.op->compute(out, operand[0], operand[1], operand[2], w.width);
}

}  // namespace

void run_vector(Wave &w, const Inst &in) {
    Lanes out[3];
    compute(w, in, out);
    if (in.second) {  // both halves of a dual instruction read before either writes
        Lanes other[3];
        compute(w, *in.second, other);
        finish(w, *in.second, other);
    }
    finish(w, in, out);
}

// ---- scalar instructions ---------------------------------------------------------------------

namespace {

i32 s(u32 a) { return i32(a); }

// The result and SCC from operands a and b and the old SCC.
struct Result {
    u32 value;
    bool scc;
};
struct Result64 {
    u64 value;
    bool scc;
};
Result keep(Wave &w, u32 value) { return {value, w.scc}; }
Result64 keep(Wave &w, u64 value) { return {value, w.scc}; }
Result nonzero(u32 value) { return {value, value != 0}; }
Result64 nonzero(u64 value) { return {value, value != 0}; }
Result with(u64 wide) { return {u32(wide), (wide >> 32 & 1) != 0}; }
Result overflow(i64 wide) { return {u32(wide), wide != i32(wide)}; }

#define SOP(NAME, A, B, READ_A, READ_B, WRITE, ...)                                             \
    {#NAME, [](Wave &w, const Inst &in) {                                                       \
         A a = READ_A(w, in.src[0]);                                                            \
         B b = READ_B(w, in.src[1]);                                                            \
         (void)a, (void)b;                                                                      \
         auto r = __VA_ARGS__;                                                                  \
         WRITE(w, in.dst, r.value);                                                             \
         w.scc = r.scc;                                                                         \
     }}
#define S32(NAME, ...) SOP(NAME, u32, u32, read_scalar, read_scalar, write_scalar, __VA_ARGS__)
#define S64(NAME, ...) SOP(NAME, u64, u64, read_scalar64, read_scalar64, write_scalar64, __VA_ARGS__)
#define S64_32(NAME, ...) SOP(NAME, u64, u32, read_scalar64, read_scalar, write_scalar64, __VA_ARGS__)
#define S32_64(NAME, ...) SOP(NAME, u64, u32, read_scalar64, read_scalar, write_scalar, __VA_ARGS__)
#define CMP(NAME, EXPR)                                                                         \
    {#NAME, [](Wave &w, const Inst &in) {                                                       \
         u32 a = read_scalar(w, in.src[0]), b = read_scalar(w, in.src[1]);                      \
         w.scc = EXPR;                                                                          \
     }}
#define CMP64(NAME, EXPR)                                                                       \
    {#NAME, [](Wave &w, const Inst &in) {                                                       \
         u64 a = read_scalar64(w, in.src[0]), b = read_scalar64(w, in.src[1]);                  \
         w.scc = EXPR;                                                                          \
     }}
#define BITS(NAME, EXPR) S32(NAME##_b32, nonzero(u32(EXPR))), S64(NAME##_b64, nonzero(u64(EXPR)))

u64 field64(u64 a, u32 b) {
    u32 offset = b & 63, width = b >> 16 & 127;
    u64 x = a >> offset;
    return width >= 64 ? x : x & ((1ull << width) - 1);
}
i64 signed_field64(u64 a, u32 b) {
    u32 width = b >> 16 & 127;
    if (width == 0) return 0;
    u64 x = field64(a, b);
    return width >= 64 ? i64(x) : i64(x << (64 - width)) >> (64 - width);
}

const Register arithmetic{
    S32(s_mov_b32, keep(w, a)), S64(s_mov_b64, keep(w, a)),
    {"s_cmov_b32", [](Wave &w, const Inst &in) {
         if (w.scc) write_scalar(w, in.dst, read_scalar(w, in.src[0]));
     }},
    S32(s_not_b32, nonzero(~a)), S64(s_not_b64, nonzero(~a)),
    S32(s_brev_b32, keep(w, [](u32 x) {
        u32 r = 0;
        for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
        return r;
    }(a))),
    S32(s_ctz_i32_b32, keep(w, a ? u32(__builtin_ctz(a)) : ~0u)),
    S32_64(s_ctz_i32_b64, keep(w, a ? u32(__builtin_ctzll(a)) : ~0u)),
    S32(s_clz_i32_u32, keep(w, a ? u32(__builtin_clz(a)) : ~0u)),
    S32_64(s_clz_i32_u64, keep(w, a ? u32(__builtin_clzll(a)) : ~0u)),
    S32(s_cls_i32, keep(w, a == 0 || a == ~0u ? ~0u : u32(__builtin_clrsb(s(a)) + 1))),
    S32(s_bcnt1_i32_b32, nonzero(u32(__builtin_popcount(a)))),
    S32_64(s_bcnt1_i32_b64, nonzero(u32(__builtin_popcountll(a)))),
    S32(s_sext_i32_i8, keep(w, u32(i32(int8_t(a))))), S32(s_sext_i32_i16, keep(w, u32(i32(i16(a))))),
    S32(s_abs_i32, nonzero(u32(s(a) < 0 ? -a : a))),
    {"s_bitset0_b32", [](Wave &w, const Inst &in) {
         write_scalar(w, in.dst, w.s[in.dst] & ~(1u << (read_scalar(w, in.src[0]) & 31)));
     }},
    {"s_bitset1_b32", [](Wave &w, const Inst &in) {
         write_scalar(w, in.dst, w.s[in.dst] | 1u << (read_scalar(w, in.src[0]) & 31));
     }},

    S32(s_add_u32, with(u64(a) + b)), S32(s_sub_u32, with(u64(a) - b)),
    S32(s_addc_u32, with(u64(a) + b + w.scc)), S32(s_subb_u32, with(u64(a) - b - w.scc)),
    S32(s_add_i32, overflow(i64(s(a)) + s(b))), S32(s_sub_i32, overflow(i64(s(a)) - s(b))),
    S32(s_absdiff_i32, nonzero(u32(s(a) > s(b) ? a - b : b - a))),
    S32(s_min_i32, Result{s(a) < s(b) ? a : b, s(a) < s(b)}),
    S32(s_max_i32, Result{s(a) > s(b) ? a : b, s(a) > s(b)}),
    S32(s_min_u32, Result{a < b ? a : b, a < b}), S32(s_max_u32, Result{a > b ? a : b, a > b}),
    S32(s_cselect_b32, keep(w, w.scc ? a : b)), S64(s_cselect_b64, keep(w, w.scc ? a : b)),
    BITS(s_and, a &b), BITS(s_or, a | b), BITS(s_xor, a ^ b), BITS(s_and_not1, a & ~b),
    BITS(s_or_not1, a | ~b), BITS(s_nand, ~(a & b)), BITS(s_nor, ~(a | b)), BITS(s_xnor, ~(a ^ b)),
    S32(s_lshl_b32, nonzero(a << (b & 31))), S64_32(s_lshl_b64, nonzero(a << (b & 63))),
    S32(s_lshr_b32, nonzero(a >> (b & 31))), S64_32(s_lshr_b64, nonzero(a >> (b & 63))),
    S32(s_ashr_i32, nonzero(u32(s(a) >> (b & 31)))),
    S64_32(s_ashr_i64, nonzero(u64(i64(a) >> (b & 63)))),
    S32(s_lshl1_add_u32, with((u64(a) << 1) + b)), S32(s_lshl2_add_u32, with((u64(a) << 2) + b)),
    S32(s_lshl3_add_u32, with((u64(a) << 3) + b)), S32(s_lshl4_add_u32, with((u64(a) << 4) + b)),
    S32(s_bfm_b32, keep(w, ((1u << (a & 31)) - 1) << (b & 31))),
    SOP(s_bfm_b64, u32, u32, read_scalar, read_scalar, write_scalar64,
        keep(w, u64((1ull << (a & 63)) - 1) << (b & 63))),
    S32(s_bfe_u32, nonzero(u32(field64(a, (b & 0x7f001f))))),
    S32(s_bfe_i32, nonzero(u32(signed_field64(u64(i64(s(a))), b & 0x7f001f)))),
    S64_32(s_bfe_u64, nonzero(field64(a, b))), S64_32(s_bfe_i64, nonzero(u64(signed_field64(a, b)))),
    S32(s_mul_i32, keep(w, a *b)), S32(s_mul_hi_u32, keep(w, u32(u64(a) * b >> 32))),
    S32(s_mul_hi_i32, keep(w, u32(u64(i64(s(a)) * s(b)) >> 32))),
    S32(s_pack_ll_b32_b16, keep(w, (a & 0xffff) | b << 16)),
    S32(s_pack_lh_b32_b16, keep(w, (a & 0xffff) | (b & 0xffff0000))),
    S32(s_pack_hh_b32_b16, keep(w, a >> 16 | (b & 0xffff0000))),
    S32(s_pack_hl_b32_b16, keep(w, a >> 16 | b << 16)),
    S32(s_movk_i32, keep(w, b)),
    {"s_cmovk_i32", [](Wave &w, const Inst &in) {
         if (w.scc) write_scalar(w, in.dst, read_scalar(w, in.src[1]));
     }},
    S32(s_addk_i32, overflow(i64(s(a)) + s(b))), S32(s_mulk_i32, keep(w, a *b)),
};

const Register compares{
    CMP(s_cmp_eq_i32, a == b), CMP(s_cmp_lg_i32, a != b), CMP(s_cmp_gt_i32, s(a) > s(b)),
    CMP(s_cmp_ge_i32, s(a) >= s(b)), CMP(s_cmp_lt_i32, s(a) < s(b)),
    CMP(s_cmp_le_i32, s(a) <= s(b)), CMP(s_cmp_eq_u32, a == b), CMP(s_cmp_lg_u32, a != b),
    CMP(s_cmp_gt_u32, a > b), CMP(s_cmp_ge_u32, a >= b), CMP(s_cmp_lt_u32, a < b),
    CMP(s_cmp_le_u32, a <= b), CMP64(s_cmp_eq_u64, a == b), CMP64(s_cmp_lg_u64, a != b),
    CMP(s_bitcmp0_b32, !(a >> (b & 31) & 1)), CMP(s_bitcmp1_b32, (a >> (b & 31) & 1) != 0),
    CMP(s_cmpk_eq_i32, a == b), CMP(s_cmpk_lg_i32, a != b), CMP(s_cmpk_gt_i32, s(a) > s(b)),
    CMP(s_cmpk_ge_i32, s(a) >= s(b)), CMP(s_cmpk_lt_i32, s(a) < s(b)),
    CMP(s_cmpk_le_i32, s(a) <= s(b)), CMP(s_cmpk_eq_u32, a == b), CMP(s_cmpk_lg_u32, a != b),
    CMP(s_cmpk_gt_u32, a > b), CMP(s_cmpk_ge_u32, a >= b), CMP(s_cmpk_lt_u32, a < b),
    CMP(s_cmpk_le_u32, a <= b),
    {"s_bitcmp1_b64", [](Wave &w, const Inst &in) {
         w.scc = read_scalar64(w, in.src[0]) >> (read_scalar(w, in.src[1]) & 63) & 1;
     }},
    {"s_bitcmp0_b64", [](Wave &w, const Inst &in) {
         w.scc = !(read_scalar64(w, in.src[0]) >> (read_scalar(w, in.src[1]) & 63) & 1);
     }},
};

// EXEC becomes f(operand, EXEC); the old one, or for wrexec the new one, goes to the destination.
#define SAVEEXEC(NAME, EXPR)                                                                    \
    {#NAME "_saveexec_b64", [](Wave &w, const Inst &in) {                                       \
         u64 a = read_scalar64(w, in.src[0]), e = w.s[EXEC] | u64(w.s[EXEC + 1]) << 32;         \
         u64 r = EXPR;                                                                          \
         write_scalar64(w, in.dst, e);                                                          \
         write_scalar64(w, EXEC, r);                                                            \
         w.scc = r != 0;                                                                        \
     }},                                                                                        \
    {#NAME "_saveexec_b32", [](Wave &w, const Inst &in) {                                       \
         u32 a = read_scalar(w, in.src[0]), e = w.s[EXEC], r = u32(EXPR);                       \
         write_scalar(w, in.dst, e);                                                            \
         w.s[EXEC] = r;                                                                         \
         w.scc = r != 0;                                                                        \
     }}

void jump(Wave &w, const Inst &in, u64 address) {
    const Code &code = *w.group->launch.kernel->code;
    u64 word = (address - code.base) / 4;
    if (address % 4 || word >= code.index.size() || code.index[word] < 0)
        fault(w, in, format("jumps to 0x%llx, where there is no code", (unsigned long long)address));
    w.pc = u32(code.index[word]);
}
u64 next_address(const Wave &w) {
    const Code &code = *w.group->launch.kernel->code;
    return code.base + 4ull * code.program[w.pc].word;
}

#define BRANCH(NAME, CONDITION)                                                                 \
    {#NAME, [](Wave &w, const Inst &in) {                                                       \
         if (CONDITION) {                                                                       \
             if (in.offset < 0) fault(w, in, "branches to where there is no code");             \
             w.pc = u32(in.offset);                                                             \
         }                                                                                      \
     }}
#define NOTHING(NAME) {#NAME, [](Wave &, const Inst &) {}}

// Of the outstanding LDS operations, which come back in order, `count` may remain.
void wait_lgkm(Wave &w, u32 count) {
    if (count < 64) w.pending &= (1ull << count) - 1;
}

const Register control{
    SAVEEXEC(s_and, a &e), SAVEEXEC(s_or, a | e), SAVEEXEC(s_xor, a ^ e),
    SAVEEXEC(s_and_not1, a & ~e), SAVEEXEC(s_or_not1, a | ~e), SAVEEXEC(s_and_not0, ~a & e),
    SAVEEXEC(s_nand, ~(a & e)), SAVEEXEC(s_nor, ~(a | e)), SAVEEXEC(s_xnor, ~(a ^ e)),
    {"s_and_not1_wrexec_b64", [](Wave &w, const Inst &in) {
         u64 r = read_scalar64(w, in.src[0]) & ~(w.s[EXEC] | u64(w.s[EXEC + 1]) << 32);
         write_scalar64(w, EXEC, r);
         write_scalar64(w, in.dst, r);
         w.scc = r != 0;
     }},
    {"s_and_not1_wrexec_b32", [](Wave &w, const Inst &in) {
         u32 r = read_scalar(w, in.src[0]) & ~w.s[EXEC];
         w.s[EXEC] = r;
         write_scalar(w, in.dst, r);
         w.scc = r != 0;
     }},
    BRANCH(s_branch, true), BRANCH(s_cbranch_scc0, !w.scc), BRANCH(s_cbranch_scc1, w.scc),
    BRANCH(s_cbranch_vccz, w.vcc() == 0), BRANCH(s_cbranch_vccnz, w.vcc() != 0),
    BRANCH(s_cbranch_execz, w.exec() == 0), BRANCH(s_cbranch_execnz, w.exec() != 0),
    {"s_getpc_b64", [](Wave &w, const Inst &in) { write_scalar64(w, in.dst, next_address(w)); }},
    {"s_setpc_b64", [](Wave &w, const Inst &in) { jump(w, in, read_scalar64(w, in.src[0])); }},
    {"s_swappc_b64", [](Wave &w, const Inst &in) {
         u64 to = read_scalar64(w, in.src[0]);
         write_scalar64(w, in.dst, next_address(w));
         jump(w, in, to);
     }},
    {"s_call_b64", [](Wave &w, const Inst &in) {
         write_scalar64(w, in.dst, next_address(w));
         if (in.offset < 0) fault(w, in, "calls where there is no code");
         w.pc = u32(in.offset);
     }},
    {"s_endpgm", [](Wave &w, const Inst &) { w.done = true; }},
    {"s_barrier", [](Wave &w, const Inst &in) {
         if (w.pending)
             fault(w, in, "reaches a barrier before its LDS accesses were waited for, so that "
                          "other waves may see LDS as it was before them");
         w.at_barrier = true;
     }},
    {"s_waitcnt", [](Wave &w, const Inst &in) {
         u32 x = in.immediate;
         wait_lgkm(w, w.group->arch.family == Family::gfx11 ? x >> 4 & 63 : x >> 8 & 15);
     }},
    {"s_waitcnt_lgkmcnt", [](Wave &w, const Inst &in) { wait_lgkm(w, in.immediate); }},
    {"s_trap", [](Wave &w, const Inst &in) { fault(w, in, "traps"); }},
    NOTHING(s_waitcnt_vscnt), NOTHING(s_waitcnt_vmcnt), NOTHING(s_waitcnt_expcnt),
    NOTHING(s_nop), NOTHING(s_sleep), NOTHING(s_setprio), NOTHING(s_clause), NOTHING(s_delay_alu),
    NOTHING(s_waitcnt_depctr), NOTHING(s_sendmsg), NOTHING(s_set_inst_prefetch_distance),
    NOTHING(s_wakeup), NOTHING(s_icache_inv), NOTHING(s_dcache_wb), NOTHING(s_dcache_inv),
    NOTHING(s_gl1_inv), NOTHING(s_setreg_b32), NOTHING(s_setreg_imm32_b32), NOTHING(s_code_end),
    NOTHING(s_ttracedata), NOTHING(s_denorm_mode), NOTHING(s_round_mode),
};

}  // namespace
}  // namespace amd
