//! What processes hold is exchanged, all of it, in one stop.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod programs;

use std::time::Duration;

use hobble_graft::census::Census;
use hobble_graft::ids::ProcessId;
use hobble_graft::stop::{Deadline, Tracer};
use hobble_graft::switch::{NoHandover, Report, Step, Switch, SwitchFailed};
use programs::Target;
use programs::volume::{Side, Volume};

#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Stop(#[from] hobble_graft::stop::StopError),
    #[error(transparent)]
    Switch(#[from] SwitchFailed),
}

fn budget() -> Deadline {
    Deadline::after(Duration::from_secs(5))
}

/// Everything to the given side.
fn switch<'c>(volume: &Volume, census: &'c Census, side: Side) -> Switch<'c> {
    let mut switch = Switch::new(census);
    for description in census.descriptions() {
        switch.description(description.id, volume.stand_in(description, side));
    }
    for file in census.mapped_files() {
        let access = if file.is_writable {
            rustix::fs::OFlags::RDWR
        } else {
            rustix::fs::OFlags::RDONLY
        };
        switch.mapped_file(
            file.id,
            volume.open(&volume.relative(&file.facts), access, side),
        );
    }
    for fs in census.fs_structs() {
        let open = |d: &hobble_graft::census::Directory| {
            volume.open(
                &volume.relative(&d.facts),
                rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY,
                side,
            )
        };
        if let Some(cwd) = &fs.cwd {
            switch.working_directory(fs.id, open(cwd));
        }
        if let Some(root) = &fs.root {
            switch.root_directory(fs.id, open(root));
        }
    }
    switch
}

/// Moves everything to the given side in one stop; gives the report and how long the targets stood still.
fn move_all(volume: &Volume, processes: &[ProcessId], side: Side) -> (Report, Duration) {
    let census = volume.census(processes);
    let switch = switch(volume, &census, side);
    let (report, released) = Tracer::scope(|tracer| -> Result<_, Failed> {
        let mut stopped = tracer.stop_all(processes, budget())?;
        let mut steps: Vec<Step> = Vec::new();
        let report = switch.apply(&mut stopped, budget(), &mut steps, &mut NoHandover)?;
        assert!(!steps.is_empty() || report.descriptors == 0);
        Ok((report, stopped.release()))
    })
    .unwrap();
    drop(switch);
    drop(census);
    assert_eq!(report.not_moved, []);
    let after = volume.census(processes);
    for description in after.descriptions() {
        assert_eq!(
            volume.side_of(&description.facts),
            side,
            "{:?}",
            description.facts
        );
    }
    for file in after.mapped_files() {
        assert_eq!(volume.side_of(&file.facts), side, "{:?}", file.facts);
    }
    for fs in after.fs_structs() {
        for directory in fs.cwd.iter().chain(&fs.root) {
            assert_eq!(
                volume.side_of(&directory.facts),
                side,
                "{:?}",
                directory.facts
            );
        }
    }
    (report, released.stood_still)
}

/// Opens argv[2] descriptors on argv[1], each with a position, flags and close-on-exec of its own, and checks them when told to.
const MANY: &str = r#"
int main(int argc, char **argv) {
    int n = atoi(argv[2]);
    int *fds = calloc(n, sizeof *fds);
    for (int i = 0; i < n; i++) {
        int flags = (i % 3 == 0 ? O_CLOEXEC : 0) | (i % 5 == 0 ? O_APPEND : 0) | (i % 7 == 0 ? O_NONBLOCK : 0);
        check((fds[i] = open(argv[1], (i % 2 ? O_RDONLY : O_RDWR) | flags)) >= 0);
        check(lseek(fds[i], i, SEEK_SET) == i);
    }
    int copy = n > 1 ? dup(fds[1]) : -1;
    ready();
    for (;;) {
        wait_for_line();
        for (int i = 0; i < n; i++) {
            int flags = (i % 2 ? O_RDONLY : O_RDWR) | (i % 5 == 0 ? O_APPEND : 0) | (i % 7 == 0 ? O_NONBLOCK : 0);
            check((fcntl(fds[i], F_GETFL) & (O_ACCMODE | O_APPEND | O_NONBLOCK)) == flags);
            check(fcntl(fds[i], F_GETFD) == (i % 3 == 0 ? FD_CLOEXEC : 0));
            check(lseek(fds[i], 0, SEEK_CUR) == i);
            unsigned char c;
            check(read(fds[i], &c, 1) == 1 && c == (unsigned char)(i * 7));
            check(lseek(fds[i], i, SEEK_SET) == i);
        }
        if (copy >= 0) {
            check(lseek(copy, 3, SEEK_SET) == 3 && lseek(fds[1], 0, SEEK_CUR) == 3);
            check(lseek(copy, 1, SEEK_SET) == 1);
        }
        say("ok");
    }
}
"#;

