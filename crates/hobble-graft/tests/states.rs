//! Targets in unusual states: restartable sequences, seccomp, storms of signals, `vfork`, other tracers, the dead.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod programs;

use std::process::Command;
use std::time::Duration;

use hobble_graft::ids::{Pid, ProcessId};
use hobble_graft::remote::{Borrowed, RemoteError};
use hobble_graft::stop::{Deadline, StopError, Tracer, Waits};
use programs::Target;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(5))
}

fn borrow(target: &Target) {
    Tracer::scope(|tracer| -> Result<_, RemoteError> {
        let mut stopped = tracer.stop_all(&[target.id()], soon())?;
        let leader = target.pid().leader();
        let mut borrowed =
            Borrowed::open(&mut stopped, target.id(), leader, soon(), &mut |_| Ok(()))?;
        assert_eq!(
            borrowed.system_call(libc::SYS_getpid, [0; 6], soon())?,
            Ok(target.pid().as_raw() as u64)
        );
        borrowed.close()?;
        stopped.release();
        Ok(())
    })
    .unwrap();
}

fn stop_error(id: ProcessId, budget: Duration) -> StopError {
    Tracer::scope(|tracer| tracer.stop_all(&[id], Deadline::after(budget)).map(drop)).unwrap_err()
}

/// Adds to a counter per processor in restartable sequences, and counts the additions: a sequence that goes on after it should have been
/// aborted, or on another processor, loses one.
#[test]
fn restartable_sequences_are_aborted_not_resumed() {
    let mut target = Target::c(
        "rseq",
        r#"
        #include <sys/rseq.h>
        #include <sched.h>
        static struct { volatile uint64_t n; char pad[56]; } counts[256];
        static volatile int stop_;
        // counts[cpu] += 1 with a wide window between load and store, committed by one store.
        static int add_one(struct rseq *rs) {
            uint64_t aborted = 0;
            asm volatile goto(
                ".pushsection __rseq_cs, \"aw\"\n"
                ".balign 32\n"
                "7: .long 0, 0\n"
                ".quad 1f, (2f - 1f), 4f\n"
                ".popsection\n"
                "leaq 7b(%%rip), %%rax\n"
                "movq %%rax, 8(%[rs])\n"
                "1:\n"
                "movl 4(%[rs]), %%eax\n"
                "shlq $6, %%rax\n"
                "addq %[counts], %%rax\n"
                "movq (%%rax), %%rcx\n"
                "movl $400, %%edx\n"
                "5: decl %%edx\n"
                "jnz 5b\n"
                "addq $1, %%rcx\n"
                "movq %%rcx, (%%rax)\n"
                "2:\n"
                "jmp 3f\n"
                ".byte 0x0f, 0xb9, 0x3d\n"
                ".long 0x53053053\n"
                "4:\n"
                "jmp %l[abort]\n"
                "3:\n"
                : : [rs] "r"(rs), [counts] "r"(counts) : "rax", "rcx", "rdx", "memory", "cc" : abort);
            (void)aborted;
            return 1;
        abort:
            return 0;
        }
        static uint64_t work(uint64_t *aborts) {
            struct rseq *rs = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
            uint64_t done = 0;
            while (!stop_) { if (add_one(rs)) done++; else (*aborts)++; }
            return done;
        }
        static void *worker(void *out) { uint64_t *o = out; o[0] = work(o + 1); return 0; }
        int main(void) {
            check(__rseq_size > 0);
            pthread_t t[2]; uint64_t out[3][2] = { { 0 } };
            for (int i = 0; i < 2; i++) check(pthread_create(&t[i], 0, worker, out[i]) == 0);
            ready();
            struct itimerval unused; (void)unused;
            // The leader works too: it is the one that is borrowed. Standard input is looked at between batches.
            fcntl(0, F_SETFL, O_NONBLOCK);
            struct rseq *rs = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
            for (char c; read(0, &c, 1) != 1;)
                for (int i = 0; i < 20000; i++) { if (add_one(rs)) out[2][0]++; else out[2][1]++; }
            stop_ = 1;
            uint64_t expected = out[2][0], aborts = out[2][1], found = 0;
            for (int i = 0; i < 2; i++) { pthread_join(t[i], 0); expected += out[i][0]; aborts += out[i][1]; }
            for (int i = 0; i < 256; i++) found += counts[i].n;
            char line[128]; snprintf(line, sizeof line, "%s %lu aborts, %ld lost", found == expected ? "ok" : "bad", (unsigned long)aborts, (long)(expected - found));
            say(line);
        }
        "#,
    );
    for _ in 0..300 {
        borrow(&target);
    }
    target.tell("");
    let line = target.line();
    eprintln!("{line}");
    assert!(line.starts_with("ok "), "{line}");
}

