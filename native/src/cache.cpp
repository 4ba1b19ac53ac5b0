#include "cache.h"

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace xl {
namespace {

size_t region_size(int head_size, bool int8) {
    const size_t numbers = 2 * static_cast<size_t>(kPageTokens) * static_cast<size_t>(head_size);
    return int8 ? numbers + 2 * kPageTokens * sizeof(float) : 2 * numbers;
}

// Codes of `size` values, whose largest magnitude becomes 127; returns the scale. Of values that are
// all below float's normal numbers it is 0.
float round_head(const float *values, int size, int8_t *codes, size_t step) {
    float largest = 0, odd = 0;
    for (int i = 0; i < size; i++) {
        largest = std::fabs(values[i]) > largest ? std::fabs(values[i]) : largest;
        odd += 0.0f * values[i];  // 0 unless one is infinite or NaN, which the largest may miss
    }
    const float scale = largest / 127.0f;
    if (!(odd == 0.0f) || scale < std::numeric_limits<float>::min()) {
        for (int i = 0; i < size; i++) codes[step * static_cast<size_t>(i)] = 0;
        return odd == 0.0f ? 0.0f : NAN;  // which stays visible: the scale is a factor of every score
    }
    for (int i = 0; i < size; i++)
        codes[step * static_cast<size_t>(i)] = static_cast<int8_t>(std::nearbyint(values[i] / scale));
    return scale;
}

}  // namespace

Cache::Cache(const xl_shape &s, bool int8, int64_t max_tokens)
    : layers_(s.layers), key_heads_(s.key_heads), real_size_(s.head_size),
      head_size_(static_cast<int>(round_up(static_cast<size_t>(s.head_size), 16))), window_(s.window), int8_(int8),
      region_bytes_(region_size(head_size_, int8)),
      max_pages_(max_tokens < 1 ? 0 : static_cast<size_t>((max_tokens - 1) / kPageTokens + 1)) {}

Cache::Sequence &Cache::at(int sequence) {
    if (sequence < 0 || static_cast<size_t>(sequence) >= sequences_.size() ||
        !sequences_[static_cast<size_t>(sequence)].exists)
        throw std::runtime_error("there is no sequence " + std::to_string(sequence));
    return sequences_[static_cast<size_t>(sequence)];
}

const Cache::Sequence &Cache::at(int sequence) const { return const_cast<Cache *>(this)->at(sequence); }

int Cache::create(int parent, int64_t length) {
    if (parent < -1) throw std::runtime_error("there is no sequence " + std::to_string(parent));
    if (parent >= 0 && (length < 0 || length > at(parent).length))
        throw std::runtime_error("a sequence of " + std::to_string(at(parent).length) + " tokens has no beginning of " +
                                 std::to_string(length));
    size_t place = 0;
    while (place < sequences_.size() && sequences_[place].exists) place++;
    if (place == sequences_.size()) sequences_.emplace_back();
    Sequence fresh;
    fresh.exists = true;
    if (parent >= 0) {
        const Sequence &from = at(parent);
        fresh.length = length;
        const auto used = static_cast<size_t>((length + kPageTokens - 1) / kPageTokens);
        fresh.pages.assign(from.pages.begin(), from.pages.begin() + static_cast<std::ptrdiff_t>(used));
        for (int page : fresh.pages)
            if (page >= 0) pages_[static_cast<size_t>(page)].users++;
    }
    sequences_[place] = std::move(fresh);
    const int made = static_cast<int>(place);
    if (parent >= 0) rewind(made, length);  // the parent's window may have dropped what this one needs
    return made;
}

void Cache::remove(int sequence) {
    Sequence &s = at(sequence);
    for (int page : s.pages) release(page);
    s = Sequence();
}

int64_t Cache::length(int sequence) const { return at(sequence).length; }

int64_t Cache::room(int64_t positions) const {
    int64_t total = 0;
    for (const Sequence &s : sequences_)
        if (s.exists) total += positions - s.length;
    return total;
}

int64_t Cache::rewind(int sequence, int64_t length) {
    Sequence &s = at(sequence);
    if (length < 0 || length > s.length)
        throw std::runtime_error("a sequence of " + std::to_string(s.length) + " tokens cannot be cut to " +
                                 std::to_string(length));
    // the next token, at position `length`, sees positions from first_seen(length) on
    for (int64_t p = first_seen(length); p < length; p += kPageTokens - p % kPageTokens)
        if (s.pages[static_cast<size_t>(p / kPageTokens)] < 0) length = 0;
    const auto used = static_cast<size_t>((length + kPageTokens - 1) / kPageTokens);
    for (size_t i = used; i < s.pages.size(); i++) release(s.pages[i]);
    s.pages.resize(used);
    s.length = length;
    return length;
}

int Cache::take() {
    if (!free_.empty()) {
        const int page = free_.back();
        free_.pop_back();
        pages_[static_cast<size_t>(page)].users = 1;
        // weights of 0 times what an earlier sequence left must be 0
        std::memset(pages_[static_cast<size_t>(page)].memory.get(), 0,
                    region_bytes_ * static_cast<size_t>(layers_ * key_heads_));
        return page;
    }
    if (pages_.size() >= max_pages_)
        throw std::runtime_error("the cache holds " + std::to_string(max_pages_ * kPageTokens) +
                                 " tokens, and all are in use");
    Page page;
    page.memory = allocate<uint8_t>(region_bytes_ * static_cast<size_t>(layers_ * key_heads_));
    page.users = 1;
    free_.reserve(pages_.size() + 1);  // so that `release` cannot fail
    pages_.push_back(std::move(page));
    return static_cast<int>(pages_.size() - 1);
}

void Cache::release(int page) {
    if (page >= 0 && --pages_[static_cast<size_t>(page)].users == 0) free_.push_back(page);
}

void Cache::reserve(int sequence, int64_t count) {
    Sequence &s = at(sequence);
    const auto first = static_cast<size_t>(s.length / kPageTokens);
    const auto end = static_cast<size_t>((s.length + count + kPageTokens - 1) / kPageTokens);
    if (s.pages.size() < end) s.pages.resize(end, -1);
    for (size_t i = first; i < end; i++) {
        const int old = s.pages[i];
        if (old >= 0 && pages_[static_cast<size_t>(old)].users == 1) continue;
        const int fresh = take();
        if (old >= 0) {
            std::memcpy(pages_[static_cast<size_t>(fresh)].memory.get(), pages_[static_cast<size_t>(old)].memory.get(),
                        region_bytes_ * static_cast<size_t>(layers_ * key_heads_));
            release(old);
        }
        s.pages[i] = fresh;
    }
}

void Cache::advance(int sequence) {
    Sequence &s = at(sequence);
    s.length++;
    const auto below = static_cast<size_t>(first_seen(s.length) / kPageTokens);
    // one page more stays, so that a few tokens can be taken back
    for (size_t i = below < 2 ? 0 : below - 1; i-- > 0 && s.pages[i] >= 0;) {
        release(s.pages[i]);
        s.pages[i] = -1;
    }
}

uint8_t *Cache::region(int page, int layer, int key_head) const {
    return pages_[static_cast<size_t>(page)].memory.get() +
           region_bytes_ * static_cast<size_t>(layer * key_heads_ + key_head);
}

PageView Cache::page(int sequence, int64_t position, int layer, int key_head) const {
    const auto index = static_cast<size_t>(position / kPageTokens);
    const uint8_t *memory = region(sequences_[static_cast<size_t>(sequence)].pages[index], layer, key_head);
    const size_t half = static_cast<size_t>(kPageTokens) * static_cast<size_t>(head_size_) * (int8_ ? 1 : 2);
    const auto *scales = reinterpret_cast<const float *>(memory + 2 * half);
    return {memory, memory + half, int8_ ? scales : nullptr, int8_ ? scales + kPageTokens : nullptr};
}

void Cache::store(int sequence, int64_t position, int layer, int key_head, const float *key, const float *value,
                  const Kernels &kernels) {
    const PageView view = page(sequence, position, layer, key_head);
    const auto slot = static_cast<size_t>(position % kPageTokens), size = static_cast<size_t>(head_size_);
    const size_t first_key = slot / 16 * 16 * size + slot % 16;
    if (int8_) {
        auto *keys = static_cast<int8_t *>(const_cast<void *>(view.keys));
        auto *values = static_cast<int8_t *>(const_cast<void *>(view.values));
        const_cast<float *>(view.key_scales)[slot] = round_head(key, real_size_, keys + first_key, 16);
        const_cast<float *>(view.value_scales)[slot] = round_head(value, real_size_, values + slot * size, 1);
        return;
    }
    auto *keys = static_cast<uint16_t *>(const_cast<void *>(view.keys));
    auto *values = static_cast<uint16_t *>(const_cast<void *>(view.values));
    uint16_t halves[1024];
    kernels.to_half(key, size, halves);
    for (size_t d = 0; d < size; d++) keys[first_key + 16 * d] = halves[d];
    kernels.to_half(value, size, values + slot * size);
}

size_t Cache::bytes(bool allocated) const {
    const size_t used = pages_.size() - (allocated ? 0 : free_.size());
    return used * region_bytes_ * static_cast<size_t>(layers_ * key_heads_);
}

}  // namespace xl
