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

template <class S, class Body>
inline void in_groups(int count, Body body) {
    // Tokens that share a load of weights. More hide the latency of the integer sums and the cost
    // of unpacking, until registers run out.
    int done = 0;
    for (; count - done >= S::kTokens; done += S::kTokens) body(Count<S::kTokens>(), done);
    if constexpr (S::kTokens > 8)
        for (; count - done >= 8; done += 8) body(Count<8>(), done);
    if constexpr (S::kTokens > 4)
        for (; count - done >= 4; done += 4) body(Count<4>(), done);
    for (; count - done >= 2; done += 2) body(Count<2>(), done);
    if (done < count) body(Count<1>(), done);
}

// G tokens with rounded inputs: where these are, and the tokens' sums so far.
template <class S, int G>
struct Group {
    Group(const Inputs &x, int first) : stride(x.columns / kBlock) {
        for (int g = 0; g < G; g++) {
            sums[g] = S::zero();
            codes[g] = x.codes + (first + g) * x.columns;
        }
        scales = x.scales + first * stride;
        totals = x.sums + first * stride;
    }

    // Four codes of block `b`, from column `c` of it on.
    typename S::Dword dword(int g, size_t b, int c) const { return S::dword(codes[g] + kBlock * b + c); }
    float scale(int g, size_t b) const { return scales[g * stride + b]; }
    int32_t total(int g, size_t b) const { return totals[g * stride + b]; }

    // Adds the integer sums of block `b`, whose weights have the scales `weight_scale`.
    void add(int g, size_t b, typename S::I sum, typename S::F weight_scale) {
        sums[g] = S::fma(S::to_float(sum), S::mul(weight_scale, S::set(scale(g, b))), sums[g]);
    }

    void store(float *out) const {
        for (int g = 0; g < G; g++) S::store(out + kTileRows * g, sums[g]);
    }

    typename S::F sums[G];

  private:
    const int8_t *codes[G];
    const float *scales;
    const int32_t *totals;
    const size_t stride;
};

template <class S, bool kMinima, int G>
inline void q4_group(const uint8_t *w, size_t blocks, const Inputs &x, int first, float *out) {
    constexpr size_t bytes = kMinima ? 320 : 288;
    Group<S, G> group(x, first);
    for (size_t b = 0; b < blocks; b++, w += bytes) {
        if (G == 1) S::prefetch(w + 4 * bytes);
        typename S::Small small[G];
        for (int g = 0; g < G; g++) small[g] = S::small_zero();
        for (int c = 0; c < 4; c++) {
            const typename S::Bytes pair = S::load_bytes(w + 64 * c);
            const typename S::Bytes low = S::low_halves(pair), high = S::high_halves(pair);
            for (int g = 0; g < G; g++) {
                small[g] = S::small_dot(small[g], low, group.dword(g, b, 4 * c));
                small[g] = S::small_dot(small[g], high, group.dword(g, b, 4 * c + 16));
            }
        }
        const typename S::F scale = S::load_half(w + 256);
        for (int g = 0; g < G; g++) {
            typename S::I sum = S::small_total(small[g]);
            if (!kMinima) sum = S::add_int(sum, -8 * group.total(g, b));  // codes are stored plus 8
            group.add(g, b, sum, scale);
            if (kMinima) {
                const float along = group.scale(g, b) * static_cast<float>(group.total(g, b));
                group.sums[g] = S::fma(S::load_half(w + 288), S::set(along), group.sums[g]);
            }
        }
    }
    group.store(out);
}

