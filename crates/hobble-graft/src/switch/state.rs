//! What an open file description is besides the file: position, status flags, and who is told of I/O.

use std::os::fd::{AsRawFd as _, BorrowedFd};

use rustix::fs::{OFlags, SeekFrom};
use rustix::io::Errno;

use crate::census::{Description, Owner};

/// The flags that `F_SETFL` changes on Linux (fs/fcntl.c, `SETFL_MASK`).
fn settable() -> OFlags {
    OFlags::APPEND
        | OFlags::NONBLOCK
        | OFlags::DIRECT
        | OFlags::NOATIME
        | OFlags::from_bits_retain(libc::O_ASYNC.cast_unsigned())
}

/// Gives `to` the position, if there is one to give, and the status flags, owner and signal that `facts` say the description has.
///
/// A description with `O_PATH` has none of these. The position is set even when it is 0: `to` need not be a new description, on the way back it is the original
/// with the position that it was left at. On a directory a position other than 0 is a cookie that only the same filesystem understands.
///
/// # Errors
/// The first setting that the kernel refuses; those before it are made.
pub fn copy_description_state(
    facts: &Description,
    position: Option<i64>,
    to: BorrowedFd<'_>,
) -> Result<(), Errno> {
    if facts.facts.is_path_only {
        return Ok(());
    }
    if let Some(position) = position {
        rustix::fs::seek(to, SeekFrom::Start(position.cast_unsigned()))?;
    }
    let wanted = OFlags::from_bits_retain(facts.flags.0) & settable();
    let has = rustix::fs::fcntl_getfl(to)?;
    if has & settable() != wanted {
        rustix::fs::fcntl_setfl(to, (has & !settable()) | wanted)?;
    }
    if let Some(owner) = facts.owner {
        let (kind, id) = match owner {
            Owner::Thread(id) => (super::sys::OwnerKind::Thread, id),
            Owner::Process(id) => (super::sys::OwnerKind::Process, id),
            Owner::Group(id) => (super::sys::OwnerKind::Group, id),
        };
        super::sys::set_owner(to.as_raw_fd(), kind, id)?;
    }
    if facts.signal != 0 {
        super::sys::set_signal(to.as_raw_fd(), facts.signal)?;
    }
    Ok(())
}
