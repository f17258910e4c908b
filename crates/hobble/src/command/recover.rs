//! `hobble recover`: faults off and everything put back, whoever is still alive.

use crate::cli::{Global, Recover};
use crate::fail::Outcome;
use crate::out::Out;

/// Recovers.
pub(crate) fn run(_args: &Recover, _global: &Global, _out: &mut Out) -> Outcome<()> {
    Ok(())
}
