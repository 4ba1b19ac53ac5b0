// Scanners that cut text into pieces, one for each split pattern (src/xinslm/tokenizer/alphabet.py
// has the patterns; a comment here quotes the alternative that a line stands for).
#pragma once

#include <cstring>

#if defined(__SSE2__) || defined(_M_X64)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif
#ifdef _MSC_VER
#include <intrin.h>
#endif

#include "text.h"

namespace xl::bpe {

enum class Rule : int32_t { LLAMA3 = 0, GPT2 = 1, QWEN2 = 2, SMOLLM = 3 };

inline unsigned trailing_zeros(uint64_t bits) {
#ifdef _MSC_VER
    unsigned long at;
    _BitScanForward64(&at, bits);
    return at;
#else
    return static_cast<unsigned>(__builtin_ctzll(bits));
#endif
}

inline unsigned leading_zeros(uint64_t bits) {
#ifdef _MSC_VER
    unsigned long at;
    _BitScanReverse64(&at, bits);
    return 63 - at;
#else
    return static_cast<unsigned>(__builtin_clzll(bits));
#endif
}

// How many of the 16 bytes at `at` are ASCII letters before the first that is none. A word's end
// costs no branch this way: 1.6 times as fast as a loop over bytes on English text.
inline unsigned letters16(const uint8_t *at) {
#if defined(__SSE2__) || defined(_M_X64)
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(at));
    bytes = _mm_or_si128(bytes, _mm_set1_epi8(0x20));
    // 'a'..'z' become the 26 largest signed bytes
    bytes = _mm_add_epi8(bytes, _mm_set1_epi8(127 - 'z'));
    const int mask = _mm_movemask_epi8(_mm_cmpgt_epi8(bytes, _mm_set1_epi8(101)));
    return trailing_zeros(~static_cast<uint64_t>(mask));
#elif defined(__ARM_NEON)
    const uint8x16_t bytes = vorrq_u8(vld1q_u8(at), vdupq_n_u8(0x20));
    const uint8x16_t none = vcgtq_u8(vsubq_u8(bytes, vdupq_n_u8('a')), vdupq_n_u8(25));
    const uint8x8_t narrow = vshrn_n_u16(vreinterpretq_u16_u8(none), 4);  // four bits a byte
    const uint64_t mask = vget_lane_u64(vreinterpret_u64_u8(narrow), 0);
    return mask ? trailing_zeros(mask) >> 2 : 16;
#else
    unsigned count = 0;
    while (count < 16 && static_cast<uint8_t>((at[count] | 0x20) - 'a') < 26) ++count;
    return count;
#endif
}

// The end of the letters that begin at `at`: \p{L}*
inline const uint8_t *skip_letters(const uint8_t *at, const uint8_t *end) {
    for (;;) {
        while (end - at >= 16) {
            const unsigned count = letters16(at);
            at += count;
            if (count < 16) break;
        }
        if (at == end) return at;
        const Char next = char_at(at, end);
        if (next.kind != LETTER) return at;
        at += next.width;
    }
}

inline const uint8_t *skip(Class kind, const uint8_t *at, const uint8_t *end) {
    while (at < end) {
        const Char next = char_at(at, end);
        if (next.kind != kind) break;
        at += next.width;
    }
    return at;
}

// Bytes of a contraction at the apostrophe `at`: 's|'t|'re|'ve|'m|'ll|'d, 0 if there is none. With
// `fold` in any case, where U+017F (long s) is an s.
inline size_t contraction(const uint8_t *at, const uint8_t *end, bool fold) {
    const size_t left = static_cast<size_t>(end - at);
    auto lower = [&](size_t i) -> uint8_t {
        const uint8_t byte = at[i];
        return fold && byte >= 'A' && byte <= 'Z' ? byte | 0x20 : byte;
    };
    if (left < 2) return 0;
    switch (lower(1)) {
        case 's': case 't': case 'm': case 'd':
            return 2;
        case 'r': case 'v':
            return left >= 3 && lower(2) == 'e' ? 3 : 0;
        case 'l':
            return left >= 3 && lower(2) == 'l' ? 3 : 0;
        case 0xC5:
            return fold && left >= 3 && at[2] == 0xBF ? 3 : 0;
        default:
            return 0;
    }
}

struct Blank {
    const uint8_t *end, *last, *newline;  // its end, its last character, after its last newline
};

