//! The inode store: which backing inode every [`NodeId`] stands for.
//!
//! Owns the nodes, their reference counts and the table that finds a node by its backing inode. Invariants:
//! * one live node per backing inode, where an inode is (device, mount, number) *and* its file handle, so that a number used again by the
//!   backing filesystem gets a new node;
//! * a `NodeId` is never used again: it carries the generation of its slot, which is also the generation the kernel is told;
//! * a node's reference count changes under the table's lock, so a FORGET and a LOOKUP that race leave either the same node or a new one, never a
//!   node that is counted but gone;
//! * nothing here knows a file by its path: names are kept for matching rules only ([`names`]).
//!
//! A node costs about 200 bytes and, where the backing filesystem has file handles, no descriptor.

mod backing;
mod fds;
mod names;
mod node;

pub(crate) use backing::{Found, resolve, stat};
pub(crate) use names::Link;
pub(crate) use node::{Io, Matched, Node, Place, Seen};

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use hobble_fuse::NodeId;

use rustix::fs::OFlags;

use crate::legacy::fact::{self, Fact};
use crate::legacy::{Claims, Estate, Log};
use crate::lock::{read, write};
use crate::sys::handle::FileHandle;
use backing::{Native, Realm};
use fds::{DirectoryCache, Pinned};

/// Every node the kernel knows.
pub(crate) struct Store {
    table: RwLock<Table>,
    realms: RwLock<Vec<Arc<Realm>>>,
    directories: DirectoryCache,
    pinned: Pinned,
    native: Option<Native>,
    /// Counts renames of directories: paths computed before the last one may be wrong.
    moves: AtomicU64,
    log: Log,
}

#[derive(Default)]
struct Table {
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_inode: HashMap<Inode, u32>,
}

struct Slot {
    generation: u32,
    node: Option<Arc<Node>>,
}

/// A backing inode, as long as it exists: the place of its realm, and its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Inode {
    pub(crate) realm: u16,
    pub(crate) number: u64,
}

fn id_of(slot: u32, generation: u32) -> NodeId {
    NodeId(u64::from(generation) << 32 | (u64::from(slot) + 1))
}

impl Table {
    fn get(&self, id: NodeId) -> Option<&Arc<Node>> {
        let slot = (id.0 & 0xffff_ffff).checked_sub(1)?;
        let slot = self.slots.get(usize::try_from(slot).ok()?)?;
        (u64::from(slot.generation) == id.0 >> 32).then_some(())?;
        slot.node.as_ref()
    }

    fn by_inode(&self, inode: Inode) -> Option<&Arc<Node>> {
        let slot = *self.by_inode.get(&inode)?;
        self.slots.get(usize::try_from(slot).ok()?)?.node.as_ref()
    }

