//! Slices of what is held of a volume, for targets with more open files than fit into one exchange.
//!
//! An exchange takes up to three descriptors of ours for each description: the original, which is kept, what replaces it, and what `/proc` tells of it. All of them are in
//! one table, which the holder shares, and the hard limit bounds that. What does not fit at once is moved in several exchanges, each with a stop of its own, and what an
//! exchange needs beside the originals is free again for the next one. So a target may have almost as many open files as the limit allows, and each stop stays short.
//!
//! Invariant: all descriptions of a file, and its mappings, are in one slice, so POSIX locks are handed over as a whole. Files that are locked when an attachment begins are in
//! the first slice, which the mount is placed with: what the target opens by name from then on is on the same side of the hook as its locks.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hobble_graft::census::{Census, FileFacts};
use rustix::process::Resource;

/// Descriptors of ours that stay free for what is opened meanwhile: by the target through the hook, and while it stands still.
pub(crate) const SPARE: usize = 1_024;
/// What one description takes while it is moved: the original, the replacement, and what `/proc` tells of it.
const EACH: usize = 3;
/// What one description takes at least: the last of these is for speed.
const LEAST: usize = 2;
/// So few are not worth a stop of their own, however little room there is.
const SMALLEST: usize = 128;
/// So many make a stop short enough, whatever room there is.
const LARGEST: usize = 3_000;
/// Stops that one attachment may take.
const MOST: usize = 24;
/// How long descriptors that were closed by another thread are waited for.
const CLOSED_WITHIN: Duration = Duration::from_secs(5);

/// A file of the volume: device and inode.
type File = (u64, u64);

/// A part of the files of a volume.
#[derive(Clone, Debug)]
pub(crate) struct Slice {
    from: u64,
    /// The last key of the slice.
    until: u64,
    first: Arc<BTreeSet<File>>,
}

impl Slice {
    /// Everything.
    pub(crate) fn whole() -> Self {
        Self {
            from: 0,
            until: u64::MAX,
            first: Arc::default(),
        }
    }

    /// One of `of` parts of about the same size, from 0 on.
    pub(crate) fn part(number: usize, of: usize) -> Self {
        let width = u64::MAX / of.max(1) as u64;
        let from = width.saturating_mul(number as u64);
        Self {
            from,
            until: if number + 1 >= of {
                u64::MAX
            } else {
                from + (width - 1)
            },
            first: Arc::default(),
        }
    }

    /// What begins at `from`, of which about `size` of `left` are wanted.
    pub(crate) fn next(from: u64, size: usize, left: usize) -> Self {
        let width = (u64::MAX - from) / left.max(1) as u64;
        let width = width.saturating_mul(size as u64);
        Self {
            from,
            until: from.saturating_add(width),
            first: Arc::default(),
        }
    }

    /// Whether there is no other part.
    pub(crate) fn is_whole(&self) -> bool {
        self.from == 0 && self.until == u64::MAX
    }

    /// Where the next part begins; `None` behind the last one.
    pub(crate) fn end(&self) -> Option<u64> {
        self.until.checked_add(1)
    }

    /// Whether a file is in this part.
    pub(crate) fn holds(&self, facts: &FileFacts) -> bool {
        self.is_whole() || {
            let key = key((facts.device.raw(), facts.inode), &self.first);
            (self.from..=self.until).contains(&key)
        }
    }
}

/// Spreads inode numbers, which come in runs, evenly (the finaliser of SplitMix64).
fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

fn key(file: File, first: &BTreeSet<File>) -> u64 {
    if first.contains(&file) {
        return 0;
    }
    mix(file.1)
}

/// Why what a target holds cannot be moved, however it is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooMany {
    /// Descriptions and mapped files.
    pub(crate) held: usize,
    /// How many of them belong to one file, or to files that are locked, where those are the trouble.
    pub(crate) together: usize,
    /// Descriptors of ours.
    pub(crate) room: usize,
}

