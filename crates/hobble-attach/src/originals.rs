//! Originals: where crash recovery finds the files that stand behind those on a dead hook.
//!
//! Invariants: what is handed out is the inode on the device that the file on the hook showed; the description itself where the holder still has it, a new one of
//! the same file otherwise. A descriptor of the holder's is duplicated when it is handed out and not before: the holder's table, which its successor shares,
//! is full of them already.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use hobble_graft::census::{Access, Census, Description, FileFacts};
use hobble_graft::proc::fdinfo;
use hobble_graft::proc::locks::{FileLock, LockClass};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};

use crate::crash_locks::FileId;
use crate::error::{AttachError, Step};
use crate::ledger::Entry;
use crate::story::Story;
use crate::volume::{self, Volume};

/// Where originals are found: the holder's descriptors, and the volume itself.
pub(crate) struct Originals {
    holder: Option<OwnedFd>,
    /// The holder's descriptors of files on the volume's device, by inode.
    held: BTreeMap<u64, Vec<HeldFile>>,
    guards: Vec<Guard>,
    /// Descriptions of the server's that are being given away.
    handed_out: RefCell<Vec<i32>>,
    /// Processes that have their locks on a file again, and may have changed them since.
    relocked: RefCell<BTreeSet<(i32, FileId)>>,
    ledger: RefCell<BTreeMap<i32, Entry>>,
    kept: BTreeMap<(i32, u64, i32), i32>,
    root: Option<(OwnedFd, Vec<u8>)>,
    /// Descriptions of the server's that have been given away: each serves one open file.
    used: RefCell<BTreeSet<i32>>,
}

struct HeldFile {
    number: i32,
    device: u64,
    flags: OFlags,
}

/// A descriptor of the holder's on which the dead server holds POSIX locks for a process.
pub(crate) struct Guard {
    number: i32,
    /// The process; `None` while they were on their way to the hook.
    pub(crate) pid: Option<i32>,
    pub(crate) file: FileId,
    /// What is locked, as OFD locks.
    pub(crate) locks: Vec<FileLock>,
}

/// The locks that are held through one of the holder's descriptors.
fn locks_through(holder: i32, number: i32) -> Vec<FileLock> {
    let text = std::fs::read(format!("/proc/{holder}/fdinfo/{number}")).unwrap_or_default();
    fdinfo::parse(&text).map_or_else(
        |error| {
            tracing::warn!(number, %error, "what is locked through a descriptor of the holder's is not understood");
            Vec::new()
        },
        |info| {
            let mut locks = info.locks;
            locks.retain(|lock| lock.class == LockClass::Ofd);
            locks
        },
    )
}

/// What stands behind an open file of the hook.
pub(crate) struct Original {
    pub(crate) file: OwnedFd,
    /// It stands where it must, and somebody may be using it.
    pub(crate) stands: bool,
    /// The holder's descriptor that keeps it, if one does.
    pub(crate) number: Option<i32>,
}

