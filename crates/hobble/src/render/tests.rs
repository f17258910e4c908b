use super::*;
use hobble_api::event::{Progress, Uncovered, Why};
use hobble_api::status::{AffectedProcess, Phase, Scope, TargetProcess};

fn at(kind: EventKind) -> Event {
    Event::new("2026-11-24T08:15:30.1234Z".parse().unwrap(), "k7mq", kind)
}

fn text(lines: Vec<Line>) -> String {
    let lines: Vec<String> = lines
        .into_iter()
        .map(|line| match line {
            Line::Plain(text) => text,
            Line::Warning(text) => format!("warning: {text}"),
            Line::Hint(text) => format!("hint: {text}"),
        })
        .collect();
    lines.join("\n")
}

fn rule(name: &str, evaluated: u64, matched: u64, injected: u64) -> RuleCounts {
    RuleCounts {
        name: name.into(),
        evaluated,
        matched,
        injected,
    }
}

#[test]
fn attached_says_what_moved_and_what_did_not() {
    let kind = EventKind::Attached(Attached {
        pause_us: 1_240,
        processes: 1,
        descriptors: 41,
        mappings: 0,
        locks: 2,
        not_covered: vec![NotCovered {
            what: "fd 9".into(),
            reason: "io_uring".into(),
            pid: Some(7),
        }],
        degraded: vec![Reason {
            code: "fcntl_locks".into(),
            text: "pid 7 holds POSIX locks".into(),
            hint: Some("look".into()),
        }],
    });
    assert_eq!(
        text(event(&at(kind))),
        "attached: 1 process, 41 descriptors, 2 locks moved; the target stood still for 1.2 ms\n\
         warning: degraded: pid 7 holds POSIX locks [fcntl_locks]\n\
         hint: look\n\
         warning: not covered: pid 7, fd 9: io_uring"
    );
}

#[test]
fn the_end_has_a_table_and_calls_out_idle_rules() {
    let kind = EventKind::Recovered(Recovered {
        pause_us: 900,
        rules: vec![
            rule("slow-wal", 1000, 200, 20),
            rule("bad-path", 5000, 0, 0),
            rule("unlucky", 10, 1, 0),
            rule("idle", 0, 0, 0),
        ],
        ..Recovered::default()
    });
    assert_eq!(
        text(event(&at(kind))),
        "recovered: everything is back; the target stood still for 900 µs\n\
         RULE      EVALUATED  MATCHED  INJECTED\n\
         slow-wal       1000      200        20\n\
         bad-path       5000        0         0\n\
         unlucky          10        1         0\n\
         idle              0        0         0\n\
         warning: rule `bad-path` never matched: its path, caller or range let none of 5000 operations through\n\
         warning: rule `unlucky` never fired: its trigger let none of 1 match through\n\
         warning: rule `idle` never matched: no operation of its kinds happened"
    );
}

#[test]
fn several_stops_are_told_with_what_was_put_back() {
    let kind = EventKind::Recovered(Recovered {
        pause_us: 2000,
        stops: 3,
        descriptors: 15_000,
        mappings: 2,
        ..Recovered::default()
    });
    assert_eq!(
        text(event(&at(kind))),
        "recovered: everything is back; the target stood still for 2.0 ms at most, 3 times, for 15000 descriptors and 2 mappings"
    );
}

#[test]
fn what_is_left_is_not_called_everything() {
    let kind = EventKind::Recovered(Recovered {
        pause_us: 1,
        left: vec![NotCovered {
            what: "fd 3".into(),
            reason: "locked".into(),
            pid: None,
        }],
        ..Recovered::default()
    });
    let text = text(event(&at(kind)));
    assert!(
        !text.contains("everything") && text.contains("warning: left: fd 3: locked"),
        "{text}"
    );
}

