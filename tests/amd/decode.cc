// Machine code to instructions.
//
// Encodings: AMD's RDNA3, MI200 and MI300 instruction set guides. All vector operations are known
// by their number in the encoding VOP3, which has a place for those of VOP1, VOP2 and VOPC too.

#include <algorithm>

#include "core.h"

namespace amd {
namespace {

struct Opcode {
    const char *encoding, *name;
    int gfx9, gfx11;
};
const Opcode opcodes[] = {
#include "opcodes.h"
};

constexpr u32 LITERAL = 255, SDWA = 249, DPP = 250, DPP8 = 233, DPP8FI = 234;

// Opcodes by family, encoding and number.
using Table = std::unordered_map<std::string, std::unordered_map<u32, const Op *>>;

Table table_of(Family family) {
    Table out;
    for (const Opcode &o : opcodes) {
        int number = family == Family::gfx9 ? o.gfx9 : o.gfx11;
        const Op *op = op_named(o.name);
        if (!op) throw Fault(format("no operation is called %s", o.name));
        if (number >= 0) out[o.encoding][u32(number)] = op;
    }
    return out;
}

u32 field(u64 x, int low, int width) { return u32(x >> low & ((1ull << width) - 1)); }
i32 signed_field(u64 x, int low, int width) {
    return i32(field(x, low, width) << (32 - width)) >> (32 - width);
}

// The value of an inline constant, as an operand of this type.
u64 constant(u32 code, Type type, u32 literal) {
    if (code >= 128 && code <= 192) return code - 128;
    if (code >= 193 && code <= 208) return u64(-i64(code - 192));
    static const f64 floats[] = {0.5, -0.5, 1, -1, 2, -2, 4, -4, 0.15915494309189532};
    if (code >= 240 && code <= 248) {
        f64 x = floats[code - 240];
        bool half = type == Type::f16 || type == Type::b16 || type == Type::pk16;
        if (half) return to_half(f32(x));
        return is_wide(type) && type != Type::pk32 ? bits<u64>(x) : bits<u32>(f32(x));
    }
    if (code == LITERAL) {
        if (type == Type::f64) return u64(literal) << 32;
        if (type == Type::i64) return u64(i64(i32(literal)));
        return literal;
    }
    return 0;
}

class Decoder {
  public:
    Decoder(const Arch &arch, Code &code, const Table &table)
        : arch_(arch), code_(code), table_(table), gfx11_(arch.family == Family::gfx11) {}

    // The instruction at a word of the code; `size` becomes its length in words.
    Inst decode(const u32 *words, size_t left, u32 at, u32 &size) {
        words_ = words;
        left_ = left;
        in_ = Inst{};
        in_.word = at;
        in_.raw[0] = words[0];
        in_.raw[1] = left > 1 ? words[1] : 0;
        size_ = 1;
        literal_seen_ = false;
        any();
        check_clamp();
        if (in_.op == nullptr) in_.run = unknown;
        else if (in_.run == nullptr) in_.run = in_.op->run;
        size = size_;
        return in_;
    }

  private:
    // Integers that saturate are not emulated.
    void check_clamp() {
        if (!in_.op || !in_.clamp || !in_.op->compute) return;
        Type d = in_.op->d;
        if (d != Type::f32 && d != Type::f16) in_.run = unknown;
    }

    void any() {
        u32 w = words_[0];
        if (w >> 31 == 0) {
            u32 top = w >> 25;
            if (top == 0x3f) vop1();
            else if (top == 0x3e) vopc();
            else vop2();
        } else if (w >> 30 == 2) {
            if (w >> 23 == 0x17d) sop1();
            else if (w >> 23 == 0x17e) sopc();
            else if (w >> 23 == 0x17f) sopp();
            else if (w >> 28 == 0xb) sopk();
            else sop2();
        } else {
            size_ = 2;
            if (left_ < 2) return;
            u32 top = w >> 26;
            if (gfx11_ ? w >> 24 == 0xcc : w >> 23 == 0x1a7) vop3p();
            else if (top == (gfx11_ ? 0x35 : 0x34)) vop3();
            else if (gfx11_ && top == 0x32) vopd();
            else if (top == 0x36) ds();
            else if (top == 0x37) flat();
            else if (top == (gfx11_ ? 0x3d : 0x30)) smem();
            else if (top == 0x38) mubuf();
        }
    }

