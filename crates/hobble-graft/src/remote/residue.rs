//! What a borrowed thread leaves behind if we die while it is borrowed.
//!
//! Owns the record and the clean-up by a later process. Invariant: a record is handed to the journal before the first byte it describes is
//! written, so what is found in a target is never more than what is recorded.

use std::time::Duration;

use super::memory::Memory;
use super::{RemoteError, place};
use crate::arch::Image;
use crate::ids::{Pid, ProcessId, Tid};
use crate::stop::{Deadline, StopError, Tracer, sys};

/// How long the code in the target may take to notice our death and leave: its read's time-out and some.
const LEAVES_WITHIN: Duration = Duration::from_secs(4);

/// What a borrow puts into a process. Harmless where it stays: code that nobody jumps to, in a page private to the process.
///
/// The code takes itself out of the way when the tracer has died: it closes its descriptors and unmaps its scratch mapping.
/// Only the bytes at `code_address` remain, until [`clean`] or the next `exec`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Residue {
    /// The process.
    pub pid: i32,
    /// When it started, in clock ticks since boot: a later process of the same pid is not touched.
    pub start_time: u64,
    /// The thread that was borrowed.
    pub tid: i32,
    /// Where the code was written.
    pub code_address: u64,
    /// What was there before (zeroes).
    pub original: Vec<u8>,
    /// Where the scratch mapping is made.
    pub scratch_address: u64,
    /// Its length in bytes.
    pub scratch_length: u64,
}

/// What [`clean`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cleaned {
    /// The process is gone, and everything with it.
    Gone,
    /// Nothing was left: the code was never written, or has been taken away.
    Nothing,
    /// The code was there and has been taken away.
    Code,
}

/// Takes away what a dead tracer left in a process.
///
/// Waits, bounded by `deadline` and four seconds, for a thread that still runs the code to leave it by itself. The process stands still for
/// well below a millisecond, and is not stopped at all when nothing is left.
///
/// # Errors
/// When the process cannot be stopped, or a thread is still inside the code by the deadline; nothing has been changed then.
pub fn clean(residue: &Residue, deadline: Deadline) -> Result<Cleaned, RemoteError> {
    let (Some(pid), Some(_)) = (Pid::new(residue.pid), Tid::new(residue.tid)) else {
        return Err(RemoteError::BadResidue { field: "pid" });
    };
    let image = Image::new();
    if residue.original.len() != image.bytes().len() || residue.original.iter().any(|b| *b != 0) {
        return Err(RemoteError::BadResidue { field: "original" });
    }
    let id = ProcessId {
        pid,
        start_time: residue.start_time,
    };
    if !matches!(id.is_alive(), Ok(true)) {
        return Ok(Cleaned::Gone);
    }
    if !is_ours(pid, residue, &image)? {
        return Ok(Cleaned::Nothing);
    }
    let deadline = deadline.min(Deadline::after(LEAVES_WITHIN));
    loop {
        let result = Tracer::scope(|tracer| -> Result<Option<Cleaned>, RemoteError> {
            let stopped = match tracer.stop_all(&[id], deadline) {
                Ok(stopped) => stopped,
                Err(StopError::Gone { .. }) => return Ok(Some(Cleaned::Gone)),
                Err(error) => return Err(error.into()),
            };
            let threads: Vec<Tid> = stopped.threads(pid).collect();
            let range = residue.code_address..residue.code_address + residue.original.len() as u64;
            for tid in &threads {
                match sys::registers(*tid) {
                    Ok(registers) if range.contains(&registers.ip()) => return Ok(None),
                    Ok(_) | Err(rustix::io::Errno::SRCH) => {}
                    Err(errno) => {
                        return Err(RemoteError::Refused {
                            pid,
                            what: "read registers",
                            errno,
                        });
                    }
                }
            }
            let Some(tid) = threads.first() else {
                return Ok(Some(Cleaned::Gone));
            };
            if is_ours(pid, residue, &image)? {
                Memory::new(pid, *tid).force(residue.code_address, &residue.original)?;
            }
            Ok(Some(Cleaned::Code))
        })?;
        match result {
            Some(cleaned) => return Ok(cleaned),
            None if deadline.passed() => return Err(RemoteError::StillInside { pid }),
            // The thread leaves by itself, and nothing tells when.
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// Whether our code lies where the record says, in a mapping of the kind that we choose.
fn is_ours(pid: Pid, residue: &Residue, image: &Image) -> Result<bool, RemoteError> {
    let end = residue
        .code_address
        .saturating_add(residue.original.len() as u64);
    let executable = place::mappings(pid)?.iter().any(|e| {
        e.protection.execute && !e.is_shared && e.start <= residue.code_address && end <= e.end
    });
    if !executable {
        return Ok(false);
    }
    let code = image
        .bytes()
        .get(..image.data_offset() as usize)
        .unwrap_or_default();
    let mut found = vec![0; code.len()];
    Memory::new(pid, pid.leader()).read(residue.code_address, &mut found)?;
    Ok(found == code)
}
