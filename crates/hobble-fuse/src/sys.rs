//! The two system calls of this crate that no library wraps: registering and removing a backing file.
//!
//! Invariant: every pointer handed to the kernel is to memory that lives and is large enough for the whole call.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

use crate::abi::BackingMap;

/// `_IOW(229, nr, size)`, as include/uapi/asm-generic/ioctl.h lays it out (x86_64 and aarch64 alike).
const fn write_request(nr: libc::c_ulong, size: usize) -> libc::c_ulong {
    (1 << 30) | ((size as libc::c_ulong) << 16) | (229 << 8) | nr
}

const BACKING_OPEN: libc::c_ulong = write_request(1, size_of::<BackingMap>());
const BACKING_CLOSE: libc::c_ulong = write_request(2, size_of::<u32>());

/// `FUSE_DEV_IOC_BACKING_OPEN` (Linux 6.9, fs/fuse/backing.c). Needs CAP_SYS_ADMIN in the initial user namespace.
pub(crate) fn backing_open(device: BorrowedFd<'_>, file: BorrowedFd<'_>) -> Result<u32, Errno> {
    let map = BackingMap {
        fd: file.as_raw_fd(),
        flags: 0,
        padding: 0,
    };
    // SAFETY: the request reads one `fuse_backing_map` through the pointer, which `map` is for the whole call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BACKING_OPEN as _, &raw const map) };
    u32::try_from(result).map_err(|_| last_error())
}

/// `FUSE_DEV_IOC_BACKING_CLOSE`.
pub(crate) fn backing_close(device: BorrowedFd<'_>, id: u32) -> Result<(), Errno> {
    // SAFETY: the request reads one u32 through the pointer, which `id` is for the whole call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BACKING_CLOSE as _, &raw const id) };
    if result < 0 {
        Err(last_error())
    } else {
        Ok(())
    }
}

fn last_error() -> Errno {
    let number = std::io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO);
    Errno::from_raw_os_error(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_numbers_are_those_of_the_kernel_header() {
        assert_eq!(BACKING_OPEN, 0x4010_e501);
        assert_eq!(BACKING_CLOSE, 0x4004_e502);
    }
}
