// The forward pass: tokens of any sequences in, logits out.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "cache.h"
#include "kernels/kernels.h"
#include "model.h"
#include "threads.h"

namespace xl {

class Context {
  public:
    Context(const Model &model, int threads, const char *kernels, bool int8_cache, int64_t max_tokens);
    ~Context();

    // Appends tokens; writes the logits at the wanted ones, or their states if `states` is not null.
    void extend(int count, const int32_t *tokens, const int32_t *sequences, const uint8_t *wanted, float *logits,
                float *states = nullptr);

    // The final norm and the head.
    void logits(size_t count, const float *states, float *out);

    // Held during a call; a caller that finds the context claimed gives up. If the claim was made in
    // the process that this one was forked from, the thread that would end the call is not here: the
    // call counts as failed, and its tokens are taken back.
    class Claim {
      public:
        explicit Claim(Context &context);
        ~Claim() { holder_.store(0, std::memory_order_release); }
        Claim(const Claim &) = delete;
        Claim &operator=(const Claim &) = delete;

      private:
        std::atomic<long> &holder_;
    };

    // Whether a fork hit a call while it changed what this object holds, which is then unusable.
    bool is_torn() const;

    Cache cache;
    const Kernels &kernels;

  private:
    // A matrix product's inputs for some tokens, with the memory they are in.
    struct Buffer {
        Memory<int8_t> codes;
        Memory<float> scales, values;
        Memory<int32_t> offsets;
        Buffer(size_t tokens, size_t columns);
        Inputs view(size_t columns) const;
    };
    // Tokens of one sequence that follow each other in the batch.
    struct Run {
        int first, count, sequence;
        int64_t position;
    };
    // A piece of attention that one thread computes: some tokens of a run, one key head, and of the
    // keys either all or one span.
    struct Unit {
        int first, count, sequence, key_head, span;
        int64_t position;
    };
    struct Product {
        const Matrix *matrix;
        float *out;
        size_t stride;
        bool add;
    };

    void start_team();
    void compute(const std::function<void(int)> &work);
    void take_back();
    void check(int count, const int32_t *tokens, const int32_t *sequences) const;
    void chunk(int count, const int32_t *tokens, const int32_t *sequences, const uint8_t *wanted);
    void plan_attention();
    void forward(int thread);
    Part own_part(int thread, int count) const;
    Inputs normalized(int thread, const std::vector<float> &norm, int count, const int *places = nullptr);
    Inputs rounded(int thread);
    void round(const Inputs &to, size_t token, size_t first, size_t size, const float *values) const;
    void products(int thread, const Product *list, size_t size, const Inputs &x, int count);
    void tiles(const Product &product, size_t begin, size_t end, const Inputs &x, int count) const;
    void gated(const Layer &layer, Part blocks, const Inputs &x) const;
    void prepare_heads(int thread, int layer);
    void attention(int thread, int layer);
    void attend_unit(const Unit &unit, int layer, float *scratch);
    void attend_span(const Unit &unit, int layer, int span, const float *queries, SoftmaxState *states, float *outputs);
    void join_spans(int thread);
    void finish(const Unit &unit, const SoftmaxState *states, const float *outputs);
    void head(int thread, float *logits);
    void grow_rotations(int64_t positions);
    Inputs inputs(int thread, size_t columns) const;

    const Model &model_;
    const int threads_;
    const size_t hidden_, queries_, keys_, ffn_;
    std::unique_ptr<Team> team_;
    long process_;
    std::atomic<long> holder_{0};        // the process whose thread is in a call, or 0
    std::atomic<bool> computing_{false}; // the call changes numbers only, no lists of this object
    std::vector<std::pair<int, int64_t>> before_;  // sequences of the call, and their lengths before it

    std::vector<float> rotations_;  // [position][cosines of head_size / 2, then sines]
    Memory<float> x_, qkv_, attended_;
    std::unique_ptr<Buffer> shared_, gated_;        // inputs of all tokens of a chunk; of `down`
    std::vector<std::unique_ptr<Buffer>> own_;      // one token, for each thread
    std::vector<Memory<float>> scratch_;            // attention, for each thread

    // The chunk at work.
    int count_ = 0, wanted_count_ = 0;
    const int32_t *tokens_ = nullptr;
    float *logits_ = nullptr, *states_ = nullptr;
    std::vector<int> wanted_;
    std::vector<Run> runs_;
    std::vector<Unit> units_, joins_;
    std::vector<float> partial_;
    size_t partial_stride_ = 0;
    bool by_span_ = false;
    std::atomic<int> next_unit_{0};
};

}  // namespace xl
