//! What differs between processors: registers, the code that runs inside a borrowed thread, and how an interrupted system
//! call is told from its registers.
//!
//! Owns everything that knows an instruction or a register name; the rest of the crate sees the same five things on every
//! processor: `Registers`, `Image`, `dead_path`, `restarts_after_stop` and `AUDIT_ARCHITECTURE`. Invariant: nothing here ever
//! writes a trap into a target, so that a thread whose tracer has died runs on to code of its own.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
mod unsupported;
#[cfg(not(target_arch = "x86_64"))]
pub(crate) use unsupported::*;

/// One system call of a batch, as the code in the target reads it. The layout is known to `blob.rs`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The number of the system call.
    pub(crate) number: u32,
    /// [`CELL_1`] and its neighbours.
    pub(crate) flags: u32,
    /// The six arguments.
    pub(crate) arguments: [u64; 6],
    /// What the system call returned; [`NOT_RUN`] until then.
    pub(crate) result: i64,
}

/// Size of an [`Entry`] in the target's memory.
pub(crate) const ENTRY_SIZE: usize = 64;
const _: () = assert!(size_of::<Entry>() == ENTRY_SIZE);

/// The first argument is the address of a 32-bit descriptor number, not the number.
pub(crate) const CELL_1: u32 = 1;
/// With [`CELL_1`]: the number is replaced by -1 before the call, so that nobody closes it a second time.
pub(crate) const CLEAR_CELL: u32 = 2;
/// A result in the range of error numbers ends the batch.
pub(crate) const STOP_ON_ERROR: u32 = 4;
/// The fifth argument is the address of a 32-bit descriptor number (`mmap`).
pub(crate) const CELL_5: u32 = 8;

/// A result of 0 ends the batch: nothing was there, as from a socket whose other end is closed.
pub(crate) const STOP_ON_ZERO: u32 = 16;

/// The result of an entry that was not reached. No system call returns it (error numbers end at -4095).
pub(crate) const NOT_RUN: i64 = i64::MIN;

impl Entry {
    /// The bytes as they lie in the target's memory.
    pub(crate) fn to_bytes(self) -> [u8; ENTRY_SIZE] {
        let mut bytes = [0; ENTRY_SIZE];
        let head = (u64::from(self.flags) << 32) | u64::from(self.number);
        let words = [head]
            .into_iter()
            .chain(self.arguments)
            .chain([self.result.cast_unsigned()]);
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// What the code in the target needs to know, besides the registers, to end by itself when the tracer has died.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ending {
    /// The signal mask to set back; `None` to leave it alone.
    pub(crate) mask: Option<u64>,
    /// Address and length of the scratch mapping; length 0 when there is none.
    pub(crate) scratch: (u64, u64),
    /// First and one-past-last address of a table of [`Entry`] that closes what is left open.
    pub(crate) cleanup: (u64, u64),
}
