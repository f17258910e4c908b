//! Undoing an attachment whose server is dead: by the holder's successor at once, or by a fresh process from the journal.
//!
//! Invariants: nothing that the journal claims is acted on unverified (see `story`); the FUSE connection is aborted first, so that no target sleeps for an
//! answer that nobody will give; what is put in a target's hands is the kept original wherever the holder still has it, and otherwise a file that has been
//! found to be the same inode. The attachment's directory goes last: as long as anything is left to undo it can be tried again.
//!
//! Length: both entries (the holder's successor and `hobble recover`) and the one way in which they undo.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use hobble_api::Timestamp;
use hobble_api::event::{Event, EventKind, Recovered, Why};
use hobble_api::exit::ExitCode;
use hobble_api::status::NotCovered as NotCoveredStatus;
use hobble_graft::census::{self, FileFacts};
use hobble_graft::ids::{Device, ProcessId};
use hobble_graft::limits::{self, DescriptorLimit};
use hobble_graft::remote;
use hobble_graft::stop::{Deadline, StopError, Tracer};
use hobble_graft::switch::Switch;
use rustix::fs::OFlags;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal};

use crate::attaching::{Traced, stop_failed, who};
use crate::bystanders::Rounds;
use crate::claim::{Claim, OTHERS, is_starting, read_ledger, read_story};
use crate::client::Client;
use crate::crash_locks::{CrashLocks, Guards};
use crate::error::{AttachError, Step};
use crate::holder::{DONE, KEEP, NEEDS_RECOVERY};
use crate::journal::{Journal, Record, Who};
use crate::journaling::Steps;
use crate::ledger::{Entry, Ledger};
use crate::originals::Originals;
use crate::preflight::chain;
use crate::session::ServeConfig;
use crate::sighting;
use crate::slices::{self, Slice};
use crate::state_dir::{AttachmentDir, StateDir};
use crate::story::{RaisedLimit, Story};
use crate::volume::{self};

/// How long one stop may take here: not to recover is worse.
const PAUSE: Duration = Duration::from_secs(5);
/// How often is looked for what is still on the hook.
const ROUNDS: u32 = 10;
/// How often a process may stand in the way of a stop before the others are put back without it.
const PATIENCE: u32 = 3;
/// How often that is tried without the attachment's directory, for nobody can be asked to try it again.
const TRIES_WITHOUT_DIRECTORY: u32 = 10;
/// How long is waited between two of these tries.
const PAUSE_WITHOUT_DIRECTORY: Duration = Duration::from_millis(500);
/// How long a killed server gets to end once nothing keeps it.
const LAST_BREATH: Duration = Duration::from_secs(2);
/// How long the successor of a server that has died gets to answer.
const TAKEN_OVER_WITHIN: Duration = Duration::from_secs(2);
/// How long a server that has failed to recover gets to end, if it does.
const GIVES_UP_WITHIN: Duration = Duration::from_secs(3);

/// Which attachments to recover.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// One, by its id.
    One(String),
    /// Every one there is.
    All,
}

/// Recovers attachments: asks their servers, and undoes from the journal what has no server any more. `each` sees the events of what happens.
///
/// # Errors
/// The first failure; with [`Which::All`] the others are tried all the same.
pub fn recover(
    state_dir: &Path,
    which: &Which,
    force: bool,
    each: &mut dyn FnMut(&Event),
) -> Result<(), AttachError> {
    let ids = match which {
        Which::One(id) => vec![id.clone()],
        Which::All => crate::ids(state_dir)?,
    };
    let mut first = Ok(());
    for id in ids {
        let result = recover_one(state_dir, &id, force, each);
        // Its server, or another `hobble recover`, was faster.
        let is_gone = *which == Which::All
            && StateDir::open(state_dir, false)
                .and_then(|state| state.attachment(&id))
                .is_err_and(|error| error.is_not_found());
        if let Err(error) = result
            && !is_gone
        {
            tracing::debug!(id, %error, "recovery failed");
            if first.is_ok() {
                first = Err(error);
            }
        }
    }
    first
}

