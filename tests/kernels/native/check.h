// What the checks of the kernels share: made-up inputs, comparisons with plain code, and a digest of the results.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "table.h"

namespace plait {

// The same numbers on every machine: no library function takes part. Multiples of 2^-23 in [-1, 1).
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}
    uint32_t bits() {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        const uint64_t mixed = (state_ ^ (state_ >> 33)) * 0xff51afd7ed558ccdu;
        return static_cast<uint32_t>(mixed >> 32);
    }
    float unit() { return static_cast<float>(static_cast<int32_t>(bits() >> 8) - (1 << 23)) / (1 << 23); }
    int64_t below(int64_t bound) { return static_cast<int64_t>(bits()) % bound; }

  private:
    uint64_t state_;
};

// `count` random numbers in [-size, size).
inline std::vector<float> random_floats(int64_t count, uint64_t seed, float size = 1.0f) {
    Random random(seed);
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = random.unit() * size;
    return values;
}

// Zeroed memory aligned to 64 bytes, as the kernels want theirs.
class Buffer {
  public:
    explicit Buffer(int64_t bytes)
        : bytes_(round_up(bytes, 64)), data_(static_cast<std::byte*>(std::aligned_alloc(64, size()))) {
        if (!data_) std::abort();
        std::memset(data_, 0, size());
    }
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    size_t size() const { return static_cast<size_t>(bytes_); }
    std::byte* data() const { return data_; }
    float* floats() const { return reinterpret_cast<float*>(data_); }

  private:
    int64_t bytes_;
    std::byte* data_;
};

inline float from_bf16(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
// Rounded to nearest, ties to even.
inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
template <class T>
T read_at(const std::byte* data, int64_t bytes) {
    T value;
    std::memcpy(&value, data + bytes, sizeof(T));
    return value;
}

// One function of one table: its verdict, and a digest (FNV-1a) of the bits of all results.
class Check {
  public:
    Check(const KernelTable& table, const char* function) : table_(table.name), function_(function) {}
    // Prints the verdict.
    ~Check() {
        std::printf("%s %s %s %016llx\n", table_, function_, wrong_ ? "WRONG" : "ok",
                    static_cast<unsigned long long>(digest_));
        if (wrong_) std::printf("  %ld of %ld comparisons; the first: %s\n", wrong_, compared_, first_.c_str());
        failures += wrong_ > 0;
    }
    Check(const Check&) = delete;
    Check& operator=(const Check&) = delete;

    void digest(const void* data, size_t bytes) {
        for (size_t i = 0; i < bytes; ++i)
            digest_ = (digest_ ^ static_cast<const uint8_t*>(data)[i]) * 0x100000001b3u;
    }
    void digest(const std::vector<float>& values) { digest(values.data(), values.size() * sizeof(float)); }
    void equal(double got, double want, const std::string& what) {
        count(got == want || (got != got && want != want), got, want, what);
    }
    // Within `tolerance`, absolutely.
    void near(double got, double want, double tolerance, const std::string& what) {
        count(std::abs(got - want) <= tolerance, got, want, what);
    }
    void same_bits(const void* got, const void* want, size_t bytes, const std::string& what) {
        count(std::memcmp(got, want, bytes) == 0, 0, 0, what);
    }

    static int failures;  // functions with a wrong result, so far

  private:
    void count(bool right, double got, double want, const std::string& what) {
        ++compared_;
        if (right) return;
        if (!wrong_++) first_ = what + ": " + std::to_string(got) + ", not " + std::to_string(want);
    }

    const char* table_;
    const char* function_;
    uint64_t digest_ = 0xcbf29ce484222325u;
    long compared_ = 0, wrong_ = 0;
    std::string first_;
};

void check_linear(const KernelTable& table);
void check_attention(const KernelTable& table);
void check_elementwise(const KernelTable& table);

}  // namespace plait
