//! Throw-away namespaces, filesystems and target programs for Hobble's tests.
//!
//! What a test makes through this crate is gone when the test is over, however it ends: guards take
//! things down in the ordinary case, and a reaper process of its own does it when the test process
//! panics, is killed, or is stopped by the runner's time-out. Mounts live in a private mount
//! namespace that dies with the test, and loop devices detach themselves with their mount.
//!
//! Public surface:
//!
//! * [`namespace::Namespace`]: a private mount namespace for the calling thread and what it starts;
//! * [`scratch::Scratch`]: a directory on a disk-backed filesystem;
//! * [`volume::Volume`]: an ext4, xfs, btrfs, tmpfs or overlay filesystem mounted in a namespace;
//! * [`program`] and [`target::Target`]: small target programs in C, Go, Java and Python and the line protocol
//!   spoken with them;
//! * [`process`]: what `/proc` says about a process and its descriptors;
//! * [`leak::LeakCheck`]: asserts that nothing is left behind;
//! * [`hobble::Hobble`]: drives the built `hobble` binary;
//! * [`need`]: states what a test needs and fails loudly when the machine lacks it.
//!
//! This crate knows nothing of Hobble's other crates: it sees the program as its users do.

pub mod command;
pub mod hobble;
pub mod leak;
pub mod namespace;
pub mod need;
pub mod process;
pub mod program;
pub mod reaper;
pub mod scratch;
pub mod target;
pub mod volume;