    static bool has(const Op *op, const char *part) { return op && std::strstr(op->name, part); }
    u64 pair() const { return words_[0] | u64(words_[1]) << 32; }

    const Op *find(const char *encoding, u32 opcode) {
        auto codes = table_.find(encoding);
        if (codes == table_.end()) return nullptr;
        auto op = codes->second.find(opcode);
        return op == codes->second.end() ? nullptr : op->second;
    }

    Operand scalar(u32 code, Type type = Type::b32) {
        Operand o;
        o.code = code;
        if (code == LITERAL && !literal_seen_) {  // it follows the instruction, once
            in_.literal = size_ < left_ ? words_[size_] : 0;
            size_++;
            literal_seen_ = true;
        }
        if (code >= 128) o.value = constant(code, type, in_.literal);
        return o;
    }

    // ---- scalar encodings ----

    void sop2() {
        u32 w = words_[0];
        in_.op = find("sop2", field(w, 23, 7));
        in_.dst = field(w, 16, 7);
        in_.src[0] = scalar(field(w, 0, 8), scalar_type());
        in_.src[1] = scalar(field(w, 8, 8), scalar_type());
    }
    void sop1() {
        u32 w = words_[0];
        in_.op = find("sop1", field(w, 8, 8));
        in_.dst = field(w, 16, 7);
        in_.src[0] = scalar(field(w, 0, 8), scalar_type());
    }
    void sopc() {
        u32 w = words_[0];
        in_.op = find("sopc", field(w, 16, 7));
        in_.src[0] = scalar(field(w, 0, 8), scalar_type());
        in_.src[1] = scalar(field(w, 8, 8), scalar_type());
    }
    Type scalar_type() const {
        if (!in_.op) return Type::b32;
        const std::string name = in_.op->name;
        bool wide = name.find("64") != std::string::npos;
        return !wide ? Type::b32 : name.find("i64") != std::string::npos ? Type::i64 : Type::b64;
    }
    void sopk() {
        u32 w = words_[0], op = field(w, 23, 5);
        in_.op = find("sopk", op);
        in_.dst = field(w, 16, 7);
        in_.immediate = field(w, 0, 16);
        in_.src[0].code = in_.dst;
        // Compared with unsigned values, it is not sign-extended.
        bool is_unsigned = in_.op && std::string(in_.op->name).ends_with("_u32");
        in_.src[1].code = 128;
        in_.src[1].value = is_unsigned ? in_.immediate : u32(signed_field(w, 0, 16));
        in_.offset = i32(in_.word + 1) + signed_field(w, 0, 16);
        if (in_.op && !std::strcmp(in_.op->name, "s_setreg_imm32_b32")) size_ = 2;
        in_.branches = has(in_.op, "s_call");
    }
    void sopp() {
        u32 w = words_[0];
        in_.op = find("sopp", field(w, 16, 7));
        in_.immediate = field(w, 0, 16);
        in_.offset = i32(in_.word + 1) + signed_field(w, 0, 16);
        in_.branches = has(in_.op, "branch");
    }
    void smem() {
        u64 w = pair();
        in_.op = find("smem", field(w, 18, 8));
        in_.address = 2 * field(w, 0, 6);
        in_.dst = field(w, 6, 7);
        in_.offset = signed_field(w, 32, 21);
        if (gfx11_) {
            in_.scalar_address = field(w, 57, 7) == 124 ? 0x80 : field(w, 57, 7);
        } else {
            bool immediate = field(w, 17, 1), reg = field(w, 14, 1);
            in_.scalar_address = reg ? field(w, 57, 7) : immediate ? 0x80 : field(w, 32, 7);
            if (!immediate) in_.offset = 0;
        }
    }

    // ---- vector encodings ----

