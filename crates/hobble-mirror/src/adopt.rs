//! Descriptors that were moved to the hook, and giving the originals back.
//!
//! Owns the original open file descriptions for as long as something of the hook stands in for them. Invariants: an original is never replaced by a re-opened
//! one (its flock and OFD locks, and whoever shares it, depend on it); one description of the server per moved description; a stand-in is opened from the calling
//! thread, on a mount that need not be attached anywhere, and no other thread ever sees a name that was made up for it.
//!
//! How a stand-in is found: along the path the original had; if that leads elsewhere or nowhere, by a name that only the calling thread can look up and that the kernel
//! is told has gone, so that `/proc/<pid>/fd` shows `(deleted)` as it did before; an original without any name that may still get one (`O_TMPFILE`) by an `O_TMPFILE` of
//! our own, since the kernel remembers on the inode that it may be linked (`I_LINKABLE`, fs/namei.c `vfs_link`).
//!
//! Length: the whole contract with whoever moves descriptors, in one place.

use std::collections::{BTreeSet, HashMap};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hobble_fuse::{Fh, LockOwner, NodeId};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags};

use crate::door::{Alias, Door, Purpose};
use crate::handle::{Handle, SETTABLE};
use crate::legacy::fact::{self, Fact};
use crate::legacy::{Claims, Estate, Log};
use crate::lock::lock;
use crate::locks::{Class, Handover, Owner, RangeLock};
use crate::mirror::{Inner, Mirror};
use crate::store::Node;
use crate::sys::lock as ofd;

/// Names a moved description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AdoptedId(u64);

/// Names an open file of the hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HandleId(pub(crate) Fh);

impl AdoptedId {
    pub(crate) const fn number(self) -> u64 {
        self.0
    }
}

impl HandleId {
    /// A number that no other open file of this hook has or had.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.0.0
    }
}

/// What is known about a description that is to be moved.
#[derive(Clone, Debug, Default)]
pub struct Adoption {
    /// Its path below the volume, without a leading slash (empty for the volume itself): the one it was last known by.
    pub path: Vec<u8>,
    /// The path no longer leads to it: it was unlinked or removed.
    pub deleted: bool,
    /// It was made by `O_TMPFILE` without `O_EXCL` and has no name so far.
    pub tmpfile: bool,
    /// Some program that is being moved has the file mapped shared.
    pub mapped: bool,
    /// OFD locks that it holds.
    pub ofd_locks: Vec<RangeLock>,
    /// The process it was found in.
    pub pid: u32,
}

/// A moved description.
#[derive(Debug)]
pub(crate) struct Adopted {
    pub(crate) id: AdoptedId,
    pub(crate) node: Arc<Node>,
    pub(crate) original: Arc<OwnedFd>,
    /// A stand-in has taken its place, so that the program has it through the hook alone.
    pub(crate) replaced: AtomicBool,
    facts: Adoption,
    /// Directories above it that were referred to for the sake of its path.
    above: Vec<NodeId>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node")
            .field("id", &self.id)
            .field("inode", &self.inode)
            .finish_non_exhaustive()
    }
}

impl Adopted {
    fn fact(&self) -> Fact {
        Fact::Adopted(fact::Adopted {
            id: self.id.0,
            node: self.node.id.0,
            original: self.original.as_raw_fd(),
            replaced: self.replaced.load(Ordering::Acquire),
            path: self.facts.path.clone(),
            deleted: self.facts.deleted,
            tmpfile: self.facts.tmpfile,
            pid: self.facts.pid,
            above: self.above.iter().map(|node| node.0).collect(),
        })
    }
}

/// All moved descriptions.
#[derive(Default)]
pub(crate) struct Table {
    next: AtomicU64,
    adopted: Mutex<HashMap<AdoptedId, Arc<Adopted>>>,
    log: Log,
}

impl Table {
    pub(crate) fn new(log: Log) -> Self {
        Self {
            log,
            ..Self::default()
        }
    }

