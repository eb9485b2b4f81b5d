// Vector instructions: lane by lane, then those that look across lanes, then matrices.
//
// Results are those of IEEE arithmetic; what hardware approximates (exp, log, rcp, sqrt, sin) is
// exact to rounding here. Semantics: AMD's RDNA3, MI200 and MI300 instruction set guides.

#include "core.h"

namespace amd {
namespace {

// ---- types -----------------------------------------------------------------------------------

template <Type T> struct As;
template <> struct As<Type::b32> {
    using type = u32;
    static u32 load(const u32 *p, int i) { return p[i]; }
    static void store(Lanes *d, int i, u32 v) { d->x[i] = v; }
};
template <> struct As<Type::f32> {
    using type = f32;
    static f32 load(const u32 *p, int i) { return bits<f32>(p[i]); }
    static void store(Lanes *d, int i, f32 v) { d->x[i] = bits<u32>(v); }
};
template <> struct As<Type::b16> {
    using type = u32;
    static u32 load(const u32 *p, int i) { return p[i] & 0xffff; }
    static void store(Lanes *d, int i, u32 v) { d->x[i] = v & 0xffff; }
};
template <> struct As<Type::f16> {
    using type = f32;
    static f32 load(const u32 *p, int i) { return from_half(u16(p[i])); }
    static void store(Lanes *d, int i, f32 v) { d->x[i] = to_half(v); }
};
template <> struct As<Type::pk16> : As<Type::b32> {};
template <> struct As<Type::mix> : As<Type::f32> {};
template <> struct As<Type::mask> : As<Type::b32> {};
template <> struct As<Type::b64> {
    using type = u64;
    static u64 load(const u32 *p, int i) { return p[i] | u64(p[LANES + i]) << 32; }
    static void store(Lanes *d, int i, u64 v) { d[0].x[i] = u32(v), d[1].x[i] = u32(v >> 32); }
};
template <> struct As<Type::pk32> : As<Type::b64> {};
template <> struct As<Type::i64> : As<Type::b64> {};
template <> struct As<Type::f64> {
    using type = f64;
    static f64 load(const u32 *p, int i) { return bits<f64>(As<Type::b64>::load(p, i)); }
    static void store(Lanes *d, int i, f64 v) { As<Type::b64>::store(d, i, bits<u64>(v)); }
};

template <Type D, Type A, Type B, Type C, class F>
inline void for_lanes(Lanes *__restrict d, const u32 *a, const u32 *b, const u32 *c, int n, F f) {
    for (int j = 0; j < n; j += 32)
#pragma GCC ivdep
        for (int i = j; i < j + 32; i++)
            As<D>::store(d, i, f(As<A>::load(a, i), As<B>::load(b, i), As<C>::load(c, i)));
}

// An operation with a result and up to three operands, called a, b and c in the expression.
#define OP3(NAME, D, A, B, C, ...)                                                              \
    {#NAME, run_vector,                                                                         \
     [](Lanes *d, const u32 *pa, const u32 *pb, const u32 *pc, int n) {                         \
         for_lanes<Type::D, Type::A, Type::B, Type::C>(                                         \
             d, pa, pb, pc, n, [](As<Type::A>::type a, As<Type::B>::type b,                     \
                                  As<Type::C>::type c) -> As<Type::D>::type { return __VA_ARGS__; }); \
     },                                                                                         \
     Type::D, {Type::A, Type::B, Type::C}}
#define OP2(NAME, D, A, B, ...)                                                                 \
    {#NAME, run_vector,                                                                         \
     [](Lanes *d, const u32 *pa, const u32 *pb, const u32 *, int n) {                           \
         for_lanes<Type::D, Type::A, Type::B, Type::B>(                                         \
             d, pa, pb, pb, n, [](As<Type::A>::type a, As<Type::B>::type b,                     \
                                  As<Type::B>::type) -> As<Type::D>::type { return __VA_ARGS__; }); \
     },                                                                                         \
     Type::D, {Type::A, Type::B, Type::none}}
#define OP1(NAME, D, A, ...)                                                                    \
    {#NAME, run_vector,                                                                         \
     [](Lanes *d, const u32 *pa, const u32 *, const u32 *, int n) {                             \
         for_lanes<Type::D, Type::A, Type::A, Type::A>(                                         \
             d, pa, pa, pa, n, [](As<Type::A>::type a, As<Type::A>::type, As<Type::A>::type)    \
                 -> As<Type::D>::type { return __VA_ARGS__; });                                 \
     },                                                                                         \
     Type::D, {Type::A, Type::none, Type::none}}

// The destination is the third operand as well.
Op accumulating(Op op) {
    op.accumulates = true;
    return op;
}

// d[1] or, of 64-bit results, d[2] is the mask that goes out: 0 or 1 for each lane.
Op carrying(const char *name, Type d, Type a, Type b, Type c, Compute compute) {
    return {name, run_vector, compute, d, {a, b, c}, true};
}

// ---- arithmetic ------------------------------------------------------------------------------

f32 fma(f32 a, f32 b, f32 c) { return __builtin_fmaf(a, b, c); }
f32 fma16(f32 a, f32 b, f32 c) { return f32(f64(a) * b + c); }
f32 min_num(f32 a, f32 b) { return a < b || b != b ? a : b; }
f32 max_num(f32 a, f32 b) { return a > b || b != b ? a : b; }
f64 min_num(f64 a, f64 b) { return a < b || b != b ? a : b; }
f64 max_num(f64 a, f64 b) { return a > b || b != b ? a : b; }
i32 s(u32 a) { return i32(a); }
i32 s16(u32 a) { return i16(a); }
u32 lo(u32 a) { return a & 0xffff; }
u32 hi(u32 a) { return a >> 16; }
i32 s24(u32 a) { return i32(a << 8) >> 8; }
u32 u24(u32 a) { return a & 0xffffff; }
template <class T> T least(T a, T b) { return b < a ? b : a; }
template <class T> T most(T a, T b) { return a < b ? b : a; }
template <class T> T middle(T a, T b, T c) { return most(least(a, b), least(most(a, b), c)); }
f32 median(f32 a, f32 b, f32 c) {
    if (a != a || b != b || c != c) return min_num(min_num(a, b), c);
    return middle(a, b, c);
}

template <class T> T to_integer(f64 x) {
    if (x != x) return 0;
    constexpr f64 low = std::numeric_limits<T>::min(), high = std::numeric_limits<T>::max();
    return x <= low ? std::numeric_limits<T>::min()
                    : x >= high ? std::numeric_limits<T>::max() : T(x);
}

// Faster than libm's where the result is in range, for exp2f is a call for each lane.
f32 exp2_of(f32 x) { return ::exp2f(x); }
f32 rndne(f32 x) { return __builtin_rintf(x); }

u32 bit_field(u32 value, u32 offset, u32 width) {
    return width & 31 ? (value >> (offset & 31)) & ((1u << (width & 31)) - 1) : 0;
}
u32 signed_bit_field(u32 value, u32 offset, u32 width) {
    width &= 31;
    if (width == 0) return 0;
    return u32(s((value >> (offset & 31)) << (32 - width)) >> (32 - width));
}

int exponent_of(f32 x) { return (bits<u32>(x) >> 23) & 255; }
bool is_denormal(f32 x) { return exponent_of(x) == 0 && x != 0; }

// v_div_scale_f32: operand `a`, which is denominator `b` or numerator `c`, made fit to divide.
f32 div_scale(f32 a, f32 b, f32 c, bool &scaled) {
    scaled = false;
    if (c == 0 || b == 0) return NAN;
    if (exponent_of(c) - exponent_of(b) >= 96) {
        scaled = true;
        return a == b ? std::ldexp(a, 64) : a;
    }
    if (is_denormal(b)) return std::ldexp(a, 64);
    bool tiny_reciprocal = is_denormal(f32(1.0 / f64(b))), tiny_result = is_denormal(c / b);
    if (tiny_reciprocal && tiny_result) {
        scaled = true;
        return a == b ? std::ldexp(a, 64) : a;
    }
    if (tiny_reciprocal) return std::ldexp(a, -64);
    if (tiny_result) {
        scaled = true;
        return a == c ? std::ldexp(a, 64) : a;
    }
    return exponent_of(c) <= 23 ? std::ldexp(a, 64) : a;
}

f32 div_fixup(f32 a, f32 b, f32 c) {
    bool negative = std::signbit(b) != std::signbit(c);
    auto sign = [&](f32 x) { return negative ? -x : x; };
    if (c != c) return c;
    if (b != b) return b;
    if ((b == 0 && c == 0) || (std::isinf(b) && std::isinf(c))) return -NAN;
    if (b == 0 || std::isinf(c)) return sign(INFINITY);
    if (std::isinf(b) || c == 0) return sign(0);
    return sign(std::fabs(a));
}

u32 class_of(f32 x) {
    bool negative = std::signbit(x);
    u32 kind;  // as in the mask: 2 infinity, 3 normal, 4 denormal, 5 zero; mirrored if positive
    if (x != x) return bits<u32>(x) & 0x400000 ? 2 : 1;
    if (std::isinf(x)) kind = 2;
    else if (x == 0) kind = 5;
    else kind = is_denormal(x) ? 4 : 3;
    return 1u << (negative ? kind : 11 - kind);
}

u32 permuted_bytes(u32 a, u32 b, u32 select) {
    u64 data = u64(a) << 32 | b;
    u32 out = 0;
    for (int i = 0; i < 4; i++) {
        u32 k = (select >> 8 * i) & 255, byte;
        if (k >= 13) byte = 255;
        else if (k == 12) byte = 0;
        else if (k >= 8) byte = (data >> (16 * (k - 8) + 15)) & 1 ? 255 : 0;
        else byte = (data >> 8 * k) & 255;
        out |= byte << 8 * i;
    }
    return out;
}

template <class F> u32 halves(F f, u32 a, u32 b, u32 c = 0) {
    return lo(f(lo(a), lo(b), lo(c))) | f(hi(a), hi(b), hi(c)) << 16;
}
template <class F> u32 half_floats(F f, u32 a, u32 b, u32 c = 0) {
    return halves([&](u32 x, u32 y, u32 z) -> u32 {
        return to_half(f(from_half(x), from_half(y), from_half(z)));
    }, a, b, c);
}
template <class F> u64 word_floats(F f, u64 a, u64 b, u64 c = 0) {
    auto one = [&](u64 x, u64 y, u64 z) {
        return bits<u32>(f(bits<f32>(u32(x)), bits<f32>(u32(y)), bits<f32>(u32(z))));
    };
    return one(a, b, c) | u64(one(a >> 32, b >> 32, c >> 32)) << 32;
}
f32 bf16(u32 h) { return bits<f32>(h << 16); }

template <class F>
void carry_lanes(Lanes *__restrict d, const u32 *a, const u32 *b, const u32 *c, int n, F f) {
    for (int i = 0; i < n; i++) {
        u64 wide = f(a[i], b[i], c ? c[i] : 0);
        d[0].x[i] = u32(wide);
        d[1].x[i] = u32(wide >> 32) & 1;
    }
}
#define CARRY(NAME, C, EXPR)                                                                    \
    carrying(#NAME, Type::b32, Type::b32, Type::b32, Type::C,                                   \
             [](Lanes *d, const u32 *a, const u32 *b, const u32 *c, int n) {                    \
                 carry_lanes(d, a, b, c, n, [](u64 a, u64 b, u64 c) -> u64 {                    \
                     (void)c;                                                                   \
                     return EXPR;                                                               \
                 });                                                                            \
             })

template <bool Signed>
void mad64(Lanes *d, const u32 *a, const u32 *b, const u32 *c, int n) {
    for (int i = 0; i < n; i++) {
        u64 addend = As<Type::b64>::load(c, i);
        u64 product = Signed ? u64(i64(s(a[i])) * s(b[i])) : u64(a[i]) * b[i];
        u64 sum = product + addend;
        As<Type::b64>::store(d, i, sum);
        d[2].x[i] = !Signed && sum < addend;
    }
}

// ---- tables ----------------------------------------------------------------------------------

#define FLOAT_OPS(T, FMA)                                                                       \
    OP2(v_add_##T, T, T, T, a + b), OP2(v_sub_##T, T, T, T, a - b),                             \
    OP2(v_subrev_##T, T, T, T, b - a), OP2(v_mul_##T, T, T, T, a * b),                          \
    OP2(v_min_##T, T, T, T, min_num(a, b)), OP2(v_max_##T, T, T, T, max_num(a, b)),             \
    OP3(v_fma_##T, T, T, T, T, FMA(a, b, c)), OP1(v_trunc_##T, T, T, std::trunc(a)),            \
    accumulating(OP3(v_fmac_##T, T, T, T, T, FMA(a, b, c))),                                    \
    OP3(v_fmamk_##T, T, T, T, T, FMA(a, b, c)), OP3(v_fmaak_##T, T, T, T, T, FMA(a, b, c)),     \
    OP1(v_ceil_##T, T, T, std::ceil(a)), OP1(v_floor_##T, T, T, std::floor(a)),                 \
    OP1(v_rndne_##T, T, T, rndne(a)), OP1(v_fract_##T, T, T, a - std::floor(a)),                \
    OP1(v_rcp_##T, T, T, 1 / a), OP1(v_sqrt_##T, T, T, std::sqrt(a)),                           \
    OP1(v_rsq_##T, T, T, 1 / std::sqrt(a)), OP1(v_exp_##T, T, T, exp2_of(a)),                   \
    OP1(v_log_##T, T, T, std::log2(a)),                                                         \
    OP1(v_sin_##T, T, T, f32(std::sin(2 * M_PI * f64(a)))),                                     \
    OP1(v_cos_##T, T, T, f32(std::cos(2 * M_PI * f64(a)))),                                     \
    OP3(v_min3_##T, T, T, T, T, min_num(min_num(a, b), c)),                                     \
    OP3(v_max3_##T, T, T, T, T, max_num(max_num(a, b), c)),                                     \
    OP3(v_med3_##T, T, T, T, T, median(a, b, c)),                                               \
    OP3(v_maxmin_##T, T, T, T, T, min_num(max_num(a, b), c)),                                   \
    OP3(v_minmax_##T, T, T, T, T, max_num(min_num(a, b), c)),                                   \
    OP1(v_frexp_mant_##T, T, T, std::isfinite(a) ? [](f32 x) { int e; return std::frexp(x, &e); }(a) : a)

const Register floats{
    FLOAT_OPS(f32, fma),
    FLOAT_OPS(f16, fma16),
    OP1(v_rcp_iflag_f32, f32, f32, 1 / a),
    OP2(v_mul_dx9_zero_f32, f32, f32, f32, a == 0 || b == 0 ? 0 : a * b),
    OP2(v_ldexp_f32, f32, f32, b32, std::ldexp(a, s(b))),
    OP2(v_ldexp_f16, f16, f16, b16, std::ldexp(a, s16(b))),
    OP1(v_frexp_exp_i32_f32, b32, f32, std::isfinite(a) && a != 0 ? u32(std::ilogb(a) + 1) : 0),
    OP1(v_frexp_exp_i16_f16, b16, f16, std::isfinite(a) && a != 0 ? u32(std::ilogb(a) + 1) : 0),
    carrying("v_div_scale_f32", Type::f32, Type::f32, Type::f32, Type::f32,
             [](Lanes *d, const u32 *a, const u32 *b, const u32 *c, int n) {
                 for (int i = 0; i < n; i++) {
                     bool scaled;
                     d[0].x[i] = bits<u32>(div_scale(
                         bits<f32>(a[i]), bits<f32>(b[i]), bits<f32>(c[i]), scaled));
                     d[1].x[i] = scaled;
                 }
             }),
    OP3(v_div_fixup_f32, f32, f32, f32, f32, div_fixup(a, b, c)),
    OP3(v_div_fixup_f16, f16, f16, f16, f16, div_fixup(a, b, c)),

    OP2(v_add_f64, f64, f64, f64, a + b), OP2(v_mul_f64, f64, f64, f64, a * b),
    OP2(v_min_f64, f64, f64, f64, min_num(a, b)), OP2(v_max_f64, f64, f64, f64, max_num(a, b)),
    OP3(v_fma_f64, f64, f64, f64, f64, std::fma(a, b, c)),
    accumulating(OP3(v_fmac_f64, f64, f64, f64, f64, std::fma(a, b, c))),
    OP2(v_ldexp_f64, f64, f64, b32, std::ldexp(a, s(b))),
    OP1(v_rcp_f64, f64, f64, 1 / a), OP1(v_rsq_f64, f64, f64, 1 / std::sqrt(a)),
    OP1(v_sqrt_f64, f64, f64, std::sqrt(a)), OP1(v_trunc_f64, f64, f64, std::trunc(a)),
    OP1(v_ceil_f64, f64, f64, std::ceil(a)), OP1(v_floor_f64, f64, f64, std::floor(a)),
    OP1(v_rndne_f64, f64, f64, std::rint(a)), OP1(v_fract_f64, f64, f64, a - std::floor(a)),

    OP1(v_cvt_f32_i32, f32, b32, f32(s(a))), OP1(v_cvt_f32_u32, f32, b32, f32(a)),
    OP1(v_cvt_i32_f32, b32, f32, u32(to_integer<i32>(a))),
    OP1(v_cvt_u32_f32, b32, f32, to_integer<u32>(a)),
    OP1(v_cvt_nearest_i32_f32, b32, f32, u32(to_integer<i32>(std::floor(f64(a) + 0.5)))),
    OP1(v_cvt_floor_i32_f32, b32, f32, u32(to_integer<i32>(std::floor(a)))),
    OP1(v_cvt_f16_f32, f16, f32, a), OP1(v_cvt_f32_f16, f32, f16, a),
    OP1(v_cvt_f16_u16, f16, b16, f32(a)), OP1(v_cvt_f16_i16, f16, b16, f32(s16(a))),
    OP1(v_cvt_u16_f16, b16, f16, to_integer<u16>(a)),
    OP1(v_cvt_i16_f16, b16, f16, u32(to_integer<i16>(a))),
    OP1(v_cvt_i32_i16, b32, b16, u32(s16(a))), OP1(v_cvt_u32_u16, b32, b16, a),
    OP1(v_cvt_f64_i32, f64, b32, s(a)), OP1(v_cvt_f64_u32, f64, b32, a),
    OP1(v_cvt_f64_f32, f64, f32, a), OP1(v_cvt_f32_f64, f32, f64, f32(a)),
    OP1(v_cvt_i32_f64, b32, f64, u32(to_integer<i32>(a))),
    OP1(v_cvt_u32_f64, b32, f64, to_integer<u32>(a)),
    OP1(v_cvt_f32_ubyte0, f32, b32, f32(a & 255)),
    OP1(v_cvt_f32_ubyte1, f32, b32, f32(a >> 8 & 255)),
    OP1(v_cvt_f32_ubyte2, f32, b32, f32(a >> 16 & 255)),
    OP1(v_cvt_f32_ubyte3, f32, b32, f32(a >> 24)),
    OP2(v_cvt_pk_rtz_f16_f32, b32, f32, f32,
        to_half_toward_zero(a) | u32(to_half_toward_zero(b)) << 16),
    OP2(v_cvt_pk_u16_u32, b32, b32, b32, least(a, 65535u) | least(b, 65535u) << 16),
    OP2(v_cvt_pk_i16_i32, b32, b32, b32,
        lo(u32(middle(s(a), -32768, 32767))) | u32(middle(s(b), -32768, 32767)) << 16),
};

const Register integers{
    OP1(v_mov_b32, b32, b32, a), OP1(v_mov_b64, b64, b64, a), OP1(v_mov_b16, b16, b16, a),
    OP1(v_not_b32, b32, b32, ~a), OP1(v_not_b16, b16, b16, ~a),
    OP1(v_bfrev_b32, b32, b32, [](u32 x) {
        u32 r = 0;
        for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
        return r;
    }(a)),
    OP1(v_clz_i32_u32, b32, b32, a ? u32(__builtin_clz(a)) : ~0u),
    OP1(v_ctz_i32_b32, b32, b32, a ? u32(__builtin_ctz(a)) : ~0u),
    OP1(v_cls_i32, b32, b32, a == 0 || a == ~0u ? ~0u : u32(__builtin_clrsb(s(a)) + 1)),
    OP2(v_and_b32, b32, b32, b32, a & b), OP2(v_or_b32, b32, b32, b32, a | b),
    OP2(v_xor_b32, b32, b32, b32, a ^ b), OP2(v_xnor_b32, b32, b32, b32, ~(a ^ b)),
    OP2(v_and_b16, b16, b16, b16, a & b), OP2(v_or_b16, b16, b16, b16, a | b),
    OP2(v_xor_b16, b16, b16, b16, a ^ b),
    OP2(v_add_nc_u32, b32, b32, b32, a + b), OP2(v_sub_nc_u32, b32, b32, b32, a - b),
    OP2(v_subrev_nc_u32, b32, b32, b32, b - a),
    OP2(v_add_nc_i32, b32, b32, b32, a + b), OP2(v_sub_nc_i32, b32, b32, b32, a - b),
    OP2(v_mul_lo_u32, b32, b32, b32, a * b),
    OP2(v_mul_hi_u32, b32, b32, b32, u32(u64(a) * b >> 32)),
    OP2(v_mul_hi_i32, b32, b32, b32, u32(u64(i64(s(a)) * s(b)) >> 32)),
    OP2(v_mul_i32_i24, b32, b32, b32, u32(s24(a)) * u32(s24(b))),
    OP2(v_mul_hi_i32_i24, b32, b32, b32, u32(u64(i64(s24(a)) * s24(b)) >> 32)),
    OP2(v_mul_u32_u24, b32, b32, b32, u24(a) * u24(b)),
    OP2(v_mul_hi_u32_u24, b32, b32, b32, u32(u64(u24(a)) * u24(b) >> 32)),
    OP3(v_mad_i32_i24, b32, b32, b32, b32, u32(s24(a)) * u32(s24(b)) + c),
    OP3(v_mad_u32_u24, b32, b32, b32, b32, u24(a) * u24(b) + c),
    OP3(v_mad_u32_u16, b32, b16, b16, b32, a * b + c),
    OP3(v_mad_i32_i16, b32, b16, b16, b32, u32(s16(a) * s16(b)) + c),
    OP2(v_min_i32, b32, b32, b32, u32(least(s(a), s(b)))),
    OP2(v_max_i32, b32, b32, b32, u32(most(s(a), s(b)))),
    OP2(v_min_u32, b32, b32, b32, least(a, b)), OP2(v_max_u32, b32, b32, b32, most(a, b)),
    OP3(v_min3_i32, b32, b32, b32, b32, u32(least(least(s(a), s(b)), s(c)))),
    OP3(v_max3_i32, b32, b32, b32, b32, u32(most(most(s(a), s(b)), s(c)))),
    OP3(v_med3_i32, b32, b32, b32, b32, u32(middle(s(a), s(b), s(c)))),
    OP3(v_min3_u32, b32, b32, b32, b32, least(least(a, b), c)),
    OP3(v_max3_u32, b32, b32, b32, b32, most(most(a, b), c)),
    OP3(v_med3_u32, b32, b32, b32, b32, middle(a, b, c)),
    OP3(v_maxmin_i32, b32, b32, b32, b32, u32(least(most(s(a), s(b)), s(c)))),
    OP3(v_minmax_i32, b32, b32, b32, b32, u32(most(least(s(a), s(b)), s(c)))),
    OP3(v_maxmin_u32, b32, b32, b32, b32, least(most(a, b), c)),
    OP3(v_minmax_u32, b32, b32, b32, b32, most(least(a, b), c)),
    OP2(v_lshlrev_b32, b32, b32, b32, b << (a & 31)),
    OP2(v_lshrrev_b32, b32, b32, b32, b >> (a & 31)),
    OP2(v_ashrrev_i32, b32, b32, b32, u32(s(b) >> (a & 31))),
    OP2(v_lshlrev_b16, b16, b16, b16, b << (a & 15)),
    OP2(v_lshrrev_b16, b16, b16, b16, b >> (a & 15)),
    OP2(v_ashrrev_i16, b16, b16, b16, u32(s16(b) >> (a & 15))),
    OP2(v_lshlrev_b64, b64, b32, b64, b << (a & 63)),
    OP2(v_lshrrev_b64, b64, b32, b64, b >> (a & 63)),
    OP2(v_ashrrev_i64, i64, b32, i64, u64(i64(b) >> (a & 63))),
    OP3(v_lshl_add_u64, b64, b64, b32, b64, (a << (b & 7)) + c),
    OP3(v_lshl_add_u32, b32, b32, b32, b32, (a << (b & 31)) + c),
    OP3(v_add_lshl_u32, b32, b32, b32, b32, (a + b) << (c & 31)),
    OP3(v_lshl_or_b32, b32, b32, b32, b32, a << (b & 31) | c),
    OP3(v_and_or_b32, b32, b32, b32, b32, (a & b) | c),
    OP3(v_or3_b32, b32, b32, b32, b32, a | b | c),
    OP3(v_xor3_b32, b32, b32, b32, b32, a ^ b ^ c),
    OP3(v_add3_u32, b32, b32, b32, b32, a + b + c),
    OP3(v_xad_u32, b32, b32, b32, b32, (a ^ b) + c),
    OP3(v_bfe_u32, b32, b32, b32, b32, bit_field(a, b, c)),
    OP3(v_bfe_i32, b32, b32, b32, b32, signed_bit_field(a, b, c)),
    OP3(v_bfi_b32, b32, b32, b32, b32, (a & b) | (~a & c)),
    OP2(v_bfm_b32, b32, b32, b32, ((1u << (a & 31)) - 1) << (b & 31)),
    OP2(v_bcnt_u32_b32, b32, b32, b32, u32(__builtin_popcount(a)) + b),
    OP3(v_alignbit_b32, b32, b32, b32, b32, u32((u64(a) << 32 | b) >> (c & 31))),
    OP3(v_alignbyte_b32, b32, b32, b32, b32, u32((u64(a) << 32 | b) >> 8 * (c & 3))),
    OP3(v_perm_b32, b32, b32, b32, b32, permuted_bytes(a, b, c)),
    OP2(v_pack_b32_f16, b32, b16, b16, a | b << 16),

    OP2(v_add_nc_u16, b16, b16, b16, a + b), OP2(v_sub_nc_u16, b16, b16, b16, a - b),
    OP2(v_subrev_nc_u16, b16, b16, b16, b - a),
    OP2(v_add_nc_i16, b16, b16, b16, a + b), OP2(v_sub_nc_i16, b16, b16, b16, a - b),
    OP2(v_mul_lo_u16, b16, b16, b16, a * b),
    OP3(v_mad_u16, b16, b16, b16, b16, a * b + c), OP3(v_mad_i16, b16, b16, b16, b16, a * b + c),
    OP2(v_min_u16, b16, b16, b16, least(a, b)), OP2(v_max_u16, b16, b16, b16, most(a, b)),
    OP2(v_min_i16, b16, b16, b16, u32(least(s16(a), s16(b)))),
    OP2(v_max_i16, b16, b16, b16, u32(most(s16(a), s16(b)))),

    OP3(v_cndmask_b32, b32, b32, b32, mask, c ? b : a),
    OP3(v_cndmask_b16, b16, b16, b16, mask, c ? b : a),
    CARRY(v_add_co_u32, none, a + b), CARRY(v_sub_co_u32, none, a - b),
    CARRY(v_subrev_co_u32, none, b - a), CARRY(v_add_co_ci_u32, mask, a + b + c),
    CARRY(v_sub_co_ci_u32, mask, a - b - c), CARRY(v_subrev_co_ci_u32, mask, b - a - c),
    carrying("v_mad_u64_u32", Type::b64, Type::b32, Type::b32, Type::b64, mad64<false>),
    carrying("v_mad_i64_i32", Type::i64, Type::b32, Type::b32, Type::i64, mad64<true>),
};

const Register packed{
    OP3(v_pk_fma_f16, pk16, pk16, pk16, pk16, half_floats(fma16, a, b, c)),
    accumulating(OP3(v_pk_fmac_f16, pk16, pk16, pk16, pk16, half_floats(fma16, a, b, c))),
    OP2(v_pk_add_f16, pk16, pk16, pk16,
        half_floats([](f32 x, f32 y, f32) { return x + y; }, a, b)),
    OP2(v_pk_mul_f16, pk16, pk16, pk16,
        half_floats([](f32 x, f32 y, f32) { return x * y; }, a, b)),
    OP2(v_pk_min_f16, pk16, pk16, pk16,
        half_floats([](f32 x, f32 y, f32) { return min_num(x, y); }, a, b)),
    OP2(v_pk_max_f16, pk16, pk16, pk16,
        half_floats([](f32 x, f32 y, f32) { return max_num(x, y); }, a, b)),
#define PK_INT(NAME, EXPR)                                                                      \
    OP2(NAME, pk16, pk16, pk16,                                                                 \
        halves([](u32 a, u32 b, u32) -> u32 { return EXPR; }, a, b))
    PK_INT(v_pk_add_u16, a + b), PK_INT(v_pk_add_i16, a + b), PK_INT(v_pk_sub_u16, a - b),
    PK_INT(v_pk_sub_i16, a - b), PK_INT(v_pk_mul_lo_u16, a *b),
    PK_INT(v_pk_lshlrev_b16, b << (a & 15)), PK_INT(v_pk_lshrrev_b16, b >> (a & 15)),
    PK_INT(v_pk_ashrrev_i16, u32(s16(b) >> (a & 15))),
    PK_INT(v_pk_max_u16, most(a, b)), PK_INT(v_pk_min_u16, least(a, b)),
    PK_INT(v_pk_max_i16, u32(most(s16(a), s16(b)))),
    PK_INT(v_pk_min_i16, u32(least(s16(a), s16(b)))),
    OP3(v_pk_mad_u16, pk16, pk16, pk16, pk16,
        halves([](u32 a, u32 b, u32 c) { return a * b + c; }, a, b, c)),
    OP3(v_pk_mad_i16, pk16, pk16, pk16, pk16,
        halves([](u32 a, u32 b, u32 c) { return a * b + c; }, a, b, c)),
    OP3(v_pk_fma_f32, pk32, pk32, pk32, pk32, word_floats(fma, a, b, c)),
    OP2(v_pk_add_f32, pk32, pk32, pk32,
        word_floats([](f32 x, f32 y, f32) { return x + y; }, a, b)),
    OP2(v_pk_mul_f32, pk32, pk32, pk32,
        word_floats([](f32 x, f32 y, f32) { return x * y; }, a, b)),
    OP2(v_pk_mov_b32, pk32, pk32, pk32, u32(a) | (b >> 32) << 32),
    OP3(v_fma_mix_f32, f32, mix, mix, mix, fma(a, b, c)),
    OP3(v_fma_mixlo_f16, f16, mix, mix, mix, fma(a, b, c)),
    OP3(v_fma_mixhi_f16, f16, mix, mix, mix, fma(a, b, c)),
    OP3(v_dot2_f32_f16, f32, pk16, pk16, f32,
        fma(from_half(hi(a)), from_half(hi(b)), fma(from_half(lo(a)), from_half(lo(b)), c))),
    accumulating(OP3(v_dot2acc_f32_f16, f32, pk16, pk16, f32,
        fma(from_half(hi(a)), from_half(hi(b)), fma(from_half(lo(a)), from_half(lo(b)), c)))),
    OP3(v_dot2_f32_bf16, f32, pk16, pk16, f32,
        fma(bf16(hi(a)), bf16(hi(b)), fma(bf16(lo(a)), bf16(lo(b)), c))),
};

#define FLOAT_COMPARES(T)                                                                       \
    OP2(v_cmp_lt_##T, mask, T, T, a < b), OP2(v_cmp_eq_##T, mask, T, T, a == b),                \
    OP2(v_cmp_le_##T, mask, T, T, a <= b), OP2(v_cmp_gt_##T, mask, T, T, a > b),                \
    OP2(v_cmp_lg_##T, mask, T, T, a < b || a > b), OP2(v_cmp_ge_##T, mask, T, T, a >= b),       \
    OP2(v_cmp_o_##T, mask, T, T, a == a && b == b),                                             \
    OP2(v_cmp_u_##T, mask, T, T, a != a || b != b),                                             \
    OP2(v_cmp_nge_##T, mask, T, T, !(a >= b)), OP2(v_cmp_nlg_##T, mask, T, T, !(a < b || a > b)), \
    OP2(v_cmp_ngt_##T, mask, T, T, !(a > b)), OP2(v_cmp_nle_##T, mask, T, T, !(a <= b)),        \
    OP2(v_cmp_neq_##T, mask, T, T, !(a == b)), OP2(v_cmp_nlt_##T, mask, T, T, !(a < b))
#define INT_COMPARES(T, B, CAST)                                                                \
    OP2(v_cmp_lt_##T, mask, B, B, CAST(a) < CAST(b)),                                           \
    OP2(v_cmp_eq_##T, mask, B, B, CAST(a) == CAST(b)),                                          \
    OP2(v_cmp_le_##T, mask, B, B, CAST(a) <= CAST(b)),                                          \
    OP2(v_cmp_gt_##T, mask, B, B, CAST(a) > CAST(b)),                                           \
    OP2(v_cmp_ne_##T, mask, B, B, CAST(a) != CAST(b)),                                          \
    OP2(v_cmp_ge_##T, mask, B, B, CAST(a) >= CAST(b))

const Register compares{
    FLOAT_COMPARES(f32), FLOAT_COMPARES(f16), FLOAT_COMPARES(f64),
    INT_COMPARES(i32, b32, i32), INT_COMPARES(u32, b32, u32), INT_COMPARES(i16, b16, i16),
    INT_COMPARES(u16, b16, u16), INT_COMPARES(i64, i64, i64), INT_COMPARES(u64, b64, u64),
    OP2(v_cmp_class_f32, mask, f32, b32, (class_of(a) & b) != 0),
};

// ---- across lanes ----------------------------------------------------------------------------

Lanes values_of(Wave &w, const Operand &o) {
    if (o.code >= VGPR) return w.v[o.code - VGPR];
    Lanes out;
    u32 value = read_scalar(w, o);
    for (u32 &x : out.x) x = value;
    return out;
}

u32 first_lane(const Wave &w) { return w.exec() ? u32(__builtin_ctzll(w.exec())) : 0; }

void readfirstlane(Wave &w, const Inst &in) {
    u32 value = in.src[0].code >= VGPR ? w.v[in.src[0].code - VGPR].x[first_lane(w)]
                                       : read_scalar(w, in.src[0]);
    write_scalar(w, in.dst, value);
}
void readlane(Wave &w, const Inst &in) {
    u32 lane = read_scalar(w, in.src[1]) & u32(w.width - 1);
    write_scalar(w, in.dst, values_of(w, in.src[0]).x[lane]);
}
void writelane(Wave &w, const Inst &in) {
    u32 lane = read_scalar(w, in.src[1]) & u32(w.width - 1);
    w.v[in.dst].x[lane] = read_scalar(w, in.src[0]);
}

// Bits of the mask in the first operand below the lane's own.
template <int High> void mbcnt(Wave &w, const Inst &in) {
    Lanes m = values_of(w, in.src[0]), base = values_of(w, in.src[1]), out;
    for (int i = 0; i < w.width; i++) {
        u64 below = (1ull << i) - 1;
        out.x[i] = base.x[i] + u32(__builtin_popcount(m.x[i] & u32(High ? below >> 32 : below)));
    }
    write_lanes(w, in, in.dst, out, w.exec());
}

template <bool Other> void permlane16(Wave &w, const Inst &in) {
    Lanes from = values_of(w, in.src[0]), out = w.v[in.dst];
    u64 select = read_scalar(w, in.src[1]) | u64(read_scalar(w, in.src[2])) << 32;
    for (int i = 0; i < w.width; i++) {
        int row = Other ? (i & ~15) ^ 16 : i & ~15, lane = row + int(select >> 4 * (i & 15) & 15);
        bool valid = in.src[0].low_from_high || (w.exec() >> lane & 1);
        if (valid) out.x[i] = from.x[lane];
        else if (in.src[1].low_from_high) out.x[i] = 0;
    }
    write_lanes(w, in, in.dst, out, w.exec());
}
void permlane64(Wave &w, const Inst &in) {
    Lanes from = values_of(w, in.src[0]), out;
    for (int i = 0; i < w.width; i++) out.x[i] = from.x[w.width == 64 ? i ^ 32 : i];
    write_lanes(w, in, in.dst, out, w.exec());
}

void div_fmas(Wave &w, const Inst &in) {
    Operand c = in.src[2], a = in.src[0], b = in.src[1];
    Lanes la = values_of(w, a), lb = values_of(w, b), lc = values_of(w, c), out;
    auto value = [](const Operand &o, u32 x) {
        f32 f = bits<f32>(x);
        if (o.absolute) f = std::fabs(f);
        return o.negate ? -f : f;
    };
    u64 vcc = w.vcc();
    for (int i = 0; i < w.width; i++) {
        f32 r = fma(value(a, la.x[i]), value(b, lb.x[i]), value(c, lc.x[i]));
        out.x[i] = bits<u32>(vcc >> i & 1 ? std::ldexp(r, 32) : r);
    }
    write_lanes(w, in, in.dst, out, w.exec());
}

void swap(Wave &w, const Inst &in) {
    Lanes a = values_of(w, in.src[0]), b = w.v[in.dst];
    write_lanes(w, in, in.dst, a, w.exec());
    write_lanes(w, in, in.src[0].code - VGPR, b, w.exec());
}

void nothing(Wave &, const Inst &) {}

const Op typed(const char *name, Run run, Type d, Type a, Type b = Type::none, Type c = Type::none) {
    return {name, run, nullptr, d, {a, b, c}};
}

const Register across{
    typed("v_nop", nothing, Type::none, Type::none),
    typed("v_readfirstlane_b32", readfirstlane, Type::b32, Type::b32),
    typed("v_readlane_b32", readlane, Type::b32, Type::b32, Type::b32),
    typed("v_writelane_b32", writelane, Type::b32, Type::b32, Type::b32),
    typed("v_mbcnt_lo_u32_b32", mbcnt<0>, Type::b32, Type::b32, Type::b32),
    typed("v_mbcnt_hi_u32_b32", mbcnt<1>, Type::b32, Type::b32, Type::b32),
    typed("v_permlane16_b32", permlane16<false>, Type::b32, Type::b32, Type::b32, Type::b32),
    typed("v_permlanex16_b32", permlane16<true>, Type::b32, Type::b32, Type::b32, Type::b32),
    typed("v_permlane64_b32", permlane64, Type::b32, Type::b32),
    typed("v_div_fmas_f32", div_fmas, Type::f32, Type::f32, Type::f32, Type::f32),
    typed("v_swap_b32", swap, Type::b32, Type::b32),
};

// ---- matrices --------------------------------------------------------------------------------

u16 half_of(const Wave &w, u32 reg, int lane, int k) {
    return u16(w.v[reg + u32(k / 2)].x[lane] >> 16 * (k & 1));
}
f32 decode(bool bf, u16 x) { return bf ? bf16(x) : from_half(x); }

// D = A B + C of 16x16 on 32 lanes. Lane l holds row l % 16 of A and column l % 16 of B, all of K;
// of C and D its column l % 16 and the rows 2 i + l / 16.
template <bool Bf16> void wmma_f32(Wave &w, const Inst &in) {
    if (w.width != 32) fault(w, in, "matrix instructions of waves of 64 are not emulated");
    u32 a = in.src[0].code - VGPR, b = in.src[1].code - VGPR;
    Lanes out[8];
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 8; i++) {
            int row = 2 * i + lane / 16;
            f32 sum = in.src[2].code >= VGPR
                          ? bits<f32>(w.v[in.src[2].code - VGPR + u32(i)].x[lane])
                          : bits<f32>(u32(in.src[2].value));
            for (int k = 0; k < 16; k++)
                sum = fma(decode(Bf16, half_of(w, a, row, k)), decode(Bf16, half_of(w, b, lane, k)), sum);
            out[i].x[lane] = bits<u32>(sum);
        }
    for (u32 i = 0; i < 8; i++) write_lanes(w, in, in.dst + i, out[i], w.all());
}

// D = A B + C of N x N on 64 lanes, K values of A and B in each. Lane l holds row l % N of A and
// column l % N of B, at k = K (l / N) + i; of D its column l % N, in groups of four rows.
template <int N, int K, bool Bf16> void mfma_f32(Wave &w, const Inst &in) {
    if (in.immediate) fault(w, in, "broadcasts and negations of matrix operands are not emulated");
    u32 a = in.src[0].code - VGPR, b = in.src[1].code - VGPR;
    constexpr int blocks = 64 / N, count = N * N / 64;
    Lanes out[count];
    for (int lane = 0; lane < 64; lane++)
        for (int i = 0; i < count; i++) {
            int row = 4 * (lane / N) + (i % 4) + 4 * blocks * (i / 4), column = lane % N;
            f32 sum = in.src[2].code >= VGPR
                          ? bits<f32>(w.v[in.src[2].code - VGPR + u32(i)].x[lane])
                          : bits<f32>(u32(in.src[2].value));
            for (int block = 0; block < blocks; block++)
                for (int k = 0; k < K; k++)
                    sum = fma(decode(Bf16, half_of(w, a, row + N * block, k)),
                              decode(Bf16, half_of(w, b, column + N * block, k)), sum);
            out[i].x[lane] = bits<u32>(sum);
        }
    for (u32 i = 0; i < count; i++) write_lanes(w, in, in.dst + i, out[i], w.all());
}

void accvgpr_move(Wave &w, const Inst &in) {
    write_lanes(w, in, in.dst, values_of(w, in.src[0]), w.exec());
}

const Register matrices{
    typed("v_wmma_f32_16x16x16_f16", wmma_f32<false>, Type::f32, Type::b32, Type::b32, Type::f32),
    typed("v_wmma_f32_16x16x16_bf16", wmma_f32<true>, Type::f32, Type::b32, Type::b32, Type::f32),
    typed("v_mfma_f32_16x16x16_f16", mfma_f32<16, 4, false>, Type::f32, Type::b32, Type::b32, Type::f32),
    typed("v_mfma_f32_32x32x8_f16", mfma_f32<32, 4, false>, Type::f32, Type::b32, Type::b32, Type::f32),
    typed("v_mfma_f32_16x16x16_bf16", mfma_f32<16, 4, true>, Type::f32, Type::b32, Type::b32, Type::f32),
    typed("v_mfma_f32_32x32x8_bf16", mfma_f32<32, 4, true>, Type::f32, Type::b32, Type::b32, Type::f32),
    typed("v_accvgpr_read", accvgpr_move, Type::b32, Type::b32),
    typed("v_accvgpr_write", accvgpr_move, Type::b32, Type::b32),
    typed("v_accvgpr_mov_b32", accvgpr_move, Type::b32, Type::b32),
};

}  // namespace
}  // namespace amd