    // Operand k of a vector instruction from its nine bits.
    void source(int k, u32 code) {
        Type type = in_.op ? in_.op->src[k] : Type::b32;
        Operand &o = in_.src[k];
        o = scalar(code, type);
        if (code < VGPR) o.plain = true;
    }
    void vector_destination(u32 reg) {
        in_.dst = in_.sdst = reg;
        if (in_.op && in_.op->d == Type::mask) in_.sdst = VCC;
    }
    // Of 16-bit operands in the short encodings of gfx11, bit 7 of a register means its high half.
    void split_halves(bool destination) {
        if (!gfx11_ || !in_.op) return;
        for (int k = 0; k < 3; k++) {
            Operand &o = in_.src[k];
            if (is_half(in_.op->src[k]) && o.code >= VGPR && (o.code & 0x80)) {
                o.code &= ~0x80u;
                o.low_from_high = true;
                o.plain = false;
            }
        }
        if (destination && is_half(in_.op->d) && (in_.dst & 0x80)) {
            in_.dst &= ~0x80u;
            in_.dst_high = true;
        }
    }

    // The modifiers that a first operand of SDWA or DPP says follow.
    void first_source(u32 code) {
        bool sdwa = !gfx11_ && code == SDWA, dpp = code == DPP, dpp8 = gfx11_ && (code == DPP8 || code == DPP8FI);
        if (!sdwa && !dpp && !dpp8) return source(0, code);
        u32 at = size_++;
        u32 w = at < left_ ? words_[at] : 0;
        in_.src[0].code = VGPR + field(w, 0, 8);
        in_.src[0].plain = false;
        if (dpp8) {
            in_.dpp = in_.dpp8 = true;
            in_.fetch_inactive = code == DPP8FI;
            in_.dpp_control = field(w, 8, 24);
        } else if (dpp) {
            in_.dpp = true;
            in_.dpp_control = field(w, 8, 9);
            in_.fetch_inactive = gfx11_ && field(w, 18, 1);
            in_.bound_ctrl = field(w, 19, 1);
            modifiers(0, field(w, 21, 1), field(w, 20, 1));
            modifiers(1, field(w, 23, 1), field(w, 22, 1));
            in_.bank_mask = u8(field(w, 24, 4));
            in_.row_mask = u8(field(w, 28, 4));
        } else {
            in_.sdwa = true;
            bool compare = in_.op && in_.op->d == Type::mask;
            if (compare) {
                in_.sdst = field(w, 15, 1) ? field(w, 8, 7) : VCC;
            } else {
                in_.dst_select = u8(field(w, 8, 3));
                in_.dst_unused = u8(field(w, 11, 2));
                in_.clamp = field(w, 13, 1);
                in_.omod = u8(field(w, 14, 2));
            }
            in_.src_select[0] = u8(field(w, 16, 3));
            in_.src_sext[0] = field(w, 19, 1);
            modifiers(0, field(w, 21, 1), field(w, 20, 1));
            if (field(w, 23, 1)) in_.src[0] = scalar(field(w, 0, 8)), in_.src[0].plain = false;
            in_.src_select[1] = u8(field(w, 24, 3));
            in_.src_sext[1] = field(w, 27, 1);
            modifiers(1, field(w, 29, 1), field(w, 28, 1));
            second_is_scalar_ = field(w, 31, 1);
        }
    }
    void modifiers(int k, bool absolute, bool negate) {
        in_.src[k].absolute = absolute;
        in_.src[k].negate = negate;
    }

