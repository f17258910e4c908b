//! What asking the rules costs, in nanoseconds per operation: `cargo run --release -p hobble-rules --example cost`.
#![allow(clippy::unwrap_used)] // A measurement that cannot be made says so.

use std::hint::black_box;
use std::time::{Duration, Instant};

use hobble_rules::{FileId, KnownCaller, Op, OpContext, Plan, load};

const ROUNDS: usize = 9;
const OPS: u32 = 200_000;

fn plan(rules: &str) -> Plan {
    let (_, experiment) = load(&format!("version: 1\nrules:\n{rules}")).unwrap();
    Plan::compile(&experiment, 42, None, Duration::ZERO)
}

/// Median of several rounds.
fn measure(what: &str, mut operation: impl FnMut()) {
    let mut times: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            (0..OPS).for_each(|_| operation());
            start.elapsed().as_secs_f64() * 1e9 / f64::from(OPS)
        })
        .collect();
    times.sort_by(f64::total_cmp);
    println!("{:>9.1} ns  {what}", times.get(ROUNDS / 2).unwrap());
}

fn ask(what: &str, plan: &Plan, op: Op, path: &str) {
    let matched = plan.match_path(path.as_bytes(), format!("/data/{path}").as_bytes());
    let caller = KnownCaller {
        uid: 0,
        pid: Some(1),
        comm: None,
    };
    let paths = [&matched];
    let context = OpContext {
        op,
        paths: &paths,
        caller: &caller,
        offset: Some(0),
        len: Some(4096),
        now: Duration::ZERO,
        file: &|| FileId(1),
    };
    measure(what, || {
        black_box(plan.decide(black_box(&context)));
    });
}

fn main() {
    let one = plan("- {op: read, path: 'pg_wal/**', fault: {errno: EIO}}");
    measure("no rule names the op: `plan.ops()`", || {
        black_box(black_box(&one).ops().contains(black_box(Op::Write)));
    });
    ask("no rule names the op: `decide`", &one, Op::Write, "base/1");
    ask("one rule, path does not match", &one, Op::Read, "base/1");

    let many: String = (0..1000)
        .map(|n| format!("- {{op: read, path: 'd{n}/**', fault: {{errno: EIO}}}}\n"))
        .collect();
    let many = plan(&many);
    ask(
        "1,000 rules on the op, path does not match",
        &many,
        Op::Read,
        "base/1",
    );
    let who: String = (0..1000)
        .map(|n| {
            format!(
                "- {{op: read, who: {{uid: {}}}, fault: {{errno: EIO}}}}\n",
                n + 1
            )
        })
        .collect();
    ask(
        "1,000 rules on the op and path, none on the caller",
        &plan(&who),
        Op::Read,
        "base/1",
    );

    ask(
        "matches, constant latency",
        &plan("- fault: {latency: 1ms}"),
        Op::Read,
        "x",
    );
    ask(
        "matches, percent: 10, errno",
        &plan("- {when: {percent: 10}, fault: {errno: EIO}}"),
        Op::Read,
        "x",
    );
    ask(
        "matches, normal latency",
        &plan("- fault: {latency: {mean: 1ms, jitter: 100us, distribution: normal}}"),
        Op::Read,
        "x",
    );
    ask(
        "matches, times: 1, per: file",
        &plan("- {when: {times: 1, per: file}, fault: {errno: EIO}}"),
        Op::Read,
        "x",
    );

    for (rules, plan) in [(1, &one), (1000, &many)] {
        measure(&format!("`match_path`, {rules} rule(s), no match"), || {
            black_box(plan.match_path(
                black_box(b"base/16384/2619_fsm"),
                b"/var/lib/data/base/16384/2619_fsm",
            ));
        });
    }
}
