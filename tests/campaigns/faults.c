/* Stands before the C library: lets the n-th call that changes the file system below a folder fail, or kills there.

   at = 0 counts only. errno = 0 kills the process, a write having written half of its bytes. lasting: all later calls
   fail too, as on a full disk. One process, one fault; threads are counted together. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[4096], where[4096];
static long at, seen;
static int armed, error, lasting;

void fault_arm(const char *folder, long n, int code, int stays) {
    snprintf(root, sizeof root, "%s", folder);
    at = n, error = code, lasting = stays, seen = 0, armed = 1;
}

long fault_disarm(char *told) {
    armed = 0;
    snprintf(told, 4096, "%s", where);
    return seen;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int is_below(const char *path) {
    char absolute[8192];
    if (path[0] == '/')
        return strncmp(path, root, strlen(root)) == 0;
    if (!getcwd(absolute, 4096))
        return 0;
    strcat(absolute, "/");
    strncat(absolute, path, 4000);
    return strncmp(absolute, root, strlen(root)) == 0;
}

static const char *path_of(int descriptor, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, buffer, 4095);
    buffer[length < 0 ? 0 : length] = 0;
    return buffer;
}

/* 1: this call is the one. */
static int is_due(const char *name, const char *path) {
    if (!armed || !path || !is_below(path))
        return 0;
    long now = __sync_add_and_fetch(&seen, 1);
    if (at == 0 || now < at || (now > at && !lasting))
        return 0;
    if (now == at)
        snprintf(where, sizeof where, "%s %s", name, path);
    return 1;
}

static int fail(void) {
    if (error == 0)
        kill(getpid(), SIGKILL);
    errno = error;
    return -1;
}

#define OPEN(function, at_arguments, at_values)                                                                        \
    int function(at_arguments const char *path, int flags, ...) {                                                      \
        mode_t mode = 0;                                                                                               \
        va_list list;                                                                                                  \
        va_start(list, flags);                                                                                         \
        if (flags & (O_CREAT | O_TMPFILE))                                                                             \
            mode = va_arg(list, mode_t);                                                                               \
        va_end(list);                                                                                                  \
        if ((flags & O_ACCMODE) != O_RDONLY && is_due("open", path))                                                   \
            return fail();                                                                                             \
        return REAL(function)(at_values path, flags, mode);                                                            \
    }
#define NOTHING
OPEN(open, NOTHING, NOTHING)
OPEN(open64, NOTHING, NOTHING)
#define FOLDER int folder,
#define GIVEN folder,
OPEN(openat, FOLDER, GIVEN)
OPEN(openat64, FOLDER, GIVEN)

ssize_t write(int descriptor, const void *bytes, size_t count) {
    char buffer[4096];
    if (armed && is_due("write", path_of(descriptor, buffer))) {
        if (error == 0)
            REAL(write)(descriptor, bytes, count / 2);
        return fail();
    }
    return REAL(write)(descriptor, bytes, count);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    char buffer[4096];
    if (armed && is_due("writev", path_of(descriptor, buffer)))
        return fail();
    return REAL(writev)(descriptor, parts, count);
}

#define ON_DESCRIPTOR(result, function, arguments, values)                                                             \
    result function arguments {                                                                                        \
        char buffer[4096];                                                                                             \
        if (armed && is_due(#function, path_of(descriptor, buffer)))                                                   \
            return fail();                                                                                             \
        return REAL(function) values;                                                                                  \
    }
ON_DESCRIPTOR(ssize_t, pwrite, (int descriptor, const void *bytes, size_t count, off_t offset), (descriptor, bytes, count, offset))
ON_DESCRIPTOR(ssize_t, pwrite64, (int descriptor, const void *bytes, size_t count, off64_t offset), (descriptor, bytes, count, offset))
ON_DESCRIPTOR(int, fsync, (int descriptor), (descriptor))
ON_DESCRIPTOR(int, fdatasync, (int descriptor), (descriptor))
ON_DESCRIPTOR(int, ftruncate, (int descriptor, off_t length), (descriptor, length))
ON_DESCRIPTOR(int, ftruncate64, (int descriptor, off64_t length), (descriptor, length))

/* These two return the error's number. */
#define ALLOCATES(function, offset_type)                                                                               \
    int function(int descriptor, offset_type offset, offset_type length) {                                             \
        char buffer[4096];                                                                                             \
        if (armed && is_due(#function, path_of(descriptor, buffer)))                                                   \
            return fail(), error;                                                                                      \
        return REAL(function)(descriptor, offset, length);                                                             \
    }
ALLOCATES(posix_fallocate, off_t)
ALLOCATES(posix_fallocate64, off64_t)

#define ON_PATH(function, checked, arguments, values)                                                                  \
    int function arguments {                                                                                           \
        if (is_due(#function, checked))                                                                                \
            return fail();                                                                                             \
        return REAL(function) values;                                                                                  \
    }
ON_PATH(rename, to, (const char *from, const char *to), (from, to))
ON_PATH(renameat, to, (int a, const char *from, int b, const char *to), (a, from, b, to))
ON_PATH(mkdir, path, (const char *path, mode_t mode), (path, mode))
ON_PATH(symlink, path, (const char *target, const char *path), (target, path))