    /// The moved descriptions of a mirror that has died.
    pub(crate) fn restore(
        estate: &mut Estate,
        claims: &mut Claims,
        log: Log,
        node: impl Fn(u64) -> Option<Arc<Node>>,
    ) -> io::Result<Self> {
        let table = Self::new(log);
        table.next.store(estate.next_adopted, Ordering::Relaxed);
        let mut adopted = HashMap::new();
        for known in estate.adopted.values_mut() {
            let id = AdoptedId(known.id);
            let restored = Adopted {
                id,
                node: node(known.node).ok_or(io::ErrorKind::InvalidData)?,
                original: claims.get(known.original)?,
                replaced: AtomicBool::new(known.replaced),
                facts: Adoption {
                    path: std::mem::take(&mut known.path),
                    deleted: known.deleted,
                    tmpfile: known.tmpfile,
                    // Registered when its stand-in was opened.
                    ofd_locks: Vec::new(),
                    // Asked when a stand-in is opened, which it has.
                    mapped: false,
                    pid: known.pid,
                },
                above: known.above.iter().map(|node| NodeId(*node)).collect(),
            };
            adopted.insert(id, Arc::new(restored));
        }
        *lock(&table.adopted) = adopted;
        Ok(table)
    }

    pub(crate) fn find(&self, id: u64) -> Option<Arc<Adopted>> {
        lock(&self.adopted).get(&AdoptedId(id)).cloned()
    }

    /// Says everything that there is to be known of them.
    pub(crate) fn say_all(&self) {
        for adopted in lock(&self.adopted).values() {
            self.log.say(|| adopted.fact());
        }
    }

    /// The number of the next one.
    pub(crate) fn next(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }
}

/// What is known about an open file of the hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandleInfo {
    /// The handle; `None` for a descriptor that has none (`O_PATH`).
    pub handle: Option<HandleId>,
    /// Its inode.
    pub node: NodeId,
    /// The moved description it stands in for.
    pub adopted: Option<AdoptedId>,
    /// Which side of the attachment it comes from.
    pub class: Class,
    /// Its reads and writes come to the server.
    pub direct: bool,
    /// It was opened with `O_NOFOLLOW`, as `F_GETFL` goes on to tell of a descriptor without a handle.
    pub nofollow: bool,
}

/// Number of the private ioctl by which an open file of the hook says which one it is: `_IOR('h', 0x4f, [u64; 4])`. Answered to door threads only.
pub(crate) const IDENTIFY: u32 = 2 << 30 | (Identity::LEN as u32) << 16 | (b'h' as u32) << 8 | 0x4f;

/// The answer to [`IDENTIFY`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    fh: u64,
    node: u64,
    adopted: u64,
    direct: bool,
}

impl Identity {
    pub(crate) const LEN: usize = 32;

    pub(crate) fn of(handle: &Handle) -> Self {
        Self {
            fh: handle.fh.0,
            node: handle.node.id.0,
            adopted: handle
                .adopted
                .as_ref()
                .map_or(u64::MAX, |adopted| adopted.id.0),
            direct: handle.direct,
        }
    }

    pub(crate) fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        let words = [self.fh, self.node, self.adopted, u64::from(self.direct)];
        for (target, word) in bytes.chunks_exact_mut(8).zip(words) {
            target.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        let mut words = [0; 4];
        for (word, source) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = source
                .try_into()
                .map(u64::from_ne_bytes)
                .unwrap_or_default();
        }
        let [fh, node, adopted, direct] = words;
        Self {
            fh,
            node,
            adopted,
            direct: direct != 0,
        }
    }
}

/// What of a description's flags its stand-in is opened with.
const MIRRORED: OFlags = OFlags::ACCMODE
    .union(SETTABLE)
    .union(OFlags::SYNC)
    .union(OFlags::DSYNC)
    .union(OFlags::DIRECTORY)
    .union(OFlags::PATH);

/// The flags to open a stand-in with for a description with these.
fn mirrored(flags: OFlags) -> OFlags {
    // F_GETFL goes on to tell how a file was made, and half of O_TMPFILE is O_DIRECTORY.
    let flags = if flags.contains(OFlags::TMPFILE) {
        flags.difference(OFlags::TMPFILE)
    } else {
        flags
    };
    flags & MIRRORED
}

/// How long to wait until the kernel has dropped a made-up name.
const SETTLE: Duration = Duration::from_millis(500);