/// The parts in which what a census found is moved onto the hook, when `room` descriptors of ours are free for that.
///
/// # Errors
/// When not even that would fit.
pub(crate) fn inwards(census: &Census, room: usize) -> Result<Vec<Slice>, TooMany> {
    let mut files: BTreeMap<File, usize> = BTreeMap::new();
    let mut locked = BTreeSet::new();
    for description in census.descriptions() {
        let file = (description.facts.device.raw(), description.facts.inode);
        *files.entry(file).or_default() += 1;
        if description.locks.iter().any(|held| held.table.is_some()) {
            locked.insert(file);
        }
    }
    for mapped in census.mapped_files() {
        *files
            .entry((mapped.facts.device.raw(), mapped.facts.inode))
            .or_default() += 1;
    }
    cut(&files, locked, room)
}

fn cut(
    files: &BTreeMap<File, usize>,
    locked: BTreeSet<File>,
    room: usize,
) -> Result<Vec<Slice>, TooMany> {
    let held: usize = files.values().sum();
    if held.saturating_mul(LEAST) <= room {
        return Ok(vec![Slice::whole()]);
    }
    let first = Arc::new(locked);
    let mut keys: BTreeMap<u64, usize> = BTreeMap::new();
    for (file, count) in files {
        *keys.entry(key(*file, &first)).or_default() += count;
    }
    let mut slices = Vec::new();
    let (mut from, mut size, mut moved) = (0, 0, 0);
    let fits = |moved: usize| room.saturating_sub(moved) / EACH;
    let mut last = 0;
    for (key, count) in keys {
        if size > 0 && size + count > fits(moved).min(LARGEST) {
            slices.push(Slice {
                from,
                until: key - 1,
                first: Arc::clone(&first),
            });
            moved += size;
            (from, size) = (key, 0);
        }
        size += count;
        last = count;
        // One file's, or the locked ones', which stay together: those may do without what is for speed.
        if size > fits(moved) && size * LEAST > room.saturating_sub(moved) {
            return Err(TooMany {
                held,
                together: last,
                room,
            });
        }
        if slices.len() >= MOST {
            return Err(TooMany {
                held,
                together: 0,
                room,
            });
        }
    }
    slices.push(Slice {
        from,
        until: u64::MAX,
        first,
    });
    // The first key is the first slice's, whatever comes before it.
    if let Some(slice) = slices.first_mut() {
        slice.from = 0;
    }
    debug_assert!(last > 0);
    Ok(slices)
}

/// Descriptors that are free now beside [`SPARE`].
pub(crate) fn room() -> usize {
    let limit = rustix::process::getrlimit(Resource::Nofile).current;
    let limit = limit.map_or(usize::MAX, |limit| {
        usize::try_from(limit).unwrap_or(usize::MAX)
    });
    limit.saturating_sub(used()).saturating_sub(SPARE)
}

/// Descriptors that would be free beside [`SPARE`] in a process that has raised its limit and has `own` open.
pub(crate) fn room_at_most(own: usize) -> usize {
    let limit = rustix::process::getrlimit(Resource::Nofile).maximum;
    let limit = limit.map_or(usize::MAX, |limit| {
        usize::try_from(limit).unwrap_or(usize::MAX)
    });
    limit.saturating_sub(own).saturating_sub(SPARE)
}

fn used() -> usize {
    std::fs::read_dir(Path::new("/proc/self/fd")).map_or(usize::MAX, Iterator::count)
}