#[test]
fn history_has_one_line_an_event() {
    for (kind, line) in [
        (
            EventKind::Attaching(Progress {
                phase: "precopy".into(),
                done: 3,
                total: 9,
            }),
            "attaching: precopy 3/9",
        ),
        (
            EventKind::Injecting(Rules {
                seed: 42,
                rules: vec!["a".into(), "b".into()],
            }),
            "injecting: a, b (seed 42)",
        ),
        (
            EventKind::Updated(Rules {
                seed: 1,
                rules: vec![],
            }),
            "updated: no rules (seed 1)",
        ),
        (
            EventKind::NotCovered(Uncovered {
                not_covered: vec![NotCovered {
                    what: "2 open files".into(),
                    reason: "not exchanged".into(),
                    pid: None,
                }],
            }),
            "not covered: 2 open files: not exchanged",
        ),
        (
            EventKind::NotCovered(Uncovered::default()),
            "covered: the rules see every open file again",
        ),
        (
            EventKind::Recovering { why: Why::Deadline },
            "recovering: the time is over",
        ),
        (
            EventKind::Failed(Failed {
                step: "stop".into(),
                cause: "pid 7 did not stop".into(),
                hint: None,
                rolled_back: true,
                exit: None,
            }),
            "failed at stop: pid 7 did not stop; the target is as it was",
        ),
    ] {
        assert_eq!(
            history(&at(kind)),
            format!("2026-11-24T08:15:30.123Z  {line}")
        );
    }
}

#[test]
fn names_from_outside_cannot_steer_the_terminal() {
    let kind = EventKind::Injecting(Rules {
        seed: 1,
        rules: vec!["\x1b[2Jx".into()],
    });
    assert!(!text(event(&at(kind))).contains('\x1b'));
}

#[test]
fn the_plan_is_printed_whole() {
    let plan = Preflight {
        verdict: Verdict::Degraded,
        reasons: vec![Reason {
            code: "sub_directory".into(),
            text: "not a mount root".into(),
            hint: Some("x".into()),
        }],
        steps: vec!["open the journal".into(), "mount".into()],
        processes: vec![AffectedProcess {
            pid: 7,
            comm: "db".into(),
            descriptors: 41,
            mappings: 2,
            locks: 0,
        }],
    };
    assert_eq!(
        text(preflight(&plan)),
        "verdict: degraded\n  not a mount root [sub_directory]\n    hint: x\nplan:\n  1. open the journal\n  2. mount\n\
         affected:\n  PID  NAME  DESCRIPTORS  MAPPINGS  LOCKS\n    7  db             41         2      0"
    );
}

fn sample() -> Status {
    Status {
        id: "k7mq".into(),
        phase: Phase::Attached,
        paused: true,
        targets: vec![TargetProcess {
            pid: 7,
            comm: "db".into(),
        }],
        scope: Scope::Tree,
        path: "/data".into(),
        started: "2026-11-24T08:00:00Z".parse().unwrap(),
        deadline: Some("2026-11-24T08:10:00Z".parse().unwrap()),
        lease: None,
        seed: 42,
        rules: vec![rule("a", 3, 2, 1)],
        server_pid: Some(100),
        holder_pid: None,
        passthrough: true,
        degraded: vec![],
        not_covered: vec![],
    }
}

#[test]
fn the_list_shows_the_living_and_the_lost() {
    let status = sample();
    let now = "2026-11-24T08:09:00Z".parse().unwrap();
    let rows = [("k7mq", Some(&status)), ("w2xz", None)];
    assert_eq!(
        list(rows.into_iter(), now),
        [
            "ID    PHASE              PID  NAME  PATH   SCOPE  RULES  INJECTED  LEFT",
            "k7mq  attached (paused)    7  db    /data  tree       1         1  1m00s",
            "w2xz  lost                 -  -     -",
        ]
    );
}

#[test]
fn one_attachment_in_full() {
    let lines = text(status(&sample(), "2026-11-24T08:11:00Z".parse().unwrap()));
    for fact in [
        "phase      attached (paused)",
        "targets    7 (db)",
        "recovers   2026-11-24T08:10:00Z (in 0 s)",
        "holder     dead",
        "RULE  EVALUATED  MATCHED  INJECTED",
    ] {
        assert!(lines.contains(fact), "{fact} is not in\n{lines}");
    }
}
