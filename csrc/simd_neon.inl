// Arm: four registers each, with the DOTPROD extension, and I8MM where the unit has it. Plain loops without DOTPROD.

#if !defined(__ARM_FEATURE_DOTPROD)
#include "simd_portable.inl"
#else

struct F16 { float32x4_t v[4]; };
struct I16 { int32x4_t v[4]; };
struct B64 { uint8x16_t v[4]; };

#define EACH _Pragma("GCC unroll 4") for (int i = 0; i < 4; ++i)

INLINE F16 load_f(const float* p) { F16 r; EACH r.v[i] = vld1q_f32(p + 4 * i); return r; }
INLINE void store_f(float* p, F16 a) { EACH vst1q_f32(p + 4 * i, a.v[i]); }
INLINE F16 set_f(float a) { F16 r; EACH r.v[i] = vdupq_n_f32(a); return r; }
INLINE F16 operator+(F16 a, F16 b) { EACH a.v[i] = vaddq_f32(a.v[i], b.v[i]); return a; }
INLINE F16 operator-(F16 a, F16 b) { EACH a.v[i] = vsubq_f32(a.v[i], b.v[i]); return a; }
INLINE F16 operator*(F16 a, F16 b) { EACH a.v[i] = vmulq_f32(a.v[i], b.v[i]); return a; }
INLINE F16 operator/(F16 a, F16 b) { EACH a.v[i] = vdivq_f32(a.v[i], b.v[i]); return a; }
// Lane by lane: a > b ? yes : no.
INLINE F16 select_gt_f(F16 a, F16 b, F16 yes, F16 no) {
    EACH a.v[i] = vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), yes.v[i], no.v[i]);
    return a;
}
// As the x86 instructions: the second operand if either is NaN (fmax would be NaN) or both are zero.
INLINE F16 max_f(F16 a, F16 b) { return select_gt_f(a, b, a, b); }
INLINE F16 min_f(F16 a, F16 b) { return select_gt_f(b, a, a, b); }
INLINE F16 abs_f(F16 a) { EACH a.v[i] = vabsq_f32(a.v[i]); return a; }
INLINE F16 sqrt_f(F16 a) { EACH a.v[i] = vsqrtq_f32(a.v[i]); return a; }

INLINE I16 load_i(const int32_t* p) { I16 r; EACH r.v[i] = vld1q_s32(p + 4 * i); return r; }
INLINE void store_i(int32_t* p, I16 a) { EACH vst1q_s32(p + 4 * i, a.v[i]); }
INLINE I16 set_i(int32_t a) { I16 r; EACH r.v[i] = vdupq_n_s32(a); return r; }
INLINE I16 operator+(I16 a, I16 b) { EACH a.v[i] = vaddq_s32(a.v[i], b.v[i]); return a; }
INLINE I16 operator-(I16 a, I16 b) { EACH a.v[i] = vsubq_s32(a.v[i], b.v[i]); return a; }
template <int bits> INLINE I16 shift_left_i(I16 a) { EACH a.v[i] = vshlq_n_s32(a.v[i], bits); return a; }
template <int bits> INLINE I16 shift_right_i(I16 a) { EACH a.v[i] = vshrq_n_s32(a.v[i], bits); return a; }
INLINE F16 to_f(I16 a) { F16 r; EACH r.v[i] = vcvtq_f32_s32(a.v[i]); return r; }
INLINE I16 round_to_i(F16 a) { I16 r; EACH r.v[i] = vcvtnq_s32_f32(a.v[i]); return r; }  // nearest, ties to even
INLINE F16 as_f(I16 a) { F16 r; EACH r.v[i] = vreinterpretq_f32_s32(a.v[i]); return r; }
INLINE I16 as_i(F16 a) { I16 r; EACH r.v[i] = vreinterpretq_s32_f32(a.v[i]); return r; }

