//! Door threads: threads of the layer above that open files on the mount in order to hand them to a program.
//!
//! Owns the table of such threads and what each is about to do. Invariants: a door's requests are never faulted and never parked; what a door is allowed beyond
//! others (opening a moved description, seeing a name that exists for it alone) lasts for one call of the API and for that thread only.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use hobble_fuse::{Fh, LockOwner, NodeId, Tid};

use crate::adopt::Adopted;
use crate::handle::Handle;
use crate::lock::{lock, read, write};
use crate::store::Node;
use crate::sys::thread;

/// What a door thread is about to do.
#[derive(Clone, Default)]
pub(crate) enum Purpose {
    /// Nothing out of the ordinary, except not to be faulted.
    #[default]
    Look,
    /// Open a stand-in for a moved description.
    StandIn(Arc<Adopted>),
    /// Open the file of a handle again, on the same description.
    Again(Arc<Handle>),
}

/// A name that exists for one door only.
#[derive(Clone)]
pub(crate) struct Alias {
    pub(crate) parent: NodeId,
    pub(crate) name: Vec<u8>,
}

#[derive(Default)]
struct State {
    purpose: Purpose,
    alias: Option<Alias>,
    /// The handle that was opened for the purpose.
    opened: Option<Fh>,
    /// The node whose attributes were asked for last.
    seen: Option<NodeId>,
    /// The owner that a lock request named.
    lock_owner: Option<LockOwner>,
}

/// One thread's door.
#[derive(Default)]
pub(crate) struct Door {
    state: Mutex<State>,
}

impl Door {
    pub(crate) fn purpose(&self) -> Purpose {
        lock(&self.state).purpose.clone()
    }

    /// The node of the description to be stood in for.
    pub(crate) fn adopted_node(&self) -> Option<Arc<Node>> {
        match &lock(&self.state).purpose {
            Purpose::StandIn(adopted) => Some(Arc::clone(&adopted.node)),
            Purpose::Look | Purpose::Again(_) => None,
        }
    }

    pub(crate) fn set_alias(&self, alias: Option<Alias>) {
        lock(&self.state).alias = alias;
    }

    /// Whether this name exists for the door.
    pub(crate) fn knows(&self, parent: NodeId, name: &[u8]) -> bool {
        lock(&self.state)
            .alias
            .as_ref()
            .is_some_and(|alias| alias.parent == parent && alias.name == name)
    }

    pub(crate) fn note_opened(&self, fh: Fh) {
        lock(&self.state).opened = Some(fh);
    }

    pub(crate) fn opened(&self) -> Option<Fh> {
        lock(&self.state).opened
    }

    pub(crate) fn note_seen(&self, node: NodeId) {
        lock(&self.state).seen = Some(node);
    }

    pub(crate) fn take_seen(&self) -> Option<NodeId> {
        lock(&self.state).seen.take()
    }

    pub(crate) fn note_lock_owner(&self, owner: LockOwner) {
        lock(&self.state).lock_owner = Some(owner);
    }

    pub(crate) fn take_lock_owner(&self) -> Option<LockOwner> {
        lock(&self.state).lock_owner.take()
    }
}

/// All doors.
#[derive(Default)]
pub(crate) struct Doors {
    count: AtomicUsize,
    open: RwLock<HashMap<Tid, Arc<Door>>>,
}

impl Doors {
    pub(crate) fn is_door(&self, tid: Tid) -> bool {
        self.get(tid).is_some()
    }

    pub(crate) fn get(&self, tid: Tid) -> Option<Arc<Door>> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        read(&self.open).get(&tid).cloned()
    }

    /// Makes the calling thread a door until the guard is dropped.
    pub(crate) fn open(&self, purpose: Purpose) -> DoorGuard<'_> {
        let tid = Tid(thread::tid().cast_unsigned());
        let door = Arc::new(Door {
            state: Mutex::new(State {
                purpose,
                ..State::default()
            }),
        });
        let mut open = write(&self.open);
        let before = open.insert(tid, Arc::clone(&door));
        self.count.store(open.len(), Ordering::Release);
        drop(open);
        DoorGuard {
            doors: self,
            tid,
            door,
            before,
        }
    }
}

/// Closes the door when dropped; doors nest.
pub(crate) struct DoorGuard<'a> {
    doors: &'a Doors,
    tid: Tid,
    pub(crate) door: Arc<Door>,
    before: Option<Arc<Door>>,
}

impl Drop for DoorGuard<'_> {
    fn drop(&mut self) {
        let mut open = write(&self.doors.open);
        match self.before.take() {
            Some(before) => open.insert(self.tid, before),
            None => open.remove(&self.tid),
        };
        self.doors.count.store(open.len(), Ordering::Release);
    }
}
