//! Open files and directories.
//!
//! Owns the table from the kernel's handle numbers to descriptions of backing files. Invariants: a number is never used again; a handle's
//! description is of its node's inode; a description that was moved from a program stays the program's own, so it is never closed behind its back and its
//! flags are those the program sees.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use hobble_fuse::{Fh, LockOwner, Tid, Unique};
use rustix::fs::OFlags;

use crate::adopt::Adopted;
use crate::legacy::fact::{self, Fact};
use crate::legacy::{Claims, Estate, Log};
use crate::lock::{lock, read, write};
use crate::locks::Class;
use crate::store::Node;

/// One open file or directory of the hook.
pub(crate) struct Handle {
    pub(crate) fh: Fh,
    pub(crate) node: Arc<Node>,
    /// The description of the backing file.
    pub(crate) file: Arc<OwnedFd>,
    /// The description was moved here from a program.
    pub(crate) adopted: Option<Arc<Adopted>>,
    /// Access mode.
    pub(crate) access: OFlags,
    /// Status flags that `file` has now ([`SETTABLE`]).
    status: AtomicU32,
    /// All flags of the open, for those that never change.
    pub(crate) opened_with: OFlags,
    /// Reads and writes come to the server.
    pub(crate) direct: bool,
    /// Who opened it: the caller of its RELEASE, which names nobody.
    pub(crate) opener: Tid,
    /// Who owns OFD locks taken through this handle, once known.
    pub(crate) ofd_owner: Mutex<Option<LockOwner>>,
    /// The description has been given back to the program: what happens to this handle no longer concerns its locks.
    pub(crate) given_back: AtomicBool,
    /// Another open file has taken its place, and its locks.
    pub(crate) superseded: AtomicBool,
    /// Which one.
    pub(crate) successor: Mutex<Option<Fh>>,
    /// It takes the place of another.
    pub(crate) is_successor: AtomicBool,
    /// In which round of [arrivals](crate::Mirror::arrived) it is put in place of what it stands in for; 0 for what programs open themselves.
    pub(crate) arrives: AtomicU64,
    /// By which name the lock table knows the owner of OFD locks, if this open file has taken the place of another.
    pub(crate) known_as: Mutex<Option<LockOwner>>,
    /// The request that it is made for; 0 for none.
    pub(crate) made_for: Unique,
    log: Log,
    /// Position of a directory's description; requests of one open directory are served one at a time.
    pub(crate) directory: Mutex<Option<u64>>,
}

/// Status flags that `fcntl(F_SETFL)` can change, and which have a meaning for the backing file.
pub(crate) const SETTABLE: OFlags = OFlags::APPEND
    .union(OFlags::DIRECT)
    .union(OFlags::NOATIME)
    .union(OFlags::NONBLOCK);

/// What a handle is made of.
#[derive(Clone)]
pub(crate) struct New {
    pub(crate) node: Arc<Node>,
    pub(crate) file: Arc<OwnedFd>,
    pub(crate) adopted: Option<Arc<Adopted>>,
    pub(crate) flags: OFlags,
    pub(crate) direct: bool,
    pub(crate) opener: Tid,
    /// The request that it is made for; 0 for none.
    pub(crate) made_for: Unique,
}

impl Handle {
    /// Tells the log what has changed about it. No lock of it may be held.
    pub(crate) fn say(&self) {
        self.log.say(|| self.fact());
    }

    fn fact(&self) -> Fact {
        let owner = |owner: &Mutex<Option<LockOwner>>| lock(owner).map(|owner| owner.0);
        Fact::Handle(fact::Handle {
            fh: self.fh.0,
            node: self.node.id.0,
            file: self.file.as_raw_fd(),
            adopted: self.adopted.as_ref().map(|adopted| adopted.id.number()),
            flags: self.opened_with.bits(),
            direct: self.direct,
            opener: self.opener.0,
            made_for: self.made_for.0,
            ofd_owner: owner(&self.ofd_owner),
            known_as: owner(&self.known_as),
            given_back: self.given_back.load(Ordering::Acquire),
            superseded: self.superseded.load(Ordering::Acquire),
            successor: lock(&self.successor).map(|fh| fh.0),
            is_successor: self.is_successor.load(Ordering::Acquire),
            arrives: self.arrives.load(Ordering::Acquire),
        })
    }

    /// Which side of the attachment it comes from.
    pub(crate) fn class(&self) -> Class {
        if self.adopted.is_some() {
            Class::Moved
        } else {
            Class::Opened
        }
    }

    /// Gives the description the status flags that the client's has at this moment: requests carry them, `F_SETFL` sends no request.
    pub(crate) fn follow_flags(&self, flags: OFlags) -> io::Result<()> {
        let wanted = flags & SETTABLE;
        let present = OFlags::from_bits_retain(self.status.load(Ordering::Relaxed));
        if wanted == present {
            return Ok(());
        }
        let all = rustix::fs::fcntl_getfl(self.file.as_fd())?;
        rustix::fs::fcntl_setfl(self.file.as_fd(), all.difference(SETTABLE) | wanted)?;
        self.status.store(wanted.bits(), Ordering::Relaxed);
        Ok(())
    }

    /// By which name the lock table knows an owner that the kernel names on this handle.
    pub(crate) fn canonical(&self, owner: LockOwner) -> LockOwner {
        if *lock(&self.ofd_owner) == Some(owner) {
            return lock(&self.known_as).unwrap_or(owner);
        }
        owner
    }

    /// Who owns the OFD locks of this open file in the lock table, if it is known.
    pub(crate) fn ofd_owner(&self) -> Option<LockOwner> {
        let own: Option<LockOwner> = *lock(&self.ofd_owner);
        lock(&self.known_as).or(own)
    }

