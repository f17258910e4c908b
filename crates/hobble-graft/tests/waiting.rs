//! A thread that waits in a system call does not notice that it was stopped and made to work for us: no `EINTR`, no early return, no
//! lost wake-up, fifty times over.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod programs;

use std::time::Duration;

use hobble_graft::remote::{Borrowed, RemoteError};
use hobble_graft::stop::{Deadline, Tracer};
use programs::Target;

/// A program whose thread waits in `CALL` (an expression that is true when the call returned what it waited for). The waiting thread is the
/// leader; `wake` runs in another process.
fn program(setup: &str, wait: &str) -> String {
    format!(
        r#"
        #include <poll.h>
        #include <sys/epoll.h>
        #include <sys/ipc.h>
        #include <sys/sem.h>
        #include <sys/msg.h>
        #include <linux/futex.h>
        #include <sys/select.h>
        #include <netinet/in.h>
        static void handler(int s) {{ (void)s; }}
        int main(void) {{
            int p[2]; check(pipe(p) == 0);
            int s[2]; check(socketpair(AF_UNIX, SOCK_STREAM, 0, s) == 0);
            uint32_t word = 0; (void)word; (void)handler;
            {setup}
            ready();
            double begun = now(); (void)begun;
            errno = 0;
            {wait}
        }}
        "#
    )
}

fn borrow(target: &Target) {
    Tracer::scope(|tracer| -> Result<_, RemoteError> {
        let deadline = Deadline::after(Duration::from_secs(5));
        let mut stopped = tracer.stop_all(&[target.id()], deadline)?;
        let leader = target.pid().leader();
        let mut borrowed =
            Borrowed::open(&mut stopped, target.id(), leader, deadline, &mut |_| Ok(()))?;
        let pid = borrowed.system_call(libc::SYS_getpid, [0; 6], deadline)?;
        assert_eq!(pid, Ok(target.pid().as_raw() as u64));
        borrowed.close()?;
        stopped.release();
        Ok(())
    })
    .unwrap();
}

/// Only stopped, no call made.
fn stop(target: &Target) {
    Tracer::scope(|tracer| {
        tracer
            .stop_all(&[target.id()], Deadline::after(Duration::from_secs(5)))
            .map(drop)
    })
    .unwrap();
}

/// Stops the waiting thread fifty times, in both ways, and then wakes it by a line on its standard input or lets its time run out.
fn undisturbed(name: &str, setup: &str, wait: &str, wake: Option<&str>) {
    let mut target = Target::c(name, &program(setup, wait));
    target.until("it waits", |t| t.state() == 'S');
    for round in 0..50 {
        if round % 5 == 4 {
            stop(&target)
        } else {
            borrow(&target)
        }
        assert!(target.is_running());
        // Let it get back into its wait now and then; at other times stop it on its way there.
        if round % 3 == 0 {
            target.until("it waits again", |t| t.state() == 'S');
        }
    }
    if let Some(line) = wake {
        target.tell(line);
    }
    assert_eq!(target.line(), "ok", "{name}");
}

/// The program itself is told to wake up by what its child writes when told so.
const CHILD: &str = r#"
    int parent = getpid(); (void)parent;
    if (fork() == 0) { wait_for_line(); WAKE; _exit(0); }
"#;

fn child(wake: &str) -> String {
    CHILD.replace("WAKE", wake)
}

