// A few rows times a matrix in bfloat16 or int8, by the processor's products of pairs of bfloat16. See `panels.py`.

#include <cstdlib>

#include "panels.h"

#include "threads.h"

namespace {

constexpr int64_t SERIAL_WORK = 1 << 16;  // Numbers of a matrix below which more threads do not pay.

struct Product {
    Matrix matrix;
    const uint16_t* inputs;  // (rows, inner)
    uint16_t* out;           // (rows, outer)
    int64_t rows, threads;
};

// Two numbers that lie side by side are copied as one.
template <typename T, typename Pair>
void pack(const T* matrix, int64_t outer_stride, int64_t inner_stride, int64_t outer, int64_t inner, int64_t threads,
          T* to) {
    static_assert(sizeof(Pair) == 2 * sizeof(T));
    parallel_for(threads, (outer + PANEL - 1) / PANEL, [=](int64_t panel) {
        const int64_t first = panel * PANEL;
        T* next = to + first * inner;
        if (inner_stride == 1 && first + PANEL <= outer) {
            const T* row = matrix + first * outer_stride;
            for (int64_t k = 0; k < inner; k += 2, row += 2, next += 2 * PANEL)
                for (int64_t n = 0; n < PANEL; ++n) std::memcpy(next + 2 * n, row + n * outer_stride, sizeof(Pair));
            return;
        }
        for (int64_t k = 0; k < inner; k += 2)
            for (int64_t n = first; n < first + PANEL; ++n, next += 2) {
                next[0] = n < outer ? matrix[n * outer_stride + k * inner_stride] : 0;
                next[1] = n < outer ? matrix[n * outer_stride + (k + 1) * inner_stride] : 0;
            }
    });
}

}  // namespace

// `to` has room for the matrix with its rows filled up to whole panels; its strides are in numbers.
extern "C" void panels_pack_bfloat16(const uint16_t* matrix, int64_t outer_stride, int64_t inner_stride, int64_t outer,
                                     int64_t inner, int64_t threads, uint16_t* to) {
    pack<uint16_t, uint32_t>(matrix, outer_stride, inner_stride, outer, inner, threads, to);
}

extern "C" void panels_pack_int8(const int8_t* matrix, int64_t outer_stride, int64_t inner_stride, int64_t outer,
                                 int64_t inner, int64_t threads, int8_t* to) {
    pack<int8_t, uint16_t>(matrix, outer_stride, inner_stride, outer, inner, threads, to);
}

// Returns 1 if there is not enough memory.
extern "C" int panels_multiply(const Product* call) {
    const Matrix& matrix = call->matrix;
    const Part parts[] = {{matrix, call->out, matrix.outer}};
    const int64_t threads = matrix.outer * matrix.inner >= SERIAL_WORK ? call->threads : 1;
    const int64_t room = matrix.scales ? 2 * PANEL * matrix.inner : 0;
    uint16_t* wide = static_cast<uint16_t*>(std::aligned_alloc(64, threads * room * sizeof(uint16_t) + 64));
    if (!wide) return 1;
    std::atomic<int64_t> done{0};
    in_threads(threads, [&](int64_t thread, int64_t team) {
        multiply_panels<Finish::STORE>(call->inputs, call->rows, parts, done, team, pair_of(matrix),
                                       wide + thread * room);
    });
    std::free(wide);
    return 0;
}

extern "C" int64_t panels_product_size() { return sizeof(Product); }
