//! The mirror: one mount's worth of everything, and the hand-out of requests.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use hobble_fuse::park::Lot;
use hobble_fuse::{
    BackingId, Caller, Errno, Features, Fh, Interrupt, Kernel, LockOwner, Negotiated, NodeId, Op,
    Reply, Request, Service, Unique,
};
use hobble_rules::{Decision, Plan};

use crate::adopt::HandleId;
use crate::config::{Caching, Callers, Config};
use crate::door::Doors;
use crate::error::MirrorError;
use crate::faults::{PlanChange, Rules};
use crate::handle::Handles;
use crate::legacy::fact::{Io, Served};
use crate::legacy::{Claims, Estate, Fact, Legacy, Log};
use crate::lock::lock;
use crate::locks::{LockTable, Locks};
use crate::ops::Turn;
use crate::store::Store;
use crate::sys::identity;

/// A mirror of a directory tree; see the crate's text. Cheap to clone: all clones are the same mirror.
#[derive(Clone)]
pub struct Mirror {
    pub(crate) inner: Arc<Inner>,
}

/// What one mount consists of.
pub(crate) struct Inner {
    pub(crate) store: Store,
    pub(crate) handles: Handles,
    pub(crate) locks: Arc<LockTable>,
    pub(crate) rules: Rules,
    pub(crate) doors: Doors,
    pub(crate) adopted: crate::adopt::Table,
    pub(crate) lot: Lot,
    pub(crate) callers: Arc<dyn Callers>,
    pub(crate) caching: Caching,
    pub(crate) volume: Vec<u8>,
    /// Not ruled out so far.
    pub(crate) passthrough: AtomicBool,
    pub(crate) kernel: OnceLock<Kernel>,
    pub(crate) negotiated: OnceLock<Negotiated>,
    /// A switch is going on.
    pub(crate) quiet: AtomicBool,
    /// Rounds of stand-ins that have arrived.
    pub(crate) arrivals: AtomicU64,
    destroyed: AtomicBool,
    /// The next FLUSH is answered ENOSYS, after which the kernel sends no more.
    pub(crate) flushless: AtomicBool,
    pub(crate) log: Log,
    /// I/O modes of open files that were taken over, until the kernel can be told of.
    modes: Mutex<Vec<(NodeId, Io)>>,
    /// What the one before us had begun or done.
    pub(crate) past: Past,
}

/// What a mirror takes over with the connection of one that has died.
#[derive(Debug)]
pub struct Inherited {
    /// The open `/dev/fuse`.
    pub device: OwnedFd,
    /// What INIT agreed on.
    pub negotiated: Negotiated,
    /// Every descriptor of the dead one that is in use again; what else it had open is of no use.
    pub numbers: HashSet<RawFd>,
}

/// Requests that a dead server had taken, by the numbers under which they were handed out first.
#[derive(Debug, Default)]
pub(crate) struct Past {
    begun: HashMap<u64, u64>,
    answered: HashMap<u64, (i32, Vec<u8>)>,
}

impl Past {
    /// The answer that it was about to get.
    pub(crate) fn answer(&self, unique: Unique) -> Option<(i32, &[u8])> {
        let (error, bytes) = self.answered.get(&unique.original().0)?;
        Some((*error, bytes))
    }

    /// What was known before it was begun, if it may have been done.
    pub(crate) fn begun(&self, unique: Unique) -> Option<u64> {
        self.begun.get(&unique.original().0).copied()
    }
}

