//! A request, typed: what [`crate::decode`] makes of the kernel's bytes.
//!
//! Invariant: whatever is borrowed here was checked by the decoder; the iterators cannot meet anything malformed.

use std::ffi::CStr;

use rustix::fs::{Access, FallocateFlags, OFlags, RenameFlags, XattrFlags};
use zerocopy::FromBytes;

use crate::abi;
use crate::features::Features;
use crate::ids::{Caller, Fh, LockOwner, NodeId, Unique};
use crate::opcode::Opcode;
use crate::types::{FileLock, SetAttr, Whence};

/// What was agreed in INIT and changes how bytes are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protocol {
    /// The agreed minor version.
    pub minor: u32,
    /// The agreed features.
    pub features: Features,
}

/// The header of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Length of the whole request in bytes.
    pub len: usize,
    /// The opcode's number, known or not.
    pub raw_opcode: u32,
    /// The request's name.
    pub unique: Unique,
    /// The inode it is about.
    pub node: NodeId,
    /// Who asks.
    pub caller: Caller,
    /// Length of the extensions at the end, in bytes.
    pub extensions: usize,
}

impl Header {
    /// The opcode, if this crate knows it.
    #[must_use]
    pub const fn opcode(&self) -> Option<Opcode> {
        Opcode::from_raw(self.raw_opcode)
    }
}

/// What comes with every operation that creates an inode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Creation<'a> {
    /// The caller's umask. With `Features::DONT_MASK` the server applies it, else the kernel has.
    pub umask: u32,
    /// Supplementary groups of the caller that matter here (`Features::CREATE_SUPP_GROUP`; at most the parent's group).
    pub groups: Groups<'a>,
    /// Security contexts to be set on the new inode (`Features::SECURITY_CTX`).
    pub security: SecurityContexts<'a>,
}

/// Group ids, checked and iterable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Groups<'a>(pub(crate) &'a [u8]);

impl<'a> Groups<'a> {
    /// The groups.
    pub fn iter(&self) -> impl Iterator<Item = u32> + 'a {
        self.0
            .chunks_exact(4)
            .filter_map(|raw| raw.try_into().ok().map(u32::from_ne_bytes))
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Security contexts, checked and iterable as (attribute name, value).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SecurityContexts<'a>(pub(crate) &'a [u8]);

impl<'a> SecurityContexts<'a> {
    /// Name and value of each context.
    pub fn iter(&self) -> impl Iterator<Item = (&'a CStr, &'a [u8])> + 'a {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let (name, value, tail) = split_context(rest)?;
            rest = tail;
            Some((name, value))
        })
    }
}

/// `fuse_secctx`, name, value; each context is padded to eight bytes (get_security_context, fs/fuse/dir.c).
pub(crate) fn split_context(bytes: &[u8]) -> Option<(&CStr, &[u8], &[u8])> {
    let (head, rest) = abi::Secctx::read_from_prefix(bytes).ok()?;
    let name = CStr::from_bytes_until_nul(rest).ok()?;
    let size = usize::try_from(head.size).ok()?;
    let start = name.to_bytes_with_nul().len();
    let value = rest.get(start..start.checked_add(size)?)?;
    let used = size_of::<abi::Secctx>() + start + size;
    let tail = bytes.get(abi::rec_align(used)..).unwrap_or_default();
    Some((name, value, tail))
}

/// The inodes of a BATCH_FORGET, each with the number of references given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forgets<'a>(pub(crate) &'a [u8]);

impl<'a> Forgets<'a> {
    /// Inode and number of references.
    pub fn iter(&self) -> impl Iterator<Item = (NodeId, u64)> + 'a {
        self.0
            .chunks_exact(size_of::<abi::ForgetOne>())
            .filter_map(|raw| abi::ForgetOne::read_from_bytes(raw).ok())
            .map(|one| (NodeId(one.nodeid), one.nlookup))
    }
}

/// The ranges of a REMOVEMAPPING (virtiofs DAX; `/dev/fuse` never sends it).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mappings<'a>(pub(crate) &'a [u8]);

impl<'a> Mappings<'a> {
    /// Offset in the memory window and length of each.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + 'a {
        self.0
            .chunks_exact(size_of::<abi::RemovemappingOne>())
            .filter_map(|raw| abi::RemovemappingOne::read_from_bytes(raw).ok())
            .map(|one| (one.moffset, one.len))
    }
}

/// A lock operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockOp {
    /// The open file.
    pub fh: Fh,
    /// Who asks.
    pub owner: LockOwner,
    /// What for.
    pub lock: FileLock,
    /// It is a flock(2), not a byte range (`FUSE_LK_FLOCK`).
    pub flock: bool,
}

/// The copy of a range of one file to another. The node in the header is the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyRange {
    /// Open source.
    pub source: Fh,
    /// Where to read.
    pub source_offset: u64,
    /// Inode of the destination.
    pub target_node: NodeId,
    /// Open destination.
    pub target: Fh,
    /// Where to write.
    pub target_offset: u64,
    /// Bytes to copy.
    pub len: u64,
    /// Flags of copy_file_range(2); none exist yet.
    pub flags: u64,
}

