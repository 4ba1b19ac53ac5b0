// UTF-8 and classes of characters, as the split patterns need them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace xl::bpe {

#include "unicode_table.inc"

enum Class : uint8_t { OTHER = 0, LETTER = 1, NUMBER = 2, SPACE = 3, NEWLINE = 4 };

struct AsciiClasses {
    Class of[128];
    constexpr AsciiClasses() : of() {
        for (int code = 0; code < 128; ++code)
            of[code] = static_cast<Class>(PAGES[PAGE_OF[0]][code / 4] >> 2 * (code % 4) & 3);
        of['\r'] = of['\n'] = NEWLINE;
    }
};
inline constexpr AsciiClasses ASCII;

struct Char {
    Class kind;
    uint8_t width;  // bytes
};

// The character at `at` < `end` that is not ASCII. A byte that starts no valid sequence is a
// character of its own of class OTHER, as U+FFFD would be.
inline Char wide_char(const uint8_t *at, const uint8_t *end) {
    const uint8_t lead = *at;
    const size_t left = static_cast<size_t>(end - at);
    auto more = [&](size_t i) { return (at[i] & 0xC0) == 0x80; };
    uint32_t code;
    uint8_t width;
    if (lead >= 0xC2 && lead < 0xE0 && left >= 2 && more(1)) {
        code = (lead & 0x1Fu) << 6 | (at[1] & 0x3Fu);
        width = 2;
    } else if ((lead & 0xF0) == 0xE0 && left >= 3 && more(1) && more(2)) {
        code = (lead & 0x0Fu) << 12 | (at[1] & 0x3Fu) << 6 | (at[2] & 0x3Fu);
        width = 3;
    } else if (lead >= 0xF0 && lead < 0xF5 && left >= 4 && more(1) && more(2) && more(3)) {
        code = (lead & 7u) << 18 | (at[1] & 0x3Fu) << 12 | (at[2] & 0x3Fu) << 6 | (at[3] & 0x3Fu);
        width = 4;
    } else {
        return {OTHER, 1};
    }
    if (code >= TABLE_END) return {OTHER, width};
    const uint8_t packed = PAGES[PAGE_OF[code >> 8]][(code & 255) >> 2];
    return {static_cast<Class>(packed >> 2 * (code & 3) & 3), width};
}

inline Char char_at(const uint8_t *at, const uint8_t *end) {
    return *at < 0x80 ? Char{ASCII.of[*at], 1} : wide_char(at, end);
}

}  // namespace xl::bpe
