//! Placing and removing a mount in the namespaces of real processes. A tmpfs plays the hook. Every mount lives in a namespace that ends
//! with the processes of its test.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use hobble_graft::ids::{Device, Pid, ProcessId};
use hobble_graft::mounts::{
    self, Covering, Filesystem, Location, MountNamespace, MountsError, PropagationRecord,
    clone_tree, remove_leftovers, sightings, submounts,
};
use hobble_graft::proc::mountinfo::{self, Mount, Propagation};
use hobble_graft::stop::Deadline;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags};

const PATIENCE: Duration = Duration::from_secs(20);

/// A process that holds a mount namespace, and ends with it.
struct Holder(Child);

impl Holder {
    /// Runs a shell script that ends by saying `ready`, and then sleeps.
    fn start(command: &mut Command, script: &str) -> Self {
        Self::expect_ready(command.args([
            "sh",
            "-c",
            &format!("set -e\n{script}\necho ready\nexec sleep 1000"),
        ]))
    }

    fn expect_ready(command: &mut Command) -> Self {
        let mut holder = Self(command.stdout(Stdio::piped()).spawn().unwrap());
        let mut line = String::new();
        BufReader::new(holder.0.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert_eq!(line, "ready\n", "the script has failed");
        holder
    }

    fn pid(&self) -> Pid {
        Pid::new(self.0.id().cast_signed()).unwrap()
    }

    fn namespace(&self) -> MountNamespace {
        MountNamespace::of(self.pid()).unwrap()
    }

    fn mounts(&self) -> Vec<Mount> {
        mountinfo::of_process(self.pid()).unwrap()
    }

    fn has(&self, hook: &Filesystem) -> bool {
        self.mounts()
            .iter()
            .any(|m| m.device == hook.device && m.source == hook.source)
    }

    /// A path of the namespace, as we can open it.
    fn see(&self, path: &Path) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{}", self.pid(), path.display()))
    }

    fn run(&self, script: &str) {
        let done = Command::new("nsenter")
            .args(["-t", &self.pid().to_string(), "-m", "sh", "-ec", script])
            .status()
            .unwrap();
        assert!(done.success(), "{script}");
    }

