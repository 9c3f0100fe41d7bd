// A row divided by the root of its mean square, rounded, and multiplied by a weight; all in bfloat16.
#pragma once

#include <cmath>
#include <cstdint>

#include "bfloat16.h"

inline void norm_row(const uint16_t* input, const uint16_t* weight, uint16_t* out, int64_t width, float epsilon) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; ++i) squares += to_float(input[i]) * to_float(input[i]);
    const float factor = 1 / std::sqrt(squares / static_cast<float>(width) + epsilon);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i)
        out[i] = to_bfloat16(to_float(to_bfloat16(to_float(input[i]) * factor)) * to_float(weight[i]));
}
