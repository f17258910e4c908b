//! The process that moves files is killed at random instants. The target never dies, never stays stopped, and its data stay right.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod programs;

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hobble_graft::census::{Census, DescriptionId, FsId, MappedFile, MappedFileId};
use hobble_graft::ids::{Pid, ProcessId};
use hobble_graft::remote::{self, Residue};
use hobble_graft::stop::{Deadline, Tracer};
use hobble_graft::switch::{NoHandover, Step, StepLog, Switch, SwitchFailed};
use programs::Target;
use programs::hook::Hook;
use programs::volume::{Side, Volume};

/// Writes and reads through moved descriptors, checks its mappings, sleeps, waits and takes signals, all the while, and counts its rounds
/// where the test can see them.
const LEDGER: &str = r#"
#include <sys/epoll.h>
static volatile uint64_t *beat;
static char *directory;
static volatile int alarms;
static void on_alarm(int s) { (void)s; alarms++; }
static void *sleeper(void *unused) {
    (void)unused;
    for (;;) {
        double begun = now(); struct timespec t = { 0, 30000000 };
        check(nanosleep(&t, 0) == 0);
        check(now() - begun >= 0.03);
        beat[1]++;
    }
}
static void *waiter(void *unused) {
    (void)unused;
    int e = epoll_create1(0); struct epoll_event v;
    for (;;) {
        // A mover killed after the stop and before it has seen the register leaves the EINTR that the kernel gives after any stop.
        int r = epoll_wait(e, &v, 1, 20);
        if (r < 0) { check(errno == EINTR); beat[4]++; } else { check(r == 0); beat[2]++; }
    }
}
static int at(const char *name, int flags) {
    char path[512]; snprintf(path, sizeof path, "%s/%s", directory, name);
    int fd = open(path, flags, 0600); check(fd >= 0); return fd;
}
int main(int argc, char **argv) {
    directory = argv[1];
    int f = open(argv[2], O_RDWR); check(f >= 0);
    beat = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, f, 0); check(beat != MAP_FAILED);
    check(chdir(directory) == 0);
    int log = at("log", O_RDWR | O_CREAT), check_log = at("log", O_RDONLY), append = at("append", O_WRONLY | O_CREAT | O_APPEND);
    int twin = dup(log);
    int many[600]; for (int i = 0; i < 600; i++) many[i] = at("data", O_RDONLY | (i % 2 ? O_CLOEXEC : 0));
    int data = at("data", O_RDWR);
    unsigned char *private = mmap(0, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE, data, 0);
    volatile uint64_t *shared = mmap(0, 65536, PROT_READ | PROT_WRITE, MAP_SHARED, data, 65536);
    check(private != MAP_FAILED && shared != MAP_FAILED);
    for (int i = 0; i < 16; i += 2) private[i * 4096] = 200 + i;
    // The alarms are for this thread alone: they would end the sleep of another one.
    sigset_t m; sigemptyset(&m); sigaddset(&m, SIGALRM); pthread_sigmask(SIG_BLOCK, &m, 0);
    pthread_t a, b; check(pthread_create(&a, 0, sleeper, 0) == 0 && pthread_create(&b, 0, waiter, 0) == 0);
    struct sigaction sa = { 0 }; sa.sa_handler = on_alarm; sa.sa_flags = SA_RESTART; sigaction(SIGALRM, &sa, 0);
    struct itimerval it = { { 0, 3000 }, { 0, 3000 } }; setitimer(ITIMER_REAL, &it, 0);
    pthread_sigmask(SIG_UNBLOCK, &m, 0);
    ready();
    for (uint64_t n = 0;; n++) {
        check(write(n % 2 ? log : twin, &n, 8) == 8);
        check(lseek(log, 0, SEEK_CUR) == (off_t)(8 * (n + 1)));
        uint64_t got; check(pread(check_log, &got, 8, 8 * n) == 8 && got == n);
        check(write(append, &n, 8) == 8);
        for (int i = 0; i < 16; i++) check(private[i * 4096] == (i % 2 ? 7 : 200 + i));
        uint64_t old = shared[n % 8192]; (void)old; shared[n % 8192] = n;
        check(pread(data, &got, 8, 65536 + 8 * (n % 8192)) == 8 && got == n);
        int fd = many[n % 600]; check(fcntl(fd, F_GETFD) == ((n % 600) % 2 ? FD_CLOEXEC : 0));
        unsigned char c; check(pread(fd, &c, 1, 4096) == 1 && c == 7);
        struct stat here, named; check(stat(".", &here) == 0 && stat(directory, &named) == 0 && here.st_ino == named.st_ino);
        beat[0] = n + 1;
        beat[3] = alarms;
    }
}
"#;

