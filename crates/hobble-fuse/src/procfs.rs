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

    /// Whether SIGKILL is pending for a thread. A kill of the process is pending in each of its threads (complete_signal,
    /// kernel/signal.c). A caller that is not visible in this pid namespace (tid 0) counts as living.
    pub(crate) fn killed(&self, tid: Tid) -> Fate {
        if tid.0 == 0 {
            return Fate::Living;
        }
        let mut buffer = [0; 4096];
        match self.read(tid, "status", &mut buffer) {
            Some(text) => fate_of_status(text),
            None => Fate::Gone,
        }
    }

    /// Whether a thread is on its way through `exit`, or gone. Does not look for signals.
    pub(crate) fn exiting(&self, tid: Tid) -> Fate {
        if tid.0 == 0 {
            return Fate::Living;
        }
        let mut buffer = [0; 4096];
        match self.read(tid, "stat", &mut buffer) {
            Some(text) if is_exiting(text) => Fate::Exiting,
            Some(_) => Fate::Living,
            None => Fate::Gone,
        }
    }

    /// Calls `found` for every thread of the system that SIGKILL is pending for and that waits, uninterruptibly, for a lock.
    pub(crate) fn killed_and_stuck(&self, mut found: impl FnMut(Tid)) {
        let mut buffer = [0; 4096];
        for process in self.numbers(".") {
            // A killed process whose first thread can die has a zombie as such, as long as others cannot.
            let suspect = self
                .read_at(&format!("{process}/stat"), &mut buffer)
                .is_some_and(|text| {
                    matches!(state_and_threads(text), Some((b'D', _)) | Some((b'Z', 2..)))
                });
            if !suspect {
                continue;
            }
            for tid in self.numbers(&format!("{process}/task")) {
                let directory = format!("{process}/task/{tid}");
                let status = self.read_at(&format!("{directory}/status"), &mut buffer);
                if status
                    .is_some_and(|text| fate_of_status(text) == Fate::Killed && is_blocked(text))
                    && self
                        .read_at(&format!("{directory}/stack"), &mut buffer)
                        .is_none_or(waits_for_lock)
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

    fn read<'b>(&self, tid: Tid, file: &str, buffer: &'b mut [u8]) -> Option<&'b [u8]> {
        self.read_at(&format!("{tid}/{file}"), buffer)
    }

    fn read_at<'b>(&self, path: &str, buffer: &'b mut [u8]) -> Option<&'b [u8]> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.root, path, flags, Mode::empty()).ok()?;
        let mut filled = 0;
        // ESRCH when the thread goes between open and read.
        loop {
            let room = buffer.get_mut(filled..).unwrap_or_default();
            match rustix::io::read(&file, room) {
                Ok(0) => break,
                Ok(len) => filled += len,
                Err(Errno::INTR) => {}
                Err(_) => return None,
            }
        }
        buffer.get(..filled)
    }
}

/// State (field 3) and number of threads (field 20) of `/proc/<pid>/stat`.
fn state_and_threads(text: &[u8]) -> Option<(u8, u32)> {
    let mut fields = behind_name(text)?;
    let state = *fields.next()?.first()?;
    let threads = std::str::from_utf8(fields.nth(16)?).ok()?.parse().ok()?;
    Some((state, threads))
}

/// Whether a thread sleeps uninterruptibly, from `/proc/<tid>/status`.
fn is_blocked(status: &[u8]) -> bool {
    status
        .split(|&byte| byte == b'\n')
        .any(|line| line.starts_with(b"State:\tD"))
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

/// The fields of `/proc/<pid>/stat` behind the name, which is field 2 and may contain anything: counting starts behind its
/// last parenthesis.
fn behind_name(text: &[u8]) -> Option<impl Iterator<Item = &[u8]>> {
    let close = text.iter().rposition(|&byte| byte == b')')?;
    Some(
        text.get(close + 1..)?
            .split(|&byte| byte == b' ')
            .filter(|field| !field.is_empty()),
    )
}

/// State, SigPnd and ShdPnd of `/proc/<tid>/status`; proc_pid_status(5).
fn fate_of_status(text: &[u8]) -> Fate {
    let mut pending = 0;
    for line in text.split(|&byte| byte == b'\n') {
        if let Some(state) = line.strip_prefix(b"State:\t") {
            if matches!(state.first(), Some(b'Z' | b'X')) {
                return Fate::Gone;
            }
        } else if let Some(mask) = line
            .strip_prefix(b"SigPnd:\t")
            .or_else(|| line.strip_prefix(b"ShdPnd:\t"))
        {
            pending |= std::str::from_utf8(mask)
                .ok()
                .and_then(|hex| u64::from_str_radix(hex, 16).ok())
                .unwrap_or(0);
        }
    }
    if pending & SIGKILL_BIT != 0 {
        Fate::Killed
    } else {
        Fate::Living
    }
}

/// Field 9 (flags) of `/proc/<tid>/stat`.
fn is_exiting(text: &[u8]) -> bool {
    behind_name(text)
        .and_then(|mut fields| fields.nth(6))
        .and_then(|field| std::str::from_utf8(field).ok())
        .and_then(|field| field.parse::<u64>().ok())
        .is_some_and(|flags| flags & PF_EXITING != 0)
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
        assert_eq!(fate_of_status(status(none, none).as_bytes()), Fate::Living);
        assert_eq!(
            fate_of_status(status(alarm, alarm).as_bytes()),
            Fate::Living
        );
        assert_eq!(fate_of_status(status(kill, none).as_bytes()), Fate::Killed);
        assert_eq!(fate_of_status(status(none, kill).as_bytes()), Fate::Killed);
        assert_eq!(fate_of_status(b"State:\tZ (zombie)\n"), Fate::Gone);
    }

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_flags() {
        assert!(is_exiting(b"12 (a) R 4 ) x) D 1 2 3 4 5 4228 0 0 0"));
        assert!(!is_exiting(b"12 (cat) D 1 2 3 4 5 4194304 4 4 4"));
        assert!(!is_exiting(b""));
        let stat = b"12 (a) Z 9 ) x) D 1 2 3 4 5 4228 0 0 0 0 1 1 0 0 20 0 17 0 99";
        assert_eq!(state_and_threads(stat), Some((b'D', 17)));
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
        assert!(is_blocked(b"Name:\tx\nState:\tD (disk sleep)\n"));
        assert!(!is_blocked(b"Name:\tState:\tD\nState:\tS (sleeping)\n"));
    }

    #[test]
    fn this_thread_lives_and_others_do_not() {
        let proc = Proc::open().unwrap();
        let me = Tid(rustix::thread::gettid()
            .as_raw_nonzero()
            .get()
            .cast_unsigned());
        for look in [Proc::exiting, Proc::killed] {
            assert_eq!(look(&proc, me), Fate::Living);
            assert_eq!(look(&proc, Tid(0)), Fate::Living);
            assert_eq!(look(&proc, Tid(i32::MAX as u32)), Fate::Gone);
        }
    }
}
