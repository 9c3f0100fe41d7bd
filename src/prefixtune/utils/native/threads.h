// Work on the threads of the OpenMP library that torch has loaded. They are asked for by the functions that GCC's
// compiled code calls and other OpenMP libraries offer as well, so that any compiler will do, with or without OpenMP.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

extern "C" {
void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}

// Call `work(thread, threads)` on each of at most `most` threads at once. All of them may meet at a `Barrier`.
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

// Where the threads of `in_threads` wait until all of them are there: for some microseconds awake, then asleep. The
// barrier of OpenMP stays awake for milliseconds, and where other work wants the processors, the thread that it waits
// for may not run meanwhile.
class Barrier {
  public:
    void wait(int64_t threads) {
        if (threads <= 1) return;
        const uint32_t round = round_.load();
        if (arrived_.fetch_add(1) + 1 == threads) {
            arrived_.store(0);
            round_.fetch_add(1);
            if (asleep_.load()) syscall(SYS_futex, &round_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
            return;
        }
        for (int i = 0; i < LOOKS; ++i) {
            if (round_.load() != round) return;
            pause();
        }
        asleep_.fetch_add(1);
        while (round_.load() == round)
            syscall(SYS_futex, &round_, FUTEX_WAIT_PRIVATE, round, nullptr, nullptr, 0);
        asleep_.fetch_sub(1);
    }

  private:
    static constexpr int LOOKS = 2000;

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    std::atomic<uint32_t> round_{0};
    std::atomic<int64_t> arrived_{0}, asleep_{0};
};

// Call `work(i)` for each i below `count`, on at most `most` threads: the next one whenever a thread is free.
template <typename Work>
void parallel_for(int64_t most, int64_t count, const Work& work) {
    std::atomic<int64_t> next{0};
    in_threads(most < count ? most : count, [&](int64_t, int64_t) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
    });
}