#[test]
fn read_of_a_pipe() {
    undisturbed(
        "read",
        &child(r#"check(write(p[1], "x", 1) == 1)"#),
        r#"char c; check(read(p[0], &c, 1) == 1 && c == 'x'); say("ok");"#,
        Some(""),
    );
}

#[test]
fn nanosleep_lasts_as_long_as_asked() {
    undisturbed(
        "nanosleep",
        "",
        r#"struct timespec t = { 1, 500000000 }; check(nanosleep(&t, 0) == 0); double took = now() - begun; check(took >= 1.5 && took < 2.2); say("ok");"#,
        None,
    );
}

#[test]
fn futex_without_a_time_out() {
    undisturbed(
        "futex",
        &format!(
            "uint32_t *f = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);{}",
            child("*f = 1; syscall(SYS_futex, f, FUTEX_WAKE, 1, 0, 0, 0)")
        ),
        r#"check(syscall(SYS_futex, f, FUTEX_WAIT, 0, 0, 0, 0) == 0); check(*f == 1); say("ok");"#,
        Some(""),
    );
}

#[test]
fn futex_with_a_time_out() {
    undisturbed(
        "futex-timed",
        "",
        r#"struct timespec t = { 1, 500000000 }; long r = syscall(SYS_futex, &word, FUTEX_WAIT, 0, &t, 0, 0);
           check(r == -1 && errno == ETIMEDOUT); double took = now() - begun; check(took >= 1.5 && took < 2.2); say("ok");"#,
        None,
    );
}

#[test]
fn poll_and_its_time_out() {
    undisturbed(
        "poll",
        "struct pollfd f = { p[0], POLLIN, 0 };",
        r#"check(poll(&f, 1, 1500) == 0); double took = now() - begun; check(took >= 1.5 && took < 2.2); say("ok");"#,
        None,
    );
}

#[test]
fn select_and_its_time_out() {
    undisturbed(
        "select",
        "fd_set f; FD_ZERO(&f); FD_SET(p[0], &f); struct timeval t = { 1, 500000 };",
        r#"check(select(p[0] + 1, &f, 0, 0, &t) == 0); double took = now() - begun; check(took >= 1.5 && took < 2.2); say("ok");"#,
        None,
    );
}

#[test]
fn epoll_wait_is_made_again() {
    undisturbed(
        "epoll",
        &format!(
            "int e = epoll_create1(0); struct epoll_event v = {{ EPOLLIN, {{ 0 }} }}; check(epoll_ctl(e, EPOLL_CTL_ADD, p[0], &v) == 0);{}",
            child(r#"check(write(p[1], "x", 1) == 1)"#)
        ),
        r#"check(epoll_wait(e, &v, 1, -1) == 1); say("ok");"#,
        Some(""),
    );
}

#[test]
fn semop_is_made_again() {
    undisturbed(
        "semop",
        &format!(
            "int q = semget(IPC_PRIVATE, 1, 0600); check(q >= 0); struct sembuf b = {{ 0, -1, 0 }}, up = {{ 0, 1, 0 }}; (void)up;{}",
            child("check(semop(q, &up, 1) == 0)")
        ),
        r#"int r = semop(q, &b, 1); int e = errno; semctl(q, 0, IPC_RMID); errno = e; check(r == 0); say("ok");"#,
        Some(""),
    );
}

#[test]
fn sigtimedwait_gets_its_signal() {
    undisturbed(
        "sigtimedwait",
        &format!(
            "sigset_t m; sigemptyset(&m); sigaddset(&m, SIGUSR1); sigprocmask(SIG_BLOCK, &m, 0);{}",
            child("check(kill(parent, SIGUSR1) == 0)")
        ),
        r#"struct timespec t = { 60, 0 }; check(sigtimedwait(&m, 0, &t) == SIGUSR1); say("ok");"#,
        Some(""),
    );
}

#[test]
fn pause_ends_with_a_signal_only() {
    undisturbed(
        "pause",
        &format!(
            "signal(SIGUSR1, handler);{}",
            child("check(kill(parent, SIGUSR1) == 0)")
        ),
        r#"check(pause() == -1 && errno == EINTR); say("ok");"#,
        Some(""),
    );
}

#[test]
fn sigsuspend_keeps_both_masks() {
    undisturbed(
        "sigsuspend",
        &format!(
            "sigset_t m, none; sigemptyset(&none); sigemptyset(&m); sigaddset(&m, SIGUSR1); sigprocmask(SIG_BLOCK, &m, 0); signal(SIGUSR1, handler);{}",
            child("check(kill(parent, SIGUSR1) == 0)")
        ),
        r#"check(sigsuspend(&none) == -1 && errno == EINTR); sigset_t now_; sigprocmask(SIG_SETMASK, 0, &now_); check(sigismember(&now_, SIGUSR1) == 1); say("ok");"#,
        Some(""),
    );
}

#[test]
fn ppoll_keeps_both_masks() {
    undisturbed(
        "ppoll",
        &format!(
            "sigset_t m, none; sigemptyset(&none); sigemptyset(&m); sigaddset(&m, SIGUSR1); sigprocmask(SIG_BLOCK, &m, 0); signal(SIGUSR1, handler); struct pollfd f = {{ p[0], POLLIN, 0 }};{}",
            child("check(kill(parent, SIGUSR1) == 0)")
        ),
        r#"check(ppoll(&f, 1, 0, &none) == -1 && errno == EINTR); sigset_t now_; sigprocmask(SIG_SETMASK, 0, &now_); check(sigismember(&now_, SIGUSR1) == 1); say("ok");"#,
        Some(""),
    );
}

#[test]
fn epoll_pwait_keeps_both_masks() {
    undisturbed(
        "epoll-pwait",
        &format!(
            "sigset_t m, none; sigemptyset(&none); sigemptyset(&m); sigaddset(&m, SIGUSR1); sigprocmask(SIG_BLOCK, &m, 0); signal(SIGUSR1, handler); int e = epoll_create1(0); struct epoll_event v;{}",
            child("check(kill(parent, SIGUSR1) == 0)")
        ),
        r#"check(epoll_pwait(e, &v, 1, -1, &none) == -1 && errno == EINTR); sigset_t now_; sigprocmask(SIG_SETMASK, 0, &now_); check(sigismember(&now_, SIGUSR1) == 1); say("ok");"#,
        Some(""),
    );
}

#[test]
fn recv_with_a_time_out_is_made_again() {
    undisturbed(
        "recv",
        &format!(
            "struct timeval t = {{ 60, 0 }}; check(setsockopt(s[0], SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t) == 0);{}",
            child(r#"check(write(s[1], "x", 1) == 1)"#)
        ),
        r#"char c; check(recv(s[0], &c, 1, 0) == 1 && c == 'x'); say("ok");"#,
        Some(""),
    );
}

#[test]
fn accept_with_a_time_out_is_made_again() {
    undisturbed(
        "accept",
        &format!(
            "int l = socket(AF_INET, SOCK_STREAM, 0); struct sockaddr_in a = {{ 0 }}; a.sin_family = AF_INET; a.sin_addr.s_addr = htonl(INADDR_LOOPBACK); socklen_t n = sizeof a;
             check(bind(l, (void *)&a, n) == 0 && listen(l, 1) == 0 && getsockname(l, (void *)&a, &n) == 0);
             struct timeval t = {{ 60, 0 }}; check(setsockopt(l, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t) == 0);{}",
            child("int c = socket(AF_INET, SOCK_STREAM, 0); check(connect(c, (void *)&a, n) == 0)")
        ),
        r#"check(accept(l, 0, 0) >= 0); say("ok");"#,
        Some(""),
    );
}

#[test]
fn wait4_gets_its_child() {
    undisturbed(
        "wait4",
        &child(""),
        r#"int st; check(wait4(-1, &st, 0, 0) > 0 && WIFEXITED(st)); say("ok");"#,
        Some(""),
    );
}

#[test]
fn msgrcv_gets_its_message() {
    undisturbed(
        "msgrcv",
        &format!(
            "int q = msgget(IPC_PRIVATE, 0600); check(q >= 0); struct {{ long type; char c; }} m = {{ 1, 'x' }};{}",
            child("check(msgsnd(q, &m, 1, 0) == 0)")
        ),
        r#"long r = msgrcv(q, &m, 1, 0, 0); int e = errno; msgctl(q, IPC_RMID, 0); errno = e; check(r == 1); say("ok");"#,
        Some(""),
    );
}

#[test]
fn a_stopped_process_stays_stopped() {
    let target = Target::c("stopped", &program("", "for (;;) sleep(1);"));
    target.signal(libc::SIGSTOP);
    target.until("it is stopped", |t| t.state() == 'T');
    for _ in 0..10 {
        borrow(&target);
        target.until("it is stopped again", |t| t.state() == 'T');
    }
    target.signal(libc::SIGCONT);
    target.until("it runs", Target::is_running);
}
