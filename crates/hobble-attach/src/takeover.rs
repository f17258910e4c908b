//! Going on where a dead server has stopped: what the engine notes for its successor, and what the successor makes of it.
//!
//! Invariant: nothing of the target is touched before the hook is served again, and nobody sees an error: what the dead server had taken and not answered is handed out again
//! and answered once. Where that cannot be had (the kernel has no FUSE_NOTIFY_RESEND, an exchange of locks was cut in two, the log is incomplete) the successor undoes the hook
//! instead ([`crate::recover::successor`]), as it does when this fails: until the hook is served nothing is done that would stand in its way.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use hobble_api::event::{Event, EventKind, TakenOver, Why};
use hobble_api::status::Status;
use hobble_graft::ids::Device;
use hobble_graft::proc::tree::MountNamespaceId;
use hobble_mirror::Legacy;
use hobble_rules::{Plan, RuleProgress};
use rustix::process::Pid;
use serde::{Deserialize, Serialize};

use crate::attaching::who;
use crate::board::Board;
use crate::claim::{Claim, read_ledger, read_story};
use crate::engine::{Engine, Means};
use crate::error::{AttachError, Step};
use crate::ground::{GroundNote, Inherited};
use crate::hook::Hook;
use crate::journal::Who;
use crate::ledger::Ledger;
use crate::options::Failover;
use crate::server;
use crate::session::ServeConfig;
use crate::state_dir::{AttachmentDir, StateDir};
use crate::story::Story;
use crate::{fault_point, recover, sys};

/// Events that a successor still has for late followers.
const KEPT_EVENTS: usize = 32;

/// What the engine notes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Note {
    /// The rules as they were last given.
    document: Option<serde_json::Value>,
    progress: Vec<RuleProgress>,
    /// When injection began and when it ends, in milliseconds of CLOCK_BOOTTIME.
    began: Option<u64>,
    deadline: Option<u64>,
    lease: Option<u64>,
    /// Something is being done to the target.
    is_busy: bool,
    is_ending: bool,
    targets: Vec<Who>,
    ground: GroundNote,
    lifeline: Option<RawFd>,
    status: Status,
    events: Vec<Event>,
}

/// Milliseconds of `CLOCK_BOOTTIME`, which goes on while the machine sleeps and is never set.
pub(crate) fn boot_time() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let millis = now.tv_sec * 1000 + now.tv_nsec / 1_000_000;
    u64::try_from(millis).unwrap_or(0)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The descriptors that are open.
pub(crate) fn open_numbers() -> BTreeSet<RawFd> {
    let mut numbers: BTreeSet<RawFd> = std::fs::read_dir("/proc/self/fd")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    // The one by which this was read is closed by now: its number will be something else's.
    numbers.retain(|number| sys::is_open(*number));
    numbers
}

impl Engine {
    /// Notes for a successor how things stand, if they have changed.
    pub(crate) fn note(&mut self) {
        self.note_as(false);
    }

    /// Notes that something is about to be done to the target.
    pub(crate) fn note_busy(&mut self) {
        self.note_as(true);
    }

    fn note_as(&mut self, is_busy: bool) {
        let (Some(legacy), Some(hook)) = (self.legacy.clone(), self.hook.as_ref()) else {
            return;
        };
        let boot = |at: Instant| {
            let now = Instant::now();
            let passed = now.saturating_duration_since(at);
            (boot_time() + millis(at.saturating_duration_since(now))).saturating_sub(millis(passed))
        };
        let plan = self.plan.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = plan.clone();
        let events = self.board.last_events(KEPT_EVENTS);
        let targets = self.targets.processes().into_iter().map(who).collect();
        let note = Note {
            document: self.document.clone(),
            progress: plan.map(|plan| plan.progress()).unwrap_or_default(),
            // Rounded, so that a moment that has not changed is noted as the same.
            began: self.began.map(boot).map(|at| at / 100 * 100),
            deadline: self.deadline.map(boot).map(|at| at / 100 * 100),
            lease: self.lease.map(boot).map(|at| at / 100 * 100),
            is_busy,
            is_ending: self.ending,
            targets,
            ground: hook.ground().note(),
            lifeline: self.lifeline,
            status: self.board.status(),
            events,
        };
        let due = note.deadline.into_iter().chain(note.lease).min();
        legacy.set_deadline(due.unwrap_or(0));
        match serde_json::to_vec(&note) {
            Ok(bytes) if bytes != self.noted => {
                legacy.note(bytes.clone());
                self.noted = bytes;
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "a successor would not know how things stand"),
        }
    }
}

