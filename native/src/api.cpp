#include <cmath>
#include <memory>
#include <vector>

#include "context.h"
#include "dispatch.h"
#include "error.h"
#include "matrix.h"
#include "model.h"
#include "sampler.h"
#include "xinslm.h"

struct xl_model {
    xl::Model model;
};

struct xl_context {
    mutable xl::Context context;  // a call that only asks claims it, too
};

namespace xl {

std::string &last_error() {
    thread_local std::string text;
    return text;
}

namespace {

// A count of these and more is a mistake: no caller has so much memory behind its pointer.
constexpr int64_t kMostRows = int64_t{1} << 31;
constexpr size_t kMostProducts = size_t{1} << 16;

size_t size_of(int64_t value) {
    if (value < 0) throw std::runtime_error("a size is negative");
    return static_cast<size_t>(value);
}

Matrix packed(int32_t type, int64_t rows, int64_t columns, const uint8_t *data, int64_t bytes, const uint16_t *scales,
              int64_t scale_count) {
    return pack(static_cast<Source>(type), size_of(rows), size_of(columns), given(data, "data"), size_of(bytes),
                scales, size_of(scale_count));
}

}  // namespace
}  // namespace xl

using xl::given;
using xl::guarded;

int32_t xl_abi(void) { return XL_ABI; }

const char *xl_last_error(void) { return xl::last_error().c_str(); }

const char *xl_kernels(void) { return xl::kernels_available(); }

xl_model *xl_model_new(const xl_shape *shape, const float *frequencies) {
    return guarded(static_cast<xl_model *>(nullptr), [&] {
        return new xl_model{xl::Model(*given(shape, "shape"), given(frequencies, "list of frequencies"))};
    });
}

void xl_model_free(xl_model *model) { delete model; }

int32_t xl_model_set(xl_model *model, int32_t layer, int32_t role, int32_t type, int64_t rows, int64_t columns,
                     const uint8_t *data, int64_t bytes, const uint16_t *scales, int64_t scale_count) {
    return guarded(-1, [&] {
        given(model, "model")
            ->model.set(layer, role, static_cast<xl::Source>(type), xl::size_of(rows), xl::size_of(columns),
                        given(data, "data"), xl::size_of(bytes), scales, xl::size_of(scale_count));
        return 0;
    });
}

int32_t xl_model_use(xl_model *model, int32_t layer, int32_t role, int64_t rows, int64_t columns, const uint8_t *data,
                     int64_t bytes) {
    return guarded(-1, [&] {
        given(model, "model")
            ->model.use(layer, role, xl::size_of(rows), xl::size_of(columns), given(data, "data"),
                        xl::size_of(bytes));
        return 0;
    });
}

int64_t xl_model_packed(const xl_model *model, int32_t layer, int32_t role, const uint8_t **data) {
    return guarded(int64_t{-1}, [&] {
        const xl::Matrix &matrix = given(model, "model")->model.matrix(layer, role);
        *given(data, "room for the address") = matrix.data;
        return static_cast<int64_t>(matrix.bytes());
    });
}

int64_t xl_model_bytes(const xl_model *model) {
    return guarded(int64_t{-1}, [&] {
        given(model, "model")->model.require_complete();
        return static_cast<int64_t>(model->model.bytes());
    });
}

xl_context *xl_context_new(const xl_model *model, int32_t threads, const char *kernels, int32_t int8_cache,
                           int64_t max_tokens) {
    return guarded(static_cast<xl_context *>(nullptr), [&] {
        return new xl_context{
            {given(model, "model")->model, threads, given(kernels, "name of kernels"), int8_cache != 0, max_tokens}};
    });
}

void xl_context_free(xl_context *context) {
    if (context && context->context.is_torn()) return;  // its memory stays, in this forked process
    delete context;
}

const char *xl_context_kernels(const xl_context *context) {
    return guarded(static_cast<const char *>(nullptr),
                   [&] { return given(context, "context")->context.kernels.name; });
}

int32_t xl_sequence_new(xl_context *context, int32_t parent, int64_t length) {
    return guarded(-1, [&] {
        const xl::Context::Claim claim(given(context, "context")->context);
        return context->context.cache.create(parent, length);
    });
}

int32_t xl_sequence_free(xl_context *context, int32_t sequence) {
    return guarded(-1, [&] {
        const xl::Context::Claim claim(given(context, "context")->context);
        context->context.cache.remove(sequence);
        return 0;
    });
}

int64_t xl_sequence_length(const xl_context *context, int32_t sequence) {
    return guarded(int64_t{-1}, [&] {
        const xl::Context::Claim claim(given(context, "context")->context);
        return context->context.cache.length(sequence);
    });
}

int64_t xl_sequence_rewind(xl_context *context, int32_t sequence, int64_t length) {
    return guarded(int64_t{-1}, [&] {
        const xl::Context::Claim claim(given(context, "context")->context);
        return context->context.cache.rewind(sequence, length);
    });
}

