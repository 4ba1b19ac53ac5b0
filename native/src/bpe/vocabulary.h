// The vocabulary and merges of a byte-level BPE, applied to one piece.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "piece.h"

namespace xl::bpe {

constexpr uint32_t NO_ID = 0xFFFFFFFF;

// How vocabulary files spell bytes (tokenizer/alphabet.py): each byte as one or two bytes of UTF-8.
struct Alphabet {
    uint16_t code[256];    // byte -> code point
    int16_t byte[0x144];   // code point -> byte, or -1
    uint8_t in_order[256]; // bytes by code point: the first ids of a new vocabulary
    Alphabet();
};
const Alphabet &alphabet();

// `count` strings that lie end to end in UTF-8, with their lengths in characters.
std::vector<std::string_view> cut_strings(const char *text, size_t bytes, const uint32_t *lengths,
                                          size_t count);

// `count` strings as a GGUF file has them: each after the 8 bytes of its length, lowest first. All of
// `bytes` must be used, and the strings must be UTF-8.
std::vector<std::string_view> cut_gguf_strings(const char *data, size_t bytes, size_t count);

// Strings to numbers; the strings belong to somebody else.
class StringTable {
   public:
    void reserve(size_t count);
    bool add(std::string_view key, uint32_t value);  // false, without a change, if it is there
    uint32_t find(std::string_view key) const;       // NO_ID if it is absent

   private:
    struct Slot {
        uint64_t hash;
        uint32_t entry;
    };
    std::vector<Slot> slots_;
    std::vector<std::pair<std::string_view, uint32_t>> entries_;
    size_t mask_ = 0;
};

class Vocabulary {
   public:
    // Spelled tokens with their ids, and merges as pairs of spelled tokens. With `ignore_merges` a
    // piece in the vocabulary is one token.
    Vocabulary(std::string tokens, const uint32_t *lengths, const uint32_t *ids, size_t count,
               std::string merges, const uint32_t *merge_lengths, size_t num_merges,
               bool ignore_merges);
    // The tokens and merges ("left right") of a GGUF file. Throws for a token or a merge that is
    // there twice or is odd, which the Python code knows how to read; merges of unknown tokens are
    // left out.
    Vocabulary(const std::vector<std::string_view> &tokens, const std::vector<uint32_t> &ids,
               const std::vector<std::string_view> &merges, const int32_t *kinds,
               bool ignore_merges);

    // Append the ids of one piece to `out`.
    void encode(const uint8_t *piece, size_t size, std::vector<uint32_t> &out) const;

    // The bytes of each token: as spelled, or its UTF-8 if it is spelled otherwise. Empty for an id
    // that no token has.
    std::vector<std::string> bytes_of_tokens(size_t vocab_size) const;
    bool has(std::string_view token) const { return whole_.find(token) != NO_ID; }
    uint32_t largest_id() const { return largest_; }

   private:
    struct Pair {
        uint32_t left = NO_ID, right = NO_ID, rank = NO_ID, joined = NO_ID;
    };
    struct Found {
        uint32_t rank, joined;
    };

    void find_bytes();
    void reserve_merges(size_t count);
    bool add_merge(uint32_t left, uint32_t right, uint32_t rank, uint32_t joined);
    size_t slot_of(uint32_t left, uint32_t right) const {
        const uint64_t key = static_cast<uint64_t>(left) << 32 | right;
        return (key ^ key >> 15) * 0x9E3779B97F4A7C15ull >> shift_;
    }
    Found find(uint32_t left, uint32_t right) const {
        for (size_t at = slot_of(left, right);; at = (at + 1) & mask_) {
            const Pair &pair = pairs_[at];
            if (pair.left == left && pair.right == right) return {pair.rank, pair.joined};
            if (pair.rank == NO_ID) return {NO_ID, NO_ID};
        }
    }
    void merge_short(uint32_t *symbols, size_t count, std::vector<uint32_t> &out) const;
    void merge_long(std::vector<uint32_t> &symbols, std::vector<uint32_t> &out) const;

    std::string text_;
    std::vector<std::string_view> tokens_;
    std::vector<uint32_t> ids_;
    StringTable whole_;
    bool ignore_merges_;
    uint32_t byte_id_[256];
    uint32_t largest_ = 0;
    std::vector<Pair> pairs_;
    size_t mask_ = 0;
    int shift_ = 0;
};

}  // namespace xl::bpe
