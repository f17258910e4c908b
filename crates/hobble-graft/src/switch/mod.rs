//! The exchange: what processes hold of a volume is replaced, all of it or nothing, while they stand still.
//!
//! Owns the order of the steps and their undoing. The same code moves onto the hook and back from it: it takes a census and, for every open file
//! description, directory and mapped file, what to put in its place; what was there before is in the census. Invariants:
//!
//! * Whatever fails, and when the budget is used up, everything done so far is undone with the kept originals and the undoing is
//!   checked with `kcmp`; [`SwitchFailed::rolled_back`] says whether that succeeded.
//! * Every step is told to the [`StepLog`] before it is made.
//! * All POSIX locks of a table are handed over around its exchange as [`LockHandover`] says; none is dropped silently. Those that the table holds on the
//!   same files through descriptors that stay are taken again, see `bystanders`.
//! * A process that dies meanwhile is left out, not an error, as long as one is left.
//!
//! What remains if we die in here: every descriptor, directory and mapping refers to one file or the other. Which of them, the
//! [`StepLog`] tells roughly and a new census exactly. A raised soft limit on descriptors and a [`crate::remote::Residue`] may be left.

mod bystanders;
mod descriptors;
mod directories;
mod in_place;
mod job;
mod locks;
mod mappings;
mod state;
mod steps;
mod sys;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::census::{
    Census, DescriptionId, DescriptionLock, FsId, FsStruct, MappedFileId, Member, SpaceId,
};
use crate::ids::{Fd, Pid, ProcessId};
use crate::proc::ProcError;
use crate::remote::RemoteError;
use crate::stop::{Deadline, Stopped};
use job::Job;

pub use state::copy_description_state;
pub use steps::{LockHandover, MovedLock, NoHandover, Step, StepLog, Way};

/// What one step of an undo may take when the budget is used up already.
const UNDO_STEP: Duration = Duration::from_millis(500);
/// What the undo may take as a whole.
const UNDO: Duration = Duration::from_secs(2);

/// Replacements that a switch closes itself.
const CLOSED_AT_ONCE: usize = 16;

