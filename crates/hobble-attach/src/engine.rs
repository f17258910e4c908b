//! The engine: one attachment from its first step to its last, on one thread.
//!
//! Invariant: at any moment the target is in one of two states, native or hooked, or inside one bounded stop on the way between them; every
//! step in between is undone by the step that failed. Rules are on only in the phase Attached and only while not paused.
//!
//! This file is the order of things; how each is done is in `attaching`, `detaching` and `hook`.
//!
//! Length: the states of an attachment and all that leads from one to another, in one place.

use std::collections::{BTreeSet, VecDeque};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hobble_api::Timestamp;
use hobble_api::control::{Answer, Problem, Response};
use hobble_api::event::{Attached, EventKind, Progress, Recovered, Retrying, Rules, Why};
use hobble_api::status::{NotCovered, Phase, Reason, RuleCounts, Scope};
use hobble_graft::census::{FsId, SpaceId};
use hobble_graft::ids::{Pid, ProcessId};
use hobble_mirror::Legacy;
use hobble_rules::spec::Document;
use hobble_rules::{Experiment, Plan};

use crate::board::Board;
use crate::control::Command;
use crate::error::{AttachError, Step};
use crate::fault_point;
use crate::holder::{DONE, NEEDS_RECOVERY};
use crate::hook::{Hook, Served};
use crate::journal::{Journal, Record};
use crate::ledger::Ledger;
use crate::options::Lifetime;
use crate::reopening::Misfits;
use crate::scope::TargetSet;
use crate::server::{failure_code, publish_failure};
use crate::session::ServeConfig;

/// How often the engine looks whether the target, its hook and its time are still there.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// When a recovery that failed is tried again; twice that after the second failure, and so on.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// The longest wait between two tries.
const RETRY_AT_MOST: Duration = Duration::from_secs(30);

/// The plan in force or, while paused, the one to go on with; counters are read from it.
pub(crate) type PlanSlot = Arc<Mutex<Option<Arc<Plan>>>>;

/// One attachment at work.
pub(crate) struct Engine {
    pub(crate) config: ServeConfig,
    pub(crate) journal: Journal,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) board: Arc<Board>,
    /// Where its own threads send it commands.
    pub(crate) to_myself: Sender<Command>,
    pub(crate) targets: Arc<TargetSet>,
    pub(crate) hook: Option<Hook>,
    pub(crate) served: Served,
    pub(crate) plan: PlanSlot,
    pub(crate) paused: bool,
    /// When rules were first turned on: the zero of every rule's window.
    pub(crate) began: Option<Instant>,
    pub(crate) deadline: Option<Instant>,
    /// When it recovers unless the lease is renewed.
    pub(crate) lease: Option<Instant>,
    /// What the mirror asks now.
    pub(crate) in_force: Option<Arc<Plan>>,
    /// Mappings and directories that an exchange has left native for good.
    pub(crate) immovable: BTreeSet<(SpaceId, u64)>,
    pub(crate) stuck: BTreeSet<FsId>,
    /// An exchange has put the target onto the hook.
    pub(crate) moved_in: bool,
    /// Open files that the rules in force do not see, as the status shows it.
    pub(crate) unseen: Option<NotCovered>,
    /// Open files that have come under a rule and wait to be opened anew.
    pub(crate) misfits: Misfits,
    /// A recovery has begun: rules stay off.
    pub(crate) ending: bool,
    /// Where a successor finds what it must know.
    pub(crate) legacy: Option<Legacy>,
    /// The rules as they were last given.
    pub(crate) document: Option<serde_json::Value>,
    /// Our end of the session's lifeline.
    pub(crate) lifeline: Option<std::os::fd::RawFd>,
    /// What the legacy was last told.
    pub(crate) noted: Vec<u8>,
    commands: Receiver<Command>,
    /// Commands that came while something else was done, in order.
    waiting: VecDeque<Command>,
    /// Recoveries that have failed.
    failures: u32,
}

