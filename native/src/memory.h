// Memory on cache lines, zeroed. Throws std::bad_alloc.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace xl {

constexpr size_t kAlignment = 64;

struct Release {
    void operator()(void *memory) const {
#if defined(_MSC_VER)
        _aligned_free(memory);
#else
        std::free(memory);
#endif
    }
};

template <class T>
using Memory = std::unique_ptr<T[], Release>;

template <class T>
Memory<T> allocate(size_t count) {
    if (count > (SIZE_MAX / 2) / sizeof(T)) throw std::bad_alloc();
    const size_t bytes = (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment + kAlignment;
#if defined(_MSC_VER)
    void *memory = _aligned_malloc(bytes, kAlignment);
#else
    void *memory = std::aligned_alloc(kAlignment, bytes);
#endif
    if (!memory) throw std::bad_alloc();
    std::memset(memory, 0, bytes);
    return Memory<T>(static_cast<T *>(memory));
}

constexpr size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

}  // namespace xl
