//! What the server may tell the kernel unasked: backing files and notifications.
//!
//! Invariant: notifications are written by one thread of their own, in the order given. The kernel takes an inode's or
//! directory's lock to act on them, and the holder of that lock may be waiting for a reply of ours: a thread that serves
//! requests must never write one (`fuse_reverse_inval_entry`, fs/fuse/dir.c).

use std::ffi::CString;
use std::os::fd::BorrowedFd;
use std::sync::mpsc;
use std::time::Duration;

use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::abi;
use crate::device::Device;
use crate::ids::NodeId;

/// The kernel's number for a registered backing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BackingId(pub u32);

/// A registered backing file; unregistered when dropped. Open files that were answered with it keep theirs.
#[derive(Debug)]
pub struct Backing {
    id: BackingId,
    device: Device,
}

impl Backing {
    /// Its number.
    #[must_use]
    pub const fn id(&self) -> BackingId {
        self.id
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        if let Err(errno) = self.device.backing_close(self.id.0) {
            // After an abort the kernel has dropped all of them itself (fuse_backing_files_free, fs/fuse/backing.c).
            tracing::debug!(id = self.id.0, %errno, "a backing file could not be unregistered");
        }
    }
}

enum Notice {
    InvalInode {
        node: NodeId,
        offset: i64,
        len: i64,
    },
    InvalEntry {
        parent: NodeId,
        name: CString,
        expire_only: bool,
    },
    Delete {
        parent: NodeId,
        child: NodeId,
        name: CString,
    },
    Resend(mpsc::SyncSender<Result<(), Errno>>),
    IncEpoch,
    Barrier(mpsc::SyncSender<()>),
}

/// A handle on the kernel's side of the connection. Cheap to clone. The thread that writes notifications ends with the last
/// handle.
#[derive(Clone, Debug)]
pub struct Kernel {
    device: Device,
    notices: mpsc::Sender<Notice>,
}

impl Kernel {
    /// Starts the thread that writes notifications.
    pub(crate) fn start(device: Device) -> std::io::Result<Self> {
        let (notices, queue) = mpsc::channel();
        let writer = device.clone();
        std::thread::Builder::new()
            .name("fuse-notify".into())
            .spawn(move || deliver(&writer, &queue))?;
        Ok(Self { device, notices })
    }

    /// Registers a file so that opens may name it in [`crate::types::Opened::backing`]. Whoever calls this lends the file's
    /// credentials to passthrough writes: the kernel uses those of the calling thread (fuse_backing_open, fs/fuse/backing.c).
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN or without `Features::PASSTHROUGH`, ELOOP when the file's filesystem is stacked too deep,
    /// EBADF, ENOSPC, EOPNOTSUPP when it can neither be read nor written in place.
    pub fn backing_open(&self, file: BorrowedFd<'_>) -> Result<Backing, Errno> {
        let id = BackingId(self.device.backing_open(file)?);
        Ok(Backing {
            id,
            device: self.device.clone(),
        })
    }

    /// A file that a server which died has registered on this connection; the kernel keeps it registered until the connection ends.
    #[must_use]
    pub fn backing_adopt(&self, id: BackingId) -> Backing {
        Backing {
            id,
            device: self.device.clone(),
        }
    }

