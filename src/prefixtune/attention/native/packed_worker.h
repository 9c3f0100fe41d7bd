// Attention of one KV head of a group, and its gradients: what one thread computes of a packed row.
//
// A segment (a source, or one of its targets) is a text of its own: its queries see the prefix, the source that it
// follows, and itself. Keys and values of prefix and source are laid out once, each target's behind them in turn, so that
// every segment's columns are in a row; the query heads that share the KV head are rows of the same products. All columns
// of some rows' scores are kept at once; the gradients compute them again.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "layouts.h"
#include "packed_call.h"

constexpr int64_t PANEL = MOST_VECTORS * LANES;  // Columns that a product takes at once.
constexpr int64_t SCORES = 1 << 15, FEWEST_ROWS = 24, MOST_TILE_ROWS = 96;

// What is laid out for an item of work, and for rows of its queries.
struct Sizes {
    int64_t group, key, value, columns, rows, scores;

    Sizes(const Call& call) : group(call.heads / call.kv_heads), key(padded(call.key_dim)), value(padded(call.value_dim)) {
        int64_t most = 1;
        for (int64_t g = 0; g < call.num_groups; ++g) {
            const Group& own = call.groups[g];
            for (int64_t s = 0; s < own.num_segments; ++s)
                most = std::max(most, length(call, g) + own.shared + call.segments[own.first_segment + s].own);
        }
        columns = up(most, PANEL);
        rows = up(std::max(MOST_TILE_ROWS, group), 2);
        scores = std::max(SCORES + 2 * step(most), (std::max(FEWEST_ROWS, group) + 2) * step(most));
    }

    static int64_t length(const Call& call, int64_t group) {
        const int64_t prefix = call.prefix_of_group[group];
        return prefix < 0 ? 0 : call.prefixes[prefix].length;
    }

    // Distance of rows of scores: of an odd number of vectors, so that a column's words are in different cache sets.
    static int64_t step(int64_t columns) { return padded(columns) / LANES % 2 ? padded(columns) : padded(columns) + LANES; }

    // How many positions are computed at once.
    int64_t positions(int64_t columns) const {
        const int64_t fitting = std::max(FEWEST_ROWS, std::min(SCORES / step(columns), MOST_TILE_ROWS));
        return std::max<int64_t>(1, fitting / group);
    }

    int64_t floats(bool backward) const {
        const int64_t dims = key + value, widest = std::max(key, value);
        const int64_t forward = columns * dims + rows * (key + widest + 1) + scores + widest + 8 * LANES;
        return forward + (backward ? columns * (key + dims) + rows * (dims + value) + scores + 8 * LANES : 0);
    }
};

template <typename T, class M>
class Worker {
    typedef typename M::Word Word;
    typedef Layout<M> Put;

  public:
    Worker(const Call& call, const Sizes& sizes, float* scratch, bool backward) : call(call), sizes(sizes), next(scratch) {
        key_columns = words(sizes.columns * sizes.key);
        value_rows = words(sizes.columns * sizes.value);
        query_rows = words(sizes.rows * sizes.key);
        scores = floats(sizes.scores);
        out = floats(sizes.rows * std::max(sizes.value, sizes.key));
        factors = floats(sizes.rows);
        row = floats(std::max(sizes.key, sizes.value));
        if (!backward) return;
        key_rows = words(sizes.columns * sizes.key);
        value_columns = value_rows;
        out_rows = words(sizes.rows * sizes.value);
        query_beside = words(sizes.rows * sizes.key);
        out_beside = words(sizes.rows * sizes.value);
        weight_gradients = floats(sizes.scores);
        key_sums = floats(sizes.columns * sizes.key);
        value_sums = floats(sizes.columns * sizes.value);
    }

    // Part `part` of `parts` of a group's queries.
    void attend(int64_t group, int64_t head, int64_t part, int64_t parts) {
        begin(group, head);
        load_prefix([&](int64_t column) { put_key(column); }, [&](int64_t column) { put_value(column); });
        int64_t tile = 0;
        for (int64_t s = 0; s < own->num_segments; ++s) {
            bool loaded = false;
            for_tiles(s, [&](int64_t first, int64_t count) {
                if (tile++ % parts != part) return;
                if (!loaded) load_own([&](int64_t column) { put_key(column); }, [&](int64_t column) { put_value(column); });
                loaded = true;
                attend_tile(first, count);
            });
        }
    }

