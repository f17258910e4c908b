//! Answering a request, exactly once.
//!
//! Invariant: a [`Reply`] is consumed by the method that sends it. One that is dropped unanswered sends EIO and is counted as
//! a bug, so that no caller ever hangs on a forgotten reply.

use std::io::IoSlice;
use std::sync::Arc;
use std::time::Duration;

use zerocopy::IntoBytes;

use crate::abi;
use crate::buffer::DataBuffer;
use crate::decode::DecodeError;
use crate::device::{Device, bump};
use crate::dir::{DirBuilder, DirPlusBuilder};
use crate::errno::{Errno, InjectedErrno};
use crate::ids::Unique;
use crate::opcode::Opcode;
use crate::types::{Attr, Entry, FileLock, Opened, StatFs, StatxAttr};

/// Whether the kernel took a reply. After `Gone` it holds none of the references (inodes, open files) that the reply gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The caller has its answer.
    Delivered,
    /// Nobody waits any more (aborted or unmounted), or the kernel refused the reply.
    Gone,
}

/// Is told what a request is about to be answered: should the server die before the kernel has the answer, whoever takes over can give the same
/// ([`Reply::repeat`]) to the request when it is handed out again.
pub trait Witness: Send + Sync {
    /// The answer to the request that was first handed out as `unique` is complete and about to be sent: the error (0, or negative) and the bytes.
    fn answering(&self, unique: Unique, error: i32, parts: &[&[u8]]);
}

/// The right and the duty to answer one request. May be sent to and answered from any thread, at any time.
pub struct Reply {
    device: Device,
    unique: Unique,
    opcode: Option<Opcode>,
    answered: bool,
    witness: Option<Arc<dyn Witness>>,
    /// What was asked may have been done already.
    is_again: bool,
}

impl std::fmt::Debug for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reply")
            .field("unique", &self.unique)
            .field("opcode", &self.opcode)
            .finish_non_exhaustive()
    }
}

/// `fuse_open_out.open_flags` of an open with a backing file.
const FOPEN_PASSTHROUGH: u32 = 1 << 7;

impl Reply {
    /// The reply to a request read from `device`. Public for tests of a [`crate::Service`] without a kernel, which pass any
    /// descriptor that takes writes, such as one end of a packet socket.
    #[must_use]
    pub const fn new(device: Device, unique: Unique, opcode: Option<Opcode>) -> Self {
        Self {
            device,
            unique,
            opcode,
            answered: false,
            witness: None,
            is_again: false,
        }
    }

    /// Has the answer told to `witness` before it is sent.
    #[must_use]
    pub fn witnessed(mut self, witness: Arc<dyn Witness>) -> Self {
        self.witness = Some(witness);
        self
    }

    /// Says that somebody who died has begun to do what is asked, and may have done it.
    #[must_use]
    pub fn begun_before(mut self) -> Self {
        self.is_again = true;
        self
    }

    /// Whether what is asked may have been done already, by somebody who died before the answer.
    #[must_use]
    pub const fn may_be_done(&self) -> bool {
        self.is_again
    }

    /// The answer that a [`Witness`] was told.
    pub fn repeat(self, error: i32, bytes: &[u8]) -> Delivery {
        self.send(error, &[bytes])
    }

    /// The request's name.
    #[must_use]
    pub const fn unique(&self) -> Unique {
        self.unique
    }

    /// What was asked.
    #[must_use]
    pub const fn opcode(&self) -> Option<Opcode> {
        self.opcode
    }

    fn wants_answer(&self) -> bool {
        self.opcode.is_none_or(Opcode::is_answered)
    }

    fn send(mut self, error: i32, parts: &[&[u8]]) -> Delivery {
        self.answered = true;
        self.transmit(error, parts)
    }

    fn transmit(&self, error: i32, parts: &[&[u8]]) -> Delivery {
        if !self.wants_answer() {
            return Delivery::Delivered;
        }
        if let Some(witness) = &self.witness {
            witness.answering(self.unique.original(), error, parts);
        }
        match self.device.reply(self.unique, error, parts) {
            Ok(()) => Delivery::Delivered,
            // ENOENT: nobody waits for it any more. ENODEV, EPERM, ECONNABORTED: the connection is no more.
            Err(Errno::NOENT | Errno::NODEV | Errno::PERM | Errno::CONNABORTED) => {
                bump(&self.device.counters().replies_late);
                Delivery::Gone
            }
            Err(errno) => {
                bump(&self.device.counters().replies_refused);
                tracing::error!(
                    unique = self.unique.0,
                    opcode = self.opcode.map_or("unknown", Opcode::name),
                    %errno,
                    "the kernel refused a reply; its caller got EIO"
                );
                Delivery::Gone
            }
        }
    }