fn recover_one(
    state_dir: &Path,
    id: &str,
    force: bool,
    each: &mut dyn FnMut(&Event),
) -> Result<(), AttachError> {
    // Says what is wrong with the id or the directory.
    let dir = attachment(state_dir, id)?;
    if let Some(mut client) = connect(&dir) {
        let since = Client::connect(id, &dir.socket())
            .and_then(|client| client.events(false, None))
            .map(last_number)
            .unwrap_or(0);
        match client.recover(force) {
            Ok(left) => {
                let mut is_told = false;
                if let Ok(mut events) = Client::connect(id, &dir.socket())
                    .and_then(|client| client.events(false, Some(since)))
                {
                    while let Ok(Some(event)) = events.next(Duration::from_secs(1)) {
                        is_told |= matches!(event.kind, EventKind::Recovered(_));
                        each(&event);
                    }
                }
                if !is_told && !left.is_empty() {
                    // It had recovered before, and this is what stayed.
                    let kind = EventKind::Recovered(Recovered {
                        left,
                        ..Recovered::default()
                    });
                    each(&Event::new(Timestamp::now(), id, kind));
                }
                return Ok(());
            }
            // It died while it was asked, or gives up to its holder's successor; the journal tells how far it came.
            Err(error) if has_ended(&dir, &error) => {}
            Err(error) => return Err(error),
        }
    }
    let publish = |kind| each(&Event::new(Timestamp::now(), id, kind));
    undo(&dir, force, publish)
}

