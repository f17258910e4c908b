//! Lock lines: `/proc/locks`, and the `lock:` lines of `fdinfo`, which have the same form.
//!
//! Form: `<id>: [-> ]<class> <mode> <kind> <pid> <major>:<minor>:<inode> <start> <end>` (fs/locks.c, `lock_get_status`). The
//! device is that of the superblock in hexadecimal, which on btrfs and overlayfs is not the `st_dev` of its files.

use std::path::Path;

use super::text::Cursor;
use super::{ParseError, ProcError};
use crate::ids::Device;

/// Which interface made a lock: they exclude each other only within a class, except POSIX and OFD locks, which are one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LockClass {
    /// `fcntl(F_SETLK)`: owned by a descriptor table, dropped by any close of the file in it.
    Posix,
    /// `fcntl(F_OFD_SETLK)`: owned by the open file description.
    Ofd,
    /// `flock`: owned by the open file description, of the whole file.
    Flock,
    /// `fcntl(F_SETLEASE)`.
    Lease,
    /// A delegation, a lease of the kernel's NFS server.
    Delegation,
    /// A class that this version does not know.
    Other,
}

/// What a lock excludes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LockKind {
    /// Shared.
    Read,
    /// Exclusive.
    Write,
    /// Being given up: a lease that is being broken.
    Unlock,
}

/// One lock on one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileLock {
    /// Which interface made it.
    pub class: LockClass,
    /// Shared or exclusive.
    pub kind: LockKind,
    /// The process that took it; `None` for OFD locks (which have none) and for processes outside our pid namespace.
    pub pid: Option<i32>,
    /// Device of the superblock, and inode; `None` when the kernel did not say.
    pub inode: Option<(Device, u64)>,
    /// First byte.
    pub start: u64,
    /// Last byte, which is locked too; `None` for "to the end, however far the file grows".
    pub end: Option<u64>,
}

/// A line of `/proc/locks`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ListedLock {
    /// Number of the line; a waiter carries the number of the lock it waits for.
    pub id: u64,
    /// Whether it is only wanted, by somebody who waits.
    pub is_waiting: bool,
    /// The lock.
    pub lock: FileLock,
}

/// Parses one lock line, without what fdinfo puts before it.
pub(super) fn parse_line(at: &mut Cursor<'_>) -> Result<ListedLock, ParseError> {
    let id = at.decimal("the number of a lock")?;
    at.literal(b":", "a colon")?;
    at.blanks();
    let is_waiting = at.try_literal(b"->");
    at.blanks();
    let class = match at.word("a lock class")? {
        b"POSIX" | b"ACCESS" => LockClass::Posix,
        b"OFDLCK" => LockClass::Ofd,
        b"FLOCK" => LockClass::Flock,
        b"LEASE" => LockClass::Lease,
        b"DELEG" => LockClass::Delegation,
        _ => LockClass::Other,
    };
    at.blanks();
    at.word("a lock mode")?;
    at.blanks();
    let place = at.error("READ, WRITE or UNLCK");
    let kind = match at.word("READ, WRITE or UNLCK")? {
        b"READ" => LockKind::Read,
        b"WRITE" => LockKind::Write,
        b"UNLCK" => LockKind::Unlock,
        _ => return Err(place),
    };
    at.blanks();
    let place = at.error("a process id");
    let pid = i32::try_from(at.signed("a process id")?).map_err(|_| place)?;
    at.blanks();
    let inode = if at.try_literal(b"<none>:") {
        at.decimal("0")?;
        None
    } else {
        let major = hex_u32(at)?;
        at.literal(b":", "a colon")?;
        let minor = hex_u32(at)?;
        at.literal(b":", "a colon")?;
        Some((Device { major, minor }, at.decimal("an inode number")?))
    };
    at.blanks();
    let start = at.decimal("the first byte of a lock")?;
    at.blanks();
    let end = if at.try_literal(b"EOF") {
        None
    } else {
        Some(at.decimal("the last byte of a lock")?)
    };
    at.blanks();
    at.end()?;
    let pid = (pid > 0).then_some(pid);
    Ok(ListedLock {
        id,
        is_waiting,
        lock: FileLock {
            class,
            kind,
            pid,
            inode,
            start,
            end,
        },
    })
}

