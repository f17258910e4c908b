/* ops: does file operations on demand, counts their results and times them.
 *
 * Commands (SLOT 0..63; COUNT repetitions; answers hold ok, failed, errno{NAME:n}, first_failed, median_us, p90_us, max_us):
 *   open SLOT FLAGS PATH   FLAGS out of r w + (both) c t a x s(sync) d(direct) n(excl) p(O_PATH) D(directory) T(tmpfile in PATH)
 *   close SLOT
 *   write|read SLOT COUNT SIZE    at offset 0, SIZE, 2*SIZE, … modulo 1 MiB; read answers also `sum` of the bytes
 *   fsync|fdatasync|fstat SLOT COUNT
 *   append SLOT COUNT SIZE
 *   stat|openclose|readdir COUNT PATH
 *   rename|link FROM TO; name SLOT PATH (links a tmpfile); unlink|mkdir|rmdir PATH; create COUNT DIR
 *   cat PATH (answers `text`, 1 KiB at most); size SLOT
 *   lock SLOT r|w|u START LENGTH (a POSIX lock, without waiting; u gives it up); held SLOT START LENGTH (`sum`: 2 when another process keeps us from reading,
 *     1 from writing, 0 from neither); map SLOT (one page, shared, for ever)
 *   exit (no answer: ends at once with its descriptors open); pid; report; reset; quit */

#define SLOTS 64
#define MOST 200000
static int table[SLOTS];
static int64_t times[MOST];
static int errnos[200];
static long done, bad, first_bad;
static unsigned long long sum;

static const char *errno_name(int number) {
    const char *name = strerrorname_np(number);
    return name ? name : "?";
}

