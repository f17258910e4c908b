//! What handlers put into replies and take out of requests: attributes, entries, locks, times.
//!
//! Invariant: each converts to and from its wire structure without losing anything the kernel would have kept.

use std::time::Duration;

use bitflags::bitflags;
use rustix::fs::{StatVfs, Statx};

use crate::abi;
use crate::ids::{Fh, LockOwner, NodeId};

/// A point in time: seconds since the epoch (may be negative) and nanoseconds (below 10⁹).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    /// Seconds since 1970-01-01T00:00:00Z.
    pub secs: i64,
    /// Nanoseconds on top.
    pub nanos: u32,
}

impl From<rustix::fs::StatxTimestamp> for Timestamp {
    fn from(time: rustix::fs::StatxTimestamp) -> Self {
        Self {
            secs: time.tv_sec,
            nanos: time.tv_nsec,
        }
    }
}

/// The attributes of an inode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attr {
    /// Inode number as programs see it (`st_ino`), which need not be the [`NodeId`].
    pub ino: u64,
    /// Size in bytes.
    pub size: u64,
    /// Blocks of 512 bytes in use.
    pub blocks: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of the contents.
    pub mtime: Timestamp,
    /// Last change of the inode.
    pub ctime: Timestamp,
    /// File type and permission bits (`st_mode`).
    pub mode: u32,
    /// Number of names.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device node, in the kernel's 32-bit encoding ([`encode_rdev`]).
    pub rdev: u32,
    /// Preferred size of a transfer, in bytes.
    pub blksize: u32,
    /// The inode is the root of another filesystem, which the kernel then mounts on its own (needs `Features::SUBMOUNTS`).
    pub submount: bool,
}

/// The 32-bit encoding of a device number that the protocol carries (`new_encode_dev`, include/linux/kdev_t.h).
#[must_use]
pub const fn encode_rdev(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// Major and minor of a device number in the protocol's encoding (`new_decode_dev`, include/linux/kdev_t.h).
#[must_use]
pub const fn decode_rdev(rdev: u32) -> (u32, u32) {
    (
        (rdev & 0xf_ff00) >> 8,
        (rdev & 0xff) | ((rdev >> 12) & 0xf_ff00),
    )
}

impl From<&Statx> for Attr {
    fn from(stat: &Statx) -> Self {
        Self {
            ino: stat.stx_ino,
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            atime: stat.stx_atime.into(),
            mtime: stat.stx_mtime.into(),
            ctime: stat.stx_ctime.into(),
            mode: u32::from(stat.stx_mode),
            nlink: stat.stx_nlink,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            rdev: encode_rdev(stat.stx_rdev_major, stat.stx_rdev_minor),
            blksize: stat.stx_blksize,
            submount: false,
        }
    }
}

impl From<&Attr> for abi::RawAttr {
    fn from(attr: &Attr) -> Self {
        Self {
            ino: attr.ino,
            size: attr.size,
            blocks: attr.blocks,
            // The kernel takes these back as signed 64-bit numbers (fuse_change_attributes_common, fs/fuse/inode.c).
            atime: attr.atime.secs.cast_unsigned(),
            mtime: attr.mtime.secs.cast_unsigned(),
            ctime: attr.ctime.secs.cast_unsigned(),
            atimensec: attr.atime.nanos,
            mtimensec: attr.mtime.nanos,
            ctimensec: attr.ctime.nanos,
            mode: attr.mode,
            nlink: attr.nlink,
            uid: attr.uid,
            gid: attr.gid,
            rdev: attr.rdev,
            blksize: attr.blksize,
            flags: if attr.submount { abi::ATTR_SUBMOUNT } else { 0 },
        }
    }
}

/// The answer to STATX: what `statx(2)` reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatxAttr {
    /// Which fields are valid (`STATX_*`).
    pub mask: u32,
    /// `STATX_ATTR_*` that are set.
    pub attributes: u64,
    /// `STATX_ATTR_*` that are supported.
    pub attributes_mask: u64,
    /// Creation time.
    pub btime: Timestamp,
    /// Major and minor of the device that holds the inode; the kernel shows its own number to programs.
    pub dev: (u32, u32),
    /// Everything `stat` has too.
    pub attr: Attr,
}

impl From<&Statx> for StatxAttr {
    fn from(stat: &Statx) -> Self {
        Self {
            mask: stat.stx_mask,
            attributes: stat.stx_attributes.bits(),
            attributes_mask: stat.stx_attributes_mask.bits(),
            btime: stat.stx_btime.into(),
            dev: (stat.stx_dev_major, stat.stx_dev_minor),
            attr: Attr::from(stat),
        }
    }
}

