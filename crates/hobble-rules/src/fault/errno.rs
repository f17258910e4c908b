//! Fault kind `errno`: the operation fails.
//!
//! Owns the weighted choice among errnos. Invariant: each is chosen in proportion to its weight, by one draw.

use crate::draw::below;
use crate::errno::InjectedErrno;

/// A checked `errno` fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrnoFault {
    /// Each with the sum of its own weight and those before it; never empty, sums strictly rise.
    choices: Vec<(u64, InjectedErrno)>,
}

impl ErrnoFault {
    /// Errnos with their weights; `None` when there is none, or a weight is 0.
    #[must_use]
    pub fn new(weighted: &[(InjectedErrno, u32)]) -> Option<Self> {
        let mut sum = 0;
        let mut choices = Vec::with_capacity(weighted.len());
        for (errno, weight) in weighted {
            if *weight == 0 {
                return None;
            }
            sum += u64::from(*weight);
            choices.push((sum, *errno));
        }
        (!choices.is_empty()).then_some(Self { choices })
    }

    /// The errnos, in the order of the rule.
    pub fn errnos(&self) -> impl Iterator<Item = InjectedErrno> {
        self.choices.iter().map(|(_, errno)| *errno)
    }

    /// Whether the choice depends on chance.
    pub(crate) fn is_random(&self) -> bool {
        self.choices.len() > 1
    }

    /// The errno that a random number stands for.
    pub(crate) fn pick(&self, draw: u64) -> Option<InjectedErrno> {
        let total = self.choices.last().map_or(0, |(sum, _)| *sum);
        let point = below(draw, total);
        self.choices
            .iter()
            .find(|(sum, _)| point < *sum)
            .map(|(_, errno)| *errno)
    }
}
