//! What a set of processes holds of a volume: descriptors, directories, mappings, and what cannot be moved.
//!
//! Owns the inventory that pre-flight prints and that a switch works from. A census only reads: the processes run on (or stand
//! still) untouched. Its one effect is that we come to hold each open file description ourselves ([`Description::kept`]), which
//! keeps its locks and an unlinked file alive until the census is dropped.
//!
//! Invariants: one [`Description`] per `struct file` of the kernel however many descriptors, tables and processes share it
//! (decided by `kcmp`, never by likeness); every descriptor of the volume appears in exactly one [`Description::places`]; ids stay
//! valid across [`Census::rescan`] and are never used twice.
//!
//! A census of running processes is a snapshot of a moving thing: it is complete only when taken, or re-scanned, while they
//! are stopped.

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;

use crate::ids::{Device, Fd, MountId, Pid, ProcessId, Tid};
use crate::proc::ProcError;
use crate::proc::locks::FileLock;
use crate::proc::maps::{MapEntry, Protection, VmFlags};
pub use crate::proc::pagemap::AddressRange;

mod descriptions;
mod directories;
mod facts;
mod groups;
mod memory;
mod scan;
mod slots;

pub(crate) use facts::kind_of;

/// Decides whether a file belongs to the volume. It must answer the same for the same facts, may be called from several threads,
/// and does not block.
pub type Volume<'a> = &'a (dyn Fn(&FileFacts) -> bool + Sync);

/// A descriptor table (`files_struct`) of this census.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableId(pub(crate) u32);

/// A pair of working and root directory (`fs_struct`) of this census.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FsId(pub(crate) u32);

/// An address space (`mm_struct`) of this census.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpaceId(pub(crate) u32);

/// An open file description (`struct file`) of this census.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DescriptionId(pub(crate) u32);

/// A file that is mapped somewhere in this census.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MappedFileId(pub(crate) u32);

/// What kind of thing an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link (open with `O_PATH` only).
    Symlink,
    /// A named pipe.
    Fifo,
    /// A socket's name in the filesystem (open with `O_PATH` only).
    Socket,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// Something that has no type, as the kernel's anonymous inodes have none.
    Other,
}

/// What is known of a file without opening it: what decides whether it belongs to the volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileFacts {
    /// The mount through which it is held.
    pub mount: MountId,
    /// `st_dev`, as programs see it.
    pub device: Device,
    /// `st_ino`.
    pub inode: u64,
    /// Names it has left.
    pub links: u32,
    /// What it is.
    pub kind: FileKind,
    /// Whether it is open with `O_PATH`: a place in the tree, which can neither be read nor written.
    pub is_path_only: bool,
    /// Its path as the kernel prints it: from the root of the mount namespace it is held in, or from ours when it is visible
    /// there; from the root of its mount when that is attached nowhere. Without ` (deleted)`. Any bytes.
    pub path: PathBuf,
    /// Whether that name is gone. The file may have other names ([`FileFacts::links`]).
    pub is_deleted: bool,
    /// Whether it is an `O_TMPFILE` file that never had a name. A guess by the name `#<inode>` that the kernel gives those
    /// (fs/dcache.c, `d_mark_tmpfile`) and the absence of links; one that was linked and unlinked again carries a real name.
    pub is_nameless: bool,
}

/// A process as the census found it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Who it is.
    pub id: ProcessId,
    /// Its living threads, by ascending id. Those that are in `exit()` have nothing any more and are not listed.
    pub threads: Vec<Thread>,
    /// Its memory.
    pub space: SpaceId,
}

/// A thread and what it shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thread {
    /// Its id.
    pub tid: Tid,
    /// Its descriptor table: usually the one of its process, unless made or unshared without `CLONE_FILES`.
    pub table: TableId,
    /// Its working and root directory: usually those of its process, unless made or unshared without `CLONE_FS`.
    pub fs: FsId,
}

/// A thread in its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    /// The process.
    pub pid: Pid,
    /// The thread.
    pub tid: Tid,
}

