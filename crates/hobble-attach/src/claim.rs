//! The right to undo an attachment, and what its journal and ledger say to whoever has it.
//!
//! Invariant: one process at a time undoes. The journal decides: everybody who wants to undo appends a record of himself and reads it all again, and the first in
//! order that still lives has the attachment to himself; records of one file are seen in one order by all.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use hobble_api::exit::ExitCode;
use rustix::fs::OFlags;

use crate::error::{AttachError, Step};
use crate::journal::{self, Journal, Record};
use crate::ledger::{self, Entry};
use crate::state_dir::AttachmentDir;
use crate::story::Story;
use crate::volume;

/// How long somebody else's recovery is waited for, or a server that is just starting.
pub(crate) const OTHERS: Duration = Duration::from_secs(20);

/// The journal's story; `None` when there is no journal: the server died before it touched anything.
pub(crate) fn read_story(dir: &AttachmentDir) -> Result<Option<Story>, AttachError> {
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
    let file = match dir.open_own(&dir.journal(), OFlags::RDONLY) {
        Ok(file) => file,
        Err(error) if error.is_not_found() => return untouched(),
        Err(error) => return Err(failed(error.into())),
    };
    let records = journal::read(file).map_err(|error| failed(error.into()))?;
    if records.is_empty() {
        return untouched();
    }
    Story::of(records, dir.id())
        .map(Some)
        .map_err(|error| failed(error.into()))
}

/// Whether the server is about to answer on its socket, and nothing is to be undone without it: it lives, or it has not yet said in the journal who it is while its
/// holder is there.
pub(crate) fn is_starting(dir: &AttachmentDir) -> bool {
    let server = dir
        .open_own(&dir.journal(), OFlags::RDONLY)
        .map_err(|error| error.is_not_found())
        .and_then(|file| journal::read(file).map_err(|_| false))
        .and_then(|records| {
            if records.is_empty() {
                return Err(true);
            }
            Story::of(records, dir.id()).map_err(|_| false)
        });
    match server {
        Ok(story) => match story.server() {
            Some(server) => crate::story::lives(server),
            None => is_held(dir),
        },
        // No journal, or nothing in it.
        Err(is_young) => is_young && is_held(dir),
    }
}

/// Whether some process has the attachment's log for its standard error, which only its holder and those that are cloned from it do.
fn is_held(dir: &AttachmentDir) -> bool {
    let Ok(log) = dir.open_own(&dir.log(), OFlags::RDONLY) else {
        return false;
    };
    // By their links: to look at a file of a hook that nobody serves would take for ever.
    let link = |pid: &str, fd: i32| std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok();
    let log = link("self", log.as_raw_fd());
    log.is_some()
        && hobble_graft::proc::tree::pids()
            .unwrap_or_default()
            .into_iter()
            .any(|pid| link(&pid.to_string(), 2) == log)
}

/// The right to undo an attachment: as long as it lasts nobody else does. Given up when dropped, or by dying.
pub(crate) struct Claim {
    pub(crate) story: Story,
    pub(crate) journal: Journal,
    me: journal::Who,
}

