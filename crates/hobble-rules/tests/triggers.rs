//! Triggers: window, counts, percent, times, and what the counts are kept for.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)] // A test may.

mod support;

use std::time::Duration;

use hobble_rules::Op;
use proptest::prelude::*;
use support::{Ask, plan, plan_with};

/// Which of the first `count` matches fire, counted from 1.
fn fired(when: &str, count: u64) -> Vec<u64> {
    let plan = plan(&format!("- {{when: {{{when}}}, fault: {{errno: EIO}}}}"));
    (1..=count)
        .filter(|_| Ask::new(Op::Read).fires(&plan))
        .collect()
}

#[test]
fn counts_are_in_matches_and_times_in_injections() {
    assert_eq!(fired("after: 3", 6), [4, 5, 6]);
    assert_eq!(fired("every: 3", 9), [3, 6, 9]);
    assert_eq!(fired("after: 2, every: 2, times: 2", 20), [4, 6]);
    assert_eq!(fired("times: 1", 5), [1]);
    assert_eq!(fired("percent: 0", 1000), [] as [u64; 0]);
    assert_eq!(fired("percent: 100", 3), [1, 2, 3]);
}

#[test]
fn times_counts_what_chance_let_through() {
    let free = fired("percent: 10", 1000);
    assert_eq!(fired("percent: 10, times: 7", 1000), free[..7]);
}

#[test]
fn only_matches_count() {
    let plan = plan(
        "- {op: read, path: 'base/**', who: {uid: 1000}, range: {start: 0, length: 10}, when: {after: 1}, fault: {errno: EIO}}",
    );
    let ask = Ask::new(Op::Read);
    for other in [
        Ask::new(Op::Write),
        ask.clone().path("elsewhere"),
        ask.clone().uid(0),
        ask.clone().range(10, 5),
        ask.clone().range(0, 0),
        Ask {
            range: None,
            ..ask.clone()
        },
    ] {
        assert!(!other.fires(&plan));
    }
    assert!(!ask.fires(&plan));
    assert!(ask.fires(&plan));
    let counters = &plan.counters()[0];
    assert_eq!(
        (counters.evaluated, counters.matched, counters.injected),
        (7, 2, 1)
    );
}

#[test]
fn a_window_opens_and_closes_and_comes_before_the_counts() {
    let plan = plan("- {when: {from: 10s, for: 5s, after: 1}, fault: {errno: EIO}}");
    let at = |millis| {
        Ask::new(Op::Read)
            .now(Duration::from_millis(millis))
            .fires(&plan)
    };
    assert!(!at(0));
    assert!(!at(9_999));
    assert!(
        !at(10_000),
        "the first match in the window is skipped by `after`"
    );
    assert!(at(10_001));
    assert!(at(14_999));
    assert!(!at(15_000));
    let counters = &plan.counters()[0];
    assert_eq!((counters.matched, counters.injected), (6, 2));
}

#[test]
fn counts_per_file_and_per_process_are_apart() {
    let per_file = plan("- {when: {times: 1, per: file}, fault: {errno: EIO}}");
    let file = |file| Ask::new(Op::Read).file(file).fires(&per_file);
    assert_eq!(
        [file(1), file(1), file(2), file(2), file(1)],
        [true, false, true, false, false]
    );

    let per_process = plan("- {when: {after: 1, per: process}, fault: {errno: EIO}}");
    let process = |pid| Ask::new(Op::Read).pid(pid).fires(&per_process);
    assert_eq!(
        [process(7), process(8), process(7), process(8)],
        [false, false, true, true]
    );
}

#[test]
fn each_file_has_a_series_of_chances_of_its_own() {
    let plan = plan("- {when: {percent: 50, per: file}, fault: {errno: EIO}}");
    let series = |file: u64| -> Vec<bool> {
        (0..64)
            .map(|_| Ask::new(Op::Read).file(file).fires(&plan))
            .collect()
    };
    let together: Vec<bool> = (0..128)
        .map(|n| Ask::new(Op::Read).file(1 + n % 2).fires(&plan))
        .collect();
    let again = support::plan("- {when: {percent: 50, per: file}, fault: {errno: EIO}}");
    let alone: Vec<bool> = (0..64)
        .map(|_| Ask::new(Op::Read).file(1).fires(&again))
        .collect();
    let of_one: Vec<bool> = together.into_iter().step_by(2).collect();
    assert_eq!(of_one, alone);
    assert_ne!(series(3), series(4));
}

