/* Sees everything durable that a process does below one folder, and every answer that it sends to a peer.
 *
 * Preloaded (LD_PRELOAD) into the real intake. Environment:
 *   POWERCUT_ROOT    folder whose files and directories are watched, as realpath(3) gives it
 *   POWERCUT_TRACE   file, outside that folder, that one record per operation is appended to; unset: none
 *   POWERCUT_IGNORE  dirsync | filesync | ledgersync: such syncs succeed, do nothing and are not recorded
 *   POWERCUT_NOSYNC  set: no sync reaches the disk; all are recorded
 * and one function, for a program that wants to be killed: powercut_arm(n) sends SIGKILL at the n-th operation from
 * now: before it is done, or, if it writes to a file or to a socket, when half of it is written.
 *
 * One lock gives the operations an order. It is held while an operation changes a file or a directory, so that the
 * order is the real one; a sync is two records, because only what was written before it began is safe when it ends;
 * an answer is recorded before it is sent. Nothing is kept by descriptor: what a descriptor is, the kernel says, so
 * duplicated, inherited and passed descriptors need no care.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <netinet/in.h>
#include <unistd.h>

#define LONGEST_ANSWER 4096
#define PARTS 1024 /* IOV_MAX */

enum kind {
    CREATE = 1, WRITE, TRUNCATE, RENAME, LINK, UNLINK, MKDIR, RMDIR, SYNC_BEGIN, SYNC_END, SEND, ESCAPE, ALLOCATE
};

struct __attribute__((packed)) record { /* replay.py knows it as "<IBBHHHIIQqQ" */
    uint32_t magic;
    uint8_t kind, spare;
    uint16_t path_length, target_length, spare2;
    uint32_t data_length, thread;
    uint64_t inode;
    int64_t offset;
    uint64_t length;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_length;
static int trace = -1;
static int no_sync;
static const char *ignored = "";
static long armed;

__attribute__((constructor)) static void begin(void)
{
    const char *where = getenv("POWERCUT_ROOT"), *file = getenv("POWERCUT_TRACE");
    if (where == NULL || *where == 0)
        return;
    snprintf(root, sizeof root, "%s", where);
    root_length = strlen(root);
    if (getenv("POWERCUT_IGNORE"))
        ignored = getenv("POWERCUT_IGNORE");
    no_sync = getenv("POWERCUT_NOSYNC") != NULL;
    if (file != NULL && *file) {
        int low = syscall(SYS_openat, AT_FDCWD, file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        trace = syscall(SYS_fcntl, low, F_DUPFD_CLOEXEC, 500); /* out of the way of who counts descriptors */
        syscall(SYS_close, low);
        if (trace < 0)
            abort();
    }
}

void powercut_arm(long operations)
{
    pthread_mutex_lock(&lock);
    armed = operations;
    pthread_mutex_unlock(&lock);
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (real == NULL) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* --- what is watched ---------------------------------------------------------------------------------- */

static int below_root(const char *path)
{
    return root_length && strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == 0);
}

static int where_is(int fd, char *path)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
    return length > 0;
}

/* Whether a descriptor is a file (or, if asked for, a directory) of ours; then also what and where it is. */
static int watched(int fd, mode_t type, struct stat *is, char *path)
{
    int before = errno;
    int yes = root_length && fd >= 0 && fstat(fd, is) == 0 && (is->st_mode & S_IFMT) == type && where_is(fd, path) &&
              below_root(path);
    errno = before;
    return yes;
}

/* A path as the folder that really holds its last part, and that part. 0 if it is not below the root. */
static int resolve(int at, const char *path, char *out)
{
    char whole[2 * PATH_MAX], folder[PATH_MAX];
    int before = errno;
    if (!root_length)
        return 0;
    if (path[0] == '/')
        snprintf(whole, sizeof whole, "%s", path);
    else {
        if (at == AT_FDCWD ? getcwd(folder, sizeof folder) == NULL : !where_is(at, folder))
            return errno = before, 0;
        snprintf(whole, sizeof whole, "%s/%s", folder, path);
    }
    for (size_t end = strlen(whole); end > 1 && whole[end - 1] == '/'; end--)
        whole[end - 1] = 0;
    char *slash = strrchr(whole, '/');
    *slash = 0;
    int found = realpath(*whole ? whole : "/", folder) != NULL;
    errno = before;
    if (!found)
        return 0;
    int length = snprintf(out, PATH_MAX, "%s/%s", strcmp(folder, "/") ? folder : "", slash + 1);
    return length < PATH_MAX && below_root(out);
}

static int is_peer(int fd, struct stat *is, int *port)
{
    int before = errno, domain = 0, yes = 0;
    socklen_t size = sizeof domain;
    if (root_length && fstat(fd, is) == 0 && S_ISSOCK(is->st_mode) &&
        getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) == 0 && (domain == AF_INET || domain == AF_INET6)) {
        struct sockaddr_storage address;
        size = sizeof address;
        *port = 0;
        if (getpeername(fd, (struct sockaddr *)&address, &size) == 0)
            *port = ntohs(((struct sockaddr_in *)&address)->sin_port); /* sin6_port lies at the same place */
        yes = 1;
    }
    errno = before;
    return yes;
}