impl Claim {
    /// Waits until nobody else is at it. `None` when nothing is left to undo: nothing ever was, or another has done it.
    pub(crate) fn take(dir: &AttachmentDir) -> Result<Option<Self>, AttachError> {
        let me = crate::server::who(rustix::process::getpid())?;
        let mut until = Instant::now() + OTHERS;
        let mut last = None;
        // Written once: what counts is the place in the order of all records.
        let mut journal: Option<Journal> = None;
        let gave_up = |journal: &mut Option<Journal>| {
            if let Some(journal) = journal {
                let _ = journal.append(&Record::GaveUp(me));
            }
        };
        loop {
            let story = match read_story(dir) {
                Ok(Some(story)) => story,
                Ok(None) => return Ok(None),
                Err(error) => {
                    gave_up(&mut journal);
                    return Err(error);
                }
            };
            let other = story
                .living_server()
                .filter(|process| process.pid != hobble_graft::ids::Pid::own());
            if other.is_some() && other != last {
                // Each gets its time.
                last = other;
                until = Instant::now() + OTHERS;
            }
            match (other, &mut journal) {
                (None, None) => {
                    let Some(mut opened) = open_for_more(dir)? else {
                        return Ok(None);
                    };
                    opened.append(&Record::Server(me)).map_err(|error| {
                        AttachError::new(Step::Recover, "the journal cannot be written")
                            .because(error)
                    })?;
                    // Who else has come is seen by reading again.
                    journal = Some(opened);
                }
                (None, Some(_)) => {
                    return Ok(journal.map(|journal| Self { story, journal, me }));
                }
                // The holder's successor, or another `hobble recover`, is at it.
                (Some(_), _) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(20))
                }
                (Some(process), _) => {
                    gave_up(&mut journal);
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
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let _ = self.journal.append(&Record::GaveUp(self.me));
    }
}

/// The journal, to be written on; `None` when another has ended the attachment meanwhile.
fn open_for_more(dir: &AttachmentDir) -> Result<Option<Journal>, AttachError> {
    match dir.open_own(&dir.journal(), OFlags::RDWR | OFlags::APPEND) {
        Ok(file) => Journal::reopened(file).map(Some).map_err(|error| {
            AttachError::new(Step::Recover, "the journal cannot be read").because(error)
        }),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => {
            Err(AttachError::new(Step::Recover, "the journal cannot be opened").because(error))
        }
    }
}

/// The ledger; without it the undoing goes by the journal alone.
pub(crate) fn read_ledger(dir: &AttachmentDir) -> BTreeMap<i32, Entry> {
    let read = dir
        .open_own(&dir.ledger(), OFlags::RDONLY)
        .map_err(|error| error.to_string())
        .and_then(|file| ledger::read(file).map_err(|error| error.to_string()));
    read.unwrap_or_else(|error| {
        tracing::warn!(error, "the ledger of descriptors cannot be read");
        BTreeMap::new()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state_dir::StateDir;
    use std::process::{Command, Stdio};

    #[test]
    fn a_directory_without_a_journal_is_of_a_server_that_starts_while_its_holder_lives() {
        let scratch = tempfile::tempdir().expect("temporary directory");
        let dir = StateDir::open(scratch.path(), true)
            .and_then(|state| state.create("abcd"))
            .expect("attachment");
        assert!(!is_starting(&dir), "nobody is there");
        let log = dir.create_own(&dir.log(), true).expect("log");
        let mut holder = Command::new("sleep")
            .arg("60")
            .stderr(Stdio::from(log))
            .spawn()
            .expect("sleep");
        let with_holder = is_starting(&dir);
        let mut journal = Journal::new(dir.create_own(&dir.journal(), true).expect("journal"));
        let with_empty_journal = is_starting(&dir);
        let boot_id = hobble_graft::ids::BootId::current().expect("boot");
        let opened = Record::Opened {
            v: 1,
            id: "abcd".into(),
            boot_id: boot_id.as_str().to_owned(),
            created: 0,
        };
        journal.append(&opened).expect("append");
        let without_server = is_starting(&dir);
        let me = crate::server::who(rustix::process::getpid()).expect("self");
        journal.append(&Record::Server(me)).expect("append");
        let _ = holder.kill();
        let _ = holder.wait();
        assert!(with_holder && with_empty_journal && without_server);
        assert!(is_starting(&dir), "the server lives");
        let dead = journal::Who {
            start: me.start + 1,
            ..me
        };
        let mut journal = Journal::new({
            std::fs::remove_file(dir.journal()).expect("remove");
            dir.create_own(&dir.journal(), true).expect("journal")
        });
        for record in [opened, Record::Server(dead), Record::Server(me)] {
            journal.append(&record).expect("append");
        }
        assert!(!is_starting(&dir), "somebody undoes, who answers nobody");
    }
}
