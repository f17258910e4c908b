//! One address space: which of its mappings are of the volume's files.
//!
//! Invariant: a mapping is listed with the properties of one look at `smaps` whose line equals the one in `maps`, or not at all;
//! of a running process some may therefore be missing, of a stopped one none.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::facts::{self, Identity};
use super::{
    AddressSpace, CensusError, FileFacts, MappedFile, MappedFileId, Mapping, Member, NotCovered,
    SpaceId, Volume,
};
use crate::ids::{Device, Pid};
use crate::proc::maps::{self, MapEntry, SmapsEntry};
use crate::proc::pagemap::{PageMap, Pages};
use crate::proc::status;

/// Resident memory above which a re-scan does not read `smaps` again, in KiB. The kernel visits every page for it (about 5 ms
/// for this much), and the target stands still meanwhile.
const RESIDENT_LIMIT_KIB: u64 = 512 << 10;

/// The mapped files of a census, one per file, mount and access.
#[derive(Debug, Default)]
pub(super) struct MappedFiles {
    pub(super) files: Vec<MappedFile>,
    next: u32,
}

impl MappedFiles {
    fn find(&self, identity: Identity, is_writable: bool) -> Option<MappedFileId> {
        let found = self
            .files
            .iter()
            .find(|f| f.facts.identity() == identity && f.is_writable == is_writable);
        found.map(|f| f.id)
    }

    fn add(&mut self, facts: FileFacts, is_writable: bool, kept: OwnedFd) -> MappedFileId {
        let id = MappedFileId(self.next);
        self.next += 1;
        self.files.push(MappedFile {
            id,
            facts,
            is_writable,
            kept,
        });
        id
    }
}

/// Looks at the memory of a thread. `before` is what an earlier look at the same space found.
pub(super) fn look(
    id: SpaceId,
    member: Member,
    before: Option<&AddressSpace>,
    volume: Volume<'_>,
    files: &mut MappedFiles,
    not_covered: &mut Vec<NotCovered>,
) -> Result<AddressSpace, CensusError> {
    let mut space = AddressSpace {
        id,
        processes: Vec::new(),
        mappings: Vec::new(),
    };
    let pid = through(member);
    let entries = maps::of_process(pid)?;
    let mut seen: HashMap<(Device, u64, &[u8]), Option<FileFacts>> = HashMap::new();
    let mut wanted: Vec<(&MapEntry, FileFacts)> = Vec::new();
    for entry in entries.iter().filter(|e| e.has_file()) {
        if entry.name.starts_with(b"/[aio]") {
            not_covered.push(NotCovered::Aio {
                space: id,
                address: entry.start,
            });
            continue;
        }
        let key = (entry.device, entry.inode, entry.name.as_slice());
        let facts = match seen.get(&key) {
            Some(known) => known.clone(),
            None => {
                let found = facts_of(pid, entry)?.filter(|facts| volume(facts));
                seen.insert(key, found.clone());
                found
            }
        };
        if let Some(facts) = facts {
            wanted.push((entry, facts));
        }
    }
    if wanted.is_empty() {
        return Ok(space);
    }
    let properties = properties(pid, before)?;
    let pagemap = PageMap::open(pid)?;
    for (entry, facts) in wanted {
        let known = properties
            .get(&(entry.start, entry.end))
            .filter(|p| p.map == *entry)
            .cloned();
        let Some(known) = known else { continue };
        // `mw` on a shared mapping is what is left in memory of the descriptor's having been open for writing (mm/mmap.c,
        // `do_mmap`): without it the mapping may never become writable, and a read-only descriptor makes its like.
        let is_writable = entry.is_shared && known.flags.may_write;
        let file = match files.find(facts.identity(), is_writable) {
            Some(file) => file,
            None => match open(pid, entry, is_writable)? {
                Some((kept, identity)) if identity == facts.identity() => {
                    files.add(facts, is_writable, kept)
                }
                _ => continue,
            },
        };
        let range = super::AddressRange {
            start: entry.start,
            end: entry.end,
        };
        let pages = if entry.is_shared {
            Pages::default()
        } else {
            pagemap.scan(range)?
        };
        space.mappings.push(Mapping {
            start: entry.start,
            end: entry.end,
            offset: entry.offset,
            protection: entry.protection,
            is_shared: entry.is_shared,
            flags: known.flags,
            protection_key: known.protection_key,
            file,
            dirty: pages.own,
            guards: pages.guards,
            map: entry.clone(),
        });
    }
    Ok(space)
}

/// The directory of /proc in which the memory of a thread is seen: its own, which exists though it is not listed
/// (fs/proc/base.c, `proc_pid_lookup`). That of the process is empty once its first thread has ended.
fn through(member: Member) -> Pid {
    Pid::new(member.tid.as_raw()).unwrap_or(member.pid)
}

