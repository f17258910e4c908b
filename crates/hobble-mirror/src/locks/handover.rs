//! Moving locks between a program's original descriptors and the hook.
//!
//! There is no atomic handover of POSIX locks: while the program holds a write lock nobody else, the server included, can have the range, and a `dup3` over any
//! descriptor of the file drops the program's locks (kernel-hazards B). The order that leaves a writer no gap and a reader only the moment of the downgrade is driven from above; here is the
//! server's part of it.
//!
//! In: the program turns write into read; [`Handover::take_read`]; the descriptors are exchanged; [`Handover::upgrade`]; the program sets its locks on the new
//! descriptors, between [`Handover::accept`] and [`Handover::finish`], which teaches the server the owner.
//! Out: [`Locks::downgrade`]; the program takes read locks on the original; [`Locks::release`]; the program turns read into write.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use hobble_fuse::{Fh, NodeId};
use rustix::fs::OFlags;

use super::table::{Class, Held};
use super::{LockKind, LockRange, LockTable, Owner};
use crate::adopt::HandleId;
use crate::lock::lock;
use crate::sys::lock as ofd;

/// Names the owner of byte-range locks on one inode, for as long as it holds any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OwnerId {
    node: NodeId,
    owner: Owner,
}

impl OwnerId {
    /// The inode.
    #[must_use]
    pub const fn node(self) -> NodeId {
        self.node
    }
}

/// One locked range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeLock {
    /// How.
    pub kind: LockKind,
    /// What.
    pub range: LockRange,
}

/// Somebody who holds byte-range locks through the hook.
#[derive(Clone, Debug)]
pub struct LockHolder {
    /// To be named in [`Locks::downgrade`], [`Locks::restore`] and [`Locks::release`].
    pub owner: OwnerId,
    /// The process that took them (thread group id, as the kernel sent it).
    pub pid: u32,
    /// Which side of the attachment its descriptors come from.
    pub class: Class,
    /// The handle's open file description is the owner (`F_OFD_SETLK`), not a process. Known only for handles that were moved or identified; others count as POSIX.
    pub ofd: bool,
    /// Handles the locks were taken through.
    pub handles: Vec<HandleId>,
    /// What is locked.
    pub ranges: Vec<RangeLock>,
}

/// The byte-range locks held through the hook.
pub struct Locks<'a> {
    pub(crate) table: &'a Arc<LockTable>,
    pub(crate) is_ofd: &'a dyn Fn(Fh, hobble_fuse::LockOwner) -> bool,
}

impl Locks<'_> {
    /// Everybody who holds something.
    #[must_use]
    pub fn held(&self) -> Vec<LockHolder> {
        let state = lock(&self.table.state);
        let mut holders = Vec::new();
        for (node, inode) in &state.inodes {
            for owner in inode.table.owners() {
                let handles = inode.table.handles(owner);
                holders.push(LockHolder {
                    owner: OwnerId { node: *node, owner },
                    pid: inode.table.of(owner).next().map_or(0, |held| held.pid),
                    class: owner.class,
                    ofd: handles.iter().any(|fh| (self.is_ofd)(*fh, owner.kernel)),
                    handles: handles.into_iter().map(HandleId).collect(),
                    ranges: inode
                        .table
                        .of(owner)
                        .map(|held| RangeLock {
                            kind: held.kind,
                            range: held.range,
                        })
                        .collect(),
                });
            }
        }
        holders
    }

    /// Turns the server's write locks of this owner on the backing file into read locks, so that the program can take read locks there. The table does not change.
    ///
    /// # Errors
    /// What the filesystem says.
    pub fn downgrade(&self, owner: OwnerId) -> io::Result<()> {
        self.reapply(owner, |_| LockKind::Read)
    }

    /// Undoes [`Locks::downgrade`].
    ///
    /// # Errors
    /// `EAGAIN` when an outsider has taken a read lock meanwhile.
    pub fn restore(&self, owner: OwnerId) -> io::Result<()> {
        self.reapply(owner, |kind| kind)
    }

    /// Gives up all locks of this owner, in the table and on the backing file: the program holds them itself now.
    pub fn release(&self, owner: OwnerId) {
        self.table.flush(owner.node, owner.owner);
    }

    fn reapply(&self, id: OwnerId, kind: impl Fn(LockKind) -> LockKind) -> io::Result<()> {
        let state = lock(&self.table.state);
        let Some(inode) = state.inodes.get(&id.node) else {
            return Ok(());
        };
        let Some(description) = inode.files.get(&id.owner) else {
            return Ok(());
        };
        for held in inode.table.of(id.owner) {
            description.set(Some(kind(held.kind)), held.range)?;
        }
        Ok(())
    }
}

