#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

namespace xl {
namespace {

struct Candidate {
    float logit;
    int32_t token;
};

bool before(const Candidate &a, const Candidate &b) {
    return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

// The candidates in order, most likely first: the first `top_k`, or all of 0.
void order(std::vector<Candidate> &all, int32_t top_k) {
    if (top_k > 0 && static_cast<size_t>(top_k) < all.size()) {
        std::nth_element(all.begin(), all.begin() + top_k - 1, all.end(), before);
        all.resize(static_cast<size_t>(top_k));
    }
    std::sort(all.begin(), all.end(), before);
}

// exp((x - largest) / temperature), normalized
std::vector<double> softmax(const std::vector<Candidate> &from, size_t count, double temperature) {
    std::vector<double> out(count);
    double total = 0;
    const double largest = from[0].logit / temperature;
    for (size_t i = 0; i < count; i++) total += out[i] = std::exp(from[i].logit / temperature - largest);
    for (double &p : out) p /= total;
    return out;
}

}  // namespace

Drawn sample(const float *logits, int32_t vocabulary, const xl_sampling &s, const int32_t *seen, int64_t seen_count,
             double uniform) {
    const auto size = static_cast<size_t>(vocabulary);
    std::vector<Candidate> all(size);
    float largest = -INFINITY;
    for (size_t i = 0; i < size; i++) {
        if (!(logits[i] < INFINITY)) throw std::runtime_error("the model's logits are NaN or infinite");
        largest = std::max(largest, logits[i]);
        all[i] = {logits[i], static_cast<int32_t>(i)};
    }
    if (!(largest > -INFINITY)) throw std::runtime_error("all logits are -infinity");
    double total = 0;
    for (size_t i = 0; i < size; i++) total += std::exp(static_cast<double>(logits[i]) - largest);
    const auto done = [&](int32_t token) {
        return Drawn{token, static_cast<double>(logits[token]) - largest - std::log(total)};
    };
    if (s.repetition_penalty != 1.0f && seen_count) {
        std::vector<int32_t> unique(seen, seen + seen_count);
        std::sort(unique.begin(), unique.end());
        unique.erase(std::unique(unique.begin(), unique.end()), unique.end());
        for (int32_t token : unique) {
            if (token < 0 || token >= vocabulary) continue;
            float &logit = all[static_cast<size_t>(token)].logit;
            logit = logit > 0 ? logit / s.repetition_penalty : logit * s.repetition_penalty;
        }
    }
    if (s.temperature == 0.0f) return done(std::min_element(all.begin(), all.end(), before)->token);
    order(all, s.top_k);
    size_t count = all.size();
    const std::vector<double> own = softmax(all, count, 1.0);
    if (s.top_p < 1.0f) {
        double reached = 0;
        const double wanted = static_cast<double>(s.top_p) * (1 - 1e-12);
        for (size_t i = 0; i < count; i++) {
            reached += own[i];
            if (reached >= wanted) {
                count = i + 1;
                break;
            }
        }
    }
    if (s.min_p > 0.0f) {
        size_t kept = 0;
        while (kept < all.size() && own[kept] >= static_cast<double>(s.min_p) * own[0]) kept++;
        count = std::min(count, kept);
    }
    const std::vector<double> weights = softmax(all, count, s.temperature);
    double reached = 0;
    for (size_t i = 0; i < count; i++) {
        reached += weights[i];
        if (uniform < reached) return done(all[i].token);
    }
    return done(all[count - 1].token);
}

}  // namespace xl
