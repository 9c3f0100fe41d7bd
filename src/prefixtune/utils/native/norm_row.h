// A row divided by the root of its mean square and multiplied by a weight, and the gradient of that in the row; of
// floats, or of bfloat16.
#pragma once

#include <cmath>
#include <cstdint>

#include "vectors.h"

// Four sums at once, since each addition waits for the one before it.
template <typename Term>
inline float sum_of_terms(int64_t width, const Term& term) {
    constexpr int64_t SUMS = 4;
    Floats sums[SUMS] = {};
    int64_t first = 0;
    for (; first + SUMS * LANES <= width; first += SUMS * LANES)
        for (int64_t i = 0; i < SUMS; ++i) sums[i] += term(first + i * LANES, LANES);
    for (; first + LANES <= width; first += LANES) sums[0] += term(first, LANES);
    if (first < width) sums[1] += term(first, width - first);
    return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// 1 over the root of the mean square.
template <typename T>
inline float norm_factor(const T* input, int64_t width, float epsilon) {
    const float squares = sum_of_terms(width, [=](int64_t i, int64_t count) {
        const Floats x = load(input + i, count);
        return x * x;
    });
    return 1 / std::sqrt(squares / static_cast<float>(width) + epsilon);
}

// The quotient is rounded before it is multiplied by the weight; or, with `plus_one`, multiplied by 1 + weight first.
template <typename T>
inline void norm_row(const T* input, const T* weight, T* out, int64_t width, float epsilon, bool plus_one = false) {
    const float factor = norm_factor(input, width, epsilon);
    if (plus_one)
        for_vectors(width, [=](int64_t i, int64_t count) {
            store(out + i, load(input + i, count) * factor * (load(weight + i, count) + 1.0f), count);
        });
    else
        for_vectors(width, [=](int64_t i, int64_t count) {
            store(out + i, rounded<T>(load(input + i, count) * factor) * load(weight + i, count), count);
        });
}

// With f the factor and s the slopes of the quotients: f s - x f^3 mean(s x).
template <typename T>
inline void norm_slopes_row(const T* input, const T* weight, const T* slopes, T* out, int64_t width, float epsilon, bool plus_one) {
    const float factor = norm_factor(input, width, epsilon), offset = plus_one ? 1.0f : 0.0f;
    const float product = sum_of_terms(width, [=](int64_t i, int64_t count) {
        return load(slopes + i, count) * (load(weight + i, count) + offset) * load(input + i, count);
    });
    const float share = product / static_cast<float>(width) * factor * factor;
    for_vectors(width, [=](int64_t i, int64_t count) {
        const Floats slope = load(slopes + i, count) * (load(weight + i, count) + offset);
        store(out + i, (slope - load(input + i, count) * share) * factor, count);
    });
}
