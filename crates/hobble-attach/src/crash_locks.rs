//! The POSIX locks that go back to the processes of a dead server.
//!
//! Invariant: a process gets the locks that it held when its server died. While it ran on the hook, the server held them for it on descriptions of its own, which the
//! holder still has: there the kernel shows which ranges, and the ledger tells whose. Only where an exchange may have been cut off, the journal knows
//! better: then the locks of that moment are in nobody's hands, or weakened.

use std::os::fd::AsFd;

use hobble_graft::census::{Census, Description, DescriptionLock, TableId};
use hobble_graft::ids::Pid;
use hobble_graft::proc::locks::{FileLock, LockClass, LockKind};

use crate::journal::PosixLock;
use crate::originals::TakenLocks;
use crate::story::Story;

/// What is known of the locks.
pub(crate) struct CrashLocks<'a> {
    journal: &'a [PosixLock],
    taken: &'a [TakenLocks],
}

impl<'a> CrashLocks<'a> {
    /// Decides whom to believe. `taken` is `None` where the holder is dead, and the locks with it: the journal is all there is then.
    pub(crate) fn new(story: &'a Story, taken: Option<&'a [TakenLocks]>) -> Self {
        let believed = story.exchanging || taken.is_none();
        Self {
            journal: if believed { &story.posix } else { &[] },
            taken: taken.unwrap_or_default(),
        }
    }

    /// The locks on the file of a description that belong to processes that have the description.
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
        let mut locks = Vec::new();
        for lock in self
            .journal
            .iter()
            .filter(|lock| (lock.dev, lock.ino) == file)
        {
            let table = table_of(description, census, |pid| {
                pid.as_raw() == lock.who.pid && started(census, pid) == Some(lock.who.start)
            });
            locks.extend(table.map(|table| DescriptionLock {
                lock: posix(
                    if lock.write {
                        LockKind::Write
                    } else {
                        LockKind::Read
                    },
                    lock.start_byte,
                    (lock.end_byte != u64::MAX).then_some(lock.end_byte),
                ),
                table: Some(table),
            }));
        }
        for taken in self.taken.iter().filter(|taken| taken.file == file) {
            let in_journal = self
                .journal
                .iter()
                .any(|lock| (lock.dev, lock.ino) == file && lock.who.pid == taken.pid);
            if in_journal {
                continue;
            }
            let Some(table) = table_of(description, census, |pid| pid.as_raw() == taken.pid) else {
                continue;
            };
            locks.extend(taken.locks.iter().map(|lock| DescriptionLock {
                lock: posix(lock.kind, lock.start, lock.end),
                table: Some(table),
            }));
        }
        locks
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
