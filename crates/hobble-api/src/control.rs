//! The control socket of one attachment: newline-delimited JSON, one request a line, at least one response a line.
//!
//! A request is `{"v":1,"request":"status"}`; a response is `{"v":1,"ok":{…}}`, `{"v":1,"error":{"cause":…,"hint":…}}` or,
//! before the last one and only for requests that stream, `{"v":1,"event":{…}}`. After its final `ok` or `error` the
//! connection takes the next request.
//!
//! Both ends treat what they read as hostile: lines are bounded by [`MAX_LINE`] ([`LineBuffer`] keeps that), unknown
//! requests, unknown fields of requests and other versions are refused by name.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::event::Event;
use crate::exit::ExitCode;
use crate::status::{NotCovered, Status};
use crate::{Timestamp, VERSION};

/// Longest line accepted, newline excluded, in bytes.
pub const MAX_LINE: usize = 1024 * 1024;

/// What can be asked of an attachment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Are you there? Answered by [`Answer::Pong`].
    Ping {},
    /// What do you look like? Answered by [`Answer::Status`].
    Status {},
    /// Put this whole rule set in force, atomically. Answered by [`Answer::Updated`] once it is.
    Update {
        /// The document in its JSON form; the attachment checks it anew and keeps its old rules if it is wrong. Volume,
        /// target, scope and duration in it are ignored.
        document: Value,
        /// A new seed; absent keeps the present one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seed: Option<u64>,
    },
    /// Switch the rules off. Answered by [`Answer::Done`], also when they were off.
    Pause {},
    /// Switch the rules on. Answered by [`Answer::Done`], also when they were on.
    Resume {},
    /// Renew the lease: count its time anew from now. Answered by [`Answer::Renewed`]; an attachment without a lease refuses.
    Renew {},
    /// Put everything back. Answered by [`Answer::Recovered`] once it has been; what happens meanwhile is told to those who
    /// follow the events.
    Recover {
        /// Go on although something can then not be put back.
        #[serde(default)]
        force: bool,
        /// It is asked for because of a signal to the command that the attachment belongs to.
        #[serde(default)]
        interrupted: bool,
    },
    /// Stream recorded events, then [`Answer::Done`].
    Events {
        /// Stay connected for those to come, until the attachment ends.
        #[serde(default)]
        follow: bool,
        /// Only events from this sequence number on; absent means all that are kept.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        since: Option<u64>,
    },
}

impl Request {
    /// The line to send, with its newline.
    ///
    /// # Errors
    /// [`WireError::TooLong`] when it would not be accepted at the other end.
    pub fn to_line(&self) -> Result<String, WireError> {
        to_line(self)
    }

    /// Reads a line, with or without its newline.
    ///
    /// # Errors
    /// Says what is wrong with the line; nothing of it has been acted on.
    pub fn from_line(line: &[u8]) -> Result<Self, WireError> {
        let fields = open(line)?;
        Self::deserialize(Value::Object(fields)).map_err(WireError::Malformed)
    }
}

/// What an attachment says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// The request was done; the last line for it.
    #[serde(rename = "ok")]
    Ok(Answer),
    /// The request was refused or failed; the last line for it.
    #[serde(rename = "error")]
    Err(Problem),
    /// Something happened; more lines follow.
    Event(Box<Event>),
}

impl Response {
    /// The line to send, with its newline.
    ///
    /// # Errors
    /// [`WireError::TooLong`] when it would not be accepted at the other end.
    pub fn to_line(&self) -> Result<String, WireError> {
        to_line(self)
    }

    /// Reads a line, with or without its newline.
    ///
    /// # Errors
    /// Says what is wrong with the line.
    pub fn from_line(line: &[u8]) -> Result<Self, WireError> {
        let fields = open(line)?;
        Self::deserialize(Value::Object(fields)).map_err(WireError::Malformed)
    }
}

