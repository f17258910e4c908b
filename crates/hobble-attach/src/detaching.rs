//! The way out: from a target on the hook to a native one, while the server lives.
//!
//! Invariants: rules are off and every delayed operation is carried out before anything else is done; every open file gets back the very description it
//! came from, or the backing description that served it, so positions, flags and locks stay; a failed exchange leaves everything on the hook, which goes
//! on working, and recovery can be tried again. Everybody who holds something of the hook is moved, targets or not.
//!
//! Length: one transaction, whose order is the point: reading it in pieces would hide what undoes what.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use hobble_api::status::{NotCovered as NotCoveredStatus, Scope};
use hobble_graft::census::{
    self, Census, DescriptionId, DescriptionLock, FsId, MappedFileId, TableId,
};
use hobble_graft::ids::ProcessId;
use hobble_graft::proc::locks::{FileLock, LockClass, LockKind};
use hobble_graft::stop::{Deadline, Tracer};
use hobble_graft::switch::Switch;
use hobble_mirror::adopt::HandleInfo;
use hobble_mirror::locks::{self, LockHolder, LockRange, OwnerId};

use crate::attaching::{StopWatch, Traced, no_hook, stop_failed, who};
use crate::bystanders::{Bystanders, Rounds};
use crate::engine::{Engine, GivenBack};
use crate::error::{AttachError, Step};
use crate::fault_point;
use crate::hook::Hook;
use crate::journal::{PosixLock, Record};
use crate::journaling::Steps;
use crate::ledger;
use crate::lock_keeper::{Outwards, lockable, must_stay};
use crate::preflight::chain;
use crate::sighting;
use crate::slices::{self, Slice};

/// Recovery may stop the target for longer than an attach: not to recover is worse.
const LEAST_PAUSE: Duration = Duration::from_secs(2);
/// The round from which on that is done: whoever was in a long call has had time to leave it.
const PATIENT_FROM: u32 = 4;
/// How often it is looked for what is still on the hook.
const ROUNDS: u32 = 10;
/// How long the kernel gets to let go of an unmounted filesystem that nobody is seen to hold.
const LET_GO: Duration = Duration::from_secs(2);

/// The processes that hold something of the hook, and what of a slice of it.
fn holders(
    hook: &Hook,
    bystanders: &Bystanders,
    slice: &Slice,
) -> Result<(Vec<ProcessId>, Census), AttachError> {
    let device = hook.device();
    let on_hook = |facts: &census::FileFacts| facts.device == device && slice.holds(facts);
    let failed = |error| {
        AttachError::new(Step::Census, "it cannot be found out who is on the hook").because(error)
    };
    let mut all = sighting::holders(device);
    all.retain(|process| !bystanders.contains(process));
    let census = census::take(&all, &on_hook).map_err(failed)?;
    Ok((all, census))
}

/// What goes back where.
struct Returns<'c> {
    switch: Switch<'c>,
    owners: BTreeMap<(TableId, DescriptionId), OwnerId>,
    given: Vec<HandleInfo>,
    positions: BTreeMap<i32, ledger::Entry>,
    /// Locks that are about to be handed over, for the journal.
    posix: Vec<PosixLock>,
    stays: Vec<NotCoveredStatus>,
    moves: usize,
}

impl Engine {
    /// Takes the target off the hook. With `force` nothing is left on it, even where a program's own idea of its locks may suffer.
    pub(crate) fn detach(&mut self, force: bool) -> Result<GivenBack, AttachError> {
        let Some(hook) = self.hook.as_ref() else {
            return Ok(GivenBack::default());
        };
        hook.disarm();
        hook.set_plan(None, Instant::now());
        hook.quiesce();
        let mut given = GivenBack::default();
        let result =
            Tracer::scope(|tracer| self.move_out(tracer, force, &mut given).map_err(Traced));
        if let Some(hook) = self.hook.as_ref() {
            hook.unquiesce();
        }
        result.map_err(|Traced(error)| error)?;
        let Some(hook) = self.hook.as_mut() else {
            return Err(no_hook());
        };
        hook.close_mount();
        given.left.extend_from_slice(hook.leftovers());
        if given.left.is_empty() && !hook.wait_end(LET_GO) {
            let unseen = "something that cannot be seen still holds it: a descriptor in flight, a mount in another namespace, a running program file".to_owned();
            given.left.push(NotCoveredStatus {
                what: "the hook".to_owned(),
                reason: unseen,
                pid: None,
            });
        }
        Ok(given)
    }

