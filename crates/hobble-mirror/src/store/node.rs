//! One inode that the kernel knows.
//!
//! Invariant: `place` never changes, so a node is the same backing inode for as long as it lives; every descriptor a node hands out refers to that inode.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use hobble_fuse::{Backing, NodeId};
use hobble_rules::PathMatch;
use rustix::fs::OFlags;

use super::names::Names;
use super::{Found, Inode, Store};
use crate::legacy::Log;
use crate::legacy::fact::{self, Fact};
use crate::lock::lock;
use crate::sys::handle::FileHandle;

/// How a node's inode is found again.
pub(crate) enum Place {
    /// By file handle; costs no descriptor.
    Handle(FileHandle),
    /// By an `O_PATH` descriptor, where the filesystem has no handles.
    Descriptor(Arc<OwnedFd>),
}

/// What the rules say about a node's paths.
#[derive(Clone)]
pub(crate) struct Matched {
    /// [`Store::moves`] when it was computed.
    pub(crate) moves: u64,
    /// One for each known path, all of one plan.
    pub(crate) paths: Arc<[PathMatch]>,
}

/// How opens of a regular file do their I/O; one mode for all opens at a time (`fuse_file_io_open`, fs/fuse/iomode.c, answers anything else with EIO).
pub(crate) enum Io {
    /// In the kernel, on this backing file.
    Passthrough(Arc<Backing>),
    /// Through the server.
    Served,
}

/// Size, modification and change time of a file.
pub(crate) type Seen = (u64, (i64, u32), (i64, u32));

/// What is known about the data of a regular file.
#[derive(Default)]
pub(crate) struct Data {
    /// Open handles.
    pub(crate) handles: u32,
    /// Their mode; `None` when there are none.
    pub(crate) io: Option<Io>,
    /// What the file was when the last handle went, if nothing can have changed since without showing.
    pub(crate) seen: Option<Seen>,
}

pub(crate) struct Node {
    pub(crate) id: NodeId,
    pub(crate) inode: Inode,
    /// `S_IFMT` bits.
    pub(crate) kind: u32,
    pub(crate) place: Place,
    /// References from the kernel; changed under the table's lock.
    pub(crate) lookups: AtomicU64,
    state: Mutex<State>,
    pub(crate) data: Mutex<Data>,
    used: AtomicBool,
    /// A writable shared mapping may exist: its stores change the times, and no request says so.
    pub(crate) may_be_mapped: AtomicBool,
    log: Log,
    /// A program had it mapped shared when it was moved here.
    pub(crate) was_mapped: AtomicBool,
}

#[derive(Default)]
struct State {
    names: Names,
    /// How often the names have changed.
    changes: u64,
    matched: Option<Box<Matched>>,
    /// Kept for speed (directories), or because the inode may have no name left.
    fd: Option<Arc<OwnedFd>>,
    /// The descriptor must stay.
    keep: bool,
}

impl Node {
    pub(super) fn new(id: NodeId, inode: Inode, kind: u32, place: Place, log: Log) -> Self {
        Self {
            id,
            inode,
            kind,
            place,
            lookups: AtomicU64::new(1),
            state: Mutex::default(),
            data: Mutex::default(),
            used: AtomicBool::new(false),
            may_be_mapped: AtomicBool::new(false),
            log,
            was_mapped: AtomicBool::new(false),
        }
    }

    /// What never changes about it, and how often the kernel refers to it. To be said with the table locked.
    pub(super) fn fact(&self) -> Fact {
        Fact::Node {
            id: self.id.0,
            realm: self.inode.realm,
            number: self.inode.number,
            kind: self.kind,
            place: match &self.place {
                Place::Handle(handle) => {
                    let (kind, bytes) = handle.parts();
                    fact::Place::Handle {
                        kind,
                        bytes: bytes.to_vec(),
                    }
                }
                Place::Descriptor(fd) => fact::Place::Descriptor(fd.as_raw_fd()),
            },
            lookups: self.lookups.load(Ordering::Acquire),
        }
    }

