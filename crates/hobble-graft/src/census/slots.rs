//! One descriptor table, slot by slot.
//!
//! Owns the looking: what a slot refers to now, given what it referred to before. Everything is checked against our own
//! descriptor of the file once we hold it, so that a slot which a running program re-uses meanwhile is looked at again and two
//! files are never mixed into one. Looking at thousands of slots is spread over a few threads, because it happens while the
//! target stands still.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

use super::facts::{self, Identity, Stamp};
use super::{CensusError, FileFacts, FileKind, Member, OpenFlags, Owner, Volume, groups};
use crate::ids::{Device, Fd};
use crate::proc::fdinfo::{self, FdInfo};
use crate::proc::{ParseError, ProcError};
use crate::sys::{fcntl, kcmp};

/// Slots that are looked at before what was found is merged: bounds how many descriptors are held twice.
pub(super) const BATCH: usize = 2048;
/// Below this a thread costs more than it saves.
const SLOTS_PER_THREAD: usize = 256;
/// More threads than this only get in each other's way in the kernel.
const THREADS: usize = 4;
/// Looks at a slot whose program changes it faster than we can look, before it is taken as empty. A re-scan of the stopped
/// program sees it at the first look.
const LOOKS: usize = 16;

/// What a slot referred to when it was last looked at.
#[derive(Clone, Copy, Debug)]
pub(super) enum Known<'a> {
    /// Nothing is known.
    Nothing,
    /// A description of which we hold a descriptor, and what its file looked like.
    Description { kept: BorrowedFd<'a>, stamp: Stamp },
    /// Something outside the volume.
    Other {
        link: &'a [u8],
        identity: Option<Identity>,
    },
}

/// What a slot refers to.
#[derive(Debug)]
pub(super) enum Found {
    /// Nothing.
    Empty,
    /// The same as before. For a description: its state now, and its facts when its name has changed.
    Same(Option<State>, Option<(Stamp, FileFacts)>),
    /// Something outside the volume, or not to be moved.
    Other {
        link: Vec<u8>,
        identity: Option<Identity>,
        special: Option<FileFacts>,
        note: Option<Note>,
    },
    /// A description of the volume.
    Description {
        stamp: Stamp,
        facts: FileFacts,
        kept: OwnedFd,
        state: State,
    },
}

/// What may change about a description without its becoming another.
#[derive(Debug)]
pub(super) struct State {
    pub(super) info: FdInfo,
    pub(super) flags: OpenFlags,
    pub(super) owner: Option<Owner>,
    pub(super) signal: i32,
}

/// Something about a slot that a switch cannot cover.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Note {
    InFlight(u64),
    IoUring(u64),
    Inotify(Vec<(Device, u64)>),
    Fanotify,
}

/// An open table of one thread.
pub(super) struct TableReader<'a> {
    member: Member,
    pidfd: OwnedFd,
    descriptors: OwnedFd,
    infos: OwnedFd,
    volume: Volume<'a>,
    prepared: Option<&'a Infos>,
    are_names_overlooked: bool,
}

/// Files of `/proc/<pid>/task/<tid>/fdinfo` that are kept open, and through which thread: each says what its number refers to when it is read (fs/proc/fd.c,
/// `seq_show`). To open one takes several times as long as to read it.
#[derive(Debug)]
pub(super) struct Infos {
    member: Member,
    files: BTreeMap<Fd, OwnedFd>,
}

impl Infos {
    /// Opens those of these descriptors, as many as `most`; what cannot be opened is opened when it is looked at.
    pub(super) fn open(member: Member, fds: impl Iterator<Item = Fd>, most: usize) -> Self {
        let Member { pid, tid } = member;
        let path = PathBuf::from(format!("/proc/{pid}/task/{tid}/fdinfo"));
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&path, flags | OFlags::DIRECTORY, Mode::empty());
        let open = |fd: Fd| {
            let file = rustix::fs::openat(
                directory.as_ref().ok()?,
                fd.to_string(),
                flags,
                Mode::empty(),
            );
            Some((fd, file.ok()?))
        };
        let files = fds.take(most).map_while(open).collect();
        Self { member, files }
    }

    pub(super) fn len(&self) -> usize {
        self.files.len()
    }
}

