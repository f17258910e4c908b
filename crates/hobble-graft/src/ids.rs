//! Names of things in other processes: process and thread ids, descriptor numbers, identities that survive pid re-use.
//!
//! Owns the newtypes that cross this crate's function borders, so that a thread id is never taken for a process id nor a
//! descriptor of another process for one of ours. Invariant: a [`Pid`] or [`Tid`] is positive and a [`Fd`] is not negative.

use std::fmt;

use crate::proc::{self, ProcError, stat};

/// A process id (thread group id) in the pid namespace of the `/proc` that we read.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pid(i32);

impl Pid {
    /// The id as a typed value; `None` unless it is positive (0 and negative numbers mean groups to the kernel).
    pub fn new(raw: i32) -> Option<Self> {
        (raw > 0).then_some(Self(raw))
    }

    /// Our own process.
    pub fn own() -> Self {
        Self(rustix::process::getpid().as_raw_nonzero().get())
    }

    /// The number that system calls take.
    pub fn as_raw(self) -> i32 {
        self.0
    }

    /// The thread group leader, whose thread id is the process id.
    pub fn leader(self) -> Tid {
        Tid(self.0)
    }
}

/// A thread id in the pid namespace of the `/proc` that we read.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tid(i32);

impl Tid {
    /// The id as a typed value; `None` unless it is positive.
    pub fn new(raw: i32) -> Option<Self> {
        (raw > 0).then_some(Self(raw))
    }

    /// The number that system calls take.
    pub fn as_raw(self) -> i32 {
        self.0
    }
}

/// A descriptor number in the table of another process. It is not a descriptor of ours and closing it means nothing here.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fd(i32);

impl Fd {
    /// The number as a typed value; `None` when it is negative.
    pub fn new(raw: i32) -> Option<Self> {
        (raw >= 0).then_some(Self(raw))
    }

    /// The number that system calls of its process take.
    pub fn as_raw(self) -> i32 {
        self.0
    }
}

macro_rules! as_number {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    )*};
}
as_number!(Pid, Tid, Fd);

/// The kernel's number of a mount, as in `/proc/<pid>/mountinfo`, `fdinfo` and `STATX_MNT_ID`. Handed out again once the mount
/// is gone; [`crate::mounts`] uses the number that is never handed out again where identity matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MountId(pub u64);

impl fmt::Display for MountId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A device number: of a filesystem (`st_dev`), or of a device file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Device {
    /// The driver's half.
    pub major: u32,
    /// The driver's own number.
    pub minor: u32,
}

impl Device {
    /// The number that `st_dev` holds.
    #[must_use]
    pub fn raw(self) -> u64 {
        rustix::fs::makedev(self.major, self.minor)
    }