fn content(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 7) as u8).collect()
}

#[test]
fn descriptors_move_there_and_back_in_one_stop() {
    for count in [1, 100, 1_000, 5_000] {
        let volume = Volume::new();
        let path = volume.file("data", &content(8192));
        let number = count.to_string();
        let mut target = Target::c_with("many", MANY, &[path.as_os_str(), number.as_ref()]);
        let before = target.fingerprint();
        let expected = count + usize::from(count > 1);
        let mut stops = Vec::new();
        for round in 0..6 {
            let side = if round % 2 == 0 {
                Side::Clone
            } else {
                Side::Native
            };
            let (report, stood_still) = move_all(&volume, &[target.id()], side);
            assert_eq!((report.descriptions, report.descriptors), (count, expected));
            target.tell("check");
            assert_eq!(target.line(), "ok");
            stops.push(stood_still);
        }
        assert_eq!(target.fingerprint(), before);
        stops.sort();
        eprintln!(
            "{count} descriptors: stood still {:?} (median), {:?} to {:?}",
            stops[stops.len() / 2],
            stops[0],
            stops[stops.len() - 1]
        );
    }
}

#[test]
fn processes_that_share_a_position_go_on_sharing_it() {
    let volume = Volume::new();
    let path = volume.file("data", &content(8192));
    let mut target = Target::c_with(
        "family",
        r#"
        int main(int argc, char **argv) {
            int shared = open(argv[1], O_RDWR), turn[8];
            check(shared >= 0 && pipe(turn) == 0 && pipe(turn + 2) == 0 && pipe(turn + 4) == 0 && pipe(turn + 6) == 0);
            for (int child = 0; child < 3; child++) {
                if (fork() == 0) {
                    prctl(PR_SET_PDEATHSIG, SIGKILL);
                    int own = open(argv[1], O_RDONLY | O_CLOEXEC); check(own >= 0 && lseek(own, child, SEEK_SET) == child);
                    check(write(turn[7], "x", 1) == 1);
                    for (char c;;) {
                        if (read(turn[2 * child], &c, 1) != 1) _exit(0);
                        check(lseek(shared, 10, SEEK_CUR) > 0);
                        check(lseek(own, 0, SEEK_CUR) == child && fcntl(own, F_GETFD) == FD_CLOEXEC);
                        check(write(turn[7], "x", 1) == 1);
                    }
                }
            }
            char c;
            for (int child = 0; child < 3; child++) check(read(turn[6], &c, 1) == 1);
            ready();
            for (int n = 1;; n++) {
                wait_for_line();
                for (int child = 0; child < 3; child++) check(write(turn[2 * child + 1], "x", 1) == 1 && read(turn[6], &c, 1) == 1);
                check(lseek(shared, 0, SEEK_CUR) == 30 * n);
                say("ok");
            }
        }
        "#,
        &[path.as_os_str()],
    );
    let mut processes = target.children();
    processes.push(target.id());
    assert_eq!(processes.len(), 4);
    for round in 0..10 {
        let side = if round % 2 == 0 {
            Side::Clone
        } else {
            Side::Native
        };
        let (report, _) = move_all(&volume, &processes, side);
        assert_eq!((report.descriptions, report.descriptors), (4, 7));
        target.tell("check");
        assert_eq!(target.line(), "ok");
    }
}

