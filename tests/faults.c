/* Lets the n-th write, fsync or rename below a folder fail, once, as a full or broken disk would: for test_faults.py.

Loaded with LD_PRELOAD, so that it is met by whatever writes, in Python or not. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static atomic_long left;
static int number;

void faults_arm(const char *below, long nth, int error) {
    strncpy(folder, below, sizeof folder - 1);
    number = error;
    atomic_store(&left, nth);
}

/* How many calls are still to come before the one that fails; 0 or less: it has failed. */
long faults_left(void) { return atomic_load(&left); }

static int fails(const char *path) {
    if (!folder[0] || strncmp(path, folder, strlen(folder)) != 0) return 0;
    if (atomic_fetch_sub(&left, 1) != 1) return 0;
    errno = number;
    return 1;
}

static int fails_at(int descriptor) {
    char link[64], path[4096];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(path);
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int d, const void *data, size_t size) { REAL(write); return fails_at(d) ? -1 : real(d, data, size); }
ssize_t pwrite(int d, const void *data, size_t size, off_t at) {
    REAL(pwrite);
    return fails_at(d) ? -1 : real(d, data, size, at);
}
ssize_t pwrite64(int d, const void *data, size_t size, off_t at) {
    REAL(pwrite64);
    return fails_at(d) ? -1 : real(d, data, size, at);
}
ssize_t writev(int d, const struct iovec *parts, int count) { REAL(writev); return fails_at(d) ? -1 : real(d, parts, count); }
ssize_t sendfile(int to, int from, off_t *at, size_t size);
ssize_t sendfile(int to, int from, off_t *at, size_t size) { REAL(sendfile); return fails_at(to) ? -1 : real(to, from, at, size); }
ssize_t sendfile64(int to, int from, off_t *at, size_t size);
ssize_t sendfile64(int to, int from, off_t *at, size_t size) { REAL(sendfile64); return fails_at(to) ? -1 : real(to, from, at, size); }
ssize_t copy_file_range(int from, off_t *f, int to, off_t *t, size_t size, unsigned flags) {
    REAL(copy_file_range);
    return fails_at(to) ? -1 : real(from, f, to, t, size, flags);
}
int ftruncate64(int d, off_t size) { REAL(ftruncate64); return fails_at(d) ? -1 : real(d, size); }
int fsync(int d) { REAL(fsync); return fails_at(d) ? -1 : real(d); }
int fdatasync(int d) { REAL(fdatasync); return fails_at(d) ? -1 : real(d); }
int rename(const char *from, const char *to) { REAL(rename); return fails(to) ? -1 : real(from, to); }
int renameat(int a, const char *from, int b, const char *to) { REAL(renameat); return fails(to) ? -1 : real(a, from, b, to); }
