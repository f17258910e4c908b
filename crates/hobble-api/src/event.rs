//! Events: what happened to an attachment, one JSON object a line.
//!
//! Every line has `v`, `time`, `id` and `event`; the other fields belong to the event. Readers must be forward compatible,
//! and this one is: an event whose name it does not know becomes [`EventKind::Other`] with all its fields kept, and unknown
//! fields of known events are ignored. A known event that lacks a field is an error, never an `Other`.

use schemars::JsonSchema;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use crate::exit::ExitCode;
use crate::status::{NotCovered, Preflight, Reason, RuleCounts};
use crate::{Timestamp, VERSION};

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct Event {
    /// Version of the format, [`VERSION`].
    pub v: u32,
    /// When it happened.
    #[schemars(with = "String")]
    pub time: Timestamp,
    /// The attachment it belongs to.
    pub id: String,
    /// Its number among the events of the attachment, from 0 up without gaps; absent on events that the attachment did
    /// not record (those before its journal existed).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seq: Option<u64>,
    /// What happened.
    #[serde(flatten)]
    pub kind: EventKind,
}

impl Event {
    /// An event without a sequence number.
    #[must_use]
    pub fn new(time: Timestamp, id: impl Into<String>, kind: EventKind) -> Self {
        Self {
            v: VERSION,
            time,
            id: id.into(),
            seq: None,
            kind,
        }
    }

    /// The line, with its newline.
    ///
    /// # Errors
    /// Never for events made of these types; the signature is that of the serializer.
    pub fn to_line(&self) -> Result<String, serde_json::Error> {
        let mut line = serde_json::to_string(self)?;
        line.push('\n');
        Ok(line)
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum EventKind {
    /// Pre-flight has judged; nothing has been touched.
    Preflight(Preflight),
    /// Attaching makes progress.
    Attaching(Progress),
    /// The hook is in place and the target runs on it.
    Attached(Attached),
    /// The rules are in force from now on.
    Injecting(Rules),
    /// Other rules are in force from now on.
    Updated(Rules),
    /// The rules are off until resumed.
    Paused {},
    /// The rules are on again.
    Resumed {},
    /// What the rules in force do not see of the target has changed.
    NotCovered(Uncovered),
    /// The server was killed and another has taken over, with its files, locks and requests.
    TakenOver(TakenOver),
    /// Recovery has begun; no fault happens from now on.
    Recovering {
        /// What caused it.
        why: Why,
    },
    /// An attempt to put everything back has failed: the target works through the hook, without faults, and it is tried again.
    Retrying(Retrying),
    /// Everything has been put back but for what `left` names.
    Recovered(Recovered),
    /// An operation failed.
    Failed(Failed),
    /// An event of a later version, kept as it came.
    #[serde(untagged)]
    Other(Map<String, Value>),
}

impl EventKind {
    /// The name of the event as written in JSON.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            EventKind::Preflight(_) => "preflight",
            EventKind::Attaching(_) => "attaching",
            EventKind::Attached(_) => "attached",
            EventKind::Injecting(_) => "injecting",
            EventKind::Updated(_) => "updated",
            EventKind::Paused {} => "paused",
            EventKind::Resumed {} => "resumed",
            EventKind::NotCovered(_) => "not_covered",
            EventKind::TakenOver(_) => "taken_over",
            EventKind::Recovering { .. } => "recovering",
            EventKind::Retrying(_) => "retrying",
            EventKind::Recovered(_) => "recovered",
            EventKind::Failed(_) => "failed",
            EventKind::Other(fields) => fields
                .get("event")
                .and_then(Value::as_str)
                .unwrap_or("unknown"),
        }
    }

    /// Whether nothing follows in the life of the attachment.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, EventKind::Recovered(_) | EventKind::Failed(_))
    }
}

/// How far attaching has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Progress {
    /// The step of the plan that is running (`pre_copy`, `switch`, ...).
    pub phase: String,
    /// How much of it is done.
    pub done: u64,
    /// How much there is; 0 while unknown.
    pub total: u64,
}

/// The hook is in place.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Attached {
    /// Longest time any process of the target stood still, in microseconds.
    pub pause_us: u64,
    /// Processes moved.
    pub processes: u64,
    /// Descriptors moved.
    pub descriptors: u64,
    /// Mappings moved.
    pub mappings: u64,
    /// Locks carried over.
    pub locks: u64,
    /// What of the target stays outside the hook.
    #[serde(default)]
    pub not_covered: Vec<NotCovered>,
    /// What works less well than it should.
    #[serde(default)]
    pub degraded: Vec<Reason>,
}

/// A rule set came into force.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Rules {
    /// The seed of every random choice: the same seed and rules make the same decisions.
    pub seed: u64,
    /// Names of the rules, in the order in which they are asked; empty with `--no-rules`.
    pub rules: Vec<String>,
}

