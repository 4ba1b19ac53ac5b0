// Text to ids and back: control tokens, pieces, their ids from a cache or from merges, threads.
#pragma once

#include <memory>
#include <mutex>

#include "batch.h"
#include "cache.h"
#include "vocabulary.h"

namespace xl::bpe {

// Tokens that a text is searched for before it is split; the longest wins.
class Finder {
   public:
    void add(std::string_view content, uint32_t id);
    // The first token in [at, end): sets its id and its end; `end` if there is none.
    const uint8_t *find(const uint8_t *at, const uint8_t *end, uint32_t &id,
                        const uint8_t *&after) const;
    bool empty() const { return tokens_.empty(); }
    bool has_spaces() const { return has_spaces_; }

   private:
    struct Token {
        std::string content;
        uint32_t id;
    };
    std::vector<Token> tokens_;  // the longest first
    bool first_[256] = {};
    bool has_spaces_ = false;
};

enum class Search : int32_t { NONE = 0, ADDED = 1, ALL = 2 };

class Encoder {
   public:
    Encoder(Vocabulary vocabulary, Rule rule, size_t vocab_size);
    void add_token(std::string_view content, uint32_t id, bool special);

    // Ids of texts, end to end in `out` (room for `capacity` ids), and where each text's begin.
    template <class Id>
    size_t encode(const Batch &batch, size_t num_texts, int32_t threads, Search search, Id *out,
                  size_t capacity, int64_t *offsets);
    std::vector<uint32_t> encode_piece(const uint8_t *piece, size_t size) const;

    // The bytes of tokens end to end; `skip_special` leaves control tokens out.
    size_t decode(const int64_t *ids, size_t count, bool skip_special, uint8_t *out,
                  size_t capacity) const;
    size_t vocab_size() const { return token_at_.size() - 1; }
    const std::vector<uint8_t> &token_bytes() const { return token_bytes_; }
    const std::vector<uint32_t> &token_at() const { return token_at_; }
    void finish();

    bool can_cut(Search search) const { return !finders_[static_cast<int>(search)].has_spaces(); }

   private:
    template <class Id>
    struct Worker {
        Cache<Id> cache;
        std::vector<uint32_t> ids;
    };
    template <class Id>
    class Pool {
       public:
        std::unique_ptr<Worker<Id>> take();
        void give(std::unique_ptr<Worker<Id>> worker);

       private:
        std::mutex guard_;
        std::vector<std::unique_ptr<Worker<Id>>> free_;
    };
    template <class Id>
    Id *ordinary(Worker<Id> &worker, const uint8_t *at, const uint8_t *end, Id *out) const;
    template <class Id>
    Id *chunk(Worker<Id> &worker, const Chunk &chunk, const Finder &finder, Id *out) const;
    template <class Id>
    Pool<Id> &pool();

    Vocabulary vocabulary_;
    Rule rule_;
    Finder finders_[3];
    std::vector<std::string> contents_;  // of tokens, until `finish` joins them
    std::vector<bool> special_;
    std::vector<uint8_t> token_bytes_;
    std::vector<uint32_t> token_at_;
    Pool<uint16_t> narrow_;
    Pool<uint32_t> wide_;
};

}  // namespace xl::bpe