// The white space that begins at `at`: \s+
inline Blank blank_run(const uint8_t *at, const uint8_t *end) {
    Blank run{at, at, nullptr};
    while (run.end < end) {
        const Char next = char_at(run.end, end);
        if (next.kind != SPACE && next.kind != NEWLINE) break;
        run.last = run.end;
        run.end += next.width;
        if (next.kind == NEWLINE) run.newline = run.end;
    }
    return run;
}

// LLaMA-3's and Qwen2's pattern: the end of the piece that begins at `at` < `end`.
template <int MAX_NUMBERS>
inline const uint8_t *next_llama(const uint8_t *at, const uint8_t *end) {
    const Char first = char_at(at, end);
    if (first.kind == LETTER) return skip_letters(at + first.width, end);
    if (*at == '\'')
        if (const size_t size = contraction(at, end, true)) return at + size;
    const uint8_t *next = at + first.width;
    if (first.kind == NUMBER) {  // \p{N}{1,3}
        for (int count = 1; count < MAX_NUMBERS && next < end; ++count) {
            const Char more = char_at(next, end);
            if (more.kind != NUMBER) break;
            next += more.width;
        }
        return next;
    }
    Char second{SPACE, 0};
    if (next < end) second = char_at(next, end);
    if (first.kind != NEWLINE && second.kind == LETTER)  // [^\r\n\p{L}\p{N}]?\p{L}+
        return skip_letters(next + second.width, end);
    if (first.kind == OTHER || (*at == ' ' && second.kind == OTHER)) {
        next = skip(OTHER, next, end);  //  ?[^\s\p{L}\p{N}]+[\r\n]*
        return skip(NEWLINE, next, end);
    }
    const Blank run = blank_run(at, end);
    if (run.newline) return run.newline;  // \s*[\r\n]+
    if (run.end == end || run.last == at) return run.end;
    return run.last;  // \s+(?!\S)
}

// GPT-2's and SmolLM's pattern; SmolLM's takes numbers one by one and spaces before them together.
template <bool SINGLE_NUMBERS>
inline const uint8_t *next_gpt2(const uint8_t *at, const uint8_t *end) {
    if (*at == '\'')
        if (const size_t size = contraction(at, end, false)) return at + size;
    const bool spaced = *at == ' ' && at + 1 < end;
    const uint8_t *next = at + spaced;
    const Char first = char_at(next, end);
    if (first.kind == LETTER) return skip_letters(next + first.width, end);
    if (first.kind == OTHER) return skip(OTHER, next + first.width, end);
    if (first.kind == NUMBER) {
        if (!SINGLE_NUMBERS) return skip(NUMBER, next + first.width, end);
        return spaced ? next : next + first.width;
    }
    const Blank run = blank_run(at, end);
    if (run.end == end || run.last == at) return run.end;
    if (SINGLE_NUMBERS && char_at(run.end, end).kind == NUMBER) return run.end;  // \s+(?=\p{N})
    return run.last;
}

template <Rule RULE>
inline const uint8_t *next_piece(const uint8_t *at, const uint8_t *end) {
    if constexpr (RULE == Rule::LLAMA3) return next_llama<3>(at, end);
    if constexpr (RULE == Rule::QWEN2) return next_llama<1>(at, end);
    if constexpr (RULE == Rule::GPT2) return next_gpt2<false>(at, end);
    if constexpr (RULE == Rule::SMOLLM) return next_gpt2<true>(at, end);
}

// Call `body` with the rule as a compile-time constant.
template <class Body>
inline auto with_rule(Rule rule, Body body) {
    switch (rule) {
        case Rule::GPT2:
            return body(std::integral_constant<Rule, Rule::GPT2>());
        case Rule::QWEN2:
            return body(std::integral_constant<Rule, Rule::QWEN2>());
        case Rule::SMOLLM:
            return body(std::integral_constant<Rule, Rule::SMOLLM>());
        default:
            return body(std::integral_constant<Rule, Rule::LLAMA3>());
    }
}

// The first place at or after `at` where a text can be cut without changing its pieces: between a
// letter and a space that another letter follows. `end` if there is none.
inline const uint8_t *safe_cut(const uint8_t *at, const uint8_t *begin, const uint8_t *end) {
    auto letter = [](uint8_t byte) { return byte < 0x80 && ASCII.of[byte] == LETTER; };
    for (; end - at >= 2; ++at)
        if (at > begin && *at == ' ' && letter(at[1]) && letter(at[-1])) return at;
    return end;
}

}  // namespace xl::bpe
