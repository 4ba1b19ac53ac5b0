#include "encoder.h"

#include <algorithm>
#include <stdexcept>

namespace xl::bpe {

void Finder::add(std::string_view content, uint32_t id) {
    if (content.empty()) throw std::invalid_argument("an added token is empty");
    const auto shorter = [&](const Token &token) { return token.content.size() < content.size(); };
    tokens_.insert(std::find_if(tokens_.begin(), tokens_.end(), shorter),
                   {std::string(content), id});
    first_[static_cast<uint8_t>(content[0])] = true;
    has_spaces_ |= content.find(' ') != std::string_view::npos;
}

const uint8_t *Finder::find(const uint8_t *at, const uint8_t *end, uint32_t &id,
                            const uint8_t *&after) const {
    for (; at < end; ++at) {
        if (!first_[*at]) continue;
        for (const Token &token : tokens_) {
            const size_t size = token.content.size();
            if (size <= static_cast<size_t>(end - at) &&
                std::memcmp(at, token.content.data(), size) == 0) {
                id = token.id;
                after = at + size;
                return at;
            }
        }
    }
    return end;
}

Encoder::Encoder(Vocabulary vocabulary, Rule rule, size_t vocab_size)
    : vocabulary_(std::move(vocabulary)), rule_(rule) {
    if (rule < Rule::LLAMA3 || rule > Rule::SMOLLM)
        throw std::invalid_argument("there is no such split rule");
    if (vocab_size >= NO_ID || vocabulary_.largest_id() >= vocab_size)
        throw std::invalid_argument("the vocabulary has more ids than its size says");
    contents_ = vocabulary_.bytes_of_tokens(vocab_size);
    special_.resize(vocab_size);
}

void Encoder::add_token(std::string_view content, uint32_t id, bool special) {
    if (id >= contents_.size()) throw std::invalid_argument("an added token's id is too large");
    finders_[static_cast<int>(Search::ALL)].add(content, id);
    if (!special) finders_[static_cast<int>(Search::ADDED)].add(content, id);
    special_[id] = special_[id] || special;
    contents_[id] = content;
}

void Encoder::finish() {
    token_at_.reserve(contents_.size() + 1);
    token_at_.push_back(0);
    for (const std::string &content : contents_) {
        token_bytes_.insert(token_bytes_.end(), content.begin(), content.end());
        if (token_bytes_.size() >= NO_ID) throw std::invalid_argument("the tokens are too long");
        token_at_.push_back(static_cast<uint32_t>(token_bytes_.size()));
    }
    contents_ = {};
}

template <class Id>
std::unique_ptr<Encoder::Worker<Id>> Encoder::Pool<Id>::take() {
    {
        // not waited for: after a fork the thread that holds it may not be in this process
        const std::unique_lock<std::mutex> lock(guard_, std::try_to_lock);
        if (lock && !free_.empty()) {
            auto worker = std::move(free_.back());
            free_.pop_back();
            return worker;
        }
    }
    return std::make_unique<Worker<Id>>();
}

template <class Id>
void Encoder::Pool<Id>::give(std::unique_ptr<Worker<Id>> worker) {
    const std::unique_lock<std::mutex> lock(guard_, std::try_to_lock);
    if (lock) free_.push_back(std::move(worker));
}

template <>
Encoder::Pool<uint16_t> &Encoder::pool() {
    return narrow_;
}
template <>
Encoder::Pool<uint32_t> &Encoder::pool() {
    return wide_;
}

template <class Id>
Id *Encoder::ordinary(Worker<Id> &worker, const uint8_t *at, const uint8_t *end, Id *out) const {
    Cache<Id> &cache = worker.cache;
    auto visit = [&](const uint8_t *piece, size_t size, const Key &key, uint64_t hash) {
        if (const auto *slot = cache.find(piece, size, key, hash)) {
            out = cache.write(*slot, out);
            return;
        }
        worker.ids.clear();
        vocabulary_.encode(piece, size, worker.ids);
        std::copy(worker.ids.begin(), worker.ids.end(), out);
        cache.insert(piece, size, key, hash, out, worker.ids.size());
        out += worker.ids.size();
    };
    with_rule(rule_, [&](auto rule) {
        for_each_piece<decltype(rule)::value>(
            at, end, [&](uint64_t hash) { cache.prefetch(hash); }, visit);
    });
    return out;
}

template <class Id>
Id *Encoder::chunk(Worker<Id> &worker, const Chunk &chunk, const Finder &finder, Id *out) const {
    const uint8_t *at = chunk.begin;
    while (!finder.empty()) {
        uint32_t id = 0;
        const uint8_t *after = nullptr;
        const uint8_t *found = finder.find(at, chunk.end, id, after);
        if (found == chunk.end) break;
        out = ordinary(worker, at, found, out);
        *out++ = static_cast<Id>(id);
        at = after;
    }
    return ordinary(worker, at, chunk.end, out);
}

template <class Id>
size_t Encoder::encode(const Batch &batch, size_t num_texts, int32_t threads, Search search,
                       Id *out, size_t capacity, int64_t *offsets) {
    // A byte gives at most one id. Each job writes where its bytes would begin, with room for the
    // ids that `Cache::write` writes at once; then the gaps are closed.
    const size_t slack = Cache<Id>::INLINE_IDS;
    if (capacity < batch.bytes + slack * std::max<size_t>(1, batch.jobs.size()))
        throw std::invalid_argument("the array of ids is too small");
    const Finder &finder = finders_[static_cast<int>(search)];
    std::vector<size_t> counts(batch.chunks.size()), begins(batch.jobs.size());
    size_t room = 0;
    for (size_t job = 0; job < batch.jobs.size(); ++job) {
        begins[job] = room;
        room += batch.jobs[job].bytes + slack;
    }
    std::vector<std::unique_ptr<Worker<Id>>> workers(
        std::min<size_t>(batch.jobs.size(), static_cast<size_t>(threads)));
    for (auto &worker : workers) worker = pool<Id>().take();
    run_jobs(batch.jobs.size(), threads, [&](size_t worker, size_t job) {
        Id *at = out + begins[job];
        for (size_t i = batch.jobs[job].first; i < batch.jobs[job].last; ++i) {
            Id *next = chunk(*workers[worker], batch.chunks[i], finder, at);
            counts[i] = static_cast<size_t>(next - at);
            at = next;
        }
    });
    for (auto &worker : workers) pool<Id>().give(std::move(worker));
    size_t total = 0;
    std::fill(offsets, offsets + num_texts + 1, int64_t{0});
    for (size_t job = 0; job < batch.jobs.size(); ++job) {
        size_t in_job = 0;
        for (size_t i = batch.jobs[job].first; i < batch.jobs[job].last; ++i) {
            in_job += counts[i];
            offsets[batch.chunks[i].text + 1] += static_cast<int64_t>(counts[i]);
        }
        if (begins[job] != total) std::memmove(out + total, out + begins[job], in_job * sizeof(Id));
        total += in_job;
    }
    for (size_t i = 0; i < num_texts; ++i) offsets[i + 1] += offsets[i];
    return total;
}

template size_t Encoder::encode(const Batch &, size_t, int32_t, Search, uint16_t *, size_t,
                                int64_t *);
template size_t Encoder::encode(const Batch &, size_t, int32_t, Search, uint32_t *, size_t,
                                int64_t *);

std::vector<uint32_t> Encoder::encode_piece(const uint8_t *piece, size_t size) const {
    std::vector<uint32_t> ids;
    vocabulary_.encode(piece, size, ids);
    return ids;
}

size_t Encoder::decode(const int64_t *ids, size_t count, bool skip_special, uint8_t *out,
                       size_t capacity) const {
    size_t total = 0;
    for (size_t i = 0; i < count; ++i) {
        if (ids[i] < 0 || static_cast<uint64_t>(ids[i]) >= vocab_size())
            throw std::invalid_argument("token id " + std::to_string(ids[i]) +
                                        " is not in the vocabulary");
        const size_t id = static_cast<size_t>(ids[i]);
        if (skip_special && special_[id]) continue;
        const size_t begin = token_at_[id], size = token_at_[id + 1] - begin;
        if (total + size <= capacity) std::memcpy(out + total, &token_bytes_[begin], size);
        total += size;
    }
    return total;
}

}  // namespace xl::bpe
