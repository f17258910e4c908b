//! Documents: printing and reading back, the schema, the examples, and input that means harm.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)] // A test may.

mod support;

use std::path::{Path, PathBuf};
use std::time::Duration;

use hobble_rules::spec::{
    AttrSpec, CorruptShape, CorruptSpec, ErrnoItem, ErrnoName, ErrnoSpec, FaultSpec, LatencyShape,
    LatencySpec, NumberOrText, OneOrMany, RangeSpec, TargetSpec, TimeParts, TimeSpec,
    WeightedErrno, WhenSpec, WhoSpec,
};
use hobble_rules::{Document, RuleSpec};
use proptest::option::of;
use proptest::prelude::*;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[test]
fn the_schema_is_as_checked_in() {
    let path = root().join("docs/experiment.schema.json");
    let generated = hobble_rules::schema();
    if std::env::var_os("HOBBLE_BLESS").is_some() {
        std::fs::write(&path, &generated).unwrap();
    }
    let checked_in = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        checked_in == generated,
        "docs/experiment.schema.json is out of date: HOBBLE_BLESS=1 cargo test -p hobble-rules --test documents"
    );
}

#[test]
fn the_examples_are_accepted_and_read_back() {
    let mut count = 0;
    for entry in std::fs::read_dir(root().join("examples")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let (document, experiment) = hobble_rules::load(&text)
            .unwrap_or_else(|found| panic!("{}:\n{}", path.display(), support::lines(&found)));
        assert!(!experiment.rules().is_empty(), "{}", path.display());
        assert_eq!(
            hobble_rules::parse(&document.to_yaml().unwrap()).unwrap(),
            document,
            "{}",
            path.display()
        );
        count += 1;
    }
    assert!(count >= 4);
}

/// Every indented or fenced YAML specification in the documentation is accepted.
#[test]
fn the_specifications_in_the_documentation_are_accepted() {
    let mut pages = vec![root().join("docs/rules.md")];
    pages.extend(
        std::fs::read_dir(root().join("docs/faults"))
            .unwrap()
            .map(|entry| entry.unwrap().path()),
    );
    let (mut specs, mut strings) = (0, 0);
    for page in pages {
        let text = std::fs::read_to_string(&page).unwrap();
        for block in text.split("```yaml\n").skip(1) {
            let block = block.split("```").next().unwrap();
            let block = if block.starts_with("version:") {
                block.to_owned()
            } else {
                support::document(block)
            };
            let loaded = hobble_rules::load(&block);
            assert!(
                loaded.is_ok(),
                "{}:\n{block}\n{}",
                page.display(),
                support::lines(&loaded.unwrap_err())
            );
            specs += 1;
        }
        for string in text.split("--fault '").skip(1) {
            let string = string.split('\'').next().unwrap();
            let checked = hobble_rules::fault_flag::parse_all(&[string])
                .and_then(|document| hobble_rules::check(&document));
            assert!(
                checked.is_ok(),
                "{}: {string}\n{}",
                page.display(),
                support::lines(&checked.unwrap_err())
            );
            strings += 1;
        }
    }
    assert!(
        specs >= 5 && strings >= 8,
        "{specs} specifications, {strings} strings"
    );
}

#[test]
fn json_is_accepted_by_the_same_entry_point_and_by_serde() {
    let json = r#"{"version": 1, "rules": [{"op": ["read"], "fault": {"errno": "EIO", "latency": "30s"}, "when": {"percent": 12.5}}]}"#;
    let document = hobble_rules::parse(json).unwrap();
    assert_eq!(serde_json::from_str::<Document>(json).unwrap(), document);
    assert_eq!(
        hobble_rules::parse(&serde_json::to_string_pretty(&document).unwrap()).unwrap(),
        document
    );
    let error = serde_json::from_str::<Document>(r#"{"version": 1, "rulez": []}"#)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("unknown key `rulez` (did you mean `rules`?)"),
        "{error}"
    );
}

