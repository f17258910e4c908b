//! The facts of a file, from a link in `/proc` and a `statx` through it.
//!
//! Nothing here asks a filesystem anew: attributes are taken as cached (`AT_STATX_DONT_SYNC`), so that a census of files on a FUSE
//! mount never waits for its server. The one path that is walked is that of a file whose name seems to end in ` (deleted)`.

use std::ffi::{CStr, OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;

use super::{FileFacts, FileKind};
use crate::ids::{Device, MountId, Pid};

const DELETED: &[u8] = b" (deleted)";

/// What says that two looks saw the same file through the same mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    pub(super) mount: MountId,
    pub(super) device: Device,
    pub(super) inode: u64,
}

impl FileFacts {
    pub(super) fn identity(&self) -> Identity {
        Identity {
            mount: self.mount,
            device: self.device,
            inode: self.inode,
        }
    }
}

/// The attributes of one file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attributes {
    pub(super) identity: Identity,
    pub(super) links: u32,
    pub(super) kind: FileKind,
    pub(super) stamp: Stamp,
}

/// What changes when a file gains, loses or changes a name: its link count, or the time of its last change of status, which every
/// local filesystem sets in `rename` too. From kernel 6.13 on a change after a look always gives another time; before it, one
/// within the same tick (at most 10 ms) as a change before the look does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    links: u32,
    seconds: i64,
    nanoseconds: u32,
}

/// The kind in `st_mode`.
pub(crate) fn kind_of(mode: u32) -> FileKind {
    match mode & libc::S_IFMT {
        libc::S_IFREG => FileKind::Regular,
        libc::S_IFDIR => FileKind::Directory,
        libc::S_IFLNK => FileKind::Symlink,
        libc::S_IFIFO => FileKind::Fifo,
        libc::S_IFSOCK => FileKind::Socket,
        libc::S_IFCHR => FileKind::CharDevice,
        libc::S_IFBLK => FileKind::BlockDevice,
        _ => FileKind::Other,
    }
}

impl From<Statx> for Attributes {
    fn from(stat: Statx) -> Self {
        let kind = kind_of(u32::from(stat.stx_mode));
        let identity = Identity {
            mount: MountId(stat.stx_mnt_id),
            device: Device {
                major: stat.stx_dev_major,
                minor: stat.stx_dev_minor,
            },
            inode: stat.stx_ino,
        };
        let changed = stat.stx_ctime;
        let stamp = Stamp {
            links: stat.stx_nlink,
            seconds: changed.tv_sec,
            nanoseconds: changed.tv_nsec,
        };
        Self {
            identity,
            links: stat.stx_nlink,
            kind,
            stamp,
        }
    }
}

const WANTED: StatxFlags = StatxFlags::TYPE
    .union(StatxFlags::NLINK)
    .union(StatxFlags::INO)
    .union(StatxFlags::MNT_ID)
    .union(StatxFlags::CTIME);

/// The attributes of what a link in `/proc` leads to.
pub(super) fn through_link(directory: BorrowedFd<'_>, name: &CStr) -> Result<Attributes, Errno> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(directory, name, flags, WANTED).map(Attributes::from)
}

/// The attributes of an open file.
pub(super) fn of_descriptor(fd: impl AsFd) -> Result<Attributes, Errno> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::EMPTY_PATH;
    rustix::fs::statx(fd.as_fd(), c"", flags, WANTED).map(Attributes::from)
}

/// Reads a link in `/proc`.
pub(super) fn link(
    directory: BorrowedFd<'_>,
    name: &CStr,
    buffer: Vec<u8>,
) -> Result<Vec<u8>, Errno> {
    rustix::fs::readlinkat(directory, name, buffer).map(std::ffi::CString::into_bytes)
}

/// Puts together what the link says and what the file says. `pid` is whose link it is.
pub(super) fn assemble(
    pid: Pid,
    link: &[u8],
    attributes: Attributes,
    is_path_only: bool,
) -> FileFacts {
    let (path, is_deleted) = match link.strip_suffix(DELETED) {
        Some(name) if attributes.links == 0 || !is_there(pid, link, attributes.identity) => {
            (name, true)
        }
        _ => (link, false),
    };
    let path = PathBuf::from(OsString::from_vec(path.to_vec()));
    let is_nameless = is_deleted
        && attributes.links == 0
        && path.file_name() == Some(OsStr::new(&format!("#{}", attributes.identity.inode)));
    FileFacts {
        mount: attributes.identity.mount,
        device: attributes.identity.device,
        inode: attributes.identity.inode,
        links: attributes.links,
        kind: attributes.kind,
        is_path_only,
        path,
        is_deleted,
        is_nameless,
    }
}

/// Whether `path` names this very file in the tree of `pid`: whether its last ten letters are its own and not the kernel's.
fn is_there(pid: Pid, path: &[u8], identity: Identity) -> bool {
    let found = open_root(pid).and_then(|root| {
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat2(
            root,
            Path::new(OsStr::from_bytes(path)),
            flags,
            Mode::empty(),
            how,
        )?;
        of_descriptor(file)
    });
    // Through another mount of the same filesystem the mount differs, and the name is still its name.
    found.is_ok_and(|a| (a.identity.device, a.identity.inode) == (identity.device, identity.inode))
}

fn open_root(pid: Pid) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(
        CWD,
        format!("/proc/{pid}/root"),
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )
}
