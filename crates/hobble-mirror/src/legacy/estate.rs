//! The facts of a log put together: what the mirror was when its server died.
//!
//! Invariant: an open file that was made for a request which was never answered is left out, because the request comes again; its descriptor is then nobody's.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use super::Legacy;
use super::fact::{Adopted, Fact, Handle, Io, Locks, Place, Realm, Served};
use crate::sys::inherit;

/// What is known of one node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) realm: u16,
    pub(crate) number: u64,
    pub(crate) kind: u32,
    pub(crate) place: Place,
    pub(crate) lookups: u64,
    pub(crate) names: Vec<(u64, Vec<u8>)>,
    pub(crate) kept: Option<i32>,
    pub(crate) may_be_mapped: bool,
    pub(crate) io: Option<Io>,
}

/// Everything.
#[derive(Debug, Default)]
pub(crate) struct Estate {
    pub(crate) volume: Vec<u8>,
    pub(crate) native: Option<i32>,
    pub(crate) served: Option<Served>,
    pub(crate) no_passthrough: bool,
    pub(crate) realms: BTreeMap<u16, Realm>,
    pub(crate) nodes: HashMap<u64, Node>,
    /// Ids that must not be used again.
    pub(crate) gone: HashSet<u64>,
    pub(crate) handles: HashMap<u64, Handle>,
    pub(crate) adopted: HashMap<u64, Adopted>,
    pub(crate) locks: HashMap<u64, Locks>,
    pub(crate) seen: Vec<(u64, u64)>,
    pub(crate) arrivals: u64,
    pub(crate) next_fh: u64,
    pub(crate) next_adopted: u64,
    /// By the number under which a request was handed out first: what was known before it was begun.
    pub(crate) begun: HashMap<u64, u64>,
    pub(crate) answered: HashMap<u64, (i32, Vec<u8>)>,
    /// In which order, the last one last.
    pub(super) answer_order: Vec<u64>,
    pub(super) note: Vec<u8>,
}

/// What changes about a node, said before or after the node itself.
#[derive(Default)]
struct State {
    names: Vec<(u64, Vec<u8>)>,
    kept: Option<i32>,
    may_be_mapped: bool,
}

impl Estate {
    /// Reads a log whose writer has ended, to be gone on with.
    ///
    /// # Errors
    /// When it is incomplete or makes no sense.
    pub(crate) fn read(legacy: &Legacy) -> io::Result<Self> {
        let estate = Self::collect(legacy)?;
        legacy.inherit(&estate);
        Ok(estate)
    }

    /// Puts the facts together that there are now.
    fn collect(legacy: &Legacy) -> io::Result<Self> {
        let mut estate = Self::default();
        let mut states: HashMap<u64, State> = HashMap::new();
        let mut ios: HashMap<u64, Io> = HashMap::new();
        for fact in legacy.facts()? {
            estate.take(fact, &mut states, &mut ios);
        }
        for (id, node) in &mut estate.nodes {
            if let Some(state) = states.remove(id) {
                node.names = state.names;
                node.kept = state.kept;
                node.may_be_mapped = state.may_be_mapped;
            }
            node.io = ios.remove(id);
        }
        let (begun, answered) = (&estate.begun, &estate.answered);
        let is_orphan = |handle: &Handle| {
            begun.contains_key(&handle.made_for) && !answered.contains_key(&handle.made_for)
        };
        let nodes = &estate.nodes;
        estate
            .handles
            .retain(|_, handle| !is_orphan(handle) && nodes.contains_key(&handle.node));
        estate.locks.retain(|node, _| nodes.contains_key(node));
        estate
            .adopted
            .retain(|_, adopted| nodes.contains_key(&adopted.node));
        Ok(estate)
    }

    /// What the log says, in an order of its own: for comparing.
    pub(crate) fn describe(legacy: &Legacy) -> io::Result<Vec<String>> {
        let estate = Self::collect(legacy)?;
        let mut lines = vec![format!(
            "{:?} {:?} {:?} {} {} {} {}",
            estate.volume,
            estate.native,
            estate.served,
            estate.no_passthrough,
            estate.arrivals,
            estate.next_fh.max(1),
            estate.next_adopted
        )];
        lines.extend(estate.realms.values().map(|realm| format!("{realm:?}")));
        let nodes = estate.nodes.iter();
        lines.extend(nodes.map(|(id, node)| format!("{id}: {node:?}")));
        lines.extend(estate.handles.values().map(|handle| format!("{handle:?}")));
        lines.extend(
            estate
                .adopted
                .values()
                .map(|adopted| format!("{adopted:?}")),
        );
        for locks in estate.locks.values() {
            let mut files: Vec<String> =
                locks.files.iter().map(|file| format!("{file:?}")).collect();
            files.sort_unstable();
            let (node, held, through) = (locks.node, &locks.held, &locks.through);
            lines.push(format!("{node}: {held:?} {through:?} {files:?}"));
        }
        let seen: HashSet<_> = estate.seen.iter().collect();
        lines.extend(seen.into_iter().map(|seen| format!("seen {seen:?}")));
        lines.sort_unstable();
        Ok(lines)
    }