int32_t xl_extend(xl_context *context, int32_t count, const int32_t *tokens, const int32_t *sequences,
                  const uint8_t *wanted, float *logits) {
    return guarded(-1, [&] {
        const xl::Context::Claim claim(given(context, "context")->context);
        given(tokens, "list of tokens"), given(sequences, "list of sequences"), given(wanted, "list of marks");
        context->context.extend(count, tokens, sequences, wanted, logits);
        return 0;
    });
}

int32_t xl_extend_states(xl_context *context, int32_t count, const int32_t *tokens, const int32_t *sequences,
                         const uint8_t *wanted, float *states) {
    return guarded(-1, [&] {
        const xl::Context::Claim claim(given(context, "context")->context);
        given(tokens, "list of tokens"), given(sequences, "list of sequences"), given(wanted, "list of marks");
        context->context.extend(count, tokens, sequences, wanted, nullptr, given(states, "room for states"));
        return 0;
    });
}

int32_t xl_logits(xl_context *context, int64_t count, const float *states, float *logits) {
    return guarded(-1, [&] {
        const xl::Context::Claim claim(given(context, "context")->context);
        given(states, "list of states"), given(logits, "room for logits");
        if (count >= xl::kMostRows) throw std::runtime_error("logits of " + std::to_string(count) + " states");
        context->context.logits(xl::size_of(count), states, logits);
        return 0;
    });
}

int64_t xl_cache_bytes(const xl_context *context, int32_t allocated) {
    return guarded(int64_t{-1}, [&] {
        const xl::Context::Claim claim(given(context, "context")->context);
        return static_cast<int64_t>(context->context.cache.bytes(allocated != 0));
    });
}

int32_t xl_sample(const float *logits, int32_t vocabulary, const xl_sampling *sampling, const int32_t *seen,
                  int64_t seen_count, double uniform, double *log_probability) {
    return guarded(-1, [&] {
        const xl_sampling &s = *given(sampling, "settings");
        given(logits, "list of logits"), given(log_probability, "room for the log-probability");
        if (vocabulary < 1) throw std::runtime_error("there are no logits");
        if (xl::size_of(seen_count)) given(seen, "list of tokens seen");
        if (seen_count >= xl::kMostRows) throw std::runtime_error("the list of tokens seen is too long");
        // written so that NaN is out of range
        if (!(s.temperature >= 0 && std::isfinite(s.temperature) && s.top_p >= 0 && s.min_p >= 0 && s.min_p <= 1 &&
              s.repetition_penalty > 0 && std::isfinite(s.repetition_penalty) && s.top_k >= 0 && uniform >= 0 &&
              uniform < 1))
            throw std::runtime_error("a setting of sampling is out of range");
        const xl::Drawn drawn = xl::sample(logits, vocabulary, s, seen, seen_count, uniform);
        *log_probability = drawn.log_probability;
        return drawn.token;
    });
}

int32_t xl_product(const char *kernels, int32_t type, int64_t rows, int64_t columns, const uint8_t *data, int64_t bytes,
                   const uint16_t *scales, int64_t scale_count, const float *x, int64_t tokens, float *out) {
    return guarded(-1, [&] {
        const xl::Kernels &k = xl::kernels_named(given(kernels, "name of kernels"));
        given(x, "list of inputs"), given(out, "room for the result");
        const xl::Matrix m = xl::packed(type, rows, columns, data, bytes, scales, scale_count);
        const size_t width = xl::round_up(m.columns, xl::kBlock), blocks = width / xl::kBlock;
        const size_t count = xl::size_of(tokens);
        if (count >= xl::kMostProducts) throw std::runtime_error("a product of " + std::to_string(count) + " tokens");
        auto values = xl::allocate<float>(count * width), steps = xl::allocate<float>(count * blocks);
        auto codes = xl::allocate<int8_t>(count * width);
        auto offsets = xl::allocate<int32_t>(count * blocks);
        for (size_t t = 0; t < count; t++) {
            std::memcpy(values.get() + t * width, x + t * m.columns, m.columns * sizeof(float));
            k.quantize(values.get() + t * width, width, codes.get() + t * width, steps.get() + t * blocks,
                       offsets.get() + t * blocks);
        }
        const xl::Inputs inputs{codes.get(), steps.get(), offsets.get(), values.get(), width};
        std::vector<float> tile(count * xl::kTileRows);
        for (size_t i = 0; i < m.tiles(); i++) {
            k.tile[static_cast<int>(m.format)](m.tile(i), m.columns, inputs, 0, static_cast<int>(count), tile.data());
            for (size_t t = 0; t < count; t++)
                for (size_t r = 0; r < xl::kTileRows && i * xl::kTileRows + r < m.rows; r++)
                    out[t * m.rows + i * xl::kTileRows + r] = tile[t * xl::kTileRows + r];
        }
        return 0;
    });
}

int32_t xl_decode_row(int32_t type, int64_t rows, int64_t columns, const uint8_t *data, int64_t bytes,
                      const uint16_t *scales, int64_t scale_count, int64_t row, float *out) {
    return guarded(-1, [&] {
        if (row < 0 || row >= rows) throw std::runtime_error("there is no row " + std::to_string(row));
        given(out, "room for the row");
        xl::packed(type, rows, columns, data, bytes, scales, scale_count).decode_row(static_cast<size_t>(row), out);
        return 0;
    });
}
