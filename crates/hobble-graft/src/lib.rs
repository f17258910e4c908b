//! Stops processes and exchanges their open files, directories and mappings.
//!
//! What this crate is for: to look at running processes without disturbing them ([`proc`], [`census`]), to stop them ([`stop`]), have
//! their threads make system calls ([`remote`]) and exchange what they hold ([`switch`]), and to place and remove mounts in
//! their namespaces ([`mounts`]). It may not know the FUSE protocol, nor what a rule is.

mod arch;
pub mod census;
pub mod ids;
pub mod limits;
pub mod mounts;
pub mod proc;
pub mod remote;
pub mod stop;
pub mod switch;
mod sys;
