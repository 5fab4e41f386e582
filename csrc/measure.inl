// What the machine can do at most, to compare the kernels with.

// Reads `bytes`, a multiple of 256, from front to back; the sum of all words.
static int32_t read_stream(const std::byte* data, int64_t bytes) {
    I16 sums[4];
    each<4>(EACH_BODY(i) { sums[i] = set_i(0); });
    for (const std::byte* end = data + bytes; data < end; data += 256)
        each<4>(EACH_BODY(i) { sums[i] = sums[i] + load_i(reinterpret_cast<const int32_t*>(data) + 16 * i); });
    int32_t lanes[16];
    store_i(lanes, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    uint32_t sum = 0;
    for (const int32_t lane : lanes) sum += static_cast<uint32_t>(lane);
    return static_cast<int32_t>(sum);
}

constexpr int kMeasuredSums = 12;  // more than a dot product takes to come out, few enough for the registers

template <class Sum, class Dot> INLINE float repeat_dots(Sum zero, int64_t dots, const Dot& dot) {
    uint8_t bytes[kMeasuredSums * 64];
    for (int i = 0; i < kMeasuredSums * 64; ++i) bytes[i] = static_cast<uint8_t>(i % 16);
    Sum sums[kMeasuredSums];
    each<kMeasuredSums>(EACH_BODY(i) { sums[i] = zero; });
    for (int64_t done = 0; done < dots; done += kMeasuredSums) {
        // For all the compiler knows, the operands are others each time, and no two sums are the same.
        asm volatile("" : : "r"(bytes) : "memory");
        each<kMeasuredSums>(EACH_BODY(i) { sums[i] = dot(sums[i], load_b(bytes + 64 * i)); });
    }
    each<kMeasuredSums - 1>(EACH_BODY(i) { sums[0] = sums[0] + sums[i + 1]; });
    float lanes[16];
    __builtin_memcpy(lanes, &sums[0], sizeof lanes);
    return lanes[0];
}
// At least `dots` dot products of 64 bytes with 64 bytes that are at hand, by the instructions that multiply this
// format; something that depends on all of them.
static float repeat_dot(WeightFormat format, int64_t dots) {
    const auto bf16 = [](F16 sum, B64 x) __attribute__((always_inline)) { return dot_bf16(sum, x, x); };
    const auto int8 = [](I16 sum, B64 x) __attribute__((always_inline)) { return dot_us(sum, x, x); };
    const auto int4 = [](I16 sum, B64 x) __attribute__((always_inline)) { return dot_small_us(sum, x, x); };
    switch (format) {
        case WeightFormat::bf16: return repeat_dots(set_f(0.0f), dots, bf16);
        case WeightFormat::int8: return repeat_dots(set_i(0), dots, int8);
        default: return repeat_dots(set_i(0), dots, int4);
    }
}
