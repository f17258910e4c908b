//! A mirror of a throw-away volume, mounted in the private namespace of the calling thread, and gone with it.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use hobble_fuse::mount::{self, Connection, MountOptions};
use hobble_fuse::{Features, Metrics, Server};
use hobble_mirror::{Caching, Callers, Config, Everybody, Legacy, Mirror, PlanChange};
use hobble_rules::Plan;
use hobble_testkit::namespace::Namespace;
use hobble_testkit::volume::{Kind, Volume};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MoveMountFlags, UnmountFlags};

/// How to mount.
pub struct Options {
    pub passthrough: bool,
    pub caching: Caching,
    pub native: bool,
    /// What to serve instead of the backing directory itself, such as a clone of its tree.
    pub root: Option<OwnedFd>,
    pub mask: Features,
    pub callers: Arc<dyn Callers>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            passthrough: true,
            caching: Caching::default(),
            native: true,
            root: None,
            mask: Features::all(),
            callers: Arc::new(Everybody),
        }
    }
}

impl Options {
    /// As on a kernel without passthrough.
    pub fn without_passthrough() -> Self {
        Self {
            mask: Features::all().difference(Features::PASSTHROUGH),
            ..Self::default()
        }
    }
}

/// A mounted mirror.
pub struct Hook {
    pub mirror: Mirror,
    pub server: Server,
    pub mount: OwnedFd,
    /// The backing tree.
    pub back: PathBuf,
    /// The mirror.
    pub front: PathBuf,
    connection: Connection,
    legacy: Legacy,
}

impl Hook {
    /// Mirrors `back` at a new directory beside it.
    pub fn new(back: &Path, options: Options) -> Self {
        // Short: a socket's path has room for 107 bytes (unix(7)).
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let name = format!("m{}", SERIAL.fetch_add(1, Ordering::Relaxed));
        let front = back.parent().unwrap().join(name);
        std::fs::create_dir(&front).unwrap();
        let open = |path: &Path| {
            rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
        };
        let legacy = Legacy::new().unwrap();
        let config = Config {
            root: options.root.unwrap_or_else(|| open(back)),
            native: options.native.then(|| open(back)),
            volume: b"/volume".to_vec(),
            caching: options.caching,
            passthrough: options.passthrough,
            legacy: Some(legacy.clone()),
        };
        let mirror = Mirror::new(config, options.callers).unwrap();
        let new = mount::create(&MountOptions::default()).unwrap();
        let serving = hobble_fuse::Config {
            features: Mirror::features(),
            mask: options.mask,
            max_stack_depth: 2,
            ..hobble_fuse::Config::default()
        };
        let server = Server::start(new.device, Arc::new(mirror.clone()), &serving).unwrap();
        let target = open(&front);
        rustix::mount::move_mount(
            new.mount.as_fd(),
            "",
            target.as_fd(),
            "",
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
        )
        .unwrap();
        Self {
            mirror,
            server,
            mount: new.mount,
            back: back.to_path_buf(),
            front,
            connection: new.connection,
            legacy,
        }
    }

    /// Puts rules in force, each written as a `--fault` string.
    pub fn inject(&self, faults: &[&str]) -> PlanChange {
        let document = hobble_rules::fault_flag::parse_all(faults).unwrap();
        let experiment = hobble_rules::check(&document).unwrap();
        let change = self.mirror.set_plan(
            Some(Arc::new(Plan::compile(
                &experiment,
                7,
                None,
                Duration::ZERO,
            ))),
            Instant::now(),
        );
        assert!(change.settled, "the kernel did not drop its caches");
        change
    }

    /// Takes the rules away.
    pub fn recover(&self) -> PlanChange {
        let change = self.mirror.set_plan(None, Instant::now());
        assert!(change.settled, "the kernel did not drop its caches");
        change
    }

    pub fn metrics(&self) -> Metrics {
        self.server.metrics()
    }

    /// A path in the mirror.
    pub fn at(&self, name: impl AsRef<Path>) -> PathBuf {
        self.front.join(name)
    }

    /// The same path in the backing tree.
    pub fn behind(&self, name: impl AsRef<Path>) -> PathBuf {
        self.back.join(name)
    }
}

impl Drop for Hook {
    fn drop(&mut self) {
        self.mirror.quiesce(true);
        self.mirror.lot().release_all();
        if !std::thread::panicking() {
            // Whatever was done, a successor would know of it.
            self.mirror.audit_legacy(&self.legacy).unwrap();
        }
        let _ = rustix::mount::unmount(&self.front, UnmountFlags::DETACH);
        // `self.mount` refers to the mount that was moved: it is in use until closed, so the connection is ended by force.
        if let Err(error) = self.connection.abort() {
            eprintln!("warning: cannot abort the connection: {error}");
        }
        let ended = self.server.wait(Duration::from_secs(10));
        let _ = std::fs::remove_dir(&self.front);
        if !std::thread::panicking() {
            assert!(ended, "the server did not end");
            let metrics = self.server.metrics();
            assert_eq!(
                metrics.replies_dropped, 0,
                "a request was dropped unanswered"
            );
            assert_eq!(metrics.replies_refused, 0, "the kernel refused a reply");
            assert_eq!(metrics.malformed, 0, "a request was malformed");
            assert_eq!(metrics.panics, 0, "a request panicked");
        }
    }
}

/// Runs a test body on a mirror of a new volume of this kind.
pub fn with(kind: Kind, options: Options, body: impl FnOnce(&Hook)) {
    let namespace = Namespace::enter().unwrap();
    let volume = Volume::new(&namespace, kind).unwrap();
    let back = volume.directory("back").unwrap();
    std::fs::set_permissions(&back, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    {
        let hook = Hook::new(&back, options);
        body(&hook);
    }
}

/// The absolute path as the rules see it.
pub fn absolute(name: &str) -> Vec<u8> {
    [b"/volume/", Path::new(name).as_os_str().as_bytes()].concat()
}

/// A program found in `HOBBLE_TOOLS`, where `cargo xtask setup` puts it, or in `PATH`; missing is a failure.
pub fn tool(name: &str) -> PathBuf {
    let directory = std::env::var_os("HOBBLE_TOOLS").map_or_else(
        || hobble_testkit::program::target_directory().join("tools/bin"),
        PathBuf::from,
    );
    Some(directory.join(name))
        .filter(|path| path.is_file())
        .unwrap_or_else(|| hobble_testkit::need::tool(name).unwrap())
}
