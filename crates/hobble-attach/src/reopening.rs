//! Putting a rule set in force, and opening anew what was opened in a mode that the rules cannot see: it was open before them, or it has come under one of them since, by
//! another name.
//!
//! Invariant: when [`Engine::put_in_force`] returns without an error, no open file of the target bypasses a rule that is for it. When it fails, the former
//! rules are in force, for the files too that were opened under the new ones meanwhile; and where those could not be opened anew either, the error, the
//! status and an event say how many files the rules do not see.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hobble_api::event::{EventKind, Uncovered};
use hobble_api::status::NotCovered;
use hobble_graft::census::{self, Census, DescriptionId};
use hobble_graft::stop::{Deadline, Tracer};
use hobble_graft::switch::{NoHandover, Switch};
use hobble_mirror::adopt::HandleId;
use hobble_rules::Plan;

use crate::attaching::{Traced, exchange_failed, no_hook, stop_failed, who};
use crate::bystanders::{Bystanders, Rounds};
use crate::engine::Engine;
use crate::error::{AttachError, Step};
use crate::hook::Hook;
use crate::journal::Record;
use crate::journaling::Steps;
use crate::sighting;
use crate::slices::{self, Slice};

/// How often a target that could not be stopped in time is tried again.
const TRIES: u32 = 3;

/// The least time from one stop for files that were renamed or linked under a rule to the next: a target that renames all the time is not to stand still all the time.
const LEAST_BETWEEN: Duration = Duration::from_millis(100);

/// When files that have come under a rule are opened anew: at once, but not again within [`LEAST_BETWEEN`].
#[derive(Debug, Default)]
pub(crate) struct Misfits {
    /// There are some.
    wait: bool,
    /// From when on there may be another stop.
    not_before: Option<Instant>,
}

impl Misfits {
    /// There are some.
    pub(crate) fn note(&mut self) {
        self.wait = true;
    }

    /// How long until they are to be seen to; `None` when there are none.
    pub(crate) fn due_in(&self, now: Instant) -> Option<Duration> {
        let wait = |due: Instant| due.saturating_duration_since(now);
        self.wait
            .then(|| self.not_before.map_or(Duration::ZERO, wait))
    }

    /// They have been seen to.
    fn done(&mut self, now: Instant) {
        *self = Self {
            wait: false,
            not_before: Some(now + LEAST_BETWEEN),
        };
    }
}

/// Whoever asks the rules and has files open for them.
trait Files {
    /// A rule set.
    type Plan;

    /// Makes `plan` the one that is asked (or none). Gives the open files that it cannot see.
    fn ask(&mut self, plan: Option<Self::Plan>) -> Result<BTreeSet<u64>, AttachError>;

    /// Opens these files anew in the mode that the plan needs: all of them or none.
    fn reopen(&mut self, files: &BTreeSet<u64>) -> Result<(), AttachError>;
}

/// A plan that could not be put in force: the former one is again.
struct NotInForce {
    /// Why.
    error: AttachError,
    /// How many open files the former plan cannot see, because they were opened for the other and could not be exchanged again.
    unseen: usize,
}

/// Puts `plan` in force, or else `former` again.
fn change<F: Files>(
    files: &mut F,
    plan: Option<F::Plan>,
    former: Option<F::Plan>,
) -> Result<(), NotInForce> {
    let whole = |error| NotInForce { error, unseen: 0 };
    let unseen = files.ask(plan).map_err(whole)?;
    if unseen.is_empty() {
        return Ok(());
    }
    let Err(error) = files.reopen(&unseen) else {
        return Ok(());
    };
    // The same files as before, and those that the target has opened since, in the mode that the new plan wanted.
    let unseen = files.ask(former).map_err(whole)?;
    let unseen = if unseen.is_empty() {
        0
    } else if !error.rolled_back() {
        // The target must be recovered, which is not to wait for another stop of it.
        unseen.len()
    } else {
        match files.reopen(&unseen) {
            Ok(()) => 0,
            Err(again) => {
                tracing::warn!(error = %again, cause = again.cause_chain(), files = unseen.len(), "open files could not be exchanged for the former rules");
                let error = if again.rolled_back() {
                    error
                } else {
                    error.needing_recovery()
                };
                return Err(NotInForce {
                    error,
                    unseen: unseen.len(),
                });
            }
        }
    };
    Err(NotInForce { error, unseen })
}

/// The engine, changing rules in one step of its life.
struct Serving<'e> {
    engine: &'e mut Engine,
    step: Step,
}

