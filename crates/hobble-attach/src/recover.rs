//! Undoing an attachment whose server is dead: by the holder's successor at once, or by a fresh process from the journal.
//!
//! Invariants: nothing that the journal claims is acted on unverified (see `story`); the FUSE connection is aborted first, so that no target sleeps for an
//! answer that nobody will give; what is put in a target's hands is the kept original wherever the holder still has it, and otherwise a file that has been
//! found to be the same inode. The attachment's directory goes last: as long as anything is left to undo it can be tried again.
//!
//! Length: both entries (the holder's successor and `hobble recover`) and the one way in which they undo.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use hobble_api::Timestamp;
use hobble_api::event::{Event, EventKind, Recovered, Why};
use hobble_api::exit::ExitCode;
use hobble_api::status::NotCovered as NotCoveredStatus;
use hobble_graft::census::{self, Census, Description, DescriptionLock, FileFacts, TableId};
use hobble_graft::ids::{Device, ProcessId};
use hobble_graft::proc::locks::{FileLock, LockClass, LockKind};
use hobble_graft::remote;
use hobble_graft::stop::{Deadline, Tracer};
use hobble_graft::switch::{NoHandover, Switch};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal};

use crate::attaching::{Traced, stop_failed, who};
use crate::client::Client;
use crate::error::{AttachError, Step};
use crate::holder::{DONE, NEEDS_RECOVERY};
use crate::journal::{self, Journal, Record, Who};
use crate::journaling::Steps;
use crate::originals::Originals;
use crate::preflight::chain;
use crate::session::ServeConfig;
use crate::sighting;
use crate::state_dir::{AttachmentDir, StateDir};
use crate::story::{RaisedLimit, Story};
use crate::sys;
use crate::volume::{self};

/// How long one stop may take here: not to recover is worse.
const PAUSE: Duration = Duration::from_secs(5);
/// How often is looked for what is still on the hook.
const ROUNDS: u32 = 10;
/// How long somebody else's recovery is waited for.
const OTHERS: Duration = Duration::from_secs(20);

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
        if let Err(error) = result {
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
    if let Ok(mut client) = Client::connect(id, &dir.socket()) {
        let since = Client::connect(id, &dir.socket())
            .and_then(|client| client.events(false, None))
            .map(last_number)
            .unwrap_or(0);
        match client.recover(force) {
            Ok(()) => {
                if let Ok(mut events) = Client::connect(id, &dir.socket())
                    .and_then(|client| client.events(false, Some(since)))
                {
                    while let Ok(Some(event)) = events.next(Duration::from_secs(1)) {
                        each(&event);
                    }
                }
                return Ok(());
            }
            // It died while it was asked; the journal tells how far it came.
            Err(_) if server_is_dead(&dir) => {}
            Err(error) => return Err(error),
        }
    }
    let publish = |kind| each(&Event::new(Timestamp::now(), id, kind));
    undo(&dir, force, publish)
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

fn server_is_dead(dir: &AttachmentDir) -> bool {
    read_story(dir).is_ok_and(|story| story.is_none_or(|story| story.living_server().is_none()))
}

/// The journal's story; `None` when there is no journal: the server died before it touched anything.
fn read_story(dir: &AttachmentDir) -> Result<Option<Story>, AttachError> {
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
        AttachError::new(
            Step::Recover,
            format!("the journal of `{}` cannot be trusted", dir.id()),
        )
        .because(error)
        .hinting("docs/recovery.md says how to undo an attachment by hand; nothing was touched")
        .exiting(ExitCode::NeedsRecovery)
    };
    // Without a record nothing was touched, unless the journal was: then the hook is there all the same, and must not be forgotten.
    let untouched = || match volume::find_by_source(&crate::hook::source(dir.id())) {
        None => Ok(None),
        Some(_) => Err(failed(
            "it holds no record, and yet the hook is mounted".into(),
        )),
    };
    if !dir.journal().exists() {
        return untouched();
    }
    let file = dir
        .open_own(&dir.journal())
        .map_err(|error| failed(error.into()))?;
    let records = journal::read(file).map_err(|error| failed(error.into()))?;
    if records.is_empty() {
        return untouched();
    }
    Story::of(records, dir.id())
        .map(Some)
        .map_err(|error| failed(error.into()))
}

