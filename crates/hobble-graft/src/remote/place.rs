//! Where in a target's address space our code and our scratch mapping go.
//!
//! Owns the search. Invariants: code goes only where the page holds nothing but zeroes up to its end, in a mapping that is already executable and private (so
//! that no other process sees it and no execute permission is asked for); the scratch mapping goes to the middle of the largest
//! hole, where neither the heap, nor the stack, nor the next `mmap` of the program would go.

use super::RemoteError;
use super::memory::Memory;
use crate::ids::Pid;
use crate::proc::maps::{self, MapEntry};

const PAGE: u64 = 4096;

/// The lowest and highest addresses that are considered (`mmap_min_addr`; the 47-bit limit of x86-64 and below that of others).
const LOWEST: u64 = 0x10_0000;
const HIGHEST: u64 = 0x7fff_0000_0000;

/// The vDSO ends with its section headers, which nothing reads; still leave a gap behind what is in use.
const GAP: u64 = 16;

/// Where code goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    pub(super) address: u64,
    /// Whether the very code lies there already, left by a tracer that died; there were zeroes before.
    pub(super) is_left_over: bool,
}

/// Room for an image whose first bytes are `code`.
///
/// The vDSO comes first: it is in every process, and the writer of a file cannot change it. Then the ends of program and library text.
pub(super) fn for_code(
    pid: Pid,
    memory: &mut Memory,
    entries: &[MapEntry],
    size: u64,
    code: &[u8],
) -> Result<Room, RemoteError> {
    let executable = |e: &&MapEntry| e.protection.execute && e.protection.read && !e.is_shared;
    let vdso = entries
        .iter()
        .filter(executable)
        .filter(|e| e.name == b"[vdso]");
    let files = entries
        .iter()
        .filter(executable)
        .filter(|e| e.has_file() && !e.protection.write);
    for entry in vdso.chain(files) {
        let mut page = vec![0; PAGE as usize];
        let start = entry.end - PAGE;
        if start < entry.start || memory.read(start, &mut page).is_err() {
            continue;
        }
        let left_over = page
            .windows(code.len())
            .step_by(16)
            .position(|bytes| bytes == code);
        if let Some(index) = left_over {
            let address = start + 16 * index as u64;
            if address + size <= entry.end {
                return Ok(Room {
                    address,
                    is_left_over: true,
                });
            }
        }
        let used = page
            .iter()
            .rposition(|b| *b != 0)
            .map_or(0, |last| last as u64 + 1);
        // A whole page of zeroes may be there for a reason that we do not know.
        if used == 0 {
            continue;
        }
        let address = (start + used + GAP).next_multiple_of(16);
        if address + size <= entry.end {
            return Ok(Room {
                address,
                is_left_over: false,
            });
        }
    }
    Err(RemoteError::NoRoom {
        pid,
        what: "padding behind executable code",
    })
}

/// Address of a hole of at least `size` bytes.
pub(super) fn for_scratch(pid: Pid, entries: &[MapEntry], size: u64) -> Result<u64, RemoteError> {
    let starts = entries.iter().map(|e| e.start).chain([HIGHEST]);
    let ends = [LOWEST].into_iter().chain(entries.iter().map(|e| e.end));
    ends.zip(starts)
        .filter(|(low, high)| *low <= HIGHEST && *high <= HIGHEST)
        .map(|(low, high)| (high.saturating_sub(low), low))
        .max()
        .filter(|(length, _)| *length >= size + 2 * PAGE)
        .map(|(length, low)| {
            (low + length / 2).next_multiple_of(PAGE)
                - size.next_multiple_of(PAGE) / 2 / PAGE * PAGE
        })
        .ok_or(RemoteError::NoRoom {
            pid,
            what: "a hole in the address space",
        })
}

/// The mappings of a process.
pub(super) fn mappings(pid: Pid) -> Result<Vec<MapEntry>, RemoteError> {
    maps::of_process(pid).map_err(|source| {
        if source.is_gone() {
            RemoteError::Gone { pid }
        } else {
            RemoteError::Inspect { pid, source }
        }
    })
}
