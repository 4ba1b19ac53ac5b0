// float16 and bfloat16 without hardware support, bit for bit as F16C converts: to nearest, ties to
// even, with subnormal numbers and infinities. `static`, because kernel files are compiled for newer
// processors than the rest and must not share a compiled function with it.
#pragma once

#include <cstdint>
#include <cstring>

namespace xl {

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t exponent = (half >> 10) & 31, fraction = half & 1023;
    if (exponent == 31) return float_of(sign | 0x7f800000 | fraction << 13);
    if (exponent) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
    const float small = static_cast<float>(fraction) * 0x1p-24f;
    return float_of(sign | bits_of(small));
}

static inline uint16_t float_to_half(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);  // NaN
    if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);  // 65536 and above
    if (magnitude < 0x38800000) {
        // subnormal: adding 1/2 leaves the value, rounded to a multiple of 2^-24, in the low bits
        const uint32_t shifted = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
        return static_cast<uint16_t>(sign | shifted);
    }
    const uint32_t odd = magnitude >> 13 & 1;
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + odd) >> 13));
}

static inline float bfloat16_to_float(uint16_t value) {
    return float_of(static_cast<uint32_t>(value) << 16);
}

}  // namespace xl