/// A descriptor table and all threads that use it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its name in this census.
    pub id: TableId,
    /// Who uses it, at least one, ascending. A remote call in any of them acts on the table of all.
    pub members: Vec<Member>,
    /// Descriptors in it, whatever they refer to.
    pub descriptors: usize,
    /// The highest descriptor in use.
    pub highest: Option<Fd>,
}

/// A working and a root directory, and all threads that share them.
#[derive(Debug)]
pub struct FsStruct {
    /// Its name in this census.
    pub id: FsId,
    /// Who uses it, at least one, ascending. A `chdir` in any of them acts on all.
    pub members: Vec<Member>,
    /// The working directory, when it belongs to the volume.
    pub cwd: Option<Directory>,
    /// The root directory, when it belongs to the volume (a chroot into it).
    pub root: Option<Directory>,
}

/// A directory that is held without a descriptor.
#[derive(Debug)]
pub struct Directory {
    /// Which one.
    pub facts: FileFacts,
    /// The same directory of the same mount, open with `O_PATH`: what `fchdir` takes on the way back.
    pub kept: OwnedFd,
}

/// An open file description of the volume.
#[derive(Debug)]
pub struct Description {
    /// Its name in this census.
    pub id: DescriptionId,
    /// Our own descriptor of this very description. While it lives, so do the locks and the file. Whoever goes on needing it shares it with the census: a
    /// descriptor more for each would halve how many fit under the limit.
    pub kept: Arc<OwnedFd>,
    /// The file.
    pub facts: FileFacts,
    /// Access mode and status flags, as `F_GETFL` gives them.
    pub flags: OpenFlags,
    /// The file position, in bytes (an opaque cookie for directories).
    pub position: i64,
    /// Who gets SIGIO, if anybody was named.
    pub owner: Option<Owner>,
    /// What is sent instead of SIGIO; 0 when nothing else was chosen.
    pub signal: i32,
    /// Locks held through it.
    pub locks: Vec<DescriptionLock>,
    /// Every descriptor that refers to it, by table and number.
    pub places: Vec<Place>,
}

/// A descriptor that refers to a description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The table it is in.
    pub table: TableId,
    /// Its number.
    pub fd: Fd,
    /// Whether `execve` closes it.
    pub close_on_exec: bool,
}

/// A lock that is held through a description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DescriptionLock {
    /// Class, kind and range.
    pub lock: FileLock,
    /// Whose it is, for POSIX locks: they belong to the table, not to the description.
    pub table: Option<TableId>,
}

/// Who is told of I/O on a description (`F_GETOWN_EX`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// One thread.
    Thread(i32),
    /// A process.
    Process(i32),
    /// A process group.
    Group(i32),
}

/// The flags word of an open file description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OpenFlags(pub u32);

impl OpenFlags {
    /// Whether this is a place in the tree only (`O_PATH`).
    pub fn is_path_only(self) -> bool {
        self.has(libc::O_PATH)
    }

    /// Whether every write goes to the end (`O_APPEND`).
    pub fn is_append(self) -> bool {
        self.has(libc::O_APPEND)
    }

    /// Whether the page cache is passed by (`O_DIRECT`).
    pub fn is_direct(self) -> bool {
        self.has(libc::O_DIRECT)
    }

    /// What it may be used for.
    pub fn access(self) -> Access {
        if self.is_path_only() {
            return Access::Path;
        }
        match self.0.cast_signed() & libc::O_ACCMODE {
            libc::O_RDONLY => Access::Read,
            libc::O_WRONLY => Access::Write,
            libc::O_RDWR => Access::ReadWrite,
            _ => Access::Neither,
        }
    }

    fn has(self, flag: i32) -> bool {
        self.0.cast_signed() & flag != 0
    }
}

impl Owner {
    /// From the type and the id of `struct f_owner_ex`; id 0 is nobody.
    fn from_kernel(kind: i32, id: i32) -> Option<Self> {
        match kind {
            _ if id == 0 => None,
            0 => Some(Self::Thread(id)),
            1 => Some(Self::Process(id)),
            _ => Some(Self::Group(id)),
        }
    }
}

