//! Locks through the mirror: between programs on the hook, and against an outsider on the backing file.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use hobble_mirror::adopt::{Adoption, HandleId};
use hobble_mirror::locks::{LockKind, LockRange, RangeLock};
use hobble_testkit::volume::Kind;
use rustix::fs::FlockOperation;
use support::{Hook, Options, with};

fn open(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap()
}

/// Waits for what follows from a RELEASE, which the kernel sends in the background.
fn soon(mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(5), "not released");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// One fcntl lock call; `Ok(None)` for success, else the errno or the conflicting lock.
#[allow(unsafe_code)]
fn fcntl(
    file: impl AsFd,
    command: i32,
    kind: i32,
    start: i64,
    len: i64,
) -> Result<libc::flock64, i32> {
    // SAFETY: all-zero is a valid `flock64`.
    let mut lock: libc::flock64 = unsafe { std::mem::zeroed() };
    lock.l_type = kind as i16;
    lock.l_start = start;
    lock.l_len = len;
    // SAFETY: `lock` is initialised and outlives the call.
    let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), command, &raw mut lock) };
    if result == 0 {
        Ok(lock)
    } else {
        Err(std::io::Error::last_os_error().raw_os_error().unwrap())
    }
}

fn posix(file: impl AsFd, kind: i32, start: i64, len: i64) -> Result<(), i32> {
    fcntl(file, libc::F_SETLK, kind, start, len).map(drop)
}

fn ofd(file: impl AsFd, kind: i32, start: i64, len: i64) -> Result<(), i32> {
    fcntl(file, libc::F_OFD_SETLK, kind, start, len).map(drop)
}

/// Does lock calls in a process of its own.
///
/// Python, because it calls fcntl(2) as it is, from a process that shares no descriptors with the test.
fn other_process(path: &Path, script: &str) -> std::process::Output {
    let program = format!(
        "import fcntl, os, struct, sys, time, signal\nf = open({path:?}, 'r+b')\n{script}\n"
    );
    std::process::Command::new("python3")
        .arg("-c")
        .arg(program)
        .output()
        .unwrap()
}

fn said(output: &std::process::Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout).trim(),
        String::from_utf8_lossy(&output.stderr).trim()
    )
}

const TRY: &str = "
try:
    fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 0)
    print('got it')
except OSError as error:
    print(error.errno)";

fn both(body: impl Fn(&Hook)) {
    with(Kind::Ext4, Options::default(), &body);
    with(Kind::Tmpfs, Options::without_passthrough(), &body);
}

#[test]
fn posix_locks_exclude_other_processes_on_either_side() {
    both(|hook| {
        let file = open(&hook.at("f"));
        posix(&file, libc::F_WRLCK, 0, 10).unwrap();
        for side in [hook.at("f"), hook.behind("f")] {
            assert_eq!(said(&other_process(&side, TRY)), "11", "{}", side.display());
        }
        // The same process may lock again, through any descriptor.
        let again = open(&hook.at("f"));
        posix(&again, libc::F_RDLCK, 0, 5).unwrap();
        posix(&again, libc::F_WRLCK, 0, 10).unwrap();
        // Closing any descriptor of the file drops them all (fcntl(2)).
        drop(again);
        for side in [hook.at("f"), hook.behind("f")] {
            assert_eq!(
                said(&other_process(&side, TRY)),
                "got it",
                "{}",
                side.display()
            );
        }
    });
}

#[test]
fn an_outsiders_lock_is_respected_and_named() {
    both(|hook| {
        let file = open(&hook.at("f"));
        let outsider = open(&hook.behind("f"));
        ofd(&outsider, libc::F_WRLCK, 5, 10).unwrap();
        assert_eq!(posix(&file, libc::F_RDLCK, 0, 6), Err(libc::EAGAIN));
        assert_eq!(ofd(&file, libc::F_WRLCK, 14, 1), Err(libc::EAGAIN));
        posix(&file, libc::F_WRLCK, 0, 5).unwrap();
        let found = fcntl(&file, libc::F_GETLK, libc::F_WRLCK, 0, 100).unwrap();
        assert_eq!(
            (i32::from(found.l_type), found.l_start, found.l_len),
            (libc::F_WRLCK, 5, 10)
        );
        ofd(&outsider, libc::F_UNLCK, 0, 0).unwrap();
        posix(&file, libc::F_WRLCK, 0, 100).unwrap();
        let found = fcntl(&outsider, libc::F_OFD_GETLK, libc::F_RDLCK, 50, 1).unwrap();
        assert_eq!(i32::from(found.l_type), libc::F_WRLCK);
    });
}

