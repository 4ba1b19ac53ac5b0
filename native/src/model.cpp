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

struct Size {
    size_t rows, columns;
};

// Shape of a weight; a vector has one row.
Size size_of(const xl_shape &s, int role) {
    const auto hidden = static_cast<size_t>(s.hidden_size), ffn = static_cast<size_t>(s.ffn_size);
    const auto head = static_cast<size_t>(s.head_size), vocabulary = static_cast<size_t>(s.vocabulary);
    const size_t queries = head * static_cast<size_t>(s.heads), keys = head * static_cast<size_t>(s.key_heads);
    switch (role) {
        case XL_EMBEDDING:
        case XL_HEAD: return {vocabulary, hidden};
        case XL_Q: return {queries, hidden};
        case XL_K:
        case XL_V: return {keys, hidden};
        case XL_O: return {hidden, queries};
        case XL_GATE:
        case XL_UP: return {ffn, hidden};
        case XL_DOWN: return {hidden, ffn};
        case XL_Q_BIAS: return {1, queries};
        case XL_K_BIAS:
        case XL_V_BIAS: return {1, keys};
        case XL_Q_NORM:
        case XL_K_NORM: return {1, head};
        default: return {1, hidden};
    }
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
    if (Matrix *to = place(layer, role)) {
        const Size size = size_of(shape, role);
        require(rows == size.rows && columns == size.columns,
                std::string(kind.name) + " is " + std::to_string(rows) + " x " + std::to_string(columns) +
                    ", but must be " + std::to_string(size.rows) + " x " + std::to_string(size.columns));
        *to = pack(source, rows, columns, data, bytes, scales, scale_count);
        return;
    }
    Layer &at = layers[kind.layered ? static_cast<size_t>(layer) : 0];
    const size_t size = size_of(shape, role).columns;
    require(rows == 1 && columns == size, std::string(kind.name) + " has " + std::to_string(columns) +
                                              " numbers, but must have " + std::to_string(size));
    require(!scales && !scale_count, std::string(kind.name) + " has scales apart, but no codes");
    std::vector<float> *vectors[XL_ROLES] = {};
    vectors[XL_FINAL_NORM] = &final_norm;
    vectors[XL_ATTENTION_NORM] = &at.attention_norm, vectors[XL_FFN_NORM] = &at.ffn_norm;
    vectors[XL_Q_BIAS] = &at.q_bias, vectors[XL_K_BIAS] = &at.k_bias, vectors[XL_V_BIAS] = &at.v_bias;
    vectors[XL_O_BIAS] = &at.o_bias, vectors[XL_Q_NORM] = &at.q_norm, vectors[XL_K_NORM] = &at.k_norm;
    *vectors[role] = vector_of(source, size, data, bytes);
}

void Model::use(int layer, int role, size_t rows, size_t columns, const uint8_t *data, size_t bytes) {
    require(role >= 0 && role < XL_ROLES, "there is no weight of role " + std::to_string(role));
    require(!kRoles[role].layered || (layer >= 0 && layer < shape.layers), "there is no layer " + std::to_string(layer));
    Matrix *to = place(layer, role);
    const Size size = size_of(shape, role);
    require(to && rows == size.rows && columns == size.columns, std::string(kRoles[role].name) + " has another shape");
    require(!to->owned || data != to->data, std::string(kRoles[role].name) + " lies in memory that it would free");
    *to = packed_at(data, rows, columns, bytes);
}

const Matrix &Model::matrix(int layer, int role) const {
    require(role >= 0 && role < XL_ROLES && (!kRoles[role].layered || (layer >= 0 && layer < shape.layers)),
            "there is no such weight");
    const Matrix *found = const_cast<Model *>(this)->place(layer, role);
    require(found && found->rows, std::string(kRoles[role].name) + " is no matrix of this model");
    return *found;
}

Matrix *Model::place(int layer, int role) {
    Layer &at = layers[kRoles[role].layered ? static_cast<size_t>(layer) : 0];
    switch (role) {
        case XL_EMBEDDING: return &embedding_;
        case XL_HEAD: return &head_;
        case XL_Q: return &at.q;
        case XL_K: return &at.k;
        case XL_V: return &at.v;
        case XL_O: return &at.o;
        case XL_GATE: return &at.gate;
        case XL_UP: return &at.up;
        case XL_DOWN: return &at.down;
        default: return nullptr;
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
