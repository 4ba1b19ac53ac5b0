#include "learn.h"

#include <stdexcept>

#include "vocabulary.h"

namespace xl::bpe {

void Counts::add(const uint8_t *piece, size_t size, const Key &key, uint64_t hash, int64_t count) {
    if (2 * (used_ + 1) > slots_.size()) grow();
    for (size_t at = home(hash);; at = (at + 1) & (slots_.size() - 1)) {
        Slot &slot = slots_[at];
        if (slot.key.high == 0) {
            slot = {key, count, pool_.size()};
            if (key.is_long()) pool_.insert(pool_.end(), piece, piece + size);
            ++used_;
            return;
        }
        if (slot.key.low == key.low && slot.key.high == key.high &&
            (!key.is_long() || std::memcmp(&pool_[slot.at], piece, size) == 0)) {
            slot.count += count;
            return;
        }
    }
}

void Counts::add_all(const Counts &other) {
    other.for_each([&](const uint8_t *piece, size_t size, int64_t count) {
        const Key key = make_key(piece, size, piece);
        add(piece, size, key, key.hash(), count);
    });
}

void Counts::grow() {
    std::vector<Slot> old(slots_.size() * 4);
    old.swap(slots_);
    for (const Slot &slot : old) {
        if (slot.key.high == 0) continue;
        size_t at = home(slot.key.hash());
        while (slots_[at].key.high != 0) at = (at + 1) & (slots_.size() - 1);
        slots_[at] = slot;
    }
}

Learner::Learner(Rule rule) : rule_(rule), counts_(1) {
    if (rule < Rule::LLAMA3 || rule > Rule::SMOLLM)
        throw std::invalid_argument("there is no such split rule");
}

void Learner::add_texts(const uint8_t *const *texts, const int64_t *sizes, size_t count,
                        int32_t threads) {
    if (!length_.empty()) throw std::logic_error("counting has ended");
    const Batch batch = make_batch(texts, sizes, count, threads, true);
    if (counts_.size() < static_cast<size_t>(threads))
        counts_.resize(std::min<size_t>(static_cast<size_t>(threads), batch.jobs.size() + 1));
    run_jobs(batch.jobs.size(), threads, [&](size_t worker, size_t job) {
        Counts &counts = counts_[worker];
        for (size_t i = batch.jobs[job].first; i < batch.jobs[job].last; ++i)
            with_rule(rule_, [&](auto rule) {
                for_each_piece<decltype(rule)::value>(
                    batch.chunks[i].begin, batch.chunks[i].end,
                    [&](uint64_t hash) { counts.prefetch(hash); },
                    [&](const uint8_t *piece, size_t size, const Key &key, uint64_t hash) {
                        counts.add(piece, size, key, hash, 1);
                    });
            });
    });
}

void Learner::add_piece(const uint8_t *piece, size_t size, int64_t count) {
    if (!length_.empty()) throw std::logic_error("counting has ended");
    if (size == 0 || count < 0) throw std::invalid_argument("an empty piece or a negative count");
    const Key key = make_key(piece, size, piece);
    counts_[0].add(piece, size, key, key.hash(), count);
}

size_t Learner::start(int64_t min_frequency, uint32_t longest) {
    if (!length_.empty()) throw std::logic_error("counting has ended");
    minimum_ = std::max<int64_t>(1, min_frequency);
    longest_ = longest;
    length_.assign(256, 1);
    before_.assign(256, NONE);
    after_.assign(256, NONE);
    for (size_t i = 1; i < counts_.size(); ++i) {
        counts_[0].add_all(counts_[i]);
        counts_[i] = Counts();
    }
    const size_t distinct = counts_[0].size();
    read_words();
    counts_.clear();
    return distinct;
}

// Turn pieces into linked lists of symbols and count their pairs.
void Learner::read_words() {
    uint32_t id_of[256];
    for (uint32_t id = 0; id < 256; ++id) id_of[alphabet().in_order[id]] = id;
    std::vector<uint32_t> pair_of(256 * 256, NONE);
    counts_[0].for_each([&](const uint8_t *piece, size_t size, int64_t count) {
        if (size < 2) return;
        if (symbols_.size() + size >= NONE)
            throw std::length_error("the distinct pieces of the text have more than 4 GB");
        const uint32_t word = static_cast<uint32_t>(frequency_.size());
        frequency_.push_back(count);
        for (size_t i = 0; i < size; ++i) {
            const uint32_t at = static_cast<uint32_t>(symbols_.size()), left = id_of[piece[i]];
            Symbol symbol{left, i ? at - 1 : NONE, i + 1 < size ? at + 1 : NONE, NONE, word};
            if (i + 1 < size && (longest_ == 0 || longest_ >= 2)) {
                const uint32_t right = id_of[piece[i + 1]];
                uint32_t &pair = pair_of[left << 8 | right];
                if (pair == NONE) {
                    pair = static_cast<uint32_t>(pairs_.size());
                    pairs_.push_back({0, left, right, 0, 0});
                }
                pairs_[pair].count += count;
                symbol.pair = pair;
                found_.push_back({pair, at});
            }
            symbols_.push_back(symbol);
        }
    });
    store(0);
    found_ = {};
}

// Move `found_` to `places_`, the places of each pair together and in their order; push the pairs.
void Learner::store(uint32_t first_pair) {
    for (const Place &place : found_) ++pairs_[place.pair].last;
    size_t end = places_.size();
    for (size_t i = first_pair; i < pairs_.size(); ++i) {
        Pair &pair = pairs_[i];
        pair.first = end;
        end += pair.last;
        pair.last = pair.first;
    }
    places_.resize(end);
    for (const Place &place : found_) places_[pairs_[place.pair].last++] = place.at;
    found_.clear();
    for (size_t i = first_pair; i < pairs_.size(); ++i) {
        const Pair &pair = pairs_[i];
        if (pair.count >= minimum_)
            heap_.push({pair.count, pair.left, pair.right, static_cast<uint32_t>(i)});
    }
}

size_t Learner::run(size_t num_tokens) {
    if (length_.empty()) throw std::logic_error("counting has not ended");
    while (length_.size() < num_tokens && !heap_.empty()) {
        Best best = heap_.top();
        heap_.pop();
        const int64_t count = pairs_[best.pair].count;
        if (count == best.count) {
            merge(best.pair);
        } else if (count >= minimum_) {  // later merges took some of it
            best.count = count;
            heap_.push(best);
        }
    }
    return length_.size();
}

void Learner::merge(uint32_t pair) {
    const Pair merged = pairs_[pair];
    const uint32_t joined = static_cast<uint32_t>(length_.size());
    const uint32_t first_pair = static_cast<uint32_t>(pairs_.size());
    length_.push_back(length_[merged.left] + length_[merged.right]);
    before_.push_back(NONE);
    after_.push_back(NONE);
    merges_.push_back(merged.left);
    merges_.push_back(merged.right);
    twice_ = NONE;
    for (size_t i = merged.first; i < merged.last; ++i)
        if (symbols_[places_[i]].pair == pair) merge_at(places_[i], joined);
    for (size_t i = first_pair; i < pairs_.size(); ++i) {
        before_[pairs_[i].left] = NONE;
        after_[pairs_[i].right] = NONE;
    }
    store(first_pair);
}

void Learner::merge_at(uint32_t at, uint32_t joined) {
    Symbol &symbol = symbols_[at];
    Symbol &right = symbols_[symbol.next];
    const uint32_t after = right.next, before = symbol.previous;
    drop_pair(at);
    if (after != NONE) {
        drop_pair(symbol.next);
        symbols_[after].previous = at;
    }
    right.token = NONE;
    symbol.token = joined;
    symbol.next = after;
    if (before != NONE) {
        drop_pair(before);
        const uint32_t token = symbols_[before].token;
        take_pair(before, token, joined, token == joined ? twice_ : before_[token]);
    }
    if (after != NONE) take_pair(at, joined, symbols_[after].token, after_[symbols_[after].token]);
}

void Learner::drop_pair(uint32_t at) {
    Symbol &symbol = symbols_[at];
    if (symbol.pair != NONE) pairs_[symbol.pair].count -= frequency_[symbol.word];
    symbol.pair = NONE;
}

// Count the pair that begins at `at`; `known` is its number, or NONE if this is its first place.
void Learner::take_pair(uint32_t at, uint32_t left, uint32_t right, uint32_t &known) {
    if (longest_ != 0 && length_[left] + length_[right] > longest_) return;
    if (known == NONE) {
        if (pairs_.size() >= NONE - 1) throw std::length_error("there are too many pairs");
        known = static_cast<uint32_t>(pairs_.size());
        pairs_.push_back({0, left, right, 0, 0});
    }
    pairs_[known].count += frequency_[symbols_[at].word];
    symbols_[at].pair = known;
    found_.push_back({known, at});
}

}  // namespace xl::bpe