impl Mirror {
    /// Takes over the original of a description that is to be moved. The caller may share it or close its own copy: the mirror keeps the description open.
    ///
    /// # Errors
    /// `EXDEV` when the file is not on a filesystem of this mirror; what reading its attributes says.
    pub fn adopt(
        &self,
        original: impl Into<Arc<OwnedFd>>,
        facts: Adoption,
    ) -> io::Result<AdoptedId> {
        let original = original.into();
        let inner = &self.inner;
        let path = (!facts.deleted).then_some(facts.path.as_slice());
        let node = inner.store.adopt(original.as_fd(), path)?;
        if facts.mapped {
            node.was_mapped.store(true, Ordering::Release);
        }
        let mut above = Vec::new();
        if node.with_names(|names| names.first().is_none()) {
            // For the rules: it is matched by the path it was last known by.
            above = inner.learn_path(&node, &facts.path);
        }
        let id = AdoptedId(inner.adopted.next.fetch_add(1, Ordering::Relaxed));
        let adopted = Adopted {
            id,
            node,
            original,
            replaced: AtomicBool::new(false),
            facts,
            above,
        };
        let mut known = lock(&inner.adopted.adopted);
        inner.adopted.log.say(|| adopted.fact());
        known.insert(id, Arc::new(adopted));
        Ok(id)
    }

    /// Forgets a moved description that nothing stands in for. Happens by itself when the last stand-in that has a handle (all but `O_PATH`) was closed by its programs:
    /// that closes the original, as it would have been without the hook.
    pub fn disown(&self, id: AdoptedId) {
        self.inner.disown(id);
    }

    /// Says that a stand-in has taken the place of the original. Until then the program goes on with the original, so that closing the stand-in (the exchange was given up) leaves the
    /// original's OFD locks alone; from then on it ends them.
    pub fn replaced(&self, id: AdoptedId) {
        if let Ok(adopted) = self.inner.adopted(id) {
            let _known = lock(&self.inner.adopted.adopted);
            adopted.replaced.store(true, Ordering::Release);
            self.inner.adopted.log.say(|| adopted.fact());
        }
    }

    /// Another descriptor of the original of a moved description.
    ///
    /// # Errors
    /// `EINVAL` for an unknown id; `EMFILE`.
    pub fn original(&self, id: AdoptedId) -> io::Result<OwnedFd> {
        self.inner.adopted(id)?.original.try_clone()
    }

    /// The number of the descriptor that keeps the original of a moved description: under it, a process that shares this one's descriptor table finds the original
    /// when this one has died. `None` for an unknown id.
    #[must_use]
    pub fn original_number(&self, id: AdoptedId) -> Option<RawFd> {
        self.inner
            .adopted(id)
            .ok()
            .map(|adopted| adopted.original.as_raw_fd())
    }

    /// Opens a stand-in for a moved description on `mount` (the hook's mount or its root directory), from the calling thread, which must not serve requests. Access
    /// mode and status flags are the original's, position and owner are the caller's to set.
    ///
    /// # Errors
    /// `EINVAL` for an unknown id; `ESTALE` when the file could not be reached in any way.
    pub fn stand_in(&self, mount: BorrowedFd<'_>, id: AdoptedId) -> io::Result<OwnedFd> {
        let inner = &self.inner;
        let adopted = inner.adopted(id)?;
        let original = rustix::fs::fcntl_getfl(&*adopted.original)?;
        let flags = mirrored(original);
        let is_path = flags.contains(OFlags::PATH);
        let flags = if is_path {
            // F_GETFL tells how it was opened. What was opened without it is no link.
            OFlags::PATH | (original & OFlags::NOFOLLOW)
        } else {
            flags
        } | OFlags::CLOEXEC;
        let guard = inner.doors.open(Purpose::StandIn(Arc::clone(&adopted)));
        let attempt = Attempt {
            inner,
            door: &guard.door,
            adopted: &adopted,
            mount,
            flags,
        };

        let mut opened = Err(io::Error::from_raw_os_error(libc::ESTALE));
        if !adopted.facts.deleted {
            opened = attempt.by_path();
        }
        if opened.is_err() && adopted.facts.tmpfile && !is_path {
            opened = attempt.by_tmpfile();
        }
        let stand_in = match opened {
            Ok(stand_in) => stand_in,
            Err(_) => attempt.by_alias()?,
        };
        if let Some(fh) = guard.door.opened() {
            if let Ok(handle) = inner.handles.get(fh) {
                let next = inner.arrivals.load(Ordering::Acquire) + 1;
                handle.arrives.store(next, Ordering::Release);
                handle.say();
            }
            inner.learn_ofd_owner(&guard.door, stand_in.as_fd(), fh, Some(&adopted));
        }
        Ok(stand_in)
    }

