// Rows divided by the root of their mean square, and multiplied by a weight; all in bfloat16. See `norm.py`.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t SERIAL_WORK = 1 << 16;  // Numbers below which more threads do not pay.

inline float to_float(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    // To the nearest, ties to even; NaN stays NaN.
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

}  // namespace

extern "C" void rms_norm(const uint16_t* inputs, const uint16_t* weight, uint16_t* out, int64_t rows, int64_t width,
                         float epsilon, int64_t threads) {
    const bool parallel = threads > 1 && rows * width >= SERIAL_WORK;
#pragma omp parallel for num_threads(threads) schedule(static) if (parallel)
    for (int64_t row = 0; row < rows; ++row) {
        const uint16_t* input = inputs + row * width;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; ++i) squares += to_float(input[i]) * to_float(input[i]);
        const float factor = 1 / std::sqrt(squares / static_cast<float>(width) + epsilon);
#pragma omp simd
        for (int64_t i = 0; i < width; ++i)
            out[row * width + i] = to_bfloat16(to_float(to_bfloat16(to_float(input[i]) * factor)) * to_float(weight[i]));
    }
}
