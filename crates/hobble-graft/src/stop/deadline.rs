//! A point in time after which a stop must be given up.

use std::time::{Duration, Instant};

/// When everything done so far is to be undone. The clock is the caller's: this is the edge at which it enters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// The budget, counted from now.
    pub fn after(budget: Duration) -> Self {
        Self(Instant::now() + budget)
    }

    /// A given instant.
    pub fn at(instant: Instant) -> Self {
        Self(instant)
    }

    /// What is left of the budget; zero when it has passed.
    pub fn left(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Whether the budget is used up.
    pub fn passed(self) -> bool {
        self.left().is_zero()
    }

    /// The later of the two; used to give an undo its own small budget.
    pub(crate) fn or_at_least(self, budget: Duration) -> Self {
        self.max(Self::after(budget))
    }
}

/// Waits for something that usually comes within microseconds: polls with yields at first, then sleeps longer and longer.
///
/// Blocking in `waitid` could not be bounded without signals of our own, and `pidfd` polling does not report stops.
pub(crate) struct Patience {
    since: Instant,
}

/// Longer than a round trip between two threads on one busy processor.
const YIELDING: Duration = Duration::from_micros(300);

impl Patience {
    /// Starts to be patient.
    pub(crate) fn new() -> Self {
        Self {
            since: Instant::now(),
        }
    }

    /// Lets others run for a moment.
    pub(crate) fn wait(&self) {
        let waited = self.since.elapsed();
        if waited < YIELDING {
            std::thread::yield_now();
        } else {
            std::thread::sleep((waited / 8).min(Duration::from_millis(2)));
        }
    }

    /// How long it has taken so far.
    pub(crate) fn waited(&self) -> Duration {
        self.since.elapsed()
    }
}
