//! The limit on open files of another process.
//!
//! prlimit(2) asks for CAP_SYS_RESOURCE even to read the limits of a process of another user (kernel/sys.c, `check_prlimit_permission`), and root in a container
//! often lacks it. So limits are read from `/proc/<pid>/limits`, and set by a thread that is that user for as long as the call takes, where the capability is missing.

use std::path::PathBuf;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit};

use crate::ids::Pid;
use crate::proc::{self, ProcError, status};

/// Soft and hard limit on descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DescriptorLimit {
    /// What is in force.
    pub soft: u64,
    /// How far the process may raise it.
    pub hard: u64,
}

/// The limit of a process.
///
/// # Errors
/// [`ProcError::Gone`], or the failing read; a file that is not understood reads as one with `EINVAL`.
pub fn descriptors(pid: Pid) -> Result<DescriptorLimit, ProcError> {
    let path = PathBuf::from(format!("/proc/{pid}/limits"));
    let text = proc::read(&path)?;
    parse(&text).ok_or(ProcError::Read {
        path,
        errno: Errno::INVAL,
    })
}

/// `Max open files            1024                 524288               files` (fs/proc/base.c, `proc_pid_limits`).
fn parse(text: &[u8]) -> Option<DescriptorLimit> {
    let line = text
        .split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(b"Max open files"))?;
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let mut number = || match words.next()? {
        "unlimited" => Some(u64::MAX),
        digits => digits.parse().ok(),
    };
    Some(DescriptorLimit {
        soft: number()?,
        hard: number()?,
    })
}

/// Sets the soft limit; the hard one stays.
///
/// # Errors
/// `ESRCH` when the process is gone; `EPERM` when it has several users and we lack CAP_SYS_RESOURCE.
pub fn set_soft(pid: Pid, limit: DescriptorLimit) -> Result<(), Errno> {
    match set(pid, limit) {
        Err(Errno::PERM) => as_its_user(pid, limit),
        other => other,
    }
}

fn set(pid: Pid, limit: DescriptorLimit) -> Result<(), Errno> {
    let pid = rustix::process::Pid::from_raw(pid.as_raw()).ok_or(Errno::SRCH)?;
    let value = |number| Some(number).filter(|number| *number != u64::MAX);
    let new = Rlimit {
        current: value(limit.soft),
        maximum: value(limit.hard),
    };
    rustix::process::prlimit(Some(pid), Resource::Nofile, new).map(drop)
}

/// From a thread that has the user and group of the process, which is all that the kernel asks for otherwise. The thread ends with it: its capabilities are gone.
fn as_its_user(pid: Pid, new: DescriptorLimit) -> Result<(), Errno> {
    let status = status::of_process(pid).map_err(|_| Errno::SRCH)?;
    let (uid, gid) = (status.uid, status.gid);
    let is_one = |ids: status::IdSet| ids.real == ids.effective && ids.real == ids.saved;
    if !is_one(uid) || !is_one(gid) {
        return Err(Errno::PERM);
    }
    let act = move || {
        // Raw system calls: they change this thread alone. The group first, while it still may.
        let gid = rustix::process::Gid::from_raw(gid.real);
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        let uid = rustix::process::Uid::from_raw(uid.real);
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        set(pid, new)
    };
    std::thread::Builder::new()
        .name("limit".to_owned())
        .spawn(act)
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))?
        .join()
        .unwrap_or(Err(Errno::IO))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_writes_is_read() {
        let text = b"Limit                     Soft Limit           Hard Limit           Units     \n\
                     Max file locks            unlimited            unlimited            locks     \n\
                     Max open files            1024                 unlimited            files     \n";
        let limit = DescriptorLimit {
            soft: 1024,
            hard: u64::MAX,
        };
        assert_eq!(parse(text), Some(limit));
        assert_eq!(parse(b"Max open files            10"), None);
        assert_eq!(parse(b""), None);
    }

    #[test]
    fn the_limit_of_another_users_process_is_read_and_set() {
        let mut child = std::process::Command::new("setpriv")
            .args([
                "--reuid",
                "65534",
                "--regid",
                "65534",
                "--clear-groups",
                "sleep",
                "30",
            ])
            .spawn()
            .unwrap();
        let pid = Pid::new(child.id().cast_signed()).unwrap();
        let is_theirs = || status::of_process(pid).is_ok_and(|status| status.uid.real == 65534);
        let end = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while !is_theirs() && std::time::Instant::now() < end {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let before = descriptors(pid).unwrap();
        let lower = DescriptorLimit {
            soft: before.soft - 7,
            ..before
        };
        let direct = as_its_user(pid, lower);
        let seen = descriptors(pid).unwrap();
        let back = set_soft(pid, before);
        let after = descriptors(pid).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((direct, seen), (Ok(()), lower));
        assert_eq!((back, after), (Ok(()), before));
        assert!(descriptors(pid).unwrap_err().is_gone());
    }
}