#[test]
fn a_fault_string_and_its_yaml_are_the_same() {
    for (string, yaml) in [
        (
            "latency=20ms jitter=5ms op=write,fsync path=pg_wal/** percent=10",
            "{op: [write, fsync], path: pg_wal/**, when: {percent: 10}, fault: {latency: {mean: 20ms, jitter: 5ms}}}",
        ),
        (
            "errno=EIO op=write percent=30.5",
            "{op: write, when: {percent: 30.5}, fault: {errno: EIO}}",
        ),
        ("errno=5", "{fault: {errno: 5}}"),
        (
            "errno=EIO:3,ENOSPC:1",
            "{fault: {errno: [{errno: EIO, weight: 3}, {errno: ENOSPC, weight: 1}]}}",
        ),
        ("errno=EIO,EROFS", "{fault: {errno: [EIO, EROFS]}}"),
        (
            "attr.perm=0 attr.size=+1KiB attr.mtime=-1h",
            "{fault: {attr: {perm: \"0\", size: +1KiB, mtime: -1h}}}",
        ),
        ("corrupt=zero", "{fault: {corrupt: zero}}"),
        (
            "corrupt=zero occurrences=3 length=16 op=read",
            "{op: read, fault: {corrupt: {fill: zero, occurrences: 3, length: 16}}}",
        ),
        (
            "latency=1s errno=EIO name=x then=stop",
            "{name: x, then: stop, fault: {latency: 1s, errno: EIO}}",
        ),
        (
            "latency.mean=1s latency.max=2s latency.distribution=exponential",
            "{fault: {latency: {mean: 1s, max: 2s, distribution: exponential}}}",
        ),
        (
            "errno=EIO pid=1,2 uid=0 comm='a b'",
            "{who: {pid: [1, 2], uid: 0, comm: a b}, fault: {errno: EIO}}",
        ),
        (
            "errno=EIO range=1MiB+64KiB",
            "{range: {start: 1MiB, length: 64KiB}, fault: {errno: EIO}}",
        ),
        (
            "errno=EIO range=..10",
            "{range: {end: 10}, fault: {errno: EIO}}",
        ),
        (
            "errno=EIO path={a,b}/*,c exclude=\"with, comma\"",
            "{path: ['{a,b}/*', c], exclude: 'with, comma', fault: {errno: EIO}}",
        ),
        (
            "errno=EIO after=1 every=2 times=3 from=4s for=5s per=file method=read",
            "{op: read, when: {after: 1, every: 2, times: 3, from: 4s, for: 5s, per: file}, fault: {errno: EIO}}",
        ),
        (
            "errno=EIO path=\"a \\\"b\\\" \\\\*\"",
            "{path: 'a \"b\" \\*', fault: {errno: EIO}}",
        ),
    ] {
        let expected = hobble_rules::parse(&support::document(&format!("- {yaml}")))
            .unwrap_or_else(|found| panic!("{yaml}\n{}", support::lines(&found)));
        let found = hobble_rules::fault_flag::parse_all(&[string])
            .unwrap_or_else(|found| panic!("{string}\n{}", support::lines(&found)));
        assert_eq!(found, expected, "{string}");
        assert_eq!(
            hobble_rules::parse(&found.to_yaml().unwrap()).unwrap(),
            expected,
            "{string}"
        );
        assert_eq!(
            hobble_rules::fault_flag::parse(string).unwrap(),
            expected.rules[0]
        );
        hobble_rules::check(&found)
            .unwrap_or_else(|found| panic!("{string}\n{}", support::lines(&found)));
    }
}

