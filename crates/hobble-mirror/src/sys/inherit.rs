//! Descriptors that somebody who died has left in a table shared with us.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Takes a descriptor over by its number.
///
/// To be called once for each number, and only for what a dead process left in the descriptor table that we share with it (`CLONE_FILES`): nobody closes it but whoever
/// gets it here.
pub(crate) fn claim(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD takes any number and touches no memory.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: open, as just seen; its owner was a process that has died, which makes it ours by the contract of this function.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
