//! What kernel and server can agree on in INIT.
//!
//! Invariant: what is agreed is a subset of what the kernel offered, of what the service wanted and of the mask.

use bitflags::bitflags;

bitflags! {
    /// INIT flags, both words (`FUSE_*` in include/uapi/linux/fuse.h; the second word is shifted up by 32).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Features: u64 {
        /// Several reads of one file at a time.
        const ASYNC_READ = 1 << 0;
        /// POSIX and OFD locks come to the server.
        const POSIX_LOCKS = 1 << 1;
        /// OPEN carries O_TRUNC.
        const ATOMIC_O_TRUNC = 1 << 3;
        /// LOOKUP of `.` and `..` works on any inode, as file handles need.
        const EXPORT_SUPPORT = 1 << 4;
        /// Writes larger than a page.
        const BIG_WRITES = 1 << 5;
        /// The server applies the umask.
        const DONT_MASK = 1 << 6;
        /// flock(2) comes to the server.
        const FLOCK_LOCKS = 1 << 10;
        /// ioctl on directories.
        const HAS_IOCTL_DIR = 1 << 11;
        /// Cached pages go when a GETATTR shows another time or size.
        const AUTO_INVAL_DATA = 1 << 12;
        /// READDIRPLUS.
        const DO_READDIRPLUS = 1 << 13;
        /// READDIRPLUS only where it helps.
        const READDIRPLUS_AUTO = 1 << 14;
        /// Direct I/O in flight in parallel; such requests are nobody's foreground and get no INTERRUPT.
        const ASYNC_DIO = 1 << 15;
        /// Dirty pages kept by the kernel. Never wanted: it hides writes.
        const WRITEBACK_CACHE = 1 << 16;
        /// OPEN may be answered ENOSYS once and for all.
        const NO_OPEN_SUPPORT = 1 << 17;
        /// LOOKUP and READDIR of one directory in parallel.
        const PARALLEL_DIROPS = 1 << 18;
        /// The server clears set-id bits (first version).
        const HANDLE_KILLPRIV = 1 << 19;
        /// The kernel checks POSIX ACLs, which it gets as extended attributes.
        const POSIX_ACL = 1 << 20;
        /// Reading the device after an abort says ECONNABORTED.
        const ABORT_ERROR = 1 << 21;
        /// Requests of up to `max_pages` pages.
        const MAX_PAGES = 1 << 22;
        /// READLINK is cached.
        const CACHE_SYMLINKS = 1 << 23;
        /// OPENDIR may be answered ENOSYS once and for all.
        const NO_OPENDIR_SUPPORT = 1 << 24;
        /// Cached pages go only when told.
        const EXPLICIT_INVAL_DATA = 1 << 25;
        /// virtiofs only.
        const MAP_ALIGNMENT = 1 << 26;
        /// The kernel mounts inodes marked [`crate::types::Attr::submount`] by itself.
        const SUBMOUNTS = 1 << 27;
        /// The server clears set-id bits where it is told to.
        const HANDLE_KILLPRIV_V2 = 1 << 28;
        /// SETXATTR carries flags of its own.
        const SETXATTR_EXT = 1 << 29;
        /// INIT has a second word of flags.
        const INIT_EXT = 1 << 30;
        /// Creations carry security contexts.
        const SECURITY_CTX = 1 << 32;
        /// virtiofs only.
        const HAS_INODE_DAX = 1 << 33;
        /// Creations carry the caller's group when it is the parent's.
        const CREATE_SUPP_GROUP = 1 << 34;
        /// NOTIFY_INVAL_ENTRY can expire instead of drop.
        const HAS_EXPIRE_ONLY = 1 << 35;
        /// Shared mappings of files opened with DIRECT_IO.
        const DIRECT_IO_ALLOW_MMAP = 1 << 36;
        /// Backing files (Linux 6.9).
        const PASSTHROUGH = 1 << 37;
        /// File handles are refused.
        const NO_EXPORT_SUPPORT = 1 << 38;
        /// NOTIFY_RESEND (Linux 6.9).
        const HAS_RESEND = 1 << 39;
        /// Idmapped mounts of this filesystem.
        const ALLOW_IDMAP = 1 << 40;
        /// Requests through io_uring (Linux 6.14).
        const OVER_IO_URING = 1 << 41;
        /// The connection is aborted when a request lives too long.
        const REQUEST_TIMEOUT = 1 << 42;
    }
}

impl Features {
    /// What a mirror of a real filesystem wants: everything that brings FUSE nearer to the backing filesystem, nothing that
    /// hides operations from the server. Left out on purpose: the write-back cache, zero-message opens, io_uring, idmapping.
    pub const MIRROR: Self = Self::ASYNC_READ
        .union(Self::POSIX_LOCKS)
        .union(Self::ATOMIC_O_TRUNC)
        .union(Self::EXPORT_SUPPORT)
        .union(Self::BIG_WRITES)
        .union(Self::DONT_MASK)
        .union(Self::FLOCK_LOCKS)
        .union(Self::HAS_IOCTL_DIR)
        .union(Self::AUTO_INVAL_DATA)
        .union(Self::DO_READDIRPLUS)
        .union(Self::READDIRPLUS_AUTO)
        .union(Self::ASYNC_DIO)
        .union(Self::PARALLEL_DIROPS)
        .union(Self::POSIX_ACL)
        .union(Self::MAX_PAGES)
        .union(Self::CACHE_SYMLINKS)
        .union(Self::HANDLE_KILLPRIV_V2)
        .union(Self::SETXATTR_EXT)
        .union(Self::INIT_EXT)
        .union(Self::CREATE_SUPP_GROUP)
        .union(Self::HAS_EXPIRE_ONLY)
        .union(Self::DIRECT_IO_ALLOW_MMAP)
        .union(Self::PASSTHROUGH)
        .union(Self::HAS_RESEND);
}
