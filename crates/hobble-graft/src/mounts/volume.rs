//! Where a volume is: its directory or file, the mount around it, and what is mounted below it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;

use super::namespace::{MountNamespace, root_of};
use super::{MountsError, step};
use crate::census::FileKind;
use crate::ids::{Device, MountId, Pid};
use crate::proc::mountinfo::{self, Mount};
use crate::sys::mount as sys;

/// `STATX_MNT_ID_UNIQUE` (Linux 6.8).
const STATX_MNT_ID_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// Walks before a host that renames and mounts without a pause is given up on.
const WALKS: usize = 10_000;

/// The kernel's name for a mount that is never given to another one until the next boot (Linux 6.8). A kernel before it gives the
/// number of [`MountId`], which is given again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UniqueMountId(pub u64);

/// A place in the tree of a process.
#[derive(Debug)]
pub struct Location {
    /// The directory or file, open with `O_PATH`. It stays this one however the tree above it changes, and whatever is mounted on it
    /// later.
    pub file: OwnedFd,
    /// As the process sees it: absolute, without symbolic links on the way.
    pub path: PathBuf,
    /// The mount it is in.
    pub mount: MountId,
    /// The same, for good.
    pub unique: UniqueMountId,
    /// `st_dev`.
    pub device: Device,
    /// `st_ino`.
    pub inode: u64,
    /// What it is.
    pub kind: FileKind,
    /// Whether it is the root of that mount.
    pub is_mount_root: bool,
    /// For a file: the directory it was found in.
    directory: Option<OwnedFd>,
}

/// What `statx` says of a mount, without asking the filesystem.
pub(super) struct Seen {
    pub(super) mount: MountId,
    pub(super) unique: UniqueMountId,
    pub(super) device: Device,
    pub(super) inode: u64,
    pub(super) kind: FileKind,
    pub(super) is_mount_root: bool,
}

/// Looks at an open file by what the kernel has cached: a dead server is not waited for.
pub(super) fn look(file: BorrowedFd<'_>) -> Result<Seen, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let wanted = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::MNT_ID;
    let stat = rustix::fs::statx(file, c"", flags, wanted)?;
    // Asked for together, the kernel gives the unique one only (fs/stat.c, `vfs_statx_path`).
    let unique = rustix::fs::statx(file, c"", flags, wanted | STATX_MNT_ID_UNIQUE)?;
    let attributes = crate::census::kind_of(u32::from(stat.stx_mode));
    Ok(Seen {
        mount: MountId(stat.stx_mnt_id),
        unique: UniqueMountId(unique.stx_mnt_id),
        device: Device {
            major: stat.stx_dev_major,
            minor: stat.stx_dev_minor,
        },
        inode: stat.stx_ino,
        kind: attributes,
        is_mount_root: stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT),
    })
}

impl Location {
    /// Finds `path` as process `pid` sees it: within its root directory, following symbolic links, but never the magic links of
    /// `/proc`. Changes nothing.
    ///
    /// # Errors
    /// [`MountsError::Resolve`] with the kernel's reason.
    pub fn resolve(pid: Pid, path: &Path) -> Result<Self, MountsError> {
        let root = root_of(pid)?;
        let failed = |errno| MountsError::Resolve {
            pid,
            path: path.to_owned(),
            errno,
        };
        let file = open_in(root.as_fd(), path, OFlags::empty()).map_err(failed)?;
        let seen = look(file.as_fd()).map_err(failed)?;
        let path = canonical(root.as_fd(), &file).map_err(failed)?;
        let Seen {
            mount,
            unique,
            device,
            inode,
            kind,
            is_mount_root,
        } = seen;
        let directory = match path.parent() {
            Some(parent) if kind != FileKind::Directory => {
                Some(open_in(root.as_fd(), parent, OFlags::DIRECTORY).map_err(failed)?)
            }
            _ => None,
        };
        Ok(Self {
            file,
            path,
            mount,
            unique,
            device,
            inode,
            kind,
            is_mount_root,
            directory,
        })
    }

    /// The root of the mount around it: found by going up, not by a path, so that it is this mount whatever lies over its mount
    /// point.
    ///
    /// # Errors
    /// [`MountsError::Unreachable`] when something is mounted over a directory on the way up.
    pub(super) fn mount_root(&self) -> Result<OwnedFd, MountsError> {
        let failed = |errno| MountsError::Unreachable {
            path: self.path.clone(),
            errno,
        };
        let start = if self.is_mount_root {
            &self.file
        } else {
            self.directory.as_ref().unwrap_or(&self.file)
        };
        let mut at = start.try_clone().map_err(MountsError::Thread)?;
        loop {
            let seen = look(at.as_fd()).map_err(failed)?;
            if seen.mount != self.mount {
                return Err(failed(Errno::XDEV));
            }
            if seen.is_mount_root {
                return Ok(at);
            }
            let how = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
            at =
                open_scoped(at.as_fd(), Path::new(".."), OFlags::DIRECTORY, how).map_err(failed)?;
        }
    }

    /// The directory it lies in: what is covered instead of a single file, so that the file can still be replaced by a rename.
    ///
    /// # Errors
    /// As [`Location::resolve`].
    pub fn parent(&self, pid: Pid) -> Result<Self, MountsError> {
        let parent = self.path.parent().unwrap_or(&self.path);
        Self::resolve(pid, parent)
    }
}

