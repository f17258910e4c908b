//! Mappings of one address space.
//!
//! Owns the order: the new mapping is made elsewhere, filled with what is private to the program, and moved onto the old one in one call
//! (`mremap`), so that no failure leaves a hole, and a thread of another process sharing the memory sees one or the other. Then what
//! `mlock` and `madvise` had said is said again.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use super::SwitchError;
use super::steps::Way;
use crate::census::{AddressRange, MappedFileId, Mapping};
use crate::remote::{Borrowed, Call, RemoteError};
use crate::stop::Deadline;

/// Mappings that are under way at once; each has up to a dozen calls.
const GROUP: usize = 64;
/// Bytes copied at a time.
const COPY: u64 = 256 * 1024;

const MADV_GUARD_INSTALL: u64 = 102;
const MLOCK_ONFAULT: u64 = 1;

/// One mapping and what it is to show.
#[derive(Clone, Debug)]
pub(super) struct Item<'a> {
    pub(super) mapping: &'a Mapping,
    pub(super) there: BorrowedFd<'a>,
    pub(super) back: BorrowedFd<'a>,
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

/// Why a mapping cannot be exchanged by anybody; `None` when it can.
pub(super) fn obstacle(mapping: &Mapping) -> Option<&'static str> {
    let flags = &mapping.flags;
    [
        (flags.sealed, "it is sealed (mseal)"),
        (
            flags.has_userfaultfd(),
            "a userfaultfd is registered for it",
        ),
        (flags.hugetlb, "it consists of huge pages"),
        (flags.io || flags.pfn_map, "it is memory of a device"),
        (
            flags.sync,
            "it is a synchronous mapping of persistent memory",
        ),
    ]
    .into_iter()
    .find_map(|(is_so, why)| is_so.then_some(why))
}

