// Functions over sixteen floats, from simd.h's operations only: the same bits on every instruction set.

// Sum and maximum over the lanes, in a fixed order.
INLINE float sum_of(F16 a) {
    float lane[16];
    store_f(lane, a);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lane[i] = lane[i] + lane[i + width];
    return lane[0];
}
INLINE float max_of(F16 a) {
    float lane[16];
    store_f(lane, a);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
    return lane[0];
}

// e^x for x up to 88, within 2 units in the last place; 0 below -87; NaN of NaN, which the order of operands below lets
// through. Reduction x = n ln 2 + r, |r| <= ln 2 / 2, then the Taylor polynomial of degree 7 (remainder below 2^-27).
INLINE F16 exp_f(F16 x) {
    const F16 lowest = set_f(-87.0f);
    const F16 clamped = min_f(set_f(88.0f), max_f(lowest, x));
    const I16 n = round_to_i(clamped * set_f(1.44269504088896341f));
    const F16 whole = to_f(n);
    const F16 r = (clamped - whole * set_f(0.693359375f)) - whole * set_f(-2.12194440e-4f);
    F16 y = set_f(1.0f / 5040);
    y = y * r + set_f(1.0f / 720);
    y = y * r + set_f(1.0f / 120);
    y = y * r + set_f(1.0f / 24);
    y = y * r + set_f(1.0f / 6);
    y = y * r + set_f(0.5f);
    y = y * r + set_f(1.0f);
    y = y * r + set_f(1.0f);
    const F16 scaled = as_f(as_i(y) + shift_left_i<23>(n));
    return select_gt_f(lowest, x, set_f(0.0f), scaled);
}
// 1 / (1 + e^-x)
INLINE F16 sigmoid_f(F16 x) { return set_f(1.0f) / (set_f(1.0f) + exp_f(set_f(0.0f) - x)); }
// (e^2x - 1) / (e^2x + 1), where that neither overflows nor loses all digits; x itself near 0.
INLINE F16 tanh_f(F16 x) {
    const F16 bounded = min_f(set_f(9.0f), max_f(set_f(-9.0f), x));
    const F16 e = exp_f(bounded + bounded);
    const F16 large = (e - set_f(1.0f)) / (e + set_f(1.0f));
    const F16 square = bounded * bounded;
    // Taylor to x^9: below 2^-24 of the value for |x| < 0.25.
    F16 series = set_f(62.0f / 2835);
    series = series * square - set_f(17.0f / 315);
    series = series * square + set_f(2.0f / 15);
    series = series * square - set_f(1.0f / 3);
    series = series * square + set_f(1.0f);
    return select_gt_f(set_f(0.25f), abs_f(bounded), bounded * series, large);
}
// The error function within 6e-7: Abramowitz and Stegun, 7.1.26.
INLINE F16 erf_f(F16 x) {
    const F16 size = abs_f(x);
    const F16 t = set_f(1.0f) / (set_f(1.0f) + set_f(0.3275911f) * size);
    F16 y = set_f(1.061405429f);
    y = y * t - set_f(1.453152027f);
    y = y * t + set_f(1.421413741f);
    y = y * t - set_f(0.284496736f);
    y = y * t + set_f(0.254829592f);
    const F16 positive = set_f(1.0f) - y * t * exp_f(set_f(0.0f) - size * size);
    return select_gt_f(set_f(0.0f), x, set_f(0.0f) - positive, positive);
}