/// What the holder runs when the server has died. Goes on serving, if it can; else undoes the hook.
pub(crate) fn successor(
    config: &ServeConfig,
    holder: Pid,
    legacy: Option<Legacy>,
    own: &BTreeSet<RawFd>,
) -> i32 {
    if let Some(legacy) = legacy {
        match take_over(config, holder, &legacy, own) {
            Ok(Some(code)) => return code,
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%error, cause = error.cause_chain(), "the hook cannot be served on; undoing it");
            }
        }
    }
    recover::successor(config, holder)
}

/// The claim to an attachment whose server is dead, where its hook can be served on.
fn claim(dir: &AttachmentDir) -> Result<Option<Claim>, AttachError> {
    let fit = |story: &Story| story.may_be_placed && !story.exchanging && story.hook_dev != 0;
    if !read_story(dir)?.is_some_and(|story| fit(&story)) {
        return Ok(None);
    }
    // Whoever was before us may have come further.
    Ok(Claim::take(dir)?.filter(|claim| fit(&claim.story)))
}

/// Serves the hook to its end; gives the exit status for the holder. `None` when this is not a hook that can be served on.
fn take_over(
    config: &ServeConfig,
    holder: Pid,
    legacy: &Legacy,
    own: &BTreeSet<RawFd>,
) -> Result<Option<i32>, AttachError> {
    let noticed = Instant::now();
    let dead = open_numbers();
    let Ok(dir) =
        StateDir::open(&config.state_dir, false).and_then(|state| state.attachment(&config.id))
    else {
        return Ok(None);
    };
    let Some(claim) = claim(&dir)? else {
        return Ok(None);
    };
    fault_point::pass("takeover-claimed");
    server::settle_in();
    let note = legacy.last_note().map_err(|error| {
        AttachError::io(Step::Serve, "read what the dead server has noted", error)
    })?;
    // None before it was attached.
    let note: Option<Note> = serde_json::from_slice(&note).ok();
    recover::hang_up(note.as_ref().and_then(|note| note.lifeline));
    let story = &claim.story;
    let journal = claim.journal.try_clone().map_err(|error| {
        AttachError::new(Step::Recover, "the journal cannot be written").because(error)
    })?;
    let ledger = dir
        .open_own(&dir.ledger(), rustix::fs::OFlags::WRONLY)
        .map_err(|error| {
            AttachError::new(Step::Recover, "the ledger cannot be written").because(error)
        })?;
    let ledger = Ledger::new(ledger, &read_ledger(&dir));
    let board = Arc::new(match &note {
        Some(note) => Board::going_on(
            note.status.clone(),
            note.events.clone(),
            Some(legacy.clone()),
        ),
        None => Board::new(server::first_status(config, holder), Some(legacy.clone())),
    });
    board.edit(|status| status.server_pid = Some(std::process::id()));
    let (engine_in, commands) = std::sync::mpsc::channel();
    let known = note.iter().flat_map(|note| &note.targets);
    let means = Means {
        journal,
        ledger,
        board: Arc::clone(&board),
        commands,
        to_myself: engine_in.clone(),
        legacy: Some(legacy.clone()),
    };
    let known = known.filter_map(|who| crate::story::process(*who));
    let mut engine = Engine::new(config.clone(), means, known.collect());
    let inherited = Inherited {
        device: Device::from_raw(story.hook_dev),
        target: story.target,
        path: std::path::PathBuf::from(
            <std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(story.path.clone()),
        ),
        namespace: MountNamespaceId(story.mount_ns),
        around: story.placing.map(Into::into),
        ground: note
            .as_ref()
            .map(|note| note.ground.clone())
            .unwrap_or_default(),
    };
    let (hook, used) = Hook::take_over(
        inherited,
        &config.id,
        Arc::clone(&engine.targets),
        Arc::clone(&engine.ledger),
        Arc::clone(&engine.served),
        engine_in.clone(),
        legacy,
    )?;
    let gap = noticed.elapsed();
    tracing::info!(?gap, "taken over from a dead server");
    let lifeline = note
        .as_ref()
        .and_then(|note| note.lifeline)
        .filter(|number| dead.contains(number) && !config.detach)
        .and_then(|number| sys::take(number).ok())
        .map(UnixStream::from);
    sweep(&dead, |number| {
        own.contains(&number)
            || used.contains(&number)
            || lifeline
                .as_ref()
                .is_some_and(|ours| ours.as_raw_fd() == number)
    });
    fault_point::pass("takeover-served");
    // From here on everybody is served, this process is the server, and the holder opens files again.
    legacy.set_server(std::process::id());
    // The next successor has less to read.
    hook.mirror().tidy_legacy();
    engine.hook = Some(hook);
    engine.moved_in = true;
    let is_busy = note
        .as_ref()
        .is_none_or(|note| note.is_busy || note.is_ending);
    if is_busy {
        recover::clean_up(story, &engine.journal);
    }
    let goes_on = engine.take_up(note.as_ref());
    board.publish(EventKind::TakenOver(TakenOver {
        server_pid: std::process::id(),
        goes_on,
        gap_us: u64::try_from(gap.as_micros()).unwrap_or(u64::MAX),
    }));
    fault_point::pass("taken-over");
    if !goes_on {
        engine.ask_to_recover(Why::LostServer);
    }
    let code = server::serve_to_the_end(config, &dir, engine, &board, engine_in, lifeline);
    // The journal goes with the directory; if it stays, the claim ends with this process.
    std::mem::forget(claim);
    Ok(Some(code))
}