    fn insert(&mut self, inode: Inode, make: impl FnOnce(NodeId) -> Node) -> io::Result<Arc<Node>> {
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                let index =
                    u32::try_from(self.slots.len()).map_err(|_| io::ErrorKind::OutOfMemory)?;
                self.slots.push(Slot {
                    generation: 0,
                    node: None,
                });
                index
            }
        };
        let slot = self
            .slots
            .get_mut(index as usize)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let node = Arc::new(make(id_of(index, slot.generation)));
        slot.node = Some(Arc::clone(&node));
        self.by_inode.insert(inode, index);
        Ok(node)
    }

    fn slot(&mut self, id: NodeId) -> io::Result<(u32, &mut Slot)> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        let index = (id.0 & 0xffff_ffff).checked_sub(1).ok_or_else(invalid)?;
        let index = u32::try_from(index).map_err(|_| invalid())?;
        while self.slots.len() <= index as usize {
            self.slots.push(Slot {
                generation: 0,
                node: None,
            });
        }
        let slot = self.slots.get_mut(index as usize).ok_or_else(invalid)?;
        Ok((index, slot))
    }

    /// Puts a node where its id says.
    fn put(&mut self, id: NodeId, node: Arc<Node>) -> io::Result<()> {
        let (index, slot) = self.slot(id)?;
        slot.generation = u32::try_from(id.0 >> 32).unwrap_or(u32::MAX);
        let inode = node.inode;
        slot.node = Some(node);
        self.by_inode.insert(inode, index);
        Ok(())
    }

    /// Never uses an id again.
    fn retire(&mut self, id: NodeId) -> io::Result<()> {
        let (_, slot) = self.slot(id)?;
        let used = u32::try_from(id.0 >> 32).unwrap_or(u32::MAX);
        if slot.node.is_none() {
            slot.generation = slot.generation.max(used.saturating_add(1));
        }
        Ok(())
    }

    /// Finds out which slots are free.
    fn list_free(&mut self) {
        let free = self.slots.iter().enumerate();
        let free = free.filter(|(_, slot)| slot.node.is_none() && slot.generation < u32::MAX);
        self.free = free
            .filter_map(|(index, _)| u32::try_from(index).ok())
            .rev()
            .collect();
    }

    /// Removes the node if nobody refers to it any more.
    fn reap(&mut self, id: NodeId) -> Option<Arc<Node>> {
        let unreferenced = self
            .get(id)
            .is_some_and(|node| node.lookups.load(Ordering::Acquire) == 0);
        if !unreferenced || id == NodeId::ROOT {
            return None;
        }
        let index = u32::try_from((id.0 & 0xffff_ffff) - 1).ok()?;
        let slot = self.slots.get_mut(index as usize)?;
        let node = slot.node.take()?;
        // A slot whose generations are used up is left out for ever, so that no id comes back.
        if let Some(next) = slot.generation.checked_add(1) {
            slot.generation = next;
            self.free.push(index);
        }
        if self.by_inode.get(&node.inode) == Some(&index) {
            self.by_inode.remove(&node.inode);
        }
        Some(node)
    }
}

impl Store {
    /// A store whose root is the directory `root`, which keeps its realm's mount alive. Files that are handed to programs are opened through the mount of `native`.
    /// `descriptors` is the soft limit of the process.
    pub(crate) fn new(
        root: OwnedFd,
        native: Option<OwnedFd>,
        descriptors: u64,
        log: Log,
    ) -> io::Result<Self> {
        let store = Self::empty(native, descriptors, log)?;
        let stat = stat(root.as_fd())?;
        // The root keeps a descriptor of its own: it is used all the time and must be there when descriptors run out.
        let root = store.acquire(Found { fd: root, stat })?;
        root.keep_open(&store)?;
        Ok(store)
    }

    fn empty(native: Option<OwnedFd>, descriptors: u64, log: Log) -> io::Result<Self> {
        Ok(Self {
            table: RwLock::default(),
            realms: RwLock::default(),
            directories: DirectoryCache::new(
                usize::try_from(descriptors / 16)
                    .unwrap_or(1024)
                    .clamp(16, 1024),
            ),
            pinned: Pinned::new(usize::try_from(descriptors / 2).unwrap_or(10_000)),
            moves: AtomicU64::new(0),
            native: native.map(Native::new).transpose()?,
            log,
        })
    }