    /// The number of our descriptor of the connection.
    #[must_use]
    pub fn device_number(&self) -> std::os::fd::RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(&self.device))
    }

    /// Drops cached attributes of an inode and cached pages from `offset` on, for `len` bytes; `len` 0 or less means to the
    /// end, a negative `offset` means attributes only.
    pub fn inval_inode(&self, node: NodeId, offset: i64, len: i64) {
        self.queue(Notice::InvalInode { node, offset, len });
    }

    /// Drops a cached name (and what is below), or with `expire_only` merely has it looked up again
    /// (`Features::HAS_EXPIRE_ONLY`), which also works on a directory that is a mount point or in use.
    pub fn inval_entry(&self, parent: NodeId, name: CString, expire_only: bool) {
        self.queue(Notice::InvalEntry {
            parent,
            name,
            expire_only,
        });
    }

    /// Tells that a name has gone: like `inval_entry`, and watchers see the deletion, provided the name is of `child`.
    pub fn delete(&self, parent: NodeId, child: NodeId, name: CString) {
        self.queue(Notice::Delete {
            parent,
            child,
            name,
        });
    }

    /// Makes every cached name suspect at once, to be looked up again on next use (Linux 6.16; EINVAL, ignored, before).
    pub fn inc_epoch(&self) {
        self.queue(Notice::IncEpoch);
    }

    /// Asks the kernel to hand out again every request that was read and not answered (`Features::HAS_RESEND`).
    ///
    /// # Errors
    /// What the kernel said; EINVAL before Linux 6.9; ENODEV when the connection has gone.
    pub fn resend(&self) -> Result<(), Errno> {
        let (answer, wait) = mpsc::sync_channel(1);
        self.queue(Notice::Resend(answer));
        wait.recv().unwrap_or(Err(Errno::NODEV))
    }

    /// Waits until all notifications queued before have been acted upon. `false` when `timeout` passed first: the kernel may be
    /// waiting for a lock that the caller of an unanswered request holds.
    #[must_use]
    pub fn flush(&self, timeout: Duration) -> bool {
        let (answer, wait) = mpsc::sync_channel(1);
        self.queue(Notice::Barrier(answer));
        wait.recv_timeout(timeout).is_ok()
    }

    fn queue(&self, notice: Notice) {
        // The receiver lives as long as this handle: its thread ends only when all senders have gone.
        let _ = self.notices.send(notice);
    }
}

fn deliver(device: &Device, queue: &mpsc::Receiver<Notice>) {
    for notice in queue {
        let result = match &notice {
            Notice::InvalInode { node, offset, len } => {
                let out = abi::NotifyInvalInodeOut {
                    ino: node.0,
                    off: *offset,
                    len: *len,
                };
                device.notify(abi::notify::INVAL_INODE, &[out.as_bytes()])
            }
            Notice::InvalEntry {
                parent,
                name,
                expire_only,
            } => {
                let out = abi::NotifyInvalEntryOut {
                    parent: parent.0,
                    namelen: name_len(name),
                    flags: if *expire_only {
                        abi::NOTIFY_EXPIRE_ONLY
                    } else {
                        0
                    },
                };
                device.notify(
                    abi::notify::INVAL_ENTRY,
                    &[out.as_bytes(), name.as_bytes_with_nul()],
                )
            }
            Notice::Delete {
                parent,
                child,
                name,
            } => {
                let out = abi::NotifyDeleteOut {
                    parent: parent.0,
                    child: child.0,
                    namelen: name_len(name),
                    padding: 0,
                };
                device.notify(
                    abi::notify::DELETE,
                    &[out.as_bytes(), name.as_bytes_with_nul()],
                )
            }
            Notice::IncEpoch => device.notify(abi::notify::INC_EPOCH, &[]),
            Notice::Resend(answer) => {
                let result = device.notify(abi::notify::RESEND, &[]);
                let _ = answer.send(result);
                result
            }
            Notice::Barrier(answer) => {
                let _ = answer.send(());
                Ok(())
            }
        };
        // ENOENT: the kernel has nothing of that name cached. ENODEV: it has no connection any more. Both are normal.
        if let Err(errno) = result
            && !matches!(
                errno,
                Errno::NOENT | Errno::NODEV | Errno::PERM | Errno::NOTDIR
            )
        {
            tracing::debug!(%errno, "the kernel refused a notification");
        }
    }
}

/// Length without the NUL. Names longer than the kernel's limit are refused by it with ENAMETOOLONG.
fn name_len(name: &CString) -> u32 {
    u32::try_from(name.as_bytes().len()).unwrap_or(u32::MAX)
}
