// AVX2 with FMA and F16C, 16 lanes as two registers; `AvxVnni` has dot products in one instruction.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace xl {
namespace {

struct Avx2Base {
    struct F { __m256 a, b; };
    struct I { __m256i a, b; };
    struct Bytes { __m256i a, b; };
    using Dword = __m256i;
    static constexpr int kRows = 4, kSums = 4;  // attention: 8 of 16 registers

    static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static F load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static void store(float *p, F x) {
        _mm256_storeu_ps(p, x.a);
        _mm256_storeu_ps(p + 8, x.b);
    }
    static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
    static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
    static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
    static F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
    static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
    static F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
    static F abs(F x) {
        const __m256 sign = _mm256_set1_ps(-0.0f);
        return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
    }
    static F fma(F x, F y, F z) {
        return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
    }
    static F round(F x) {
        constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        return {_mm256_round_ps(x.a, nearest), _mm256_round_ps(x.b, nearest)};
    }
    static __m256 power_of_two(__m256 n) {
        const __m256i exponent = _mm256_add_epi32(_mm256_cvttps_epi32(n), _mm256_set1_epi32(127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    }
    static F power_of_two(F n) { return {power_of_two(n.a), power_of_two(n.b)}; }
    static F zero_below(F y, F x, float limit) {
        const __m256 least = _mm256_set1_ps(limit);
        return {_mm256_andnot_ps(_mm256_cmp_ps(x.a, least, _CMP_LT_OQ), y.a),
                _mm256_andnot_ps(_mm256_cmp_ps(x.b, least, _CMP_LT_OQ), y.b)};
    }
    static __m256 inside(__m256 x, int begin, int end) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        const __m256i early = _mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane);
        const __m256i before_end = _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane);
        const __m256i keep = _mm256_andnot_si256(early, before_end);
        return _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), x, _mm256_castsi256_ps(keep));
    }
    static F inside(F x, int begin, int end) {
        return {inside(x.a, begin, end), inside(x.b, begin - 8, end - 8)};
    }
    static float sum(F x) {
        const __m256 eight = _mm256_add_ps(x.a, x.b);
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
    }
    static float largest(F x) {
        const __m256 eight = _mm256_max_ps(x.a, x.b);
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
    }
    static F load_half(const void *p) {
        const __m128i *halves = static_cast<const __m128i *>(p);
        return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
    }
    static void store_half(uint16_t *p, F x) {
        constexpr int nearest = _MM_FROUND_TO_NEAREST_INT;
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph(x.a, nearest));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p + 8), _mm256_cvtps_ph(x.b, nearest));
    }
    static F load_int8(const int8_t *p) {
        const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(codes, 8)))};
    }
    static int32_t store_codes(int8_t *p, F x) {
        const __m256i a = _mm256_cvtps_epi32(x.a), b = _mm256_cvtps_epi32(x.b);
        const __m256i wide = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
        const __m128i low = _mm256_castsi256_si128(wide), high = _mm256_extracti128_si256(wide, 1);
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm_packs_epi16(low, high));
        const __m256i eight = _mm256_add_epi32(a, b);
        __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
    }
    static F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
    static I add_int(I x, int32_t y) {
        const __m256i all = _mm256_set1_epi32(y);
        return {_mm256_add_epi32(x.a, all), _mm256_add_epi32(x.b, all)};
    }

    // Keeps gcc from computing all products of a block first, which it has no registers for.
    static void keep_order(__m256i &a, __m256i &b) {
#if defined(__GNUC__)
        __asm__("" : "+x"(a), "+x"(b));
#else
        (void)a, (void)b;
#endif
    }
    static void prefetch(const void *p) {
        const char *at = static_cast<const char *>(p);
        for (int line = 0; line < 5; line++) _mm_prefetch(at + 64 * line, _MM_HINT_T0);
    }
    static Bytes load_bytes(const uint8_t *p) {
        return {_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)),
                _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p + 32))};
    }
    static Bytes low_halves(Bytes x) {
        const __m256i mask = _mm256_set1_epi8(15);
        return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
    }
    static Bytes high_halves(Bytes x) {
        return low_halves({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)});
    }
    static Dword dword(const int8_t *p) {
        int32_t four;
        std::memcpy(&four, p, 4);
        return _mm256_set1_epi32(four);
    }
};

struct Avx2 : Avx2Base {
    static constexpr int kTokens = 4;  // 8 sums of 16 registers; 3 and 6 were measured and are not faster
    static constexpr int kOffset = 0;

    // int16: 8 products of at most 2 * 15 * 127 are below 2^15, so a block needs no wider sum
    struct Small { __m256i a, b; };
    static Small small_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static Small small_dot(Small s, Bytes w, Dword x) {
        s = {_mm256_add_epi16(s.a, _mm256_maddubs_epi16(w.a, x)),
             _mm256_add_epi16(s.b, _mm256_maddubs_epi16(w.b, x))};
        keep_order(s.a, s.b);
        return s;
    }
    static I small_total(Small s) {
        const __m256i one = _mm256_set1_epi16(1);
        return {_mm256_madd_epi16(s.a, one), _mm256_madd_epi16(s.b, one)};
    }

    // maddubs takes unsigned by signed: the weight's sign moves to the input
    struct Signed { __m256i a, b, size_a, size_b; };
    using Large = I;
    static Signed load_signed(const uint8_t *p) {
        const Bytes x = load_bytes(p);
        return {x.a, x.b, _mm256_abs_epi8(x.a), _mm256_abs_epi8(x.b)};
    }
    static Large large_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static Large large_dot(Large s, const Signed &w, Dword x) {
        const __m256i one = _mm256_set1_epi16(1);
        const __m256i a = _mm256_maddubs_epi16(w.size_a, _mm256_sign_epi8(x, w.a));
        const __m256i b = _mm256_maddubs_epi16(w.size_b, _mm256_sign_epi8(x, w.b));
        s = {_mm256_add_epi32(s.a, _mm256_madd_epi16(a, one)),
             _mm256_add_epi32(s.b, _mm256_madd_epi16(b, one))};
        keep_order(s.a, s.b);
        return s;
    }
    static I large_total(Large s) { return s; }
};

#if defined(XL_AVXVNNI)
struct AvxVnni : Avx2Base {
    static constexpr int kTokens = 4;  // 8 sums of 16 registers
    static constexpr int kOffset = 128;
    using Small = I;
    using Large = I;
    using Signed = Bytes;

    // Adds to each lane four products of unsigned codes with signed ones.
    static I dot(I s, Bytes codes, Dword x) {
        return {_mm256_dpbusd_avx_epi32(s.a, codes.a, x), _mm256_dpbusd_avx_epi32(s.b, codes.b, x)};
    }
    static Small small_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static Small small_dot(Small s, Bytes w, Dword x) { return dot(s, w, x); }
    static I small_total(Small s) { return s; }

    // int8 weights become 0..255, and the template subtracts what kOffset adds
    static Signed load_signed(const uint8_t *p) {
        const Bytes x = load_bytes(p);
        const __m256i flip = _mm256_set1_epi8(-128);
        return {_mm256_xor_si256(x.a, flip), _mm256_xor_si256(x.b, flip)};
    }
    static Large large_zero() { return small_zero(); }
    static Large large_dot(Large s, Signed w, Dword x) { return dot(s, w, x); }
    static I large_total(Large s) { return s; }
};
#endif

}  // namespace
}  // namespace xl