#[test]
fn threads_with_tables_and_directories_of_their_own() {
    let volume = Volume::new();
    let path = volume.file("data", &content(8192));
    let mut target = Target::c_with(
        "unshared",
        r#"
        #include <sched.h>
        static char *path, *directory;
        static volatile int round_, done;
        static void *own(void *unused) {
            (void)unused;
            check(syscall(SYS_unshare, CLONE_FILES | CLONE_FS) == 0);
            int fd = open(path, O_RDWR | O_CLOEXEC); check(fd >= 0 && lseek(fd, 77, SEEK_SET) == 77 && chdir(directory) == 0);
            done = 1;
            for (int seen = 0;;) {
                while (round_ == seen) usleep(500);
                seen = round_;
                struct stat here, named; check(stat(".", &here) == 0 && stat(directory, &named) == 0 && here.st_ino == named.st_ino);
                check(lseek(fd, 0, SEEK_CUR) == 77);
                done = seen + 1;
            }
        }
        int main(int argc, char **argv) {
            path = argv[1]; directory = argv[2];
            pthread_t t; check(pthread_create(&t, 0, own, 0) == 0);
            while (!done) usleep(500);
            int fd = open(path, O_RDONLY); check(fd >= 0 && lseek(fd, 5, SEEK_SET) == 5);
            ready();
            for (;;) {
                wait_for_line();
                check(lseek(fd, 0, SEEK_CUR) == 5);
                round_++; while (done != round_ + 1) usleep(500);
                say("ok");
            }
        }
        "#,
        &[path.as_os_str(), volume.path().as_os_str()],
    );
    for round in 0..10 {
        let side = if round % 2 == 0 {
            Side::Clone
        } else {
            Side::Native
        };
        let (report, _) = move_all(&volume, &[target.id()], side);
        assert_eq!(
            (report.descriptions, report.descriptors, report.directories),
            (2, 2, 1)
        );
        target.tell("check");
        assert_eq!(target.line(), "ok");
    }
}

#[test]
fn working_and_root_directory() {
    let volume = Volume::new();
    volume.file("here", b"");
    std::fs::create_dir(volume.path().join("below")).unwrap();
    let mut target = Target::c_with(
        "rooted",
        r#"
        int main(int argc, char **argv) {
            check(chroot(argv[1]) == 0 && chdir("/below") == 0);
            ready();
            for (;;) {
                wait_for_line();
                char cwd[256]; check(getcwd(cwd, sizeof cwd) && strcmp(cwd, "/below") == 0);
                check(access("/here", F_OK) == 0 && access("../here", F_OK) == 0 && access("../../here", F_OK) == 0);
                say("ok");
            }
        }
        "#,
        &[volume.path().as_os_str()],
    );
    for round in 0..6 {
        let side = if round % 2 == 0 {
            Side::Clone
        } else {
            Side::Native
        };
        let (report, _) = move_all(&volume, &[target.id()], side);
        assert_eq!(report.directories, 2);
        target.tell("check");
        assert_eq!(target.line(), "ok");
    }
}