    void vop1() {
        u32 w = words_[0], op = field(w, 9, 8);
        in_.op = find("vop", op + (gfx11_ ? 384 : 320));
        short_form();
        first_source(field(w, 0, 9));
        vector_destination(field(w, 17, 8));
        split_halves(true);
        third();
    }
    void vop2() {
        u32 w = words_[0], op = field(w, 25, 6);
        in_.op = find("vop", op + 256);
        short_form();
        first_source(field(w, 0, 9));
        second_source(field(w, 9, 8));
        vector_destination(field(w, 17, 8));
        if (in_.op && in_.op->carries) in_.sdst = VCC;
        std::string name = in_.op ? in_.op->name : "";
        if (name.find("fmaak") != std::string::npos) {
            source(2, LITERAL);
        } else if (name.find("fmamk") != std::string::npos) {
            in_.src[2] = in_.src[1];
            source(1, LITERAL);
        }
        split_halves(true);
        third();
    }
    void vopc() {
        u32 w = words_[0];
        compare(field(w, 17, 8));
        in_.sdst = VCC;
        short_form();
        first_source(field(w, 0, 9));
        second_source(field(w, 9, 8));
        split_halves(false);
    }
    // v_cmpx is v_cmp with another destination.
    void compare(u32 opcode) {
        bool x = gfx11_ ? opcode & 0x80 : opcode & 0x10 && opcode >= 0x20;
        if (!gfx11_ && opcode < 0x20) x = opcode & 1;
        u32 plain = gfx11_ ? opcode & 0x7f : opcode < 0x20 ? opcode & ~1u : opcode & ~0x10u;
        in_.op = find("vop", plain);
        in_.writes_exec = x;
    }
    void second_source(u32 reg) {
        Operand old = in_.src[1];
        in_.src[1].code = VGPR + reg;
        bool modified = in_.sdwa || (in_.dpp && (old.absolute || old.negate));
        if (in_.sdwa && second_is_scalar_) in_.src[1] = scalar(reg);
        in_.src[1].absolute = old.absolute;
        in_.src[1].negate = old.negate;
        in_.src[1].plain = !modified;
    }
    void short_form() {
        second_is_scalar_ = false;
        in_.zero_high = !gfx11_;
    }
    // A third operand that the encoding leaves out.
    void third() {
        if (!in_.op) return;
        if (in_.op->accumulates) in_.src[2].code = VGPR + in_.dst;
        if (in_.op->src[2] == Type::mask) in_.src[2].code = VCC;
    }

    void vop3() {
        u64 w = pair();
        u32 opcode = field(w, 16, 10);
        bool is_compare = opcode < 256;
        if (is_compare) compare(opcode);
        else in_.op = find("vop", opcode);
        if (!in_.op) {
            for (int at : {32, 41, 50})
                if (field(w, at, 9) == LITERAL) size_ = 3;
            return;
        }
        bool in_vop12 = opcode < (gfx11_ ? 512u : 448u);
        in_.zero_high = !gfx11_ && in_vop12;
        first_source(field(w, 32, 9));
        source(1, field(w, 41, 9));
        source(2, field(w, 50, 9));
        if (in_.op->src[2] == Type::mask && in_.src[2].code >= 128) in_.src[2].code = VCC;
        vector_destination(field(w, 0, 8));
        if (is_compare) in_.sdst = field(w, 0, 8);
        if (in_.op->accumulates) in_.src[2] = Operand{}, in_.src[2].code = VGPR + in_.dst;
        in_.omod = u8(field(w, 59, 2));
        in_.clamp = field(w, 15, 1);
        u32 absolute = field(w, 8, 3), select = field(w, 11, 4), negate = field(w, 61, 3);
        if (in_.op->carries) {
            in_.sdst = field(w, 8, 7);
            absolute = select = 0;
            in_.clamp = in_.op->d == Type::f32 && in_.clamp;
        }
        for (int k = 0; k < 3; k++) {
            Operand &o = in_.src[k];
            modifiers(k, o.absolute || (absolute >> k & 1), o.negate || (negate >> k & 1));
            o.low_from_high = select >> k & 1;
            o.plain = o.plain && !o.absolute && !o.negate && !o.low_from_high;
        }
        in_.dst_high = select >> 3 & 1;
    }

