// Which tables run on this machine. Compiled for the oldest machine of its architecture, so that it can ask anywhere.

#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "table.h"

namespace plait {

// Each unit isa_*.cc defines one; the build says which units it has.
namespace avx512_vnni { extern const KernelTable table; }
namespace avx512 { extern const KernelTable table; }
namespace avx2 { extern const KernelTable table; }
namespace neon_i8mm { extern const KernelTable table; }
namespace neon { extern const KernelTable table; }
namespace portable { extern const KernelTable table; }

namespace {

#if defined(__x86_64__)

// Instructions that the processor has and whose registers the operating system saves.
struct Features {
    bool avx2 = false;         // with FMA and F16C
    bool avx512 = false;       // F, BW, VL, DQ
    bool avx512_vnni = false;  // those with VNNI and BF16
};

bool has(unsigned word, int bit) { return word >> bit & 1; }

Features features() {
    Features found;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
    const bool fma = has(c, 12), osxsave = has(c, 27), avx = has(c, 28), f16c = has(c, 29);
    if (!osxsave || !avx) return found;
    // XCR0: which registers the system saves when it switches threads. Without that AVX faults on any processor.
    unsigned saved, high;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    const bool saves_ymm = (saved & 0x06) == 0x06, saves_zmm = (saved & 0xe6) == 0xe6;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
    const unsigned subleaves = a;
    found.avx2 = saves_ymm && fma && f16c && has(b, 5);
    found.avx512 = found.avx2 && saves_zmm && has(b, 16) && has(b, 17) && has(b, 30) && has(b, 31);
    const bool vnni = has(c, 11);
    if (subleaves < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return found;
    found.avx512_vnni = found.avx512 && vnni && has(a, 5);
    return found;
}

#elif defined(__aarch64__)

struct Features {
    bool neon = false;       // with DOTPROD
    bool neon_i8mm = false;  // and I8MM
};

Features features() {
    Features found;
    found.neon = getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
    found.neon_i8mm = found.neon && (getauxval(AT_HWCAP2) & HWCAP2_I8MM);
    return found;
}

#else

struct Features {};
Features features() { return {}; }

#endif

struct Tables {
    const KernelTable* best_first[6];
    int count = 0;
    const KernelTable* current = nullptr;
    std::string reason;  // why there is no current one

    Tables() {
        [[maybe_unused]] const Features found = features();
#ifdef PLAIT_HAS_AVX512_VNNI
        if (found.avx512_vnni) add(avx512_vnni::table);
#endif
#ifdef PLAIT_HAS_AVX512
        if (found.avx512) add(avx512::table);
#endif
#ifdef PLAIT_HAS_AVX2
        if (found.avx2) add(avx2::table);
#endif
#ifdef PLAIT_HAS_NEON_I8MM
        if (found.neon_i8mm) add(neon_i8mm::table);
#endif
#ifdef PLAIT_HAS_NEON
        if (found.neon) add(neon::table);
#endif
        add(portable::table);
        choose(std::getenv("PLAIT_ISA"));
    }

    void add(const KernelTable& table) { best_first[count++] = &table; }

    void choose(const char* asked) {
        if (!asked || !*asked) {
            current = best_first[0];
            return;
        }
        std::string known;
        for (int i = 0; i < count; ++i) {
            const std::string name = best_first[i]->name;
            if (name == asked) current = best_first[i];
            known += (i ? ", " : "") + name;
        }
        if (!current)
            reason = "PLAIT_ISA asks for the instruction set '" + std::string(asked) +
                     "', which this build does not have or this machine does not run; choose among " + known +
                     ", or unset it for the first";
    }
};

// Found out once: the table in use does not change while a program runs.
const Tables& tables() {
    static const Tables found;
    return found;
}

}  // namespace

const KernelTable* const* available_tables(int* count) {
    *count = tables().count;
    return tables().best_first;
}

const KernelTable* current_table(const char** reason) {
    *reason = tables().current ? nullptr : tables().reason.c_str();
    return tables().current;
}

}  // namespace plait
