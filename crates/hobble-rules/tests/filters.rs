//! Filters: operations, paths, callers, ranges.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)] // A test may.

mod support;

use std::time::Duration;

use hobble_rules::{Comm, FileId, KnownCaller, Op, OpContext, OpSet, Plan};
use proptest::prelude::*;
use support::{Ask, plan};

fn path_matches(pattern: &str, path: &[u8]) -> bool {
    let quoted = pattern.replace('\'', "''");
    hits(
        &plan(&format!("- {{path: '{quoted}', fault: {{errno: EIO}}}}")),
        path,
    )
}

/// Whether the first rule can match a path, relative to a volume at `/data`.
fn hits(plan: &Plan, path: &[u8]) -> bool {
    let absolute = [
        b"/data".as_slice(),
        if path.is_empty() { b"" } else { b"/" },
        path,
    ]
    .concat();
    !plan.match_path(path, &absolute).ops().is_empty()
}

#[test]
fn globs_mean_what_the_manual_says() {
    for (pattern, path, expected) in [
        ("pg_wal/**", "pg_wal/0001", true),
        ("pg_wal/**", "pg_wal/a/b/c", true),
        ("pg_wal/**", "pg_wal", false),
        ("pg_wal/**", "x/pg_wal/0001", false),
        ("pg_wal", "pg_wal", true),
        ("pg_wal", "x/y/pg_wal", true),
        ("pg_wal", "pg_wal/0001", false),
        ("*.log", "a.log", true),
        ("*.log", "x/y/a.log", true),
        ("*.log", ".log", true),
        ("*.log", "a.log.1", false),
        ("base/*", "base/1", true),
        ("base/*", "base/1/2", false),
        ("./base/*", "base/1", true),
        ("base/**/2", "base/2", true),
        ("base/**/2", "base/1/2", true),
        ("base/**/2", "base/1/1/2", true),
        ("**/2", "2", true),
        ("**", "anything/at/all", true),
        ("**", "", true),
        (".", "", true),
        ("*", "", false),
        ("*", "a/b", true),
        ("/data", "", true),
        ("/data/**", "x", true),
        ("/data/x", "x", true),
        ("/other/x", "x", false),
        ("/x", "x", false),
        ("a?c", "abc", true),
        ("a?c", "a/c", false),
        ("{a,b}/*", "b/x", true),
        ("{a,b/c}/*", "b/c/x", true),
        ("[!a]x", "bx", true),
        ("[!a]x", "ax", false),
        ("file\\*", "file*", true),
        ("file\\*", "filex", false),
        ("Über", "x/Über", true),
        ("it's", "it's", true),
    ] {
        assert_eq!(
            path_matches(pattern, path.as_bytes()),
            expected,
            "{pattern} {path}"
        );
    }
}

#[test]
fn names_that_are_not_text_match_like_others() {
    assert!(path_matches("dir/**", b"dir/\xff\xfe"));
    assert!(path_matches("*.log", b"\xff.log"));
    assert!(path_matches("a?b", b"a\xffb"));
    assert!(!path_matches("a?b", b"a\xff\xffb"));
    assert!(!path_matches("*.log", b"\xff.lo\xff"));
}

#[test]
fn excluded_paths_are_left_alone_and_order_does_not_matter() {
    let plan =
        plan("- {path: ['base/**', '*.conf'], exclude: ['*.tmp', base/1/**], fault: {errno: EIO}}");
    for (path, expected) in [
        ("base/2/3", true),
        ("base/1/3", false),
        ("base/2/x.tmp", false),
        ("postgresql.conf", true),
        ("other", false),
    ] {
        assert_eq!(hits(&plan, path.as_bytes()), expected, "{path}");
    }
    let all_but = support::plan("- {exclude: 'pg_wal/**', fault: {errno: EIO}}");
    assert!(hits(&all_but, b"base/1") && !hits(&all_but, b"pg_wal/1"));
}

