/* Disk operations under one folder, counted, and failed, ended or photographed at one of them.
 *
 * Preloaded (LD_PRELOAD) it stands before the C library, where Python, torch's C++ and everything else have to pass.
 * Nothing happens before faults_reset has said what and a process has armed itself. What faults_reset sets is in memory
 * that forked processes share; whether a process is armed is its own. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

enum { OPEN = 1, WRITE = 2, SYNC = 4, RENAME = 8, UNLINK = 16, MKDIR = 32, TRUNCATE = 64, CLOSE = 128 };
enum { COUNT, KILL, FAIL, PHOTOGRAPH, TEAR };
enum { FILES = 65536, LENGTH = 1024 };

struct control {
    char prefix[LENGTH], photographs[LENGTH];
    long count, at;
    int kinds, error, onwards, action, lock;
};
static struct control *shared;
static int armed;
static char tracked[FILES];
extern char **environ;

__attribute__((constructor)) static void begin(void) {
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void faults_reset(const char *prefix, const char *photographs, long at, int kinds, int error, int onwards, int action) {
    memset(shared, 0, sizeof *shared);
    strncpy(shared->prefix, prefix, LENGTH - 1);
    strncpy(shared->photographs, photographs, LENGTH - 1);
    shared->at = at, shared->kinds = kinds, shared->error = error, shared->onwards = onwards, shared->action = action;
}
void faults_arm(int on) { armed = on; }
long faults_count(void) { return shared->count; }

static int inside(int folder, const char *path) {
    char whole[2 * LENGTH], link[64];
    size_t length = strlen(shared->prefix);
    if (!armed || !length || !path) return 0;
    if (path[0] != '/') {
        if (folder == AT_FDCWD) strcpy(link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t size = readlink(link, whole, LENGTH);
        if (size < 0) return 0;
        snprintf(whole + size, sizeof whole - size, "/%s", path);
        path = whole;
    }
    return strncmp(path, shared->prefix, length) == 0;
}
static int known(int file) { return armed && file >= 0 && file < FILES && tracked[file]; }

static void photograph(long number, const char *what) {
    char target[2 * LENGTH];
    pid_t pid;
    int status;
    snprintf(target, sizeof target, "%s/%05ld-%s", shared->photographs, number, what);
    char *arguments[] = {"cp", "-a", shared->prefix, target, NULL};
    if (posix_spawnp(&pid, "cp", NULL, NULL, arguments, environ) == 0)
        while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
}
static void hold(void) { while (__sync_lock_test_and_set(&shared->lock, 1)) sched_yield(); }
static void let_go(void) { if (shared->lock) __sync_lock_release(&shared->lock); }

/* What an operation has to fail with, 0 to go on; *half is how many bytes of a write come before the end. While it
 * photographs, the lock is held until let_go, so that no other process is between two states. */
static int meet(int kind, const char *what, size_t size, size_t *half) {
    int was = errno, error = 0;
    if (shared->action == PHOTOGRAPH) hold();
    long number = __sync_add_and_fetch(&shared->count, 1);
    int now = shared->kinds & kind && shared->at && (shared->onwards ? number >= shared->at : number == shared->at);
    if (shared->action == PHOTOGRAPH) {
        photograph(number, what);
        if (half && size > 1) *half = size / 2;
    } else if (now && shared->action == TEAR && half && size > 1) *half = size / 2;
    else if (now && (shared->action == KILL || shared->action == TEAR)) kill(getpid(), SIGKILL);
    else if (now && shared->action == FAIL) error = shared->error;
    errno = was;
    return error;
}
/* After the first half of a write. */
static void torn(const char *what) {
    if (shared->action == PHOTOGRAPH) photograph(shared->count, what);
    else kill(getpid(), SIGKILL);
}

#define REAL(name, type) static __typeof__(type) real; if (!real) real = (__typeof__(type))dlsym(RTLD_NEXT, name)
#define GUARD(condition, kind, what, failed) \
    int mine = condition, error = mine ? meet(kind, what, 0, NULL) : 0; \
    if (error) { let_go(); errno = error; return failed; }
#define DONE(result) if (mine) { int was = errno; let_go(); errno = was; } return result

static int changes(int flags) { return flags & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR); }
static void track(int file, int ours) { if (file >= 0 && file < FILES) tracked[file] = ours; }

#define OPENING(name) \
    int name(const char *path, int flags, ...) { \
        REAL(#name, int (*)(const char *, int, ...)); \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        GUARD(changes(flags) && inside(AT_FDCWD, path), OPEN, "open", -1) \
        int file = real(path, flags, mode); track(file, mine); DONE(file); }
OPENING(open)
OPENING(open64)
#define OPENING_AT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(#name, int (*)(int, const char *, int, ...)); \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        GUARD(changes(flags) && inside(folder, path), OPEN, "open", -1) \
        int file = real(folder, path, flags, mode); track(file, mine); DONE(file); }
