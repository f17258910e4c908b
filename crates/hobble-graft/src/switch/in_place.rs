//! Descriptors that are received at the very numbers of those they replace.
//!
//! `dup3` needs a second descriptor of each replacement, and to close that is a request to the server where the replacement is a file of a FUSE
//! filesystem: tens of microseconds each, for a server that may have died meanwhile. Where it is not, to receive in place still spares two calls for each.
//! See `remote::feed`.
//!
//! Owns the choice of what is received in place, and the numbers. Invariants:
//!
//! * Every free number below those to be received is plugged meanwhile, with descriptors that the thread closes by itself if we die.
//! * A number is without a file only between two calls of one batch, and only while everybody who shares the table stands still, or for the
//!   moment that the thread needs after our death: a letter is short where there are others.
//! * What was not given the number it was meant for is an error, and the numbers without a file get back what they had, before it is reported.
//!
//! Where closing such a second descriptor would drop POSIX locks of the table ([`Aim::Locks`]) it is done whatever it costs.
//!
//! Not received in place: what somebody might take the numbers from (the kernel's own threads of an io_uring open files, too), what a seccomp
//! filter might keep the thread from finishing, and what is replaced if closing *that* takes long (unless it is done for the locks).

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::EventfdFlags;

use super::SwitchError;
use super::descriptors::Item;
use crate::census::{Census, TableId};
use crate::ids::Fd;
use crate::remote::{Borrowed, Call, Letter, MESSAGE_DESCRIPTORS, RemoteError, Taken};
use crate::stop::Deadline;

/// Below this many, what it spares is not worth finding out.
const WORTH_IT: usize = 8;
/// A close that takes longer asks somebody else: a native one takes a fraction of a microsecond, a round trip to another process several.
const LONG: Duration = Duration::from_micros(3);
/// Free numbers that are plugged at most: as many as a message has descriptors.
const PLUGS: usize = MESSAGE_DESCRIPTORS;
/// Free numbers for each descriptor that make plugging them dearer than closing a second descriptor.
const PLUGS_EACH: usize = 32;
/// Descriptors in a letter when other threads share the table: they are taken within a few microseconds.
const SHORT: usize = 32;
/// Descriptors between two looks at the clock.
const BATCH: usize = 1_024;
/// Numbers in a row that are worth a `close_range`.
const RANGE: usize = 3;

/// A table, as the census saw it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Numbers<'c> {
    pub(super) census: &'c Census,
    pub(super) table: TableId,
    /// Whether nobody but the borrowed thread uses it.
    pub(super) is_alone: bool,
}

/// What receiving in place is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Aim {
    /// To spare requests.
    Speed,
    /// To close no copy: that would drop POSIX locks of the table.
    Locks,
}

impl Numbers<'_> {
    /// Descriptors in a letter.
    fn letter(&self, aim: Aim) -> usize {
        match aim {
            _ if self.is_alone => MESSAGE_DESCRIPTORS,
            Aim::Speed => SHORT,
            // Closing what is replaced may take long here.
            Aim::Locks => 1,
        }
    }
}

/// Whether closing one of several descriptors of this file takes long. The shortest of three tries counts.
fn is_slow_to_close(file: BorrowedFd<'_>) -> bool {
    (0..3).all(|_| {
        let copy: Option<OwnedFd> = rustix::io::fcntl_dupfd_cloexec(file, 0).ok();
        let begun = Instant::now();
        drop(copy);
        begun.elapsed() >= LONG
    })
}

fn primary(item: &Item<'_>) -> Option<(Fd, bool)> {
    item.places.first().copied()
}