fn budget() -> Deadline {
    Deadline::after(Duration::from_secs(5))
}

/// Writes down what would be left, and kills its own process at the step it is told.
struct ToFile {
    file: std::fs::File,
    dies_at: Option<u32>,
    steps: u32,
}

fn die() -> ! {
    let own = rustix::process::getpid();
    rustix::process::kill_process(own, rustix::process::Signal::KILL).unwrap();
    unreachable!("survived SIGKILL");
}

impl StepLog for ToFile {
    fn step(&mut self, step: &Step) -> std::io::Result<()> {
        if let Step::Borrow(residue) = step {
            // One write: we may be killed between two, and even in one, at the end of a page (mm/filemap.c, `generic_perform_write`); such a step is not made.
            let line = format!("\n{}\n", serde_json::to_string(residue).unwrap());
            self.file.write_all(line.as_bytes())?;
        }
        self.steps += 1;
        if self.dies_at == Some(self.steps) {
            die();
        }
        Ok(())
    }
}

/// What to put in place, opened while the target runs.
struct StandIns {
    descriptions: Vec<(DescriptionId, OwnedFd)>,
    files: Vec<(MappedFileId, OwnedFd)>,
    directories: Vec<(FsId, OwnedFd)>,
}

impl StandIns {
    fn open(volume: &Volume, census: &Census, side: Side) -> Self {
        use rustix::fs::OFlags;
        let access = |file: &MappedFile| {
            if file.is_writable {
                OFlags::RDWR
            } else {
                OFlags::RDONLY
            }
        };
        let directory = OFlags::PATH | OFlags::DIRECTORY;
        Self {
            descriptions: census
                .descriptions()
                .map(|d| (d.id, volume.stand_in(d, side)))
                .collect(),
            files: census
                .mapped_files()
                .iter()
                .map(|f| {
                    (
                        f.id,
                        volume.open(&volume.relative(&f.facts), access(f), side),
                    )
                })
                .collect(),
            directories: census
                .fs_structs()
                .iter()
                .filter_map(|fs| {
                    Some((
                        fs.id,
                        volume.open(&volume.relative(&fs.cwd.as_ref()?.facts), directory, side),
                    ))
                })
                .collect(),
        }
    }

    fn into_switch(self, census: &Census) -> Switch<'_> {
        let mut switch = Switch::new(census);
        self.descriptions
            .into_iter()
            .for_each(|(id, fd)| switch.description(id, fd));
        self.files
            .into_iter()
            .for_each(|(id, fd)| switch.mapped_file(id, fd));
        self.directories
            .into_iter()
            .for_each(|(id, fd)| switch.working_directory(id, fd));
        switch
    }
}

/// A process that shares our descriptors but not our memory, as the holder of an attachment does: the target's socket then sees no end of file
/// when we are killed. It ends after five seconds.
fn share_descriptors() {
    #[allow(unsafe_code)]
    mod sys {
        pub(super) fn holder() {
            // SAFETY: the child has a copy of our memory and only makes system calls.
            let pid = unsafe {
                libc::syscall(
                    libc::SYS_clone,
                    libc::CLONE_FILES | libc::SIGCHLD,
                    0,
                    0,
                    0,
                    0,
                )
            };
            if pid == 0 {
                // SAFETY: takes a number.
                unsafe { libc::alarm(5) };
                loop {
                    // SAFETY: takes nothing.
                    unsafe { libc::pause() };
                }
            }
            assert!(pid > 0);
        }
    }
    sys::holder();
}

