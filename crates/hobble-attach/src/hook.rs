//! The hook: a FUSE connection, the mirror that serves it, its mount, and the standing of that mount in the target's namespace.
//!
//! Invariants: the mirror is served from before the mount is placed until the kernel has let go of it; the rules see nobody before
//! [`Hook::arm`] and nobody after [`Hook::disarm`]; what is kept of the target stays open as long as the hook lives. If we die, mount and connection stay with the
//! holder's descriptors.
//!
//! Length: one type, and everything that is asked of a served mirror and its mount.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hobble_api::status::NotCovered;
use hobble_fuse::mount::{self, MountOptions};
use hobble_fuse::{Features, Server, Service, Tid};
use hobble_graft::census::{Description, Directory, FileFacts, MappedFile};
use hobble_graft::ids::Device;
use hobble_graft::proc::locks::{LockClass, LockKind};
use hobble_graft::stop::Deadline;
use hobble_mirror::adopt::{AdoptedId, Adoption, HandleId};
use hobble_mirror::locks::{self, LockRange, RangeLock};
use hobble_mirror::{Caching, CallerFacts, Callers, Config, Everybody, Legacy, Mirror, PlanChange};
use hobble_rules::Plan;

use crate::control::Command;
use crate::error::{AttachError, Step};
use crate::ground::{Ground, Inherited};
use crate::ledger::{Entry, Ledger};
use crate::own::Own;
use crate::scope::TargetSet;
use crate::volume::{self, Volume};
use hobble_graft::mounts::{Covering, MountsError, PropagationRecord};

/// Other users of the volume rely on each other's changes at once, in their lock protocols above all.
const CACHING: Caching = Caching::NONE;
/// How often it is looked whether the mount is still where it was placed.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long delayed operations get to be carried out once they have been released.
const SETTLE: Duration = Duration::from_millis(200);

/// The mirror's questions about callers, answered from the set of targets.
struct Audience {
    targets: Arc<TargetSet>,
    armed: Arc<AtomicBool>,
    ledger: Arc<Ledger>,
    misfits: Arc<AtomicBool>,
    engine: Sender<Command>,
}

impl Callers for Audience {
    fn in_scope(&self, tid: Tid) -> bool {
        // Requests of thread 0 are the kernel's own (write-back, read-ahead for nobody): they are on behalf of whoever mapped the file, which in a
        // private namespace is a target.
        self.armed.load(Ordering::Acquire)
            && i32::try_from(tid.0).is_ok_and(|tid| tid == 0 || self.targets.contains(tid))
    }

    fn facts(&self, tid: Tid) -> CallerFacts {
        Everybody.facts(tid)
    }

    fn holds_locks_on(&self, file: BorrowedFd<'_>, pid: u32) {
        let entry = BTreeMap::from([(file.as_raw_fd(), Entry::Locks { pid })]);
        if let Err(error) = self.ledger.write(&entry) {
            tracing::warn!(%error, pid, "should the server die, a lock of this process is lost");
        }
    }

    fn lets_go_of(&self, file: BorrowedFd<'_>) {
        let entry = BTreeMap::from([(file.as_raw_fd(), Entry::Free)]);
        if let Err(error) = self.ledger.write(&entry) {
            tracing::debug!(%error, "the ledger does not tell that an original was closed");
        }
    }

    fn misfits(&self) {
        // One command at a time, however fast the target renames: the engine looks at all of them when it comes to it.
        if !self.misfits.swap(true, Ordering::AcqRel) {
            // Without an engine there is nobody left whom the rules are for.
            let _ = self.engine.send(Command::Reopen);
        }
    }
}

/// The mirror that is served now, for whoever gives a status: whether it passes files through is known only once it has opened some. Emptied by the
/// hook's end, so that it keeps nothing open.
pub(crate) type Served = Arc<Mutex<Option<Mirror>>>;

/// A served mirror and its mount.
pub(crate) struct Hook {
    server: Server,
    mirror: Mirror,
    /// Ours; it alone would keep the filesystem alive for ever, so it is closed when the last stand-in has been opened.
    mount: Option<OwnedFd>,
    device: Device,
    armed: Arc<AtomicBool>,
    /// The engine has been told of misfits, and has not looked since.
    misfits: Arc<AtomicBool>,
    placed: Option<Covering>,
    /// It has been placed once: somebody may have come to it by path, and be on it still.
    was_placed: bool,
    /// Removing it has failed.
    unremoved: bool,
    leftovers: Vec<NotCovered>,
    source: String,
    ground: Ground,
    looked: Instant,
    lost: bool,
    served: Served,
}

