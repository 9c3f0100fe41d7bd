// A few rows or many, times matrices in bfloat16 or int8, by the processor's products of pairs of bfloat16.
//
// A matrix (outer, inner) lies in panels of 16 of its rows: for each pair of numbers k, k + 1, the pairs of the 16
// rows. So a panel is read in order, and a vector of it is multiplied with a pair of each input row. Sums are float32;
// a row's result does not depend on the rows beside it. Panels of int8 lie in the same order; they are widened, which is
// exact, once for all input rows.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#include "vectors.h"

#if !defined(__AVX512BF16__) || !defined(__AVX512BW__) || !defined(__AVX512VL__)
#error the processor has no products of bfloat16
#endif

constexpr int64_t PANEL = 16;

struct Matrix {
    const void* panels;    // of bfloat16, or of int8 with scales
    const float* scales;   // (outer), or null
    const uint16_t* bias;  // (outer), or null
    int64_t outer, inner;

    int64_t bytes_of_panel() const { return PANEL * inner * (scales ? 1 : 2); }
    const char* panel(int64_t index) const { return static_cast<const char*>(panels) + index * bytes_of_panel(); }
};

// What becomes of a product, once rounded.
enum class Finish {
    STORE,
    ADD,   // It is added to what is there.
    GATE,  // Of two matrices: silu of the first one's, times the second one's.
};

// A product's matrix, and where its result goes; with `GATE`, the first part's is used.
struct Part {
    Matrix matrix;
    uint16_t* out;
    int64_t stride;  // of a row of `out`
};

// Two panels that are read at once.
struct PanelPair {
    const char* first[2];
};

inline PanelPair pair_of(const Matrix& matrix) { return {{matrix.panel(0), matrix.panel(1)}}; }

namespace panels {

constexpr int64_t MOST_ROWS = 14;  // Input rows at once: with two panels, as many sums as registers hold.
constexpr int64_t MANY_ROWS = 64;  // From here on, input rows are read once for several panels.
constexpr int64_t NEAR_BYTES = 1 << 19;  // Of these panels.
constexpr int64_t LINE = PANEL * 4;      // Bytes of a panel for a pair of numbers.
constexpr int64_t CHUNKS = 4;  // Of the work, for each thread: one that is delayed leaves some to others.

// The panels that are multiplied at once, and those that come after them.
struct Columns {
    const char *panels[2], *next[2];
    const float* scales[2];
    const uint16_t* biases[2];
    int64_t count;        // of panels: 1 or 2
    uint16_t* out;        // of the first row
    int64_t stride, left; // left: columns of `out`
};

inline __mmask16 first_lanes(int64_t count) {
    return count >= PANEL ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
}

inline __m512 widen(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline __m512 rounded(__m512 numbers) { return widen((__m256i)_mm512_cvtneps_pbh(numbers)); }

inline __m512 silu(__m512 x) {
    const Floats size = reinterpret_cast<const Floats&>(x) < 0.0f ? reinterpret_cast<const Floats&>(x)
                                                                  : -reinterpret_cast<const Floats&>(x);
    const Floats power = exponential(size);
    const Floats share = (reinterpret_cast<const Floats&>(x) < 0.0f ? power : Floats{} + 1.0f) / (power + 1.0f);
    return _mm512_mul_ps(x, reinterpret_cast<const __m512&>(share));
}

// `sums` += two numbers of an input row times those of the panels.
template <int C>
inline __attribute__((always_inline)) void multiply_pair(const char* numbers, const __m512bh (&panels)[C],
                                                         __m512 (&sums)[C]) {
    int32_t bits;
    std::memcpy(&bits, numbers, sizeof bits);
    const __m512bh pair = (__m512bh)_mm512_set1_epi32(bits);
    for (int c = 0; c < C; ++c) sums[c] = _mm512_dpbf16_ps(sums[c], panels[c], pair);
}

// Int8 as bfloat16, in the same order; exact.
inline void widen_panel(const char* panel, int64_t count, uint16_t* to) {
    for (int64_t i = 0; i < count; i += 32) {
        __m512 halves[2];
        for (int64_t half = 0; half < 2; ++half) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(panel + i + half * 16));
            halves[half] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
        }
        _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(halves[1], halves[0]));
    }
}

