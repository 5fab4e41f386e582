// AVX-512: one register each. VNNI and BF16 where the unit has them, emulated exactly where it has not.

// __m512i is eight 64-bit lanes to GCC, and what it loads as those but adds as sixteen 32-bit lanes it keeps twice: a
// tile of sums then no longer fits the registers.
typedef int32_t Int32x16 __attribute__((vector_size(64)));

struct F16 { __m512 v; };
struct I16 { Int32x16 v; };
struct B64 { __m512i v; };

INLINE __m512i raw(I16 a) { return (__m512i)a.v; }
INLINE I16 from_raw(__m512i a) { return {(Int32x16)a}; }

INLINE F16 load_f(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE void store_f(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
INLINE F16 set_f(float a) { return {_mm512_set1_ps(a)}; }
INLINE F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE F16 max_f(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE F16 min_f(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
INLINE F16 abs_f(F16 a) { return {_mm512_abs_ps(a.v)}; }
INLINE F16 sqrt_f(F16 a) { return {_mm512_sqrt_ps(a.v)}; }
// Lane by lane: a > b ? yes : no.
INLINE F16 select_gt_f(F16 a, F16 b, F16 yes, F16 no) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), no.v, yes.v)};
}

INLINE I16 load_i(const int32_t* p) { return from_raw(_mm512_loadu_si512(p)); }
INLINE void store_i(int32_t* p, I16 a) { _mm512_storeu_si512(p, raw(a)); }
INLINE I16 set_i(int32_t a) { return from_raw(_mm512_set1_epi32(a)); }
INLINE I16 operator+(I16 a, I16 b) { return from_raw(_mm512_add_epi32(raw(a), raw(b))); }
INLINE I16 operator-(I16 a, I16 b) { return from_raw(_mm512_sub_epi32(raw(a), raw(b))); }
template <int bits> INLINE I16 shift_left_i(I16 a) { return from_raw(_mm512_slli_epi32(raw(a), bits)); }
template <int bits> INLINE I16 shift_right_i(I16 a) { return from_raw(_mm512_srai_epi32(raw(a), bits)); }
INLINE F16 to_f(I16 a) { return {_mm512_cvtepi32_ps(raw(a))}; }
INLINE I16 round_to_i(F16 a) { return from_raw(_mm512_cvtps_epi32(a.v)); }  // nearest, ties to even
INLINE F16 as_f(I16 a) { return {_mm512_castsi512_ps(raw(a))}; }
INLINE I16 as_i(F16 a) { return from_raw(_mm512_castps_si512(a.v)); }

INLINE B64 load_b(const void* p) { return {_mm512_loadu_si512(p)}; }
INLINE void store_b(void* p, B64 a) { _mm512_storeu_si512(p, a.v); }
// Four bytes (two bfloat16) repeated sixteen times.
INLINE B64 repeat4(const void* p) {
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return {_mm512_set1_epi32(word)};
}
INLINE B64 low_nibbles(B64 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
INLINE B64 high_nibbles(B64 a) {
    return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))};
}

// Sixteen bfloat16 as floats, and back with rounding to nearest even (NaN is not expected).
INLINE F16 load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
INLINE void store_bf16(uint16_t* p, F16 a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
// Sixteen integers within -128 .. 127 (or 0 .. 255) as bytes, and signed bytes as integers.
INLINE void store_i8(void* p, I16 a) { _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(raw(a))); }
INLINE I16 load_i8(const void* p) {
    return from_raw(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}

// acc[i] += sum over j < 4 of u[4i + j] * s[4i + j]; u unsigned, s signed and not below -127. Exact.
INLINE I16 dot_us(I16 acc, B64 u, B64 s) {
#if defined(__AVX512VNNI__)
    return from_raw(_mm512_dpbusd_epi32(raw(acc), u.v, s.v));
#else
    const __m512i ones = _mm512_set1_epi16(1);
    const __m512i low = _mm512_maddubs_epi16(_mm512_and_si512(u.v, _mm512_set1_epi8(0x7f)), s.v);
    const __m512i top = _mm512_and_si512(_mm512_srli_epi16(u.v, 7), _mm512_set1_epi8(1));
    const __m512i high = _mm512_slli_epi16(_mm512_maddubs_epi16(top, s.v), 7);
    const __m512i sum = _mm512_add_epi32(_mm512_madd_epi16(low, ones), _mm512_madd_epi16(high, ones));
    return from_raw(_mm512_add_epi32(raw(acc), sum));
#endif
}
// The same for u of at most 127, which is cheaper where byte products saturate.
INLINE I16 dot_small_us(I16 acc, B64 u, B64 s) {
#if defined(__AVX512VNNI__)
    return from_raw(_mm512_dpbusd_epi32(raw(acc), u.v, s.v));
#else
    const __m512i pairs = _mm512_maddubs_epi16(u.v, s.v);
    return from_raw(_mm512_add_epi32(raw(acc), _mm512_madd_epi16(pairs, _mm512_set1_epi16(1))));
#endif
}
// acc[i] = (acc[i] + a[2i + 1] * b[2i + 1]) + a[2i] * b[2i] over bfloat16: what VDPBF16PS does.
INLINE F16 dot_bf16(F16 acc, B64 a, B64 b) {
#if defined(__AVX512BF16__)
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)};
#else
    const __m512i top = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
    const __m512 odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a.v, top)),
                                       _mm512_castsi512_ps(_mm512_and_si512(b.v, top)), acc.v);
    return {_mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16)),
                            _mm512_castsi512_ps(_mm512_slli_epi32(b.v, 16)), odd)};
#endif
}
INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