    void vop3p() {
        u64 w = pair();
        in_.op = find("vop3p", field(w, 16, 7));
        bool matrix = in_.op && (std::strstr(in_.op->name, "mfma") || std::strstr(in_.op->name, "wmma"));
        bool acc_move = in_.op && std::strstr(in_.op->name, "accvgpr");
        u32 codes[] = {field(w, 32, 9), field(w, 41, 9), field(w, 50, 9)};
        for (int k = 0; k < 3; k++) source(k, codes[k]);
        vector_destination(field(w, 0, 8));
        if (!in_.op) return;
        if ((matrix || acc_move) && !gfx11_) {
            // Bits that choose accumulation registers.
            if (acc_move) {
                bool reads = std::strstr(in_.op->name, "read");
                if (reads) in_.src[0].code = AGPR + (codes[0] & 255);
                else in_.dst += 256;
                return;
            }
            if (field(w, 59, 1)) in_.src[0].code += 256;
            if (field(w, 60, 1)) in_.src[1].code += 256;
            if (field(w, 15, 1)) {
                in_.dst += 256;
                if (in_.src[2].code >= VGPR) in_.src[2].code += 256;
            }
            in_.immediate = field(w, 8, 7) | field(w, 61, 3) << 7;
            return;
        }
        u32 select = field(w, 11, 3), select_high = field(w, 59, 2) | field(w, 14, 1) << 2;
        u32 negate = field(w, 61, 3), negate_high = field(w, 8, 3);
        if (matrix) {
            if (negate || negate_high) in_.run = unknown;
            return;
        }
        in_.clamp = field(w, 15, 1);
        for (int k = 0; k < 3; k++) {
            Operand &o = in_.src[k];
            o.low_from_high = select >> k & 1;
            o.high_from_high = select_high >> k & 1;
            o.negate = negate >> k & 1;
            o.negate_high = negate_high >> k & 1;
            Type type = in_.op->src[k];
            if (type == Type::mix && o.high_from_high && codes[k] >= 240 && codes[k] <= 248)
                o.value = constant(codes[k], Type::f16, 0);
            bool halves = type == Type::pk16 || type == Type::pk32;
            o.plain = halves ? !o.low_from_high && o.high_from_high && !o.negate && !o.negate_high
                             : type != Type::mix && !o.negate;
        }
        if (!std::strcmp(in_.op->name, "v_fma_mixhi_f16")) in_.dst_high = true;
        if (in_.op->accumulates) in_.src[2] = Operand{}, in_.src[2].code = VGPR + in_.dst;
        // A constant has no high half.
        for (Operand &o : in_.src)
            if (o.code >= 128 && o.code < VGPR && o.code != LITERAL) o.plain = false;
    }

    void vopd() {
        u64 w = pair();
        const Op *x = find("vopd", field(w, 22, 4)), *y = find("vopd", field(w, 17, 5));
        if (!x || !y) {
            if (field(w, 0, 9) == LITERAL || field(w, 32, 9) == LITERAL) size_ = 3;
            return;
        }
        u32 dx = field(w, 56, 8), dy = field(w, 49, 7) << 1 | ((dx & 1) ^ 1);
        auto half = [&](const Op *op, u32 src0, u32 src1, u32 dst) {
            in_.op = op;
            source(0, src0);
            in_.src[1] = Operand{};
            in_.src[1].code = VGPR + src1;
            in_.dst = in_.sdst = dst;
            in_.src[2] = Operand{};
            if (std::strstr(op->name, "fmaak")) {
                source(2, LITERAL);
            } else if (std::strstr(op->name, "fmamk")) {
                in_.src[2] = in_.src[1];
                source(1, LITERAL);
            }
            third();
        };
        half(y, field(w, 32, 9), field(w, 41, 8), dy);
        auto second = std::make_unique<Inst>(in_);
        second->run = y->run;
        half(x, field(w, 0, 9), field(w, 9, 8), dx);
        second->literal = in_.literal;
        in_.second = second.get();
        code_.seconds.push_back(std::move(second));
    }

    // ---- memory encodings ----

    void ds() {
        u64 w = pair();
        u32 opcode = gfx11_ ? field(w, 18, 8) : field(w, 17, 8);
        in_.op = find("ds", opcode);
        u32 acc = !gfx11_ && field(w, 25, 1) ? 256 : 0;
        in_.offset = i32(field(w, 0, 16));
        in_.offset1 = field(w, 8, 8);
        in_.address = VGPR + field(w, 32, 8);
        in_.data = VGPR + acc + field(w, 40, 8);
        in_.data1 = VGPR + acc + field(w, 48, 8);
        in_.dst = VGPR + acc + field(w, 56, 8);
        in_.returns = opcode & 0x20;
        if (field(w, gfx11_ ? 17 : 16, 1)) in_.op = nullptr;  // global data share
    }