#[test]
fn mappings_keep_content_protection_and_flags() {
    let volume = Volume::new();
    let path = volume.file("data", &vec![9; 1 << 20]);
    let mut target = Target::c_with(
        "mapped",
        r#"
        enum { N = 64, P = 4096 };
        static uint64_t sum(volatile unsigned char *p, size_t n) { uint64_t s = 0; for (size_t i = 0; i < n; i++) s = s * 31 + p[i]; return s; }
        int main(int argc, char **argv) {
            int fd = open(argv[1], O_RDWR); check(fd >= 0);
            unsigned char *private = mmap(0, N * P, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
            unsigned char *shared = mmap(0, N * P, PROT_READ | PROT_WRITE, MAP_SHARED, fd, N * P);
            unsigned char *hidden = mmap(0, 4 * P, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
            unsigned char *guarded = mmap(0, 4 * P, PROT_READ, MAP_SHARED, fd, 8 * P);
            check(private != MAP_FAILED && shared != MAP_FAILED && hidden != MAP_FAILED && guarded != MAP_FAILED);
            close(fd);
            for (int i = 0; i < N; i += 3) memset(private + i * P, i, P);
            memset(hidden, 42, P); check(mprotect(hidden, 4 * P, PROT_NONE) == 0);
            check(mprotect(private, 3 * P, PROT_READ) == 0);
            check(mlock(shared, 2 * P) == 0 && madvise(shared + 4 * P, P, MADV_DONTFORK) == 0);
            check(madvise(shared + 8 * P, 8 * P, MADV_RANDOM) == 0 && madvise(private + 8 * P, P, MADV_DONTDUMP) == 0);
            uint64_t first = sum(private, N * P);
            ready();
            for (unsigned char n = 1;; n++) {
                wait_for_line();
                check(sum(private, N * P) == first);
                memset(shared, n, N * P); check(sum(shared, 1) == n);
                check(mprotect(hidden, 4 * P, PROT_READ) == 0);
                check(hidden[0] == 42 && hidden[P - 1] == 42 && hidden[P] == 9 && mprotect(hidden, 4 * P, PROT_NONE) == 0);
                check(guarded[0] == 9);
                private[N * P - 1] = n; first = sum(private, N * P);
                say("ok");
            }
        }
        "#,
        &[path.as_os_str()],
    );
    // What smaps says about the mappings, without what counts pages.
    let flags = |target: &Target| -> Vec<String> {
        let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", target.pid())).unwrap();
        let mut lines = Vec::new();
        let mut of_file = false;
        for line in smaps.lines() {
            if line.contains(" rw") || line.contains(" r-") || line.contains(" --") {
                of_file = line.ends_with("/data");
                if of_file {
                    let words: Vec<&str> = line.split_ascii_whitespace().take(5).collect();
                    lines.push(words.join(" "));
                }
            }
            if of_file && line.starts_with("VmFlags") {
                // Soft-dirty tracking only says that the memory is new.
                lines.push(line.replace(" sd", ""));
            }
        }
        lines
    };
    let before = flags(&target);
    assert!(before.len() > 10, "{before:?}");
    for round in 0..50_u8 {
        let side = if round % 2 == 0 {
            Side::Clone
        } else {
            Side::Native
        };
        let (report, _) = move_all(&volume, &[target.id()], side);
        assert!(
            report.mappings > 8 && report.bytes_copied >= 22 * 4096,
            "{report:?}"
        );
        assert_eq!(flags(&target), before);
        target.tell("check");
        assert_eq!(target.line(), "ok");
        let bytes = std::fs::read(&path).unwrap();
        assert!(
            bytes[64 * 4096..128 * 4096].iter().all(|b| *b == round + 1),
            "the shared mapping shows another file"
        );
        assert!(
            bytes[..64 * 4096].iter().all(|b| *b == 9),
            "private pages were written to the file"
        );
    }
}

/// Fails at the step it is told, or collects.
struct FailsAt(usize);

impl hobble_graft::switch::StepLog for FailsAt {
    fn step(&mut self, _: &Step) -> std::io::Result<()> {
        if self.0 == 0 {
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        self.0 -= 1;
        Ok(())
    }
}

#[test]
fn whatever_fails_is_rolled_back() {
    let volume = Volume::new();
    let path = volume.file("data", &content(8192));
    let mut targets: Vec<Target> = (0..2)
        .map(|_| Target::c_with("many", MANY, &[path.as_os_str(), "300".as_ref()]))
        .collect();
    let processes: Vec<ProcessId> = targets.iter().map(Target::id).collect();
    let before: Vec<String> = targets.iter().map(Target::fingerprint).collect();
    let mut failures = 0;
    for step in 0..8 {
        let census = volume.census(&processes);
        let switch = switch(&volume, &census, Side::Clone);
        let result = Tracer::scope(|tracer| -> Result<Result<Report, SwitchFailed>, Failed> {
            let mut stopped = tracer.stop_all(&processes, budget())?;
            Ok(switch.apply(&mut stopped, budget(), &mut FailsAt(step), &mut NoHandover))
        })
        .unwrap();
        match result {
            Err(failed) => {
                failures += 1;
                assert!(failed.rolled_back, "step {step}: {failed:?}");
                let after: Vec<String> = targets.iter().map(Target::fingerprint).collect();
                assert_eq!(after, before);
            }
            Ok(_) => break,
        }
    }
    assert_eq!(failures, 4, "two processes, two steps each");
    move_all(&volume, &processes, Side::Native);
    // A budget that is used up in the middle.
    for micros in (0..2_000).step_by(50) {
        let census = volume.census(&processes);
        let switch = switch(&volume, &census, Side::Clone);
        let result = Tracer::scope(|tracer| -> Result<_, Failed> {
            let mut stopped = tracer.stop_all(&processes, budget())?;
            let late = Deadline::after(Duration::from_micros(micros));
            Ok(switch.apply(&mut stopped, late, &mut Vec::new(), &mut NoHandover))
        })
        .unwrap();
        if let Err(failed) = result {
            assert!(failed.rolled_back, "{micros} µs: {failed:?}");
            let after: Vec<String> = targets.iter().map(Target::fingerprint).collect();
            assert_eq!(after, before, "{micros} µs");
        } else {
            move_all(&volume, &processes, Side::Native);
        }
    }
    for target in &mut targets {
        target.tell("check");
        assert_eq!(target.line(), "ok");
    }
}

#[test]
fn a_nearly_full_table_and_a_full_one() {
    let volume = Volume::new();
    let path = volume.file("data", &content(8192));
    let program = r#"
        #include <sys/resource.h>
        int main(int argc, char **argv) {
            int keep_hard = atoi(argv[2]), leave = atoi(argv[3]);
            struct rlimit r = { 64, keep_hard ? 128 : 64 }; check(setrlimit(RLIMIT_NOFILE, &r) == 0);
            int fds[64], n = 0;
            for (int fd; (fd = open(argv[1], O_RDONLY)) >= 0; n++) { fds[n] = fd; check(lseek(fd, n, SEEK_SET) == n); }
            check(errno == EMFILE);
            while (leave--) close(fds[--n]);
            ready();
            for (;;) {
                wait_for_line();
                for (int i = 0; i < n; i++) check(lseek(fds[i], 0, SEEK_CUR) == i);
                struct rlimit now_; check(getrlimit(RLIMIT_NOFILE, &now_) == 0 && now_.rlim_cur == 64);
                say("ok");
            }
        }
    "#;
    for (hard, leave) in [("0", "3"), ("0", "4"), ("0", "10"), ("1", "0"), ("1", "1")] {
        let mut target = Target::c_with(
            "full",
            program,
            &[path.as_os_str(), hard.as_ref(), leave.as_ref()],
        );
        for side in [Side::Clone, Side::Native] {
            move_all(&volume, &[target.id()], side);
            target.tell("check");
            assert_eq!(target.line(), "ok");
        }
    }
    for leave in ["0", "1", "2"] {
        let mut target = Target::c_with(
            "full",
            program,
            &[path.as_os_str(), "0".as_ref(), leave.as_ref()],
        );
        let before = target.fingerprint();
        let census = volume.census(&[target.id()]);
        let switch = switch(&volume, &census, Side::Clone);
        let failed = Tracer::scope(|tracer| -> Result<_, Failed> {
            let mut stopped = tracer.stop_all(&[target.id()], budget())?;
            Ok(switch
                .apply(&mut stopped, budget(), &mut Vec::new(), &mut NoHandover)
                .unwrap_err())
        })
        .unwrap();
        assert!(
            matches!(
                failed.error,
                hobble_graft::switch::SwitchError::TableFull { hard: 64, .. }
            ),
            "{failed:?}"
        );
        assert!(failed.rolled_back);
        assert_eq!(target.fingerprint(), before);
        target.tell("check");
        assert_eq!(target.line(), "ok");
    }
}

/// Keeps the ranges with OFD locks of its own, as a server does, and watches with an outsider's eyes.
struct Keeper {
    path: std::path::PathBuf,
    file: std::fs::File,
    calls: usize,
}

mod sys {
    #![allow(unsafe_code)]

    use std::os::fd::AsRawFd as _;

    /// An OFD lock on the whole file, without waiting; gives the error number.
    pub(super) fn ofd_lock(file: &std::fs::File, kind: i32) -> Result<(), i32> {
        ofd_lock_range(file, kind, 0, 0)
    }

    pub(super) fn ofd_lock_range(
        file: &std::fs::File,
        kind: i32,
        start: u64,
        length: u64,
    ) -> Result<(), i32> {
        // SAFETY: all zeroes is a valid flock.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = kind as i16;
        (lock.l_start, lock.l_len) = (start as i64, length as i64);
        // SAFETY: the structure outlives the call.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut lock) };
        if result == 0 {
            Ok(())
        } else {
            Err(std::io::Error::last_os_error().raw_os_error().unwrap())
        }
    }
}

impl hobble_graft::switch::LockHandover for Keeper {
    fn before(
        &mut self,
        locks: &[hobble_graft::switch::MovedLock],
        _: hobble_graft::switch::Way,
    ) -> std::io::Result<()> {
        assert_eq!(locks.len(), 2);
        self.calls += 1;
        assert_eq!(
            sys::ofd_lock(&self.file, libc::F_RDLCK),
            Ok(()),
            "the target's write lock was not weakened"
        );

        Ok(())
    }

    fn after(
        &mut self,
        _: &[hobble_graft::switch::MovedLock],
        _: hobble_graft::switch::Way,
    ) -> std::io::Result<()> {
        // Nobody else can write: we hold the ranges, and the target has its read locks again.
        let outsider = std::fs::File::options().write(true).open(&self.path)?;
        assert_eq!(sys::ofd_lock(&outsider, libc::F_WRLCK), Err(libc::EAGAIN));
        assert_eq!(sys::ofd_lock(&self.file, libc::F_UNLCK), Ok(()));
        assert_eq!(sys::ofd_lock(&outsider, libc::F_WRLCK), Err(libc::EAGAIN));
        Ok(())
    }
}

/// The locks of a process, as its descriptors show them. (`/proc/locks` is not read in one piece: while others lock, lines are missed.)
fn locks_of(target: &Target) -> Vec<String> {
    let mut ours = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{}/fdinfo", target.pid())).unwrap() {
        let info = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        let locks = info.lines().filter_map(|line| line.strip_prefix("lock:"));
        ours.extend(locks.map(|lock| {
            let words: Vec<&str> = lock.split_ascii_whitespace().skip(1).collect();
            words.join(" ")
        }));
    }
    ours.sort();
    ours.dedup();
    ours
}

#[test]
fn posix_locks_are_taken_again() {
    let volume = Volume::new();
    let path = volume.file("data", &content(8192));
    let mut target = Target::c_with(
        "locked",
        r#"
        int main(int argc, char **argv) {
            int fd = open(argv[1], O_RDWR), other = open(argv[1], O_RDONLY); check(fd >= 0 && other >= 0);
            struct flock w = { F_WRLCK, SEEK_SET, 10, 20, 0 }, r = { F_RDLCK, SEEK_SET, 1000, 0, 0 };
            check(fcntl(fd, F_SETLK, &w) == 0 && fcntl(other, F_SETLK, &r) == 0);
            ready();
            for (;;) wait_for_line(), say("ok");
        }
        "#,
        &[path.as_os_str()],
    );
    let before = locks_of(&target);
    assert_eq!(before.len(), 2, "{before:?}");
    for round in 0..6 {
        let side = if round % 2 == 0 {
            Side::Clone
        } else {
            Side::Native
        };
        let census = volume.census(&[target.id()]);
        let switch = switch(&volume, &census, side);
        let mut keeper = Keeper {
            path: path.clone(),
            file: std::fs::File::options()
                .read(true)
                .write(true)
                .open(&path)
                .unwrap(),
            calls: 0,
        };
        let report = Tracer::scope(|tracer| -> Result<_, Failed> {
            let mut stopped = tracer.stop_all(&[target.id()], budget())?;
            Ok(switch.apply(&mut stopped, budget(), &mut Vec::new(), &mut keeper)?)
        })
        .unwrap();
        assert_eq!((report.locks, keeper.calls), (2, 1));
        assert!(report.lock_window > Duration::ZERO);
        assert_eq!(locks_of(&target), before);
    }
    target.tell("check");
    assert_eq!(target.line(), "ok");
}

/// Locks a file through two descriptors, one of them for writing only if argv[2] says so, and maps it.
const LOCKED_TWICE: &str = r#"
int main(int argc, char **argv) {
    int fd = open(argv[1], O_RDWR), other = open(argv[1], O_RDWR | O_CLOEXEC); check(fd >= 0 && other >= 0);
    check(dup2(fd, 100) == 100 && dup2(other, 101) == 101 && close(fd) == 0 && close(other) == 0);
    check(mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, 100, 0) != MAP_FAILED);
    struct flock w = { F_WRLCK, SEEK_SET, 10, 20, 0 }, x = { F_WRLCK, SEEK_SET, 50, 10, 0 }, r = { F_RDLCK, SEEK_SET, 1000, 0, 0 };
    check(fcntl(100, F_SETLK, &w) == 0 && fcntl(101, F_SETLK, &x) == 0 && fcntl(101, F_SETLK, &r) == 0);
    ready();
    for (;;) wait_for_line(), say("ok");
}
"#;

/// Tries all the while to lock somebody else's ranges for writing, until told to stop; says how often it could.
struct Intruder {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    thread: std::thread::JoinHandle<(u64, u64)>,
}

impl Intruder {
    fn at(path: &std::path::Path) -> Self {
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let file = std::fs::File::options().write(true).open(path).unwrap();
        let told = std::sync::Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let (mut tries, mut taken) = (0, 0);
            while !told.load(std::sync::atomic::Ordering::Relaxed) {
                tries += 1;
                if sys::ofd_lock(&file, libc::F_WRLCK).is_ok() {
                    taken += 1;
                    sys::ofd_lock(&file, libc::F_UNLCK).unwrap();
                }
            }
            (tries, taken)
        });
        Self { stop, thread }
    }

    fn report(self) -> (u64, u64) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// A switch of what the census shows at one number (or of the mapping, without one).
