/* maps DIR PAGES MAPPINGS GAP(spin|nap|none)
 *
 * Maps a file privately and dirties every other page, maps one shared and writes to it, and compares both with what they must
 * hold, all the while in a thread and in full on demand. MAPPINGS further private mappings of one dirty page each
 * are there to be moved. A private mapping's clean pages show the file, its dirty ones never change.
 *
 * Commands: check, report, reset, tolerate 0|1, quit. */

static unsigned char *private_map, *shared_map, **small;
static unsigned char *want_private, *want_shared;
static size_t pages, mappings, bytes;
static int private_fd, shared_fd;
static atomic_long rounds;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void compare(const char *what, const unsigned char *got, const unsigned char *want, size_t length) {
    if (!memcmp(got, want, length))
        return;
    for (size_t i = 0; i < length; i++) {
        if (got[i] != want[i]) {
            fail("%s: byte %zu is %02x, must be %02x", what, i, got[i], want[i]);
            return;
        }
    }
}

static void full_check(void) {
    unsigned char page[4096];
    compare("private mapping", private_map, want_private, bytes);
    compare("shared mapping", shared_map, want_shared, bytes);
    for (size_t i = 0; i < pages; i++) {
        if (pread(shared_fd, page, 4096, i * 4096) != 4096)
            fail("pread of the shared file: %s", strerror(errno));
        else
            compare("shared file", page, want_shared + i * 4096, 4096);
    }
    for (size_t i = 0; i < mappings; i++) {
        if (small[i][0] != (unsigned char)(i + 1) || small[i][4095] != (unsigned char)~i)
            fail("small mapping %zu holds %02x…%02x", i, small[i][0], small[i][4095]);
    }
}

static void *churn(void *unused) {
    unsigned random = 7;
    (void)unused;
    for (;;) {
        pthread_mutex_lock(&lock);
        size_t page = rand_r(&random) % pages, at = page * 4096 + rand_r(&random) % 4096;
        compare("private page", private_map + page * 4096, want_private + page * 4096, 4096);
        compare("shared page", shared_map + page * 4096, want_shared + page * 4096, 4096);
        /* Through the mapping one time, through the file the other: both must show in both. */
        want_shared[at] += 1;
        if (rand_r(&random) % 2)
            shared_map[at] = want_shared[at];
        else if (pwrite(shared_fd, &want_shared[at], 1, at) != 1)
            want_shared[at] -= 1;
        if (page % 2 == 1) {
            want_private[at] ^= 0x55;
            private_map[at] = want_private[at];
        }
        pthread_mutex_unlock(&lock);
        atomic_fetch_add(&rounds, 1);
        nap_us(50);
    }
    return NULL;
}

static int make(const char *directory, const char *name, unsigned char *content) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0644);
    if (fd < 0 || write(fd, content, bytes) != (ssize_t)bytes)
        die("%s", path);
    return fd;
}

int main(int argc, char **argv) {
    if (argc != 5)
        return 2;
    common_init();
    pages = atoi(argv[2]);
    mappings = atoi(argv[3]);
    bytes = pages * 4096;
    want_private = malloc(bytes);
    want_shared = malloc(bytes);
    for (size_t i = 0; i < bytes; i++) {
        want_private[i] = i * 7 + (i >> 12);
        want_shared[i] = i * 13 + (i >> 12);
    }
    private_fd = make(argv[1], "private", want_private);
    shared_fd = make(argv[1], "shared", want_shared);
    private_map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, private_fd, 0);
    shared_map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, shared_fd, 0);
    small = calloc(mappings + 1, sizeof *small);
    if (private_map == MAP_FAILED || shared_map == MAP_FAILED)
        die("mmap");
    for (size_t page = 1; page < pages; page += 2) {
        for (size_t i = page * 4096; i < page * 4096 + 4096; i++) {
            want_private[i] ^= 0xa5;
            private_map[i] = want_private[i];
        }
    }
    for (size_t i = 0; i < mappings; i++) {
        /* Not next to each other in the file, so the kernel keeps them apart. */
        small[i] = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, private_fd, (i * 2 % pages) * 4096);
        if (small[i] == MAP_FAILED)
            die("mmap");
        small[i][0] = i + 1;
        small[i][4095] = ~i;
    }
    gap_start(0, argv[4]);
    pthread_t thread;
    if (pthread_create(&thread, NULL, churn, NULL))
        die("pthread_create");
    printf("{\"ready\":true,\"pids\":[%d]}\n", getpid());
    fflush(stdout);
    for (char *line; (line = next_command());) {
        bool quit = !strcmp(line, "quit");
        if (!strcmp(line, "check") || quit) {
            pthread_mutex_lock(&lock);
            full_check();
            if (!quit)
                pthread_mutex_unlock(&lock);
        } else if (!strcmp(line, "reset")) {
            gap_reset();
        } else if (strcmp(line, "report")) {
            fail("unknown command %s", line);
        }
        answer_begin();
        printf(",\"rounds\":%ld,\"gap_us\":%ld", atomic_load(&rounds), gap_longest_us());
        answer_end();
        if (quit)
            return 0;
    }
    return 0;
}
