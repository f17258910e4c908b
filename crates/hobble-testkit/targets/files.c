/* files DIR DESCRIPTORS PROCESSES GAP(spin|nap|none) WORK(busy|idle)
 *
 * Opens DESCRIPTORS descriptors of every sort below DIR and uses them all the while in PROCESSES processes that share the
 * descriptions. What each file must hold is a function of its number and the offset, so contents can be checked at any time by anybody; offsets and
 * sizes that must be are kept in shared memory.
 *
 * Commands: check, report, reset, tolerate 0|1 (whether failing calls are errors), pause, go, quit. */

enum sort { OWN, DUP, APPEND, SEQUENTIAL, DIRECTORY, UNLINKED, TMPFILE, RENAMED, SORTS };

#define SIZE 4096
#define RECORD 16
#define APPEND_LIMIT (64 * 1024)

struct slot {
    int fd;
    enum sort sort;
    int number;      /* of the file, for its pattern */
    int flags;       /* F_GETFL when it was opened */
    int cloexec;     /* F_GETFD likewise */
    int place;       /* index into offset[] and size[] */
    ino_t inode;
};

static struct {
    atomic_int run, busy, tolerate, stop;
    atomic_long operations, faults;
    int64_t values[]; /* offset or number of records of each slot */
} *state;

static struct slot *slots;
static int count, processes;
static char directory[PATH_MAX];

static unsigned char pattern(int number, int64_t offset) {
    return (unsigned char)(number * 131 + offset * 7 + (offset >> 8) * 13 + 1);
}

static void fill(unsigned char *buffer, int number, int64_t offset, int length) {
    for (int i = 0; i < length; i++)
        buffer[i] = pattern(number, offset + i);
}

static bool failed(const char *what, struct slot *slot) {
    atomic_fetch_add(&state->faults, 1);
    if (!atomic_load(&state->tolerate))
        fail("%s of descriptor %d (sort %d): %s", what, slot->fd, slot->sort, strerror(errno));
    return true;
}

static void compare(const char *what, struct slot *slot, unsigned char *got, int64_t offset, int length) {
    unsigned char want[SIZE];
    fill(want, slot->number, offset, length);
    if (memcmp(want, got, length))
        fail("%s of descriptor %d (sort %d): wrong data at %lld", what, slot->fd, slot->sort, (long long)offset);
}

static void open_slot(int index) {
    struct slot *slot = &slots[index];
    char path[PATH_MAX + 64];
    int flags = O_RDWR | O_CREAT | O_TRUNC;
    slot->sort = index % SORTS;
    slot->number = index;
    slot->place = index;
    if (slot->sort == DUP && index == 0)
        slot->sort = OWN;
    snprintf(path, sizeof path, "%s/file-%d", directory, index);
    switch (slot->sort) {
    case OWN: slot->fd = open(path, flags | O_CLOEXEC, 0644); break;
    case DUP:
        /* Reads in turn through both: they share one offset. */
        slot->fd = dup(slots[index - 1].fd);
        slot->number = index - 1;
        slot->place = index - 1;
        break;
    case APPEND: slot->fd = open(path, flags | O_APPEND, 0644); break;
    case SEQUENTIAL: slot->fd = open(path, flags, 0644); break;
    case DIRECTORY:
        mkdir(path, 0755);
        slot->fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        break;
    case UNLINKED:
        slot->fd = open(path, flags, 0600);
        unlink(path);
        break;
    case TMPFILE:
        slot->fd = open(directory, O_RDWR | O_TMPFILE, 0600);
        if (slot->fd < 0 && errno == EOPNOTSUPP) {
            slot->fd = open(path, flags, 0600);
            unlink(path);
        }
        break;
    case RENAMED: slot->fd = open(path, flags | O_NONBLOCK | O_CLOEXEC, 0644); break;
    default: break;
    }
    if (slot->fd < 0)
        die("open %s", path);
    if (slot->sort != DIRECTORY && slot->sort != DUP && slot->sort != APPEND) {
        unsigned char buffer[SIZE];
        fill(buffer, slot->number, 0, SIZE);
        if (pwrite(slot->fd, buffer, SIZE, 0) != SIZE)
            die("write %s", path);
    }
    if (slot->sort == SEQUENTIAL) {
        /* Only read from here on: another access mode to carry over. */
        close(slot->fd);
        slot->fd = open(path, O_RDONLY);
        if (slot->fd < 0)
            die("reopen %s", path);
    }
    struct stat status;
    if (fstat(slot->fd, &status))
        die("fstat");
    slot->inode = status.st_ino;
    slot->flags = fcntl(slot->fd, F_GETFL);
    slot->cloexec = fcntl(slot->fd, F_GETFD);
}

