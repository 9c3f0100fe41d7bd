// Attention of tokens to the slots of a KV cache, for which keys and values of the tokens are there already.
//
// One item of work is a KV head of a sequence and a block of its queries; the query heads that share the KV head are
// rows of the same products. Keys and values are read in blocks, with a running softmax, all in float32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "vectors.h"

namespace attention {

constexpr int64_t BLOCK = 64;  // Columns of keys and values at once.
constexpr int64_t ROWS = 64;   // Rows of queries at once, or one token's.
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
                    for (int r = 0; r < R; ++r) sum[r] += key * load(queries + r * width + d);
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
            for (int v = 0; v < V; ++v) sum[r][v] += x[v] * a[r * lda + i];
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

struct Span {
    int64_t slot, start, count, prefix_length, first_token;
};

struct Call {
    void *keys, *values;              // (slots, H, C, Dk) and (slots, H, C, Dv)
    const void *query, *key, *value;  // of the row, by head and token; key and value may be null: nothing is written
    void* out;                        // (T, Hq, Dv)
    const Span* spans;
    const float* bias;   // (Hq, bias_length) by distance, or null
    const float* sinks;  // (Hq), or null
    int64_t keys_strides[2], values_strides[2];                  // slot, head
    int64_t query_strides[2], key_strides[2], value_strides[2];  // head, token
    int64_t num_spans, heads, kv_heads, key_dim, value_dim, bias_length, window, threads;
    float scale, softcap;
};

struct Item {
    const Span* span;
    int64_t kv_head, first, last;  // of the span's tokens
};

struct Sizes {
    int64_t key, value, rows, tokens;
    explicit Sizes(const Call& call)
        : key(padded(call.key_dim)), value(padded(call.value_dim)), rows(call.heads / call.kv_heads) {
        tokens = rows < ROWS ? ROWS / rows : 1;
        rows *= tokens;
    }
    // Of a thread, in floats.
    int64_t scratch() const { return rows * (key + value + BLOCK + 2 * 16) + BLOCK * (key + value); }
};

template <typename T>
void write(const Call& call, const Span& span, int64_t kv_head) {
    for (int64_t t = 0; t < span.count; ++t) {
        const int64_t token = span.first_token + t, position = span.start + t;
        std::memcpy(static_cast<T*>(call.keys) + span.slot * call.keys_strides[0] + kv_head * call.keys_strides[1] +
                        position * call.key_dim,
                    static_cast<const T*>(call.key) + kv_head * call.key_strides[0] + token * call.key_strides[1],
                    call.key_dim * sizeof(T));
        std::memcpy(static_cast<T*>(call.values) + span.slot * call.values_strides[0] +
                        kv_head * call.values_strides[1] + position * call.value_dim,
                    static_cast<const T*>(call.value) + kv_head * call.value_strides[0] + token * call.value_strides[1],
                    call.value_dim * sizeof(T));
    }
}

// Rows of `dim` numbers as float32, in rows of `width`.
template <typename T>
void widen(const T* from, int64_t count, int64_t dim, int64_t width, float* to) {
    for (int64_t i = 0; i < count; ++i, from += dim, to += width) {
        for (int64_t d = 0; d < dim; ++d) to[d] = to_float(from[d]);
        for (int64_t d = dim; d < width; ++d) to[d] = 0;
    }
}

// From the products of a query with a block's keys to scores; -inf where the query does not see.
inline void make_scores(const Call& call, float* scores, int64_t head, int64_t position, int64_t prefix_length,
                        int64_t begin, int64_t count) {
    for (int64_t j = 0; j < count; ++j) scores[j] *= call.scale;
    if (call.softcap > 0)
        for (int64_t j = 0; j < count; ++j) scores[j] = std::tanh(scores[j] / call.softcap) * call.softcap;
    const int64_t text = prefix_length > begin ? prefix_length - begin : 0;
    if (call.bias) {
        const float* bias = call.bias + head * call.bias_length;
        for (int64_t j = text; j < count; ++j) {
            const int64_t distance = position - begin - j;
            if (distance < 0) break;
            scores[j] += bias[distance < call.bias_length ? distance : call.bias_length - 1];
        }
    }
    int64_t visible = position + 1 - begin;
    if (visible < 0) visible = 0;
    for (int64_t j = visible; j < padded(count); ++j) scores[j] = -INFINITY;
    if (call.window > 0) {
        const int64_t hidden = position - call.window + 1 - begin;
        for (int64_t j = text; j < hidden && j < count; ++j) scores[j] = -INFINITY;
    }
}

// Turn `count` scores into weights, and scale what was summed before; their sum is added to `total`.
inline void soften(float* scores, int64_t count, float* sums, int64_t width, float* highest, float* total) {
    Floats tops = load(scores);
    for (int64_t j = LANES; j < count; j += LANES) {
        const Floats next = load(scores + j);
        tops = next > tops ? next : tops;
    }
    const float block_top = max_of(tops);
    // NaN is no top, but makes the total NaN.
    const float top = block_top > *highest ? block_top : *highest;
    if (top == -INFINITY) {
        // Nothing of the block is visible; NaN stays.
        for (int64_t j = 0; j < count; ++j) scores[j] = scores[j] != scores[j] ? scores[j] : 0;
        for (int64_t j = 0; j < count; ++j) *total += scores[j];
        return;
    }
    Floats parts = {};
    for (int64_t j = 0; j < count; j += LANES) {
        const Floats weight = exponential(load(scores + j) - top);
        store(scores + j, weight);
        parts += weight;
    }
    if (top != *highest) {
        const float factor = std::exp(*highest - top);
        for (int64_t d = 0; d < width; d += LANES) store(sums + d, load(sums + d) * factor);
        *total *= factor;
        *highest = top;
    }
    *total += sum_of(parts);
}

template <typename T>
void attend(const Call& call, const Sizes& sizes, const Item& item, const Item& following, float* scratch) {
    const Span& span = *item.span;
    const int64_t group = call.heads / call.kv_heads, rows = (item.last - item.first) * group;
    float* queries = scratch;
    float* sums = queries + sizes.rows * sizes.key;
    float* scores = sums + sizes.rows * sizes.value;
    float* highest = scores + sizes.rows * BLOCK;
    float* total = highest + sizes.rows * 16;
    float* key_block = total + sizes.rows * 16;
    float* value_block = key_block + BLOCK * sizes.key;
    const bool in_pairs = sizeof(T) == sizeof(uint16_t) && rows <= FEW_ROWS && suits_pairs(call.key_dim);
    uint16_t* narrow = reinterpret_cast<uint16_t*>(queries);
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t head = item.kv_head * group + row % group, token = span.first_token + item.first + row / group;
        const T* query =
            static_cast<const T*>(call.query) + head * call.query_strides[0] + token * call.query_strides[1];
        if (in_pairs)
            std::memcpy(narrow + row * sizes.key, query, call.key_dim * sizeof *narrow);
        else
            widen(query, 1, call.key_dim, sizes.key, queries + row * sizes.key);
        highest[row] = -INFINITY;
        total[row] = 0;
    }
    std::memset(sums, 0, rows * sizes.value * sizeof(float));
    const T* keys = static_cast<const T*>(call.keys) + span.slot * call.keys_strides[0] +
                    item.kv_head * call.keys_strides[1];
    const T* values = static_cast<const T*>(call.values) + span.slot * call.values_strides[0] +
                      item.kv_head * call.values_strides[1];
    const int64_t slots = following.span->slot - span.slot, heads = following.kv_head - item.kv_head;
    const int64_t keys_ahead = (slots * call.keys_strides[0] + heads * call.keys_strides[1]) * sizeof(T);
    const int64_t values_ahead = (slots * call.values_strides[0] + heads * call.values_strides[1]) * sizeof(T);
    const int64_t stop = span.start + item.last, first_position = span.start + item.first;
    for (int64_t begin = 0; begin < stop; begin += BLOCK) {
        const int64_t count = stop - begin < BLOCK ? stop - begin : BLOCK;
        if (call.window > 0 && begin >= span.prefix_length && begin + count <= first_position - call.window + 1) continue;
        const T* block = keys + begin * call.key_dim;
        if (in_pairs) {
            multiply_few(narrow, sizes.key, reinterpret_cast<const uint16_t*>(block), call.key_dim, count, keys_ahead,
                         scores, rows);
        } else if (rows <= FEW_ROWS && call.key_dim % LANES == 0) {
            multiply_few(queries, sizes.key, block, call.key_dim, count, scores, rows);
        } else if (rows <= FEW_ROWS) {
            widen(block, count, call.key_dim, sizes.key, key_block);
            multiply_few(queries, sizes.key, key_block, sizes.key, count, scores, rows);
        } else {
            for (int64_t j = 0; j < count; ++j)
                for (int64_t d = 0; d < call.key_dim; ++d)
                    key_block[d * BLOCK + j] = to_float(block[j * call.key_dim + d]);
            multiply<false>(queries, sizes.key, key_block, BLOCK, scores, BLOCK, rows, call.key_dim, padded(count));
        }
        for (int64_t row = 0; row < rows; ++row) {
            make_scores(call, scores + row * BLOCK, item.kv_head * group + row % group, first_position + row / group,
                        span.prefix_length, begin, count);
            soften(scores + row * BLOCK, padded(count), sums + row * sizes.value, sizes.value, highest + row,
                   total + row);
        }
        const T* rest = values + begin * call.value_dim;
        if (rows <= FEW_ROWS && call.value_dim % LANES == 0) {
            multiply<true>(scores, BLOCK, rest, call.value_dim, sums, sizes.value, rows, count, call.value_dim,
                           values_ahead);
        } else {
            widen(rest, count, call.value_dim, sizes.value, value_block);
            multiply<true>(scores, BLOCK, value_block, sizes.value, sums, sizes.value, rows, count, sizes.value);
        }
    }
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t head = item.kv_head * group + row % group, token = span.first_token + item.first + row / group;
        float scale = 1, sum = total[row];
        if (call.sinks) {
            const float sink = call.sinks[head], top = sink > highest[row] ? sink : highest[row];
            scale = std::exp(highest[row] - top);
            sum = sum * scale + std::exp(sink - top);
        }
        T* out = static_cast<T*>(call.out) + (token * call.heads + head) * call.value_dim;
        for (int64_t d = 0; d < call.value_dim; ++d) from_float(sums[row * sizes.value + d] * scale / sum, out + d);
    }
}

// How many items a call's attention consists of.
inline int64_t count_items(const Call& call, const Sizes& sizes) {
    int64_t count = 0;
    for (int64_t i = 0; i < call.num_spans; ++i)
        count += (call.spans[i].count + sizes.tokens - 1) / sizes.tokens * call.kv_heads;
    return count;
}

// The items: the last tokens of a span first, which take longest.
inline void make_items(const Call& call, const Sizes& sizes, Item* items) {
    for (int64_t i = call.num_spans; i-- > 0;) {
        const Span& span = call.spans[i];
        for (int64_t last = span.count; last > 0; last -= sizes.tokens)
            for (int64_t head = 0; head < call.kv_heads; ++head)
                *items++ = {&span, head, last > sizes.tokens ? last - sizes.tokens : 0, last};
    }
}

}  // namespace attention
