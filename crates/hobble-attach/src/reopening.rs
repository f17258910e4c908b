//! Putting a rule set in force, and opening anew what was opened in a mode that the new rules cannot see.
//!
//! Invariant: when [`Engine::put_in_force`] returns without an error, no open file of the target bypasses a rule that is for it. Before, the former
//! rules are in force: an update that cannot be made changes nothing.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hobble_graft::census::{self, Census, DescriptionId};
use hobble_graft::stop::{Deadline, Tracer};
use hobble_graft::switch::{NoHandover, Switch};
use hobble_mirror::adopt::HandleId;
use hobble_rules::Plan;

use crate::attaching::{Traced, no_hook, stop_failed, who};
use crate::engine::Engine;
use crate::error::{AttachError, Step};
use crate::hook::Hook;
use crate::journal::Record;
use crate::journaling::Steps;
use crate::preflight::chain;
use crate::sighting;

/// How often a target that could not be stopped in time is tried again.
const TRIES: u32 = 3;

impl Engine {
    /// Makes `plan` the one that is asked (or none).
    pub(crate) fn put_in_force(
        &mut self,
        plan: Option<Arc<Plan>>,
        step: Step,
    ) -> Result<(), AttachError> {
        let origin = self.origin();
        let before = self.in_force.clone();
        let Some(hook) = self.hook.as_ref() else {
            return Err(no_hook());
        };
        let change = hook.set_plan(plan.clone(), origin);
        if !change.settled {
            tracing::warn!(
                "the kernel still waits for an operation before it drops what it has cached"
            );
        }
        // What waits was delayed by the former rules, which are no more: it is carried out now.
        hook.release_delayed();
        self.in_force = plan;
        if !change.must_reopen.is_empty()
            && let Err(error) = self.reopen(&change.must_reopen, step)
        {
            if let Some(hook) = self.hook.as_ref() {
                hook.set_plan(before.clone(), origin);
            }
            self.in_force = before;
            return Err(error);
        }
        if let Some(hook) = self.hook.as_ref() {
            hook.arm();
        }
        Ok(())
    }

    fn reopen(&mut self, handles: &[HandleId], step: Step) -> Result<(), AttachError> {
        let wanted: BTreeSet<u64> = handles.iter().map(|handle| handle.number()).collect();
        let mut attempt = 1;
        loop {
            let result =
                Tracer::scope(|tracer| self.reopen_once(tracer, &wanted, step).map_err(Traced))
                    .map_err(|Traced(error)| error);
            if let Some(hook) = self.hook.as_ref() {
                hook.unquiesce();
            }
            match result {
                Err(error) if error.rolled_back() && attempt < TRIES => {
                    tracing::info!(%error, cause = error.cause_chain(), attempt, "open files could not be exchanged at once");
                    attempt += 1;
                    // A pause between two tries: nothing announces that a thread could be stopped now.
                    std::thread::sleep(Duration::from_millis(60));
                }
                other => return other,
            }
        }
    }

    fn reopen_once(
        &mut self,
        tracer: &Tracer,
        wanted: &BTreeSet<u64>,
        step: Step,
    ) -> Result<(), AttachError> {
        let Some(hook) = self.hook.as_ref() else {
            return Err(no_hook());
        };
        let device = hook.device();
        let on_hook = move |facts: &census::FileFacts| facts.device == device;
        let looked = |error| {
            AttachError::new(step, "it cannot be found out who is on the hook").because(error)
        };
        let holders = sighting::holders(device);
        let mut census = census::take(&holders, &on_hook).map_err(looked)?;
        if concerned(hook, &census, wanted).is_empty() {
            return Ok(());
        }
        if let Err(error) = self.journal.append(&Record::Stopping {
            processes: holders.iter().map(|process| who(*process)).collect(),
        }) {
            tracing::warn!(%error, "the journal does not tell of the stop");
        }
        hook.quiesce();
        let deadline = Deadline::after(Duration::from_micros(self.config.max_pause_us));
        let mut stopped = tracer
            .stop_all(&holders, deadline)
            .map_err(|error| stop_failed(step, error))?;
        census
            .rescan(stopped.processes(), &on_hook)
            .map_err(looked)?;
        let mut switch = Switch::new(&census);
        let mut superseded = Vec::new();
        for (id, handle) in concerned(hook, &census, wanted) {
            let Some(description) = census.description(id) else {
                continue;
            };
            let again = hook
                .mirror()
                .reopen_stand_in(description.kept.as_fd())
                .map_err(|error| {
                    AttachError::io(
                        step,
                        format!(
                            "open {} on the hook again",
                            description.facts.path.display()
                        ),
                        error,
                    )
                })?;
            superseded.push(handle);
            switch.description(id, again);
        }
        hook.mirror().supersede(&superseded, true);
        let applied = switch.apply(
            &mut stopped,
            deadline,
            &mut Steps {
                journal: &mut self.journal,
                positions: None,
            },
            &mut NoHandover,
        );
        if let (Err(_), Some(hook)) = (&applied, self.hook.as_ref()) {
            hook.mirror().supersede(&superseded, false);
        }
        drop(stopped);
        applied.map(drop).map_err(|failed| {
            tracing::debug!(error = chain(&failed), "reopening");
            let rolled_back = failed.rolled_back;
            let error = AttachError::new(step, "the rules need open files to be exchanged, which failed; the former rules are in force")
                .because(failed)
                .hinting("a longer --max-pause may help");
            if rolled_back { error } else { error.needing_recovery() }
        })
    }

    /// The zero of every rule's window.
    fn origin(&self) -> Instant {
        self.began.unwrap_or_else(Instant::now)
    }
}

/// The descriptions that have to be opened anew, and their handles.
fn concerned(
    hook: &Hook,
    census: &Census,
    wanted: &BTreeSet<u64>,
) -> Vec<(DescriptionId, HandleId)> {
    census
        .descriptions()
        .filter_map(|description| {
            let handle = hook
                .mirror()
                .identify(description.kept.as_fd())
                .ok()?
                .handle?;
            wanted
                .contains(&handle.number())
                .then_some((description.id, handle))
        })
        .collect()
}
