#include "model.h"

#include <cmath>
#include <stdexcept>

#include "half.h"

namespace xl {
namespace {

struct Role {
    const char *name;
    bool layered, optional;
};

const Role kRoles[] = {
    {"embedding", false, false},     {"head", false, true},        {"final norm", false, false},
    {"attention norm", true, false}, {"q_proj", true, false},      {"k_proj", true, false},
    {"v_proj", true, false},         {"o_proj", true, false},      {"feed-forward norm", true, false},
    {"gate_proj", true, false},      {"up_proj", true, false},     {"down_proj", true, false},
    {"q_proj bias", true, true},     {"k_proj bias", true, true},  {"v_proj bias", true, true},
    {"o_proj bias", true, true},     {"q_norm", true, true},       {"k_norm", true, true},
};

void require(bool holds, const std::string &what) {
    if (!holds) throw std::runtime_error(what);
}

std::vector<float> vector_of(Source source, size_t count, const uint8_t *data, size_t bytes) {
    require(source == Source::kF32 || source == Source::kF16 || source == Source::kBF16,
            "a vector of weights must be float32, float16 or bfloat16");
    require(bytes == count * (source == Source::kF32 ? 4 : 2), "the bytes of a vector do not match its length");
    std::vector<float> out(round_up(count, 16), 0.0f);
    for (size_t i = 0; i < count; i++) {
        if (source == Source::kF32) {
            std::memcpy(&out[i], data + 4 * i, 4);
            continue;
        }
        uint16_t value;
        std::memcpy(&value, data + 2 * i, 2);
        out[i] = source == Source::kF16 ? half_to_float(value) : bfloat16_to_float(value);
    }
    return out;
}

}  // namespace

Model::Model(const xl_shape &s, const float *given) : shape(s) {
    const auto within = [](int32_t value, int32_t most) { return value >= 1 && value <= most; };
    require(within(s.layers, 1 << 14) && within(s.hidden_size, 1 << 20) && within(s.ffn_size, 1 << 22) &&
                within(s.heads, 1 << 12) && within(s.key_heads, 1 << 12) && within(s.head_size, 1 << 10) &&
                within(s.vocabulary, 1 << 26) && within(s.positions, 1 << 24),
            "the model's shape is out of range");
    require(s.heads % s.key_heads == 0, "the key heads must divide the query heads");
    require(s.head_size % 2 == 0, "the head size must be even");
    require(s.window >= 0 && std::isfinite(s.eps) && s.eps >= 0, "the window or epsilon is out of range");
    frequencies.assign(given, given + s.head_size / 2);
    layers.resize(static_cast<size_t>(s.layers));
}

void Model::set(int layer, int role, Source source, size_t rows, size_t columns, const uint8_t *data,
                size_t bytes, const uint16_t *scales, size_t scale_count) {
    require(role >= 0 && role < XL_ROLES, "there is no weight of role " + std::to_string(role));
    const Role &kind = kRoles[role];
    require(!kind.layered || (layer >= 0 && layer < shape.layers), "there is no layer " + std::to_string(layer));
    const auto hidden = static_cast<size_t>(shape.hidden_size), ffn = static_cast<size_t>(shape.ffn_size);
    const auto head = static_cast<size_t>(shape.head_size);
    const size_t queries = head * static_cast<size_t>(shape.heads);
    const size_t keys = head * static_cast<size_t>(shape.key_heads);
    const auto vocabulary = static_cast<size_t>(shape.vocabulary);
    Layer &at = layers[kind.layered ? static_cast<size_t>(layer) : 0];
    const auto matrix = [&](Matrix &to, size_t height, size_t width) {
        require(rows == height && columns == width,
                std::string(kind.name) + " is " + std::to_string(rows) + " x " + std::to_string(columns) +
                    ", but must be " + std::to_string(height) + " x " + std::to_string(width));
        to = pack(source, rows, columns, data, bytes, scales, scale_count);
    };
    const auto vector = [&](std::vector<float> &to, size_t size) {
        require(rows == 1 && columns == size, std::string(kind.name) + " has " + std::to_string(columns) +
                                                  " numbers, but must have " + std::to_string(size));
        to = vector_of(source, size, data, bytes);
    };
    switch (role) {
        case XL_EMBEDDING: return matrix(embedding_, vocabulary, hidden);
        case XL_HEAD: return matrix(head_, vocabulary, hidden);
        case XL_FINAL_NORM: return vector(final_norm, hidden);
        case XL_ATTENTION_NORM: return vector(at.attention_norm, hidden);
        case XL_Q: return matrix(at.q, queries, hidden);
        case XL_K: return matrix(at.k, keys, hidden);
        case XL_V: return matrix(at.v, keys, hidden);
        case XL_O: return matrix(at.o, hidden, queries);
        case XL_FFN_NORM: return vector(at.ffn_norm, hidden);
        case XL_GATE: return matrix(at.gate, ffn, hidden);
        case XL_UP: return matrix(at.up, ffn, hidden);
        case XL_DOWN: return matrix(at.down, hidden, ffn);
        case XL_Q_BIAS: return vector(at.q_bias, queries);
        case XL_K_BIAS: return vector(at.k_bias, keys);
        case XL_V_BIAS: return vector(at.v_bias, keys);
        case XL_O_BIAS: return vector(at.o_bias, hidden);
        case XL_Q_NORM: return vector(at.q_norm, head);
        default: return vector(at.k_norm, head);
    }
}

void Model::require_complete() const {
    require(embedding_.rows, "the embedding is missing");
    require(!final_norm.empty(), "the final norm is missing");
    for (size_t i = 0; i < layers.size(); i++) {
        const Layer &l = layers[i];
        for (const Matrix *m : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down})
            require(m->rows, "a matrix of layer " + std::to_string(i) + " is missing");
        require(!l.attention_norm.empty() && !l.ffn_norm.empty(),
                "a norm of layer " + std::to_string(i) + " is missing");
    }
}

size_t Model::bytes() const {
    size_t total = embedding_.bytes() + head_.bytes();
    for (const Layer &l : layers)
        for (const Matrix *m : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) total += m->bytes();
    return total;
}

}  // namespace xl