/// What a description may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// `O_RDONLY`.
    Read,
    /// `O_WRONLY`.
    Write,
    /// `O_RDWR`.
    ReadWrite,
    /// `O_PATH`.
    Path,
    /// Access mode 3: neither, for ioctl only.
    Neither,
}

/// A file that is mapped, opened afresh by us.
#[derive(Debug)]
pub struct MappedFile {
    /// Its name in this census.
    pub id: MappedFileId,
    /// The file.
    pub facts: FileFacts,
    /// Whether some mapping of it can write to the file (shared, and made from a descriptor that may write): then `kept` is open
    /// for reading and writing, else for reading.
    pub is_writable: bool,
    /// The file opened through `/proc/<pid>/map_files`, which works for unlinked files and ignores permissions.
    pub kept: OwnedFd,
}

/// Memory shared by one or more processes, and what of the volume is mapped into it.
#[derive(Debug)]
pub struct AddressSpace {
    /// Its name in this census.
    pub id: SpaceId,
    /// Processes that use it (more than one between `vfork` and `execve`, or by `clone(CLONE_VM)`).
    pub processes: Vec<Pid>,
    /// Mappings of the volume's files, by ascending address.
    pub mappings: Vec<Mapping>,
}

/// A mapping of a file of the volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First byte.
    pub start: u64,
    /// First byte after it.
    pub end: u64,
    /// Offset into the file, in bytes.
    pub offset: u64,
    /// What the program may do with the memory now.
    pub protection: Protection,
    /// `MAP_SHARED`; otherwise what the program writes stays its own.
    pub is_shared: bool,
    /// Everything that `madvise`, `mlock` and the like have said about it.
    pub flags: VmFlags,
    /// The memory protection key, 0 unless one was given.
    pub protection_key: u32,
    /// The file.
    pub file: MappedFileId,
    /// Pages of a private mapping that have a content of their own, as address ranges, ascending and not touching.
    pub dirty: Vec<AddressRange>,
    /// Guard regions (`MADV_GUARD_INSTALL`) of a private mapping, as address ranges, ascending and not touching. Those of shared
    /// mappings are not looked for: it would mean to visit every page of what may be a whole database.
    pub guards: Vec<AddressRange>,
    /// The line of `maps` it was made from: what a re-scan compares.
    pub(crate) map: MapEntry,
}

/// A FIFO, socket or device of the volume that is open. Never moved: what is open stays with the kernel's object, which is the
/// same on both sides of the hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Special {
    /// The file.
    pub facts: FileFacts,
    /// The table it is open in.
    pub table: TableId,
    /// The descriptor.
    pub fd: Fd,
}

/// Something that holds on to files and cannot be moved.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NotCovered {
    /// Descriptors that were sent through a unix socket and not yet received. Which files they are cannot be seen.
    InFlight {
        /// Table of the receiving socket.
        table: TableId,
        /// The receiving socket.
        fd: Fd,
        /// Descriptors in its queue.
        descriptors: u64,
    },
    /// An io_uring with registered files: operations on those bypass the descriptor table.
    IoUring {
        /// Table of the ring.
        table: TableId,
        /// The ring.
        fd: Fd,
        /// Registered files.
        files: u64,
    },
    /// A context of kernel AIO: operations in flight finish on the file they were submitted for.
    Aio {
        /// Where its ring is mapped.
        space: SpaceId,
        /// Address of that mapping.
        address: u64,
    },
    /// A lease or delegation, which FUSE files cannot have.
    Lease {
        /// The description that has it.
        description: DescriptionId,
    },
    /// An inotify instance. Its watches stay on the backing inodes; those of the volume are the ones whose device is the volume's.
    Inotify {
        /// Table of the instance.
        table: TableId,
        /// The instance.
        fd: Fd,
        /// What is watched, as (device of the superblock, inode).
        watches: Vec<(Device, u64)>,
    },
    /// A fanotify group. Its marks stay on the backing inodes, mounts and filesystems.
    Fanotify {
        /// Table of the group.
        table: TableId,
        /// The group.
        fd: Fd,
    },
    /// The program itself lies in the volume: `/proc/<pid>/exe` cannot be exchanged, and its text is mapped from the backing file.
    Executable {
        /// The process.
        process: Pid,
        /// Its program.
        facts: FileFacts,
    },
}

