// A batch of texts, cut into chunks for threads.
#pragma once

#include <atomic>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "scanner.h"

namespace xl::bpe {

struct Chunk {
    const uint8_t *begin, *end;
    size_t text;  // which text it belongs to
};

// Consecutive chunks that one thread takes at once.
struct Job {
    size_t first, last;  // chunks
    size_t bytes;
};

struct Batch {
    std::vector<Chunk> chunks;
    std::vector<Job> jobs;
    size_t bytes = 0;
};

// Texts as chunks and jobs of about 256 KiB. With `cut`, long texts are cut where their pieces stay
// the same; with one thread everything is one job.
inline Batch make_batch(const uint8_t *const *texts, const int64_t *sizes, size_t count,
                        int32_t threads, bool cut) {
    constexpr size_t JOB_BYTES = size_t{1} << 18;
    if (threads < 1) throw std::invalid_argument("the number of threads must be at least 1");
    Batch batch;
    batch.chunks.reserve(count);
    for (size_t i = 0; i < count; ++i) {
        if (sizes[i] < 0 || (sizes[i] > 0 && texts[i] == nullptr))
            throw std::invalid_argument("a text has no bytes or a negative length");
        const uint8_t *at = texts[i], *end = at + sizes[i];
        batch.bytes += static_cast<size_t>(sizes[i]);
        while (cut && threads > 1 && static_cast<size_t>(end - at) > 2 * JOB_BYTES) {
            const uint8_t *next = safe_cut(at + JOB_BYTES, at, end);
            if (next == end) break;
            batch.chunks.push_back({at, next, i});
            at = next;
        }
        batch.chunks.push_back({at, end, i});
    }
    Job job{0, 0, 0};
    for (; job.last < batch.chunks.size();) {
        const Chunk &chunk = batch.chunks[job.last++];
        job.bytes += static_cast<size_t>(chunk.end - chunk.begin);
        if ((threads > 1 && job.bytes >= JOB_BYTES) || job.last == batch.chunks.size()) {
            batch.jobs.push_back(job);
            job = {job.last, job.last, 0};
        }
    }
    return batch;
}

// Call `work(worker, job)` for each job on up to `threads` threads, the caller's included. Threads
// end with the call, so nothing of them is left when the process forks.
template <class Work>
inline void run_jobs(size_t num_jobs, int32_t threads, Work work) {
    std::atomic<size_t> next{0};
    std::exception_ptr error;
    std::mutex guard;
    auto loop = [&](size_t worker) {
        try {
            for (size_t job; (job = next.fetch_add(1)) < num_jobs;) work(worker, job);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(guard);
            error = std::current_exception();
            next = num_jobs;
        }
    };
    std::vector<std::thread> others;
    try {
        for (size_t i = 1; i < num_jobs && i < static_cast<size_t>(threads); ++i)
            others.emplace_back(loop, i);
    } catch (const std::system_error &) {
        // the system gives no more threads: those that there are do the work
    }
    loop(0);
    for (std::thread &thread : others) thread.join();
    if (error) std::rethrow_exception(error);
}

}  // namespace xl::bpe
