// Rows divided by the root of their mean square, and multiplied by a weight; all in bfloat16. See `norm.py`.

#include <cstdint>

#include "norm_row.h"
#include "threads.h"

namespace {

constexpr int64_t SERIAL_WORK = 1 << 16;  // Numbers below which more threads do not pay.

}  // namespace

extern "C" void rms_norm(const uint16_t* inputs, const uint16_t* weight, uint16_t* out, int64_t rows, int64_t width,
                         float epsilon, int64_t threads) {
    const int64_t parts = rows * width >= SERIAL_WORK ? threads : 1;
    parallel_for(parts, parts, [=](int64_t part) {
        for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row)
            norm_row(inputs + row * width, weight, out + row * width, width, epsilon);
    });
}