    /// Which open file of the hook a descriptor refers to. Teaches the mirror who owns the OFD locks taken through it.
    ///
    /// # Errors
    /// `ENOTTY` or `EXDEV` when it is none of this mirror's.
    pub fn identify(&self, fuse: BorrowedFd<'_>) -> io::Result<HandleInfo> {
        let inner = &self.inner;
        let guard = inner.doors.open(Purpose::Look);
        let flags = rustix::fs::fcntl_getfl(fuse)?;
        if flags.contains(OFlags::PATH) {
            let node = inner.node_behind(&guard.door, fuse)?;
            return Ok(HandleInfo {
                handle: None,
                node,
                adopted: None,
                class: Class::Opened,
                direct: false,
                nofollow: flags.contains(OFlags::NOFOLLOW),
            });
        }
        let identity = Identity::from_bytes(crate::sys::ioctl::identify(fuse, IDENTIFY)?);
        let handle = inner.handles.get(Fh(identity.fh))?;
        if handle.node.id.0 != identity.node {
            return Err(io::Error::from_raw_os_error(libc::EXDEV));
        }
        if handle.node.is_regular() {
            inner.learn_ofd_owner(&guard.door, fuse, handle.fh, None);
        }
        Ok(HandleInfo {
            handle: Some(HandleId(handle.fh)),
            node: handle.node.id,
            adopted: handle.adopted.as_ref().map(|adopted| adopted.id),
            class: handle.class(),
            direct: handle.direct,
            nofollow: flags.contains(OFlags::NOFOLLOW),
        })
    }

