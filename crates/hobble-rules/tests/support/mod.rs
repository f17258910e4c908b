//! What the tests of this crate share: rules from text, and operations to ask about.
#![allow(dead_code)] // No test uses all of it.

use std::time::Duration;

use hobble_rules::{Comm, Decision, Diagnostic, FileId, KnownCaller, Op, OpContext, Plan};

/// The plan of rules written as the items of `rules:` in YAML.
pub(crate) fn plan(rules: &str) -> Plan {
    plan_with(rules, 42, None, Duration::ZERO)
}

/// The same with everything that can be chosen.
pub(crate) fn plan_with(rules: &str, seed: u64, previous: Option<&Plan>, now: Duration) -> Plan {
    let (_, experiment) = hobble_rules::load(&document(rules))
        .unwrap_or_else(|found| panic!("{rules}\n{}", lines(&found)));
    Plan::compile(&experiment, seed, previous, now)
}

/// The plan of `--fault` strings.
pub(crate) fn flags(faults: &[&str]) -> Plan {
    let document = hobble_rules::fault_flag::parse_all(faults)
        .unwrap_or_else(|found| panic!("{}", lines(&found)));
    let experiment =
        hobble_rules::check(&document).unwrap_or_else(|found| panic!("{}", lines(&found)));
    Plan::compile(&experiment, 42, None, Duration::ZERO)
}

/// What is wrong with rules written as the items of `rules:`.
pub(crate) fn errors(rules: &str) -> Vec<Diagnostic> {
    match hobble_rules::load(&document(rules)) {
        Ok(_) => panic!("accepted:\n{rules}"),
        Err(found) => found,
    }
}

/// The warnings about rules written as the items of `rules:`.
pub(crate) fn warnings(rules: &str) -> Vec<String> {
    let (_, experiment) = hobble_rules::load(&document(rules))
        .unwrap_or_else(|found| panic!("{rules}\n{}", lines(&found)));
    experiment
        .warnings()
        .iter()
        .map(ToString::to_string)
        .collect()
}

pub(crate) fn document(rules: &str) -> String {
    format!("version: 1\nrules:\n{rules}\n")
}

pub(crate) fn lines(found: &[Diagnostic]) -> String {
    found
        .iter()
        .map(|diagnostic| format!("{diagnostic}\n"))
        .collect()
}

/// An operation to ask about.
#[derive(Clone)]
pub(crate) struct Ask {
    pub(crate) op: Op,
    pub(crate) path: String,
    pub(crate) caller: KnownCaller,
    pub(crate) range: Option<(u64, u64)>,
    pub(crate) now: Duration,
    pub(crate) file: u64,
}

impl Ask {
    pub(crate) fn new(op: Op) -> Self {
        let caller = KnownCaller {
            uid: 1000,
            pid: Some(7),
            comm: Some(Comm::new(b"postgres")),
        };
        Self {
            op,
            path: "base/1/2".into(),
            caller,
            range: Some((0, 4096)),
            now: Duration::ZERO,
            file: 1,
        }
    }

    pub(crate) fn path(self, path: &str) -> Self {
        Self {
            path: path.into(),
            ..self
        }
    }

    pub(crate) fn pid(self, pid: u32) -> Self {
        Self {
            caller: KnownCaller {
                pid: Some(pid),
                ..self.caller
            },
            ..self
        }
    }

    pub(crate) fn uid(self, uid: u32) -> Self {
        Self {
            caller: KnownCaller { uid, ..self.caller },
            ..self
        }
    }

    pub(crate) fn comm(self, comm: &str) -> Self {
        Self {
            caller: KnownCaller {
                comm: Some(Comm::new(comm.as_bytes())),
                ..self.caller
            },
            ..self
        }
    }

    pub(crate) fn range(self, offset: u64, len: u64) -> Self {
        Self {
            range: Some((offset, len)),
            ..self
        }
    }

    pub(crate) fn now(self, now: Duration) -> Self {
        Self { now, ..self }
    }

    pub(crate) fn file(self, file: u64) -> Self {
        Self { file, ..self }
    }

    pub(crate) fn of(&self, plan: &Plan) -> Decision {
        let path = plan.match_path(
            self.path.as_bytes(),
            format!("/data/{}", self.path).as_bytes(),
        );
        plan.decide(&OpContext {
            op: self.op,
            paths: &[&path],
            caller: &self.caller,
            offset: self.range.map(|(offset, _)| offset),
            len: self.range.map(|(_, len)| len),
            now: self.now,
            file: &|| FileId(self.file),
        })
    }

    /// Whether any rule fires.
    pub(crate) fn fires(&self, plan: &Plan) -> bool {
        !self.of(plan).is_pass()
    }
}