/* A call that failed because whoever served it died may have been carried out all the same, as on any filesystem over a network: what became of it is looked
 * up before the slot is used again. Only one step can be in doubt, and nothing else may have happened. */
#define DOUBT (1LL << 40)

static bool settle(struct slot *slot) {
    int64_t *value = &state->values[slot->place], was = *value & ~DOUBT;
    struct stat status;
    char plain[PATH_MAX + 64], renamed[PATH_MAX + 80];
    if (!(*value & DOUBT))
        return true;
    if (slot->sort == RENAMED) {
        snprintf(plain, sizeof plain, "%s/file-%d", directory, slot->number);
        snprintf(renamed, sizeof renamed, "%s.renamed", plain);
        bool is_plain = !access(plain, F_OK), is_renamed = !access(renamed, F_OK);
        if (is_plain == is_renamed)
            return !failed("access", slot);
        *value = is_renamed;
        return true;
    }
    if (fstat(slot->fd, &status))
        return !failed("fstat", slot);
    int64_t now = status.st_size / RECORD;
    bool emptied = was * RECORD >= APPEND_LIMIT && now == 0;
    if (status.st_size % RECORD || !(now == was || now == was + 1 || emptied))
        fail("descriptor %d has %lld bytes appended, must have %lld or one record more", slot->fd,
             (long long)status.st_size, (long long)was * RECORD);
    *value = now;
    return true;
}