// `R` input rows times `C` panels. Meanwhile, a share of what is read next comes from memory.
template <int R, int C, Finish F>
void multiply_tile(const uint16_t* inputs, int64_t inner, const Columns& columns, int64_t row, int64_t turn,
                   int64_t tiles) {
    const char *panels[C], *next[C];
    for (int c = 0; c < C; ++c) panels[c] = columns.panels[c], next[c] = columns.next[c];
    // Pointers to every third row: the processor's addresses have room for a stride, and its registers not for pointers
    // to all rows.
    const int64_t stride = inner * 2;
    const char* rows0 = reinterpret_cast<const char*>(inputs + row * inner);
    const char *rows3 = rows0 + 3 * stride, *rows6 = rows3 + 3 * stride, *rows9 = rows6 + 3 * stride,
               *rows12 = rows9 + 3 * stride;
    __m512 sums[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sums[r][c] = _mm512_setzero_ps();
    for (int64_t k = 0; k < inner / 2; ++k) {
        if (turn-- == 0) {
            turn = tiles - 1;
            for (int c = 0; c < C; ++c) _mm_prefetch(next[c] + k * LINE, _MM_HINT_T1);
        }
        __m512bh numbers[C];
        for (int c = 0; c < C; ++c) numbers[c] = (__m512bh)_mm512_loadu_si512(panels[c] + k * LINE);
#define ROW(r, pointer) \
    if constexpr (R > r) multiply_pair<C>(pointer + r % 3 * stride, numbers, sums[r])
        ROW(0, rows0);
        ROW(1, rows0);
        ROW(2, rows0);
        ROW(3, rows3);
        ROW(4, rows3);
        ROW(5, rows3);
        ROW(6, rows6);
        ROW(7, rows6);
        ROW(8, rows6);
        ROW(9, rows9);
        ROW(10, rows9);
        ROW(11, rows9);
        ROW(12, rows12);
        ROW(13, rows12);
#undef ROW
        rows0 += 4, rows3 += 4, rows6 += 4, rows9 += 4, rows12 += 4;
        asm("" : "+r"(rows0), "+r"(rows3), "+r"(rows6), "+r"(rows9), "+r"(rows12));
    }
    for (int c = 0; c < C; ++c) {
        const __mmask16 mask = first_lanes(columns.left - (F == Finish::GATE ? 0 : c * PANEL));
        if (columns.scales[c]) {
            const __m512 scale = _mm512_maskz_loadu_ps(mask, columns.scales[c]);
            for (int r = 0; r < R; ++r) sums[r][c] = _mm512_mul_ps(sums[r][c], scale);
        }
        if (!columns.biases[c]) continue;
        const __m512 bias = widen(_mm256_maskz_loadu_epi16(mask, columns.biases[c]));
        for (int r = 0; r < R; ++r) sums[r][c] = _mm512_add_ps(sums[r][c], bias);
    }
    for (int c = 0; c < (F == Finish::GATE ? 1 : C); ++c) {
        const __mmask16 mask = first_lanes(columns.left - c * PANEL);
        for (int r = 0; r < R; ++r) {
            uint16_t* out = columns.out + (row + r) * columns.stride + c * PANEL;
            __m512 result = sums[r][c];
            if constexpr (F == Finish::ADD)
                result = _mm512_add_ps(rounded(result), widen(_mm256_maskz_loadu_epi16(mask, out)));
            if constexpr (F == Finish::GATE)
                result = _mm512_mul_ps(rounded(silu(rounded(result))), rounded(sums[r][C - 1]));
            _mm256_mask_storeu_epi16(out, mask, (__m256i)_mm512_cvtneps_pbh(result));
        }
    }
}

template <int C, Finish F>
void multiply_rows(const uint16_t* inputs, int64_t inner, const Columns& columns, int64_t row, int64_t count,
                   int64_t turn, int64_t tiles) {
#define ROWS_CASE(R) \
    case R: return multiply_tile<R, C, F>(inputs, inner, columns, row, turn, tiles);
    switch (count) {
        ROWS_CASE(1) ROWS_CASE(2) ROWS_CASE(3) ROWS_CASE(4) ROWS_CASE(5) ROWS_CASE(6) ROWS_CASE(7)
        ROWS_CASE(8) ROWS_CASE(9) ROWS_CASE(10) ROWS_CASE(11) ROWS_CASE(12) ROWS_CASE(13)
        default: return multiply_tile<14, C, F>(inputs, inner, columns, row, turn, tiles);
    }
#undef ROWS_CASE
}

template <Finish F>
int64_t groups_of(const Part& part) {
    const int64_t width = F == Finish::GATE ? PANEL : 2 * PANEL;
    return (part.matrix.outer + width - 1) / width;
}

// The columns of a group of panels, counted through all parts.
template <Finish F, int N>
Columns columns_of(const Part (&parts)[N], int64_t group) {
    Columns columns;
    if constexpr (F == Finish::GATE) {
        for (int c = 0; c < 2; ++c) {
            const Matrix& matrix = parts[c].matrix;
            columns.panels[c] = matrix.panel(group);
            columns.scales[c] = matrix.scales ? matrix.scales + group * PANEL : nullptr;
            columns.biases[c] = matrix.bias ? matrix.bias + group * PANEL : nullptr;
        }
        columns.count = 2;
        columns.out = parts[0].out + group * PANEL;
        columns.stride = parts[0].stride;
        columns.left = parts[0].matrix.outer - group * PANEL;
        return columns;
    }
    int part = 0;
    while (part < N - 1 && group >= groups_of<F>(parts[part])) group -= groups_of<F>(parts[part++]);
    const Matrix& matrix = parts[part].matrix;
    const int64_t first = group * 2 * PANEL;
    for (int c = 0; c < 2; ++c) {
        columns.panels[c] = matrix.panel(2 * group + c);
        columns.scales[c] = matrix.scales ? matrix.scales + first + c * PANEL : nullptr;
        columns.biases[c] = matrix.bias ? matrix.bias + first + c * PANEL : nullptr;
    }
    columns.out = parts[part].out + first;
    columns.stride = parts[part].stride;
    columns.left = matrix.outer - first;
    columns.count = columns.left > PANEL ? 2 : 1;
    return columns;
}

}  // namespace panels

