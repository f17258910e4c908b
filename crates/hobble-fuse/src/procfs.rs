//! What `/proc` says of the caller of a request: killed, exiting, gone.
//!
//! Invariant: answers are about a thread id at one moment; nothing is cached. The descriptor of `/proc` is opened once, so
//! that nothing depends on the mount namespace of whichever thread asks.

use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::ids::Tid;

/// The state of a calling thread that decides whether its request may go on waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It lives, whatever signals it may have pending.
    Living,
    /// SIGKILL is pending for it.
    Killed,
    /// It is in `do_exit` already (PF_EXITING) and can get no signal any more.
    Exiting,
    /// No such thread.
    Gone,
}

/// An open `/proc`.
#[derive(Debug)]
pub(crate) struct Proc {
    root: OwnedFd,
}

const PF_EXITING: u64 = 0x4;
const SIGKILL_BIT: u64 = 1 << (libc::SIGKILL - 1);

impl Proc {
    /// Opens it and makes sure that it shows this process under the number it goes by: with the `/proc` of another pid
    /// namespace every caller would seem to be gone, or be taken for somebody else (ESRCH then).
    pub(crate) fn open() -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open("/proc", flags, Mode::empty())?;
        let me = rustix::fs::readlinkat(&root, "self", Vec::new())?;
        if me.to_bytes()
            != rustix::process::getpid()
                .as_raw_nonzero()
                .to_string()
                .as_bytes()
        {
            return Err(Errno::SRCH);
        }
        Ok(Self { root })
    }

    /// The state of a thread, from `/proc/<tid>/stat` alone. A kill of a process, and any other signal that ends it without a
    /// core dump, is pending as SIGKILL in each of its threads from the start (complete_signal, kernel/signal.c). A caller that
    /// is not visible in this pid namespace (tid 0), or whose state cannot be read for want of descriptors, counts as living.
    pub(crate) fn fate(&self, tid: Tid) -> Fate {
        if tid.0 == 0 {
            return Fate::Living;
        }
        let mut buffer = [0; 4096];
        match self.read(&format!("{tid}/stat"), &mut buffer) {
            Ok(text) => Stat::parse(text).map_or(Fate::Living, |stat| stat.fate()),
            Err(Errno::NOENT | Errno::SRCH) => Fate::Gone,
            Err(_) => Fate::Living,
        }
    }

    /// The same, and SIGKILL is also looked for among the signals pending for the process as a whole.
    pub(crate) fn fate_for_sure(&self, tid: Tid) -> Fate {
        match self.fate(tid) {
            Fate::Living if tid.0 != 0 => {}
            fate => return fate,
        }
        let mut buffer = [0; 4096];
        match self.read(&format!("{tid}/status"), &mut buffer) {
            Ok(text) if pending(text) & SIGKILL_BIT != 0 => Fate::Killed,
            Err(Errno::NOENT | Errno::SRCH) => Fate::Gone,
            _ => Fate::Living,
        }
    }

    /// Calls `found` for every thread of the system that was killed and waits, uninterruptibly, for a lock.
    pub(crate) fn killed_and_stuck(&self, mut found: impl FnMut(Tid)) {
        let mut buffer = [0; 4096];
        let mut stat = |path: String| Stat::parse(self.read(&path, &mut buffer).ok()?);
        let mut stack = [0; 4096];
        for process in self.numbers(".") {
            // A killed process whose first thread can die has a zombie as such, as long as others cannot.
            let suspect = stat(format!("{process}/stat"))
                .is_some_and(|stat| stat.state == b'D' || (stat.state == b'Z' && stat.threads > 1));
            if !suspect {
                continue;
            }
            for tid in self.numbers(&format!("{process}/task")) {
                let directory = format!("{process}/task/{tid}");
                if stat(format!("{directory}/stat"))
                    .is_some_and(|stat| stat.state == b'D' && stat.fate() == Fate::Killed)
                    && self
                        .read(&format!("{directory}/stack"), &mut stack)
                        .map_or(true, waits_for_lock)
                {
                    found(Tid(tid));
                }
            }
        }
    }

    /// The entries of a directory that are numbers.
    fn numbers(&self, path: &str) -> Vec<u32> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Ok(directory) = rustix::fs::openat(&self.root, path, flags, Mode::empty()) else {
            return Vec::new();
        };
        let Ok(entries) = rustix::fs::Dir::new(directory) else {
            return Vec::new();
        };
        entries
            .filter_map(|entry| entry.ok()?.file_name().to_str().ok()?.parse().ok())
            .collect()
    }

    fn read<'b>(&self, path: &str, buffer: &'b mut [u8]) -> Result<&'b [u8], Errno> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.root, path, flags, Mode::empty())?;
        let mut filled = 0;
        loop {
            let room = buffer.get_mut(filled..).unwrap_or_default();
            match rustix::io::read(&file, room) {
                Ok(0) => break,
                Ok(len) => filled += len,
                Err(Errno::INTR) => {}
                // ESRCH when the thread goes between open and read.
                Err(errno) => return Err(errno),
            }
        }
        Ok(buffer.get(..filled).unwrap_or_default())
    }
}