/// Exchanges the mappings; gives how many and the bytes copied.
///
/// What remains if we die in here: mappings of the program show one file or the other, with the same content; further mappings, at addresses
/// that it does not know of, may be left until it ends or calls `exec`.
pub(super) fn exchange(
    borrowed: &mut Borrowed<'_>,
    items: &mut [Item<'_>],
    way: Way,
    message: usize,
    deadline: Deadline,
) -> Result<(usize, u64), SwitchError> {
    let mut wanted: Vec<&mut Item<'_>> = items
        .iter_mut()
        .filter(|item| way == Way::There || item.is_touched)
        .collect();
    let (mut count, mut bytes) = (0, 0);
    for group in wanted.chunks_mut(GROUP.min(message.max(1))) {
        if deadline.passed() {
            return Err(SwitchError::Late {
                step: "exchange mappings",
            });
        }
        let places = make(borrowed, group, way, deadline)?;
        let filled = fill(borrowed, group, &places, deadline);
        match filled {
            Ok(copied) => bytes += copied,
            Err(error) => {
                forget(borrowed, group, &places, deadline);
                return Err(error);
            }
        }
        put(borrowed, group, &places, deadline)?;
        count += group.len();
        for item in group.iter_mut().filter(|_| way == Way::Back) {
            item.is_touched = false;
        }
    }
    Ok((count, bytes))
}

fn length(mapping: &Mapping) -> u64 {
    mapping.end.saturating_sub(mapping.start)
}

/// What the new mapping may be used for until it is put in place. Private pages with a content of their own were written while the
/// mapping was writable: making the new one so at first too counts its memory as the old one's is (`VM_ACCOUNT`). Not for code, where
/// security modules may refuse to make modified pages executable.
fn first_protection(mapping: &Mapping) -> i32 {
    let now = mapping.protection;
    if mapping.is_shared || now.write || now.execute || mapping.dirty.is_empty() {
        now.bits()
    } else {
        libc::PROT_READ | libc::PROT_WRITE
    }
}

/// Makes the new mappings somewhere.
fn make(
    borrowed: &mut Borrowed<'_>,
    group: &[&mut Item<'_>],
    way: Way,
    deadline: Deadline,
) -> Result<Vec<u64>, SwitchError> {
    let mut files: Vec<(MappedFileId, BorrowedFd<'_>)> = Vec::new();
    for item in group {
        if !files.iter().any(|(id, _)| *id == item.mapping.file) {
            files.push((item.mapping.file, item.source(way)));
        }
    }
    let sources: Vec<BorrowedFd<'_>> = files.iter().map(|(_, fd)| *fd).collect();
    let mut calls = vec![borrowed.receive_call(files.len())?];
    for item in group {
        let mapping = item.mapping;
        let index = files
            .iter()
            .position(|(id, _)| *id == mapping.file)
            .unwrap_or(0);
        let sharing = if mapping.is_shared {
            libc::MAP_SHARED
        } else {
            libc::MAP_PRIVATE
        };
        let reserve = if mapping.flags.no_reserve {
            libc::MAP_NORESERVE
        } else {
            0
        };
        let flags = u64::from((sharing | reserve).cast_unsigned());
        let protection = u64::from(first_protection(mapping).cast_unsigned());
        let call = Call::new(
            libc::SYS_mmap,
            &[0, length(mapping), protection, flags, 0, mapping.offset],
        );
        calls.push(call.fifth_is(borrowed.cell(index)).or_stop());
    }
    borrowed.run_sending(&sources, &mut calls, deadline)?;
    let mut close: Vec<Call> = borrowed.close_calls(files.len()).collect();
    borrowed.run(&mut close, deadline.or_at_least(super::UNDO_STEP))?;
    let mut results = calls.iter().map(Call::result);
    if !matches!(results.next(), Some(Some(Ok(_)))) {
        return Err(RemoteError::Truncated {
            pid: borrowed.pid(),
            sent: files.len(),
            got: 0,
        }
        .into());
    }
    let mut places = Vec::with_capacity(group.len());
    for (item, result) in group.iter().zip(results) {
        match result {
            Some(Ok(address)) => places.push(address),
            other => {
                forget(borrowed, group, &places, deadline);
                let errno = other.and_then(Result::err).unwrap_or(Errno::CANCELED);
                return Err(error(borrowed, item.mapping, "mmap", errno));
            }
        }
    }
    Ok(places)
}

fn error(
    borrowed: &Borrowed<'_>,
    mapping: &Mapping,
    call: &'static str,
    errno: Errno,
) -> SwitchError {
    SwitchError::Mapping {
        pid: borrowed.pid(),
        address: mapping.start,
        call,
        errno,
    }
}

/// Copies what is private to the program.
fn fill(
    borrowed: &mut Borrowed<'_>,
    group: &[&mut Item<'_>],
    places: &[u64],
    deadline: Deadline,
) -> Result<u64, SwitchError> {
    let mut copied = 0;
    let mut buffer = Vec::new();
    for (item, place) in group
        .iter()
        .zip(places)
        .filter(|(item, _)| !item.mapping.is_shared)
    {
        for AddressRange { start, end } in &item.mapping.dirty {
            let mut at = *start;
            while at < *end {
                if deadline.passed() {
                    return Err(SwitchError::Late {
                        step: "copy private pages",
                    });
                }
                borrowed.stay_awake(deadline)?;
                let now = (*end - at).min(COPY);
                buffer.resize(usize::try_from(now).unwrap_or(0), 0);
                borrowed.memory().read(at, &mut buffer)?;
                let to = place + (at - item.mapping.start);
                if first_protection(item.mapping) & libc::PROT_WRITE != 0 {
                    borrowed.memory().write(to, &buffer)?;
                } else {
                    borrowed.memory().force(to, &buffer)?;
                }
                copied += now;
                at += now;
            }
        }
    }
    Ok(copied)
}

/// Takes away new mappings that have not been put in place.
fn forget(
    borrowed: &mut Borrowed<'_>,
    group: &[&mut Item<'_>],
    places: &[u64],
    deadline: Deadline,
) {
    let mut calls: Vec<Call> = group
        .iter()
        .zip(places)
        .map(|(item, at)| Call::new(libc::SYS_munmap, &[*at, length(item.mapping)]))
        .collect();
    if let Err(error) = borrowed.run(&mut calls, deadline.or_at_least(super::UNDO_STEP)) {
        tracing::warn!(pid = borrowed.pid().as_raw(), %error, "mappings that were made for nothing are left behind");
    }
}

/// Moves the new mappings onto the old ones and says again what had been said about them.
fn put(
    borrowed: &mut Borrowed<'_>,
    group: &mut [&mut Item<'_>],
    places: &[u64],
    deadline: Deadline,
) -> Result<(), SwitchError> {
    let flags = u64::from((libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED).cast_unsigned());
    let mut calls = Vec::new();
    let mut owners = Vec::new();
    for (index, (item, at)) in group.iter_mut().zip(places).enumerate() {
        item.is_touched = true;
        let mapping = item.mapping;
        let size = length(mapping);
        let first = calls.len();
        if first_protection(mapping) != mapping.protection.bits() {
            let protection = u64::from(mapping.protection.bits().cast_unsigned());
            calls.push((
                "mprotect",
                Call::new(libc::SYS_mprotect, &[*at, size, protection]),
            ));
        }
        calls.push((
            "mremap",
            Call::new(libc::SYS_mremap, &[*at, size, size, flags, mapping.start]),
        ));
        said_about(mapping, &mut calls);
        owners.resize(owners.len() + calls.len() - first, index);
    }
    let mut batch: Vec<Call> = calls.iter().map(|(_, call)| call.or_stop()).collect();
    borrowed.run(&mut batch, deadline)?;
    for ((call, (name, _)), index) in batch.iter().zip(&calls).zip(&owners) {
        let result = call.result();
        if !matches!(result, Some(Ok(_))) {
            let errno = result.and_then(Result::err).unwrap_or(Errno::CANCELED);
            let moved = batch
                .iter()
                .zip(&calls)
                .filter(|(c, (n, _))| *n == "mremap" && matches!(c.result(), Some(Ok(_))))
                .count();
            let (rest, places) = (
                group.get(moved..).unwrap_or_default(),
                places.get(moved..).unwrap_or_default(),
            );
            forget(borrowed, rest, places, deadline);
            let mapping = group.get(*index).map(|item| item.mapping);
            return Err(mapping.map_or(SwitchError::Late { step: name }, |mapping| {
                error(borrowed, mapping, name, errno)
            }));
        }
    }
    Ok(())
}

/// The calls that give a mapping the properties that `smaps` showed.
fn said_about(mapping: &Mapping, calls: &mut Vec<(&'static str, Call)>) {
    let (start, size, flags) = (mapping.start, length(mapping), &mapping.flags);
    if mapping.protection_key != 0 {
        let protection = u64::from(mapping.protection.bits().cast_unsigned());
        let key = u64::from(mapping.protection_key);
        calls.push((
            "pkey_mprotect",
            Call::new(libc::SYS_pkey_mprotect, &[start, size, protection, key]),
        ));
    }
    let advices = [
        (flags.dont_fork, libc::MADV_DONTFORK),
        (flags.dont_dump, libc::MADV_DONTDUMP),
        (flags.huge_page, libc::MADV_HUGEPAGE),
        (flags.no_huge_page, libc::MADV_NOHUGEPAGE),
        (flags.sequential, libc::MADV_SEQUENTIAL),
        (flags.random, libc::MADV_RANDOM),
        (flags.mergeable, libc::MADV_MERGEABLE),
        (flags.wipe_on_fork, libc::MADV_WIPEONFORK),
    ];
    for (is_set, advice) in advices {
        if is_set {
            calls.push((
                "madvise",
                Call::new(
                    libc::SYS_madvise,
                    &[start, size, u64::from(advice.cast_unsigned())],
                ),
            ));
        }
    }
    for guard in &mapping.guards {
        let size = guard.end.saturating_sub(guard.start);
        calls.push((
            "madvise",
            Call::new(libc::SYS_madvise, &[guard.start, size, MADV_GUARD_INSTALL]),
        ));
    }
    if flags.locked_on_fault {
        calls.push((
            "mlock2",
            Call::new(libc::SYS_mlock2, &[start, size, MLOCK_ONFAULT]),
        ));
    } else if flags.locked {
        calls.push(("mlock", Call::new(libc::SYS_mlock, &[start, size])));
    }
}
