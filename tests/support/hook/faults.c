/* faults: a library that Linux loads before libc (LD_PRELOAD), between a process and its disk.

Of calls about files below one folder it counts each, lets one of them fail or come with a
signal, and writes down all that a disk may have or not have when the power goes.

    gcc -shared -fPIC -O1 -o faults.so faults.c -ldl -lpthread

A line of the journal is an operation, its arguments apart by tabs: C create, M mkdir, R rename,
X exchange, L link, U unlink, D rmdir, each with paths; W write and S sync, each with an inode. What
U and R take away is linked into the folder of the dead first, by the line's number. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#define FILES 65536
enum { SHORT = -1, SIGNAL = -100 }; /* SIGNAL - n: signal n */

static char under[4096], dead[4096];
static long at, calls, lines;
static int armed, harm, journal = -1;
static const char *struck = "";
static unsigned char ours[FILES];
static pthread_mutex_t mutex = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static __thread int inside;

/* Begin: call number `number` fails with errno `how`, is cut SHORT, or comes with a signal. */
void faults_arm(const char *folder, long number, int how, const char *log, const char *graves) {
    snprintf(under, sizeof under, "%s/", folder);
    at = number, harm = how, calls = lines = 0, struck = "";
    if (log) {
        journal = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        snprintf(dead, sizeof dead, "%s", graves);
    }
    armed = 1;
}
long faults_calls(void) { return calls; }
const char *faults_struck(void) { return struck; }

static const char *full(int folder, const char *path, char *buffer) {
    if (!path || path[0] == '/') return path ? path : "";
    char link[64];
    ssize_t n;
    if (folder == AT_FDCWD) return path;
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    n = syscall(SYS_readlinkat, AT_FDCWD, link, buffer, 4000);
    if (n < 0) return path;
    snprintf(buffer + n, 4096 - n, "/%s", path);
    return buffer;
}
static int is_under(const char *path) { return strncmp(path, under, strlen(under)) == 0; }

