//! The open file descriptions that we hold, each once.
//!
//! Invariant: no two entries are the same `struct file`. Candidates are those with the same identity and access mode, which no
//! program can change; among them `kcmp` decides, and its order (which holds until the next boot) keeps them sorted, so that a
//! file which is open five thousand times costs thirteen comparisons a time. Only descriptors of our own are compared: no
//! program can pull one away meanwhile.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;

use super::facts::{Identity, Stamp};
use super::slots::State;
use super::{
    Access, Description, DescriptionId, DescriptionLock, FileFacts, OpenFlags, Owner, Place,
    TableId,
};
use crate::ids::Pid;
use crate::proc::locks::LockClass;
use crate::sys::kcmp;

/// What two descriptors of one description have in common.
type Key = (Identity, Access);

/// What a re-scan compares a description with.
#[derive(Debug)]
struct Before {
    is_new: bool,
    is_changed: bool,
    places: Vec<Place>,
    locks: Vec<DescriptionLock>,
}

#[derive(Debug)]
struct Entry {
    description: Description,
    stamp: Stamp,
    before: Option<Before>,
}

/// All descriptions of a census.
#[derive(Debug, Default)]
pub(super) struct Descriptions {
    entries: BTreeMap<DescriptionId, Entry>,
    /// Candidates, each list in the order of `kcmp`.
    by_key: HashMap<Key, Vec<DescriptionId>>,
    next: u32,
}

/// What became of the descriptions since [`Descriptions::begin`].
#[derive(Debug, Default)]
pub(super) struct Changes {
    pub(super) appeared: Vec<DescriptionId>,
    pub(super) vanished: Vec<Description>,
    pub(super) moved: Vec<DescriptionId>,
    pub(super) changed: Vec<DescriptionId>,
}

impl Descriptions {
    pub(super) fn all(&self) -> impl ExactSizeIterator<Item = &Description> {
        self.entries.values().map(|entry| &entry.description)
    }

    pub(super) fn get(&self, id: DescriptionId) -> Option<&Description> {
        self.entries.get(&id).map(|entry| &entry.description)
    }

    /// What the file of a description looked like when it was last named.
    pub(super) fn stamp(&self, id: DescriptionId) -> Option<Stamp> {
        self.entries.get(&id).map(|entry| entry.stamp)
    }

    /// Starts a scan: places and locks are collected afresh.
    pub(super) fn begin(&mut self) {
        for entry in self.entries.values_mut() {
            entry.before = Some(Before {
                is_new: false,
                is_changed: false,
                places: std::mem::take(&mut entry.description.places),
                locks: std::mem::take(&mut entry.description.locks),
            });
        }
    }

    /// Adds what a descriptor of ours refers to, unless it is here already: then ours is closed again.
    pub(super) fn insert(
        &mut self,
        facts: FileFacts,
        stamp: Stamp,
        kept: OwnedFd,
        flags: OpenFlags,
    ) -> Result<DescriptionId, Errno> {
        let candidates = self
            .by_key
            .entry((facts.identity(), flags.access()))
            .or_default();
        let own = Pid::own().as_raw();
        let (mut low, mut high) = (0, candidates.len());
        while low < high {
            let middle = low.midpoint(high);
            let Some((id, entry)) = candidates
                .get(middle)
                .and_then(|id| Some((*id, self.entries.get(id)?)))
            else {
                break;
            };
            match kcmp::file(
                own,
                entry.description.kept.as_raw_fd(),
                own,
                kept.as_raw_fd(),
            )? {
                Ordering::Equal => return Ok(id),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        let id = DescriptionId(self.next);
        self.next += 1;
        candidates.insert(low, id);
        let description = Description {
            id,
            kept: Arc::new(kept),
            facts,
            flags,
            position: 0,
            owner: None,
            signal: 0,
            locks: Vec::new(),
            places: Vec::new(),
        };
        let before = Before {
            is_new: true,
            is_changed: false,
            places: Vec::new(),
            locks: Vec::new(),
        };
        self.entries.insert(
            id,
            Entry {
                description,
                stamp,
                before: Some(before),
            },
        );
        Ok(id)
    }

    /// Notes that a descriptor refers to `id`, and the state it was seen in.
    pub(super) fn seen(
        &mut self,
        id: DescriptionId,
        place: Place,
        state: State,
        renamed: Option<(Stamp, FileFacts)>,
    ) {
        let Some(entry) = self.entries.get_mut(&id) else {
            return;
        };
        let description = &mut entry.description;
        let mut is_changed = false;
        if let Some((stamp, facts)) = renamed {
            is_changed |= facts != description.facts;
            entry.stamp = stamp;
            description.facts = facts;
        }
        let now: (OpenFlags, i64, Option<Owner>, i32) =
            (state.flags, state.info.position, state.owner, state.signal);
        is_changed |= now
            != (
                description.flags,
                description.position,
                description.owner,
                description.signal,
            );
        (
            description.flags,
            description.position,
            description.owner,
            description.signal,
        ) = now;
        for lock in state.info.locks {
            let table = (lock.class == LockClass::Posix).then_some(place.table);
            let lock = DescriptionLock { lock, table };
            // Every descriptor of the description shows them all.
            if !description.locks.contains(&lock) {
                description.locks.push(lock);
            }
        }
        description.places.push(place);
        if let Some(before) = &mut entry.before {
            before.is_changed |= is_changed;
        }
    }

    /// Takes back what was seen in `table` during this scan.
    pub(super) fn forget(&mut self, table: TableId) {
        for entry in self.entries.values_mut() {
            entry
                .description
                .places
                .retain(|place| place.table != table);
        }
    }

    /// Ends a scan.
    pub(super) fn finish(&mut self) -> Changes {
        let mut changes = Changes::default();
        let gone: Vec<DescriptionId> = self
            .entries
            .iter()
            .filter(|(_, e)| e.description.places.is_empty())
            .map(|(id, _)| *id)
            .collect();
        for id in gone {
            let Some(Entry {
                description,
                before,
                ..
            }) = self.entries.remove(&id)
            else {
                continue;
            };
            let key = (description.facts.identity(), description.flags.access());
            if let Some(candidates) = self.by_key.get_mut(&key) {
                candidates.retain(|other| *other != id);
                if candidates.is_empty() {
                    self.by_key.remove(&key);
                }
            }
            if before.is_none_or(|b| !b.is_new) {
                changes.vanished.push(description);
            }
        }
        for (id, entry) in &mut self.entries {
            entry.description.places.sort_unstable();
            let Some(before) = entry.before.take() else {
                continue;
            };
            if before.is_new {
                changes.appeared.push(*id);
                continue;
            }
            if before.places != entry.description.places {
                changes.moved.push(*id);
            }
            if before.is_changed || !is_same_set(&before.locks, &entry.description.locks) {
                changes.changed.push(*id);
            }
        }
        changes
    }
}

fn is_same_set(a: &[DescriptionLock], b: &[DescriptionLock]) -> bool {
    a.len() == b.len() && a.iter().all(|lock| b.contains(lock))
}