/// Why a switch failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SwitchError {
    /// A call could not be made in a target.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// The budget is used up.
    #[error("no time left to {step}")]
    Late {
        /// What was under way.
        step: &'static str,
    },
    /// The log did not take a step.
    #[error("cannot record a step")]
    Record {
        /// The log's reason.
        #[source]
        source: io::Error,
    },
    /// A replacement could not be given position, flags, owner or signal.
    #[error("cannot carry over the state of open file description {description:?}")]
    State {
        /// Which one.
        description: DescriptionId,
        /// The kernel's reason.
        #[source]
        errno: Errno,
    },
    /// A descriptor could not be put in place.
    #[error("cannot exchange descriptor {fd} of process {pid}")]
    Place {
        /// The process.
        pid: Pid,
        /// The descriptor.
        fd: Fd,
        /// The error of `dup3` in the target.
        #[source]
        errno: Errno,
    },
    /// The descriptor table is full and the hard limit leaves no room.
    #[error("process {pid} has no free descriptors: {used} in use, hard limit {hard}")]
    TableFull {
        /// The process.
        pid: Pid,
        /// Descriptors in use.
        used: u64,
        /// The hard limit.
        hard: u64,
    },
    /// The limit on descriptors could not be read.
    #[error("cannot read the limit on descriptors of process {pid}")]
    ReadLimit {
        /// The process.
        pid: Pid,
        /// What failed.
        #[source]
        source: crate::proc::ProcError,
    },
    /// The limit on descriptors could not be raised or put back.
    #[error("cannot change the limit on descriptors of process {pid}")]
    Limit {
        /// The process.
        pid: Pid,
        /// The kernel's reason.
        #[source]
        errno: Errno,
    },
    /// A POSIX lock could not be taken (again).
    #[error("cannot take the POSIX lock of process {pid} on descriptor {fd} at byte {start}")]
    Lock {
        /// The process.
        pid: Pid,
        /// The descriptor.
        fd: Fd,
        /// First byte of the range.
        start: u64,
        /// The error of `fcntl` in the target.
        #[source]
        errno: Errno,
    },
    /// It could not be found out which POSIX locks a process holds.
    #[error("cannot find the POSIX locks of process {pid}")]
    Look {
        /// The process.
        pid: Pid,
        /// The reason.
        #[source]
        source: ProcError,
    },
    /// Whoever keeps locks meanwhile has failed.
    #[error("cannot keep the POSIX locks of process {pid} during the exchange")]
    Handover {
        /// The process.
        pid: Pid,
        /// Their reason.
        #[source]
        source: io::Error,
    },
    /// The working directory could not be looked up or put back.
    #[error("cannot put back the working directory of process {pid}")]
    Directory {
        /// The process.
        pid: Pid,
        /// The reason.
        #[source]
        errno: Errno,
    },
    /// A mapping could not be exchanged.
    #[error("{call} failed for the mapping at {address:#x} of process {pid}")]
    Mapping {
        /// The process.
        pid: Pid,
        /// Its first address.
        address: u64,
        /// The system call.
        call: &'static str,
        /// Its error.
        #[source]
        errno: Errno,
    },
    /// No thread of a process that should be changed stands still.
    #[error("no thread of process {pid} stands still")]
    NotStill {
        /// The process.
        pid: Pid,
    },
    /// After an undo, a descriptor does not refer to what it referred to before.
    #[error("descriptor {fd} of process {pid} does not refer to what it did")]
    NotRestored {
        /// The process.
        pid: Pid,
        /// The descriptor.
        fd: Fd,
    },
    /// All processes have ended.
    #[error("process {pid} is gone")]
    Gone {
        /// One of them.
        pid: Pid,
    },
}

impl SwitchError {
    fn is_gone(&self) -> bool {
        matches!(
            self,
            Self::Gone { .. } | Self::Remote(RemoteError::Gone { .. })
        )
    }
}

/// A switch that did not happen.
#[derive(Debug, thiserror::Error)]
#[error("{}", if *.rolled_back { "nothing was exchanged" } else { "the exchange was left half done" })]
pub struct SwitchFailed {
    /// Why.
    #[source]
    pub error: SwitchError,
    /// Whether everything is as it was before.
    pub rolled_back: bool,
    /// What failed while undoing.
    pub undo: Vec<SwitchError>,
}

impl SwitchFailed {
    /// Whether more time may have helped.
    pub fn is_late(&self) -> bool {
        matches!(
            self.error,
            SwitchError::Late { .. } | SwitchError::Remote(RemoteError::Late { .. })
        )
    }
}

/// Something that stays with the old file although a replacement was given.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NotMoved {
    /// A mapping.
    Mapping {
        /// Where.
        space: SpaceId,
        /// First address.
        start: u64,
        /// Why.
        reason: &'static str,
    },
    /// A working or root directory: the target itself has no right to enter it.
    Directory {
        /// Whose.
        fs: FsId,
        /// Whether it is the root directory.
        is_root: bool,
        /// The error in the target.
        errno: Errno,
    },
}

/// What a switch has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Open file descriptions exchanged.
    pub descriptions: usize,
    /// Descriptors exchanged, all tables together.
    pub descriptors: usize,
    /// Working and root directories exchanged.
    pub directories: usize,
    /// Mappings exchanged.
    pub mappings: usize,
    /// Bytes of private pages copied.
    pub bytes_copied: u64,
    /// POSIX locks handed over.
    pub locks: usize,
    /// POSIX locks on the same files, held through descriptors that were not exchanged, which were lost by the way and taken again.
    pub locks_taken_again: usize,
    /// The longest time from the first exchange of a table to its last lock taken again.
    pub lock_window: Duration,
    /// How long all of it took. How long the targets stood still is told when they are let go.
    pub took: Duration,
    /// What stays with the old files.
    pub not_moved: Vec<NotMoved>,
    /// Processes that have died meanwhile.
    pub gone: Vec<Pid>,
}