    /// Success without a result.
    pub fn ok(self) -> Delivery {
        self.send(0, &[])
    }

    /// Nothing, to a request that takes no answer (FORGET, BATCH_FORGET). Same as dropping it, but says so.
    pub fn none(self) {
        drop(self);
    }

    /// A real failure.
    pub fn error(self, errno: Errno) -> Delivery {
        self.send(-errno.raw_os_error(), &[])
    }

    /// A failure that a rule asked for.
    pub fn injected(self, errno: InjectedErrno) -> Delivery {
        bump(&self.device.counters().injected_errors);
        self.send(-errno.number(), &[])
    }

    /// "This kind of request is not supported"; for many opcodes the kernel never asks again.
    pub fn unsupported(self) -> Delivery {
        self.error(Errno::NOSYS)
    }

    /// The request's bytes made no sense: EIO, counted and logged.
    pub fn malformed(self, error: &DecodeError) -> Delivery {
        bump(&self.device.counters().malformed);
        tracing::error!(unique = self.unique.0, %error, "malformed request answered EIO");
        self.error(Errno::IO)
    }

    /// An inode, to LOOKUP, MKNOD, MKDIR, SYMLINK or LINK.
    #[must_use = "a reference to the inode was taken only if it was delivered"]
    pub fn entry(self, entry: &Entry) -> Delivery {
        self.send(0, &[abi::EntryOut::from(entry).as_bytes()])
    }

    /// "There is no such name", to LOOKUP, to be remembered by the kernel for as long as `valid`.
    pub fn negative_entry(self, valid: Duration) -> Delivery {
        let out = abi::EntryOut {
            entry_valid: valid.as_secs(),
            entry_valid_nsec: valid.subsec_nanos(),
            ..abi::EntryOut::default()
        };
        self.send(0, &[out.as_bytes()])
    }

    /// Attributes, to GETATTR or SETATTR, to be used by the kernel for as long as `valid`.
    pub fn attr(self, attr: &Attr, valid: Duration) -> Delivery {
        let out = abi::AttrOut {
            attr_valid: valid.as_secs(),
            attr_valid_nsec: valid.subsec_nanos(),
            dummy: 0,
            attr: attr.into(),
        };
        self.send(0, &[out.as_bytes()])
    }

    /// Attributes, to STATX, to be used by the kernel for as long as `valid`.
    pub fn statx(self, stat: &StatxAttr, valid: Duration) -> Delivery {
        let out = abi::StatxOut {
            attr_valid: valid.as_secs(),
            attr_valid_nsec: valid.subsec_nanos(),
            flags: 0,
            spare: [0; 2],
            stat: stat.into(),
        };
        self.send(0, &[out.as_bytes()])
    }

    /// An open file or directory, to OPEN or OPENDIR.
    #[must_use = "the kernel sends RELEASE for the handle only if it was delivered"]
    pub fn opened(self, opened: &Opened<'_>) -> Delivery {
        self.send(0, &[open_out(opened).as_bytes()])
    }

    /// A new inode and its open file, to CREATE or TMPFILE.
    #[must_use = "references to inode and handle were taken only if it was delivered"]
    pub fn created(self, entry: &Entry, opened: &Opened<'_>) -> Delivery {
        self.send(
            0,
            &[
                abi::EntryOut::from(entry).as_bytes(),
                open_out(opened).as_bytes(),
            ],
        )
    }

    /// Bytes, to READ or READLINK.
    pub fn data(self, data: &[u8]) -> Delivery {
        self.send(0, &[data])
    }