/* --- records ------------------------------------------------------------------------------------------ */

static void put(enum kind kind, uint64_t inode, const char *path, const char *target, int64_t offset, uint64_t length,
                const struct iovec *data, int parts, size_t bytes)
{
    if (trace < 0)
        return;
    int before = errno;
    struct record head = {0x54554350, kind, 0, strlen(path), strlen(target), 0, bytes, syscall(SYS_gettid), inode,
                          offset, length};
    struct iovec all[PARTS + 3] = {{&head, sizeof head}, {(void *)path, head.path_length},
                                   {(void *)target, head.target_length}};
    int count = 3;
    size_t expected = sizeof head + head.path_length + head.target_length + bytes;
    for (int i = 0; i < parts && bytes > 0 && count < PARTS; i++) {
        size_t take = data[i].iov_len < bytes ? data[i].iov_len : bytes;
        all[count++] = (struct iovec){data[i].iov_base, take};
        bytes -= take;
    }
    if (bytes > 0 || syscall(SYS_writev, trace, all, count) != (ssize_t)expected)
        abort(); /* a trace with a gap proves nothing */
    errno = before;
}

static void note(enum kind kind, uint64_t inode, const char *path, int64_t offset, uint64_t length)
{
    put(kind, inode, path, "", offset, length, NULL, 0, 0);
}

static void die(void)
{
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;)
        pause();
}

/* Counts an operation; true for the one at which to die. Under the lock. */
static int due(void)
{
    return armed > 0 && --armed == 0;
}

static void enter(void)
{
    pthread_mutex_lock(&lock);
    if (due())
        die();
}

static void leave(void)
{
    pthread_mutex_unlock(&lock);
}

static void escape(const char *call, const char *path)
{
    char said[PATH_MAX + 64];
    snprintf(said, sizeof said, "%s %s", call, path);
    pthread_mutex_lock(&lock);
    note(ESCAPE, 0, said, 0, 0);
    pthread_mutex_unlock(&lock);
}

/* --- files: opening ------------------------------------------------------------------------------------ */

static int open_with(int (*call)(int, const char *, int, mode_t), int at, const char *path, int flags, mode_t mode)
{
    char place[PATH_MAX];
    struct stat before, is;
    int nameless = (flags & O_TMPFILE) == O_TMPFILE;
    if (!root_length || !(nameless || flags & (O_CREAT | O_TRUNC)) || !resolve(at, path, place))
        return call(at, path, flags, mode);
    pthread_mutex_lock(&lock);
    int saved = errno;
    int existed = !nameless && fstatat(at, path, &before, 0) == 0;
    errno = saved;
    int operation = !existed || (flags & O_TRUNC && before.st_size > 0);
    if (operation && due())
        die();
    int fd = call(at, path, flags, mode);
    if (fd >= 0 && operation && watched(fd, S_IFREG, &is, place)) {
        if (!existed)
            note(CREATE, is.st_ino, nameless ? "" : place, 0, 0);
        else
            note(TRUNCATE, is.st_ino, place, 0, 0);
    }
    leave();
    return fd;
}