const FILTERED: &str = r#"
        #include <linux/filter.h>
        #include <linux/seccomp.h>
        #include <stddef.h>
        int main(void) {
            // What a sandboxed worker may do; anything else kills.
            #define ALLOW(n) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, n, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
            struct sock_filter f[] = {
                BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
                MORE
                ALLOW(SYS_read), ALLOW(SYS_write), ALLOW(SYS_exit_group), ALLOW(SYS_restart_syscall), ALLOW(SYS_nanosleep), ALLOW(SYS_clock_nanosleep),
                BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
            };
            struct sock_fprog p = { sizeof f / sizeof *f, f };
            ready();
            check(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &p) == 0);
            for (;;) { struct timespec t = { 0, 1000000 }; nanosleep(&t, 0); }
        }
        "#;

#[test]
fn filtered_targets_are_borrowed_when_that_is_safe() {
    let more = "ALLOW(SYS_rt_sigprocmask), ALLOW(SYS_close), ALLOW(SYS_munmap), ALLOW(SYS_sendto), ALLOW(SYS_recvmsg), ALLOW(SYS_dup3), ALLOW(SYS_mmap), ALLOW(SYS_mremap),
        ALLOW(SYS_mprotect), ALLOW(SYS_madvise), ALLOW(SYS_socketpair), ALLOW(SYS_setsockopt), ALLOW(SYS_fchdir), ALLOW(SYS_fcntl),";
    let filtered = Target::c("filtered", &FILTERED.replace("MORE", more));
    filtered.until("it is filtered", |t| {
        std::fs::read_to_string(format!("/proc/{}/status", t.pid()))
            .unwrap()
            .contains("Seccomp:\t2")
    });
    for _ in 0..50 {
        // getpid is not allowed to the program: the filter is suspended.
        borrow(&filtered);
    }
    assert!(filtered.is_running());
    let killing = Target::c("filtered", &FILTERED.replace("MORE", ""));
    killing.until("it is filtered", |t| {
        std::fs::read_to_string(format!("/proc/{}/status", t.pid()))
            .unwrap()
            .contains("Seccomp:\t2")
    });
    assert_filtered(&killing);
    let mut strict = Target::c(
        "strict",
        r#"
        int main(void) {
            ready();
            check(prctl(PR_SET_SECCOMP, 1) == 0);
            for (char c;;) { if (read(0, &c, 1) != 1) syscall(SYS_exit, 0); check(write(1, "ok\n", 3) == 3); }
        }
        "#,
    );
    strict.until("it is strict", |t| {
        std::fs::read_to_string(format!("/proc/{}/status", t.pid()))
            .unwrap()
            .contains("Seccomp:\t1")
    });
    assert_filtered(&strict);
    strict.tell("");
    assert_eq!(strict.line(), "ok");
}