#[test]
fn a_conflict_on_the_hook_names_the_process() {
    both(|hook| {
        let file = open(&hook.at("f"));
        posix(&file, libc::F_WRLCK, 3, 4).unwrap();
        let script = "
raw = fcntl.fcntl(f, fcntl.F_GETLK, struct.pack('hhqqi4x', fcntl.F_RDLCK, 0, 0, 0, 0))
kind, whence, start, length, pid = struct.unpack('hhqqi4x', raw)
print(kind, start, length, pid)";
        let expected = format!("{} 3 4 {}", libc::F_WRLCK, std::process::id());
        assert_eq!(said(&other_process(&hook.at("f"), script)), expected);
    });
}

#[test]
fn ofd_locks_belong_to_the_description_and_go_with_it() {
    both(|hook| {
        let (one, other) = (open(&hook.at("f")), open(&hook.at("f")));
        ofd(&one, libc::F_WRLCK, 0, 10).unwrap();
        assert_eq!(ofd(&other, libc::F_RDLCK, 9, 1), Err(libc::EAGAIN));
        let duplicate = one.try_clone().unwrap();
        drop(one);
        assert_eq!(
            ofd(&other, libc::F_RDLCK, 9, 1),
            Err(libc::EAGAIN),
            "the description is still open"
        );
        drop(duplicate);
        soon(|| ofd(&other, libc::F_RDLCK, 9, 1).is_ok());
        let outsider = open(&hook.behind("f"));
        assert_eq!(ofd(&outsider, libc::F_WRLCK, 9, 1), Err(libc::EAGAIN));
        ofd(&outsider, libc::F_WRLCK, 0, 9).unwrap();
    });
}

#[test]
fn flock_excludes_on_both_sides_and_goes_with_the_description() {
    both(|hook| {
        let (one, other) = (open(&hook.at("f")), open(&hook.at("f")));
        let outsider = open(&hook.behind("f"));
        rustix::fs::flock(&one, FlockOperation::LockExclusive).unwrap();
        for file in [&other, &outsider] {
            assert_eq!(
                rustix::fs::flock(file, FlockOperation::NonBlockingLockShared).unwrap_err(),
                rustix::io::Errno::AGAIN
            );
        }
        rustix::fs::flock(&one, FlockOperation::LockShared).unwrap();
        rustix::fs::flock(&other, FlockOperation::NonBlockingLockShared).unwrap();
        rustix::fs::flock(&outsider, FlockOperation::NonBlockingLockShared).unwrap();
        rustix::fs::flock(&outsider, FlockOperation::Unlock).unwrap();
        rustix::fs::flock(&one, FlockOperation::Unlock).unwrap();
        drop(other);
        soon(|| rustix::fs::flock(&outsider, FlockOperation::NonBlockingLockExclusive).is_ok());
        assert!(rustix::fs::flock(&one, FlockOperation::NonBlockingLockShared).is_err());
    });
}

