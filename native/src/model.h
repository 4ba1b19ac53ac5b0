// A LLaMA-style decoder: its shape and packed weights.
#pragma once

#include <string>
#include <vector>

#include "matrix.h"
#include "xinslm.h"

namespace xl {

struct Layer {
    Matrix q, k, v, o, gate, up, down;
    // Padded with zeros to a multiple of 16; empty where the model has none.
    std::vector<float> attention_norm, ffn_norm, q_bias, k_bias, v_bias, o_bias, q_norm, k_norm;
};

class Model {
  public:
    // Throws for a shape that cannot work.
    Model(const xl_shape &shape, const float *frequencies);

    // Sets one weight; `layer` is ignored for those that belong to none.
    void set(int layer, int role, Source source, size_t rows, size_t columns, const uint8_t *data,
             size_t bytes, const uint16_t *scales, size_t scale_count);

    // Uses a matrix that is packed already, in memory that outlives the model. Its format follows from
    // its size. Throws for a weight that is no matrix, and for a size of no format.
    void use(int layer, int role, size_t rows, size_t columns, const uint8_t *data, size_t bytes);

    // The matrix of a role; throws if it is none, or missing.
    const Matrix &matrix(int layer, int role) const;

    // Throws, naming it, if a weight is missing.
    void require_complete() const;

    const Matrix &head() const { return head_.rows ? head_ : embedding_; }
    const Matrix &embedding() const { return embedding_; }
    size_t bytes() const;

    const xl_shape shape;
    std::vector<float> frequencies;  // radians per position, head_size / 2
    std::vector<Layer> layers;
    std::vector<float> final_norm;

  private:
    Matrix *place(int layer, int role);

    Matrix embedding_, head_;
};

}  // namespace xl