    // Gradients of a group; those of its prefix go to (P, D) arrays.
    void differentiate(int64_t group, int64_t head, float* prefix_keys, float* prefix_values) {
        begin(group, head);
        const auto put_both = [&](int64_t column) {
            put_key(column);
            Put::put_beside(row, sizes.key, column, key_rows);
        };
        const auto put_value_column = [&](int64_t column) {
            Put::put_column(row, sizes.value, PANEL, panel(value_columns, column, sizes.value));
        };
        load_prefix(put_both, put_value_column);
        const int64_t common = length + own->shared;
        clear(0, common);
        for (int64_t s = 0; s < own->num_segments; ++s) {
            const Segment& part = call.segments[own->first_segment + s];
            bool loaded = false;
            for_tiles(s, [&](int64_t first, int64_t count) {
                if (!loaded) {
                    load_own(put_both, put_value_column);
                    clear(common, common + part.own);
                }
                loaded = true;
                differentiate_tile(first, count);
            });
            if (loaded) write_sums(common, part.first_key, part.own);
        }
        write_sums(length, own->first_key, own->shared);
        for (int64_t p = 0; p < length; ++p) {
            narrow(key_sums + p * sizes.key, call.key_dim, 1.0f, prefix_keys + p * call.key_dim);
            narrow(value_sums + p * sizes.value, call.value_dim, 1.0f, prefix_values + p * call.value_dim);
        }
    }

  private:
    const Call& call;
    const Sizes& sizes;
    float* next;
    // Keys and values as what queries and gradients of the output are multiplied with, and what weights are multiplied with.
    Word *key_columns, *value_rows, *key_rows = nullptr, *value_columns = nullptr;
    Word *query_rows, *out_rows = nullptr, *query_beside = nullptr, *out_beside = nullptr;
    float *scores, *out, *factors, *row, *weight_gradients = nullptr, *key_sums = nullptr, *value_sums = nullptr;
    // The group at hand, its prefix's length, and the segment at hand.
    const Group* own = nullptr;
    const Prefix* prefix = nullptr;
    const Segment* segment = nullptr;
    int64_t kv_head = 0, length = 0, total = 0, step = 0;
    // Of a tile: how many columns its first position sees, and the position in the text.
    int64_t first_visible = 0, text_position = 0;

    float* floats(int64_t count) {
        float* result = next;
        next += padded(count);
        return result;
    }
    Word* words(int64_t numbers) { return reinterpret_cast<Word*>(floats(numbers / M::NUMBERS)); }

    static Word* panel(Word* columns, int64_t column, int64_t width) {
        return columns + column / PANEL * (width / M::NUMBERS * PANEL) + column % PANEL;
    }
    void put_key(int64_t column) { Put::put_column(row, sizes.key, PANEL, panel(key_columns, column, sizes.key)); }
    void put_value(int64_t column) { Put::put_beside(row, sizes.value, column, value_rows); }

    void begin(int64_t group, int64_t head) {
        own = call.groups + group;
        const int64_t index = call.prefix_of_group[group];
        prefix = index < 0 ? nullptr : call.prefixes + index;
        length = Sizes::length(call, group);
        kv_head = head;
    }

    template <class PutKey, class PutValue>
    void load_prefix(const PutKey& put_key, const PutValue& put_value) {
        for (int64_t p = 0; p < length; ++p) {
            widen(prefix->key + kv_head * prefix->key_strides[0] + p * prefix->key_strides[1], call.key_dim, row);
            put_key(p);
            widen(prefix->value + kv_head * prefix->value_strides[0] + p * prefix->value_strides[1], call.value_dim, row);
            put_value(p);
        }
        load_text(length, own->first_key, own->shared, put_key, put_value);
    }

    template <class PutKey, class PutValue>
    void load_own(const PutKey& put_key, const PutValue& put_value) {
        load_text(length + own->shared, segment->first_key, segment->own, put_key, put_value);
    }

    template <class PutKey, class PutValue>
    void load_text(int64_t column, int64_t first, int64_t count, const PutKey& put_key, const PutValue& put_value) {
        for (int64_t i = 0; i < count; ++i) {
            widen(at(call.key, call.key_strides, kv_head, first + i), call.key_dim, row);
            put_key(column + i);
            widen(at(call.value, call.value_strides, kv_head, first + i), call.value_dim, row);
            put_value(column + i);
        }
    }

    static const T* at(const void* data, const int64_t* strides, int64_t head, int64_t token) {
        return static_cast<const T*>(data) + head * strides[0] + token * strides[1];
    }