/* Count a call; return what is to become of it: 0, an errno, or SHORT. */
static int strike(const char *name) {
    if (inside) return 0;
    if (__sync_add_and_fetch(&calls, 1) != at || !harm) return 0;
    struck = name;
    if (harm > SIGNAL) return harm;
    syscall(SYS_kill, syscall(SYS_getpid), SIGNAL - harm);
    return 0;
}
static void note(const char *format, ...) {
    char line[9000];
    va_list rest;
    va_start(rest, format);
    int n = vsnprintf(line, sizeof line - 1, format, rest);
    va_end(rest);
    line[n++] = '\n';
    if (syscall(SYS_write, journal, line, n) == n) lines++;
}
static void bury(int folder, const char *path) {
    char grave[4200];
    snprintf(grave, sizeof grave, "%s/%ld", dead, lines);
    syscall(SYS_linkat, folder, path, AT_FDCWD, grave, 0);
}
static void noted_of(char kind, int fd) {
    struct stat64 state;
    if (journal < 0 || inside) return;
    inside++;
    pthread_mutex_lock(&mutex);
    if (fstat64(fd, &state) == 0) note("%c\t%lu", kind, (unsigned long)state.st_ino);
    pthread_mutex_unlock(&mutex);
    inside--;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define OURS(fd) (armed && (fd) >= 0 && (fd) < FILES && ours[fd])
#define STRIKE(name, bad) do { int how = strike(name); if (how > 0) { errno = how; return bad; } } while (0)

/* Calls with a path. `act` is the real one; what they change is noted together with the change. */
#define CHANGE(name, is_ours, before, act, after)                        \
    if (!armed || !(is_ours)) return act;                                \
    STRIKE(name, -1);                                                    \
    if (journal < 0) return act;                                         \
    pthread_mutex_lock(&mutex);                                          \
    before;                                                              \
    int done = act, cause = errno;                                       \
    if (done >= 0) { after; }                                            \
    pthread_mutex_unlock(&mutex);                                        \
    errno = cause;                                                       \
    return done

static int opened(int folder, const char *path, int flags, mode_t mode, const char *name) {
    char buffer[4096];
    const char *whole = full(folder, path, buffer);
    int below = armed && is_under(whole), created = 0;
    struct stat64 state;
    if (below) STRIKE(name, -1);
    if (below && journal >= 0) pthread_mutex_lock(&mutex);
    if (below && journal >= 0 && flags & O_CREAT) {
        inside++, created = fstatat64(folder, path, &state, AT_SYMLINK_NOFOLLOW) != 0, inside--;
    }
    int fd = syscall(SYS_openat, folder, path, flags, mode), cause = errno;
    if (fd >= 0 && fd < FILES) ours[fd] = below;
    if (below && journal >= 0) {
        if (fd >= 0 && created) note("C\t%s", whole);
        if (fd >= 0 && flags & O_TRUNC && !created) noted_of('W', fd);
        pthread_mutex_unlock(&mutex);
    }
    errno = cause;
    return fd;
}
#define MODE va_list rest; va_start(rest, flags); mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; va_end(rest)
int open(const char *path, int flags, ...) { MODE; return opened(AT_FDCWD, path, flags, mode, "open"); }
int open64(const char *path, int flags, ...) { MODE; return opened(AT_FDCWD, path, flags, mode, "open"); }
int openat(int folder, const char *path, int flags, ...) { MODE; return opened(folder, path, flags, mode, "open"); }
int openat64(int folder, const char *path, int flags, ...) { MODE; return opened(folder, path, flags, mode, "open"); }
int close(int fd) {
    REAL(close);
    if (fd >= 0 && fd < FILES) ours[fd] = 0;
    return real(fd);
}

int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    char buffer[4096];
    const char *whole = full(folder, path, buffer);
    CHANGE("unlink", is_under(whole), if (!(flags & AT_REMOVEDIR)) bury(folder, path), real(folder, path, flags),
           note("%c\t%s", flags & AT_REMOVEDIR ? 'D' : 'U', whole));
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(mkdirat);
    char buffer[4096];
    const char *whole = full(folder, path, buffer);
    CHANGE("mkdir", is_under(whole), , real(folder, path, mode), note("M\t%s", whole));
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
int linkat(int from, const char *a, int to, const char *b, int flags) {
    REAL(linkat);
    char buffer[4096];
    const char *whole = full(to, b, buffer);
    CHANGE("link", is_under(whole), , real(from, a, to, b, flags), note("L\t%s", whole));
}
int link(const char *a, const char *b) { return linkat(AT_FDCWD, a, AT_FDCWD, b, 0); }
int symlinkat(const char *text, int folder, const char *path) {
    REAL(symlinkat);
    char buffer[4096];
    const char *whole = full(folder, path, buffer);
    CHANGE("symlink", is_under(whole), , real(text, folder, path), note("L\t%s", whole));
}
int symlink(const char *text, const char *path) { return symlinkat(text, AT_FDCWD, path); }
int renameat2(int from, const char *a, int to, const char *b, unsigned flags) {
    char one[4096], other[4096];
    const char *old = full(from, a, one), *new = full(to, b, other);
    CHANGE("rename", is_under(old) || is_under(new), if (!flags) bury(to, b),
           syscall(SYS_renameat2, from, a, to, b, flags), note("%c\t%s\t%s", flags & 2 ? 'X' : 'R', old, new));
}
int renameat(int from, const char *a, int to, const char *b) { return renameat2(from, a, to, b, 0); }
int rename(const char *a, const char *b) { return renameat2(AT_FDCWD, a, AT_FDCWD, b, 0); }

/* Calls that write to an open file. */
#define WRITES(name, shorter, act)                                                                   \
    if (!OURS(fd)) return act;                                                                       \
    int how = strike(name);                                                                          \
    if (how > 0) { errno = how; return -1; }                                                         \
    if (how == SHORT) shorter;                                                                       \
    noted_of('W', fd);                                                                               \
    return act
ssize_t write(int fd, const void *data, size_t size) { REAL(write); WRITES("write", size = (size + 1) / 2, real(fd, data, size)); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t to) { REAL(pwrite64); WRITES("pwrite", size = (size + 1) / 2, real(fd, data, size, to)); }
ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off64_t to, int flags) { REAL(pwritev64v2); WRITES("pwritev", count = (count + 1) / 2, real(fd, parts, count, to, flags)); }
ssize_t writev(int fd, const struct iovec *parts, int count) { REAL(writev); WRITES("writev", count = (count + 1) / 2, real(fd, parts, count)); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); WRITES("ftruncate", , real(fd, size)); }
ssize_t copy_file_range(int from, off64_t *a, int fd, off64_t *b, size_t size, unsigned flags) { REAL(copy_file_range); WRITES("copy_file_range", size = (size + 1) / 2, real(from, a, fd, b, size, flags)); }
ssize_t sendfile64(int fd, int from, off64_t *at_, size_t size) { REAL(sendfile64); WRITES("sendfile", size = (size + 1) / 2, real(fd, from, at_, size)); }
int ioctl(int fd, unsigned long request, ...) {
    REAL(ioctl);
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    WRITES("ioctl", , real(fd, request, argument));
}