static int by_time(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

static void began(void) {
    memset(errnos, 0, sizeof errnos);
    done = bad = sum = 0;
    first_bad = -1;
}

static void took(int64_t start, bool ok) {
    int error = errno;
    long n = done + bad;
    if (n < MOST)
        times[n] = now_ns() - start;
    if (ok) {
        done++;
        return;
    }
    if (first_bad < 0)
        first_bad = n;
    bad++;
    if (error >= 0 && error < 200)
        errnos[error]++;
}

static void answer(void) {
    long n = done + bad;
    answer_begin();
    printf(",\"ok\":%ld,\"failed\":%ld,\"first_failed\":%ld,\"sum\":%llu,\"gap_us\":%ld,\"errno\":{", done, bad, first_bad,
           sum, gap_longest_us());
    bool first = true;
    for (int i = 0; i < 200; i++) {
        if (errnos[i]) {
            printf("%s\"%s\":%d", first ? "" : ",", errno_name(i), errnos[i]);
            first = false;
        }
    }
    printf("}");
    if (n > MOST)
        n = MOST;
    if (n > 0) {
        qsort(times, n, sizeof times[0], by_time);
        printf(",\"median_us\":%lld,\"p90_us\":%lld,\"max_us\":%lld", (long long)times[n / 2] / 1000,
               (long long)times[n * 9 / 10] / 1000, (long long)times[n - 1] / 1000);
    }
    answer_end();
}

static int open_flags(const char *text) {
    int flags = strchr(text, '+') ? O_RDWR : strchr(text, 'w') || strchr(text, 'a') ? O_WRONLY : O_RDONLY;
    for (; *text; text++) {
        switch (*text) {
        case 'c': flags |= O_CREAT; break;
        case 't': flags |= O_TRUNC; break;
        case 'a': flags |= O_APPEND; break;
        case 's': flags |= O_SYNC; break;
        case 'd': flags |= O_DIRECT; break;
        case 'n': flags |= O_EXCL; break;
        case 'D': flags |= O_DIRECTORY; break;
        case 'p': flags |= O_PATH; break;
        case 'T': flags |= O_TMPFILE; break;
        }
    }
    return flags;
}

int main(void) {
    common_init();
    for (int i = 0; i < SLOTS; i++)
        table[i] = -1;
    unsigned char *buffer = aligned_alloc(4096, 1 << 20);
    if (!buffer)
        return 3;
    memset(buffer, 'h', 1 << 20);
    gap_start(0, "nap");
    printf("{\"ready\":true,\"pids\":[%d]}\n", getpid());
    fflush(stdout);
    for (char *line; (line = next_command());) {
        char verb[32] = "", first[2048] = "", second[2048] = "";
        int slot = 0;
        long count = 1, size = 4096;
        began();
        if (sscanf(line, "%31s", verb) != 1)
            continue;
        bool quit = !strcmp(verb, "quit");
        int64_t start = now_ns();
        if (quit || !strcmp(verb, "report") || !strcmp(verb, "pid")) {
        } else if (!strcmp(verb, "reset")) {
            gap_reset();
        } else if (!strcmp(verb, "exit")) {
            _exit(0);
        } else if (sscanf(line, "open %d %63s %2047s", &slot, second, first) == 3) {
            int fd = open(first, open_flags(second), 0644);
            took(start, fd >= 0);
            table[slot % SLOTS] = fd;
        } else if (sscanf(line, "close %d", &slot) == 1) {
            took(start, close(table[slot % SLOTS]) == 0);
            table[slot % SLOTS] = -1;
        } else if (sscanf(line, "lock %d %1s %ld %ld", &slot, second, &count, &size) == 4) {
            struct flock lock = {.l_whence = SEEK_SET, .l_start = count, .l_len = size};
            lock.l_type = second[0] == 'r' ? F_RDLCK : second[0] == 'w' ? F_WRLCK : F_UNLCK;
            took(start, fcntl(table[slot % SLOTS], F_SETLK, &lock) == 0);
        } else if (sscanf(line, "held %d %ld %ld", &slot, &count, &size) == 3) {
            struct flock read = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = count, .l_len = size}, write = read;
            write.l_type = F_WRLCK;
            took(start, fcntl(table[slot % SLOTS], F_GETLK, &read) == 0 && fcntl(table[slot % SLOTS], F_GETLK, &write) == 0);
            sum = read.l_type != F_UNLCK ? 2 : write.l_type != F_UNLCK ? 1 : 0;
        } else if (sscanf(line, "map %d", &slot) == 1) {
            took(start, mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, table[slot % SLOTS], 0) != MAP_FAILED);
        } else if (sscanf(line, "size %d", &slot) == 1) {
            struct stat status;
            bool ok = fstat(table[slot % SLOTS], &status) == 0;
            took(start, ok);
            if (ok)
                sum = status.st_size;
        } else if (sscanf(line, "write %d %ld %ld", &slot, &count, &size) == 3 ||
                   sscanf(line, "append %d %ld %ld", &slot, &count, &size) == 3 ||
                   sscanf(line, "read %d %ld %ld", &slot, &count, &size) == 3) {
            if (size < 1 || size > 1 << 20)
                size = 4096;
            for (long i = 0; i < count; i++) {
                off_t offset = i * size % (1 << 20);
                start = now_ns();
                ssize_t got = verb[0] == 'w'   ? pwrite(table[slot % SLOTS], buffer, size, offset)
                              : verb[0] == 'a' ? write(table[slot % SLOTS], buffer, size)
                                               : pread(table[slot % SLOTS], buffer, size, offset);
                took(start, got >= 0);
                if (got > 0 && verb[0] == 'r') {
                    for (ssize_t b = 0; b < got; b++)
                        sum += buffer[b];
                    memset(buffer, 'h', got);
                }
            }
        } else if (sscanf(line, "fsync %d %ld", &slot, &count) == 2 ||
                   sscanf(line, "fdatasync %d %ld", &slot, &count) == 2 ||
                   sscanf(line, "fstat %d %ld", &slot, &count) == 2) {
            struct stat status;
            for (long i = 0; i < count; i++) {
                /* Something to write back, outside of what is timed; its own failure is not what is asked. */
                if (strcmp(verb, "fstat") && pwrite(table[slot % SLOTS], buffer, 512, 0) < 0)
                    errno = 0;
                start = now_ns();
                int result = !strcmp(verb, "fsync")       ? fsync(table[slot % SLOTS])
                             : !strcmp(verb, "fdatasync") ? fdatasync(table[slot % SLOTS])
                                                          : fstat(table[slot % SLOTS], &status);
                took(start, result == 0);
            }
        } else if (sscanf(line, "stat %ld %2047s", &count, first) == 2 ||
                   sscanf(line, "openclose %ld %2047s", &count, first) == 2 ||
                   sscanf(line, "create %ld %2047s", &count, first) == 2 ||
                   sscanf(line, "readdir %ld %2047s", &count, first) == 2) {
            struct stat status;
            for (long i = 0; i < count; i++) {
                start = now_ns();
                bool ok;
                if (verb[0] == 's') {
                    ok = stat(first, &status) == 0;
                    if (ok)
                        sum = status.st_size;
                } else if (verb[0] == 'o') {
                    int fd = open(first, O_RDONLY | O_CLOEXEC);
                    ok = fd >= 0;
                    if (ok)
                        close(fd);
                } else if (verb[0] == 'c') {
                    snprintf(second, sizeof second, "%.1900s/created-%ld", first, i);
                    int fd = open(second, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
                    ok = fd >= 0;
                    if (ok)
                        close(fd);
                } else {
                    DIR *dir = opendir(first);
                    ok = dir != NULL;
                    if (ok) {
                        errno = 0;
                        while (readdir(dir))
                            sum++;
                        ok = errno == 0;
                        closedir(dir);
                    }
                }
                took(start, ok);
            }
        } else if (sscanf(line, "rename %2047s %2047s", first, second) == 2) {
            took(start, rename(first, second) == 0);
        } else if (sscanf(line, "link %2047s %2047s", first, second) == 2) {
            took(start, link(first, second) == 0);
        } else if (sscanf(line, "name %d %2047s", &slot, first) == 2) {
            snprintf(second, sizeof second, "/proc/self/fd/%d", table[slot % SLOTS]);
            took(start, linkat(AT_FDCWD, second, AT_FDCWD, first, AT_SYMLINK_FOLLOW) == 0);
        } else if (sscanf(line, "unlink %2047s", first) == 1) {
            took(start, unlink(first) == 0);
        } else if (sscanf(line, "mkdir %2047s", first) == 1) {
            took(start, mkdir(first, 0755) == 0);
        } else if (sscanf(line, "rmdir %2047s", first) == 1) {
            took(start, rmdir(first) == 0);
        } else if (sscanf(line, "cat %2047s", first) == 1) {
            int fd = open(first, O_RDONLY | O_CLOEXEC);
            ssize_t got = fd < 0 ? -1 : read(fd, second, 1024);
            took(start, got >= 0);
            close(fd);
            answer_begin();
            second[got < 0 ? 0 : got] = 0;
            printf(",\"ok\":%ld,\"failed\":%ld,\"text\":", done, bad);
            print_text(second);
            answer_end();
            continue;
        } else {
            fail("cannot do %s", line);
        }
        answer();
        if (quit)
            return 0;
    }
    return 0;
}