/// The target's own rules would kill it if we died: it is stopped and let go, and nothing else.
fn assert_filtered(target: &Target) {
    let before = target.fingerprint();
    let error = Tracer::scope(|tracer| -> Result<(), RemoteError> {
        let mut stopped = tracer.stop_all(&[target.id()], soon())?;
        Borrowed::open(
            &mut stopped,
            target.id(),
            target.pid().leader(),
            soon(),
            &mut |_| Ok(()),
        )
        .map(drop)
    })
    .unwrap_err();
    assert!(matches!(error, RemoteError::Filtered { .. }), "{error:?}");
    assert_eq!(target.fingerprint(), before);
    assert!(target.is_running());
}

#[test]
fn no_signal_of_a_storm_is_lost() {
    let mut target = Target::c(
        "storm",
        r#"
        static volatile int got, last, disorder, plain, sent;
        static void on_rt(int s, siginfo_t *i, void *u) { (void)s; (void)u; if (i->si_value.sival_int != last + 1) disorder++; last = i->si_value.sival_int; got++; }
        static void on_plain(int s) { (void)s; plain++; }
        int main(void) {
            struct sigaction a = { 0 }; a.sa_sigaction = on_rt; a.sa_flags = SA_SIGINFO | SA_RESTART; sigaction(SIGRTMIN, &a, 0);
            struct sigaction b = { 0 }; b.sa_handler = on_plain; b.sa_flags = SA_RESTART; sigaction(SIGUSR1, &b, 0);
            int p[2]; check(pipe(p) == 0);
            pid_t parent = getpid(), child = fork();
            if (child == 0) {
                for (int i = 1; i <= 40000; i++) {
                    union sigval v = { i };
                    while (sigqueue(parent, SIGRTMIN, v) != 0) { check(errno == EAGAIN); usleep(100); }
                    if (i % 4 == 0) kill(parent, SIGUSR1);
                    if (i % 64 == 0) usleep(1000);
                }
                check(write(p[1], "x", 1) == 1); pause();
            }
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            ready();
            char c; check(read(p[0], &c, 1) == 1);
            kill(child, SIGKILL);
            for (int i = 0; i < 1000 && got < 40000; i++) usleep(1000);
            char line[128]; snprintf(line, sizeof line, "%d %d %d", got, disorder, plain > 0); say(line); pause();
        }
        "#,
    );
    let mut stops = 0;
    let children = target.children();
    while children.iter().any(|c| c.is_alive().unwrap()) && target.id().is_alive().unwrap() {
        borrow(&target);
        stops += 1;
        std::thread::sleep(Duration::from_micros(300));
    }
    assert_eq!(target.line(), "40000 0 1", "after {stops} stops");
    assert!(stops > 50, "{stops} stops");
}

#[test]
fn a_vfork_parent_is_held_until_its_child_execs() {
    let program = r#"
        int main(int argc, char **argv) {
            ready();
            if (vfork() == 0) {
                struct timespec t = { 0, 0 }; t.tv_nsec = atol(argv[1]);
                t.tv_sec = t.tv_nsec / 1000000000; t.tv_nsec %= 1000000000;
                syscall(SYS_nanosleep, &t, 0);
                execl("/bin/sleep", "sleep", "30", (char *)0); _exit(1);
            }
            say("ok");
            for (;;) pause();
        }
    "#;
    let mut target = Target::c_with("vfork", program, &["400000000".as_ref()]);
    target.until("the child runs", |t| t.state() == 'D');
    let children = target.children();
    assert_eq!(children.len(), 1);
    // Both are stopped: the child is let go to its exec.
    let both = [target.id(), children[0]];
    Tracer::scope(|tracer| -> Result<_, StopError> {
        let stopped = tracer.stop_all(&both, soon())?;
        assert_eq!(stopped.threads(target.pid()).count(), 1);
        assert_eq!(stopped.threads(children[0].pid).count(), 1);
        stopped.release();
        Ok(())
    })
    .unwrap();
    assert_eq!(target.line(), "ok");
    // One whose child takes too long is named, and goes on.
    let mut slow = Target::c_with("vfork", program, &["1500000000".as_ref()]);
    slow.until("the child runs", |t| t.state() == 'D');
    slow.children();
    let error = stop_error(slow.id(), Duration::from_millis(100));
    assert!(
        matches!(
            error,
            StopError::Unstoppable {
                waits: Waits::ForVforkChild,
                ..
            }
        ),
        "{error:?}"
    );
    assert_eq!(slow.line(), "ok");
    assert!(slow.is_running());
}