impl Files for Serving<'_> {
    type Plan = Arc<Plan>;

    fn ask(&mut self, plan: Option<Arc<Plan>>) -> Result<BTreeSet<u64>, AttachError> {
        let origin = self.engine.origin();
        let Some(hook) = self.engine.hook.as_ref() else {
            return Err(no_hook());
        };
        let change = hook.set_plan(plan.clone(), origin);
        if !change.settled {
            tracing::warn!(
                "the kernel still waits for an operation before it drops what it has cached"
            );
        }
        // What waits was delayed by rules that are no more: it is carried out now.
        hook.release_delayed();
        self.engine.in_force = plan;
        Ok(change
            .must_reopen
            .into_iter()
            .map(HandleId::number)
            .collect())
    }

    fn reopen(&mut self, files: &BTreeSet<u64>) -> Result<(), AttachError> {
        self.engine.reopen(files, self.step)
    }
}

impl Engine {
    /// Makes `plan` the one that is asked (or none). After an error the former one is.
    pub(crate) fn put_in_force(
        &mut self,
        plan: Option<Arc<Plan>>,
        step: Step,
    ) -> Result<(), AttachError> {
        let former = self.in_force.clone();
        let had_rules = former.is_some();
        match change(&mut Serving { engine: self, step }, plan, former) {
            Ok(()) => {
                self.tell_unseen(0, NOT_IN_FORCE);
                if let Some(hook) = self.hook.as_ref() {
                    hook.arm();
                }
                Ok(())
            }
            Err(NotInForce { error, unseen }) => {
                self.tell_unseen(unseen, NOT_IN_FORCE);
                Err(not_in_force(error, unseen, had_rules))
            }
        }
    }

    /// Opens anew the files that have come under a rule in force by a rename or a link, and do not show it what is read and written through them. Where that fails, the
    /// attachment goes on and tells of it; the error is that of a target that is left half way.
    pub(crate) fn reopen_misfits(&mut self) -> Result<(), AttachError> {
        let result = self.reopen_all_misfits();
        self.misfits.done(Instant::now());
        result
    }

