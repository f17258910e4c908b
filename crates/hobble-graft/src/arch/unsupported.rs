//! Processors for which nobody has written the code that runs in a target yet.
//!
//! Everything compiles; seizing works, and the first thread that is looked at is reported as foreign.