/// One process's POSIX locks on one file, on their way to the hook. Dropped unfinished, it gives up what it has taken.
#[must_use]
pub struct Handover {
    table: Arc<LockTable>,
    node: NodeId,
    file: Arc<OwnedFd>,
    access: OFlags,
    pids: Arc<[u32]>,
    windows: Vec<Fh>,
    /// Whom the locks are added to.
    joined: Option<Joined>,
    finished: bool,
}

/// An owner that held locks on the hook before the handover.
struct Joined {
    owner: Owner,
    /// What it held.
    before: Vec<Held>,
    /// What it was to hold besides.
    added: Mutex<Vec<LockRange>>,
}

impl Handover {
    pub(crate) fn begin(
        table: Arc<LockTable>,
        node: NodeId,
        original: &OwnedFd,
    ) -> io::Result<Self> {
        let open = |access| crate::fd::reopen(original.as_fd(), access | OFlags::NONBLOCK);
        // On a read-only filesystem there can be read locks only.
        let (file, access) = match open(OFlags::RDWR) {
            Ok(file) => (file, OFlags::RDWR),
            Err(_) => (open(OFlags::RDONLY)?, OFlags::RDONLY),
        };
        table.callers.holds_locks_on(file.as_fd(), 0);
        Ok(Self {
            table,
            node,
            file: Arc::new(file),
            access,
            pids: Arc::from([]),
            windows: Vec::new(),
            joined: None,
            finished: false,
        })
    }

    /// Whether this owner's locks are on the handover's file.
    #[must_use]
    pub fn is_of(&self, owner: OwnerId) -> bool {
        owner.node == self.node
    }

    /// Says that the process holds locks on the file through the hook already, moved there earlier, as this owner: those handed over now are added to them, on the
    /// same description. (Held on another they would be released with it.) To be called before anything is taken.
    ///
    /// # Errors
    /// What taking them on a description that may write says, where they were held on one that may not.
    pub fn join(&mut self, id: OwnerId) -> io::Result<()> {
        let mut state = lock(&self.table.state);
        let Some(inode) = state.inodes.get_mut(&self.node) else {
            return Ok(());
        };
        let before: Vec<Held> = inode.table.of(id.owner).collect();
        let Some(present) = inode.files.get(&id.owner).filter(|_| id.node == self.node) else {
            return Ok(());
        };
        if present.access == self.access || present.access == OFlags::RDWR {
            self.file = Arc::clone(&present.file);
            self.access = present.access;
        } else {
            // What is held on a description that may only read is shared, so a second one can hold it as well before the first lets go.
            for held in &before {
                ofd::set(self.file.as_fd(), Some(held.kind), held.range)?;
            }
            let wider = super::Description {
                file: Arc::clone(&self.file),
                access: self.access,
            };
            if let Some(held) = before.first() {
                self.table
                    .callers
                    .holds_locks_on(wider.file.as_fd(), held.pid);
            }
            inode.closing.extend(inode.files.insert(id.owner, wider));
            self.table.say(&mut state, id.node);
        }
        self.joined = Some(Joined {
            owner: id.owner,
            before,
            added: Mutex::default(),
        });
        Ok(())
    }

    fn note(&self, range: LockRange) {
        if let Some(joined) = &self.joined {
            lock(&joined.added).push(range);
        }
    }

    /// Takes a shared lock on the backing file; the program's own lock on the range must be a shared one.
    ///
    /// # Errors
    /// `EAGAIN` when somebody holds a write lock.
    pub fn take_read(&self, range: LockRange) -> io::Result<()> {
        self.note(range);
        ofd::set(self.file.as_fd(), Some(LockKind::Read), range)
    }

    /// Makes a shared lock an exclusive one; the program's own locks must be gone.
    ///
    /// # Errors
    /// `EAGAIN` when somebody else shares the range: an outsider got in at the downgrade.
    pub fn upgrade(&self, range: LockRange) -> io::Result<()> {
        self.note(range);
        ofd::set(self.file.as_fd(), Some(LockKind::Write), range)
    }

    /// Gives up a range again.
    ///
    /// # Errors
    /// What the filesystem says.
    pub fn give_up(&self, range: LockRange) -> io::Result<()> {
        ofd::set(self.file.as_fd(), None, range)?;
        // It may have shared a part of it before.
        let before = self.joined.iter().flat_map(|joined| &joined.before);
        for held in before.filter(|held| held.range.overlaps(range)) {
            ofd::set(self.file.as_fd(), Some(held.kind), held.range)?;
        }
        Ok(())
    }