/// How many of `held` descriptions on the hook are given back at once: all, or as many as there is room for. What replaces them is one more descriptor of ours each, the
/// look at them another; the originals are there already, and free descriptors as they go.
pub(crate) fn outwards(held: usize) -> usize {
    if held.saturating_mul(LEAST) <= room() {
        return held;
    }
    // What the slice before took is closed by another thread, and by the kernel's word that a file is not open any more.
    let until = Instant::now() + CLOSED_WITHIN;
    loop {
        let size = room() / EACH;
        if size >= held.min(SMALLEST) || Instant::now() >= until {
            return size.clamp(1, LARGEST).min(held);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// In how many parts of the same size `held` descriptions are given back by somebody who can only duplicate the originals: each takes what is on the hook, and the original.
pub(crate) fn parts(held: usize) -> usize {
    let room = room();
    if held.saturating_mul(LEAST) <= room {
        return 1;
    }
    held.saturating_mul(EACH).div_ceil(room.max(SMALLEST))
}

/// Waits until there is room for `count` descriptions more, as far as what is being closed makes any.
pub(crate) fn wait_for_room(count: usize) {
    let until = Instant::now() + CLOSED_WITHIN;
    while room() < count.saturating_mul(EACH) && Instant::now() < until {
        // Replacements are closed by a thread of their own, which tells nobody.
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(count: u64, each: usize) -> BTreeMap<File, usize> {
        (1..=count).map(|inode| ((8, inode), each)).collect()
    }

    /// How many of the files are in each slice. Every file must be in one.
    fn sizes(files: &BTreeMap<File, usize>, slices: &[Slice]) -> Vec<usize> {
        let mut sizes = vec![0; slices.len()];
        for (file, count) in files {
            let key = key(*file, &slices[0].first);
            let inside: Vec<usize> = (0..slices.len())
                .filter(|n| {
                    slices[*n].is_whole() || (slices[*n].from..=slices[*n].until).contains(&key)
                })
                .collect();
            assert_eq!(inside.len(), 1, "{file:?} is in the slices {inside:?}");
            sizes[inside[0]] += count;
        }
        sizes
    }

    #[test]
    fn what_fits_is_moved_at_once_and_what_does_not_in_slices() {
        let few = files(5_000, 1);
        assert_eq!(cut(&few, BTreeSet::new(), 18_000).unwrap().len(), 1);
        let many = files(15_000, 1);
        let slices = cut(&many, BTreeSet::new(), 18_700).unwrap();
        assert!((2..10).contains(&slices.len()), "{slices:?}");
        let mut moved = 0;
        for size in sizes(&many, &slices) {
            assert!(moved + EACH * size <= 18_700, "{size} after {moved}");
            moved += size;
        }
        assert_eq!(moved, 15_000);
    }

    #[test]
    fn locked_files_are_in_the_first_slice() {
        let many = files(15_000, 1);
        let locked: BTreeSet<File> = (1..=3_000).map(|inode| (8, inode * 5)).collect();
        let slices = cut(&many, locked.clone(), 18_700).unwrap();
        for file in &locked {
            assert!((slices[0].from..=slices[0].until).contains(&key(*file, &slices[0].first)));
        }
        assert_eq!(sizes(&many, &slices).iter().sum::<usize>(), 15_000);
    }

    #[test]
    fn what_cannot_fit_is_refused() {
        assert!(cut(&files(19_000, 1), BTreeSet::new(), 18_700).is_err());
        // One file that is open so often cannot be cut.
        assert!(cut(&files(1, 15_000), BTreeSet::new(), 18_700).is_err());
        let all: BTreeSet<File> = files(15_000, 1).into_keys().collect();
        let refused = cut(&files(15_000, 1), all, 18_700).unwrap_err();
        assert_eq!(refused.together, 15_000);
    }

    #[test]
    fn parts_cover_everything_once() {
        let many = files(10_000, 1);
        for of in [1, 2, 7, 24] {
            let slices: Vec<Slice> = (0..of).map(|number| Slice::part(number, of)).collect();
            let sizes = sizes(&many, &slices);
            assert!(
                sizes.iter().all(|size| size * of > 8_000),
                "{of}: {sizes:?}"
            );
        }
        let mut from = Some(0);
        let mut left = 10_000;
        let mut slices = Vec::new();
        while let Some(at) = from {
            let size = 1_500.min(left.max(1));
            slices.push(Slice::next(at, size, left));
            from = slices[slices.len() - 1].end();
            left = left.saturating_sub(size);
        }
        assert_eq!(sizes(&many, &slices).iter().sum::<usize>(), 10_000);
    }
}
