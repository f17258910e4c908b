//! Who stands in the way of a stop without being meant by it, and how often a stop is tried because of that.
//!
//! Invariant: only a process that is no target is left out, and whoever is left out is told of.

use std::collections::BTreeMap;

use hobble_api::status::NotCovered as NotCoveredStatus;
use hobble_graft::ids::ProcessId;
use hobble_graft::stop::StopError;

use crate::preflight::chain;

/// Processes that hold something of the hook without being targets, and cannot be stopped: traced by somebody else, 32-bit, asleep in the kernel. They must not keep
/// the targets from being put back, and stay on the hook, which serves them plainly until they let go.
#[derive(Default)]
pub(crate) struct Bystanders {
    left_out: BTreeMap<ProcessId, String>,
}

impl Bystanders {
    /// Leaves out who stood in the way of a stop, unless it is a target. Says whether somebody was.
    pub(crate) fn leave_out(
        &mut self,
        error: &StopError,
        processes: &[ProcessId],
        is_target: impl Fn(ProcessId) -> bool,
    ) -> bool {
        let in_the_way = processes
            .iter()
            .find(|process| Some(process.pid) == error.pid());
        if let Some(process) = in_the_way
            && !matches!(error, StopError::Gone { .. })
            && !is_target(*process)
        {
            return self.left_out.insert(*process, chain(error)).is_none();
        }
        false
    }

    /// How many are left out.
    pub(crate) fn count(&self) -> usize {
        self.left_out.len()
    }

    pub(crate) fn contains(&self, process: &ProcessId) -> bool {
        self.left_out.contains_key(process)
    }

    /// What is told of them.
    pub(crate) fn into_left(self) -> impl Iterator<Item = NotCoveredStatus> {
        self.left_out.into_iter().map(|(process, why)| NotCoveredStatus {
            what: format!("what process {process} has of the hook"),
            reason: format!("it is no target and could not be stopped ({why}): it is served without faults until it lets go"),
            pid: u32::try_from(process.pid.as_raw()).ok(),
        })
    }
}

/// Rounds of something that needs everybody to stand still. What was tried until somebody was left out does not count: one that nobody can stop must not use up the
/// patience that the others are owed.
pub(crate) struct Rounds {
    most: u32,
    counted: u32,
    left_out: u32,
}

impl Rounds {
    /// Somebody who makes processes that cannot be stopped does not go on for ever.
    const MOST_LEFT_OUT: u32 = 256;

    pub(crate) fn new(most: u32) -> Self {
        Self {
            most,
            counted: 0,
            left_out: 0,
        }
    }

    /// Begins a round and gives its number, from 0 on; `None` when there is no further one.
    pub(crate) fn begin(&mut self) -> Option<u32> {
        let number = (self.counted < self.most).then_some(self.counted)?;
        self.counted += 1;
        Some(number)
    }

    /// Somebody is left out from now on; `rounds` were tried before that was known, this one among them.
    pub(crate) fn left_out(&mut self, rounds: u32) {
        if self.left_out < Self::MOST_LEFT_OUT {
            self.left_out += 1;
            self.counted = self.counted.saturating_sub(rounds);
        }
    }

    /// The round that has begun was one of several that were meant to be, and does not count.
    pub(crate) fn again(&mut self) {
        self.counted = self.counted.saturating_sub(1);
    }

    /// Whether the round that has begun is the last one.
    pub(crate) fn is_last(&self) -> bool {
        self.counted >= self.most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounds that end when as many have stood in the way as often as they need to be left out. Says how many are left when they end.
    fn left_of(mut unstoppable: u32, each: u32) -> u32 {
        let mut rounds = Rounds::new(10);
        let mut tried = 0;
        while unstoppable > 0 && rounds.begin().is_some() {
            tried += 1;
            if tried == each {
                (tried, unstoppable) = (0, unstoppable - 1);
                rounds.left_out(each);
            }
        }
        unstoppable
    }

    #[test]
    fn however_many_are_left_out_the_others_get_all_their_rounds() {
        for (unstoppable, each) in [(4, 3), (30, 3), (11, 1)] {
            assert_eq!(left_of(unstoppable, each), 0, "{unstoppable} times {each}");
        }
        let mut rounds = Rounds::new(2);
        assert_eq!(rounds.begin(), Some(0));
        rounds.left_out(1);
        assert_eq!((rounds.begin(), rounds.is_last()), (Some(0), false));
        assert_eq!((rounds.begin(), rounds.is_last()), (Some(1), true));
        assert_eq!(rounds.begin(), None);
    }

    #[test]
    fn rounds_end_even_if_somebody_is_left_out_in_each() {
        assert!(left_of(u32::MAX, 1) > 0);
    }
}