#[test]
fn traced_dead_and_foreign_targets_are_named() {
    let target = Target::c("plain", "int main(void) { ready(); for (;;) pause(); }");
    // Traced by another thread of ours, which is as good as another process to the kernel.
    let (told, tell) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let (ready_tx, ready_rx) = std::sync::mpsc::channel();
        let id = target.id();
        scope.spawn(move || {
            Tracer::scope(move |tracer| -> Result<(), StopError> {
                let stopped = tracer.stop_all(&[id], soon())?;
                ready_tx.send(()).unwrap();
                let _ = tell.recv();
                stopped.release();
                Ok(())
            })
            .unwrap();
        });
        ready_rx.recv().unwrap();
        let error = stop_error(target.id(), Duration::from_secs(1));
        drop(told);
        assert!(
            matches!(&error, StopError::Traced { tracer, .. } if *tracer > 0),
            "{error:?}"
        );
    });
    target.until("it runs", Target::is_running);

    let mut zombie = Command::new("true").spawn().unwrap();
    let id = ProcessId::of(Pid::new(zombie.id() as i32).unwrap()).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let error = stop_error(id, Duration::from_secs(1));
    assert!(matches!(error, StopError::Gone { .. }), "{error:?}");
    assert!(zombie.wait().unwrap().success());

    // Among others who live, the dead are passed over.
    let mut dead = Command::new("true").spawn().unwrap();
    let gone = ProcessId::of(Pid::new(dead.id() as i32).unwrap()).unwrap();
    assert!(dead.wait().unwrap().success());
    Tracer::scope(|tracer| -> Result<(), StopError> {
        let stopped = tracer.stop_all(&[gone, target.id()], soon())?;
        assert_eq!(stopped.processes(), [target.id()]);
        stopped.release();
        Ok(())
    })
    .unwrap();

    let reused = ProcessId {
        start_time: target.id().start_time + 1,
        ..target.id()
    };
    assert!(matches!(
        stop_error(reused, Duration::from_secs(1)),
        StopError::Gone { .. }
    ));
    assert!(target.is_running());
}

#[test]
fn a_target_that_dies_meanwhile_is_gone() {
    let target = Target::c("plain", "int main(void) { ready(); for (;;) pause(); }");
    let error = Tracer::scope(|tracer| -> Result<(), RemoteError> {
        let mut stopped = tracer.stop_all(&[target.id()], soon())?;
        let mut borrowed = Borrowed::open(
            &mut stopped,
            target.id(),
            target.pid().leader(),
            soon(),
            &mut |_| Ok(()),
        )?;
        target.signal(libc::SIGKILL);
        let result = borrowed.system_call(libc::SYS_getpid, [0; 6], soon());
        let error = result.err().unwrap();
        assert!(matches!(
            borrowed.close(),
            Ok(()) | Err(RemoteError::Gone { .. })
        ));
        let released = stopped.release();
        assert_eq!(released.gone, [target.pid()]);
        Err(error)
    })
    .unwrap_err();
    assert!(matches!(error, RemoteError::Gone { .. }), "{error:?}");
}

