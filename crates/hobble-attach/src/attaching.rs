//! The way in: from a native target to one that runs on the hook.
//!
//! Invariants: the target stands still only between [`Stopped`]'s making and its drop, and never longer than `--max-pause` plus the undoing of
//! what was begun; whatever fails leaves it native. Stand-ins are opened while the target runs; what changed meanwhile is found by a
//! second look while it stands still.
//!
//! Length: one transaction, whose order is the point: reading it in pieces would hide what undoes what.

use std::time::{Duration, Instant};

use hobble_api::event::EventKind;
use hobble_api::status::{NotCovered as NotCoveredStatus, Scope, Verdict};
use hobble_graft::census::{self, Census, SpaceId};
use hobble_graft::ids::{Pid, ProcessId};
use hobble_graft::proc::tree;
use hobble_graft::stop::{Deadline, StopError, Stopped, Tracer};
use hobble_graft::switch::{NotMoved, Report, SwitchFailed};

use crate::engine::{Engine, Moved, called_off};
use crate::error::{AttachError, Step};
use crate::fault_point;
use crate::hook::Hook;
use crate::journal::{Record, Who};
use crate::journaling::Steps;
use crate::lock_keeper::Inwards;
use crate::own::Own;
use crate::preflight::{self, chain};
use crate::slices::{self, Slice};
use crate::stand_ins::StandIns;
use crate::volume::Volume;

/// How often a target that could not be stopped in time is tried again: a slow fsync may just have been under way.
const TRIES: u32 = 3;
/// Between two tries.
const BREATH: Duration = Duration::from_millis(60);
/// How often what was missed is looked for after letting go.
const ROUNDS: u32 = 6;

/// The target and its living descendants, without this attachment's own processes.
pub(crate) fn tree_of(root: ProcessId, own: Own) -> Vec<ProcessId> {
    let mut found = tree::descendants(&[root]).unwrap_or_else(|_| vec![root]);
    found.retain(|process| !own.includes(process.pid));
    found
}

/// Everybody in the mount namespace of a process, without this attachment's own processes.
pub(crate) fn namespace_of(pid: i32, own: Own) -> Vec<i32> {
    let Some(pid) = Pid::new(pid) else {
        return Vec::new();
    };
    tree::mount_namespace(pid)
        .and_then(tree::in_mount_namespace)
        .map(|found| {
            found
                .processes
                .into_iter()
                .filter(|process| !own.includes(process.pid))
                .map(|process| process.pid.as_raw())
                .collect()
        })
        .unwrap_or_default()
}

/// The processes to be stopped and moved.
pub(crate) fn processes(
    target: ProcessId,
    scope: Scope,
    own: Own,
) -> Result<Vec<ProcessId>, AttachError> {
    let failed = |error| {
        AttachError::new(Step::Preflight, "the target's processes cannot be listed").because(error)
    };
    let mut found = match scope {
        Scope::Tree => tree::descendants(&[target]).map_err(failed)?,
        Scope::Namespace => {
            let namespace = tree::mount_namespace(target.pid).map_err(failed)?;
            tree::in_mount_namespace(namespace)
                .map_err(failed)?
                .processes
        }
    };
    found.retain(|process| !own.includes(process.pid));
    Ok(found)
}

/// The living children of a process's threads (`/proc/<pid>/task/<tid>/children`, exact while the parent stands still; proc_pid_children(5)).
fn children(pid: Pid) -> Vec<ProcessId> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    tasks
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|list| {
            list.split_ascii_whitespace()
                .filter_map(|pid| Pid::new(pid.parse().ok()?))
                .collect::<Vec<_>>()
        })
        .filter_map(|pid| ProcessId::of(pid).ok())
        .filter(|process| process.is_alive().unwrap_or(false))
        .collect()
}

/// Where the time of a stop goes, for the log.
pub(crate) struct StopWatch {
    last: Instant,
    laps: Vec<(&'static str, Duration)>,
}

impl StopWatch {
    pub(crate) fn start() -> Self {
        Self {
            last: Instant::now(),
            laps: Vec::with_capacity(8),
        }
    }