static int real_openat(int at, const char *path, int flags, mode_t mode)
{
    REAL(openat);
    return real(at, path, flags, mode);
}

#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }

int open(const char *path, int flags, ...) { MODE(flags) return open_with(real_openat, AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return open_with(real_openat, AT_FDCWD, path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE(flags) return open_with(real_openat, at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE(flags) return open_with(real_openat, at, path, flags, mode); }
int creat(const char *path, mode_t mode) { return open_with(real_openat, AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }
int __open_2(const char *path, int flags) { return open_with(real_openat, AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return open_with(real_openat, AT_FDCWD, path, flags, 0); }
int __openat_2(int at, const char *path, int flags) { return open_with(real_openat, at, path, flags, 0); }
int __openat64_2(int at, const char *path, int flags) { return open_with(real_openat, at, path, flags, 0); }

/* --- files and sockets: writing ------------------------------------------------------------------------ */

static size_t total(const struct iovec *data, int parts)
{
    size_t bytes = 0;
    for (int i = 0; i < parts; i++)
        bytes += data[i].iov_len;
    return bytes;
}

/* Writes to a watched file, at its position (offset -1) or elsewhere. */
static ssize_t write_file(int fd, const struct iovec *data, int parts, off_t offset, const struct stat *is,
                          const char *path)
{
    REAL(pwritev);
    static __typeof__(writev) *at_position;
    if (at_position == NULL)
        at_position = (__typeof__(writev) *)dlsym(RTLD_NEXT, "writev");
    pthread_mutex_lock(&lock);
    off_t place = offset;
    if (offset < 0) {
        struct stat now;
        int appends = fcntl(fd, F_GETFL) & O_APPEND;
        place = appends && fstat(fd, &now) == 0 ? now.st_size : lseek(fd, 0, SEEK_CUR);
    }
    if (due()) {
        size_t half = total(data, parts) / 2;
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_DIRECT); /* half of whole blocks need not be whole blocks */
        for (int i = 0; i < parts && half > 0; i++) {
            size_t take = data[i].iov_len < half ? data[i].iov_len : half;
            if (syscall(SYS_pwrite64, fd, data[i].iov_base, take, place) < 0)
                break;
            half -= take, place += take;
        }
        die();
    }
    ssize_t written = offset < 0 ? at_position(fd, data, parts) : real(fd, data, parts, offset);
    if (written > 0)
        put(WRITE, is->st_ino, path, "", place, written, data, parts, written);
    leave();
    return written;
}

/* Notes what goes to a peer, before it goes. */
static void announce(int fd, const struct iovec *data, int parts, const struct stat *is, int port)
{
    size_t bytes = total(data, parts);
    pthread_mutex_lock(&lock);
    if (due()) {
        if (parts > 0 && bytes > 0)
            syscall(SYS_sendto, fd, data[0].iov_base, data[0].iov_len / 2, MSG_NOSIGNAL, NULL, 0);
        die();
    }
    put(SEND, is->st_ino, "", "", port, bytes, data, parts, bytes < LONGEST_ANSWER ? bytes : LONGEST_ANSWER);
    leave();
}

#define WRITES(fd, data, parts, offset, otherwise) \
    struct stat is; \
    char path[PATH_MAX]; \
    int port; \
    if (watched(fd, S_IFREG, &is, path)) \
        return write_file(fd, data, parts, offset, &is, path); \
    if (is_peer(fd, &is, &port)) \
        announce(fd, data, parts, &is, port); \
    return otherwise

ssize_t write(int fd, const void *bytes, size_t count)
{
    REAL(write);
    struct iovec data = {(void *)bytes, count};
    WRITES(fd, &data, 1, -1, real(fd, bytes, count));
}

ssize_t writev(int fd, const struct iovec *data, int parts)
{
    REAL(writev);
    WRITES(fd, data, parts, -1, real(fd, data, parts));
}

#define POSITIONED(name, type) \
    ssize_t name(int fd, const void *bytes, size_t count, type offset) \
    { \
        REAL(name); \
        struct iovec data = {(void *)bytes, count}; \
        WRITES(fd, &data, 1, offset, real(fd, bytes, count, offset)); \
    }
POSITIONED(pwrite, off_t)
POSITIONED(pwrite64, off64_t)

#define GATHERED(name, type) \
    ssize_t name(int fd, const struct iovec *data, int parts, type offset) \
    { \
        REAL(name); \
        WRITES(fd, data, parts, offset, real(fd, data, parts, offset)); \
    }
GATHERED(pwritev, off_t)
GATHERED(pwritev64, off64_t)

#define GATHERED2(name, type) \
    ssize_t name(int fd, const struct iovec *data, int parts, type offset, int flags) \
    { \
        REAL(name); \
        WRITES(fd, data, parts, offset, real(fd, data, parts, offset, flags)); \
    }
GATHERED2(pwritev2, off_t)
GATHERED2(pwritev64v2, off64_t)

ssize_t send(int fd, const void *bytes, size_t count, int flags)
{
    REAL(send);
    struct iovec data = {(void *)bytes, count};
    struct stat is;
    int port;
    if (is_peer(fd, &is, &port))
        announce(fd, &data, 1, &is, port);
    return real(fd, bytes, count, flags);
}

ssize_t sendto(int fd, const void *bytes, size_t count, int flags, const struct sockaddr *to, socklen_t size)
{
    REAL(sendto);
    struct iovec data = {(void *)bytes, count};
    struct stat is;
    int port;
    if (is_peer(fd, &is, &port))
        announce(fd, &data, 1, &is, port);
    return real(fd, bytes, count, flags, to, size);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
    REAL(sendmsg);
    struct stat is;
    int port;
    if (is_peer(fd, &is, &port))
        announce(fd, message->msg_iov, message->msg_iovlen, &is, port);
    return real(fd, message, flags);
}

int sendmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags)
{
    REAL(sendmmsg);
    struct stat is;
    int port;
    if (is_peer(fd, &is, &port))
        escape("sendmmsg", "");
    return real(fd, messages, count, flags);
}

/* --- files: size ---------------------------------------------------------------------------------------- */

#define TRUNCATES(name, type) \
    int name(int fd, type size) \
    { \
        REAL(name); \
        struct stat is; \
        char path[PATH_MAX]; \
        if (!watched(fd, S_IFREG, &is, path)) \
            return real(fd, size); \
        enter(); \
        int answer = real(fd, size); \
        if (answer == 0) \
            note(TRUNCATE, is.st_ino, path, 0, size); \
        leave(); \
        return answer; \
    }
TRUNCATES(ftruncate, off_t)
TRUNCATES(ftruncate64, off64_t)

static int allocate(int (*call)(int, int, off_t, off_t), int fd, int mode, off_t offset, off_t length)
{
    struct stat is;
    char path[PATH_MAX];
    if (!watched(fd, S_IFREG, &is, path))
        return call(fd, mode, offset, length);
    if (mode & ~FALLOC_FL_KEEP_SIZE)
        escape("fallocate", path);
    enter();
    int answer = call(fd, mode, offset, length);
    if (answer == 0 && mode == 0)
        note(ALLOCATE, is.st_ino, path, offset, length);
    leave();
    return answer;
}

static int real_fallocate(int fd, int mode, off_t offset, off_t length)
{
    REAL(fallocate);
    return real(fd, mode, offset, length);
}

static int real_posix_fallocate(int fd, int mode, off_t offset, off_t length)
{
    REAL(posix_fallocate);
    (void)mode;
    return real(fd, offset, length);
}

int fallocate(int fd, int mode, off_t offset, off_t length) { return allocate(real_fallocate, fd, mode, offset, length); }
int fallocate64(int fd, int mode, off64_t offset, off64_t length) { return allocate(real_fallocate, fd, mode, offset, length); }
int posix_fallocate(int fd, off_t offset, off_t length) { return allocate(real_posix_fallocate, fd, 0, offset, length); }
int posix_fallocate64(int fd, off64_t offset, off64_t length) { return allocate(real_posix_fallocate, fd, 0, offset, length); }

/* --- directories ---------------------------------------------------------------------------------------- */

static int rename_with(int old_at, const char *old, int new_at, const char *new, unsigned flags)
{
    REAL(renameat2);
    char from[PATH_MAX], to[PATH_MAX];
    struct stat is;
    int leaves = resolve(old_at, old, from), comes = resolve(new_at, new, to);
    if (!leaves && !comes)
        return real(old_at, old, new_at, new, flags);
    if (leaves != comes || flags & ~RENAME_NOREPLACE)
        escape("rename", leaves ? from : to);
    enter();
    int answer = real(old_at, old, new_at, new, flags);
    if (answer == 0 && fstatat(new_at, new, &is, AT_SYMLINK_NOFOLLOW) == 0) {
        if (!S_ISREG(is.st_mode))
            note(ESCAPE, 0, "rename of something other than a file", 0, 0);
        put(RENAME, is.st_ino, from, to, 0, 0, NULL, 0, 0);
    }
    leave();
    return answer;
}

int rename(const char *old, const char *new) { return rename_with(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int old_at, const char *old, int new_at, const char *new) { return rename_with(old_at, old, new_at, new, 0); }
int renameat2(int old_at, const char *old, int new_at, const char *new, unsigned flags)
{
    return rename_with(old_at, old, new_at, new, flags);
}

static int link_with(int old_at, const char *old, int new_at, const char *new, int flags)
{
    REAL(linkat);
    char to[PATH_MAX];
    struct stat is;
    if (!resolve(new_at, new, to))
        return real(old_at, old, new_at, new, flags);
    enter();
    int answer = real(old_at, old, new_at, new, flags);
    if (answer == 0 && fstatat(new_at, new, &is, AT_SYMLINK_NOFOLLOW) == 0)
        note(LINK, is.st_ino, to, 0, 0);
    leave();
    return answer;
}

int link(const char *old, const char *new) { return link_with(AT_FDCWD, old, AT_FDCWD, new, 0); }
int linkat(int old_at, const char *old, int new_at, const char *new, int flags)
{
    return link_with(old_at, old, new_at, new, flags);
}

static int unlink_with(int at, const char *path, int flags)
{
    REAL(unlinkat);
    char place[PATH_MAX];
    struct stat is;
    int before = errno;
    int ours = resolve(at, path, place) && fstatat(at, path, &is, AT_SYMLINK_NOFOLLOW) == 0 &&
               (S_ISREG(is.st_mode) || S_ISDIR(is.st_mode));
    errno = before;
    if (!ours)
        return real(at, path, flags);
    enter();
    int answer = real(at, path, flags);
    if (answer == 0)
        note(S_ISDIR(is.st_mode) ? RMDIR : UNLINK, is.st_ino, place, 0, 0);
    leave();
    return answer;
}

int unlink(const char *path) { return unlink_with(AT_FDCWD, path, 0); }
int unlinkat(int at, const char *path, int flags) { return unlink_with(at, path, flags); }
int rmdir(const char *path) { return unlink_with(AT_FDCWD, path, AT_REMOVEDIR); }

int remove(const char *path)
{
    struct stat is;
    int before = errno, folder = lstat(path, &is) == 0 && S_ISDIR(is.st_mode);
    errno = before;
    return folder ? rmdir(path) : unlink(path);
}

int mkdirat(int at, const char *path, mode_t mode)
{
    REAL(mkdirat);
    char place[PATH_MAX];
    struct stat is;
    int before = errno;
    int ours = resolve(at, path, place) && fstatat(at, path, &is, AT_SYMLINK_NOFOLLOW) != 0;
    errno = before;
    if (!ours)
        return real(at, path, mode);
    enter();
    int answer = real(at, path, mode);
    if (answer == 0 && fstatat(at, path, &is, AT_SYMLINK_NOFOLLOW) == 0)
        note(MKDIR, is.st_ino, place, 0, 0);
    leave();
    return answer;
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

/* --- syncs ---------------------------------------------------------------------------------------------- */

static int ignores(const struct stat *is, const char *path)
{
    const char *name = strrchr(path, '/');
    int ledger = name != NULL && strncmp(name, "/ledger.sqlite", 14) == 0;
    if (S_ISDIR(is->st_mode))
        return strcmp(ignored, "dirsync") == 0;
    return strcmp(ignored, ledger ? "ledgersync" : "filesync") == 0;
}

static int sync_with(int (*call)(int), int fd)
{
    struct stat is;
    char path[PATH_MAX];
    if (!watched(fd, S_IFREG, &is, path) && !watched(fd, S_IFDIR, &is, path))
        return call(fd);
    if (ignores(&is, path))
        return 0;
    enter();
    note(SYNC_BEGIN, is.st_ino, path, 0, S_ISDIR(is.st_mode));
    leave();
    int answer = no_sync ? 0 : call(fd);
    enter();
    if (answer == 0)
        note(SYNC_END, is.st_ino, path, 0, S_ISDIR(is.st_mode));
    leave();
    return answer;
}

static int real_fsync(int fd)
{
    REAL(fsync);
    return real(fd);
}

static int real_fdatasync(int fd)
{
    REAL(fdatasync);
    return real(fd);
}

int fsync(int fd) { return sync_with(real_fsync, fd); }
int fdatasync(int fd) { return sync_with(real_fdatasync, fd); }

/* sync_file_range promises nothing after a power cut (sync_file_range(2)), so it needs no record. */

int syncfs(int fd)
{
    REAL(syncfs);
    escape("syncfs", "");
    return real(fd);
}

void sync(void)
{
    REAL(sync);
    escape("sync", "");
    real();
}

int msync(void *address, size_t length, int flags)
{
    REAL(msync);
    return real(address, length, flags); /* what is mapped for writing is an escape already */
}

/* --- what the replay does not understand ----------------------------------------------------------------- */

static void mapped(int protection, int flags, int fd)
{
    struct stat is;
    char path[PATH_MAX];
    if (fd < 0 || !(flags & MAP_SHARED) || !(protection & PROT_WRITE) || !watched(fd, S_IFREG, &is, path))
        return;
    size_t length = strlen(path);
    /* The index of SQLite's WAL: it is built anew from the WAL itself by who opens the database first. */
    if (length < 4 || strcmp(path + length - 4, "-shm") != 0)
        escape("mmap", path);
}

void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    if (root_length)
        mapped(protection, flags, fd);
    return (void *)syscall(SYS_mmap, address, length, protection, flags, fd, offset);
}

void *mmap64(void *address, size_t length, int protection, int flags, int fd, off64_t offset)
{
    return mmap(address, length, protection, flags, fd, offset);
}

static void other(const char *call, int fd)
{
    struct stat is;
    char path[PATH_MAX];
    if (watched(fd, S_IFREG, &is, path))
        escape(call, path);
}

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t length, unsigned flags)
{
    REAL(copy_file_range);
    other("copy_file_range", out);
    return real(in, from, out, to, length, flags);
}

ssize_t sendfile(int out, int in, off_t *offset, size_t count)
{
    REAL(sendfile);
    other("sendfile", out);
    return real(out, in, offset, count);
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t count)
{
    REAL(sendfile64);
    other("sendfile64", out);
    return real(out, in, offset, count);
}

ssize_t splice(int in, off64_t *from, int out, off64_t *to, size_t length, unsigned flags)
{
    REAL(splice);
    other("splice", out);
    return real(in, from, out, to, length, flags);
}

#define TRUNCATES_PATH(name, type) \
    int name(const char *path, type size) \
    { \
        REAL(name); \
        char place[PATH_MAX]; \
        if (resolve(AT_FDCWD, path, place)) \
            escape("truncate", place); \
        return real(path, size); \
    }
TRUNCATES_PATH(truncate, off_t)
TRUNCATES_PATH(truncate64, off64_t)

int symlinkat(const char *to, int at, const char *path)
{
    REAL(symlinkat);
    char place[PATH_MAX];
    if (resolve(at, path, place))
        escape("symlink", place);
    return real(to, at, path);
}

int symlink(const char *to, const char *path) { return symlinkat(to, AT_FDCWD, path); }