    /// Says whose locks these are (thread group ids), where several processes hand over locks through the same handles. To be called before [`Handover::accept`].
    pub fn limit_to(&mut self, pids: &[u32]) {
        self.pids = Arc::from(pids);
    }

    /// From now on locks that arrive on these handles are the ones being handed over: their owner is the process, and it holds them on this handover's description.
    pub fn accept(&mut self, handles: &[HandleId]) {
        let mut state = lock(&self.table.state);
        for handle in handles {
            state
                .windows
                .entry(handle.0)
                .or_default()
                .push(super::Window {
                    file: Arc::clone(&self.file),
                    access: self.access,
                    pids: Arc::clone(&self.pids),
                });
            self.windows.push(handle.0);
        }
    }

    /// Ends the registration. Says what is registered now.
    #[must_use]
    pub fn finish(mut self) -> Vec<RangeLock> {
        self.finished = true;
        self.close();
        let state = lock(&self.table.state);
        let Some(inode) = state.inodes.get(&self.node) else {
            return Vec::new();
        };
        let mine = inode
            .files
            .iter()
            .filter(|(_, description)| Arc::ptr_eq(&description.file, &self.file));
        mine.flat_map(|(owner, _)| inode.table.of(*owner))
            .map(|held| RangeLock {
                kind: held.kind,
                range: held.range,
            })
            .collect()
    }

    fn close(&self) {
        let mut state = lock(&self.table.state);
        for fh in &self.windows {
            if let Some(windows) = state.windows.get_mut(fh) {
                windows.retain(|window| !Arc::ptr_eq(&window.file, &self.file));
                if windows.is_empty() {
                    state.windows.remove(fh);
                }
            }
        }
    }
}

impl Drop for Handover {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        self.close();
        if let Some(joined) = &self.joined {
            let added = std::mem::take(&mut *lock(&joined.added));
            for range in added {
                if let Err(error) = self.give_up(range) {
                    tracing::warn!(%error, "a range of a handover that did not happen stays locked");
                }
            }
            let mut state = lock(&self.table.state);
            if let Some(inode) = state.inodes.get_mut(&self.node) {
                inode.table.restore(joined.owner, &joined.before);
                self.table.say(&mut state, self.node);
            }
            return;
        }
        let owners: Vec<Owner> = {
            let state = lock(&self.table.state);
            let files = state.inodes.get(&self.node).map(|inode| &inode.files);
            let mine = files
                .into_iter()
                .flatten()
                .filter(|(_, description)| Arc::ptr_eq(&description.file, &self.file));
            mine.map(|(owner, _)| *owner).collect()
        };
        for owner in owners {
            self.table.flush(self.node, owner);
        }
    }
}

impl LockTable {
    /// Records what a moved description already holds, on that very description.
    pub(crate) fn register_ofd(
        &self,
        node: NodeId,
        fh: Fh,
        owner: hobble_fuse::LockOwner,
        original: &Arc<OwnedFd>,
        pid: u32,
        ranges: &[RangeLock],
    ) {
        let mut state = lock(&self.state);
        let inode = state.inodes.entry(node).or_default();
        let owner = Owner {
            kernel: owner,
            class: Class::Moved,
        };
        // Whatever it may do with locks it could do with the original: the kernel checks the stand-in's access mode, which is the same.
        let description = super::Description {
            file: Arc::clone(original),
            access: OFlags::RDWR,
        };
        inode.files.insert(owner, description);
        for RangeLock { kind, range } in ranges {
            inode.table.set(owner, fh, pid, Some(*kind), *range);
        }
        self.say(&mut state, node);
    }

    /// The description on which a handle's own (OFD) locks are held, if it holds any.
    pub(crate) fn ofd_description(
        &self,
        node: NodeId,
        owner: Owner,
    ) -> Option<(Arc<OwnedFd>, Vec<RangeLock>)> {
        let state = lock(&self.state);
        let inode = state.inodes.get(&node)?;
        let file = Arc::clone(&inode.files.get(&owner)?.file);
        let ranges: Vec<RangeLock> = inode
            .table
            .of(owner)
            .map(|held| RangeLock {
                kind: held.kind,
                range: held.range,
            })
            .collect();
        (!ranges.is_empty()).then_some((file, ranges))
    }
}