/// A connection to the server, as soon as it takes one: its socket comes after its journal, and its journal after its directory. One that has just died has a successor in
/// a moment, which puts everything back without an error to anybody. `None` when there is no server.
fn connect(dir: &AttachmentDir) -> Option<Client> {
    let begun = Instant::now();
    loop {
        if let Ok(client) = Client::connect(dir.id(), &dir.socket()) {
            return Some(client);
        }
        let waited = begun.elapsed();
        let is_worth_it = waited < OTHERS && is_starting(dir)
            || waited < TAKEN_OVER_WITHIN && is_being_taken_over(dir);
        if !is_worth_it {
            return None;
        }
        // Neither a journal's first records nor a socket are announced.
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether a successor may be about to serve: the holder is there, and has not been left alone with a hook that nobody could put back.
fn is_being_taken_over(dir: &AttachmentDir) -> bool {
    read_story(dir).is_ok_and(|story| story.is_some_and(|story| story.living_holder().is_some()))
}

fn last_number(mut events: crate::client::Events) -> u64 {
    let mut next = 0;
    while let Ok(Some(event)) = events.next(Duration::from_secs(1)) {
        next = event.seq.map_or(next, |seq| seq + 1);
    }
    next
}

fn attachment(state_dir: &Path, id: &str) -> Result<AttachmentDir, AttachError> {
    StateDir::open(state_dir, false)
        .and_then(|state| state.attachment(id))
        .map_err(|error| {
            AttachError::new(Step::Recover, format!("no attachment `{id}`")).because(error)
        })
}

/// Whether the server has ended, after it has answered with `error`. One that cannot put everything back says so before it ends, and its followers get their time.
fn has_ended(dir: &AttachmentDir, error: &AttachError) -> bool {
    let until = Instant::now() + GIVES_UP_WITHIN;
    loop {
        let is_dead = read_story(dir).is_ok_and(|story| {
            let server = story.and_then(|story| story.server());
            server.is_none_or(|server| !crate::story::lives(server))
        });
        let may_end = error.exit_code() == ExitCode::NeedsRecovery && Instant::now() < until;
        if is_dead || !may_end {
            return is_dead;
        }
        // Only its parent is told.
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether somebody may still answer for the hook, or is giving everything back: by the journal or, where that cannot be trusted, by who listens on the socket.
fn is_served(dir: &AttachmentDir) -> bool {
    match read_story(dir) {
        Ok(story) => story.is_some_and(|story| story.living_server().is_some()),
        Err(_) => Client::connect(dir.id(), &dir.socket()).is_ok(),
    }
}

/// What the holder runs when the server has died: the same undoing, in a process that shares the holder's descriptors.
pub(crate) fn successor(config: &ServeConfig, holder: Pid) -> i32 {
    hang_up(None);
    let dir =
        StateDir::open(&config.state_dir, false).and_then(|state| state.attachment(&config.id));
    let result = match dir {
        Ok(dir) => undo(&dir, false, |_| {}),
        // It was at its very end, or somebody else has recovered; or somebody cleans up what is not theirs.
        Err(error) if error.is_not_found() => {
            let holder = crate::server::who(holder).map(crate::story::process);
            let result = holder.and_then(|holder| {
                holder.map_or(Ok(()), |holder| undo_without_directory(config, holder))
            });
            return outcome(result, KEEP);
        }
        Err(error) => Err(AttachError::new(
            Step::Recover,
            "the attachment's directory cannot be used",
        )
        .because(error)),
    };
    outcome(result, NEEDS_RECOVERY)
}

/// The exit status that tells the holder how a recovery has gone.
fn outcome(result: Result<(), AttachError>, failed: i32) -> i32 {
    match result {
        Ok(()) => DONE,
        Err(error) => {
            tracing::error!(%error, cause = error.cause_chain(), "the target could not be put back");
            failed
        }
    }
}

/// Ends the conversations of the dead server: its sockets live on in the table that we share with the holder, and whoever is connected would wait for ever.
///
/// The session's lifeline, `but`, is left alone by who takes over.
pub(crate) fn hang_up(but: Option<i32>) {
    let Ok(list) = std::fs::read_dir("/proc/self/fd") else {
        return;
    };
    // By their links: a duplicate of a file of the hook would be closed with a FLUSH that nobody answers.
    let is_socket = |path: &Path| {
        std::fs::read_link(path)
            .is_ok_and(|link| link.as_os_str().as_encoded_bytes().starts_with(b"socket:"))
    };
    let numbers: Vec<i32> = list
        .filter_map(Result::ok)
        .filter(|entry| is_socket(&entry.path()))
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|number| Some(*number) != but)
        .collect();
    let Ok(own) = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())
    else {
        return;
    };
    for number in numbers {
        if let Ok(socket) = rustix::process::pidfd_getfd(&own, number, PidfdGetfdFlags::empty())
            && rustix::net::sockopt::socket_domain(&socket) == Ok(rustix::net::AddressFamily::UNIX)
        {
            let _ = rustix::net::shutdown(&socket, rustix::net::Shutdown::Both);
            // Who has connected and was not accepted yet is in no list of descriptors, and a listener's end is not theirs as long as the holder has it open.
            let waits = rustix::net::sockopt::socket_acceptconn(&socket) == Ok(true)
                && rustix::io::ioctl_fionbio(&socket, true).is_ok();
            while waits && rustix::net::accept(&socket).is_ok() {}
        }
    }
}

/// Undoes what the journal tells of, and removes the attachment.
fn undo(
    dir: &AttachmentDir,
    force: bool,
    mut publish: impl FnMut(EventKind),
) -> Result<(), AttachError> {
    let claim = match Claim::take(dir) {
        Ok(Some(claim)) => claim,
        Ok(None) => return finish(dir, None),
        Err(error) => {
            // Nobody answers any more: whoever sleeps in a request gets an error now, and can be stopped or killed.
            if !is_served(dir)
                && let Some(device) = volume::find_by_source(&crate::hook::source(dir.id()))
            {
                abort(device);
            }
            return Err(error);
        }
    };
    let Claim { story, journal, .. } = &claim;
    publish(EventKind::Recovering {
        why: Why::LostServer,
    });
    let journal = journal.try_clone().map_err(|error| {
        AttachError::new(Step::Recover, "the journal cannot be written").because(error)
    })?;
    let known = read_ledger(dir);
    let ledger = dir
        .open_own(&dir.ledger(), OFlags::WRONLY)
        .ok()
        .map(|file| Ledger::new(file, &known));
    let work = Undoing::new(story, journal, known, ledger);
    let (left, pause) = work.all(force)?;
    publish(EventKind::Recovered(Recovered {
        pause_us: u64::try_from(pause.as_micros()).unwrap_or(u64::MAX),
        left,
        ..Recovered::default()
    }));
    finish(dir, story.living_holder())
}

/// Takes away what a dead server may have left in processes, where the hook is served on.
pub(crate) fn clean_up(story: &Story, journal: &Journal) {
    match journal.try_clone() {
        Ok(journal) => Undoing::new(story, journal, BTreeMap::new(), None).clean(),
        Err(error) => {
            tracing::warn!(%error, "what a dead server left in processes stays there; it is harmless");
        }
    }
}

/// Undoes an attachment whose directory somebody has removed: by what its holder was told in the beginning, and what the hook itself shows.
///
/// All tries are made here: the first takes the mount away, and whoever came after it would find no trace of the hook, though processes may still be on it.
fn undo_without_directory(config: &ServeConfig, holder: ProcessId) -> Result<(), AttachError> {
    let Some(device) = volume::find_by_source(&crate::hook::source(&config.id)) else {
        return Ok(());
    };
    tracing::warn!(
        id = config.id,
        "the attachment's directory is gone, and its hook is not: undoing without a journal"
    );
    let story = Story::without_journal(config, holder, device);
    let mut tries = 1;
    loop {
        let nowhere = std::fs::OpenOptions::new()
            .append(true)
            .open("/dev/null")
            .map_err(|error| AttachError::io(Step::Recover, "open /dev/null", error))?;
        let work = Undoing::new(&story, Journal::new(nowhere), BTreeMap::new(), None);
        match work.all(false) {
            Ok(_) => return Ok(()),
            Err(error) if tries < TRIES_WITHOUT_DIRECTORY => {
                tracing::warn!(%error, cause = error.cause_chain(), tries, "the target could not be put back; trying again");
                // Nothing announces that a process could be stopped now.
                std::thread::sleep(PAUSE_WITHOUT_DIRECTORY);
                tries += 1;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Ends a connection whose server is dead: who waits for an answer gets an error.
fn abort(device: Device) {
    match hobble_fuse::mount::Connection::from_number(device.minor).abort() {
        Ok(()) | Err(rustix::io::Errno::NOENT) => {}
        Err(error) => tracing::warn!(%error, "the connection could not be aborted"),
    }
}

impl<'a> Undoing<'a> {
    fn new(
        story: &'a Story,
        journal: Journal,
        known: BTreeMap<i32, Entry>,
        ledger: Option<Ledger>,
    ) -> Self {
        Self {
            story,
            journal,
            known,
            ledger,
            left: Vec::new(),
            mounts: Vec::new(),
            in_the_way: BTreeMap::new(),
            pause: Duration::ZERO,
        }
    }

    /// Does all there is to do; gives what is left and the longest stop. Without `force` nothing may be left.
    fn all(mut self, force: bool) -> Result<(Vec<NotCoveredStatus>, Duration), AttachError> {
        Tracer::scope(|tracer| self.run(tracer).map_err(Traced)).map_err(|Traced(error)| error)?;
        let mut left = self.left;
        left.append(&mut self.mounts);
        let given_up = self
            .in_the_way
            .iter()
            .filter(|(_, (times, _))| *times >= PATIENCE);
        left.extend(given_up.map(|(process, (_, why))| NotCoveredStatus {
            what: format!("what process {process} has of the hook"),
            reason: format!("the process could not be stopped: {why}"),
            pid: u32::try_from(process.pid.as_raw()).ok(),
        }));
        if left.is_empty() || force {
            return Ok((left, self.pause));
        }
        let list: Vec<String> = left
            .iter()
            .map(|left| format!("{}: {}", left.what, left.reason))
            .collect();
        Err(AttachError::new(
            Step::Recover,
            format!("not everything could be given back: {}", list.join("; ")),
        )
        .hinting("--force leaves these to fail and ends the attachment")
        .needing_recovery())
    }
}

/// Ends the holder, if it is not our own parent that is waiting for us, and removes the directory.
fn finish(dir: &AttachmentDir, holder: Option<ProcessId>) -> Result<(), AttachError> {
    dir.remove().map_err(|error| {
        AttachError::new(
            Step::Recover,
            "the attachment's directory cannot be removed",
        )
        .because(error)
    })?;
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get());
    if let Some(holder) = holder
        && parent != Some(holder.pid.as_raw())
        && let Some(pid) = Pid::from_raw(holder.pid.as_raw())
    {
        let _ = rustix::process::kill_process(pid, Signal::TERM);
    }
    Ok(())
}

struct Undoing<'a> {
    story: &'a Story,
    journal: Journal,
    /// What the ledger said in the beginning.
    known: BTreeMap<i32, Entry>,
    /// The ledger, for whoever goes on if we are killed too.
    ledger: Option<Ledger>,
    left: Vec<NotCoveredStatus>,
    /// Mounts of the hook that cannot be removed.
    mounts: Vec<NotCoveredStatus>,
    /// Who could not be stopped, how often, and why not.
    in_the_way: BTreeMap<ProcessId, (u32, String)>,
    pause: Duration,
}

impl Undoing<'_> {
    fn run(&mut self, tracer: &Tracer) -> Result<(), AttachError> {
        let story = self.story;
        // A journal that was cut off may not tell how far the attachment had come; the mount itself does.
        let hook_dev = match story.hook_dev {
            0 => volume::find_by_source(&story.source).map_or(0, Device::raw),
            known => known,
        };
        if hook_dev == 0 {
            self.clean();
            return Ok(());
        }
        let device = Device::from_raw(hook_dev);
        if !is_ours(story, device) {
            tracing::info!("nothing is left of the hook");
            self.clean();
            return Ok(());
        }
        // Whoever sleeps in a request to the dead server gets an error now instead of sleeping for ever.
        abort(device);
        self.wait_for_the_dead();
        self.clean();
        // Before the volume is looked up again: its path leads to the hook until then.
        self.unmount(device)?;
        if !story.may_be_placed && story.hook_dev != 0 {
            // It was attached nowhere yet: what is open on it are stand-ins of Hobble's own, and the originals behind them are in use by the target as ever.
            return Ok(());
        }
        let originals = Originals::collect(story, &self.known)?;
        let mut rounds = Rounds::new(ROUNDS);
        // As many stops as it takes for what does not fit into one, then one for the rest.
        let parts = slices::parts(originals.len());
        let mut number = if parts > 1 { 0 } else { parts };
        while let Some(round) = rounds.begin() {
            self.unmount(device)?;
            let mut processes = sighting::holders(device);
            // A successor of the server's that waits for its turn, or has just begun, has the holder's table: what it holds is what the holder keeps.
            let is_holders = |process: &ProcessId| {
                story
                    .holder
                    .is_some_and(|holder| census::share_a_table(holder.pid, process.pid))
            };
            processes.retain(|process| {
                Some(*process) != story.holder
                    && !story.servers.contains(process)
                    && !is_holders(process)
                    && !self.is_given_up(process)
            });
            if processes.is_empty() {
                return Ok(());
            }
            let given_up = self.count_given_up();
            let slice = if number < parts {
                Slice::part(number, parts)
            } else {
                Slice::whole()
            };
            let result = self.give_back(tracer, &processes, device, &slice, &originals);
            if self.count_given_up() > given_up {
                rounds.left_out(PATIENCE);
            }
            match result {
                Ok(_) if !slice.is_whole() => {
                    number += 1;
                    rounds.again();
                }
                Ok(true) => {}
                Ok(false) => return Ok(()),
                // Somebody was in a long call, or under another tracer, which may have gone a moment later.
                Err(error) if !rounds.is_last() && error.step() == Step::Recover => {
                    tracing::info!(%error, cause = error.cause_chain(), "giving back failed; trying again");
                    std::thread::sleep(Duration::from_millis(20 * u64::from(round + 1)));
                }
                Err(error) => return Err(error),
            }
        }
        let still = sighting::holders(device)
            .iter()
            .filter(|process| !self.is_given_up(process))
            .count();
        if still > 0 {
            self.left.push(NotCoveredStatus {
                what: format!("{still} processes"),
                reason: "they came to the hook faster than they could be taken off it".to_owned(),
                pid: None,
            });
        }
        Ok(())
    }

    /// A server that was killed while it waited for itself ends only now, and lets go of the processes that it traces when it does.
    fn wait_for_the_dead(&self) {
        let own = hobble_graft::ids::Pid::own();
        let until = Instant::now() + LAST_BREATH;
        let lingers = |process: &ProcessId| {
            process.pid != own
                && process.is_ending().unwrap_or(false)
                && process.is_alive().unwrap_or(false)
        };
        while self.story.servers.iter().any(lingers) && Instant::now() < until {
            // Only its parent is told.
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What a dead server left in processes. Only after the connection has been aborted: a thread that waits for the dead server cannot be stopped.
    fn clean(&mut self) {
        let mut seen = BTreeSet::new();
        for residue in &self.story.residues {
            if !seen.insert((
                residue.pid,
                residue.start_time,
                residue.tid,
                residue.code_address,
                residue.scratch_address,
            )) {
                continue;
            }
            match remote::clean(residue, Deadline::after(PAUSE)) {
                Ok(_) => {}
                Err(error) => tracing::warn!(
                    pid = residue.pid,
                    error = chain(&error),
                    "what a dead server left in a process stays there; it is harmless"
                ),
            }
        }
        self.limits();
    }

    /// Soft limits that a dead server had raised for an exchange.
    fn limits(&mut self) {
        for put_back in put_limits_back(&self.story.limits) {
            if let Err(error) = self.journal.append(&Record::LimitPutBack { who: put_back }) {
                tracing::warn!(%error, "the journal does not tell that a limit was put back");
            }
        }
    }

    fn unmount(&mut self, device: Device) -> Result<(), AttachError> {
        self.mounts = volume::remove_everywhere(device, &self.story.source)?;
        Ok(())
    }

    /// One stop of everybody on the hook. Says whether another round may find more.
    fn give_back(
        &mut self,
        tracer: &Tracer,
        processes: &[ProcessId],
        device: Device,
        slice: &Slice,
        originals: &Originals,
    ) -> Result<bool, AttachError> {
        let _ = self.journal.append(&Record::Stopping {
            processes: processes.iter().map(|process| who(*process)).collect(),
        });
        let deadline = Deadline::after(PAUSE);
        let mut stopped = match tracer.stop_all(processes, deadline) {
            Ok(stopped) => stopped,
            Err(error) => {
                self.note_in_the_way(&error, processes);
                return Err(stop_failed(Step::Recover, error).needing_recovery());
            }
        };
        let on_hook = |facts: &census::FileFacts| facts.device == device && slice.holds(facts);
        let census = census::take(stopped.processes(), &on_hook).map_err(|error| {
            AttachError::new(Step::Recover, "the stopped target cannot be looked into")
                .because(error)
                .needing_recovery()
        })?;
        self.left.clear();
        let locks = CrashLocks::new(self.story, originals);
        let mut positions = BTreeMap::new();
        let mut switch = Switch::new(&census);
        switch.locks_are_gone();
        let mut moves = 0;
        for description in census.descriptions() {
            match originals.of(description, &census) {
                Ok(original) => {
                    let due = locks.of(description, &census, &original.file);
                    if !due.is_empty() {
                        switch.locks(description.id, due);
                    }
                    if original.stands {
                        switch.keep_position(description.id);
                    } else if let Some(number) = original.number {
                        let position = description.position;
                        positions.insert(number, Entry::Kept { position });
                    }
                    switch.description(description.id, original.file);
                    moves += 1;
                }
                Err(error) => self.leave(&description.facts, &error),
            }
        }
        for file in census.mapped_files() {
            let flags = if file.is_writable {
                OFlags::RDWR
            } else {
                OFlags::RDONLY
            };
            match originals.reach(&file.facts, flags) {
                Ok(original) => {
                    switch.mapped_file(file.id, original);
                    moves += 1;
                }
                Err(error) => self.leave(&file.facts, &error),
            }
        }
        for fs in census.fs_structs() {
            for (directory, is_root) in [(&fs.cwd, false), (&fs.root, true)] {
                let Some(directory) = directory else { continue };
                match originals.reach(&directory.facts, OFlags::PATH | OFlags::DIRECTORY) {
                    Ok(original) if is_root => switch.root_directory(fs.id, original),
                    Ok(original) => switch.working_directory(fs.id, original),
                    Err(error) => {
                        self.leave(&directory.facts, &error);
                        continue;
                    }
                }
                moves += 1;
            }
        }
        if moves == 0 {
            return Ok(false);
        }
        if slice.is_whole() {
            self.left.append(&mut locks.unplaced());
        }
        let posix = locks.for_journal(&census);
        if let Err(error) = self.journal.append(&Record::Locks { posix }) {
            tracing::warn!(%error, "the journal does not tell of the locks");
        }
        let report = switch.apply(
            &mut stopped,
            deadline,
            &mut Steps {
                journal: &mut self.journal,
                positions: self.ledger.as_ref().map(|ledger| (ledger, &positions)),
            },
            &mut Guards {
                originals,
                locks: &locks,
                census: &census,
            },
        );
        if report.is_ok() {
            if let Err(error) = self.journal.append(&Record::Exchanged) {
                tracing::warn!(%error, "the journal does not tell that the exchange is complete");
            }
            originals.placed(positions);
        }
        originals.settle(report.is_ok().then(|| locks.owners()));
        let released = stopped.release();
        self.pause = self.pause.max(released.stood_still);
        let report = report.map_err(|failed| {
            AttachError::new(Step::Recover, "the target's files could not be given back")
                .because(failed)
                .needing_recovery()
        })?;
        // What cannot be moved now cannot be in the next round either: it is told, not tried for ever.
        let stuck = report.not_moved.len();
        self.left
            .extend(report.not_moved.iter().map(crate::attaching::not_moved));
        Ok(moves > stuck)
    }

    /// A process under another tracer, say, must not keep all others on a dead hook.
    fn note_in_the_way(&mut self, error: &StopError, processes: &[ProcessId]) {
        let in_the_way = processes
            .iter()
            .find(|process| Some(process.pid) == error.pid());
        if let Some(process) = in_the_way {
            let (times, why) = self.in_the_way.entry(*process).or_default();
            *times += 1;
            *why = chain(error);
        }
    }

    fn is_given_up(&self, process: &ProcessId) -> bool {
        self.in_the_way
            .get(process)
            .is_some_and(|(times, _)| *times >= PATIENCE)
    }

    fn count_given_up(&self) -> usize {
        self.in_the_way
            .keys()
            .filter(|process| self.is_given_up(process))
            .count()
    }

    fn leave(&mut self, facts: &FileFacts, error: &std::io::Error) {
        self.left.push(NotCoveredStatus {
            what: facts.path.display().to_string(),
            reason: error.to_string(),
            pid: None,
        });
    }
}

/// Puts raised soft limits back, the last first, where the process is the one that was meant and its limit is still the raised one: a program, or an
/// administrator, that has set it since knows better. Says whose are done with; one that could not be put back can be tried again.
fn put_limits_back(limits: &[RaisedLimit]) -> Vec<Who> {
    let mut done = Vec::new();
    for limit in limits.iter().rev() {
        let who = limit.who;
        let lives =
            crate::story::process(who).is_some_and(|process| process.is_alive().unwrap_or(false));
        let replaced = if lives { put_limit_back(limit) } else { Ok(()) };
        match replaced {
            Ok(()) => done.push(who),
            Err(error) => {
                tracing::warn!(pid = who.pid, %error, "the soft limit on descriptors stays raised");
            }
        }
    }
    done
}

fn put_limit_back(limit: &RaisedLimit) -> std::io::Result<()> {
    let Some(pid) = hobble_graft::ids::Pid::new(limit.who.pid) else {
        return Ok(());
    };
    let now = limits::descriptors(pid).map_err(std::io::Error::other)?;
    if now.soft == limit.raised {
        let soft = limit.soft.min(now.hard);
        limits::set_soft(pid, DescriptorLimit { soft, ..now })?;
    }
    Ok(())
}

/// Whether the filesystem that has the hook's device number now is the hook. The kernel gives the number to the next filesystem without a disk as soon as the
/// hook has gone, and what happens to a stranger's must not be ours to decide.
fn is_ours(story: &Story, device: Device) -> bool {
    // A mount of it has our source; a descriptor of the holder's, or a moved one of a target, is still on it.
    let held = |process: ProcessId| sighting::has_on(process.pid, device);
    volume::is_sighted(device, &story.source)
        || story.living_holder().is_some_and(held)
        || story.kept.iter().any(|kept| {
            kept.places.iter().any(|place| {
                let lives = crate::story::process(place.who)
                    .is_some_and(|process| process.is_alive().unwrap_or(false));
                lives && sighting::descriptor_is(place.who.pid, place.fd, device, kept.ino)
            })
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    /// A process whose soft limit on descriptors is `soft`.
    struct Limited(Child);

    impl Limited {
        fn new(soft: u64) -> Self {
            let script = format!("ulimit -Sn {soft}; echo; exec sleep 60");
            let mut child = Command::new("sh")
                .args(["-c", &script])
                .stdout(std::process::Stdio::piped())
                .spawn()
                .expect("sh");
            let mut line = [0];
            std::io::Read::read_exact(child.stdout.as_mut().expect("stdout"), &mut line)
                .expect("the limit is set");
            Self(child)
        }

        fn who(&self) -> Who {
            let pid = hobble_graft::ids::Pid::new(self.0.id().cast_signed()).expect("pid");
            who(ProcessId::of(pid).expect("alive"))
        }

        fn soft(&self) -> Option<u64> {
            let limits =
                std::fs::read_to_string(format!("/proc/{}/limits", self.0.id())).expect("limits");
            let line = limits
                .lines()
                .find_map(|line| line.strip_prefix("Max open files"))
                .expect("a limit on descriptors");
            line.split_ascii_whitespace().next()?.parse().ok()
        }
    }

    impl Drop for Limited {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_limit_is_put_back_only_while_it_is_the_raised_one_of_that_process() {
        let process = Limited::new(80);
        let who = process.who();
        let limit = |who, soft, raised| RaisedLimit { who, soft, raised };
        // Raised to 72 and put back by hand, long ago; the program has 80 for its own reasons.
        assert_eq!(put_limits_back(&[limit(who, 64, 72)]), [who]);
        assert_eq!(process.soft(), Some(80), "somebody else's limit");
        let other = Who {
            start: who.start + 1,
            ..who
        };
        put_limits_back(&[limit(other, 64, 80)]);
        assert_eq!(process.soft(), Some(80), "somebody else's pid");
        // What a recovery that died had raised on top goes first.
        put_limits_back(&[limit(who, 64, 72), limit(who, 72, 80)]);
        assert_eq!(process.soft(), Some(64));
    }
}
