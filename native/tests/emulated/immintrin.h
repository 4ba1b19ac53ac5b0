// Stands in for the compiler's header where the processor lacks AVX-VNNI or AVX-512: what the
// kernels use of them, as plain C++, lane by lane after Intel's Intrinsics Guide. For tests only; it
// says nothing about speed, nor whether an instruction in assembly is right.
//
// With XL_EMULATED=avxvnni (AVX2 is real) one function is added to the compiler's header; otherwise
// the types of AVX-512 are structures and that header is not read.
#pragma once

#if defined(__AVX2__)
#include_next <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated {

// vpdpbusd: adds four products of unsigned bytes of `a` with signed bytes of `b`, without saturation.
inline int32_t dot(int32_t sum, const uint8_t *a, const int8_t *b) {
    for (int j = 0; j < 4; j++) sum += static_cast<int32_t>(a[j]) * static_cast<int32_t>(b[j]);
    return sum;
}

}  // namespace emulated

#if defined(__AVX2__)

inline __m256i emulated_dpbusd(__m256i sum, __m256i a, __m256i b) {
    int32_t sums[8];
    uint8_t left[32];
    int8_t right[32];
    std::memcpy(sums, &sum, 32), std::memcpy(left, &a, 32), std::memcpy(right, &b, 32);
    for (int i = 0; i < 8; i++) sums[i] = emulated::dot(sums[i], left + 4 * i, right + 4 * i);
    std::memcpy(&sum, sums, 32);
    return sum;
}
#define _mm256_dpbusd_avx_epi32 emulated_dpbusd

#else

#include "half.h"

struct __m512 { float v[16]; };
struct __m512i { uint8_t v[64]; };
struct __m256i { uint8_t v[32]; };
struct __m128i { uint8_t v[16]; };
using __mmask16 = uint16_t;

enum { _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_NO_EXC = 8, _CMP_LT_OQ = 0x11, _MM_HINT_T0 = 3 };
inline void _mm_prefetch(const char *, int) {}

namespace emulated {

template <class Op>
__m512 floats(Op op) {
    __m512 out;
    for (int i = 0; i < 16; i++) out.v[i] = op(i);
    return out;
}

template <class T, class Op>
__m512i integers(Op op) {
    __m512i out;
    for (int i = 0; i < static_cast<int>(64 / sizeof(T)); i++) {
        const T value = static_cast<T>(op(i));
        std::memcpy(out.v + sizeof(T) * static_cast<size_t>(i), &value, sizeof(T));
    }
    return out;
}

template <class T>
T at(const uint8_t *bytes, int i) {
    T value;
    std::memcpy(&value, bytes + sizeof(T) * static_cast<size_t>(i), sizeof(T));
    return value;
}

// Conversions to int32 give 0x80000000 for NaN and what does not fit.
inline int32_t whole(float x) {
    return x >= -2147483648.0f && x < 2147483648.0f ? static_cast<int32_t>(x) : INT32_MIN;
}

}  // namespace emulated