    /// The store of a mirror that has died.
    pub(crate) fn restore(
        estate: &mut Estate,
        claims: &mut Claims,
        descriptors: u64,
        log: Log,
    ) -> io::Result<Self> {
        let native = estate.native.map(|fd| claims.sole(fd)).transpose()?;
        let store = Self::empty(native, descriptors, log)?;
        let mut realms = Vec::new();
        for (place, realm) in estate.realms.values().enumerate() {
            if usize::from(realm.index) != place {
                return Err(io::Error::other("a filesystem of the tree is missing"));
            }
            let anchor = realm.anchor.map(|fd| claims.sole(fd)).transpose()?;
            realms.push(Arc::new(Realm::restore(realm, anchor)));
        }
        let mut table = Table::default();
        for (id, known) in &mut estate.nodes {
            let place = match &known.place {
                fact::Place::Handle { kind, bytes } => FileHandle::from_parts(*kind, bytes)
                    .map(Place::Handle)
                    .ok_or(io::ErrorKind::InvalidData)?,
                fact::Place::Descriptor(fd) => Place::Descriptor(claims.get(*fd)?),
            };
            let held = matches!(place, Place::Descriptor(_));
            let inode = Inode {
                realm: known.realm,
                number: known.number,
            };
            let node = Node::new(NodeId(*id), inode, known.kind, place, store.log.clone());
            node.lookups.store(known.lookups, Ordering::Release);
            let kept = known.kept.map(|fd| claims.get(fd)).transpose()?;
            node.restore(std::mem::take(&mut known.names), kept, known.may_be_mapped);
            table.put(NodeId(*id), Arc::new(node))?;
            if held {
                store.pinned.add(NodeId(*id));
            }
        }
        for id in &estate.gone {
            table.retire(NodeId(*id))?;
        }
        table.list_free();
        *write(&store.table) = table;
        *write(&store.realms) = realms;
        if store.get(NodeId::ROOT).is_none() {
            return Err(io::Error::other("the root is missing"));
        }
        Ok(store)
    }

    /// Says everything that there is to be known of it.
    pub(crate) fn say_all(&self) {
        for realm in read(&self.realms).iter() {
            self.log.say(|| realm.fact());
        }
        // Locked for writing: references are counted under the lock for reading.
        let table = write(&self.table);
        for (index, slot) in table.slots.iter().enumerate() {
            if let Some(node) = &slot.node {
                self.log.say(|| node.fact());
                node.say_all();
            } else if let (Ok(index), Some(last)) =
                (u32::try_from(index), slot.generation.checked_sub(1))
            {
                // Generations are not to be used again.
                self.log.say(|| Fact::Gone {
                    id: id_of(index, last).0,
                });
            }
        }
    }

    fn count(&self, node: &Node, change: i64) {
        let id = node.id.0;
        self.log.say(|| Fact::Lookups { id, change });
    }

    /// The node with this id; `None` when the kernel names one that it has forgotten.
    pub(crate) fn get(&self, id: NodeId) -> Option<Arc<Node>> {
        read(&self.table).get(id).cloned()
    }

    /// The node of a backing inode, if the kernel knows it.
    pub(crate) fn peek(&self, found: &Found) -> Option<Arc<Node>> {
        let realm = self.known_realm(found)?;
        let node = read(&self.table)
            .by_inode(Inode {
                realm: realm.index,
                number: found.stat.stx_ino,
            })
            .cloned()?;
        node.is(found).then_some(node)
    }

    /// Which inode it is.
    pub(crate) fn inode_of(&self, found: &Found) -> io::Result<Inode> {
        Ok(Inode {
            realm: self.realm(found)?.index,
            number: found.stat.stx_ino,
        })
    }

