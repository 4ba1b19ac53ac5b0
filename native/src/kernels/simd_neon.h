// NEON of AArch64, 16 lanes as four registers; with kDot also the dot products of Armv8.2.
#pragma once

#include <arm_neon.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace xl {
namespace {

struct NeonBase {
    struct F { float32x4_t v[4]; };
    struct I { int32x4_t v[4]; };
    struct Bytes { int8x16_t v[4]; };  // register i: 4 codes of each of the rows 4 i to 4 i + 3
    using Signed = Bytes;
    using Dword = int8x16_t;
    static constexpr int kOffset = 0;
    static constexpr int kRows = 4, kSums = 4;  // attention: 16 of 32 registers

    template <class Op>
    static F each(Op op) {
        return {{op(0), op(1), op(2), op(3)}};
    }
    static F set(float x) {
        const float32x4_t all = vdupq_n_f32(x);
        return {{all, all, all, all}};
    }
    static F zero() { return set(0.0f); }
    static F load(const float *p) { return each([&](int i) { return vld1q_f32(p + 4 * i); }); }
    static void store(float *p, F x) {
        for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.v[i]);
    }
    static F add(F x, F y) { return each([&](int i) { return vaddq_f32(x.v[i], y.v[i]); }); }
    static F sub(F x, F y) { return each([&](int i) { return vsubq_f32(x.v[i], y.v[i]); }); }
    static F mul(F x, F y) { return each([&](int i) { return vmulq_f32(x.v[i], y.v[i]); }); }
    static F div(F x, F y) { return each([&](int i) { return vdivq_f32(x.v[i], y.v[i]); }); }
    // fmax of NEON returns NaN if either is; these return the second, as x86 does
    static float32x4_t max(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
    static float32x4_t min(float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }
    static F max(F x, F y) { return each([&](int i) { return max(x.v[i], y.v[i]); }); }
    static F min(F x, F y) { return each([&](int i) { return min(x.v[i], y.v[i]); }); }
    static F abs(F x) { return each([&](int i) { return vabsq_f32(x.v[i]); }); }
    static F fma(F x, F y, F z) {
        return each([&](int i) { return vfmaq_f32(z.v[i], x.v[i], y.v[i]); });
    }
    static F round(F x) { return each([&](int i) { return vrndnq_f32(x.v[i]); }); }
    static F power_of_two(F n) {
        return each([&](int i) {
            const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n.v[i]), vdupq_n_s32(127));
            return vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
        });
    }
    static F zero_below(F y, F x, float limit) {
        const float32x4_t least = vdupq_n_f32(limit), none = vdupq_n_f32(0.0f);
        return each([&](int i) { return vbslq_f32(vcltq_f32(x.v[i], least), none, y.v[i]); });
    }
    static F inside(F x, int begin, int end) {
        constexpr int32_t first[4] = {0, 1, 2, 3};
        return each([&](int i) {
            const int32x4_t lane = vaddq_s32(vld1q_s32(first), vdupq_n_s32(4 * i));
            const uint32x4_t late = vcgeq_s32(lane, vdupq_n_s32(begin));
            const uint32x4_t keep = vandq_u32(late, vcltq_s32(lane, vdupq_n_s32(end)));
            return vbslq_f32(keep, x.v[i], vdupq_n_f32(-INFINITY));
        });
    }
    static float sum(F x) {
        const float32x4_t four =
            vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
        const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
        return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
    }
    static float largest(F x) {
        float four[4];
        vst1q_f32(four, max(max(x.v[0], x.v[2]), max(x.v[1], x.v[3])));
        const float a = four[0] > four[2] ? four[0] : four[2];
        const float b = four[1] > four[3] ? four[1] : four[3];
        return a > b ? a : b;
    }
    static F load_half(const void *p) {
        const auto *halves = static_cast<const uint8_t *>(p);
        return each([&](int i) {
            return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(halves + 8 * i)));
        });
    }
    static void store_half(uint16_t *p, F x) {
        for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i])));
    }
    static F load_int8(const int8_t *p) {
        const int8x16_t codes = vld1q_s8(p);
        const int16x8_t low = vmovl_s8(vget_low_s8(codes)), high = vmovl_high_s8(codes);
        return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
                 vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))}};
    }
    static int32_t store_codes(int8_t *p, F x) {
        int32x4_t codes[4];
        for (int i = 0; i < 4; i++) codes[i] = vcvtnq_s32_f32(x.v[i]);
        const int16x8_t low = vqmovn_high_s32(vqmovn_s32(codes[0]), codes[1]);
        const int16x8_t high = vqmovn_high_s32(vqmovn_s32(codes[2]), codes[3]);
        vst1q_s8(p, vqmovn_high_s16(vqmovn_s16(low), high));
        return vaddvq_s32(vaddq_s32(vaddq_s32(codes[0], codes[1]), vaddq_s32(codes[2], codes[3])));
    }
    static F to_float(I x) { return each([&](int i) { return vcvtq_f32_s32(x.v[i]); }); }
    static I add_int(I x, int32_t y) {
        for (int i = 0; i < 4; i++) x.v[i] = vaddq_s32(x.v[i], vdupq_n_s32(y));
        return x;
    }

    static void prefetch(const void *p) {
        const char *at = static_cast<const char *>(p);
        for (int line = 0; line < 5; line++) __builtin_prefetch(at + 64 * line);
    }
    static Bytes load_bytes(const uint8_t *p) {
        Bytes out;
        for (int i = 0; i < 4; i++) out.v[i] = vreinterpretq_s8_u8(vld1q_u8(p + 16 * i));
        return out;
    }
    static Signed load_signed(const uint8_t *p) { return load_bytes(p); }
    static Bytes low_halves(Bytes x) {
        for (int i = 0; i < 4; i++) x.v[i] = vandq_s8(x.v[i], vdupq_n_s8(15));
        return x;
    }
    static Bytes high_halves(Bytes x) {
        for (int i = 0; i < 4; i++)
            x.v[i] = vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(x.v[i]), 4));
        return x;
    }
    static Dword dword(const int8_t *p) {
        int32_t four;
        std::memcpy(&four, p, 4);
        return vreinterpretq_s8_s32(vdupq_n_s32(four));
    }
};

