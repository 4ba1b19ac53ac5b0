// Every kernel once, as a template over an instruction set `S` (simd_*.h). S has
//   F       16 floats            I       16 int32
//   Bytes   64 bytes of codes, 4 for each of 16 rows
//   Dword   4 codes of an input, for all rows
//   Small   sums of products of codes 0..15 with at most 32 codes of an input
//   Large   sums of products of int8 codes with codes of an input
// Lane r belongs to row r of a tile (or key r of 16), so no sum crosses lanes but in `sum`.
#pragma once

#include <cmath>
#include <cstring>

#include "../half.h"
#include "kernels.h"

namespace xl {
namespace {

// Not std::min and std::max: a shared inline function, compiled here for a newer processor, might be
// the copy that the linker keeps for all.
template <class T>
inline T lesser(T a, T b) {
    return a < b ? a : b;
}

template <class T>
inline T greater(T a, T b) {
    return a > b ? a : b;
}

template <int G>
struct Count {
    static constexpr int value = G;
};

template <int kMost, class Body>
inline void in_groups(int count, Body body) {
    // Tokens that share a load of weights, or queries that share keys. More hide the latency of the
    // sums and the cost of unpacking, until registers run out.
    int done = 0;
    for (; count - done >= kMost; done += kMost) body(Count<kMost>(), done);
    if constexpr (kMost > 8)
        for (; count - done >= 8; done += 8) body(Count<8>(), done);
    if constexpr (kMost > 4)
        for (; count - done >= 4; done += 4) body(Count<4>(), done);
    if constexpr (kMost > 3)
        if (count - done == 3) return body(Count<3>(), done);
    for (; count - done >= 2; done += 2) body(Count<2>(), done);
    if (done < count) body(Count<1>(), done);
}

// Hides from the compiler how a value was made, so that it does not keep others made from it.
template <class T>
inline void opaque(T &x) {
#if defined(__GNUC__)
    __asm__("" : "+r"(x));
#else
    (void)x;
#endif
}

// Pointers to G rows at a distance of `stride`. x86 reaches base + {0, 1, 2} * stride in one address;
// GCC makes G pointers instead, most of them on the stack, and loads more pointers than codes.
template <class T, int G>
struct Rows {
    Rows(const T *first, size_t distance) : stride(distance) {
        for (int k = 0; k < kBases; k++) bases[k] = first + 3 * k * stride;
    }
    const T *operator[](int g) const { return bases[g / 3] + g % 3 * stride; }
    void advance(size_t by) {
        for (auto &base : bases) {
            base += by;
            opaque(base);
        }
        opaque(stride);
    }
    static constexpr int kBases = (G + 2) / 3;
    const T *bases[kBases];
    size_t stride;
};

// G tokens with rounded inputs: where those of the block at hand are, and the tokens' sums so far.
template <class S, int G>
struct Group {
    Group(const Inputs &x, int first)
        : codes(x.codes + first * x.columns, x.columns),
          scales(x.scales + first * (x.columns / kBlock), x.columns / kBlock),
          offsets(x.offsets + first * (x.columns / kBlock), x.columns / kBlock) {
        for (int g = 0; g < G; g++) sums[g] = S::zero();
    }

    // Four codes, from column `c` of the block on.
    typename S::Dword dword(int g, int c) const { return S::dword(codes[g] + c); }
    float scale(int g) const { return *scales[g]; }
    int32_t offset(int g) const { return *offsets[g]; }

    // Adds the integer sums of the block, whose weights have the scales `weight_scale`.
    void add(int g, typename S::I sum, typename S::F weight_scale) {
        sums[g] = S::fma(S::to_float(sum), S::mul(weight_scale, S::set(scale(g))), sums[g]);
    }

    void next_block() {
        codes.advance(kBlock);
        scales.advance(1);
        offsets.advance(1);
    }

    void store(float *out) const {
        for (int g = 0; g < G; g++) S::store(out + kTileRows * g, sums[g]);
    }

