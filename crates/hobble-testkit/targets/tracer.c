/* tracer PID: traces PID without stopping it, until it is told to quit. */

int main(int argc, char **argv) {
    if (argc != 2)
        return 2;
    common_init();
    pid_t pid = atoi(argv[1]);
    if (ptrace(PTRACE_SEIZE, pid, 0, 0))
        die("PTRACE_SEIZE %d", pid);
    printf("{\"ready\":true,\"pids\":[%d]}\n", getpid());
    fflush(stdout);
    while (next_command()) {
        answer_begin();
        answer_end();
        break;
    }
    return 0;
}