/// A request, typed. Names have no NUL and no slash; flags are those of the system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(
    missing_docs,
    reason = "fields are the arguments of the system call that the variant is named after; what is not is commented"
)]
pub enum Op<'a> {
    /// Find a name in a directory. `.` and `..` come with `Features::EXPORT_SUPPORT` only.
    Lookup {
        name: &'a CStr,
    },
    /// The kernel gives back references to the inode. No reply.
    Forget {
        references: u64,
    },
    /// The same for many inodes. No reply.
    BatchForget(Forgets<'a>),
    Getattr {
        fh: Option<Fh>,
    },
    /// `flags` are `AT_STATX_*`, `mask` is `STATX_*`.
    Statx {
        fh: Option<Fh>,
        flags: u32,
        mask: u32,
    },
    Setattr(SetAttr),
    Readlink,
    Symlink {
        name: &'a CStr,
        target: &'a CStr,
        creation: Creation<'a>,
    },
    /// `mode` has the file type; `rdev` is encoded as by [`crate::types::encode_rdev`].
    Mknod {
        name: &'a CStr,
        mode: u32,
        rdev: u32,
        creation: Creation<'a>,
    },
    Mkdir {
        name: &'a CStr,
        mode: u32,
        creation: Creation<'a>,
    },
    Unlink {
        name: &'a CStr,
    },
    Rmdir {
        name: &'a CStr,
    },
    /// RENAME (no flags) and RENAME2. The node in the header is the old parent.
    Rename {
        name: &'a CStr,
        new_parent: NodeId,
        new_name: &'a CStr,
        flags: RenameFlags,
    },
    /// The node in the header is the parent of the new name, `source` the inode to link.
    Link {
        source: NodeId,
        new_name: &'a CStr,
    },
    /// `kill_suidgid`: with O_TRUNC, clear set-id bits as the kernel would (`Features::HANDLE_KILLPRIV_V2`).
    Open {
        flags: OFlags,
        kill_suidgid: bool,
    },
    Create {
        name: &'a CStr,
        flags: OFlags,
        mode: u32,
        kill_suidgid: bool,
        creation: Creation<'a>,
    },
    /// O_TMPFILE: the node in the header is the directory.
    Tmpfile {
        flags: OFlags,
        mode: u32,
        creation: Creation<'a>,
    },
    /// `flags` are those of the open file at this moment.
    Read {
        fh: Fh,
        offset: u64,
        size: u32,
        flags: OFlags,
        lock_owner: Option<LockOwner>,
    },
    /// `from_cache`: written back from pages, so `fh` and the caller are guesses.
    Write {
        fh: Fh,
        offset: u64,
        data: &'a [u8],
        flags: OFlags,
        lock_owner: Option<LockOwner>,
        from_cache: bool,
        kill_suidgid: bool,
    },
    Statfs,
    /// The last descriptor has gone. `flock_unlock`: the owner's flock goes with it.
    Release {
        fh: Fh,
        flags: OFlags,
        lock_owner: LockOwner,
        flush: bool,
        flock_unlock: bool,
    },
    Fsync {
        fh: Fh,
        datasync: bool,
    },
    /// `acl_kill_sgid`: clear set-group-id along with this change of `system.posix_acl_access`.
    Setxattr {
        name: &'a CStr,
        value: &'a [u8],
        flags: XattrFlags,
        acl_kill_sgid: bool,
    },
    /// `size` 0 asks for the size only.
    Getxattr {
        name: &'a CStr,
        size: u32,
    },
    /// `size` 0 asks for the size only.
    Listxattr {
        size: u32,
    },
    Removexattr {
        name: &'a CStr,
    },
    /// A descriptor is closed; POSIX locks of `lock_owner` on the inode go.
    Flush {
        fh: Fh,
        lock_owner: LockOwner,
    },
    /// Answered by the server itself.
    Init {
        major: u32,
        minor: u32,
        max_readahead: u32,
        offered: Features,
    },
    Opendir {
        flags: OFlags,
    },
    Readdir {
        fh: Fh,
        offset: u64,
        size: u32,
    },
    Readdirplus {
        fh: Fh,
        offset: u64,
        size: u32,
    },
    Releasedir {
        fh: Fh,
        flags: OFlags,
    },
    Fsyncdir {
        fh: Fh,
        datasync: bool,
    },
    Getlk(LockOp),
    Setlk(LockOp),
    /// Like `Setlk`, but waits. May be answered EINTR when interrupted.
    Setlkw(LockOp),
    Access {
        mask: Access,
    },
    /// Answered by the server itself, through [`crate::Service::interrupted`].
    Interrupt {
        target: Unique,
    },
    Bmap {
        block: u64,
        block_size: u32,
    },
    /// Answered by the server itself.
    Destroy,
    /// `directory`: on a directory. `data` is what the command word says is copied in, `out_size` what may be copied out.
    Ioctl {
        fh: Fh,
        command: u32,
        argument: u64,
        data: &'a [u8],
        out_size: u32,
        directory: bool,
        compat: bool,
    },
    Poll {
        fh: Fh,
        wakeup: u64,
        schedule_notify: bool,
        events: u32,
    },
    /// Data that a NOTIFY_RETRIEVE asked for; this crate never asks.
    NotifyReply {
        offset: u64,
        data: &'a [u8],
    },
    Fallocate {
        fh: Fh,
        offset: u64,
        length: u64,
        mode: FallocateFlags,
    },
    Lseek {
        fh: Fh,
        offset: u64,
        whence: Whence,
    },
    /// COPY_FILE_RANGE and COPY_FILE_RANGE_64: the reply is [`crate::Reply::copied`] for both.
    CopyFileRange(CopyRange),
    /// virtiofs only.
    Setupmapping {
        fh: Fh,
        file_offset: u64,
        len: u64,
        write: bool,
        read: bool,
        window_offset: u64,
    },
    /// virtiofs only.
    Removemapping(Mappings<'a>),
    Syncfs,
    /// An opcode newer than this crate. The server answers it ENOSYS by itself.
    Unknown {
        opcode: u32,
        body: &'a [u8],
    },
}
