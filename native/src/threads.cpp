#include "threads.h"

#include <cfenv>
#include <stdexcept>
#include <string>
#include <system_error>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define XL_PAUSE() _mm_pause()
#elif defined(__aarch64__) && !defined(_MSC_VER)
#define XL_PAUSE() __asm__ volatile("yield")
#else
#define XL_PAUSE() std::this_thread::yield()
#endif

namespace xl {

namespace {
// About 20 microseconds; a layer's step of a 135M model takes 5 to 50.
constexpr int kSpins = 1000;
}  // namespace

// A point that a round of threads passes together, again and again.
struct Team::Gate {
    explicit Gate(int count) : size(count) {}

    // The last to arrive opens the gate for the others.
    void pass() {
        const unsigned long round = opened.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            arrived.store(0, std::memory_order_relaxed);
            open(round + 1);
        } else {
            wait(round);
        }
    }

    void open(unsigned long round) {
        opened.store(round, std::memory_order_seq_cst);
        if (sleepers.load(std::memory_order_seq_cst)) {
            { std::lock_guard<std::mutex> lock(mutex); }
            condition.notify_all();
        }
    }

    // Returns when the gate was opened after `round`.
    void wait(unsigned long round) {
        for (int i = 0; i < kSpins; i++) {
            if (opened.load(std::memory_order_acquire) != round) return;
            XL_PAUSE();
        }
        sleepers.fetch_add(1, std::memory_order_seq_cst);
        {
            std::unique_lock<std::mutex> lock(mutex);
            condition.wait(lock, [&] { return opened.load(std::memory_order_seq_cst) != round; });
        }
        sleepers.fetch_sub(1, std::memory_order_seq_cst);
    }

    const int size;
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<unsigned long> opened{0};
    std::atomic<int> sleepers{0};
    std::mutex mutex;
    std::condition_variable condition;
};

Team::Team(int size) : size_(size), start_(new Gate(1)), middle_(new Gate(size)) {
    threads_.reserve(static_cast<size_t>(size - 1));
    try {
        for (int i = 1; i < size; i++) threads_.emplace_back([this, i] { loop(i, 0); });
    } catch (const std::system_error &error) {
        stop();
        throw std::runtime_error("the system has no room for " + std::to_string(size) + " threads (" + error.what() +
                                 "); ask for fewer");
    }
}

Team::~Team() { stop(); }

void Team::stop() {
    stop_ = true;
    start_->open(start_->opened.load() + 1);
    for (auto &thread : threads_) thread.join();
}

void Team::run(const std::function<void(int)> &work) {
    if (size_ == 1) return work(0);
    work_ = &work;
    start_->open(start_->opened.load() + 1);
    work(0);
    barrier();  // the others are done with `work`
}

void Team::barrier() {
    if (size_ > 1) middle_->pass();
}

void Team::loop(int index, unsigned long seen) {
    std::fesetenv(FE_DFL_ENV);  // a thread begins with the modes of the one that made it
    for (;;) {
        start_->wait(seen);
        seen++;
        if (stop_) return;
        (*work_)(index);
        barrier();
    }
}

}  // namespace xl