impl Mirror {
    /// A mirror of `config.root`, to be given to [`hobble_fuse::Server::start`].
    ///
    /// # Errors
    /// See [`MirrorError`].
    pub fn new(config: Config, callers: Arc<dyn Callers>) -> Result<Self, MirrorError> {
        // On a thread of its own, because what a worker does to its thread is for good.
        std::thread::scope(|threads| threads.spawn(identity::enter).join())
            .map_err(|_| MirrorError::Worker(Errno::IO.into()))?
            .map_err(MirrorError::Worker)?;
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile)
            .current
            .unwrap_or(1 << 20);
        // A tree without the mounts below it: what they cover is what the hook shows, and they are put back on top of it.
        let root = crate::sys::path::clone_mount(config.root.as_fd()).or_else(|error| {
            tracing::debug!(%error, "the root's mount cannot be cloned; serving through the descriptor as it is");
            config.root.try_clone()
        });
        let root = root
            .and_then(|root| directory(&root))
            .map_err(MirrorError::Root)?;
        let native = match config.native {
            Some(native) => Some(directory(&native).map_err(MirrorError::Root)?),
            None => None,
        };
        if let Some(legacy) = &config.legacy {
            legacy.clear();
        }
        let log = Log::new(config.legacy);
        log.say(|| Fact::Mirror {
            volume: config.volume.clone(),
            native: native.as_ref().map(|native| native.as_raw_fd()),
        });
        if !config.passthrough {
            log.say(|| Fact::NoPassthrough);
        }
        let store = Store::new(root, native, limit, log.clone()).map_err(MirrorError::Root)?;
        Ok(Self {
            inner: Arc::new(Inner {
                store,
                handles: Handles::new(log.clone()),
                locks: Arc::new(LockTable::new(Arc::clone(&callers), log.clone())),
                rules: Rules::default(),
                doors: Doors::default(),
                adopted: crate::adopt::Table::new(log.clone()),
                lot: Lot::new()?,
                callers,
                caching: config.caching,
                volume: config.volume,
                passthrough: AtomicBool::new(config.passthrough),
                kernel: OnceLock::new(),
                negotiated: OnceLock::new(),
                quiet: AtomicBool::new(false),
                arrivals: AtomicU64::new(0),
                destroyed: AtomicBool::new(false),
                flushless: AtomicBool::new(false),
                log,
                modes: Mutex::default(),
                past: Past::default(),
            }),
        })
    }

    /// The mirror of a server that has died, as it was at its last moment; to be given to [`hobble_fuse::Server::resume`] with what is inherited. No rules are in force. This process shares
    /// the descriptor table of the dead one, and nobody else takes over what was in it.
    ///
    /// # Errors
    /// [`MirrorError::Legacy`] when the log does not tell enough. Descriptors that had been taken over are closed then, some of them perhaps originals of programs: what undoes the
    /// hook without the log must have duplicates of them.
    pub fn resume(
        legacy: &Legacy,
        callers: Arc<dyn Callers>,
        caching: Caching,
    ) -> Result<(Self, Inherited), MirrorError> {
        std::thread::scope(|threads| threads.spawn(identity::enter).join())
            .map_err(|_| MirrorError::Worker(Errno::IO.into()))?
            .map_err(MirrorError::Worker)?;
        let mut estate = Estate::read(legacy).map_err(MirrorError::Legacy)?;
        let can_resend = estate.served.is_some_and(|served| {
            Features::from_bits_retain(served.features).contains(Features::HAS_RESEND)
        });
        if !can_resend {
            let error = std::io::Error::other(
                "this kernel does not hand out again what a dead server had taken (Linux 6.9)",
            );
            return Err(MirrorError::Legacy(error));
        }
        let mut claims = Claims::default();
        let restored = Self::restore(&mut estate, &mut claims, legacy, callers, caching);
        let (mirror, device, negotiated) = match restored {
            Ok(restored) => restored,
            Err(error) => {
                // Whoever undoes the hook by other means needs them where they are.
                claims.abandon();
                return Err(MirrorError::Legacy(error));
            }
        };
        let inherited = Inherited {
            device,
            negotiated,
            numbers: claims.numbers(),
        };
        Ok((mirror, inherited))
    }

    fn restore(
        estate: &mut Estate,
        claims: &mut Claims,
        legacy: &Legacy,
        callers: Arc<dyn Callers>,
        caching: Caching,
    ) -> std::io::Result<(Self, OwnedFd, Negotiated)> {
        let served = estate
            .served
            .ok_or_else(|| std::io::Error::other("it was not served yet"))?;
        let device = claims.sole(served.device)?;
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile)
            .current
            .unwrap_or(1 << 20);
        let log = Log::new(Some(legacy.clone()));
        let store = Store::restore(estate, claims, limit, log.clone())?;
        let node = |id: u64| store.get(NodeId(id));
        let adopted = crate::adopt::Table::restore(estate, claims, log.clone(), node)?;
        let handles = Handles::restore(estate, claims, log.clone(), node, |id| adopted.find(id))?;
        let locks = LockTable::restore(Arc::clone(&callers), estate, claims, log.clone())?;
        let mirror = Self {
            inner: Arc::new(Inner {
                store,
                handles,
                locks: Arc::new(locks),
                rules: Rules::default(),
                doors: Doors::default(),
                adopted,
                lot: Lot::new().map_err(std::io::Error::other)?,
                callers,
                caching,
                volume: std::mem::take(&mut estate.volume),
                passthrough: AtomicBool::new(!estate.no_passthrough),
                kernel: OnceLock::new(),
                negotiated: OnceLock::new(),
                quiet: AtomicBool::new(false),
                arrivals: AtomicU64::new(estate.arrivals),
                destroyed: AtomicBool::new(false),
                flushless: AtomicBool::new(false),
                log,
                modes: Mutex::default(),
                past: Past {
                    begun: std::mem::take(&mut estate.begun),
                    answered: std::mem::take(&mut estate.answered),
                },
            }),
        };
        *lock(&mirror.inner.modes) = estate
            .nodes
            .iter()
            .filter_map(|(id, node)| Some((NodeId(*id), node.io?)))
            .collect();
        Ok((mirror, device, negotiated(&served)))
    }

    /// What the server shall ask the kernel for on behalf of a mirror: [`Features::MIRROR`] without
    /// * the cache of symlinks, behind which a rule on `readlink` would not be seen;
    /// * truncation as part of OPEN: the kernel finds out only afterwards that the file is being executed (`handle_truncate`, fs/namei.c), says ETXTBSY as
    ///   it should, and the running program is gone. As an operation of its own the truncation comes after the check.
    #[must_use]
    pub const fn features() -> Features {
        Features::MIRROR.difference(Features::CACHE_SYMLINKS.union(Features::ATOMIC_O_TRUNC))
    }

    /// Writes the log of what a successor must know anew, so that it is as short as can be. Done by itself from time to time; worth while after [`Mirror::resume`].
    pub fn tidy_legacy(&self) {
        self.inner.log.rewrite(|| self.inner.say_all());
    }

    /// Whether the log of what a successor must know says what is the case: it must say the same when everything is said again. For tests, while nothing is going on.
    ///
    /// # Errors
    /// The first thing that it says differently; what reading it says.
    pub fn audit_legacy(&self, legacy: &Legacy) -> std::io::Result<()> {
        let mut before = Estate::describe(legacy)?;
        for _ in 0..100 {
            // What the kernel does by itself (RELEASE, FORGET) comes when it comes.
            std::thread::sleep(Duration::from_millis(10));
            let now = Estate::describe(legacy)?;
            if now == before {
                break;
            }
            before = now;
        }
        self.tidy_legacy();
        let after = Estate::describe(legacy)?;
        // Both are sorted.
        let missing = after
            .iter()
            .find(|line| before.binary_search(line).is_err());
        let stale = before
            .iter()
            .find(|line| after.binary_search(line).is_err());
        match (missing, stale) {
            (None, None) => Ok(()),
            different => Err(std::io::Error::other(format!(
                "the log and the mirror differ (missing, stale): {different:?}"
            ))),
        }
    }

    /// Puts a plan in force (or none) for all operations that arrive from now on. `origin` is when injection began. Has the kernel drop what it has cached and that
    /// would hide a rule or was made up by one, and says which open files are in the wrong I/O mode.
    ///
    /// Operations that are delayed already stay so; [`Mirror::release`] ends that. Must not be called from a thread that serves requests.
    pub fn set_plan(&self, plan: Option<Arc<Plan>>, origin: Instant) -> PlanChange {
        self.inner.set_plan(plan.map(|plan| (plan, origin)))
    }

    /// Open files whose reads and writes bypass the server although a rule of the plan in force wants to see them: until they are opened anew the rule cannot fire on
    /// them. There are some only after [`Mirror::set_plan`], which names them, and after [`Callers::misfits`].
    #[must_use]
    pub fn misfits(&self) -> Vec<HandleId> {
        self.inner.misfits(|_| true)
    }

    /// While `true` no operation is delayed, as is right while programs are stopped and their descriptors exchanged. What is delayed already stays so until
    /// [`Mirror::release`]. Meanwhile closing a descriptor of a file opened by [`Mirror::reopen_stand_in`], or by [`Mirror::stand_in`] until it has
    /// [arrived](Mirror::arrived), drops no POSIX lock: it is the copy by which the file came to the program.
    pub fn quiesce(&self, on: bool) {
        self.inner.quiet.store(on, Ordering::Release);
        self.inner.lot.bypass(on);
    }

    /// Says that all stand-ins opened so far are in place or closed. To be called before their programs go on: from then on to close one drops the POSIX locks that
    /// the program has on the file through moved descriptors, those moved earlier included.
    pub fn arrived(&self) {
        let arrivals = self.inner.arrivals.fetch_add(1, Ordering::AcqRel) + 1;
        self.inner.log.say(|| Fact::Arrivals(arrivals));
    }

    /// Ends the delays of chosen callers: their operations are carried out now. Returns how many.
    pub fn release(&self, choose: impl FnMut(&Caller) -> bool) -> usize {
        self.inner.lot.release_for(choose)
    }

    /// Waits until every operation whose delay has ended was carried out; `false` when `timeout` passed first.
    #[must_use]
    pub fn settle(&self, timeout: Duration) -> bool {
        self.inner.lot.settle(timeout)
    }

    /// The delayed operations.
    #[must_use]
    pub fn lot(&self) -> &Lot {
        &self.inner.lot
    }

    /// Whether reads and writes that no rule wants to see go past the server. Known for sure only after the first regular file was opened; before, it says whether
    /// kernel and configuration allow it.
    #[must_use]
    pub fn passthrough(&self) -> bool {
        self.inner.passthrough.load(Ordering::Relaxed)
    }

    /// How many inodes the kernel knows.
    #[must_use]
    pub fn nodes(&self) -> usize {
        self.inner.store.len()
    }

    /// How many files and directories are open.
    #[must_use]
    pub fn open_files(&self) -> usize {
        self.inner.handles.len()
    }

    /// While set, a close of a descriptor is answered so that the kernel never reports a close again on this connection (ENOSYS to FLUSH sets `no_flush`,
    /// fs/fuse/file.c): for the time when everything goes back to where it came from, because each report costs the closer a round trip. There is no way back: from
    /// then on a process's locks go with its open file, not with the first close of any.
    pub fn stop_flushing(&self, on: bool) {
        self.inner.flushless.store(on, Ordering::Release);
    }

    /// Whether the connection has ended.
    #[must_use]
    pub fn is_destroyed(&self) -> bool {
        self.inner.destroyed.load(Ordering::Acquire)
    }

    /// Calls `work` with the byte-range locks held through the hook.
    pub fn with_locks<T>(&self, work: impl FnOnce(&Locks<'_>) -> T) -> T {
        let is_ofd = |fh: Fh, owner: LockOwner| self.inner.handles.is_ofd_owner(fh, owner);
        work(&Locks {
            table: &self.inner.locks,
            is_ofd: &is_ofd,
        })
    }
}