/// Opens `path` within `root`, with `O_PATH`.
pub(super) fn open_in(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    open_scoped(
        root,
        path,
        flags,
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )
}

/// `openat2` with `O_PATH`. A scoped walk over `..` gives up when anything was renamed or mounted on the host meanwhile, and asks to be
/// repeated (openat2(2), EAGAIN).
pub(super) fn open_scoped(
    root: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
    how: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    let mut last = Errno::AGAIN;
    for _ in 0..WALKS {
        match rustix::fs::openat2(
            root,
            path,
            OFlags::PATH | OFlags::CLOEXEC | flags,
            Mode::empty(),
            how,
        ) {
            Err(Errno::AGAIN) => std::thread::yield_now(),
            Err(errno) => {
                last = errno;
                break;
            }
            Ok(file) => return Ok(file),
        }
    }
    Err(last)
}

/// The name of an open file below `root`.
fn canonical(root: BorrowedFd<'_>, file: &OwnedFd) -> Result<PathBuf, Errno> {
    use std::os::fd::AsRawFd as _;
    use std::os::unix::ffi::OsStringExt as _;
    // Both links are written from our own root, or from the root of a namespace we are not in, so the common start is cut off.
    let name = |fd: i32| {
        let link = rustix::fs::readlink(format!("/proc/thread-self/fd/{fd}"), Vec::new())?;
        Ok::<_, Errno>(PathBuf::from(std::ffi::OsString::from_vec(
            link.into_bytes(),
        )))
    };
    let (root, file) = (name(root.as_raw_fd())?, name(file.as_raw_fd())?);
    let below = file.strip_prefix(&root).unwrap_or(&file);
    Ok(Path::new("/").join(below))
}

/// The mounts below `location` that `pid` can see, parents before children. Their mount points are as `pid` sees them.
///
/// # Errors
/// [`crate::proc::ProcError::Gone`] when there is no such process.
pub fn submounts(pid: Pid, location: &Location) -> Result<Vec<Mount>, MountsError> {
    let mut inside = vec![location.mount];
    let mut found = Vec::new();
    for mount in mountinfo::of_process(pid)? {
        let is_below =
            mount.mount_point != location.path && mount.mount_point.starts_with(&location.path);
        if mount.parent != mount.id && is_below && inside.contains(&mount.parent) {
            inside.push(mount.id);
            found.push(mount);
        }
    }
    Ok(found)
}

/// The flags of the mount around an open file, in the words of `fsmount` (`MOUNT_ATTR_*`): what a mount that takes its place must
/// have too.
///
/// # Errors
/// When `statvfs` fails, which asks the filesystem.
pub fn attributes_of(file: impl AsFd) -> Result<u64, MountsError> {
    // statvfs(3) flag, MOUNT_ATTR_* of include/uapi/linux/mount.h.
    const FLAGS: [(u64, u64); 7] = [
        (libc::ST_RDONLY, 0x1),
        (libc::ST_NOSUID, 0x2),
        (libc::ST_NODEV, 0x4),
        (libc::ST_NOEXEC, 0x8),
        (libc::ST_NOATIME, 0x10),
        (libc::ST_NODIRATIME, 0x80),
        // ST_NOSYMFOLLOW, Linux 5.10.
        (0x2000, 0x20_0000),
    ];
    let flags = rustix::fs::fstatvfs(file)
        .map_err(step("look at a mount"))?
        .f_flag
        .bits();
    Ok(FLAGS
        .iter()
        .filter(|(st, _)| flags & st != 0)
        .fold(0, |all, (_, attribute)| all | attribute))
}

/// A detached copy of the mount around `location`, with `location` as its root: the way to the real tree when something is mounted
/// over it. It is private: nothing that is mounted elsewhere shows up in it, our own hook least of all. Runs in `namespace`, where
/// the mount must be.
///
/// With `is_recursive` the mounts below it are copied too. Where mounts below it are locked, as in a namespace that was made
/// without privileges, the kernel copies all or nothing, and all are copied.
///
/// If we die nothing remains: the copy goes with its descriptor.
///
/// # Errors
/// The kernel's reason, and [`MountsError::Timeout`].
pub fn clone_tree(
    namespace: &MountNamespace,
    location: &Location,
    is_recursive: bool,
    timeout: Duration,
) -> Result<OwnedFd, MountsError> {
    let file = location.file.try_clone().map_err(MountsError::Thread)?;
    namespace.enter(timeout, move |_| {
        let copy = copy(file.as_fd(), is_recursive)?;
        sys::set_propagation(copy.as_fd(), libc::MS_PRIVATE, true)
            .map_err(step("make a copy of a mount private"))?;
        Ok(copy)
    })?
}

/// A detached copy that is still a member of its groups. To be called in the namespace of the mount.
pub(super) fn copy(file: BorrowedFd<'_>, is_recursive: bool) -> Result<OwnedFd, MountsError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let all = flags | OpenTreeFlags::AT_RECURSIVE;
    match rustix::mount::open_tree(file, "", if is_recursive { all } else { flags }) {
        Err(Errno::INVAL) if !is_recursive => rustix::mount::open_tree(file, "", all),
        other => other,
    }
    .map_err(step("copy a mount"))
}
