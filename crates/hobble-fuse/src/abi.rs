//! The bytes of the FUSE protocol: structures, opcodes and flag words of `include/uapi/linux/fuse.h`, ABI 7.45 (Linux 6.18).
//!
//! Nothing here has meaning of its own: [`crate::decode`] and [`crate::reply`] turn these into types a handler may see.
//! Invariant: every structure has exactly the size and field order of its C namesake, which the tests at the end check.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The only major version there is.
pub(crate) const KERNEL_VERSION: u32 = 7;
/// The newest minor version whose messages this crate knows.
pub(crate) const KERNEL_MINOR_VERSION: u32 = 45;

/// The smallest buffer the kernel lets a server read into (`FUSE_MIN_READ_BUFFER`).
pub(crate) const MIN_READ_BUFFER: usize = 8192;

/// Set in `unique` of a request that the kernel queues a second time (`FUSE_UNIQUE_RESEND`).
pub(crate) const UNIQUE_RESEND: u64 = 1 << 63;
/// `uid` or `gid` of a request whose caller has no mapping or whose operation needs none (`FUSE_INVALID_UIDGID`).
pub(crate) const INVALID_UIDGID: u32 = u32::MAX;

macro_rules! wire {
    ($($(#[$meta:meta])* struct $name:ident { $($(#[$fmeta:meta])* $field:ident: $ty:ty,)* })*) => {
        $(
            $(#[$meta])*
            #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
            #[repr(C)]
            pub(crate) struct $name { $($(#[$fmeta])* pub(crate) $field: $ty,)* }
        )*
    };
}

wire! {
    struct InHeader {
        len: u32,
        opcode: u32,
        unique: u64,
        nodeid: u64,
        uid: u32,
        gid: u32,
        pid: u32,
        /// Length of the extensions at the end of the request, in units of eight bytes (ABI 7.38).
        total_extlen: u16,
        padding: u16,
    }
    struct OutHeader { len: u32, error: i32, unique: u64, }
    struct RawAttr {
        ino: u64,
        size: u64,
        blocks: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        nlink: u32,
        uid: u32,
        gid: u32,
        rdev: u32,
        blksize: u32,
        flags: u32,
    }
    struct RawSxTime { tv_sec: i64, tv_nsec: u32, reserved: i32, }
    struct RawStatx {
        mask: u32,
        blksize: u32,
        attributes: u64,
        nlink: u32,
        uid: u32,
        gid: u32,
        mode: u16,
        spare0: u16,
        ino: u64,
        size: u64,
        blocks: u64,
        attributes_mask: u64,
        atime: RawSxTime,
        btime: RawSxTime,
        ctime: RawSxTime,
        mtime: RawSxTime,
        rdev_major: u32,
        rdev_minor: u32,
        dev_major: u32,
        dev_minor: u32,
        spare2: [u64; 14],
    }
    struct RawFileLock { start: u64, end: u64, kind: u32, pid: u32, }
    struct EntryOut {
        nodeid: u64,
        generation: u64,
        entry_valid: u64,
        attr_valid: u64,
        entry_valid_nsec: u32,
        attr_valid_nsec: u32,
        attr: RawAttr,
    }
    struct AttrOut { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: RawAttr, }
    struct StatxOut { attr_valid: u64, attr_valid_nsec: u32, flags: u32, spare: [u64; 2], stat: RawStatx, }
    struct OpenOut { fh: u64, open_flags: u32, backing_id: i32, }
    struct WriteOut { size: u32, padding: u32, }
    struct CopyFileRangeOut { bytes_copied: u64, }
    struct StatfsOut {
        blocks: u64,
        bfree: u64,
        bavail: u64,
        files: u64,
        ffree: u64,
        bsize: u32,
        namelen: u32,
        frsize: u32,
        padding: u32,
        spare: [u32; 6],
    }
    struct GetxattrOut { size: u32, padding: u32, }
    struct LkOut { lk: RawFileLock, }
    struct BmapOut { block: u64, }
    struct IoctlOut { result: i32, flags: u32, in_iovs: u32, out_iovs: u32, }
    struct PollOut { revents: u32, padding: u32, }
    struct LseekOut { offset: u64, }
    struct Dirent { ino: u64, off: u64, namelen: u32, kind: u32, }

    struct InitIn { major: u32, minor: u32, max_readahead: u32, flags: u32, }
    struct InitInExt { flags2: u32, unused: [u32; 11], }
    struct InitOut {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
        max_background: u16,
        congestion_threshold: u16,
        max_write: u32,
        time_gran: u32,
        max_pages: u16,
        map_alignment: u16,
        flags2: u32,
        max_stack_depth: u32,
        request_timeout: u16,
        unused: [u16; 11],
    }

    struct ForgetIn { nlookup: u64, }
    struct ForgetOne { nodeid: u64, nlookup: u64, }
    struct BatchForgetIn { count: u32, dummy: u32, }
    struct GetattrIn { getattr_flags: u32, dummy: u32, fh: u64, }
    struct StatxIn { getattr_flags: u32, reserved: u32, fh: u64, sx_flags: u32, sx_mask: u32, }
    struct MknodIn { mode: u32, rdev: u32, umask: u32, padding: u32, }
    struct MkdirIn { mode: u32, umask: u32, }
    struct RenameIn { newdir: u64, }
    struct Rename2In { newdir: u64, flags: u32, padding: u32, }
    struct LinkIn { oldnodeid: u64, }
    struct SetattrIn {
        valid: u32,
        padding: u32,
        fh: u64,
        size: u64,
        lock_owner: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        unused4: u32,
        uid: u32,
        gid: u32,
        unused5: u32,
    }
    struct OpenIn { flags: u32, open_flags: u32, }
    struct CreateIn { flags: u32, mode: u32, umask: u32, open_flags: u32, }
    struct ReleaseIn { fh: u64, flags: u32, release_flags: u32, lock_owner: u64, }
    struct FlushIn { fh: u64, unused: u32, padding: u32, lock_owner: u64, }
    struct ReadIn { fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32, }
    struct WriteIn { fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32, }
    struct FsyncIn { fh: u64, fsync_flags: u32, padding: u32, }
    struct SetxattrIn { size: u32, flags: u32, }
    struct SetxattrInExt { setxattr_flags: u32, padding: u32, }
    struct GetxattrIn { size: u32, padding: u32, }
    struct LkIn { fh: u64, owner: u64, lk: RawFileLock, lk_flags: u32, padding: u32, }
    struct AccessIn { mask: u32, padding: u32, }
    struct InterruptIn { unique: u64, }
    struct BmapIn { block: u64, blocksize: u32, padding: u32, }
    struct IoctlIn { fh: u64, flags: u32, cmd: u32, arg: u64, in_size: u32, out_size: u32, }
    struct PollIn { fh: u64, kh: u64, flags: u32, events: u32, }
    struct FallocateIn { fh: u64, offset: u64, length: u64, mode: u32, padding: u32, }
    struct LseekIn { fh: u64, offset: u64, whence: u32, padding: u32, }
    struct CopyFileRangeIn {
        fh_in: u64,
        off_in: u64,
        nodeid_out: u64,
        fh_out: u64,
        off_out: u64,
        len: u64,
        flags: u64,
    }
    struct SetupmappingIn { fh: u64, foffset: u64, len: u64, flags: u64, moffset: u64, }
    struct RemovemappingIn { count: u32, }
    struct RemovemappingOne { moffset: u64, len: u64, }
    struct SyncfsIn { padding: u64, }
    struct NotifyRetrieveIn { dummy1: u64, offset: u64, size: u32, dummy2: u32, dummy3: u64, dummy4: u64, }

    struct ExtHeader { size: u32, kind: u32, }
    struct Secctx { size: u32, padding: u32, }
    struct SuppGroups { nr_groups: u32, }

    struct NotifyInvalInodeOut { ino: u64, off: i64, len: i64, }
    struct NotifyInvalEntryOut { parent: u64, namelen: u32, flags: u32, }
    struct NotifyDeleteOut { parent: u64, child: u64, namelen: u32, padding: u32, }

    struct BackingMap { fd: i32, flags: u32, padding: u64, }
}

/// Extension type of `fuse_supp_groups` (`FUSE_EXT_GROUPS`); types up to 31 are counts of security contexts.
pub(crate) const EXT_GROUPS: u32 = 32;
pub(crate) const MAX_NR_SECCTX: u32 = 31;

pub(crate) mod fattr {
    pub(crate) const MODE: u32 = 1 << 0;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    pub(crate) const FH: u32 = 1 << 6;
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
    pub(crate) const LOCKOWNER: u32 = 1 << 9;
    pub(crate) const CTIME: u32 = 1 << 10;
    pub(crate) const KILL_SUIDGID: u32 = 1 << 11;
}

pub(crate) const GETATTR_FH: u32 = 1 << 0;
pub(crate) const RELEASE_FLUSH: u32 = 1 << 0;
pub(crate) const RELEASE_FLOCK_UNLOCK: u32 = 1 << 1;
pub(crate) const LK_FLOCK: u32 = 1 << 0;
pub(crate) const WRITE_CACHE: u32 = 1 << 0;
pub(crate) const WRITE_LOCKOWNER: u32 = 1 << 1;
pub(crate) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
pub(crate) const READ_LOCKOWNER: u32 = 1 << 1;
pub(crate) const OPEN_KILL_SUIDGID: u32 = 1 << 0;
pub(crate) const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;
pub(crate) const FSYNC_FDATASYNC: u32 = 1 << 0;
pub(crate) const POLL_SCHEDULE_NOTIFY: u32 = 1 << 0;
pub(crate) const NOTIFY_EXPIRE_ONLY: u32 = 1 << 0;
pub(crate) const ATTR_SUBMOUNT: u32 = 1 << 0;

/// Notification codes: sent in `error` of a header whose `unique` is 0.
pub(crate) mod notify {
    pub(crate) const INVAL_INODE: i32 = 2;
    pub(crate) const INVAL_ENTRY: i32 = 3;
    pub(crate) const DELETE: i32 = 6;
    pub(crate) const RESEND: i32 = 7;
    pub(crate) const INC_EPOCH: i32 = 8;
}

/// Size of the header of every request.
pub(crate) const IN_HEADER_SIZE: usize = size_of::<InHeader>();
/// Bytes in front of the payload of a WRITE: what the buffers place just before an aligned address.
pub(crate) const WRITE_PREFIX: usize = IN_HEADER_SIZE + size_of::<WriteIn>();
/// Size of the header of every reply.
pub(crate) const OUT_HEADER_SIZE: usize = size_of::<OutHeader>();

/// Directory entries and extensions are padded to eight bytes (`FUSE_REC_ALIGN`).
pub(crate) const fn rec_align(len: usize) -> usize {
    len.next_multiple_of(8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes as a C compiler lays out the kernel's header.
    #[test]
    fn structures_have_the_sizes_of_their_c_namesakes() {
        let sizes = [
            (size_of::<InHeader>(), 40),
            (size_of::<OutHeader>(), 16),
            (size_of::<RawAttr>(), 88),
            (size_of::<RawStatx>(), 256),
            (size_of::<RawFileLock>(), 24),
            (size_of::<EntryOut>(), 128),
            (size_of::<AttrOut>(), 104),
            (size_of::<StatxOut>(), 288),
            (size_of::<OpenOut>(), 16),
            (size_of::<StatfsOut>(), 80),
            (size_of::<LkOut>(), 24),
            (size_of::<IoctlOut>(), 16),
            (size_of::<Dirent>(), 24),
            (size_of::<InitIn>() + size_of::<InitInExt>(), 64),
            (size_of::<InitOut>(), 64),
            (size_of::<StatxIn>(), 24),
            (size_of::<MknodIn>(), 16),
            (size_of::<Rename2In>(), 16),
            (size_of::<SetattrIn>(), 88),
            (size_of::<CreateIn>(), 16),
            (size_of::<ReleaseIn>(), 24),
            (size_of::<FlushIn>(), 24),
            (size_of::<ReadIn>(), 40),
            (size_of::<WriteIn>(), 40),
            (size_of::<FsyncIn>(), 16),
            (size_of::<SetxattrIn>() + size_of::<SetxattrInExt>(), 16),
            (size_of::<LkIn>(), 48),
            (size_of::<BmapIn>(), 16),
            (size_of::<IoctlIn>(), 32),
            (size_of::<PollIn>(), 24),
            (size_of::<FallocateIn>(), 32),
            (size_of::<LseekIn>(), 24),
            (size_of::<CopyFileRangeIn>(), 56),
            (size_of::<SetupmappingIn>(), 40),
            (size_of::<NotifyRetrieveIn>(), 40),
            (size_of::<NotifyInvalInodeOut>(), 24),
            (size_of::<NotifyInvalEntryOut>(), 16),
            (size_of::<NotifyDeleteOut>(), 24),
            (size_of::<BackingMap>(), 16),
        ];
        for (index, (rust, c)) in sizes.into_iter().enumerate() {
            assert_eq!(rust, c, "structure number {index}");
        }
        assert_eq!(WRITE_PREFIX, 80);
    }
}