    pub(crate) fn lap(&mut self, name: &'static str) {
        let now = Instant::now();
        self.laps.push((name, now - self.last));
        self.last = now;
    }

    pub(crate) fn tell(&self) {
        let laps: Vec<String> = self
            .laps
            .iter()
            .map(|(name, time)| format!("{name} {} us", time.as_micros()))
            .collect();
        tracing::debug!(laps = laps.join(", "), "the target stood still");
    }
}

/// A process as the journal names it.
pub(crate) fn who(process: ProcessId) -> Who {
    Who {
        pid: process.pid.as_raw(),
        start: process.start_time,
    }
}

/// A failed stop, in the words of an attachment.
pub(crate) fn stop_failed(step: Step, error: StopError) -> AttachError {
    let vanished = matches!(error, StopError::Gone { .. });
    let hint = match &error {
        StopError::Unstoppable { .. } => {
            Some("nothing was changed; try again, or allow more time with --max-pause")
        }
        StopError::Traced { .. } => Some("end the debugger, strace or other attachment first"),
        _ => None,
    };
    let failed = AttachError::new(step, "the target could not be stopped").because(error);
    let failed = if vanished {
        failed.exiting(hobble_api::exit::ExitCode::TargetVanished)
    } else {
        failed
    };
    match hint {
        Some(hint) => failed.hinting(hint),
        None => failed,
    }
}

/// A failed exchange, in the words of an attachment.
pub(crate) fn exchange_failed(step: Step, what: &str, failed: SwitchFailed) -> AttachError {
    for undo in &failed.undo {
        tracing::error!(error = chain(undo), "undoing the exchange");
    }
    let (rolled_back, is_late) = (failed.rolled_back, failed.is_late());
    let mut error = AttachError::new(step, what).because(failed);
    if is_late {
        error = error.hinting("a longer --max-pause may help");
    }
    if rolled_back {
        error
    } else {
        error.needing_recovery()
    }
}

/// Carries errors out of [`Tracer::scope`].
pub(crate) struct Traced(pub(crate) AttachError);

impl From<StopError> for Traced {
    fn from(error: StopError) -> Self {
        Self(stop_failed(Step::Stop, error))
    }
}

impl Engine {
    /// Moves the target onto a hook of its own; rules are off.
    pub(crate) fn attach(&mut self) -> Result<(), AttachError> {
        let path = std::path::PathBuf::from(
            <std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(
                self.config.path.clone(),
            ),
        );
        let survey = preflight::survey(
            self.config.pid,
            self.config.start_time,
            self.config.own(),
            self.config.scope,
            &path,
            &self.config.state_dir,
        )?;
        self.board
            .publish(EventKind::Preflight(survey.preflight.clone()));
        if let Some(refusal) = survey.refusal {
            return Err(refusal);
        }
        let (Some(volume), Some(census)) = (survey.volume, survey.census) else {
            return Err(AttachError::new(
                Step::Preflight,
                "the target cannot be looked into",
            ));
        };
        let target = ProcessId {
            pid: Pid::new(self.config.pid)
                .ok_or_else(|| AttachError::new(Step::Preflight, "not a process id"))?,
            start_time: self.config.start_time,
        };
        let degraded = if survey.preflight.verdict == Verdict::Degraded {
            survey.preflight.reasons
        } else {
            Vec::new()
        };
        let not_covered = preflight::not_covered(&survey.elsewhere);
        let mut census = Some(census);
        let mut attempt = 1;
        loop {
            let mut moved = Moved {
                degraded: degraded.clone(),
                not_covered: not_covered.clone(),
                ..Moved::default()
            };
            match self.attach_once(target, &volume, census.take(), &mut moved) {
                Ok(()) => {
                    self.record(&Record::Attached)?;
                    self.publish_attached(moved);
                    return Ok(());
                }
                // A mount that was taken away cannot be placed again, so everything is made anew.
                Err(error)
                    if error.rolled_back()
                        && attempt < TRIES
                        && is_transient(&error)
                        && !self.moved_in
                        && self.withdraw() =>
                {
                    tracing::info!(%error, cause = error.cause_chain(), attempt, "the target could not be moved at once");
                    attempt += 1;
                    std::thread::sleep(BREATH * attempt);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The processes to be stopped and moved now.
    fn processes(&self, target: ProcessId) -> Result<Vec<ProcessId>, AttachError> {
        processes(target, self.config.scope, self.config.own())
    }

    /// Gives up a hook that no target was moved to, and says whether that could be done: whoever else has come to it by path meanwhile is taken off it first.
    fn withdraw(&mut self) -> bool {
        if self.hook.as_ref().is_some_and(Hook::was_placed)
            && !self.detach(true).is_ok_and(|given| given.left.is_empty())
        {
            return false;
        }
        self.hook = None;
        true
    }

    /// One try, from serving to letting go.
    fn attach_once(
        &mut self,
        target: ProcessId,
        volume: &Volume,
        census: Option<Census>,
        moved: &mut Moved,
    ) -> Result<(), AttachError> {
        self.progress("serve", 0, 1);
        let hook = Hook::serve(
            volume,
            &self.config.id,
            std::sync::Arc::clone(&self.targets),
            std::sync::Arc::clone(&self.ledger),
            std::sync::Arc::clone(&self.served),
            self.to_myself.clone(),
            self.legacy.clone(),
        )?;
        self.record(&Record::Attachment {
            target: who(target),
            scope: self.config.scope.as_str().to_owned(),
            mount_ns: volume.namespace(),
            path: self.config.path.clone(),
            hook_dev: hook.device().raw(),
            backing_dev: volume.device().raw(),
        })?;
        self.hook = Some(hook);
        // The plan chooses how stand-ins are opened; until the hook is armed it sees nobody.
        let plan = self.first_plan()?;
        if let Some(hook) = self.hook.as_ref() {
            hook.set_plan(plan, Instant::now());
        }
        fault_point::pass("served");
        let census = match census {
            Some(census) => census,
            None => self.held_by(target, &|facts| volume.holds(facts))?,
        };
        // What the census holds is there already, and is kept.
        let held = census.descriptions().len();
        let parts = slices::inwards(&census, slices::room() + held).map_err(|too_many| {
            AttachError::new(Step::Census, preflight::too_many(&too_many))
                .hinting(preflight::MORE_DESCRIPTORS)
        })?;
        Tracer::scope(|tracer| {
            self.move_in(tracer, target, volume, census, &parts, moved)
                .map_err(Traced)
        })
        .map_err(|Traced(error)| error)
    }

    /// Writes a record that a step depends on.
    pub(crate) fn record(&mut self, record: &Record) -> Result<(), AttachError> {
        self.journal.append(record).map_err(|error| {
            AttachError::new(Step::Journal, "the journal cannot be written")
                .because(error)
                .hinting("the state directory needs a few MiB of space; name another one with --state-dir")
        })
    }

    fn move_in(
        &mut self,
        tracer: &Tracer,
        target: ProcessId,
        volume: &Volume,
        census: Census,
        parts: &[Slice],
        moved: &mut Moved,
    ) -> Result<(), AttachError> {
        let total = (census.descriptions().len() + census.mapped_files().len()) as u64;
        if let [whole] = parts {
            let (census, stand_ins) =
                self.move_slice(tracer, target, volume, whole, census, (0, total), moved)?;
            return self.chase(tracer, target, volume, census, stand_ins, moved);
        }
        // It holds everything, and with that what the first slice needs.
        drop(census);
        tracing::info!(
            open = total,
            stops = parts.len(),
            "the target has more open files than are moved at once"
        );
        let (mut unopened, mut before) = (0, 0);
        for (number, slice) in parts.iter().enumerate() {
            let mut attempt = 1;
            loop {
                let in_part = |facts: &census::FileFacts| slice.holds(facts) && volume.holds(facts);
                let census = self.held_by(target, &in_part)?;
                let count = census.descriptions().len() + census.mapped_files().len();
                slices::wait_for_room(count);
                let sofar = (before, total.max(before + count as u64));
                match self.move_slice(tracer, target, volume, slice, census, sofar, moved) {
                    Ok((_, stand_ins)) => {
                        unopened += stand_ins.unopened;
                        before += count as u64;
                        break;
                    }
                    // The first one places the mount, which cannot be done twice: all of it is tried again by the caller.
                    Err(error)
                        if number > 0
                            && attempt < TRIES
                            && error.rolled_back()
                            && is_transient(&error) =>
                    {
                        if let Some(hook) = self.hook.as_ref() {
                            hook.unquiesce();
                        }
                        tracing::info!(%error, cause = error.cause_chain(), attempt, "a slice could not be moved at once");
                        attempt += 1;
                        std::thread::sleep(BREATH * attempt);
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        let census = self.held_by(target, &|facts| volume.holds(facts))?;
        let mut stand_ins = StandIns::default();
        stand_ins.unopened = unopened;
        self.chase(tracer, target, volume, census, stand_ins, moved)
    }

    /// What the target holds of a part of the volume.
    fn held_by(&self, target: ProcessId, holds: census::Volume<'_>) -> Result<Census, AttachError> {
        census::take(&self.processes(target)?, holds).map_err(|error| {
            AttachError::new(Step::Census, "the target cannot be looked into").because(error)
        })
    }

    /// Opens what replaces what a census of one slice found, and exchanges it. `sofar` is how much was moved before, and how much there is in all.
    #[allow(clippy::too_many_arguments)]
    fn move_slice(
        &mut self,
        tracer: &Tracer,
        target: ProcessId,
        volume: &Volume,
        slice: &Slice,
        mut census: Census,
        sofar: (u64, u64),
        moved: &mut Moved,
    ) -> Result<(Census, StandIns), AttachError> {
        let mut stand_ins = StandIns::default();
        let (before, total) = sofar;
        let kept = {
            let Some(hook) = self.hook.as_ref() else {
                return Err(no_hook());
            };
            let mut last = Instant::now();
            stand_ins.complete(hook, &census, |done| {
                if last.elapsed() > Duration::from_millis(500) {
                    last = Instant::now();
                    self.progress("precopy", before + done as u64, total);
                }
            })
        };
        self.record(&Record::Keeping { kept })?;
        let count = (census.descriptions().len() + census.mapped_files().len()) as u64;
        self.progress("precopy", total.min(before + count), total);
        // Everything that needs many descriptors of ours has been opened.
        census.prepare_rescan(slices::SPARE);
        fault_point::pass("precopied");
        if self.is_called_off() {
            return Err(called_off());
        }

        self.switch_in(
            tracer,
            target,
            volume,
            slice,
            &mut census,
            &mut stand_ins,
            moved,
        )?;
        Ok((census, stand_ins))
    }

    /// Stops, looks again, moves, lets go.
    #[allow(clippy::too_many_arguments)]
    fn switch_in(
        &mut self,
        tracer: &Tracer,
        target: ProcessId,
        volume: &Volume,
        slice: &Slice,
        census: &mut Census,
        stand_ins: &mut StandIns,
        moved: &mut Moved,
    ) -> Result<(), AttachError> {
        let list = self.processes(target)?;
        self.record(&Record::Stopping {
            processes: list.iter().map(|process| who(*process)).collect(),
        })?;
        fault_point::pass("stopping");
        if let Some(hook) = self.hook.as_ref() {
            hook.quiesce();
        }
        // Whatever can be found out before the target stands still is.
        let first = !self.hook.as_ref().is_some_and(Hook::is_placed);
        let around = if first {
            Some(volume.propagation()?)
        } else {
            None
        };
        if let Some(around) = around {
            self.record(&Record::Placing(around.into()))?;
        }
        let specials: Vec<_> = census
            .specials()
            .iter()
            .map(|special| special.facts.clone())
            .collect();
        let through = if first {
            volume.through(&specials)
        } else {
            Vec::new()
        };
        let deadline = Deadline::after(Duration::from_micros(self.config.max_pause_us));
        let mut watch = StopWatch::start();
        let mut stopped = tracer
            .stop_all(&list, deadline)
            .map_err(|error| self.stop_failed(Step::Stop, error))?;
        watch.lap("stop");
        self.add_newborn(&mut stopped, deadline)?;
        watch.lap("newborn");
        fault_point::pass("stopped");
        let difference = census
            .rescan(stopped.processes(), &|facts| {
                slice.holds(facts) && volume.holds(facts)
            })
            .map_err(|error| {
                AttachError::new(Step::Census, "the stopped target cannot be looked into")
                    .because(error)
            })?;
        let Some(hook) = self.hook.as_ref() else {
            return Err(no_hook());
        };
        watch.lap("census");
        stand_ins.forget(hook, &difference);
        let kept = stand_ins.complete(hook, census, |_| {});
        if !kept.is_empty() {
            self.record(&Record::Keeping { kept })?;
        }
        late(deadline)?;
        watch.lap("stand-ins");
        if let Some(around) = around {
            fault_point::pass("mounting");
            let Some(hook) = self.hook.as_mut() else {
                return Err(no_hook());
            };
            hook.place(around)?;
            watch.lap("mount");
            // Here and nowhere else. From the moment the hook lies there until a socket is bound through it, whoever connects to it is refused, so nobody of the
            // target may run in between: not after letting go. And not before the stop either, not even the copies that are bound: a program may
            // have replaced its socket since (unlink, bind), and would be shown through the hook with the dead one for as long as it is attached.
            let unbound = match hook.bind_through(through, deadline) {
                Ok(unbound) => unbound,
                Err(error) => {
                    let error = match late(deadline) {
                        Err(late) => late.because(error),
                        Ok(()) => AttachError::new(
                            Step::Mount,
                            "what lies below the volume cannot be bound through the hook",
                        )
                        .because(error),
                    };
                    return Err(self.take_away(stopped, error));
                }
            };
            for (name, error) in unbound {
                moved.not_covered.push(NotCoveredStatus {
                    what: name.display().to_string(),
                    reason: format!("it does not show through the hook: {}", chain(&error)),
                    pid: None,
                });
            }
            watch.lap("bind");
            fault_point::pass("mounted");
        }
        let report = self.exchange(census, stand_ins, &mut stopped, deadline);
        watch.lap("exchange");
        match report {
            Ok(report) => {
                // From here on the hook is in use: whatever fails, it must not go without everybody being taken off it first.
                self.moved_in = true;
                fault_point::pass("grafted");
                if let Some(hook) = self.hook.as_ref() {
                    hook.mirror().arrived();
                }
                let released = stopped.release();
                watch.lap("release");
                watch.tell();
                fault_point::pass("let-go");
                if let Some(hook) = self.hook.as_ref() {
                    hook.unquiesce();
                    stand_ins.disown_passing(hook);
                }
                moved.not_covered.append(&mut stand_ins.failed);
                moved.pause = moved.pause.max(released.stood_still);
                self.remember_stuck(&report);
                note(moved, census, &report, volume);
                Ok(())
            }
            Err(error) if first && error.rolled_back() => Err(self.take_away(stopped, error)),
            Err(error) => {
                drop(stopped);
                Err(error)
            }
        }
    }

    /// Takes a hook away that nobody was moved onto, and only then lets the target go, which has seen nothing of it. Gives back the error that led to it.
    fn take_away(&mut self, stopped: Stopped, error: AttachError) -> AttachError {
        let removed = self.hook.as_mut().map_or(Ok(()), Hook::remove);
        drop(stopped);
        match removed {
            Ok(()) => error,
            Err(removal) => {
                tracing::error!(error = %removal, "the hook could not be taken away again");
                error.needing_recovery()
            }
        }
    }

    /// Children that were born while their parents were being stopped. Whoever came into the namespace from elsewhere is found after letting go.
    fn add_newborn(&self, stopped: &mut Stopped, deadline: Deadline) -> Result<(), AttachError> {
        let own = self.config.own();
        for _ in 0..16 {
            let born: Vec<ProcessId> = stopped
                .processes()
                .iter()
                .flat_map(|process| children(process.pid))
                .filter(|child| !own.includes(child.pid) && !stopped.processes().contains(child))
                .collect();
            if born.is_empty() {
                return Ok(());
            }
            stopped
                .add(&born, deadline)
                .map_err(|error| self.stop_failed(Step::Stop, error))?;
        }
        Err(AttachError::new(
            Step::Stop,
            "the target makes processes faster than they can be stopped",
        ))
    }

    /// Exchanges everything for which there is a stand-in, locks included.
    fn exchange(
        &mut self,
        census: &Census,
        stand_ins: &mut StandIns,
        stopped: &mut Stopped,
        deadline: Deadline,
    ) -> Result<Report, AttachError> {
        let Some(hook) = self.hook.as_ref() else {
            return Err(no_hook());
        };
        let handles = stand_ins.locked_handles(hook, census);
        let positions = stand_ins.positions(census);
        let switch = stand_ins.switch(census);
        let mut keeper = Inwards::new(hook, census, &stand_ins.adopted, &handles);
        self.journal
            .append(&Record::Locks {
                posix: Inwards::posix(census),
            })
            .and_then(|()| self.journal.append(&Record::Grafting))
            .map_err(|error| {
                AttachError::new(Step::Journal, "the journal cannot be written").because(error)
            })?;
        fault_point::pass("grafting");
        let report = switch.apply(
            stopped,
            deadline,
            &mut Steps {
                journal: &mut self.journal,
                positions: Some((&self.ledger, &positions)),
            },
            &mut keeper,
        );
        if report.is_ok() {
            keeper.finish();
            stand_ins.replaced(hook);
            self.tell_exchanged();
        } else {
            drop(keeper);
            stand_ins.disown_all(hook);
        }
        report.map_err(|failed| {
            exchange_failed(
                Step::Graft,
                "the target's files could not be exchanged",
                failed,
            )
        })
    }

    /// Looks for what was opened natively between the look and the letting go, or is held by threads and processes that came late, and moves it too.
    fn chase(
        &mut self,
        tracer: &Tracer,
        target: ProcessId,
        volume: &Volume,
        mut census: Census,
        mut stand_ins: StandIns,
        moved: &mut Moved,
    ) -> Result<(), AttachError> {
        for round in 0..=ROUNDS {
            let mut list = self.processes(target)?;
            // Those whose parents have gone meanwhile are no descendants any more, and targets all the same.
            let own = self.config.own();
            list.extend(self.targets.processes().into_iter().filter(|process| {
                !own.includes(process.pid) && process.is_alive().unwrap_or(false)
            }));
            list.sort_unstable();
            list.dedup();
            census
                .rescan(&list, &|facts| volume.holds(facts))
                .map_err(|error| {
                    AttachError::new(Step::Census, "the target cannot be looked into")
                        .because(error)
                })?;
            let immovable = |space: SpaceId, start: u64| self.immovable.contains(&(space, start));
            let native = census
                .descriptions()
                .len()
                .saturating_sub(stand_ins.unopened)
                + census
                    .fs_structs()
                    .iter()
                    .filter(|fs| {
                        (fs.cwd.is_some() || fs.root.is_some()) && !self.stuck.contains(&fs.id)
                    })
                    .count()
                + census
                    .spaces()
                    .iter()
                    .flat_map(|space| {
                        space
                            .mappings
                            .iter()
                            .map(|mapping| (space.id, mapping.start))
                    })
                    .filter(|(space, start)| !immovable(*space, *start))
                    .count();
            if native == 0 {
                return Ok(());
            }
            if round == ROUNDS {
                tracing::warn!(native, "files of the volume keep appearing");
                moved.not_covered.push(NotCoveredStatus {
                    what: format!("{native} open files, mappings or directories"),
                    reason: "they appeared faster than they could be moved".to_owned(),
                    pid: None,
                });
                return Ok(());
            }
            tracing::debug!(
                native,
                "opened natively while the hook was placed; moving that too"
            );
            stand_ins = StandIns::default();
            let whole = Slice::whole();
            match self.switch_in(
                tracer,
                target,
                volume,
                &whole,
                &mut census,
                &mut stand_ins,
                moved,
            ) {
                Ok(()) => {}
                // The rest of the target runs on the hook; what was missed is tried again.
                Err(error) if error.rolled_back() && is_transient(&error) => {
                    // The next round may find nothing left to be moved, and nobody else would let operations be delayed again.
                    if let Some(hook) = self.hook.as_ref() {
                        hook.unquiesce();
                    }
                    tracing::info!(%error, cause = error.cause_chain(), "what was missed could not be moved at once");
                    std::thread::sleep(BREATH);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A failed stop. That some descendant exited just then is no failure of the target's, and may be tried again.
    fn stop_failed(&self, step: Step, error: StopError) -> AttachError {
        let stranger = matches!(&error, StopError::Gone { pid } if pid.as_raw() != self.config.pid);
        let failed = stop_failed(step, error);
        if stranger {
            failed.exiting(hobble_api::exit::ExitCode::RolledBack)
        } else {
            failed
        }
    }

    /// What an exchange left native for a reason that another one would meet again.
    fn remember_stuck(&mut self, report: &Report) {
        for not_moved in &report.not_moved {
            match not_moved {
                NotMoved::Mapping { space, start, .. } => {
                    self.immovable.insert((*space, *start));
                }
                NotMoved::Directory { fs, .. } => {
                    self.stuck.insert(*fs);
                }
                _ => {}
            }
        }
    }

    /// Puts everything back after an attach that failed half way, and says in what state that leaves the target, and what is still on the hook: then there is one.
    pub(crate) fn undo_after_failure(
        &mut self,
        error: AttachError,
    ) -> (AttachError, Vec<NotCoveredStatus>) {
        if self.moved_in || self.hook.as_ref().is_some_and(Hook::was_placed) {
            match self.detach(true) {
                Ok(given) if given.left.is_empty() => {}
                // Somebody else's, who could not be stopped, or what cannot be moved: without a server all of it would fail.
                Ok(given) => {
                    self.board
                        .edit(|status| status.not_covered.clone_from(&given.left));
                    return (error, given.left);
                }
                Err(undo) => {
                    tracing::error!(error = %undo, cause = undo.cause_chain(), "putting the target back failed");
                    return (error.needing_recovery(), Vec::new());
                }
            }
        }
        // Dropping the hook ends the connection: nobody can be on it.
        self.hook = None;
        (error, Vec::new())
    }
}

pub(crate) fn no_hook() -> AttachError {
    AttachError::new(Step::Serve, "there is no hook")
}

fn late(deadline: Deadline) -> Result<(), AttachError> {
    if deadline.passed() {
        return Err(AttachError::new(
            Step::Stop,
            "the target could not be moved within --max-pause; nothing was changed",
        )
        .hinting("allow more time with --max-pause"));
    }
    Ok(())
}

/// Whether another try may go better: the target was in a long system call, or the machine busy.
fn is_transient(error: &AttachError) -> bool {
    matches!(error.step(), Step::Stop | Step::Graft)
        && error.exit_code() != hobble_api::exit::ExitCode::TargetVanished
}

fn note(moved: &mut Moved, census: &Census, report: &Report, volume: &Volume) {
    moved.processes = moved.processes.max(census.processes().len() as u64);
    moved.descriptors += report.descriptors as u64;
    moved.mappings += report.mappings as u64;
    let held: usize = census
        .descriptions()
        .map(|description| description.locks.len())
        .sum();
    moved.locks += held as u64;
    moved
        .not_covered
        .extend(report.not_moved.iter().map(not_moved));
    for not_covered in census.not_covered() {
        let (code, text) = preflight::describe(not_covered, volume);
        if let Some(text) = text {
            let entry = NotCoveredStatus {
                what: code.to_owned(),
                reason: text,
                pid: None,
            };
            if !moved.not_covered.contains(&entry) {
                moved.not_covered.push(entry);
            }
        }
    }
}

/// What an exchange left where it was, for the report.
pub(crate) fn not_moved(not_moved: &NotMoved) -> NotCoveredStatus {
    match not_moved {
        NotMoved::Mapping { start, reason, .. } => NotCoveredStatus {
            what: format!("the mapping at {start:#x}"),
            reason: (*reason).to_owned(),
            pid: None,
        },
        NotMoved::Directory { is_root, errno, .. } => NotCoveredStatus {
            what: if *is_root {
                "a root directory"
            } else {
                "a working directory"
            }
            .to_owned(),
            reason: format!("the target may not enter it: {errno}"),
            pid: None,
        },
        other => NotCoveredStatus {
            what: format!("{other:?}"),
            reason: "it stays native".to_owned(),
            pid: None,
        },
    }
}
