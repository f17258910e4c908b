//! Open-file-description locks (`F_OFD_SETLK`, fcntl(2)).
//!
//! The server never takes process-owned (`F_SETLK`) locks: closing any descriptor of the file would drop them.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::check;

/// A range of bytes, both ends included; `u64::MAX >> 1` (`OFFSET_MAX`) as the end means "to the end of the file, however it grows".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LockRange {
    /// First byte.
    pub start: u64,
    /// Last byte.
    pub end: u64,
}

impl LockRange {
    /// What the kernel sends as the end of a lock without end (`OFFSET_MAX`, include/linux/fs.h).
    pub const OPEN_END: u64 = i64::MAX as u64;

    /// Whether the two have a byte in common.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start <= other.end && other.start <= self.end
    }
}

/// How a range or a file is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LockKind {
    /// Shared.
    Read,
    /// Exclusive.
    Write,
}

fn raw(kind: libc::c_int, range: LockRange) -> libc::flock64 {
    // SAFETY: all-zero is a valid `flock64`; it is a struct of integers.
    let mut lock: libc::flock64 = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = range.start.cast_signed();
    lock.l_len = if range.end >= LockRange::OPEN_END {
        0
    } else {
        (range.end - range.start + 1).cast_signed()
    };
    lock
}

fn number(kind: Option<LockKind>) -> libc::c_int {
    match kind {
        None => libc::F_UNLCK,
        Some(LockKind::Read) => libc::F_RDLCK,
        Some(LockKind::Write) => libc::F_WRLCK,
    }
}

/// Locks (`Some`) or unlocks (`None`) a range for the open file description; `EAGAIN` when somebody else holds it.
pub(crate) fn set(fd: BorrowedFd<'_>, kind: Option<LockKind>, range: LockRange) -> io::Result<()> {
    let lock = raw(number(kind), range);
    // SAFETY: `lock` is an initialised `flock64` with `l_pid` 0, as OFD locks demand, and outlives the call.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    check(result.into()).map(drop)
}

/// Like [`set`], but waits. `EINTR` when the thread was nudged.
pub(crate) fn set_wait(fd: BorrowedFd<'_>, kind: LockKind, range: LockRange) -> io::Result<()> {
    let lock = raw(number(Some(kind)), range);
    // SAFETY: as in `set`.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLKW, &raw const lock) };
    check(result.into()).map(drop)
}

/// What another description holds that keeps this one from locking the range: kind, range and pid (-1 for an OFD lock).
pub(crate) fn get(
    fd: BorrowedFd<'_>,
    kind: LockKind,
    range: LockRange,
) -> io::Result<Option<(LockKind, LockRange, i32)>> {
    let mut lock = raw(number(Some(kind)), range);
    // SAFETY: `lock` is an initialised `flock64` that the kernel overwrites; it outlives the call.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    check(result.into())?;
    let kind = match libc::c_int::from(lock.l_type) {
        libc::F_RDLCK => LockKind::Read,
        libc::F_WRLCK => LockKind::Write,
        _ => return Ok(None),
    };
    let start = lock.l_start.cast_unsigned();
    let end = match lock.l_len.cast_unsigned() {
        0 => LockRange::OPEN_END,
        len => start.saturating_add(len - 1),
    };
    Ok(Some((kind, LockRange { start, end }, lock.l_pid)))
}
