// The next token from logits: inference/sampling.py defines it.
#pragma once

#include <cstdint>

#include "xinslm.h"

namespace xl {

struct Drawn {
    int32_t token;
    double log_probability;
};

// Throws if a logit is NaN or all are -infinity.
Drawn sample(const float *logits, int32_t vocabulary, const xl_sampling &sampling, const int32_t *seen,
             int64_t seen_count, double uniform);

}  // namespace xl
