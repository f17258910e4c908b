//! POSIX locks that nobody hands over and that an exchange would drop all the same.
//!
//! Any close of a descriptor of a file drops all POSIX locks that the closing table has on the file (`locks_remove_posix`, which `filp_close` calls;
//! fcntl_locking(2)), through whatever descriptor they were taken. An exchange closes what a number referred to, the copy by which a replacement came, and what
//! a mapping was made through. So a table loses the locks that it holds through descriptors which are not exchanged: opened after an earlier
//! round of the same recovery, given back by it, or by another path.
//!
//! A mapping is made while the descriptors are those of before, so whatever the table holds on its file is lost with it, through descriptors that are exchanged
//! afterwards, too: not on the hook's side of an exchange, where a server keeps the locks, but on the native one.
//!
//! Owns finding these locks and having the target take them again. Invariants:
//!
//! * From before the first such close until the target holds its locks again, a description of our own holds a read lock on their ranges, so that no
//!   writer gets in. As with a handover, a reader can where the target's lock was one for writing; taking it again fails then, and the switch is rolled back.
//! * Until they are all held again that is remembered, so that an undo takes them again even when the exchange failed in between.
//!
//! What remains if we die between the first such close and the taking again: the locks are gone, and nothing tells of them; the read lock stays with whoever shares our
//! descriptor table.
//!
//! What is not kept: the range of a lock for writing in a table that has the file open for writing only. It cannot be turned into a read lock, so it is free
//! from the close until it is taken again.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::locks::{self, Grip, Hold};
use super::steps::Way;
use super::{SwitchError, descriptors, mappings};
use crate::census::{self, Access, Census, OpenFlags, TableId};
use crate::ids::{Device, Fd, Pid, Tid};
use crate::proc::locks::{FileLock, LockClass};
use crate::proc::{self, ProcError, fdinfo};
use crate::remote::Borrowed;
use crate::stop::Deadline;

/// To ask `/proc` about a descriptor takes about as long as to ask for the inodes of so many.
const DEARER: usize = 16;

/// A file, whichever mount it was opened through.
pub(super) type FileId = (Device, u64);

/// Files of which descriptors are closed, with one of ours for each.
pub(super) type Files<'a> = BTreeMap<FileId, BorrowedFd<'a>>;

/// The file behind a descriptor of ours, without asking its filesystem.
pub(super) fn file_of(fd: BorrowedFd<'_>) -> Option<FileId> {
    census::file_behind(fd).ok()
}

/// How far it has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// They are as the target wants them.
    #[default]
    Full,
    /// They are read locks, or gone.
    Weak,
}

/// The locks of one table that would be lost.
#[derive(Debug, Default)]
pub(super) struct Bystanders<'a> {
    locks: Vec<(FileId, Grip)>,
    files: Files<'a>,
    guards: BTreeMap<FileId, OwnedFd>,
    state: State,
    taken: usize,
}

/// A descriptor of a file that locks may be held through.
struct Seen {
    fd: Fd,
    file: FileId,
    info: fdinfo::FdInfo,
}

impl Seen {
    fn is_readable(&self) -> bool {
        let access = OpenFlags(self.info.flags).access();
        matches!(access, Access::Read | Access::ReadWrite)
    }
}

/// The thread that closes descriptors, and its table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Closer<'a> {
    pub(super) census: &'a Census,
    pub(super) table: TableId,
    pub(super) pid: Pid,
    pub(super) tid: Tid,
}

