//! The mirror: one mount's worth of everything, and the hand-out of requests.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use hobble_fuse::park::Lot;
use hobble_fuse::{
    Caller, Errno, Features, Fh, Interrupt, Kernel, LockOwner, Negotiated, NodeId, Op, Reply,
    Request, Service,
};
use hobble_rules::{Decision, Plan};

use crate::adopt::HandleId;
use crate::config::{Caching, Callers, Config};
use crate::door::Doors;
use crate::error::MirrorError;
use crate::faults::{PlanChange, Rules};
use crate::handle::Handles;
use crate::legacy::fact::Io;
use crate::legacy::{Fact, Log};
use crate::locks::{LockTable, Locks};
use crate::ops::Turn;
use crate::resume::Past;
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
    pub(crate) destroyed: AtomicBool,
    /// The next FLUSH is answered ENOSYS, after which the kernel sends no more.
    pub(crate) flushless: AtomicBool,
    pub(crate) log: Log,
    /// I/O modes of open files that were taken over, until the kernel can be told of.
    pub(crate) modes: Mutex<Vec<(NodeId, Io)>>,
    /// What the one before us had begun or done.
    pub(crate) past: Past,
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

    /// What the server shall ask the kernel for on behalf of a mirror: [`Features::MIRROR`] without
    /// * the cache of symlinks, behind which a rule on `readlink` would not be seen;
    /// * truncation as part of OPEN: the kernel finds out only afterwards that the file is being executed (`handle_truncate`, fs/namei.c), says ETXTBSY as
    ///   it should, and the running program is gone. As an operation of its own the truncation comes after the check.
    #[must_use]
    pub const fn features() -> Features {
        Features::MIRROR.difference(Features::CACHE_SYMLINKS.union(Features::ATOMIC_O_TRUNC))
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

impl Service for Mirror {
    fn started(&self, kernel: &Kernel, negotiated: &Negotiated) {
        // A second server for the same mirror is a bug above; the first one stays in force.
        let _ = self.inner.kernel.set(kernel.clone());
        let _ = self.inner.negotiated.set(*negotiated);
        let inner = &self.inner;
        inner.take_up(kernel, negotiated);
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
