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

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::ids::{Device, Fd, MountId, Pid, ProcessId, Tid};
use crate::proc::locks::FileLock;
use crate::proc::maps::{Protection, VmFlags};
pub use crate::proc::pagemap::AddressRange;

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
    /// Our own descriptor of this very description. While it lives, so do the locks and the file.
    pub kept: OwnedFd,
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
    /// Guard regions (`MADV_GUARD_INSTALL`), as address ranges, ascending and not touching.
    pub guards: Vec<AddressRange>,
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