#[test]
fn two_paths_match_on_either() {
    let plan = plan("- {op: rename, path: '*.new', fault: {errno: EIO}}");
    let ask = |from: &str, to: &str| {
        let paths = [from, to].map(|path| plan.match_path(path.as_bytes(), b"/"));
        let caller = KnownCaller::default();
        let decision = plan.decide(&OpContext {
            op: Op::Rename,
            paths: &[&paths[0], &paths[1]],
            caller: &caller,
            offset: None,
            len: None,
            now: Duration::ZERO,
            file: &|| FileId(0),
        });
        !decision.is_pass()
    };
    assert!(ask("a.new", "a"));
    assert!(ask("a", "a.new"));
    assert!(!ask("a", "b"));
}

#[test]
fn without_a_path_only_rules_without_a_path_match() {
    let plan = plan(
        "- {name: any, fault: {latency: 1s}}\n- {name: some, path: '**', fault: {latency: 2s}}",
    );
    let caller = KnownCaller::default();
    let unknown = plan.match_unknown_path();
    for paths in [&[][..], &[&unknown][..]] {
        let context = OpContext {
            op: Op::Read,
            paths,
            caller: &caller,
            offset: None,
            len: None,
            now: Duration::ZERO,
            file: &|| FileId(0),
        };
        assert_eq!(plan.decide(&context).delay, Duration::from_secs(1));
    }
}

#[test]
fn who_the_file_is_is_asked_only_when_a_rule_that_counts_per_file_has_matched() {
    let asked = std::cell::Cell::new(0);
    let count = |rules: &str| {
        let plan = plan(rules);
        let path = plan.match_path(b"x", b"/data/x");
        asked.set(0);
        let _ = plan.decide(&OpContext {
            op: Op::Read,
            paths: &[&path],
            caller: &KnownCaller::default(),
            offset: None,
            len: None,
            now: Duration::ZERO,
            file: &|| {
                asked.set(asked.get() + 1);
                FileId(1)
            },
        });
        asked.get()
    };
    assert_eq!(count("- {when: {times: 1}, fault: {errno: EIO}}"), 0);
    assert_eq!(
        count("- {path: y, when: {times: 1, per: file}, fault: {errno: EIO}}"),
        0
    );
    assert_eq!(
        count("- {path: x, when: {times: 1, per: file}, fault: {errno: EIO}}"),
        1
    );
    assert_ne!(
        FileId::named(FileId(1), b"a"),
        FileId::named(FileId(1), b"b")
    );
    assert_ne!(
        FileId::named(FileId(1), b"a"),
        FileId::named(FileId(2), b"a")
    );
}

#[test]
fn a_match_of_another_plan_leaves_the_fault_out() {
    let (one, two) = (plan("- fault: {errno: EIO}"), plan("- fault: {errno: EIO}"));
    let stale = one.match_path(b"x", b"/data/x");
    let caller = KnownCaller::default();
    let context = OpContext {
        op: Op::Read,
        paths: &[&stale],
        caller: &caller,
        offset: None,
        len: None,
        now: Duration::ZERO,
        file: &|| FileId(0),
    };
    assert!(!one.decide(&context).is_pass());
    assert!(two.decide(&context).is_pass());
    assert!(
        two.intercepts_data(&stale),
        "careful about the mode of an open"
    );
}

#[test]
fn callers_are_told_apart() {
    for (who, expected) in [
        ("{pid: 7}", true),
        ("{pid: [8, 7]}", true),
        ("{pid: 8}", false),
        ("{uid: 1000}", true),
        ("{uid: 0}", false),
        ("{comm: postgres}", true),
        ("{comm: 'post*'}", true),
        ("{comm: ['mysqld', '*gres']}", true),
        ("{comm: Postgres}", false),
        ("{comm: 'post*', uid: 0}", false),
        ("{comm: 'post*', uid: [0, 1000], pid: 7}", true),
    ] {
        let plan = plan(&format!("- {{who: {who}, fault: {{errno: EIO}}}}"));
        assert_eq!(Ask::new(Op::Read).fires(&plan), expected, "{who}");
    }
}