    /// A description of the backing file to replace an open file of the hook with: the kept original, or for a file opened while attached the
    /// backing description with its flags, OFD locks and flock. Position and owner are the caller's to set. From now on closing the hook's file leaves the
    /// description's locks alone; [`Mirror::keep`] takes that back.
    ///
    /// # Errors
    /// What opening says, for `O_PATH` descriptors; `EBADF` when the handle has gone.
    pub fn give_back(&self, info: &HandleInfo) -> io::Result<OwnedFd> {
        let inner = &self.inner;
        let Some(handle) = info.handle else {
            let node = inner
                .store
                .get(info.node)
                .ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))?;
            let nofollow = if info.nofollow {
                OFlags::NOFOLLOW
            } else {
                OFlags::empty()
            };
            return inner
                .store
                .open(&node, OFlags::PATH | nofollow | OFlags::CLOEXEC)
                .or_else(|error| {
                    // Unlinked, and held by nothing but a descriptor of ours.
                    inner.fd_of(&node).map_err(|_| error)?.try_clone()
                });
        };
        let handle = inner.handles.get(handle.0)?;
        let file = inner.handed_over(&handle)?;
        handle.given_back.store(true, Ordering::Release);
        handle.say();
        Ok(file)
    }

    /// Takes back [`Mirror::give_back`]: the hook's file stays in use.
    ///
    /// # Errors
    /// `EBADF` when the handle has gone.
    pub fn keep(&self, handle: HandleId) -> io::Result<()> {
        let handle = self.inner.handles.get(handle.0)?;
        handle.given_back.store(false, Ordering::Release);
        handle.say();
        Ok(())
    }

    /// Opens the file behind an open file of the hook once more, in the I/O mode that fits the present plan, on the same backing description. `fuse` is a
    /// descriptor of the open file to be replaced; position and owner are the caller's to set.
    ///
    /// # Errors
    /// As [`Mirror::identify`]; `ESTALE` when the kernel opened something else.
    pub fn reopen_stand_in(&self, fuse: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        let info = self.identify(fuse)?;
        let handle = info
            .handle
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))?;
        let handle = self.inner.handles.get(handle.0)?;
        let flags = mirrored(rustix::fs::fcntl_getfl(fuse)?);
        let guard = self.inner.doors.open(Purpose::Again(Arc::clone(&handle)));
        let again = crate::fd::reopen(fuse, flags)?;
        let fh = guard
            .door
            .opened()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))?;
        self.inner
            .learn_ofd_owner(&guard.door, again.as_fd(), fh, None);
        // To the kernel the new open file is another owner of OFD locks; to the lock table it is the same.
        let successor = self.inner.handles.get(fh)?;
        *lock(&successor.known_as) = handle.ofd_owner();
        successor.is_successor.store(true, Ordering::Release);
        *lock(&handle.successor) = Some(fh);
        successor.say();
        handle.say();
        Ok(again)
    }

    /// Says that these files are about to be closed because others have taken their place on the same descriptions
    /// ([`Mirror::reopen_stand_in`]): closing them gives up no lock. With `false`, takes that back.
    pub fn supersede(&self, handles: &[HandleId], on: bool) {
        for handle in handles {
            if let Ok(handle) = self.inner.handles.get(handle.0) {
                handle.superseded.store(on, Ordering::Release);
                handle.say();
            }
        }
    }

    /// Whether the hook's file was opened in a mode in which no rule of the present plan is bypassed.
    ///
    /// # Errors
    /// `EBADF` when the handle has gone.
    pub fn fits(&self, handle: HandleId) -> io::Result<bool> {
        let handle = self.inner.handles.get(handle.0)?;
        Ok(handle.direct
            || !handle.node.is_regular()
            || !self.inner.rules.intercepts_data(&self.inner, &handle.node))
    }

    /// Whether any process has ever taken a POSIX lock on a file through the hook. Owners of OFD locks are known once their open files have been
    /// [identified](Mirror::identify); until then, and after such a file was closed, they count as processes.
    #[must_use]
    pub fn has_seen_posix_locks(&self, node: NodeId) -> bool {
        // Most files have seen none at all, and asking every handle for each of thousands of files would take seconds.
        if !self.inner.locks.has_seen_others(node, &BTreeSet::new()) {
            return false;
        }
        let ofd = self
            .inner
            .handles
            .all()
            .iter()
            .filter_map(|handle| *lock(&handle.ofd_owner))
            .map(|owner| owner.0)
            .collect();
        self.inner.locks.has_seen_others(node, &ofd)
    }

    /// Begins to move a process's POSIX locks on the file of a moved description.
    ///
    /// # Errors
    /// `EINVAL` for an unknown id; what opening the file says.
    pub fn begin_handover(&self, id: AdoptedId) -> io::Result<Handover> {
        let adopted = self.inner.adopted(id)?;
        Handover::begin(
            Arc::clone(&self.inner.locks),
            adopted.node.id,
            &adopted.original,
        )
    }
}

impl Inner {
    /// Forgets a moved description. Its last descriptor closes it, which drops its locks.
    pub(crate) fn disown(&self, id: AdoptedId) {
        let adopted = {
            let mut known = lock(&self.adopted.adopted);
            let adopted = known.remove(&id);
            if adopted.is_some() {
                self.adopted.log.say(|| Fact::AdoptedGone { id: id.0 });
            }
            adopted
        };
        if let Some(adopted) = adopted {
            self.callers.lets_go_of(adopted.original.as_fd());
            self.store.forget(adopted.node.id, 1);
            for node in &adopted.above {
                self.store.forget(*node, 1);
            }
        }
    }

    fn adopted(&self, id: AdoptedId) -> io::Result<Arc<Adopted>> {
        lock(&self.adopted.adopted)
            .get(&id)
            .cloned()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
    }