#[test]
fn a_file_and_strings_are_loaded_together_and_all_mistakes_are_found() {
    let good = "version: 1\nrules:\n- {fault: {errno: EIO}, op: read}\n";
    let (document, experiment) =
        hobble_rules::load_all(Some(good), &["latency=1s", "errno=EROFS op=write"]).unwrap();
    assert_eq!(document.rules.len(), 3);
    let names: Vec<&str> = experiment
        .rules()
        .iter()
        .map(hobble_rules::Rule::name)
        .collect();
    assert_eq!(names, ["errno-1", "latency-2", "errno-3"]);

    let bad = "version: 1\nrules:\n- {fualt: {errno: EIO}}\n- {op: raed, fault: {errno: EIO}}\n";
    let found =
        hobble_rules::load_all(Some(bad), &["latency=1", "errno=EIO opp=read"]).unwrap_err();
    let said = support::lines(&found);
    for expected in [
        "3:4: rules[0]: unknown key `fualt` (did you mean `fault`?)",
        "4:8: rules[1].op: unknown op `raed` (did you mean `read`?)",
        "--fault 1, column 9: fault.latency: `1`: a duration needs a unit",
        "--fault 2, column 11: unknown key `opp` (did you mean `op`?)",
    ] {
        assert!(said.contains(expected), "{expected}\n--\n{said}");
    }
    assert_eq!(found[2].field, "rules[2].fault.latency", "{said}");
}

/// Nonsense, and how it is made.
fn hostile() -> Vec<(&'static str, String)> {
    let mut bomb = "a: &a [1,1,1,1,1,1,1,1,1]\n".to_owned();
    for (before, name) in ('a'..='y').zip('b'..='z') {
        bomb.push_str(&format!(
            "{name}: &{name} [{}]\n",
            vec![format!("*{before}"); 9].join(",")
        ));
    }
    let item = "- {op: raed, path: \"{a,b\", fault: {errno: EIOO}}\n";
    vec![
        ("ten mebibytes", "x".repeat(10 << 20)),
        ("a mebibyte of letters", "x".repeat(1 << 20)),
        ("open brackets", "[".repeat(500_000)),
        ("open braces", "{\"a\":".repeat(200_000)),
        ("nested lists", "- ".repeat(300_000)),
        ("nested keys", "? ".repeat(300_000)),
        ("aliases of aliases", bomb),
        (
            "a recursive alias",
            "version: 1\nrules: &a [*a]\n".to_owned(),
        ),
        (
            "many keys",
            (0..80_000).map(|n| format!("k{n}: 1\n")).collect(),
        ),
        ("many wrong rules", support::document(&item.repeat(10_000))),
        (
            "many patterns",
            support::document(&format!(
                "- {{path: [{}], fault: {{errno: EIO}}}}",
                "'**/{a,b,*c}?/x[!y-z]*',".repeat(20_000)
            )),
        ),
        (
            "one long pattern",
            support::document(&format!(
                "- {{path: '{}', fault: {{errno: EIO}}}}",
                "*a".repeat(100_000)
            )),
        ),
        (
            "nested alternatives",
            support::document(&format!(
                "- {{path: '{}', fault: {{errno: EIO}}}}",
                "{".repeat(2_000)
            )),
        ),
        ("a long key", format!("{}: 1\n", "k".repeat(1_000_000))),
        ("an open quote", format!("\"{}", "\\n".repeat(300_000))),
        (
            "control characters",
            "\u{0}\u{1}\u{7f}\u{feff}".repeat(1000),
        ),
        ("many documents", "---\n".repeat(100_000)),
    ]
}

/// Time that this thread has had a processor, so that other tests on a busy machine do not count (proc(5), schedstat).
fn on_cpu() -> Duration {
    let schedstat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(schedstat.split(' ').next().unwrap().parse().unwrap())
}

#[test]
fn nonsense_is_refused_at_once() {
    for (what, text) in hostile() {
        // The stack of a thread of the standard library, as a server may have it.
        let (took, refused) = std::thread::spawn(move || {
            let start = on_cpu();
            let refused = hobble_rules::load(&text).is_err();
            (on_cpu() - start, refused)
        })
        .join()
        .unwrap();
        assert!(refused, "{what}");
        assert!(took < Duration::from_secs(1), "{what}: {took:?}");
    }
}

