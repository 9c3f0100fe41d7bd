// Rows divided by the root of their mean square, and multiplied by a weight; all in bfloat16. See `norm.py`.

#include <cmath>
#include <cstdint>

#include "bfloat16.h"
#include "threads.h"

namespace {

constexpr int64_t SERIAL_WORK = 1 << 16;  // Numbers below which more threads do not pay.

void norm_row(const uint16_t* input, const uint16_t* weight, uint16_t* out, int64_t width, float epsilon) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; ++i) squares += to_float(input[i]) * to_float(input[i]);
    const float factor = 1 / std::sqrt(squares / static_cast<float>(width) + epsilon);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i)
        out[i] = to_bfloat16(to_float(to_bfloat16(to_float(input[i]) * factor)) * to_float(weight[i]));
}

}  // namespace

extern "C" void rms_norm(const uint16_t* inputs, const uint16_t* weight, uint16_t* out, int64_t rows, int64_t width,
                         float epsilon, int64_t threads) {
    const int64_t parts = rows * width >= SERIAL_WORK ? threads : 1;
    parallel_for(parts, parts, [=](int64_t part) {
        for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row)
            norm_row(inputs + row * width, weight, out + row * width, width, epsilon);
    });
}