/// Why there is no census.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CensusError {
    /// A file in `/proc` could not be read or understood.
    #[error("cannot inspect a process")]
    Proc(#[from] ProcError),
    /// The kernel does not let us look into a process that has more privileges than we have, or belongs to somebody else.
    #[error("not permitted to look into process {pid}")]
    Denied {
        /// The process.
        pid: Pid,
        /// The kernel's reason.
        #[source]
        errno: Errno,
    },
    /// We have no free descriptors left to hold the target's open files with.
    #[error("too few descriptors of our own to hold the open files of process {pid}")]
    OutOfDescriptors {
        /// The process whose files did not fit.
        pid: Pid,
        /// The kernel's reason: the limit of this process (EMFILE) or of the system (ENFILE).
        #[source]
        errno: Errno,
    },
    /// Two threads or descriptors could not be compared.
    #[error("cannot compare what process {pid} shares")]
    Compare {
        /// One of the two.
        pid: Pid,
        /// The kernel's reason.
        #[source]
        errno: Errno,
    },
    /// A descriptor could not be looked at.
    #[error("cannot look at descriptor {fd} of process {pid}")]
    Descriptor {
        /// The process.
        pid: Pid,
        /// The descriptor.
        fd: Fd,
        /// The kernel's reason.
        #[source]
        errno: Errno,
    },
}

impl CensusError {
    fn from_errno(path: &Path, pid: Pid, errno: Errno) -> Self {
        match errno {
            Errno::ACCESS | Errno::PERM => Self::Denied { pid, errno },
            Errno::MFILE | Errno::NFILE => Self::OutOfDescriptors { pid, errno },
            errno => Self::Proc(ProcError::errno(path, errno)),
        }
    }

    fn slot(pid: Pid, fd: Fd, errno: Errno) -> Self {
        match errno {
            Errno::ACCESS | Errno::PERM => Self::Denied { pid, errno },
            Errno::MFILE | Errno::NFILE => Self::OutOfDescriptors { pid, errno },
            errno => Self::Descriptor { pid, fd, errno },
        }
    }

    fn compare(pid: Pid, errno: Errno) -> Self {
        match errno {
            Errno::ACCESS | Errno::PERM => Self::Denied { pid, errno },
            errno => Self::Compare { pid, errno },
        }
    }

    /// Whether a process or thread was simply no longer there.
    fn is_gone(&self) -> bool {
        matches!(self, Self::Proc(error) if error.is_gone())
    }
}

/// The inventory.
#[derive(Debug, Default)]
pub struct Census {
    processes: Vec<Process>,
    tables: Vec<Table>,
    fs: Vec<FsStruct>,
    spaces: Vec<AddressSpace>,
    descriptions: descriptions::Descriptions,
    mapped: memory::MappedFiles,
    specials: Vec<Special>,
    not_covered: Vec<NotCovered>,
    slots: BTreeMap<TableId, scan::Slots>,
    prepared: BTreeMap<TableId, slots::Infos>,
    are_names_overlooked: bool,
    next: scan::Ids,
}

/// What a re-scan found to be different. All ids are of the census that was re-scanned.
#[derive(Debug, Default)]
pub struct Difference {
    /// Descriptions that were not there before.
    pub appeared: Vec<DescriptionId>,
    /// Descriptions that no descriptor refers to any more. Dropping them lets go of the files.
    pub vanished: Vec<Description>,
    /// Descriptions whose descriptors are no longer the same: duplicated, closed, `FD_CLOEXEC` set or cleared.
    pub moved: Vec<DescriptionId>,
    /// Descriptions with another position, other flags, owner, signal, locks or name.
    pub changed: Vec<DescriptionId>,
    /// Pairs of directories that are new or have changed.
    pub directories: Vec<FsId>,
    /// Address spaces whose mappings of the volume have changed, those with other dirty pages included.
    pub spaces: Vec<SpaceId>,
    /// Whether processes, threads, or what they share have changed.
    pub is_structural: bool,
}

