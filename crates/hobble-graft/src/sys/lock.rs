//! Open-file-description locks (`F_OFD_SETLK`, fcntl(2)), which rustix does not wrap. Never `F_SETLK`: closing any descriptor of the file would drop those.

use std::os::fd::{AsRawFd as _, BorrowedFd};

use rustix::io::Errno;

use crate::proc::locks::FileLock;

/// Takes a read lock on the range of `range`, without waiting.
pub(crate) fn share(fd: BorrowedFd<'_>, range: &FileLock) -> Result<(), Errno> {
    let length = range
        .end
        .map_or(0, |end| end.saturating_sub(range.start).saturating_add(1));
    let lock = libc::flock64 {
        l_type: libc::F_RDLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: range.start.cast_signed(),
        l_len: length.cast_signed(),
        // An OFD lock has no process.
        l_pid: 0,
    };
    // SAFETY: the kernel reads the structure, which outlives the call.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result < 0 {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    } else {
        Ok(())
    }
}