INLINE B64 load_b(const void* p) { B64 r; EACH r.v[i] = vld1q_u8(static_cast<const uint8_t*>(p) + 16 * i); return r; }
INLINE void store_b(void* p, B64 a) { EACH vst1q_u8(static_cast<uint8_t*>(p) + 16 * i, a.v[i]); }
// Four bytes (two bfloat16) repeated sixteen times.
INLINE B64 repeat4(const void* p) {
    uint32_t word;
    __builtin_memcpy(&word, p, 4);
    B64 r;
    EACH r.v[i] = vreinterpretq_u8_u32(vdupq_n_u32(word));
    return r;
}
INLINE B64 low_nibbles(B64 a) { EACH a.v[i] = vandq_u8(a.v[i], vdupq_n_u8(15)); return a; }
INLINE B64 high_nibbles(B64 a) { EACH a.v[i] = vshrq_n_u8(a.v[i], 4); return a; }

// Sixteen bfloat16 as floats, and back with rounding to nearest even (NaN is not expected).
INLINE F16 load_bf16(const uint16_t* p) {
    F16 r;
    EACH r.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
    return r;
}
INLINE void store_bf16(uint16_t* p, F16 a) {
    EACH {
        const uint32x4_t bits = vreinterpretq_u32_f32(a.v[i]);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        vst1_u16(p + 4 * i, vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16));
    }
}
// Sixteen integers within -128 .. 127 (or 0 .. 255) as bytes, and signed bytes as integers.
INLINE void store_i8(void* p, I16 a) {
    const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
    const int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
    vst1q_s8(static_cast<int8_t*>(p), vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
INLINE I16 load_i8(const void* p) {
    const int8x16_t bytes = vld1q_s8(static_cast<const int8_t*>(p));
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
    return {{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)),
             vmovl_s16(vget_high_s16(high))}};
}

// acc[i] += sum over j < 4 of u[4i + j] * s[4i + j]; u unsigned, s signed and not below -127. Exact.
INLINE I16 dot_us(I16 acc, B64 u, B64 s) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    EACH acc.v[i] = vusdotq_s32(acc.v[i], u.v[i], vreinterpretq_s8_u8(s.v[i]));
#else
    // (u - 128) . s + 128 sum(s). The second part leaves the loop over u.
    EACH {
        const int8x16_t weights = vreinterpretq_s8_u8(s.v[i]);
        const int8x16_t centred = vreinterpretq_s8_u8(veorq_u8(u.v[i], vdupq_n_u8(0x80)));
        const int32x4_t excess = vdotq_s32(vdupq_n_s32(0), weights, vdupq_n_s8(-128));
        acc.v[i] = vsubq_s32(vdotq_s32(acc.v[i], centred, weights), excess);
    }
#endif
    return acc;
}
// The same for u of at most 127, which is cheaper where the instruction wants both signed.
INLINE I16 dot_small_us(I16 acc, B64 u, B64 s) {
    EACH acc.v[i] = vdotq_s32(acc.v[i], vreinterpretq_s8_u8(u.v[i]), vreinterpretq_s8_u8(s.v[i]));
    return acc;
}
// acc[i] = (acc[i] + a[2i + 1] * b[2i + 1]) + a[2i] * b[2i] over bfloat16: what VDPBF16PS does, and BFDOT does not.
INLINE float32x4_t odd_bf16(uint8x16_t a) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u8(a), vdupq_n_u32(0xffff0000u)));
}
INLINE float32x4_t even_bf16(uint8x16_t a) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u8(a), 16)); }
INLINE F16 dot_bf16(F16 acc, B64 a, B64 b) {
    EACH {
        const float32x4_t odd = vfmaq_f32(acc.v[i], odd_bf16(a.v[i]), odd_bf16(b.v[i]));
        acc.v[i] = vfmaq_f32(odd, even_bf16(a.v[i]), even_bf16(b.v[i]));
    }
    return acc;
}
INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
#undef EACH
#endif