/// Moves everything of a process to and fro until it is killed. Not a test: the body of the process that is killed.
#[test]
fn mover() {
    let Ok(pid) = std::env::var("HOBBLE_MOVER_PID") else {
        return;
    };
    let directory = std::env::var("HOBBLE_MOVER_DIRECTORY").unwrap();
    let log = std::env::var("HOBBLE_MOVER_LOG").unwrap();
    let id = ProcessId::of(Pid::new(pid.parse().unwrap()).unwrap()).unwrap();
    let volume = match std::env::var("HOBBLE_MOVER_MOUNT") {
        Ok(mount) => {
            let mount = rustix::fs::open(
                format!("/proc/self/fd/{mount}"),
                rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
                rustix::fs::Mode::empty(),
            );
            Volume::with_other_way(Path::new(&directory), mount.unwrap())
        }
        Err(_) => Volume::at(Path::new(&directory)),
    };
    let log = std::fs::File::options()
        .append(true)
        .create(true)
        .open(log)
        .unwrap();
    let dies_at: Option<u32> = std::env::var("HOBBLE_MOVER_DIES")
        .ok()
        .map(|n| n.parse().unwrap());
    let mut log = ToFile {
        file: log,
        dies_at,
        steps: 0,
    };
    if std::env::var_os("HOBBLE_MOVER_HOLDER").is_some() {
        share_descriptors();
    }
    for round in 0.. {
        let side = if round % 2 == 0 {
            Side::Clone
        } else {
            Side::Native
        };
        // Which descriptors and mappings there are does not change; positions do, and are looked at while the target stands still.
        let mut census = volume.census(&[id]);
        let stand_ins = StandIns::open(&volume, &census, side);
        println!("mover moves");
        let result = Tracer::scope(|tracer| -> Result<(), hobble_graft::stop::StopError> {
            let mut stopped = tracer.stop_all(&[id], budget())?;
            if dies_at == Some(0) {
                die();
            }
            volume.rescan(&mut census, &[id]);
            let switch = stand_ins.into_switch(&census);
            println!("mover applies");
            let result: Result<_, SwitchFailed> =
                switch.apply(&mut stopped, budget(), &mut log, &mut NoHandover);
            let released = stopped.release();
            result.unwrap_or_else(|error| panic!("round {round}: {error:?} {released:?}"));
            Ok(())
        });
        result.unwrap();
        println!("round {round}");
    }
}

#[test]
fn the_mover_is_killed_at_random_instants() {
    kill_movers(240, How::AtRandom);
}

#[test]
fn the_mover_is_killed_while_a_holder_keeps_its_descriptors() {
    kill_movers(6, How::WithHolder);
}

#[test]
fn the_mover_is_killed_while_descriptors_are_received_in_place() {
    kill_movers(160, How::OntoHook);
}

#[test]
fn the_mover_dies_at_each_step() {
    kill_movers(40, How::AtSteps);
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    AtRandom,
    /// As that, with replacements from a server that lives on.
    OntoHook,
    WithHolder,
    /// When everything stands still, and at each of the four steps.
    AtSteps,
}

impl How {
    fn is_random(self) -> bool {
        matches!(self, Self::AtRandom | Self::OntoHook)
    }
}