/// Another server has taken over.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TakenOver {
    /// The process that serves now.
    pub server_pid: u32,
    /// Whether the experiment goes on; else the target is recovered now.
    pub goes_on: bool,
    /// How long nobody served after the death was noticed, in microseconds.
    pub gap_us: u64,
}

/// What the rules in force do not see of the target, besides what `attached` told.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Uncovered {
    /// All of it; empty when everything is seen again.
    pub not_covered: Vec<NotCovered>,
}

/// What caused a recovery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Why {
    /// `hobble recover`, or the end of the command that the attachment was made for.
    User,
    /// SIGINT or SIGTERM to the command in the foreground, or SIGTERM to the server.
    Signal,
    /// The time given by `--for` is over.
    Deadline,
    /// The last process of the target has exited.
    TargetExit,
    /// The server was killed, and its holder or a later command puts things back.
    LostServer,
    /// Whoever had to renew the lease did not.
    LostLease,
    /// Somebody removed the mount from under the attachment.
    HookLost,
    /// Attaching failed after side effects.
    Failed,
    /// A cause of a later version.
    #[serde(other)]
    Other,
}

impl Why {
    /// The clause that completes "recovering: ...".
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Why::User => "asked to",
            Why::Signal => "interrupted",
            Why::Deadline => "the time is over",
            Why::TargetExit => "the target has exited",
            Why::LostServer => "the server died",
            Why::LostLease => "the lease was not renewed",
            Why::HookLost => "the hook was removed by somebody else",
            Why::Failed => "attaching failed",
            Why::Other => "for a reason that this version does not know",
        }
    }
}

/// An attempt to put everything back has failed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Retrying {
    /// The error and what caused it, outermost first, joined by `: `.
    pub cause: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// When it is tried again, in milliseconds from now.
    pub in_ms: u64,
}

/// Everything has been put back but for what `left` names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Recovered {
    /// Longest time any process of the target stood still while things were put back, in microseconds.
    pub pause_us: u64,
    /// Times that the target was stopped for it: more than one where there was much to put back, or something came late.
    #[serde(default)]
    pub stops: u64,
    /// Descriptors put back.
    #[serde(default)]
    pub descriptors: u64,
    /// Mappings put back.
    #[serde(default)]
    pub mappings: u64,
    /// Final counters of the rules, in the order in which they were asked.
    pub rules: Vec<RuleCounts>,
    /// What could not be put back; empty in the normal case.
    #[serde(default)]
    pub left: Vec<NotCovered>,
}

/// An operation failed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Failed {
    /// The step of the plan that failed.
    pub step: String,
    /// The error and what caused it, outermost first, joined by `: `.
    pub cause: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Whether the target is as it was: true also when it was never touched.
    pub rolled_back: bool,
    /// The exit code that fits, where the other fields do not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<ExitCode>,
}

impl<'de> Deserialize<'de> for Event {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Head {
            v: u32,
            time: Timestamp,
            id: String,
            #[serde(default)]
            seq: Option<u64>,
            event: String,
        }
        let mut fields = Map::deserialize(deserializer)?;
        let head = Head::deserialize(Value::Object(fields.clone())).map_err(D::Error::custom)?;
        let kind = match Known::parse(&head.event, &fields).map_err(D::Error::custom)? {
            Some(kind) => kind,
            None => {
                for shared in ["v", "time", "id", "seq"] {
                    fields.remove(shared);
                }
                EventKind::Other(fields)
            }
        };
        Ok(Event {
            v: head.v,
            time: head.time,
            id: head.id,
            seq: head.seq,
            kind,
        })
    }
}

/// The events this version knows.
struct Known;

