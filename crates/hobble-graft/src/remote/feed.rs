//! Messages whose descriptors the thread receives at numbers chosen beforehand.
//!
//! `SCM_RIGHTS` installs descriptors at the lowest free numbers (net/core/scm.c, `scm_detach_fds`). Where these are known, closing some numbers and
//! receiving as many descriptors puts them in the very place of the closed ones, and leaves no second descriptor to be closed: with a file of a
//! FUSE filesystem such a close is a request to its server each time (fs/fuse/file.c, `fuse_flush`).
//!
//! Owns the feeding of a batch with such messages, called letters. Invariants:
//!
//! * **Nothing is closed for a letter before the letter lies in the target's socket.** Its first call looks for it there without taking it
//!   (`MSG_PEEK`), and the batch ends when there is none: if we die, the thread brings to its end what it has begun, and begins nothing that it
//!   could not end. (`unix_stream_read_generic` looks at the queue before it looks whether the other end is closed.)
//! * At most [`AHEAD`] letters lie in the socket, so that a thread whose tracer has died ends soon.
//! * A letter that has been sent is never interrupted by our running out of time: only the next one is withheld.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::{
    Borrowed, Call, Cell, DONE, LETTERS, RemoteError, SCRATCH_LENGTH, SOCKET, TABLE, TABLE_ENTRIES,
    TAKEN, TAKEN_AT,
};
use crate::arch::ENTRY_SIZE;
use crate::ids::Fd;
use crate::stop::Deadline;

/// Letters that the thread may have before it says that it has taken one.
const AHEAD: usize = 2;

/// How long a letter that was sent may take to be taken, whatever the budget: to take the thread back in the middle would leave
/// numbers without a file. Closing a file of a network filesystem may write it back.
const TAKING: Duration = Duration::from_secs(2);

/// A vector of one byte, which all letters share.
const VECTOR: u64 = LETTERS;
const BYTE: u64 = LETTERS + 16;
const PEEKED: u64 = LETTERS + 24;
const FIRST: u64 = LETTERS + 32;

/// `struct msghdr` and its padding, and behind it the header of the control message.
const HEAD: u64 = 64;
const CONTROL_HEAD: u64 = 16;

/// Descriptors of ours on the way to numbers of the target.
#[derive(Clone, Debug)]
pub(crate) struct Letter<'a> {
    pub(crate) descriptors: Vec<BorrowedFd<'a>>,
    pub(crate) close_on_exec: bool,
    /// Calls between the look for the letter and its taking.
    pub(crate) before: Vec<Call>,
    /// Calls after its taking.
    pub(crate) after: Vec<Call>,
}

impl Letter<'_> {
    /// Calls in the table.
    pub(crate) fn calls(&self) -> usize {
        self.before.len() + self.after.len() + 3
    }

    /// Bytes of scratch memory.
    fn size(&self) -> u64 {
        (HEAD + CONTROL_HEAD + 4 * self.descriptors.len() as u64).next_multiple_of(8)
    }
}

/// What became of a letter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    /// Results of the calls before its taking; empty when it was not begun.
    pub(crate) before: Vec<Call>,
    /// What receiving it returned; `None` when it was not reached.
    pub(crate) received: Option<Result<u64, rustix::io::Errno>>,
    /// The numbers that its descriptors were given, in their order.
    pub(crate) numbers: Vec<i32>,
    /// Results of the calls after its taking.
    pub(crate) after: Vec<Call>,
}

impl Taken {
    /// Whether a call before its taking was made.
    pub(crate) fn is_begun(&self) -> bool {
        self.received.is_some() || self.before.iter().any(|call| call.result().is_some())
    }
}

