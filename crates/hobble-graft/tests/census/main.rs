//! The census of real processes. Most are forked copies of this one: what a test opens, maps or locks, its copy has too.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod sys;

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use hobble_graft::census::{
    self, Access, Census, Description, FileFacts, FileKind, NotCovered, Owner,
};
use hobble_graft::ids::{Fd, Pid, ProcessId, Tid};
use hobble_graft::proc::locks::{LockClass, LockKind};
use rustix::fs::{Mode, OFlags};
use sys::Target;
use tempfile::TempDir;

/// A fresh directory as the volume, and the only test at work: a copy of this process made for one test would otherwise hold what
/// another has open.
struct Volume {
    dir: TempDir,
    root: PathBuf,
    _alone: MutexGuard<'static, ()>,
}

impl Volume {
    fn new() -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        Self {
            dir,
            root,
            _alone: alone,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn open(&self, name: &str) -> File {
        open_rw(&self.path(name))
    }

    fn has(&self, facts: &FileFacts) -> bool {
        facts.path.starts_with(&self.root)
    }

    fn census(&self, processes: &[ProcessId]) -> Census {
        assert!(self.dir.path().exists());
        census::take(processes, &|facts| self.has(facts)).unwrap()
    }

    fn rescan(&self, census: &mut Census, processes: &[ProcessId]) -> census::Difference {
        census.rescan(processes, &|facts| self.has(facts)).unwrap()
    }
}

fn id_of(target: &Target) -> ProcessId {
    ProcessId::of(Pid::new(target.pid()).unwrap()).unwrap()
}

fn fd_of(file: &impl std::os::fd::AsFd) -> Fd {
    Fd::new(file.as_fd().as_raw_fd()).unwrap()
}

fn open_rw(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap()
}

fn by_fd(census: &Census, process: ProcessId, fd: Fd) -> Option<&Description> {
    let process = census.processes().iter().find(|p| p.id == process)?;
    let table = process.threads.first()?.table;
    census
        .descriptions()
        .find(|d| d.places.iter().any(|p| p.table == table && p.fd == fd))
}

fn ascending<T: Ord>(items: impl IntoIterator<Item = T>) -> Vec<T> {
    let mut items: Vec<T> = items.into_iter().collect();
    items.sort_unstable();
    items
}

/// A child that executes a program, with the descriptors it inherits, and is gone in the end.
struct Program(Child);

impl Program {
    fn start(command: &mut Command) -> Self {
        let child = Self(command.spawn().unwrap());
        // Until it has executed its program it is a copy of ours; the vdso is mapped after the program.
        let file = |name: &str| PathBuf::from(format!("/proc/{}/{name}", child.0.id()));
        let own = fs::read_link("/proc/self/exe").unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        let is_ready = || {
            fs::read_link(file("exe")).is_ok_and(|exe| exe != own)
                && fs::read(file("maps")).is_ok_and(|maps| maps.windows(6).any(|w| w == b"[vdso]"))
        };
        while !is_ready() {
            assert!(Instant::now() < end, "the child does not start");
        }
        child
    }

