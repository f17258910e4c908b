/* signals FILE
 *
 * Waits in every way that a stop might disturb, and reads FILE under a timer whose handler is SA_RESTART. No call may see EINTR,
 * no wait may end early, no read may fail or come back short, whatever is done to the program from outside.
 *
 * Commands: report, reset, storm N (N real-time signals to itself, each must arrive), stops 0|1 (while 1, the calls that SIGCONT
 * interrupts natively may be: signal(7), "Interruption of system calls and library functions by stop signals"), quit. */

#define WAIT_MS 120

static atomic_long ticks, reads, waits, storm;
static atomic_int slow_reads, stops;
static int file;

static void on_alarm(int signal) {
    (void)signal;
    atomic_fetch_add(&ticks, 1);
}

static void on_storm(int signal) {
    (void)signal;
    atomic_fetch_add(&storm, 1);
}

static void *reader(void *unused) {
    (void)unused;
    unsigned char buffer[4096];
    /* Only this thread takes the timer's signal. */
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGALRM);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    for (;;) {
        int64_t start = now_ns();
        ssize_t got = pread(file, buffer, sizeof buffer, 0);
        if (got < 0)
            fail("pread: %s", strerror(errno));
        else if (got != sizeof buffer)
            fail("pread: %zd bytes", got);
        if (now_ns() - start > 50000000)
            atomic_fetch_add(&slow_reads, 1);
        atomic_fetch_add(&reads, 1);
    }
    return NULL;
}

static void waited(const char *what, int64_t start, bool timed_out) {
    int error = errno;
    int64_t took = (now_ns() - start) / 1000000;
    atomic_fetch_add(&waits, 1);
    if (atomic_load(&stops) && (timed_out || error == EINTR))
        return;
    if (!timed_out)
        fail("%s: %s", what, strerror(error));
    else if (took < WAIT_MS - 2)
        fail("%s came back after %lld of %d ms", what, (long long)took, WAIT_MS);
}

static void *wait_epoll(void *unused) {
    (void)unused;
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event;
    for (;;) {
        int64_t start = now_ns();
        waited("epoll_wait", start, epoll_wait(epoll, &event, 1, WAIT_MS) == 0);
    }
    return NULL;
}

static void *wait_recv(void *unused) {
    (void)unused;
    int pair[2];
    char byte;
    struct timeval limit = {0, WAIT_MS * 1000};
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
        die("socketpair");
    setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    for (;;) {
        int64_t start = now_ns();
        waited("recv", start, recv(pair[0], &byte, 1, 0) == -1 && errno == EAGAIN);
    }
    return NULL;
}

static void *wait_signal(void *unused) {
    (void)unused;
    sigset_t set;
    struct timespec limit = {0, WAIT_MS * 1000000};
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    for (;;) {
        int64_t start = now_ns();
        waited("sigtimedwait", start, sigtimedwait(&set, NULL, &limit) == -1 && errno == EAGAIN);
    }
    return NULL;
}

static void *wait_semop(void *unused) {
    (void)unused;
    int id = semget(IPC_PRIVATE, 1, 0600);
    if (id < 0)
        die("semget");
    struct sembuf operation = {0, -1, 0};
    struct timespec limit = {0, WAIT_MS * 1000000};
    for (;;) {
        int64_t start = now_ns();
        waited("semtimedop", start, semtimedop(id, &operation, 1, &limit) == -1 && errno == EAGAIN);
    }
    return NULL;
}

static void *wait_poll(void *unused) {
    (void)unused;
    for (;;) {
        int64_t start = now_ns();
        waited("poll", start, poll(NULL, 0, WAIT_MS) == 0);
        start = now_ns();
        struct timespec limit = {0, WAIT_MS * 1000000};
        waited("nanosleep", start, nanosleep(&limit, NULL) == 0);
        start = now_ns();
        uint32_t word = 0;
        waited("futex", start, syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &limit, NULL, 0) == -1 && errno == ETIMEDOUT);
    }
    return NULL;
}

int main(int argc, char **argv) {
    if (argc != 2)
        return 2;
    common_init();
    /* The semaphore goes with the namespace, and that with the process, however it ends. */
    if (unshare(CLONE_NEWIPC))
        die("unshare");
    file = open(argv[1], O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    unsigned char block[4096] = {0};
    if (file < 0 || pwrite(file, block, sizeof block, 0) != sizeof block)
        die("%s", argv[1]);
    struct sigaction action = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
    sigaction(SIGALRM, &action, NULL);
    action.sa_handler = on_storm;
    sigaction(SIGRTMIN, &action, NULL);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGALRM);
    sigaddset(&set, SIGRTMIN);
    sigaddset(&set, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    void *(*all[])(void *) = {reader, wait_epoll, wait_recv, wait_signal, wait_semop, wait_poll};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, all[i], NULL))
            die("pthread_create");
    }
    /* The storm is taken here, where nothing waits but for a command. */
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    struct itimerval timer = {{0, 7000}, {0, 7000}};
    setitimer(ITIMER_REAL, &timer, NULL);
    printf("{\"ready\":true,\"pids\":[%d]}\n", getpid());
    fflush(stdout);
    for (char *line; (line = next_command());) {
        bool quit = !strcmp(line, "quit");
        int signals;
        if (!strcmp(line, "reset")) {
            atomic_store(&ticks, 0);
            atomic_store(&reads, 0);
            atomic_store(&slow_reads, 0);
        } else if (sscanf(line, "storm %d", &signals) == 1) {
            long before = atomic_load(&storm);
            for (int i = 0; i < signals; i++) {
                union sigval value = {i};
                while (sigqueue(getpid(), SIGRTMIN, value) == -1 && errno == EAGAIN)
                    nap_us(100);
            }
            for (int tries = 0; atomic_load(&storm) - before < signals && tries < 5000; tries++)
                nap_us(1000);
            if (atomic_load(&storm) - before != signals)
                fail("%ld of %d real-time signals arrived", atomic_load(&storm) - before, signals);
        } else if (!strncmp(line, "stops ", 6)) {
            /* Waits that began before are over after this. */
            if (line[6] == '0')
                nap_us(WAIT_MS * 2000);
            atomic_store(&stops, line[6] == '1');
        } else if (!quit && strcmp(line, "report")) {
            fail("unknown command %s", line);
        }
        answer_begin();
        printf(",\"ticks\":%ld,\"reads\":%ld,\"waits\":%ld,\"slow_reads\":%d", atomic_load(&ticks), atomic_load(&reads),
               atomic_load(&waits), atomic_load(&slow_reads));
        answer_end();
        if (quit)
            _exit(0);
    }
    return 0;
}