/// A waiter is let in when the lock is free, whoever held it.
#[test]
fn waiting_ends_when_the_lock_is_given_up() {
    both(|hook| {
        let path = hook.at("f");
        for (holder, is_outsider) in [(open(&path), false), (open(&hook.behind("f")), true)] {
            soon(|| ofd(&holder, libc::F_WRLCK, 0, 10).is_ok());
            let waiter = open(&path);
            let (sender, receiver) = mpsc::channel();
            let wait = std::thread::spawn(move || {
                fcntl(&waiter, libc::F_OFD_SETLKW, libc::F_WRLCK, 5, 1).unwrap();
                sender.send(Instant::now()).unwrap();
                waiter
            });
            assert!(
                receiver.recv_timeout(Duration::from_millis(100)).is_err(),
                "outsider: {is_outsider}"
            );
            ofd(&holder, libc::F_UNLCK, 0, 0).unwrap();
            receiver.recv_timeout(Duration::from_secs(5)).unwrap();
            drop(wait.join().unwrap());
        }
        let (holder, waiter) = (open(&hook.behind("f")), open(&path));
        rustix::fs::flock(&holder, FlockOperation::LockExclusive).unwrap();
        let wait =
            std::thread::spawn(move || rustix::fs::flock(&waiter, FlockOperation::LockExclusive));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!wait.is_finished());
        drop(holder);
        wait.join().unwrap().unwrap();
    });
}

#[test]
fn a_signal_ends_a_wait_with_eintr_and_a_kill_ends_the_process() {
    both(|hook| {
        let path = hook.at("f");
        for side in [hook.at("f"), hook.behind("f")] {
            let holder = open(&side);
            soon(|| ofd(&holder, libc::F_WRLCK, 0, 10).is_ok());
            soon(|| rustix::fs::flock(&holder, FlockOperation::NonBlockingLockExclusive).is_ok());
            for call in [
                "fcntl.lockf(f, fcntl.LOCK_EX, 10, 0)",
                "fcntl.flock(f, fcntl.LOCK_EX)",
            ] {
                let script = format!(
                    "class Alarm(Exception): pass
def ring(*_): raise Alarm()
signal.signal(signal.SIGALRM, ring)
signal.setitimer(signal.ITIMER_REAL, 0.1)
begun = time.monotonic()
try:
    {call}
    print('got it')
except Alarm:
    print('alarm' if time.monotonic() - begun < 2 else 'late')"
                );
                assert_eq!(said(&other_process(&path, &script)), "alarm");
                let mut child = std::process::Command::new("python3")
                    .arg("-c")
                    .arg(format!("import fcntl\nf = open({path:?}, 'r+b')\n{call}"))
                    .spawn()
                    .unwrap();
                std::thread::sleep(Duration::from_millis(200));
                let begun = Instant::now();
                child.kill().unwrap();
                child.wait().unwrap();
                assert!(begun.elapsed() < Duration::from_secs(1));
            }
        }
    });
}

