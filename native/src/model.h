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
    Matrix embedding_, head_;
};

}  // namespace xl
