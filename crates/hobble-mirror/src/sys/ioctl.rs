//! Forwarding of the few ioctls whose argument has a fixed size and holds no pointers.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::check;

/// An ioctl of a filesystem that may be handed on as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FsIoctl {
    /// `FS_IOC_GETFLAGS`: inode flags (chattr).
    GetFlags,
    /// `FS_IOC_SETFLAGS`.
    SetFlags,
    /// `FS_IOC_GETVERSION`: inode generation.
    GetVersion,
    /// `FS_IOC_FSGETXATTR`: extended flags, project id.
    GetXattr,
    /// `FS_IOC_FSSETXATTR`.
    SetXattr,
}

/// Size of `struct fsxattr` (include/uapi/linux/fs.h), the largest argument.
pub(crate) const LARGEST: usize = 28;

// The numbers are declared with the size of a `long` or `int`, whatever the kernel really copies (include/uapi/linux/fs.h).
const GET_FLAGS: u32 = 0x8008_6601;
const SET_FLAGS: u32 = 0x4008_6602;
const GET_VERSION: u32 = 0x8008_7601;
const GET_FLAGS_32: u32 = 0x8004_6601;
const SET_FLAGS_32: u32 = 0x4004_6602;
const GET_VERSION_32: u32 = 0x8004_7601;
const GET_XATTR: u32 = 0x801c_581f;
const SET_XATTR: u32 = 0x401c_5820;

impl FsIoctl {
    /// The ioctl with this number, if it is one of ours.
    pub(crate) const fn from_command(command: u32) -> Option<Self> {
        match command {
            GET_FLAGS | GET_FLAGS_32 => Some(Self::GetFlags),
            SET_FLAGS | SET_FLAGS_32 => Some(Self::SetFlags),
            GET_VERSION | GET_VERSION_32 => Some(Self::GetVersion),
            GET_XATTR => Some(Self::GetXattr),
            SET_XATTR => Some(Self::SetXattr),
            _ => None,
        }
    }

    const fn command(self) -> u32 {
        match self {
            Self::GetFlags => GET_FLAGS,
            Self::SetFlags => SET_FLAGS,
            Self::GetVersion => GET_VERSION,
            Self::GetXattr => GET_XATTR,
            Self::SetXattr => SET_XATTR,
        }
    }

    /// Bytes that are really read from or written to the argument: an `int` for flags and version, whatever the number says (ext4, xfs, btrfs).
    pub(crate) const fn len(self) -> usize {
        match self {
            Self::GetFlags | Self::SetFlags | Self::GetVersion => 4,
            Self::GetXattr | Self::SetXattr => LARGEST,
        }
    }

    /// Whether it changes the file.
    pub(crate) const fn changes(self) -> bool {
        matches!(self, Self::SetFlags | Self::SetXattr)
    }
}

/// Performs the ioctl on `fd`; `argument` is read or overwritten.
pub(crate) fn run(fd: BorrowedFd<'_>, ioctl: FsIoctl, argument: &mut [u8; 32]) -> io::Result<()> {
    // SAFETY: every ioctl of `FsIoctl` reads or writes at most `LARGEST` (28) bytes or a long (8) at its argument, which has 32, and keeps no pointer.
    let result = unsafe {
        libc::ioctl(
            fd.as_raw_fd(),
            libc::Ioctl::from(ioctl.command()),
            argument.as_mut_ptr(),
        )
    };
    check(result.into()).map(drop)
}

/// The private ioctl by which an open file of the hook names itself; `command` says that it writes exactly 32 bytes.
pub(crate) fn identify(fd: BorrowedFd<'_>, command: u32) -> io::Result<[u8; 32]> {
    let mut answer = [0; 32];
    // SAFETY: the size in `command` is that of `answer` (checked where the number is defined), which outlives the call. A file that is none of ours refuses the number.
    let result = unsafe {
        libc::ioctl(
            fd.as_raw_fd(),
            libc::Ioctl::from(command),
            answer.as_mut_ptr(),
        )
    };
    check(result.into()).map(|_| answer)
}
