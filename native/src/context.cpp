#include "context.h"

#include "dispatch.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#if defined(_WIN32)
#include <process.h>
#else
#include <unistd.h>
#endif

namespace xl {
namespace {

constexpr int kChunkTokens = 256;  // tokens that go through a layer at once
constexpr int kQueryRows = 48;     // queries that share the keys of a unit
constexpr int kGatedTokens = 64;   // tokens whose gates stay in the first-level cache

long process_id() {
#if defined(_WIN32)
    return _getpid();
#else
    return getpid();
#endif
}

size_t padded(int32_t size) { return round_up(static_cast<size_t>(size), kBlock); }

}  // namespace

Context::Buffer::Buffer(size_t tokens, size_t columns)
    : codes(allocate<int8_t>(tokens * columns)), scales(allocate<float>(tokens * columns / kBlock)),
      values(allocate<float>(tokens * columns)), offsets(allocate<int32_t>(tokens * columns / kBlock)) {}

Inputs Context::Buffer::view(size_t columns) const {
    return {codes.get(), scales.get(), offsets.get(), values.get(), columns};
}

Context::Context(const Model &model, int threads, const char *names, bool int8_cache, int64_t max_tokens)
    : cache(model.shape, int8_cache, max_tokens), kernels(kernels_named(names)), model_(model), threads_(threads),
      hidden_(padded(model.shape.hidden_size)), queries_(padded(model.shape.heads * model.shape.head_size)),
      keys_(static_cast<size_t>(model.shape.key_heads * model.shape.head_size)), ffn_(padded(model.shape.ffn_size)) {
    if (threads < 1 || threads > 1024) throw std::runtime_error("threads must be 1 to 1024");
    if (max_tokens < 1) throw std::runtime_error("the cache must hold at least one token");
    model.require_complete();
    x_ = allocate<float>(kChunkTokens * hidden_);
    qkv_ = allocate<float>(kChunkTokens * (queries_ + 2 * keys_));
    attended_ = allocate<float>(kChunkTokens * queries_);
    shared_.reset(new Buffer(kChunkTokens, std::max(hidden_, queries_)));
    gated_.reset(new Buffer(kChunkTokens, ffn_));
    const auto group = static_cast<size_t>(model.shape.heads / model.shape.key_heads);
    const size_t rows = std::max(group, static_cast<size_t>(kQueryRows));
    for (int i = 0; i < threads; i++) {
        own_.emplace_back(new Buffer(1, std::max(hidden_, queries_)));
        scratch_.push_back(allocate<float>(3 * rows * static_cast<size_t>(cache.head_size())));
    }
    start_team();
}

void Context::start_team() {
    // After a fork the child has no threads but its own; the parent's team cannot be joined here.
    (void)team_.release();
    team_.reset(new Team(threads_));
    process_ = process_id();
}

Context::~Context() {
    // in a child process there is nobody to join
    if (process_ != process_id()) (void)team_.release();
}

Context::Claim::Claim(Context &context) : holder_(context.holder_) {
    const long own = process_id();
    long holder = 0;
    if (holder_.compare_exchange_strong(holder, own, std::memory_order_acquire)) return;
    if (holder == own || !holder_.compare_exchange_strong(holder, own, std::memory_order_acquire))
        throw std::runtime_error("busy: another thread is using this context");
    if (!context.computing_) {
        holder_.store(holder, std::memory_order_release);
        throw std::runtime_error("the process was forked while another thread was changing this context; make a new one");
    }
    context.computing_ = false;
    context.take_back();
}

bool Context::is_torn() const {
    const long holder = holder_;
    return holder && holder != process_id() && !computing_;
}

void Context::compute(const std::function<void(int)> &work) {
    computing_ = true;
    team_->run(work);
    computing_ = false;
}

void Context::take_back() {
    // Also of sequences that have not grown yet, whose new pages go back. One that the window has
    // emptied meanwhile may be listed again.
    for (const auto &[sequence, length] : before_) cache.rewind(sequence, std::min(length, cache.length(sequence)));
    before_.clear();
}

void Context::check(int count, const int32_t *tokens, const int32_t *sequences) const {
    if (count < 1) throw std::runtime_error("there are no tokens");
    const auto full = [&] {
        throw std::runtime_error("the context holds " + std::to_string(model_.shape.positions) + " tokens");
    };
    std::vector<int64_t> added;
    for (int i = 0; i < count; i++) {
        if (tokens[i] < 0 || tokens[i] >= model_.shape.vocabulary)
            throw std::runtime_error("token " + std::to_string(tokens[i]) + " is not in the vocabulary of " +
                                     std::to_string(model_.shape.vocabulary));
        const int64_t before = cache.length(sequences[i]);  // throws for an unknown sequence
        if (static_cast<size_t>(sequences[i]) >= added.size()) added.resize(static_cast<size_t>(sequences[i]) + 1);
        if (before + ++added[static_cast<size_t>(sequences[i])] > model_.shape.positions)
            full();
        // before the lists are read any further: a count out of range is no length of theirs
        if (!i && count > cache.room(model_.shape.positions)) full();
    }
}

void Context::extend(int count, const int32_t *tokens, const int32_t *sequences, const uint8_t *wanted,
                     float *logits, float *states) {
    check(count, tokens, sequences);
    if (!logits && !states && std::any_of(wanted, wanted + count, [](uint8_t mark) { return mark != 0; }))
        throw std::runtime_error("there is no room for logits");
    if (process_ != process_id()) start_team();
    before_.clear();
    for (int i = 0; i < count; i++)
        if (i == 0 || sequences[i] != sequences[i - 1]) before_.emplace_back(sequences[i], cache.length(sequences[i]));
    try {
        for (int done = 0; done < count; done += kChunkTokens) {
            const int size = std::min(kChunkTokens, count - done);
            logits_ = logits, states_ = states;
            chunk(size, tokens + done, sequences + done, wanted + done);
            const auto rows = static_cast<size_t>(wanted_count_);
            if (states) states += rows * static_cast<size_t>(model_.shape.hidden_size);
            if (logits) logits += rows * static_cast<size_t>(model_.shape.vocabulary);
        }
    } catch (...) {
        take_back();
        throw;
    }
    before_.clear();
}

void Context::logits(size_t count, const float *states, float *out) {
    if (process_ != process_id()) start_team();
    const auto size = static_cast<size_t>(model_.shape.hidden_size);
    for (size_t done = 0; done < count; done += kChunkTokens) {
        count_ = wanted_count_ = static_cast<int>(std::min<size_t>(kChunkTokens, count - done));
        wanted_.clear();
        for (int i = 0; i < count_; i++) {
            wanted_.push_back(i);
            std::memcpy(x_.get() + static_cast<size_t>(i) * hidden_, states + (done + static_cast<size_t>(i)) * size,
                        size * sizeof(float));
        }
        logits_ = out + done * static_cast<size_t>(model_.shape.vocabulary);
        compute([this](int thread) { head(thread, logits_); });
    }
}

void Context::chunk(int count, const int32_t *tokens, const int32_t *sequences, const uint8_t *wanted) {
    count_ = count, tokens_ = tokens;
    wanted_.clear(), runs_.clear();
    std::vector<int64_t> next;
    int64_t most = 0;
    for (int i = 0; i < count; i++) {
        if (wanted[i]) wanted_.push_back(i);
        const auto s = static_cast<size_t>(sequences[i]);
        if (s >= next.size()) next.resize(s + 1, -1);
        if (next[s] < 0) next[s] = cache.length(sequences[i]);
        if (i && sequences[i] == sequences[i - 1])
            runs_.back().count++;
        else
            runs_.push_back({i, 1, sequences[i], next[s]});
        most = std::max(most, ++next[s]);
    }
    wanted_count_ = static_cast<int>(wanted_.size());
    for (size_t s = 0; s < next.size(); s++)
        if (next[s] >= 0) cache.reserve(static_cast<int>(s), next[s] - cache.length(static_cast<int>(s)));
    grow_rotations(most);
    plan_attention();
    compute([this](int thread) { forward(thread); });
    for (int i = 0; i < count; i++) cache.advance(sequences[i]);
}

void Context::grow_rotations(int64_t positions) {
    const auto half = static_cast<size_t>(model_.shape.head_size / 2);
    const auto known = static_cast<int64_t>(rotations_.size() / (2 * half));
    if (positions <= known) return;
    rotations_.resize(static_cast<size_t>(positions + 255) / 256 * 256 * 2 * half);
    float *out = rotations_.data() + static_cast<size_t>(known) * 2 * half;
    for (auto p = known; p < static_cast<int64_t>(rotations_.size() / (2 * half)); p++, out += 2 * half) {
        for (size_t i = 0; i < half; i++) {
            const float angle = static_cast<float>(p) * model_.frequencies[i];
            out[i] = static_cast<float>(std::cos(static_cast<double>(angle)));
            out[half + i] = static_cast<float>(std::sin(static_cast<double>(angle)));
        }
    }
}

void Context::plan_attention() {
    const int group = model_.shape.heads / model_.shape.key_heads;
    const int tokens = std::max(1, kQueryRows / group);
    units_.clear(), joins_.clear();
    int spans = 0;
    for (const Run &run : runs_) {
        const int64_t last = run.position + run.count - 1;
        const auto first = static_cast<int>(cache.first_seen(run.position) / kSpanTokens);
        spans = std::max(spans, static_cast<int>(last / kSpanTokens) + 1 - first);
    }
    // Few queries: the threads share the keys of one sequence. Many: each takes its own queries.
    by_span_ = spans > 1 && threads_ > 1 && count_ <= 16;
    for (const Run &run : runs_) {
        for (int at = 0; at < run.count; at += tokens) {
            Unit unit{run.first + at, std::min(tokens, run.count - at), run.sequence, 0, -1, run.position + at};
            for (int h = 0; h < model_.shape.key_heads; h++) {
                unit.key_head = h, unit.span = -1;
                if (!by_span_) {
                    units_.push_back(unit);
                    continue;
                }
                joins_.push_back(unit);
                joins_.back().span = static_cast<int>(units_.size());  // its first unit
                const auto first = static_cast<int>(cache.first_seen(unit.position) / kSpanTokens);
                const auto end = static_cast<int>((unit.position + unit.count - 1) / kSpanTokens) + 1;
                for (unit.span = first; unit.span < end; unit.span++) units_.push_back(unit);
            }
        }
    }
    next_unit_.store(0, std::memory_order_relaxed);
    if (!by_span_) return;
    const auto rows = static_cast<size_t>(tokens * group);
    partial_stride_ = rows * (static_cast<size_t>(cache.head_size()) + 2);
    partial_.resize(units_.size() * partial_stride_);
}

Inputs Context::inputs(int thread, size_t columns) const {
    // One token's inputs are computed by every thread for itself: cheaper than another barrier.
    return (count_ == 1 ? *own_[static_cast<size_t>(thread)] : *shared_).view(columns);
}

void Context::forward(int thread) {
    const xl_shape &s = model_.shape;
    const Part part(static_cast<size_t>(count_), thread, threads_);
    for (size_t t = part.begin; t < part.end; t++)
        model_.embedding().decode_row(static_cast<size_t>(tokens_[t]), x_.get() + t * hidden_);
    team_->barrier();
    const size_t stride = queries_ + 2 * keys_;
    for (int i = 0; i < s.layers; i++) {
        const Layer &layer = model_.layers[static_cast<size_t>(i)];
        const Inputs x = normalized(thread, layer.attention_norm, count_);
        const Product qkv[] = {{&layer.q, qkv_.get(), stride, false},
                               {&layer.k, qkv_.get() + queries_, stride, false},
                               {&layer.v, qkv_.get() + queries_ + keys_, stride, false}};
        products(thread, qkv, 3, x, count_);
        team_->barrier();
        prepare_heads(thread, i);
        if (thread == 0) next_unit_.store(0, std::memory_order_relaxed);
        team_->barrier();
        attention(thread, i);
        team_->barrier();
        const Product out{&layer.o, x_.get(), hidden_, true};
        products(thread, &out, 1, rounded(thread), count_);
        team_->barrier();
        gated(layer, Part(ffn_ / kBlock, thread, threads_), normalized(thread, layer.ffn_norm, count_));
        team_->barrier();
        const Product down{&layer.down, x_.get(), hidden_, true};
        products(thread, &down, 1, gated_->view(ffn_), count_);
        team_->barrier();
    }
    if (states_) {
        const auto size = static_cast<size_t>(s.hidden_size);
        const Part rows(static_cast<size_t>(wanted_count_), thread, threads_);
        for (size_t i = rows.begin; i < rows.end; i++)
            std::memcpy(states_ + i * size, x_.get() + static_cast<size_t>(wanted_[i]) * hidden_, size * sizeof(float));
        return;
    }
    head(thread, logits_);
}

// Tokens that a thread normalizes or rounds. A single one is every thread's own.
Part Context::own_part(int thread, int count) const {
    return count_ == 1 ? Part(1, 0, 1) : Part(static_cast<size_t>(count), thread, threads_);
}

// Norm and rounding of the first tokens, or of those at `places`; the barrier is for other threads'.
Inputs Context::normalized(int thread, const std::vector<float> &norm, int count, const int *places) {
    const Inputs to = inputs(thread, hidden_);
    const Part part = own_part(thread, count);
    for (size_t t = part.begin; t < part.end; t++) {
        const size_t from = places ? static_cast<size_t>(places[t]) : t;
        kernels.rms_norm(x_.get() + from * hidden_, norm.data(), static_cast<size_t>(model_.shape.hidden_size),
                         model_.shape.eps, to.values + t * hidden_);
        round(to, t, 0, hidden_, to.values + t * hidden_);
    }
    if (count_ != 1) team_->barrier();
    return to;
}

// What attention gave, rounded. Float weights read it where it is.
Inputs Context::rounded(int thread) {
    Inputs to = inputs(thread, queries_);
    to.values = attended_.get();
    const Part part = own_part(thread, count_);
    for (size_t t = part.begin; t < part.end; t++) round(to, t, 0, queries_, to.values + t * queries_);
    if (count_ != 1) team_->barrier();
    return to;
}

// Codes of `size` inputs of a token, from column `first` on.
void Context::round(const Inputs &to, size_t token, size_t first, size_t size, const float *values) const {
    const size_t at = token * to.columns + first;
    kernels.quantize(values, size, to.codes + at, to.scales + at / kBlock, to.offsets + at / kBlock);
}

void Context::products(int thread, const Product *list, size_t size, const Inputs &x, int count) {
    size_t total = 0;
    for (size_t i = 0; i < size; i++) total += list[i].matrix->tiles();
    const Part part(total, thread, threads_);
    size_t first = 0;
    for (size_t i = 0; i < size; i++) {
        const Matrix &m = *list[i].matrix;
        const size_t begin = std::max(part.begin, first), end = std::min(part.end, first + m.tiles());
        if (begin < end) tiles(list[i], begin - first, end - first, x, count);
        first += m.tiles();
    }
}

void Context::tiles(const Product &product, size_t begin, size_t end, const Inputs &x, int count) const {
    const Matrix &m = *product.matrix;
    const auto kernel = kernels.tile[static_cast<int>(m.format)];
    alignas(64) float out[kChunkTokens * kTileRows];
    for (size_t tile = begin; tile < end; tile++) {
        kernel(m.tile(tile), m.columns, x, 0, count, out);
        const size_t row = tile * kTileRows, rows = std::min<size_t>(kTileRows, m.rows - row);
        float *to = product.out + row;
        const auto write = [&](size_t size) {
            const float *from = out;
            for (int t = 0; t < count; t++, to += product.stride, from += kTileRows)
                for (size_t r = 0; r < size; r++) to[r] = product.add ? to[r] + from[r] : from[r];
        };
        if (rows == kTileRows)
            write(kTileRows);  // a constant, after which the loop is vector instructions
        else
            write(rows);
    }
}

// silu(gate x) * (up x), 32 rows at a time: a block of the down projection's inputs, which is rounded
// while it is in the cache.
void Context::gated(const Layer &layer, Part blocks, const Inputs &x) const {
    const Inputs to = gated_->view(ffn_);
    const auto gate_kernel = kernels.tile[static_cast<int>(layer.gate.format)];
    const auto up_kernel = kernels.tile[static_cast<int>(layer.up.format)];
    alignas(64) float gate[kGatedTokens * kTileRows], up[kGatedTokens * kTileRows], values[kGatedTokens][kBlock] = {};
    for (size_t block = blocks.begin; block < blocks.end; block++) {
        const size_t first = block * kBlock, end = std::min(first + kBlock, layer.gate.rows);
        if (end < first + kBlock) std::memset(values, 0, sizeof values);
        for (int done = 0; done < count_; done += kGatedTokens) {
            const int count = std::min(kGatedTokens, count_ - done);
            for (size_t row = first; row < end; row += kTileRows) {
                gate_kernel(layer.gate.tile(row / kTileRows), layer.gate.columns, x, done, count, gate);
                up_kernel(layer.up.tile(row / kTileRows), layer.up.columns, x, done, count, up);
                for (int t = 0; t < count; t++) {
                    kernels.silu_product(gate + kTileRows * t, up + kTileRows * t);
                    std::memcpy(values[t] + (row - first), gate + kTileRows * t,
                                std::min<size_t>(kTileRows, end - row) * sizeof(float));
                }
            }
            for (int t = 0; t < count; t++) {
                const auto token = static_cast<size_t>(done + t);
                if (layer.down.is_float())
                    std::memcpy(to.values + token * ffn_ + first, values[t], sizeof values[t]);
                else
                    round(to, token, first, kBlock, values[t]);
            }
        }
    }
}

// The last layer's outputs at the wanted tokens, through the norm and the head.
void Context::head(int thread, float *logits) {
    if (!wanted_count_) return;
    const Inputs x = normalized(thread, model_.final_norm, wanted_count_, wanted_.data());
    const Product product{&model_.head(), logits, static_cast<size_t>(model_.shape.vocabulary), false};
    products(thread, &product, 1, x, wanted_count_);
}

}  // namespace xl
