//! Descriptors that nodes hold, and how many.
//!
//! Owns two lists of node ids: directories whose descriptor is kept for speed, and nodes that need a descriptor because their filesystem has no file
//! handles. Invariant: the first list never exceeds its capacity; the second is kept near its capacity by asking the kernel to forget.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex};

use hobble_fuse::NodeId;

use super::node::Node;
use crate::lock::lock;

/// Recently used directories; first in, first out, with a second chance for what was used since.
pub(crate) struct DirectoryCache {
    capacity: usize,
    queue: Mutex<VecDeque<NodeId>>,
}

impl DirectoryCache {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            capacity,
            queue: Mutex::default(),
        }
    }

    /// A node's descriptor was put into its cache; closes those that had to make room.
    pub(crate) fn added(&self, id: NodeId, find: impl Fn(NodeId) -> Option<Arc<Node>>) {
        let mut evicted = Vec::new();
        {
            let mut queue = lock(&self.queue);
            queue.push_back(id);
            let mut chances = queue.len();
            while queue.len() > self.capacity {
                let Some(oldest) = queue.pop_front() else {
                    break;
                };
                match find(oldest) {
                    Some(node) if chances > 0 && node.was_used() => queue.push_back(oldest),
                    Some(node) => evicted.push(node),
                    None => {}
                }
                chances = chances.saturating_sub(1);
            }
        }
        for node in evicted {
            node.drop_cached();
        }
    }

    pub(crate) fn remove(&self, id: NodeId) {
        lock(&self.queue).retain(|queued| *queued != id);
    }

    pub(crate) fn clear(&self, find: impl Fn(NodeId) -> Option<Arc<Node>>) {
        let queue = std::mem::take(&mut *lock(&self.queue));
        for node in queue.into_iter().filter_map(find) {
            node.drop_cached();
        }
    }
}

/// Nodes that hold a descriptor for as long as they live.
pub(crate) struct Pinned {
    capacity: usize,
    inner: Mutex<PinnedInner>,
}

#[derive(Default)]
struct PinnedInner {
    live: HashSet<NodeId>,
    queue: VecDeque<NodeId>,
}

impl Pinned {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            capacity,
            inner: Mutex::default(),
        }
    }

    pub(crate) fn add(&self, id: NodeId) {
        let mut inner = lock(&self.inner);
        inner.live.insert(id);
        inner.queue.push_back(id);
    }

    pub(crate) fn remove(&self, id: NodeId) {
        lock(&self.inner).live.remove(&id);
    }

    /// The oldest, when there are too many; each is named again only after all others were.
    pub(crate) fn overdue(&self) -> Vec<NodeId> {
        /// So many at a time: enough to fall behind no workload, few enough not to throw away what is in use.
        const BATCH: usize = 64;
        let mut inner = lock(&self.inner);
        let mut named = Vec::new();
        if inner.live.len() <= self.capacity {
            return named;
        }
        while named.len() < BATCH {
            let Some(id) = inner.queue.pop_front() else {
                break;
            };
            if inner.live.contains(&id) {
                inner.queue.push_back(id);
                named.push(id);
            }
        }
        named
    }
}
