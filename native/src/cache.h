// Keys and values in pages of 64 positions, and the sequences that own them.
//
// A page holds its positions for all layers and key heads. Sequences share pages that they have in
// common; one that writes into a shared page takes a copy first. With a sliding window, pages that no
// later token sees go back to the pool, so the memory of a sequence stays bounded.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "memory.h"
#include "xinslm.h"

namespace xl {

class Cache {
  public:
    Cache(const xl_shape &shape, bool int8, int64_t max_tokens);

    int create(int parent, int64_t length);
    void remove(int sequence);
    int64_t length(int sequence) const;
    // Most tokens that all sequences can grow by if each holds at most `positions`.
    int64_t room(int64_t positions) const;
    int64_t rewind(int sequence, int64_t length);

    // Makes room for `count` more tokens, with pages that the sequence alone owns. Throws, having
    // changed no length, if the cache is full.
    void reserve(int sequence, int64_t count);
    // Counts a token as written; drops pages below the window.
    void advance(int sequence);

    // Where the position's page is for a layer and key head.
    PageView page(int sequence, int64_t position, int layer, int key_head) const;
    void store(int sequence, int64_t position, int layer, int key_head, const float *key,
               const float *value, const Kernels &kernels);

    // First position that a token at `position` sees.
    int64_t first_seen(int64_t position) const {
        return window_ && position >= window_ ? position - window_ + 1 : 0;
    }
    size_t bytes(bool allocated) const;
    int head_size() const { return head_size_; }  // padded to a multiple of 16
    bool int8() const { return int8_; }

  private:
    struct Page {
        Memory<uint8_t> memory;
        int users = 0;
    };
    struct Sequence {
        bool exists = false;
        int64_t length = 0;
        std::vector<int> pages;  // -1: dropped, or not there yet
    };
    Sequence &at(int sequence);
    const Sequence &at(int sequence) const;
    int take();
    void release(int page);
    uint8_t *region(int page, int layer, int key_head) const;

    const int layers_, key_heads_, real_size_, head_size_;
    const int64_t window_;
    const bool int8_;
    const size_t region_bytes_, max_pages_;
    std::vector<Page> pages_;
    std::vector<int> free_;
    std::vector<Sequence> sequences_;
};

}  // namespace xl