impl Originals {
    pub(crate) fn collect(
        story: &Story,
        ledger: &BTreeMap<i32, Entry>,
    ) -> Result<Self, AttachError> {
        let mut holder_fd = None;
        let mut guards = Vec::new();
        let mut held: BTreeMap<u64, Vec<HeldFile>> = BTreeMap::new();
        let root = story
            .target
            .filter(|target| target.is_alive().unwrap_or(false))
            .map(|target| {
                let path = PathBuf::from(
                    <std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(
                        story.path.clone(),
                    ),
                );
                (target, path)
            });
        let volume = root.and_then(|(target, path)| Volume::resolve(target, &path).ok());
        if let (Some(volume), Some(around)) = (&volume, story.placing)
            && let Err(error) = volume::restore_propagation(volume, around.into())
        {
            tracing::warn!(%error, cause = error.cause_chain(), "the mount around the volume may propagate differently than before");
        }
        let mut devices: BTreeSet<u64> = story.kept.iter().map(|kept| kept.dev).collect();
        devices.extend(story.backing_dev);
        devices.extend(volume.as_ref().map(|volume| volume.device().raw()));
        let root =
            volume.and_then(|volume| Some((volume.native().ok()?, volume.printed().to_vec())));
        if let Some(holder) = story.living_holder() {
            let failed = |error: rustix::io::Errno| {
                AttachError::io(
                    Step::Recover,
                    format!("look into the holder, process {holder}"),
                    error,
                )
            };
            let pid = Pid::from_raw(holder.pid.as_raw())
                .ok_or_else(|| failed(rustix::io::Errno::SRCH))?;
            let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(failed)?;
            if !holder.is_alive().unwrap_or(false) {
                return Err(failed(rustix::io::Errno::SRCH));
            }
            let numbers = std::fs::read_dir(format!("/proc/{holder}/fd")).map_err(|error| {
                AttachError::io(
                    Step::Recover,
                    format!("list the descriptors of the holder, process {holder}"),
                    error,
                )
            })?;
            for number in
                numbers.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
            {
                if !is_regular_link(&format!("/proc/{holder}/fd/{number}")) {
                    continue;
                }
                let file =
                    match rustix::process::pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()) {
                        Ok(file) => file,
                        Err(rustix::io::Errno::BADF) => continue,
                        // Not to see an original would mean to lose it.
                        Err(error) => return Err(failed(error)),
                    };
                let (Ok(stat), Ok(flags)) =
                    (rustix::fs::fstat(&file), rustix::fs::fcntl_getfl(&file))
                else {
                    continue;
                };
                // Only the backing filesystem's: the holder's other files have inode numbers too.
                if stat.st_dev == story.hook_dev || !devices.contains(&stat.st_dev) {
                    continue;
                }
                // A number may be something else's by now: what the ledger says of locks is true where there are locks.
                if let Some(Entry::Locks { pid }) = ledger.get(&number) {
                    let locks = locks_through(holder.pid.as_raw(), number);
                    if !locks.is_empty() {
                        guards.push(Guard {
                            number,
                            pid: i32::try_from(*pid).ok().filter(|pid| *pid > 0),
                            file: (stat.st_dev, stat.st_ino),
                            locks,
                        });
                    }
                }
                held.entry(stat.st_ino).or_default().push(HeldFile {
                    number,
                    device: stat.st_dev,
                    flags,
                });
            }
            holder_fd = Some(pidfd);
        }
        // A number that was closed since keeps nothing, whatever has it now.
        let is_stale =
            |number| matches!(ledger.get(number), Some(Entry::Free | Entry::Locks { .. }));
        let kept = story
            .kept
            .iter()
            .filter(|kept| !is_stale(&kept.holder_fd))
            .flat_map(|kept| {
                kept.places
                    .iter()
                    .map(|place| ((place.who.pid, place.who.start, place.fd), kept.holder_fd))
            })
            .collect();
        Ok(Self {
            holder: holder_fd,
            held,
            guards,
            handed_out: RefCell::default(),
            relocked: RefCell::default(),
            ledger: RefCell::new(ledger.clone()),
            kept,
            root,
            used: RefCell::default(),
        })
    }

    /// How many files of the volume the holder has open.
    pub(crate) fn len(&self) -> usize {
        self.held.values().map(Vec::len).sum()
    }

    /// Another descriptor of one of the holder's.
    fn duplicate(&self, number: i32, file: FileId) -> std::io::Result<OwnedFd> {
        let gone = || std::io::Error::from(rustix::io::Errno::STALE);
        let holder = self.holder.as_ref().ok_or_else(gone)?;
        let found = rustix::process::pidfd_getfd(holder, number, PidfdGetfdFlags::empty())?;
        let stat = rustix::fs::fstat(&found)?;
        // Nobody opens or closes anything there any more; should that be wrong, it must not become a wrong file.
        if (stat.st_dev, stat.st_ino) == file {
            Ok(found)
        } else {
            Err(gone())
        }
    }

    /// Whether a kept original stands where it must: see [`Entry::Kept`]. The hook's file has not moved since the exchange; the original may have, in
    /// a process that the exchange had not come to, and that is not stopped because it holds nothing of the hook.
    fn stands(&self, held: &HeldFile, description: &Description) -> bool {
        let now = description.position;
        matches!(self.ledger.borrow().get(&held.number), Some(Entry::Kept { position }) if *position == now)
    }

    /// Takes note of where originals stand now that they are given back.
    pub(crate) fn placed(&self, positions: BTreeMap<i32, Entry>) {
        self.ledger.borrow_mut().extend(positions);
    }

    /// The description that stands behind one on the hook.
    pub(crate) fn of(
        &self,
        description: &Description,
        census: &Census,
    ) -> std::io::Result<Original> {
        let elsewhere = |file| Original {
            file,
            stands: false,
            number: None,
        };
        let inode = description.facts.inode;
        let access =
            OFlags::from_bits_retain(description.flags.0) & (OFlags::ACCMODE | OFlags::PATH);
        // F_SETFL cannot add these later.
        let synchronous =
            OFlags::from_bits_retain(description.flags.0) & (OFlags::SYNC | OFlags::DSYNC);
        let same = self.held.get(&inode).map(Vec::as_slice).unwrap_or_default();
        // Where it was found when it was moved; a descriptor that was re-used since has another inode or another access mode.
        for place in &description.places {
            let members = census
                .tables()
                .iter()
                .find(|table| table.id == place.table)
                .map(|table| table.members.as_slice())
                .unwrap_or_default();
            for member in members {
                let Some(process) = census
                    .processes()
                    .iter()
                    .find(|process| process.id.pid == member.pid)
                else {
                    continue;
                };
                let key = (
                    process.id.pid.as_raw(),
                    process.id.start_time,
                    place.fd.as_raw(),
                );
                if let Some(number) = self.kept.get(&key)
                    && let Some(found) = same.iter().find(|held| {
                        held.number == *number
                            && !self.is_guard(held.number)
                            && held.flags & (OFlags::ACCMODE | OFlags::PATH) == access
                    })
                {
                    let file = self.duplicate(found.number, (found.device, inode))?;
                    let stands = self.stands(found, description);
                    let number = Some(found.number);
                    return Ok(Original {
                        file,
                        stands,
                        number,
                    });
                }
            }
        }
        let kept: Vec<i32> = self.kept.values().copied().collect();
        let is_taken = |number: &i32| {
            self.used.borrow().contains(number) || self.handed_out.borrow().contains(number)
        };
        // Not one on which the server holds locks: it is nobody's file.
        let opened = same.iter().find(|held| {
            !kept.contains(&held.number)
                && !is_taken(&held.number)
                && !self.is_guard(held.number)
                && held.flags & (OFlags::ACCMODE | OFlags::PATH) == access
                && held.flags & (OFlags::SYNC | OFlags::DSYNC) == synchronous
                && description.flags.access() != Access::Path
        });
        if let Some(held) = opened {
            // The one that served it, or one that served the same file in the same mode: a flock, if there is one, stays.
            self.handed_out.borrow_mut().push(held.number);
            return self
                .duplicate(held.number, (held.device, inode))
                .map(elsewhere);
        }
        self.reach(&description.facts, access | synchronous)
            .map(elsewhere)
    }

    /// The file at a path of the hook, by the holder's descriptors or by name.
    pub(crate) fn reach(&self, facts: &FileFacts, flags: OFlags) -> std::io::Result<OwnedFd> {
        // By name first: what is opened through the holder's descriptors may be on the mirror's own copy of the mount, whose directories have no path in any
        // namespace.
        match self.by_name(facts, flags) {
            Ok(found) => Ok(found),
            Err(error) => match self.held.get(&facts.inode).and_then(|held| held.first()) {
                Some(held) => reopen(
                    self.duplicate(held.number, (held.device, facts.inode))?
                        .as_fd(),
                    flags,
                ),
                None => Err(error),
            },
        }
    }

    fn by_name(&self, facts: &FileFacts, flags: OFlags) -> std::io::Result<OwnedFd> {
        let lost = |why: &str| {
            std::io::Error::new(
                std::io::ErrorKind::NotFound,
                format!("it cannot be found again: {why}"),
            )
        };
        if facts.is_deleted {
            return Err(lost(
                "it has no name, and the process that kept it open is dead",
            ));
        }
        let (root, printed) = self
            .root
            .as_ref()
            .ok_or_else(|| lost("the volume itself cannot be reached"))?;
        // The hook is unmounted by now, so the kernel prints paths from the hook's own root (d_path of a detached mount).
        let relative = volume::below(printed, &facts.path)
            .or_else(|| volume::below(b"/", &facts.path))
            .ok_or_else(|| lost("its name is not below the volume"))?;
        let relative = if relative.is_empty() {
            b".".to_vec()
        } else {
            relative
        };
        let how = rustix::fs::ResolveFlags::BENEATH | rustix::fs::ResolveFlags::NO_SYMLINKS;
        // openat2 refuses O_NONBLOCK together with O_PATH; without O_PATH it keeps a FIFO from holding us up.
        let extra = if flags.contains(OFlags::PATH) {
            OFlags::CLOEXEC | OFlags::NOFOLLOW
        } else {
            OFlags::CLOEXEC | OFlags::NONBLOCK
        };
        let found = rustix::fs::openat2(root, relative, flags | extra, Mode::empty(), how)?;
        let stat = rustix::fs::fstat(&found)?;
        if stat.st_ino != facts.inode {
            return Err(lost("another file has its name now"));
        }
        Ok(found)
    }

    /// The descriptors on which the dead server holds locks; `None` where the holder is dead too.
    pub(crate) fn guards(&self) -> Option<&[Guard]> {
        self.holder.as_ref().map(|_| self.guards.as_slice())
    }

    /// Another descriptor of a guard.
    pub(crate) fn of_guard(&self, guard: &Guard) -> std::io::Result<OwnedFd> {
        self.duplicate(guard.number, guard.file)
    }

    fn is_guard(&self, number: i32) -> bool {
        self.guards.iter().any(|guard| guard.number == number)
    }

    /// What was handed out since the last time is in the processes' hands, and so are these locks; with `None` it is not, and can be handed out again.
    pub(crate) fn settle(&self, locks: Option<BTreeSet<(i32, FileId)>>) {
        let handed_out = self.handed_out.take();
        if let Some(locks) = locks {
            self.used.borrow_mut().extend(handed_out);
            self.relocked.borrow_mut().extend(locks);
        }
    }

    /// Whether a process has had its locks on a file given back.
    pub(crate) fn is_relocked(&self, pid: i32, file: FileId) -> bool {
        self.relocked.borrow().contains(&(pid, file))
    }
}

/// Whether a link in `/proc/*/fd` leads to something with a path, not to a socket, pipe or anonymous inode.
fn is_regular_link(path: &str) -> bool {
    std::fs::read_link(path).is_ok_and(|link| link.as_os_str().as_encoded_bytes().starts_with(b"/"))
}

/// The same inode in a new description.
fn reopen(fd: std::os::fd::BorrowedFd<'_>, flags: OFlags) -> std::io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
    Ok(rustix::fs::open(
        path,
        (flags
            & (OFlags::ACCMODE | OFlags::PATH | OFlags::DIRECTORY | OFlags::SYNC | OFlags::DSYNC))
            | OFlags::CLOEXEC
            | OFlags::NONBLOCK,
        Mode::empty(),
    )?)
}
