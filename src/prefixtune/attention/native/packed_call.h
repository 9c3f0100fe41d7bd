// What `packed.py` and `plan.py` say of a packed row.
#pragma once

#include <algorithm>
#include <cstdint>

#include "products.h"

struct Group {
    int64_t first_key, shared;  // Keys that all segments see: of the source.
    int64_t first_segment, num_segments;
    int64_t first_hidden, num_hidden;  // Positions of the prefix.
};

struct Segment {
    int64_t first_query, count;
    int64_t first_key, own;     // Keys that it alone sees; 0: its keys are shared ones.
    int64_t position;           // Of its first query in the text; -1: queries see all.
    int64_t hides_prefix;
};

struct Prefix {
    const float *key, *value;
    float *key_gradient, *value_gradient;  // (H, P, D), contiguous and zero.
    int64_t length, key_strides[2], value_strides[2];  // Of head and position, as are all strides.
};

struct Call {
    const void *query, *key, *value, *out_gradient;
    void *out, *query_gradient, *key_gradient, *value_gradient;  // (T, heads, D), contiguous.
    float* log_sums;                                             // (heads, T)
    const Group* groups;
    const Segment* segments;
    const Prefix* prefixes;
    const int64_t *prefix_of_group, *hidden;  // -1: no prefix.
    int64_t query_strides[2], key_strides[2], value_strides[2], out_gradient_strides[2];
    int64_t tokens, num_groups, num_prefixes, heads, kv_heads, key_dim, value_dim, window, threads;
    float scale;
};
