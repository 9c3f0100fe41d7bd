// The cross-entropy of rows of scores, and its gradient in their place. See `loss.py`.

#include <cmath>
#include <cstdint>

#include "bfloat16.h"
#include "threads.h"
#include "vectors.h"

namespace {

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Powers of the row are kept in `powers`, of `width` numbers.
template <typename T>
float loss_row(T* scores, int64_t label, int64_t width, float* powers) {
    const int64_t whole = width / LANES * LANES;
    Floats most = Floats{} - INFINITY;
    for (int64_t i = 0; i < whole; i += LANES) most = larger(most, load(scores + i));
    float top = max_of(most);
    for (int64_t i = whole; i < width; ++i) top = std::fmax(top, to_float(scores[i]));
    Floats sums[2] = {};
    for (int64_t i = 0; i < whole; i += LANES) {
        const Floats power = exponential(load(scores + i) - top);
        store(powers + i, power);
        sums[i / LANES % 2] += power;
    }
    float sum = sum_of(sums[0] + sums[1]);
    for (int64_t i = whole; i < width; ++i) sum += powers[i] = std::exp(to_float(scores[i]) - top);
    const float loss = std::log(sum) - (to_float(scores[label]) - top), share = 1 / sum;
    for_vectors(width, [=](int64_t i, int64_t count) { store(scores + i, load(powers + i, count) * share, count); });
    from_float(powers[label] * share - 1, scores + label);
    return loss;
}

template <typename T>
void losses_of(T* scores, const int64_t* labels, float* losses, float* powers, int64_t rows, int64_t width,
               int64_t threads) {
    in_threads(threads < rows ? threads : rows, [=](int64_t thread, int64_t all) {
        for (int64_t row = rows * thread / all; row < rows * (thread + 1) / all; ++row)
            losses[row] = loss_row(scores + row * width, labels[row], width, powers + thread * width);
    });
}

}  // namespace

// `powers` has room for a row for each thread.
extern "C" void losses_float(float* scores, const int64_t* labels, float* losses, float* powers, int64_t rows,
                             int64_t width, int64_t threads) {
    losses_of(scores, labels, losses, powers, rows, width, threads);
}

extern "C" void losses_bfloat16(uint16_t* scores, const int64_t* labels, float* losses, float* powers, int64_t rows,
                                int64_t width, int64_t threads) {
    losses_of(scores, labels, losses, powers, rows, width, threads);
}
