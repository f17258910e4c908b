/* outsider DIR
 *
 * Opens DIR/flock, DIR/ofd and DIR/posix and tries all the while to take somebody else's locks on them, giving back at once what it gets.
 * A window is the time between the last refusal before and the first refusal after a success.
 *
 * Commands: report, reset, quit. */

struct kind {
    const char *name;
    int fd;
    atomic_long tries, taken, window_ns, blind_ns;
    int64_t refused;
    bool open;
};

static struct kind kinds[3] = {{.name = "flock"}, {.name = "ofd"}, {.name = "posix"}};
static atomic_bool resetting;

static int range(int fd, int command, short type) {
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET};
    return fcntl(fd, command, &lock);
}

static int take(int index, int fd, bool release) {
    switch (index) {
    case 0: return flock(fd, release ? LOCK_UN : LOCK_EX | LOCK_NB);
    case 1: return range(fd, F_OFD_SETLK, release ? F_UNLCK : F_WRLCK);
    default: return range(fd, F_SETLK, release ? F_UNLCK : F_WRLCK);
    }
}

static void *try_all(void *unused) {
    (void)unused;
    for (;;) {
        bool reset = atomic_exchange(&resetting, false);
        for (int i = 0; i < 3; i++) {
            struct kind *kind = &kinds[i];
            if (reset) {
                kind->tries = kind->taken = kind->window_ns = kind->blind_ns = 0;
                kind->refused = 0;
            }
            int result = take(i, kind->fd, false);
            int64_t now = now_ns();
            kind->tries++;
            if (result == 0) {
                take(i, kind->fd, true);
                kind->taken++;
                kind->open = true;
                /* Seen from the last refusal on; the first refusal after it ends the window. */
            } else if (errno != EAGAIN && errno != EACCES) {
                fail("%s: %s", kind->name, strerror(errno));
                nap_us(1000);
            } else {
                if (kind->refused) {
                    int64_t since = now - kind->refused;
                    if (kind->open && since > kind->window_ns)
                        kind->window_ns = since;
                    if (!kind->open && since > kind->blind_ns)
                        kind->blind_ns = since;
                }
                kind->open = false;
                kind->refused = now;
            }
        }
    }
    return NULL;
}

int main(int argc, char **argv) {
    if (argc != 2)
        return 2;
    common_init();
    for (int i = 0; i < 3; i++) {
        char path[PATH_MAX];
        snprintf(path, sizeof path, "%s/%s", argv[1], kinds[i].name);
        kinds[i].fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
        if (kinds[i].fd < 0)
            die("%s", path);
    }
    pthread_t thread;
    if (pthread_create(&thread, NULL, try_all, NULL))
        die("pthread_create");
    printf("{\"ready\":true,\"pids\":[%d]}\n", getpid());
    fflush(stdout);
    for (char *line; (line = next_command());) {
        bool quit = !strcmp(line, "quit");
        if (!strcmp(line, "reset")) {
            atomic_store(&resetting, true);
            while (atomic_load(&resetting))
                nap_us(100);
            nap_us(1000);
        }
        answer_begin();
        for (int i = 0; i < 3; i++)
            printf(",\"%s\":{\"tries\":%ld,\"taken\":%ld,\"window_us\":%ld,\"blind_us\":%ld,\"open\":%s}", kinds[i].name,
                   kinds[i].tries, kinds[i].taken, kinds[i].window_ns / 1000, kinds[i].blind_ns / 1000,
                   kinds[i].open ? "true" : "false");
        answer_end();
        if (quit)
            return 0;
    }
    return 0;
}