fn only<'c>(volume: &Volume, census: &'c Census, number: Option<i32>, side: Side) -> Switch<'c> {
    let mut switch = Switch::new(census);
    for description in census.descriptions() {
        if description
            .places
            .iter()
            .any(|p| Some(p.fd.as_raw()) == number)
        {
            switch.description(description.id, volume.stand_in(description, side));
        }
    }
    for file in census.mapped_files().iter().filter(|_| number.is_none()) {
        let access = rustix::fs::OFlags::RDWR;
        switch.mapped_file(
            file.id,
            volume.open(&volume.relative(&file.facts), access, side),
        );
    }
    switch
}

#[test]
fn locks_held_through_descriptors_that_stay_are_kept() {
    let volume = Volume::new();
    let path = volume.file("data", &content(8192));
    let mut target = Target::c_with("locked-twice", LOCKED_TWICE, &[path.as_os_str()]);
    let before = locks_of(&target);
    assert_eq!(before.len(), 3, "{before:?}");
    for (number, lost) in [(Some(100), 2), (Some(101), 1), (None, 3)] {
        let intruder = Intruder::at(&path);
        for side in [Side::Clone, Side::Native, Side::Clone, Side::Native] {
            let census = volume.census(&[target.id()]);
            let switch = only(&volume, &census, number, side);
            let report = Tracer::scope(|tracer| -> Result<_, Failed> {
                let mut stopped = tracer.stop_all(&[target.id()], budget())?;
                Ok(switch.apply(
                    &mut stopped,
                    budget(),
                    &mut Vec::new(),
                    &mut Sharing::of(&path),
                )?)
            })
            .unwrap();
            assert_eq!(report.descriptors, usize::from(number.is_some()));
            assert_eq!((report.locks, report.locks_taken_again), (3 - lost, lost));
            assert_eq!(locks_of(&target), before, "{number:?}");
        }
        let (tries, taken) = intruder.report();
        assert!(tries > 100 && taken == 0, "{number:?}: {taken} of {tries}");
    }
    target.tell("check");
    assert_eq!(target.line(), "ok");
}