/// What is to be exchanged.
#[derive(Debug)]
pub struct Switch<'c> {
    census: &'c Census,
    descriptions: BTreeMap<DescriptionId, OwnedFd>,
    placed: BTreeSet<DescriptionId>,
    directories: BTreeMap<(FsId, bool), OwnedFd>,
    files: BTreeMap<MappedFileId, OwnedFd>,
    locks: BTreeMap<DescriptionId, Vec<DescriptionLock>>,
    are_locks_gone: bool,
}

impl<'c> Switch<'c> {
    /// Nothing yet. The census must have been taken, or re-scanned, while the processes stand still.
    pub fn new(census: &'c Census) -> Self {
        Self {
            census,
            descriptions: BTreeMap::new(),
            placed: BTreeSet::new(),
            directories: BTreeMap::new(),
            files: BTreeMap::new(),
            locks: BTreeMap::new(),
            are_locks_gone: false,
        }
    }

    /// Puts `replacement` at every place of an open file description. Its position, flags, owner and signal are carried over by
    /// [`Switch::apply`]; its access mode must be the same.
    pub fn description(&mut self, id: DescriptionId, replacement: OwnedFd) {
        self.descriptions.insert(id, replacement);
    }

    /// Says that a replacement stands where it must, and may be in use by somebody who is not stopped: its position is left alone.
    pub fn keep_position(&mut self, id: DescriptionId) {
        self.placed.insert(id);
    }

    /// Says which POSIX locks are held on a description's file, where the census cannot see them: the kernel shows none with a
    /// file of a filesystem that keeps its locks itself, as FUSE does (fs/fuse/file.c, `fuse_setlk`).
    pub fn locks(&mut self, id: DescriptionId, locks: Vec<DescriptionLock>) {
        self.locks.insert(id, locks);
    }

    /// Says that the locks of [`Self::locks`] are not held any more, because whoever kept them is dead: they are only taken, not handed over.
    pub fn locks_are_gone(&mut self) {
        self.are_locks_gone = true;
    }

    /// Makes `replacement` (which may be open with `O_PATH`) the working directory of everybody who shares `id`.
    pub fn working_directory(&mut self, id: FsId, replacement: OwnedFd) {
        self.directories.insert((id, false), replacement);
    }

    /// As [`Self::working_directory`], for the root directory.
    pub fn root_directory(&mut self, id: FsId, replacement: OwnedFd) {
        self.directories.insert((id, true), replacement);
    }

    /// Maps `replacement` wherever a file is mapped. It must be open for reading, and for writing where the file
    /// [is](crate::census::MappedFile::is_writable).
    pub fn mapped_file(&mut self, id: MappedFileId, replacement: OwnedFd) {
        self.files.insert(id, replacement);
    }