    fn take(&mut self, fact: Fact, states: &mut HashMap<u64, State>, ios: &mut HashMap<u64, Io>) {
        match fact {
            Fact::Mirror { volume, native } => {
                self.volume = volume;
                self.native = native;
            }
            Fact::Served(served) => self.served = Some(served),
            Fact::NoPassthrough => self.no_passthrough = true,
            Fact::Realm(realm) => {
                self.realms.insert(realm.index, realm);
            }
            Fact::Node {
                id,
                realm,
                number,
                kind,
                place,
                lookups,
            } => {
                let node = Node {
                    realm,
                    number,
                    kind,
                    place,
                    lookups,
                    names: Vec::new(),
                    kept: None,
                    may_be_mapped: false,
                    io: None,
                };
                self.nodes.insert(id, node);
            }
            Fact::Lookups { id, change } => {
                // Before the node was said anew there is nothing to count, and it comes with its count.
                if let Some(node) = self.nodes.get_mut(&id) {
                    node.lookups = node.lookups.saturating_add_signed(change);
                }
            }
            Fact::State {
                id,
                names,
                kept,
                may_be_mapped,
            } => {
                let state = State {
                    names,
                    kept,
                    may_be_mapped,
                };
                states.insert(id, state);
            }
            Fact::Gone { id } => {
                self.nodes.remove(&id);
                states.remove(&id);
                ios.remove(&id);
                self.gone.insert(id);
            }
            Fact::Io { id, io } => {
                match io {
                    Some(io) => ios.insert(id, io),
                    None => ios.remove(&id),
                };
            }
            Fact::Handle(handle) => {
                self.next_fh = self.next_fh.max(handle.fh + 1);
                self.handles.insert(handle.fh, handle);
            }
            Fact::HandleGone { fh } => {
                self.handles.remove(&fh);
            }
            Fact::Adopted(adopted) => {
                self.next_adopted = self.next_adopted.max(adopted.id + 1);
                self.adopted.insert(adopted.id, adopted);
            }
            Fact::AdoptedGone { id } => {
                self.adopted.remove(&id);
            }
            Fact::Locks(locks) => {
                if locks.held.is_empty() && locks.files.is_empty() && locks.through.is_empty() {
                    self.locks.remove(&locks.node);
                } else {
                    self.locks.insert(locks.node, locks);
                }
            }
            Fact::Seen { node, owner } => self.seen.push((node, owner)),
            Fact::Arrivals(arrivals) => self.arrivals = self.arrivals.max(arrivals),
            Fact::Next { fh, adopted } => {
                self.next_fh = self.next_fh.max(fh);
                self.next_adopted = self.next_adopted.max(adopted);
            }
            Fact::Begun { unique, before } => {
                self.begun.insert(unique, before);
            }
            Fact::Answered {
                unique,
                error,
                bytes,
            } => {
                self.answered.insert(unique, (error, bytes));
                self.answer_order.push(unique);
            }
            Fact::Note(note) => self.note = note,
        }
    }
}

/// Takes descriptors over, each once however often it is named.
#[derive(Default)]
pub(crate) struct Claims {
    shared: HashMap<RawFd, Arc<OwnedFd>>,
    sole: HashSet<RawFd>,
}

impl Claims {
    /// A descriptor that several things may have.
    pub(crate) fn get(&mut self, number: RawFd) -> io::Result<Arc<OwnedFd>> {
        if self.sole.contains(&number) {
            return Err(io::Error::other(format!(
                "descriptor {number} has an owner already"
            )));
        }
        if let Some(fd) = self.shared.get(&number) {
            return Ok(Arc::clone(fd));
        }
        let fd = Arc::new(inherit::claim(number)?);
        self.shared.insert(number, Arc::clone(&fd));
        Ok(fd)
    }

    /// A descriptor that one thing has.
    pub(crate) fn sole(&mut self, number: RawFd) -> io::Result<OwnedFd> {
        if self.shared.contains_key(&number) || self.sole.contains(&number) {
            return Err(io::Error::other(format!(
                "descriptor {number} has an owner already"
            )));
        }
        let fd = inherit::claim(number)?;
        self.sole.insert(fd.as_raw_fd());
        Ok(fd)
    }

    /// Leaves all of them open, whatever becomes of whoever has them: what else is done about a dead server's descriptors needs them.
    pub(crate) fn abandon(self) {
        for fd in self.shared.into_values() {
            std::mem::forget(fd);
        }
    }

    /// All that were taken over.
    pub(crate) fn numbers(&self) -> HashSet<RawFd> {
        self.shared.keys().chain(&self.sole).copied().collect()
    }
}
