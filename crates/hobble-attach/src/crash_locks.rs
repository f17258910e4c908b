//! The POSIX locks that go back to the processes of a dead server.
//!
//! Invariants: a process gets the locks that it held when its server died, and nobody else gets a write lock on their ranges in between. While it ran on the hook, the server
//! held them for it on descriptions of its own, the *guards*, which the holder still has: there the kernel shows which ranges, and the ledger tells whose. Only
//! where an exchange may have been cut off, the journal knows better: then the locks of that moment are weakened, or on their way.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd;

use hobble_api::status::NotCovered;
use hobble_graft::census::{Census, Description, DescriptionId, DescriptionLock, TableId};
use hobble_graft::ids::Pid;
use hobble_graft::proc::locks::{FileLock, LockClass, LockKind};
use hobble_graft::switch::{LockHandover, MovedLock, Way};

use crate::journal::PosixLock;
use crate::lock_keeper::lockable;
use crate::originals::{Guard, Originals};
use crate::story::Story;
use crate::sys;

/// Device and inode.
pub(crate) type FileId = (u64, u64);

/// A lock that a process is to have.
struct Due {
    pid: i32,
    /// When the process started, where that is known.
    start: Option<u64>,
    file: FileId,
    lock: FileLock,
}

/// The locks that are due, and which of them have found a descriptor to be taken through.
pub(crate) struct CrashLocks {
    due: Vec<Due>,
    /// Those of which the process has been seen.
    wanted: RefCell<BTreeSet<usize>>,
    placed: RefCell<BTreeSet<usize>>,
    files: RefCell<BTreeMap<DescriptionId, FileId>>,
}

impl CrashLocks {
    /// Decides whom to believe. Where the holder is dead, and the guards with it, the journal is all there is.
    pub(crate) fn new(story: &Story, originals: &Originals) -> Self {
        let guards = originals.guards();
        let mut due = Vec::new();
        if story.exchanging || guards.is_none() {
            due.extend(story.posix.iter().map(in_journal));
        }
        let told: BTreeSet<(i32, FileId)> = due.iter().map(|due| (due.pid, due.file)).collect();
        for guard in guards.unwrap_or_default() {
            let Some(pid) = guard.pid else { continue };
            if !told.contains(&(pid, guard.file)) {
                due.extend(guard.locks.iter().map(|lock| Due {
                    pid,
                    start: None,
                    file: guard.file,
                    lock: posix(lock.kind, lock.start, lock.end),
                }));
            }
        }
        due.retain(|due| !originals.is_relocked(due.pid, due.file));
        Self {
            due,
            wanted: RefCell::default(),
            placed: RefCell::default(),
            files: RefCell::default(),
        }
    }

    /// The locks on the file of a description that belong to processes that have it, and that can be taken through it. Each is named once.
    pub(crate) fn of(
        &self,
        description: &Description,
        census: &Census,
        original: impl AsFd,
    ) -> Vec<DescriptionLock> {
        let Ok(stat) = rustix::fs::fstat(original) else {
            return Vec::new();
        };
        let file = (stat.st_dev, stat.st_ino);
        self.files.borrow_mut().insert(description.id, file);
        let kinds = lockable(description.flags.access());
        let mut locks = Vec::new();
        for (index, due) in self.due.iter().enumerate() {
            if due.file != file || self.placed.borrow().contains(&index) {
                continue;
            }
            let is_it = |pid: Pid| {
                pid.as_raw() == due.pid
                    && due
                        .start
                        .is_none_or(|start| started(census, pid) == Some(start))
            };
            let Some(table) = table_of(description, census, is_it) else {
                continue;
            };
            self.wanted.borrow_mut().insert(index);
            if kinds.contains(&(due.lock.kind == LockKind::Write)) {
                self.placed.borrow_mut().insert(index);
                locks.push(DescriptionLock {
                    lock: due.lock,
                    table: Some(table),
                });
            }
        }
        locks
    }

    /// Locks of processes on the hook that cannot be taken: no descriptor that is left there may.
    pub(crate) fn unplaced(&self) -> Vec<NotCovered> {
        let placed = self.placed.borrow();
        self.wanted
            .borrow()
            .iter()
            .filter(|index| !placed.contains(index))
            .filter_map(|index| self.due.get(*index))
            .map(|due| NotCovered {
                what: format!(
                    "a POSIX lock at byte {} of inode {}",
                    due.lock.start, due.file.1
                ),
                reason: "the process has no descriptor any more through which it may be taken"
                    .to_owned(),
                pid: u32::try_from(due.pid).ok(),
            })
            .collect()
    }