    /// Tells the log what may have changed. `state` is locked meanwhile, so that what is said last is what is so last.
    fn say_state(&self, state: &State) {
        self.log.say(|| self.state_fact(state));
    }

    fn state_fact(&self, state: &State) -> Fact {
        Fact::State {
            id: self.id.0,
            names: state
                .names
                .iter()
                .map(|link| (link.parent.0, link.name.to_vec()))
                .collect(),
            kept: state
                .fd
                .as_ref()
                .filter(|_| state.keep)
                .map(|fd| fd.as_raw_fd()),
            may_be_mapped: self.may_be_mapped.load(Ordering::Relaxed),
        }
    }

    /// Says everything that is to be known of it but [`Node::fact`].
    pub(super) fn say_all(&self) {
        self.say_state(&lock(&self.state));
        let data = lock(&self.data);
        if data.io.is_some() {
            self.say_io(&data);
        }
    }

    /// Tells the log how its opens do their I/O.
    pub(crate) fn say_io(&self, data: &Data) {
        self.log.say(|| Fact::Io {
            id: self.id.0,
            io: data.io.as_ref().map(|io| match io {
                Io::Passthrough(backing) => fact::Io::Passthrough(backing.id().0),
                Io::Served => fact::Io::Served,
            }),
        });
    }

    /// A writable shared mapping may exist from now on.
    pub(crate) fn note_mapping(&self) {
        if !self.may_be_mapped.swap(true, Ordering::Relaxed) {
            self.say_state(&lock(&self.state));
        }
    }

    /// Takes over what a node of the same id was.
    pub(super) fn restore(
        &self,
        links: Vec<(u64, Vec<u8>)>,
        kept: Option<Arc<OwnedFd>>,
        may_be_mapped: bool,
    ) {
        let mut state = lock(&self.state);
        state.keep = kept.is_some();
        state.fd = kept;
        state.names = Names::of(links);
        self.may_be_mapped.store(may_be_mapped, Ordering::Relaxed);
    }

    /// What the kernel is told as the generation of this node's id.
    pub(crate) fn generation(&self) -> u64 {
        self.id.0 >> 32
    }

    pub(crate) fn is_dir(&self) -> bool {
        self.kind == libc::S_IFDIR
    }

    pub(crate) fn is_regular(&self) -> bool {
        self.kind == libc::S_IFREG
    }

    /// Whether this is what was found, and not an earlier inode of the same number.
    pub(super) fn is(&self, found: &Found) -> bool {
        match &self.place {
            Place::Handle(handle) => {
                FileHandle::of(found.fd.as_fd()).is_ok_and(|other| other == *handle)
            }
            Place::Descriptor(_) => true,
        }
    }

    /// A descriptor of the inode, good for everything an `O_PATH` descriptor is good for.
    pub(crate) fn fd(self: &Arc<Self>, store: &Store) -> io::Result<Arc<OwnedFd>> {
        let handle = match &self.place {
            Place::Descriptor(fd) => return Ok(Arc::clone(fd)),
            Place::Handle(handle) => handle,
        };
        if let Some(fd) = &lock(&self.state).fd {
            self.used.store(true, Ordering::Relaxed);
            return Ok(Arc::clone(fd));
        }
        let fd = Arc::new(store.open_handle(self.inode.realm, handle, OFlags::PATH)?);
        if self.is_dir() {
            // Only directories are kept open for speed: a kept descriptor of a file that somebody unlinks would keep its blocks allocated.
            let added = {
                let mut state = lock(&self.state);
                let added = state.fd.is_none();
                state.fd.get_or_insert_with(|| Arc::clone(&fd));
                added
            };
            if added {
                store.directories.added(self.id, |id| store.get(id));
            }
        }
        Ok(fd)
    }

    /// Keeps a descriptor for as long as the node lives, because its last name is about to go.
    pub(crate) fn keep_open(self: &Arc<Self>, store: &Store) -> io::Result<()> {
        let fd = self.fd(store)?;
        self.keep(fd);
        Ok(())
    }

