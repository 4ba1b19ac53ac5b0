// The beginnings of all pieces in 64 bytes at once, by bit operations on one mask for each class of
// characters. A piece costs no branch that could be mispredicted this way: see docs/results.md.
#pragma once

#include "scanner.h"

#if defined(__SSE2__) || defined(_M_X64) || defined(__aarch64__)
#define XL_BPE_WINDOWS 1
#else
#define XL_BPE_WINDOWS 0
#endif

namespace xl::bpe {

#if XL_BPE_WINDOWS

// Bit i stands for byte i of 64. Letters to newlines are ASCII only; `wide` is all other bytes.
struct Window {
    uint64_t letters = 0, numbers = 0, blank = 0, controls = 0, newlines = 0, quotes = 0, wide = 0;
};

// U+0009 to U+000D and the blank are the ASCII white space, newlines are two of them.
constexpr bool ascii_is_as_expected() {
    for (int code = 0; code < 128; ++code) {
        const bool letter = (code | 0x20) >= 'a' && (code | 0x20) <= 'z';
        const bool number = code >= '0' && code <= '9';
        const bool newline = code == '\r' || code == '\n';
        const bool space = (code == ' ' || (code >= 9 && code <= 13)) && !newline;
        const Class kind = letter    ? LETTER
                           : number  ? NUMBER
                           : newline ? NEWLINE
                           : space   ? SPACE
                                     : OTHER;
        if (ASCII.of[code] != kind) return false;
    }
    return true;
}
static_assert(ascii_is_as_expected());

#if defined(__aarch64__)
// One bit for each byte that is 0xFF, of four registers.
inline uint64_t bits(const uint8x16_t (&masks)[4]) {
    static const uint8_t POWERS[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t powers = vld1q_u8(POWERS);
    const uint8x16_t low = vpaddq_u8(vandq_u8(masks[0], powers), vandq_u8(masks[1], powers));
    const uint8x16_t high = vpaddq_u8(vandq_u8(masks[2], powers), vandq_u8(masks[3], powers));
    const uint8x16_t both = vpaddq_u8(low, high);
    return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(both, both)), 0);
}

inline Window classify(const uint8_t *at) {
    uint8x16_t letters[4], numbers[4], blank[4], controls[4], newlines[4], quotes[4], wide[4];
    for (int part = 0; part < 4; ++part) {
        const uint8x16_t bytes = vld1q_u8(at + 16 * part);
        auto within = [](uint8x16_t value, uint8_t first, uint8_t last) {
            return vcleq_u8(vsubq_u8(value, vdupq_n_u8(first)), vdupq_n_u8(last - first));
        };
        letters[part] = within(vorrq_u8(bytes, vdupq_n_u8(0x20)), 'a', 'z');
        numbers[part] = within(bytes, '0', '9');
        blank[part] = vceqq_u8(bytes, vdupq_n_u8(' '));
        controls[part] = within(bytes, 9, 13);
        newlines[part] =
            vorrq_u8(vceqq_u8(bytes, vdupq_n_u8('\n')), vceqq_u8(bytes, vdupq_n_u8('\r')));
        quotes[part] = vceqq_u8(bytes, vdupq_n_u8('\''));
        wide[part] = vcgeq_u8(bytes, vdupq_n_u8(0x80));
    }
    return {bits(letters),  bits(numbers), bits(blank), bits(controls),
            bits(newlines), bits(quotes),  bits(wide)};
}
#else
inline Window classify(const uint8_t *at) {
    Window found;
    for (int part = 0; part < 4; ++part) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(at + 16 * part));
        // after the addition `first` to `last` are the largest signed bytes
        auto within = [](__m128i value, char first, char last) {
            const __m128i moved = _mm_add_epi8(value, _mm_set1_epi8(static_cast<char>(127 - last)));
            return _mm_cmpgt_epi8(moved, _mm_set1_epi8(static_cast<char>(126 - last + first)));
        };
        auto equal = [&](char byte) { return _mm_cmpeq_epi8(bytes, _mm_set1_epi8(byte)); };
        auto put = [&](uint64_t &mask, __m128i chosen) {
            mask |= static_cast<uint64_t>(static_cast<uint32_t>(_mm_movemask_epi8(chosen)))
                    << 16 * part;
        };
        put(found.letters, within(_mm_or_si128(bytes, _mm_set1_epi8(0x20)), 'a', 'z'));
        put(found.numbers, within(bytes, '0', '9'));
        put(found.blank, equal(' '));
        put(found.controls, within(bytes, 9, 13));
        put(found.newlines, _mm_or_si128(equal('\n'), equal('\r')));
        put(found.quotes, equal('\''));
        put(found.wide, bytes);
    }
    return found;
}
#endif

