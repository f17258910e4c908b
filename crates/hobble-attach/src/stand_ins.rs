//! Stand-ins: what replaces the target's files, opened on the hook beforehand.
//!
//! Invariant: every stand-in is bound to the original it stands for before the target gets it; originals that are not taken over in the end are disowned, so
//! nothing is kept open for nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};

use hobble_api::status::NotCovered as NotCoveredStatus;
use hobble_graft::census::{self, Census, DescriptionId, Difference, FsId, MappedFileId};
use hobble_graft::ids::Pid;
use hobble_graft::switch::Switch;
use hobble_mirror::adopt::{AdoptedId, HandleId};

use crate::attaching::who;
use crate::hook::Hook;
use crate::journal::{Kept, Place};
use crate::ledger::Entry;
use crate::preflight::chain;

/// What replaces what the census found: opened on the hook, each bound to the original it stands for.
#[derive(Default)]
pub(crate) struct StandIns {
    descriptions: BTreeMap<DescriptionId, OwnedFd>,
    pub(crate) adopted: BTreeMap<DescriptionId, AdoptedId>,
    /// Our descriptors of the originals.
    numbers: BTreeMap<DescriptionId, i32>,
    files: BTreeMap<MappedFileId, OwnedFd>,
    directories: BTreeMap<(FsId, bool), OwnedFd>,
    /// Adopted for the sake of a stand-in only: mappings and directories keep their files themselves.
    passing: Vec<AdoptedId>,
    /// What could not be opened on the hook, and why: it stays native and is reported.
    pub(crate) failed: Vec<NotCoveredStatus>,
    /// How many descriptions those are.
    pub(crate) unopened: usize,
}

impl StandIns {
    /// Opens what is missing. Gives back the descriptions that are new, for the journal.
    pub(crate) fn complete(
        &mut self,
        hook: &Hook,
        census: &Census,
        mut each: impl FnMut(usize),
    ) -> Vec<Kept> {
        let mut kept = Vec::new();
        let mut opened = 0;
        self.failed.clear();
        self.unopened = 0;
        let mapped = mapped_shared(census);
        for description in census.descriptions() {
            if self.descriptions.contains_key(&description.id) {
                continue;
            }
            let found: Vec<Place> = description
                .places
                .iter()
                .flat_map(|place| places(census, *place))
                .collect();
            let pid = found
                .first()
                .and_then(|place| u32::try_from(place.who.pid).ok())
                .unwrap_or(0);
            match hook.stand_in_for(
                description,
                pid,
                mapped.contains(&file_of(&description.facts)),
            ) {
                Ok((holder_fd, id, stand_in)) => {
                    let (dev, ino) = (description.facts.device.raw(), description.facts.inode);
                    kept.push(Kept {
                        holder_fd,
                        dev,
                        ino,
                        places: found,
                    });
                    self.adopted.insert(description.id, id);
                    self.numbers.insert(description.id, holder_fd);
                    self.descriptions.insert(description.id, stand_in);
                }
                Err(error) => {
                    self.unopened += 1;
                    self.failed
                        .push(not_opened(&description.facts.path, &error));
                }
            }
            opened += 1;
            each(opened);
        }
        for file in census.mapped_files() {
            if self.files.contains_key(&file.id) {
                continue;
            }
            match hook.stand_in_for_mapping(file, mapped.contains(&file_of(&file.facts))) {
                Ok((id, stand_in)) => {
                    self.passing.push(id);
                    self.files.insert(file.id, stand_in);
                }
                Err(error) => self.failed.push(not_opened(&file.facts.path, &error)),
            }
            opened += 1;
            each(opened);
        }
        // Directories are opened every time: an id stays while its directory changes.
        self.directories.clear();
        for fs in census.fs_structs() {
            for (directory, is_root) in [(&fs.cwd, false), (&fs.root, true)] {
                let Some(directory) = directory else { continue };
                match hook.stand_in_for_directory(directory) {
                    Ok((id, stand_in)) => {
                        self.passing.push(id);
                        self.directories.insert((fs.id, is_root), stand_in);
                    }
                    Err(error) => self.failed.push(not_opened(&directory.facts.path, &error)),
                }
            }
        }
        kept
    }