/* Calls that read, or look. */
#define READS(name, shorter, act)                                                                    \
    if (!OURS(fd)) return act;                                                                       \
    int how = strike(name);                                                                          \
    if (how > 0) { errno = how; return -1; }                                                         \
    if (how == SHORT) shorter;                                                                       \
    return act
ssize_t read(int fd, void *data, size_t size) { REAL(read); READS("read", size = (size + 1) / 2, real(fd, data, size)); }
ssize_t pread64(int fd, void *data, size_t size, off64_t from) { REAL(pread64); READS("pread", size = (size + 1) / 2, real(fd, data, size, from)); }
ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t from, int flags) { REAL(preadv64v2); READS("preadv", count = (count + 1) / 2, real(fd, parts, count, from, flags)); }
ssize_t readv(int fd, const struct iovec *parts, int count) { REAL(readv); READS("readv", count = (count + 1) / 2, real(fd, parts, count)); }
int flock(int fd, int operation) { REAL(flock); READS("flock", , real(fd, operation)); }
int lockf64(int fd, int command, off64_t size) { REAL(lockf64); READS("lockf", , real(fd, command, size)); }
int fchmod(int fd, mode_t mode) { REAL(fchmod); READS("fchmod", , real(fd, mode)); }
int futimens(int fd, const struct timespec times[2]) { REAL(futimens); READS("futimens", , real(fd, times)); }
int fstat64(int fd, struct stat64 *state) { REAL(fstat64); READS("fstat", , real(fd, state)); }
static int synced(int fd, int done) {
    if (done == 0 && OURS(fd)) noted_of('S', fd);
    return done;
}
int fsync(int fd) { REAL(fsync); if (OURS(fd)) STRIKE("fsync", -1); return synced(fd, real(fd)); }
int fdatasync(int fd) { REAL(fdatasync); if (OURS(fd)) STRIKE("fdatasync", -1); return synced(fd, real(fd)); }

#define LOOKS(name, act)                                                                             \
    char buffer[4096];                                                                               \
    if (armed && is_under(full(AT_FDCWD, path, buffer))) STRIKE(name, -1);                           \
    return act
int stat64(const char *path, struct stat64 *state) { REAL(stat64); LOOKS("stat", real(path, state)); }
int lstat64(const char *path, struct stat64 *state) { REAL(lstat64); LOOKS("lstat", real(path, state)); }
int chmod(const char *path, mode_t mode) { REAL(chmod); LOOKS("chmod", real(path, mode)); }
int statvfs64(const char *path, struct statvfs64 *state) { REAL(statvfs64); LOOKS("statvfs", real(path, state)); }
int access(const char *path, int mode) { REAL(access); LOOKS("access", real(path, mode)); }
ssize_t readlink(const char *path, char *into, size_t size) { REAL(readlink); LOOKS("readlink", real(path, into, size)); }
int utimensat(int folder, const char *path, const struct timespec times[2], int flags) { REAL(utimensat); LOOKS("utimensat", real(folder, path, times, flags)); }
DIR *opendir(const char *path) {
    REAL(opendir);
    char buffer[4096];
    if (armed && is_under(full(AT_FDCWD, path, buffer))) STRIKE("opendir", NULL);
    return real(path);
}