    /// A process in a copy of this one's mount namespace, made by `unshare` with `arguments`.
    fn copy(&self, arguments: &[&str], script: &str) -> Self {
        let mut command = Command::new("nsenter");
        command
            .args(["-t", &self.pid().to_string(), "-m", "unshare", "-m"])
            .args(arguments);
        Self::start(&mut command, script)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A world with a filesystem `base`, mounted shared, which holds `vol` with a file, a mount below it, and another directory.
struct World {
    dir: tempfile::TempDir,
    outside: Holder,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().display();
        let script = format!(
            "mount -t tmpfs base {at}\nmount --make-shared {at}\nmkdir {at}/vol {at}/vol/sub {at}/other\n\
             echo native > {at}/vol/file\nmount -t tmpfs below {at}/vol/sub\necho deep > {at}/vol/sub/deep"
        );
        let outside = Holder::start(
            Command::new("unshare").args(["-m", "--propagation", "private"]),
            &script,
        );
        Self { dir, outside }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn base(&self, holder: &Holder) -> Mount {
        holder
            .mounts()
            .into_iter()
            .find(|m| m.mount_point == self.dir.path())
            .unwrap()
    }
}

/// A detached tmpfs with a file `file`, and what is bound onto it: a directory `sub` and a file `sock`.
fn hook() -> (OwnedFd, Filesystem) {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    // A name of its own: device numbers go from the hook of one test to that of another.
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let source = format!("hook-{}", NEXT.fetch_add(1, Ordering::Relaxed));
    rustix::mount::fsconfig_set_string(context.as_fd(), "source", &source).unwrap();
    rustix::mount::fsconfig_create(context.as_fd()).unwrap();
    let mount = rustix::mount::fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )
    .unwrap();
    rustix::fs::mkdirat(&mount, "sub", Mode::RWXU).unwrap();
    for (name, text) in [("file", "hooked\n"), ("sock", "")] {
        let file =
            rustix::fs::openat(&mount, name, OFlags::CREATE | OFlags::WRONLY, Mode::RWXU).unwrap();
        fs::File::from(file).write_all(text.as_bytes()).unwrap();
    }
    let stat = rustix::fs::fstat(&mount).unwrap();
    let device = Device {
        major: rustix::fs::major(stat.st_dev),
        minor: rustix::fs::minor(stat.st_dev),
    };
    (
        mount,
        Filesystem {
            device,
            source: source.into(),
        },
    )
}

fn place(target: &Holder, path: &Path, top: &OwnedFd) -> (Covering, PropagationRecord) {
    let location = Location::resolve(target.pid(), path).unwrap();
    let record = Covering::record(&target.namespace(), &location, PATIENCE).unwrap();
    let covering =
        Covering::place(target.namespace(), &location, top.as_fd(), record, PATIENCE).unwrap();
    (covering, record)
}

fn read(path: PathBuf) -> String {
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Attaches and detaches in a namespace made with `propagation`, with sandboxes made meanwhile.
fn round_trip(propagation: &str, volume: &str) {
    let world = World::new();
    let target = world.outside.copy(&["--propagation", propagation], "");
    let before = world.base(&target).propagation;
    let own = Holder(Command::new("sleep").arg("1000").spawn().unwrap());
    let path = world.path(volume);
    let (top, hook) = self::hook();
    let file = target.see(&path).join("file");

    let (covering, record) = place(&target, &path, &top);
    assert_eq!(record.propagation, before);
    assert_eq!(covering.device(), hook.device);
    assert_eq!(read(file.clone()), "hooked\n");
    assert!(covering.is_in_place(PATIENCE).unwrap());
    assert!(target.has(&hook));
    assert!(
        !world.outside.has(&hook),
        "the hook shows up outside the target's namespace ({propagation})"
    );
    assert!(!own.has(&hook));
    assert_eq!(sightings(hook.clone(), PATIENCE).unwrap().len(), 1);

    // What others mount meanwhile still arrives where it did before.
    let other = world.path("other").display().to_string();
    world.outside.run(&format!("mount -t tmpfs late {other}"));
    let arrives = target
        .mounts()
        .iter()
        .any(|m| m.mount_point == world.path("other"));
    assert_eq!(arrives, !before.is_private(), "{propagation}");

    let sandbox = target.copy(&["-U", "-r", "--propagation", "slave"], "");
    let twin = target.copy(&["--propagation", "unchanged"], "");
    assert!(
        sandbox.has(&hook) && twin.has(&hook),
        "copies of the namespace are hooked too"
    );

    covering.remove(PATIENCE).unwrap();
    assert_eq!(
        sightings(hook.clone(), PATIENCE).unwrap(),
        [],
        "the hook has stayed behind ({propagation})"
    );
    assert!(!sandbox.has(&hook) && !twin.has(&hook));
    assert_eq!(world.base(&target).propagation, before, "{propagation}");
    if volume == "vol" {
        assert_eq!(read(file), "native\n");
    }
    world.outside.run(&format!("umount {other}"));
    let is_gone = !target
        .mounts()
        .iter()
        .any(|m| m.mount_point == world.path("other"));
    assert!(is_gone);
}

#[test]
fn nothing_shows_up_outside_or_stays_behind_with_a_peer() {
    round_trip("unchanged", "vol");
    round_trip("unchanged", "");
}

#[test]
fn nothing_shows_up_outside_or_stays_behind_with_a_slave() {
    round_trip("slave", "vol");
    round_trip("slave", "");
}

#[test]
fn nothing_shows_up_outside_or_stays_behind_with_a_private_mount() {
    round_trip("private", "vol");
    round_trip("private", "");
}

#[test]
fn an_unbindable_mount_is_unbindable_again() {
    let world = World::new();
    let at = world.dir.path().display();
    let target = world.outside.copy(
        &["--propagation", "private"],
        &format!("mount --make-unbindable {at}"),
    );
    let (top, hook) = self::hook();
    let (covering, _) = place(&target, &world.path("vol"), &top);
    covering.remove(PATIENCE).unwrap();
    let unbindable = Propagation {
        is_unbindable: true,
        ..Propagation::default()
    };
    assert_eq!(world.base(&target).propagation, unbindable);
    assert_eq!(sightings(hook.clone(), PATIENCE).unwrap(), []);
}

#[test]
fn a_slave_that_is_shared_gets_both_groups_back() {
    let world = World::new();
    let at = world.dir.path().display();
    let target = world.outside.copy(
        &["--propagation", "slave"],
        &format!("mount --make-shared {at}"),
    );
    let before = world.base(&target).propagation;
    assert!(before.peer_group.is_some() && before.master.is_some());
    let (top, _) = hook();
    let (covering, _) = place(&target, &world.path("vol"), &top);
    let during = world.base(&target).propagation;
    assert_ne!(during.peer_group, before.peer_group);
    covering.remove(PATIENCE).unwrap();
    assert_eq!(world.base(&target).propagation, before);
}

#[test]
fn a_sandbox_without_privileges_can_be_a_target() {
    let world = World::new();
    let sandbox = world.outside.copy(&["-U", "-r"], "");
    let before = world.base(&sandbox).propagation;
    let location = Location::resolve(sandbox.pid(), &world.path("vol")).unwrap();
    // Its mounts are locked together, so the copy has what lies below too.
    let tree = clone_tree(&sandbox.namespace(), &location, false, PATIENCE).unwrap();
    let deep = rustix::fs::openat(&tree, "sub/deep", OFlags::RDONLY, Mode::empty()).unwrap();
    let mut text = String::new();
    fs::File::from(deep).read_to_string(&mut text).unwrap();
    assert_eq!(text, "deep\n");

    let (top, hook) = self::hook();
    let (covering, _) = place(&sandbox, &world.path("vol"), &top);
    assert_eq!(read(sandbox.see(&world.path("vol/file"))), "hooked\n");
    covering.remove(PATIENCE).unwrap();
    assert_eq!(read(sandbox.see(&world.path("vol/file"))), "native\n");
    assert_eq!(sightings(hook.clone(), PATIENCE).unwrap(), []);
    assert_eq!(world.base(&sandbox).propagation, before);
}

#[test]
fn the_real_tree_is_reached_below_the_hook_and_stays_private() {
    let world = World::new();
    let target = world.outside.copy(&["--propagation", "unchanged"], "");
    let location = Location::resolve(target.pid(), &world.path("vol")).unwrap();
    let alone = clone_tree(&target.namespace(), &location, false, PATIENCE).unwrap();
    let all = clone_tree(&target.namespace(), &location, true, PATIENCE).unwrap();
    let (top, _) = hook();
    let (covering, _) = place(&target, &world.path("vol"), &top);
    // A mount made by a peer outside must not appear in the copies, nor ours.
    world.outside.run(&format!(
        "mkdir {0}/new; mount -t tmpfs new {0}/new; echo x > {0}/new/x",
        world.path("vol").display()
    ));
    let text = |tree: &OwnedFd, name: &str| {
        let file = rustix::fs::openat(tree, name, OFlags::RDONLY, Mode::empty())?;
        let mut text = String::new();
        fs::File::from(file).read_to_string(&mut text).unwrap();
        Ok::<_, Errno>(text)
    };
    assert_eq!(text(&alone, "file").unwrap(), "native\n");
    assert_eq!(text(&alone, "sub/deep"), Err(Errno::NOENT));
    assert_eq!(text(&all, "sub/deep").unwrap(), "deep\n");
    for tree in [&alone, &all] {
        assert_eq!(text(tree, "new/x"), Err(Errno::NOENT));
    }
    covering.remove(PATIENCE).unwrap();
}

#[test]
fn what_lies_below_is_bound_through_the_hook() {
    let world = World::new();
    let target = world.outside.copy(&["--propagation", "unchanged"], "");
    let volume = world.path("vol");
    let socket = target.see(&volume).join("sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let location = Location::resolve(target.pid(), &volume).unwrap();
    let below = submounts(target.pid(), &location).unwrap();
    assert_eq!(
        below
            .iter()
            .map(|m| m.mount_point.clone())
            .collect::<Vec<_>>(),
        [volume.join("sub")]
    );

    let (top, hook) = self::hook();
    let (covering, _) = place(&target, &volume, &top);
    assert!(
        UnixStream::connect(&socket).is_err(),
        "the hook's own file is no socket"
    );
    let names = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
    let late = covering
        .bind_through(names(&["sock", "sub"]), Deadline::after(Duration::ZERO))
        .unwrap_err();
    assert!(
        matches!(late, MountsError::Late { .. } | MountsError::Timeout { .. }),
        "{late:?}"
    );
    assert_eq!(
        submounts(target.pid(), &location).unwrap(),
        below,
        "nothing is bound once the deadline has passed"
    );
    assert!(UnixStream::connect(&socket).is_err());
    // Those that cannot be bound, for reasons of their own, keep no other from being bound.
    let unbound = covering
        .bind_through(
            names(&["nothing", "sock", "../other", "sub"]),
            Deadline::after(PATIENCE),
        )
        .unwrap();
    UnixStream::connect(&socket).unwrap();
    listener.accept().unwrap();
    assert_eq!(read(target.see(&volume.join("sub/deep"))), "deep\n");
    let why: Vec<_> = unbound
        .iter()
        .map(|(name, error)| match error {
            MountsError::Step { errno, .. } => (name.as_path(), *errno),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(
        why,
        [
            (Path::new("nothing"), Errno::NOENT),
            (Path::new("../other"), Errno::XDEV)
        ]
    );

    covering.remove(PATIENCE).unwrap();
    assert_eq!(sightings(hook.clone(), PATIENCE).unwrap(), []);
    assert_eq!(read(target.see(&volume.join("sub/deep"))), "deep\n");
    UnixStream::connect(&socket).unwrap();
    let now = submounts(target.pid(), &location).unwrap();
    assert_eq!(now, below, "what was mounted below is mounted as it was");
}

#[test]
fn a_single_file_can_be_covered() {
    let world = World::new();
    let target = world.outside.copy(&["--propagation", "unchanged"], "");
    let before = world.base(&target).propagation;
    let (tree, hook) = self::hook();
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let top = rustix::mount::open_tree(&tree, "file", flags).unwrap();
    let path = world.path("vol/file");
    let location = Location::resolve(target.pid(), &path).unwrap();
    let record = Covering::record(&target.namespace(), &location, PATIENCE).unwrap();
    let covering =
        Covering::place(target.namespace(), &location, top.as_fd(), record, PATIENCE).unwrap();
    assert_eq!(read(target.see(&path)), "hooked\n");
    assert!(!world.outside.has(&hook));
    covering.remove(PATIENCE).unwrap();
    assert_eq!(read(target.see(&path)), "native\n");
    assert_eq!(world.base(&target).propagation, before);
}

#[test]
fn a_lost_hook_is_noticed() {
    let world = World::new();
    let target = world.outside.copy(&["--propagation", "unchanged"], "");
    let (top, _) = hook();
    let (covering, _) = place(&target, &world.path("vol"), &top);
    target.run(&format!("umount -l {}", world.path("vol").display()));
    assert!(!covering.is_in_place(PATIENCE).unwrap());
    covering.remove(PATIENCE).unwrap();

    fs::create_dir(world.outside.see(&world.path("doomed"))).unwrap();
    let before = world.base(&target).propagation;
    let (top, hook) = self::hook();
    let (covering, _) = place(&target, &world.path("doomed"), &top);
    // Removing the directory elsewhere detaches what is mounted on it here.
    fs::remove_dir(world.outside.see(&world.path("doomed"))).unwrap();
    assert!(!covering.is_in_place(PATIENCE).unwrap());
    covering.remove(PATIENCE).unwrap();
    assert_eq!(world.base(&target).propagation, before);
    assert_eq!(sightings(hook.clone(), PATIENCE).unwrap(), []);
}

#[test]
fn a_later_process_can_clean_up() {
    for propagation in ["unchanged", "slave", "private"] {
        let world = World::new();
        let target = world.outside.copy(&["--propagation", propagation], "");
        let before = world.base(&target).propagation;
        let (top, hook) = self::hook();
        let (covering, record) = place(&target, &world.path("vol"), &top);
        let loner = target.copy(&["--propagation", "private"], "");
        // Dropped without being removed: what a killed process leaves.
        drop((covering, top));
        assert_eq!(sightings(hook.clone(), PATIENCE).unwrap().len(), 2);
        // Another filesystem with that number is not ours.
        assert_eq!(remove_leftovers(hook.device, PATIENCE).unwrap(), []);
        assert!(loner.has(&hook) && target.has(&hook));
        assert_eq!(remove_leftovers(hook.clone(), PATIENCE).unwrap(), []);
        assert_eq!(sightings(hook.clone(), PATIENCE).unwrap(), []);
        assert!(!loner.has(&hook));
        let location = Location::resolve(target.pid(), &world.path("vol")).unwrap();
        Covering::restore(&target.namespace(), &location, record, PATIENCE).unwrap();
        let after = world.base(&target).propagation;
        assert_eq!(after, before, "{propagation}");
        let elsewhere = Location::resolve(target.pid(), &world.path("vol/sub")).unwrap();
        let refused =
            Covering::restore(&target.namespace(), &elsewhere, record, PATIENCE).unwrap_err();
        assert!(matches!(refused, MountsError::NotOurs { .. }));
    }
}

#[test]
fn a_locked_copy_that_left_propagation_is_named() {
    let world = World::new();
    let target = world.outside.copy(&["--propagation", "unchanged"], "");
    let (top, hook) = self::hook();
    let (covering, _) = place(&target, &world.path("vol"), &top);
    let sandbox = target.copy(&["-U", "-r", "--propagation", "private"], "");
    covering.remove(PATIENCE).unwrap();
    assert!(sandbox.has(&hook));
    let left = remove_leftovers(hook.clone(), PATIENCE).unwrap();
    assert_eq!(left.len(), 1);
    assert_eq!(
        (left[0].namespace, left[0].refused),
        (sandbox.namespace().id(), Some(Errno::INVAL))
    );
    drop(sandbox);
    // Whoever looks through all namespaces, as other tests do, keeps each alive for that time.
    let end = Instant::now() + PATIENCE;
    while !sightings(hook.clone(), PATIENCE).unwrap().is_empty() {
        assert!(Instant::now() < end, "the namespace does not end");
    }
}

#[test]
fn paths_are_resolved_as_the_target_sees_them() {
    let world = World::new();
    let at = world.dir.path().display();
    let script = format!("ln -s /vol {at}/link\nln -s ../../../../../../vol {at}/up");
    let target = world.outside.copy(&["--propagation", "unchanged"], &script);
    let direct = Location::resolve(target.pid(), &world.path("vol")).unwrap();
    assert_eq!(
        (direct.path.clone(), direct.is_mount_root),
        (world.path("vol"), false)
    );
    let dotted = Location::resolve(target.pid(), &world.path("other/../vol/.")).unwrap();
    assert_eq!(
        (dotted.path, dotted.inode, dotted.mount),
        (world.path("vol"), direct.inode, direct.mount)
    );
    assert!(
        Location::resolve(target.pid(), &world.path("vol/sub"))
            .unwrap()
            .is_mount_root
    );
    let missing = Location::resolve(target.pid(), &world.path("nothing")).unwrap_err();
    assert!(
        matches!(
            missing,
            MountsError::Resolve {
                errno: Errno::NOENT,
                ..
            }
        ),
        "{missing:?}"
    );
    let magic = Location::resolve(target.pid(), Path::new("/proc/self/root/etc")).unwrap_err();
    assert!(
        matches!(
            magic,
            MountsError::Resolve {
                errno: Errno::LOOP,
                ..
            }
        ),
        "{magic:?}"
    );
    assert!(Location::resolve(Pid::new(i32::MAX).unwrap(), Path::new("/")).is_err());

    // Another root directory: what leads out of it for us leads nowhere for it.
    let program = "import os, sys, time\nos.chroot(sys.argv[1])\nprint('ready', flush=True)\ntime.sleep(1000)\n";
    let mut command = Command::new("nsenter");
    command
        .args([
            "-t",
            &target.pid().to_string(),
            "-m",
            "python3",
            "-c",
            program,
        ])
        .arg(world.dir.path());
    let jailed = Holder::expect_ready(&mut command);
    for path in ["/vol", "/link", "/up", "/../../vol"] {
        let found = Location::resolve(jailed.pid(), Path::new(path)).unwrap();
        assert_eq!(
            (found.path, found.inode, found.unique),
            (PathBuf::from("/vol"), direct.inode, direct.unique),
            "{path}"
        );
    }
    assert!(Location::resolve(target.pid(), &world.path("link")).is_err());
    let (top, hook) = self::hook();
    let (covering, _) = place(&jailed, Path::new("/vol"), &top);
    assert_eq!(read(target.see(&world.path("vol/file"))), "hooked\n");
    covering.remove(PATIENCE).unwrap();
    assert_eq!(sightings(hook.clone(), PATIENCE).unwrap(), []);
}

#[test]
fn a_visit_leaves_the_visitor_where_it_was() {
    let world = World::new();
    let own = ProcessId::own().unwrap();
    let before = MountNamespace::of(own.pid).unwrap().id();
    let cwd = std::env::current_dir().unwrap();
    let there = world.outside.namespace();
    let dir = world.path("vol/file");
    let text = there
        .enter(PATIENCE, move |_| fs::read_to_string(dir).unwrap())
        .unwrap();
    assert_eq!(text, "native\n");
    assert!(!world.path("vol/file").exists());
    assert_eq!(MountNamespace::of(own.pid).unwrap().id(), before);
    assert_eq!(std::env::current_dir().unwrap(), cwd);
    assert!(
        MountNamespace::all()
            .unwrap()
            .iter()
            .any(|n| n.id() == there.id())
    );

    let short = Duration::from_millis(50);
    let late = there
        .enter(short, move |_| std::thread::sleep(4 * short))
        .unwrap_err();
    assert!(matches!(late, MountsError::Timeout { .. }), "{late:?}");
}

#[test]
fn the_flags_of_a_mount_are_read() {
    let world = World::new();
    let at = world.path("other").display().to_string();
    world.outside.run(&format!(
        "mount -t tmpfs -o ro,nosuid,nodev,noexec,noatime flags {at}"
    ));
    let location = Location::resolve(world.outside.pid(), &world.path("other")).unwrap();
    // The descriptor was opened before the mount only if the path were not walked again.
    assert!(location.is_mount_root);
    assert_eq!(mounts::attributes_of(&location.file).unwrap(), 0x1f);
}
