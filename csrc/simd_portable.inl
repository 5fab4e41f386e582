// Plain loops that any compiler can turn into what the machine has.

struct F16 { float v[16]; };
struct I16 { int32_t v[16]; };
struct B64 { uint8_t v[64]; };

#define EACH for (int i = 0; i < 16; ++i)

INLINE F16 load_f(const float* p) { F16 r; EACH r.v[i] = p[i]; return r; }
INLINE void store_f(float* p, F16 a) { EACH p[i] = a.v[i]; }
INLINE F16 set_f(float a) { F16 r; EACH r.v[i] = a; return r; }
INLINE F16 operator+(F16 a, F16 b) { EACH a.v[i] += b.v[i]; return a; }
INLINE F16 operator-(F16 a, F16 b) { EACH a.v[i] -= b.v[i]; return a; }
INLINE F16 operator*(F16 a, F16 b) { EACH a.v[i] *= b.v[i]; return a; }
INLINE F16 operator/(F16 a, F16 b) { EACH a.v[i] /= b.v[i]; return a; }
// As the x86 instructions: the second operand if either is NaN.
INLINE F16 max_f(F16 a, F16 b) { EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
INLINE F16 min_f(F16 a, F16 b) { EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
INLINE F16 abs_f(F16 a) { EACH a.v[i] = __builtin_fabsf(a.v[i]); return a; }
INLINE F16 sqrt_f(F16 a) { EACH a.v[i] = __builtin_sqrtf(a.v[i]); return a; }
// Lane by lane: a > b ? yes : no.
INLINE F16 select_gt_f(F16 a, F16 b, F16 yes, F16 no) {
    EACH no.v[i] = a.v[i] > b.v[i] ? yes.v[i] : no.v[i];
    return no;
}

INLINE I16 load_i(const int32_t* p) { I16 r; EACH r.v[i] = p[i]; return r; }
INLINE void store_i(int32_t* p, I16 a) { EACH p[i] = a.v[i]; }
INLINE I16 set_i(int32_t a) { I16 r; EACH r.v[i] = a; return r; }
INLINE I16 operator+(I16 a, I16 b) { EACH a.v[i] += b.v[i]; return a; }
INLINE I16 operator-(I16 a, I16 b) { EACH a.v[i] -= b.v[i]; return a; }
template <int bits> INLINE I16 shift_left_i(I16 a) {
    EACH a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << bits);
    return a;
}
template <int bits> INLINE I16 shift_right_i(I16 a) { EACH a.v[i] >>= bits; return a; }
INLINE F16 to_f(I16 a) { F16 r; EACH r.v[i] = static_cast<float>(a.v[i]); return r; }
INLINE I16 round_to_i(F16 a) { I16 r; EACH r.v[i] = static_cast<int32_t>(__builtin_rintf(a.v[i])); return r; }
INLINE F16 as_f(I16 a) { F16 r; __builtin_memcpy(&r, &a, 64); return r; }
INLINE I16 as_i(F16 a) { I16 r; __builtin_memcpy(&r, &a, 64); return r; }

INLINE B64 load_b(const void* p) { B64 r; __builtin_memcpy(&r, p, 64); return r; }
INLINE void store_b(void* p, B64 a) { __builtin_memcpy(p, &a, 64); }
// Four bytes (two bfloat16) repeated sixteen times.
INLINE B64 repeat4(const void* p) { B64 r; EACH __builtin_memcpy(r.v + 4 * i, p, 4); return r; }
INLINE B64 low_nibbles(B64 a) { for (int i = 0; i < 64; ++i) a.v[i] &= 15; return a; }
INLINE B64 high_nibbles(B64 a) { for (int i = 0; i < 64; ++i) a.v[i] >>= 4; return a; }

INLINE float bf16_to_float(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}
// Sixteen bfloat16 as floats, and back with rounding to nearest even (NaN is not expected).
INLINE F16 load_bf16(const uint16_t* p) { F16 r; EACH r.v[i] = bf16_to_float(p[i]); return r; }
INLINE void store_bf16(uint16_t* p, F16 a) {
    EACH {
        uint32_t bits;
        __builtin_memcpy(&bits, &a.v[i], 4);
        p[i] = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}
// Sixteen integers within -128 .. 127 (or 0 .. 255) as bytes, and signed bytes as integers.
INLINE void store_i8(void* p, I16 a) { EACH static_cast<uint8_t*>(p)[i] = static_cast<uint8_t>(a.v[i]); }
INLINE I16 load_i8(const void* p) { I16 r; EACH r.v[i] = static_cast<const int8_t*>(p)[i]; return r; }

// acc[i] += sum over j < 4 of u[4i + j] * s[4i + j]; u unsigned, s signed and not below -127. Exact.
INLINE I16 dot_us(I16 acc, B64 u, B64 s) {
    EACH {
        int32_t sum = 0;
        for (int j = 0; j < 4; ++j) sum += static_cast<int32_t>(u.v[4 * i + j]) * static_cast<int8_t>(s.v[4 * i + j]);
        acc.v[i] += sum;
    }
    return acc;
}
// The same for u of at most 127, which is cheaper where byte products saturate.
INLINE I16 dot_small_us(I16 acc, B64 u, B64 s) { return dot_us(acc, u, s); }
// acc[i] = (acc[i] + a[2i + 1] * b[2i + 1]) + a[2i] * b[2i] over bfloat16: what VDPBF16PS does.
INLINE F16 dot_bf16(F16 acc, B64 a, B64 b) {
    EACH {
        uint16_t x[2], y[2];
        __builtin_memcpy(x, a.v + 4 * i, 4);
        __builtin_memcpy(y, b.v + 4 * i, 4);
        acc.v[i] += bf16_to_float(x[1]) * bf16_to_float(y[1]);
        acc.v[i] += bf16_to_float(x[0]) * bf16_to_float(y[0]);
    }
    return acc;
}
INLINE void prefetch(const void*) {}
#undef EACH