#[test]
fn the_largest_experiment_is_compiled_in_time() {
    let rules: String = (0..4096)
        .map(|n| format!("- {{op: read, path: 'd{n}/**/[xyz]*', fault: {{errno: EIO}}}}\n"))
        .collect();
    let start = on_cpu();
    let plan = support::plan(&rules);
    assert!(
        plan.match_path(b"d4095/a/x", b"/")
            .ops()
            .contains(hobble_rules::Op::Read)
    );
    let took = on_cpu() - start;
    assert!(took < Duration::from_secs(5), "{took:?}");
}

fn word() -> BoxedStrategy<String> {
    prop_oneof![
        "[a-zA-Z0-9*?/._+-]{1,12}",
        "\\PC{0,12}",
        Just("0644".to_owned()),
        Just("1e5".to_owned()),
        Just("yes".to_owned()),
        Just("null".to_owned()),
        Just("~".to_owned()),
        Just("+1".to_owned()),
        Just("1_000".to_owned()),
        Just("0x10".to_owned()),
        Just("- a: b # c".to_owned()),
        Just("line\nbreak \t\u{7f}\u{85}".to_owned()),
        Just(" blank ".to_owned()),
        Just("x".repeat(200)),
        Just("word ".repeat(40)),
    ]
    .boxed()
}

fn some<T: std::fmt::Debug + Clone + 'static>(
    item: impl Strategy<Value = T> + Clone + 'static,
) -> impl Strategy<Value = OneOrMany<T>> {
    prop_oneof![
        item.clone().prop_map(OneOrMany::One),
        prop::collection::vec(item, 0..3).prop_map(OneOrMany::Many)
    ]
}

fn number_or_text() -> impl Strategy<Value = NumberOrText> {
    prop_oneof![
        any::<u64>().prop_map(NumberOrText::Number),
        word().prop_map(NumberOrText::Text)
    ]
}

fn errno_name() -> impl Strategy<Value = ErrnoName> {
    prop_oneof![
        any::<u64>().prop_map(ErrnoName::Number),
        word().prop_map(ErrnoName::Name)
    ]
}

fn errno() -> impl Strategy<Value = ErrnoSpec> {
    let item = prop_oneof![
        errno_name().prop_map(ErrnoItem::Plain),
        (errno_name(), any::<u32>())
            .prop_map(|(errno, weight)| ErrnoItem::Weighted(WeightedErrno { errno, weight }))
    ];
    prop_oneof![
        errno_name().prop_map(ErrnoSpec::One),
        prop::collection::vec(item, 0..3).prop_map(ErrnoSpec::List),
        prop::collection::btree_map("[A-Z]{2,8}", any::<u32>(), 0..3).prop_map(ErrnoSpec::Weights)
    ]
}

fn latency() -> impl Strategy<Value = LatencySpec> {
    let shape = (word(), of(word()), of(word()), of(word()), of(word())).prop_map(
        |(mean, jitter, distribution, min, max)| LatencyShape {
            mean,
            jitter,
            distribution,
            min,
            max,
        },
    );
    prop_oneof![
        word().prop_map(LatencySpec::Fixed),
        shape.prop_map(LatencySpec::Shaped)
    ]
}

fn attr() -> impl Strategy<Value = AttrSpec> {
    let time = || {
        of(prop_oneof![
            word().prop_map(TimeSpec::Text),
            (any::<i64>(), any::<u32>())
                .prop_map(|(sec, nsec)| TimeSpec::Parts(TimeParts { sec, nsec }))
        ])
    };
    let amount = || of(number_or_text());
    let first = (of(any::<u64>()), amount(), amount(), time(), time(), time());
    let second = (
        of(word()),
        amount(),
        amount(),
        of(any::<u32>()),
        of(any::<u32>()),
        amount(),
    );
    (first, second).prop_map(
        |((ino, size, blocks, atime, mtime, ctime), (kind, perm, nlink, uid, gid, rdev))| {
            AttrSpec {
                ino,
                size,
                blocks,
                atime,
                mtime,
                ctime,
                kind,
                perm,
                nlink,
                uid,
                gid,
                rdev,
            }
        },
    )
}

