// A bounded table from pieces to their ids, which does nearly all the work of encoding: 98 % of the
// pieces of unseen English text were seen before.
#pragma once

#include <vector>

#include "piece.h"

namespace xl::bpe {

// Id is uint16_t or uint32_t, as the output has them.
template <class Id>
class Cache {
   public:
    static constexpr size_t INLINE_BYTES = 12, INLINE_IDS = INLINE_BYTES / sizeof(Id);

    // A slot has the piece's key and its ids, if they are few, so that one cache line is read.
    struct alignas(32) Slot {
        Key key{0, 0};
        uint32_t count = 0;
        uint8_t data[INLINE_BYTES];  // ids, or the offset in `pool_` of the ids and a long piece
    };

    Cache() : slots_(FIRST_SLOTS) {}

    void prefetch(uint64_t hash) const { bpe::prefetch(&slots_[home(hash)]); }

    // The slot of a piece, or nullptr.
    const Slot *find(const uint8_t *piece, size_t size, const Key &key, uint64_t hash) const {
        for (size_t i = 0; i < PROBES; ++i) {
            const Slot &slot = slots_[(home(hash) + i) & (slots_.size() - 1)];
            if (slot.key.low == key.low && slot.key.high == key.high) {
                if (!key.is_long()) return &slot;
                const uint8_t *known = pool_.data() + offset(slot) + slot.count * sizeof(Id);
                if (std::memcmp(known, piece, size) == 0) return &slot;
            }
            if (slot.key.high == 0) return nullptr;
        }
        return nullptr;
    }

    // Write the ids of a slot. INLINE_BYTES are always written, which saves a branch that would
    // often be mispredicted: `out` needs that much room.
    Id *write(const Slot &slot, Id *out) const {
        if (slot.count <= INLINE_IDS && !slot.key.is_long()) {
            std::memcpy(out, slot.data, INLINE_BYTES);
        } else {
            std::memcpy(out, pool_.data() + offset(slot), slot.count * sizeof(Id));
        }
        return out + slot.count;
    }

    void insert(const uint8_t *piece, size_t size, const Key &key, uint64_t hash, const Id *ids,
                size_t count) {
        if (size > LONGEST) return;
        if (pool_.size() > MAX_POOL) clear();
        if (used_ * 2 >= slots_.size() && slots_.size() < MAX_SLOTS) grow();
        Slot made;
        made.key = key;
        made.count = static_cast<uint32_t>(count);
        std::memset(made.data, 0, INLINE_BYTES);
        if (count <= INLINE_IDS && !key.is_long()) {
            std::memcpy(made.data, ids, count * sizeof(Id));
        } else {
            const uint32_t at = static_cast<uint32_t>(pool_.size());
            std::memcpy(made.data, &at, sizeof at);
            const uint8_t *bytes = reinterpret_cast<const uint8_t *>(ids);
            pool_.insert(pool_.end(), bytes, bytes + count * sizeof(Id));
            if (key.is_long()) pool_.insert(pool_.end(), piece, piece + size);
        }
        place(made, hash);
    }

   private:
    // 4 MiB at most: more slots find more pieces, but fewer of them in the processor's caches.
    static constexpr size_t FIRST_SLOTS = 1 << 12, MAX_SLOTS = 1 << 17, PROBES = 8;
    static constexpr size_t MAX_POOL = size_t{1} << 23, LONGEST = 1024;

    size_t home(uint64_t hash) const { return hash >> 24 & (slots_.size() - 1); }

    static uint32_t offset(const Slot &slot) {
        uint32_t at;
        std::memcpy(&at, slot.data, sizeof at);
        return at;
    }

    void place(const Slot &made, uint64_t hash) {
        for (size_t i = 0; i < PROBES; ++i) {
            Slot &slot = slots_[(home(hash) + i) & (slots_.size() - 1)];
            if (slot.key.high == 0) {
                slot = made;
                ++used_;
                return;
            }
        }
        slots_[home(hash)] = made;  // a full neighbourhood: the piece there is forgotten
    }

    void grow() {
        std::vector<Slot> old(slots_.size() * 4 < MAX_SLOTS ? slots_.size() * 4 : MAX_SLOTS);
        old.swap(slots_);
        used_ = 0;
        for (const Slot &slot : old)
            if (slot.key.high != 0) place(slot, slot.key.hash());
    }

    void clear() {
        slots_.assign(slots_.size(), Slot());
        pool_.clear();
        used_ = 0;
    }

    std::vector<Slot> slots_;
    std::vector<uint8_t> pool_;
    size_t used_ = 0;
};

}  // namespace xl::bpe
