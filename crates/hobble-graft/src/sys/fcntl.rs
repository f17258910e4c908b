//! The `fcntl` commands about signal-driven I/O (fcntl(2)), which no crate wraps.

use std::os::fd::{AsRawFd as _, BorrowedFd};

use rustix::io::Errno;

const F_GETSIG: i32 = 11;
const F_GETOWN_EX: i32 = 16;

/// `struct f_owner_ex`.
#[derive(Default)]
#[repr(C)]
struct OwnerEx {
    kind: i32,
    pid: i32,
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// `F_GETOWN_EX`: kind (0 thread, 1 process, 2 group) and id; id 0 is nobody.
pub(crate) fn owner(fd: BorrowedFd<'_>) -> Result<(i32, i32), Errno> {
    let mut owner = OwnerEx::default();
    // SAFETY: F_GETOWN_EX writes one f_owner_ex, which `owner` is, and it outlives the call.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, &raw mut owner) };
    if result < 0 {
        Err(last_error())
    } else {
        Ok((owner.kind, owner.pid))
    }
}

/// `F_GETSIG`: the signal that is sent instead of SIGIO; 0 for SIGIO without information.
pub(crate) fn signal(fd: BorrowedFd<'_>) -> Result<i32, Errno> {
    // SAFETY: F_GETSIG takes no argument and touches no memory of ours.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), F_GETSIG) };
    if result < 0 {
        Err(last_error())
    } else {
        Ok(result)
    }
}