    fn reopen_all_misfits(&mut self) -> Result<(), AttachError> {
        let misfits = |hook: Option<&Hook>| hook.map(Hook::misfits).unwrap_or_default();
        let unseen = misfits(self.hook.as_ref());
        if unseen.is_empty() {
            return Ok(());
        }
        match self.reopen(&unseen, Step::Update) {
            Ok(()) => {
                self.tell_unseen(0, RENAMED);
                Ok(())
            }
            Err(error) if error.rolled_back() => {
                tracing::warn!(%error, cause = error.cause_chain(), files = unseen.len(), "files that were renamed or linked under a rule could not be exchanged");
                let unseen = misfits(self.hook.as_ref());
                self.tell_unseen(unseen.len(), RENAMED);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Shows in status and events that the rules in force do not see some open files, and `why`, or that they see all of them again.
    fn tell_unseen(&mut self, files: usize, why: &str) {
        let now = (files > 0).then(|| NotCovered {
            what: open_files(files),
            reason: format!(
                "{why}, and not exchanged since: the rules in force do not see what is read and written through them until they are closed, or until the next \
                 change of the rules"
            ),
            pid: None,
        });
        if now == self.unseen {
            return;
        }
        let before = std::mem::replace(&mut self.unseen, now.clone());
        self.board.edit(|status| {
            status
                .not_covered
                .retain(|known| Some(known) != before.as_ref());
            status.not_covered.extend(now.clone());
        });
        self.board.publish(EventKind::NotCovered(Uncovered {
            not_covered: now.into_iter().collect(),
        }));
    }

    fn reopen(&mut self, wanted: &BTreeSet<u64>, step: Step) -> Result<(), AttachError> {
        // Each is looked at through one more descriptor of ours, and opened anew through another.
        let open = self
            .hook
            .as_ref()
            .map_or(0, |hook| hook.mirror().open_files());
        let parts = slices::parts(open);
        for number in 0..parts {
            self.reopen_slice(wanted, step, &Slice::part(number, parts))?;
            if parts > 1 {
                slices::wait_for_room(open.div_ceil(parts));
            }
        }
        Ok(())
    }

    fn reopen_slice(
        &mut self,
        wanted: &BTreeSet<u64>,
        step: Step,
        slice: &Slice,
    ) -> Result<(), AttachError> {
        let mut rounds = Rounds::new(TRIES);
        let mut bystanders = Bystanders::default();
        loop {
            let attempt = rounds.begin();
            let left_out = bystanders.count();
            let result = Tracer::scope(|tracer| {
                self.reopen_once(tracer, wanted, step, slice, &mut bystanders)
                    .map_err(Traced)
            })
            .map_err(|Traced(error)| error);
            if let Some(hook) = self.hook.as_ref() {
                hook.unquiesce();
            }
            if bystanders.count() > left_out {
                rounds.left_out(1);
            }
            match result {
                Err(error) if error.rolled_back() && !rounds.is_last() => {
                    tracing::info!(%error, cause = error.cause_chain(), attempt, "open files could not be exchanged at once");
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
        slice: &Slice,
        bystanders: &mut Bystanders,
    ) -> Result<(), AttachError> {
        let Some(hook) = self.hook.as_ref() else {
            return Err(no_hook());
        };
        let device = hook.device();
        let on_hook = |facts: &census::FileFacts| facts.device == device && slice.holds(facts);
        let looked = |error| {
            AttachError::new(step, "it cannot be found out who is on the hook").because(error)
        };
        let mut holders = sighting::holders(device);
        holders.retain(|process| !bystanders.contains(process));
        let mut census = census::take(&holders, &on_hook).map_err(looked)?;
        // Asked for while the target runs: each costs a round trip through the hook.
        let mut known = Known::default();
        if concerned(hook, &census, wanted, &mut known).is_empty() {
            return Ok(());
        }
        if let Err(error) = self.journal.append(&Record::Stopping {
            processes: holders.iter().map(|process| who(*process)).collect(),
        }) {
            tracing::warn!(%error, "the journal does not tell of the stop");
        }
        hook.quiesce();
        let deadline = Deadline::after(Duration::from_micros(self.config.max_pause_us));
        let mut stopped = tracer.stop_all(&holders, deadline).map_err(|error| {
            bystanders.leave_out(&error, &holders, |process| self.is_target(process));
            stop_failed(step, error)
        })?;
        census
            .rescan(stopped.processes(), &on_hook)
            .map_err(looked)?;
        let mut switch = Switch::new(&census);
        let mut superseded = Vec::new();
        for (id, handle) in concerned(hook, &census, wanted, &mut known) {
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
        // Before the programs go on: until then every FLUSH is that of a copy by which an exchange was made, and drops no lock; from then on it is their own close.
        if let Some(hook) = self.hook.as_ref() {
            hook.unquiesce();
        }
        drop(stopped);
        applied
            .map(drop)
            .map_err(|failed| exchange_failed(step, "open files could not be exchanged", failed))
    }

    /// The zero of every rule's window.
    fn origin(&self) -> Instant {
        self.began.unwrap_or_else(Instant::now)
    }
}

/// Why open files are not seen by the rules.
const NOT_IN_FORCE: &str = "opened for rules that could not be put in force";
const RENAMED: &str = "renamed or linked under a rule while they were open";

fn open_files(number: usize) -> String {
    if number == 1 {
        "1 open file".to_owned()
    } else {
        format!("{number} open files")
    }
}

/// The error of a change of rules, which says what is in force now.
fn not_in_force(error: AttachError, unseen: usize, had_rules: bool) -> AttachError {
    let mut now = if had_rules {
        "the former rules are in force"
    } else {
        "no rule is in force"
    }
    .to_owned();
    if unseen > 0 {
        now.push_str(&format!(" except for {}", open_files(unseen)));
    }
    let (step, code, rolled_back) = (error.step(), error.exit_code(), error.rolled_back());
    let hint = error.hint().map(str::to_owned);
    let told = AttachError::new(
        step,
        format!("the rules need open files to be opened anew, which failed; {now}"),
    )
    .because(error)
    .exiting(code);
    let told = match hint {
        Some(hint) => told.hinting(hint),
        None => told,
    };
    if rolled_back {
        told
    } else {
        told.needing_recovery()
    }
}

/// Which handles descriptions have, as far as they have been asked for; `None` for one without.
type Known = BTreeMap<DescriptionId, Option<HandleId>>;

/// The descriptions that have to be opened anew, and their handles. Asks about those that are not `known`.
fn concerned(
    hook: &Hook,
    census: &Census,
    wanted: &BTreeSet<u64>,
    known: &mut Known,
) -> Vec<(DescriptionId, HandleId)> {
    census
        .descriptions()
        .filter_map(|description| {
            let handle = match known.entry(description.id) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(new) => {
                    let info = hook.mirror().identify(description.kept.as_fd());
                    *new.insert(info.ok()?.handle)
                }
            }?;
            wanted
                .contains(&handle.number())
                .then_some((description.id, handle))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files that are open in one mode or the other, and a target that can be stopped only so often.
    struct Fake {
        asked: Option<&'static str>,
        /// Number of the file and the rules that see it.
        files: Vec<(u64, &'static str, bool)>,
        /// What the target opens while it is tried to stop it; in the mode that the plan of the moment wants.
        opens: Vec<(u64, &'static str)>,
        /// Results of the next reopenings: done, not done, or half done.
        results: Vec<Result<(), bool>>,
    }

    impl Files for Fake {
        type Plan = &'static str;

        fn ask(&mut self, plan: Option<&'static str>) -> Result<BTreeSet<u64>, AttachError> {
            self.asked = plan;
            Ok(self.unseen())
        }

        fn reopen(&mut self, files: &BTreeSet<u64>) -> Result<(), AttachError> {
            let opened = std::mem::take(&mut self.opens);
            self.files.extend(
                opened
                    .into_iter()
                    .map(|(file, rules)| (file, rules, self.asked == Some(rules))),
            );
            match self.results.remove(0) {
                Ok(()) => {
                    for file in &mut self.files {
                        file.2 |= files.contains(&file.0);
                    }
                    Ok(())
                }
                Err(rolled_back) => {
                    let error = AttachError::new(Step::Stop, "it runs on");
                    Err(if rolled_back {
                        error
                    } else {
                        error.needing_recovery()
                    })
                }
            }
        }
    }

    impl Fake {
        fn new(results: Vec<Result<(), bool>>) -> Self {
            Self {
                asked: Some("old"),
                files: vec![(1, "old", true), (2, "new", false)],
                opens: vec![(3, "old"), (4, "new"), (5, "old")],
                results,
            }
        }

        /// Open files that rules are for which do not see them.
        fn unseen(&self) -> BTreeSet<u64> {
            self.files
                .iter()
                .filter(|(_, rules, sees)| Some(*rules) == self.asked && !sees)
                .map(|(file, ..)| *file)
                .collect()
        }
    }

    #[test]
    fn misfits_are_seen_to_at_once_and_then_not_for_a_while() {
        let start = Instant::now();
        let mut misfits = Misfits::default();
        assert_eq!(misfits.due_in(start), None);
        misfits.note();
        assert_eq!(misfits.due_in(start), Some(Duration::ZERO));
        misfits.done(start);
        assert_eq!(misfits.due_in(start), None, "there are no others");
        misfits.note();
        assert_eq!(misfits.due_in(start), Some(LEAST_BETWEEN));
        let later = start + LEAST_BETWEEN + Duration::from_millis(1);
        assert_eq!(misfits.due_in(later), Some(Duration::ZERO));
    }

    #[test]
    fn a_plan_in_force_sees_every_file() {
        let mut files = Fake::new(vec![Ok(())]);
        assert!(change(&mut files, Some("new"), Some("old")).is_ok());
        assert_eq!(
            (files.asked, files.unseen()),
            (Some("new"), BTreeSet::new())
        );
    }

    #[test]
    fn what_was_opened_under_the_new_plan_is_opened_anew_for_the_former_one() {
        let mut files = Fake::new(vec![Err(true), Ok(())]);
        let failed = change(&mut files, Some("new"), Some("old")).expect_err("it runs on");
        assert_eq!(
            (files.asked, files.unseen()),
            (Some("old"), BTreeSet::new())
        );
        assert_eq!(failed.unseen, 0);
        assert_eq!(
            not_in_force(failed.error, 0, true).to_string(),
            "the rules need open files to be opened anew, which failed; the former rules are in force"
        );
    }

    #[test]
    fn what_the_former_plan_does_not_see_is_told() {
        let mut files = Fake::new(vec![Err(true), Err(true)]);
        let failed = change(&mut files, Some("new"), Some("old")).expect_err("it runs on");
        assert_eq!((files.asked, files.unseen()), (Some("old"), [3, 5].into()));
        assert_eq!((failed.unseen, failed.error.rolled_back()), (2, true));
        let told = not_in_force(failed.error, 2, true);
        assert!(
            told.to_string()
                .ends_with("the former rules are in force except for 2 open files"),
            "{told}"
        );
        assert_eq!(told.cause_chain(), "it runs on");
    }

    #[test]
    fn a_half_done_exchange_needs_recovery_and_no_further_stop() {
        let mut files = Fake::new(vec![Err(false)]);
        let failed = change(&mut files, Some("new"), Some("old")).expect_err("half done");
        assert_eq!((files.asked, failed.unseen), (Some("old"), 2));
        assert!(!not_in_force(failed.error, 2, true).rolled_back());
        // Also when it is the second one that is left half done.
        let mut files = Fake::new(vec![Err(true), Err(false)]);
        let failed = change(&mut files, Some("new"), Some("old")).expect_err("half done");
        assert!(!failed.error.rolled_back());
    }

    #[test]
    fn a_resume_that_fails_leaves_it_paused() {
        let mut files = Fake::new(vec![Err(true)]);
        files.asked = None;
        let failed = change(&mut files, Some("new"), None).expect_err("it runs on");
        assert_eq!((files.asked, failed.unseen), (None, 0));
        let told = not_in_force(failed.error, 0, false);
        assert!(told.to_string().ends_with("no rule is in force"), "{told}");
    }
}