    /// Remembers the names along a path, as far as the directories can be found, so that rules see it. Returns the directories, each with a reference that keeps its
    /// node while the kernel does not know it.
    fn learn_path(&self, node: &Arc<Node>, path: &[u8]) -> Vec<NodeId> {
        let mut above = Vec::new();
        let Some(mut parent) = self.store.get(NodeId::ROOT) else {
            return above;
        };
        let parts: Vec<&[u8]> = path
            .split(|byte| *byte == b'/')
            .filter(|part| !part.is_empty())
            .collect();
        let Some((last, directories)) = parts.split_last() else {
            return above;
        };
        for part in directories {
            let next = CString::new(*part)
                .map_err(io::Error::from)
                .and_then(|name| crate::store::resolve(self.fd_of(&parent)?.as_fd(), &name))
                .and_then(|found| self.store.acquire(found));
            let Ok(next) = next else { return above };
            above.push(next.id);
            next.learn(&self.store, parent.id, part, 1);
            parent = next;
        }
        node.learn(&self.store, parent.id, last, 1);
        above
    }

    /// The node behind a descriptor, by asking the kernel for attributes it may not answer from its cache.
    fn node_behind(&self, door: &Door, fuse: BorrowedFd<'_>) -> io::Result<NodeId> {
        door.take_seen();
        rustix::fs::statx(
            fuse,
            c"",
            AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC,
            StatxFlags::BASIC_STATS,
        )?;
        door.take_seen()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EXDEV))
    }

    /// Asks the kernel who owns OFD locks of an open file: `F_OFD_GETLK` names the description itself, whoever asks.
    fn learn_ofd_owner(
        &self,
        door: &Door,
        fuse: BorrowedFd<'_>,
        fh: Fh,
        adopted: Option<&Adopted>,
    ) {
        let Ok(handle) = self.handles.get(fh) else {
            return;
        };
        if !handle.node.is_regular() {
            return;
        }
        door.take_lock_owner();
        let all = ofd::LockRange {
            start: 0,
            end: ofd::LockRange::OPEN_END,
        };
        // Directories and pipes have no locks; whatever fails here fails for the program too.
        let _ = ofd::get(fuse, ofd::LockKind::Read, all);
        let Some(owner) = door.take_lock_owner() else {
            return;
        };
        *lock(&handle.ofd_owner) = Some(owner);
        handle.say();
        if let Some(adopted) = adopted
            && !adopted.facts.ofd_locks.is_empty()
        {
            let facts = &adopted.facts;
            self.locks.register_ofd(
                handle.node.id,
                fh,
                owner,
                &adopted.original,
                facts.pid,
                &facts.ofd_locks,
            );
        }
    }

    /// The description that takes over from a handle.
    fn handed_over(&self, handle: &Handle) -> io::Result<OwnedFd> {
        handle.follow_flags(handle.status())?;
        let owner: Option<LockOwner> = handle.ofd_owner();
        if handle.adopted.is_some() {
            return handle.file.try_clone();
        }
        let Some(owner) = owner else {
            return handle.file.try_clone();
        };
        let owner = Owner {
            kernel: owner,
            class: handle.class(),
        };
        let Some((holder, ranges)) = self.locks.ofd_description(handle.node.id, owner) else {
            return handle.file.try_clone();
        };
        // The locks move to the handle's own description; for an instant nobody holds them, which OFD locks leave no way around.
        for RangeLock { kind, range } in ranges {
            ofd::set(holder.as_fd(), None, range)?;
            ofd::set(handle.file.as_fd(), Some(kind), range)?;
        }
        handle.file.try_clone()
    }
}

/// The ways to open one stand-in.
struct Attempt<'a> {
    inner: &'a Inner,
    door: &'a Door,
    adopted: &'a Adopted,
    mount: BorrowedFd<'a>,
    flags: OFlags,
}