OPENING_AT(openat)
OPENING_AT(openat64)
#define OPENING_STREAM(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(#name, FILE *(*)(const char *, const char *)); \
        GUARD(strpbrk(mode, "wa+") && inside(AT_FDCWD, path), OPEN, "open", NULL) \
        FILE *stream = real(path, mode); if (stream) track(fileno(stream), mine); DONE(stream); }
OPENING_STREAM(fopen)
OPENING_STREAM(fopen64)

ssize_t write(int file, const void *data, size_t size) {
    REAL("write", ssize_t (*)(int, const void *, size_t));
    size_t half = 0;
    int mine = known(file), error = mine ? meet(WRITE, "write", size, &half) : 0;
    if (error) { let_go(); errno = error; return -1; }
    ssize_t first = half ? real(file, data, half) : 0;
    if (half && first == (ssize_t)half) { torn("write-half"); size -= half; data = (const char *)data + half; }
    ssize_t rest = first < (ssize_t)half ? 0 : real(file, data, size);
    DONE(rest < 0 ? rest : first + rest);
}
#define WRITING_AT(name) \
    ssize_t name(int file, const void *data, size_t size, off_t place) { \
        REAL(#name, ssize_t (*)(int, const void *, size_t, off_t)); \
        GUARD(known(file), WRITE, "pwrite", -1) DONE(real(file, data, size, place)); }
WRITING_AT(pwrite)
WRITING_AT(pwrite64)
ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL("writev", ssize_t (*)(int, const struct iovec *, int));
    GUARD(known(file), WRITE, "writev", -1)
    DONE(real(file, parts, count));
}
#define SYNCING(name) \
    int name(int file) { REAL(#name, int (*)(int)); char path[64]; snprintf(path, sizeof path, "."); \
        GUARD(known(file) || inside(file, path), SYNC, "sync", -1) DONE(real(file)); }
SYNCING(fsync)
SYNCING(fdatasync)
int close(int file) {
    REAL("close", int (*)(int));
    int mine = known(file), error = mine ? meet(CLOSE, "close", 0, NULL) : 0;
    track(file, 0);
    int result = real(file);
    if (error) { let_go(); errno = error; return -1; }
    DONE(result);
}
int fclose(FILE *stream) {
    REAL("fclose", int (*)(FILE *));
    int file = fileno(stream), mine = known(file), error = mine ? meet(CLOSE, "close", 0, NULL) : 0;
    track(file, 0);
    int result = real(stream);
    if (error) { let_go(); errno = error; return EOF; }
    DONE(result);
}
int rename(const char *old, const char *new) {
    REAL("rename", int (*)(const char *, const char *));
    GUARD(inside(AT_FDCWD, new), RENAME, "rename", -1)
    DONE(real(old, new));
}
int renameat(int from, const char *old, int to, const char *new) {
    REAL("renameat", int (*)(int, const char *, int, const char *));
    GUARD(inside(to, new), RENAME, "rename", -1)
    DONE(real(from, old, to, new));
}
#define OF_PATH(name, kind, what) \
    int name(const char *path) { REAL(#name, int (*)(const char *)); \
        GUARD(inside(AT_FDCWD, path), kind, what, -1) DONE(real(path)); }
OF_PATH(unlink, UNLINK, "unlink")
OF_PATH(rmdir, UNLINK, "rmdir")
int unlinkat(int folder, const char *path, int flags) {
    REAL("unlinkat", int (*)(int, const char *, int));
    GUARD(inside(folder, path), UNLINK, "unlink", -1)
    DONE(real(folder, path, flags));
}
int mkdir(const char *path, mode_t mode) {
    REAL("mkdir", int (*)(const char *, mode_t));
    GUARD(inside(AT_FDCWD, path), MKDIR, "mkdir", -1)
    DONE(real(path, mode));
}
int mkdirat(int folder, const char *path, mode_t mode) {
    REAL("mkdirat", int (*)(int, const char *, mode_t));
    GUARD(inside(folder, path), MKDIR, "mkdir", -1)
    DONE(real(folder, path, mode));
}
#define CUTTING(name) \
    int name(int file, off_t size) { REAL(#name, int (*)(int, off_t)); \
        GUARD(known(file), TRUNCATE, "truncate", -1) DONE(real(file, size)); }
CUTTING(ftruncate)
CUTTING(ftruncate64)