/// The result of a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// It is done, and there is nothing to tell.
    Done {},
    /// The attachment is there.
    Pong {
        /// Its identifier.
        id: String,
        /// The process that answers.
        pid: u32,
        /// The version of Hobble that serves it.
        version: String,
    },
    /// How it looks.
    Status(Box<Status>),
    /// The rules now in force.
    Updated {
        /// The seed now in force.
        seed: u64,
        /// Names of the rules now in force.
        rules: Vec<String>,
    },
    /// The lease is renewed.
    Renewed {
        /// When it ends next.
        until: Timestamp,
    },
    /// The target is native again.
    Recovered {
        /// What could not be put back, or stays on the hook until it is closed; empty in the normal case.
        left: Vec<NotCovered>,
    },
}

/// Why a request was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The error and what caused it, outermost first, joined by `: `.
    pub cause: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// How the command that asked has to end; [`ExitCode::Failed`] where nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<ExitCode>,
}

/// A line that is not a message.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The line does not end within the bound.
    #[error("line longer than {limit} bytes")]
    TooLong {
        /// The bound.
        limit: usize,
    },
    /// The line is not JSON.
    #[error("line is not JSON")]
    NotJson(#[source] serde_json::Error),
    /// The line is JSON, and not an object.
    #[error("line is not a JSON object")]
    NotAnObject,
    /// The line does not say which version it speaks.
    #[error("message without a version number in `v`")]
    NoVersion,
    /// The line speaks another version.
    #[error("message of version {found}, this is version {VERSION}")]
    Version {
        /// What it says in `v`.
        found: u64,
    },
    /// The message is unknown or its fields are wrong.
    #[error("malformed message")]
    Malformed(#[source] serde_json::Error),
    /// The message could not be written.
    #[error("cannot write message as JSON")]
    Encode(#[source] serde_json::Error),
}

/// Cuts a byte stream into lines and never holds more than one line and one read beyond [`MAX_LINE`].
///
/// The stream is left to the caller: give every chunk read to [`push`](Self::push), then take lines until there is none.
#[derive(Debug, Default)]
pub struct LineBuffer {
    bytes: Vec<u8>,
    /// How far `bytes` has been searched for a newline.
    searched: usize,
}

impl LineBuffer {
    /// An empty buffer.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends what was read.
    pub fn push(&mut self, chunk: &[u8]) {
        self.bytes.extend_from_slice(chunk);
    }

    /// Takes the next whole line, without its newline; `None` means that more must be read first.
    ///
    /// # Errors
    /// [`WireError::TooLong`] when the line under way exceeds [`MAX_LINE`]; the stream cannot be used any further.
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, WireError> {
        let unsearched = self.bytes.get(self.searched..).unwrap_or_default();
        match unsearched.iter().position(|&byte| byte == b'\n') {
            Some(offset) => {
                let end = self.searched + offset;
                if end > MAX_LINE {
                    return Err(WireError::TooLong { limit: MAX_LINE });
                }
                let rest = self.bytes.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.bytes, rest);
                line.truncate(end);
                self.searched = 0;
                Ok(Some(line))
            }
            None if self.bytes.len() > MAX_LINE => Err(WireError::TooLong { limit: MAX_LINE }),
            None => {
                self.searched = self.bytes.len();
                Ok(None)
            }
        }
    }

    /// Whether the stream, if it ends here, ends in the middle of a line.
    #[must_use]
    pub fn is_partial(&self) -> bool {
        !self.bytes.is_empty()
    }
}

/// Adds the version and the newline.
fn to_line<T: Serialize>(message: &T) -> Result<String, WireError> {
    #[derive(Serialize)]
    struct Envelope<'a, T> {
        v: u32,
        #[serde(flatten)]
        message: &'a T,
    }
    let mut line = serde_json::to_string(&Envelope {
        v: VERSION,
        message,
    })
    .map_err(WireError::Encode)?;
    if line.len() > MAX_LINE {
        return Err(WireError::TooLong { limit: MAX_LINE });
    }
    line.push('\n');
    Ok(line)
}