    // A segment's queries, some positions at a time.
    template <class Function>
    void for_tiles(int64_t index, const Function& function) {
        segment = call.segments + own->first_segment + index;
        total = length + own->shared + segment->own;
        step = Sizes::step(total);
        const int64_t positions = sizes.positions(total);
        for (int64_t first = 0; first < segment->count; first += positions) {
            text_position = segment->position + first;
            first_visible = segment->position < 0 ? total : length + text_position + 1;
            function(segment->first_query + first, std::min(positions, segment->count - first));
        }
    }

    bool causal() const { return segment->position >= 0; }
    int64_t visible(int64_t row) const { return causal() ? std::min(total, first_visible + row / sizes.group) : total; }
    // Columns of a row that products may read: what follows the visible ones is to be zero.
    int64_t end(int64_t row) const { return std::min(padded(total), padded(visible(row) + MOST_ROWS)); }
    int64_t head(int64_t row) const { return kv_head * sizes.group + row % sizes.group; }

    // Products of rows with the columns that they see.
    void multiply_columns(const Word* rows_at, const Word* columns, int64_t width, int64_t rows, float* to) {
        const int64_t steps = width / M::NUMBERS, most = visible(rows - 1);
        for (int64_t column = 0; column < most; column += PANEL)
            for (int64_t first = 0; first < rows; first += MOST_ROWS) {
                const int64_t count = std::min(MOST_ROWS, rows - first);
                const int64_t rest = std::min(PANEL, padded(visible(first + count - 1)) - column);
                if (rest <= 0) continue;
                multiply<M, false>(count, rest, steps, rows_at + first * steps, steps, 1, columns + column * steps, PANEL,
                                   to + first * step + column, step);
            }
    }

    // Products of rows of weights with the rows of keys or values.
    void multiply_weights(const float* weights, const Word* matrix, int64_t width, int64_t rows) {
        for (int64_t first = 0; first < rows; first += MOST_ROWS) {
            const int64_t count = std::min(MOST_ROWS, rows - first);
            const int64_t steps = (visible(first + count - 1) + M::NUMBERS - 1) / M::NUMBERS;
            const Word* own_weights = reinterpret_cast<const Word*>(weights + first * step);
            multiply<M, false>(count, width, steps, own_weights, step, 1, matrix, width, out + first * width, width);
        }
    }

    // Add products of columns of weights with rows of queries, or of gradients.
    void add_products(const Word* transposed, const Word* matrix, int64_t width, int64_t rows, float* sums) {
        const int64_t most = visible(rows - 1), steps = (rows + M::NUMBERS - 1) / M::NUMBERS;
        for (int64_t column = 0; column < most; column += MOST_ROWS) {
            const int64_t hidden = causal() ? std::max<int64_t>(0, column - first_visible + 1) * sizes.group : 0;
            const int64_t skipped = hidden / M::NUMBERS, count = std::min(MOST_ROWS, most - column);
            multiply<M, true>(count, width, steps - skipped, transposed + skipped * M::NUMBERS * step + column, 1,
                              M::NUMBERS * step, matrix + skipped * width, width, sums + column * width, width);
        }
    }

    static void fill(float* from, int64_t first, int64_t stop, float value) {
        if (stop > first) std::fill(from + first, from + stop, value);
    }

    void mask(float* own_scores, int64_t row, int64_t stop) const {
        fill(own_scores, visible(row), stop, -INFINITY);
        if (segment->hides_prefix) fill(own_scores, 0, length, -INFINITY);
        for (int64_t i = 0; i < own->num_hidden; ++i) {
            const int64_t position = call.hidden[own->first_hidden + i];
            if (position < length) own_scores[position] = -INFINITY;
        }
        if (causal() && call.window > 0) {
            const int64_t outside = text_position + row / sizes.group - call.window + 1;
            fill(own_scores, length, length + outside, -INFINITY);
        }
    }