template <bool kDot>
struct Neon;

template <>
struct Neon<false> : NeonBase {
    static constexpr int kTokens = 2;  // 16 sums of 32 registers

    // int16: 8 products of at most 15 * 127 are added in a lane, and two lanes in small_total
    struct Small { int16x8_t low[4], high[4]; };
    static Small small_zero() {
        Small s;
        for (int i = 0; i < 4; i++) s.low[i] = s.high[i] = vdupq_n_s16(0);
        return s;
    }
    static Small small_dot(Small s, const Bytes &w, Dword x) {
        for (int i = 0; i < 4; i++) {
            s.low[i] = vmlal_s8(s.low[i], vget_low_s8(w.v[i]), vget_low_s8(x));
            s.high[i] = vmlal_high_s8(s.high[i], w.v[i], x);
        }
        return s;
    }
    static I small_total(const Small &s) {
        I out;
        for (int i = 0; i < 4; i++) out.v[i] = vpaddlq_s16(vpaddq_s16(s.low[i], s.high[i]));
        return out;
    }

    // int16 holds two products of at most 128 * 127
    using Large = I;
    static Large large_zero() {
        const int32x4_t zero = vdupq_n_s32(0);
        return {{zero, zero, zero, zero}};
    }
    static Large large_dot(Large s, const Signed &w, Dword x) {
        for (int i = 0; i < 4; i++) {
            const int16x8_t low = vmull_s8(vget_low_s8(w.v[i]), vget_low_s8(x));
            s.v[i] = vpadalq_s16(s.v[i], vpaddq_s16(low, vmull_high_s8(w.v[i], x)));
        }
        return s;
    }
    static I large_total(Large s) { return s; }
};

#if defined(__ARM_FEATURE_DOTPROD)
template <>
struct Neon<true> : NeonBase {
    static constexpr int kTokens = 4;  // 16 sums of 32 registers

    using Small = I;
    using Large = I;
    static I large_zero() {
        const int32x4_t zero = vdupq_n_s32(0);
        return {{zero, zero, zero, zero}};
    }
    static I large_dot(I s, const Bytes &w, Dword x) {
        for (int i = 0; i < 4; i++) s.v[i] = vdotq_s32(s.v[i], w.v[i], x);
        return s;
    }
    static I large_total(I s) { return s; }
    static I small_zero() { return large_zero(); }
    static I small_dot(I s, const Bytes &w, Dword x) { return large_dot(s, w, x); }
    static I small_total(I s) { return s; }
};
#endif

}  // namespace
}  // namespace xl
