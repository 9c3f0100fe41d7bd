// Conversions between bfloat16, kept as its 16 bits, and float.
#pragma once

#include <cstdint>
#include <cstring>

inline float to_float(float value) { return value; }

inline float to_float(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// To the nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline void from_float(float value, float* to) { *to = value; }

inline void from_float(float value, uint16_t* to) { *to = to_bfloat16(value); }