    /// The device that `st_dev` names.
    #[must_use]
    pub fn from_raw(dev: u64) -> Self {
        Self {
            major: rustix::fs::major(dev),
            minor: rustix::fs::minor(dev),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// A process that stays the same process: its pid and the time it started.
///
/// Within one boot the pair is unique (the kernel hands a pid out again only after the process is gone, and the start time
/// has a resolution of one tick, 10 ms, which a pid cannot wrap in). Across boots a [`BootId`] must be compared too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessId {
    /// The process id.
    pub pid: Pid,
    /// Start of the process, in clock ticks (1/100 s) since boot: field 22 of `/proc/<pid>/stat`.
    pub start_time: u64,
}

impl ProcessId {
    /// The identity of the process that has `pid` now.
    ///
    /// # Errors
    /// [`ProcError::Gone`] when no process has that pid, else the failing read.
    pub fn of(pid: Pid) -> Result<Self, ProcError> {
        let stat = stat::of_process(pid)?;
        Ok(Self {
            pid,
            start_time: stat.start_time,
        })
    }

    /// Our own process.
    ///
    /// # Errors
    /// When `/proc` is not mounted or not ours to read.
    pub fn own() -> Result<Self, ProcError> {
        Self::of(Pid::own())
    }

    /// Whether this very process still runs. A zombie does not: it has neither memory nor descriptors any more. A process whose
    /// first thread has ended while others go on looks like a zombie in `stat`, but has more than one thread, and is alive.
    ///
    /// # Errors
    /// When `/proc` cannot be read for another reason than the process being gone.
    pub fn is_alive(self) -> Result<bool, ProcError> {
        match stat::of_process(self.pid) {
            Ok(stat) => Ok(stat.start_time == self.start_time && !stat.has_ended()),
            Err(ProcError::Gone { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether this very process is past saving, though it may still be seen: its first thread has ended or is exiting, or SIGKILL is pending for it. A
    /// killed process stays in this state, for ever if need be, while one of its threads sleeps in a request to a filesystem that nobody serves any more (the
    /// wait for an answer that has been read by the server is not killable, fs/fuse/dev.c `request_wait_answer`); its parent hears nothing of its death until then.
    ///
    /// Not for programs that end their first thread and go on.
    ///
    /// # Errors
    /// When `/proc` cannot be read for another reason than the process being gone.
    pub fn is_ending(self) -> Result<bool, ProcError> {
        let looked = stat::of_process(self.pid)
            .and_then(|stat| Ok((stat, super::proc::status::of_process(self.pid)?)));
        match looked {
            Ok((stat, status)) => Ok(stat.start_time != self.start_time
                || stat.state.is_dead()
                || stat.is_exiting()
                || status.pending.contains(SIGKILL)
                || status.shared_pending.contains(SIGKILL)),
            Err(ProcError::Gone { .. }) => Ok(true),
            Err(error) => Err(error),
        }
    }
}

const SIGKILL: u32 = libc::SIGKILL.cast_unsigned();

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.pid.fmt(f)
    }
}

/// The kernel's name for this boot, `/proc/sys/kernel/random/boot_id`: what makes a [`ProcessId`] unique in a file that
/// outlives the machine's running time.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BootId(String);

impl BootId {
    /// The running boot.
    ///
    /// # Errors
    /// When the file cannot be read or is not 36 characters of lower-case hexadecimal digits and hyphens.
    pub fn current() -> Result<Self, ProcError> {
        let path = "/proc/sys/kernel/random/boot_id";
        let bytes = proc::read(path.as_ref())?;
        let text = bytes.trim_ascii();
        Self::parse(text)
            .ok_or_else(|| ProcError::parse(path.as_ref(), proc::ParseError::new(0, "a boot id")))
    }

    /// A boot id from a file that may hold anything; `None` unless it has the kernel's form.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let hyphens = [8, 13, 18, 23];
        let good = text.len() == 36
            && text.iter().enumerate().all(|(i, b)| {
                if hyphens.contains(&i) {
                    *b == b'-'
                } else {
                    matches!(b, b'0'..=b'9' | b'a'..=b'f')
                }
            });
        good.then(|| Self(String::from_utf8_lossy(text).into_owned()))
    }

    /// The 36 characters.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_refuse_numbers_that_mean_groups() {
        assert_eq!(Pid::new(0), None);
        assert_eq!(Pid::new(-1), None);
        assert_eq!(Tid::new(0), None);
        assert_eq!(Fd::new(-1), None);
        assert_eq!(Fd::new(0).map(Fd::as_raw), Some(0));
    }

    #[test]
    fn own_process_is_alive_and_a_reused_pid_is_not() {
        let own = ProcessId::own().unwrap();
        assert!(own.is_alive().unwrap());
        let other = ProcessId {
            start_time: own.start_time + 1,
            ..own
        };
        assert!(!other.is_alive().unwrap());
    }

    #[test]
    fn a_zombie_is_not_alive() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let id = ProcessId::of(Pid::new(child.id() as i32).unwrap()).unwrap();
        assert!(id.is_alive().unwrap());
        child.kill().unwrap();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while id.is_alive().unwrap() {
            assert!(
                std::time::Instant::now() < end,
                "a killed child stays alive"
            );
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(id.is_ending().unwrap());
        child.wait().unwrap();
        assert!(!id.is_alive().unwrap());
        assert!(id.is_ending().unwrap());
        assert!(!ProcessId::own().unwrap().is_ending().unwrap());
    }

    #[test]
    fn boot_id_has_the_kernels_form() {
        let now = BootId::current().unwrap();
        assert_eq!(now.as_str().len(), 36);
        assert_eq!(BootId::parse(now.as_str().as_bytes()), Some(now));
        assert_eq!(BootId::parse(b"6a0c3d5e-0000-0000-0000-00000000000G"), None);
        assert_eq!(BootId::parse(b""), None);
    }
}