static void step(struct slot *slot, unsigned *random) {
    unsigned char buffer[SIZE];
    int64_t *value = &state->values[slot->place];
    if (!settle(slot))
        return;
    int64_t offset = rand_r(random) % SIZE;
    int length = 1 + rand_r(random) % (SIZE - offset);
    ssize_t got;
    atomic_fetch_add(&state->operations, 1);
    switch (slot->sort) {
    case OWN:
    case DUP:
    case SEQUENTIAL:
        /* The offset belongs to the description: through which descriptor it moves must not matter. */
        got = read(slot->fd, buffer, length);
        if (got < 0) {
            failed("read", slot);
        } else if (got == 0) {
            if (*value != SIZE)
                fail("read of descriptor %d: end of file at %lld", slot->fd, (long long)*value % 10000000);
            if (lseek(slot->fd, 0, SEEK_SET) != 0)
                failed("lseek", slot);
            else
                *value = 0;
        } else {
            compare("read", slot, buffer, *value, got);
            *value += got;
        }
        break;
    case APPEND: {
        if (*value * RECORD >= APPEND_LIMIT) {
            if (ftruncate(slot->fd, 0)) {
                *value |= DOUBT;
                failed("ftruncate", slot);
                break;
            }
            *value = 0;
        }
        char record[64];
        snprintf(record, sizeof record, "%07d:%07lld\n", slot->number % 10000000, (long long)*value % 10000000);
        got = write(slot->fd, record, RECORD);
        if (got < 0) {
            *value |= DOUBT;
            failed("append", slot);
        } else if (got != RECORD)
            fail("append to descriptor %d: %zd of %d bytes", slot->fd, got, RECORD);
        else
            *value += 1;
        break;
    }
    case DIRECTORY: {
        struct stat status;
        char name[64];
        snprintf(name, sizeof name, "entry-%d", rand_r(random) % 4);
        int fd = openat(slot->fd, name, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
        if (fd < 0) {
            failed("openat", slot);
            break;
        }
        if (fstat(fd, &status))
            failed("fstat", slot);
        close(fd);
        if (unlinkat(slot->fd, name, 0))
            failed("unlinkat", slot);
        break;
    }
    case RENAMED: {
        char from[PATH_MAX + 64], to[PATH_MAX + 64];
        snprintf(from, sizeof from, "%s/file-%d%s", directory, slot->number, *value ? ".renamed" : "");
        snprintf(to, sizeof to, "%s/file-%d%s", directory, slot->number, *value ? "" : ".renamed");
        if (rename(from, to)) {
            *value |= DOUBT;
            failed("rename", slot);
        } else {
            *value = !*value;
        }
    } /* fall through */
    case UNLINKED:
    case TMPFILE:
        if (rand_r(random) % 2) {
            got = pread(slot->fd, buffer, length, offset);
            if (got < 0)
                failed("pread", slot);
            else if (got != length)
                fail("pread of descriptor %d: %zd of %d bytes", slot->fd, got, length);
            else
                compare("pread", slot, buffer, offset, length);
        } else {
            fill(buffer, slot->number, offset, length);
            got = pwrite(slot->fd, buffer, length, offset);
            if (got < 0)
                failed("pwrite", slot);
            else if (got != length)
                fail("pwrite to descriptor %d: %zd of %d bytes", slot->fd, got, length);
        }
        break;
    default: break;
    }
}

/* Opens, writes, renames, reads back and removes a file by name. */
static void by_name(int process, unsigned *random) {
    char from[PATH_MAX + 64], to[PATH_MAX + 64];
    unsigned char buffer[SIZE];
    struct slot slot = {.number = rand_r(random) % 1000, .sort = SORTS};
    snprintf(from, sizeof from, "%s/new-%d", directory, process);
    snprintf(to, sizeof to, "%s/moved-%d", directory, process);
    slot.fd = open(from, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (slot.fd < 0) {
        slot.fd = -1;
        failed("open by name", &slot);
        return;
    }
    fill(buffer, slot.number, 0, SIZE);
    bool written = write(slot.fd, buffer, SIZE) == SIZE || !failed("write by name", &slot);
    close(slot.fd);
    if (rename(from, to)) {
        failed("rename by name", &slot);
    } else {
        slot.fd = open(to, O_RDONLY | O_CLOEXEC);
        if (slot.fd < 0) {
            failed("open after rename", &slot);
        } else {
            ssize_t got = read(slot.fd, buffer, SIZE);
            if (got < 0)
                failed("read by name", &slot);
            else if (written && got != SIZE)
                fail("read by name: %zd of %d bytes", got, SIZE);
            else if (written)
                compare("read by name", &slot, buffer, 0, SIZE);
            close(slot.fd);
        }
        if (unlink(to))
            failed("unlink by name", &slot);
    }
    atomic_fetch_add(&state->operations, 1);
}

static void work(int process) {
    unsigned random = 12345 + process;
    bool working = false;
    for (;;) {
        if (!atomic_load(&state->run)) {
            if (working)
                atomic_fetch_sub(&state->busy, 1);
            working = false;
            nap_us(500);
            continue;
        }
        if (!working) {
            atomic_fetch_add(&state->busy, 1);
            working = true;
            continue; /* looks at `run` once more: the check waits for busy == 0 */
        }
        int index = rand_r(&random) % count;
        /* One process uses a description at a time; a dup goes with its original. */
        if (slots[index].place % processes != process)
            index = (index + 1) % count;
        if (slots[index].place % processes == process)
            step(&slots[index], &random);
        if (rand_r(&random) % 16 == 0)
            by_name(process, &random);
        nap_us(50);
    }
}

static void *work_thread(void *argument) {
    work((int)(intptr_t)argument);
    return NULL;
}

static void check_slot(struct slot *slot) {
    struct stat status;
    if (!settle(slot))
        return;
    int64_t value = state->values[slot->place];
    if (fstat(slot->fd, &status)) {
        failed("fstat", slot);
        return;
    }
    if (status.st_ino != slot->inode)
        fail("descriptor %d (sort %d) is inode %lu, was %lu", slot->fd, slot->sort, status.st_ino, slot->inode);
    int flags = fcntl(slot->fd, F_GETFL), cloexec = fcntl(slot->fd, F_GETFD);
    if (flags != slot->flags)
        fail("descriptor %d (sort %d) has flags %o, had %o", slot->fd, slot->sort, flags, slot->flags);
    if (cloexec != slot->cloexec)
        fail("descriptor %d (sort %d) has CLOEXEC %d, had %d", slot->fd, slot->sort, cloexec, slot->cloexec);
    unsigned char buffer[SIZE];
    ssize_t got;
    switch (slot->sort) {
    case OWN:
    case DUP:
    case SEQUENTIAL:
        if (lseek(slot->fd, 0, SEEK_CUR) != value)
            fail("descriptor %d (sort %d) is at %lld, must be at %lld", slot->fd, slot->sort,
                 (long long)lseek(slot->fd, 0, SEEK_CUR), (long long)value);
        /* fall through */
    case UNLINKED:
    case TMPFILE:
    case RENAMED:
        got = pread(slot->fd, buffer, SIZE, 0);
        if (got < 0)
            failed("pread", slot);
        else if (got != SIZE)
            fail("descriptor %d (sort %d) has %zd bytes", slot->fd, slot->sort, got);
        else
            compare("check", slot, buffer, 0, SIZE);
        break;
    case APPEND:
        if (status.st_size != value * RECORD)
            fail("descriptor %d has %lld bytes appended, must have %lld", slot->fd, (long long)status.st_size,
                 (long long)value * RECORD);
        for (int64_t record = 0; record < value; record += 97) {
            char want[64];
            snprintf(want, sizeof want, "%07d:%07lld\n", slot->number % 10000000, (long long)record % 10000000);
            if (pread(slot->fd, buffer, RECORD, record * RECORD) != RECORD)
                failed("pread", slot);
            else if (memcmp(want, buffer, RECORD))
                fail("descriptor %d: record %lld is wrong", slot->fd, (long long)record);
        }
        break;
    default: break;
    }
}

static void rest(void) {
    atomic_store(&state->run, 0);
    for (int tries = 0; atomic_load(&state->busy) > 0; tries++) {
        if (tries > 30000) {
            fail("%d workers do not come to rest", atomic_load(&state->busy));
            break;
        }
        nap_us(1000);
    }
}

static void check(void) {
    char at[PATH_MAX], want[PATH_MAX + 16];
    rest();
    for (int i = 0; i < count; i++)
        check_slot(&slots[i]);
    snprintf(want, sizeof want, "%s/cwd", directory);
    if (!getcwd(at, sizeof at))
        fail("getcwd: %s", strerror(errno));
    else if (strcmp(at, want))
        fail("the working directory is %s, was %s", at, want);
    if (access("marker", F_OK) && !atomic_load(&state->tolerate))
        fail("the working directory has lost its file: %s", strerror(errno));
}

int main(int argc, char **argv) {
    if (argc != 6 || !realpath(argv[1], directory)) {
        fprintf(stderr, "usage: files DIR DESCRIPTORS PROCESSES spin|nap|none busy|idle\n");
        return 2;
    }
    count = atoi(argv[2]);
    processes = atoi(argv[3]);
    if (count < 1 || processes < 1 || processes > MAX_PROCESSES)
        return 2;
    common_init();
    state = shared(sizeof *state + count * sizeof state->values[0]);
    slots = calloc(count, sizeof *slots);
    char path[PATH_MAX + 64];
    snprintf(path, sizeof path, "%s/cwd", directory);
    mkdir(path, 0755);
    if (chdir(path))
        die("chdir %s", path);
    close(open("marker", O_CREAT | O_WRONLY, 0644));
    for (int i = 0; i < count; i++)
        open_slot(i);

    bool busy = !strcmp(argv[5], "busy");
    pid_t pids[MAX_PROCESSES] = {getpid()};
    for (int process = 1; process < processes; process++) {
        pids[process] = fork();
        if (pids[process] < 0)
            die("fork");
        if (pids[process] == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            gap_start(process, argv[4]);
            work(process);
        }
    }
    gap_start(0, argv[4]);
    pthread_t thread;
    if (pthread_create(&thread, NULL, work_thread, (void *)0))
        die("pthread_create");
    atomic_store(&state->run, busy);

    printf("{\"ready\":true,\"pids\":[");
    for (int process = 0; process < processes; process++)
        printf("%s%d", process ? "," : "", pids[process]);
    printf("]}\n");
    fflush(stdout);

    for (char *line; (line = next_command());) {
        bool quit = !strcmp(line, "quit");
        if (!strcmp(line, "check") || quit) {
            check();
            atomic_store(&state->run, busy && !quit);
        } else if (!strcmp(line, "reset")) {
            gap_reset();
        } else if (!strcmp(line, "pause")) {
            rest();
        } else if (!strcmp(line, "go")) {
            atomic_store(&state->run, busy);
        } else if (!strncmp(line, "tolerate ", 9)) {
            atomic_store(&state->tolerate, atoi(line + 9));
        } else if (strcmp(line, "report")) {
            fail("unknown command %s", line);
        }
        answer_begin();
        printf(",\"operations\":%ld,\"faults\":%ld,\"gap_us\":%ld", atomic_load(&state->operations),
               atomic_load(&state->faults), gap_longest_us());
        answer_end();
        if (quit)
            break;
    }
    for (int process = 1; process < processes; process++) {
        kill(pids[process], SIGKILL);
        waitpid(pids[process], NULL, 0);
    }
    return 0;
}
