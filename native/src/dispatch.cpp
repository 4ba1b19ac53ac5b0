#include "dispatch.h"

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#define XL_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace xl {
namespace {

struct Features {
    bool avx2 = false, avxvnni = false, avx512vnni = false, amx = false, neon = false, dotprod = false;
};

#ifdef XL_X86
void cpuid(uint32_t leaf, uint32_t part, uint32_t (&r)[4]) {
#if defined(_MSC_VER)
    int out[4];
    __cpuidex(out, static_cast<int>(leaf), static_cast<int>(part));
    for (int i = 0; i < 4; i++) r[i] = static_cast<uint32_t>(out[i]);
#else
    __cpuid_count(leaf, part, r[0], r[1], r[2], r[3]);
#endif
}

// Which registers the operating system saves; without that a feature must not be used.
uint64_t saved_state() {
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
#endif
}
#endif

Features detect() {
    Features f;
#ifdef XL_X86
    uint32_t r[4];
    cpuid(0, 0, r);
    const uint32_t last = r[0];
    if (last < 7) return f;
    cpuid(1, 0, r);
    const uint32_t c = r[2];
    constexpr uint32_t fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    if ((c & (fma | osxsave | avx | f16c)) != (fma | osxsave | avx | f16c)) return f;
    const uint64_t saved = saved_state();
    cpuid(7, 0, r);
    const uint32_t b7 = r[1], c7 = r[2], d7 = r[3], parts = r[0];
    f.avx2 = (saved & 6) == 6 && (b7 & 1u << 5);
    // AVX512F, DQ, BW, VL and VNNI
    constexpr uint32_t wide = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    f.avx512vnni = f.avx2 && (saved & 0xe6) == 0xe6 && (b7 & wide) == wide && (c7 & 1u << 11);
    constexpr uint32_t tiles = 1u << 24 | 1u << 25;  // AMX-TILE and AMX-INT8
    f.amx = f.avx512vnni && (saved & 0x60000) == 0x60000 && (d7 & tiles) == tiles;
    if (parts >= 1) {
        cpuid(7, 1, r);
        f.avxvnni = f.avx2 && (r[0] & 1u << 4);
    }
#elif defined(__aarch64__)
    f.neon = true;
#if defined(__linux__)
    f.dotprod = getauxval(AT_HWCAP) & (1u << 20);  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
    f.dotprod = true;  // every Apple processor with 64 bits that runs macOS
#endif
#endif
    return f;
}

const std::vector<const Kernels *> &available() {
    static const std::vector<const Kernels *> found = [] {
        const Features f = detect();
        std::vector<const Kernels *> list;
        const auto add = [&](bool supported, const Kernels *kernels) {
            if (supported && kernels) list.push_back(kernels);
        };
        add(f.amx, f.amx ? amx_kernels() : nullptr);  // which asks the system
        add(f.avx512vnni, avx512vnni_kernels());
        add(f.avxvnni, avxvnni_kernels());
        add(f.avx2, avx2_kernels());
        add(f.dotprod, neon_dot_kernels());
        add(f.neon, neon_kernels());
        add(true, scalar_kernels());
        return list;
    }();
    return found;
}

}  // namespace

const char *kernels_available() {
    static const std::string names = [] {
        std::string text;
        for (const Kernels *kernels : available()) text += (text.empty() ? "" : " ") + std::string(kernels->name);
        return text;
    }();
    return names.c_str();
}

const Kernels &kernels_named(const char *name) {
    if (!*name) return *available().front();
    for (const Kernels *kernels : available())
        if (!std::strcmp(kernels->name, name)) return *kernels;
    throw std::runtime_error("this processor or this build has no kernels '" + std::string(name) +
                             "', only: " + kernels_available());
}

}  // namespace xl
