//! The scan: one pass over everything, which is both the first census and every later one.
//!
//! Order: who shares what, then tables, directories and memory. A process that ends at any point is left out in the end, with
//! all that only it had.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use super::FileFacts;
use super::descriptions::Changes;
use super::facts::Identity;
use super::slots::{BATCH, Found, Known, Note, TableReader};
use super::{
    Census, CensusError, DescriptionId, Difference, FsId, FsStruct, Member, NotCovered, Place,
    Process, SpaceId, Special, Table, TableId, Thread, Volume, directories, groups, memory,
};
use crate::ids::{Fd, Pid, ProcessId};
use crate::proc::ProcError;
use crate::proc::locks::LockClass;

/// What the slots of one table referred to when they were last looked at.
pub(super) type Slots = BTreeMap<Fd, Slot>;

/// What one slot referred to.
#[derive(Debug)]
pub(super) enum Slot {
    Description(DescriptionId),
    Other {
        link: Vec<u8>,
        identity: Option<Identity>,
        special: Option<FileFacts>,
        note: Option<Note>,
    },
}

impl Slot {
    pub(super) fn is_ring(&self) -> bool {
        matches!(self, Self::Other { link, .. } if link == b"anon_inode:[io_uring]")
    }
}

/// Ids that were not yet given.
#[derive(Debug, Default)]
pub(super) struct Ids {
    table: u32,
    fs: u32,
    space: u32,
}

/// The latest tables whose slots are tried as guesses for the next.
const TABLES_TO_GUESS_FROM: usize = 4;

fn take_id(next: &mut u32) -> u32 {
    let id = *next;
    *next += 1;
    id
}

/// One object of the kernel, with the id it had or gets, and who uses it.
type Grouped<I> = Vec<(I, Vec<Member>)>;

/// Gives groups the ids of the groups that their first known member was in. Which of two halves of a split group keeps the id does
/// not matter: what the id stands for is compared slot by slot afterwards.
fn with_ids<I: Copy + Ord>(
    groups: Vec<Vec<Member>>,
    before: &BTreeMap<Member, I>,
    mut new: impl FnMut() -> I,
) -> Grouped<I> {
    let mut taken = BTreeSet::new();
    let mut out: Grouped<I> = groups
        .into_iter()
        .map(|members| {
            let old = members
                .iter()
                .filter_map(|m| before.get(m))
                .find(|id| !taken.contains(*id));
            let id = old.copied().unwrap_or_else(&mut new);
            taken.insert(id);
            (id, members)
        })
        .collect();
    out.sort_unstable_by_key(|(id, _)| *id);
    out
}

pub(super) fn rescan(
    census: &mut Census,
    processes: &[ProcessId],
    volume: Volume<'_>,
) -> Result<Difference, CensusError> {
    let mut difference = Difference::default();
    let structure_before = (
        census.processes.clone(),
        census.tables.iter().map(|t| t.id).collect::<Vec<_>>(),
    );

    let living = groups::living(processes)?;
    let members: Vec<Member> = living.values().flatten().copied().collect();
    let by_table = groups::partition(&members, groups::TABLES)?;
    let members: Vec<Member> = sorted(&by_table);
    let by_fs = groups::partition(&members, groups::DIRECTORIES)?;
    let members: Vec<Member> = sorted(&by_fs);
    let by_space = groups::partition(&members, groups::SPACES)?;

    let tables_before = owners(census.tables.iter().map(|t| (t.id, t.members.as_slice())));
    let mut tables = with_ids(by_table, &tables_before, || {
        TableId(take_id(&mut census.next.table))
    });
    let fs_before = owners(census.fs.iter().map(|f| (f.id, f.members.as_slice())));
    let mut fs = with_ids(by_fs, &fs_before, || FsId(take_id(&mut census.next.fs)));
    let space_before: BTreeMap<Pid, SpaceId> = census
        .spaces
        .iter()
        .flat_map(|s| s.processes.iter().map(|pid| (*pid, s.id)))
        .collect();
    let space_before = members
        .iter()
        .filter_map(|m| Some((*m, *space_before.get(&m.pid)?)))
        .collect();
    let spaces = with_ids(by_space, &space_before, || {
        SpaceId(take_id(&mut census.next.space))
    });

    scan_tables(census, &mut tables, volume, &mut difference)?;
    scan_directories(census, &mut fs, volume, &mut difference)?;
    scan_spaces(census, &spaces, volume, &mut difference)?;

    // What is left of the processes: threads for which everything was found.
    let table_of = owners(census.tables.iter().map(|t| (t.id, t.members.as_slice())));
    let fs_of = owners(census.fs.iter().map(|f| (f.id, f.members.as_slice())));
    let space_of: BTreeMap<Pid, SpaceId> = census
        .spaces
        .iter()
        .flat_map(|s| s.processes.iter().map(|pid| (*pid, s.id)))
        .collect();
    census.processes = living
        .into_iter()
        .filter_map(|(id, members)| {
            let thread = |m: Member| {
                Some(Thread {
                    tid: m.tid,
                    table: *table_of.get(&m)?,
                    fs: *fs_of.get(&m)?,
                })
            };
            let threads: Vec<Thread> = members.into_iter().filter_map(thread).collect();
            let space = *space_of.get(&id.pid)?;
            (!threads.is_empty()).then_some(Process { id, threads, space })
        })
        .collect();

    let structure = (
        &census.processes,
        census.tables.iter().map(|t| t.id).collect::<Vec<_>>(),
    );
    difference.is_structural = structure != (&structure_before.0, structure_before.1);
    notes(census, volume)?;
    Ok(difference)
}