impl Known {
    fn parse(
        name: &str,
        fields: &Map<String, Value>,
    ) -> Result<Option<EventKind>, serde_json::Error> {
        #[derive(Deserialize)]
        struct Recovering {
            why: Why,
        }
        let value = Value::Object(fields.clone());
        Ok(Some(match name {
            "preflight" => EventKind::Preflight(Deserialize::deserialize(value)?),
            "attaching" => EventKind::Attaching(Deserialize::deserialize(value)?),
            "attached" => EventKind::Attached(Deserialize::deserialize(value)?),
            "retrying" => EventKind::Retrying(Deserialize::deserialize(value)?),
            "injecting" => EventKind::Injecting(Deserialize::deserialize(value)?),
            "updated" => EventKind::Updated(Deserialize::deserialize(value)?),
            "paused" => EventKind::Paused {},
            "resumed" => EventKind::Resumed {},
            "taken_over" => EventKind::TakenOver(Deserialize::deserialize(value)?),
            "not_covered" => EventKind::NotCovered(Deserialize::deserialize(value)?),
            "recovering" => EventKind::Recovering {
                why: Recovering::deserialize(value)?.why,
            },
            "recovered" => EventKind::Recovered(Deserialize::deserialize(value)?),
            "failed" => EventKind::Failed(Deserialize::deserialize(value)?),
            _ => return Ok(None),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{AffectedProcess, Verdict};

    fn at(kind: EventKind) -> Event {
        let mut event = Event::new(
            "2026-11-24T08:15:30.5Z".parse().unwrap(),
            "brisk-otter",
            kind,
        );
        event.seq = Some(3);
        event
    }

    fn every_kind() -> Vec<EventKind> {
        vec![
            EventKind::Preflight(Preflight {
                verdict: Verdict::Degraded,
                reasons: vec![Reason {
                    code: "fcntl_locks".into(),
                    text: "pid 7 holds POSIX locks".into(),
                    hint: None,
                }],
                steps: vec!["mount the hook over /data".into()],
                processes: vec![AffectedProcess {
                    pid: 7,
                    comm: "db".into(),
                    descriptors: 3,
                    mappings: 1,
                    locks: 1,
                }],
            }),
            EventKind::Attaching(Progress {
                phase: "pre_copy".into(),
                done: 1,
                total: 3,
            }),
            EventKind::Attached(Attached {
                pause_us: 1200,
                processes: 1,
                descriptors: 3,
                mappings: 1,
                locks: 1,
                not_covered: vec![NotCovered {
                    what: "fd 9".into(),
                    reason: "io_uring".into(),
                    pid: Some(7),
                }],
                degraded: vec![],
            }),
            EventKind::Injecting(Rules {
                seed: u64::MAX,
                rules: vec!["errno-1".into()],
            }),
            EventKind::Updated(Rules::default()),
            EventKind::Paused {},
            EventKind::Resumed {},
            EventKind::NotCovered(Uncovered {
                not_covered: vec![NotCovered {
                    what: "2 open files".into(),
                    reason: "not exchanged".into(),
                    pid: None,
                }],
            }),
            EventKind::Recovering {
                why: Why::TargetExit,
            },
            EventKind::Recovered(Recovered {
                pause_us: 900,
                stops: 2,
                descriptors: 7,
                mappings: 1,
                rules: vec![RuleCounts {
                    name: "errno-1".into(),
                    evaluated: 10,
                    matched: 4,
                    injected: 2,
                }],
                left: vec![],
            }),
            EventKind::Failed(Failed {
                step: "switch".into(),
                cause: "pid 7 did not stop".into(),
                hint: Some("try again".into()),
                rolled_back: true,
                exit: Some(ExitCode::RolledBack),
            }),
        ]
    }

    #[test]
    fn every_kind_survives_the_round_trip_under_its_name() {
        for kind in every_kind() {
            let event = at(kind);
            let line = event.to_line().unwrap();
            assert!(line.ends_with('\n'));
            let value: Value = serde_json::from_str(&line).unwrap();
            assert_eq!(value["event"], event.kind.name(), "{line}");
            assert_eq!(value["v"], 1);
            assert_eq!(value["time"], "2026-11-24T08:15:30.5Z");
            assert_eq!(value["id"], "brisk-otter");
            assert_eq!(
                serde_json::from_str::<Event>(&line).unwrap(),
                event,
                "{line}"
            );
        }
    }

    #[test]
    fn unknown_events_are_kept_and_written_back_unchanged() {
        let line =
            r#"{"v":1,"time":"2026-11-24T08:15:30Z","id":"a","event":"teleported","to":{"x":1}}"#;
        let event: Event = serde_json::from_str(line).unwrap();
        assert_eq!(event.kind.name(), "teleported");
        assert!(!event.kind.is_final());
        let again: Value = serde_json::from_str(&event.to_line().unwrap()).unwrap();
        assert_eq!(again, serde_json::from_str::<Value>(line).unwrap());
    }

    #[test]
    fn unknown_fields_and_causes_are_tolerated() {
        let line = r#"{"v":1,"time":"2026-11-24T08:15:30Z","id":"a","event":"recovering","why":"eclipse","more":1}"#;
        let event: Event = serde_json::from_str(line).unwrap();
        assert_eq!(event.kind, EventKind::Recovering { why: Why::Other });
    }

    #[test]
    fn a_known_event_without_its_fields_is_an_error() {
        let line = r#"{"v":1,"time":"2026-11-24T08:15:30Z","id":"a","event":"recovered"}"#;
        let error = serde_json::from_str::<Event>(line).unwrap_err().to_string();
        assert!(error.contains("pause_us"), "{error}");
    }

    #[test]
    fn only_the_last_events_are_final() {
        let last: Vec<_> = every_kind()
            .iter()
            .filter(|kind| kind.is_final())
            .map(|kind| kind.name().to_owned())
            .collect();
        assert_eq!(last, ["recovered", "failed"]);
    }
}
