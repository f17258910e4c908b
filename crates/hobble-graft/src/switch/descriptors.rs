//! Descriptors of one table.
//!
//! Owns the order of receiving, placing and closing, where descriptors are not received in place (see `in_place`). Invariants: a descriptor changes
//! from one file to the other in one call; between two messages the target holds no descriptor of ours but the socket, so a table needs only as
//! many free numbers as one message has descriptors, and two more.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use super::SwitchError;
use super::bystanders::{self, Bystanders};
use super::in_place::{self, Aim, Numbers};
use super::steps::Way;
use crate::census::DescriptionId;
use crate::ids::Fd;
use crate::proc::locks::FileLock;
use crate::remote::{Borrowed, Call, RemoteError};
use crate::stop::Deadline;

/// One description and where it belongs in a table.
#[derive(Clone, Debug)]
pub(super) struct Item<'a> {
    pub(super) description: DescriptionId,
    /// The replacement.
    pub(super) there: BorrowedFd<'a>,
    /// What was there before.
    pub(super) back: BorrowedFd<'a>,
    /// The descriptors and whether `execve` closes them.
    pub(super) places: Vec<(Fd, bool)>,
    /// POSIX locks of the table, found on this description.
    pub(super) locks: Vec<FileLock>,
    /// Whether it is open for reading, as a read lock demands.
    pub(super) is_readable: bool,
    /// Whether some of the places may hold the replacement.
    pub(super) is_touched: bool,
}

impl<'a> Item<'a> {
    pub(super) fn source(&self, way: Way) -> BorrowedFd<'a> {
        match way {
            Way::There => self.there,
            Way::Back => self.back,
        }
    }
}

/// Puts replacements in place, or on the way back, what was there before where it may be missing. `message` bounds how many
/// descriptions are under way at once. Received in place if `numbers` tells where that is, and what is replaced is closed fast.
///
/// What remains if we die in here: each descriptor refers to one file or the other; nothing else.
pub(super) fn place(
    borrowed: &mut Borrowed<'_>,
    items: &mut [Item<'_>],
    way: Way,
    message: usize,
    numbers: Option<Numbers<'_>>,
    deadline: Deadline,
) -> Result<usize, SwitchError> {
    let mut wanted: Vec<&mut Item<'_>> = items
        .iter_mut()
        // On the way there, what is touched was placed before, see `spare`.
        .filter(|item| item.is_touched == (way == Way::Back))
        .collect();
    let (mut placed, mut done) = (0, 0);
    if let Some(numbers) = numbers {
        let (count, free) = in_place::choose(&mut wanted, numbers, Aim::Speed, borrowed);
        if let Some(chosen) = wanted.get_mut(..count).filter(|chosen| !chosen.is_empty())
            && let Some(received) =
                in_place::exchange(borrowed, chosen, &free, numbers, Aim::Speed, deadline)?
        {
            (placed, done) = (received, count);
        }
    }
    let rest = wanted.get_mut(done..).unwrap_or_default();
    Ok(placed + place_by_copy(borrowed, rest, way, message, deadline)?)
}

/// Before replacements are put in place: sees to it that the table's other POSIX locks on their files outlive that. What can be received at its very number is
/// (and touched then): it leaves no copy to be closed, which helps where what the number refers to is another file. For the rest the locks are protected.
///
/// What remains if we die in here: each descriptor refers to one file or the other; see [`Bystanders::protect`].
pub(super) fn spare(
    borrowed: &mut Borrowed<'_>,
    items: &mut [Item<'_>],
    bystanders: &mut Bystanders<'_>,
    numbers: Numbers<'_>,
    deadline: Deadline,
) -> Result<usize, SwitchError> {
    if bystanders.is_empty() {
        return Ok(0);
    }
    let concern = |fd| bystanders::file_of(fd).is_some_and(|file| bystanders.concern(file));
    let (mut copies, others): (Vec<_>, Vec<_>) = items
        .iter_mut()
        .filter(|item| concern(item.there) || concern(item.back))
        .partition(|item| !concern(item.back));
    let mut placed = 0;
    if others.is_empty() && bystanders.are_untouched() {
        let (count, free) = in_place::choose(&mut copies, numbers, Aim::Locks, borrowed);
        if let Some(chosen) = copies.get_mut(..count).filter(|chosen| !chosen.is_empty())
            && let Some(received) =
                in_place::exchange(borrowed, chosen, &free, numbers, Aim::Locks, deadline)?
        {
            placed = received;
        }
    }
    if copies.iter().chain(&others).any(|item| !item.is_touched) {
        bystanders.protect(borrowed, deadline)?;
    }
    Ok(placed)
}

/// Receives descriptors anywhere, and puts copies of them in place.
fn place_by_copy(
    borrowed: &mut Borrowed<'_>,
    wanted: &mut [&mut Item<'_>],
    way: Way,
    message: usize,
    deadline: Deadline,
) -> Result<usize, SwitchError> {
    let pid = borrowed.pid();
    let mut placed = 0;
    for group in wanted.chunks_mut(message.max(1)) {
        if deadline.passed() {
            return Err(SwitchError::Late {
                step: "exchange descriptors",
            });
        }
        let sources: Vec<BorrowedFd<'_>> = group.iter().map(|item| item.source(way)).collect();
        let mut calls = vec![borrowed.receive_call(group.len())?];
        for (index, item) in group.iter_mut().enumerate() {
            item.is_touched = true;
            let cell = borrowed.cell(index);
            calls.extend(item.places.iter().map(|(fd, close_on_exec)| {
                let flags = if *close_on_exec { libc::O_CLOEXEC } else { 0 };
                Call::new(
                    libc::SYS_dup3,
                    &[
                        0,
                        u64::from(fd.as_raw().cast_unsigned()),
                        u64::from(flags.cast_unsigned()),
                    ],
                )
                .first_is(cell)
                .or_stop()
            }));
        }
        calls.extend(borrowed.close_calls(group.len()));
        borrowed.run_sending(&sources, &mut calls, deadline)?;
        let mut results = calls.iter();
        match results.next().and_then(Call::result) {
            Some(Ok(_)) => {}
            Some(Err(errno)) => {
                return Err(RemoteError::Call {
                    pid,
                    call: "recvmsg",
                    errno,
                }
                .into());
            }
            None => {
                return Err(RemoteError::Lost {
                    tid: borrowed.tid(),
                }
                .into());
            }
        }
        let places = group.iter().flat_map(|item| item.places.iter());
        let mut failure = None;
        for ((fd, _), call) in places.zip(results) {
            match call.result() {
                Some(Ok(_)) => placed += 1,
                Some(Err(errno)) => failure = failure.or(Some((*fd, errno))),
                None => {}
            }
        }
        if let Some((fd, errno)) = failure {
            let received = borrowed.open_cells()?;
            let mut close: Vec<Call> = borrowed.close_calls(group.len()).collect();
            borrowed.run(&mut close, deadline.or_at_least(super::UNDO_STEP))?;
            return Err(if errno == Errno::BADF && received < group.len() {
                RemoteError::Truncated {
                    pid,
                    sent: group.len(),
                    got: received,
                }
                .into()
            } else {
                SwitchError::Place { pid, fd, errno }
            });
        }
        for item in group.iter_mut().filter(|_| way == Way::Back) {
            item.is_touched = false;
        }
    }
    Ok(placed)
}
