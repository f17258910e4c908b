/* Shared by the target programs in C: clock, list of errors, answers, gap meter.
 *
 * A program's state that several of its processes use lies in one shared mapping, made before any fork. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_ERRORS 24
#define MAX_PROCESSES 8

static struct {
    atomic_int errors;
    char error[MAX_ERRORS][200];
    atomic_long gap[MAX_PROCESSES];
} *common;

static inline int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static inline void nap_us(long us) {
    struct timespec t = {us / 1000000, us % 1000000 * 1000};
    while (nanosleep(&t, &t) == -1 && errno == EINTR) {
    }
}

__attribute__((format(printf, 1, 2))) static inline void fail(const char *format, ...) {
    int slot = atomic_fetch_add(&common->errors, 1);
    if (slot >= MAX_ERRORS)
        return;
    va_list list;
    va_start(list, format);
    vsnprintf(common->error[slot], sizeof common->error[slot], format, list);
    va_end(list);
}

/* For what the test cannot go on without. */
__attribute__((format(printf, 1, 2), noreturn)) static inline void die(const char *format, ...) {
    int error = errno;
    va_list list;
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fprintf(stderr, ": %s\n", strerror(error));
    exit(3);
}

static inline void print_text(const char *text) {
    putchar('"');
    for (; *text; text++) {
        unsigned char c = *text;
        if (c == '"' || c == '\\')
            printf("\\%c", c);
        else if (c < 0x20 || c >= 0x7f)
            printf("\\u%04x", c);
        else
            putchar(c);
    }
    putchar('"');
}

/* Opens an answer with the errors so far; the caller adds `,"key":value` and ends it. */
static inline void answer_begin(void) {
    printf("{\"errors\":[");
    int count = atomic_load(&common->errors);
    for (int i = 0; i < count && i < MAX_ERRORS; i++) {
        if (i)
            putchar(',');
        print_text(common->error[i]);
    }
    printf("],\"error_count\":%d", count);
}

static inline void answer_end(void) {
    printf("}\n");
    fflush(stdout);
}

static inline void *shared(size_t size) {
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        die("mmap");
    return at;
}

static inline void common_init(void) {
    common = shared(sizeof *common);
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

/* Measures the longest time in which this process did not run, by reading the clock all the while.
 * With `nap` it sleeps in between, which spares the machine and costs precision. */
struct gap_meter {
    int slot;
    bool nap;
};

static inline void *gap_thread(void *argument) {
    struct gap_meter *meter = argument;
    int64_t last = now_ns();
    for (;;) {
        if (meter->nap) {
            nap_us(200);
        }
        int64_t now = now_ns();
        if (now - last > atomic_load_explicit(&common->gap[meter->slot], memory_order_relaxed))
            atomic_store(&common->gap[meter->slot], now - last);
        last = now;
    }
    return NULL;
}

static inline void gap_start(int slot, const char *how) {
    static struct gap_meter meter;
    if (!strcmp(how, "none"))
        return;
    meter.slot = slot;
    meter.nap = strcmp(how, "spin") != 0;
    pthread_t thread;
    if (pthread_create(&thread, NULL, gap_thread, &meter))
        die("pthread_create");
}

static inline void gap_reset(void) {
    for (int i = 0; i < MAX_PROCESSES; i++)
        atomic_store(&common->gap[i], 0);
}

static inline long gap_longest_us(void) {
    long longest = 0;
    for (int i = 0; i < MAX_PROCESSES; i++) {
        long gap = atomic_load(&common->gap[i]);
        if (gap > longest)
            longest = gap;
    }
    return longest / 1000;
}

/* The next command line without its end; NULL at end of file. */
static inline char *next_command(void) {
    static char line[4096];
    if (!fgets(line, sizeof line, stdin))
        return NULL;
    line[strcspn(line, "\n")] = 0;
    return line;
}