template <class S, int G>
inline void q8_group(const uint8_t *w, size_t blocks, const Inputs &x, int first, float *out) {
    Group<S, G> group(x, first);
    for (size_t b = 0; b < blocks; b++, w += 544) {
        if (G == 1) S::prefetch(w + 2 * 544);
        typename S::Large large[G];
        for (int g = 0; g < G; g++) large[g] = S::large_zero();
        for (int c = 0; c < 8; c++) {
            const typename S::Signed bytes = S::load_signed(w + 64 * c);
            for (int g = 0; g < G; g++) large[g] = S::large_dot(large[g], bytes, group.dword(g, b, 4 * c));
        }
        const typename S::F scale = S::load_half(w + 512);
        for (int g = 0; g < G; g++) {
            typename S::I sum = S::large_total(large[g]);
            if (S::kOffset) sum = S::add_int(sum, -S::kOffset * group.total(g, b));
            group.add(g, b, sum, scale);
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
    in_groups<S>(count, [&](auto g, int at) {
        q4_group<S, kMinima, decltype(g)::value>(w, columns / kBlock, x, first + at,
                                                 out + kTileRows * at);
    });
}

template <class S>
void q8_tile(const uint8_t *w, size_t columns, const Inputs &x, int first, int count, float *out) {
    in_groups<S>(count, [&](auto g, int at) {
        q8_group<S, decltype(g)::value>(w, columns / kBlock, x, first + at, out + kTileRows * at);
    });
}

template <class S, bool kHalf>
void float_tile(const uint8_t *w, size_t columns, const Inputs &x, int first, int count,
                float *out) {
    in_groups<S>(count, [&](auto g, int at) {
        float_group<S, kHalf, decltype(g)::value>(w, columns, x, first + at, out + kTileRows * at);
    });
}

template <class S>
void quantize_row(const float *x, size_t columns, int8_t *codes, float *scales, int32_t *sums) {
    for (size_t b = 0; b < columns / kBlock; b++, x += kBlock, codes += kBlock) {
        const typename S::F a = S::load(x), c = S::load(x + 16);
        const float largest = S::largest(S::max(S::abs(a), S::abs(c)));
        // 0 * x is 0 unless x is infinite or NaN, which the largest may miss
        const float odd = S::sum(S::add(S::mul(a, S::zero()), S::mul(c, S::zero())));
        const float scale = half_to_float(float_to_half(largest / 127.0f));
        if (!(odd == 0.0f) || scale == 0.0f) {
            scales[b] = odd == 0.0f ? 0.0f : NAN;
            sums[b] = 0;
            std::memset(codes, 0, kBlock);
            continue;
        }
        const typename S::F by = S::set(127.0f / largest);
        scales[b] = scale;
        sums[b] = S::store_codes(codes, S::mul(a, by)) + S::store_codes(codes + 16, S::mul(c, by));
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

// Scores of R queries for 64 keys. A key's lane sums over the head in order.
template <class S, class T, int R>
inline void page_scores(const T *keys, int size, const float *queries, float (*scores)[kPageTokens]) {
    for (int block = 0; block < kPageTokens / 16; block++, keys += 16 * size) {
        typename S::F sums[R];
        for (int r = 0; r < R; r++) sums[r] = S::zero();
        for (int d = 0; d < size; d++) {
            const typename S::F key = load_cached<S>(keys + 16 * d);
            for (int r = 0; r < R; r++)
                sums[r] = S::fma(key, S::set(queries[r * size + d]), sums[r]);
        }
        for (int r = 0; r < R; r++) S::store(scores[r] + 16 * block, sums[r]);
    }
}

// Turns scores into exp(score - largest), updates the state, returns the factor of earlier outputs.
template <class S>
inline float page_softmax(float *scores, const float *key_scales, const Range &seen,
                          SoftmaxState &state) {
    typename S::F largest = S::set(-INFINITY);
    for (int i = 0; i < kPageTokens; i += 16) {
        typename S::F score = S::load(scores + i);
        if (key_scales) score = S::mul(score, S::load(key_scales + i));
        score = S::inside(score, seen.begin - i, seen.end - i);  // -infinity elsewhere
        largest = S::max(largest, score);
        S::store(scores + i, score);
    }
    const float most = greater(state.largest, S::largest(largest));
    typename S::F total = S::zero();
    for (int i = 0; i < kPageTokens; i += 16) {
        const typename S::F e = exponential<S>(S::sub(S::load(scores + i), S::set(most)));
        total = S::add(total, e);
        S::store(scores + i, e);
    }
    float before[16];
    S::store(before, exponential<S>(S::set(state.largest - most)));
    state.largest = most;
    state.total = state.total * before[0] + S::sum(total);
    return before[0];
}

// A row's values from `begin` to `end`, in order.
template <class S, class T>
inline typename S::F add_values(typename S::F sum, const T *values, int size, const float *weights, int begin,
                                int end) {
    for (int i = begin; i < end; i++) sum = S::fma(load_cached<S>(values + i * size), S::set(weights[i]), sum);
    return sum;
}

// No row reads a value that it does not see: 0 times what is infinite or NaN is NaN.
template <class S, class T, int R>
inline void page_values(const T *values, int size, const float (*weights)[kPageTokens], const float *before,
                        const Range *seen, const Range &shared, float *outputs) {
    for (int d = 0; d < size; d += 16) {
        typename S::F sums[R];
        for (int r = 0; r < R; r++) {
            sums[r] = S::mul(S::load(outputs + r * size + d), S::set(before[r]));
            sums[r] = add_values<S>(sums[r], values + d, size, weights[r], seen[r].begin, shared.begin);
        }
        for (int i = shared.begin; i < shared.end; i++) {
            const typename S::F value = load_cached<S>(values + i * size + d);
            for (int r = 0; r < R; r++) sums[r] = S::fma(value, S::set(weights[r][i]), sums[r]);
        }
        for (int r = 0; r < R; r++) {
            sums[r] = add_values<S>(sums[r], values + d, size, weights[r], shared.end, seen[r].end);
            S::store(outputs + r * size + d, sums[r]);
        }
    }
}

template <class S, class T, int R>
inline void attend_rows(const PageView &page, int size, const float *queries, const Range *seen,
                        SoftmaxState *states, float *outputs) {
    Range shared{0, kPageTokens};  // what all rows see
    for (int r = 0; r < R; r++) {
        shared.begin = greater(shared.begin, seen[r].begin);
        shared.end = lesser(shared.end, seen[r].end);
    }
    if (shared.begin >= shared.end) {
        if constexpr (R > 1)
            for (int r = 0; r < R; r++)
                attend_rows<S, T, 1>(page, size, queries + r * size, seen + r, states + r, outputs + r * size);
        return;
    }
    float scores[R][kPageTokens], before[R] = {};  // gcc 12 takes it for uninitialized
    page_scores<S, T, R>(static_cast<const T *>(page.keys), size, queries, scores);
    for (int r = 0; r < R; r++) {
        before[r] = page_softmax<S>(scores[r], page.key_scales, seen[r], states[r]);
        if (page.value_scales)
            for (int i = 0; i < kPageTokens; i++) scores[r][i] *= page.value_scales[i];
    }
    page_values<S, T, R>(static_cast<const T *>(page.values), size, scores, before, seen, shared, outputs);
}

template <class S, class T>
void attend(const PageView &page, int size, int rows, const float *queries, const Range *seen,
            SoftmaxState *states, float *outputs) {
    int r = 0;
    for (; r + 4 <= rows; r += 4)
        attend_rows<S, T, 4>(page, size, queries + r * size, seen + r, states + r, outputs + r * size);
    queries += r * size, outputs += r * size, seen += r, states += r;
    if (rows - r == 3) attend_rows<S, T, 3>(page, size, queries, seen, states, outputs);
    if (rows - r == 2) attend_rows<S, T, 2>(page, size, queries, seen, states, outputs);
    if (rows - r == 1) attend_rows<S, T, 1>(page, size, queries, seen, states, outputs);
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
