//! How a regular file's data gets from and to the program.
//!
//! Owns the choice between I/O in the kernel on the backing file (passthrough) and I/O through the server, and the one registered backing file of each inode.
//! Invariants, each of which the kernel answers with EIO when broken (fs/fuse/iomode.c): while an inode is open, all its opens are passthrough or none is; all name the same
//! backing file; it stays registered until the last handle has been released. DIRECT_IO is chosen per open: exactly when a rule may want to see its reads or writes.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, UNIX_EPOCH};

use hobble_fuse::types::OpenMode;
use hobble_fuse::{Backing, Errno};
use rustix::fs::OFlags;

use crate::legacy::Fact;
use crate::lock::lock;
use crate::mirror::Inner;
use crate::store::{Io, Node, Seen};
use crate::sys::identity::{self, Setid, Who};

/// How one open does its I/O.
pub(crate) struct Chosen {
    pub(crate) mode: OpenMode,
    pub(crate) backing: Option<Arc<Backing>>,
}

/// What would show that a file has changed.
fn look(file: &OwnedFd) -> Option<Seen> {
    let stat = crate::store::stat(file.as_fd()).ok()?;
    Some((
        stat.stx_size,
        (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
        (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
    ))
}

/// Whether a change from now on must show in the times: they are as coarse as the timer tick on some filesystems (current_time, fs/inode.c).
fn is_settled(seen: &Seen) -> bool {
    /// Longer than any tick.
    const TICK: Duration = Duration::from_millis(20);
    let (_, _, (secs, nanos)) = seen;
    let changed = u64::try_from(*secs).map(|secs| UNIX_EPOCH + Duration::new(secs, *nanos));
    changed.is_ok_and(|changed| changed.elapsed().is_ok_and(|age| age > TICK))
}

impl Inner {
    /// Chooses the I/O mode of one more open of a regular file. To be paired with [`Inner::leave_io`].
    pub(crate) fn enter_io(
        &self,
        node: &Node,
        file: &OwnedFd,
        flags: OFlags,
        direct: bool,
    ) -> Chosen {
        let mut data = lock(&node.data);
        let (io, is_new) = match (data.handles, data.io.take()) {
            (1.., Some(io)) => (io, false),
            _ => (self.register(file), true),
        };
        data.handles += 1;
        let backing = match &io {
            Io::Passthrough(backing) => Some(Arc::clone(backing)),
            Io::Served => None,
        };
        let seen = data.seen.take();
        data.io = Some(io);
        if is_new {
            node.say_io(&data);
        }
        drop(data);
        if backing.is_some() && flags & OFlags::ACCMODE == OFlags::RDWR {
            // The mapping outlives every handle and is seen by nobody (fuse_passthrough_mmap maps the backing file itself), so this is never taken back.
            node.note_mapping();
        }
        let mode = if direct {
            OpenMode::DIRECT_IO | OpenMode::PARALLEL_DIRECT_WRITES
        } else if backing.is_none() && seen.is_some() && seen == look(file) {
            // Cached pages are what is in the file: it is as it was when it was last closed.
            OpenMode::KEEP_CACHE
        } else {
            OpenMode::empty()
        };
        Chosen { mode, backing }
    }

    /// The kernel has released an open, or never got it.
    pub(crate) fn leave_io(&self, node: &Node, file: &OwnedFd) {
        let gone = {
            let mut data = lock(&node.data);
            data.handles = data.handles.saturating_sub(1);
            if data.handles == 0 && matches!(data.io, Some(Io::Served)) {
                data.seen = look(file).filter(is_settled);
            }
            // The kernel leaves the mode before it sends RELEASE (fuse_file_put, fs/fuse/file.c), so the next open may choose anew.
            if data.handles == 0 {
                let io = data.io.take();
                // Before the number of the backing file may become another's.
                node.say_io(&data);
                io
            } else {
                None
            }
        };
        drop(gone);
    }

    fn register(&self, file: &OwnedFd) -> Io {
        if !self.passthrough.load(Ordering::Relaxed) {
            return Io::Served;
        }
        let Some(kernel) = self.kernel.get() else {
            return Io::Served;
        };
        // The kernel writes with the credentials of whoever registers: not root's, or every writer could use what is reserved for root, and without
        // CAP_FSETID, or set-id bits would survive a write (kernel-hazards A6, A7). CAP_SYS_ADMIN is all that registering takes.
        let nobody = Who {
            uid: identity::OVERFLOW,
            gid: identity::OVERFLOW,
            groups: &[],
            setid: Setid::Clear,
            umask: 0,
        };
        let registered = identity::assume(nobody)
            .map_err(|error| crate::error::errno(&error))
            .and_then(|_guard| kernel.backing_open(file.as_fd()));
        match registered {
            Ok(backing) => Io::Passthrough(Arc::new(backing)),
            Err(errno) => {
                if matches!(
                    errno,
                    Errno::PERM | Errno::LOOP | Errno::OPNOTSUPP | Errno::INVAL
                ) && self.passthrough.swap(false, Ordering::Relaxed)
                {
                    self.log.say(|| Fact::NoPassthrough);
                    tracing::warn!(%errno, "no passthrough on this backing filesystem: reads and writes go through the server");
                }
                Io::Served
            }
        }
    }
}
