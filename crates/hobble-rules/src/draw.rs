//! Repeatable randomness: what chance decides for match `n` of a rule.
//!
//! Owns the mapping (seed, rule name, scope key, n) → random numbers, by ChaCha8 with the first three as the key and `n` as the stream. Invariant:
//! the numbers depend on nothing else, so neither the interleaving of threads nor the other rules change them. The layout of the key and the order
//! of the draws are part of what makes an old seed reproduce an old run: change them only with the spec version.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// The part of the key that is the same for all matches of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RuleKey {
    seed: u64,
    name: u128,
}

impl RuleKey {
    pub(crate) fn new(seed: u64, name: &str) -> Self {
        Self {
            seed,
            name: fnv1a(name.as_bytes()),
        }
    }

    /// The generator of match `n` in the counting scope `scope`.
    pub(crate) fn stream(self, scope: u64, n: u64) -> ChaCha8Rng {
        let mut key = [0; 32];
        let bytes = self
            .seed
            .to_le_bytes()
            .into_iter()
            .chain(self.name.to_le_bytes())
            .chain(scope.to_le_bytes());
        for (slot, byte) in key.iter_mut().zip(bytes) {
            *slot = byte;
        }
        let mut stream = ChaCha8Rng::from_seed(key);
        stream.set_stream(n);
        stream
    }

    /// The fixed draws of match `n`, in the scope `scope`.
    pub(crate) fn draws(self, scope: u64, n: u64) -> Draws {
        let mut stream = self.stream(scope, n);
        Draws {
            share: stream.next_u64(),
            pick: stream.next_u64(),
            first: stream.next_u64(),
            second: stream.next_u64(),
        }
    }
}

/// The four numbers that every match may use; always drawn in this order, whichever of them a rule needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Draws {
    /// Decides whether `percent` lets the match through.
    pub(crate) share: u64,
    /// Chooses among weighted errnos.
    pub(crate) pick: u64,
    /// First of two for a latency's distribution.
    pub(crate) first: u64,
    /// Second of two for a latency's distribution.
    pub(crate) second: u64,
}

/// A number in (0, 1], evenly spread, from 53 bits of `draw`. Never 0, so its logarithm is finite.
#[allow(clippy::cast_precision_loss)] // 53 bits fit exactly.
pub(crate) fn unit(draw: u64) -> f64 {
    ((draw >> 11) + 1) as f64 / (1_u64 << 53) as f64
}

/// A number below `bound`, evenly spread but for less than one part in 2^64 / `bound`; 0 when `bound` is 0.
pub(crate) fn below(draw: u64, bound: u64) -> u64 {
    // The high word of a product of two u64 is below either factor, so it fits.
    u64::try_from((u128::from(draw) * u128::from(bound)) >> 64).unwrap_or(0)
}

/// One number for a number and a text.
pub(crate) fn fold(number: u64, text: &[u8]) -> u64 {
    let hash = fnv1a_from(fnv1a(&number.to_le_bytes()), text);
    // Both halves; neither is as well mixed as the two together.
    let (high, low) = ((hash >> 64) as u64, hash as u64);
    high ^ low
}

/// FNV-1a, 128 bits: stable over versions and machines, unlike the standard library's hashers.
fn fnv1a(bytes: &[u8]) -> u128 {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    fnv1a_from(OFFSET, bytes)
}

fn fnv1a_from(start: u128, bytes: &[u8]) -> u128 {
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    bytes.iter().fold(start, |hash, byte| {
        (hash ^ u128::from(*byte)).wrapping_mul(PRIME)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_a_function_of_all_four_inputs() {
        let base = RuleKey::new(42, "slow-wal").draws(0, 7);
        assert_eq!(base, RuleKey::new(42, "slow-wal").draws(0, 7));
        assert_ne!(base, RuleKey::new(43, "slow-wal").draws(0, 7));
        assert_ne!(base, RuleKey::new(42, "slow-wam").draws(0, 7));
        assert_ne!(base, RuleKey::new(42, "slow-wal").draws(1, 7));
        assert_ne!(base, RuleKey::new(42, "slow-wal").draws(0, 8));
    }

    /// An old seed must reproduce an old run: these numbers may change only with the version of the spec. They were computed by an
    /// independent ChaCha8 (RFC 8439 with 8 rounds, 64-bit counter and stream).
    #[test]
    fn numbers_are_stable_over_releases() {
        assert_eq!(fnv1a(b"a"), 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964);
        let draws = RuleKey::new(42, "slow-wal").draws(0, 0);
        assert_eq!(
            (draws.share, draws.pick, draws.first, draws.second),
            (
                1411417326180943351,
                3849991417665768901,
                15657389396869117878,
                8059346366278855562
            )
        );
    }

    #[test]
    fn units_and_bounds_hold_at_the_edges() {
        assert!(unit(0) > 0.0);
        assert!((unit(u64::MAX) - 1.0).abs() < f64::EPSILON);
        assert_eq!(below(u64::MAX, 10), 9);
        assert_eq!(below(0, 10), 0);
        assert_eq!(below(u64::MAX, 0), 0);
    }
}