impl Engine {
    /// Puts the noted rules in force again. Says whether the experiment goes on.
    fn take_up(&mut self, note: Option<&Note>) -> bool {
        if let Err(error) = crate::scope::follow(&self.targets) {
            tracing::warn!(%error, "process events are followed at operations only");
        }
        let Some(note) = note.filter(|note| note.began.is_some()) else {
            return false;
        };
        let ago = |at: u64| {
            let ago = Duration::from_millis(boot_time().saturating_sub(at));
            Instant::now().checked_sub(ago)
        };
        self.began = note.began.and_then(ago);
        let ahead =
            |at: u64| Instant::now() + Duration::from_millis(at.saturating_sub(boot_time()));
        self.deadline = note.deadline.map(ahead);
        self.lease = note.lease.map(ahead);
        self.document.clone_from(&note.document);
        self.paused = note.status.paused;
        let plan = match self.noted_plan(note) {
            Ok(plan) => plan,
            Err(error) => {
                tracing::error!(%error, cause = error.cause_chain(), "the rules of the dead server cannot be put in force again");
                return false;
            }
        };
        self.plan
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone_from(&plan);
        if note.is_ending || self.config.failover == Failover::Recover {
            return false;
        }
        let in_force = plan.filter(|_| !self.paused);
        if let Err(error) = self.put_in_force(in_force, Step::Inject) {
            tracing::error!(%error, cause = error.cause_chain(), "the rules of the dead server cannot be put in force again");
            return false;
        }
        true
    }

    fn noted_plan(&self, note: &Note) -> Result<Option<Arc<Plan>>, AttachError> {
        let Some(document) = &note.document else {
            return Ok(None);
        };
        let experiment = self.check(document, Step::Inject)?;
        let plan = Plan::compile(&experiment, note.status.seed, None, Duration::ZERO);
        Ok(Some(Arc::new(plan.going_on(&note.progress))))
    }
}

/// Closes what the dead server had open and nobody uses any more. On a thread of its own: some of it is of the hook, and to close that is a request to ourselves.
fn sweep(dead: &BTreeSet<RawFd>, is_used: impl Fn(RawFd) -> bool) {
    let leftovers: Vec<OwnedFd> = dead
        .iter()
        .filter(|number| !is_used(**number))
        .filter_map(|number| sys::take(*number).ok())
        .collect();
    tracing::debug!(
        descriptors = leftovers.len(),
        "closing what a dead server had open"
    );
    let swept = std::thread::Builder::new()
        .name("hobble-sweep".into())
        .spawn(move || drop(leftovers));
    if let Err(error) = swept {
        tracing::warn!(%error, "what a dead server had open was closed at once");
    }
}