impl Drop for Hook {
    fn drop(&mut self) {
        *self.served.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Features switched off by `HOBBLE_MASK`, a list of names in any case such as `passthrough,has_resend`; for tests.
fn mask() -> Result<Features, AttachError> {
    let Ok(text) = std::env::var("HOBBLE_MASK") else {
        return Ok(Features::all());
    };
    let mut mask = Features::all();
    for name in text
        .split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty())
    {
        let Some(feature) = Features::from_name(&name.to_ascii_uppercase()) else {
            let known: Vec<String> = Features::all()
                .iter_names()
                .map(|(name, _)| name.to_ascii_lowercase())
                .collect();
            return Err(AttachError::new(
                Step::Serve,
                format!("HOBBLE_MASK: `{name}` is no feature"),
            )
            .hinting(format!("there are: {}", known.join(", "))));
        };
        mask.remove(feature);
    }
    Ok(mask)
}

/// The source that `/proc/mounts` shows: what tells one attachment's hook from another's when a device number is given again.
pub(crate) fn source(id: &str) -> String {
    format!("hobble-{id}")
}

/// What of this is offered by some kernels only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Offered {
    /// Reads, writes and mappings of files that no rule looks at stay inside the kernel.
    pub(crate) passthrough: bool,
    /// A file can be mapped shared although all its reads and writes go to the server.
    pub(crate) direct_mappings: bool,
}

/// What a kernel lacks that has no [`Offered::direct_mappings`], and the hint.
pub(crate) const NO_DIRECT_MAPPINGS: (&str, &str) = (
    "files that are mapped shared when they are moved are read through the page cache, so a rule for reads of them sees only what is not cached; files that are opened under a rule \
     for data cannot be mapped shared (ENODEV)",
    "Linux 6.6 or later",
);

/// What the kernel offers.
pub(crate) fn probe() -> Result<Offered, AttachError> {
    probing(hobble_fuse::Config::default().max_stack_depth, |server| {
        let features = server.negotiated().features;
        let passthrough = features.contains(Features::PASSTHROUGH);
        Offered {
            passthrough,
            direct_mappings: passthrough || features.contains(Features::DIRECT_IO_ALLOW_MMAP),
        }
    })
}

/// Registers a file of the volume as the mirror would register it; gives the kernel's refusal. The file may be open with `O_PATH`.
pub(crate) fn probe_backing(
    file: BorrowedFd<'_>,
    volume: &Volume,
) -> Result<Option<hobble_fuse::Errno>, AttachError> {
    probing(volume.max_stack_depth(), |server| {
        server.kernel().backing_open(file).err()
    })
}

/// Makes a connection with a service that answers nothing, to see what the kernel offers.
fn probing<T>(max_stack_depth: u32, look: impl FnOnce(&Server) -> T) -> Result<T, AttachError> {
    struct Nobody;
    impl Service for Nobody {
        fn call(&self, _request: hobble_fuse::Request, reply: hobble_fuse::Reply) {
            reply.error(hobble_fuse::Errno::NOSYS);
        }
        fn interrupted(&self, _interrupt: hobble_fuse::Interrupt) {}
    }
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
        AttachError::new(Step::Serve, "no FUSE filesystem can be made").because(error)
    };
    let new = mount::create(&MountOptions::default()).map_err(|error| failed(error.into()))?;
    let config = hobble_fuse::Config {
        mask: mask()?,
        readers: 1,
        max_stack_depth,
        ..hobble_fuse::Config::default()
    };
    let server = Server::start(new.device, Arc::new(Nobody), &config)
        .map_err(|error| failed(error.into()))?;
    let seen = look(&server);
    drop(new.mount);
    if !server.wait(Duration::from_secs(2)) {
        tracing::debug!(
            "the kernel is slow to let go of a filesystem that was made to see what it offers"
        );
    }
    Ok(seen)
}

