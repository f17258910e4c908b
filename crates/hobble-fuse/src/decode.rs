//! From bytes to a typed operation: the only place that reads what the kernel sent.
//!
//! Invariant: [`decode`] either returns an [`Op`] whose every part was checked (lengths, NULs, enumerations) or an error that
//! says what is wrong and where; it never panics, whatever the bytes. Bytes behind the known end of a structure are ignored,
//! because newer kernels append fields there.
//!
//! Length: one decoder for each opcode, side by side as in the kernel's header.

use std::ffi::CStr;

use rustix::fs::{Access, FallocateFlags, OFlags, RenameFlags, XattrFlags};
use thiserror::Error;
use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::abi::{self, fattr};
use crate::features::Features;
use crate::ids::{Caller, Fh, LockOwner, NodeId, Tid, Unique};
use crate::op::split_context;
pub use crate::op::{
    CopyRange, Creation, Forgets, Groups, Header, LockOp, Mappings, Op, Protocol, SecurityContexts,
};
use crate::opcode::Opcode;
use crate::types::{FileLock, LockKind, SetAttr, SetTime, Timestamp, Whence};

/// Why bytes are not a request.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// Not even a header.
    #[error("a request of {have} bytes has no complete header (40 bytes)")]
    ShortHeader {
        /// Bytes there are.
        have: usize,
    },
    /// The header's length is not the number of bytes read.
    #[error("the header claims {claimed} bytes but {have} were read")]
    Length {
        /// What the header says.
        claimed: usize,
        /// Bytes there are.
        have: usize,
    },
    /// An argument reaches beyond the end.
    #[error("{opcode}: {what} needs {need} bytes at offset {at} but {have} are left")]
    Truncated {
        /// The operation.
        opcode: Opcode,
        /// The argument.
        what: &'static str,
        /// Where it starts, in bytes from the header's end.
        at: usize,
        /// Bytes it needs.
        need: usize,
        /// Bytes there are.
        have: usize,
    },
    /// A string without its NUL.
    #[error("{opcode}: {what} at offset {at} has no terminating NUL")]
    Unterminated {
        /// The operation.
        opcode: Opcode,
        /// The argument.
        what: &'static str,
        /// Where it starts, in bytes from the header's end.
        at: usize,
    },
    /// A name that no directory can contain.
    #[error("{opcode}: {what} at offset {at} is empty or contains a slash")]
    BadName {
        /// The operation.
        opcode: Opcode,
        /// The argument.
        what: &'static str,
        /// Where it starts, in bytes from the header's end.
        at: usize,
    },
    /// A number outside its enumeration.
    #[error("{opcode}: {what} has the impossible value {value:#x}")]
    BadValue {
        /// The operation.
        opcode: Opcode,
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The extension area is malformed.
    #[error("{opcode}: extension at offset {at} of the extension area: {what}")]
    Extension {
        /// The operation.
        opcode: Opcode,
        /// What is wrong.
        what: &'static str,
        /// Where, in bytes from the start of the area.
        at: usize,
    },
}

/// Reads the header and checks the length.
///
/// # Errors
/// When there is no complete header or its length is not that of `bytes`.
pub fn header(bytes: &[u8]) -> Result<Header, DecodeError> {
    let Ok((raw, _)) = abi::InHeader::read_from_prefix(bytes) else {
        return Err(DecodeError::ShortHeader { have: bytes.len() });
    };
    let claimed = usize::try_from(raw.len).unwrap_or(usize::MAX);
    if claimed != bytes.len() {
        return Err(DecodeError::Length {
            claimed,
            have: bytes.len(),
        });
    }
    Ok(Header {
        len: claimed,
        raw_opcode: raw.opcode,
        unique: Unique(raw.unique),
        node: NodeId(raw.nodeid),
        caller: Caller {
            uid: raw.uid,
            gid: raw.gid,
            tid: Tid(raw.pid),
        },
        extensions: usize::from(raw.total_extlen) * 8,
    })
}