/// Keeps what is moved with read locks, as a server does, and fails at the `fails`th call.
struct Sharing {
    file: std::fs::File,
    fails: usize,
}

impl Sharing {
    fn of(path: &std::path::Path) -> Self {
        let file = std::fs::File::open(path).unwrap();
        Self {
            file,
            fails: usize::MAX,
        }
    }

    fn call(&mut self, locks: Option<&[hobble_graft::switch::MovedLock]>) -> std::io::Result<()> {
        if self.fails == 0 {
            self.fails = usize::MAX;
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        self.fails -= 1;
        let Some(locks) = locks else {
            return sys::ofd_lock(&self.file, libc::F_UNLCK)
                .map_err(std::io::Error::from_raw_os_error);
        };
        assert!(!locks.is_empty());
        for moved in locks {
            let length = moved.lock.end.map_or(0, |end| end - moved.lock.start + 1);
            sys::ofd_lock_range(&self.file, libc::F_RDLCK, moved.lock.start, length)
                .map_err(std::io::Error::from_raw_os_error)?;
        }
        Ok(())
    }
}

impl hobble_graft::switch::LockHandover for Sharing {
    fn before(
        &mut self,
        locks: &[hobble_graft::switch::MovedLock],
        _: hobble_graft::switch::Way,
    ) -> std::io::Result<()> {
        self.call(Some(locks))
    }