/// What the holder runs when the server has died: the same undoing, in a process that shares the holder's descriptors.
pub(crate) fn successor(config: &ServeConfig, _holder: Pid) -> i32 {
    hang_up();
    let result =
        attachment(&config.state_dir, &config.id).and_then(|dir| undo(&dir, false, |_| {}));
    match result {
        Ok(()) => DONE,
        Err(error) => {
            tracing::error!(%error, cause = error.cause_chain(), "the target could not be put back");
            NEEDS_RECOVERY
        }
    }
}

/// Ends the conversations of the dead server: its sockets live on in the table that we share with the holder, and whoever is connected would wait for ever.
fn hang_up() {
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
        }
    }
}

/// Undoes what the journal tells of, and removes the attachment.
fn undo(
    dir: &AttachmentDir,
    force: bool,
    mut publish: impl FnMut(EventKind),
) -> Result<(), AttachError> {
    let until = Instant::now() + OTHERS;
    let story = loop {
        let Some(story) = read_story(dir)? else {
            return finish(dir, None);
        };
        let other = story
            .living_server()
            .filter(|process| process.pid != hobble_graft::ids::Pid::own());
        match other {
            None => break story,
            // The holder's successor, or another `hobble recover`, is at it.
            Some(_) if Instant::now() < until => std::thread::sleep(Duration::from_millis(50)),
            Some(process) => {
                return Err(AttachError::new(
                    Step::Recover,
                    format!(
                        "process {process} is still working on attachment `{}`",
                        dir.id()
                    ),
                )
                .hinting("look at its log, or end it"));
            }
        }
        if !dir.journal().exists() {
            return Ok(());
        }
    };
    publish(EventKind::Recovering {
        why: Why::LostServer,
    });
    let mut journal = open_for_more(dir)?;
    let me = crate::server::who(rustix::process::getpid())?;
    journal.append(&Record::Server(me)).map_err(|error| {
        AttachError::new(Step::Recover, "the journal cannot be written").because(error)
    })?;
    let mut work = Undoing {
        story: &story,
        journal,
        left: Vec::new(),
        pause: Duration::ZERO,
    };
    let result =
        Tracer::scope(|tracer| work.run(tracer).map_err(Traced)).map_err(|Traced(error)| error);
    let (left, pause) = (std::mem::take(&mut work.left), work.pause);
    result?;
    if !left.is_empty() && !force {
        let list: Vec<String> = left
            .iter()
            .map(|left| format!("{}: {}", left.what, left.reason))
            .collect();
        return Err(AttachError::new(
            Step::Recover,
            format!("not everything could be given back: {}", list.join("; ")),
        )
        .hinting("--force leaves these descriptors to fail and ends the attachment")
        .needing_recovery());
    }
    publish(EventKind::Recovered(Recovered {
        pause_us: u64::try_from(pause.as_micros()).unwrap_or(u64::MAX),
        rules: Vec::new(),
        left,
    }));
    finish(dir, story.living_holder())
}