    /// Bytes in pieces, to READ.
    pub fn data_vectored(self, data: &[IoSlice<'_>]) -> Delivery {
        let parts: Vec<&[u8]> = data.iter().map(|slice| &**slice).collect();
        self.send(0, &parts)
    }

    /// Bytes in a pooled buffer ([`crate::Request::data_buffer`]), to READ.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "the buffer goes back to the pool once it was sent"
    )]
    pub fn buffer(self, data: DataBuffer) -> Delivery {
        self.send(0, &[&data])
    }

    /// Number of bytes written, to WRITE.
    pub fn written(self, size: u32) -> Delivery {
        self.send(0, &[abi::WriteOut { size, padding: 0 }.as_bytes()])
    }

    /// Number of bytes copied, to COPY_FILE_RANGE (where more than `u32::MAX` is told as that) and COPY_FILE_RANGE_64.
    pub fn copied(self, bytes: u64) -> Delivery {
        if self.opcode == Some(Opcode::CopyFileRange64) {
            self.send(
                0,
                &[abi::CopyFileRangeOut {
                    bytes_copied: bytes,
                }
                .as_bytes()],
            )
        } else {
            self.written(u32::try_from(bytes).unwrap_or(u32::MAX))
        }
    }

    /// To STATFS.
    pub fn statfs(self, stat: &StatFs) -> Delivery {
        self.send(0, &[abi::StatfsOut::from(stat).as_bytes()])
    }

    /// Size of an attribute or of the list, to GETXATTR or LISTXATTR with size 0.
    pub fn xattr_size(self, size: u32) -> Delivery {
        self.send(0, &[abi::GetxattrOut { size, padding: 0 }.as_bytes()])
    }

    /// The attribute or the list (names, each with its NUL), to GETXATTR or LISTXATTR with a size.
    pub fn xattr_data(self, data: &[u8]) -> Delivery {
        self.send(0, &[data])
    }

    /// The lock that is in the way, or one of kind `Unlock` if there is none, to GETLK.
    pub fn lock(self, lock: &FileLock) -> Delivery {
        self.send(0, &[abi::LkOut { lk: lock.into() }.as_bytes()])
    }

    /// Result of an ioctl and the bytes to be copied out. Restricted form: the kernel takes sizes from the command word.
    pub fn ioctl(self, result: i32, data: &[u8]) -> Delivery {
        let out = abi::IoctlOut {
            result,
            flags: 0,
            in_iovs: 0,
            out_iovs: 0,
        };
        self.send(0, &[out.as_bytes(), data])
    }

    /// The position found, to LSEEK.
    pub fn lseek(self, offset: u64) -> Delivery {
        self.send(0, &[abi::LseekOut { offset }.as_bytes()])
    }

    /// The events that are ready (`POLLIN` ...), to POLL.
    pub fn poll(self, events: u32) -> Delivery {
        self.send(
            0,
            &[abi::PollOut {
                revents: events,
                padding: 0,
            }
            .as_bytes()],
        )
    }

    /// The block on the device, to BMAP.
    pub fn bmap(self, block: u64) -> Delivery {
        self.send(0, &[abi::BmapOut { block }.as_bytes()])
    }

    /// Entries, to READDIR; none of them is the end of the directory.
    #[expect(clippy::needless_pass_by_value, reason = "a listing is sent once")]
    pub fn directory(self, listing: DirBuilder) -> Delivery {
        self.send(0, &[listing.as_bytes()])
    }

    /// Entries with attributes, to READDIRPLUS; none of them is the end of the directory.
    #[must_use = "references to the inodes were taken only if it was delivered"]
    #[expect(clippy::needless_pass_by_value, reason = "a listing is sent once")]
    pub fn directory_plus(self, listing: DirPlusBuilder) -> Delivery {
        self.send(0, &[listing.as_bytes()])
    }

    /// The answer to INIT.
    pub(crate) fn init(self, out: &abi::InitOut) -> Delivery {
        self.send(0, &[out.as_bytes()])
    }
}

fn open_out(opened: &Opened<'_>) -> abi::OpenOut {
    let mut out = abi::OpenOut {
        fh: opened.fh.0,
        open_flags: opened.mode.bits(),
        backing_id: 0,
    };
    if let Some(backing) = opened.backing {
        out.open_flags |= FOPEN_PASSTHROUGH;
        out.backing_id = backing.id().0.cast_signed();
    }
    out
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.answered && self.wants_answer() {
            bump(&self.device.counters().replies_dropped);
            tracing::error!(
                unique = self.unique.0,
                opcode = self.opcode.map_or("unknown", Opcode::name),
                "a request was dropped unanswered, its caller gets EIO; please report this bug"
            );
            self.transmit(-Errno::IO.raw_os_error(), &[]);
        }
    }
}