    /// Where the originals are now, for the ledger.
    pub(crate) fn positions(&self, census: &Census) -> BTreeMap<i32, Entry> {
        self.descriptions
            .keys()
            .filter_map(|id| {
                let position = census.description(*id)?.position;
                Some((*self.numbers.get(id)?, Entry::Kept { position }))
            })
            .collect()
    }

    /// Forgets what a second look found gone.
    pub(crate) fn forget(&mut self, hook: &Hook, difference: &Difference) {
        for gone in &difference.vanished {
            self.descriptions.remove(&gone.id);
            if let Some(id) = self.adopted.remove(&gone.id) {
                hook.mirror().disown(id);
            }
        }
    }

    /// Handles of the stand-ins for files on which POSIX locks are held.
    pub(crate) fn locked_handles(
        &self,
        hook: &Hook,
        census: &Census,
    ) -> BTreeMap<(u64, u64), Vec<HandleId>> {
        let mut handles: BTreeMap<(u64, u64), Vec<HandleId>> = BTreeMap::new();
        for description in census
            .descriptions()
            .filter(|description| description.locks.iter().any(|held| held.table.is_some()))
        {
            let Some(stand_in) = self.descriptions.get(&description.id) else {
                continue;
            };
            if let Ok(info) = hook.mirror().identify(stand_in.as_fd())
                && let Some(handle) = info.handle
            {
                handles
                    .entry((description.facts.device.raw(), description.facts.inode))
                    .or_default()
                    .push(handle);
            }
        }
        handles
    }

    /// The exchange of everything that has a stand-in, which it takes.
    pub(crate) fn switch<'c>(&mut self, census: &'c Census) -> Switch<'c> {
        let mut switch = Switch::new(census);
        for (id, stand_in) in std::mem::take(&mut self.descriptions) {
            switch.description(id, stand_in);
        }
        for (id, stand_in) in std::mem::take(&mut self.files) {
            switch.mapped_file(id, stand_in);
        }
        for ((id, is_root), stand_in) in std::mem::take(&mut self.directories) {
            if is_root {
                switch.root_directory(id, stand_in)
            } else {
                switch.working_directory(id, stand_in)
            }
        }
        switch
    }

    /// After an exchange that did not happen: nothing stands in for anything, the originals need not be kept.
    pub(crate) fn disown_all(&mut self, hook: &Hook) {
        for (_, id) in std::mem::take(&mut self.adopted) {
            hook.mirror().disown(id);
        }
        self.disown_passing(hook);
    }

    /// After an exchange: the target has the originals through their stand-ins alone.
    pub(crate) fn replaced(&self, hook: &Hook) {
        for id in self.adopted.values() {
            hook.mirror().replaced(*id);
        }
    }

    /// After an exchange: mappings and directories hold what they need themselves.
    pub(crate) fn disown_passing(&mut self, hook: &Hook) {
        for id in std::mem::take(&mut self.passing) {
            hook.mirror().disown(id);
        }
    }
}

/// The files that are mapped shared, by device and inode.
fn mapped_shared(census: &Census) -> BTreeSet<(u64, u64)> {
    let shared: BTreeSet<MappedFileId> = census
        .spaces()
        .iter()
        .flat_map(|space| &space.mappings)
        .filter(|mapping| mapping.is_shared)
        .map(|mapping| mapping.file)
        .collect();
    census
        .mapped_files()
        .iter()
        .filter(|file| shared.contains(&file.id))
        .map(|file| file_of(&file.facts))
        .collect()
}

fn file_of(facts: &census::FileFacts) -> (u64, u64) {
    (facts.device.raw(), facts.inode)
}

fn not_opened(path: &std::path::Path, error: &dyn std::error::Error) -> NotCoveredStatus {
    NotCoveredStatus {
        what: path.display().to_string(),
        reason: format!("it cannot be opened on the hook: {}", chain(error)),
        pid: None,
    }
}

fn places(census: &Census, place: census::Place) -> Vec<Place> {
    let table = census.tables().iter().find(|table| table.id == place.table);
    let mut pids: Vec<Pid> = table
        .map(|table| table.members.iter().map(|member| member.pid).collect())
        .unwrap_or_default();
    pids.dedup();
    pids.into_iter()
        .filter_map(|pid| {
            census
                .processes()
                .iter()
                .find(|process| process.id.pid == pid)
        })
        .map(|process| Place {
            who: who(process.id),
            fd: place.fd.as_raw(),
        })
        .collect()
}
