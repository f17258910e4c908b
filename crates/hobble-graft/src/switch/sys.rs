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

/// The limit on descriptors of another process, soft and hard; sets it first when `new` is given.
pub(super) fn descriptor_limit(pid: i32, new: Option<(u64, u64)>) -> Result<(u64, u64), Errno> {
    let wanted = new.map(|(soft, hard)| libc::rlimit {
        rlim_cur: soft,
        rlim_max: hard,
    });
    let pointer = wanted.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let mut old = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `pointer` is null or points to a structure that outlives the call, and so does `old`.
    result(unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, pointer, &raw mut old) })?;
    Ok((old.rlim_cur, old.rlim_max))
}
