/* once DIR PROCESSES
 *
 * Does all the while what must not be done twice, from several processes: appends numbered records to one file, makes, renames, links and removes names and
 * directories, sets and removes attributes, takes and gives up locks. Every failure is an error; nothing is forgiven.
 *
 * Commands: report (operations so far, and the longest that one has taken), reset (of the longest), check (every record that was written is in the file once, in
 * order, and no other), quit. */
#include <sys/xattr.h>

static struct {
    atomic_bool stop, hold;
    atomic_int held;
    atomic_long rounds[MAX_PROCESSES];
    atomic_long operations, longest_ns;
} *all;

static int processes;
static int self;

static void took(const char *what, int64_t start, bool ok) {
    int error = errno;
    int64_t time = now_ns() - start;
    atomic_fetch_add(&all->operations, 1);
    long longest = atomic_load(&all->longest_ns);
    while (time > longest && !atomic_compare_exchange_weak(&all->longest_ns, &longest, time)) {
    }
    if (!ok)
        fail("%d: %s: %s", self, what, strerror(error));
}

#define DO(what, call)                   \
    do {                                 \
        int64_t start = now_ns();        \
        errno = 0;                       \
        took(what, start, (call) != -1); \
    } while (0)

static void work(void) {
    char name[64], other[64], directory[64];
    snprintf(name, sizeof name, "name-%d", self);
    snprintf(other, sizeof other, "other-%d", self);
    snprintf(directory, sizeof directory, "directory-%d", self);
    int log = open("log", O_WRONLY | O_APPEND | O_CLOEXEC);
    int locked = open("locked", O_RDWR | O_CLOEXEC);
    if (log < 0 || locked < 0)
        die("open");
    for (long round = 0; !atomic_load(&all->stop); round++) {
        while (atomic_load(&all->hold)) {
            atomic_fetch_add(&all->held, 1);
            while (atomic_load(&all->hold))
                nap_us(200);
            atomic_fetch_sub(&all->held, 1);
        }
        char record[32];
        int length = snprintf(record, sizeof record, "%d %ld\n", self, round);
        DO("append", write(log, record, length));
        atomic_store(&all->rounds[self], round + 1);
        if (round % 16 == 0)
            DO("fsync", fsync(log));
        int fd = -1;
        DO("create", fd = open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
        DO("write", write(fd, record, length));
        char back[32];
        DO("read", pread(fd, back, sizeof back, 0) == length && !memcmp(back, record, length) ? 0 : -1);
        DO("setxattr", fsetxattr(fd, "user.once", record, length, XATTR_CREATE));
        DO("removexattr", fremovexattr(fd, "user.once"));
        DO("link", link(name, other));
        struct stat status;
        DO("stat", fstat(fd, &status));
        if (status.st_nlink != 2)
            fail("%d: %ld names instead of 2", self, (long)status.st_nlink);
        DO("unlink", unlink(name));
        DO("rename", rename(other, name));
        DO("close", close(fd));
        DO("unlink", unlink(name));
        DO("mkdir", mkdir(directory, 0755));
        DO("symlink", symlink("nowhere", name));
        DO("unlink", unlink(name));
        DO("rmdir", rmdir(directory));
        struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = self * 8, .l_len = 8};
        DO("lock", fcntl(locked, F_SETLKW, &lock));
        lock.l_type = F_UNLCK;
        DO("unlock", fcntl(locked, F_SETLK, &lock));
    }
}

/* Reads the log by itself, not by what was written. */
static void check(void) {
    long next[MAX_PROCESSES] = {0};
    FILE *log = fopen("log", "re");
    if (!log)
        die("log");
    int process;
    long round;
    long line = 0;
    char text[64];
    while (fgets(text, sizeof text, log)) {
        line++;
        if (sscanf(text, "%d %ld\n", &process, &round) != 2 || process < 0 || process >= processes) {
            fail("line %ld makes no sense", line);
            break;
        }
        if (round != next[process]) {
            fail("line %ld: record %ld of process %d instead of %ld", line, round, process, next[process]);
            break;
        }
        next[process]++;
    }
    fclose(log);
    for (int i = 0; i < processes; i++) {
        long written = atomic_load(&all->rounds[i]);
        if (next[i] != written)
            fail("process %d has written %ld records, %ld are there", i, written, next[i]);
    }
}

int main(int argc, char **argv) {
    if (argc != 3)
        return 2;
    common_init();
    all = shared(sizeof *all);
    processes = atoi(argv[2]);
    if (processes < 1 || processes > MAX_PROCESSES)
        return 2;
    if (chdir(argv[1]))
        die("%s", argv[1]);
    for (const char *const *name = (const char *const[]){"log", "locked", NULL}; *name; name++) {
        int fd = open(*name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
        if (fd < 0)
            die("%s", *name);
        close(fd);
    }
    pid_t children[MAX_PROCESSES] = {0};
    for (int i = 0; i < processes; i++) {
        children[i] = fork();
        if (children[i] < 0)
            die("fork");
        if (!children[i]) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            self = i;
            work();
            _exit(0);
        }
    }
    printf("{\"ready\":true,\"pids\":[%d", getpid());
    for (int i = 0; i < processes; i++)
        printf(",%d", children[i]);
    printf("]}\n");
    fflush(stdout);
    for (char *line; (line = next_command());) {
        bool quit = !strcmp(line, "quit");
        if (!strcmp(line, "reset"))
            atomic_store(&all->longest_ns, 0);
        if (!strcmp(line, "check")) {
            atomic_store(&all->hold, true);
            for (int tries = 0; atomic_load(&all->held) < processes && tries < 50000; tries++)
                nap_us(200);
            if (atomic_load(&all->held) < processes)
                fail("somebody hangs");
            check();
            atomic_store(&all->hold, false);
        }
        if (quit) {
            atomic_store(&all->stop, true);
            for (int i = 0; i < processes; i++)
                waitpid(children[i], NULL, 0);
        }
        answer_begin();
        printf(",\"operations\":%ld,\"longest_us\":%ld", atomic_load(&all->operations), atomic_load(&all->longest_ns) / 1000);
        answer_end();
        if (quit)
            return 0;
    }
    return 0;
}
