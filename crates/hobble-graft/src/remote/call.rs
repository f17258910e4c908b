//! One system call to be made by a borrowed thread, and what it returned.

use rustix::io::Errno;

use crate::arch::{self, CELL_1, CLEAR_CELL, Entry, NOT_RUN, STOP_ON_ERROR, STOP_ON_ZERO};

/// One system call to be made by a borrowed thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call(pub(super) Entry);

impl Call {
    /// A call with plain arguments, the rest 0.
    pub(crate) fn new(number: i64, arguments: &[u64]) -> Self {
        let mut all = [0; 6];
        for (slot, argument) in all.iter_mut().zip(arguments) {
            *slot = *argument;
        }
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        Self(Entry {
            number,
            flags: 0,
            arguments: all,
            result: NOT_RUN,
        })
    }

    /// The first argument is a received descriptor.
    pub(crate) fn first_is(mut self, cell: Cell) -> Self {
        let [first, ..] = &mut self.0.arguments;
        *first = cell.0;
        self.0.flags |= CELL_1;
        self
    }

    /// The fifth argument is a received descriptor.
    pub(crate) fn fifth_is(mut self, cell: Cell) -> Self {
        let [_, _, _, _, fifth, _] = &mut self.0.arguments;
        *fifth = cell.0;
        self.0.flags |= arch::CELL_5;
        self
    }

    /// An error of this call ends the batch.
    pub(crate) fn or_stop(mut self) -> Self {
        self.0.flags |= STOP_ON_ERROR;
        self
    }

    /// As [`Self::or_stop`], and so does a result of 0.
    pub(crate) fn or_stop_at_nothing(mut self) -> Self {
        self.0.flags |= STOP_ON_ERROR | STOP_ON_ZERO;
        self
    }

    /// `close` of a received descriptor.
    pub(crate) fn close(cell: Cell) -> Self {
        let mut call = Self::new(libc::SYS_close, &[]).first_is(cell);
        call.0.flags |= CLEAR_CELL;
        call
    }

    /// What it returned; `None` when it was not made.
    pub(crate) fn result(&self) -> Option<Result<u64, Errno>> {
        (self.0.result != NOT_RUN).then(|| decode(self.0.result))
    }
}

/// Splits what a system call returns.
pub(super) fn decode(result: i64) -> Result<u64, Errno> {
    if (-4095..0).contains(&result) {
        Err(Errno::from_raw_os_error(
            i32::try_from(-result).unwrap_or(libc::EIO),
        ))
    } else {
        Ok(result.cast_unsigned())
    }
}

/// Where in the target's memory the number of a received descriptor lies. It holds -1 when there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cell(pub(super) u64);
