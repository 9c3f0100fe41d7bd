// Heads turned by position, halves against each other, and the gradient of that. See `rotation.py`.

#include <cstdint>

#include "rows.h"
#include "vectors.h"

namespace {

// With a head's halves a and b: a cos - b sin and b cos + a sin; back: a cos + b sin and b cos - a sin, where the sine
// is that of the other half.
template <bool BACK, typename T>
void turn(const T* input, const T* cos, const T* sin, T* out, int64_t half) {
    for_vectors(half, [=](int64_t i, int64_t count) {
        const Floats a = load(input + i, count), b = load(input + half + i, count);
        const Floats cos_a = load(cos + i, count), cos_b = load(cos + half + i, count);
        const Floats sin_a = load(sin + i, count), sin_b = load(sin + half + i, count);
        store(out + i, BACK ? a * cos_a + b * sin_b : a * cos_a - b * sin_a, count);
        store(out + half + i, BACK ? b * cos_b - a * sin_a : b * cos_b + a * sin_b, count);
    });
}

// Heads in the strides given; the result stands as (batch, text, heads, dim).
template <typename T>
void rotate(const T* input, const T* cos, const T* sin, T* out, const int64_t* shape, const int64_t* strides,
            int64_t cos_stride, bool back, int64_t threads) {
    const int64_t heads = shape[1], text = shape[2], dim = shape[3];
    for_rows(threads, shape[0] * text, heads * dim, [=](int64_t row) {
        const int64_t batch = row / text, at = row % text;
        const int64_t angle = batch * cos_stride + at * dim;
        for (int64_t head = 0; head < heads; ++head) {
            const T* from = input + batch * strides[0] + head * strides[1] + at * strides[2];
            (back ? turn<true, T> : turn<false, T>)(from, cos + angle, sin + angle, out + (row * heads + head) * dim, dim / 2);
        }
    });
}

}  // namespace

#define ROTATE(NAME, T)                                                                                               \
    extern "C" void rotate_##NAME(const T* input, const T* cos, const T* sin, T* out, const int64_t* shape,           \
                                  const int64_t* strides, int64_t cos_stride, int64_t back, int64_t threads) {        \
        rotate(input, cos, sin, out, shape, strides, cos_stride, back, threads);                                      \
    }

ROTATE(float, float)
ROTATE(bfloat16, uint16_t)
