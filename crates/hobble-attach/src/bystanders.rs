//! Who stands in the way of a stop without being meant by it.
//!
//! Invariant: only a process that is no target is left out, and whoever is left out is told of.

use std::collections::BTreeMap;

use hobble_api::status::NotCovered as NotCoveredStatus;
use hobble_graft::ids::ProcessId;
use hobble_graft::stop::StopError;

use crate::preflight::chain;

/// Processes that hold something of the hook without being targets, and cannot be stopped: traced by somebody else, 32-bit, asleep in the kernel. They must not keep
/// the targets from being put back, and stay on the hook, which serves them plainly until they let go.
#[derive(Default)]
pub(crate) struct Bystanders {
    left_out: BTreeMap<ProcessId, String>,
}

impl Bystanders {
    /// Leaves out who stood in the way of a stop, unless it is a target.
    pub(crate) fn leave_out(
        &mut self,
        error: &StopError,
        processes: &[ProcessId],
        is_target: impl Fn(ProcessId) -> bool,
    ) {
        let in_the_way = processes
            .iter()
            .find(|process| Some(process.pid) == error.pid());
        if let Some(process) = in_the_way
            && !matches!(error, StopError::Gone { .. })
            && !is_target(*process)
        {
            self.left_out.insert(*process, chain(error));
        }
    }

    pub(crate) fn contains(&self, process: &ProcessId) -> bool {
        self.left_out.contains_key(process)
    }

    /// What is told of them.
    pub(crate) fn into_left(self) -> impl Iterator<Item = NotCoveredStatus> {
        self.left_out.into_iter().map(|(process, why)| NotCoveredStatus {
            what: format!("what process {process} has of the hook"),
            reason: format!("it is no target and could not be stopped ({why}): it is served without faults until it lets go"),
            pid: u32::try_from(process.pid.as_raw()).ok(),
        })
    }
}
