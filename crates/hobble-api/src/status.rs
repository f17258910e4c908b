//! Snapshots: what one attachment looks like now ([`Status`]), what an attachment would do ([`Preflight`]), and what a
//! machine can do ([`Check`]).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Timestamp;

/// Where an attachment is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The journal exists; nothing of the target has been touched.
    Pending,
    /// The hook is being installed.
    Attaching,
    /// The hook is in place; whether faults are on is told by `paused` and the rules.
    Attached,
    /// Everything is being put back.
    Detaching,
    /// Everything has been put back.
    Detached,
    /// An operation failed; what is left over, if anything, is put back by `hobble recover`.
    Failed,
}

impl Phase {
    /// The lower-case word used in JSON and in tables.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Phase::Pending => "pending",
            Phase::Attaching => "attaching",
            Phase::Attached => "attached",
            Phase::Detaching => "detaching",
            Phase::Detached => "detached",
            Phase::Failed => "failed",
        }
    }
}

/// Whose operations are faulted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// One process and its descendants.
    Tree,
    /// Every process in the target's mount namespace.
    Namespace,
}

impl Scope {
    /// The lower-case word used in JSON, in specifications and on the command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Scope::Tree => "tree",
            Scope::Namespace => "namespace",
        }
    }
}

/// The counters of one rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RuleCounts {
    /// Name of the rule, unique in its experiment.
    pub name: String,
    /// Operations of the rule's kinds that the rule looked at.
    pub evaluated: u64,
    /// Of those, how many passed all its filters.
    pub matched: u64,
    /// Of those, how many its trigger let through: faults that really happened.
    pub injected: u64,
}

/// A process that the experiment hits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TargetProcess {
    /// Process id as seen by Hobble.
    pub pid: u32,
    /// Its name (`/proc/<pid>/comm`).
    pub comm: String,
}

/// Something that works less well than it should, or not at all, and what can be done about it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub struct Reason {
    /// A stable word for scripts (`fcntl_locks`, `no_passthrough`, ...).
    pub code: String,
    /// One sentence for people.
    pub text: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Something of the target that the hook does not cover, or that could not be put back.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub struct NotCovered {
    /// What it is (`fd 7 -> /data/x`, `mapping 7f00…-7f01… /data/y`, ...).
    pub what: String,
    /// Why it stays outside.
    pub reason: String,
    /// The process it belongs to, where it belongs to one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
}

/// One attachment, as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Status {
    /// Identifier of the attachment.
    pub id: String,
    /// Where it is in its life.
    pub phase: Phase,
    /// Whether the rules are switched off for the time being.
    pub paused: bool,
    /// The processes hit. The first one is the process that was named.
    pub targets: Vec<TargetProcess>,
    /// Whose operations are faulted.
    pub scope: Scope,
    /// The volume as the target sees it.
    pub path: String,
    /// When the attachment began.
    #[schemars(with = "String")]
    pub started: Timestamp,
    /// When it recovers by itself; absent means never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub deadline: Option<Timestamp>,
    /// When it recovers unless the lease is renewed before; absent without a lease.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub lease: Option<Timestamp>,
    /// The seed of every random choice.
    pub seed: u64,
    /// The rules with their counters, in the order in which they are asked.
    pub rules: Vec<RuleCounts>,
    /// The process that answers the filesystem's requests; absent when it is dead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_pid: Option<u32>,
    /// The process that keeps descriptors alive when the server dies; absent when it is dead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder_pid: Option<u32>,
    /// Whether files without a rule are read and written inside the kernel, at nearly native speed.
    pub passthrough: bool,
    /// What works less well than it should.
    #[serde(default)]
    pub degraded: Vec<Reason>,
    /// What of the target is not covered by the hook.
    #[serde(default)]
    pub not_covered: Vec<NotCovered>,
}

/// The judgement of pre-flight.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Nothing stands in the way.
    Ok,
    /// It works, with the limits that the reasons name.
    Degraded,
    /// It is not done, for the reasons given.
    Refuse,
}

impl Verdict {
    /// The lower-case word used in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Degraded => "degraded",
            Verdict::Refuse => "refuse",
        }
    }
}

/// A process that attaching would stop and move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AffectedProcess {
    /// Process id as seen by Hobble.
    pub pid: u32,
    /// Its name (`/proc/<pid>/comm`).
    pub comm: String,
    /// Descriptors open on the volume.
    pub descriptors: u64,
    /// Mappings of files of the volume.
    pub mappings: u64,
    /// Locks held on files of the volume.
    pub locks: u64,
}

/// What attaching would do, found out without touching anything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Preflight {
    /// Whether it can be done.
    pub verdict: Verdict,
    /// Why it is degraded or refused; empty when the verdict is `ok`.
    pub reasons: Vec<Reason>,
    /// What would be done, in order, one sentence each.
    pub steps: Vec<String>,
    /// Who would be stopped and moved.
    pub processes: Vec<AffectedProcess>,
}

/// Outcome of one check of `hobble doctor`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum CheckOutcome {
    /// As it should be.
    Ok,
    /// Hobble works, with a limit.
    Warn,
    /// Hobble cannot work.
    Fail,
}

impl CheckOutcome {
    /// The lower-case word used in JSON and in tables.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            CheckOutcome::Ok => "ok",
            CheckOutcome::Warn => "warn",
            CheckOutcome::Fail => "fail",
        }
    }
}

/// One thing that `hobble doctor` looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Check {
    /// A stable word for scripts (`kernel`, `fuse_passthrough`, `capabilities`, ...).
    pub name: String,
    /// What was found.
    pub outcome: CheckOutcome,
    /// The finding, for people.
    pub text: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_json() {
        for phase in [
            Phase::Pending,
            Phase::Attaching,
            Phase::Attached,
            Phase::Detaching,
            Phase::Detached,
            Phase::Failed,
        ] {
            assert_eq!(serde_json::to_value(phase).unwrap(), phase.as_str());
        }
        for scope in [Scope::Tree, Scope::Namespace] {
            assert_eq!(serde_json::to_value(scope).unwrap(), scope.as_str());
        }
        for verdict in [Verdict::Ok, Verdict::Degraded, Verdict::Refuse] {
            assert_eq!(serde_json::to_value(verdict).unwrap(), verdict.as_str());
        }
        for outcome in [CheckOutcome::Ok, CheckOutcome::Warn, CheckOutcome::Fail] {
            assert_eq!(serde_json::to_value(outcome).unwrap(), outcome.as_str());
        }
    }
}
