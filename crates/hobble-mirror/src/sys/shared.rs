//! Memory that outlives its writer: anonymous, shared with every process that was cloned from the one that made it.
//!
//! Invariant: bytes are written by one process at a time, and read only when that one has ended; what the two agree on is in the words of the first page, which
//! are atomic.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Bytes at the start that hold [words](Shared::word) only.
pub(crate) const HEAD: usize = 4096;
/// How many words there are.
const WORDS: usize = 64;

/// A region of shared memory.
pub(crate) struct Shared {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to no thread; what is written is bounds-checked and, by the module's invariant, never read at the same time.
unsafe impl Send for Shared {}
// SAFETY: as above; writers are kept apart by whoever owns the region.
unsafe impl Sync for Shared {}

impl Shared {
    /// A region of `len` bytes, all zero, of which memory is taken only where something is written.
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        if len <= HEAD {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let how = MapFlags::SHARED | MapFlags::NORESERVE;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory that is in use.
        let start = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, access, how) }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, len })
    }

    /// One of the atomic words of the first page.
    pub(crate) fn word(&self, index: usize) -> &AtomicU64 {
        let index = index.min(WORDS - 1);
        // SAFETY: the index is within the first page, which is within the mapping.
        let word = unsafe { self.start.cast::<u64>().add(index) };
        // SAFETY: aligned because mappings are and the offset is a multiple of eight; valid as long as `self`; accessed as an atomic only, since
        // `write` and `read` keep out of the first page.
        unsafe { AtomicU64::from_ptr(word.as_ptr()) }
    }

    fn within(&self, at: usize, len: usize) -> Option<NonNull<u8>> {
        let end = at.checked_add(len)?;
        if at < HEAD || end > self.len {
            return None;
        }
        // SAFETY: `at` is below the length of the mapping, as just checked.
        Some(unsafe { self.start.add(at) })
    }

    /// Copies bytes in. `false` when they do not fit there.
    pub(crate) fn write(&self, at: usize, bytes: &[u8]) -> bool {
        let Some(target) = self.within(at, bytes.len()) else {
            return false;
        };
        // SAFETY: the target lies within the mapping and is not part of `bytes`, which is memory of the process's own.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target.as_ptr(), bytes.len()) };
        true
    }

    /// Copies bytes out.
    pub(crate) fn read(&self, at: usize, len: usize) -> Option<Vec<u8>> {
        let source = self.within(at, len)?;
        let mut bytes = vec![0; len];
        // SAFETY: the source lies within the mapping, the vector was just made with that length.
        unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), bytes.as_mut_ptr(), len) };
        Some(bytes)
    }

    /// Gives memory back that need not be kept; it reads as zero then. A hint: nothing depends on it.
    pub(crate) fn discard(&self, at: usize, len: usize) {
        let page = HEAD;
        let (start, end) = (at.next_multiple_of(page), (at + len) / page * page);
        if end <= start {
            return;
        }
        if let Some(target) = self.within(start, end - start) {
            // SAFETY: within the mapping, which is shared and anonymous; its bytes are declared to be of no use any more by the caller.
            let _ = unsafe {
                rustix::mm::madvise(target.as_ptr().cast(), end - start, Advice::LinuxRemove)
            };
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and every reference into it borrows from `self`.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_and_bounds_hold() {
        let region = Shared::new(HEAD * 4).unwrap();
        assert!(region.write(HEAD, b"hello"));
        assert_eq!(region.read(HEAD, 5).unwrap(), b"hello");
        assert!(!region.write(HEAD - 1, b"x"), "the words are not bytes");
        assert!(!region.write(HEAD * 4 - 2, b"xyz"));
        assert!(region.read(HEAD * 4, 1).is_none());
        assert!(region.read(usize::MAX, 2).is_none());
        region.discard(HEAD, HEAD * 3);
        assert_eq!(region.read(HEAD, 5).unwrap(), [0; 5]);
    }
}
