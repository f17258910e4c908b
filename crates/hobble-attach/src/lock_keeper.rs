//! Keeps POSIX locks from outsiders while a process's descriptors are exchanged.
//!
//! Invariant: between the moment a process's own lock on a range is gone and the moment it is back, the server holds an OFD lock on the
//! range. There is no atomic handover (kernel-hazards B): a *reader* can get in between the downgrade of a write lock and the end of the
//! handover, a writer cannot. When one did get in, the upgrade fails and the whole exchange is rolled back.

use std::collections::BTreeMap;
use std::io;

use hobble_graft::census::{Access, Census, DescriptionId, DescriptionLock, TableId};
use hobble_graft::proc::locks::LockKind;
use hobble_graft::switch::{LockHandover, MovedLock, Way};
use hobble_mirror::adopt::{AdoptedId, HandleId, HandleInfo};
use hobble_mirror::locks::{Class, Handover, LockHolder, OwnerId};

use crate::hook::{Hook, lock_range};
use crate::journal::PosixLock;

/// The way in: from the target's own locks to the server's.
pub(crate) struct Inwards<'a> {
    hook: &'a Hook,
    adopted: &'a BTreeMap<DescriptionId, AdoptedId>,
    /// Handles of the stand-ins of every file, by the file's device and inode: a lock may be set through any of them.
    handles: &'a BTreeMap<(u64, u64), Vec<HandleId>>,
    census: &'a Census,
    /// Who holds POSIX locks through descriptors that were moved in an earlier round.
    present: Vec<LockHolder>,
    open: BTreeMap<(TableId, u64, u64), Handover>,
}

impl<'a> Inwards<'a> {
    pub(crate) fn new(
        hook: &'a Hook,
        census: &'a Census,
        adopted: &'a BTreeMap<DescriptionId, AdoptedId>,
        handles: &'a BTreeMap<(u64, u64), Vec<HandleId>>,
    ) -> Self {
        let mut present = hook.mirror().with_locks(|locks| locks.held());
        present.retain(|holder| !holder.ofd && holder.class == Class::Moved);
        Self {
            hook,
            present,
            adopted,
            handles,
            census,
            open: BTreeMap::new(),
        }
    }

    /// The locks that are about to be handed over, for the journal.
    pub(crate) fn posix(census: &Census) -> Vec<PosixLock> {
        let mut locks = Vec::new();
        for description in census.descriptions() {
            let facts = &description.facts;
            let held = for_journal(census, &description.locks, facts.device.raw(), facts.inode);
            for lock in held {
                // The kernel shows a POSIX lock with every descriptor of the file.
                if !locks.contains(&lock) {
                    locks.push(lock);
                }
            }
        }
        locks
    }

    fn file(&self, lock: &MovedLock) -> Option<(u64, u64)> {
        self.census
            .description(lock.description)
            .map(|description| (description.facts.device.raw(), description.facts.inode))
    }

    /// The processes that share a descriptor table, and so its POSIX locks.
    fn processes(&self, table: TableId) -> Vec<u32> {
        let members = self
            .census
            .tables()
            .iter()
            .filter(|known| known.id == table)
            .flat_map(|known| &known.members);
        let mut pids: Vec<u32> = members
            .filter_map(|member| u32::try_from(member.pid.as_raw()).ok())
            .collect();
        pids.dedup();
        pids
    }

    fn missing(what: &str) -> io::Error {
        io::Error::new(io::ErrorKind::NotFound, what.to_owned())
    }

    /// Ends all handovers: what the target has set through the new descriptors stays. Called when the exchange has succeeded.
    pub(crate) fn finish(self) -> usize {
        self.open
            .into_values()
            .map(|handover| handover.finish().len())
            .sum()
    }
}