/// Moves what can be received in place to the front, in the order of numbers; gives how many, and the free numbers below.
pub(super) fn choose(
    items: &mut [&mut Item<'_>],
    numbers: Numbers<'_>,
    aim: Aim,
    borrowed: &Borrowed<'_>,
) -> (usize, Vec<Fd>) {
    let none = (0, Vec::new());
    let (Some(first), Some(own)) = (items.first(), borrowed.socket_number()) else {
        return none;
    };
    let is_worth_it = || items.len() >= WORTH_IT && !is_slow_to_close(first.back);
    if !borrowed.may_receive_in_place()
        || numbers.census.has_ring(numbers.table)
        || aim == Aim::Speed && !is_worth_it()
    {
        return none;
    }
    items.sort_unstable_by_key(|item| primary(item));
    let mut used = numbers.census.numbers_in(numbers.table).peekable();
    let (mut free, mut next) = (Vec::new(), 0);
    for (index, item) in items.iter().enumerate() {
        let Some((number, _)) = primary(item) else {
            return (index, free);
        };
        let below = free.len();
        while next < number.as_raw() {
            while used.next_if(|fd| fd.as_raw() < next).is_some() {}
            if used.peek().is_none_or(|fd| fd.as_raw() > next) && own.as_raw() != next {
                free.extend(Fd::new(next));
            }
            let most = match aim {
                Aim::Speed => PLUGS.min((index + 1) * PLUGS_EACH),
                Aim::Locks => PLUGS,
            };
            if free.len() > most {
                free.truncate(below);
                return (index, free);
            }
            next += 1;
        }
        next += 1;
    }
    (items.len(), free)
}

/// Receives the replacements of `items`, which [`choose`] has chosen; gives how many descriptors were exchanged. `None` when the free numbers are not
/// those that were expected: nothing has been changed then.
///
/// What remains if we die in here: each descriptor refers to one file or the other; nothing else.
pub(super) fn exchange(
    borrowed: &mut Borrowed<'_>,
    items: &mut [&mut Item<'_>],
    free: &[Fd],
    numbers: Numbers<'_>,
    aim: Aim,
    deadline: Deadline,
) -> Result<Option<usize>, SwitchError> {
    let size = numbers.letter(aim);
    let (are_plugged, has_ranges) = plug(borrowed, free, deadline)?;
    let result = if are_plugged {
        receive(borrowed, items, size, has_ranges, deadline).map(Some)
    } else {
        tracing::debug!(
            pid = borrowed.pid().as_raw(),
            "free descriptors are not where they were seen"
        );
        Ok(None)
    };
    if !free.is_empty() {
        let mut unplug: Vec<Call> = borrowed.close_calls(free.len()).collect();
        let unplugged = borrowed.run(&mut unplug, deadline.or_at_least(super::UNDO_STEP));
        // The first error counts.
        let placed = result?;
        unplugged?;
        return Ok(placed);
    }
    result
}

/// Takes the free numbers; says whether they are those that were expected, and whether the kernel closes ranges.
fn plug(
    borrowed: &mut Borrowed<'_>,
    free: &[Fd],
    deadline: Deadline,
) -> Result<(bool, bool), SwitchError> {
    // No process has so many descriptors: nothing is closed.
    let nowhere = u64::from(u32::MAX - 1);
    let try_range = Call::new(libc::SYS_close_range, &[nowhere, nowhere, 0]);
    let ranges = |call: Option<&Call>| matches!(call.and_then(Call::result), Some(Ok(_)));
    let may_close_ranges = borrowed.may_close_ranges();
    if free.is_empty() {
        let mut calls = [try_range];
        borrowed.run(&mut calls, deadline)?;
        return Ok((true, may_close_ranges && ranges(calls.first())));
    }
    let pid = borrowed.pid();
    let file =
        rustix::event::eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| RemoteError::Refused {
            pid,
            what: "make a descriptor for",
            errno,
        })?;
    let plugs = vec![file.as_fd(); free.len()];
    let mut calls = [borrowed.receive_call(plugs.len())?, try_range];
    borrowed.run_sending(&plugs, &mut calls, deadline)?;
    let got = borrowed.cells(free.len())?;
    let are_expected = got.iter().copied().eq(free.iter().map(|fd| fd.as_raw()));
    Ok((are_expected, may_close_ranges && ranges(calls.last())))
}

fn receive(
    borrowed: &mut Borrowed<'_>,
    items: &mut [&mut Item<'_>],
    size: usize,
    has_ranges: bool,
    deadline: Deadline,
) -> Result<usize, SwitchError> {
    let mut placed = 0;
    // A message is received with FD_CLOEXEC or without it. Those of the other kind are in use meanwhile, so the order within a kind is enough.
    for kind in [false, true] {
        let mut of_kind: Vec<&mut &mut Item<'_>> = items
            .iter_mut()
            .filter(|item| primary(item).is_some_and(|(_, on_exec)| on_exec == kind))
            .collect();
        for batch in of_kind.chunks_mut(BATCH) {
            let letters: Vec<Letter<'_>> = batch
                .chunks(size)
                .map(|items| letter(items, kind, has_ranges))
                .collect();
            let (mut rest, mut at) = (letters.as_slice(), 0);
            while !rest.is_empty() {
                if deadline.passed() {
                    return Err(SwitchError::Late {
                        step: "exchange descriptors",
                    });
                }
                let fit = Borrowed::letters_that_fit(rest).max(1);
                let (now, later) = rest.split_at_checked(fit).unwrap_or((rest, &[]));
                let end = at + now.iter().map(|l| l.descriptors.len()).sum::<usize>();
                let part = batch.get_mut(at..end).unwrap_or_default();
                for item in part.iter_mut() {
                    item.is_touched = true;
                }
                placed += take(borrowed, part, now, size, deadline)?;
                (rest, at) = (later, end);
            }
        }
    }
    Ok(placed)
}

/// What exchanges some descriptors of one kind.
fn letter<'a>(items: &[&mut &mut Item<'a>], close_on_exec: bool, has_ranges: bool) -> Letter<'a> {
    let number = |fd: Fd| u64::from(fd.as_raw().cast_unsigned());
    let numbers: Vec<u64> = items
        .iter()
        .filter_map(|item| primary(item).map(|(fd, _)| number(fd)))
        .collect();
    let mut before = Vec::new();
    for run in numbers.chunk_by(|a, b| a + 1 == *b) {
        match (run.first(), run.last()) {
            (Some(first), Some(last)) if has_ranges && run.len() >= RANGE => {
                before.push(Call::new(libc::SYS_close_range, &[*first, *last, 0]));
            }
            _ => before.extend(run.iter().map(|fd| Call::new(libc::SYS_close, &[*fd]))),
        }
    }
    let copy = |from: Fd, to: Fd, on_exec: bool| {
        let flags = if on_exec {
            libc::O_CLOEXEC.cast_unsigned().into()
        } else {
            0
        };
        Call::new(libc::SYS_dup3, &[number(from), number(to), flags]).or_stop()
    };
    let after = items
        .iter()
        .filter_map(|item| item.places.split_first())
        .flat_map(|((from, _), rest)| {
            rest.iter()
                .map(move |(to, on_exec)| copy(*from, *to, *on_exec))
        })
        .collect();
    Letter {
        descriptors: items.iter().map(|item| item.there).collect(),
        close_on_exec,
        before,
        after,
    }
}