/// The same directory, opened for reading: what `open_by_handle_at` and `syncfs` take.
fn directory(fd: &OwnedFd) -> std::io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    Ok(rustix::fs::openat(
        fd,
        c".",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

fn served(device: RawFd, negotiated: &Negotiated) -> Fact {
    Fact::Served(Served {
        device,
        kernel_minor: negotiated.kernel_minor,
        minor: negotiated.minor,
        offered: negotiated.offered.bits(),
        features: negotiated.features.bits(),
        max_write: negotiated.max_write,
        max_readahead: negotiated.max_readahead,
        max_stack_depth: negotiated.max_stack_depth,
    })
}

fn negotiated(served: &Served) -> Negotiated {
    Negotiated {
        kernel_minor: served.kernel_minor,
        minor: served.minor,
        offered: Features::from_bits_retain(served.offered),
        features: Features::from_bits_retain(served.features),
        max_write: served.max_write,
        max_readahead: served.max_readahead,
        max_stack_depth: served.max_stack_depth,
    }
}

impl Service for Mirror {
    fn started(&self, kernel: &Kernel, negotiated: &Negotiated) {
        // A second server for the same mirror is a bug above; the first one stays in force.
        let _ = self.inner.kernel.set(kernel.clone());
        let _ = self.inner.negotiated.set(*negotiated);
        let inner = &self.inner;
        inner.log.say(|| served(kernel.device_number(), negotiated));
        for (node, io) in std::mem::take(&mut *lock(&inner.modes)) {
            let handles = inner.handles.select(|handle| handle.node.id == node);
            let io = match io {
                Io::Passthrough(id) => {
                    crate::store::Io::Passthrough(Arc::new(kernel.backing_adopt(BackingId(id))))
                }
                Io::Served => crate::store::Io::Served,
            };
            if let Some(handle) = handles.first() {
                let mut data = lock(&handle.node.data);
                data.handles = u32::try_from(handles.len()).unwrap_or(u32::MAX);
                data.io = Some(io);
            }
            // Dropped where nothing is open: then it is registered in vain.
        }
        if !negotiated.features.contains(Features::PASSTHROUGH)
            && self.inner.passthrough.swap(false, Ordering::Relaxed)
        {
            inner.log.say(|| Fact::NoPassthrough);
            tracing::warn!(
                "this kernel has no FUSE passthrough: reads and writes go through the server"
            );
        }
    }

    fn call(&self, request: Request, reply: Reply) {
        if let Err(error) = identity::enter() {
            tracing::error!(%error, "a worker has no credentials to serve with");
            reply.error(crate::error::errno(&error));
            return;
        }
        let inner = &self.inner;
        inner.serve(request, reply);
        if inner.log.is_due() {
            inner.log.rewrite(|| inner.say_all());
        }
    }

    fn interrupted(&self, interrupt: Interrupt) {
        if !self.inner.locks.interrupt(interrupt.target()) {
            self.inner.lot.interrupted(interrupt);
        }
    }

    fn destroyed(&self) {
        self.inner.destroyed.store(true, Ordering::Release);
        self.inner.locks.interrupt_all();
        self.inner.lot.release_all();
    }
}

impl Inner {
    /// Tells the log everything.
    fn say_all(&self) {
        self.log.say(|| Fact::Mirror {
            volume: self.volume.clone(),
            native: self.store.native_number(),
        });
        if let (Some(kernel), Some(negotiated)) = (self.kernel.get(), self.negotiated.get()) {
            self.log.say(|| served(kernel.device_number(), negotiated));
        }
        if !self.passthrough.load(Ordering::Relaxed) {
            self.log.say(|| Fact::NoPassthrough);
        }
        self.log.say(|| Fact::Next {
            fh: self.handles.next(),
            adopted: self.adopted.next(),
        });
        let arrivals = self.arrivals.load(Ordering::Acquire);
        self.log.say(|| Fact::Arrivals(arrivals));
        self.store.say_all();
        self.adopted.say_all();
        self.handles.say_all();
        self.locks.say_all();
    }

    /// Does what was asked for. Every operation ends here, faulted or not; `decision` carries only what alters results.
    pub(crate) fn perform(
        self: &Arc<Self>,
        request: &Request,
        op: Op<'_>,
        reply: Reply,
        decision: &Decision,
    ) {
        let Some(reply) = self.once(request, &op, reply) else {
            return;
        };
        let caller = request.caller();
        let turn = Turn { caller, decision };
        let node = request.node();
        match op {
            Op::Forget { references } => {
                self.store.forget(node, references);
                reply.none();
            }
            Op::BatchForget(forgets) => {
                for (node, references) in forgets.iter() {
                    self.store.forget(node, references);
                }
                reply.none();
            }
            Op::Lookup { name } => self.lookup(node, name, turn, reply),
            Op::Getattr { fh } => self.getattr(node, fh, turn, reply),
            Op::Statx {
                fh,
                flags: _,
                mask: _,
            } => self.statx(node, fh, turn, reply),
            Op::Setattr(change) => self.setattr(node, &change, turn, reply),
            Op::Readlink => self.readlink(node, reply),
            Op::Symlink {
                name,
                target,
                creation,
            } => self.symlink(node, name, target, &creation, turn, reply),
            Op::Mknod {
                name,
                mode,
                rdev,
                creation,
            } => {
                self.mknod(node, name, (mode, rdev), &creation, turn, reply);
            }
            Op::Mkdir {
                name,
                mode,
                creation,
            } => self.mkdir(node, name, mode, &creation, turn, reply),
            Op::Unlink { name } => self.unlink(node, name, false, caller, reply),
            Op::Rmdir { name } => self.unlink(node, name, true, caller, reply),
            Op::Rename {
                name,
                new_parent,
                new_name,
                flags,
            } => {
                self.rename((node, name), (new_parent, new_name), flags, caller, reply);
            }
            Op::Link { source, new_name } => self.link(source, node, new_name, turn, reply),
            Op::Open {
                flags,
                kill_suidgid,
            } => self.open(node, flags, kill_suidgid, caller, reply),
            Op::Create {
                name,
                flags,
                mode,
                kill_suidgid,
                creation,
            } => {
                self.create(
                    node,
                    name,
                    (flags, mode, kill_suidgid),
                    &creation,
                    turn,
                    reply,
                );
            }
            Op::Tmpfile {
                flags,
                mode,
                creation,
            } => self.tmpfile(node, flags, mode, &creation, turn, reply),
            Op::Read {
                fh,
                offset,
                size,
                flags,
                lock_owner,
            } => {
                let paged = lock_owner.is_none();
                self.read(request, (fh, flags), (offset, size), paged, reply, decision);
            }
            Op::Write {
                fh,
                offset,
                data,
                flags,
                kill_suidgid,
                from_cache,
                lock_owner: _,
            } => {
                self.write(
                    (fh, flags),
                    offset,
                    data,
                    (kill_suidgid, from_cache),
                    turn,
                    reply,
                );
            }
            Op::Statfs => self.statfs(node, reply),
            Op::Release { fh, .. } => self.release(fh, reply),
            Op::Releasedir { fh, .. } => self.release(fh, reply),
            Op::Fsync { fh, datasync } | Op::Fsyncdir { fh, datasync } => {
                self.fsync(fh, datasync, reply)
            }
            Op::Flush { fh, lock_owner } => self.flush(fh, lock_owner, reply),
            Op::Setxattr {
                name,
                value,
                flags,
                acl_kill_sgid,
            } => {
                self.setxattr(node, name, value, (flags, acl_kill_sgid), caller, reply);
            }
            Op::Getxattr { name, size } => self.getxattr(node, name, size, reply),
            Op::Listxattr { size } => self.listxattr(node, size, caller, reply),
            Op::Removexattr { name } => self.removexattr(node, name, caller, reply),
            Op::Opendir { flags } => self.opendir(node, flags, caller, reply),
            Op::Readdir { fh, offset, size } => self.readdir(fh, offset, size, reply),
            Op::Readdirplus { fh, offset, size } => {
                self.readdirplus(fh, offset, size, reply, decision)
            }
            Op::Getlk(ask) => self.getlk(node, &ask, caller, reply),
            Op::Setlk(ask) => self.setlk(node, &ask, false, reply),
            Op::Setlkw(ask) => self.setlk(node, &ask, true, reply),
            Op::Ioctl {
                fh,
                command,
                data,
                out_size,
                ..
            } => {
                self.ioctl(fh, command, data, out_size, caller, reply);
            }
            Op::Fallocate {
                fh,
                offset,
                length,
                mode,
            } => self.fallocate(fh, (offset, length), mode, caller, reply),
            Op::Lseek { fh, offset, whence } => self.lseek(fh, offset, whence, reply),
            Op::CopyFileRange(copy) => self.copy_file_range(&copy, caller, reply),
            Op::Syncfs => self.syncfs(reply),
            // ACCESS: the kernel checks permissions itself. POLL: regular files are always ready. BMAP: there is no block device beneath. The kernel asks each once.
            _ => {
                reply.unsupported();
            }
        }
    }
}