impl Borrowed<'_> {
    /// Whether the thread could end what it had begun if we died.
    pub(crate) fn may_receive_in_place(&self) -> bool {
        self.alone.receives_in_place
    }

    /// Whether its filters let it close ranges without us.
    pub(crate) fn may_close_ranges(&self) -> bool {
        self.alone.closes_ranges
    }

    /// The number at which our socket lies in the target.
    pub(crate) fn socket_number(&self) -> Option<Fd> {
        self.socket_number
    }

    /// How many of these letters one batch can take.
    pub(crate) fn letters_that_fit(letters: &[Letter<'_>]) -> usize {
        let (mut calls, mut bytes) = (0, FIRST);
        letters
            .iter()
            .take_while(|letter| {
                calls += letter.calls();
                bytes += letter.size();
                calls <= TABLE_ENTRIES && bytes <= SCRATCH_LENGTH
            })
            .count()
    }

    /// Has the thread take letters, as many as [fit](Self::letters_that_fit). Says what became of each, the error of the first that could not be sent, too.
    ///
    /// What remains if we die in here: the letters that lie in the socket are taken, the others not begun.
    ///
    /// # Errors
    /// When the thread is gone, or has not said a word for two seconds; what was begun may be unfinished then.
    pub(crate) fn take_letters(
        &mut self,
        letters: &[Letter<'_>],
        deadline: Deadline,
    ) -> Result<(Vec<Taken>, Result<(), RemoteError>), RemoteError> {
        let (mut calls, gates) = self.write_letters(letters)?;
        self.write_table(&calls)?;
        self.start_batch()?;
        let fed = self.feed(letters, &gates, deadline)?;
        self.read_results(&mut calls)?;
        let withheld = fed.as_ref().err().map_or(letters.len(), |(sent, _)| *sent);
        let mut area = vec![0; letters.iter().map(|l| l.size() as usize).sum()];
        self.memory.read(self.scratch + FIRST, &mut area)?;
        let (mut at, mut calls) = (0, calls.as_slice());
        let mut taken = Vec::with_capacity(letters.len());
        for (index, letter) in letters.iter().enumerate() {
            let numbers = area.get(at + (HEAD + CONTROL_HEAD) as usize..);
            let numbers = numbers.unwrap_or_default().chunks_exact(4);
            let numbers = numbers
                .take(letter.descriptors.len())
                .filter_map(|n| n.try_into().ok())
                .map(i32::from_le_bytes);
            at += letter.size() as usize;
            let (mine, rest) = calls.split_at_checked(letter.calls()).unwrap_or_default();
            calls = rest;
            let mut mine = mine.iter().copied().skip(1);
            let before: Vec<Call> = mine.by_ref().take(letter.before.len()).collect();
            let received = mine.next().and_then(|call| call.result());
            let is_sent = index < withheld;
            taken.push(Taken {
                before: if is_sent { before } else { Vec::new() },
                received: received.filter(|_| is_sent),
                numbers: numbers.collect(),
                after: mine.take(letter.after.len()).collect(),
            });
        }
        Ok((taken, fed.map_err(|(_, error)| error)))
    }

    /// Writes what receives the letters; gives the calls, and where in them the look for each letter is.
    fn write_letters(
        &mut self,
        letters: &[Letter<'_>],
    ) -> Result<(Vec<Call>, Vec<usize>), RemoteError> {
        let base = self.scratch;
        let socket = Cell(base + SOCKET);
        let peek = libc::MSG_PEEK.cast_unsigned().into();
        let look = Call::new(libc::SYS_recvfrom, &[0, base + PEEKED, 1, peek])
            .first_is(socket)
            .or_stop_at_nothing();
        let quietly = (libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT).cast_unsigned();
        let tell = Call::new(
            libc::SYS_sendto,
            &[0, base + TAKEN_AT, 1, u64::from(quietly)],
        )
        .first_is(socket);
        let mut bytes = Vec::new();
        for word in [base + BYTE, 1, 0, 0] {
            bytes.extend_from_slice(&u64::to_le_bytes(word));
        }
        let mut at = base + FIRST;
        let (mut calls, mut gates) = (Vec::new(), Vec::new());
        for letter in letters {
            // CMSG_LEN(n * 4), not CMSG_SPACE: the kernel must not fit one more in.
            let length = CONTROL_HEAD + 4 * letter.descriptors.len() as u64;
            let end = bytes.len() + letter.size() as usize;
            for word in [0, 0, base + VECTOR, 1, at + HEAD, length, 0, 0] {
                bytes.extend_from_slice(&u64::to_le_bytes(word));
            }
            bytes.resize(end, 0xff);
            let flags = if letter.close_on_exec {
                libc::MSG_CMSG_CLOEXEC.cast_unsigned().into()
            } else {
                0
            };
            gates.push(calls.len());
            calls.push(look);
            calls.extend_from_slice(&letter.before);
            calls.push(
                Call::new(libc::SYS_recvmsg, &[0, at, flags])
                    .first_is(socket)
                    .or_stop_at_nothing(),
            );
            calls.extend_from_slice(&letter.after);
            calls.push(tell);
            at += letter.size();
        }
        self.memory.write(base + LETTERS, &bytes)?;
        Ok((calls, gates))
    }

    /// Sends the letters as they are taken. Inner error: how many were sent, and why not the next.
    fn feed(
        &mut self,
        letters: &[Letter<'_>],
        gates: &[usize],
        deadline: Deadline,
    ) -> Result<Result<(), (usize, RemoteError)>, RemoteError> {
        let (mut sent, mut taken) = (0, 0);
        let mut failure = None;
        loop {
            while let (Some(letter), Some(gate)) = (letters.get(sent), gates.get(sent))
                && failure.is_none()
                && sent < taken + AHEAD
            {
                let result = if deadline.passed() {
                    Err(RemoteError::Late { tid: self.tid })
                } else {
                    self.send(&letter.descriptors)
                };
                match result {
                    Ok(()) => {
                        self.spoken = Instant::now();
                        sent += 1;
                    }
                    Err(error) => {
                        self.withhold(*gate)?;
                        failure = Some((sent, error));
                    }
                }
            }
            let mut words = [0; 16];
            let came = self.hear(&mut words, deadline.or_at_least(TAKING))?;
            for word in words.iter().take(came) {
                match *word {
                    TAKEN => taken += 1,
                    DONE => return Ok(failure.map_or(Ok(()), Err)),
                    _ => return Err(RemoteError::Lost { tid: self.tid }),
                }
            }
        }
    }

    /// Ends the batch at a letter that will not come: what follows the look for it becomes a call that fails.
    fn withhold(&mut self, gate: usize) -> Result<(), RemoteError> {
        let fails = Call::new(libc::SYS_close, &[u64::MAX]).or_stop();
        let next = self.scratch + TABLE + ((gate + 1) * ENTRY_SIZE) as u64;
        self.memory.write(next, &fails.0.to_bytes())?;
        self.send_nothing();
        Ok(())
    }
}
