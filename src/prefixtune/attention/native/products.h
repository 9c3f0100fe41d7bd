// Products of small matrices, summed in float: C = A B, or C += A B. The lanes of a register run along the rows of B and
// C; numbers of A are broadcast, from wherever they are, so A may be read as its transpose.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

#if defined(__AVX512F__) && defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int64_t MOST_VECTORS = 4;
#else
constexpr int64_t MOST_VECTORS = 2;
#endif
constexpr int64_t MOST_ROWS = 6;  // With MOST_VECTORS as many sums as registers hold.

inline int64_t up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }
inline int64_t padded(int64_t size) { return up(size, LANES); }

// Matrices of floats: a word is a number.
struct FloatWords {
    typedef float Word;
    static constexpr int64_t NUMBERS = 1;

    static inline Floats dot(float a, Floats b, Floats sum) { return a * b + sum; }
    static inline Floats load_words(const float* from) { return load(from); }
};

#if defined(__AVX512F__) && defined(__AVX512BF16__)
// Matrices of bfloat16: a word is two numbers that follow each other along the axis that is summed over.
struct PairWords {
    typedef uint32_t Word;
    static constexpr int64_t NUMBERS = 2;

    static inline Floats dot(uint32_t a, __m512i b, Floats sum) {
        const __m512i pairs = _mm512_set1_epi32(static_cast<int>(a));
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pairs, (__m512bh)b);
    }
    static inline __m512i load_words(const uint32_t* from) { return _mm512_loadu_si512(from); }
};
#endif

template <class M, int R, int V, bool ADD>
void multiply_tile(const typename M::Word* a, int64_t a_row, int64_t a_step, const typename M::Word* b, int64_t b_step,
                   int64_t steps, float* c, int64_t c_row) {
    Floats sum[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sum[r][v] = ADD ? load(c + r * c_row + v * LANES) : Floats{};
    for (int64_t i = 0; i < steps; ++i) {
        decltype(M::load_words(b)) columns[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) columns[v] = M::load_words(b + i * b_step + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sum[r][v] = M::dot(a[r * a_row + i * a_step], columns[v], sum[r][v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) store(c + r * c_row + v * LANES, sum[r][v]);
}

template <class M, int R, bool ADD, typename... Arguments>
inline void multiply_rows(int64_t vectors, Arguments... arguments) {
    if (vectors == 1) multiply_tile<M, R, 1, ADD>(arguments...);
    if (vectors == 2) multiply_tile<M, R, 2, ADD>(arguments...);
    if constexpr (MOST_VECTORS > 2) {
        if (vectors == 3) multiply_tile<M, R, 3, ADD>(arguments...);
        if (vectors == 4) multiply_tile<M, R, 4, ADD>(arguments...);
    }
}

// A block of at most MOST_ROWS rows of C. `a_row` and `a_step` are the distances between A's rows, and between its words
// along the sum of `steps` words; `b_step` and `c_row` those between rows of B and of C, which have `width` lanes.
template <class M, bool ADD>
void multiply(int64_t rows, int64_t width, int64_t steps, const typename M::Word* a, int64_t a_row, int64_t a_step,
              const typename M::Word* b, int64_t b_step, float* c, int64_t c_row) {
    const int64_t vectors = width / LANES;
    if (vectors == 0) return;
    // As even parts as there are.
    const int64_t parts = (vectors + MOST_VECTORS - 1) / MOST_VECTORS;
    for (int64_t part = 0, first = 0; part < parts; ++part) {
        const int64_t count = (vectors - first + parts - part - 1) / (parts - part);
        const auto* own_b = b + first * LANES;
        float* own_c = c + first * LANES;
        switch (rows) {
            case 1: multiply_rows<M, 1, ADD>(count, a, a_row, a_step, own_b, b_step, steps, own_c, c_row); break;
            case 2: multiply_rows<M, 2, ADD>(count, a, a_row, a_step, own_b, b_step, steps, own_c, c_row); break;
            case 3: multiply_rows<M, 3, ADD>(count, a, a_row, a_step, own_b, b_step, steps, own_c, c_row); break;
            case 4: multiply_rows<M, 4, ADD>(count, a, a_row, a_step, own_b, b_step, steps, own_c, c_row); break;
            case 5: multiply_rows<M, 5, ADD>(count, a, a_row, a_step, own_b, b_step, steps, own_c, c_row); break;
            default: multiply_rows<M, 6, ADD>(count, a, a_row, a_step, own_b, b_step, steps, own_c, c_row);
        }
        first += count;
    }
}
