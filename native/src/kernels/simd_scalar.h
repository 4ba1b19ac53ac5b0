// The definition: plain loops over 16 lanes.
#pragma once

#include <cmath>
#include <cstring>

#include "../half.h"

namespace xl {
namespace {

struct Scalar {
    struct F { float v[16]; };
    struct I { int32_t v[16]; };
    struct Bytes { uint8_t v[64]; };
    struct Signed { int8_t v[64]; };
    struct Dword { int8_t v[4]; };
    using Small = I;
    using Large = I;
    static constexpr int kTokens = 4;
    static constexpr int kOffset = 0;
    static constexpr int kRows = 4, kSums = 4;

    template <class Op>
    static F each(Op op) {
        F out;
        for (int i = 0; i < 16; i++) out.v[i] = op(i);
        return out;
    }
    static F zero() { return set(0.0f); }
    static F set(float x) { return each([&](int) { return x; }); }
    static F load(const float *p) { return each([&](int i) { return p[i]; }); }
    static void store(float *p, F a) { std::memcpy(p, a.v, sizeof a.v); }
    static F add(F a, F b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
    static F sub(F a, F b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
    static F mul(F a, F b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
    static F div(F a, F b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
    // as x86: the second operand if one is NaN
    static F max(F a, F b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
    static F min(F a, F b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
    static F abs(F a) { return each([&](int i) { return std::fabs(a.v[i]); }); }
    static F fma(F a, F b, F c) {
        return each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
    }
    static F round(F a) { return each([&](int i) { return std::nearbyint(a.v[i]); }); }
    static F power_of_two(F n) {
        return each([&](int i) {
            const int32_t whole = n.v[i] == n.v[i] ? static_cast<int32_t>(n.v[i]) : 0;
            return float_of(static_cast<uint32_t>(whole + 127) << 23);
        });
    }
    static F zero_below(F a, F x, float limit) {
        return each([&](int i) { return x.v[i] < limit ? 0.0f : a.v[i]; });
    }
    static F inside(F a, int begin, int end) {
        return each([&](int i) { return i >= begin && i < end ? a.v[i] : -INFINITY; });
    }
    static float sum(F a) {
        for (int half = 8; half; half /= 2)
            for (int i = 0; i < half; i++) a.v[i] += a.v[i + half];
        return a.v[0];
    }
    static float largest(F a) {
        for (int half = 8; half; half /= 2)
            for (int i = 0; i < half; i++) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
        return a.v[0];
    }
    static F load_half(const void *p) {
        uint16_t halves[16];
        std::memcpy(halves, p, sizeof halves);
        return each([&](int i) { return half_to_float(halves[i]); });
    }
    static void store_half(uint16_t *p, F a) {
        for (int i = 0; i < 16; i++) p[i] = float_to_half(a.v[i]);
    }
    static F load_int8(const int8_t *p) { return each([&](int i) { return float(p[i]); }); }
    // 16 codes, rounded to nearest, ties to even; returns their sum
    static int32_t store_codes(int8_t *p, F a) {
        int32_t total = 0;
        for (int i = 0; i < 16; i++) {
            p[i] = static_cast<int8_t>(std::nearbyint(a.v[i]));
            total += p[i];
        }
        return total;
    }
    static F to_float(I a) { return each([&](int i) { return static_cast<float>(a.v[i]); }); }
    static I add_int(I a, int32_t b) {
        for (int i = 0; i < 16; i++) a.v[i] += b;
        return a;
    }

    static void prefetch(const void *) {}
    static Bytes load_bytes(const uint8_t *p) {
        Bytes out;
        std::memcpy(out.v, p, 64);
        return out;
    }
    static Signed load_signed(const uint8_t *p) {
        Signed out;
        std::memcpy(out.v, p, 64);
        return out;
    }
    static Bytes low_halves(Bytes a) {
        for (auto &byte : a.v) byte &= 15;
        return a;
    }
    static Bytes high_halves(Bytes a) {
        for (auto &byte : a.v) byte = static_cast<uint8_t>(byte >> 4);
        return a;
    }
    static Dword dword(const int8_t *p) {
        Dword out;
        std::memcpy(out.v, p, 4);
        return out;
    }
    template <class B>
    static I dot(I sum, const B &w, Dword x) {
        for (int r = 0; r < 16; r++)
            for (int j = 0; j < 4; j++) sum.v[r] += w.v[4 * r + j] * x.v[j];
        return sum;
    }
    static Small small_zero() { return {}; }
    static Small small_dot(Small sum, const Bytes &w, Dword x) { return dot(sum, w, x); }
    static I small_total(Small sum) { return sum; }
    static Large large_zero() { return {}; }
    static Large large_dot(Large sum, const Signed &w, Dword x) { return dot(sum, w, x); }
    static I large_total(Large sum) { return sum; }
};

}  // namespace
}  // namespace xl