/// What is needed of `/proc/<tid>/stat`; proc_pid_stat(5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stat {
    state: u8,
    flags: u64,
    threads: u32,
    /// Signals pending for the thread itself, of the first 31.
    pending: u64,
}

impl Stat {
    /// Fields 3, 9, 20 and 31. Field 2, the name, may contain anything, so counting starts behind its last parenthesis.
    fn parse(text: &[u8]) -> Option<Self> {
        let close = text.iter().rposition(|&byte| byte == b')')?;
        let rest = std::str::from_utf8(text.get(close + 1..)?).ok()?;
        let mut fields = rest.split_ascii_whitespace();
        Some(Self {
            state: *fields.next()?.as_bytes().first()?,
            flags: fields.nth(5)?.parse().ok()?,
            threads: fields.nth(10)?.parse().ok()?,
            pending: fields.nth(10)?.parse().ok()?,
        })
    }

    const fn fate(self) -> Fate {
        if matches!(self.state, b'Z' | b'X') {
            Fate::Gone
        } else if self.flags & PF_EXITING != 0 {
            Fate::Exiting
        } else if self.pending & SIGKILL_BIT != 0 {
            Fate::Killed
        } else {
            Fate::Living
        }
    }
}

/// SigPnd and ShdPnd of `/proc/<tid>/status`; proc_pid_status(5).
fn pending(text: &[u8]) -> u64 {
    text.split(|&byte| byte == b'\n')
        .filter_map(|line| {
            line.strip_prefix(b"SigPnd:\t")
                .or_else(|| line.strip_prefix(b"ShdPnd:\t"))
        })
        .filter_map(|mask| u64::from_str_radix(std::str::from_utf8(mask).ok()?, 16).ok())
        .fold(0, |all, mask| all | mask)
}

