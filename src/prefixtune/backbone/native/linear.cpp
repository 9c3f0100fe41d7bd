// A row or two times a matrix that lies as torch keeps it, (outer, inner), which is read once, in order. See `linear.py`.
//
// Numbers of the matrix are widened to float, multiplied and added up as floats, and the sum is rounded once.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "threads.h"
#include "vectors.h"

namespace {

constexpr int64_t STEP = 2 * LANES;         // Numbers of a line of the matrix at once.
constexpr int64_t UNROLLED = 3;             // Steps with sums of their own.
constexpr int64_t SERIAL_WORK = 1 << 15;    // Numbers of a matrix below which more threads do not pay.
constexpr int64_t PARTS = 4;                // Of the work, for each thread: one that is delayed leaves some to others.

struct Matrix {
    const void* weight;     // (outer, inner)
    const float* scales;    // (outer), or null
    const uint16_t* bias;   // (outer), or null
    int64_t outer, inner;
};

template <typename V>
inline V load_as(const void* from) {
    V vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

// Words of two bfloat16: a step is its first halves, then its second halves, and the inputs lie so, too.
struct BFloat16 {
    typedef uint16_t Number;
    static int64_t index(int64_t k) { return k / STEP * STEP + k % 2 * LANES + k % STEP / 2; }
    static float widen(Number number) { return to_float(number); }
    static void widen(const Number* from, Floats to[2]) {
        const Words words = load_as<Words>(from);
        to[0] = reinterpret_cast<Floats>(words << 16);
        to[1] = reinterpret_cast<Floats>(words & 0xffff0000u);
    }
};

struct Int8 {
    typedef int8_t Number;
    static int64_t index(int64_t k) { return k; }
    static float widen(Number number) { return number; }
    static void widen(const Number* from, Floats to[2]) {
        for (int64_t half = 0; half < 2; ++half, from += LANES) {
#if defined(__AVX512F__)
            const __m512 wide = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_as<__m128i>(from)));
            to[half] = reinterpret_cast<const Floats&>(wide);
#elif defined(__AVX2__)
            const __m256 wide = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
            to[half] = reinterpret_cast<const Floats&>(wide);
#else
            for (int64_t lane = 0; lane < LANES; ++lane) to[half][lane] = from[lane];
#endif
        }
    }
};

template <typename T, int64_t ROWS>
void multiply_line(const typename T::Number* line, int64_t inner, const float* inputs, float* sums) {
    Floats parts[ROWS][2 * UNROLLED] = {};
    auto add_step = [&](int64_t k, int64_t part) {
        Floats wide[2];
        T::widen(line + k, wide);
        for (int64_t row = 0; row < ROWS; ++row) {
            const float* input = inputs + row * inner + k;
            parts[row][part] += wide[0] * load(input);
            parts[row][part + 1] += wide[1] * load(input + LANES);
        }
    };
    int64_t k = 0;
    for (; k + UNROLLED * STEP <= inner; k += UNROLLED * STEP)
        for (int64_t step = 0; step < UNROLLED; ++step) add_step(k + step * STEP, 2 * step);
    for (; k + STEP <= inner; k += STEP) add_step(k, 0);
    for (int64_t row = 0; row < ROWS; ++row) {
        Floats all = parts[row][0];
        for (int64_t part = 1; part < 2 * UNROLLED; ++part) all += parts[row][part];
        sums[row] = sum_of(all);
        for (int64_t rest = k; rest < inner; ++rest) sums[row] += T::widen(line[rest]) * inputs[row * inner + rest];
    }
}

template <typename T, int64_t ROWS>
void multiply_lines(const Matrix& matrix, const float* inputs, uint16_t* out, int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
        float sums[ROWS];
        multiply_line<T, ROWS>(static_cast<const typename T::Number*>(matrix.weight) + n * matrix.inner, matrix.inner,
                               inputs, sums);
        for (int64_t row = 0; row < ROWS; ++row) {
            const float scaled = matrix.scales ? sums[row] * matrix.scales[n] : sums[row];
            out[row * matrix.outer + n] = to_bfloat16(matrix.bias ? scaled + to_float(matrix.bias[n]) : scaled);
        }
    }
}

template <typename T>
int run(const Matrix& matrix, const uint16_t* input, uint16_t* out, int64_t rows, int64_t threads) {
    float* inputs = static_cast<float*>(std::malloc((rows * matrix.inner + 1) * sizeof(float)));
    if (!inputs) return 1;
    const int64_t whole = matrix.inner / STEP * STEP;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t k = 0; k < matrix.inner; ++k)
            inputs[row * matrix.inner + (k < whole ? T::index(k) : k)] = to_float(input[row * matrix.inner + k]);
    const bool parallel = threads > 1 && matrix.outer * matrix.inner >= SERIAL_WORK;
    const int64_t parts = parallel ? threads * PARTS : 1;
    parallel_for(threads, parts, [&](int64_t part) {
        const int64_t first = matrix.outer * part / parts, last = matrix.outer * (part + 1) / parts;
        if (rows == 1)
            multiply_lines<T, 1>(matrix, inputs, out, first, last);
        else
            multiply_lines<T, 2>(matrix, inputs, out, first, last);
    });
    std::free(inputs);
    return 0;
}

}  // namespace

extern "C" int linear_bfloat16(const Matrix* matrix, const uint16_t* input, uint16_t* out, int64_t rows, int64_t threads) {
    return run<BFloat16>(*matrix, input, out, rows, threads);
}

extern "C" int linear_int8(const Matrix* matrix, const uint16_t* input, uint16_t* out, int64_t rows, int64_t threads) {
    return run<Int8>(*matrix, input, out, rows, threads);
}

extern "C" int64_t linear_matrix_size() { return sizeof(Matrix); }