    void flat() {
        u64 w = pair();
        in_.op = find("flat", field(w, 18, 7));
        u32 segment = gfx11_ ? field(w, 16, 2) : field(w, 14, 2);
        u32 acc = !gfx11_ && field(w, 55, 1) ? 256 : 0;
        in_.immediate = segment;
        in_.offset = segment == 0 && !gfx11_ ? i32(field(w, 0, 12)) : signed_field(w, 0, 13);
        in_.address = VGPR + field(w, 32, 8);
        in_.data = VGPR + acc + field(w, 40, 8);
        in_.dst = VGPR + acc + field(w, 56, 8);
        u32 base = field(w, 48, 7);
        in_.scalar_address = base == (gfx11_ ? 124u : 127u) || segment == 0 ? 0x80 : base;
        in_.returns = gfx11_ ? field(w, 14, 1) : field(w, 16, 1);
        if (segment == 1) {
            bool has_address = gfx11_ ? field(w, 55, 1) : field(w, 13, 1);
            if (!arch_.flat_scratch) in_.op = nullptr;
            if (!has_address) in_.address = 0;
        }
    }

    void mubuf() {
        u64 w = pair();
        in_.op = find("mubuf", gfx11_ ? field(w, 18, 8) : field(w, 18, 7));
        if (!in_.op || std::strstr(in_.op->name, "inv") || std::strstr(in_.op->name, "wb")) return;
        // Only scratch of gfx90a is reached through a buffer.
        u32 acc = field(w, 55, 1) ? 256 : 0;
        in_.immediate = 3;
        in_.offset = i32(field(w, 0, 12));
        in_.address = field(w, 12, 1) ? VGPR + field(w, 32, 8) : 0;
        in_.data = in_.dst = VGPR + acc + field(w, 40, 8);
        u32 base = field(w, 56, 8);
        in_.scalar_address = base < 128 ? base : 0x80;
        if (base >= 128) in_.offset += i32(constant(base, Type::b32, 0)) / 64;
        if (field(w, 13, 1) || field(w, 48, 5) != 0 || arch_.flat_scratch) in_.op = nullptr;
    }

    const Arch &arch_;
    Code &code_;
    const Table &table_;
    bool gfx11_;
    const u32 *words_ = nullptr;
    size_t left_ = 0;
    Inst in_;
    u32 size_ = 0;
    bool second_is_scalar_ = false, literal_seen_ = false;
};

}  // namespace

// Decode words first..last of the image, which hold functions, one after another.
void decode_range(Code &code, u32 first, u32 last) {
    static const Table tables[] = {table_of(Family::gfx9), table_of(Family::gfx11)};
    Decoder decoder(*code.arch, code, tables[int(code.arch->family)]);
    const u32 *words = reinterpret_cast<const u32 *>(code.image.data());
    for (u32 at = first; at < last;) {
        u32 size = 1;
        code.index[at] = i32(code.program.size());
        code.program.push_back(decoder.decode(words + at, last - at, at, size));
        at += size;
    }
}

// Turn the branches' targets from words into instructions.
void resolve_branches(Code &code) {
    for (Inst &in : code.program)
        if (in.branches) {
            bool inside = in.offset >= 0 && u32(in.offset) < code.index.size();
            in.offset = inside ? code.index[u32(in.offset)] : -1;
        }
}

std::string describe(const Code &code, const Inst &in) {
    std::string where = "?";
    u32 offset = 0;
    for (const auto &[word, name] : code.functions)
        if (word <= in.word) where = name, offset = 4 * (in.word - word);
    std::string what = in.op ? in.op->name : format("instruction %08x %08x", in.raw[0], in.raw[1]);
    if (!what.compare(0, 5, "flat_")) {
        static const char *segments[] = {"flat", "scratch", "global", "buffer"};
        what.replace(0, 4, segments[in.immediate & 3]);
    }
    if (in.second) what += format(" and %s", in.second->op->name);
    return format("%s+0x%x: %s", where.c_str(), offset, what.c_str());
}

void unknown(Wave &w, const Inst &in) {
    fault(w, in, "is not known to the emulator (tests/amd)");
}

}  // namespace amd