fn corrupt() -> impl Strategy<Value = CorruptSpec> {
    let shape =
        (word(), of(any::<u64>()), of(number_or_text())).prop_map(|(fill, occurrences, length)| {
            CorruptShape {
                fill,
                occurrences,
                length,
            }
        });
    prop_oneof![
        word().prop_map(CorruptSpec::Fill),
        shape.prop_map(CorruptSpec::Full)
    ]
}

fn rule() -> impl Strategy<Value = RuleSpec> {
    let who = (
        of(some(any::<u32>())),
        of(some(word())),
        of(some(any::<u32>())),
    )
        .prop_map(|(pid, comm, uid)| WhoSpec { pid, comm, uid });
    let range = (
        of(number_or_text()),
        of(number_or_text()),
        of(number_or_text()),
    )
        .prop_map(|(start, length, end)| RangeSpec { start, length, end });
    let percent = prop_oneof![
        (0_u32..=100).prop_map(f64::from),
        0.0..=100.0_f64,
        Just(1e-300),
        Just(1e300),
        Just(-5.0)
    ];
    let when = (
        of(percent),
        of(any::<u64>()),
        of(any::<u64>()),
        of(any::<u64>()),
        of(word()),
        of(word()),
        of(word()),
    )
        .prop_map(
            |(percent, after, every, times, from, lasting, per)| WhenSpec {
                percent,
                after,
                every,
                times,
                from,
                lasting,
                per,
            },
        );
    let fault = (of(latency()), of(errno()), of(attr()), of(corrupt()))
        .prop_filter("a fault", |(latency, errno, attr, corrupt)| {
            latency.is_some() || errno.is_some() || attr.is_some() || corrupt.is_some()
        })
        .prop_map(|(latency, errno, attr, corrupt)| FaultSpec {
            latency,
            errno,
            attr,
            corrupt,
        });
    let filters = (
        of(word()),
        of(some(word())),
        of(some(word())),
        of(some(word())),
        of(who),
        of(range),
    );
    (filters, of(when), fault, of(word())).prop_map(
        |((name, op, path, exclude, who, range), when, fault, then)| RuleSpec {
            name,
            op,
            path,
            exclude,
            who,
            range,
            when,
            fault,
            then,
            ..RuleSpec::default()
        },
    )
}

fn any_document() -> impl Strategy<Value = Document> {
    let head = (
        of(word()),
        of(any::<u32>()),
        of(word()),
        of(any::<u64>()),
        of(word()),
    );
    (head, prop::collection::vec(rule(), 0..4)).prop_map(
        |((volume, pid, duration, seed, scope), rules)| Document {
            volume,
            target: pid.map(|pid| TargetSpec { pid }),
            duration,
            seed,
            scope,
            ..Document::with_rules(rules)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn what_is_printed_reads_back_as_the_same(document in any_document()) {
        let yaml = document.to_yaml().unwrap();
        let read = hobble_rules::parse(&yaml).map_err(|found| TestCaseError::fail(format!("{yaml}\n{}", support::lines(&found))))?;
        prop_assert_eq!(&read, &document, "{}", yaml);
        let json = serde_json::to_string(&document).unwrap();
        prop_assert_eq!(serde_json::from_str::<Document>(&json).unwrap(), document);
    }

    /// Whatever it says, checking it ends, and what passes can be compiled.
    #[test]
    fn any_document_is_checked_without_panic(document in any_document()) {
        if let Ok(experiment) = hobble_rules::check(&document) {
            let plan = hobble_rules::Plan::compile(&experiment, 1, None, Duration::ZERO);
            let _ = support::Ask::new(hobble_rules::Op::Read).of(&plan);
        }
    }

    #[test]
    fn any_text_is_read_without_panic(text in prop_oneof![
        "\\PC{0,200}",
        "[\\[\\]{}:,&*#|>'\"!%@`?\\n -]{0,100}",
        "version: 1\nrules:\n- \\{(op|path|fault|when): [a-z\\[\\]{}:, 0-9*]{0,40}",
    ]) {
        let _ = hobble_rules::load(&text);
        let _ = hobble_rules::fault_flag::parse_all(&[&text]);
    }
}
