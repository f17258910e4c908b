//! `F_SETOWN_EX` and `F_SETSIG`, which no crate wraps.

#![allow(unsafe_code)]

use std::os::fd::RawFd;

use rustix::io::Errno;

/// `F_OWNER_*` of include/uapi/asm-generic/fcntl.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OwnerKind {
    Thread = 0,
    Process = 1,
    Group = 2,
}

const F_SETSIG: libc::c_int = 10;
const F_SETOWN_EX: libc::c_int = 15;

#[repr(C)]
struct OwnerEx {
    kind: libc::c_int,
    pid: libc::pid_t,
}

fn result(result: libc::c_int) -> Result<(), Errno> {
    if result == -1 {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    } else {
        Ok(())
    }
}

/// Who is told of I/O on `fd`. Ids are those of our pid namespace.
pub(super) fn set_owner(fd: RawFd, kind: OwnerKind, id: i32) -> Result<(), Errno> {
    let owner = OwnerEx {
        kind: kind as libc::c_int,
        pid: id,
    };
    // SAFETY: the kernel reads the structure, which outlives the call.
    result(unsafe { libc::fcntl(fd, F_SETOWN_EX, &raw const owner) })
}

/// What is sent instead of SIGIO.
pub(super) fn set_signal(fd: RawFd, signal: i32) -> Result<(), Errno> {
    // SAFETY: takes numbers only.
    result(unsafe { libc::fcntl(fd, F_SETSIG, signal) })
}
