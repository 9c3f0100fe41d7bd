// A few rows times a matrix in bfloat16, by the processor's products of pairs of bfloat16. See `panels.py`.
//
// The matrix (N, K) lies in panels of 16 of its rows: for each pair of numbers k, k + 1, the pairs of the 16 rows. So a
// panel is read in order, and a vector of it is multiplied with a pair of each input row. Sums are float32.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "threads.h"

#if !defined(__AVX512BF16__) || !defined(__AVX512BW__) || !defined(__AVX512VL__)
#error the processor has no products of bfloat16
#endif

namespace {

constexpr int64_t WIDTH = 16;
constexpr int64_t TWICE = 2;       // Panels at once.
constexpr int64_t MOST_ROWS = 14;  // Input rows at once: with two panels, as many sums as registers hold.
constexpr int64_t MANY_ROWS = 64;  // From here on, input rows are read once for several panels.
constexpr int64_t NEAR_BYTES = 1 << 17;  // Of the panels.
constexpr int64_t SERIAL_WORK = 1 << 16;  // Numbers of a matrix below which more threads do not pay.
constexpr int64_t PARTS = 4;              // Of the work, for each thread: one that is delayed leaves some to others.

struct Product {
    const uint16_t *inputs, *panels, *bias;  // (rows, inner); the matrix; (outer), or null
    uint16_t* out;                           // (rows, outer)
    int64_t rows, outer, inner, threads;
};

// `R` input rows times `C` panels. Meanwhile, a share of what is read next comes from memory.
template <int R, int C>
void multiply_tile(const Product& product, int64_t row, int64_t column, const uint16_t* panel, int64_t turn,
                   int64_t tiles) {
    const int64_t pairs = product.inner / 2;
    const uint16_t* inputs = product.inputs + row * product.inner;
    const uint16_t* next = panel + C * pairs * 2 * WIDTH;
    __m512 sums[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sums[r][c] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; ++k) {
        __m512bh numbers[C];
        if (turn-- == 0) {
            turn = tiles - 1;
            for (int c = 0; c < C; ++c)
                _mm_prefetch(reinterpret_cast<const char*>(next + (c * pairs + k) * 2 * WIDTH), _MM_HINT_T1);
        }
        for (int c = 0; c < C; ++c)
            numbers[c] = (__m512bh)_mm512_loadu_si512(panel + (c * pairs + k) * 2 * WIDTH);
        for (int r = 0; r < R; ++r) {
            int32_t bits;
            std::memcpy(&bits, inputs + r * product.inner + 2 * k, sizeof bits);
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(bits);
            for (int c = 0; c < C; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], numbers[c], pair);
        }
    }
    for (int c = 0; c < C; ++c) {
        const int64_t first = column + c * WIDTH, left = product.outer - first;
        const __mmask16 mask = left >= WIDTH ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
        __m512 bias = _mm512_setzero_ps();
        if (product.bias) {
            const __m256i halves = _mm256_maskz_loadu_epi16(mask, product.bias + first);
            bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
        }
        for (int r = 0; r < R; ++r) {
            const __m256i halves = (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(sums[r][c], bias));
            _mm256_mask_storeu_epi16(product.out + (row + r) * product.outer + first, mask, halves);
        }
    }
}

template <int C>
void multiply_rows(const Product& product, int64_t row, int64_t count, int64_t column, const uint16_t* panel,
                   int64_t turn, int64_t tiles) {
    switch (count) {
        case 1: return multiply_tile<1, C>(product, row, column, panel, turn, tiles);
        case 2: return multiply_tile<2, C>(product, row, column, panel, turn, tiles);
        case 3: return multiply_tile<3, C>(product, row, column, panel, turn, tiles);
        case 4: return multiply_tile<4, C>(product, row, column, panel, turn, tiles);
        case 5: return multiply_tile<5, C>(product, row, column, panel, turn, tiles);
        case 6: return multiply_tile<6, C>(product, row, column, panel, turn, tiles);
        case 7: return multiply_tile<7, C>(product, row, column, panel, turn, tiles);
        case 8: return multiply_tile<8, C>(product, row, column, panel, turn, tiles);
        case 9: return multiply_tile<9, C>(product, row, column, panel, turn, tiles);
        case 10: return multiply_tile<10, C>(product, row, column, panel, turn, tiles);
        case 11: return multiply_tile<11, C>(product, row, column, panel, turn, tiles);
        case 12: return multiply_tile<12, C>(product, row, column, panel, turn, tiles);
        case 13: return multiply_tile<13, C>(product, row, column, panel, turn, tiles);
        default: return multiply_tile<14, C>(product, row, column, panel, turn, tiles);
    }
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

// `to` has room for the matrix with its rows filled up to whole panels; its strides are in numbers.
extern "C" void panels_pack(const uint16_t* matrix, int64_t outer_stride, int64_t inner_stride, int64_t outer,
                            int64_t inner, int64_t threads, uint16_t* to) {
    parallel_for(threads, (outer + WIDTH - 1) / WIDTH, [=](int64_t panel) {
        const int64_t first = panel * WIDTH;
        uint16_t* next = to + first * inner;
        for (int64_t k = 0; k < inner; k += 2)
            for (int64_t n = first; n < first + WIDTH; ++n, next += 2) {
                next[0] = n < outer ? matrix[n * outer_stride + k * inner_stride] : 0;
                next[1] = n < outer ? matrix[n * outer_stride + (k + 1) * inner_stride] : 0;
            }
    });
}

extern "C" void panels_multiply(const Product* call) {
    const Product& product = *call;
    const int64_t tiles = (product.rows + MOST_ROWS - 1) / MOST_ROWS, tile = (product.rows + tiles - 1) / tiles;
    const int64_t width = TWICE * WIDTH, groups = (product.outer + width - 1) / width;
    const bool parallel = product.threads > 1 && product.outer * product.inner >= SERIAL_WORK;
    const int64_t most = product.rows >= MANY_ROWS ? NEAR_BYTES / (width * product.inner * 2) : 1;
    int64_t part = smaller(groups / (parallel ? product.threads * PARTS : 1), most);
    if (part < 1) part = 1;
    parallel_for(parallel ? product.threads : 1, (groups + part - 1) / part, [&](int64_t index) {
        const int64_t begin = index * part;
        for (int64_t row = 0; row < product.rows; row += tile)
            for (int64_t group = begin; group < smaller(begin + part, groups); ++group) {
                const int64_t column = group * width, count = smaller(tile, product.rows - row);
                const uint16_t* panel = product.panels + column * product.inner;
                if (product.outer - column > WIDTH)
                    multiply_rows<TWICE>(product, row, count, column, panel, row / tile, tiles);
                else
                    multiply_rows<1>(product, row, count, column, panel, row / tile, tiles);
            }
    });
}

extern "C" int64_t panels_product_size() { return sizeof(Product); }
