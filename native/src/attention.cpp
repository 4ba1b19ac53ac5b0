// The part of Context that deals with heads: biases, norms, rotary positions, and attention.
//
// Softmax runs over spans of 512 positions, and spans are joined in order. They begin at multiples of
// 512, so the bits of a result do not depend on threads or chunks.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "context.h"

namespace xl {
namespace {

constexpr int kMostRows = 4096;  // queries of a key head, at most

void rotate(float *head, const float *table, size_t size, bool interleaved) {
    const size_t half = size / 2;
    for (size_t i = 0; i < half; i++) {
        float &a = head[interleaved ? 2 * i : i], &b = head[interleaved ? 2 * i + 1 : i + half];
        const float c = table[i], s = table[half + i], x = a, y = b;
        a = x * c - y * s;
        b = y * c + x * s;
    }
}

void add_bias(float *head, const std::vector<float> &bias, size_t at, size_t size) {
    if (!bias.empty())
        for (size_t i = 0; i < size; i++) head[i] += bias[at + i];
}

bool is_empty(const SoftmaxState &state) {
    return state.total == 0.0f && !(state.largest > -std::numeric_limits<float>::infinity());
}

// Joins the states and outputs of later keys into those of earlier ones, query by query.
void join_rows(const Kernels &kernels, size_t rows, size_t size, SoftmaxState *states, float *outputs,
               const SoftmaxState *later, const float *later_outputs) {
    for (size_t r = 0; r < rows; r++) {
        if (is_empty(later[r])) continue;
        float *to = outputs + r * size;
        const float *from = later_outputs + r * size;
        if (is_empty(states[r])) {
            states[r] = later[r];
            std::memcpy(to, from, size * sizeof(float));
        } else {
            kernels.join(states[r], to, later[r], from, static_cast<int>(size));
        }
    }
}

}  // namespace

// Finishes queries, keys and values of the chunk and stores the latter two.
void Context::prepare_heads(int thread, int index) {
    const xl_shape &s = model_.shape;
    const Layer &layer = model_.layers[static_cast<size_t>(index)];
    const auto size = static_cast<size_t>(s.head_size), half = size / 2;
    const size_t stride = queries_ + 2 * keys_;
    const auto heads = static_cast<size_t>(s.heads), key_heads = static_cast<size_t>(s.key_heads);
    const Part part(static_cast<size_t>(count_) * (heads + key_heads), thread, threads_);
    alignas(64) float key[1024] = {}, value[1024] = {};
    const auto finish = [&](float *head, const std::vector<float> &bias, const std::vector<float> &norm, size_t at,
                            const float *table) {
        add_bias(head, bias, at, size);
        if (!norm.empty()) {
            alignas(64) float padded[1024] = {};
            std::memcpy(padded, head, size * sizeof(float));
            kernels.rms_norm(padded, norm.data(), size, s.eps, padded);
            std::memcpy(head, padded, size * sizeof(float));
        }
        rotate(head, table, size, s.interleaved);
    };
    size_t run = 0;
    for (size_t item = part.begin; item < part.end; item++) {
        const size_t t = item / (heads + key_heads), h = item % (heads + key_heads);
        while (t >= static_cast<size_t>(runs_[run].first + runs_[run].count)) run++;
        const int64_t position = runs_[run].position + static_cast<int64_t>(t) - runs_[run].first;
        const float *table = rotations_.data() + static_cast<size_t>(position) * 2 * half;
        float *row = qkv_.get() + t * stride;
        if (h < heads) {
            finish(row + h * size, layer.q_bias, layer.q_norm, h * size, table);
            continue;
        }
        const size_t at = (h - heads) * size;
        finish(row + queries_ + at, layer.k_bias, layer.k_norm, at, table);
        add_bias(row + queries_ + keys_ + at, layer.v_bias, at, size);
        std::memcpy(key, row + queries_ + at, size * sizeof(float));
        std::memcpy(value, row + queries_ + keys_ + at, size * sizeof(float));
        cache.store(runs_[run].sequence, position, index, static_cast<int>(h - heads), key, value, kernels);
    }
    // the output's bias goes straight into the residual, once for each token
    if (!layer.o_bias.empty()) {
        const Part tokens(static_cast<size_t>(count_), thread, threads_);
        for (size_t t = tokens.begin; t < tokens.end; t++)
            add_bias(x_.get() + t * hidden_, layer.o_bias, 0, static_cast<size_t>(s.hidden_size));
    }
}

void Context::attention(int thread, int layer) {
    float *scratch = scratch_[static_cast<size_t>(thread)].get();
    const auto count = static_cast<int>(units_.size());
    // Which thread takes a unit does not matter to its bits; the units of a prompt differ in length.
    for (int i; (i = next_unit_.fetch_add(1, std::memory_order_relaxed)) < count;)
        attend_unit(units_[static_cast<size_t>(i)], layer, scratch);
    if (by_span_) {
        team_->barrier();
        join_spans(thread);
    }
}

void Context::attend_unit(const Unit &unit, int layer, float *scratch) {
    const xl_shape &s = model_.shape;
    const int group = s.heads / s.key_heads;
    const auto real = static_cast<size_t>(s.head_size), size = static_cast<size_t>(cache.head_size());
    const size_t rows = static_cast<size_t>(unit.count * group);
    float *queries = scratch, *outputs = scratch + rows * size, *partial = outputs + rows * size;
    const float by = 1.0f / std::sqrt(static_cast<float>(s.head_size));
    for (int t = 0; t < unit.count; t++) {
        const float *from = qkv_.get() + static_cast<size_t>(unit.first + t) * (queries_ + 2 * keys_) +
                            static_cast<size_t>(unit.key_head * group) * real;
        for (int g = 0; g < group; g++, from += real) {
            float *to = queries + static_cast<size_t>(t * group + g) * size;
            for (size_t d = 0; d < real; d++) to[d] = from[d] * by;
            for (size_t d = real; d < size; d++) to[d] = 0;
        }
    }
    SoftmaxState states[kMostRows], later[kMostRows];
    if (unit.span >= 0) {
        float *to = partial_.data() + static_cast<size_t>(&unit - units_.data()) * partial_stride_;
        attend_span(unit, layer, unit.span, queries, states, outputs);
        std::memcpy(to, outputs, rows * size * sizeof(float));
        std::memcpy(to + rows * size, states, rows * sizeof(SoftmaxState));
        return;
    }
    const auto first = static_cast<int>(cache.first_seen(unit.position) / kSpanTokens);
    const auto last = static_cast<int>((unit.position + unit.count - 1) / kSpanTokens);
    attend_span(unit, layer, first, queries, states, outputs);
    for (int span = first + 1; span <= last; span++) {
        attend_span(unit, layer, span, queries, later, partial);
        join_rows(kernels, rows, size, states, outputs, later, partial);
    }
    finish(unit, states, outputs);
}

void Context::attend_span(const Unit &unit, int layer, int span, const float *queries, SoftmaxState *states,
                          float *outputs) {
    const int group = model_.shape.heads / model_.shape.key_heads, rows = unit.count * group;
    const int64_t last = unit.position + unit.count - 1;
    const int64_t start = static_cast<int64_t>(span) * kSpanTokens;
    const int64_t begin = std::max<int64_t>(start, cache.first_seen(unit.position));
    const int64_t end = std::min<int64_t>(start + kSpanTokens, last + 1);
    PageView pages[kSpanTokens / kPageTokens] = {};
    for (int64_t at = begin / kPageTokens * kPageTokens; at < end; at += kPageTokens)
        pages[(at - start) / kPageTokens] = cache.page(unit.sequence, at, layer, unit.key_head);
    Range seen[kMostRows];
    for (int t = 0; t < unit.count; t++) {
        const int64_t p = unit.position + t;
        const auto from = static_cast<int>(std::max<int64_t>(cache.first_seen(p) - start, 0));
        const auto to = static_cast<int>(std::min<int64_t>(p + 1 - start, kSpanTokens));
        for (int g = 0; g < group; g++) seen[t * group + g] = {from, to};
    }
    kernels.attend[cache.int8()](pages, cache.head_size(), rows, queries, seen, states, outputs);
}

void Context::join_spans(int thread) {
    const int group = model_.shape.heads / model_.shape.key_heads;
    const auto size = static_cast<size_t>(cache.head_size());
    for (size_t j = static_cast<size_t>(thread); j < joins_.size(); j += static_cast<size_t>(threads_)) {
        const Unit &unit = joins_[j];
        const size_t rows = static_cast<size_t>(unit.count * group);
        const auto first = static_cast<size_t>(unit.span);
        const size_t end = j + 1 < joins_.size() ? static_cast<size_t>(joins_[j + 1].span) : units_.size();
        SoftmaxState states[kMostRows], later[kMostRows];
        float *outputs = partial_.data() + first * partial_stride_;
        std::memcpy(states, outputs + rows * size, rows * sizeof(SoftmaxState));
        for (size_t i = first + 1; i < end; i++) {
            const float *from = partial_.data() + i * partial_stride_;
            std::memcpy(later, from + rows * size, rows * sizeof(SoftmaxState));
            join_rows(kernels, rows, size, states, outputs, later, from);
        }
        finish(unit, states, outputs);
    }
}

void Context::finish(const Unit &unit, const SoftmaxState *states, const float *outputs) {
    const int group = model_.shape.heads / model_.shape.key_heads;
    const auto real = static_cast<size_t>(model_.shape.head_size), size = static_cast<size_t>(cache.head_size());
    for (int t = 0; t < unit.count; t++) {
        float *to = attended_.get() + static_cast<size_t>(unit.first + t) * queries_ +
                    static_cast<size_t>(unit.key_head * group) * real;
        for (int g = 0; g < group; g++, to += real) {
            const size_t r = static_cast<size_t>(t * group + g);
            const float by = 1.0f / states[r].total;
            for (size_t d = 0; d < real; d++) to[d] = outputs[r * size + d] * by;
        }
    }
}

}  // namespace xl