impl Difference {
    /// Whether nothing is different but positions and other state that is carried over at the last moment.
    pub fn is_empty(&self) -> bool {
        self.appeared.is_empty()
            && self.vanished.is_empty()
            && self.moved.is_empty()
            && self.directories.is_empty()
            && self.spaces.is_empty()
            && !self.is_structural
    }
}

/// Takes the census of `processes`. Those that have ended, or end meanwhile, are left out. `volume` says which files count.
///
/// Their pids must be of our own pid namespace, as `/proc` shows them. Nothing of the target changes; we come to hold its open
/// files until the census is dropped.
///
/// # Errors
/// When a process may not be looked into, our descriptors run out, or the kernel answers otherwise than it is known to.
pub fn take(processes: &[ProcessId], volume: Volume<'_>) -> Result<Census, CensusError> {
    let mut census = Census::default();
    census.rescan(processes, volume)?;
    Ok(census)
}

/// Whether a process shares our own descriptor table (`CLONE_FILES`): what it holds is what we hold.
#[must_use]
pub fn shares_our_table(pid: Pid) -> bool {
    share_a_table(Pid::own(), pid)
}

/// Whether two processes share one descriptor table (`CLONE_FILES`).
#[must_use]
pub fn share_a_table(one: Pid, other: Pid) -> bool {
    crate::sys::kcmp::files(one.as_raw(), other.as_raw()) == Ok(std::cmp::Ordering::Equal)
}

/// Device and inode of an open file, without asking its filesystem.
pub(crate) fn file_behind(fd: BorrowedFd<'_>) -> Result<(Device, u64), Errno> {
    let identity = facts::of_descriptor(fd)?.identity;
    Ok((identity.device, identity.inode))
}

impl Census {
    /// Looks again, at the same or other processes, and says what is different. What is found as it was is not derived anew, so
    /// that this is fast enough to be done while the target stands still. After an error the census must not be used but for
    /// dropping it: it may be half old and half new.
    ///
    /// Not noticed: a rename of a directory above a file, or of the file itself on a filesystem that does not set its change time
    /// then; a change of `madvise` or `mlock` flags alone, in processes with more than 512 MiB of
    /// resident memory.
    ///
    /// # Errors
    /// As [`take`].
    pub fn rescan(
        &mut self,
        processes: &[ProcessId],
        volume: Volume<'_>,
    ) -> Result<Difference, CensusError> {
        scan::rescan(self, processes, volume)
    }

    /// Makes later looks fast: keeps open what `/proc` tells of the descriptors that were found, as many of them as leave `reserve` descriptors of ours free. To be
    /// called while the processes run.
    pub fn prepare_rescan(&mut self, reserve: usize) {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let numbers = || {
            let entries = std::fs::read_dir("/proc/self/fd").into_iter().flatten();
            entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        };
        let used = numbers().count();
        let limit = limit.map_or(usize::MAX, |limit| {
            usize::try_from(limit).unwrap_or(usize::MAX)
        });
        let mut most = limit.saturating_sub(used).saturating_sub(reserve);
        self.prepared.clear();
        for table in &self.tables {
            let Some(member) = table.members.first() else {
                continue;
            };
            let slots = self.slots.get(&table.id).into_iter().flatten();
            let descriptors = slots
                .filter(|(_, slot)| matches!(slot, scan::Slot::Description(_)))
                .map(|(fd, _)| *fd);
            let infos = slots::Infos::open(*member, descriptors, most);
            most = most.saturating_sub(infos.len());
            self.prepared.insert(table.id, infos);
        }
        // To enlarge our own table, which others share, takes a grace period of RCU (fs/file.c, `expand_fdtable`): now, and not while the target stands still.
        let highest = numbers().max().unwrap_or(0);
        let reserve = i32::try_from(reserve).unwrap_or(i32::MAX);
        let last = i32::try_from(limit).unwrap_or(i32::MAX) - 1;
        let room = highest.saturating_add(reserve).min(last);
        if let Some(description) = self.descriptions().next()
            && let Err(errno) = rustix::io::fcntl_dupfd_cloexec(&description.kept, room)
        {
            tracing::debug!(%errno, room, "our descriptor table is enlarged when it has to be");
        }
    }

