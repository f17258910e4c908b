/* locks DIR RANGES
 *
 * Holds a flock on DIR/flock, an OFD lock on DIR/ofd and a POSIX lock on DIR/posix, all exclusive, RANGES more POSIX locks
 * of one byte each on DIR/ranges, and, together with a second process that it forks, a shared POSIX lock on DIR/shared (as SQLite
 * does on its shared memory: who finds it free truncates the file). A helper process of its own tries to take them on command.
 *
 * Commands: check (are they kept from another process?), release, report, reset, quit. */

static char directory[PATH_MAX];
static int flock_fd, ofd_fd, posix_fd, ranges_fd, shared_fd;

static int open_in(const char *name) {
    char path[PATH_MAX + 32];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0)
        die("%s", path);
    return fd;
}

static int range(int fd, int command, short type, off_t start, off_t length) {
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = length};
    return fcntl(fd, command, &lock);
}

/* In a child, whose POSIX owner is another. Bits: 1 flock, 2 OFD, 4 POSIX, 8 ranges, 32 exclusively what is shared: it could be
 * taken; 16: it could not be shared. */
static int takeable(int ranges) {
    fflush(stdout);
    pid_t child = fork();
    if (child < 0)
        die("fork");
    if (child == 0) {
        int got = 0;
        if (flock(open_in("flock"), LOCK_EX | LOCK_NB) == 0)
            got |= 1;
        if (range(open_in("ofd"), F_OFD_SETLK, F_WRLCK, 0, 0) == 0)
            got |= 2;
        if (range(open_in("posix"), F_SETLK, F_WRLCK, 0, 0) == 0)
            got |= 4;
        int fd = open_in("ranges");
        for (int i = 0; i < ranges; i++) {
            if (range(fd, F_SETLK, F_WRLCK, i * 2, 1) == 0)
                got |= 8;
        }
        fd = open_in("shared");
        if (range(fd, F_SETLK, F_RDLCK, 128, 1))
            got |= 16; /* a shared lock is always to be had */
        struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 128, .l_len = 1};
        if (range(fd, F_SETLK, F_WRLCK, 128, 1) == 0 || fcntl(fd, F_GETLK, &lock) || lock.l_type == F_UNLCK)
            got |= 32;
        _exit(got);
    }
    int status;
    if (waitpid(child, &status, 0) != child || !WIFEXITED(status))
        die("the helper died");
    return WEXITSTATUS(status);
}

int main(int argc, char **argv) {
    if (argc != 3 || !realpath(argv[1], directory))
        return 2;
    common_init();
    int ranges = atoi(argv[2]);
    bool held = true;
    flock_fd = open_in("flock");
    ofd_fd = open_in("ofd");
    posix_fd = open_in("posix");
    ranges_fd = open_in("ranges");
    if (flock(flock_fd, LOCK_EX | LOCK_NB) || range(ofd_fd, F_OFD_SETLK, F_WRLCK, 0, 0) ||
        range(posix_fd, F_SETLK, F_WRLCK, 0, 0))
        die("cannot take the locks");
    for (int i = 0; i < ranges; i++) {
        if (range(ranges_fd, F_SETLK, F_WRLCK, i * 2, 1))
            die("cannot take a range");
    }
    pid_t partner = fork();
    if (partner < 0)
        die("fork");
    if (partner == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        shared_fd = open_in("shared");
        if (range(shared_fd, F_SETLK, F_RDLCK, 128, 1))
            die("cannot share");
        for (;;)
            pause();
    }
    shared_fd = open_in("shared");
    struct flock probe = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 128, .l_len = 1};
    do {
        nap_us(1000);
        probe.l_type = F_WRLCK;
        fcntl(shared_fd, F_GETLK, &probe);
    } while (probe.l_type == F_UNLCK);
    if (range(shared_fd, F_SETLK, F_RDLCK, 128, 1))
        die("cannot share");
    gap_start(0, "spin");
    printf("{\"ready\":true,\"pids\":[%d,%d]}\n", getpid(), partner);
    fflush(stdout);
    for (char *line; (line = next_command());) {
        bool quit = !strcmp(line, "quit");
        if (!strcmp(line, "check")) {
            int want = held ? 0 : 7 | (ranges ? 8 : 0), got = takeable(ranges);
            if (got != want)
                fail("another process can take locks %d, must be %d (1 flock, 2 OFD, 4 POSIX, 8 ranges, 32 shared; 16 cannot be shared)", got, want);
        } else if (!strcmp(line, "release")) {
            held = false;
            /* The partner keeps its share. */
            if (range(shared_fd, F_SETLK, F_UNLCK, 0, 0) || flock(flock_fd, LOCK_UN) || range(ofd_fd, F_OFD_SETLK, F_UNLCK, 0, 0) ||
                range(posix_fd, F_SETLK, F_UNLCK, 0, 0) || range(ranges_fd, F_SETLK, F_UNLCK, 0, 0))
                fail("cannot release: %s", strerror(errno));
        } else if (!strcmp(line, "reset")) {
            gap_reset();
        } else if (!quit && strcmp(line, "report")) {
            fail("unknown command %s", line);
        }
        answer_begin();
        printf(",\"gap_us\":%ld", gap_longest_us());
        answer_end();
        if (quit) {
            kill(partner, SIGKILL);
            waitpid(partner, NULL, 0);
            return 0;
        }
    }
    return 0;
}