inline __m512 _mm512_set1_ps(float x) { return emulated::floats([&](int) { return x; }); }
inline __m512 _mm512_setzero_ps() { return _mm512_set1_ps(0.0f); }
inline __m512 _mm512_loadu_ps(const void *p) {
    __m512 out;
    std::memcpy(out.v, p, 64);
    return out;
}
inline void _mm512_storeu_ps(void *p, __m512 x) { std::memcpy(p, x.v, 64); }
inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return emulated::floats([&](int i) { return a.v[i] + b.v[i]; }); }
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { return emulated::floats([&](int i) { return a.v[i] - b.v[i]; }); }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return emulated::floats([&](int i) { return a.v[i] * b.v[i]; }); }
inline __m512 _mm512_div_ps(__m512 a, __m512 b) { return emulated::floats([&](int i) { return a.v[i] / b.v[i]; }); }
// the second operand if either is NaN or both are zero
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
    return emulated::floats([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline __m512 _mm512_min_ps(__m512 a, __m512 b) {
    return emulated::floats([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline __m512 _mm512_abs_ps(__m512 a) { return emulated::floats([&](int i) { return std::fabs(a.v[i]); }); }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return emulated::floats([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
inline __m512 _mm512_roundscale_ps(__m512 a, int control) {
    // bits 7:4 are the binary digits kept; 1:0 the direction, 0: to nearest, ties to even
    if ((control & 0xf7) != _MM_FROUND_TO_NEAREST_INT) std::abort();
    return emulated::floats([&](int i) { return std::nearbyint(a.v[i]); });
}
inline __m512i _mm512_cvttps_epi32(__m512 a) {
    return emulated::integers<int32_t>([&](int i) { return emulated::whole(std::trunc(a.v[i])); });
}
inline __m512i _mm512_cvtps_epi32(__m512 a) {
    return emulated::integers<int32_t>([&](int i) { return emulated::whole(std::nearbyint(a.v[i])); });
}
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
    return emulated::floats([&](int i) { return static_cast<float>(emulated::at<int32_t>(a.v, i)); });
}
inline __m512i _mm512_set1_epi32(int x) { return emulated::integers<int32_t>([&](int) { return x; }); }
inline __m512i _mm512_set1_epi8(char x) { return emulated::integers<char>([&](int) { return x; }); }
inline __m512i _mm512_setzero_si512() { return _mm512_set1_epi32(0); }
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
    return emulated::integers<uint32_t>(
        [&](int i) { return emulated::at<uint32_t>(a.v, i) + emulated::at<uint32_t>(b.v, i); });
}
inline __m512i _mm512_slli_epi32(__m512i a, unsigned count) {
    return emulated::integers<uint32_t>(
        [&](int i) { return count > 31 ? 0 : emulated::at<uint32_t>(a.v, i) << count; });
}
inline __m512i _mm512_srli_epi16(__m512i a, unsigned count) {
    return emulated::integers<uint16_t>([&](int i) { return count > 15 ? 0 : emulated::at<uint16_t>(a.v, i) >> count; });
}
inline __m512i _mm512_and_si512(__m512i a, __m512i b) {
    return emulated::integers<uint8_t>([&](int i) { return a.v[i] & b.v[i]; });
}
inline __m512i _mm512_xor_si512(__m512i a, __m512i b) {
    return emulated::integers<uint8_t>([&](int i) { return a.v[i] ^ b.v[i]; });
}
inline __m512 _mm512_castsi512_ps(__m512i a) {
    __m512 out;
    std::memcpy(out.v, a.v, 64);
    return out;
}
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
    if (predicate != _CMP_LT_OQ) std::abort();
    unsigned mask = 0;
    for (int i = 0; i < 16; i++) mask |= (a.v[i] < b.v[i] ? 1u : 0u) << i;
    return static_cast<__mmask16>(mask);
}
inline __m512 _mm512_mask_mov_ps(__m512 source, __mmask16 mask, __m512 a) {
    return emulated::floats([&](int i) { return mask >> i & 1 ? a.v[i] : source.v[i]; });
}
// Blocks of four lanes: the lower two of the result are chosen from `a`, the upper two from `b`.
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int control) {
    return emulated::floats([&](int i) {
        const int block = control >> (2 * (i / 4)) & 3;
        return (i < 8 ? a : b).v[4 * block + i % 4];
    });
}
inline __m512 _mm512_permute_ps(__m512 a, int control) {
    return emulated::floats([&](int i) { return a.v[i / 4 * 4 + (control >> (2 * (i % 4)) & 3)]; });
}
inline float _mm512_cvtss_f32(__m512 a) { return a.v[0]; }
inline __m256i _mm256_loadu_si256(const __m256i *p) {
    __m256i out;
    std::memcpy(out.v, p, 32);
    return out;
}
inline void _mm256_storeu_si256(__m256i *p, __m256i a) { std::memcpy(p, a.v, 32); }
inline __m128i _mm_loadu_si128(const __m128i *p) {
    __m128i out;
    std::memcpy(out.v, p, 16);
    return out;
}
inline void _mm_storeu_si128(__m128i *p, __m128i a) { std::memcpy(p, a.v, 16); }
inline __m512 _mm512_cvtph_ps(__m256i a) {
    return emulated::floats([&](int i) { return xl::half_to_float(emulated::at<uint16_t>(a.v, i)); });
}
inline __m256i _mm512_cvtps_ph(__m512 a, int rounding) {
    if (rounding != _MM_FROUND_TO_NEAREST_INT) std::abort();
    __m256i out;
    for (int i = 0; i < 16; i++) {
        const uint16_t half = xl::float_to_half(a.v[i]);
        std::memcpy(out.v + 2 * i, &half, 2);
    }
    return out;
}
inline __m512i _mm512_cvtepi8_epi32(__m128i a) {
    return emulated::integers<int32_t>([&](int i) { return emulated::at<int8_t>(a.v, i); });
}
inline __m128i _mm512_cvtepi32_epi8(__m512i a) {
    __m128i out;
    for (int i = 0; i < 16; i++) out.v[i] = a.v[4 * i];
    return out;
}
inline int _mm512_reduce_add_epi32(__m512i a) {
    int sum = 0;
    for (int i = 0; i < 16; i++) sum += emulated::at<int32_t>(a.v, i);
    return sum;
}
inline __m512i _mm512_sub_epi8(__m512i a, __m512i b) {
    return emulated::integers<uint8_t>([&](int i) { return a.v[i] - b.v[i]; });
}
inline void _mm512_storeu_si512(void *p, __m512i a) { std::memcpy(p, a.v, 64); }
inline __m512i _mm512_loadu_si512(const void *p) {
    __m512i out;
    std::memcpy(out.v, p, 64);
    return out;
}
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
    return emulated::integers<int32_t>([&](int i) {
        return emulated::dot(emulated::at<int32_t>(sum.v, i), a.v + 4 * i,
                             reinterpret_cast<const int8_t *>(b.v) + 4 * i);
    });
}

namespace emulated {

// AMX: eight registers of up to 16 rows of 64 bytes, whose shapes are set before their use.
struct Tile {
    int rows = 0, bytes = 0;
    uint8_t v[16][64] = {};
};

inline Tile &tile(int n) {
    static Tile tiles[8];
    return tiles[n];
}

inline void shape_tiles(const uint16_t *row_bytes, const uint8_t *rows) {
    for (int n = 0; n < 16; n++) {
        if (n > 7 ? row_bytes[n] || rows[n] : row_bytes[n] > 64 || rows[n] > 16) std::abort();
        if (n < 8) tile(n) = Tile(), tile(n).rows = rows[n], tile(n).bytes = row_bytes[n];
    }
}

inline void release_tiles() {
    for (int n = 0; n < 8; n++) tile(n) = Tile();
}

inline void load_tile(int n, const void *from, size_t stride) {
    Tile &to = tile(n);
    if (!to.rows) std::abort();
    for (int r = 0; r < to.rows; r++)
        std::memcpy(to.v[r], static_cast<const uint8_t *>(from) + static_cast<size_t>(r) * stride,
                    static_cast<size_t>(to.bytes));
}

inline void store_tile(int n, void *to, size_t stride) {
    const Tile &from = tile(n);
    for (int r = 0; r < from.rows; r++)
        std::memcpy(static_cast<uint8_t *>(to) + static_cast<size_t>(r) * stride, from.v[r],
                    static_cast<size_t>(from.bytes));
}

// tilezero and tdpbssd: row m of `a` times the bytes that stand below each other in `b`, 4 to a row.
inline void multiply_tiles(int sums, int a, int b) {
    Tile &c = tile(sums);
    if (c.rows != tile(a).rows || c.bytes != tile(b).bytes || tile(a).bytes != 4 * tile(b).rows) std::abort();
    for (int m = 0; m < c.rows; m++)
        for (int n = 0; n < c.bytes / 4; n++) {
            int32_t sum = 0;
            for (int k = 0; k < tile(a).bytes; k++)
                sum += static_cast<int8_t>(tile(a).v[m][k]) * static_cast<int8_t>(tile(b).v[k / 4][4 * n + k % 4]);
            std::memcpy(c.v[m] + 4 * n, &sum, 4);
        }
}

}  // namespace emulated

#endif