    fn id(&self) -> ProcessId {
        ProcessId::of(Pid::new(self.0.id().cast_signed()).unwrap()).unwrap()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn duplicates_are_one_description_and_second_opens_are_not() {
    let volume = Volume::new();
    let first = volume.open("a");
    let duplicate = first.try_clone().unwrap();
    let second = volume.open("a");
    rustix::io::fcntl_setfd(&duplicate, rustix::io::FdFlags::empty()).unwrap();
    (&first).write_all(b"twelve bytes").unwrap();
    let target = Target::fork(&[]);
    let id = id_of(&target);

    let census = volume.census(&[id]);
    assert_eq!(census.descriptions().len(), 2);
    let shared = by_fd(&census, id, fd_of(&first)).unwrap();
    let places: Vec<_> = shared
        .places
        .iter()
        .map(|p| (p.fd, p.close_on_exec))
        .collect();
    assert_eq!(
        places,
        ascending([(fd_of(&first), true), (fd_of(&duplicate), false)])
    );
    assert_eq!(shared.position, 12);
    assert_eq!(shared.facts.kind, FileKind::Regular);
    assert_eq!(shared.facts.path, volume.path("a"));
    assert!(!shared.facts.is_deleted && !shared.facts.is_nameless && shared.facts.links == 1);
    let other = by_fd(&census, id, fd_of(&second)).unwrap();
    assert_eq!(other.position, 0);
    assert_ne!(other.id, shared.id);

    // What is kept is the very description: its position is the program's.
    (&first).seek(SeekFrom::Start(5)).unwrap();
    assert_eq!(rustix::fs::tell(&shared.kept).unwrap(), 5);
}

#[test]
fn flags_owners_and_signals_are_seen() {
    let volume = Volume::new();
    let append = OpenOptions::new()
        .append(true)
        .create(true)
        .open(volume.path("a"))
        .unwrap();
    let quiet = volume.open("a");
    sys::set_owner(append.as_fd(), 1, Pid::own().as_raw()).unwrap();
    sys::fcntl(append.as_fd(), 10, libc::SIGRTMIN()).unwrap();
    let place = rustix::fs::open(
        volume.path("a"),
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .unwrap();
    let directory = File::open(&volume.root).unwrap();
    std::os::unix::fs::symlink("nowhere", volume.path("link")).unwrap();
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let link = rustix::fs::open(volume.path("link"), flags, Mode::empty()).unwrap();
    let target = Target::fork(&[]);
    let id = id_of(&target);

    let census = volume.census(&[id]);
    let of = |fd: Fd| by_fd(&census, id, fd).unwrap();
    let seen = of(fd_of(&append));
    assert!(seen.flags.is_append());
    assert_eq!(seen.flags.access(), Access::Write);
    assert_eq!(seen.owner, Some(Owner::Process(Pid::own().as_raw())));
    assert_eq!(seen.signal, libc::SIGRTMIN());
    let seen = of(fd_of(&quiet));
    assert_eq!(
        (seen.owner, seen.signal, seen.flags.access()),
        (None, 0, Access::ReadWrite)
    );
    let seen = of(fd_of(&place));
    assert!(seen.facts.is_path_only && seen.flags.access() == Access::Path);
    let seen = of(fd_of(&directory));
    assert_eq!(
        (seen.facts.kind, seen.flags.access()),
        (FileKind::Directory, Access::Read)
    );
    let seen = of(fd_of(&link));
    assert_eq!(
        (seen.facts.kind, seen.facts.is_path_only),
        (FileKind::Symlink, true)
    );
}

#[test]
fn deleted_and_nameless_files_are_told_from_files_with_such_names() {
    let volume = Volume::new();
    let unlinked = volume.open("gone");
    fs::remove_file(volume.path("gone")).unwrap();
    let misnamed = volume.open("here (deleted)");
    let linked = volume.open("one");
    fs::hard_link(volume.path("one"), volume.path("two")).unwrap();
    fs::remove_file(volume.path("one")).unwrap();
    let nameless = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .open(&volume.root)
        .unwrap();
    let odd = volume
        .root
        .join(std::ffi::OsStr::from_bytes(b"\xff\n\\012 (deleted)"));
    let odd_file = open_rw(&odd);
    fs::remove_file(&odd).unwrap();
    let target = Target::fork(&[]);
    let id = id_of(&target);

    let census = volume.census(&[id]);
    let facts = |file: &File| by_fd(&census, id, fd_of(file)).unwrap().facts.clone();
    let seen = facts(&unlinked);
    assert_eq!(
        (seen.path, seen.is_deleted, seen.links),
        (volume.path("gone"), true, 0)
    );
    let seen = facts(&misnamed);
    assert_eq!(
        (seen.path, seen.is_deleted, seen.links),
        (volume.path("here (deleted)"), false, 1)
    );
    let seen = facts(&linked);
    assert_eq!(
        (seen.path, seen.is_deleted, seen.links),
        (volume.path("one"), true, 1)
    );
    let seen = facts(&nameless);
    assert!(seen.is_nameless && seen.is_deleted && seen.links == 0);
    let seen = facts(&odd_file);
    assert_eq!(
        (seen.path, seen.is_deleted, seen.is_nameless),
        (odd, true, false)
    );
}

#[test]
fn locks_of_three_kinds_are_seen_with_their_owners() {
    let volume = Volume::new();
    let (whole, range, open) = (volume.open("a"), volume.open("a"), volume.open("a"));
    let again = range.try_clone().unwrap();
    drop(volume.open("b"));
    let leased = File::open(volume.path("b")).unwrap();
    sys::lock(open.as_fd(), libc::F_OFD_SETLK, libc::F_RDLCK, 100, 0).unwrap();
    rustix::fs::flock(&whole, rustix::fs::FlockOperation::LockShared).unwrap();
    sys::fcntl(leased.as_fd(), libc::F_SETLEASE, libc::F_RDLCK).unwrap();
    // A lock of this kind belongs to the process that takes it.
    let target = Target::fork(&[&|| sys::lock(range.as_fd(), libc::F_SETLK, libc::F_WRLCK, 10, 5)]);
    target.step(0);
    let id = id_of(&target);

    let census = volume.census(&[id]);
    let of = |file: &File| by_fd(&census, id, fd_of(file)).unwrap();
    let locks = &of(&range).locks;
    assert_eq!(
        locks.len(),
        1,
        "seen through two descriptors, held once: {locks:?}"
    );
    assert_eq!(
        (locks[0].lock.class, locks[0].lock.kind),
        (LockClass::Posix, LockKind::Write)
    );
    assert_eq!((locks[0].lock.start, locks[0].lock.end), (10, Some(14)));
    assert_eq!(locks[0].lock.pid, Some(target.pid()));
    assert_eq!(locks[0].table, Some(of(&range).places[0].table));
    assert_eq!(of(&again).id, of(&range).id);
    let locks = &of(&open).locks;
    assert_eq!(
        (locks[0].lock.class, locks[0].lock.kind),
        (LockClass::Ofd, LockKind::Read)
    );
    assert_eq!(
        (locks[0].lock.start, locks[0].lock.end, locks[0].table),
        (100, None, None)
    );
    let locks = &of(&whole).locks;
    assert_eq!(
        (locks.len(), locks[0].lock.class, locks[0].lock.kind),
        (1, LockClass::Flock, LockKind::Read)
    );
    let lease = of(&leased).id;
    assert!(
        census
            .not_covered()
            .contains(&NotCovered::Lease { description: lease })
    );
}

#[test]
fn children_share_descriptions_and_have_directories_of_their_own() {
    let volume = Volume::new();
    let inherited = volume.open("shared");
    let private = volume.open("private");
    fs::create_dir(volume.path("work")).unwrap();
    rustix::io::fcntl_setfd(&inherited, rustix::io::FdFlags::empty()).unwrap();
    let a = Program::start(
        Command::new("sleep")
            .arg("100")
            .current_dir(volume.path("work")),
    );
    let b = Program::start(Command::new("sleep").arg("100").current_dir("/"));
    rustix::io::fcntl_setfd(&inherited, rustix::io::FdFlags::CLOEXEC).unwrap();
    let c = Target::fork(&[]);

    let census = volume.census(&[a.id(), b.id(), id_of(&c)]);
    assert_eq!(census.processes().len(), 3);
    let shared = by_fd(&census, id_of(&c), fd_of(&inherited)).unwrap();
    assert_eq!(
        shared.places.len(),
        3,
        "one place in each of three tables: {:?}",
        shared.places
    );
    assert_eq!(shared.places.iter().filter(|p| p.close_on_exec).count(), 1);
    assert_eq!(
        by_fd(&census, id_of(&c), fd_of(&private))
            .unwrap()
            .places
            .len(),
        1
    );
    for program in [&a, &b] {
        assert_eq!(
            by_fd(&census, program.id(), fd_of(&inherited)).unwrap().id,
            shared.id
        );
    }
    let fs_of = |id: ProcessId| {
        let process = census.processes().iter().find(|p| p.id == id).unwrap();
        census
            .fs_structs()
            .iter()
            .find(|f| f.id == process.threads[0].fs)
            .unwrap()
    };
    let cwd = fs_of(a.id()).cwd.as_ref().unwrap();
    assert_eq!(cwd.facts.path, volume.path("work"));
    assert_eq!(
        rustix::fs::fstat(&cwd.kept).unwrap().st_ino,
        cwd.facts.inode
    );
    assert!(fs_of(b.id()).cwd.is_none());
    assert!(fs_of(a.id()).root.is_none());
    assert_eq!(
        (
            census.spaces().len(),
            census.tables().len(),
            census.fs_structs().len()
        ),
        (3, 3, 3)
    );
}

#[test]
fn a_process_that_ends_is_left_out() {
    let volume = Volume::new();
    let file = volume.open("a");
    let (stays, ends) = (Target::fork(&[]), Target::fork(&[]));
    let ids = [id_of(&stays), id_of(&ends)];
    let mut census = volume.census(&ids);
    assert_eq!(census.processes().len(), 2);
    assert_eq!(
        by_fd(&census, ids[0], fd_of(&file)).unwrap().places.len(),
        2
    );
    drop(ends);
    let difference = volume.rescan(&mut census, &ids);
    assert!(difference.is_structural);
    assert_eq!(
        census.processes().iter().map(|p| p.id).collect::<Vec<_>>(),
        [ids[0]]
    );
    assert_eq!(
        by_fd(&census, ids[0], fd_of(&file)).unwrap().places.len(),
        1
    );
    let reused = ProcessId {
        start_time: ids[0].start_time + 1,
        ..ids[0]
    };
    assert!(volume.census(&[reused]).processes().is_empty());
}

#[test]
fn threads_may_have_tables_and_directories_of_their_own() {
    let volume = Volume::new();
    fs::create_dir(volume.path("elsewhere")).unwrap();
    let elsewhere = volume.path("elsewhere");
    let common = volume.open("common");
    let path = volume.path("alone");
    let (tell, told) = mpsc::channel();
    let (release, released) = mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        sys::unshare(libc::CLONE_FILES | libc::CLONE_FS).unwrap();
        std::env::set_current_dir(elsewhere).unwrap();
        let alone = open_rw(&path);
        tell.send((
            rustix::thread::gettid().as_raw_nonzero().get(),
            fd_of(&alone),
        ))
        .unwrap();
        let _ = released.recv();
    });
    let (tid, fd) = told.recv().unwrap();
    let own = ProcessId::own().unwrap();
    let census = census::take(&[own], &|facts| volume.has(facts));
    drop(release);
    thread.join().unwrap();
    let census = census.unwrap();

    let process = &census.processes()[0];
    let thread = process
        .threads
        .iter()
        .find(|t| t.tid == Tid::new(tid).unwrap())
        .unwrap();
    let main = process
        .threads
        .iter()
        .find(|t| t.tid == process.id.pid.leader())
        .unwrap();
    assert_ne!(thread.table, main.table);
    assert_ne!(thread.fs, main.fs);
    let places = census.places_in(thread.table);
    let fds: Vec<Fd> = places.iter().map(|(place, _)| place.fd).collect();
    assert_eq!(fds, ascending([fd_of(&common), fd]));
    let common = by_fd(&census, own, fd_of(&common)).unwrap();
    assert!(
        places.iter().any(|(_, id)| *id == common.id),
        "the copied table shares the description"
    );
    let fs = census
        .fs_structs()
        .iter()
        .find(|f| f.id == thread.fs)
        .unwrap();
    assert!(fs.cwd.as_ref().unwrap().facts.path.ends_with("elsewhere"));
    let table = census
        .tables()
        .iter()
        .find(|t| t.id == thread.table)
        .unwrap();
    assert_eq!(table.members.len(), 1);
}

#[test]
fn a_process_outlives_its_first_thread() {
    let volume = Volume::new();
    let program = "import ctypes, sys, threading, time\n\
        file = open(sys.argv[1], 'w')\n\
        def wait():\n    time.sleep(0.2)\n    open(sys.argv[2], 'w').close()\n    time.sleep(100)\n\
        threading.Thread(target=wait).start()\n\
        ctypes.CDLL(None).syscall(int(sys.argv[3]), 0)\n";
    let ready = volume.path("ready");
    let mut command = Command::new("python3");
    command
        .args(["-c", program])
        .arg(volume.path("a"))
        .arg(&ready)
        .arg(libc::SYS_exit.to_string());
    let program = Program::start(&mut command);
    let id = program.id();
    let end = Instant::now() + Duration::from_secs(20);
    while !ready.exists() {
        assert!(Instant::now() < end, "the second thread does not go on");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(id.is_alive().unwrap());
    let census = volume.census(&[id]);
    assert_eq!(census.processes().len(), 1);
    let table = &census.tables()[0];
    assert!(
        table.members.iter().all(|m| m.tid != id.pid.leader()),
        "{table:?}"
    );
    assert!(
        census
            .descriptions()
            .any(|d| d.facts.path == volume.path("a"))
    );
}

#[test]
fn special_files_are_listed_and_never_kept() {
    let volume = Volume::new();
    let fifo = volume.path("fifo");
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let reader = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&fifo)
        .unwrap();
    let device = volume.path("null");
    let number = rustix::fs::makedev(1, 3);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &device,
        rustix::fs::FileType::CharacterDevice,
        mode,
        number,
    )
    .unwrap();
    let device = File::open(&device).unwrap();
    let target = Target::fork(&[]);

