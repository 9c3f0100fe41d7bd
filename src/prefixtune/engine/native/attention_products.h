// Products of attention: of queries with keys, and of weights with values.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "vectors.h"

namespace attention {

constexpr int64_t BLOCK = 64;  // Columns of keys and values at once.
constexpr int64_t FEW_ROWS = 4;

// To whole vectors, and whole cache lines.
inline int64_t padded(int64_t size) { return (size + 15) / 16 * 16; }

// Products of `R` queries (in rows of `width`) with `count` keys (in rows of `dim`, a multiple of LANES); the scores are
// in rows of BLOCK, of which what follows the last key is 0.
template <int R, typename T>
inline void multiply_keys(const float* queries, int64_t width, const T* keys, int64_t dim, int64_t count, float* scores) {
    for (int64_t begin = 0; begin < count; begin += LANES) {
        Floats parts[R][LANES];
        for (int64_t j = 0; j < LANES; ++j) {
            Floats sum[R] = {};
            if (begin + j < count)
                for (int64_t d = 0; d < dim; d += LANES) {
                    const Floats key = load(keys + (begin + j) * dim + d);
                    for (int r = 0; r < R; ++r) sum[r] = multiply_add(key, load(queries + r * width + d), sum[r]);
                }
            for (int r = 0; r < R; ++r) parts[r][j] = sum[r];
        }
        for (int r = 0; r < R; ++r) {
            // Neighbours are added until each lane is the sum of one vector.
            for (int64_t left = LANES / 2; left > 0; left /= 2)
                for (int64_t i = 0; i < left; ++i)
                    parts[r][i] = evens(parts[r][2 * i], parts[r][2 * i + 1]) + odds(parts[r][2 * i], parts[r][2 * i + 1]);
            store(scores + r * BLOCK + begin, parts[r][0]);
        }
    }
}

template <typename T>
void multiply_few(const float* queries, int64_t width, const T* keys, int64_t dim, int64_t count, float* scores,
                  int64_t rows) {
    if (rows == 4) multiply_keys<4>(queries, width, keys, dim, count, scores);
    if (rows == 3) multiply_keys<3>(queries, width, keys, dim, count, scores);
    if (rows == 2) multiply_keys<2>(queries, width, keys, dim, count, scores);
    if (rows == 1) multiply_keys<1>(queries, width, keys, dim, count, scores);
}

#if defined(__AVX512BF16__)
constexpr int64_t PAIRS = 32;  // Numbers of bfloat16 in a vector.

// Products of `R` queries with `N` keys of `D` vectors, each lane a share of one: of N vectors, one.
template <int R, int D, int N>
inline void multiply_pairs(const __m512bh (&queries)[R][D], const uint16_t* keys, int64_t ahead,
                           Floats (&sums)[R]) {
    if constexpr (N == 1) {
        for (int r = 0; r < R; ++r) sums[r] = Floats{};
        for (int d = 0; d < D; ++d) {
            const __m512bh key = (__m512bh)_mm512_loadu_si512(keys + d * PAIRS);
            _mm_prefetch(reinterpret_cast<const char*>(keys + d * PAIRS) + ahead, _MM_HINT_T1);
            for (int r = 0; r < R; ++r)
                sums[r] = (Floats)_mm512_dpbf16_ps((__m512)sums[r], key, queries[r][d]);
        }
    } else {
        Floats more[R];
        multiply_pairs<R, D, N / 2>(queries, keys, ahead, sums);
        multiply_pairs<R, D, N / 2>(queries, keys + N / 2 * D * PAIRS, ahead, more);
        for (int r = 0; r < R; ++r) sums[r] = evens(sums[r], more[r]) + odds(sums[r], more[r]);
    }
}

// As `multiply_keys`, by products of pairs. Meanwhile, what lies `ahead` bytes behind the keys comes from memory.
template <int R, int D>
void multiply_keys(const uint16_t* queries, int64_t width, const uint16_t* keys, int64_t count, int64_t ahead,
                   float* scores) {
    __m512bh rows[R][D];
    for (int r = 0; r < R; ++r)
        for (int d = 0; d < D; ++d) rows[r][d] = (__m512bh)_mm512_loadu_si512(queries + r * width + d * PAIRS);
    for (int64_t begin = 0; begin < count; begin += LANES, keys += LANES * D * PAIRS) {
        Floats sums[R];
        if (begin + LANES <= count) {
            multiply_pairs<R, D, LANES>(rows, keys, ahead, sums);
        } else {
            // What follows the last key may not be memory of ours.
            uint16_t rest[LANES * D * PAIRS] = {};
            std::memcpy(rest, keys, (count - begin) * D * PAIRS * sizeof *keys);
            multiply_pairs<R, D, LANES>(rows, rest, ahead, sums);
        }
        for (int r = 0; r < R; ++r) store(scores + r * BLOCK + begin, sums[r]);
    }
}

template <int D>
void multiply_few(const uint16_t* queries, int64_t width, const uint16_t* keys, int64_t count, int64_t ahead,
                  float* scores, int64_t rows) {
    if (rows == 4) multiply_keys<4, D>(queries, width, keys, count, ahead, scores);
    if (rows == 3) multiply_keys<3, D>(queries, width, keys, count, ahead, scores);
    if (rows == 2) multiply_keys<2, D>(queries, width, keys, count, ahead, scores);
    if (rows == 1) multiply_keys<1, D>(queries, width, keys, count, ahead, scores);
}

inline bool suits_pairs(int64_t dim) { return dim == PAIRS || dim == 2 * PAIRS || dim == 4 * PAIRS; }

inline void multiply_few(const uint16_t* queries, int64_t width, const uint16_t* keys, int64_t dim, int64_t count,
                         int64_t ahead, float* scores, int64_t rows) {
    if (dim == PAIRS) multiply_few<1>(queries, width, keys, count, ahead, scores, rows);
    if (dim == 2 * PAIRS) multiply_few<2>(queries, width, keys, count, ahead, scores, rows);
    if (dim == 4 * PAIRS) multiply_few<4>(queries, width, keys, count, ahead, scores, rows);
}
#else
inline bool suits_pairs(int64_t) { return false; }

inline void multiply_few(const uint16_t*, int64_t, const uint16_t*, int64_t, int64_t, int64_t, float*, int64_t) {}
#endif

// `R` rows and `V` vectors of c = a b, or of c += a b. Meanwhile, what lies `ahead` bytes behind `b` comes from memory.
template <int R, int V, bool ADD, typename T>
inline void multiply_tile(const float* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc, int64_t k,
                          int64_t ahead) {
    Floats sum[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sum[r][v] = ADD ? load(c + r * ldc + v * LANES) : Floats{};
    for (int64_t i = 0; i < k; ++i) {
        Floats x[V];
        for (int v = 0; v < V; ++v) x[v] = load(b + i * ldb + v * LANES);
        if (ADD)
            for (size_t line = 0; line < V * LANES * sizeof(T); line += 64)
                __builtin_prefetch(reinterpret_cast<const char*>(b + i * ldb) + line + ahead, 0, 2);
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) sum[r][v] = multiply_add(x[v], broadcast(a[r * lda + i]), sum[r][v]);
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(c + r * ldc + v * LANES, sum[r][v]);
}

template <int R, bool ADD, typename T>
inline void multiply_rows(const float* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc, int64_t k,
                          int64_t n, int64_t ahead) {
    constexpr int V = LANES == 16 ? 4 : 2;  // As many as there are registers for.
    int64_t column = 0;
    for (; column + V * LANES <= n; column += V * LANES)
        multiply_tile<R, V, ADD>(a, lda, b + column, ldb, c + column, ldc, k, ahead);
    for (; column < n; column += LANES) multiply_tile<R, 1, ADD>(a, lda, b + column, ldb, c + column, ldc, k, ahead);
}

// c = a b, or c += a b; `n` is a multiple of LANES.
template <bool ADD, typename T>
void multiply(const float* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t k,
              int64_t n, int64_t ahead = 0) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4)
        multiply_rows<4, ADD>(a + row * lda, lda, b, ldb, c + row * ldc, ldc, k, n, ahead);
    a += row * lda, c += row * ldc;
    if (rows - row == 3) multiply_rows<3, ADD>(a, lda, b, ldb, c, ldc, k, n, ahead);
    if (rows - row == 2) multiply_rows<2, ADD>(a, lda, b, ldb, c, ldc, k, n, ahead);
    if (rows - row == 1) multiply_rows<1, ADD>(a, lda, b, ldb, c, ldc, k, n, ahead);
}

}  // namespace attention