    fn after(
        &mut self,
        _: &[hobble_graft::switch::MovedLock],
        _: hobble_graft::switch::Way,
    ) -> std::io::Result<()> {
        self.call(None)
    }
}

#[test]
fn a_switch_that_fails_leaves_all_locks() {
    let volume = Volume::new();
    let path = volume.file("data", &content(8192));
    let mut target = Target::c_with("locked-twice", LOCKED_TWICE, &[path.as_os_str()]);
    let before = locks_of(&target);
    let shown = target.fingerprint();
    let mut failures = 0;
    for everything in [false, true] {
        for step in 0..8 {
            let census = volume.census(&[target.id()]);
            let mut switch = if everything {
                switch(&volume, &census, Side::Clone)
            } else {
                only(&volume, &census, Some(100), Side::Clone)
            };
            for file in census.mapped_files() {
                let name = volume.relative(&file.facts);
                switch.mapped_file(
                    file.id,
                    volume.open(&name, rustix::fs::OFlags::RDWR, Side::Clone),
                );
            }
            // First the steps, then what keeps the locks.
            let (mut log, mut keeper) = (FailsAt(usize::MAX), Sharing::of(&path));
            if step < 5 {
                log = FailsAt(step);
            } else {
                keeper.fails = step - 5;
            }
            let intruder = Intruder::at(&path);
            let result = Tracer::scope(|tracer| -> Result<Result<Report, SwitchFailed>, Failed> {
                let mut stopped = tracer.stop_all(&[target.id()], budget())?;
                Ok(switch.apply(&mut stopped, budget(), &mut log, &mut keeper))
            })
            .unwrap();
            let (tries, taken) = intruder.report();
            assert_eq!(taken, 0, "step {step}: {tries} tries");
            assert_eq!(locks_of(&target), before, "step {step}, {everything}");
            match result {
                Err(failed) => {
                    failures += 1;
                    assert!(failed.rolled_back, "step {step}: {failed:?}");
                    assert_eq!(target.fingerprint(), shown, "step {step}");
                }
                Ok(_) => {
                    move_all(&volume, &[target.id()], Side::Native);
                    assert_eq!(locks_of(&target), before);
                }
            }
        }
    }
    assert_eq!(failures, 10, "three steps and two calls, twice");
    target.tell("check");
    assert_eq!(target.line(), "ok");
}
