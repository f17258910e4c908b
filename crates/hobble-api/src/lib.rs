//! Types that cross a process border: what the command line, the agent and the operator say to an attachment and hear
//! from it.
//!
//! This crate acts on nothing: no file, socket, clock or process is touched here. Everything is plain data with one JSON
//! form, and the form is stable: fields are added, never renamed or removed, and every message says which version of the
//! format it speaks ([`VERSION`]).
//!
//! * [`event`]: the lines that `--json` prints and that `hobble events` replays.
//! * [`control`]: requests and responses of the control socket of one attachment.
//! * [`status`]: a snapshot of one attachment, the result of pre-flight, and the checks of `hobble doctor`.
//! * [`exit`]: the exit codes that scripts rely on.
//!
//! Paths appear as JSON strings. A path that is not UTF-8 is written with U+FFFD in place of each bad byte sequence: these
//! types are for reading and displaying, never for finding a file again.

pub mod control;
pub mod event;
pub mod exit;
pub mod status;

/// A point in time, written as RFC 3339 in UTC (`2026-11-24T08:15:30.5Z`).
pub use jiff::Timestamp;

/// Version of every message defined here. A reader refuses a request of another version and tolerates unknown events.
pub const VERSION: u32 = 1;
