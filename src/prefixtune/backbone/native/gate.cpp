// `act(gate) * up` for rows of numbers, and its gradients. See `gate.py`.
//
// Each activation is x times the logistic function of some k(x): x itself for SiLU, sqrt(8 / pi) (x + 0.044715 x^3) for
// GELU by its approximation with tanh.

#include <cstdint>

#include "rows.h"
#include "vectors.h"

namespace {

enum Activation : int64_t { SILU, GELU_TANH };

constexpr float LINEAR = 1.5957691216f, CUBIC = LINEAR * 0.044715f;

template <Activation A>
inline Floats exponent(Floats x) {
    return A == SILU ? x : x * (x * x * CUBIC + LINEAR);
}

template <Activation A>
inline Floats exponent_slope(Floats x) {
    return A == SILU ? Floats{} + 1.0f : x * x * (3 * CUBIC) + LINEAR;
}

inline Floats logistic(Floats x) {
    const Floats power = exponential(x < 0.0f ? x : -x);
    return (x < 0.0f ? power : Floats{} + 1.0f) / (power + 1.0f);
}

template <Activation A, typename T>
void gate_row(const T* gate, const T* up, T* out, int64_t width) {
    for_vectors(width, [=](int64_t i, int64_t count) {
        const Floats x = load(gate + i, count);
        store(out + i, x * logistic(exponent<A>(x)) * load(up + i, count), count);
    });
}

template <Activation A, typename T>
void slopes_row(const T* gate, const T* up, const T* slopes, T* gate_slopes, T* up_slopes, int64_t width) {
    for_vectors(width, [=](int64_t i, int64_t count) {
        const Floats x = load(gate + i, count), share = logistic(exponent<A>(x)), slope = load(slopes + i, count);
        const Floats activation_slope = share * (x * (Floats{} + 1.0f - share) * exponent_slope<A>(x) + 1.0f);
        store(gate_slopes + i, slope * load(up + i, count) * activation_slope, count);
        store(up_slopes + i, slope * x * share, count);
    });
}

}  // namespace

#define GATE(NAME, T)                                                                                                 \
    extern "C" void gate_##NAME(const T* gate, const T* up, T* out, int64_t rows, int64_t width, int64_t activation,  \
                                int64_t threads) {                                                                    \
        for_rows(threads, rows, width, [=](int64_t row) {                                                             \
            const int64_t at = row * width;                                                                           \
            (activation == SILU ? gate_row<SILU, T> : gate_row<GELU_TANH, T>)(gate + at, up + at, out + at, width);   \
        });                                                                                                           \
    }                                                                                                                 \
    extern "C" void gate_slopes_##NAME(const T* gate, const T* up, const T* slopes, T* gate_slopes, T* up_slopes,     \
                                       int64_t rows, int64_t width, int64_t activation, int64_t threads) {            \
        for_rows(threads, rows, width, [=](int64_t row) {                                                             \
            const int64_t at = row * width;                                                                           \
            (activation == SILU ? slopes_row<SILU, T> : slopes_row<GELU_TANH, T>)(                                    \
                gate + at, up + at, slopes + at, gate_slopes + at, up_slopes + at, width);                            \
        });                                                                                                           \
    }

GATE(float, float)
GATE(bfloat16, uint16_t)
