//! Which pages of a private mapping have a content of their own, and where guard regions lie.
//!
//! From kernel 6.7 on the PAGEMAP_SCAN ioctl skips what is not there, so that a sparse mapping of a terabyte costs nothing. Before
//! it, every page has a word in `/proc/<pid>/pagemap` (Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::ProcError;
use crate::ids::Pid;
use crate::sys::pagemap::{self as sys, Region};

/// Bit 58: a guard region, from kernel 6.15 on.
const PM_GUARD: u64 = 1 << 58;
/// Bit 61: the page is the file's, or of shared anonymous memory.
const PM_FILE: u64 = 1 << 61;
/// Bit 62: in swap. Only private pages of a file mapping are ever swapped.
const PM_SWAP: u64 = 1 << 62;
/// Bit 63: in memory.
const PM_PRESENT: u64 = 1 << 63;

/// Words read at a time without the ioctl: 32 KiB, 16 MiB of memory.
const WORDS: usize = 4096;

/// Addresses of a process, multiples of its page size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressRange {
    /// First byte.
    pub start: u64,
    /// First byte after it.
    pub end: u64,
}

/// What is special in a piece of memory, as ranges that ascend and do not touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pages {
    /// Pages that are in memory or swap and are not the file's: written since they were mapped.
    pub own: Vec<AddressRange>,
    /// Guard regions.
    pub guards: Vec<AddressRange>,
}

/// An open pagemap of one process. It keeps showing the memory it was opened for, even after `execve`.
#[derive(Debug)]
pub struct PageMap {
    file: File,
    path: PathBuf,
    page_size: u64,
}

impl PageMap {
    /// Opens the pagemap of `pid`.
    ///
    /// # Errors
    /// [`ProcError::Gone`] when there is no such process.
    pub fn open(pid: Pid) -> Result<Self, ProcError> {
        let path = PathBuf::from(format!("/proc/{pid}/pagemap"));
        let file = File::open(&path).map_err(|e| ProcError::read(&path, &e))?;
        Ok(Self {
            file,
            path,
            page_size: rustix::param::page_size() as u64,
        })
    }

    /// What is special in `range`.
    ///
    /// # Errors
    /// [`ProcError::Gone`] when the memory is gone; the failing system call otherwise.
    pub fn scan(&self, range: AddressRange) -> Result<Pages, ProcError> {
        match self.scan_by_ioctl(range) {
            Err(Errno::NOTTY) => self.scan_by_words(range),
            Ok(pages) => Ok(pages),
            Err(errno) => Err(ProcError::errno(&self.path, errno)),
        }
    }

    fn scan_by_ioctl(&self, range: AddressRange) -> Result<Pages, Errno> {
        let mut pages = Pages::default();
        let mut at = range.start;
        while at < range.end {
            let mut regions = [Region::default(); 256];
            let (found, walked) =
                sys::scan_own_pages(self.file.as_fd(), at, range.end, &mut regions)?;
            for region in found {
                let list = if region.is_guard() {
                    &mut pages.guards
                } else {
                    &mut pages.own
                };
                push(list, region.start, region.end);
            }
            // The kernel walks on by at least a page unless it is done; never trust that with an endless loop.
            if walked <= at {
                break;
            }
            at = walked;
        }
        Ok(pages)
    }

    fn scan_by_words(&self, range: AddressRange) -> Result<Pages, ProcError> {
        let mut pages = Pages::default();
        let mut buffer = vec![0u8; WORDS * 8];
        let mut at = range.start;
        while at < range.end {
            let wanted = usize::try_from((range.end - at) / self.page_size)
                .unwrap_or(usize::MAX)
                .min(WORDS);
            let buffer = buffer.get_mut(..wanted * 8).unwrap_or_default();
            let position = at / self.page_size * 8;
            let read = self
                .file
                .read_at(buffer, position)
                .map_err(|e| ProcError::read(&self.path, &e))?;
            let (words, _) = buffer.get(..read).unwrap_or_default().as_chunks::<8>();
            if words.is_empty() {
                // End of file: the memory has gone.
                return Err(ProcError::Gone {
                    path: self.path.clone(),
                });
            }
            for word in words {
                let bits = u64::from_ne_bytes(*word);
                let next = at.saturating_add(self.page_size);
                if bits & PM_GUARD != 0 {
                    push(&mut pages.guards, at, next);
                } else if bits & PM_FILE == 0 && bits & (PM_SWAP | PM_PRESENT) != 0 {
                    push(&mut pages.own, at, next);
                }
                at = next;
            }
        }
        Ok(pages)
    }

    /// The file that is read.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn push(list: &mut Vec<AddressRange>, start: u64, end: u64) {
    match list.last_mut() {
        Some(last) if last.end == start => last.end = end,
        _ => list.push(AddressRange { start, end }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proc::maps;

    #[test]
    fn both_ways_of_looking_see_the_same() {
        let own = Pid::own();
        let map = PageMap::open(own).unwrap();
        let mut own_pages = 0;
        // What the dynamic linker has relocated and then made read-only: private pages that no thread changes any more.
        for entry in maps::of_process(own).unwrap() {
            if !entry.has_file() || entry.is_shared || entry.protection.write {
                continue;
            }
            let range = AddressRange {
                start: entry.start,
                end: entry.end,
            };
            let by_words = map.scan_by_words(range).unwrap();
            match map.scan_by_ioctl(range) {
                Ok(by_ioctl) => assert_eq!(by_ioctl, by_words, "{entry:?}"),
                // Before 6.7 the words are all there is.
                Err(errno) => assert_eq!(errno, Errno::NOTTY),
            }
            own_pages += by_words.own.len();
        }
        assert!(own_pages > 0, "a linked program has relocated pages");
    }
}
