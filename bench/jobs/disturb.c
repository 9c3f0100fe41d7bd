/* A disk that is full and a clock that jumps, whenever another process says so: for kills.py.

Loaded with LD_PRELOAD. Both switches are in a file that all processes share. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static struct { int64_t seconds, full; } none, *said = (void *)&none;
static const char *folder = "";

__attribute__((constructor)) static void begin(void) {
    const char *file = getenv("DISTURB_FILE");
    folder = getenv("DISTURB_FOLDER");
    if (!file || !folder) return;
    int descriptor = open(file, O_RDONLY);
    if (descriptor < 0) return;
    void *mapped = mmap(0, sizeof none, PROT_READ, MAP_SHARED, descriptor, 0);
    close(descriptor);
    if (mapped != MAP_FAILED) said = mapped;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    int result = real(clock, now);
    if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += said->seconds;
    return result;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    REAL(gettimeofday);
    int result = real(now, zone);
    if (!result && now) now->tv_sec += said->seconds;
    return result;
}
time_t time(time_t *now) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (now) *now = precise.tv_sec;
    return precise.tv_sec;
}

static int is_full(int descriptor) {
    char link[64], path[4096];
    if (!said->full) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (strncmp(path, folder, strlen(folder))) return 0;
    errno = ENOSPC;
    return 1;
}

ssize_t write(int d, const void *data, size_t size) { REAL(write); return is_full(d) ? -1 : real(d, data, size); }
ssize_t pwrite(int d, const void *data, size_t size, off_t at) {
    REAL(pwrite);
    return is_full(d) ? -1 : real(d, data, size, at);
}
ssize_t pwrite64(int d, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    return is_full(d) ? -1 : real(d, data, size, at);
}
ssize_t writev(int d, const struct iovec *parts, int count) { REAL(writev); return is_full(d) ? -1 : real(d, parts, count); }
ssize_t sendfile(int to, int from, off_t *at, size_t size);
ssize_t sendfile(int to, int from, off_t *at, size_t size) { REAL(sendfile); return is_full(to) ? -1 : real(to, from, at, size); }
ssize_t copy_file_range(int from, off64_t *f, int to, off64_t *t, size_t size, unsigned flags) {
    REAL(copy_file_range);
    return is_full(to) ? -1 : real(from, f, to, t, size, flags);
}
