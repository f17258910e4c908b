//! The nearest valid word, for messages about a word that is not valid.
//!
//! Owns the measure: optimal string alignment (insertions, deletions, substitutions, swaps of neighbours), case ignored. Invariant: bounded work, whatever
//! the word.

use std::cmp::Reverse;

/// Longest word for which a neighbour is sought, in bytes.
const LONGEST: usize = 40;

/// The candidate nearest to `word`, if any is near enough to be what was meant.
pub(crate) fn nearest<'a>(
    word: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    if word.is_empty() || word.len() > LONGEST {
        return None;
    }
    let word = word.to_lowercase();
    let (distance, best) = candidates
        .into_iter()
        .map(|candidate| {
            (
                distance(word.as_bytes(), candidate.to_lowercase().as_bytes()),
                candidate,
            )
        })
        // Among equals: first what only lacks letters, then what begins alike.
        .min_by_key(|(distance, candidate)| {
            (
                *distance,
                !lacks_letters(&word, candidate),
                Reverse(common_start(&word, candidate)),
            )
        })?;
    (distance <= 1 + word.len().min(best.len()) / 3).then_some(best)
}

/// Whether `word` is the candidate with letters left out.
fn lacks_letters(word: &str, candidate: &str) -> bool {
    let mut letters = candidate.bytes();
    word.bytes()
        .all(|letter| letters.any(|other| other.eq_ignore_ascii_case(&letter)))
}

fn common_start(left: &str, right: &str) -> usize {
    left.bytes()
        .zip(right.bytes())
        .take_while(|(a, b)| a.eq_ignore_ascii_case(b))
        .count()
}

fn distance(left: &[u8], right: &[u8]) -> usize {
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=right.len()).collect();
    let at = |row: &[usize], place: usize| row.get(place).copied().unwrap_or(usize::MAX / 2);
    for (i, a) in left.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, b) in right.iter().enumerate() {
            let mut best = (at(&last, j) + usize::from(a != b))
                .min(at(&last, j + 1) + 1)
                .min(at(&row, j) + 1);
            let swapped =
                i > 0 && j > 0 && left.get(i - 1) == Some(b) && right.get(j - 1) == Some(a);
            if swapped {
                best = best.min(at(&before_last, j - 1) + 1);
            }
            row.push(best);
        }
        before_last = std::mem::replace(&mut last, row);
    }
    at(&last, right.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_right() {
        for (left, right, expected) in [
            ("", "", 0),
            ("abc", "abc", 0),
            ("abc", "acb", 1),
            ("read", "raed", 1),
            ("kitten", "sitting", 3),
            ("", "ab", 2),
        ] {
            assert_eq!(
                distance(left.as_bytes(), right.as_bytes()),
                expected,
                "{left} {right}"
            );
        }
    }

    #[test]
    fn near_words_are_found_and_far_ones_are_not() {
        let words = ["read", "write", "fsync", "rename"];
        assert_eq!(nearest("wriet", words), Some("write"));
        assert_eq!(nearest("FSNYC", words), Some("fsync"));
        assert_eq!(nearest("whn", ["who", "when"]), Some("when"));
        assert_eq!(nearest("xyzzy", words), None);
        assert_eq!(nearest(&"r".repeat(100_000), words), None);
    }
}
