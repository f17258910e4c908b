//! Finds threads that were killed and cannot die, because they queue for a lock that the caller of a parked request holds.
//!
//! The VFS takes an inode's lock, waits for another's lookup of the same name, and FUSE takes its own mutexes, all without
//! heeding SIGKILL. Which lock a thread waits for cannot be told from outside; so the answer is a mere yes or no, and all
//! holders go on. Invariants: scans take at most a tenth of one processor; a thread counts for [`PATIENCE`] only, so that
//! one which is stuck for another reason (a dead disk) does not end waits for ever.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use crate::procfs::Proc;

/// How long a stuck thread counts.
const PATIENCE: Duration = Duration::from_secs(10);

/// At least this often a scan takes place, whatever it costs.
const LONGEST: Duration = Duration::from_millis(500);

#[derive(Default)]
pub(super) struct Stuck {
    /// Stuck threads, with the time they were first seen.
    since: HashMap<u32, Instant>,
    /// Not to be scanned again before.
    not_before: Option<Instant>,
}

impl Stuck {
    /// Whether the time for the next scan has come.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.not_before.is_none_or(|at| now >= at)
    }

    /// Whether some thread other than `parked` was killed and waits for a lock.
    pub(super) fn scan(&mut self, proc: &Proc, parked: &HashSet<u32>) -> bool {
        let start = processor_time();
        let mut found = Vec::new();
        proc.killed_and_stuck(|tid| {
            if !parked.contains(&tid.0) {
                found.push(tid.0);
            }
        });
        let cost = processor_time().saturating_sub(start);
        let now = Instant::now();
        self.not_before = Some(now + (cost * 9).min(LONGEST));
        self.judge(&found, now)
    }

    fn judge(&mut self, found: &[u32], now: Instant) -> bool {
        self.since.retain(|tid, _| found.contains(tid));
        let mut any = false;
        for &tid in found {
            any |= now.duration_since(*self.since.entry(tid).or_insert(now)) < PATIENCE;
        }
        any
    }
}

/// Processor time this thread has used; what it waited for a processor does not count.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_counts_for_a_while_only() {
        let mut stuck = Stuck::default();
        let start = Instant::now();
        let later = start + PATIENCE;
        assert!(!stuck.judge(&[], start));
        assert!(stuck.judge(&[5], start));
        assert!(stuck.judge(&[5], start + PATIENCE / 2));
        assert!(!stuck.judge(&[5], later));
        assert!(stuck.judge(&[5, 6], later));
        // Gone and come back: the number was given to another thread.
        assert!(!stuck.judge(&[], later));
        assert!(stuck.judge(&[5], later));
    }

    #[test]
    fn scans_are_spaced_by_what_they_cost() {
        let mut stuck = Stuck::default();
        let proc = Proc::open().unwrap();
        let start = Instant::now();
        assert!(stuck.is_due(start));
        assert!(!stuck.scan(&proc, &HashSet::new()));
        assert!(!stuck.is_due(start));
        assert!(stuck.is_due(Instant::now() + LONGEST));
    }
}