    /// Exchanges everything, or nothing.
    ///
    /// # Errors
    /// [`SwitchFailed`] tells why, and whether everything is as before.
    pub fn apply(
        &self,
        stopped: &mut Stopped,
        deadline: Deadline,
        log: &mut dyn StepLog,
        handover: &mut dyn LockHandover,
    ) -> Result<Report, SwitchFailed> {
        let begun = Instant::now();
        let mut report = Report {
            descriptions: self.descriptions.len(),
            ..Report::default()
        };
        let failed = |error, rolled_back| SwitchFailed {
            error,
            rolled_back,
            undo: Vec::new(),
        };
        self.carry_over().map_err(|error| failed(error, true))?;
        let mut jobs = self
            .jobs(stopped, &mut report)
            .map_err(|error| failed(error, true))?;
        for job in &mut jobs {
            job.are_locks_gone = self.are_locks_gone;
        }
        // A process that shares its table with another, but not its memory, makes its mappings before the table's locks are handed over: see `Job::run`.
        jobs.sort_by_key(|job| !job.items.is_empty());
        let mut error = None;
        let mut last_gone = None;
        for job in &mut jobs {
            match job.run(stopped, deadline, log, handover, &mut report) {
                Ok(()) => {}
                Err(reason) if job.is_about_the_dead(&reason) => {
                    report.gone.push(job.process.pid);
                    last_gone = Some(reason);
                }
                Err(reason) => {
                    error = Some(reason);
                    break;
                }
            }
        }
        let all_gone = !jobs.is_empty()
            && jobs
                .iter()
                .all(|job| report.gone.contains(&job.process.pid));
        let error = error.or(if all_gone { last_gone } else { None });
        if let Some(error) = error {
            return Err(Self::undo(error, &mut jobs, stopped, log, handover));
        }
        report.gone.sort_unstable();
        report.gone.dedup();
        report.took = begun.elapsed();
        Ok(report)
    }

    /// Undoes the jobs that were begun, the last one first.
    fn undo(
        error: SwitchError,
        jobs: &mut [Job<'_>],
        stopped: &mut Stopped,
        log: &mut dyn StepLog,
        handover: &mut dyn LockHandover,
    ) -> SwitchFailed {
        let deadline = Deadline::after(UNDO);
        let mut undo = Vec::new();
        for job in jobs.iter_mut().rev() {
            match job.undo(stopped, deadline, log, handover) {
                Ok(()) => {}
                // What is dead needs no undoing.
                Err(reason) if job.is_about_the_dead(&reason) => {}
                Err(reason) => undo.push(reason),
            }
        }
        SwitchFailed {
            error,
            rolled_back: undo.is_empty(),
            undo,
        }
    }

    fn carry_over(&self) -> Result<(), SwitchError> {
        for (id, replacement) in &self.descriptions {
            if let Some(facts) = self.census.description(*id) {
                let position = (!self.placed.contains(id)).then_some(facts.position);
                copy_description_state(facts, position, replacement.as_fd()).map_err(|errno| {
                    SwitchError::State {
                        description: *id,
                        errno,
                    }
                })?;
            }
        }
        Ok(())
    }

    /// Divides the work among as few threads as possible.
    fn jobs<'s>(
        &'s self,
        stopped: &Stopped,
        report: &mut Report,
    ) -> Result<Vec<Job<'s>>, SwitchError> {
        let mut jobs: Vec<Job<'s>> = Vec::new();
        for table in self.census.tables() {
            let items = self.items_of(table.id);
            if items.is_empty() {
                continue;
            }
            let job = job_for(&mut jobs, self.census, stopped, &table.members, |job| {
                job.items.is_empty()
            })?;
            job.items = items;
        }
        for fs in self.census.fs_structs() {
            let items = self.directories_of(fs);
            if items.is_empty() {
                continue;
            }
            job_for(&mut jobs, self.census, stopped, &fs.members, |_| true)?
                .directories
                .extend(items);
        }
        for space in self.census.spaces() {
            let mut items = Vec::new();
            for mapping in &space.mappings {
                let (Some(there), Some(file)) = (
                    self.files.get(&mapping.file),
                    self.census.mapped_file(mapping.file),
                ) else {
                    continue;
                };
                match mappings::obstacle(mapping) {
                    Some(reason) => {
                        report.not_moved.push(NotMoved::Mapping {
                            space: space.id,
                            start: mapping.start,
                            reason,
                        });
                    }
                    None => items.push(mappings::Item {
                        mapping,
                        there: there.as_fd(),
                        back: file.kept.as_fd(),
                        is_touched: false,
                    }),
                }
            }
            if !items.is_empty() {
                let members: Vec<Member> = space
                    .processes
                    .iter()
                    .flat_map(|pid| stopped.threads(*pid).map(|tid| Member { pid: *pid, tid }))
                    .collect();
                job_for(&mut jobs, self.census, stopped, &members, |_| true)?
                    .mappings
                    .extend(items);
            }
        }
        Ok(jobs)
    }

    fn items_of(&self, table: crate::census::TableId) -> Vec<descriptors::Item<'_>> {
        let mut items = Vec::new();
        for (id, there) in &self.descriptions {
            let Some(facts) = self.census.description(*id) else {
                continue;
            };
            let places: Vec<(Fd, bool)> = facts
                .places
                .iter()
                .filter(|p| p.table == table)
                .map(|p| (p.fd, p.close_on_exec))
                .collect();
            if places.is_empty() {
                continue;
            }
            let held = self.locks.get(id).unwrap_or(&facts.locks);
            let locks = held
                .iter()
                .filter(|l| l.table == Some(table))
                .map(|l| l.lock)
                .collect();
            items.push(descriptors::Item {
                description: *id,
                there: there.as_fd(),
                back: facts.kept.as_fd(),
                places,
                locks,
                is_readable: matches!(
                    facts.flags.access(),
                    crate::census::Access::Read | crate::census::Access::ReadWrite
                ),
                is_touched: false,
            });
        }
        items
    }

    fn directories_of<'s>(&'s self, fs: &'s FsStruct) -> Vec<(FsId, directories::Item<'s>)> {
        // The root first: it leads through the working directory.
        let both = [(&fs.root, true), (&fs.cwd, false)];
        both.into_iter()
            .filter_map(|(directory, is_root)| {
                let there: BorrowedFd<'s> = self.directories.get(&(fs.id, is_root))?.as_fd();
                let back = directory.as_ref()?.kept.as_fd();
                Some((
                    fs.id,
                    directories::Item {
                        there,
                        back,
                        is_root,
                        is_touched: false,
                    },
                ))
            })
            .collect()
    }
}

