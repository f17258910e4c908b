//! Looking things up in the backing tree.
//!
//! Owns the realms: the (device, mount) pairs met so far, each with the descriptor through which its file handles are opened. Invariant: a lookup never follows a
//! symlink, `..` or the last name's automount.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Statx, StatxFlags};

use crate::legacy::fact::{Fact, Realm as RealmFact};
use crate::sys::handle::FileHandle;

/// What a lookup found: an `O_PATH` descriptor and the attributes of the very same inode.
pub(crate) struct Found {
    pub(crate) fd: OwnedFd,
    pub(crate) stat: Statx,
}

/// Attributes of what a descriptor of any kind refers to.
pub(crate) fn stat(fd: BorrowedFd<'_>) -> io::Result<Statx> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID;
    Ok(rustix::fs::statx(
        fd,
        c"",
        AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT,
        wanted,
    )?)
}

/// What a descriptor refers to.
pub(crate) fn found(fd: OwnedFd) -> io::Result<Found> {
    let stat = stat(fd.as_fd())?;
    Ok(Found { fd, stat })
}

/// Finds a path below a directory, without following symlinks.
pub(crate) fn walk(root: BorrowedFd<'_>, path: &[u8]) -> io::Result<Found> {
    let path = if path.is_empty() {
        b".".as_slice()
    } else {
        path
    };
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    found(rustix::fs::openat2(root, path, flags, Mode::empty(), how)?)
}

/// Finds one name in a directory.
pub(crate) fn resolve(parent: BorrowedFd<'_>, name: &CStr) -> io::Result<Found> {
    let fd = rustix::fs::openat(
        parent,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    found(fd)
}

/// One filesystem (or btrfs subvolume), as reached through one mount.
pub(crate) struct Realm {
    pub(crate) index: u16,
    device: (u32, u32),
    mount: u64,
    /// Any object of the mount, opened for more than its path; `None` when the filesystem has no handles that can be opened again.
    anchor: Option<OwnedFd>,
}

impl Realm {
    pub(crate) fn new(index: u16, found: &Found) -> Self {
        let anchor = anchor(found).ok();
        if anchor.is_none() {
            tracing::info!(
                device = format_args!("{}:{}", found.stat.stx_dev_major, found.stat.stx_dev_minor),
                "no file handles on this filesystem: every inode the kernel knows costs a descriptor"
            );
        }
        let device = (found.stat.stx_dev_major, found.stat.stx_dev_minor);
        Self {
            index,
            device,
            mount: found.stat.stx_mnt_id,
            anchor,
        }
    }

    /// The realm of a mirror that has died.
    pub(crate) fn restore(known: &RealmFact, anchor: Option<OwnedFd>) -> Self {
        Self {
            index: known.index,
            device: known.device,
            mount: known.mount,
            anchor,
        }
    }

    pub(crate) fn fact(&self) -> Fact {
        Fact::Realm(RealmFact {
            index: self.index,
            device: self.device,
            mount: self.mount,
            anchor: self.anchor.as_ref().map(|fd| fd.as_raw_fd()),
        })
    }

    pub(crate) fn holds(&self, stat: &Statx) -> bool {
        self.device == (stat.stx_dev_major, stat.stx_dev_minor) && self.mount == stat.stx_mnt_id
    }

    pub(crate) fn is_of(&self, stat: &Statx) -> bool {
        self.device == (stat.stx_dev_major, stat.stx_dev_minor)
    }

    pub(crate) const fn mount(&self) -> u64 {
        self.mount
    }

    pub(crate) fn sync(&self) -> io::Result<()> {
        match &self.anchor {
            Some(anchor) => Ok(rustix::fs::syncfs(anchor)?),
            None => Ok(()),
        }
    }

    pub(crate) const fn has_handles(&self) -> bool {
        self.anchor.is_some()
    }

    pub(crate) fn open(&self, handle: &FileHandle, flags: OFlags) -> io::Result<OwnedFd> {
        let anchor = self
            .anchor
            .as_ref()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EOPNOTSUPP))?;
        handle.open(anchor.as_fd(), flags.bits().cast_signed())
    }
}

/// The target's own mount of the backing filesystem.
pub(crate) struct Native {
    anchor: OwnedFd,
    device: (u32, u32),
}

impl Native {
    pub(crate) fn new(anchor: OwnedFd) -> io::Result<Self> {
        let stat = stat(anchor.as_fd())?;
        Ok(Self {
            anchor,
            device: (stat.stx_dev_major, stat.stx_dev_minor),
        })
    }

    pub(crate) fn number(&self) -> i32 {
        self.anchor.as_raw_fd()
    }

    /// What lies at `path`, provided that it is the wanted inode.
    pub(crate) fn walk(&self, path: &[u8], wanted: &Statx) -> Option<OwnedFd> {
        let found = walk(self.anchor.as_fd(), path).ok()?;
        let same = (
            found.stat.stx_ino,
            found.stat.stx_dev_major,
            found.stat.stx_dev_minor,
        ) == (wanted.stx_ino, wanted.stx_dev_major, wanted.stx_dev_minor);
        same.then_some(found.fd)
    }
}

impl Realm {
    /// Opens an inode as a program would have opened it: on the target's own mount where that is of the same filesystem.
    pub(crate) fn open_for_client(
        &self,
        native: Option<&Native>,
        handle: &FileHandle,
        flags: OFlags,
    ) -> io::Result<OwnedFd> {
        match native.filter(|native| native.device == self.device) {
            Some(native) => handle.open(native.anchor.as_fd(), flags.bits().cast_signed()),
            None => self.open(handle, flags),
        }
    }
}

/// Opens what was found as an anchor, and proves that a handle leads back to it.
fn anchor(found: &Found) -> io::Result<OwnedFd> {
    let handle = FileHandle::of(found.fd.as_fd())?;
    // Opening anything else than a directory or a regular file could have an effect or block; such a realm does without handles.
    let flags = match u32::from(found.stat.stx_mode) & libc::S_IFMT {
        libc::S_IFDIR => OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        libc::S_IFREG => OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC,
        _ => return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
    };
    let anchor = if flags.contains(OFlags::DIRECTORY) {
        rustix::fs::openat(found.fd.as_fd(), c".", flags, Mode::empty())?
    } else {
        crate::fd::reopen(found.fd.as_fd(), flags)?
    };
    let again = handle.open(anchor.as_fd(), libc::O_PATH)?;
    let again = stat(again.as_fd())?;
    if again.stx_ino != found.stat.stx_ino {
        return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
    }
    Ok(anchor)
}
