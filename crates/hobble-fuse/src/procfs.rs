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

    fn read<'b>(&self, tid: Tid, file: &str, buffer: &'b mut [u8]) -> Option<&'b [u8]> {
        let path = format!("{tid}/{file}");
        let file = rustix::fs::openat(
            &self.root,
            path,
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .ok()?;
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

/// Field 9 (flags) of `/proc/<tid>/stat`; the name in field 2 may contain anything, so counting starts behind its last `)`.
fn is_exiting(text: &[u8]) -> bool {
    let Some(close) = text.iter().rposition(|&byte| byte == b')') else {
        return false;
    };
    let rest = text.get(close + 1..).unwrap_or_default();
    let flags = rest
        .split(|&byte| byte == b' ')
        .filter(|field| !field.is_empty())
        .nth(6);
    flags
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
