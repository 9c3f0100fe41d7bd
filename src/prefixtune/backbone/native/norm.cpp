// Rows divided by the root of their mean square and multiplied by a weight, and the gradient of that in the rows. See
// `norm.py`. A row's result does not depend on the rows beside it, nor on the number of threads.

#include <cstdint>

#include "norm_row.h"
#include "rows.h"

#define NORM(NAME, T)                                                                                                 \
    extern "C" void rms_norm_##NAME(const T* inputs, const T* weight, T* out, int64_t rows, int64_t width,            \
                                    float epsilon, int64_t plus_one, int64_t threads) {                               \
        for_rows(threads, rows, width, [=](int64_t row) {                                                             \
            norm_row(inputs + row * width, weight, out + row * width, width, epsilon, plus_one);                      \
        });                                                                                                           \
    }                                                                                                                 \
    extern "C" void rms_norm_slopes_##NAME(const T* inputs, const T* weight, const T* slopes, T* out, int64_t rows,   \
                                           int64_t width, float epsilon, int64_t plus_one, int64_t threads) {         \
        for_rows(threads, rows, width, [=](int64_t row) {                                                             \
            const int64_t at = row * width;                                                                           \
            norm_slopes_row(inputs + at, weight, slopes + at, out + at, width, epsilon, plus_one);                         \
        });                                                                                                           \
    }

NORM(float, float)
NORM(bfloat16, uint16_t)
