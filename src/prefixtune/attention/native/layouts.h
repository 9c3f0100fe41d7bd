// How rows of floats become matrices of words (see `products.h`).
#pragma once

#include "products.h"

// Widen a row, with zeros up to a multiple of LANES.
template <typename T>
inline void widen(const T* from, int64_t dim, float* to) {
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) store(to + d, load(from + d));
    if (d == dim) return;
    store(to + d, Floats{});
    for (; d < dim; ++d) to[d] = to_float(from[d]);
}

// Round a row times a factor.
template <typename T>
inline void narrow(const float* from, int64_t dim, float factor, T* to) {
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) store(to + d, load(from + d) * factor);
    for (; d < dim; ++d) from_float(from[d] * factor, to + d);
}

template <class M>
struct Layout;

template <>
struct Layout<FloatWords> {
    // A row as words along it; may be in place. `width` is a multiple of LANES, as in what follows.
    static inline void put_row(const float* row, int64_t width, float* to) {
        if (row != to) std::memcpy(to, row, width * sizeof(float));
    }

    // A row as row `index` of a matrix whose words are along its columns.
    static inline void put_beside(const float* row, int64_t width, int64_t index, float* to) {
        std::memcpy(to + index * width, row, width * sizeof(float));
    }

    // A row as a column of a matrix whose rows are `step` words apart.
    static inline void put_column(const float* row, int64_t width, int64_t step, float* to) {
        for (int64_t d = 0; d < width; ++d) to[d * step] = row[d];
    }

    // Two rows of weights `p`, and of gradients by weights `g`, become what products with them and with their transposes
    // read: gradients by scores in `g` as words along rows, and `transposed` ones of both.
    static inline void make_gradients(float* p, float* g, int64_t step, const float* delta, float scale, int64_t width) {
        for (int64_t row = 0; row < 2; ++row)
            for (int64_t i = 0; i < width; i += LANES) {
                float* own = g + row * step + i;
                store(own, load(p + row * step + i) * (load(own) - delta[row]) * scale);
            }
    }
    static inline const float* transposed_weights(const float* p, const float*, int64_t) { return p; }
    static inline const float* transposed_gradients(const float*, const float* g, int64_t) { return g; }
};

#if defined(__AVX512F__) && defined(__AVX512BF16__)
template <>
struct Layout<PairWords> {
    static inline __m512i halves_of(Floats x) {
        return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
    }
    static inline __m512i pair_of(Floats low, Floats high) {
        return _mm512_or_si512(halves_of(low), _mm512_slli_epi32(halves_of(high), 16));
    }

    static inline void put_row(const float* row, int64_t width, void* to) {
        for (int64_t i = 0; i < width; i += LANES) store(static_cast<uint16_t*>(to) + i, load(row + i));
    }

    // An even row has zeros beside it until an odd one follows.
    static inline void put_beside(const float* row, int64_t width, int64_t index, uint32_t* to) {
        uint32_t* own = to + index / 2 * width;
        for (int64_t i = 0; i < width; i += LANES) {
            __m512i words = halves_of(load(row + i));
            if (index % 2) {
                const __m512i low = _mm512_and_si512(_mm512_loadu_si512(own + i), _mm512_set1_epi32(0xffff));
                words = _mm512_or_si512(low, _mm512_slli_epi32(words, 16));
            }
            _mm512_storeu_si512(own + i, words);
        }
    }

    static inline void put_column(const float* row, int64_t width, int64_t step, uint32_t* to) {
        for (int64_t i = 0; i < width; i += LANES) {
            uint32_t words[LANES / 2];
            put_row(row + i, LANES, words);
            for (int64_t d = 0; d < LANES / 2; ++d) to[(i / 2 + d) * step] = words[d];
        }
    }

    static inline void make_gradients(float* p, float* g, int64_t step, const float* delta, float scale, int64_t width) {
        for (int64_t i = 0; i < width; i += LANES) {
            const Floats first = load(p + i), second = load(p + step + i);
            const Floats first_gradient = first * (load(g + i) - delta[0]) * scale;
            const Floats second_gradient = second * (load(g + step + i) - delta[1]) * scale;
            _mm512_storeu_si512(p + i, pair_of(first, second));
            _mm512_storeu_si512(p + step + i, pair_of(first_gradient, second_gradient));
            store(reinterpret_cast<uint16_t*>(g) + i, first_gradient);
            store(reinterpret_cast<uint16_t*>(g + step) + i, second_gradient);
        }
    }
    static inline const uint32_t* transposed_weights(const float* p, const float*, int64_t) {
        return reinterpret_cast<const uint32_t*>(p);
    }
    static inline const uint32_t* transposed_gradients(const float* p, const float*, int64_t step) {
        return reinterpret_cast<const uint32_t*>(p + step);
    }
};
#endif
