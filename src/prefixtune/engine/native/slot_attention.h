// Attention of tokens to the slots of a KV cache, for which keys and values of the tokens are there already.
//
// One item of work is a KV head of a sequence and a block of its queries; the query heads that share the KV head are
// rows of the same products. Keys and values are read in blocks, with a running softmax, all in float32.
//
// A prefix that several sequences have may stand outside the slots, once. Those of them that have one token each in the
// step are one item: its blocks are read for all of them, before each goes on with its own slot.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention_products.h"

namespace attention {

constexpr int64_t ROWS = 64;  // Rows of queries at once, or one token's.

struct Span {
    int64_t slot, start, count, prefix_length, first_token;
    // Per layer the keys and the values of the prefix, (H, P, Dk) and (H, P, Dv); null: the slot begins with them.
    const void* const* prefix;

    // Position of the slot's first column.
    int64_t first_column() const { return prefix ? prefix_length : 0; }
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
    int64_t num_spans, layer, heads, kv_heads, key_dim, value_dim, bias_length, window, threads;
    float scale, softcap;
};

struct Item {
    const Span* spans;             // the first of them
    int64_t num_spans;             // several: of one token each, with the same prefix
    int64_t kv_head, first, last;  // of a span's tokens
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
        const int64_t token = span.first_token + t, column = span.start + t - span.first_column();
        std::memcpy(static_cast<T*>(call.keys) + span.slot * call.keys_strides[0] + kv_head * call.keys_strides[1] +
                        column * call.key_dim,
                    static_cast<const T*>(call.key) + kv_head * call.key_strides[0] + token * call.key_strides[1],
                    call.key_dim * sizeof(T));
        std::memcpy(static_cast<T*>(call.values) + span.slot * call.values_strides[0] +
                        kv_head * call.values_strides[1] + column * call.value_dim,
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
    if (visible > count) visible = count;
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

// Columns of keys and values of a KV head: of a prefix, or of a slot.
template <typename T>
struct Columns {
    const T *keys, *values;  // of the first of them
    int64_t first, stop;
};

// None if the prefix stands in the slot.
template <typename T>
Columns<T> prefix_columns(const Call& call, const Span& span, int64_t kv_head) {
    if (!span.prefix) return {};
    const int64_t row = kv_head * span.prefix_length;
    return {static_cast<const T*>(span.prefix[2 * call.layer]) + row * call.key_dim,
            static_cast<const T*>(span.prefix[2 * call.layer + 1]) + row * call.value_dim, 0, span.prefix_length};
}

// Those that `last` of the span's tokens see.
template <typename T>
Columns<T> slot_columns(const Call& call, const Span& span, int64_t kv_head, int64_t last) {
    return {static_cast<const T*>(call.keys) + span.slot * call.keys_strides[0] + kv_head * call.keys_strides[1],
            static_cast<const T*>(call.values) + span.slot * call.values_strides[0] + kv_head * call.values_strides[1],
            span.first_column(), span.start + last};
}

// How many bytes `to` is behind `from`; 0 if there is none.
inline int64_t bytes_ahead(const void* from, const void* to) {
    return to ? reinterpret_cast<intptr_t>(to) - reinterpret_cast<intptr_t>(from) : 0;
}

// The queries of an item, and what they have summed up so far.
template <typename T>
class Rows {
  public:
    Rows(const Call& call, const Sizes& sizes, const Item& item, float* scratch)
        : call_(call),
          sizes_(sizes),
          item_(item),
          group_(call.heads / call.kv_heads),
          per_span_((item.last - item.first) * group_),
          count_(item.num_spans * per_span_),
          few_(per_span_ <= FEW_ROWS),
          in_pairs_(few_ && sizeof(T) == sizeof(uint16_t) && suits_pairs(call.key_dim)),
          queries_(scratch),
          sums_(queries_ + sizes.rows * sizes.key),
          scores_(sums_ + sizes.rows * sizes.value),
          highest_(scores_ + sizes.rows * BLOCK),
          total_(highest_ + sizes.rows * 16),
          key_block_(total_ + sizes.rows * 16),
          value_block_(key_block_ + BLOCK * sizes.key) {
        for_rows(0, count_, [&](int64_t row, int64_t head, int64_t token, int64_t) {
            const T* query =
                static_cast<const T*>(call.query) + head * call.query_strides[0] + token * call.query_strides[1];
            if (in_pairs_)
                std::memcpy(narrow(row), query, call.key_dim * sizeof(T));
            else
                widen(query, 1, call.key_dim, sizes.key, queries_ + row * sizes.key);
            highest_[row] = -INFINITY;
            total_[row] = 0;
        });
        std::memset(sums_, 0, count_ * sizes.value * sizeof(float));
    }

    int64_t count() const { return count_; }
    int64_t per_span() const { return per_span_; }

    // Attend to some columns with rows from `row` to `stop`; meanwhile the next columns come from memory.
    void attend(const Columns<T>& columns, int64_t row, int64_t stop, const Columns<T>& next) {
        const int64_t prefix_length = item_.spans->prefix_length;
        const int64_t keys_ahead = bytes_ahead(columns.keys, next.keys);
        const int64_t values_ahead = bytes_ahead(columns.values, next.values);
        const T *keys = columns.keys, *values = columns.values;
        // Of the first of the rows, if they are one span's.
        const int64_t position = item_.spans[item_.num_spans > 1 ? row / group_ : 0].start + item_.first;
        for (int64_t begin = columns.first; begin < columns.stop; begin += BLOCK) {
            const int64_t count = columns.stop - begin < BLOCK ? columns.stop - begin : BLOCK;
            // No row sees what is farther than the window from the first one.
            const bool hidden = call_.window > 0 && begin >= prefix_length &&
                                begin + count <= position - call_.window + 1;
            if (!hidden) {
                multiply_keys(keys, count, row, stop, keys_ahead);
                for_rows(row, stop, [&](int64_t i, int64_t head, int64_t, int64_t position) {
                    float* scores = scores_ + i * BLOCK;
                    make_scores(call_, scores, head, position, prefix_length, begin, count);
                    soften(scores, padded(count), sums_ + i * sizes_.value, sizes_.value, highest_ + i, total_ + i);
                });
                add_values(values, count, row, stop, values_ahead);
            }
            keys += count * call_.key_dim, values += count * call_.value_dim;
        }
    }

    void store_results() const {
        for_rows(0, count_, [&](int64_t row, int64_t head, int64_t token, int64_t) {
            float scale = 1, sum = total_[row];
            if (call_.sinks) {
                const float sink = call_.sinks[head], top = sink > highest_[row] ? sink : highest_[row];
                scale = std::exp(highest_[row] - top);
                sum = sum * scale + std::exp(sink - top);
            }
            T* out = static_cast<T*>(call_.out) + (token * call_.heads + head) * call_.value_dim;
            const float* sums = sums_ + row * sizes_.value;
            const int64_t dim = call_.value_dim;
            for (int64_t d = 0; d < dim; ++d) from_float(sums[d] * scale / sum, out + d);
        });
    }

  private:
    // Call `work(row, head, token, position)` for rows from a span's, or a token's, first one on: each token has a row
    // for each of the heads that share the KV head.
    template <typename Work>
    void for_rows(int64_t row, int64_t stop, const Work& work) const {
        const bool together = item_.num_spans > 1;
        for (int64_t t = row / group_; row < stop; ++t) {
            const Span& span = item_.spans[together ? t : 0];
            const int64_t index = together ? 0 : item_.first + t;
            for (int64_t h = 0; h < group_; ++h, ++row)
                work(row, item_.kv_head * group_ + h, span.first_token + index, span.start + index);
        }
    }

    uint16_t* narrow(int64_t row) const { return reinterpret_cast<uint16_t*>(queries_) + row * sizes_.key; }

    // A row's sums must not depend on the rows beside it: what is chosen here depends on one span alone.
    void multiply_keys(const T* keys, int64_t count, int64_t row, int64_t stop, int64_t ahead) const {
        const int64_t dim = call_.key_dim, width = sizes_.key;
        if (!few_) {
            for (int64_t j = 0; j < count; ++j)
                for (int64_t d = 0; d < dim; ++d) key_block_[d * BLOCK + j] = to_float(keys[j * dim + d]);
            multiply<false>(queries_ + row * width, width, key_block_, BLOCK, scores_ + row * BLOCK, BLOCK, stop - row,
                            dim, padded(count));
            return;
        }
        const bool whole = dim % LANES == 0;
        if (!whole) widen(keys, count, dim, width, key_block_);
        for (; row < stop; row += FEW_ROWS, ahead = 0) {
            const int64_t rows = stop - row < FEW_ROWS ? stop - row : FEW_ROWS;
            const float* queries = queries_ + row * width;
            float* scores = scores_ + row * BLOCK;
            if (in_pairs_)
                multiply_few(narrow(row), width, reinterpret_cast<const uint16_t*>(keys), dim, count, ahead, scores,
                             rows);
            else if (whole)
                multiply_few(queries, width, keys, dim, count, scores, rows);
            else
                multiply_few(queries, width, key_block_, width, count, scores, rows);
        }
    }

    void add_values(const T* values, int64_t count, int64_t row, int64_t stop, int64_t ahead) const {
        const int64_t dim = call_.value_dim, width = sizes_.value;
        if (few_ && dim % LANES == 0) {
            for (; row < stop; row += FEW_ROWS, ahead = 0) {
                const int64_t rows = stop - row < FEW_ROWS ? stop - row : FEW_ROWS;
                multiply<true>(scores_ + row * BLOCK, BLOCK, values, dim, sums_ + row * width, width, rows, count, dim,
                               ahead);
            }
        } else {
            widen(values, count, dim, width, value_block_);
            multiply<true>(scores_ + row * BLOCK, BLOCK, value_block_, width, sums_ + row * width, width, stop - row,
                           count, width);
        }
    }

    const Call& call_;
    const Sizes& sizes_;
    const Item& item_;
    const int64_t group_, per_span_, count_;
    const bool few_, in_pairs_;
    float *queries_, *sums_, *scores_, *highest_, *total_, *key_block_, *value_block_;
};

template <typename T>
void attend(const Call& call, const Sizes& sizes, const Item& item, const Item& following, float* scratch) {
    Rows<T> rows(call, sizes, item, scratch);
    const Columns<T> prefix = prefix_columns<T>(call, *item.spans, item.kv_head);
    rows.attend(prefix, 0, rows.count(), prefix_columns<T>(call, *following.spans, following.kv_head));
    for (int64_t i = 0; i < item.num_spans; ++i) {
        const Columns<T> own = slot_columns<T>(call, item.spans[i], item.kv_head, item.last);
        const bool last = i + 1 == item.num_spans;
        const Columns<T> next = last ? slot_columns<T>(call, *following.spans, following.kv_head, 0)
                                     : slot_columns<T>(call, item.spans[i + 1], item.kv_head, 0);
        rows.attend(own, i * rows.per_span(), (i + 1) * rows.per_span(), next);
    }
    rows.store_results();
}

// How many spans before `stop`, that one included, are one after the other of one token, with one prefix.
inline int64_t count_alike(const Call& call, int64_t stop) {
    const Span& last = call.spans[stop - 1];
    int64_t first = stop - 1;
    if (last.prefix && last.count == 1)
        while (first > 0 && call.spans[first - 1].prefix == last.prefix && call.spans[first - 1].count == 1) --first;
    return stop - first;
}

// Call `make(item)` for each item: the last tokens of a span first, which take longest.
template <typename Make>
void for_items(const Call& call, const Sizes& sizes, const Make& make) {
    for (int64_t stop = call.num_spans; stop > 0;) {
        const int64_t alike = count_alike(call, stop);
        if (alike > 1) {
            // Items of about one size, enough for all threads.
            int64_t parts = (alike + sizes.tokens - 1) / sizes.tokens;
            const int64_t wanted = (2 * call.threads + call.kv_heads - 1) / call.kv_heads;
            if (call.threads > 1 && parts < wanted) parts = wanted < alike ? wanted : alike;
            for (int64_t head = 0; head < call.kv_heads; ++head)
                for (int64_t part = 0; part < parts; ++part) {
                    const int64_t first = alike * part / parts, next = alike * (part + 1) / parts;
                    make(Item{call.spans + stop - alike + first, next - first, head, 0, 1});
                }
        } else {
            const Span& span = call.spans[stop - 1];
            for (int64_t last = span.count; last > 0; last -= sizes.tokens)
                for (int64_t head = 0; head < call.kv_heads; ++head)
                    make(Item{&span, 1, head, last > sizes.tokens ? last - sizes.tokens : 0, last});
        }
        stop -= alike;
    }
}

// How many items a call's attention consists of.
inline int64_t count_items(const Call& call, const Sizes& sizes) {
    int64_t count = 0;
    for_items(call, sizes, [&](const Item&) { ++count; });
    return count;
}

inline void make_items(const Call& call, const Sizes& sizes, Item* items) {
    for_items(call, sizes, [&](const Item& item) { *items++ = item; });
}

}  // namespace attention