/// Checks the bound and the version, and returns the other fields.
fn open(line: &[u8]) -> Result<Map<String, Value>, WireError> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    if line.len() > MAX_LINE {
        return Err(WireError::TooLong { limit: MAX_LINE });
    }
    // serde_json bounds nesting at 128, so a hostile line cannot exhaust the stack.
    match serde_json::from_slice(line).map_err(WireError::NotJson)? {
        Value::Object(mut fields) => match fields.remove("v").as_ref().and_then(Value::as_u64) {
            Some(version) if version == u64::from(VERSION) => Ok(fields),
            Some(found) => Err(WireError::Version { found }),
            None => Err(WireError::NoVersion),
        },
        _ => Err(WireError::NotAnObject),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::EventKind;
    use crate::status::{Phase, Scope};
    use std::error::Error as _;

    fn requests() -> Vec<Request> {
        vec![
            Request::Ping {},
            Request::Status {},
            Request::Update {
                document: serde_json::json!({"version": 1, "rules": []}),
                seed: Some(u64::MAX),
            },
            Request::Pause {},
            Request::Resume {},
            Request::Renew {},
            Request::Recover {
                force: true,
                interrupted: true,
            },
            Request::Events {
                follow: true,
                since: Some(4),
            },
        ]
    }

    fn responses() -> Vec<Response> {
        vec![
            Response::Ok(Answer::Done {}),
            Response::Ok(Answer::Pong {
                id: "a".into(),
                pid: 3,
                version: "0.1.0".into(),
            }),
            Response::Ok(Answer::Status(Box::new(Status {
                id: "a".into(),
                phase: Phase::Attached,
                paused: false,
                targets: vec![],
                scope: Scope::Tree,
                path: "/data".into(),
                started: Timestamp::UNIX_EPOCH,
                deadline: None,
                lease: None,
                seed: 1,
                rules: vec![],
                server_pid: Some(1),
                holder_pid: None,
                passthrough: true,
                degraded: vec![],
                not_covered: vec![],
            }))),
            Response::Ok(Answer::Updated {
                seed: 1,
                rules: vec!["errno-1".into()],
            }),
            Response::Err(Problem {
                cause: "no".into(),
                hint: None,
                exit: Some(ExitCode::NeedsRecovery),
            }),
            Response::Event(Box::new(Event::new(
                Timestamp::UNIX_EPOCH,
                "a",
                EventKind::Paused {},
            ))),
        ]
    }

    use crate::Timestamp;

    #[test]
    fn requests_survive_the_round_trip() {
        for request in requests() {
            let line = request.to_line().unwrap();
            assert!(line.starts_with(r#"{"v":1,"request":""#), "{line}");
            assert_eq!(Request::from_line(line.as_bytes()).unwrap(), request);
        }
    }

    #[test]
    fn responses_survive_the_round_trip() {
        for response in responses() {
            let line = response.to_line().unwrap();
            assert_eq!(
                Response::from_line(line.as_bytes()).unwrap(),
                response,
                "{line}"
            );
        }
    }

    #[test]
    fn left_out_fields_have_their_defaults() {
        assert_eq!(
            Request::from_line(br#"{"v":1,"request":"events"}"#).unwrap(),
            Request::Events {
                follow: false,
                since: None
            }
        );
        assert_eq!(
            Request::from_line(br#"{"v":1,"request":"recover"}"#).unwrap(),
            Request::Recover {
                force: false,
                interrupted: false
            }
        );
    }

    #[test]
    fn wrong_lines_are_refused_by_name() {
        let refused = |line: &str| {
            let error = Request::from_line(line.as_bytes()).unwrap_err();
            match error.source() {
                Some(source) => format!("{error}: {source}"),
                None => error.to_string(),
            }
        };
        assert!(refused("").starts_with("line is not JSON: EOF"));
        assert_eq!(refused("[1]"), "line is not a JSON object");
        assert_eq!(
            refused(r#"{"request":"ping"}"#),
            "message without a version number in `v`"
        );
        assert_eq!(
            refused(r#"{"v":"1","request":"ping"}"#),
            "message without a version number in `v`"
        );
        assert_eq!(
            refused(r#"{"v":2,"request":"ping"}"#),
            "message of version 2, this is version 1"
        );
        assert!(refused(r#"{"v":1}"#).contains("missing field `request`"));
        assert!(refused(r#"{"v":1,"request":"dance"}"#).contains("unknown variant `dance`"));
        assert!(refused(r#"{"v":1,"request":"ping","x":1}"#).contains("unknown field `x`"));
        assert!(
            refused(r#"{"v":1,"request":"recover","force":"yes"}"#).contains("expected a boolean")
        );
        let deep = format!(
            r#"{{"v":1,"request":"update","document":{}{}}}"#,
            "[".repeat(100_000),
            "]".repeat(100_000)
        );
        assert!(refused(&deep).contains("recursion limit"));
    }

    #[test]
    fn long_messages_are_not_even_sent() {
        let request = Request::Update {
            document: Value::String("x".repeat(MAX_LINE)),
            seed: None,
        };
        assert!(matches!(
            request.to_line(),
            Err(WireError::TooLong { limit: MAX_LINE })
        ));
        assert!(matches!(
            Request::from_line(&vec![b' '; MAX_LINE + 1]),
            Err(WireError::TooLong { .. })
        ));
    }

    #[test]
    fn lines_come_out_whole_whatever_the_chunks() {
        let text = b"one\n\ntwo\nthree";
        for size in 1..=text.len() {
            let mut buffer = LineBuffer::new();
            let mut lines = Vec::new();
            for chunk in text.chunks(size) {
                buffer.push(chunk);
                while let Some(line) = buffer.next_line().unwrap() {
                    lines.push(String::from_utf8(line).unwrap());
                }
            }
            assert_eq!(lines, ["one", "", "two"], "chunks of {size}");
            assert!(buffer.is_partial());
            buffer.push(b"\n");
            assert_eq!(buffer.next_line().unwrap().unwrap(), b"three");
            assert!(!buffer.is_partial());
        }
    }

    #[test]
    fn a_line_of_the_longest_length_passes_and_one_more_byte_does_not() {
        let mut buffer = LineBuffer::new();
        buffer.push(&vec![b'x'; MAX_LINE]);
        assert!(buffer.next_line().unwrap().is_none());
        buffer.push(b"\n");
        assert_eq!(buffer.next_line().unwrap().unwrap().len(), MAX_LINE);
        buffer.push(&vec![b'x'; MAX_LINE + 1]);
        assert!(matches!(buffer.next_line(), Err(WireError::TooLong { .. })));
    }

    proptest::proptest! {
        #[test]
        fn noise_is_refused_and_never_panics(line in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            proptest::prop_assert!(Request::from_line(&line).is_err());
            proptest::prop_assert!(Response::from_line(&line).is_err());
        }

        /// Valid messages with one byte changed: understood or refused, and what is understood can be sent again.
        #[test]
        fn damaged_messages_are_read_or_refused(which in 0_usize..7, at in 0_usize..200, byte in proptest::num::u8::ANY) {
            let mut line = requests()[which].to_line().unwrap().into_bytes();
            let length = line.len();
            line[at % length] = byte;
            if let Ok(request) = Request::from_line(&line) {
                let again = request.to_line().unwrap();
                proptest::prop_assert_eq!(Request::from_line(again.as_bytes()).unwrap(), request);
            }
        }

        #[test]
        fn lines_survive_any_chunking(
            lines in proptest::collection::vec("[a-z ]{0,20}", 0..10),
            sizes in proptest::collection::vec(1_usize..30, 1..40),
        ) {
            let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
            let mut buffer = LineBuffer::new();
            let mut found = Vec::new();
            let mut rest = text.as_bytes();
            let mut sizes = sizes.into_iter().cycle();
            while !rest.is_empty() {
                let (chunk, after) = rest.split_at(sizes.next().unwrap().min(rest.len()));
                rest = after;
                buffer.push(chunk);
                while let Some(line) = buffer.next_line().unwrap() {
                    found.push(String::from_utf8(line).unwrap());
                }
            }
            proptest::prop_assert_eq!(found, lines);
        }
    }
}