fn open_for_more(dir: &AttachmentDir) -> Result<Journal, AttachError> {
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
        AttachError::new(Step::Recover, "the journal cannot be opened").because(error)
    };
    drop(
        dir.open_own(&dir.journal())
            .map_err(|error| failed(error.into()))?,
    );
    let fd = rustix::fs::open(
        dir.journal(),
        OFlags::WRONLY | OFlags::APPEND | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|error| failed(std::io::Error::from(error).into()))?;
    Ok(Journal::new(File::from(fd)))
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
    left: Vec<NotCoveredStatus>,
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
        if hook_dev == 0 || story.recovered {
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
        match hobble_fuse::mount::Connection::from_number(device.minor).abort() {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(error) => tracing::warn!(%error, "the connection could not be aborted"),
        }
        self.clean();
        // Before the volume is looked up again: its path leads to the hook until then.
        self.unmount(device)?;
        let originals = Originals::collect(story)?;
        for _ in 0..ROUNDS {
            self.unmount(device)?;
            let mut processes = sighting::holders(device);
            processes
                .retain(|process| Some(*process) != story.holder && Some(*process) != story.server);
            if processes.is_empty() {
                return Ok(());
            }
            if !self.give_back(tracer, &processes, device, &originals)? {
                return Ok(());
            }
        }
        Ok(())
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

    fn unmount(&self, device: Device) -> Result<(), AttachError> {
        volume::remove_everywhere(device, &self.story.source)
    }

    /// One stop of everybody on the hook. Says whether another round may find more.
    fn give_back(
        &mut self,
        tracer: &Tracer,
        processes: &[ProcessId],
        device: Device,
        originals: &Originals,
    ) -> Result<bool, AttachError> {
        let _ = self.journal.append(&Record::Stopping {
            processes: processes.iter().map(|process| who(*process)).collect(),
        });
        let deadline = Deadline::after(PAUSE);
        let mut stopped = tracer
            .stop_all(processes, deadline)
            .map_err(|error| stop_failed(Step::Recover, error).needing_recovery())?;
        let census = census::take(stopped.processes(), &|facts| facts.device == device).map_err(
            |error| {
                AttachError::new(Step::Recover, "the stopped target cannot be looked into")
                    .because(error)
                    .needing_recovery()
            },
        )?;
        self.left.clear();
        let mut switch = Switch::new(&census);
        switch.locks_are_gone();
        let mut moves = 0;
        for description in census.descriptions() {
            match originals.of(description, &census) {
                Ok(original) => {
                    let locks = self.posix_locks(description, &census, &original);
                    if !locks.is_empty() {
                        switch.locks(description.id, locks);
                    }
                    switch.description(description.id, original);
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
        // The server's OFD locks on the same ranges would keep the target from taking its own; nobody serves them any more.
        originals.unlock_servers();
        let report = switch.apply(
            &mut stopped,
            deadline,
            &mut Steps {
                journal: &mut self.journal,
            },
            &mut NoHandover,
        );
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

    fn leave(&mut self, facts: &FileFacts, error: &std::io::Error) {
        self.left.push(NotCoveredStatus {
            what: facts.path.display().to_string(),
            reason: error.to_string(),
            pid: None,
        });
    }

    /// POSIX locks that the process had when it was attached.
    fn posix_locks(
        &self,
        description: &Description,
        census: &Census,
        original: &OwnedFd,
    ) -> Vec<DescriptionLock> {
        let Ok(stat) = rustix::fs::fstat(original) else {
            return Vec::new();
        };
        let mut locks = Vec::new();
        for lock in self
            .story
            .posix
            .iter()
            .filter(|lock| lock.ino == stat.st_ino && lock.dev == stat.st_dev)
        {
            let table: Option<TableId> =
                description
                    .places
                    .iter()
                    .map(|place| place.table)
                    .find(|table| {
                        census
                            .tables()
                            .iter()
                            .filter(|known| known.id == *table)
                            .any(|known| {
                                known.members.iter().any(|member| {
                                    member.pid.as_raw() == lock.who.pid
                                        && started(census, member.pid) == Some(lock.who.start)
                                })
                            })
                    });
            let Some(table) = table else { continue };
            let kind = if lock.write {
                LockKind::Write
            } else {
                LockKind::Read
            };
            let end = (lock.end_byte != u64::MAX).then_some(lock.end_byte);
            let lock = FileLock {
                class: LockClass::Posix,
                kind,
                pid: None,
                inode: None,
                start: lock.start_byte,
                end,
            };
            locks.push(DescriptionLock {
                lock,
                table: Some(table),
            });
        }
        locks
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
        let replaced = if lives {
            sys::replace_soft_descriptor_limit(who.pid, limit.raised, limit.soft)
        } else {
            Ok(false)
        };
        match replaced {
            Ok(_) => done.push(who),
            Err(error) => {
                tracing::warn!(pid = who.pid, %error, "the soft limit on descriptors stays raised");
            }
        }
    }
    done
}

fn started(census: &Census, pid: hobble_graft::ids::Pid) -> Option<u64> {
    census
        .processes()
        .iter()
        .find(|process| process.id.pid == pid)
        .map(|process| process.id.start_time)
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