#[test]
fn a_circle_of_waiting_processes_is_refused() {
    both(|hook| {
        let path = hook.at("f");
        let file = open(&path);
        posix(&file, libc::F_WRLCK, 0, 1).unwrap();
        let child = {
            let path = path.clone();
            std::thread::spawn(move || {
                other_process(
                    &path,
                    "fcntl.lockf(f, fcntl.LOCK_EX, 1, 1)\nprint('mine', flush=True)\nfcntl.lockf(f, fcntl.LOCK_EX, 1, 0)\nprint('both')",
                )
            })
        };
        // Until the child holds byte 1 and waits for byte 0.
        let begun = Instant::now();
        while posix(&file, libc::F_WRLCK, 1, 1).is_ok() {
            posix(&file, libc::F_UNLCK, 1, 1).unwrap();
            assert!(begun.elapsed() < Duration::from_secs(10));
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(
            fcntl(&file, libc::F_SETLKW, libc::F_WRLCK, 1, 1).map(drop),
            Err(libc::EDEADLK)
        );
        posix(&file, libc::F_UNLCK, 0, 0).unwrap();
        assert_eq!(said(&child.join().unwrap()), "mine\nboth");
    });
}

fn adopted(
    hook: &Hook,
    original: &File,
    path: &str,
    ofd_locks: Vec<RangeLock>,
) -> (hobble_mirror::adopt::AdoptedId, File) {
    let facts = Adoption {
        path: path.as_bytes().to_vec(),
        ofd_locks,
        pid: std::process::id(),
        ..Adoption::default()
    };
    let id = hook
        .mirror
        .adopt(
            std::os::fd::OwnedFd::from(original.try_clone().unwrap()),
            facts,
        )
        .unwrap();
    let file = hook.mirror.stand_in(hook.mount.as_fd(), id).unwrap();
    (id, File::from(file))
}

fn handle(hook: &Hook, file: &File) -> HandleId {
    hook.mirror.identify(file.as_fd()).unwrap().handle.unwrap()
}

#[test]
fn a_moved_description_keeps_its_flock_and_ofd_locks_all_the_way() {
    both(|hook| {
        let original = open(&hook.behind("f"));
        ofd(&original, libc::F_WRLCK, 0, 10).unwrap();
        rustix::fs::flock(&original, FlockOperation::LockExclusive).unwrap();
        let locks = vec![RangeLock {
            kind: LockKind::Write,
            range: LockRange { start: 0, end: 9 },
        }];
        let (_, file) = adopted(hook, &original, "f", locks);
        drop(original);
        let outsider = open(&hook.behind("f"));
        let insider = open(&hook.at("f"));
        let held = || {
            for other in [&outsider, &insider] {
                assert_eq!(ofd(other, libc::F_RDLCK, 0, 1), Err(libc::EAGAIN));
                assert!(rustix::fs::flock(other, FlockOperation::NonBlockingLockShared).is_err());
            }
        };
        held();
        // The program goes on with its locks: they are the very same.
        ofd(&file, libc::F_WRLCK, 0, 20).unwrap();
        assert_eq!(ofd(&outsider, libc::F_RDLCK, 15, 1), Err(libc::EAGAIN));
        ofd(&file, libc::F_UNLCK, 10, 10).unwrap();
        ofd(&outsider, libc::F_RDLCK, 15, 1).unwrap();
        held();
        let holders = hook.mirror.with_locks(|locks| locks.held());
        assert_eq!(holders.len(), 1);
        assert!(holders[0].ofd);
        let back = hook
            .mirror
            .give_back(&hook.mirror.identify(file.as_fd()).unwrap())
            .unwrap();
        drop(file);
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(ofd(&outsider, libc::F_RDLCK, 0, 1), Err(libc::EAGAIN));
        assert!(rustix::fs::flock(&outsider, FlockOperation::NonBlockingLockShared).is_err());
        drop(back);
    });
}

#[test]
fn locks_taken_while_attached_go_with_the_description_that_is_given_back() {
    both(|hook| {
        let file = open(&hook.at("f"));
        ofd(&file, libc::F_WRLCK, 0, 10).unwrap();
        rustix::fs::flock(&file, FlockOperation::LockExclusive).unwrap();
        let back = hook
            .mirror
            .give_back(&hook.mirror.identify(file.as_fd()).unwrap())
            .unwrap();
        drop(file);
        std::thread::sleep(Duration::from_millis(50));
        let outsider = open(&hook.behind("f"));
        assert_eq!(ofd(&outsider, libc::F_RDLCK, 0, 1), Err(libc::EAGAIN));
        assert!(rustix::fs::flock(&outsider, FlockOperation::NonBlockingLockShared).is_err());
        drop(back);
        ofd(&outsider, libc::F_RDLCK, 0, 1).unwrap();
    });
}

/// A program that keys its own state by `st_dev` takes a moved and a later-opened descriptor for two files; to the kernel they have one owner.
#[test]
fn moved_and_later_opened_descriptors_of_one_process_exclude_each_other() {
    both(|hook| {
        let original = open(&hook.behind("f"));
        let (_, moved) = adopted(hook, &original, "f", Vec::new());
        drop(original);
        let opened = open(&hook.at("f"));
        posix(&moved, libc::F_WRLCK, 0, 10).unwrap();
        assert_eq!(posix(&opened, libc::F_WRLCK, 0, 10), Err(libc::EAGAIN));
        posix(&opened, libc::F_WRLCK, 20, 10).unwrap();
        assert_eq!(posix(&moved, libc::F_RDLCK, 20, 1), Err(libc::EAGAIN));
        // Closing a descriptor of one class drops nothing of the other.
        drop(opened);
        assert_eq!(said(&other_process(&hook.behind("f"), TRY)), "11");
        posix(&moved, libc::F_WRLCK, 20, 10).unwrap();
    });
}

/// A program that holds an original descriptor and does what a graft has a target do.
struct Target {
    child: std::process::Child,
    input: std::process::ChildStdin,
    output: std::io::BufReader<std::process::ChildStdout>,
    socket: std::os::fd::OwnedFd,
}

impl Target {
    /// Opens `path` as `files[0]`.
    fn start(path: &Path) -> Self {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).unwrap();
        let program = format!(
            "import fcntl, os, socket, sys
door = socket.socket(fileno={})
files = [open({path:?}, 'r+b', buffering=0)]
def take():
    _, fds, _, _ = socket.recv_fds(door, 1, 1)
    os.dup2(fds[0], files[0].fileno())
    os.close(fds[0])
def lock(kind, length, start):
    fcntl.lockf(files[0], kind | fcntl.LOCK_NB, length, start)
for line in sys.stdin:
    try:
        exec(line)
        print('done', flush=True)
    except OSError as error:
        print(error.errno, flush=True)
",
            theirs.as_raw_fd()
        );
        let mut child = std::process::Command::new("python3")
            .args(["-c", &program])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = std::io::BufReader::new(child.stdout.take().unwrap());
        Self {
            child,
            input,
            output,
            socket: ours,
        }
    }

    fn run(&mut self, command: &str) -> String {
        use std::io::{BufRead, Write};
        writeln!(self.input, "{command}").unwrap();
        let mut answer = String::new();
        self.output.read_line(&mut answer).unwrap();
        answer.trim().to_owned()
    }

    /// `dup2` of this file over the target's own.
    fn exchange(&mut self, file: impl AsFd) {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [file.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(
            &self.socket,
            &[std::io::IoSlice::new(b"x")],
            &mut control,
            SendFlags::empty(),
        )
        .unwrap();
        assert_eq!(self.run("take()"), "done");
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const WRITE: LockRange = LockRange { start: 0, end: 9 };
const READ: LockRange = LockRange { start: 50, end: 59 };

/// The whole way in and out, as the graft drives it, with an outsider looking at every step.
#[test]
fn posix_locks_move_to_the_hook_and_back() {
    with(Kind::Ext4, Options::default(), |hook| {
        let path = hook.behind("f");
        drop(open(&path));
        let mut target = Target::start(&path);
        let locked = || assert_eq!(said(&other_process(&path, TRY)), "11");
        assert_eq!(target.run("lock(fcntl.LOCK_EX, 10, 0)"), "done");
        assert_eq!(target.run("lock(fcntl.LOCK_SH, 10, 50)"), "done");
        locked();
        let original = open(&path);
        let (id, moved) = adopted(hook, &original, "f", Vec::new());
        drop(original);

        let mut handover = hook.mirror.begin_handover(id).unwrap();
        assert_eq!(target.run("lock(fcntl.LOCK_SH, 10, 0)"), "done");
        handover.take_read(WRITE).unwrap();
        handover.take_read(READ).unwrap();
        locked();
        target.exchange(&moved);
        handover.upgrade(WRITE).unwrap();
        locked();
        handover.accept(&[handle(hook, &moved)]);
        assert_eq!(target.run("lock(fcntl.LOCK_EX, 10, 0)"), "done");
        assert_eq!(target.run("lock(fcntl.LOCK_SH, 10, 50)"), "done");
        let registered = handover.finish();
        assert_eq!(registered.len(), 2, "{registered:?}");
        locked();
        assert_eq!(said(&other_process(&hook.at("f"), TRY)), "11");

        let holders = hook.mirror.with_locks(|locks| locks.held());
        assert_eq!(holders.len(), 1);
        assert_eq!(
            (holders[0].pid, holders[0].ofd, holders[0].ranges.len()),
            (target.child.id(), false, 2)
        );
        let info = hook.mirror.identify(moved.as_fd()).unwrap();
        let native = hook.mirror.give_back(&info).unwrap();
        let owner = holders[0].owner;
        hook.mirror
            .with_locks(|locks| locks.downgrade(owner))
            .unwrap();
        target.exchange(&native);
        // The exchange was a close to the kernel; what the server holds stays until it is told otherwise.
        locked();
        assert_eq!(target.run("lock(fcntl.LOCK_SH, 10, 0)"), "done");
        assert_eq!(target.run("lock(fcntl.LOCK_SH, 10, 50)"), "done");
        locked();
        hook.mirror.with_locks(|locks| locks.release(owner));
        assert_eq!(target.run("lock(fcntl.LOCK_EX, 10, 0)"), "done");
        locked();
        drop((moved, native));
        std::thread::sleep(Duration::from_millis(50));
        locked();
        assert!(hook.mirror.with_locks(|locks| locks.held()).is_empty());
        drop(target);
        assert_eq!(said(&other_process(&path, TRY)), "got it");
    });
}

/// A descriptor that was missed is moved in a later round, when the process holds locks on the hook already; `happens`: or the move is given up.
fn later_round(happens: bool) {
    with(Kind::Ext4, Options::default(), |hook| {
        let path = hook.behind("f");
        drop(open(&path));
        let mut target = Target::start(&path);
        let outsider = open(&path);
        let held = |start: i64| ofd(&outsider, libc::F_WRLCK, start, 1) == Err(libc::EAGAIN);
        let shared = |start: i64| held(start) && ofd(&outsider, libc::F_RDLCK, start, 1).is_ok();
        let range = |start: u64| LockRange {
            start,
            end: start + 9,
        };
        let move_over = |target: &mut Target, ranges: &[(LockKind, u64)], happens: bool| {
            hook.mirror.quiesce(true);
            let original = open(&path);
            let (id, moved) = adopted(hook, &original, "f", Vec::new());
            let present = hook.mirror.with_locks(|locks| locks.held());
            let mut handover = hook.mirror.begin_handover(id).unwrap();
            if let Some(holder) = present.first() {
                handover.join(holder.owner).unwrap();
            }
            for (_, start) in ranges {
                assert_eq!(
                    target.run(&format!("lock(fcntl.LOCK_SH, 10, {start})")),
                    "done"
                );
                handover.take_read(range(*start)).unwrap();
            }
            target.exchange(&moved);
            handover.accept(&[handle(hook, &moved)]);
            for (kind, start) in ranges {
                assert_eq!(
                    target.run(&format!("lock(fcntl.LOCK_SH, 10, {start})")),
                    "done"
                );
                if *kind == LockKind::Write {
                    handover.upgrade(range(*start)).unwrap();
                    assert_eq!(
                        target.run(&format!("lock(fcntl.LOCK_EX, 10, {start})")),
                        "done"
                    );
                }
            }
            let taken = happens.then(|| handover.finish().len());
            hook.mirror.arrived();
            hook.mirror.quiesce(false);
            taken
        };
        assert_eq!(target.run("lock(fcntl.LOCK_EX, 10, 0)"), "done");
        assert_eq!(target.run("lock(fcntl.LOCK_SH, 10, 20)"), "done");
        let first = [(LockKind::Write, 0), (LockKind::Read, 20)];
        assert_eq!(move_over(&mut target, &first, true), Some(2));
        assert!(held(0) && !shared(0) && shared(20));

        // Natively, as by a descriptor that was in flight meanwhile.
        let open_again = format!("files.insert(0, open({path:?}, 'r+b', buffering=0))");
        assert_eq!(target.run(&open_again), "done");
        assert_eq!(target.run("lock(fcntl.LOCK_EX, 10, 40)"), "done");
        assert_eq!(target.run("lock(fcntl.LOCK_SH, 10, 25)"), "done");
        let later = [(LockKind::Write, 40), (LockKind::Read, 25)];
        let taken = move_over(&mut target, &later, happens);
        assert!(
            held(0) && !shared(0) && shared(20),
            "those of the first round"
        );
        let ranges: Vec<(u64, u64)> = hook
            .mirror
            .with_locks(|locks| locks.held())
            .iter()
            .flat_map(|holder| holder.ranges.iter().map(|r| (r.range.start, r.range.end)))
            .collect();
        if happens {
            assert_eq!(taken, Some(3));
            assert_eq!(ranges, [(0, 9), (20, 34), (40, 49)]);
            assert!(shared(30) && held(40) && !shared(40));
        } else {
            assert_eq!(ranges, [(0, 9), (20, 29)]);
            assert!(!held(30) && !held(40));
        }
        // Once it is there, closing it drops them all, as closing any descriptor of the file does.
        assert_eq!(target.run("files[0].close()"), "done");
        assert!(!held(0) && !held(20) && !held(40));
    });
}

#[test]
fn locks_moved_in_a_later_round_are_added_to_those_that_are_there() {
    later_round(true);
}

#[test]
fn a_later_round_that_is_given_up_leaves_the_locks_that_were_there() {
    later_round(false);
}

#[test]
fn an_abandoned_handover_leaves_nothing_locked() {
    with(Kind::Ext4, Options::default(), |hook| {
        let original = open(&hook.behind("f"));
        let (id, moved) = adopted(hook, &original, "f", Vec::new());
        let mut handover = hook.mirror.begin_handover(id).unwrap();
        handover.take_read(WRITE).unwrap();
        handover.upgrade(WRITE).unwrap();
        handover.accept(&[handle(hook, &moved)]);
        posix(&moved, libc::F_WRLCK, 0, 10).unwrap();
        drop(handover);
        assert_eq!(said(&other_process(&hook.behind("f"), TRY)), "got it");
    });
}

#[test]
fn locks_survive_a_reopening_for_another_mode() {
    both(|hook| {
        let file = open(&hook.at("f"));
        ofd(&file, libc::F_WRLCK, 0, 10).unwrap();
        posix(&file, libc::F_WRLCK, 20, 10).unwrap();
        rustix::fs::flock(&file, FlockOperation::LockExclusive).unwrap();
        let outsider = open(&hook.behind("f"));
        let held = || {
            assert_eq!(ofd(&outsider, libc::F_RDLCK, 0, 1), Err(libc::EAGAIN));
            assert_eq!(ofd(&outsider, libc::F_RDLCK, 20, 1), Err(libc::EAGAIN));
            assert!(rustix::fs::flock(&outsider, FlockOperation::NonBlockingLockShared).is_err());
        };
        hook.inject(&["errno=EIO op=write percent=0"]);
        hook.mirror.quiesce(true);
        let mut number = std::os::fd::OwnedFd::from(file);
        let again = hook.mirror.reopen_stand_in(number.as_fd()).unwrap();
        hook.mirror.supersede(
            &[hook
                .mirror
                .identify(number.as_fd())
                .unwrap()
                .handle
                .unwrap()],
            true,
        );
        rustix::io::dup2(&again, &mut number).unwrap();
        drop(again);
        hook.mirror.quiesce(false);
        let file = File::from(number);
        std::thread::sleep(Duration::from_millis(50));
        held();
        // They are the very same locks: the program goes on with them.
        ofd(&file, libc::F_UNLCK, 0, 0).unwrap();
        posix(&file, libc::F_UNLCK, 0, 0).unwrap();
        rustix::fs::flock(&file, FlockOperation::Unlock).unwrap();
        ofd(&outsider, libc::F_WRLCK, 0, 100).unwrap();
        rustix::fs::flock(&outsider, FlockOperation::NonBlockingLockExclusive).unwrap();
        drop(outsider);
        ofd(&file, libc::F_WRLCK, 0, 10).unwrap();
        drop(file);
        let outsider = open(&hook.behind("f"));
        soon(|| ofd(&outsider, libc::F_WRLCK, 0, 100).is_ok());
    });
}

#[test]
fn a_moved_description_is_closed_with_its_last_stand_in() {
    both(|hook| {
        let original = open(&hook.behind("f"));
        rustix::fs::flock(&original, FlockOperation::LockExclusive).unwrap();
        let (_, file) = adopted(hook, &original, "f", Vec::new());
        drop(original);
        let outsider = open(&hook.behind("f"));
        assert!(rustix::fs::flock(&outsider, FlockOperation::NonBlockingLockShared).is_err());
        drop(file);
        soon(|| rustix::fs::flock(&outsider, FlockOperation::NonBlockingLockShared).is_ok());
    });
}

/// A stand-in that never took the place of the original, because an exchange was given up, takes nothing away from it.
#[test]
fn an_original_keeps_its_own_locks_when_its_stand_in_is_dropped() {
    both(|hook| {
        let original = open(&hook.behind("f"));
        ofd(&original, libc::F_WRLCK, 0, 10).unwrap();
        let facts = Adoption {
            path: b"f".to_vec(),
            ofd_locks: vec![RangeLock {
                kind: LockKind::Write,
                range: LockRange { start: 0, end: 9 },
            }],
            ..Adoption::default()
        };
        let stand_in = || {
            let original = original.as_fd().try_clone_to_owned().unwrap();
            let id = hook.mirror.adopt(original, facts.clone()).unwrap();
            (id, hook.mirror.stand_in(hook.mount.as_fd(), id).unwrap())
        };
        let (_, given_up) = stand_in();
        let outsider = open(&hook.behind("f"));
        let client = open(&hook.at("f"));
        for other in [&outsider, &client] {
            assert_eq!(ofd(other, libc::F_WRLCK, 0, 10), Err(libc::EAGAIN));
        }
        drop(given_up);
        soon(|| hook.mirror.open_files() == 1);
        for other in [&outsider, &client] {
            assert_eq!(ofd(other, libc::F_WRLCK, 0, 10), Err(libc::EAGAIN));
        }
        // The next one does take its place, and with it go the locks, whatever else is open.
        let (id, stand_in) = stand_in();
        hook.mirror.replaced(id);
        drop((original, stand_in));
        soon(|| ofd(&client, libc::F_WRLCK, 0, 10).is_ok());
    });
}

/// The kernel announces one signal for each request. One that came while a rule delayed the request must end the wait for the lock that follows, and so must a kill
/// after it, which is announced by nobody.
#[test]
fn a_signal_during_a_delay_ends_the_wait_for_the_lock_that_follows() {
    const TAKE: [&str; 2] = [
        "fcntl.lockf(f, fcntl.LOCK_EX)",
        "fcntl.flock(f, fcntl.LOCK_EX)",
    ];
    both(|hook| {
        let file = open(&hook.at("f"));
        posix(&file, libc::F_WRLCK, 0, 0).unwrap();
        rustix::fs::flock(&file, FlockOperation::LockExclusive).unwrap();
        hook.inject(&["latency=400ms op=setlk,flock who.comm=python3*"]);
        for take in TAKE {
            let script = format!(
                "
def stop(signal, frame): raise InterruptedError('stopped')
signal.signal(signal.SIGALRM, stop)
signal.setitimer(signal.ITIMER_REAL, 0.1)
begun = time.monotonic()
try:
    {take}
    print('got it')
except InterruptedError as error:
    print(error, time.monotonic() - begun >= 0.35)"
            );
            let output = within(Duration::from_secs(10), &hook.at("f"), &script);
            assert_eq!(output.as_deref(), Some("stopped True"), "{take}");
            // A handler that returns: Python makes the call again, which is delayed again and waits again, until it is killed.
            let script = format!(
                "
signal.signal(signal.SIGALRM, lambda *_: os.write(1, b'again'))
signal.setitimer(signal.ITIMER_REAL, 0.1)
parent = os.getpid()
if os.fork() == 0:
    time.sleep(1.2)
    os.kill(parent, signal.SIGKILL)
    os._exit(0)
{take}"
            );
            let output = within(Duration::from_secs(10), &hook.at("f"), &script);
            assert_eq!(output.as_deref(), Some("again"), "{take}, killed");
        }
        hook.recover();
    });
}

/// What a process says that ends within this time; `None` when it had to be freed by dropping what it waits for.
fn within(limit: Duration, path: &Path, script: &str) -> Option<String> {
    let (sender, receiver) = mpsc::channel();
    let (path, script) = (path.to_path_buf(), script.to_owned());
    std::thread::spawn(move || sender.send(said(&other_process(&path, &script))));
    receiver.recv_timeout(limit).ok()
}
