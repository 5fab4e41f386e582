// AVX2 with FMA: two registers each, the first for the lower lanes. There are sixteen: they hold four sums beside what
// these are made of.

struct F16 { __m256 low, high; };
struct I16 { __m256i low, high; };
struct B64 { __m256i low, high; };

INLINE F16 load_f(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store_f(float* p, F16 a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
}
INLINE F16 set_f(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
INLINE F16 operator+(F16 a, F16 b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
INLINE F16 operator-(F16 a, F16 b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
INLINE F16 operator*(F16 a, F16 b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
INLINE F16 operator/(F16 a, F16 b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
INLINE F16 max_f(F16 a, F16 b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
INLINE F16 min_f(F16 a, F16 b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
INLINE F16 abs_f(F16 a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
INLINE F16 sqrt_f(F16 a) { return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)}; }
// Lane by lane: a > b ? yes : no.
INLINE F16 select_gt_f(F16 a, F16 b, F16 yes, F16 no) {
    return {_mm256_blendv_ps(no.low, yes.low, _mm256_cmp_ps(a.low, b.low, _CMP_GT_OQ)),
            _mm256_blendv_ps(no.high, yes.high, _mm256_cmp_ps(a.high, b.high, _CMP_GT_OQ))};
}

INLINE __m256i load_half(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE void store_half(void* p, __m256i a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }

INLINE I16 load_i(const int32_t* p) { return {load_half(p), load_half(p + 8)}; }
INLINE void store_i(int32_t* p, I16 a) {
    store_half(p, a.low);
    store_half(p + 8, a.high);
}
INLINE I16 set_i(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
INLINE I16 operator+(I16 a, I16 b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
INLINE I16 operator-(I16 a, I16 b) { return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
template <int bits> INLINE I16 shift_left_i(I16 a) {
    return {_mm256_slli_epi32(a.low, bits), _mm256_slli_epi32(a.high, bits)};
}
template <int bits> INLINE I16 shift_right_i(I16 a) {
    return {_mm256_srai_epi32(a.low, bits), _mm256_srai_epi32(a.high, bits)};
}
INLINE F16 to_f(I16 a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
INLINE I16 round_to_i(F16 a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }  // ties to even
INLINE F16 as_f(I16 a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
INLINE I16 as_i(F16 a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }

INLINE B64 load_b(const void* p) { return {load_half(p), load_half(static_cast<const char*>(p) + 32)}; }
INLINE void store_b(void* p, B64 a) {
    store_half(p, a.low);
    store_half(static_cast<char*>(p) + 32, a.high);
}
// Four bytes (two bfloat16) repeated sixteen times.
INLINE B64 repeat4(const void* p) {
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return {_mm256_set1_epi32(word), _mm256_set1_epi32(word)};
}
INLINE B64 low_nibbles(B64 a) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(a.low, mask), _mm256_and_si256(a.high, mask)};
}
INLINE B64 high_nibbles(B64 a) {
    return low_nibbles({_mm256_srli_epi16(a.low, 4), _mm256_srli_epi16(a.high, 4)});
}

// Sixteen bfloat16 as floats, and back with rounding to nearest even (NaN is not expected).
INLINE __m256 widen_bf16(__m128i halves) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
INLINE F16 load_bf16(const uint16_t* p) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(p);
    return {widen_bf16(_mm_loadu_si128(halves)), widen_bf16(_mm_loadu_si128(halves + 1))};
}
INLINE __m256i round_bf16(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    return _mm256_srli_epi32(rounded, 16);
}
// Sixteen integers within 0 .. 65535 as 16 bits each. Packing works within halves of a register, hence the permutation.
INLINE __m256i narrow_to_16(__m256i low, __m256i high) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
}
INLINE void store_bf16(uint16_t* p, F16 a) { store_half(p, narrow_to_16(round_bf16(a.low), round_bf16(a.high))); }

// Sixteen integers within -128 .. 127 (or 0 .. 255) as bytes, and signed bytes as integers.
INLINE void store_i8(void* p, I16 a) {
    const __m256i byte = _mm256_set1_epi32(255);
    const __m256i words = narrow_to_16(_mm256_and_si256(a.low, byte), _mm256_and_si256(a.high, byte));
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(static_cast<__m128i*>(p), bytes);
}
INLINE I16 load_i8(const void* p) {
    const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
    return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}

// acc[i] += sum over j < 4 of u[4i + j] * s[4i + j]; u unsigned, s signed and not below -127. Exact.
// The byte product maddubs saturates, so even and odd bytes are widened to 16 bits in place and multiplied apart. The
// three operations that widen s and the two that widen u leave the loop over the other operand: in a tile four remain.
INLINE __m256i dot_us_half(__m256i acc, __m256i u, __m256i s) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
INLINE I16 dot_us(I16 acc, B64 u, B64 s) {
    return {dot_us_half(acc.low, u.low, s.low), dot_us_half(acc.high, u.high, s.high)};
}
// The same for u of at most 127, which is cheaper where byte products saturate.
INLINE __m256i dot_small_us_half(__m256i acc, __m256i u, __m256i s) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}
INLINE I16 dot_small_us(I16 acc, B64 u, B64 s) {
    return {dot_small_us_half(acc.low, u.low, s.low), dot_small_us_half(acc.high, u.high, s.high)};
}
// acc[i] = (acc[i] + a[2i + 1] * b[2i + 1]) + a[2i] * b[2i] over bfloat16: what VDPBF16PS does.
INLINE __m256 odd_bf16(__m256i a) {
    return _mm256_castsi256_ps(_mm256_and_si256(a, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}
INLINE __m256 even_bf16(__m256i a) { return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)); }
INLINE __m256 dot_bf16_half(__m256 acc, __m256i a, __m256i b) {
    return _mm256_fmadd_ps(even_bf16(a), even_bf16(b), _mm256_fmadd_ps(odd_bf16(a), odd_bf16(b), acc));
}
INLINE F16 dot_bf16(F16 acc, B64 a, B64 b) {
    return {dot_bf16_half(acc.low, a.low, b.low), dot_bf16_half(acc.high, a.high, b.high)};
}
INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
