// Learns merges: counts distinct pieces, then joins the most frequent pair again and again.
#pragma once

#include <queue>
#include <string>

#include "batch.h"
#include "piece.h"

namespace xl::bpe {

// Exact counts of distinct pieces; keeps a copy of each.
class Counts {
   public:
    Counts() : slots_(1 << 12) {}
    void prefetch(uint64_t hash) const { bpe::prefetch(&slots_[home(hash)]); }
    void add(const uint8_t *piece, size_t size, const Key &key, uint64_t hash, int64_t count);
    void add_all(const Counts &other);
    size_t size() const { return used_; }

    // Call `visit(piece, size, count)` for each piece.
    template <class Visit>
    void for_each(Visit visit) const {
        for (const Slot &slot : slots_) {
            if (slot.key.high == 0) continue;
            if (slot.key.is_long()) {
                visit(&pool_[slot.at], slot.key.high & ~LONG_MARK, slot.count);
            } else {
                const auto *piece = reinterpret_cast<const uint8_t *>(&slot.key);
                visit(piece, slot.key.high >> 56, slot.count);
            }
        }
    }

   private:
    struct Slot {
        Key key{0, 0};
        int64_t count = 0;
        size_t at = 0;  // of a long piece in `pool_`
    };
    size_t home(uint64_t hash) const { return hash >> 16 & (slots_.size() - 1); }
    void grow();

    std::vector<Slot> slots_;
    std::vector<uint8_t> pool_;
    size_t used_ = 0;
};

class Learner {
   public:
    explicit Learner(Rule rule);
    void add_texts(const uint8_t *const *texts, const int64_t *sizes, size_t count,
                   int32_t threads);
    void add_piece(const uint8_t *piece, size_t size, int64_t count);
    // End counting; `longest` is in bytes, 0 for no limit. Returns the number of distinct pieces.
    size_t start(int64_t min_frequency, uint32_t longest);
    // Merge until there are `num_tokens` tokens or no pair is left; returns the number of tokens.
    size_t run(size_t num_tokens);
    const std::vector<uint32_t> &merges() const { return merges_; }  // left and right in turn

   private:
    static constexpr uint32_t NONE = 0xFFFFFFFF;
    struct Symbol {
        uint32_t token, previous, next;  // in its word; NONE at the ends
        uint32_t pair;                   // the pair that begins here
        uint32_t word;
    };
    struct Pair {
        int64_t count;
        uint32_t left, right;
        size_t first, last;  // in `places_`
    };
    struct Best {
        int64_t count;
        uint32_t left, right, pair;
        bool operator<(const Best &other) const {
            if (count != other.count) return count < other.count;
            return left != other.left ? left > other.left : right > other.right;
        }
    };
    struct Place {
        uint32_t pair, at;
    };

    void read_words();
    void merge(uint32_t pair);
    void merge_at(uint32_t at, uint32_t joined);
    void take_pair(uint32_t at, uint32_t left, uint32_t right, uint32_t &known);
    void drop_pair(uint32_t at);
    void store(uint32_t first_pair);

    Rule rule_;
    std::vector<Counts> counts_;  // one for each thread
    int64_t minimum_ = 1;
    uint32_t longest_ = 0;
    std::vector<Symbol> symbols_;
    std::vector<int64_t> frequency_;
    std::vector<Pair> pairs_;
    std::vector<uint32_t> places_;  // of the symbols where pairs begin; some have changed since
    std::vector<Place> found_;      // places of the pairs that the present merge makes
    std::vector<uint32_t> length_;  // of tokens, in bytes
    std::vector<uint32_t> before_, after_;  // token -> pair with the present merge's token, or NONE
    uint32_t twice_ = NONE;
    std::priority_queue<Best> heap_;
    std::vector<uint32_t> merges_;
};

}  // namespace xl::bpe
