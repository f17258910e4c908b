//! Naming and opening again what a descriptor refers to, without walking a path.
//!
//! Invariant: a worker's working directory is `/proc/self/fd` ([`crate::sys::identity`]), so a bare number names a descriptor; elsewhere the full path is used.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags};

use crate::sys::identity;

/// A path that leads to what a descriptor refers to, be it a symlink.
pub(crate) struct ProcName {
    bytes: [u8; 32],
}

impl ProcName {
    pub(crate) fn new(fd: BorrowedFd<'_>) -> Self {
        use std::io::Write;
        let mut bytes = [0; 32];
        let (room, _) = bytes.split_at_mut(31);
        let number = fd.as_raw_fd();
        let mut room = &mut *room;
        // "/proc/self/fd/2147483647" has 24 bytes: it fits.
        let _ = if identity::is_worker() {
            write!(room, "{number}")
        } else {
            write!(room, "/proc/self/fd/{number}")
        };
        Self { bytes }
    }

    pub(crate) fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.bytes).unwrap_or_default()
    }
}

/// Opens what `fd` (an `O_PATH` descriptor will do) refers to, anew and with other flags: a new open file description.
pub(crate) fn reopen(fd: BorrowedFd<'_>, flags: OFlags) -> io::Result<OwnedFd> {
    let name = ProcName::new(fd);
    let flags =
        (flags | OFlags::CLOEXEC).difference(OFlags::NOFOLLOW | OFlags::CREATE | OFlags::EXCL);
    Ok(rustix::fs::openat(
        CWD,
        name.as_c_str(),
        flags,
        Mode::empty(),
    )?)
}

/// An `O_PATH` descriptor of what `fd` refers to, on the same mount.
pub(crate) fn reopen_path(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    reopen(fd, OFlags::PATH)
}
