//! From a specification to a decision: filters, triggers and faults.
//!
//! Pure and repeatable: nothing here performs I/O, reads a clock or draws from a shared source of randomness. A text becomes a raw [`Document`], the
//! document a checked [`Experiment`], the experiment a [`Plan`], and the plan answers one question per operation: what is to be done to it.
//! This crate knows nothing of FUSE, processes or files.

mod caller;
mod check;
mod counters;
mod diagnostic;
mod draw;
mod errno;
mod experiment;
pub mod fault;
pub mod fault_flag;
mod nearest;
mod op;
mod path_match;
mod pattern;
mod plan;
pub mod spec;
mod units;

pub use caller::{CallerFacts, Comm, KnownCaller};
pub use check::{MOST_RULES, check, load, load_all};
pub use counters::{RuleCounters, RuleProgress};
pub use diagnostic::{Diagnostic, Position, Severity, Source};
pub use errno::InjectedErrno;
pub use experiment::{Experiment, Rule, RunFor, Scope, Target};
pub use fault::attr::{AttrOverride, Attributes, FileKind, Timestamp};
pub use fault::corrupt::{Corruption, Fill, Segment};
pub use op::{Op, OpSet};
pub use path_match::PathMatch;
pub use plan::{Decision, FileId, OpContext, Plan, RuleIndex};
pub use spec::{Document, RuleSpec, parse, schema};
