// Vectors of as many floats as a register of the processor holds.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__FMA__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "bfloat16.h"

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));
typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t))));

inline Floats load(const float* from) {
    Floats result;
    std::memcpy(&result, from, sizeof result);
    return result;
}

// The same number in each lane. (Adding it to zeros costs an addition, for the sake of -0.)
inline Floats broadcast(float number) { return (Floats{} + 1.0f) * number; }

// a b + c, rounded once where the processor can. Left to itself, a compiler does so in some loops and not in others.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(
        _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
    return reinterpret_cast<Floats>(
        _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
    return a * b + c;
#endif
}

// Of bfloat16.
inline Floats load(const uint16_t* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    const Words bits = __builtin_convertvector(halves, Words) << 16;
    Floats result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

// As bfloat16, rounded as by `to_bfloat16`; but the processor's own instruction takes numbers below 2^-126 as 0.
inline void store(uint16_t* to, Floats value) {
#if defined(__AVX512BF16__)
    const __m256bh halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(value));
    std::memcpy(to, &halves, sizeof halves);
#else
    Words bits;
    std::memcpy(&bits, &value, sizeof bits);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words chosen = (bits & 0x7fffffffu) > 0x7f800000u ? Words{} + 0x7fc0u : rounded;
    const Halves halves = __builtin_convertvector(chosen, Halves);
    std::memcpy(to, &halves, sizeof halves);
#endif
}

// The first `count` numbers, and zeros.
template <typename T>
inline Floats load(const T* from, int64_t count) {
    if (count == LANES) return load(from);
    T part[LANES] = {};
    std::memcpy(part, from, count * sizeof(T));
    return load(part);
}

template <typename T>
inline void store(T* to, Floats value, int64_t count) {
    if (count == LANES) return store(to, value);
    T part[LANES];
    store(part, value);
    std::memcpy(to, part, count * sizeof(T));
}

// As if it had been stored.
template <typename T>
inline Floats rounded(Floats value) {
    T stored[LANES];
    store(stored, value);
    return load(stored);
}

// Call `work(first, count)` for each vector of a row.
template <typename Work>
inline void for_vectors(int64_t width, const Work& work) {
    int64_t first = 0;
    for (; first + LANES <= width; first += LANES) work(first, LANES);
    if (first < width) work(first, width - first);
}

// Every second lane of two vectors, from `FIRST` on.
template <int FIRST, int... I>
inline Floats every_second(Floats a, Floats b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (2 * I + FIRST)...);
#else
    return __builtin_shuffle(a, b, Ints{(2 * I + FIRST)...});
#endif
}

inline Floats evens(Floats a, Floats b) { return every_second<0>(a, b, std::make_integer_sequence<int, LANES>()); }
inline Floats odds(Floats a, Floats b) { return every_second<1>(a, b, std::make_integer_sequence<int, LANES>()); }

inline float sum_of(Floats x) {
    for (int64_t width = LANES; width > 1; width /= 2) x = evens(x, x) + odds(x, x);
    return x[0];
}

inline float max_of(Floats x) {
    for (int64_t width = LANES; width > 1; width /= 2) {
        const Floats a = evens(x, x), b = odds(x, x);
        x = a > b ? a : b;
    }
    return x[0];
}

// e^x for x <= 0, and 0 below -87.
inline Floats exponential(Floats x) {
    const Floats lowest = Floats{} - 88.0f, magic = Floats{} + 12582912.0f;
    x = x < lowest ? lowest : x;
    const Floats t = x * 1.44269504f;
    const Floats whole = (t + magic) - magic;
    const Floats f = (t - whole) * 0.693147181f;
    Floats power = Floats{} + 1.0f / 5040;
    power = power * f + 1.0f / 720;
    power = power * f + 1.0f / 120;
    power = power * f + 1.0f / 24;
    power = power * f + 1.0f / 6;
    power = power * f + 0.5f;
    power = power * f + 1.0f;
    power = power * f + 1.0f;
    const Ints bits = (__builtin_convertvector(whole, Ints) + 127) << 23;
    Floats scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return power * scale;
}