    /// Whose locks on which file these are.
    pub(crate) fn owners(&self) -> BTreeSet<(i32, FileId)> {
        self.placed
            .borrow()
            .iter()
            .filter_map(|index| self.due.get(*index))
            .map(|due| (due.pid, due.file))
            .collect()
    }

    /// All of them, for the journal of whoever goes on if we die too.
    pub(crate) fn for_journal(&self, census: &Census) -> Vec<PosixLock> {
        self.placed
            .borrow()
            .iter()
            .filter_map(|index| self.due.get(*index))
            .filter_map(|due| {
                let process = census
                    .processes()
                    .iter()
                    .find(|process| process.id.pid.as_raw() == due.pid)?;
                Some(PosixLock {
                    who: crate::attaching::who(process.id),
                    dev: due.file.0,
                    ino: due.file.1,
                    write: due.lock.kind == LockKind::Write,
                    start_byte: due.lock.start,
                    end_byte: due.lock.end.unwrap_or(u64::MAX),
                })
            })
            .collect()
    }
}

/// Keeps writers out with the dead server's guards until the processes have their own locks again; the way out of a living server does the same
/// ([`crate::lock_keeper::Outwards`]).
pub(crate) struct Guards<'a> {
    pub(crate) originals: &'a Originals,
    pub(crate) locks: &'a CrashLocks,
    pub(crate) census: &'a Census,
}

impl Guards<'_> {
    /// The guards of what is moved: of a member of the table, or of nobody yet.
    fn concerned(&self, locks: &[MovedLock]) -> Vec<&Guard> {
        let files = self.locks.files.borrow();
        let is_for = |guard: &Guard, lock: &MovedLock| {
            let members = self
                .census
                .tables()
                .iter()
                .filter(|table| table.id == lock.table)
                .flat_map(|table| &table.members);
            files.get(&lock.description) == Some(&guard.file)
                && guard
                    .pid
                    .is_none_or(|pid| members.into_iter().any(|member| member.pid.as_raw() == pid))
        };
        self.originals
            .guards()
            .unwrap_or_default()
            .iter()
            .filter(|guard| locks.iter().any(|lock| is_for(guard, lock)))
            .collect()
    }

    fn set(&self, guard: &Guard, kind: impl Fn(LockKind) -> LockKind) -> io::Result<()> {
        let file = self.originals.of_guard(guard)?;
        guard.locks.iter().try_for_each(|lock| {
            sys::lock_description(
                file.as_fd(),
                kind(lock.kind) == LockKind::Write,
                lock.start,
                lock.end,
            )
        })
    }
}

impl LockHandover for Guards<'_> {
    fn before(&mut self, locks: &[MovedLock], _way: Way) -> io::Result<()> {
        // Both ways: read locks stand in the way of nobody's read locks.
        self.concerned(locks)
            .into_iter()
            .try_for_each(|guard| self.set(guard, |_| LockKind::Read))
    }

    fn after(&mut self, locks: &[MovedLock], way: Way) -> io::Result<()> {
        for guard in self.concerned(locks) {
            match way {
                Way::There => {
                    sys::unlock_description(self.originals.of_guard(guard)?.as_fd())?;
                }
                Way::Back => self.set(guard, |kind| kind)?,
            }
        }
        Ok(())
    }
}

fn in_journal(lock: &PosixLock) -> Due {
    let kind = if lock.write {
        LockKind::Write
    } else {
        LockKind::Read
    };
    Due {
        pid: lock.who.pid,
        start: Some(lock.who.start),
        file: (lock.dev, lock.ino),
        lock: posix(
            kind,
            lock.start_byte,
            (lock.end_byte != u64::MAX).then_some(lock.end_byte),
        ),
    }
}

fn posix(kind: LockKind, start: u64, end: Option<u64>) -> FileLock {
    FileLock {
        class: LockClass::Posix,
        kind,
        pid: None,
        inode: None,
        start,
        end,
    }
}

/// The table through which a process has the description.
fn table_of(
    description: &Description,
    census: &Census,
    is_it: impl Fn(Pid) -> bool,
) -> Option<TableId> {
    let has_it = |table: &TableId| {
        census
            .tables()
            .iter()
            .filter(|known| known.id == *table)
            .any(|known| known.members.iter().any(|member| is_it(member.pid)))
    };
    description
        .places
        .iter()
        .map(|place| place.table)
        .find(has_it)
}

fn started(census: &Census, pid: Pid) -> Option<u64> {
    census
        .processes()
        .iter()
        .find(|process| process.id.pid == pid)
        .map(|process| process.id.start_time)
}