#[test]
fn a_caller_of_whom_nothing_is_known_matches_no_condition() {
    let gone = |rules: &str| {
        let caller = KnownCaller {
            uid: 0,
            pid: None,
            comm: None,
        };
        Ask {
            caller,
            ..Ask::new(Op::Read)
        }
        .fires(&plan(rules))
    };
    assert!(!gone("- {who: {pid: 7}, fault: {errno: EIO}}"));
    assert!(!gone("- {who: {comm: '*'}, fault: {errno: EIO}}"));
    assert!(gone("- {who: {uid: 0}, fault: {errno: EIO}}"));
}

#[test]
fn a_name_of_a_thread_matches_too() {
    struct Thread;
    impl hobble_rules::CallerFacts for Thread {
        fn uid(&self) -> u32 {
            0
        }
        fn pid(&self) -> Option<u32> {
            Some(1)
        }
        fn comm(&self) -> Option<Comm> {
            Some(Comm::new(b"java"))
        }
        fn thread_comm(&self) -> Option<Comm> {
            Some(Comm::new(b"GC Thread#0"))
        }
    }
    for (comm, expected) in [("java", true), ("GC Thread*", true), ("main", false)] {
        let plan = plan(&format!(
            "- {{who: {{comm: '{comm}'}}, fault: {{errno: EIO}}}}"
        ));
        let path = plan.match_path(b"x", b"/x");
        let context = OpContext {
            op: Op::Read,
            paths: &[&path],
            caller: &Thread,
            offset: None,
            len: None,
            now: Duration::ZERO,
            file: &|| FileId(0),
        };
        assert_eq!(!plan.decide(&context).is_pass(), expected, "{comm}");
    }
}

#[test]
fn ranges_match_what_touches_them() {
    let plan = plan("- {op: data, range: {start: 1MiB, length: 64KiB}, fault: {errno: EIO}}");
    let start = 1 << 20;
    for (offset, len, expected) in [
        (start, 1, true),
        (start - 1, 1, false),
        (start - 1, 2, true),
        (start + 65535, 1, true),
        (start + 65536, 1, false),
        (0, u64::MAX, true),
        (start, 0, false),
        (u64::MAX, u64::MAX, false),
    ] {
        assert_eq!(
            Ask::new(Op::Read).range(offset, len).fires(&plan),
            expected,
            "{offset} {len}"
        );
    }
    assert!(
        !Ask {
            range: None,
            ..Ask::new(Op::Fallocate)
        }
        .fires(&plan)
    );
    for (range, last) in [
        ("{end: 10}", 9),
        ("{start: 5, end: 10}", 9),
        ("{start: 5}", u64::MAX - 1),
    ] {
        let plan = support::plan(&format!(
            "- {{op: read, range: {range}, fault: {{errno: EIO}}}}"
        ));
        assert!(Ask::new(Op::Read).range(last, 1).fires(&plan), "{range}");
        assert!(
            range.contains("end") != Ask::new(Op::Read).range(last + 1, 1).fires(&plan)
                || last == u64::MAX - 1,
            "{range}"
        );
    }
}

#[test]
fn words_for_operations_stand_for_the_right_ones() {
    let ops = |op: &str| plan(&format!("- {{op: {op}, fault: {{latency: 1s}}}}")).ops();
    assert_eq!(ops("data"), OpSet::DATA);
    assert_eq!(
        ops("[sync, READ]"),
        OpSet::SYNC.union(OpSet::only(Op::Read))
    );
    assert_eq!(
        ops("fsync"),
        [Op::Fsync, Op::Fdatasync].into_iter().collect()
    );
    assert_eq!(ops("fdatasync"), OpSet::only(Op::Fdatasync));
    assert_eq!(
        plan("- {method: Write, fault: {errno: EIO}}").ops(),
        OpSet::only(Op::Write)
    );
    assert_eq!(
        plan("- fault: {latency: 1s}").ops(),
        OpSet::ALL.difference(OpSet::NEVER_SENT)
    );
}

