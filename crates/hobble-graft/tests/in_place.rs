//! Files of a FUSE filesystem are put in place of native ones without a request to their server for each.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod programs;

use std::ffi::OsStr;
use std::time::Duration;

use hobble_graft::census::Census;
use hobble_graft::remote::RemoteError;
use hobble_graft::stop::{Deadline, Tracer};
use hobble_graft::switch::{NoHandover, Report, Switch, SwitchError, SwitchFailed};
use programs::Target;
use programs::hook::Hook;
use programs::volume::{Side, Volume};

/// What looking whether closing is slow may cost, and a little.
const A_FEW: u64 = 8;

/// Opens argv[2] descriptors of argv[1] between others, with free numbers between them, some twice; argv[3] other threads; behind every argv[4]th
/// a number is left free; at `gap` closes a descriptor of none of them.
const SCATTERED: &str = r#"
static void *sleeper(void *unused) { (void)unused; for (;;) pause(); }
int main(int argc, char **argv) {
    int n = atoi(argv[2]), threads = atoi(argv[3]), every = atoi(argv[4]), stranger = -1, copies = 0;
    int *fds = calloc(n, sizeof *fds), *holes = calloc(n, sizeof *holes), *copy = calloc(n, sizeof *copy), left = 0;
    for (int i = 0; i < n; i++) {
        check((fds[i] = open(argv[1], (i % 2 ? O_RDONLY : O_RDWR) | (i % 3 == 0 ? O_CLOEXEC : 0) | (i % 5 == 0 ? O_APPEND : 0))) >= 0);
        check(lseek(fds[i], i, SEEK_SET) == i);
        if (every && i % every == every - 1) check((holes[left++] = open("/dev/null", O_RDONLY)) >= 0);
        if (i % 50 == 7) check((copy[copies++] = i % 100 == 7 ? dup(fds[i]) : fcntl(fds[i], F_DUPFD_CLOEXEC, 0)) >= 0);
        if (i == n / 2) check((stranger = open("/dev/null", O_RDONLY)) >= 0);
    }
    while (left) close(holes[--left]);
    for (int i = 0; i < threads; i++) { pthread_t t; check(pthread_create(&t, 0, sleeper, 0) == 0); }
    ready();
    for (;;) {
        char line[16]; int at = 0;
        for (;; at++) { if (read(0, line + at, 1) != 1) _exit(0); if (line[at] == '\n') break; }
        if (line[0] == 'g') check(close(stranger) == 0);
        for (int i = 0; i < n; i++) {
            check((fcntl(fds[i], F_GETFL) & (O_ACCMODE | O_APPEND)) == ((i % 2 ? O_RDONLY : O_RDWR) | (i % 5 == 0 ? O_APPEND : 0)));
            check(fcntl(fds[i], F_GETFD) == (i % 3 == 0 ? FD_CLOEXEC : 0) && lseek(fds[i], 0, SEEK_CUR) == i);
            unsigned char c; check(pread(fds[i], &c, 1, i) == 1 && c == (unsigned char)(i * 7));
        }
        for (int i = 7, k = 0; i < n; i += 50, k++) {
            check(fcntl(copy[k], F_GETFD) == (i % 100 == 7 ? 0 : FD_CLOEXEC));
            check(lseek(copy[k], 3, SEEK_SET) == 3 && lseek(fds[i], 0, SEEK_CUR) == 3 && lseek(fds[i], i, SEEK_SET) == i);
        }
        say("ok");
    }
}
"#;

struct Scene {
    volume: Volume,
    hook: Hook,
    target: Target,
    /// Descriptions and descriptors of them.
    counts: (usize, usize),
    before: String,
}

#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Stop(#[from] hobble_graft::stop::StopError),
    #[error(transparent)]
    Switch(#[from] SwitchFailed),
}

impl Scene {
    fn new(count: usize, threads: usize, every: usize) -> Self {
        let directory = tempfile::tempdir().unwrap().keep();
        let content: Vec<u8> = (0..8192).map(|i| (i * 7) as u8).collect();
        let path = directory.join("data");
        std::fs::write(&path, content).unwrap();
        let hook = Hook::of(&directory);
        let volume = Volume::with_other_way(&directory, hook.mount());
        let numbers = [count, threads, every].map(|n| n.to_string());
        let arguments: Vec<&OsStr> = [path.as_os_str()]
            .into_iter()
            .chain(numbers.iter().map(OsStr::new))
            .collect();
        let target = Target::c_with("scattered", SCATTERED, &arguments);
        let before = target.fingerprint();
        let copies = (7..count).step_by(50).count();
        Self {
            volume,
            hook,
            target,
            counts: (count, count + copies),
            before,
        }
    }

    fn census(&self) -> Census {
        self.volume.census(&[self.target.id()])
    }