#[test]
fn threads_that_come_and_go_are_all_stopped() {
    let target = Target::c(
        "spawner",
        r#"
        static void *one(void *unused) { return unused; }
        static void *many(void *unused) { for (;;) { pthread_t t; if (pthread_create(&t, 0, one, 0) == 0) pthread_join(t, 0); } return unused; }
        int main(void) { pthread_t t[4]; for (int i = 0; i < 4; i++) pthread_create(&t[i], 0, many, 0); ready(); for (;;) pause(); }
        "#,
    );
    for _ in 0..50 {
        Tracer::scope(|tracer| -> Result<_, StopError> {
            let stopped = tracer.stop_all(&[target.id()], soon())?;
            let listed = || -> Vec<String> {
                let mut all: Vec<String> =
                    std::fs::read_dir(format!("/proc/{}/task", target.pid()))
                        .unwrap()
                        .filter_map(|e| {
                            let path = e.unwrap().path().join("stat");
                            let stat = std::fs::read_to_string(path).ok()?;
                            let (name, rest) = stat.rsplit_once(") ")?;
                            (!rest.starts_with(['Z', 'X'])).then(|| {
                                format!("{} {}", name.split(' ').next().unwrap(), &rest[..1])
                            })
                        })
                        .collect();
                all.sort();
                all
            };
            let first = listed();
            assert!(first.iter().all(|t| t.ends_with(" t")), "{first:?}");
            std::thread::sleep(Duration::from_millis(2));
            assert_eq!(listed(), first);
            stopped.release();
            Ok(())
        })
        .unwrap();
    }
    assert!(target.is_running());
}

#[test]
fn a_stop_signal_that_comes_meanwhile_takes_effect_afterwards() {
    let target = Target::c("plain", "int main(void) { ready(); for (;;) pause(); }");
    for with_continue in [false, true] {
        Tracer::scope(|tracer| -> Result<(), RemoteError> {
            let mut stopped = tracer.stop_all(&[target.id()], soon())?;
            let leader = target.pid().leader();
            let mut borrowed =
                Borrowed::open(&mut stopped, target.id(), leader, soon(), &mut |_| Ok(()))?;
            target.signal(libc::SIGSTOP);
            for _ in 0..20 {
                borrowed
                    .system_call(libc::SYS_getpid, [0; 6], soon())?
                    .unwrap();
            }
            if with_continue {
                target.signal(libc::SIGCONT);
            }
            borrowed.close()?;
            stopped.release();
            Ok(())
        })
        .unwrap();
        if with_continue {
            std::thread::sleep(Duration::from_millis(50));
            assert!(target.is_running(), "state {}", target.state());
        } else {
            target.until("it is stopped", |t| t.state() == 'T');
            target.signal(libc::SIGCONT);
            target.until("it runs", Target::is_running);
        }
    }
}

#[test]
fn a_borrow_that_fails_half_way_leaves_nothing() {
    let target = Target::c(
        "no-descriptors",
        r#"
        #include <sys/resource.h>
        int main(void) {
            struct rlimit r = { 16, 16 }; check(setrlimit(RLIMIT_NOFILE, &r) == 0);
            while (dup(0) >= 0) {}
            ready();
            for (;;) pause();
        }
        "#,
    );
    target.until("it waits", |t| t.state() == 'S');
    let before = target.fingerprint();
    let error = Tracer::scope(|tracer| -> Result<(), RemoteError> {
        let mut stopped = tracer.stop_all(&[target.id()], soon())?;
        let leader = target.pid().leader();
        Borrowed::open(&mut stopped, target.id(), leader, soon(), &mut |_| Ok(())).map(drop)
    })
    .unwrap_err();
    assert!(
        matches!(
            error,
            RemoteError::Call {
                call: "socketpair",
                errno: rustix::io::Errno::MFILE,
                ..
            }
        ),
        "{error:?}"
    );
    assert_eq!(target.fingerprint(), before);
    assert!(target.is_running());
    // A record that cannot be kept prevents everything.
    let error = Tracer::scope(|tracer| -> Result<(), RemoteError> {
        let mut stopped = tracer.stop_all(&[target.id()], soon())?;
        let leader = target.pid().leader();
        let mut full = |_: &_| Err(std::io::ErrorKind::StorageFull.into());
        Borrowed::open(&mut stopped, target.id(), leader, soon(), &mut full).map(drop)
    })
    .unwrap_err();
    assert!(matches!(error, RemoteError::Record { .. }), "{error:?}");
    assert_eq!(target.fingerprint(), before);
}
