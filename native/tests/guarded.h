// Arrays for tests that end where memory ends: a read or write behind one is a fault at once.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

template <class T>
class Guarded {
  public:
    explicit Guarded(size_t count) : count_(count) {
        const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        const size_t bytes = count * sizeof(T), whole = (bytes + page - 1) / page * page;
        size_ = whole + page;
        void *memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) std::abort();
        base_ = static_cast<char *>(memory);
        if (mprotect(base_ + whole, page, PROT_NONE)) std::abort();
        data_ = reinterpret_cast<T *>(base_ + (whole - bytes));
    }
    ~Guarded() { munmap(base_, size_); }
    Guarded(const Guarded &) = delete;
    Guarded &operator=(const Guarded &) = delete;

    T *get() const { return data_; }
    T &operator[](size_t i) const { return data_[i]; }
    size_t size() const { return count_; }

  private:
    size_t count_, size_;
    char *base_;
    T *data_;
};
