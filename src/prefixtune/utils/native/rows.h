// Work on the rows of a matrix.
#pragma once

#include <cstdint>

#include "threads.h"

// Call `work(row)` for each of some rows, in parts of equal size, on at most `threads` threads.
template <typename Work>
inline void for_rows(int64_t threads, int64_t rows, int64_t width, const Work& work) {
    constexpr int64_t SERIAL = 1 << 15;  // Numbers below which more threads do not pay.
    const int64_t parts = rows * width >= SERIAL ? threads : 1;
    parallel_for(parts, parts, [=](int64_t part) {
        for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) work(row);
    });
}