impl From<&StatxAttr> for abi::RawStatx {
    fn from(stat: &StatxAttr) -> Self {
        let time = |t: Timestamp| abi::RawSxTime {
            tv_sec: t.secs,
            tv_nsec: t.nanos,
            reserved: 0,
        };
        let (rdev_major, rdev_minor) = decode_rdev(stat.attr.rdev);
        Self {
            mask: stat.mask,
            blksize: stat.attr.blksize,
            attributes: stat.attributes,
            nlink: stat.attr.nlink,
            uid: stat.attr.uid,
            gid: stat.attr.gid,
            mode: (stat.attr.mode & 0xffff) as u16,
            spare0: 0,
            ino: stat.attr.ino,
            size: stat.attr.size,
            blocks: stat.attr.blocks,
            attributes_mask: stat.attributes_mask,
            atime: time(stat.attr.atime),
            btime: time(stat.btime),
            ctime: time(stat.attr.ctime),
            mtime: time(stat.attr.mtime),
            rdev_major,
            rdev_minor,
            dev_major: stat.dev.0,
            dev_minor: stat.dev.1,
            spare2: [0; 14],
        }
    }
}

/// The answer to LOOKUP and to everything that makes a new name: an inode, which thereby gains one reference from the
/// kernel, to be given back by FORGET.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The inode.
    pub node: NodeId,
    /// Distinguishes two lives of one `node`: the pair is unique for ever.
    pub generation: u64,
    /// Its attributes.
    pub attr: Attr,
    /// How long the kernel may use the name without asking.
    pub entry_valid: Duration,
    /// How long the kernel may use the attributes without asking.
    pub attr_valid: Duration,
}

impl From<&Entry> for abi::EntryOut {
    fn from(entry: &Entry) -> Self {
        Self {
            nodeid: entry.node.0,
            generation: entry.generation,
            entry_valid: entry.entry_valid.as_secs(),
            attr_valid: entry.attr_valid.as_secs(),
            entry_valid_nsec: entry.entry_valid.subsec_nanos(),
            attr_valid_nsec: entry.attr_valid.subsec_nanos(),
            attr: (&entry.attr).into(),
        }
    }
}

bitflags! {
    /// How the kernel shall treat an open file or directory (`FOPEN_*`). Passthrough is not here: it follows from
    /// [`Opened::backing`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct OpenMode: u32 {
        /// Reads and writes come to the server; the page cache is bypassed.
        const DIRECT_IO = 1 << 0;
        /// What is cached from an earlier open stays.
        const KEEP_CACHE = 1 << 1;
        /// The file has no position to seek to.
        const NONSEEKABLE = 1 << 2;
        /// The directory's listing may be cached.
        const CACHE_DIR = 1 << 3;
        /// The file has no position at all.
        const STREAM = 1 << 4;
        /// No FLUSH at close.
        const NOFLUSH = 1 << 5;
        /// Direct writes that do not extend the file take the inode's lock shared (Linux 6.2).
        const PARALLEL_DIRECT_WRITES = 1 << 6;
    }
}

/// The answer to OPEN, OPENDIR, and to the second half of CREATE and TMPFILE.
#[derive(Clone, Copy, Debug)]
pub struct Opened<'a> {
    /// The server's name for the open file.
    pub fh: Fh,
    /// How the kernel shall treat it.
    pub mode: OpenMode,
    /// The backing file that the kernel shall use by itself (`FOPEN_PASSTHROUGH`, Linux 6.9). All opens of one inode must name
    /// the same one, else the kernel fails the open with EIO. It must stay registered until the reply has been sent; the
    /// kernel then holds a reference of its own.
    pub backing: Option<&'a crate::kernel::Backing>,
}

/// A byte-range lock, or the whole file for flock. `end` is inclusive; [`FileLock::TO_END`] means "to the end of the file".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileLock {
    /// First byte.
    pub start: u64,
    /// Last byte.
    pub end: u64,
    /// What is asked for or held.
    pub kind: LockKind,
    /// The process that asks or holds (`l_pid`).
    pub pid: u32,
}

impl FileLock {
    /// `end` of a lock that reaches to the end of the file, however long it becomes (`OFFSET_MAX`).
    pub const TO_END: u64 = i64::MAX as u64;
}

/// Kind of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LockKind {
    /// Shared (`F_RDLCK`).
    Read,
    /// Exclusive (`F_WRLCK`).
    Write,
    /// None (`F_UNLCK`).
    Unlock,
}

impl LockKind {
    /// `F_RDLCK`, `F_WRLCK` or `F_UNLCK`.
    #[must_use]
    pub const fn raw(self) -> u32 {
        match self {
            Self::Read => libc::F_RDLCK as u32,
            Self::Write => libc::F_WRLCK as u32,
            Self::Unlock => libc::F_UNLCK as u32,
        }
    }