fn hex_u32(at: &mut Cursor<'_>) -> Result<u32, ParseError> {
    let place = at.error("a device number");
    u32::try_from(at.hex("a device number")?).map_err(|_| place)
}

/// Parses the text of `/proc/locks`.
///
/// # Errors
/// The first byte that is not as `lock_get_status` writes it.
pub fn parse(text: &[u8]) -> Result<Vec<ListedLock>, ParseError> {
    let mut at = Cursor::new(text);
    let mut locks = Vec::new();
    while !at.is_empty() {
        locks.push(parse_line(&mut at.line_cursor())?);
    }
    Ok(locks)
}

/// Every lock on the host whose owner is in a pid namespace that we can see, holders first, each followed by its waiters.
/// Locks of processes outside our pid namespace are left out by the kernel (`locks_show`).
///
/// # Errors
/// When the file cannot be read or understood.
pub fn host_wide() -> Result<Vec<ListedLock>, ProcError> {
    let path = Path::new("/proc/locks");
    parse(&super::read(path)?).map_err(|e| ProcError::parse(path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_classes() {
        let text = b"1: LEASE  ACTIVE    READ 13423 fe:00:10010885 0 EOF\n\
            2: OFDLCK ADVISORY  READ -1 fe:00:10010884 100 EOF\n\
            3: POSIX  ADVISORY  WRITE 13423 fe:00:10010884 5 14\n\
            3: -> POSIX  ADVISORY  READ 99 fe:00:10010884 0 9223372036854775806\n\
            4: FLOCK  ADVISORY  WRITE 13423 fe:00:10010884 0 EOF\n\
            5: POSIX  *NOINODE* READ 3 <none>:0 0 EOF\n";
        let locks = parse(text).unwrap();
        let classes: Vec<_> = locks.iter().map(|l| l.lock.class).collect();
        use LockClass::{Flock, Lease, Ofd, Posix};
        assert_eq!(classes, [Lease, Ofd, Posix, Posix, Flock, Posix]);
        assert_eq!(locks[1].lock.pid, None);
        assert_eq!(
            locks[2].lock.inode,
            Some((
                Device {
                    major: 0xfe,
                    minor: 0
                },
                10_010_884
            ))
        );
        assert_eq!((locks[2].lock.start, locks[2].lock.end), (5, Some(14)));
        assert_eq!((locks[3].is_waiting, locks[3].id), (true, 3));
        assert_eq!(locks[5].lock.inode, None);
    }

    #[test]
    fn errors_have_places() {
        assert_eq!(parse(b"x"), Err(ParseError::new(0, "the number of a lock")));
        assert_eq!(
            parse(b"1: POSIX ADVISORY MAYBE"),
            Err(ParseError::new(18, "READ, WRITE or UNLCK"))
        );
        let unfinished = parse(b"1: FLOCK  ADVISORY  WRITE 1 fe:00:1 0 EOF x").unwrap_err();
        assert_eq!(unfinished, ParseError::new(42, "the end of the line"));
    }

    #[test]
    fn a_lock_of_ours_is_listed() {
        use std::os::unix::fs::MetadataExt as _;
        let file = tempfile::tempfile().unwrap();
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
        let inode = file.metadata().unwrap().ino();
        let own = i32::try_from(std::process::id()).unwrap();
        let found = host_wide().unwrap().into_iter().any(|l| {
            l.lock.class == LockClass::Flock
                && l.lock.pid == Some(own)
                && l.lock.inode.is_some_and(|i| i.1 == inode)
        });
        assert!(found);
    }
}
