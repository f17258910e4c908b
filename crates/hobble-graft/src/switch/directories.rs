//! Working and root directories.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::SwitchError;
use super::steps::Way;
use crate::remote::{Borrowed, Call, RemoteError};
use crate::stop::Deadline;

/// One directory of one `fs_struct`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item<'a> {
    pub(super) there: BorrowedFd<'a>,
    pub(super) back: BorrowedFd<'a>,
    pub(super) is_root: bool,
    pub(super) is_touched: bool,
}

/// Changes the directory. Inner error: the target has no right to (its own rights count for `fchdir` and `chroot`).
///
/// What remains if we die in here: the directory is one or the other; after a `chroot` the working directory may be the root.
pub(super) fn change(
    borrowed: &mut Borrowed<'_>,
    item: &mut Item<'_>,
    way: Way,
    deadline: Deadline,
) -> Result<Result<(), Errno>, SwitchError> {
    let source = match way {
        Way::There => item.there,
        Way::Back => item.back,
    };
    if !item.is_root {
        item.is_touched = true;
        return enter(borrowed, source, &[], deadline);
    }
    // chroot takes a path, so the way leads through the working directory, which is put back afterwards.
    let path = PathBuf::from(format!(
        "/proc/{}/task/{}/cwd",
        borrowed.pid(),
        borrowed.tid()
    ));
    let before = rustix::fs::open(
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|errno| SwitchError::Directory {
        pid: borrowed.pid(),
        errno,
    })?;
    let dot = borrowed.argument_memory();
    borrowed.memory().write(dot, b".\0")?;
    item.is_touched = true;
    let changed = enter(
        borrowed,
        source,
        &[Call::new(libc::SYS_chroot, &[dot]).or_stop()],
        deadline,
    )?;
    let returned = enter(
        borrowed,
        before.as_fd(),
        &[],
        deadline.or_at_least(super::UNDO_STEP),
    )?;
    returned.map_err(|errno| SwitchError::Directory {
        pid: borrowed.pid(),
        errno,
    })?;
    Ok(changed)
}

/// `fchdir`, then further calls.
fn enter(
    borrowed: &mut Borrowed<'_>,
    directory: BorrowedFd<'_>,
    then: &[Call],
    deadline: Deadline,
) -> Result<Result<(), Errno>, SwitchError> {
    let mut calls = vec![
        borrowed.receive_call(1)?,
        Call::new(libc::SYS_fchdir, &[])
            .first_is(borrowed.cell(0))
            .or_stop(),
    ];
    calls.extend_from_slice(then);
    borrowed.run_sending(&[directory], &mut calls, deadline)?;
    let mut close: Vec<Call> = borrowed.close_calls(1).collect();
    borrowed.run(&mut close, deadline.or_at_least(super::UNDO_STEP))?;
    let mut results = calls.iter().map(Call::result);
    match results.next() {
        Some(Some(Ok(_))) => {}
        _ => {
            return Err(RemoteError::Truncated {
                pid: borrowed.pid(),
                sent: 1,
                got: 0,
            }
            .into());
        }
    }
    for result in results {
        match result {
            Some(Ok(_)) => {}
            Some(Err(errno)) => return Ok(Err(errno)),
            None => return Ok(Err(Errno::CANCELED)),
        }
    }
    Ok(Ok(()))
}