#[test]
fn an_update_keeps_counts_of_the_same_name_and_starts_windows_of_new_names() {
    let old = plan(
        "- {name: a, when: {after: 2}, fault: {errno: EIO}}\n- {name: gone, op: write, fault: {latency: 1s}}",
    );
    assert!(!Ask::new(Op::Read).fires(&old));
    let now = Duration::from_secs(100);
    let rules = "- {name: new, op: write, when: {from: 10s}, fault: {errno: EIO}}\n- {name: a, when: {after: 2, from: 50s}, fault: {errno: EROFS}}";
    let new = plan_with(rules, 42, Some(&old), now);
    assert!(new.generation() > old.generation());

    assert!(!Ask::new(Op::Read).now(now).fires(&new), "the second match");
    assert!(
        Ask::new(Op::Read).fires(&old),
        "the third, in flight with the old plan, is the first past `after`"
    );
    assert!(
        Ask::new(Op::Read).now(now).fires(&new),
        "the fourth; the window of `a` counts from the first plan"
    );

    assert!(!Ask::new(Op::Mkdir).path("x").now(now).of(&new).is_pass());
    let write = |after: u64| {
        Ask::new(Op::Write)
            .now(now + Duration::from_secs(after))
            .of(&new)
            .errno
            .and_then(|errno| errno.name())
    };
    assert_eq!(
        (write(9), write(10)),
        (Some("EROFS"), Some("EIO")),
        "the window of `new` counts from the update"
    );
    let counters = new.counters();
    assert_eq!(
        (
            counters[1].evaluated,
            counters[1].matched,
            counters[1].injected
        ),
        (6, 6, 4)
    );
}

#[test]
fn percent_is_within_three_standard_deviations() {
    const OPS: u32 = 10_000;
    for percent in [0.1, 1.0, 12.5, 30.0, 99.5] {
        for seed in 0..5 {
            let plan = plan_with(
                &format!("- {{when: {{percent: {percent}}}, fault: {{errno: EIO}}}}"),
                seed,
                None,
                Duration::ZERO,
            );
            let share = percent / 100.0;
            let count = (0..OPS).filter(|_| Ask::new(Op::Read).fires(&plan)).count();
            let expected = f64::from(OPS) * share;
            let deviation = (expected * (1.0 - share)).sqrt();
            let off = (f64::from(u32::try_from(count).unwrap()) - expected).abs() / deviation;
            assert!(
                off < 3.0,
                "percent {percent}, seed {seed}: {count}, {off} standard deviations off"
            );
        }
    }
}

proptest! {
    /// What a trigger without chance does is what its definition says.
    #[test]
    fn counting_is_as_defined(after in 0_u64..20, every in 1_u64..10, times in proptest::option::of(1_u64..10)) {
        let limit = times.map_or(String::new(), |times| format!(", times: {times}"));
        let found = fired(&format!("after: {after}, every: {every}{limit}"), 100);
        let defined: Vec<u64> = (1..=100)
            .filter(|n| *n > after && (n - after) % every == 0)
            .take(times.map_or(usize::MAX, |times| usize::try_from(times).unwrap()))
            .collect();
        prop_assert_eq!(found, defined);
    }

    /// Whichever thread asks, the rule fires equally often and, match by match, with equal decisions.
    #[test]
    fn interleaving_changes_no_decision(seed: u64, percent in 1_u32..100, times in proptest::option::of(1_u64..50)) {
        const THREADS: usize = 4;
        const EACH: usize = 100;
        let limit = times.map_or(String::new(), |times| format!(", times: {times}"));
        let rules = format!(
            "- {{when: {{percent: {percent}{limit}}}, fault: {{latency: {{mean: 10ms, jitter: 5ms}}}}}}\n\
             - {{when: {{percent: 50}}, fault: {{errno: [EIO, ENOSPC]}}}}"
        );
        let decisions = |plan: &hobble_rules::Plan, count| -> Vec<String> {
            (0..count).map(|_| {
                let decision = Ask::new(Op::Read).of(plan);
                format!("{:?} {:?} {:?}", decision.delay, decision.errno, decision.fired)
            }).collect()
        };
        let alone = plan_with(&rules, seed, None, Duration::ZERO);
        let expected = decisions(&alone, THREADS * EACH);
        let shared = plan_with(&rules, seed, None, Duration::ZERO);
        let found: Vec<String> = std::thread::scope(|threads| {
            let asked: Vec<_> = (0..THREADS).map(|_| threads.spawn(|| decisions(&shared, EACH))).collect();
            asked.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        prop_assert_eq!(alone.counters(), shared.counters());
        // Rules number their matches apart, so threads may pair them up differently; each rule's own decisions are the same.
        let of_rule = |all: &[String], column: usize| {
            let mut values: Vec<String> = all.iter().map(|line| line.split(' ').nth(column).unwrap().to_owned()).collect();
            values.sort();
            values
        };
        for column in 0..2 {
            prop_assert_eq!(of_rule(&expected, column), of_rule(&found, column));
        }
    }

    /// Other rules do not change a rule's decisions.
    #[test]
    fn rules_are_independent(seed: u64) {
        let rule = "- {name: x, op: read, when: {percent: 30}, fault: {latency: {mean: 10ms, jitter: 5ms}}}";
        let others = format!("- {{op: read, when: {{percent: 50}}, fault: {{attr: {{uid: 1}}}}}}\n{rule}").replace("op: read, when: {percent: 50}", "op: lookup, when: {percent: 50}");
        let (one, two) = (plan_with(rule, seed, None, Duration::ZERO), plan_with(&others, seed, None, Duration::ZERO));
        for _ in 0..50 {
            let _ = Ask::new(Op::Lookup).of(&two);
            prop_assert_eq!(Ask::new(Op::Read).of(&one).delay, Ask::new(Op::Read).of(&two).delay);
        }
    }
}