    /// From now on a re-scan keeps the names and link counts that were seen, for who needs neither: to ask for them is a seventh of a look.
    pub fn overlook_renames(&mut self) {
        self.are_names_overlooked = true;
    }

    /// The processes that are alive, by ascending id.
    pub fn processes(&self) -> &[Process] {
        &self.processes
    }

    /// Their descriptor tables, by ascending id.
    pub fn tables(&self) -> &[Table] {
        &self.tables
    }

    /// Their pairs of directories, by ascending id.
    pub fn fs_structs(&self) -> &[FsStruct] {
        &self.fs
    }

    /// Their address spaces, by ascending id.
    pub fn spaces(&self) -> &[AddressSpace] {
        &self.spaces
    }

    /// The open file descriptions of the volume, by ascending id.
    pub fn descriptions(&self) -> impl ExactSizeIterator<Item = &Description> {
        self.descriptions.all()
    }

    /// One of them.
    pub fn description(&self, id: DescriptionId) -> Option<&Description> {
        self.descriptions.get(id)
    }

    /// The files that are mapped, by ascending id.
    pub fn mapped_files(&self) -> &[MappedFile] {
        &self.mapped.files
    }

    /// One of them.
    pub fn mapped_file(&self, id: MappedFileId) -> Option<&MappedFile> {
        self.mapped.files.iter().find(|file| file.id == id)
    }

    /// FIFOs, sockets and devices of the volume that are open: listed, never moved.
    pub fn specials(&self) -> &[Special] {
        &self.specials
    }

    /// What cannot be moved, and what may hide something that is not seen.
    pub fn not_covered(&self) -> &[NotCovered] {
        &self.not_covered
    }

    /// All numbers in use in a table, whatever they refer to, ascending.
    pub(crate) fn numbers_in(&self, table: TableId) -> impl Iterator<Item = Fd> {
        self.slots
            .get(&table)
            .into_iter()
            .flat_map(|slots| slots.keys().copied())
    }

    /// The descriptors of a table that refer to something with a path, of the volume or not, each with its device and inode.
    pub(crate) fn files_in(&self, table: TableId) -> impl Iterator<Item = (Fd, (Device, u64))> {
        let file = |slot: &scan::Slot| match slot {
            scan::Slot::Description(id) => {
                let facts = &self.description(*id)?.facts;
                Some((facts.device, facts.inode))
            }
            scan::Slot::Other { identity, .. } => identity.map(|file| (file.device, file.inode)),
        };
        let slots = self.slots.get(&table).into_iter().flatten();
        slots.filter_map(move |(fd, slot)| Some((*fd, file(slot)?)))
    }

    /// Whether an io_uring is open in a table: threads of the kernel may then open and close files in it while the program stands still.
    pub(crate) fn has_ring(&self, table: TableId) -> bool {
        let mut slots = self
            .slots
            .get(&table)
            .into_iter()
            .flat_map(BTreeMap::values);
        slots.any(scan::Slot::is_ring)
    }

    /// The volume's descriptors in one table, by ascending number, each with its description.
    pub fn places_in(&self, table: TableId) -> Vec<(Place, DescriptionId)> {
        let mut places: Vec<_> = self
            .descriptions()
            .flat_map(|d| {
                d.places
                    .iter()
                    .filter(|p| p.table == table)
                    .map(|p| (*p, d.id))
            })
            .collect();
        places.sort_unstable_by_key(|(place, _)| place.fd);
        places
    }
}