impl Drop for Switch<'_> {
    /// Closing a replacement may be a request to a server, and a switch is usually dropped while the targets still stand still: others than a few
    /// are closed by a thread of their own.
    fn drop(&mut self) {
        if self.descriptions.len() <= CLOSED_AT_ONCE {
            return;
        }
        let descriptions = std::mem::take(&mut self.descriptions);
        let closer = std::thread::Builder::new().name("closer".to_owned());
        // Where no thread can be had, this closes them.
        let _ = closer.spawn(move || drop(descriptions));
    }
}

/// The job of some thread among `members`: one that has a job already if `fits`, else a new one.
fn job_for<'j, 's>(
    jobs: &'j mut Vec<Job<'s>>,
    census: &'s Census,
    stopped: &Stopped,
    members: &[Member],
    fits: impl Fn(&Job<'_>) -> bool,
) -> Result<&'j mut Job<'s>, SwitchError> {
    let is_member = |job: &Job<'_>| {
        members
            .iter()
            .any(|m| m.pid == job.process.pid && m.tid == job.tid)
    };
    let still = |m: &&Member| stopped.threads(m.pid).any(|tid| tid == m.tid);
    let nobody = || SwitchError::NotStill {
        pid: members.first().map_or_else(Pid::own, |m| m.pid),
    };
    let index = match jobs.iter().position(|job| is_member(job) && fits(job)) {
        Some(index) => index,
        None => {
            let member = members.iter().find(still).ok_or_else(nobody)?;
            let process: ProcessId = *stopped
                .processes()
                .iter()
                .find(|p| p.pid == member.pid)
                .ok_or_else(nobody)?;
            let table = census
                .tables()
                .iter()
                .find(|t| t.members.contains(member))
                .ok_or_else(nobody)?;
            jobs.push(Job::new(process, member.tid, census, table));
            jobs.len() - 1
        }
    };
    jobs.get_mut(index).ok_or_else(nobody)
}
