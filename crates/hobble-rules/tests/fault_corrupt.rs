//! Fault kind `corrupt`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)] // A test may.

mod support;

use std::collections::BTreeSet;

use hobble_rules::{Corruption, Fill, Op, OpSet};
use support::{Ask, flags, plan, plan_with, warnings};

fn corruption(fault: &str) -> Corruption {
    Ask::new(Op::Read)
        .of(&plan(&format!(
            "- {{op: read, fault: {{corrupt: {fault}}}}}"
        )))
        .corrupt[0]
}

#[test]
fn segments_stay_within_the_buffer_and_the_limits() {
    let plan = plan("- {op: read, fault: {corrupt: {fill: zero, occurrences: 4, length: 100}}}");
    let (mut counts, mut lengths) = (BTreeSet::new(), BTreeSet::new());
    for round in 0..3_000 {
        let len = 1 + round % 512;
        let segments = Ask::new(Op::Read).of(&plan).corrupt[0].segments(len);
        counts.insert(segments.len());
        for segment in segments {
            assert!(segment.len >= 1 && segment.len <= 100);
            assert!(segment.offset + segment.len <= len);
            lengths.insert(segment.len);
        }
    }
    assert_eq!(counts.into_iter().collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert_eq!((lengths.first(), lengths.last()), (Some(&1), Some(&100)));
}

#[test]
fn zero_overwrites_the_named_bytes_and_no_others() {
    let corruption = corruption("{fill: zero, occurrences: 3, length: 16}");
    assert_eq!(corruption.fill(), Fill::Zero);
    let mut buffer = vec![0xaa_u8; 4096];
    let segments = corruption.apply(&mut buffer);
    assert_eq!(segments, corruption.segments(4096));
    let named = |at: usize| {
        segments
            .iter()
            .any(|segment| (segment.offset..segment.offset + segment.len).contains(&at))
    };
    for (at, byte) in buffer.iter().enumerate() {
        assert_eq!(*byte, if named(at) { 0 } else { 0xaa }, "byte {at}");
    }
}

#[test]
fn random_bytes_differ_and_can_be_repeated() {
    let corruption = corruption("{fill: random, occurrences: 1, length: 1KiB}");
    let (mut one, mut two) = (vec![0_u8; 65536], vec![0_u8; 65536]);
    let segments = corruption.apply(&mut one);
    corruption.apply(&mut two);
    assert_eq!(one, two);
    let segment = segments[0];
    let written: BTreeSet<u8> = one[segment.offset..segment.offset + segment.len]
        .iter()
        .copied()
        .collect();
    assert!(
        segment.len < 32 || written.len() > segment.len / 8,
        "{segment:?} {written:?}"
    );
    assert!(
        one[..segment.offset]
            .iter()
            .chain(&one[segment.offset + segment.len..])
            .all(|byte| *byte == 0)
    );
}

#[test]
fn an_empty_buffer_is_left_alone() {
    let corruption = corruption("{fill: random, occurrences: 9, length: 9}");
    assert_eq!(corruption.segments(0), []);
    assert_eq!(corruption.apply(&mut []), []);
}

#[test]
fn the_scalar_form_is_one_byte() {
    assert_eq!(corruption("zero").segments(100).len(), 1);
    assert_eq!(corruption("zero").segments(100)[0].len, 1);
}

#[test]
fn matches_differ_from_one_another_and_seeds_too() {
    let rules = "- {op: read, fault: {corrupt: {fill: zero, occurrences: 1, length: 1}}}";
    let places = |seed| {
        let plan = plan_with(rules, seed, None, std::time::Duration::ZERO);
        (0..100)
            .map(|_| Ask::new(Op::Read).of(&plan).corrupt[0].segments(1 << 20)[0].offset)
            .collect::<Vec<_>>()
    };
    assert_eq!(places(1), places(1));
    assert_ne!(places(1), places(2));
    assert!(places(1).into_iter().collect::<BTreeSet<_>>().len() > 95);
}

#[test]
fn corrupting_writes_is_called_destructive() {
    let (_, experiment) =
        hobble_rules::load(&support::document("- fault: {corrupt: zero}")).unwrap();
    assert!(experiment.is_destructive() && experiment.rules()[0].is_destructive());
    assert_eq!(experiment.rules()[0].ops(), OpSet::WITH_DATA);
    assert!(
        warnings("- fault: {corrupt: zero}")
            .concat()
            .contains("destructive")
    );
    let (_, reads) =
        hobble_rules::load(&support::document("- {op: read, fault: {corrupt: zero}}")).unwrap();
    assert!(!reads.is_destructive());
    assert!(reads.warnings().is_empty());
}

#[test]
fn corruptions_of_several_rules_compose() {
    let plan = flags(&["corrupt=zero op=read", "corrupt=random op=read length=4"]);
    assert_eq!(Ask::new(Op::Read).of(&plan).corrupt.len(), 2);
}