    /// The kind with this number.
    #[must_use]
    pub const fn from_raw(raw: u32) -> Option<Self> {
        const READ: u32 = libc::F_RDLCK as u32;
        const WRITE: u32 = libc::F_WRLCK as u32;
        const UNLOCK: u32 = libc::F_UNLCK as u32;
        match raw {
            READ => Some(Self::Read),
            WRITE => Some(Self::Write),
            UNLOCK => Some(Self::Unlock),
            _ => None,
        }
    }
}

impl From<&FileLock> for abi::RawFileLock {
    fn from(lock: &FileLock) -> Self {
        Self {
            start: lock.start,
            end: lock.end,
            kind: lock.kind.raw(),
            pid: lock.pid,
        }
    }
}

/// The answer to STATFS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatFs {
    /// Blocks of `fragment_size` in all.
    pub blocks: u64,
    /// Free blocks.
    pub blocks_free: u64,
    /// Free blocks for callers without privilege.
    pub blocks_available: u64,
    /// Inodes in all.
    pub files: u64,
    /// Free inodes.
    pub files_free: u64,
    /// Preferred size of a transfer.
    pub block_size: u32,
    /// Longest name.
    pub name_max: u32,
    /// Size of a block.
    pub fragment_size: u32,
}

impl From<&StatVfs> for StatFs {
    fn from(stat: &StatVfs) -> Self {
        let narrow = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        Self {
            blocks: stat.f_blocks,
            blocks_free: stat.f_bfree,
            blocks_available: stat.f_bavail,
            files: stat.f_files,
            files_free: stat.f_ffree,
            block_size: narrow(stat.f_bsize),
            name_max: narrow(stat.f_namemax),
            fragment_size: narrow(stat.f_frsize),
        }
    }
}

impl From<&StatFs> for abi::StatfsOut {
    fn from(stat: &StatFs) -> Self {
        Self {
            blocks: stat.blocks,
            bfree: stat.blocks_free,
            bavail: stat.blocks_available,
            files: stat.files,
            ffree: stat.files_free,
            bsize: stat.block_size,
            namelen: stat.name_max,
            frsize: stat.fragment_size,
            padding: 0,
            spare: [0; 6],
        }
    }
}

/// A time to be set by SETATTR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// The server's present time (`UTIME_NOW`).
    Now,
    /// This time.
    At(Timestamp),
}

/// What SETATTR shall change. Fields that are `None` stay as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// The open file through which the change was asked for (`ftruncate`, and `open` with O_TRUNC).
    pub fh: Option<Fh>,
    /// New type and permission bits.
    pub mode: Option<u32>,
    /// New owner.
    pub uid: Option<u32>,
    /// New group.
    pub gid: Option<u32>,
    /// New size in bytes.
    pub size: Option<u64>,
    /// New access time.
    pub atime: Option<SetTime>,
    /// New modification time.
    pub mtime: Option<SetTime>,
    /// New change time; only sent with the write-back cache.
    pub ctime: Option<Timestamp>,
    /// The lock owner on whose behalf the size changes (mandatory locks of old).
    pub lock_owner: Option<LockOwner>,
    /// The server must clear set-user-id, set-group-id and capabilities as the kernel would for this caller
    /// (`FATTR_KILL_SUIDGID`, with `Features::HANDLE_KILLPRIV_V2`).
    pub kill_suidgid: bool,
}

/// Where LSEEK counts from. Only `Data` and `Hole` reach a server, and `End` where attributes are not cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Whence {
    /// From the start.
    Set,
    /// From the present position.
    Current,
    /// From the end.
    End,
    /// The next data at or after the offset.
    Data,
    /// The next hole at or after the offset.
    Hole,
}

impl Whence {
    pub(crate) const fn from_raw(raw: u32) -> Option<Self> {
        match raw {
            0 => Some(Self::Set),
            1 => Some(Self::Current),
            2 => Some(Self::End),
            3 => Some(Self::Data),
            4 => Some(Self::Hole),
            _ => None,
        }
    }

    /// `SEEK_SET` and so on.
    #[must_use]
    pub const fn raw(self) -> u32 {
        match self {
            Self::Set => 0,
            Self::Current => 1,
            Self::End => 2,
            Self::Data => 3,
            Self::Hole => 4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn device_numbers_survive_the_encoding(major in 0u32..1 << 12, minor in 0u32..1 << 20) {
            prop_assert_eq!(decode_rdev(encode_rdev(major, minor)), (major, minor));
            // What glibc's makedev and the kernel's new_encode_dev agree on for numbers of this size.
            let dev = libc::makedev(major, minor);
            prop_assert_eq!(u64::from(encode_rdev(major, minor)), dev);
        }
    }

    #[test]
    fn times_before_the_epoch_stay_negative() {
        let attr = Attr {
            mtime: Timestamp { secs: -1, nanos: 5 },
            ..Attr::default()
        };
        let raw = abi::RawAttr::from(&attr);
        assert_eq!((raw.mtime, raw.mtimensec), (u64::MAX, 5));
    }
}