impl<'a> TableReader<'a> {
    /// Opens the table that `member` uses. [`ProcError::Gone`] when the thread is.
    pub(super) fn open(
        member: Member,
        volume: Volume<'a>,
        prepared: Option<&'a Infos>,
        are_names_overlooked: bool,
    ) -> Result<Self, CensusError> {
        let Member { pid, tid } = member;
        let open = |name: &str| {
            let path = PathBuf::from(format!("/proc/{pid}/task/{tid}/{name}"));
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(&path, flags, Mode::empty())
                .map_err(|errno| CensusError::from_errno(&path, pid, errno))
        };
        let (descriptors, infos) = (open("fd")?, open("fdinfo")?);
        // A pidfd of a process means its first thread, which may have a table of its own, or have ended (PIDFD_THREAD: 6.9).
        let flags = if tid == pid.leader() {
            0
        } else {
            libc::PIDFD_THREAD
        };
        let flags = rustix::process::PidfdFlags::from_bits_retain(flags);
        let pidfd = rustix::process::Pid::from_raw(tid.as_raw())
            .ok_or(Errno::SRCH)
            .and_then(|raw| rustix::process::pidfd_open(raw, flags))
            .map_err(|errno| {
                CensusError::from_errno(
                    &PathBuf::from(format!("/proc/{pid}/task/{tid}")),
                    pid,
                    errno,
                )
            })?;
        Ok(Self {
            member,
            pidfd,
            descriptors,
            infos,
            volume,
            prepared: prepared.filter(|infos| infos.member == member),
            are_names_overlooked,
        })
    }

    /// Whether the thread through which the table is seen still has it. If not, slots were seen as empty that are not.
    pub(super) fn is_valid(&self) -> Result<bool, CensusError> {
        Ok(!groups::is_exiting(self.member)?)
    }

    /// How many slots are in use; `None` when the kernel does not say (before 6.2).
    pub(super) fn count(&self) -> Option<usize> {
        let stat = rustix::fs::statx(
            &self.descriptors,
            c"",
            AtFlags::EMPTY_PATH,
            StatxFlags::SIZE,
        )
        .ok()?;
        usize::try_from(stat.stx_size)
            .ok()
            .filter(|count| *count > 0)
    }

    /// The slots in use, ascending.
    pub(super) fn list(&self) -> Result<Vec<Fd>, CensusError> {
        let mut fds = Vec::new();
        let mut buffer = Vec::with_capacity(1 << 16);
        rustix::fs::seek(&self.descriptors, rustix::fs::SeekFrom::Start(0))
            .map_err(|errno| self.error(errno))?;
        let mut entries = rustix::fs::RawDir::new(&self.descriptors, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            match entry {
                Ok(entry) => fds.extend(
                    entry
                        .file_name()
                        .to_str()
                        .ok()
                        .and_then(|n| n.parse().ok())
                        .and_then(Fd::new),
                ),
                Err(Errno::NOENT | Errno::SRCH) => break,
                Err(errno) => return Err(self.error(errno)),
            }
        }
        fds.sort_unstable();
        Ok(fds)
    }