    /// Moves as the census says; gives what was flushed while the target stood still, too.
    fn apply(
        &self,
        census: &Census,
        side: Side,
        budget: Duration,
    ) -> Result<(Report, Duration, u64), Failed> {
        let mut switch = Switch::new(census);
        for description in census.descriptions() {
            switch.description(description.id, self.volume.stand_in(description, side));
        }
        Tracer::scope(|tracer| {
            let mut stopped =
                tracer.stop_all(&[self.target.id()], Deadline::after(Duration::from_secs(5)))?;
            let flushes = self.hook.flushes();
            let report = switch.apply(
                &mut stopped,
                Deadline::after(budget),
                &mut Vec::new(),
                &mut NoHandover,
            );
            let flushes = self.hook.flushes() - flushes;
            let released = stopped.release();
            Ok((report?, released.stood_still, flushes))
        })
    }

    fn move_to(&self, side: Side) -> (Duration, u64) {
        let census = self.census();
        let (report, stood_still, flushes) =
            self.apply(&census, side, Duration::from_secs(5)).unwrap();
        assert_eq!((report.descriptions, report.descriptors), self.counts);
        drop(census);
        for description in self.census().descriptions() {
            assert_eq!(
                self.volume.side_of(&description.facts),
                side,
                "{:?}",
                description.facts
            );
        }
        (stood_still, flushes)
    }

    fn check(&mut self) {
        self.target.tell("check");
        assert_eq!(self.target.line(), "ok");
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(self.volume.path());
    }
}

fn many_descriptors() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
}

#[test]
fn nothing_is_flushed_while_the_target_stands_still() {
    many_descriptors();
    for (count, threads, every) in [
        (8, 0, 0),
        (253, 0, 100),
        (254, 3, 40),
        (1_000, 0, 0),
        (1_000, 7, 50),
        (5_000, 0, 100),
        (5_000, 7, 30),
    ] {
        let mut scene = Scene::new(count, threads, every);
        let (mut stops, mut flushed) = (Vec::new(), 0);
        for _ in 0..3 {
            let (stood_still, flushes) = scene.move_to(Side::Clone);
            assert!(
                flushes <= A_FEW,
                "{flushes} requests to move {count} descriptors"
            );
            stops.push(stood_still);
            flushed = flushed.max(flushes);
            scene.check();
            scene.move_to(Side::Native);
            scene.check();
            assert_eq!(scene.target.fingerprint(), scene.before);
        }
        stops.sort();
        eprintln!(
            "{count} descriptors, {threads} more threads, a free number behind every {every}th: {:?} to {:?}, {flushed} requests",
            stops[0], stops[2]
        );
    }
}

#[test]
fn few_descriptors_and_too_many_free_numbers_are_moved_as_ever() {
    many_descriptors();
    // Every second number is free: more than is plugged.
    for (count, every) in [(1, 0), (7, 3), (1_500, 2)] {
        let mut scene = Scene::new(count, 2, every);
        for side in [Side::Clone, Side::Native, Side::Clone, Side::Native] {
            scene.move_to(side);
            scene.check();
        }
        assert_eq!(scene.target.fingerprint(), scene.before);
    }
}

#[test]
fn a_budget_that_ends_between_two_messages_is_rolled_back() {
    many_descriptors();
    let mut scene = Scene::new(1_500, 3, 100);
    let (mut failures, mut successes) = (0, 0);
    for micros in (200..6_000).step_by(100) {
        let census = scene.census();
        match scene.apply(&census, Side::Clone, Duration::from_micros(micros)) {
            Err(Failed::Switch(failed)) => {
                failures += 1;
                assert!(failed.rolled_back, "{micros} µs: {failed:?}");
                assert_eq!(scene.target.fingerprint(), scene.before, "{micros} µs");
                scene.check();
            }
            Err(Failed::Stop(error)) => panic!("{error}"),
            Ok(_) => {
                successes += 1;
                drop(census);
                scene.move_to(Side::Native);
            }
        }
    }
    eprintln!("{failures} rolled back, {successes} moved");
    assert!(failures > 0);
    scene.check();
    assert_eq!(scene.target.fingerprint(), scene.before);
}

#[test]
fn a_number_that_is_not_where_it_was_seen_is_found_out_and_everything_put_back() {
    many_descriptors();
    // The thread's own socket takes the free number in the middle, so that none is left to be plugged.
    let mut scene = Scene::new(600, 2, 300);
    let stale = scene.census();
    // A descriptor in the middle is closed: the numbers behind it would be received one place too early.
    scene.target.tell("gap");
    assert_eq!(scene.target.line(), "ok");
    let before = scene.target.fingerprint();
    let Err(Failed::Switch(failed)) = scene.apply(&stale, Side::Clone, Duration::from_secs(5))
    else {
        panic!("the gap was not noticed");
    };
    assert!(
        matches!(
            failed.error,
            SwitchError::Remote(RemoteError::Truncated { .. })
        ),
        "{failed:?}"
    );
    assert!(failed.rolled_back, "{failed:?}");
    assert_eq!(scene.target.fingerprint(), before);
    drop(stale);
    scene.check();
    scene.move_to(Side::Clone);
    scene.check();
    scene.move_to(Side::Native);
    assert_eq!(scene.target.fingerprint(), before);
}

