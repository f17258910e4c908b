//! Which rules match a path.
//!
//! Owns the set of rules that is kept with an inode. Invariant: small for few rules, shared between paths that match alike for many; only the plan that made it
//! can tell what its bits mean, so it carries that plan's generation.

use std::sync::Arc;

use crate::op::OpSet;

/// Which rules match a path, for one plan. Small and cheap to clone: meant to be kept with the inode until the plan changes.
#[derive(Clone, Debug)]
pub struct PathMatch {
    pub(crate) generation: u64,
    pub(crate) ops: OpSet,
    pub(crate) rules: RuleBits,
}

impl PathMatch {
    /// The generation of the plan that made it; it is of no use to any other.
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.generation
    }

    /// The operations that some rule may match on this path.
    #[must_use]
    pub const fn ops(&self) -> OpSet {
        self.ops
    }
}

/// A set of rules.
#[derive(Clone, Debug)]
pub(crate) enum RuleBits {
    /// Of a plan with at most 64.
    Inline(u64),
    /// Of a larger one; shared by all paths that match the same.
    Shared(Arc<[u64]>),
}

impl RuleBits {
    pub(crate) fn word(&self, index: usize) -> u64 {
        match self {
            Self::Inline(bits) if index == 0 => *bits,
            Self::Inline(_) => 0,
            Self::Shared(words) => words.get(index).copied().unwrap_or(0),
        }
    }

    pub(crate) fn from_words(words: Vec<u64>) -> Self {
        match words.as_slice() {
            [] => Self::Inline(0),
            [one] => Self::Inline(*one),
            _ => Self::Shared(words.into()),
        }
    }

    /// The places of the rules, rising.
    pub(crate) fn iter(&self, words: usize) -> impl Iterator<Item = usize> {
        (0..words).flat_map(|word| ones(self.word(word)).map(move |bit| word * 64 + bit))
    }
}

/// The places of the bits that are set, rising.
pub(crate) fn ones(mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = (bits != 0).then_some(bits.trailing_zeros() as usize);
        bits &= bits.wrapping_sub(1);
        bit
    })
}
