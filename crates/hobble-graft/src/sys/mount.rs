//! Mount system calls that rustix does not wrap: `mount_setattr(2)`, and walking from mount namespace to mount namespace.

use std::ffi::{CStr, c_int, c_uint};
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use rustix::io::Errno;

/// `struct mount_attr`.
#[derive(Default)]
#[repr(C)]
struct Attributes {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// `struct mnt_ns_info`.
#[derive(Default)]
#[repr(C)]
struct NamespaceInfo {
    size: u32,
    nr_mounts: u32,
    mnt_ns_id: u64,
}

/// `_IOR(0xb7, 11, struct mnt_ns_info)` and its like with 12, in the encoding that x86 and arm64 share (Linux 6.12).
const NS_MNT_GET_NEXT: libc::Ioctl =
    (2 << 30) | ((size_of::<NamespaceInfo>() as libc::Ioctl) << 16) | (0xb7 << 8) | 11;
const NS_MNT_GET_PREV: libc::Ioctl =
    (2 << 30) | ((size_of::<NamespaceInfo>() as libc::Ioctl) << 16) | (0xb7 << 8) | 12;

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Changes the propagation (`MS_PRIVATE`, `MS_SLAVE`, `MS_SHARED` or `MS_UNBINDABLE`) of the mount whose root `root` is, and with
/// `is_recursive` of those below it.
pub(crate) fn set_propagation(
    root: BorrowedFd<'_>,
    propagation: u64,
    is_recursive: bool,
) -> Result<(), Errno> {
    let attributes = Attributes {
        propagation,
        ..Attributes::default()
    };
    let flags = libc::AT_EMPTY_PATH | if is_recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty string with its NUL, and `attributes` is a mount_attr of the size that is stated; both
    // outlive the call, which only reads them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            root.as_raw_fd(),
            c"".as_ptr(),
            flags as c_uint,
            &raw const attributes,
            size_of::<Attributes>(),
        )
    };
    if result < 0 {
        Err(last_error())
    } else {
        Ok(())
    }
}

/// `umount2` of a name relative to the working directory of the calling thread.
pub(crate) fn unmount(name: &CStr, flags: c_int) -> Result<(), Errno> {
    // SAFETY: `name` ends with a NUL and outlives the call.
    let result = unsafe { libc::umount2(name.as_ptr(), flags) };
    if result < 0 {
        Err(last_error())
    } else {
        Ok(())
    }
}

/// Gives the calling thread a working and root directory of its own, which it must have to change its mount namespace alone.
pub(crate) fn unshare_directories() -> Result<(), Errno> {
    // SAFETY: CLONE_FS concerns the directories of this thread only; no memory or descriptor table is touched.
    let result = unsafe { libc::unshare(libc::CLONE_FS) };
    if result < 0 {
        Err(last_error())
    } else {
        Ok(())
    }
}

/// The mount namespace after (or before) this one in the order of their age, as a descriptor of its own; `None` at the end.
pub(crate) fn neighbour(
    namespace: BorrowedFd<'_>,
    is_next: bool,
) -> Result<Option<OwnedFd>, Errno> {
    let mut info = NamespaceInfo {
        size: size_of::<NamespaceInfo>() as u32,
        ..NamespaceInfo::default()
    };
    let command = if is_next {
        NS_MNT_GET_NEXT
    } else {
        NS_MNT_GET_PREV
    };
    // SAFETY: `info` is a mnt_ns_info of the size it states, and outlives the call, which may write to it.
    let result = unsafe { libc::ioctl(namespace.as_raw_fd(), command, &raw mut info) };
    if result < 0 {
        return match last_error() {
            Errno::NOENT => Ok(None),
            errno => Err(errno),
        };
    }
    // SAFETY: the kernel has just opened this descriptor for us (fs/nsfs.c, `open_namespace`), close-on-exec.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(result) }))
}
