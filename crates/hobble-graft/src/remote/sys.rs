//! Descriptors of another thread's table (`pidfd_open(2)`, `pidfd_getfd(2)`).

#![allow(unsafe_code)]

use std::os::fd::{FromRawFd as _, OwnedFd};

use rustix::io::Errno;
use rustix::process::{PidfdFlags, PidfdGetfdFlags};

use crate::ids::{Fd, Pid, Tid};

/// `PIDFD_THREAD` of include/uapi/linux/pidfd.h (Linux 6.9).
const PIDFD_THREAD: libc::c_int = libc::O_EXCL;

/// A descriptor for one thread, whose table may differ from its leader's.
fn thread_pidfd(tid: Tid) -> Result<OwnedFd, Errno> {
    // SAFETY: takes numbers only.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, tid.as_raw(), PIDFD_THREAD) };
    let raw = i32::try_from(result).unwrap_or(-1);
    if raw < 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Our own descriptor for what descriptor `fd` of a thread refers to.
pub(super) fn get_fd(pid: Pid, tid: Tid, fd: Fd) -> Result<OwnedFd, Errno> {
    let pidfd = if tid == pid.leader() {
        let pid = rustix::process::Pid::from_raw(pid.as_raw()).ok_or(Errno::SRCH)?;
        rustix::process::pidfd_open(pid, PidfdFlags::empty())?
    } else {
        thread_pidfd(tid)?
    };
    rustix::process::pidfd_getfd(pidfd, fd.as_raw(), PidfdGetfdFlags::empty())
}