impl Hook {
    /// Makes the connection and serves it. What remains if we die: nothing, the mount is attached nowhere.
    pub(crate) fn serve(
        volume: &Volume,
        id: &str,
        targets: Arc<TargetSet>,
        ledger: Arc<Ledger>,
        served: Served,
        engine: Sender<Command>,
        legacy: Option<Legacy>,
    ) -> Result<Self, AttachError> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |error: Box<dyn std::error::Error + Send + Sync>| {
                AttachError::new(Step::Serve, what).because(error)
            }
        };
        let mask = mask()?;
        let options = MountOptions {
            source: source(id),
            attributes: volume.mount_flags()?,
            ..MountOptions::default()
        };
        let new =
            mount::create(&options).map_err(|error| failed("make the FUSE mount")(error.into()))?;
        let armed = Arc::new(AtomicBool::new(false));
        let misfits = Arc::new(AtomicBool::new(false));
        let audience = Audience {
            targets,
            armed: Arc::clone(&armed),
            ledger,
            misfits: Arc::clone(&misfits),
            engine,
        };
        let config = Config {
            root: volume.clone_tree()?,
            native: Some(volume.native()?),
            volume: volume.absolute().to_vec(),
            caching: CACHING,
            passthrough: mask.contains(Features::PASSTHROUGH),
            legacy,
        };
        let mirror = Mirror::new(config, Arc::new(audience))
            .map_err(|error| failed("make the mirror")(error.into()))?;
        let serving = hobble_fuse::Config {
            features: Mirror::features(),
            mask,
            max_stack_depth: volume.max_stack_depth(),
            ..hobble_fuse::Config::default()
        };
        let server = Server::start(new.device, Arc::new(mirror.clone()), &serving)
            .map_err(|error| failed("serve the mirror")(error.into()))?;
        let connection = new.connection;
        *served.lock().unwrap_or_else(PoisonError::into_inner) = Some(mirror.clone());
        Ok(Self {
            server,
            mirror,
            mount: Some(new.mount),
            device: Device {
                major: 0,
                minor: connection.number(),
            },
            armed,
            misfits,
            placed: None,
            was_placed: false,
            unremoved: false,
            leftovers: Vec::new(),
            source: source(id),
            ground: Ground::Volume(volume.clone()),
            looked: Instant::now(),
            lost: false,
            served,
        })
    }

    /// Goes on serving the hook of a server that has died: what it had taken and not answered is handed out again. Gives the numbers of its descriptors that are in use.
    ///
    /// When this fails the hook is as it was, but for descriptors that only the dead server had a use for.
    pub(crate) fn take_over(
        inherited: Inherited,
        id: &str,
        targets: Arc<TargetSet>,
        ledger: Arc<Ledger>,
        served: Served,
        engine: Sender<Command>,
        legacy: &Legacy,
    ) -> Result<(Self, HashSet<RawFd>), AttachError> {
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
            AttachError::new(Step::Serve, "the hook cannot be taken over").because(error)
        };
        let armed = Arc::new(AtomicBool::new(false));
        let misfits = Arc::new(AtomicBool::new(false));
        let audience = Audience {
            targets,
            armed: Arc::clone(&armed),
            ledger,
            misfits: Arc::clone(&misfits),
            engine,
        };
        let (mirror, estate) = Mirror::resume(legacy, Arc::new(audience), CACHING)
            .map_err(|error| failed(error.into()))?;
        let serving = hobble_fuse::Config {
            features: Mirror::features(),
            mask: mask()?,
            max_stack_depth: estate.negotiated.max_stack_depth,
            ..hobble_fuse::Config::default()
        };
        let hobble_mirror::Inherited {
            device,
            negotiated,
            numbers,
        } = estate;
        let server = Server::resume(device, Arc::new(mirror.clone()), &serving, negotiated);
        let server = match server {
            Ok(server) => server,
            Err(error) => {
                // What undoes the hook instead needs the originals of the programs' files where they are.
                std::mem::forget(mirror);
                return Err(failed(error.into()));
            }
        };
        *served.lock().unwrap_or_else(PoisonError::into_inner) = Some(mirror.clone());
        let hook = Self {
            server,
            mirror,
            mount: None,
            device: inherited.device,
            armed,
            misfits,
            placed: None,
            was_placed: true,
            unremoved: true,
            leftovers: Vec::new(),
            source: source(id),
            ground: Ground::Inherited(inherited),
            looked: Instant::now(),
            lost: false,
            served,
        };
        Ok((hook, numbers))
    }

    /// What it lies on.
    pub(crate) fn ground(&self) -> &Ground {
        &self.ground
    }

    pub(crate) fn device(&self) -> Device {
        self.device
    }

    pub(crate) fn mirror(&self) -> &Mirror {
        &self.mirror
    }

    pub(crate) fn is_placed(&self) -> bool {
        self.placed.is_some() || self.unremoved
    }

    /// Whether anybody can have come to it, though its mount may be gone again.
    pub(crate) fn was_placed(&self) -> bool {
        self.was_placed
    }

    /// From now on the rules see the targets.
    pub(crate) fn arm(&self) {
        self.armed.store(true, Ordering::Release);
    }

    /// From now on the rules see nobody; what they delay is carried out at once.
    pub(crate) fn disarm(&self) {
        self.armed.store(false, Ordering::Release);
        self.mirror.release(|_| true);
    }

    /// Carries out at once what is delayed.
    pub(crate) fn release_delayed(&self) {
        self.mirror.release(|_| true);
    }

    /// Puts a plan in force; see [`Mirror::set_plan`].
    pub(crate) fn set_plan(&self, plan: Option<Arc<Plan>>, origin: Instant) -> PlanChange {
        self.mirror.set_plan(plan, origin)
    }

    /// The open files that bypass a rule in force; see [`Mirror::misfits`]. Of those that come to be later the engine is told anew.
    pub(crate) fn misfits(&self) -> BTreeSet<u64> {
        // Before the look: what comes after it is told.
        self.misfits.store(false, Ordering::Release);
        let misfits = self.mirror.misfits().into_iter();
        misfits.map(HandleId::number).collect()
    }

    /// Nothing is delayed from now on, and what was is carried out: the target is about to be stopped (kernel-hazards A2).
    pub(crate) fn quiesce(&self) {
        self.mirror.quiesce(true);
        self.mirror.release(|_| true);
        if !self.mirror.settle(SETTLE) {
            tracing::debug!("released operations are still being carried out");
        }
    }

    /// Whether the kernel is to be told, at the next close of a descriptor, that closing need not be reported any more: it costs a round trip for each, and
    /// a target that is being taken off the hook closes all of them while it stands still.
    pub(crate) fn stop_flushing(&self, on: bool) {
        self.mirror.stop_flushing(on);
    }

    /// Delays are possible again.
    pub(crate) fn unquiesce(&self) {
        self.mirror.quiesce(false);
    }

    fn stand_in(
        &self,
        original: impl Into<std::sync::Arc<OwnedFd>>,
        adoption: Adoption,
    ) -> std::io::Result<(AdoptedId, OwnedFd)> {
        let id = self.mirror.adopt(original, adoption)?;
        match self
            .mount()
            .and_then(|mount| self.mirror.stand_in(mount, id))
        {
            Ok(stand_in) => Ok((id, stand_in)),
            Err(error) => {
                self.mirror.disown(id);
                Err(error)
            }
        }
    }

    fn adoption(
        &self,
        facts: &FileFacts,
        pid: u32,
        mapped: bool,
        ofd_locks: Vec<RangeLock>,
    ) -> Adoption {
        Adoption {
            path: self.ground.relative(&facts.path),
            deleted: facts.is_deleted,
            tmpfile: facts.is_nameless,
            mapped,
            ofd_locks,
            pid,
        }
    }

    /// Opens what replaces a description, whose file is `mapped` shared or not; gives the number of our own descriptor that keeps the original, and the name it is kept under.
    pub(crate) fn stand_in_for(
        &self,
        description: &Description,
        pid: u32,
        mapped: bool,
    ) -> std::io::Result<(i32, AdoptedId, OwnedFd)> {
        // The census's own: while the target is moved there is no room for one more of each.
        let original = std::sync::Arc::clone(&description.kept);
        let number = original.as_raw_fd();
        let ofd_locks = description
            .locks
            .iter()
            .filter(|held| held.lock.class == LockClass::Ofd)
            .filter_map(|held| range_lock(&held.lock))
            .collect();
        let (id, stand_in) = self.stand_in(
            original,
            self.adoption(&description.facts, pid, mapped, ofd_locks),
        )?;
        Ok((number, id, stand_in))
    }

    /// Opens what replaces the file of a mapping. The mapping itself keeps the file, so nothing is kept here.
    pub(crate) fn stand_in_for_mapping(
        &self,
        file: &MappedFile,
        mapped: bool,
    ) -> std::io::Result<(AdoptedId, OwnedFd)> {
        let (id, stand_in) = self.stand_in(
            file.kept.try_clone()?,
            self.adoption(&file.facts, 0, mapped, Vec::new()),
        )?;
        // The target receives it, maps it and closes it again, which must not give up the locks that the target holds on the same file.
        if let Some(handle) = self.mirror.identify(stand_in.as_fd())?.handle {
            self.mirror.supersede(&[handle], true);
        }
        Ok((id, stand_in))
    }

    /// Opens what replaces a working or root directory.
    pub(crate) fn stand_in_for_directory(
        &self,
        directory: &Directory,
    ) -> std::io::Result<(AdoptedId, OwnedFd)> {
        self.stand_in(
            directory.kept.try_clone()?,
            self.adoption(&directory.facts, 0, false, Vec::new()),
        )
    }

    /// Puts the mount over the volume. What remains if we die: the mount, served by nobody until the holder's successor or `hobble recover` takes it away.
    pub(crate) fn place(&mut self, record: PropagationRecord) -> Result<(), AttachError> {
        let mount = self
            .mount()
            .map_err(|error| AttachError::io(Step::Mount, "place the hook", error))?;
        let Ground::Volume(volume) = &self.ground else {
            return Err(AttachError::new(
                Step::Mount,
                "the hook was placed by another server",
            ));
        };
        let placed = volume.place(mount, record);
        self.was_placed = true;
        self.placed = Some(placed?);
        Ok(())
    }

    /// Lets names below the volume ([`Volume::through`]) show through the hook. Says which could not be, each for its own reason; fails as a whole when the
    /// deadline passes, and leaves it to [`Hook::remove`] to take away what was bound.
    pub(crate) fn bind_through(
        &self,
        names: Vec<PathBuf>,
        deadline: Deadline,
    ) -> Result<Vec<(PathBuf, MountsError)>, MountsError> {
        self.placed.as_ref().map_or(Ok(Vec::new()), |placed| {
            placed.bind_through(names, deadline)
        })
    }

    /// Takes the mount away again, wherever it got to. After a failure it counts as placed still, and can be tried again.
    pub(crate) fn remove(&mut self) -> Result<(), AttachError> {
        let taken = self.take_off();
        if !self.unremoved {
            return Ok(());
        }
        // Sandboxes made while attached have copies of their own; and what could not be taken off where it was placed is looked for as if it were one.
        self.leftovers = volume::remove_everywhere(self.device, &self.source)?;
        self.unremoved = taken.is_err();
        if let Ground::Inherited(inherited) = &self.ground {
            inherited.restore_propagation();
        }
        taken
    }

    /// Takes the mount away where it was placed, which is quick. Its copies may be there still: [`Hook::remove`] has to follow.
    pub(crate) fn take_off(&mut self) -> Result<(), AttachError> {
        let Some(placed) = self.placed.take() else {
            return Ok(());
        };
        self.unremoved = true;
        volume::take_off(placed)
    }

    /// Mounts of it that could not be removed: copies in sandboxes that were made meanwhile.
    pub(crate) fn leftovers(&self) -> &[NotCovered] {
        &self.leftovers
    }

    /// Whether somebody has removed the mount behind our back; looked for once a second.
    pub(crate) fn is_lost(&mut self) -> bool {
        if self.looked.elapsed() >= LOOK_EVERY {
            self.looked = Instant::now();
            self.lost = match (&self.placed, &self.ground) {
                (Some(placed), _) => !Volume::is_in_place(placed),
                (None, Ground::Inherited(_)) => {
                    self.unremoved && !volume::is_sighted(self.device, &self.source)
                }
                (None, Ground::Volume(_)) => false,
            };
        }
        self.lost
    }

    /// Whether any process but our own is left in the target's mount namespace.
    pub(crate) fn namespace_is_inhabited(&self, own: Own) -> bool {
        match &self.ground {
            Ground::Volume(volume) => volume.is_inhabited(own),
            Ground::Inherited(inherited) => volume::is_inhabited(inherited.namespace, own),
        }
    }

    /// Whether the connection lives.
    pub(crate) fn is_serving(&self) -> bool {
        self.server.is_serving()
    }

    /// Waits for the kernel to let go of the filesystem.
    pub(crate) fn wait_end(&self, timeout: Duration) -> bool {
        self.server.wait(timeout)
    }

    /// A descriptor of the mount, for walking below it from a thread that serves nothing.
    fn mount(&self) -> std::io::Result<BorrowedFd<'_>> {
        self.mount
            .as_ref()
            .map(OwnedFd::as_fd)
            .ok_or_else(|| std::io::ErrorKind::NotConnected.into())
    }

    /// Closes our own descriptor of the mount: the kernel ends the connection when nobody else holds anything on it.
    pub(crate) fn close_mount(&mut self) {
        self.mount = None;
    }
}

/// A lock as the mirror counts it; `None` for a lease that is being broken.
pub(crate) fn range_lock(lock: &hobble_graft::proc::locks::FileLock) -> Option<RangeLock> {
    let kind = match lock.kind {
        LockKind::Read => locks::LockKind::Read,
        LockKind::Write => locks::LockKind::Write,
        _ => return None,
    };
    Some(RangeLock {
        kind,
        range: lock_range(lock),
    })
}

/// A range as the mirror counts it.
pub(crate) fn lock_range(lock: &hobble_graft::proc::locks::FileLock) -> LockRange {
    LockRange {
        start: lock.start,
        end: lock.end.unwrap_or(LockRange::OPEN_END),
    }
}