impl Attempt<'_> {
    /// Whether what was opened is what it shall be.
    fn check(&self, opened: OwnedFd) -> io::Result<OwnedFd> {
        let right = if self.flags.contains(OFlags::PATH) {
            self.inner.node_behind(self.door, opened.as_fd())? == self.adopted.node.id
        } else {
            self.door.opened().is_some()
        };
        if right {
            Ok(opened)
        } else {
            Err(io::Error::from_raw_os_error(libc::ESTALE))
        }
    }

    fn walk(&self, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
        let path = if path.is_empty() {
            b".".as_slice()
        } else {
            path
        };
        let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        // An O_PATH descriptor of a symlink is opened as such.
        let how = if flags.contains(OFlags::PATH) {
            how.difference(ResolveFlags::NO_SYMLINKS)
        } else {
            how
        };
        Ok(rustix::fs::openat2(
            self.mount,
            path,
            flags,
            Mode::empty(),
            how,
        )?)
    }

    fn by_path(&self) -> io::Result<OwnedFd> {
        self.check(self.walk(&self.adopted.facts.path, self.flags)?)
    }

    /// The nearest directory above the lost name that can still be reached, and the name.
    fn place(&self) -> io::Result<(OwnedFd, NodeId, Vec<u8>)> {
        let path = &self.adopted.facts.path;
        let cut = path.iter().rposition(|byte| *byte == b'/');
        let (mut directory, name) = match cut {
            Some(cut) => (
                path.get(..cut).unwrap_or_default(),
                path.get(cut + 1..).unwrap_or_default(),
            ),
            None => (b"".as_slice(), path.as_slice()),
        };
        let name = if name.is_empty() {
            b"deleted".to_vec()
        } else {
            name.to_vec()
        };
        loop {
            let opened = self
                .walk(
                    directory,
                    OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                )
                .and_then(|fd| Ok((self.inner.node_behind(self.door, fd.as_fd())?, fd)));
            match opened {
                Ok((node, fd)) => return Ok((fd, node, name)),
                Err(error) if directory.is_empty() => return Err(error),
                Err(_) => {
                    let cut = directory
                        .iter()
                        .rposition(|byte| *byte == b'/')
                        .unwrap_or(0);
                    directory = directory.get(..cut).unwrap_or_default();
                }
            }
        }
    }

    fn by_tmpfile(&self) -> io::Result<OwnedFd> {
        let (directory, ..) = self.place()?;
        let mode = Mode::from_bits_retain(0o600);
        // An access mode that O_TMPFILE takes: it must be able to write.
        Ok(rustix::fs::openat(
            &directory,
            c".",
            self.flags | OFlags::TMPFILE,
            mode,
        )?)
    }

    /// Through a name that exists for this thread alone, and for no longer than this takes.
    fn by_alias(&self) -> io::Result<OwnedFd> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let (directory, parent, mut name) = self.place()?;
        self.door.take_seen();
        let taken = rustix::fs::statx(
            &directory,
            CString::new(name.clone())?,
            AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_FORCE_SYNC,
            StatxFlags::TYPE,
        );
        let its_own = self.door.take_seen() == Some(self.adopted.node.id);
        if taken.is_ok() && !its_own {
            // The name is somebody else's now: the kernel would use what it has cached under it.
            name.truncate(200);
            name.extend_from_slice(
                format!(".moved-{}", SERIAL.fetch_add(1, Ordering::Relaxed)).as_bytes(),
            );
        }
        let alias = CString::new(name.clone())?;
        self.door.set_alias(Some(Alias { parent, name }));
        // Not O_NOFOLLOW, which the program would see in its F_GETFL; a link is not followed all the same.
        let how = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let how = if self.flags.contains(OFlags::PATH) {
            how
        } else {
            how | ResolveFlags::NO_SYMLINKS
        };
        let opened = rustix::fs::openat2(&directory, &alias, self.flags, Mode::empty(), how);
        self.door.set_alias(None);
        let opened = opened
            .map_err(io::Error::from)
            .and_then(|opened| self.check(opened));
        if let Some(kernel) = self.inner.kernel.get() {
            let gone = crate::store::stat(self.adopted.original.as_fd())
                .is_ok_and(|stat| stat.stx_nlink == 0)
                || self.adopted.node.is_dir() && self.adopted.facts.deleted;
            if gone && opened.is_ok() {
                kernel.delete(parent, self.adopted.node.id, alias);
            } else {
                kernel.inval_entry(parent, alias, false);
            }
            if !kernel.flush(SETTLE) {
                tracing::debug!(
                    "the name of a stand-in is still shown: its directory is locked by an operation in progress"
                );
            }
        }
        opened
    }
}
