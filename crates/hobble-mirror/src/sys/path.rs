//! `open_tree(2)`, and `close(2)` with its result.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use super::check;

/// A detached copy of the mount that `root` is in, rooted at `root` and without the mounts below it, so that a walk through it finds what they cover.
///
/// `EINVAL` where the kernel refuses (locked mounts below, fs/namespace.c `__do_loopback`; detached trees before Linux 6.15).
pub(crate) fn clone_mount(root: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let empty: &CStr = c"";
    let flags =
        libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as libc::c_uint;
    // SAFETY: the empty name outlives the call; no other memory is passed.
    let result =
        unsafe { libc::syscall(libc::SYS_open_tree, root.as_raw_fd(), empty.as_ptr(), flags) };
    let fd = check(result)?;
    // SAFETY: the kernel just returned this descriptor to us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Closes a descriptor and says what its filesystem had to report. The descriptor is gone in any case (close(2)).
pub(crate) fn close(fd: OwnedFd) -> io::Result<()> {
    let fd = fd.into_raw_fd();
    // SAFETY: `into_raw_fd` gave up ownership, so this is the only close of the descriptor.
    let result = unsafe { libc::close(fd) };
    check(result.into()).map(drop)
}