#[test]
fn data_is_intercepted_only_where_a_rule_may_want_it() {
    let plan = plan(
        "- {op: [read, fsync], path: 'base/**', fault: {errno: EIO}}\n- {op: fsync, fault: {latency: 1s}}",
    );
    let at = |path: &str| plan.match_path(path.as_bytes(), b"/");
    assert!(plan.intercepts_data(&at("base/1")));
    assert!(!plan.intercepts_data(&at("other")));
}

#[test]
fn more_than_sixty_four_rules_are_all_asked() {
    let rules: String = (0..200)
        .map(|n| format!("- {{path: 'd{n}/**', fault: {{latency: {}ms}}}}\n", n + 1))
        .collect();
    let plan = plan(&rules);
    for n in [0, 1, 63, 64, 65, 127, 128, 199] {
        let decision = Ask::new(Op::Read).path(&format!("d{n}/x")).of(&plan);
        assert_eq!(decision.delay, Duration::from_millis(n + 1));
        assert_eq!(decision.fired.len(), 1);
        assert_eq!(
            plan.rule_name(decision.fired[0]),
            Some(format!("latency-{}", n + 1).as_str())
        );
    }
    assert!(!Ask::new(Op::Read).path("other/x").fires(&plan));
    assert!(plan.counters().iter().all(|rule| rule.evaluated == 9));
}

#[test]
fn stop_ends_the_list() {
    let plan = plan("- {path: a/**, fault: {latency: 1s}, then: stop}\n- {fault: {latency: 2s}}");
    assert_eq!(Ask::new(Op::Read).path("a/x").of(&plan).delay.as_secs(), 1);
    assert_eq!(Ask::new(Op::Read).path("b/x").of(&plan).delay.as_secs(), 2);
    let counters = plan.counters();
    assert_eq!((counters[0].evaluated, counters[1].evaluated), (2, 1));
}

/// The meaning of globs, once more and as simply as possible.
fn reference(pattern: &[u8], path: &[u8]) -> bool {
    let pattern: Vec<&[u8]> = pattern.split(|byte| *byte == b'/').collect();
    let path: Vec<&[u8]> = path.split(|byte| *byte == b'/').collect();
    if pattern.len() == 1 && pattern[0] != b"**" {
        return segment(pattern[0], path[path.len() - 1]);
    }
    segments(&pattern, &path)
}

fn segments(pattern: &[&[u8]], path: &[&[u8]]) -> bool {
    match (pattern, path) {
        ([], []) => true,
        // At the end, `**` is what lies below: one name at least.
        ([b"**"], rest) => !rest.is_empty(),
        ([b"**", tail @ ..], rest) => (0..=rest.len()).any(|skip| segments(tail, &rest[skip..])),
        ([first, tail @ ..], [name, rest @ ..]) => segment(first, name) && segments(tail, rest),
        _ => false,
    }
}

fn segment(pattern: &[u8], name: &[u8]) -> bool {
    match pattern {
        [] => name.is_empty(),
        [b'*', tail @ ..] => (0..=name.len()).any(|skip| segment(tail, &name[skip..])),
        [b'?', tail @ ..] => !name.is_empty() && segment(tail, &name[1..]),
        [byte, tail @ ..] => name.first() == Some(byte) && segment(tail, &name[1..]),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn globs_agree_with_a_simple_matcher(
        pattern in prop::collection::vec("[ab*?][ab*?.]{0,2}|\\.[ab*?]{1,2}|\\*\\*", 1..4),
        path in prop::collection::vec("[ab][ab.]{0,2}|\\.[ab]{1,2}", 1..5),
    ) {
        // `**` inside a name is two `*`; the simple matcher says so too.
        let pattern = pattern.join("/");
        let path = path.join("/");
        prop_assert_eq!(path_matches(&pattern, path.as_bytes()), reference(pattern.as_bytes(), path.as_bytes()), "{} {}", pattern, path);
    }
}
