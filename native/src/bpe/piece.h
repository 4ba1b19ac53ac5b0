// Pieces as keys of hash tables: 16 bytes that hold a piece of at most 15, or stand for a long one.
#pragma once

#include <cstring>

#include "window.h"

namespace xl::bpe {

constexpr size_t SHORT_PIECE = 15;
constexpr uint64_t LONG_MARK = 0xFFull << 56;

inline uint64_t load64(const uint8_t *at) {
    uint64_t value;
    std::memcpy(&value, at, 8);
    return value;
}

inline uint64_t mix(uint64_t value) {
    value ^= value >> 32;
    value *= 0x9E3779B97F4A7C15ull;
    return value ^ value >> 29;
}

inline uint64_t hash_bytes(const uint8_t *at, size_t size) {
    uint64_t hash = size * 0xC2B2AE3D27D4EB4Full;
    for (; size >= 8; at += 8, size -= 8) hash = mix(hash ^ load64(at)) * 0xD6E8FEB86659FD93ull;
    uint64_t tail = 0;
    std::memcpy(&tail, at, size);
    return mix(hash ^ tail) * 0xD6E8FEB86659FD93ull;
}

struct Key {
    uint64_t low, high;  // bytes 0 to 7; bytes 8 to 14 and the size, or LONG_MARK and the size

    bool is_long() const { return high >= LONG_MARK; }
    uint64_t hash() const {
        return mix(low ^ high * 0xD6E8FEB86659FD93ull) * 0xC2B2AE3D27D4EB4Full;
    }
};

// 16 bytes are read at once if `end` says that there are as many.
inline Key make_key(const uint8_t *at, size_t size, const uint8_t *end) {
    static constexpr struct Masks {
        uint64_t of[16][2];
        constexpr Masks() : of() {
            for (int size = 0; size < 16; ++size) {
                of[size][0] = size >= 8 ? ~0ull : (1ull << 8 * size) - 1;
                of[size][1] = size > 8 ? (1ull << 8 * (size - 8)) - 1 : 0;
            }
        }
    } MASKS;
    if (size > SHORT_PIECE) return {hash_bytes(at, size), LONG_MARK | size};
    Key key{0, 0};
    if (end - at >= 16) {
        key = {load64(at) & MASKS.of[size][0], load64(at + 8) & MASKS.of[size][1]};
    } else {
        std::memcpy(&key, at, size);
    }
    key.high |= static_cast<uint64_t>(size) << 56;
    return key;
}

inline void prefetch(const void *address) {
#if defined(__GNUC__)
    __builtin_prefetch(address);
#else
    (void)address;
#endif
}

// Cut a text and call `visit(piece, size, key, hash)` for each piece in order. `prepare(hash)` is
// called for 64 pieces before the first of them is visited: memory answers meanwhile.
template <Rule RULE, class Prepare, class Visit>
inline void for_each_piece(const uint8_t *at, const uint8_t *end, Prepare prepare, Visit visit) {
    constexpr int BLOCK = 64;
    struct {
        const uint8_t *at;
        size_t size;
        Key key;
        uint64_t hash;
    } block[2 * BLOCK];
    while (at < end) {
        int count = 0;
        const auto add = [&](const uint8_t *next) {
            auto &piece = block[count++];
            piece.at = at;
            piece.size = static_cast<size_t>(next - at);
            piece.key = make_key(at, piece.size, end);
            piece.hash = piece.key.hash();
            prepare(piece.hash);
            at = next;
        };
        while (count < BLOCK && at < end) {
#if XL_BPE_WINDOWS
            if (end - at >= 64) {
                const uint8_t *window = at;
                uint64_t starts = piece_starts<RULE>(at, end) & ~uint64_t{1};
                if (starts) {
                    for (; starts; starts &= starts - 1) add(window + trailing_zeros(starts));
                    continue;
                }
            }
#endif
            add(next_piece<RULE>(at, end));
        }
        for (int i = 0; i < count; ++i)
            visit(block[i].at, block[i].size, block[i].key, block[i].hash);
    }
}

}  // namespace xl::bpe