/// Reads a whole request.
///
/// # Errors
/// See [`DecodeError`]; the request should be answered EIO.
pub fn decode(bytes: &[u8], protocol: Protocol) -> Result<Op<'_>, DecodeError> {
    let header = header(bytes)?;
    let body = bytes.get(abi::IN_HEADER_SIZE..).unwrap_or_default();
    let Some(opcode) = header.opcode() else {
        return Ok(Op::Unknown {
            opcode: header.raw_opcode,
            body,
        });
    };
    let Some(split) = body.len().checked_sub(header.extensions) else {
        return Err(DecodeError::Truncated {
            opcode,
            what: "extension area",
            at: 0,
            need: header.extensions,
            have: body.len(),
        });
    };
    let (arguments, extensions) = body.split_at_checked(split).unwrap_or_default();
    Arguments {
        opcode,
        bytes: arguments,
        at: 0,
    }
    .operation(protocol, extensions)
}

/// The arguments of one request and how far they have been read.
struct Arguments<'a> {
    opcode: Opcode,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Arguments<'a> {
    fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }

    fn truncated(&self, what: &'static str, need: usize) -> DecodeError {
        DecodeError::Truncated {
            opcode: self.opcode,
            what,
            at: self.at,
            need,
            have: self.rest().len(),
        }
    }

    fn structure<T: FromBytes + KnownLayout + Immutable>(
        &mut self,
        what: &'static str,
    ) -> Result<T, DecodeError> {
        let (value, _) =
            T::read_from_prefix(self.rest()).map_err(|_| self.truncated(what, size_of::<T>()))?;
        self.at += size_of::<T>();
        Ok(value)
    }

    fn data(&mut self, what: &'static str, len: u32) -> Result<&'a [u8], DecodeError> {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let data = self
            .rest()
            .get(..len)
            .ok_or_else(|| self.truncated(what, len))?;
        self.at += len;
        Ok(data)
    }

    fn string(&mut self, what: &'static str) -> Result<&'a CStr, DecodeError> {
        let string =
            CStr::from_bytes_until_nul(self.rest()).map_err(|_| DecodeError::Unterminated {
                opcode: self.opcode,
                what,
                at: self.at,
            })?;
        self.at += string.to_bytes_with_nul().len();
        Ok(string)
    }

    /// A component of a path.
    fn name(&mut self, what: &'static str) -> Result<&'a CStr, DecodeError> {
        let at = self.at;
        let name = self.string(what)?;
        if name.is_empty() || name.to_bytes().contains(&b'/') {
            return Err(DecodeError::BadName {
                opcode: self.opcode,
                what,
                at,
            });
        }
        Ok(name)
    }

    fn bad(&self, what: &'static str, value: impl Into<u64>) -> DecodeError {
        DecodeError::BadValue {
            opcode: self.opcode,
            what,
            value: value.into(),
        }
    }

    fn operation(
        mut self,
        protocol: Protocol,
        extensions: &'a [u8],
    ) -> Result<Op<'a>, DecodeError> {
        Ok(match self.opcode {
            Opcode::Lookup => Op::Lookup {
                name: self.name("name")?,
            },
            Opcode::Forget => {
                let raw: abi::ForgetIn = self.structure("fuse_forget_in")?;
                Op::Forget {
                    references: raw.nlookup,
                }
            }
            Opcode::BatchForget => {
                let raw: abi::BatchForgetIn = self.structure("fuse_batch_forget_in")?;
                Op::BatchForget(Forgets(self.array(
                    "fuse_forget_one",
                    raw.count,
                    size_of::<abi::ForgetOne>(),
                )?))
            }
            Opcode::Getattr => {
                let raw: abi::GetattrIn = self.structure("fuse_getattr_in")?;
                Op::Getattr {
                    fh: optional_fh(raw.getattr_flags, raw.fh),
                }
            }
            Opcode::Statx => {
                let raw: abi::StatxIn = self.structure("fuse_statx_in")?;
                Op::Statx {
                    fh: optional_fh(raw.getattr_flags, raw.fh),
                    flags: raw.sx_flags,
                    mask: raw.sx_mask,
                }
            }
            Opcode::Setattr => Op::Setattr(self.setattr()?),
            Opcode::Readlink => Op::Readlink,
            Opcode::Symlink => {
                let name = self.name("name")?;
                let target = self.string("target")?;
                Op::Symlink {
                    name,
                    target,
                    creation: self.creation(0, extensions)?,
                }
            }
            Opcode::Mknod => {
                let raw: abi::MknodIn = self.structure("fuse_mknod_in")?;
                let name = self.name("name")?;
                Op::Mknod {
                    name,
                    mode: raw.mode,
                    rdev: raw.rdev,
                    creation: self.creation(raw.umask, extensions)?,
                }
            }
            Opcode::Mkdir => {
                let raw: abi::MkdirIn = self.structure("fuse_mkdir_in")?;
                let name = self.name("name")?;
                Op::Mkdir {
                    name,
                    mode: raw.mode,
                    creation: self.creation(raw.umask, extensions)?,
                }
            }
            Opcode::Unlink => Op::Unlink {
                name: self.name("name")?,
            },
            Opcode::Rmdir => Op::Rmdir {
                name: self.name("name")?,
            },
            Opcode::Rename => {
                let raw: abi::RenameIn = self.structure("fuse_rename_in")?;
                self.rename(raw.newdir, 0)?
            }
            Opcode::Rename2 => {
                let raw: abi::Rename2In = self.structure("fuse_rename2_in")?;
                self.rename(raw.newdir, raw.flags)?
            }
            Opcode::Link => {
                let raw: abi::LinkIn = self.structure("fuse_link_in")?;
                Op::Link {
                    source: NodeId(raw.oldnodeid),
                    new_name: self.name("new name")?,
                }
            }
            Opcode::Open => {
                let (flags, kill_suidgid) = self.open()?;
                Op::Open {
                    flags,
                    kill_suidgid,
                }
            }
            Opcode::Opendir => Op::Opendir {
                flags: self.open()?.0,
            },
            Opcode::Create => {
                let raw: abi::CreateIn = self.structure("fuse_create_in")?;
                Op::Create {
                    name: self.name("name")?,
                    flags: OFlags::from_bits_retain(raw.flags),
                    mode: raw.mode,
                    kill_suidgid: raw.open_flags & abi::OPEN_KILL_SUIDGID != 0,
                    creation: self.creation(raw.umask, extensions)?,
                }
            }
            Opcode::Tmpfile => {
                let raw: abi::CreateIn = self.structure("fuse_create_in")?;
                // "/" for every O_TMPFILE (vfs_tmpfile, fs/namei.c): it says nothing.
                self.string("name")?;
                Op::Tmpfile {
                    flags: OFlags::from_bits_retain(raw.flags),
                    mode: raw.mode,
                    creation: self.creation(raw.umask, extensions)?,
                }
            }
            Opcode::Read => {
                let raw: abi::ReadIn = self.structure("fuse_read_in")?;
                Op::Read {
                    fh: Fh(raw.fh),
                    offset: raw.offset,
                    size: raw.size,
                    flags: OFlags::from_bits_retain(raw.flags),
                    lock_owner: (raw.read_flags & abi::READ_LOCKOWNER != 0)
                        .then_some(LockOwner(raw.lock_owner)),
                }
            }
            Opcode::Write => {
                let raw: abi::WriteIn = self.structure("fuse_write_in")?;
                Op::Write {
                    fh: Fh(raw.fh),
                    offset: raw.offset,
                    data: self.data("data", raw.size)?,
                    flags: OFlags::from_bits_retain(raw.flags),
                    lock_owner: (raw.write_flags & abi::WRITE_LOCKOWNER != 0)
                        .then_some(LockOwner(raw.lock_owner)),
                    from_cache: raw.write_flags & abi::WRITE_CACHE != 0,
                    kill_suidgid: raw.write_flags & abi::WRITE_KILL_SUIDGID != 0,
                }
            }
            Opcode::Statfs => Op::Statfs,
            Opcode::Release => {
                let raw: abi::ReleaseIn = self.structure("fuse_release_in")?;
                Op::Release {
                    fh: Fh(raw.fh),
                    flags: OFlags::from_bits_retain(raw.flags),
                    lock_owner: LockOwner(raw.lock_owner),
                    flush: raw.release_flags & abi::RELEASE_FLUSH != 0,
                    flock_unlock: raw.release_flags & abi::RELEASE_FLOCK_UNLOCK != 0,
                }
            }
            Opcode::Releasedir => {
                let raw: abi::ReleaseIn = self.structure("fuse_release_in")?;
                Op::Releasedir {
                    fh: Fh(raw.fh),
                    flags: OFlags::from_bits_retain(raw.flags),
                }
            }
            Opcode::Fsync => {
                let (fh, datasync) = self.fsync()?;
                Op::Fsync { fh, datasync }
            }
            Opcode::Fsyncdir => {
                let (fh, datasync) = self.fsync()?;
                Op::Fsyncdir { fh, datasync }
            }
            Opcode::Setxattr => self.setxattr(protocol)?,
            Opcode::Getxattr => {
                let raw: abi::GetxattrIn = self.structure("fuse_getxattr_in")?;
                Op::Getxattr {
                    name: self.string("attribute name")?,
                    size: raw.size,
                }
            }
            Opcode::Listxattr => {
                let raw: abi::GetxattrIn = self.structure("fuse_getxattr_in")?;
                Op::Listxattr { size: raw.size }
            }
            Opcode::Removexattr => Op::Removexattr {
                name: self.string("attribute name")?,
            },
            Opcode::Flush => {
                let raw: abi::FlushIn = self.structure("fuse_flush_in")?;
                Op::Flush {
                    fh: Fh(raw.fh),
                    lock_owner: LockOwner(raw.lock_owner),
                }
            }
            Opcode::Init => self.init()?,
            Opcode::Readdir => {
                let raw: abi::ReadIn = self.structure("fuse_read_in")?;
                Op::Readdir {
                    fh: Fh(raw.fh),
                    offset: raw.offset,
                    size: raw.size,
                }
            }
            Opcode::Readdirplus => {
                let raw: abi::ReadIn = self.structure("fuse_read_in")?;
                Op::Readdirplus {
                    fh: Fh(raw.fh),
                    offset: raw.offset,
                    size: raw.size,
                }
            }
            Opcode::Getlk => Op::Getlk(self.lock()?),
            Opcode::Setlk => Op::Setlk(self.lock()?),
            Opcode::Setlkw => Op::Setlkw(self.lock()?),
            Opcode::Access => {
                let raw: abi::AccessIn = self.structure("fuse_access_in")?;
                Op::Access {
                    mask: Access::from_bits_retain(raw.mask),
                }
            }
            Opcode::Interrupt => {
                let raw: abi::InterruptIn = self.structure("fuse_interrupt_in")?;
                Op::Interrupt {
                    target: Unique(raw.unique),
                }
            }
            Opcode::Bmap => {
                let raw: abi::BmapIn = self.structure("fuse_bmap_in")?;
                Op::Bmap {
                    block: raw.block,
                    block_size: raw.blocksize,
                }
            }
            Opcode::Destroy => Op::Destroy,
            Opcode::Ioctl => {
                const COMPAT: u32 = 1 << 0;
                const DIR: u32 = 1 << 4;
                let raw: abi::IoctlIn = self.structure("fuse_ioctl_in")?;
                Op::Ioctl {
                    fh: Fh(raw.fh),
                    command: raw.cmd,
                    argument: raw.arg,
                    data: self.data("argument of the command", raw.in_size)?,
                    out_size: raw.out_size,
                    directory: raw.flags & DIR != 0,
                    compat: raw.flags & COMPAT != 0,
                }
            }
            Opcode::Poll => {
                let raw: abi::PollIn = self.structure("fuse_poll_in")?;
                Op::Poll {
                    fh: Fh(raw.fh),
                    wakeup: raw.kh,
                    schedule_notify: raw.flags & abi::POLL_SCHEDULE_NOTIFY != 0,
                    events: raw.events,
                }
            }
            Opcode::NotifyReply => {
                let raw: abi::NotifyRetrieveIn = self.structure("fuse_notify_retrieve_in")?;
                Op::NotifyReply {
                    offset: raw.offset,
                    data: self.data("data", raw.size)?,
                }
            }
            Opcode::Fallocate => {
                let raw: abi::FallocateIn = self.structure("fuse_fallocate_in")?;
                Op::Fallocate {
                    fh: Fh(raw.fh),
                    offset: raw.offset,
                    length: raw.length,
                    mode: FallocateFlags::from_bits_retain(raw.mode),
                }
            }
            Opcode::Lseek => {
                let raw: abi::LseekIn = self.structure("fuse_lseek_in")?;
                let whence =
                    Whence::from_raw(raw.whence).ok_or_else(|| self.bad("whence", raw.whence))?;
                Op::Lseek {
                    fh: Fh(raw.fh),
                    offset: raw.offset,
                    whence,
                }
            }
            Opcode::CopyFileRange | Opcode::CopyFileRange64 => {
                let raw: abi::CopyFileRangeIn = self.structure("fuse_copy_file_range_in")?;
                Op::CopyFileRange(CopyRange {
                    source: Fh(raw.fh_in),
                    source_offset: raw.off_in,
                    target_node: NodeId(raw.nodeid_out),
                    target: Fh(raw.fh_out),
                    target_offset: raw.off_out,
                    len: raw.len,
                    flags: raw.flags,
                })
            }
            Opcode::Setupmapping => {
                let raw: abi::SetupmappingIn = self.structure("fuse_setupmapping_in")?;
                Op::Setupmapping {
                    fh: Fh(raw.fh),
                    file_offset: raw.foffset,
                    len: raw.len,
                    write: raw.flags & 1 != 0,
                    read: raw.flags & 2 != 0,
                    window_offset: raw.moffset,
                }
            }
            Opcode::Removemapping => {
                let raw: abi::RemovemappingIn = self.structure("fuse_removemapping_in")?;
                let size = size_of::<abi::RemovemappingOne>();
                Op::Removemapping(Mappings(self.array(
                    "fuse_removemapping_one",
                    raw.count,
                    size,
                )?))
            }
            Opcode::Syncfs => {
                let _: abi::SyncfsIn = self.structure("fuse_syncfs_in")?;
                Op::Syncfs
            }
        })
    }

    fn array(
        &mut self,
        what: &'static str,
        count: u32,
        size: usize,
    ) -> Result<&'a [u8], DecodeError> {
        let need = usize::try_from(count)
            .unwrap_or(usize::MAX)
            .saturating_mul(size);
        let bytes = self
            .rest()
            .get(..need)
            .ok_or_else(|| self.truncated(what, need))?;
        self.at += need;
        Ok(bytes)
    }

    fn setattr(&mut self) -> Result<SetAttr, DecodeError> {
        let raw: abi::SetattrIn = self.structure("fuse_setattr_in")?;
        let has = |bit: u32| raw.valid & bit != 0;
        let time = |set: u32, now: u32, secs: u64, nanos: u32| match (has(now), has(set)) {
            (true, _) => Some(SetTime::Now),
            (false, true) => Some(SetTime::At(Timestamp {
                secs: secs.cast_signed(),
                nanos,
            })),
            (false, false) => None,
        };
        Ok(SetAttr {
            fh: has(fattr::FH).then_some(Fh(raw.fh)),
            mode: has(fattr::MODE).then_some(raw.mode),
            uid: has(fattr::UID).then_some(raw.uid),
            gid: has(fattr::GID).then_some(raw.gid),
            size: has(fattr::SIZE).then_some(raw.size),
            atime: time(fattr::ATIME, fattr::ATIME_NOW, raw.atime, raw.atimensec),
            mtime: time(fattr::MTIME, fattr::MTIME_NOW, raw.mtime, raw.mtimensec),
            ctime: has(fattr::CTIME).then_some(Timestamp {
                secs: raw.ctime.cast_signed(),
                nanos: raw.ctimensec,
            }),
            lock_owner: has(fattr::LOCKOWNER).then_some(LockOwner(raw.lock_owner)),
            kill_suidgid: has(fattr::KILL_SUIDGID),
        })
    }

    fn rename(&mut self, new_parent: u64, flags: u32) -> Result<Op<'a>, DecodeError> {
        Ok(Op::Rename {
            name: self.name("name")?,
            new_parent: NodeId(new_parent),
            new_name: self.name("new name")?,
            flags: RenameFlags::from_bits_retain(flags),
        })
    }

    fn open(&mut self) -> Result<(OFlags, bool), DecodeError> {
        let raw: abi::OpenIn = self.structure("fuse_open_in")?;
        Ok((
            OFlags::from_bits_retain(raw.flags),
            raw.open_flags & abi::OPEN_KILL_SUIDGID != 0,
        ))
    }

    fn fsync(&mut self) -> Result<(Fh, bool), DecodeError> {
        let raw: abi::FsyncIn = self.structure("fuse_fsync_in")?;
        Ok((Fh(raw.fh), raw.fsync_flags & abi::FSYNC_FDATASYNC != 0))
    }

    fn lock(&mut self) -> Result<LockOp, DecodeError> {
        let raw: abi::LkIn = self.structure("fuse_lk_in")?;
        let kind =
            LockKind::from_raw(raw.lk.kind).ok_or_else(|| self.bad("lock type", raw.lk.kind))?;
        Ok(LockOp {
            fh: Fh(raw.fh),
            owner: LockOwner(raw.owner),
            lock: FileLock {
                start: raw.lk.start,
                end: raw.lk.end,
                kind,
                pid: raw.lk.pid,
            },
            flock: raw.lk_flags & abi::LK_FLOCK != 0,
        })
    }

    fn setxattr(&mut self, protocol: Protocol) -> Result<Op<'a>, DecodeError> {
        let raw: abi::SetxattrIn = self.structure("fuse_setxattr_in")?;
        // The kernel sends the second half only to servers that asked for it (fuse_setxattr, fs/fuse/xattr.c).
        let extended = if protocol.features.contains(Features::SETXATTR_EXT) {
            self.structure("fuse_setxattr_in, second half")?
        } else {
            abi::SetxattrInExt::default()
        };
        Ok(Op::Setxattr {
            name: self.string("attribute name")?,
            value: self.data("attribute value", raw.size)?,
            flags: XattrFlags::from_bits_retain(raw.flags),
            acl_kill_sgid: extended.setxattr_flags & abi::SETXATTR_ACL_KILL_SGID != 0,
        })
    }

    fn init(&mut self) -> Result<Op<'a>, DecodeError> {
        let raw: abi::InitIn = self.structure("fuse_init_in")?;
        let mut offered = u64::from(raw.flags);
        if offered & Features::INIT_EXT.bits() != 0 {
            let extended: abi::InitInExt = self.structure("fuse_init_in, second half")?;
            offered |= u64::from(extended.flags2) << 32;
        }
        Ok(Op::Init {
            major: raw.major,
            minor: raw.minor,
            max_readahead: raw.max_readahead,
            offered: Features::from_bits_retain(offered),
        })
    }

    fn creation(&self, umask: u32, extensions: &'a [u8]) -> Result<Creation<'a>, DecodeError> {
        let mut creation = Creation {
            umask,
            ..Creation::default()
        };
        let mut at = 0;
        while at < extensions.len() {
            let error = |what| DecodeError::Extension {
                opcode: self.opcode,
                what,
                at,
            };
            let area = extensions.get(at..).unwrap_or_default();
            let (head, _) =
                abi::ExtHeader::read_from_prefix(area).map_err(|_| error("no complete header"))?;
            let size = usize::try_from(head.size).unwrap_or(usize::MAX);
            if size < size_of::<abi::ExtHeader>() {
                return Err(error("it claims to be shorter than its header"));
            }
            let body = area
                .get(size_of::<abi::ExtHeader>()..size)
                .ok_or_else(|| error("it reaches beyond the end of the area"))?;
            match head.kind {
                abi::EXT_GROUPS => {
                    let (groups, list) = abi::SuppGroups::read_from_prefix(body)
                        .map_err(|_| error("supplementary groups without their number"))?;
                    let need = usize::try_from(groups.nr_groups)
                        .unwrap_or(usize::MAX)
                        .saturating_mul(4);
                    creation.groups = Groups(
                        list.get(..need)
                            .ok_or_else(|| error("fewer supplementary groups than it claims"))?,
                    );
                }
                0..=abi::MAX_NR_SECCTX => {
                    // Here the "type" is the number of contexts (struct fuse_secctx_header).
                    let mut rest = body;
                    for _ in 0..head.kind {
                        (_, _, rest) = split_context(rest)
                            .ok_or_else(|| error("malformed security context"))?;
                    }
                    let used = body.len() - rest.len();
                    creation.security = SecurityContexts(body.get(..used).unwrap_or_default());
                }
                _ => {} // A type newer than this crate: skipped, which its size makes possible.
            }
            at += abi::rec_align(size);
        }
        Ok(creation)
    }
}

fn optional_fh(flags: u32, fh: u64) -> Option<Fh> {
    (flags & abi::GETATTR_FH != 0).then_some(Fh(fh))
}

#[cfg(test)]
mod tests;