    void attend_tile(int64_t first, int64_t positions) {
        const int64_t rows = positions * sizes.group, query_words = sizes.key / M::NUMBERS;
        for (int64_t r = 0; r < rows; ++r) {
            widen(at(call.query, call.query_strides, head(r), first + r / sizes.group), call.key_dim, row);
            Put::put_row(row, sizes.key, query_rows + r * query_words);
        }
        multiply_columns(query_rows, key_columns, sizes.key, rows, scores);
        for (int64_t r = 0; r < rows; ++r) {
            float* own_scores = scores + r * step;
            const int64_t stop = end(r);
            mask(own_scores, r, stop);
            Floats highest = load(own_scores);
            for (int64_t i = LANES; i < stop; i += LANES) {
                const Floats x = load(own_scores + i);
                highest = x > highest ? x : highest;
            }
            const float top = max_of(highest), shift = top == -INFINITY ? 0 : top;
            Floats sums = {};
            for (int64_t i = 0; i < stop; i += LANES) {
                const Floats weight = exponential((load(own_scores + i) - shift) * call.scale);
                sums += weight;
                store(own_scores + i, weight);
            }
            const float sum = sum_of(sums);
            factors[r] = 1 / sum;
            if (call.log_sums)
                call.log_sums[head(r) * call.tokens + first + r / sizes.group] = shift * call.scale + std::log(sum);
            Put::put_row(own_scores, stop, reinterpret_cast<Word*>(own_scores));
        }
        multiply_weights(scores, value_rows, sizes.value, rows);
        for (int64_t r = 0; r < rows; ++r) {
            T* to = static_cast<T*>(call.out) + ((first + r / sizes.group) * call.heads + head(r)) * call.value_dim;
            narrow(out + r * sizes.value, call.value_dim, factors[r], to);
        }
    }

    void differentiate_tile(int64_t first, int64_t positions) {
        const int64_t rows = positions * sizes.group;
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t token = first + r / sizes.group;
            widen(at(call.query, call.query_strides, head(r), token), call.key_dim, row);
            Put::put_row(row, sizes.key, query_rows + r * (sizes.key / M::NUMBERS));
            Put::put_beside(row, sizes.key, r, query_beside);
            widen(at(call.out_gradient, call.out_gradient_strides, head(r), token), call.value_dim, row);
            Put::put_row(row, sizes.value, out_rows + r * (sizes.value / M::NUMBERS));
            Put::put_beside(row, sizes.value, r, out_beside);
        }
        multiply_columns(query_rows, key_columns, sizes.key, rows, scores);
        multiply_columns(out_rows, value_columns, sizes.value, rows, weight_gradients);
        for (int64_t r = 0; r < rows; r += 2) make_gradients(r, rows, first);
        multiply_weights(weight_gradients, key_rows, sizes.key, rows);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t token = first + r / sizes.group;
            narrow(out + r * sizes.key, call.key_dim, 1.0f,
                   static_cast<T*>(call.query_gradient) + (token * call.heads + head(r)) * call.key_dim);
        }
        add_products(Put::transposed_gradients(scores, weight_gradients, step), query_beside, sizes.key, rows, key_sums);
        add_products(Put::transposed_weights(scores, weight_gradients, step), out_beside, sizes.value, rows, value_sums);
    }

    // Weights and gradients by scores of two rows; a second that is not there is zero.
    void make_gradients(int64_t r, int64_t rows, int64_t first) {
        const int64_t stop = end(std::min(r + 1, rows - 1));
        float delta[2] = {};
        for (int64_t i = 0; i < 2; ++i) {
            float *weights = scores + (r + i) * step, *gradients = weight_gradients + (r + i) * step;
            if (r + i == rows) {
                fill(weights, 0, stop, 0);
                fill(gradients, 0, stop, 0);
                continue;
            }
            mask(weights, r + i, stop);
            fill(gradients, visible(r + i), stop, 0);
            const float log_sum = call.log_sums[head(r + i) * call.tokens + first + (r + i) / sizes.group];
            Floats sums = {};
            for (int64_t j = 0; j < stop; j += LANES) {
                const Floats weight = exponential(load(weights + j) * call.scale - log_sum);
                sums += weight * load(gradients + j);
                store(weights + j, weight);
            }
            delta[i] = sum_of(sums);
        }
        Put::make_gradients(scores + r * step, weight_gradients + r * step, step, delta, call.scale, stop);
    }

    void clear(int64_t column, int64_t stop) {
        fill(key_sums, column * sizes.key, stop * sizes.key, 0);
        fill(value_sums, column * sizes.value, stop * sizes.value, 0);
    }

    void write_sums(int64_t column, int64_t first, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t place = (first + i) * call.kv_heads + kv_head;
            narrow(key_sums + (column + i) * sizes.key, call.key_dim, 1.0f,
                   static_cast<T*>(call.key_gradient) + place * call.key_dim);
            narrow(value_sums + (column + i) * sizes.value, call.value_dim, 1.0f,
                   static_cast<T*>(call.value_gradient) + place * call.value_dim);
        }
    }
};