// One product of `rows` input rows with the matrices of all parts, by all threads of a team, each of which calls this
// with the same arguments but for `wide`. `done` counts what is done, from 0. `after` is read after it: its first panels
// come from memory meanwhile. `wide` has room for two panels of bfloat16, if a matrix is of int8.
template <Finish F, int N>
void multiply_panels(const uint16_t* inputs, int64_t rows, const Part (&parts)[N], std::atomic<int64_t>& done,
                     int64_t threads, const PanelPair& after, uint16_t* wide) {
    using namespace panels;
    const int64_t tiles = (rows + MOST_ROWS - 1) / MOST_ROWS, tile = (rows + tiles - 1) / tiles;
    const int64_t inner = parts[0].matrix.inner;
    int64_t groups = 0;
    for (int i = 0; i < (F == Finish::GATE ? 1 : N); ++i) groups += groups_of<F>(parts[i]);
    int64_t chunks = threads > 1 ? threads * CHUNKS : 1;
    // Those of int8 are widened once.
    const bool by_group = rows < MANY_ROWS || parts[0].matrix.scales;
    if (!by_group) {
        const int64_t bytes = groups * 2 * PANEL * inner * 2, per_thread = threads * NEAR_BYTES;
        const int64_t least = (bytes + per_thread - 1) / per_thread * threads;
        if (chunks < least) chunks = least;
    }
    if (chunks > groups) chunks = groups;
    const auto multiply = [&](int64_t group, int64_t first_tile, int64_t last_tile) {
        Columns columns = columns_of<F>(parts, group);
        for (int c = 0; c < 2; ++c) columns.next[c] = after.first[c];
        if (group + 1 < groups) {
            const Columns next = columns_of<F>(parts, group + 1);
            for (int c = 0; c < 2; ++c) columns.next[c] = next.panels[c];
        }
        if (columns.scales[0])
            for (int64_t c = 0; c < columns.count; ++c) {
                uint16_t* to = wide + c * PANEL * inner;
                widen_panel(columns.panels[c], PANEL * inner, to);
                columns.panels[c] = reinterpret_cast<const char*>(to);
            }
        for (int64_t t = first_tile; t < last_tile; ++t) {
            const int64_t row = t * tile, count = tile < rows - row ? tile : rows - row;
            if (columns.count == 2)
                multiply_rows<2, F>(inputs, inner, columns, row, count, t, tiles);
            else if constexpr (F != Finish::GATE)
                multiply_rows<1, F>(inputs, inner, columns, row, count, t, tiles);
        }
    };
    for (int64_t i; (i = done.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
        const int64_t begin = groups * i / chunks, end = groups * (i + 1) / chunks;
        if (by_group)
            for (int64_t group = begin; group < end; ++group) multiply(group, 0, tiles);
        else
            for (int64_t t = 0; t < tiles; ++t)
                for (int64_t group = begin; group < end; ++group) multiply(group, t, t + 1);
    }
}