/// Whether a kernel stack (`/proc/<tid>/stack`, empty or unreadable where the kernel does not show it) is that of a thread which
/// waits for an inode's lock, a mutex, or somebody else's lookup of the same name. The locking functions themselves are
/// not shown (`stack_trace_save_tsk` leaves out what is marked `__sched`), so what is first is who called them: the functions of
/// fs/namei.c, fs/open.c, fs/xattr.c, fs/readdir.c, fs/dcache.c and fs/fuse that wait without heeding signals.
fn waits_for_lock(stack: &[u8]) -> bool {
    const CALLERS: [&str; 33] = [
        "__lookup_",
        "__mutex_",
        "__start_",
        "__vfs_",
        "chmod_",
        "chown_",
        "d_alloc_",
        "do_linkat",
        "do_mkdirat",
        "do_mknodat",
        "do_open",
        "do_renameat2",
        "do_rmdir",
        "do_symlinkat",
        "do_truncate",
        "do_unlinkat",
        "down_",
        "filename_",
        "fuse_",
        "generic_",
        "iterate_",
        "link_path_walk",
        "lock_",
        "lookup_",
        "mutex_",
        "notify_change",
        "open_",
        "path_",
        "removexattr",
        "rwsem_",
        "start_",
        "vfs_",
        "walk_component",
    ];
    let Some(first) = stack
        .split(|&byte| byte == b'\n')
        .find(|line| !line.is_empty())
    else {
        return true;
    };
    let name = first.strip_prefix(b"[<0>] ").unwrap_or(first);
    !name.starts_with(b"fuse_dev_")
        && CALLERS
            .iter()
            .any(|caller| name.starts_with(caller.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pending_kills_are_seen_in_either_mask() {
        let status = |own: &str, shared: &str| {
            format!(
                "Name:\tx\nState:\tD (disk sleep)\nSigPnd:\t{own}\nShdPnd:\t{shared}\nSigBlk:\t0000000000000100\n"
            )
        };
        let none = "0000000000000000";
        let kill = "0000000000000100";
        let alarm = "0000000000002000";
        let killed = |own, shared| pending(status(own, shared).as_bytes()) & SIGKILL_BIT != 0;
        assert!(!killed(none, none) && !killed(alarm, alarm));
        assert!(killed(kill, none) && killed(none, kill));
    }

    fn stat(state: char, flags: u64, pending: u64) -> Stat {
        let text = format!(
            "12 (a) Z 9 ) x) {state} 1 2 3 4 5 {flags} 7 8 9 10 11 12 13 14 20 0 17 0 99 1 2 3 4 5 6 7 8 {pending} 0 0 0 0\n"
        );
        Stat::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let expected = Stat {
            state: b'D',
            flags: 4_194_304,
            threads: 17,
            pending: 256,
        };
        assert_eq!(stat('D', 4_194_304, 256), expected);
        assert_eq!(Stat::parse(b""), None);
        assert_eq!(Stat::parse(b"12 (cat) D 1 2 3"), None);
    }

    #[test]
    fn the_fate_of_a_thread_follows_from_state_flags_and_signals() {
        assert_eq!(stat('D', 4_194_304, 0).fate(), Fate::Living);
        assert_eq!(stat('D', 4_194_304, 1 << 13).fate(), Fate::Living);
        assert_eq!(stat('D', 4_194_304, 1 << 8).fate(), Fate::Killed);
        assert_eq!(stat('D', 4_194_308, 1 << 8).fate(), Fate::Exiting);
        assert_eq!(stat('Z', 4_194_308, 0).fate(), Fate::Gone);
    }

    #[test]
    fn waits_for_locks_are_told_from_other_waits() {
        assert!(waits_for_lock(
            b"[<0>] fuse_file_write_iter+0x31f/0x500\n[<0>] vfs_write+0x22f/0x450\n"
        ));
        assert!(waits_for_lock(
            b"[<0>] open_last_lookups+0x1/0x2\n[<0>] path_openat+0x88/0x290\n"
        ));
        assert!(waits_for_lock(b""), "not shown");
        assert!(!waits_for_lock(
            b"[<0>] request_wait_answer+0x13b/0x210\n[<0>] __fuse_simple_request+0xd8\n"
        ));
        assert!(!waits_for_lock(
            b"[<0>] folio_wait_bit_common+0x1/0x2\n[<0>] vfs_read+0x3/0x4\n"
        ));
    }

    #[test]
    fn this_thread_lives_and_others_do_not() {
        let proc = Proc::open().unwrap();
        let me = Tid(rustix::thread::gettid()
            .as_raw_nonzero()
            .get()
            .cast_unsigned());
        for look in [Proc::fate, Proc::fate_for_sure] {
            assert_eq!(look(&proc, me), Fate::Living);
            assert_eq!(look(&proc, Tid(0)), Fate::Living);
            assert_eq!(look(&proc, Tid(i32::MAX as u32)), Fate::Gone);
        }
    }
}