    /// The node of a backing inode, with one more reference from the kernel.
    pub(crate) fn acquire(&self, found: Found) -> io::Result<Arc<Node>> {
        let realm = self.realm(&found)?;
        let inode = Inode {
            realm: realm.index,
            number: found.stat.stx_ino,
        };
        let handle = if realm.has_handles() {
            FileHandle::of(found.fd.as_fd()).ok()
        } else {
            None
        };
        let same = |node: &Arc<Node>| match (&node.place, &handle) {
            (Place::Handle(known), Some(handle)) => known == handle,
            // A descriptor keeps the inode, so its number cannot have been used again.
            _ => true,
        };
        {
            let table = read(&self.table);
            if let Some(node) = table.by_inode(inode).filter(|node| same(node)) {
                node.lookups.fetch_add(1, Ordering::AcqRel);
                self.count(node, 1);
                return Ok(Arc::clone(node));
            }
        }
        let mut table = write(&self.table);
        if let Some(node) = table.by_inode(inode).filter(|node| same(node)) {
            node.lookups.fetch_add(1, Ordering::AcqRel);
            self.count(node, 1);
            return Ok(Arc::clone(node));
        }
        let Found { fd, stat } = found;
        let held = handle.is_none();
        let place = match handle {
            Some(handle) => Place::Handle(handle),
            None => Place::Descriptor(Arc::new(fd)),
        };
        let node = table.insert(inode, |id| {
            let kind = u32::from(stat.stx_mode) & libc::S_IFMT;
            Node::new(id, inode, kind, place, self.log.clone())
        })?;
        self.log.say(|| node.fact());
        drop(table);
        if held {
            self.pinned.add(node.id);
        }
        Ok(node)
    }

    /// Counts one more reference from the kernel.
    pub(crate) fn reference(&self, node: &Arc<Node>) {
        let _table = read(&self.table);
        node.lookups.fetch_add(1, Ordering::AcqRel);
        self.count(node, 1);
    }

    /// The number of the descriptor of the target's own mount.
    pub(crate) fn native_number(&self) -> Option<i32> {
        self.native.as_ref().map(Native::number)
    }

    /// Whether there is a mount of the target's own to open files through.
    pub(crate) fn has_native(&self) -> bool {
        self.native.is_some()
    }

    /// Writes the filesystems of the tree to their devices.
    pub(crate) fn sync(&self) -> io::Result<()> {
        for realm in read(&self.realms).iter() {
            realm.sync()?;
        }
        Ok(())
    }

    /// The node of an inode that a program holds open, by whichever mount, with one more reference: found by handle on our own mount, else by `path` below
    /// the root, else kept by the descriptor itself.
    pub(crate) fn adopt(
        &self,
        original: BorrowedFd<'_>,
        path: Option<&[u8]>,
    ) -> io::Result<Arc<Node>> {
        let stat = stat(original)?;
        let same = |found: &Found| {
            (
                found.stat.stx_ino,
                found.stat.stx_dev_major,
                found.stat.stx_dev_minor,
            ) == (stat.stx_ino, stat.stx_dev_major, stat.stx_dev_minor)
        };
        let realms: Vec<Arc<Realm>> = read(&self.realms)
            .iter()
            .filter(|realm| realm.is_of(&stat))
            .cloned()
            .collect();
        if let Ok(handle) = FileHandle::of(original) {
            for realm in realms.iter().filter(|realm| realm.has_handles()) {
                let Ok(fd) = realm.open(&handle, OFlags::PATH) else {
                    continue;
                };
                let found = backing::found(fd)?;
                if same(&found) {
                    return self.acquire(found);
                }
            }
        }
        if let Some(path) = path
            && let Some(root) = self.get(NodeId::ROOT)
            && let Ok(found) = backing::walk(root.fd(self)?.as_fd(), path)
            && same(&found)
        {
            return self.acquire(found);
        }
        let fd = crate::fd::reopen_path(original)?;
        let mut found = backing::found(fd)?;
        if let Some(realm) = realms.first() {
            // The same inode may be looked up by its name one day: it must be the same node then.
            found.stat.stx_mnt_id = realm.mount();
        }
        self.acquire_held(found)
    }

    /// A node that holds its descriptor whatever its filesystem can do.
    fn acquire_held(&self, found: Found) -> io::Result<Arc<Node>> {
        let fd = Arc::new(found.fd.try_clone()?);
        let node = self.acquire(found)?;
        node.keep(fd);
        Ok(node)
    }