    /// Looks at all of `slots`, in their order.
    pub(super) fn look_at(&self, slots: &[(Fd, Known<'_>)]) -> Result<Vec<Found>, CensusError> {
        let parallel = std::thread::available_parallelism()
            .map_or(1, usize::from)
            .min(THREADS);
        let threads = parallel.min(slots.len() / SLOTS_PER_THREAD).max(1);
        let one = |part: &[(Fd, Known<'_>)]| -> Result<Vec<Found>, CensusError> {
            let mut looker = Looker {
                table: self,
                text: Vec::new(),
                link: Vec::new(),
            };
            part.iter()
                .map(|(fd, known)| looker.look(*fd, *known))
                .collect()
        };
        if threads == 1 {
            return one(slots);
        }
        let mut parts = slots.chunks(slots.len().div_ceil(threads));
        let mine = parts.next().unwrap_or_default();
        std::thread::scope(|scope| {
            // Where no thread can be had, the work is done here.
            let others: Vec<_> = parts
                .map(|part| {
                    (
                        part,
                        std::thread::Builder::new()
                            .spawn_scoped(scope, move || one(part))
                            .ok(),
                    )
                })
                .collect();
            let mut found = one(mine)?;
            for (part, other) in others {
                let result = other
                    .and_then(|thread| thread.join().ok())
                    .unwrap_or_else(|| one(part));
                found.extend(result?);
            }
            Ok(found)
        })
    }

    fn error(&self, errno: Errno) -> CensusError {
        let Member { pid, tid } = self.member;
        CensusError::from_errno(
            &PathBuf::from(format!("/proc/{pid}/task/{tid}/fd")),
            pid,
            errno,
        )
    }

    fn slot_error(&self, fd: Fd, errno: Errno) -> CensusError {
        CensusError::slot(self.member.pid, fd, errno)
    }
}

/// One thread's look at a table, with its buffers.
struct Looker<'a, 'v> {
    table: &'a TableReader<'v>,
    text: Vec<u8>,
    link: Vec<u8>,
}

/// Why a look was in vain.
enum Miss {
    Empty,
    Again,
    Failed(CensusError),
}

impl Looker<'_, '_> {
    fn look(&mut self, fd: Fd, known: Known<'_>) -> Result<Found, CensusError> {
        let name = CString::new(fd.to_string()).unwrap_or_default();
        for _ in 0..LOOKS {
            match self.look_once(fd, &name, known) {
                Ok(found) => return Ok(found),
                Err(Miss::Empty) => return Ok(Found::Empty),
                Err(Miss::Again) => {}
                Err(Miss::Failed(error)) => return Err(error),
            }
        }
        Ok(Found::Empty)
    }

    fn look_once(&mut self, fd: Fd, name: &CStr, known: Known<'_>) -> Result<Found, Miss> {
        match known {
            Known::Nothing => {}
            Known::Description { kept, stamp } => {
                if self.is_same(fd, kept)? {
                    return self.same(fd, name, kept, stamp);
                }
            }
            Known::Other { link, identity } => {
                self.read_link(fd, name)?;
                if self.link == link {
                    let now = match identity {
                        Some(before) => {
                            let attributes =
                                facts::through_link(self.table.descriptors.as_fd(), name)
                                    .map_err(|e| self.miss(fd, e))?;
                            Some(attributes.identity) == Some(before)
                        }
                        None => true,
                    };
                    if now {
                        return Ok(Found::Same(None, None));
                    }
                }
            }
        }
        self.anew(fd, name)
    }

    fn is_same(&self, fd: Fd, kept: BorrowedFd<'_>) -> Result<bool, Miss> {
        let own = crate::ids::Pid::own().as_raw();
        let tid = self.table.member.tid.as_raw();
        match kcmp::file(tid, fd.as_raw(), own, kept.as_raw_fd()) {
            Ok(order) => Ok(order.is_eq()),
            Err(Errno::BADF | Errno::SRCH) => Err(Miss::Empty),
            Err(errno) => Err(Miss::Failed(CensusError::compare(
                self.table.member.pid,
                errno,
            ))),
        }
    }

    fn same(
        &mut self,
        fd: Fd,
        name: &CStr,
        kept: BorrowedFd<'_>,
        before: Stamp,
    ) -> Result<Found, Miss> {
        let state = self.state(fd, name, kept)?;
        if self.table.are_names_overlooked {
            return Ok(Found::Same(Some(state), None));
        }
        let attributes = facts::of_descriptor(kept).map_err(|e| self.miss(fd, e))?;
        let mut renamed = None;
        if attributes.stamp != before {
            self.read_link(fd, name)?;
            let is_path_only = state.flags.is_path_only();
            let facts =
                facts::assemble(self.table.member.pid, &self.link, attributes, is_path_only);
            renamed = Some((attributes.stamp, facts));
        }
        Ok(Found::Same(Some(state), renamed))
    }

    fn anew(&mut self, fd: Fd, name: &CStr) -> Result<Found, Miss> {
        self.read_link(fd, name)?;
        if !self.link.starts_with(b"/") {
            let note = self.note(fd, name)?;
            return Ok(Found::Other {
                link: self.link.clone(),
                identity: None,
                special: None,
                note,
            });
        }
        let attributes = facts::through_link(self.table.descriptors.as_fd(), name)
            .map_err(|e| self.miss(fd, e))?;
        let info = self.info(fd, name)?;
        if info.mount != attributes.identity.mount {
            return Err(Miss::Again);
        }
        let is_path_only = OpenFlags(info.flags).is_path_only();
        let link = self.link.clone();
        let facts = facts::assemble(self.table.member.pid, &link, attributes, is_path_only);
        let is_movable =
            is_path_only || matches!(facts.kind, FileKind::Regular | FileKind::Directory);
        if !(self.table.volume)(&facts) || !is_movable {
            let is_special =
                !is_movable && facts.kind != FileKind::Other && (self.table.volume)(&facts);
            let identity = Some(facts.identity());
            return Ok(Found::Other {
                link,
                identity,
                special: is_special.then_some(facts),
                note: None,
            });
        }
        let kept = rustix::process::pidfd_getfd(
            &self.table.pidfd,
            fd.as_raw(),
            rustix::process::PidfdGetfdFlags::empty(),
        )
        .map_err(|e| self.miss(fd, e))?;
        // The slot may have been closed and used again between the look and the taking.
        let taken = facts::of_descriptor(&kept).map_err(|e| self.miss(fd, e))?;
        if taken.identity != facts.identity() {
            return Err(Miss::Again);
        }
        let state = self.state(fd, name, kept.as_fd())?;
        if !self.is_same(fd, kept.as_fd())? || state.flags.is_path_only() != is_path_only {
            return Err(Miss::Again);
        }
        Ok(Found::Description {
            stamp: attributes.stamp,
            facts,
            kept,
            state,
        })
    }

    fn state(&mut self, fd: Fd, name: &CStr, kept: BorrowedFd<'_>) -> Result<State, Miss> {
        let info = self.info(fd, name)?;
        let flags = OpenFlags(info.flags & !libc::O_CLOEXEC.cast_unsigned());
        // fcntl(2) on an O_PATH descriptor knows neither command.
        let (owner, signal) = if flags.is_path_only() {
            (None, 0)
        } else {
            let (kind, id) = fcntl::owner(kept).map_err(|e| self.miss(fd, e))?;
            (
                Owner::from_kernel(kind, id),
                fcntl::signal(kept).map_err(|e| self.miss(fd, e))?,
            )
        };
        Ok(State {
            info,
            flags,
            owner,
            signal,
        })
    }

    fn read_link(&mut self, fd: Fd, name: &CStr) -> Result<(), Miss> {
        let buffer = std::mem::take(&mut self.link);
        self.link = facts::link(self.table.descriptors.as_fd(), name, buffer)
            .map_err(|e| self.miss(fd, e))?;
        Ok(())
    }

    fn info(&mut self, fd: Fd, name: &CStr) -> Result<FdInfo, Miss> {
        if self.read_prepared(fd)
            && let Ok(info) = fdinfo::parse(&self.text)
        {
            return Ok(info);
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.table.infos, name, flags, Mode::empty())
            .map_err(|e| self.miss(fd, e))?;
        self.text.clear();
        loop {
            self.text.reserve(1024);
            let room = self.text.capacity() - self.text.len();
            // The kernel prints the whole text before the first read, so a short read is the last.
            let read = rustix::io::read(&file, rustix::buffer::spare_capacity(&mut self.text));
            if read.map_err(|e| self.miss(fd, e))? < room {
                break;
            }
        }
        fdinfo::parse(&self.text).map_err(|error| self.unreadable(fd, error))
    }

    /// Reads what is said of a descriptor through a file that is open already. `false` when there is none, or it says nothing: the thread may have ended.
    fn read_prepared(&mut self, fd: Fd) -> bool {
        let Some(file) = self.table.prepared.and_then(|infos| infos.files.get(&fd)) else {
            return false;
        };
        self.text.clear();
        loop {
            self.text.reserve(1024);
            let room = self.text.capacity() - self.text.len();
            let offset = self.text.len() as u64;
            let buffer = rustix::buffer::spare_capacity(&mut self.text);
            match rustix::io::pread(file, buffer, offset) {
                Ok(read) if read < room => return !self.text.is_empty(),
                Ok(_) => {}
                Err(_) => return false,
            }
        }
    }

    fn unreadable(&self, fd: Fd, error: ParseError) -> Miss {
        let Member { pid, tid } = self.table.member;
        let path = PathBuf::from(format!("/proc/{pid}/task/{tid}/fdinfo/{fd}"));
        Miss::Failed(ProcError::parse(&path, error).into())
    }

    /// Kinds of descriptors that can hold on to files of the volume out of our sight.
    fn note(&mut self, fd: Fd, name: &CStr) -> Result<Option<Note>, Miss> {
        let is_of_interest = self.link.starts_with(b"socket:")
            || self.link == b"anon_inode:[io_uring]"
            || self.link == b"anon_inode:inotify"
            || self.link == b"anon_inode:[fanotify]";
        if !is_of_interest {
            return Ok(None);
        }
        let info = self.info(fd, name)?;
        Ok(match self.link.as_slice() {
            b"anon_inode:[io_uring]" if info.registered_files > 0 => {
                Some(Note::IoUring(info.registered_files))
            }
            b"anon_inode:inotify" if !info.inotify.is_empty() => Some(Note::Inotify(info.inotify)),
            b"anon_inode:[fanotify]" if info.fanotify_marks > 0 => Some(Note::Fanotify),
            _ if info.in_flight > 0 => Some(Note::InFlight(info.in_flight)),
            _ => None,
        })
    }

    fn miss(&self, fd: Fd, errno: Errno) -> Miss {
        match errno {
            // The slot was closed, or the thread has ended.
            Errno::NOENT | Errno::BADF | Errno::SRCH => Miss::Empty,
            errno => Miss::Failed(self.table.slot_error(fd, errno)),
        }
    }
}
