// A few rows times a matrix in bfloat16, by the processor's products of pairs of bfloat16. See `panels.py`.

#include "panels.h"

#include "threads.h"

namespace {

constexpr int64_t SERIAL_WORK = 1 << 16;  // Numbers of a matrix below which more threads do not pay.

struct Product {
    const uint16_t *inputs, *panels, *bias;  // (rows, inner); the matrix; (outer), or null
    uint16_t* out;                           // (rows, outer)
    int64_t rows, outer, inner, threads;
};

}  // namespace

// `to` has room for the matrix with its rows filled up to whole panels; its strides are in numbers.
extern "C" void panels_pack(const uint16_t* matrix, int64_t outer_stride, int64_t inner_stride, int64_t outer,
                            int64_t inner, int64_t threads, uint16_t* to) {
    parallel_for(threads, (outer + PANEL - 1) / PANEL, [=](int64_t panel) {
        const int64_t first = panel * PANEL;
        uint16_t* next = to + first * inner;
        for (int64_t k = 0; k < inner; k += 2)
            for (int64_t n = first; n < first + PANEL; ++n, next += 2) {
                next[0] = n < outer ? matrix[n * outer_stride + k * inner_stride] : 0;
                next[1] = n < outer ? matrix[n * outer_stride + (k + 1) * inner_stride] : 0;
            }
    });
}

extern "C" void panels_multiply(const Product* call) {
    const Matrix matrix{call->panels, call->bias, call->outer, call->inner};
    const Part parts[] = {{matrix, call->out, call->outer}};
    const bool parallel = call->threads > 1 && call->outer * call->inner >= SERIAL_WORK;
    std::atomic<int64_t> done{0};
    in_threads(parallel ? call->threads : 1, [&](int64_t, int64_t threads) {
        multiply_panels<Finish::STORE>(call->inputs, call->rows, parts, done, threads, pair_of(matrix));
    });
}

extern "C" int64_t panels_product_size() { return sizeof(Product); }
