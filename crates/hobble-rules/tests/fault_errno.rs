//! Fault kind `errno`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)] // A test may.

mod support;

use std::collections::BTreeMap;

use hobble_rules::{InjectedErrno, Op};
use support::{Ask, errors, flags, lines, plan};

#[test]
fn one_errno_by_name_number_or_lower_case() {
    for written in [
        "EIO",
        "5",
        "eio",
        "[EIO]",
        "{EIO: 1}",
        "[{errno: 5, weight: 2}]",
    ] {
        let plan = plan(&format!("- fault: {{errno: {written}}}"));
        let decision = Ask::new(Op::Write).of(&plan);
        assert_eq!(decision.errno, InjectedErrno::named("EIO"), "{written}");
        assert_eq!(decision.errno.unwrap().raw(), 5);
        assert!(decision.delay.is_zero());
    }
}

#[test]
fn weights_are_kept_within_three_standard_deviations() {
    const OPS: u32 = 40_000;
    for plan in [
        plan("- fault: {errno: {EIO: 3, ENOSPC: 1}}"),
        flags(&["errno=EIO:3,ENOSPC:1"]),
    ] {
        let mut counts = BTreeMap::new();
        for _ in 0..OPS {
            *counts
                .entry(Ask::new(Op::Write).of(&plan).errno.unwrap().to_string())
                .or_insert(0_u32) += 1;
        }
        assert_eq!(counts.len(), 2);
        let expected = f64::from(OPS) * 0.75;
        let deviation = (f64::from(OPS) * 0.75 * 0.25).sqrt();
        assert!(
            (f64::from(counts["EIO"]) - expected).abs() < 3.0 * deviation,
            "{counts:?}"
        );
    }
}

#[test]
fn a_list_is_evenly_weighted() {
    let plan = plan("- fault: {errno: [EIO, ENOSPC, EDQUOT, EROFS]}");
    let mut counts = BTreeMap::new();
    for _ in 0..8_000 {
        *counts
            .entry(Ask::new(Op::Write).of(&plan).errno.unwrap())
            .or_insert(0) += 1;
    }
    assert_eq!(counts.len(), 4);
    assert!(
        counts.values().all(|count| (1_880..2_120).contains(count)),
        "{counts:?}"
    );
}

#[test]
fn the_first_errno_ends_the_operation() {
    let plan = plan(
        "- {when: {every: 2}, fault: {errno: EIO}}\n- {fault: {latency: 1s}}\n- {fault: {errno: ENOSPC}}",
    );
    let first = Ask::new(Op::Write).of(&plan);
    assert_eq!(
        (first.errno.unwrap().name(), first.delay.as_secs()),
        (Some("ENOSPC"), 1)
    );
    let second = Ask::new(Op::Write).of(&plan);
    assert_eq!(
        (second.errno.unwrap().name(), second.delay.as_secs()),
        (Some("EIO"), 0)
    );
    let counters = plan.counters();
    assert_eq!(
        counters
            .iter()
            .map(|rule| (rule.evaluated, rule.matched, rule.injected))
            .collect::<Vec<_>>(),
        [(2, 2, 1), (1, 1, 1), (1, 1, 1)]
    );
}

#[test]
fn slow_then_failed_compose_in_one_rule() {
    let decision = Ask::new(Op::Read).of(&plan("- fault: {latency: 30s, errno: EIO}"));
    assert_eq!(
        (decision.delay.as_secs(), decision.errno.unwrap().name()),
        (30, Some("EIO"))
    );
}

#[test]
fn nobody_would_see_an_errno_of_release() {
    let plan = plan("- fault: {errno: EIO}");
    assert!(!plan.ops().contains(Op::Release));
    assert!(!plan.ops().contains(Op::Releasedir));
    assert!(plan.ops().contains(Op::Flush));
}

#[test]
fn enosys_is_refused_where_the_kernel_would_remember_it() {
    let found = lines(&errors("- {op: fsync, fault: {errno: ENOSYS}}"));
    assert!(found.contains("would outlive the rule"), "{found}");
    assert!(Ask::new(Op::Read).fires(&plan("- {op: read, fault: {errno: ENOSYS}}")));
}
