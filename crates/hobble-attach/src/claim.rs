//! The right to undo an attachment, and what its journal and ledger say to whoever has it.
//!
//! Invariant: one process at a time undoes. The journal decides: everybody who wants to undo appends a record of himself and reads it all again, and the first in
//! order that still lives has the attachment to himself; records of one file are seen in one order by all.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use hobble_api::exit::ExitCode;
use rustix::fs::OFlags;

use crate::error::{AttachError, Step};
use crate::journal::{self, Journal, Record};
use crate::ledger::{self, Entry};
use crate::state_dir::AttachmentDir;
use crate::story::Story;
use crate::volume;

/// How long somebody else's recovery is waited for.
const OTHERS: Duration = Duration::from_secs(20);

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
