//! Counting: what a rule has seen and done.
//!
//! Owns the only state of a plan. Invariants: `injected` ≤ `matched`; the number a match gets in its counting scope is given once, so decision `n` is
//! made once whatever the interleaving; a rule of the same name in the next plan shares this state, so that nothing is lost while operations that
//! hold the old plan finish.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::op::{Op, OpSet};

/// What one rule has seen and done since it was first installed under its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleCounters {
    /// The rule's name.
    pub name: String,
    /// Operations of the rule's kinds that reached the rule: not ended before by an errno or `then: stop` of an earlier rule.
    pub evaluated: u64,
    /// Of those, the ones for which every filter held (path, who, range), whatever the trigger said.
    pub matched: u64,
    /// Of those, the ones that the trigger let through.
    pub injected: u64,
}

/// How far a rule has come, for another process to go on with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleProgress {
    /// Its name.
    pub name: String,
    /// See [`RuleCounters`].
    pub evaluated: u64,
    /// See [`RuleCounters`].
    pub matched: u64,
    /// See [`RuleCounters`].
    pub injected: u64,
    /// When its window began, in milliseconds since injection began.
    pub origin_ms: u64,
}

/// Counts by operation, spread over cache lines so that threads do not fight over one.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    shards: [Shard; SHARDS],
}

const SHARDS: usize = 8;

#[derive(Debug)]
#[repr(align(128))]
struct Shard([AtomicU64; Op::COUNT]);

impl Default for Shard {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Tally {
    pub(crate) fn count(&self, op: Op) {
        if let Some(counter) = self
            .shards
            .get(shard())
            .and_then(|shard| shard.0.get(op.index()))
        {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many operations of these kinds were counted.
    pub(crate) fn sum(&self, ops: OpSet) -> u64 {
        let counter = |shard: &Shard, op: Op| {
            shard
                .0
                .get(op.index())
                .map_or(0, |counter| counter.load(Ordering::Relaxed))
        };
        self.shards
            .iter()
            .map(|shard| ops.iter().map(|op| counter(shard, op)).sum::<u64>())
            .sum()
    }
}

/// The shard of the calling thread; threads take turns in choosing one when they first count.
fn shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static MINE: Cell<usize> = const { Cell::new(usize::MAX) });
    MINE.with(|mine| {
        if mine.get() == usize::MAX {
            mine.set(NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS);
        }
        mine.get()
    })
}

/// Counts of one counting scope.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stream {
    /// Matches inside the window so far.
    pub(crate) seen: u64,
    /// Injections so far.
    pub(crate) injected: u64,
}

/// Most processes or files that are counted apart in one of [`KEY_SHARDS`]; further ones share one count, so that memory is bounded.
const MOST_KEYS: usize = 1 << 17;

const KEY_SHARDS: usize = 8;

/// The counts of one rule.
#[derive(Debug, Default)]
pub(crate) struct RuleState {
    pub(crate) matched: AtomicU64,
    pub(crate) injected: AtomicU64,
    whole: Mutex<Stream>,
    keyed: [Mutex<HashMap<u64, Stream>>; KEY_SHARDS],
    overflow: Mutex<Stream>,
}

impl RuleState {
    /// Goes on from these counts.
    pub(crate) fn go_on(&self, matched: u64, injected: u64) {
        self.matched.store(matched, Ordering::Relaxed);
        self.injected.store(injected, Ordering::Relaxed);
        *lock(&self.whole) = Stream {
            seen: matched,
            injected,
        };
    }

    /// Works on the counts of a scope, alone: of the rule for `None`, else of a process or file.
    pub(crate) fn with<T>(&self, key: Option<u64>, work: impl FnOnce(&mut Stream) -> T) -> T {
        let Some(key) = key else {
            return work(&mut lock(&self.whole));
        };
        let Some(shard) = self.keyed.get((key % KEY_SHARDS as u64) as usize) else {
            return work(&mut lock(&self.overflow));
        };
        let mut streams = lock(shard);
        if streams.len() < MOST_KEYS {
            return work(streams.entry(key).or_default());
        }
        if let Some(stream) = streams.get_mut(&key) {
            return work(stream);
        }
        drop(streams);
        work(&mut lock(&self.overflow))
    }
}

/// No invariant spans more than the numbers themselves, so a panic elsewhere does not spoil them.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How often a rule ended the list, by operation: what later rules did not get to see.
#[derive(Debug, Default)]
pub(crate) struct Cutoffs(Shard);

impl Cutoffs {
    pub(crate) fn count(&self, op: Op) {
        if let Some(counter) = self.0.0.get(op.index()) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn sum(&self, ops: OpSet) -> u64 {
        ops.iter()
            .filter_map(|op| self.0.0.get(op.index()))
            .map(|counter| counter.load(Ordering::Relaxed))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_past_the_limit_share_a_count() {
        let state = RuleState::default();
        let count = |key| {
            state.with(Some(key), |stream| {
                stream.seen += 1;
                stream.seen
            })
        };
        let keys = (MOST_KEYS * KEY_SHARDS) as u64;
        for key in 0..keys {
            assert_eq!(count(key), 1);
        }
        assert_eq!(count(keys), 1);
        assert_eq!(count(keys + 1), 2);
        assert_eq!(count(0), 2);
    }

    #[test]
    fn a_tally_adds_up_over_threads() {
        let tally = Tally::default();
        std::thread::scope(|threads| {
            for _ in 0..4 {
                threads.spawn(|| (0..1000).for_each(|_| tally.count(Op::Read)));
            }
        });
        assert_eq!(tally.sum(OpSet::DATA), 4000);
        assert_eq!(tally.sum(OpSet::only(Op::Write)), 0);
    }
}
