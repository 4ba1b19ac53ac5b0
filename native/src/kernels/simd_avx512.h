// AVX-512 with VNNI: 16 lanes are one register, and a dot product takes one instruction.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace xl {
namespace {

struct Avx512Vnni {
    using F = __m512;
    using I = __m512i;
    using Bytes = __m512i;
    using Dword = const int8_t *;  // read by the dot product itself, which broadcasts it
    using Small = __m512i;
    using Large = __m512i;
    using Signed = __m512i;
    static constexpr int kTokens = 12;  // 24 sums of 32 registers
    static constexpr int kOffset = 128;
    // attention: 12 queries times 2 vectors are 24 sums of 32 registers
    static constexpr int kRows = 12, kSums = 24;

    static F zero() { return _mm512_setzero_ps(); }
    static F set(float x) { return _mm512_set1_ps(x); }
    static F load(const float *p) { return _mm512_loadu_ps(p); }
    static void store(float *p, F x) { _mm512_storeu_ps(p, x); }
    static F add(F x, F y) { return _mm512_add_ps(x, y); }
    static F sub(F x, F y) { return _mm512_sub_ps(x, y); }
    static F mul(F x, F y) { return _mm512_mul_ps(x, y); }
    static F div(F x, F y) { return _mm512_div_ps(x, y); }
    static F max(F x, F y) { return _mm512_max_ps(x, y); }
    static F min(F x, F y) { return _mm512_min_ps(x, y); }
    static F abs(F x) { return _mm512_abs_ps(x); }
    static F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
    static F round(F x) {
        return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    static F power_of_two(F n) {
        const __m512i exponent = _mm512_add_epi32(_mm512_cvttps_epi32(n), _mm512_set1_epi32(127));
        return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
    }
    static F zero_below(F y, F x, float limit) {
        const __mmask16 below = _mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_LT_OQ);
        return _mm512_mask_mov_ps(y, below, _mm512_setzero_ps());
    }
    // Bits of the lanes before `end`.
    static uint32_t lanes_before(int end) { return end <= 0 ? 0 : end >= 16 ? 0xffff : (1u << end) - 1; }
    static F inside(F x, int begin, int end) {
        const auto keep = static_cast<__mmask16>(lanes_before(end) & ~lanes_before(begin));
        return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), keep, x);
    }
    static float sum(F x) {
        const F eight = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
        const F four = _mm512_add_ps(eight, _mm512_shuffle_f32x4(eight, eight, 0xb1));
        const F two = _mm512_add_ps(four, _mm512_permute_ps(four, 0x4e));
        return _mm512_cvtss_f32(_mm512_add_ps(two, _mm512_permute_ps(two, 0xb1)));
    }
    static float largest(F x) {
        const F eight = _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
        const F four = _mm512_max_ps(eight, _mm512_shuffle_f32x4(eight, eight, 0xb1));
        const F two = _mm512_max_ps(four, _mm512_permute_ps(four, 0x4e));
        return _mm512_cvtss_f32(_mm512_max_ps(two, _mm512_permute_ps(two, 0xb1)));
    }
    static F load_half(const void *p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i *>(p)));
    }
    static void store_half(uint16_t *p, F x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(p),
                            _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
    static F load_int8(const int8_t *p) {
        const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
    }
    static int32_t store_codes(int8_t *p, F x) {
        const __m512i codes = _mm512_cvtps_epi32(x);
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(codes));
        return _mm512_reduce_add_epi32(codes);
    }
    static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
    static I add_int(I x, int32_t y) { return _mm512_add_epi32(x, _mm512_set1_epi32(y)); }

    static void prefetch(const void *p) {
        const char *at = static_cast<const char *>(p);
        for (int line = 0; line < 5; line++) _mm_prefetch(at + 64 * line, _MM_HINT_T0);
    }
    static Bytes load_bytes(const uint8_t *p) { return _mm512_loadu_si512(p); }
    static Bytes low_halves(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
    static Bytes high_halves(Bytes x) { return low_halves(_mm512_srli_epi16(x, 4)); }
    static Dword dword(const int8_t *p) { return p; }

    // Adds to each lane four products of unsigned codes with the same four signed ones at `x`.
    static __m512i dot(__m512i sum, __m512i codes, const int8_t *x) {
#if defined(__GNUC__) && !defined(__clang__) && defined(__AVX512VNNI__)
        // gcc 12 copies the sum before and after the intrinsic, which halves the speed
        __asm__("vpdpbusd %2%{1to16%}, %1, %0"
                : "+v"(sum)
                : "v"(codes), "m"(*reinterpret_cast<const int8_t(*)[4]>(x)));
        return sum;
#else
        int32_t four;
        std::memcpy(&four, x, 4);
        return _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(four));
#endif
    }
    static Small small_zero() { return _mm512_setzero_si512(); }
    static Small small_dot(Small s, Bytes w, Dword x) { return dot(s, w, x); }
    static I small_total(Small s) { return s; }

    // The instruction takes unsigned by signed: int8 weights become 0..255, and the template
    // subtracts what kOffset adds.
    static Signed load_signed(const uint8_t *p) {
        return _mm512_xor_si512(load_bytes(p), _mm512_set1_epi8(-128));
    }
    static Large large_zero() { return _mm512_setzero_si512(); }
    static Large large_dot(Large s, Signed w, Dword x) { return dot(s, w, x); }
    static I large_total(Large s) { return s; }
};

}  // namespace
}  // namespace xl