    /// Takes back references of the kernel.
    pub(crate) fn forget(&self, id: NodeId, references: u64) {
        if id == NodeId::ROOT {
            return;
        }
        let gone = {
            let table = read(&self.table);
            let Some(node) = table.get(id) else { return };
            let before = node
                .lookups
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| {
                    Some(count.saturating_sub(references))
                });
            self.count(
                node,
                i64::try_from(references)
                    .unwrap_or(i64::MAX)
                    .saturating_neg(),
            );
            before.unwrap_or(0) <= references
        };
        if gone {
            let node = {
                let mut table = write(&self.table);
                let node = table.reap(id);
                if node.is_some() {
                    self.log.say(|| Fact::Gone { id: id.0 });
                }
                node
            };
            if let Some(node) = node {
                self.directories.remove(id);
                if matches!(node.place, Place::Descriptor(_)) {
                    self.pinned.remove(id);
                }
            }
        }
    }

    /// Descriptors are dear: names of nodes that hold one and have not been used for long, to be dropped from the kernel's cache so that it forgets them.
    pub(crate) fn overdue(&self) -> Vec<Link> {
        let ids = self.pinned.overdue();
        if ids.is_empty() {
            return Vec::new();
        }
        let table = read(&self.table);
        ids.into_iter()
            .filter_map(|id| table.get(id))
            .filter_map(|node| node.with_names(|names| names.first().cloned()))
            .collect()
    }

    /// All nodes, at some moment.
    pub(crate) fn all(&self) -> Vec<Arc<Node>> {
        read(&self.table)
            .slots
            .iter()
            .filter_map(|slot| slot.node.clone())
            .collect()
    }

    /// How many nodes there are.
    pub(crate) fn len(&self) -> usize {
        let table = read(&self.table);
        table.slots.len() - table.free.len()
    }

    /// Closes descriptors that are only there for speed; `EMFILE` may go away by it.
    pub(crate) fn shed_descriptors(&self) {
        self.directories.clear(|id| self.get(id));
    }

    /// The number of renames of directories so far: what was computed from paths under another number is to be computed again.
    pub(crate) fn moves(&self) -> u64 {
        self.moves.load(Ordering::Acquire)
    }

    /// A directory got another path, and so did everything below it.
    pub(crate) fn directory_moved(&self) {
        self.moves.fetch_add(1, Ordering::AcqRel);
    }

    /// The inode number as programs see it: the backing's own, except that numbers of other devices below the root (btrfs subvolumes, mounts) are made distinct, since
    /// the whole hook has one `st_dev`.
    pub(crate) fn visible_number(inode: Inode) -> u64 {
        const SHIFT: u32 = 48;
        match inode.realm {
            0 => inode.number,
            realm if inode.number >> SHIFT == 0 => u64::from(realm) << SHIFT | inode.number,
            realm => {
                // Numbers this large are not dense; spread them so that they meet others by chance only (splitmix64's finaliser).
                let mut mixed = inode.number ^ (u64::from(realm) << SHIFT);
                mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                (mixed ^ (mixed >> 31)) | 1 << 63
            }
        }
    }

    fn known_realm(&self, found: &Found) -> Option<Arc<Realm>> {
        read(&self.realms)
            .iter()
            .find(|realm| realm.holds(&found.stat))
            .cloned()
    }

    fn realm(&self, found: &Found) -> io::Result<Arc<Realm>> {
        if let Some(realm) = self.known_realm(found) {
            return Ok(realm);
        }
        let mut realms = write(&self.realms);
        if let Some(realm) = realms.iter().find(|realm| realm.holds(&found.stat)) {
            return Ok(Arc::clone(realm));
        }
        let index =
            u16::try_from(realms.len()).map_err(|_| io::Error::from_raw_os_error(libc::EXDEV))?;
        let realm = Arc::new(Realm::new(index, found));
        self.log.say(|| realm.fact());
        realms.push(Arc::clone(&realm));
        Ok(realm)
    }

    fn realm_at(&self, index: u16) -> Option<Arc<Realm>> {
        read(&self.realms).get(usize::from(index)).cloned()
    }
}