fn kill_movers(rounds: usize, how: How) {
    let directory = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("data"), vec![7; 131_072]).unwrap();
    let hook = (how == How::OntoHook).then(|| Hook::of(directory.path()));
    let beat_path = elsewhere.path().join("beat");
    std::fs::write(&beat_path, vec![0; 4096]).unwrap();
    let log = elsewhere.path().join("log");
    let target = Target::c_with(
        "ledger",
        LEDGER,
        &[directory.path().as_os_str(), beat_path.as_os_str()],
    );
    // Movers inherit the mount; the target shall not.
    let mount = hook.as_ref().map(|hook| {
        let mount = hook.mount();
        rustix::io::fcntl_setfd(&mount, rustix::io::FdFlags::empty()).unwrap();
        mount
    });
    let beats = || -> Vec<u64> {
        std::fs::read(&beat_path)
            .unwrap()
            .chunks_exact(8)
            .take(5)
            .map(|w| u64::from_le_bytes(w.try_into().unwrap()))
            .collect()
    };
    target.until("all threads work", |_| {
        beats().iter().take(3).all(|n| *n > 0)
    });
    let descriptors = target.descriptors();
    let vdso = target.vdso();
    let seed = std::env::var("HOBBLE_TEST_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or_else(|| u64::from(std::process::id()));
    eprintln!("HOBBLE_TEST_SEED={seed}");
    let mut random = seed | 1;
    let mut next = move || {
        // xorshift64
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let (mut rounds_seen, mut hits, mut cleaned, mut longest) = (0, 0, 0, Duration::ZERO);
    for kill in 0..rounds {
        let mut mover = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "mover", "--nocapture"])
            .env("HOBBLE_MOVER_PID", target.pid().to_string())
            .env("HOBBLE_MOVER_DIRECTORY", directory.path())
            .env("HOBBLE_MOVER_LOG", &log)
            .envs(
                mount
                    .as_ref()
                    .map(|mount| ("HOBBLE_MOVER_MOUNT", mount.as_raw_fd().to_string())),
            )
            .envs((how == How::WithHolder).then_some(("HOBBLE_MOVER_HOLDER", "1")))
            .envs(match how {
                How::AtRandom | How::OntoHook => None,
                How::AtSteps => Some(("HOBBLE_MOVER_DIES", (kill % 5).to_string())),
                // The steps after the first are announced while the thread waits for a word from us.
                How::WithHolder => Some(("HOBBLE_MOVER_DIES", (2 + kill % 3).to_string())),
            })
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(mover.stdout.take().unwrap())
            .lines()
            .map_while(Result::ok);
        let moves_before = if how.is_random() { next() % 3 } else { 0 };
        for moves in 0..=moves_before {
            assert!(
                lines.any(|line| line.contains("mover moves")),
                "the mover did not start"
            );
            rounds_seen += usize::from(moves > 0);
        }
        if how.is_random() {
            // One in three at any time of the stop, the others while a thread works for the mover.
            let mut longest_wait = 9_000;
            if kill % 3 != 0 {
                assert!(lines.any(|line| line.contains("mover applies")));
                // How long it takes until a thread works for the mover, and how long that takes, differs by a factor of ten from machine to machine.
                longest_wait = if kill % 3 == 1 { 20_000 } else { 8_000 };
            }
            std::thread::sleep(Duration::from_micros(next() % longest_wait));
            mover.kill().unwrap();
        }
        let killed = Instant::now();
        let status = mover.wait().unwrap();
        assert!(
            !status.success() && std::os::unix::process::ExitStatusExt::signal(&status) == Some(9),
            "kill {kill}: {status}"
        );
        let before = beats();
        target.until("all threads go on", |_| {
            beats()
                .iter()
                .zip(&before)
                .take(3)
                .all(|(now, then)| now > then)
        });
        longest = longest.max(killed.elapsed());
        hits += usize::from(target.vdso() != vdso);
        assert!(target.is_running(), "kill {kill}: state {}", target.state());
        let records = std::fs::read_to_string(&log).unwrap_or_default();
        let whole = |line: &str| serde_json::from_str::<Residue>(line).ok();
        if let Some(residue) = records.lines().rev().find_map(whole) {
            let maps = std::fs::read_to_string(format!("/proc/{}/maps", target.pid())).unwrap();
            let scratch = format!("{:x}-", residue.scratch_address);
            assert!(
                !maps.lines().any(|l| l.starts_with(&scratch)),
                "kill {kill}: the scratch mapping is left: {maps}"
            );
            // Every other time the next mover has to cope with what this one left.
            if kill % 2 == 1 && kill + 1 < rounds {
                continue;
            }
            let found = remote::clean(&residue, budget()).unwrap();
            cleaned += usize::from(found == remote::Cleaned::Code);
            assert_eq!(
                remote::clean(&residue, budget()).unwrap(),
                remote::Cleaned::Nothing
            );
        }
    }
    eprintln!(
        "{rounds} kills, {rounds_seen} whole moves in between, code left behind {hits} times, taken away {cleaned} times, longest way back {longest:?}, EINTR of epoll_wait {} times",
        beats()[4]
    );
    match how {
        How::AtSteps | How::WithHolder => {
            assert_eq!(beats()[4], 0, "EINTR although everything stood still")
        }
        How::AtRandom | How::OntoHook => assert!(
            beats()[4] <= 1 + rounds as u64 / 5,
            "EINTR is to be an accident of movers killed during the stop"
        ),
    }
    assert!(cleaned > 0, "no kill hit a borrowed thread");
    // Every record was written once, in order.
    let written = beats()[0];
    for name in ["log", "append"] {
        let bytes = std::fs::read(directory.path().join(name)).unwrap();
        let records: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|w| u64::from_le_bytes(w.try_into().unwrap()))
            .collect();
        assert!(records.len() as u64 >= written);
        assert!(
            records.iter().enumerate().all(|(i, n)| i as u64 == *n),
            "{name} is out of order"
        );
    }
    let left: Vec<String> = target
        .descriptors()
        .into_iter()
        .filter(|d| !descriptors.contains(d))
        .collect();
    assert_eq!(left, Vec::<String>::new(), "descriptors are left");
    assert_eq!(target.descriptors().len(), descriptors.len());
    assert_eq!(target.vdso(), vdso);
}