impl<'a> Closer<'a> {
    /// What is lost when these descriptors are exchanged, or put back after these mappings, and not handed over with them.
    pub(super) fn lost_with_descriptors(
        &self,
        items: &[descriptors::Item<'a>],
        mappings: &[mappings::Item<'a>],
    ) -> Result<Bystanders<'a>, SwitchError> {
        let exchanged = items.iter().flat_map(|item| &item.places);
        let exchanged = exchanged.map(|(fd, _)| *fd).collect();
        self.find(&exchanged, 2 * items.len(), || {
            let of_items = items.iter().flat_map(|item| [item.there, item.back]);
            let mapped = [Way::There, Way::Back].map(|way| mapped(mappings.iter(), way));
            of_items
                .chain(mapped.into_iter().flatten())
                .filter_map(|fd| Some((file_of(fd)?, fd)))
                .collect()
        })
    }

    /// What is lost, whatever descriptor it is held through, when mappings are made: all on the way there, on the way back those that are touched. For a table whose
    /// descriptors are those of before.
    pub(super) fn lost_with_mappings(
        &self,
        mappings: &[mappings::Item<'a>],
        way: Way,
    ) -> Result<Bystanders<'a>, SwitchError> {
        let made = mappings.iter();
        let made = made.filter(|item| way == Way::There || item.is_touched);
        let made = mapped(made, way);
        if made.is_empty() {
            return Ok(Bystanders::default());
        }
        self.find(&BTreeSet::new(), made.len(), || {
            let made = made.into_iter();
            made.filter_map(|fd| Some((file_of(fd)?, fd))).collect()
        })
    }

    /// What `/proc` tells of a descriptor; `None` when it was closed since, or the process has died, which the next call in it tells.
    fn look(&self, fd: Fd) -> Result<Option<fdinfo::FdInfo>, ProcError> {
        let path = PathBuf::from(format!("/proc/{}/task/{}/fdinfo/{fd}", self.pid, self.tid));
        match proc::read(&path) {
            Err(ProcError::Gone { .. }) => Ok(None),
            Err(error) => Err(error),
            Ok(text) => match fdinfo::parse(&text) {
                Ok(info) => Ok(Some(info)),
                Err(error) => Err(ProcError::parse(&path, error)),
            },
        }
    }

    /// What the table holds on `files`, which as many as `closed` descriptors refer to, through other descriptors than `exchanged`.
    fn find(
        &self,
        exchanged: &BTreeSet<Fd>,
        closed: usize,
        files: impl FnOnce() -> Files<'a>,
    ) -> Result<Bystanders<'a>, SwitchError> {
        let others: Vec<(Fd, FileId)> = self
            .census
            .files_in(self.table)
            .filter(|(fd, _)| !exchanged.contains(fd))
            .collect();
        // Nearly always there are thousands of closed descriptors and a few others without a lock, or only few of both.
        let is_free = |(fd, _): &(Fd, FileId)| {
            let is_posix = |lock: &FileLock| lock.class == LockClass::Posix;
            matches!(self.look(*fd), Ok(found) if !found.iter().flat_map(|info| &info.locks).any(is_posix))
        };
        if others.is_empty() || others.len() * DEARER < closed && others.iter().all(is_free) {
            return Ok(Bystanders::default());
        }
        let files = files();
        let mut seen = Vec::new();
        for (fd, file) in others
            .into_iter()
            .filter(|(_, file)| files.contains_key(file))
        {
            let failed = |source| SwitchError::Look {
                pid: self.pid,
                source,
            };
            let info = self.look(fd).map_err(failed)?;
            seen.extend(info.map(|info| Seen { fd, file, info }));
        }
        let mut locks: Vec<(FileId, Grip)> = Vec::new();
        for Seen { fd, file, info } in &seen {
            // The kernel shows a lock with the description that it was taken through, in the table that owns it (fs/locks.c, `__show_fd_locks`).
            for lock in info.locks.iter().filter(|l| l.class == LockClass::Posix) {
                let is_known = |(other, grip): &(FileId, Grip)| other == file && grip.lock == *lock;
                if locks.iter().any(is_known) {
                    continue;
                }
                let readable = |s: &&Seen| s.file == *file && s.is_readable();
                let reader = seen
                    .iter()
                    .find(|s| s.fd == *fd && s.is_readable())
                    .or_else(|| seen.iter().find(readable))
                    .map(|s| s.fd);
                let (fd, lock) = (*fd, *lock);
                locks.push((*file, Grip { lock, fd, reader }));
            }
        }
        Ok(Bystanders {
            locks,
            files,
            ..Bystanders::default()
        })
    }
}

/// What each file is mapped through.
fn mapped<'i, 'a: 'i>(
    mappings: impl Iterator<Item = &'i mappings::Item<'a>>,
    way: Way,
) -> Vec<BorrowedFd<'a>> {
    let files: BTreeMap<_, _> = mappings
        .map(|item| (item.mapping.file, item.source(way)))
        .collect();
    files.into_values().collect()
}

impl<'a> Bystanders<'a> {
    /// Whether there is anything to be lost by closing a descriptor of this file.
    pub(super) fn concern(&self, file: FileId) -> bool {
        self.locks.iter().any(|(other, _)| *other == file)
    }

    /// Whether there are none at all.
    pub(super) fn is_empty(&self) -> bool {
        self.locks.is_empty()
    }

    /// How many were lost and taken again.
    pub(super) fn taken(&self) -> usize {
        self.taken
    }

    /// Whether they are as the target wants them.
    pub(super) fn are_untouched(&self) -> bool {
        self.state == State::Full
    }

    fn grips(&self) -> impl Iterator<Item = Grip> {
        self.locks.iter().map(|(_, grip)| *grip)
    }

    /// Keeps the ranges from writers. To be called before the first close; again is harmless.
    ///
    /// What remains if we die in here: locks for writing may be locks for reading.
    pub(super) fn protect(
        &mut self,
        borrowed: &mut Borrowed<'_>,
        deadline: Deadline,
    ) -> Result<(), SwitchError> {
        if self.locks.is_empty() {
            return Ok(());
        }
        self.state = State::Weak;
        locks::hold(borrowed, self.grips(), Hold::Read, deadline)?;
        let pid = borrowed.pid();
        let failed = |errno: Errno| SwitchError::Handover {
            pid,
            source: errno.into(),
        };
        for (file, grip) in &self.locks {
            if grip.reader.is_none() {
                continue;
            }
            let guard = match self.guards.entry(*file) {
                std::collections::btree_map::Entry::Occupied(open) => open.into_mut(),
                std::collections::btree_map::Entry::Vacant(none) => {
                    let Some(ours) = self.files.get(file) else {
                        continue;
                    };
                    none.insert(reopen(*ours).map_err(failed)?)
                }
            };
            crate::sys::lock::share(std::os::fd::AsFd::as_fd(guard), &grip.lock).map_err(failed)?;
        }
        Ok(())
    }

    /// Has the target hold its locks again, after the last close.
    pub(super) fn take_again(
        &mut self,
        borrowed: &mut Borrowed<'_>,
        deadline: Deadline,
    ) -> Result<(), SwitchError> {
        if self.state == State::Full {
            return Ok(());
        }
        locks::hold(borrowed, self.grips(), Hold::Read, deadline)?;
        // Closing them gives up the read locks, which would stand in the way of the target's locks for writing.
        self.guards.clear();
        locks::hold(borrowed, self.grips(), Hold::Full, deadline)?;
        self.state = State::Full;
        self.taken = self.locks.len();
        Ok(())
    }
}

/// A description of our own, so that no lock of the program's own descriptions is touched.
fn reopen(fd: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    rustix::fs::open(
        format!("/proc/self/fd/{}", fd.as_raw_fd()),
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC,
        Mode::empty(),
    )
}