fn sorted(groups: &[Vec<Member>]) -> Vec<Member> {
    let mut members: Vec<Member> = groups.iter().flatten().copied().collect();
    members.sort_unstable();
    members
}

fn owners<'a, I: Copy>(groups: impl Iterator<Item = (I, &'a [Member])>) -> BTreeMap<Member, I> {
    groups
        .flat_map(|(id, members)| members.iter().map(move |m| (*m, id)))
        .collect()
}

/// Runs `work` with the members of a group until one of them lives long enough; `None` when none is left.
fn with_any<T>(
    members: &mut Vec<Member>,
    mut work: impl FnMut(Member) -> Result<T, CensusError>,
) -> Result<Option<T>, CensusError> {
    while let Some(member) = members.first().copied() {
        match work(member) {
            Ok(done) => return Ok(Some(done)),
            Err(error) if error.is_gone() => {
                members.remove(0);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Why the next member of a group is asked.
fn gone(Member { pid, tid }: Member) -> CensusError {
    CensusError::Proc(ProcError::Gone {
        path: PathBuf::from(format!("/proc/{pid}/task/{tid}")),
    })
}

fn scan_tables(
    census: &mut Census,
    groups: &mut Grouped<TableId>,
    volume: Volume<'_>,
    difference: &mut Difference,
) -> Result<(), CensusError> {
    census.descriptions.begin();
    census.tables.clear();
    let mut slots_before = std::mem::take(&mut census.slots);
    let prepared = std::mem::take(&mut census.prepared);
    let are_names_overlooked = census.are_names_overlooked;
    for (id, members) in groups.iter_mut() {
        let before = slots_before.remove(id).unwrap_or_default();
        let slots = with_any(members, |member| {
            let reader = TableReader::open(member, volume, prepared.get(id), are_names_overlooked)?;
            let slots = scan_table(census, *id, &reader, &before)?;
            if reader.is_valid()? {
                return Ok(slots);
            }
            census.descriptions.forget(*id);
            Err(gone(member))
        })?;
        let Some(slots) = slots else { continue };
        let highest = slots.last_key_value().map(|(fd, _)| *fd);
        let table = Table {
            id: *id,
            members: members.clone(),
            descriptors: slots.len(),
            highest,
        };
        census.tables.push(table);
        census.slots.insert(*id, slots);
    }
    census.prepared = prepared;
    let Changes {
        appeared,
        vanished,
        moved,
        changed,
    } = census.descriptions.finish();
    difference.appeared = appeared;
    difference.vanished = vanished;
    difference.moved = moved;
    difference.changed = changed;
    Ok(())
}

fn scan_table(
    census: &mut Census,
    id: TableId,
    reader: &TableReader<'_>,
    before: &Slots,
) -> Result<Slots, CensusError> {
    // Listing instantiates an entry for every descriptor, so the list of last time is tried first: when as many slots are in use
    // as then and none of those is empty, there is no other.
    let mut found = Slots::new();
    if reader.count() == Some(before.len()) {
        let known: Vec<Fd> = before.keys().copied().collect();
        look_and_merge(census, id, reader, before, &known, &mut found)?;
        if found.len() == before.len() {
            return Ok(found);
        }
    }
    let rest: Vec<Fd> = reader
        .list()?
        .into_iter()
        .filter(|fd| !found.contains_key(fd))
        .collect();
    look_and_merge(census, id, reader, before, &rest, &mut found)?;
    Ok(found)
}

/// What a slot that was not seen before may refer to: the same as that slot of a table that was just scanned, if processes have
/// inherited from one another. A right guess spares taking a descriptor only to close it again, which on a FUSE filesystem is
/// a request to the server each time; a wrong one costs a comparison.
fn guess(census: &Census, before: &Slots, fd: Fd) -> Option<Slot> {
    if before.contains_key(&fd) {
        return None;
    }
    census
        .slots
        .values()
        .rev()
        .take(TABLES_TO_GUESS_FROM)
        .find_map(|slots| match slots.get(&fd) {
            Some(Slot::Description(id)) => Some(Slot::Description(*id)),
            _ => None,
        })
}

fn look_and_merge(
    census: &mut Census,
    table: TableId,
    reader: &TableReader<'_>,
    before: &Slots,
    fds: &[Fd],
    slots: &mut Slots,
) -> Result<(), CensusError> {
    for batch in fds.chunks(BATCH) {
        let guesses: Vec<Option<Slot>> =
            batch.iter().map(|fd| guess(census, before, *fd)).collect();
        let expected = |n: usize, fd: &Fd| before.get(fd).or_else(|| guesses.get(n)?.as_ref());
        let questions: Vec<(Fd, Known<'_>)> = batch
            .iter()
            .enumerate()
            .map(|(n, fd)| {
                let known = match expected(n, fd) {
                    Some(Slot::Description(id)) => {
                        match (census.descriptions.get(*id), census.descriptions.stamp(*id)) {
                            (Some(d), Some(stamp)) => Known::Description {
                                kept: d.kept.as_fd(),
                                stamp,
                            },
                            _ => Known::Nothing,
                        }
                    }
                    Some(Slot::Other { link, identity, .. }) => Known::Other {
                        link,
                        identity: *identity,
                    },
                    None => Known::Nothing,
                };
                (*fd, known)
            })
            .collect();
        let answers = reader.look_at(&questions)?;
        drop(questions);
        for (n, (fd, answer)) in batch.iter().copied().zip(answers).enumerate() {
            if let Some(slot) = merge(census, table, fd, expected(n, &fd), answer)? {
                slots.insert(fd, slot);
            }
        }
    }
    Ok(())
}

fn merge(
    census: &mut Census,
    table: TableId,
    fd: Fd,
    before: Option<&Slot>,
    answer: Found,
) -> Result<Option<Slot>, CensusError> {
    Ok(match (answer, before) {
        (Found::Empty, _) => None,
        (Found::Same(Some(state), renamed), Some(Slot::Description(id))) => {
            let place = Place {
                table,
                fd,
                close_on_exec: state.info.close_on_exec(),
            };
            census.descriptions.seen(*id, place, state, renamed);
            Some(Slot::Description(*id))
        }
        (
            Found::Same(..),
            Some(Slot::Other {
                link,
                identity,
                special,
                note,
            }),
        ) => Some(Slot::Other {
            link: link.clone(),
            identity: *identity,
            special: special.clone(),
            note: note.clone(),
        }),
        // Cannot be: only what was expected can be the same. Taken as empty, and the count then asks for a full listing.
        (Found::Same(..), _) => None,
        (
            Found::Other {
                link,
                identity,
                special,
                note,
            },
            _,
        ) => Some(Slot::Other {
            link,
            identity,
            special,
            note,
        }),
        (
            Found::Description {
                stamp,
                facts,
                kept,
                state,
            },
            _,
        ) => {
            let place = Place {
                table,
                fd,
                close_on_exec: state.info.close_on_exec(),
            };
            let id = census
                .descriptions
                .insert(facts, stamp, kept, state.flags)
                .map_err(|errno| CensusError::compare(Pid::own(), errno))?;
            census.descriptions.seen(id, place, state, None);
            Some(Slot::Description(id))
        }
    })
}

fn scan_directories(
    census: &mut Census,
    groups: &mut Grouped<FsId>,
    volume: Volume<'_>,
    difference: &mut Difference,
) -> Result<(), CensusError> {
    let mut before: BTreeMap<FsId, FsStruct> = std::mem::take(&mut census.fs)
        .into_iter()
        .map(|f| (f.id, f))
        .collect();
    for (id, members) in groups.iter_mut() {
        let (mut cwd, mut root) = before.remove(id).map_or((None, None), |f| (f.cwd, f.root));
        let looked = with_any(members, |member| {
            let (cwd, cwd_changed) = directories::look(member, "cwd", cwd.take(), volume)?;
            let (root, root_changed) = directories::look(member, "root", root.take(), volume)?;
            Ok((cwd, root, cwd_changed || root_changed))
        })?;
        let Some((cwd, root, is_changed)) = looked else {
            continue;
        };
        if is_changed {
            difference.directories.push(*id);
        }
        census.fs.push(FsStruct {
            id: *id,
            members: members.clone(),
            cwd,
            root,
        });
    }
    Ok(())
}

fn scan_spaces(
    census: &mut Census,
    groups: &Grouped<SpaceId>,
    volume: Volume<'_>,
    difference: &mut Difference,
) -> Result<(), CensusError> {
    let before: BTreeMap<SpaceId, super::AddressSpace> = std::mem::take(&mut census.spaces)
        .into_iter()
        .map(|s| (s.id, s))
        .collect();
    census.not_covered.clear();
    for (id, members) in groups {
        let old = before.get(id);
        let mut left = members.clone();
        let found = with_any(&mut left, |member| {
            let mut aio = Vec::new();
            let space = memory::look(*id, member, old, volume, &mut census.mapped, &mut aio)?;
            // A thread that has lost its memory shows an empty one.
            if groups::is_exiting(member)? {
                return Err(gone(member));
            }
            census.not_covered.extend(aio);
            Ok(space)
        })?;
        let Some(mut space) = found else { continue };
        space.processes = left.iter().map(|m| m.pid).collect();
        space.processes.sort_unstable();
        space.processes.dedup();
        let mappings_before = old.map(|s| s.mappings.as_slice()).unwrap_or_default();
        if mappings_before != space.mappings {
            difference.spaces.push(*id);
        }
        census.spaces.push(space);
    }
    let used: BTreeSet<_> = census
        .spaces
        .iter()
        .flat_map(|s| s.mappings.iter().map(|m| m.file))
        .collect();
    census.mapped.files.retain(|file| used.contains(&file.id));
    Ok(())
}

/// Lists what is seen and not moved.
fn notes(census: &mut Census, volume: Volume<'_>) -> Result<(), CensusError> {
    census.specials.clear();
    for (table, slots) in &census.slots {
        for (fd, slot) in slots {
            let Slot::Other { special, note, .. } = slot else {
                continue;
            };
            let (table, fd) = (*table, *fd);
            if let Some(facts) = special {
                census.specials.push(Special {
                    facts: facts.clone(),
                    table,
                    fd,
                });
            }
            census
                .not_covered
                .extend(note.as_ref().map(|note| match note {
                    Note::InFlight(descriptors) => NotCovered::InFlight {
                        table,
                        fd,
                        descriptors: *descriptors,
                    },
                    Note::IoUring(files) => NotCovered::IoUring {
                        table,
                        fd,
                        files: *files,
                    },
                    Note::Inotify(watches) => NotCovered::Inotify {
                        table,
                        fd,
                        watches: watches.clone(),
                    },
                    Note::Fanotify => NotCovered::Fanotify { table, fd },
                }));
        }
    }
    for description in census.descriptions.all() {
        if description
            .locks
            .iter()
            .any(|l| matches!(l.lock.class, LockClass::Lease | LockClass::Delegation))
        {
            census.not_covered.push(NotCovered::Lease {
                description: description.id,
            });
        }
    }
    for process in &census.processes {
        let Some(thread) = process.threads.first() else {
            continue;
        };
        let facts = memory::executable(
            Member {
                pid: process.id.pid,
                tid: thread.tid,
            },
            volume,
        )?;
        census
            .not_covered
            .extend(facts.map(|facts| NotCovered::Executable {
                process: process.id.pid,
                facts,
            }));
    }
    Ok(())
}