impl LockHandover for Inwards<'_> {
    fn before(&mut self, locks: &[MovedLock], way: Way) -> io::Result<()> {
        if way == Way::Back {
            // The target gets its own locks back, which read locks of ours do not keep it from.
            for lock in locks
                .iter()
                .filter(|lock| lock.lock.kind == LockKind::Write)
            {
                let Some((dev, ino)) = self.file(lock) else {
                    continue;
                };
                if let Some(handover) = self.open.get(&(lock.table, dev, ino)) {
                    handover.take_read(lock_range(&lock.lock))?;
                }
            }
            return Ok(());
        }
        for lock in locks {
            let (dev, ino) = self
                .file(lock)
                .ok_or_else(|| Self::missing("a lock on a file that is not moved"))?;
            let key = (lock.table, dev, ino);
            if !self.open.contains_key(&key) {
                let adopted = self
                    .adopted
                    .get(&lock.description)
                    .ok_or_else(|| Self::missing("a lock on a description without a stand-in"))?;
                let pids = self.processes(lock.table);
                let mut handover = self.hook.mirror().begin_handover(*adopted)?;
                // In a later round of an attachment the process may have locks here already.
                let present = self
                    .present
                    .iter()
                    .find(|holder| handover.is_of(holder.owner) && pids.contains(&holder.pid));
                if let Some(holder) = present {
                    handover.join(holder.owner)?;
                }
                handover.limit_to(&pids);
                handover.accept(
                    self.handles
                        .get(&(dev, ino))
                        .map(Vec::as_slice)
                        .unwrap_or_default(),
                );
                self.open.insert(key, handover);
            }
            let handover = self
                .open
                .get(&key)
                .ok_or_else(|| Self::missing("a handover that was just begun"))?;
            if lock.is_readable {
                handover.take_read(lock_range(&lock.lock))?;
            }
        }
        Ok(())
    }

    fn after(&mut self, locks: &[MovedLock], way: Way) -> io::Result<()> {
        for lock in locks {
            let Some((dev, ino)) = self.file(lock) else {
                continue;
            };
            let Some(handover) = self.open.get(&(lock.table, dev, ino)) else {
                continue;
            };
            match way {
                Way::There if lock.lock.kind == LockKind::Write => {
                    handover.upgrade(lock_range(&lock.lock))?
                }
                Way::There => {}
                Way::Back => handover.give_up(lock_range(&lock.lock))?,
            }
        }
        Ok(())
    }
}

/// What a process may lock through a description: whether as a writer. The kernel wants a descriptor that may read for a read lock, and one that may write for the other
/// (fs/locks.c, `check_fmode_for_setlk`).
pub(crate) fn lockable(access: Access) -> &'static [bool] {
    match access {
        Access::Read => &[false],
        Access::Write => &[true],
        Access::ReadWrite => &[false, true],
        Access::Path | Access::Neither => &[],
    }
}

/// POSIX locks on one file, as the journal names them.
pub(crate) fn for_journal(
    census: &Census,
    locks: &[DescriptionLock],
    dev: u64,
    ino: u64,
) -> Vec<PosixLock> {
    locks
        .iter()
        .filter_map(|held| {
            let table = held.table?;
            let tables = census.tables();
            let member = tables
                .iter()
                .find(|known| known.id == table)?
                .members
                .first()?;
            let process = census
                .processes()
                .iter()
                .find(|process| process.id.pid == member.pid)?;
            Some(PosixLock {
                who: crate::attaching::who(process.id),
                dev,
                ino,
                write: held.lock.kind == LockKind::Write,
                start_byte: held.lock.start,
                end_byte: held.lock.end.unwrap_or(u64::MAX),
            })
        })
        .collect()
}

/// The way out: from the server's locks to the target's own.
pub(crate) struct Outwards<'a> {
    hook: &'a Hook,
    /// Which owner's locks a table takes over on a description's file.
    owners: &'a BTreeMap<(TableId, DescriptionId), OwnerId>,
}

impl<'a> Outwards<'a> {
    pub(crate) fn new(
        hook: &'a Hook,
        owners: &'a BTreeMap<(TableId, DescriptionId), OwnerId>,
    ) -> Self {
        Self { hook, owners }
    }

    fn each(&self, locks: &[MovedLock]) -> Vec<OwnerId> {
        let mut owners: Vec<OwnerId> = Vec::new();
        for lock in locks {
            if let Some(owner) = self.owners.get(&(lock.table, lock.description))
                && !owners.contains(owner)
            {
                owners.push(*owner);
            }
        }
        owners
    }
}

impl LockHandover for Outwards<'_> {
    fn before(&mut self, locks: &[MovedLock], _way: Way) -> io::Result<()> {
        // Both ways: read locks of ours stand in the way of nobody's read locks.
        let owners = self.each(locks);
        self.hook
            .mirror()
            .with_locks(|held| owners.iter().try_for_each(|owner| held.downgrade(*owner)))
    }

    fn after(&mut self, locks: &[MovedLock], way: Way) -> io::Result<()> {
        let owners = self.each(locks);
        self.hook.mirror().with_locks(|held| match way {
            Way::There => {
                for owner in owners {
                    held.release(owner);
                }
                Ok(())
            }
            Way::Back => owners.iter().try_for_each(|owner| held.restore(*owner)),
        })
    }
}

/// Whether recovery leaves a file on the hook until it is closed: it was opened while attached, and the file has seen POSIX locks. The program
/// may key its own lock table by `st_dev`, so a native descriptor would drop locks of connections that the program takes for another file's
/// (kernel-hazards A1).
pub(crate) fn must_stay(info: &HandleInfo, saw_posix_locks: bool) -> bool {
    saw_posix_locks && info.adopted.is_none() && info.handle.is_some()
}