    Rows<int8_t, G> codes;
    Rows<float, G> scales;
    Rows<int32_t, G> offsets;
    typename S::F sums[G];
};

template <class S, bool kMinima, int G>
inline void q4_group(const uint8_t *w, size_t blocks, const Inputs &x, int first, float *out) {
    constexpr size_t bytes = kMinima ? 320 : 288;
    Group<S, G> group(x, first);
    for (size_t b = 0; b < blocks; b++, w += bytes, group.next_block()) {
        if (G == 1) S::prefetch(w + 4 * bytes);
        typename S::Small small[G];
        for (int g = 0; g < G; g++) small[g] = S::small_zero();
        for (int c = 0; c < 4; c++) {
            const typename S::Bytes pair = S::load_bytes(w + 64 * c);
            const typename S::Bytes low = S::low_halves(pair), high = S::high_halves(pair);
            for (int g = 0; g < G; g++) {
                small[g] = S::small_dot(small[g], low, group.dword(g, 4 * c));
                small[g] = S::small_dot(small[g], high, group.dword(g, 4 * c + 16));
            }
        }
        const typename S::F scale = S::load_half(w + 256);
        for (int g = 0; g < G; g++) {
            typename S::I sum = S::small_total(small[g]);
            if (!kMinima) sum = S::add_int(sum, group.offset(g));
            group.add(g, sum, scale);
            if (kMinima) {
                const float along = group.scale(g) * (static_cast<float>(group.offset(g)) * -0.125f);
                group.sums[g] = S::fma(S::load_half(w + 288), S::set(along), group.sums[g]);
            }
        }
    }
    group.store(out);
}

template <class S, int G>
inline void q8_group(const uint8_t *w, size_t blocks, const Inputs &x, int first, float *out) {
    Group<S, G> group(x, first);
    for (size_t b = 0; b < blocks; b++, w += 544, group.next_block()) {
        if (G == 1) S::prefetch(w + 2 * 544);
        typename S::Large large[G];
        for (int g = 0; g < G; g++) large[g] = S::large_zero();
        for (int c = 0; c < 8; c++) {
            const typename S::Signed bytes = S::load_signed(w + 64 * c);
            for (int g = 0; g < G; g++) large[g] = S::large_dot(large[g], bytes, group.dword(g, 4 * c));
        }
        const typename S::F scale = S::load_half(w + 512);
        for (int g = 0; g < G; g++) {
            typename S::I sum = S::large_total(large[g]);
            if (S::kOffset) sum = S::add_int(sum, S::kOffset / 8 * group.offset(g));
            group.add(g, sum, scale);
        }
    }
    group.store(out);
}

template <class S, bool kHalf, int G>
inline void float_group(const uint8_t *w, size_t columns, const Inputs &x, int first, float *out) {
    typename S::F sums[G];
    const float *values[G];
    for (int g = 0; g < G; g++) {
        sums[g] = S::zero();
        values[g] = x.values + (first + g) * x.columns;
    }
    for (size_t c = 0; c < columns; c++, w += kHalf ? 32 : 64) {
        const typename S::F weight =
            kHalf ? S::load_half(w) : S::load(reinterpret_cast<const float *>(w));
        for (int g = 0; g < G; g++) sums[g] = S::fma(weight, S::set(values[g][c]), sums[g]);
    }
    for (int g = 0; g < G; g++) S::store(out + kTileRows * g, sums[g]);
}

template <class S, bool kMinima>
void q4_tile(const uint8_t *w, size_t columns, const Inputs &x, int first, int count, float *out) {
    in_groups<S::kTokens>(count, [&](auto g, int at) {
        q4_group<S, kMinima, decltype(g)::value>(w, columns / kBlock, x, first + at,
                                                 out + kTileRows * at);
    });
}

template <class S>
void q8_tile(const uint8_t *w, size_t columns, const Inputs &x, int first, int count, float *out) {
    in_groups<S::kTokens>(count, [&](auto g, int at) {
        q8_group<S, decltype(g)::value>(w, columns / kBlock, x, first + at, out + kTileRows * at);
    });
}

template <class S, bool kHalf>
void float_tile(const uint8_t *w, size_t columns, const Inputs &x, int first, int count,
                float *out) {
    in_groups<S::kTokens>(count, [&](auto g, int at) {
        float_group<S, kHalf, decltype(g)::value>(w, columns, x, first + at, out + kTileRows * at);
    });
}

template <class S>
void quantize_row(const float *x, size_t columns, int8_t *codes, float *scales, int32_t *offsets) {
    for (size_t b = 0; b < columns / kBlock; b++, x += kBlock, codes += kBlock) {
        const typename S::F a = S::load(x), c = S::load(x + 16);
        const float largest = S::largest(S::max(S::abs(a), S::abs(c)));
        // 0 * x is 0 unless x is infinite or NaN, which the largest may miss
        const float odd = S::sum(S::add(S::mul(a, S::zero()), S::mul(c, S::zero())));
        const float scale = half_to_float(float_to_half(largest / 127.0f));
        if (!(odd == 0.0f) || scale == 0.0f) {
            scales[b] = odd == 0.0f ? 0.0f : NAN;
            offsets[b] = 0;
            std::memset(codes, 0, kBlock);
            continue;
        }
        const typename S::F by = S::set(127.0f / largest);
        scales[b] = scale;
        offsets[b] = -8 * (S::store_codes(codes, S::mul(a, by)) + S::store_codes(codes + 16, S::mul(c, by)));
    }
}

template <class S>
void rms_norm(const float *x, const float *weight, size_t size, float eps, float *out) {
    typename S::F squares = S::zero();
    for (size_t i = 0; i < size; i += 16) {
        const typename S::F v = S::load(x + i);
        squares = S::fma(v, v, squares);
    }
    const float by = 1.0f / std::sqrt(S::sum(squares) / static_cast<float>(size) + eps);
    for (size_t i = 0; i < size; i += 16)
        S::store(out + i, S::mul(S::mul(S::load(x + i), S::set(by)), S::load(weight + i)));
}

// exp(x) with a relative error below 1e-7; 0 below -87, where float has subnormal numbers only.
// Cody and Waite's reduction x = n ln 2 + r, then a polynomial of degree 6 in r.
template <class S>
inline typename S::F exponential(typename S::F x) {
    using F = typename S::F;
    // NaN stays: of the two operands the second is the result if one is NaN
    const F inside = S::min(S::set(88.0f), S::max(S::set(-87.0f), x));
    const F n = S::round(S::mul(inside, S::set(1.44269504f)));
    F r = S::fma(n, S::set(-0.693359375f), inside);
    r = S::fma(n, S::set(2.12194440e-4f), r);
    F p = S::set(1.0f / 720);
    p = S::fma(p, r, S::set(1.0f / 120));
    p = S::fma(p, r, S::set(1.0f / 24));
    p = S::fma(p, r, S::set(1.0f / 6));
    p = S::fma(p, r, S::set(0.5f));
    p = S::fma(p, r, S::set(1.0f));
    p = S::fma(p, r, S::set(1.0f));
    return S::zero_below(S::mul(p, S::power_of_two(n)), x, -87.0f);
}

template <class S>
void silu_product(float *gate, const float *up) {
    const typename S::F g = S::load(gate);
    const typename S::F below = S::add(S::set(1.0f), exponential<S>(S::sub(S::zero(), g)));
    S::store(gate, S::mul(S::div(g, below), S::load(up)));
}

template <class S>
inline typename S::F load_cached(const uint16_t *from) {
    return S::load_half(from);
}

template <class S>
inline typename S::F load_cached(const int8_t *from) {
    return S::load_int8(from);
}

// Vectors of 16 that R queries take at once, so that enough sums are in flight.
template <class S, int R>
constexpr int kWide = 4 * R <= S::kSums ? 4 : 2 * R <= S::kSums ? 2 : 1;

// Scores of R queries for 16 B keys of a page. A key's lane sums over the head in order.
template <class S, class T, int R, int B>
inline void key_scores(const T *keys, int size, const float *queries, float (*scores)[kSpanTokens], int at) {
    typename S::F sums[R][B], key[B];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) sums[r][b] = S::zero();
    for (int d = 0; d < size; d++) {
        for (int b = 0; b < B; b++) key[b] = load_cached<S>(keys + 16 * (b * size + d));
        for (int r = 0; r < R; r++) {
            const typename S::F query = S::set(queries[r * size + d]);
            for (int b = 0; b < B; b++) sums[r][b] = S::fma(key[b], query, sums[r][b]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) S::store(scores[r] + at + 16 * b, sums[r][b]);
}

// Turns the scores that a query sees into its weights: exp(score - largest), times the value's scale.
template <class S, bool kScaled>
inline SoftmaxState span_softmax(float *scores, const PageView *pages, const Range &seen) {
    const int first = seen.begin / 16 * 16;
    typename S::F most = S::set(-INFINITY), total = S::zero();
    for (int i = first; i < seen.end; i += 16) {
        typename S::F score = S::load(scores + i);
        if (kScaled) score = S::mul(score, S::load(pages[i / kPageTokens].key_scales + i % kPageTokens));
        if (i < seen.begin || i + 16 > seen.end)
            score = S::inside(score, seen.begin - i, seen.end - i);  // -infinity elsewhere
        most = S::max(most, score);
        S::store(scores + i, score);
    }
    const float largest = S::largest(most);
    for (int i = first; i < seen.end; i += 16) {
        const typename S::F e = exponential<S>(S::sub(S::load(scores + i), S::set(largest)));
        total = S::add(total, e);
        if (kScaled)
            S::store(scores + i, S::mul(e, S::load(pages[i / kPageTokens].value_scales + i % kPageTokens)));
        else
            S::store(scores + i, e);
    }
    return {largest, S::sum(total)};
}

// Adds the values from `begin` to `end`, in order, to 16 B columns of R outputs.
template <class S, class T, int R, int B>
inline void add_values(typename S::F (*sums)[B], const PageView *pages, int size, int column,
                       const float (*weights)[kSpanTokens], int begin, int end) {
    typename S::F value[B];
    while (begin < end) {
        const T *values = static_cast<const T *>(pages[begin / kPageTokens].values) + column;
        for (const int stop = lesser(end, begin / kPageTokens * kPageTokens + kPageTokens); begin < stop; begin++) {
            for (int b = 0; b < B; b++) value[b] = load_cached<S>(values + begin % kPageTokens * size + 16 * b);
            for (int r = 0; r < R; r++) {
                const typename S::F weight = S::set(weights[r][begin]);
                for (int b = 0; b < B; b++) sums[r][b] = S::fma(value[b], weight, sums[r][b]);
            }
        }
    }
}

// No row reads a value that it does not see: 0 times what is infinite or NaN is NaN.
template <class S, class T, int R, int B>
inline void span_values(const PageView *pages, int size, int column, const float (*weights)[kSpanTokens],
                        const Range *seen, const Range &shared, float *outputs) {
    typename S::F sums[R][B];
    for (int r = 0; r < R; r++) {
        for (int b = 0; b < B; b++) sums[r][b] = S::zero();
        add_values<S, T, 1, B>(sums + r, pages, size, column, weights + r, seen[r].begin, shared.begin);
    }
    add_values<S, T, R, B>(sums, pages, size, column, weights, shared.begin, shared.end);
    for (int r = 0; r < R; r++) {
        add_values<S, T, 1, B>(sums + r, pages, size, column, weights + r, shared.end, seen[r].end);
        for (int b = 0; b < B; b++) S::store(outputs + r * size + column + 16 * b, sums[r][b]);
    }
}

template <class S, class T, int R>
inline void attend_rows(const PageView *pages, int size, const float *queries, const Range *seen,
                        SoftmaxState *states, float *outputs) {
    constexpr int B = kWide<S, R>;
    Range shared{0, kSpanTokens}, any{kSpanTokens, 0};  // what all rows see, what one of them does
    for (int r = 0; r < R; r++) {
        shared = {greater(shared.begin, seen[r].begin), lesser(shared.end, seen[r].end)};
        any = {lesser(any.begin, seen[r].begin), greater(any.end, seen[r].end)};
    }
    if (shared.begin >= shared.end) {
        if constexpr (R > 1) {
            for (int r = 0; r < R; r++)
                attend_rows<S, T, 1>(pages, size, queries + r * size, seen + r, states + r, outputs + r * size);
        } else {
            states[0] = {-INFINITY, 0.0f};
            std::memset(outputs, 0, static_cast<size_t>(size) * sizeof(float));
        }
        return;
    }
    alignas(64) float scores[R][kSpanTokens];
    for (int at = any.begin / (16 * B) * (16 * B); at < any.end; at += 16 * B) {
        const T *keys = static_cast<const T *>(pages[at / kPageTokens].keys) + at % kPageTokens * size;
        key_scores<S, T, R, B>(keys, size, queries, scores, at);
    }
    for (int r = 0; r < R; r++) states[r] = span_softmax<S, sizeof(T) == 1>(scores[r], pages, seen[r]);
    int column = 0;
    for (; column + 16 * B <= size; column += 16 * B)
        span_values<S, T, R, B>(pages, size, column, scores, seen, shared, outputs);
    for (; column < size; column += 16)
        span_values<S, T, R, 1>(pages, size, column, scores, seen, shared, outputs);
}

template <class S, class T>
void attend(const PageView *pages, int size, int rows, const float *queries, const Range *seen,
            SoftmaxState *states, float *outputs) {
    in_groups<S::kRows>(rows, [&](auto r, int at) {
        attend_rows<S, T, decltype(r)::value>(pages, size, queries + at * size, seen + at, states + at,
                                              outputs + at * size);
    });
}

template <class S>
void join(SoftmaxState &state, float *output, const SoftmaxState &later, const float *later_output,
          int size) {
    const float most = greater(state.largest, later.largest);
    float factors[16];
    const float first = state.largest - most, second = later.largest - most;
    S::store(factors, exponential<S>(S::set(first)));
    const float a = factors[0];
    S::store(factors, exponential<S>(S::set(second)));
    const float b = factors[0];
    state.largest = most;
    state.total = state.total * a + later.total * b;
    for (int d = 0; d < size; d += 16) {
        const typename S::F kept = S::mul(S::load(output + d), S::set(a));
        S::store(output + d, S::fma(S::load(later_output + d), S::set(b), kept));
    }
}

template <class S>
void to_half(const float *values, size_t count, uint16_t *out) {
    for (size_t i = 0; i < count; i += 16) S::store_half(out + i, S::load(values + i));
}

template <class S>
constexpr Kernels table(const char *name) {
    return {name,
            {q4_tile<S, false>, q4_tile<S, true>, q8_tile<S>, float_tile<S, true>,
             float_tile<S, false>},
            quantize_row<S>,
            rms_norm<S>,
            silu_product<S>,
            {attend<S, uint16_t>, attend<S, int8_t>},
            join<S>,
            to_half<S>};
}

}  // namespace
}  // namespace xl