    fn move_out(
        &mut self,
        tracer: &Tracer,
        force: bool,
        given: &mut GivenBack,
    ) -> Result<(), AttachError> {
        let mut immovable: Vec<NotCoveredStatus> = Vec::new();
        let mut bystanders = Bystanders::default();
        let mut rounds = Rounds::new(ROUNDS);
        // What does not fit into one exchange goes back in slices, while the mount stays where it is, until the rest does.
        // Files with locks go last: a process that opens one anew must meet its own lock on the side where it is.
        let (mut from, mut with_locked) = (Some(0), false);
        while let Some(round) = rounds.begin() {
            let Some(hook) = self.hook.as_ref() else {
                return Err(no_hook());
            };
            let open = hook.mirror().open_files();
            let size = slices::outwards(open);
            if size < open && from.is_none() && !with_locked {
                (from, with_locked) = (Some(0), true);
            }
            let slice = match from {
                Some(from) if size < open => Slice::next(from, size, open),
                _ => Slice::whole(),
            };
            let choice = Choice {
                force,
                without_locked: !slice.is_whole() && !with_locked,
            };
            let (processes, mut census) = holders(hook, &bystanders, &slice)?;
            // Asked for while the target runs: each costs round trips through the hook.
            let mut known = Known::default();
            known.learn(hook, &census)?;
            let stays = staying(hook, &census, &known, choice);
            let moves = census.descriptions().len() - stays.len()
                + census.mapped_files().len()
                + census
                    .fs_structs()
                    .iter()
                    .filter(|fs| fs.cwd.is_some() || fs.root.is_some())
                    .count();
            if moves == 0 && !slice.is_whole() {
                from = slice.end();
                rounds.again();
                continue;
            }
            if moves <= immovable.len() && !hook.is_placed() && slice.is_whole() {
                given.left = left(hook, &census, &stays);
                given.left.append(&mut immovable);
                given.left.extend(bystanders.into_left());
                return Ok(());
            }
            if moves == 0 {
                // Nobody has to be stopped to take away a mount that nobody is on.
                self.unmount()?;
                continue;
            }
            if let Err(error) = self.journal.append(&Record::Stopping {
                processes: processes.iter().map(|process| who(*process)).collect(),
            }) {
                tracing::warn!(%error, "the journal does not tell of the stop");
            }
            // Every description is given back through one more descriptor of ours.
            census.prepare_rescan(slices::SPARE + moves);
            // What is given back is found by descriptor.
            census.overlook_renames();
            let budget = Duration::from_micros(self.config.max_pause_us);
            let budget = if round < PATIENT_FROM {
                budget
            } else {
                budget.max(LEAST_PAUSE)
            };
            let deadline = Deadline::after(budget);
            let mut watch = StopWatch::start();
            let mut stopped = match tracer.stop_all(&processes, deadline) {
                Ok(stopped) => stopped,
                Err(error) => {
                    let is_target = |process| self.is_target(process);
                    if bystanders.leave_out(&error, &processes, is_target) {
                        rounds.left_out(1);
                    }
                    if rounds.is_last() {
                        return Err(stop_failed(Step::Recover, error));
                    }
                    tracing::info!(
                        error = chain(&error),
                        "not everybody could be stopped; trying again"
                    );
                    // A pause between two tries: nothing announces that a thread could be stopped now.
                    std::thread::sleep(Duration::from_millis(20 * u64::from(round + 1)));
                    continue;
                }
            };
            watch.lap("stop");
            fault_point::pass("recover-stopped");
            let device = hook.device();
            census
                .rescan(stopped.processes(), &|facts| {
                    facts.device == device && slice.holds(facts)
                })
                .map_err(|error| {
                    AttachError::new(Step::Recover, "the stopped target cannot be looked into")
                        .because(error)
                })?;
            watch.lap("census");
            known.learn(hook, &census)?;
            let mut returns = returns(hook, &census, &known, choice)?;
            hook.stop_flushing(returns.stays.is_empty() && slice.is_whole());
            watch.lap("originals");
            let mut keeper = Outwards::new(hook, &returns.owners);
            let posix = std::mem::take(&mut returns.posix);
            if let Err(error) = self.journal.append(&Record::Locks { posix }) {
                tracing::warn!(%error, "the journal does not tell of the locks");
            }
            let applied = returns.switch.apply(
                &mut stopped,
                deadline,
                &mut Steps {
                    journal: &mut self.journal,
                    positions: Some((&self.ledger, &returns.positions)),
                },
                &mut keeper,
            );
            match applied {
                Ok(report) => {
                    self.tell_exchanged();
                    fault_point::pass("recover-grafted");
                    immovable = report
                        .not_moved
                        .iter()
                        .map(crate::attaching::not_moved)
                        .collect();
                    watch.lap("exchange");
                    given.stops += 1;
                    given.descriptors += report.descriptors as u64;
                    given.mappings += report.mappings as u64;
                    if !slice.is_whole() {
                        let released = stopped.release();
                        watch.lap("release");
                        watch.tell();
                        given.pause = given.pause.max(released.stood_still);
                        from = slice.end();
                        rounds.again();
                        continue;
                    }
                    // Its copies in other namespaces are looked for when the target runs again: that takes longer than all of this.
                    let taken = self.hook.as_mut().map_or(Ok(()), Hook::take_off);
                    watch.lap("unmount");
                    let released = stopped.release();
                    watch.lap("release");
                    watch.tell();
                    given.pause = given.pause.max(released.stood_still);
                    taken.and_then(|()| self.unmount())?;
                    given.left = returns.stays;
                }
                Err(failed) => {
                    hook.stop_flushing(false);
                    for info in &returns.given {
                        if let Some(handle) = info.handle {
                            let _ = hook.mirror().keep(handle);
                        }
                    }
                    drop(stopped);
                    if failed.rolled_back {
                        self.tell_exchanged();
                    }
                    let error = AttachError::new(
                        Step::Recover,
                        "the target's files could not be given back",
                    );
                    let rolled_back = failed.rolled_back;
                    let error = error.because(failed).hinting("it goes on working through the hook, without faults; try `hobble recover` again");
                    if !rolled_back {
                        return Err(error.needing_recovery());
                    }
                    if rounds.is_last() {
                        return Err(error);
                    }
                    tracing::info!(
                        cause = error.cause_chain(),
                        "giving back failed; trying again"
                    );
                    // A pause between two tries: nothing announces that a thread could be stopped now.
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
        Err(AttachError::new(
            Step::Recover,
            "processes come to the hook faster than they can be taken off it",
        ))
    }

    /// Whether a process is among those that the attachment is for.
    pub(crate) fn is_target(&self, process: ProcessId) -> bool {
        match self.config.scope {
            Scope::Tree => self.targets.contains(process.pid.as_raw()),
            Scope::Namespace => crate::attaching::namespace_of(self.config.pid, self.config.own())
                .contains(&process.pid.as_raw()),
        }
    }

    /// Tells the journal that what it says of locks on their way is over.
    pub(crate) fn tell_exchanged(&mut self) {
        if let Err(error) = self.journal.append(&Record::Exchanged) {
            tracing::warn!(%error, "the journal does not tell that the exchange is complete");
        }
    }

    fn unmount(&mut self) -> Result<(), AttachError> {
        let Some(hook) = self.hook.as_mut() else {
            return Err(no_hook());
        };
        hook.remove()?;
        fault_point::pass("unmounted");
        Ok(())
    }
}

/// What the things that are held turned out to be.
#[derive(Default)]
struct Known {
    descriptions: BTreeMap<DescriptionId, HandleInfo>,
    files: BTreeMap<MappedFileId, HandleInfo>,
    /// By inode as well: an id stays while its directory changes.
    directories: BTreeMap<(FsId, bool, u64), HandleInfo>,
}

impl Known {
    /// Asks about what is new in a census.
    fn learn(&mut self, hook: &Hook, census: &Census) -> Result<(), AttachError> {
        let mirror = hook.mirror();
        let failed = |facts: &census::FileFacts| {
            let path = facts.path.display().to_string();
            move |error: std::io::Error| {
                AttachError::io(
                    Step::Recover,
                    format!("find what {path} on the hook came from"),
                    error,
                )
            }
        };
        for description in census.descriptions() {
            if let Entry::Vacant(new) = self.descriptions.entry(description.id) {
                new.insert(
                    mirror
                        .identify(description.kept.as_fd())
                        .map_err(failed(&description.facts))?,
                );
            }
        }
        for file in census.mapped_files() {
            if let Entry::Vacant(new) = self.files.entry(file.id) {
                new.insert(
                    mirror
                        .identify(file.kept.as_fd())
                        .map_err(failed(&file.facts))?,
                );
            }
        }
        for fs in census.fs_structs() {
            for (directory, is_root) in [(&fs.cwd, false), (&fs.root, true)] {
                let Some(directory) = directory else { continue };
                if let Entry::Vacant(new) =
                    self.directories
                        .entry((fs.id, is_root, directory.facts.inode))
                {
                    new.insert(
                        mirror
                            .identify(directory.kept.as_fd())
                            .map_err(failed(&directory.facts))?,
                    );
                }
            }
        }
        Ok(())
    }
}

/// What goes back in a round.
#[derive(Clone, Copy)]
struct Choice {
    /// Also what may make a program's own idea of its locks suffer.
    force: bool,
    /// Nothing of files on which there have been POSIX locks.
    without_locked: bool,
}

/// Which descriptions stay on the hook, until they are closed or until a later round.
fn staying(hook: &Hook, census: &Census, known: &Known, choice: Choice) -> BTreeSet<DescriptionId> {
    if choice.force && !choice.without_locked {
        return BTreeSet::new();
    }
    let stays = |info: &HandleInfo| {
        let seen = hook.mirror().has_seen_posix_locks(info.node);
        (seen && choice.without_locked) || (!choice.force && must_stay(info, seen))
    };
    census
        .descriptions()
        .map(|description| description.id)
        .filter(|id| known.descriptions.get(id).is_some_and(stays))
        .collect()
}

fn left(hook: &Hook, census: &Census, stays: &BTreeSet<DescriptionId>) -> Vec<NotCoveredStatus> {
    census
        .descriptions()
        .filter(|description| stays.contains(&description.id))
        .map(|description| {
            let table = description.places.first().map(|place| place.table);
            let member = census.tables().iter().find(|known| Some(known.id) == table).and_then(|known| known.members.first());
            // Once the hook is unmounted the kernel prints paths from the hook's own root.
            let relative = hook.ground().relative(&description.facts.path);
            NotCoveredStatus {
                what: format!(
                    "descriptor {} of {}/{}",
                    description.places.first().map_or(-1, |place| place.fd.as_raw()),
                    String::from_utf8_lossy(hook.ground().absolute()),
                    String::from_utf8_lossy(&relative)
                ),
                reason: "it was opened while attached and the file has POSIX locks: it is served without faults until it is closed; --force gives it back at once".to_owned(),
                pid: member.and_then(|member| u32::try_from(member.pid.as_raw()).ok()),
            }
        })
        .collect()
}

/// Finds for everything on the hook what it came from.
fn returns<'c>(
    hook: &Hook,
    census: &'c Census,
    known: &Known,
    choice: Choice,
) -> Result<Returns<'c>, AttachError> {
    let mirror = hook.mirror();
    let stays = staying(hook, census, known, choice);
    let held = mirror.with_locks(|locks| locks.held());
    let mut found = HashSet::new();
    let mut returns = Returns {
        switch: Switch::new(census),
        owners: BTreeMap::new(),
        given: Vec::new(),
        positions: BTreeMap::new(),
        posix: Vec::new(),
        stays: left(hook, census, &stays),
        moves: 0,
    };
    let failed = |path: &std::path::Path| {
        let path = path.display().to_string();
        move |error: std::io::Error| {
            AttachError::io(
                Step::Recover,
                format!("give back what {path} on the hook came from"),
                error,
            )
        }
    };
    for description in census
        .descriptions()
        .filter(|description| !stays.contains(&description.id))
    {
        let Some(info) = known.descriptions.get(&description.id) else {
            continue;
        };
        let original = mirror
            .give_back(info)
            .map_err(failed(&description.facts.path))?;
        let owners = &mut returns.owners;
        let locks = posix_locks(census, description, info, &held, owners, &mut found);
        if !locks.is_empty() {
            let stat = rustix::fs::fstat(&original)
                .map_err(|errno| failed(&description.facts.path)(std::io::Error::from(errno)))?;
            returns.posix.extend(crate::lock_keeper::for_journal(
                census,
                &locks,
                stat.st_dev,
                stat.st_ino,
            ));
            returns.switch.locks(description.id, locks);
        }
        if let Some(number) = info.adopted.and_then(|id| mirror.original_number(id)) {
            let position = description.position;
            returns
                .positions
                .insert(number, ledger::Entry::Kept { position });
        }
        returns.switch.description(description.id, original);
        returns.given.push(*info);
        returns.moves += 1;
    }
    for file in census.mapped_files() {
        let Some(info) = known.files.get(&file.id) else {
            continue;
        };
        returns.switch.mapped_file(
            file.id,
            mirror.give_back(info).map_err(failed(&file.facts.path))?,
        );
        returns.given.push(*info);
        returns.moves += 1;
    }
    for fs in census.fs_structs() {
        for (directory, is_root) in [(&fs.cwd, false), (&fs.root, true)] {
            let Some(directory) = directory else { continue };
            let Some(info) = known
                .directories
                .get(&(fs.id, is_root, directory.facts.inode))
            else {
                continue;
            };
            let original = mirror
                .give_back(info)
                .map_err(failed(&directory.facts.path))?;
            if is_root {
                returns.switch.root_directory(fs.id, original)
            } else {
                returns.switch.working_directory(fs.id, original)
            }
            returns.moves += 1;
        }
    }
    Ok(returns)
}

/// The POSIX locks that the tables of a description hold on its file through the hook and that can be taken through it: the kernel does not show them with a FUSE
/// file. Each is named with one description only, the first that will do, which `found` remembers.
///
/// A process may hold some as the owner that its moved descriptors are to the hook, and others as the one that descriptors opened since are. To the kernel it is
/// one owner, which comes to hold all of them: two owners never hold the same byte unless both share it (the hook's lock table), so none is lost to another.
fn posix_locks(
    census: &Census,
    description: &census::Description,
    info: &HandleInfo,
    held: &[LockHolder],
    owners: &mut BTreeMap<(TableId, DescriptionId), OwnerId>,
    found: &mut HashSet<(TableId, OwnerId, bool)>,
) -> Vec<DescriptionLock> {
    let mut locks = Vec::new();
    let kinds = lockable(description.flags.access());
    for holder in held.iter().filter(|holder| {
        !holder.ofd && holder.owner.node() == info.node && holder.class == info.class
    }) {
        let table = description
            .places
            .iter()
            .map(|place| place.table)
            .find(|table| {
                census
                    .tables()
                    .iter()
                    .filter(|known| known.id == *table)
                    .any(|known| {
                        known.members.iter().any(|member| {
                            u32::try_from(member.pid.as_raw()).is_ok_and(|pid| pid == holder.pid)
                        })
                    })
            });
        let Some(table) = table else { continue };
        for is_write in kinds {
            let ranges = holder
                .ranges
                .iter()
                .filter(|range| (range.kind == locks::LockKind::Write) == *is_write);
            if !found.insert((table, holder.owner, *is_write)) {
                continue;
            }
            owners.insert((table, description.id), holder.owner);
            locks.extend(ranges.map(|range| DescriptionLock {
                lock: held_lock(*range),
                table: Some(table),
            }));
        }
    }
    locks
}

fn held_lock(lock: locks::RangeLock) -> FileLock {
    let kind = match lock.kind {
        locks::LockKind::Read => LockKind::Read,
        locks::LockKind::Write => LockKind::Write,
    };
    let end = (lock.range.end < LockRange::OPEN_END).then_some(lock.range.end);
    FileLock {
        class: LockClass::Posix,
        kind,
        pid: None,
        inode: None,
        start: lock.range.start,
        end,
    }
}