/// What an engine works with.
pub(crate) struct Means {
    pub(crate) journal: Journal,
    pub(crate) ledger: Ledger,
    pub(crate) board: Arc<Board>,
    pub(crate) commands: Receiver<Command>,
    /// Where its own threads send it commands.
    pub(crate) to_myself: Sender<Command>,
    pub(crate) legacy: Option<Legacy>,
}

/// What an attach moved.
#[derive(Debug, Default)]
pub(crate) struct Moved {
    pub(crate) pause: Duration,
    pub(crate) processes: u64,
    pub(crate) descriptors: u64,
    pub(crate) mappings: u64,
    pub(crate) locks: u64,
    pub(crate) not_covered: Vec<NotCovered>,
    pub(crate) degraded: Vec<Reason>,
}

/// What a recovery left.
#[derive(Debug, Default)]
pub(crate) struct GivenBack {
    pub(crate) pause: Duration,
    pub(crate) stops: u64,
    pub(crate) descriptors: u64,
    pub(crate) mappings: u64,
    /// What stays on the hook until it is closed.
    pub(crate) left: Vec<NotCovered>,
}

fn refuse(answer: &Sender<Response>, error: &AttachError) {
    let _ = answer.send(Response::Err(Problem {
        cause: error.whole(),
        hint: error.hint().map(str::to_owned),
        exit: Some(error.exit_code()),
    }));
}

fn recovered(answer: &Sender<Response>, left: Vec<NotCovered>) {
    let _ = answer.send(Response::Ok(Answer::Recovered { left }));
}

fn done(answer: &Sender<Response>) {
    let _ = answer.send(Response::Ok(Answer::Done {}));
}

/// Reads and checks a document that came as JSON.
pub(crate) fn check_document(
    document: &serde_json::Value,
    step: Step,
) -> Result<Experiment, AttachError> {
    let document: Document = serde_json::from_value(document.clone())
        .map_err(|error| AttachError::new(step, "the rules cannot be read").because(error))?;
    hobble_rules::check(&document).map_err(|found| diagnostics(&found, step))
}

/// Diagnostics as one error.
pub(crate) fn diagnostics(found: &[hobble_rules::Diagnostic], step: Step) -> AttachError {
    let list: Vec<String> = found.iter().map(ToString::to_string).collect();
    AttachError::new(
        step,
        format!("the rules are not right: {}", list.join("; ")),
    )
    .hinting("`hobble check` shows every place")
    .exiting(hobble_api::exit::ExitCode::Usage)
}

fn draw_seed() -> u64 {
    let mut bytes = [0_u8; 8];
    match rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()) {
        Ok(8) => u64::from_ne_bytes(bytes),
        // Any seed will do as long as it is told; the clock is one.
        _ => u64::try_from(Timestamp::now().as_nanosecond() & i128::from(u64::MAX)).unwrap_or(1),
    }
}

impl Engine {
    /// An engine for a configuration, or for one whose server has died: with the targets that are `known`.
    pub(crate) fn new(config: ServeConfig, means: Means, known: Vec<ProcessId>) -> Self {
        let Means {
            journal,
            ledger,
            board,
            commands,
            to_myself,
            legacy,
        } = means;
        let own = config.own();
        let root = Pid::new(config.pid).map(|pid| ProcessId {
            pid,
            start_time: config.start_time,
        });
        let targets = match config.scope {
            Scope::Namespace => TargetSet::everyone(own.within_reach_of(config.pid)),
            Scope::Tree => TargetSet::tree(own, || {
                let mut all = known;
                all.extend(
                    root.into_iter()
                        .flat_map(|root| crate::attaching::tree_of(root, own)),
                );
                all.retain(|process| process.is_alive().unwrap_or(true));
                all
            }),
        };
        Self {
            legacy,
            document: config.document.clone(),
            lifeline: None,
            noted: Vec::new(),
            config,
            journal,
            ledger: Arc::new(ledger),
            board,
            to_myself,
            targets,
            hook: None,
            served: Served::default(),
            plan: PlanSlot::default(),
            paused: false,
            began: None,
            in_force: None,
            deadline: None,
            lease: None,
            immovable: BTreeSet::new(),
            stuck: BTreeSet::new(),
            moved_in: false,
            unseen: None,
            misfits: Misfits::default(),
            ending: false,
            commands,
            waiting: VecDeque::new(),
            failures: 0,
        }
    }