    /// Status flags as last seen.
    pub(crate) fn status(&self) -> OFlags {
        OFlags::from_bits_retain(self.status.load(Ordering::Relaxed))
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.access != OFlags::RDONLY
    }
}

/// All open files and directories.
pub(crate) struct Handles {
    next: AtomicU64,
    open: RwLock<HashMap<u64, Arc<Handle>>>,
    log: Log,
}

impl Handles {
    pub(crate) fn new(log: Log) -> Self {
        Self {
            next: AtomicU64::new(1),
            open: RwLock::default(),
            log,
        }
    }

    /// The open files of a mirror that has died.
    pub(crate) fn restore(
        estate: &Estate,
        claims: &mut Claims,
        log: Log,
        node: impl Fn(u64) -> Option<Arc<Node>>,
        adopted: impl Fn(u64) -> Option<Arc<Adopted>>,
    ) -> io::Result<Self> {
        let handles = Self::new(log);
        handles.next.store(estate.next_fh.max(1), Ordering::Relaxed);
        let mut open = HashMap::new();
        for known in estate.handles.values() {
            let missing = || io::Error::from(io::ErrorKind::InvalidData);
            let new = New {
                node: node(known.node).ok_or_else(missing)?,
                file: claims.get(known.file)?,
                adopted: match known.adopted {
                    Some(id) => Some(adopted(id).ok_or_else(missing)?),
                    None => None,
                },
                flags: OFlags::from_bits_retain(known.flags),
                direct: known.direct,
                opener: Tid(known.opener),
                made_for: Unique(0),
            };
            let handle = handles.make(Fh(known.fh), new);
            *lock(&handle.ofd_owner) = known.ofd_owner.map(LockOwner);
            *lock(&handle.known_as) = known.known_as.map(LockOwner);
            *lock(&handle.successor) = known.successor.map(Fh);
            handle.given_back.store(known.given_back, Ordering::Release);
            handle.superseded.store(known.superseded, Ordering::Release);
            handle
                .is_successor
                .store(known.is_successor, Ordering::Release);
            handle.arrives.store(known.arrives, Ordering::Release);
            open.insert(known.fh, Arc::new(handle));
        }
        *write(&handles.open) = open;
        Ok(handles)
    }

    /// Says everything that there is to be known of them.
    pub(crate) fn say_all(&self) {
        let open = read(&self.open);
        for handle in open.values() {
            handle.say();
        }
    }

    /// The number of the next one.
    pub(crate) fn next(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    pub(crate) fn insert(&self, new: New) -> Arc<Handle> {
        let fh = Fh(self.next.fetch_add(1, Ordering::Relaxed));
        let handle = Arc::new(self.make(fh, new));
        let mut open = write(&self.open);
        handle.say();
        open.insert(fh.0, Arc::clone(&handle));
        handle
    }

    fn make(&self, fh: Fh, new: New) -> Handle {
        // Not what the client's description has: one that is shared with an earlier handle may be behind, since F_SETFL sends no request, and no request at all comes
        // in passthrough. fcntl(2) has F_GETFL fail for a bad descriptor alone.
        let status = rustix::fs::fcntl_getfl(new.file.as_fd()).unwrap_or(new.flags) & SETTABLE;
        Handle {
            fh,
            node: new.node,
            file: new.file,
            adopted: new.adopted,
            access: new.flags & OFlags::ACCMODE,
            status: AtomicU32::new(status.bits()),
            opened_with: new.flags,
            direct: new.direct,
            opener: new.opener,
            ofd_owner: Mutex::new(None),
            given_back: AtomicBool::new(false),
            superseded: AtomicBool::new(false),
            successor: Mutex::new(None),
            is_successor: AtomicBool::new(false),
            arrives: AtomicU64::new(0),
            known_as: Mutex::new(None),
            directory: Mutex::new(None),
            made_for: new.made_for,
            log: self.log.clone(),
        }
    }

    pub(crate) fn get(&self, fh: Fh) -> io::Result<Arc<Handle>> {
        read(&self.open)
            .get(&fh.0)
            .cloned()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    pub(crate) fn remove(&self, fh: Fh) -> Option<Arc<Handle>> {
        let mut open = write(&self.open);
        let removed = open.remove(&fh.0);
        if removed.is_some() {
            self.log.say(|| Fact::HandleGone { fh: fh.0 });
        }
        removed
    }

    /// All handles, at some moment.
    pub(crate) fn all(&self) -> Vec<Arc<Handle>> {
        read(&self.open).values().cloned().collect()
    }

    /// Chosen handles, at some moment.
    pub(crate) fn select(&self, choose: impl Fn(&Handle) -> bool) -> Vec<Arc<Handle>> {
        let open = read(&self.open);
        let chosen = open.values().filter(|handle| choose(handle));
        chosen.cloned().collect()
    }

    /// Any open description of a node.
    pub(crate) fn any_of(&self, node: &Node) -> Option<Arc<OwnedFd>> {
        read(&self.open)
            .values()
            .find(|handle| handle.node.id == node.id)
            .map(|handle| Arc::clone(&handle.file))
    }

    pub(crate) fn len(&self) -> usize {
        read(&self.open).len()
    }

    /// Whether a handle's own (OFD) locks belong to this owner.
    pub(crate) fn is_ofd_owner(&self, fh: Fh, owner: LockOwner) -> bool {
        self.get(fh)
            .is_ok_and(|handle| handle.ofd_owner() == Some(owner))
    }
}