/// What `smaps` says, by range. A process with much memory is asked once only: the mappings that it had then are taken to have the
/// flags they had, and just a space with a mapping that is new is read again.
fn properties(
    pid: Pid,
    before: Option<&AddressSpace>,
) -> Result<HashMap<(u64, u64), SmapsEntry>, CensusError> {
    if let Some(before) = before.filter(|b| !b.mappings.is_empty())
        && status::of_process(pid)?.resident_kib > RESIDENT_LIMIT_KIB
    {
        let known: HashMap<_, _> = before
            .mappings
            .iter()
            .map(|m| {
                let entry = SmapsEntry {
                    map: m.map.clone(),
                    flags: m.flags,
                    protection_key: m.protection_key,
                };
                ((m.start, m.end), entry)
            })
            .collect();
        let now = maps::of_process(pid)?;
        let names: Vec<&[u8]> = known.values().map(|e| e.map.name.as_slice()).collect();
        let is_complete = now
            .iter()
            .filter(|e| e.has_file() && names.contains(&e.name.as_slice()))
            .all(|e| known.get(&(e.start, e.end)).is_some_and(|k| k.map == *e));
        if is_complete {
            return Ok(known);
        }
    }
    let entries = maps::smaps_of_process(pid)?;
    Ok(entries
        .into_iter()
        .map(|e| ((e.map.start, e.map.end), e))
        .collect())
}

fn link_path(pid: Pid, entry: &MapEntry) -> PathBuf {
    PathBuf::from(format!(
        "/proc/{pid}/map_files/{:x}-{:x}",
        entry.start, entry.end
    ))
}

fn facts_of(pid: Pid, entry: &MapEntry) -> Result<Option<FileFacts>, CensusError> {
    let path = link_path(pid, entry);
    let name = CString::new(path.as_os_str().as_encoded_bytes()).unwrap_or_default();
    let read = facts::link(rustix::fs::CWD.as_fd(), &name, Vec::new())
        .and_then(|link| Ok((link, facts::through_link(rustix::fs::CWD.as_fd(), &name)?)));
    match read {
        Ok((link, _)) if !link.starts_with(b"/") => Ok(None),
        Ok((link, attributes)) => Ok(Some(facts::assemble(pid, &link, attributes, false))),
        // Unmapped meanwhile.
        Err(Errno::NOENT | Errno::SRCH) => Ok(None),
        Err(errno) => Err(CensusError::from_errno(&path, pid, errno)),
    }
}

/// Opens what is mapped. Without O_NONBLOCK a lease that an outsider holds would make us wait for him.
fn open(
    pid: Pid,
    entry: &MapEntry,
    is_writable: bool,
) -> Result<Option<(OwnedFd, Identity)>, CensusError> {
    let path = link_path(pid, entry);
    let access = if is_writable {
        OFlags::RDWR
    } else {
        OFlags::RDONLY
    };
    let flags = access | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    let opened = match rustix::fs::open(&path, flags, Mode::empty()) {
        // The server of its filesystem is dead. A place in the tree can be had without asking it; it serves to know the file, not to map it again.
        Err(Errno::NOTCONN | Errno::CONNABORTED) => {
            rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        }
        opened => opened,
    };
    let opened = opened
        .and_then(|file| facts::of_descriptor(&file).map(|attributes| (file, attributes.identity)));
    match opened {
        Ok(opened) => Ok(Some(opened)),
        Err(Errno::NOENT | Errno::SRCH) => Ok(None),
        Err(errno) => Err(CensusError::from_errno(&path, pid, errno)),
    }
}

/// The program file of a thread, when it belongs to the volume.
pub(super) fn executable(
    member: Member,
    volume: Volume<'_>,
) -> Result<Option<FileFacts>, CensusError> {
    let pid = through(member);
    let path = PathBuf::from(format!("/proc/{pid}/exe"));
    let name = CString::new(path.as_os_str().as_encoded_bytes()).unwrap_or_default();
    let read = facts::link(rustix::fs::CWD.as_fd(), &name, Vec::new())
        .and_then(|link| Ok((link, facts::through_link(rustix::fs::CWD.as_fd(), &name)?)));
    match read {
        Ok((link, attributes)) => {
            Ok(Some(facts::assemble(pid, &link, attributes, false)).filter(|f| volume(f)))
        }
        // Threads of the kernel have no program, and neither has a process that just ended.
        Err(Errno::NOENT | Errno::SRCH) => Ok(None),
        Err(errno) => Err(CensusError::from_errno(&path, pid, errno)),
    }
}