/// Has the thread take letters and checks what became of them.
fn take(
    borrowed: &mut Borrowed<'_>,
    items: &[&mut &mut Item<'_>],
    letters: &[Letter<'_>],
    size: usize,
    deadline: Deadline,
) -> Result<usize, SwitchError> {
    let (taken, fed) = borrowed.take_letters(letters, deadline)?;
    let mut placed = 0;
    let mut failure = None;
    for (items, taken) in items.chunks(size).zip(&taken) {
        let wanted: Vec<i32> = items
            .iter()
            .filter_map(|item| primary(item).map(|(fd, _)| fd.as_raw()))
            .collect();
        if taken.is_begun() && taken.numbers != wanted {
            let error = received_error(borrowed, &wanted, taken);
            repair(borrowed, items, &wanted, &taken.numbers);
            return Err(error);
        }
        placed += if taken.is_begun() { wanted.len() } else { 0 };
        let others = items
            .iter()
            .flat_map(|item| item.places.iter().skip(1).map(|(fd, _)| *fd));
        for (fd, call) in others.zip(&taken.after) {
            match call.result() {
                Some(Ok(_)) => placed += 1,
                Some(Err(errno)) => {
                    let pid = borrowed.pid();
                    failure = failure.or(Some(SwitchError::Place { pid, fd, errno }));
                }
                None => {}
            }
        }
    }
    if let Some(failure) = failure {
        return Err(failure);
    }
    match fed {
        Err(RemoteError::Late { .. }) => Err(SwitchError::Late {
            step: "exchange descriptors",
        }),
        Err(error) => Err(error.into()),
        Ok(()) if taken.iter().all(Taken::is_begun) => Ok(placed),
        // The wait for a letter was cut short.
        Ok(()) => Err(RemoteError::Lost {
            tid: borrowed.tid(),
        }
        .into()),
    }
}

fn received_error(borrowed: &Borrowed<'_>, wanted: &[i32], taken: &Taken) -> SwitchError {
    let pid = borrowed.pid();
    match taken.received {
        Some(Err(errno)) => RemoteError::Call {
            pid,
            call: "recvmsg",
            errno,
        }
        .into(),
        _ => RemoteError::Truncated {
            pid,
            sent: wanted.len(),
            got: wanted
                .iter()
                .filter(|fd| taken.numbers.contains(fd))
                .count(),
        }
        .into(),
    }
}

/// Gives numbers that were closed and not received what they had before, so that an undo finds every number in use. What was received
/// elsewhere stays until then: it keeps those numbers from being given.
fn repair(
    borrowed: &mut Borrowed<'_>,
    items: &[&mut &mut Item<'_>],
    wanted: &[i32],
    numbers: &[i32],
) {
    let missing: Vec<BorrowedFd<'_>> = items
        .iter()
        .zip(wanted)
        .filter(|(_, fd)| !numbers.contains(fd))
        .map(|(item, _)| item.back)
        .collect();
    let expected: Vec<i32> = wanted
        .iter()
        .copied()
        .filter(|fd| !numbers.contains(fd))
        .collect();
    let letter = Letter {
        descriptors: missing,
        close_on_exec: false,
        before: Vec::new(),
        after: Vec::new(),
    };
    let letters = [letter];
    let limit = Deadline::after(super::UNDO_STEP);
    let is_needed = !expected.is_empty();
    let repaired = is_needed.then(|| borrowed.take_letters(&letters, limit));
    match repaired {
        Some(Ok((taken, Ok(()))))
            if taken.first().is_some_and(|taken| taken.numbers == expected) => {}
        None => {}
        other => {
            tracing::error!(pid = borrowed.pid().as_raw(), numbers = ?expected, result = ?other, "descriptors could not be given back");
        }
    }
    let mut strays: Vec<Call> = numbers
        .iter()
        .filter(|fd| **fd >= 0 && !wanted.contains(fd))
        .map(|fd| Call::new(libc::SYS_close, &[u64::from(fd.cast_unsigned())]))
        .collect();
    if let Err(error) = borrowed.run(&mut strays, limit) {
        tracing::error!(pid = borrowed.pid().as_raw(), %error, "descriptors of ours are left in the target");
    }
}
