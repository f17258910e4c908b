//! The life of an attachment: pre-flight, attach, inject, update, recover.
//!
//! This crate joins the parts below it: it decides *when* a process is stopped, *when* the hook is placed and *what* is written to the
//! journal first; how a process is stopped is `hobble-graft`'s matter, what the filesystem does is `hobble-mirror`'s, what a rule means
//! is `hobble-rules`'s. Callers are the command line and the node agent; they see only what this page lists.
//!
//! Processes: [`inject`] starts the *holder*, which clones the *server* with a shared descriptor table; the caller talks to the
//! server over a socket in the state directory ([`Client`]).
//!
//! Public surface:
//! * [`InjectOptions`], [`ExecOptions`], [`Scope`], [`Lifetime`]: what is asked for.
//! * [`preflight`]: verdict and plan without side effects. [`doctor`]: what this machine offers.
//! * [`inject`] → [`Session`]: events, `recover()`. [`exec`]: a command under a hook of its own.
//! * [`list`], [`Client`]: what is attached, and requests to it. [`recover`]: undo by a fresh process, from the journal.
//! * [`serve_entry`]: what the hidden command `__serve` of the program runs.

mod attaching;
mod board;
mod bystanders;
mod claim;
mod client;
mod control;
mod crash_locks;
mod detaching;
mod doctor;
mod engine;
mod error;
mod exec;
pub mod fault_point;
mod ground;
mod holder;
mod hook;
mod inspect;
mod journal;
mod journaling;
mod ledger;
mod list;
mod lock_keeper;
mod options;
mod originals;
mod own;
mod preflight;
mod process_events;
mod recover;
mod reopening;
mod scope;
mod server;
mod session;
mod sighting;
mod single_file;
mod slices;
mod stand_ins;
mod state_dir;
mod story;
mod sys;
mod takeover;
mod volume;

pub use client::{Client, Events, only_id};
pub use doctor::doctor;
pub use error::{AttachError, StateError, Step};
pub use exec::{ExecOutcome, LAUNCH_ARGUMENT, exec, launch_entry};
pub use hobble_api::status::Scope;
pub use holder::serve_entry;
pub use journal::JournalError;
pub use list::{Listed, ids, list};
pub use options::{DEFAULT_MAX_PAUSE, ExecOptions, Failover, InjectOptions, Lifetime};
pub use preflight::preflight;
pub use recover::{Which, recover};
pub use session::{SERVE_ARGUMENT, Session, failure, inject};
pub use state_dir::DEFAULT_STATE_DIR;
