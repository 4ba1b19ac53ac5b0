// A team of threads that runs one function together, with barriers inside it.
//
// A thread waits by spinning for some microseconds, since most waits are shorter, and then sleeps:
// with more threads than processors, one that spun on would keep the last one from working.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace xl {

class Team {
  public:
    // Throws if the system does not give that many threads.
    explicit Team(int size);
    ~Team();
    Team(const Team &) = delete;
    Team &operator=(const Team &) = delete;

    int size() const { return size_; }

    // Calls `work(i)` for i = 0 .. size - 1, 0 in the calling thread. `work` must not throw.
    void run(const std::function<void(int)> &work);

    // Inside `work`: returns when all threads have called it. Writes before are visible after.
    void barrier();

  private:
    struct Gate;
    void loop(int index, unsigned long seen);
    void stop();

    const int size_;
    std::unique_ptr<Gate> start_, middle_;
    const std::function<void(int)> *work_ = nullptr;
    bool stop_ = false;
    std::vector<std::thread> threads_;
};

// Part `index` of `parts` equal parts of [0, count).
struct Part {
    size_t begin, end;
    Part(size_t count, int index, int parts)
        : begin(count * static_cast<size_t>(index) / static_cast<size_t>(parts)),
          end(count * static_cast<size_t>(index + 1) / static_cast<size_t>(parts)) {}
};

}  // namespace xl
