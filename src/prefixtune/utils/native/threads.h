// Work on the threads of the OpenMP library that torch has loaded. They are asked for by the functions that GCC's
// compiled code calls and other OpenMP libraries offer as well, so that any compiler will do, with or without OpenMP.
#pragma once

#include <atomic>
#include <cstdint>

extern "C" {
void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
void GOMP_barrier(void);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}

// Call `work(thread, threads)` on each of at most `most` threads at once. All of them may meet at `barrier`.
template <typename Work>
void in_threads(int64_t most, const Work& work) {
    if (most <= 1) {
        work(int64_t{0}, int64_t{1});
        return;
    }
    void (*const function)(void*) = [](void* data) {
        (*static_cast<const Work*>(data))(int64_t{omp_get_thread_num()}, int64_t{omp_get_num_threads()});
    };
    GOMP_parallel(function, const_cast<Work*>(&work), static_cast<unsigned>(most), 0);
}

// Wait until all threads of `in_threads` are here.
inline void barrier(int64_t threads) {
    if (threads > 1) GOMP_barrier();
}

// Call `work(i)` for each i below `count`, on at most `most` threads: the next one whenever a thread is free.
template <typename Work>
void parallel_for(int64_t most, int64_t count, const Work& work) {
    std::atomic<int64_t> next{0};
    in_threads(most < count ? most : count, [&](int64_t, int64_t) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
    });
}