// Starts of the numbers' pieces of at most `MOST`; a number that begins before the window begins
// with it.
template <int MOST>
inline uint64_t number_starts(uint64_t numbers) {
    if constexpr (MOST == 1) return numbers;
    uint64_t starts = numbers & ~(numbers << 1);
    if constexpr (MOST == 0) return starts;
    const uint64_t four = numbers & numbers << 1 & numbers << 2 & numbers << 3;
    for (uint64_t more = starts << 3 & four; more; more = more << 3 & four) starts |= more;
    return starts;
}

// White space that begins after a newline, unless another newline comes before the text goes on:
// \s*[\r\n]+ ends there.
inline uint64_t after_newlines(uint64_t spaces, uint64_t newlines) {
    uint64_t kept = 0;
    for (uint64_t left = spaces & newlines << 1; left; left &= left - 1) {
        const uint64_t start = left & (~left + 1);
        const uint64_t after = (spaces + start) & ~spaces;  // the lowest bit: behind this run
        if (!(after & (~after + 1) & newlines)) kept |= start;
    }
    return kept;
}

// Add the end of each contraction whose apostrophe begins a piece; its letter begins none.
inline uint64_t cut_contractions(uint64_t starts, uint64_t quotes, const uint8_t *at,
                                 const uint8_t *end, bool fold) {
    for (uint64_t left = starts & quotes; left; left &= left - 1) {
        const unsigned place = trailing_zeros(left);
        if (place >= 61) break;
        const size_t size = contraction(at + place, end, fold);
        if (size == 0) continue;
        starts &= ~(uint64_t{2} << place);
        starts |= uint64_t{1} << (place + size);
    }
    return starts;
}

// Bit i: a piece begins at at[i], where a piece begins at `at` and 64 bytes are there. What depends
// on bytes behind them, or on a character that is not ASCII, is left out with all that follows.
template <Rule RULE>
inline uint64_t piece_starts(const uint8_t *at, const uint8_t *end) {
    const Window w = classify(at);
    const uint64_t letters = w.letters, spaces = (w.blank | w.controls) & ~w.newlines;
    const uint64_t white = spaces | w.newlines;
    const uint64_t others = ~(letters | w.numbers | white | w.wide);
    // the bytes that are known, without white space at their end, which may go on
    uint64_t known = w.wide ? (w.wide & (~w.wide + 1)) - 1 : ~uint64_t{0};
    known &= ~uint64_t{0} >> 3;  // room for a contraction
    const uint64_t visible = known & ~white;
    if (visible == 0) return 1;
    known = ~uint64_t{0} >> leading_zeros(visible);

    const uint64_t letter_starts = letters & ~(letters << 1);
    const uint64_t other_starts = others & ~(others << 1);
    const uint64_t last = white & ~(white >> 1);  // of each run
    uint64_t starts = 1;
    if constexpr (RULE == Rule::LLAMA3 || RULE == Rule::QWEN2) {
        // a blank goes with others, any space with letters, a lone other one with letters
        const uint64_t spaced = others & w.blank << 1;
        const uint64_t lone = other_starts & ~(others >> 1) & ~spaced;
        // newlines behind others are theirs
        const uint64_t taken = w.newlines & ~(w.newlines + (w.newlines & others << 1));
        const uint64_t free = white & ~taken;
        starts |= letter_starts & ~(spaces << 1) & ~(lone << 1);
        starts |= other_starts & ~spaced;
        starts |= number_starts<RULE == Rule::LLAMA3 ? 3 : 1>(w.numbers);
        starts |= (free & ~(free << 1)) | (last & spaces) | after_newlines(spaces, w.newlines);
    } else {
        // a blank goes with what follows; before single numbers all white space stays together
        constexpr bool SINGLE = RULE == Rule::SMOLLM;
        const uint64_t split = SINGLE ? last & ~(w.numbers >> 1) : last;
        const uint64_t word_starts = letter_starts | other_starts | number_starts<SINGLE>(w.numbers);
        starts |= (word_starts & ~((split & w.blank) << 1)) | (white & ~(white << 1)) | split;
    }
    starts &= known;
    constexpr bool FOLD = RULE == Rule::LLAMA3 || RULE == Rule::QWEN2;
    if (starts & w.quotes) starts = cut_contractions(starts, w.quotes, at, end, FOLD) & known;
    return starts | 1;
}

#endif

}  // namespace xl::bpe
