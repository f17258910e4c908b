//! POSIX locks of a table, taken again through exchanged descriptors.
//!
//! Owns the calls that the target itself has to make: the kernel's owner of a POSIX lock is the table, so nobody else can take it.

use rustix::io::Errno;

use super::SwitchError;
use super::descriptors::Item;
use super::steps::MovedLock;
use crate::census::TableId;
use crate::ids::Fd;
use crate::proc::locks::{FileLock, LockClass, LockKind};
use crate::remote::{Borrowed, Call};
use crate::stop::Deadline;

/// What the target is asked to hold on the range of each lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    /// A read lock in any case.
    Read,
    /// Write locks where they were write locks; the read locks are held already.
    Full,
}

/// A lock, and through which descriptors of the target it is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grip {
    pub(super) lock: FileLock,
    /// For a lock as it is.
    pub(super) fd: Fd,
    /// For a read lock on the range, where some descriptor allows it: a lock for writing cannot be weakened through one that may only write.
    pub(super) reader: Option<Fd>,
}

impl From<&MovedLock> for Grip {
    fn from(moved: &MovedLock) -> Self {
        Self {
            lock: moved.lock,
            fd: moved.fd,
            reader: moved.is_readable.then_some(moved.fd),
        }
    }
}

/// `struct flock` is 32 bytes.
const FLOCK: usize = 32;
const BATCH: usize = 256;

/// The locks of a table, with a descriptor for each.
pub(super) fn of_items(table: TableId, pid: crate::ids::Pid, items: &[Item<'_>]) -> Vec<MovedLock> {
    items
        .iter()
        .filter_map(|item| Some((item, item.places.first()?.0)))
        .flat_map(|(item, fd)| {
            let description = item.description;
            item.locks
                .iter()
                .filter(|lock| lock.class == LockClass::Posix)
                .map(move |lock| MovedLock {
                    table,
                    pid,
                    description,
                    fd,
                    lock: *lock,
                    is_readable: item.is_readable,
                })
        })
        .collect()
}

fn structure(lock: &FileLock, kind: LockKind) -> [u8; FLOCK] {
    let kind = match kind {
        LockKind::Read => libc::F_RDLCK,
        LockKind::Write => libc::F_WRLCK,
        LockKind::Unlock => libc::F_UNLCK,
    };
    let length = lock
        .end
        .map_or(0, |end| end.saturating_sub(lock.start).saturating_add(1));
    let mut bytes = [0; FLOCK];
    // l_type, l_whence (SEEK_SET), four bytes of padding, l_start, l_len, l_pid.
    let words = [u64::from(kind.cast_unsigned()), lock.start, length, 0];
    for (slot, word) in bytes.chunks_exact_mut(8).zip(words) {
        slot.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Makes the target hold the locks; never waits for them (`F_SETLK`).
pub(super) fn hold(
    borrowed: &mut Borrowed<'_>,
    locks: impl IntoIterator<Item = Grip>,
    hold: Hold,
    deadline: Deadline,
) -> Result<(), SwitchError> {
    let wanted: Vec<(Fd, FileLock)> = locks
        .into_iter()
        .filter_map(|grip| match hold {
            Hold::Read => Some((grip.reader?, grip.lock)),
            Hold::Full => (grip.lock.kind == LockKind::Write).then_some((grip.fd, grip.lock)),
        })
        .collect();
    let kind = match hold {
        Hold::Read => LockKind::Read,
        Hold::Full => LockKind::Write,
    };
    let at = borrowed.argument_memory();
    for group in wanted.chunks(BATCH) {
        let bytes: Vec<u8> = group
            .iter()
            .flat_map(|(_, lock)| structure(lock, kind))
            .collect();
        borrowed.memory().write(at, &bytes)?;
        let mut calls: Vec<Call> = (at..)
            .step_by(FLOCK)
            .zip(group)
            .map(|(address, (fd, _))| {
                let fd = u64::from(fd.as_raw().cast_unsigned());
                Call::new(
                    libc::SYS_fcntl,
                    &[fd, libc::F_SETLK.cast_unsigned().into(), address],
                )
                .or_stop()
            })
            .collect();
        borrowed.run(&mut calls, deadline)?;
        let pid = borrowed.pid();
        for (call, (fd, lock)) in calls.iter().zip(group) {
            let error = |errno| SwitchError::Lock {
                pid,
                fd: *fd,
                start: lock.start,
                errno,
            };
            match call.result() {
                Some(Ok(_)) => {}
                Some(Err(errno)) => return Err(error(errno)),
                None => return Err(error(Errno::CANCELED)),
            }
        }
    }
    Ok(())
}