    /// Keeps this descriptor for as long as the node lives.
    pub(crate) fn keep(&self, fd: Arc<OwnedFd>) {
        let mut state = lock(&self.state);
        state.fd.get_or_insert(fd);
        state.keep = true;
        self.say_state(&state);
    }

    /// Whether it holds a descriptor for good: its last name went through the hook.
    pub(crate) fn is_kept(&self) -> bool {
        lock(&self.state).keep
    }

    pub(super) fn drop_cached(&self) {
        let dropped = {
            let mut state = lock(&self.state);
            if state.keep { None } else { state.fd.take() }
        };
        drop(dropped);
    }

    /// Whether the descriptor was used since this was last asked.
    pub(super) fn was_used(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }

    pub(crate) fn with_names<T>(&self, work: impl FnOnce(&Names) -> T) -> T {
        work(&lock(&self.state).names)
    }

    /// Changes the names; what the rules say about the node is then computed again.
    pub(crate) fn change_names(&self, work: impl FnOnce(&mut Names) -> bool) -> bool {
        let mut state = lock(&self.state);
        let changed = work(&mut state.names);
        if changed {
            state.changes += 1;
            state.matched = None;
            self.say_state(&state);
        }
        changed
    }

    /// Learns a name seen by a lookup. Says whether it had another before: then it may come under rules under which it was not.
    pub(crate) fn learn(&self, store: &Store, parent: NodeId, name: &[u8], links: u32) -> bool {
        let sole = self.is_dir() || links <= 1;
        let had_one = self.with_names(|names| names.first().is_some());
        let changed = self.change_names(|names| names.learn(parent, name, sole));
        // A directory with another name than before was moved behind our back.
        if changed && had_one && self.is_dir() {
            store.directory_moved();
        }
        changed && had_one
    }

    /// What was last kept by [`Node::set_matched`] for the present names, and how often those have changed.
    pub(crate) fn matched(&self) -> (Option<Matched>, u64) {
        let state = lock(&self.state);
        (state.matched.as_deref().cloned(), state.changes)
    }

    /// Keeps what the rules say about the names, unless those have `changes`d meanwhile.
    pub(crate) fn set_matched(&self, matched: Matched, changes: u64) {
        let mut state = lock(&self.state);
        if state.changes == changes {
            state.matched = Some(Box::new(matched));
        }
    }
}

impl Store {
    /// Opens a node's inode with these flags, as a program would have: never creating, never following a link.
    pub(crate) fn open(&self, node: &Node, flags: OFlags) -> io::Result<OwnedFd> {
        let flags = flags.difference(OFlags::CREATE | OFlags::EXCL | OFlags::NOCTTY);
        match &node.place {
            Place::Descriptor(fd) => match self.on_native(node, fd.as_fd()) {
                Some(native) => crate::fd::reopen(native.as_fd(), flags),
                None => crate::fd::reopen(fd.as_fd(), flags),
            },
            Place::Handle(handle) => {
                let realm = self
                    .realm_at(node.inode.realm)
                    .ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))?;
                realm.open_for_client(self.native.as_ref(), handle, flags)
            }
        }
    }

    /// The inode that `fd` refers to, on the target's own mount: along its last known paths, where they lead to that very inode.
    fn on_native(&self, node: &Node, fd: BorrowedFd<'_>) -> Option<OwnedFd> {
        let native = self.native.as_ref()?;
        let wanted = super::stat(fd).ok()?;
        self.paths_of(node.id)
            .iter()
            .find_map(|path| native.walk(path, &wanted))
    }

    pub(crate) fn open_handle(
        &self,
        realm: u16,
        handle: &FileHandle,
        flags: OFlags,
    ) -> io::Result<OwnedFd> {
        let realm = self
            .realm_at(realm)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))?;
        realm.open(handle, flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A million of them have to fit; the kernel's own inode takes about a kilobyte.
    #[test]
    fn a_node_stays_small() {
        assert!(size_of::<Node>() <= 256, "{} bytes", size_of::<Node>());
        eprintln!("{} bytes", size_of::<Node>());
    }
}