    /// Reads the counters of the rules, from any thread.
    pub(crate) fn counters(&self) -> impl Fn() -> Vec<RuleCounts> + Send + Sync + 'static {
        let plan = Arc::clone(&self.plan);
        move || rule_counts(&plan)
    }

    /// Whether files are passed through now, from any thread; `None` without a hook.
    pub(crate) fn passthrough(&self) -> impl Fn() -> Option<bool> + Send + Sync + 'static {
        let served = Arc::clone(&self.served);
        move || {
            let served = served.lock().unwrap_or_else(PoisonError::into_inner);
            served.as_ref().map(hobble_mirror::Mirror::passthrough)
        }
    }

    /// The pids to show as targets, from any thread.
    pub(crate) fn targets(&self) -> impl Fn() -> Vec<i32> + Send + Sync + 'static {
        let targets = Arc::clone(&self.targets);
        let (pid, scope, own) = (self.config.pid, self.config.scope, self.config.own());
        move || match scope {
            Scope::Tree => {
                let mut pids: Vec<i32> = targets
                    .processes()
                    .into_iter()
                    .map(|process| process.pid.as_raw())
                    .collect();
                // The process that was named comes first.
                pids.sort_by_key(|known| *known != pid);
                pids
            }
            Scope::Namespace => crate::attaching::namespace_of(pid, own),
        }
    }

    /// Attaches, serves commands until it has recovered, and tells the exit status for the holder.
    pub(crate) fn live(&mut self) -> i32 {
        if let Err(error) = crate::scope::follow(&self.targets) {
            tracing::warn!(%error, "process events are followed at operations only");
        }
        self.board.edit(|status| status.phase = Phase::Attaching);
        if let Err(error) = self.attach().and_then(|()| self.begin()) {
            tracing::error!(%error, cause = error.cause_chain(), step = error.step().name(), "attaching failed");
            let (error, left) = self.undo_after_failure(error);
            let is_served_on = !left.is_empty();
            self.answer_the_waiting(&error, &left);
            publish_failure(&self.board, &error);
            return if is_served_on {
                tracing::warn!("what is left on the hook is served until it is let go of");
                self.linger()
            } else {
                failure_code(&error)
            };
        }
        self.go_on()
    }

    /// Serves commands until it has recovered, and tells the exit status for the holder.
    pub(crate) fn go_on(&mut self) -> i32 {
        let mut looked = Instant::now();
        loop {
            self.note();
            // However fast commands come, by a script or by a target that renames all the time, the deadline is looked at.
            let due = if looked.elapsed() >= LOOK_EVERY {
                looked = Instant::now();
                self.look()
            } else {
                None
            };
            let misfits_due = if self.ending {
                None
            } else {
                self.misfits.due_in(Instant::now())
            };
            if misfits_due == Some(Duration::ZERO) && due.is_none() {
                self.note_busy();
                if let Err(error) = self.reopen_misfits() {
                    self.retry(&error.needing_recovery(), true);
                    return NEEDS_RECOVERY;
                }
            }
            let wait = misfits_due.map_or(LOOK_EVERY, |due| due.min(LOOK_EVERY));
            let command = match due.or_else(|| self.waiting.pop_front()) {
                Some(command) => Some(command),
                // No sender goes before this does, which has one itself.
                None => self.commands.recv_timeout(wait).ok(),
            };
            if command.is_some() {
                self.note_busy();
            }
            match command {
                None => {}
                Some(Command::Reopen) => self.misfits.note(),
                Some(
                    Command::Update { answer, .. }
                    | Command::Pause { answer }
                    | Command::Resume { answer }
                    | Command::Renew { answer },
                ) if self.ending => {
                    refuse(
                        &answer,
                        &AttachError::new(Step::Update, "it is being recovered"),
                    );
                }
                Some(Command::Update {
                    document,
                    seed,
                    answer,
                }) => match self.update(&document, seed) {
                    Ok((seed, rules)) => {
                        let _ = answer.send(Response::Ok(Answer::Updated { seed, rules }));
                    }
                    Err(error) => {
                        refuse(&answer, &error);
                        if !error.rolled_back() {
                            self.retry(&error, true);
                            return NEEDS_RECOVERY;
                        }
                    }
                },
                Some(Command::Pause { answer }) => match self.pause() {
                    Ok(()) => done(&answer),
                    Err(error) => {
                        refuse(&answer, &error);
                        if !error.rolled_back() {
                            self.retry(&error, true);
                            return NEEDS_RECOVERY;
                        }
                    }
                },
                Some(Command::Resume { answer }) => match self.resume() {
                    Ok(()) => done(&answer),
                    Err(error) => {
                        refuse(&answer, &error);
                        if !error.rolled_back() {
                            self.retry(&error, true);
                            return NEEDS_RECOVERY;
                        }
                    }
                },
                Some(Command::Renew { answer }) => match self.renew() {
                    Ok(until) => {
                        let _ = answer.send(Response::Ok(Answer::Renewed { until }));
                    }
                    Err(error) => refuse(&answer, &error),
                },
                Some(Command::Recover { why, force, answer }) => match self.recover(why, force) {
                    Ok(left) => {
                        if let Some(answer) = answer {
                            recovered(&answer, left);
                        }
                        return self.linger();
                    }
                    Err(error) => {
                        // Without a connection nothing can be asked any more: the holder's successor goes by its descriptors.
                        let is_lost = !error.rolled_back()
                            || self.hook.as_ref().is_some_and(|hook| !hook.is_serving());
                        // Whatever failed: the target is not native.
                        let error = error.needing_recovery();
                        self.retry(&error, is_lost);
                        if let Some(answer) = answer {
                            refuse(&answer, &error);
                        }
                        if is_lost {
                            return NEEDS_RECOVERY;
                        }
                    }
                },
            }
        }
    }

    /// Has it recover as if somebody had asked for it.
    pub(crate) fn ask_to_recover(&mut self, why: Why) {
        self.waiting.push_back(Command::Recover {
            why,
            force: false,
            answer: None,
        });
    }

    /// Tells that a recovery has failed, and when it is tried again: by us, or at once by the holder's successor.
    fn retry(&mut self, error: &AttachError, by_successor: bool) {
        self.failures += 1;
        let wait = if by_successor {
            Duration::ZERO
        } else {
            RETRY_AFTER
                .saturating_mul(1 << (self.failures - 1).min(5))
                .min(RETRY_AT_MOST)
        };
        tracing::error!(%error, cause = error.cause_chain(), ?wait, "recovery failed; it is tried again");
        self.board.publish(EventKind::Retrying(Retrying {
            cause: error.whole(),
            hint: error.hint().map(str::to_owned),
            in_ms: u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
        }));
        self.deadline = Some(Instant::now() + wait);
    }

    /// Whether somebody has asked for the end while the target was being attached: then it is not to be touched any further.
    pub(crate) fn is_called_off(&mut self) -> bool {
        self.waiting.extend(self.commands.try_iter());
        self.waiting
            .iter()
            .any(|command| matches!(command, Command::Recover { .. }))
    }

    /// Attaching failed: who has asked for its end has got it, but for what is `left`; the rest is refused.
    fn answer_the_waiting(&mut self, error: &AttachError, left: &[NotCovered]) {
        self.waiting.extend(self.commands.try_iter());
        for command in self.waiting.drain(..) {
            match command {
                Command::Recover { answer, .. } if error.rolled_back() => {
                    if let Some(answer) = answer {
                        recovered(&answer, left.to_vec());
                    }
                }
                Command::Recover { answer, .. } => {
                    if let Some(answer) = answer {
                        refuse(&answer, error);
                    }
                }
                Command::Update { answer, .. }
                | Command::Pause { answer }
                | Command::Resume { answer }
                | Command::Renew { answer } => refuse(&answer, error),
                Command::Reopen => {}
            }
        }
    }

    /// What time, target and hook ask for.
    fn look(&mut self) -> Option<Command> {
        let recover = |why| {
            Some(Command::Recover {
                why,
                force: false,
                answer: None,
            })
        };
        if self
            .deadline
            .is_some_and(|deadline| Instant::now() >= deadline)
        {
            return recover(Why::Deadline);
        }
        if self.lease.is_some_and(|lease| Instant::now() >= lease) && self.failures == 0 {
            return recover(Why::LostLease);
        }
        if self.failures > 0 {
            // Whatever else has happened, the next try is due when it is due.
            return None;
        }
        if !self.anybody_left() {
            return recover(Why::TargetExit);
        }
        if self.hook.as_ref().is_some_and(|hook| !hook.is_serving())
            || self.hook.as_mut().is_some_and(Hook::is_lost)
        {
            return recover(Why::HookLost);
        }
        None
    }

    fn anybody_left(&self) -> bool {
        match self.config.scope {
            Scope::Tree => self
                .targets
                .processes()
                .into_iter()
                .any(|process| process.is_alive().unwrap_or(true)),
            Scope::Namespace => self
                .hook
                .as_ref()
                .is_none_or(|hook| hook.namespace_is_inhabited(self.config.own())),
        }
    }

    pub(crate) fn progress(&self, phase: &str, done: u64, total: u64) {
        self.board.publish(EventKind::Attaching(Progress {
            phase: phase.to_owned(),
            done,
            total,
        }));
    }

    /// The plan to begin with, compiled before anything is opened because it chooses how files are opened.
    pub(crate) fn first_plan(&mut self) -> Result<Option<Arc<Plan>>, AttachError> {
        let Some(document) = &self.config.document else {
            // Told all the same: a rule set that comes by an update without a seed of its own goes on with it.
            let seed = self.config.seed.unwrap_or_else(draw_seed);
            self.board.edit(|status| status.seed = seed);
            return Ok(None);
        };
        let experiment = self.check(document, Step::Inject)?;
        let seed = self
            .config
            .seed
            .or(experiment.seed())
            .unwrap_or_else(draw_seed);
        self.board.edit(|status| status.seed = seed);
        let plan = Arc::new(Plan::compile(&experiment, seed, None, Duration::ZERO));
        *self.plan.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&plan));
        Ok(Some(plan))
    }

    /// Reads and checks a document for this attachment.
    pub(crate) fn check(
        &self,
        document: &serde_json::Value,
        step: Step,
    ) -> Result<Experiment, AttachError> {
        let only =
            self.hook.as_ref().map(Hook::ground).and_then(|ground| {
                Some((ground.absolute().to_vec(), ground.only_file()?.to_vec()))
            });
        match only {
            None => check_document(document, step),
            Some((directory, file)) => crate::single_file::check(document, &directory, &file, step),
        }
    }

    /// Attached and published: rules on, clock started.
    fn begin(&mut self) -> Result<(), AttachError> {
        if self.is_called_off() {
            return Err(called_off());
        }
        fault_point::pass("injecting");
        let began = *self.began.get_or_insert_with(Instant::now);
        let plan = self
            .plan
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        self.put_in_force(plan, Step::Inject)?;
        let seed = self.board.status().seed;
        if let Lifetime::For(time) = self.config.lifetime() {
            self.deadline = Some(began + time);
        }
        self.start_lease();
        let deadline = self.deadline.and_then(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            Timestamp::now().checked_add(left).ok()
        });
        self.board.edit(|status| {
            status.phase = Phase::Attached;
            status.deadline = deadline;
        });
        // Whoever hears of it may rely on it, whatever becomes of this server.
        self.note();
        self.board.publish(EventKind::Injecting(Rules {
            seed,
            rules: self.rule_names(),
        }));
        Ok(())
    }

    pub(crate) fn rule_names(&self) -> Vec<String> {
        rule_counts(&self.plan)
            .into_iter()
            .map(|rule| rule.name)
            .collect()
    }

    /// Publishes what attaching moved.
    pub(crate) fn publish_attached(&self, moved: Moved) {
        let event = Attached {
            pause_us: u64::try_from(moved.pause.as_micros()).unwrap_or(u64::MAX),
            processes: moved.processes,
            descriptors: moved.descriptors,
            mappings: moved.mappings,
            locks: moved.locks,
            not_covered: moved.not_covered,
            degraded: moved.degraded,
        };
        self.board.edit(|status| {
            status.not_covered.clone_from(&event.not_covered);
            status.degraded.clone_from(&event.degraded);
        });
        self.board.publish(EventKind::Attached(event));
    }

    fn update(
        &mut self,
        document: &serde_json::Value,
        seed: Option<u64>,
    ) -> Result<(u64, Vec<String>), AttachError> {
        let experiment = self.check(document, Step::Update)?;
        fault_point::pass("updating");
        let previous = self
            .plan
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let seed = seed
            .or(experiment.seed())
            .or_else(|| previous.as_ref().map(|plan| plan.seed()))
            .unwrap_or_else(|| self.board.status().seed);
        let now = self.began.map_or(Duration::ZERO, |began| began.elapsed());
        let plan = Arc::new(Plan::compile(&experiment, seed, previous.as_deref(), now));
        if !self.paused {
            self.put_in_force(Some(Arc::clone(&plan)), Step::Update)?;
        }
        *self.plan.lock().unwrap_or_else(PoisonError::into_inner) = Some(plan);
        self.document = Some(document.clone());
        self.board.edit(|status| status.seed = seed);
        let rules = self.rule_names();
        self.note();
        self.board.publish(EventKind::Updated(Rules {
            seed,
            rules: rules.clone(),
        }));
        fault_point::pass("updated");
        Ok((seed, rules))
    }

    fn pause(&mut self) -> Result<(), AttachError> {
        if self.paused {
            return Err(AttachError::new(Step::Update, "it is paused already"));
        }
        self.put_in_force(None, Step::Update)?;
        self.paused = true;
        self.board.edit(|status| status.paused = true);
        self.note();
        self.board.publish(EventKind::Paused {});
        Ok(())
    }

    fn resume(&mut self) -> Result<(), AttachError> {
        if !self.paused {
            return Err(AttachError::new(Step::Update, "it is not paused"));
        }
        let plan = self
            .plan
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        self.put_in_force(plan, Step::Update)?;
        self.paused = false;
        self.board.edit(|status| status.paused = false);
        self.note();
        self.board.publish(EventKind::Resumed {});
        Ok(())
    }

    /// Counts the time of the lease anew from now.
    fn renew(&mut self) -> Result<Timestamp, AttachError> {
        let until = self.start_lease().ok_or_else(|| {
            AttachError::new(Step::Control, "it has no lease")
                .hinting("`hobble inject --lease 30s` makes one")
        })?;
        self.note();
        Ok(until)
    }

    /// Counts the time of the lease from now; gives when it ends. `None` without a lease.
    fn start_lease(&mut self) -> Option<Timestamp> {
        let time = Duration::from_millis(self.config.lease_ms?);
        self.lease = Some(Instant::now() + time);
        let until = Timestamp::now().checked_add(time).ok();
        self.board.edit(|status| status.lease = until);
        until
    }

    fn recover(&mut self, why: Why, force: bool) -> Result<Vec<NotCovered>, AttachError> {
        self.ending = true;
        self.note();
        self.board.edit(|status| status.phase = Phase::Detaching);
        self.board.publish(EventKind::Recovering { why });
        self.journal
            .append(&Record::Recovering {
                why: format!("{why:?}"),
            })
            .unwrap_or_else(
                |error| tracing::warn!(%error, "the journal does not tell of the recovery"),
            );
        fault_point::pass("recovering");
        let given = self.detach(force)?;
        if let Some(legacy) = &self.legacy {
            // What is left is served for as long as it is held.
            legacy.set_deadline(0);
        }
        self.board.edit(|status| {
            status.phase = Phase::Detached;
            status.not_covered.clone_from(&given.left);
        });
        let left = u32::try_from(given.left.len()).unwrap_or(u32::MAX);
        if let Err(error) = self.journal.append(&Record::Recovered { left }) {
            tracing::warn!(%error, "the journal does not tell of the end of the recovery");
        }
        fault_point::pass("recovered");
        self.board.publish(EventKind::Recovered(Recovered {
            pause_us: u64::try_from(given.pause.as_micros()).unwrap_or(u64::MAX),
            stops: given.stops,
            descriptors: given.descriptors,
            mappings: given.mappings,
            rules: rule_counts(&self.plan),
            left: given.left.clone(),
        }));
        Ok(given.left)
    }

    /// Serves plainly until the kernel has let go of the hook: descriptors that stay on it by design, or are in flight in a socket.
    fn linger(&mut self) -> i32 {
        loop {
            if self
                .hook
                .as_ref()
                .is_none_or(|hook| hook.wait_end(LOOK_EVERY))
            {
                return DONE;
            }
            let next = match self.waiting.pop_front() {
                Some(command) => Ok(command),
                None => self.commands.try_recv(),
            };
            // What is left is nobody's but its holder's; the only request that makes sense now is to look again, or to force it.
            match next {
                Ok(Command::Recover { force, answer, .. }) => {
                    let result = self.detach(force);
                    if let Ok(given) = &result {
                        self.board
                            .edit(|status| status.not_covered.clone_from(&given.left));
                    }
                    match (answer, result) {
                        (Some(answer), Ok(given)) => recovered(&answer, given.left),
                        (Some(answer), Err(error)) => refuse(&answer, &error.needing_recovery()),
                        (None, _) => {}
                    }
                }
                Ok(
                    Command::Update { answer, .. }
                    | Command::Pause { answer }
                    | Command::Resume { answer }
                    | Command::Renew { answer },
                ) => {
                    refuse(
                        &answer,
                        &AttachError::new(
                            Step::Update,
                            "it has recovered; only files that are still open are served",
                        ),
                    );
                }
                // Rules are off.
                Ok(Command::Reopen) | Err(_) => {}
            }
        }
    }
}

/// Somebody has asked for the end before the rules were in force.
pub(crate) fn called_off() -> AttachError {
    AttachError::new(
        Step::Inject,
        "called off before any rule was in force; the target is as it was",
    )
    .exiting(hobble_api::exit::ExitCode::RolledBack)
}

fn rule_counts(plan: &PlanSlot) -> Vec<RuleCounts> {
    let plan = plan.lock().unwrap_or_else(PoisonError::into_inner).clone();
    plan.map_or_else(Vec::new, |plan| {
        plan.counters()
            .into_iter()
            .map(|rule| RuleCounts {
                name: rule.name,
                evaluated: rule.evaluated,
                matched: rule.matched,
                injected: rule.injected,
            })
            .collect()
    })
}