    let census = volume.census(&[id_of(&target)]);
    assert_eq!(census.descriptions().len(), 0);
    let specials = ascending(
        census
            .specials()
            .iter()
            .map(|s| (s.fd, s.facts.kind == FileKind::Fifo)),
    );
    assert_eq!(
        specials,
        ascending([(fd_of(&reader), true), (fd_of(&device), false)])
    );
}

#[test]
fn what_cannot_be_moved_is_named() {
    let volume = Volume::new();
    let file = volume.open("a");
    let (left, right) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let fds = [file.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
    let data = [std::io::IoSlice::new(b"x")];
    rustix::net::sendmsg(&left, &data, &mut control, rustix::net::SendFlags::empty()).unwrap();
    let watch = sys::inotify(&CString::new(volume.root.as_os_str().as_bytes()).unwrap()).unwrap();
    let path = volume.path("program");
    fs::copy("/bin/sleep", &path).unwrap();
    let program = Program::start(Command::new(&path).arg("100").arg0("sleep"));
    let target = Target::fork(&[]);

    let census = volume.census(&[id_of(&target), program.id()]);
    let found = |wanted: &dyn Fn(&NotCovered) -> bool| census.not_covered().iter().any(wanted);
    assert!(found(
        &|n| matches!(n, NotCovered::InFlight { fd, descriptors: 1, .. } if *fd == fd_of(&right))
    ));
    let inode = rustix::fs::stat(&volume.root).unwrap().st_ino;
    assert!(found(
        &|n| matches!(n, NotCovered::Inotify { fd, watches, .. }
        if *fd == fd_of(&watch) && watches.iter().any(|(_, i)| *i == inode))
    ));
    assert!(found(
        &|n| matches!(n, NotCovered::Executable { process, facts }
        if *process == program.id().pid && facts.path == path)
    ));
    let space = census
        .spaces()
        .iter()
        .find(|s| s.processes == [program.id().pid])
        .unwrap();
    assert!(
        space
            .mappings
            .iter()
            .any(|m| m.protection.execute && !m.is_shared),
        "its text is mapped from the volume"
    );
}

#[test]
fn mappings_have_their_properties() {
    let volume = Volume::new();
    let file = volume.open("map");
    file.set_len(16 * 4096).unwrap();
    let read_only = File::open(volume.path("map")).unwrap();
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    let private = sys::Memory::map(file.as_fd(), 16 * 4096, rw, libc::MAP_PRIVATE, 0).unwrap();
    let shared = sys::Memory::map(file.as_fd(), 4 * 4096, rw, libc::MAP_SHARED, 2 * 4096).unwrap();
    let weak = sys::Memory::map(
        read_only.as_fd(),
        4096,
        libc::PROT_READ,
        libc::MAP_SHARED,
        0,
    )
    .unwrap();
    shared.poke(0, 9);
    shared.advise(libc::MADV_RANDOM).unwrap();
    drop((file, read_only));
    fs::remove_file(volume.path("map")).unwrap();
    // What is said about the private mapping is said by the target: part of it does not survive a fork.
    let say = || {
        private.advise(libc::MADV_DONTFORK)?;
        private.advise(libc::MADV_DONTDUMP)?;
        private.lock()
    };
    let target = Target::fork(&[&say, &|| weak.unmap()]);
    target.step(0);
    let id = id_of(&target);

    let mut census = volume.census(&[id]);
    let find = |census: &Census, memory: &sys::Memory| {
        census.spaces()[0]
            .mappings
            .iter()
            .find(|m| m.start == memory.address())
            .unwrap()
            .clone()
    };
    let seen = find(&census, &private);
    assert!(!seen.is_shared && seen.flags.locked && seen.flags.dont_fork && seen.flags.dont_dump);
    assert!(!seen.flags.random && !seen.flags.sealed && !seen.flags.has_userfaultfd());
    assert_eq!(
        (seen.end - seen.start, seen.offset, seen.protection.bits()),
        (16 * 4096, 0, rw)
    );
    // mlock makes the kernel fault in, and for a writable private mapping copy, every page.
    assert_eq!(
        seen.dirty
            .iter()
            .map(|r| (r.end - r.start) / 4096)
            .sum::<u64>(),
        16
    );
    let seen = find(&census, &shared);
    assert!(seen.is_shared && seen.flags.random && seen.flags.may_write && seen.dirty.is_empty());
    assert_eq!(seen.offset, 2 * 4096);
    let mapped = census.mapped_file(seen.file).unwrap();
    assert!(mapped.is_writable && mapped.facts.is_deleted && mapped.facts.links == 0);
    // Unlinked as it is, the file was opened, for writing too.
    let mut byte = [0u8];
    rustix::io::pread(&mapped.kept, &mut byte, 2 * 4096).unwrap();
    assert_eq!(byte, [9]);
    rustix::io::pwrite(&mapped.kept, &[1], 0).unwrap();
    let seen = find(&census, &weak);
    assert!(!seen.flags.may_write && !census.mapped_file(seen.file).unwrap().is_writable);
    assert_eq!(census.mapped_files().len(), 2);

    let files: Vec<_> = census.mapped_files().iter().map(|f| f.id).collect();
    assert!(volume.rescan(&mut census, &[id]).spaces.is_empty());
    assert_eq!(
        census
            .mapped_files()
            .iter()
            .map(|f| f.id)
            .collect::<Vec<_>>(),
        files
    );
    target.step(1);
    let space = census.spaces()[0].id;
    assert_eq!(volume.rescan(&mut census, &[id]).spaces, [space]);
    assert_eq!(census.spaces()[0].mappings.len(), 2);
}

#[test]
fn dirty_pages_and_guards_are_exact() {
    let volume = Volume::new();
    let file = volume.open("map");
    file.set_len(600 * 4096).unwrap();
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    let memory = sys::Memory::map(file.as_fd(), 600 * 4096, rw, libc::MAP_PRIVATE, 0).unwrap();
    // More separate ranges than one call of the kernel's scan can return, and one long one.
    let alone: Vec<usize> = (0..560).step_by(2).collect();
    for page in alone.iter().copied().chain(570..590) {
        memory.poke(page * 4096 + 5, 1);
    }
    // MADV_GUARD_INSTALL; on file mappings from kernel 6.15 on, before it there are none to be found.
    let has_guards = memory.advise_page(595, 102).is_ok();
    let target = Target::fork(&[]);
    let census = volume.census(&[id_of(&target)]);
    let mapping = census.spaces()[0]
        .mappings
        .iter()
        .find(|m| m.start == memory.address())
        .unwrap();
    let page = |n: usize| memory.address() + n as u64 * 4096;
    let mut expected: Vec<(u64, u64)> = alone.iter().map(|n| (page(*n), page(*n + 1))).collect();
    expected.push((page(570), page(590)));
    assert_eq!(
        mapping
            .dirty
            .iter()
            .map(|r| (r.start, r.end))
            .collect::<Vec<_>>(),
        expected
    );
    let guards: Vec<_> = mapping.guards.iter().map(|r| (r.start, r.end)).collect();
    assert_eq!(
        guards,
        if has_guards {
            vec![(page(595), page(596))]
        } else {
            Vec::new()
        }
    );
}

#[test]
fn a_rescan_names_what_changed_and_nothing_else() {
    let volume = Volume::new();
    let (stays, closes, renames) = (
        volume.open("stays"),
        volume.open("closes"),
        volume.open("old"),
    );
    let (reused, spare) = (volume.open("reused"), File::open("/dev/null").unwrap());
    let name = |name: &str| CString::new(volume.path(name).as_os_str().as_bytes()).unwrap();
    let (reused_name, fresh_name) = (name("reused"), name("fresh"));
    let fresh = || -> std::io::Result<()> {
        let close = |fd: std::os::fd::BorrowedFd<'_>| sys::close(fd);
        close(closes.as_fd())?;
        // The same number, the same file, the same flags, but another description.
        sys::replace(reused.as_fd(), &reused_name, libc::O_RDWR | libc::O_CLOEXEC)?;
        sys::replace(
            spare.as_fd(),
            &fresh_name,
            libc::O_RDWR | libc::O_CREAT | libc::O_CLOEXEC,
        )?;
        sys::fcntl(stays.as_fd(), libc::F_DUPFD_CLOEXEC, 500)?;
        rustix::io::write(&stays, b"x")?;
        Ok(())
    };
    let more = || -> std::io::Result<()> {
        sys::fcntl(stays.as_fd(), libc::F_SETFD, 0)?;
        sys::lock(spare.as_fd(), libc::F_OFD_SETLK, libc::F_WRLCK, 0, 1)
    };
    let target = Target::fork(&[&fresh, &more]);
    let id = id_of(&target);
    let mut census = volume.census(&[id]);
    let of = |census: &Census, file: &File| by_fd(census, id, fd_of(file)).unwrap().id;
    let [stays_id, closes_id, renames_id, reused_id] =
        [&stays, &closes, &renames, &reused].map(|file| of(&census, file));
    assert_eq!(census.descriptions().len(), 4);

    let nothing = volume.rescan(&mut census, &[id]);
    assert!(
        nothing.is_empty() && nothing.changed.is_empty(),
        "{nothing:?}"
    );

    target.step(0);
    fs::rename(volume.path("old"), volume.path("new")).unwrap();
    let difference = volume.rescan(&mut census, &[id]);
    let (fresh_id, new_id) = (of(&census, &spare), of(&census, &reused));
    assert_eq!(
        ascending(difference.appeared.clone()),
        ascending([fresh_id, new_id])
    );
    assert_ne!(new_id, reused_id);
    let vanished = ascending(difference.vanished.iter().map(|d| d.id));
    assert_eq!(vanished, ascending([closes_id, reused_id]));
    assert_eq!(difference.moved, [stays_id]);
    assert_eq!(
        ascending(difference.changed.clone()),
        ascending([stays_id, renames_id])
    );
    assert_eq!(
        by_fd(&census, id, Fd::new(500).unwrap()).unwrap().id,
        stays_id
    );
    assert_eq!(
        census.description(renames_id).unwrap().facts.path,
        volume.path("new")
    );
    assert_eq!(census.description(stays_id).unwrap().position, 1);
    assert!(!difference.is_structural);

    target.step(1);
    let difference = volume.rescan(&mut census, &[id]);
    assert_eq!(
        (difference.moved, difference.changed),
        (vec![stays_id], vec![fresh_id])
    );
    assert!(difference.appeared.is_empty() && difference.vanished.is_empty());
    let cloexec: Vec<bool> = census
        .description(stays_id)
        .unwrap()
        .places
        .iter()
        .map(|p| p.close_on_exec)
        .collect();
    assert_eq!(cloexec, [false, true]);
}

#[test]
fn a_running_program_that_reopens_without_pause_is_never_mixed_up() {
    let volume = Volume::new();
    let program = "import os, sys\nd = sys.argv[1]\nn = 0\n\
        while True:\n    n += 1\n    f = os.open(f'{d}/{n % 7}', os.O_RDWR | os.O_CREAT)\n    os.lseek(f, n % 7, 0)\n    os.close(f)\n";
    let program = Program::start(
        Command::new("python3")
            .args(["-c", program])
            .arg(&volume.root),
    );
    let mut census = Census::default();
    let mut seen = 0;
    let end = Instant::now() + Duration::from_secs(20);
    while seen < 20 && Instant::now() < end {
        volume.rescan(&mut census, &[program.id()]);
        for description in census.descriptions() {
            let kept = rustix::fs::fstat(&description.kept).unwrap();
            assert_eq!(kept.st_ino, description.facts.inode);
            let by_name = rustix::fs::stat(&description.facts.path).unwrap();
            assert_eq!(
                by_name.st_ino, description.facts.inode,
                "{:?}",
                description.facts
            );
            seen += 1;
        }
    }
    assert!(seen > 0, "no file was ever seen open");
}