#[test]
fn plugs_that_miss_a_free_number_change_nothing() {
    many_descriptors();
    let mut scene = Scene::new(600, 2, 100);
    let stale = scene.census();
    scene.target.tell("gap");
    assert_eq!(scene.target.line(), "ok");
    let before = scene.target.fingerprint();
    // Copies are put in place instead, each at the price of a request.
    let (report, _, flushes) = scene
        .apply(&stale, Side::Clone, Duration::from_secs(5))
        .unwrap();
    assert_eq!(report.descriptors, scene.counts.1);
    assert!(flushes >= 600, "{flushes} requests");
    drop(stale);
    scene.check();
    scene.move_to(Side::Native);
    assert_eq!(scene.target.fingerprint(), before);
}

/// Opens argv[1] at number argv[2], and once more when told to, for a lock on it; argv[3] other threads.
const LOCKS_LATER: &str = r#"
static void *sleeper(void *unused) { (void)unused; for (;;) pause(); }
int main(int argc, char **argv) {
    int number = atoi(argv[2]), fd = open(argv[1], O_RDWR), other = -1; check(fd >= 0);
    if (fd != number) check(dup3(fd, number, O_CLOEXEC) == number && close(fd) == 0);
    check(dup2(number, number + 2) == number + 2);
    for (int i = 0; i < atoi(argv[3]); i++) { pthread_t t; check(pthread_create(&t, 0, sleeper, 0) == 0); }
    ready();
    for (;;) {
        wait_for_line();
        if (other < 0) check((other = open(argv[1], O_RDWR | O_CLOEXEC)) >= 0);
        struct flock w = { F_WRLCK, SEEK_SET, 10, 10, 0 }, r = { F_RDLCK, SEEK_SET, 100, 0, 0 };
        check(fcntl(other, F_SETLK, &w) == 0 && fcntl(other, F_SETLK, &r) == 0);
        check(lseek(number, 0, SEEK_CUR) == lseek(number + 2, 0, SEEK_CUR));
        say("ok");
    }
}
"#;

fn posix_locks(target: &Target) -> Vec<String> {
    let mut locks = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{}/fdinfo", target.pid())).unwrap() {
        let info = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        locks.extend(
            info.lines()
                .filter(|l| l.contains(" POSIX "))
                .map(str::to_owned),
        );
    }
    locks
}

#[test]
fn where_a_copy_would_cost_locks_there_is_none() {
    many_descriptors();
    // From number 900 on more numbers are free below than are plugged: a copy is closed, and the locks are taken again.
    for (number, threads, taken_again) in [("3", "0", 0), ("9", "3", 0), ("900", "0", 2)] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data");
        std::fs::write(&path, vec![7; 8192]).unwrap();
        let hook = Hook::of(directory.path());
        let volume = Volume::with_other_way(directory.path(), hook.mount());
        let arguments = [path.as_os_str(), number.as_ref(), threads.as_ref()];
        let mut target = Target::c_with("locks-later", LOCKS_LATER, &arguments);
        let id = target.id();
        let apply = |census: &Census, side| {
            let mut switch = Switch::new(census);
            let on = |facts| volume.side_of(facts) != side;
            for description in census.descriptions().filter(|d| on(&d.facts)) {
                switch.description(description.id, volume.stand_in(description, side));
            }
            Tracer::scope(|tracer| -> Result<Report, Failed> {
                let limit = Deadline::after(Duration::from_secs(5));
                let mut stopped = tracer.stop_all(&[id], limit)?;
                Ok(switch.apply(&mut stopped, limit, &mut Vec::new(), &mut NoHandover)?)
            })
            .unwrap()
        };
        let report = apply(&volume.census(&[target.id()]), Side::Clone);
        assert_eq!((report.descriptors, report.locks_taken_again), (2, 0));
        target.tell("lock");
        assert_eq!(target.line(), "ok");
        let before = posix_locks(&target);
        assert_eq!(before.len(), 2, "{before:?}");
        let report = apply(&volume.census(&[target.id()]), Side::Native);
        assert_eq!(
            (report.descriptors, report.locks_taken_again),
            (2, taken_again),
            "from {number}"
        );
        let words = |locks: &[String]| -> Vec<String> {
            let mut kinds: Vec<String> = locks
                .iter()
                .map(|lock| {
                    lock.split_ascii_whitespace()
                        .skip(2)
                        .collect::<Vec<_>>()
                        .join(" ")
                })
                .collect();
            kinds.sort();
            kinds
        };
        assert_eq!(
            words(&posix_locks(&target)),
            words(&before),
            "from {number}"
        );
        for description in volume.census(&[target.id()]).descriptions() {
            assert_eq!(volume.side_of(&description.facts), Side::Native);
        }
        target.tell("check");
        assert_eq!(target.line(), "ok");
    }
}
