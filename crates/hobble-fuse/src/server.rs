//! Serving one connection: INIT, then readers that hand requests to a [`Service`].
//!
//! Invariants: INIT has been answered when [`Server::start`] returns; at least one thread always reads while the connection
//! lives, up to [`Config::max_readers`]; [`Service::destroyed`] is called exactly once, after the last reader has ended.

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use thiserror::Error;

use crate::abi;
use crate::buffer::Pool;
use crate::decode::{DecodeError, Op, Protocol};
use crate::device::{Device, Metrics, bump};
use crate::features::Features;
use crate::ids::Unique;
use crate::kernel::Kernel;
use crate::negotiate::{self, Config, Negotiated};
use crate::opcode::Opcode;
use crate::reply::Reply;
use crate::request::Request;

/// What serves the requests of one connection.
pub trait Service: Send + Sync + 'static {
    /// INIT has been answered; no request has been read yet. Called once, before anything else.
    fn started(&self, kernel: &Kernel, negotiated: &Negotiated) {
        let _ = (kernel, negotiated);
    }

    /// One request, to be answered through `reply`, now or later, here or from another thread. May block in calls on the
    /// backing filesystem, and in nothing else: what has to wait goes to [`crate::park::Lot`].
    fn call(&self, request: Request, reply: Reply);

    /// A signal has come for the caller of a request. [`crate::park::Lot::interrupted`] is what to do with it.
    fn interrupted(&self, interrupt: Interrupt);

    /// The connection has ended: unmounted or aborted. No request will come any more. Called once, after everything else.
    fn destroyed(&self) {}
}

/// A signal has come for the caller of a request (FUSE_INTERRUPT). The kernel says so once per request, whatever the signal.
#[derive(Debug)]
pub struct Interrupt {
    device: Device,
    unique: Unique,
    target: Unique,
}

impl Interrupt {
    /// An interrupt made by hand, for tests without a kernel.
    #[must_use]
    pub const fn new(device: Device, unique: Unique, target: Unique) -> Self {
        Self {
            device,
            unique,
            target,
        }
    }

    /// The request whose caller has a signal pending.
    #[must_use]
    pub const fn target(&self) -> Unique {
        self.target
    }

    /// Has the kernel say so again, at once, provided that it still waits for the request (EAGAIN, fuse_dev_do_write in
    /// fs/fuse/dev.c). To be used sparingly: answered right away, every time, it makes a busy loop.
    pub fn again(self) {
        let again = -Errno::AGAIN.raw_os_error();
        // ENOENT: the request has been answered meanwhile.
        let _ = self.device.reply(self.unique, again, &[]);
    }
}

/// Why a connection could not be served.
#[derive(Debug, Error)]
pub enum StartError {
    /// The kernel did not send INIT in time: the device has no filesystem behind it, or it is served already.
    #[error("no INIT from the kernel within {0:?}")]
    NoInit(Duration),
    /// The device cannot be read.
    #[error("cannot read INIT from the device")]
    Read(#[source] Errno),
    /// The first request is not INIT.
    #[error("the first request is {0}, not INIT: the connection has been served before")]
    NotInit(&'static str),
    /// INIT makes no sense.
    #[error("cannot decode INIT")]
    Malformed(#[source] DecodeError),
    /// The kernel is too old.
    #[error(
        "the kernel speaks FUSE {major}.{minor}, at least {}.{} is needed",
        abi::KERNEL_VERSION,
        negotiate::OLDEST_MINOR
    )]
    Version {
        /// Its major version.
        major: u32,
        /// Its minor version.
        minor: u32,
    },
    /// The kernel did not take our answer.
    #[error("the kernel refused the answer to INIT")]
    Refused,
    /// The kernel does not hand out again what a dead server had taken.
    #[error("the kernel does not hand out requests again")]
    Resend(#[source] Errno),
    /// No thread.
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
}

/// A connection being served. Dropping it leaves the readers to serve until the connection ends by itself.
#[derive(Debug)]
pub struct Server {
    device: Device,
    kernel: Kernel,
    negotiated: Negotiated,
    crew: Arc<Crew>,
}

impl Server {
    /// Answers INIT, then starts the readers.
    ///
    /// # Errors
    /// See [`StartError`]. No request has been served then, and dropping device and mount ends the connection.
    pub fn start(
        device: impl Into<Device>,
        service: Arc<dyn Service>,
        config: &Config,
    ) -> Result<Self, StartError> {
        let device = device.into();
        let negotiated = negotiate::handshake(&device, config)?;
        let kernel = Kernel::start(device.clone()).map_err(StartError::Thread)?;
        Self::serve(device, kernel, service, config, negotiated)
    }

    /// Serves a connection whose INIT was answered before, by a server that has died. Requests that it had read and not
    /// answered are handed out again, marked ([`Unique::is_resent`]), if `Features::HAS_RESEND` was agreed on; else nobody answers them.
    ///
    /// # Errors
    /// When no thread can be started, or the kernel does not hand out again what it should.
    pub fn resume(
        device: impl Into<Device>,
        service: Arc<dyn Service>,
        config: &Config,
        negotiated: Negotiated,
    ) -> Result<Self, StartError> {
        let device = device.into();
        let kernel = Kernel::start(device.clone()).map_err(StartError::Thread)?;
        if negotiated.features.contains(Features::HAS_RESEND) {
            // Before anything is read: what we had read ourselves would be handed out twice.
            kernel.resend().map_err(StartError::Resend)?;
        }
        Self::serve(device, kernel, service, config, negotiated)
    }

    fn serve(
        device: Device,
        kernel: Kernel,
        service: Arc<dyn Service>,
        config: &Config,
        negotiated: Negotiated,
    ) -> Result<Self, StartError> {
        service.started(&kernel, &negotiated);
        // The largest SETXATTR (64 KiB and a name) has to fit too, else the kernel fails it with E2BIG.
        let payload = usize::try_from(negotiated.max_write)
            .unwrap_or(usize::MAX)
            .max(128 << 10);
        let crew = Arc::new(Crew {
            device: device.clone(),
            service,
            pool: Pool::new(payload, config.max_readers.min(16)),
            protocol: Protocol {
                minor: negotiated.minor,
                features: negotiated.features,
            },
            min: config.readers.max(1),
            max: config.max_readers.max(config.readers).max(1),
            threads: AtomicUsize::new(0),
            reading: AtomicUsize::new(0),
            progress: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            watch: Mutex::new(Watch::default()),
            changed: Condvar::new(),
            watcher_asleep: AtomicBool::new(false),
        });
        let watcher = Arc::clone(&crew);
        std::thread::Builder::new()
            .name("fuse-watch".into())
            .spawn(move || watcher.watch())
            .map_err(StartError::Thread)?;
        for number in 0..crew.min {
            match crew.spawn() {
                Ok(()) => {}
                Err(error) if number == 0 => {
                    crew.ended.store(true, Ordering::SeqCst);
                    crew.wake_watcher();
                    return Err(StartError::Thread(error));
                }
                Err(error) => {
                    tracing::warn!(%error, number, "serving with fewer readers than asked for")
                }
            }
        }
        Ok(Self {
            device,
            kernel,
            negotiated,
            crew,
        })
    }

    /// What INIT agreed on.
    #[must_use]
    pub const fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// A handle for backing files and notifications.
    #[must_use]
    pub fn kernel(&self) -> Kernel {
        self.kernel.clone()
    }

    /// What was counted so far.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        self.device.counters().snapshot()
    }

    /// Whether the connection still lives.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        !self
            .crew
            .watch
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .destroyed
    }

    /// Waits until the connection has ended and [`Service::destroyed`] has returned. `false` when `timeout` passed first.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> bool {
        let watch = self
            .crew
            .watch
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let (watch, _) = self
            .crew
            .changed
            .wait_timeout_while(watch, timeout, |watch| !watch.destroyed)
            .unwrap_or_else(PoisonError::into_inner);
        watch.destroyed
    }
}

/// How often the watcher looks while all readers are busy.
const TICK: Duration = Duration::from_millis(2);
/// How long readers must have been free before the watcher sleeps again.
const CALM: Duration = Duration::from_millis(100);

#[derive(Debug, Default)]
struct Watch {
    destroyed: bool,
}

/// The readers of one connection.
struct Crew {
    device: Device,
    service: Arc<dyn Service>,
    pool: Pool,
    protocol: Protocol,
    min: usize,
    max: usize,
    /// Threads that exist.
    threads: AtomicUsize,
    /// Threads inside `read`.
    reading: AtomicUsize,
    /// Requests taken off the device.
    progress: AtomicU64,
    /// A reader has seen the end of the connection.
    ended: AtomicBool,
    watch: Mutex<Watch>,
    changed: Condvar,
    watcher_asleep: AtomicBool,
}

impl std::fmt::Debug for Crew {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Crew")
            .field("threads", &self.threads)
            .finish_non_exhaustive()
    }
}

impl Crew {
    fn spawn(self: &Arc<Self>) -> std::io::Result<()> {
        let number = self.threads.fetch_add(1, Ordering::SeqCst);
        self.reading.fetch_add(1, Ordering::SeqCst);
        self.device
            .counters()
            .readers
            .fetch_add(1, Ordering::Relaxed);
        let crew = Arc::clone(self);
        let spawned = std::thread::Builder::new()
            .name(format!("fuse-read-{number}"))
            .spawn(move || crew.work());
        if spawned.is_err() {
            self.reading.fetch_sub(1, Ordering::SeqCst);
            self.leave();
        }
        spawned.map(drop)
    }

    fn leave(&self) {
        self.device
            .counters()
            .readers
            .fetch_sub(1, Ordering::Relaxed);
        if self.threads.fetch_sub(1, Ordering::SeqCst) == 1 && self.ended.load(Ordering::SeqCst) {
            self.wake_watcher();
        }
    }

    /// The life of one reader. It counts as reading from the moment it was made.
    fn work(self: Arc<Self>) {
        loop {
            let next = self.next();
            let left = self.reading.fetch_sub(1, Ordering::SeqCst) - 1;
            let Some((request, unique, opcode)) = next else {
                break;
            };
            self.progress.fetch_add(1, Ordering::Relaxed);
            if left == 0 && self.watcher_asleep.load(Ordering::SeqCst) {
                self.wake_watcher();
            }
            self.dispatch(request, unique, opcode);
            // More threads than needed read already: the surplus that grew under load goes.
            if self.reading.fetch_add(1, Ordering::SeqCst) >= self.min {
                self.reading.fetch_sub(1, Ordering::SeqCst);
                break;
            }
        }
        self.leave();
    }

    /// The next request; `None` when the connection has ended.
    fn next(&self) -> Option<(Request, Unique, Option<Opcode>)> {
        loop {
            let mut buffer = self.pool.take();
            let len = match self.device.read(buffer.request_mut()) {
                // Never from the kernel, but from a socket that stands in for it in tests.
                Ok(0) => {
                    self.ended.store(true, Ordering::SeqCst);
                    return None;
                }
                Ok(len) => len,
                // ENOENT: the request was interrupted while it was being read. EINTR: a signal for us. EAGAIN: somebody made
                // the descriptor non-blocking (fuse_dev_do_read, fs/fuse/dev.c).
                Err(Errno::NOENT | Errno::INTR) => continue,
                Err(Errno::AGAIN) => {
                    let mut poll = [rustix::event::PollFd::new(
                        &self.device,
                        rustix::event::PollFlags::IN,
                    )];
                    let _ = rustix::event::poll(&mut poll, None);
                    continue;
                }
                // ENODEV: unmounted or aborted. ECONNABORTED: aborted, with `Features::ABORT_ERROR`.
                Err(Errno::NODEV | Errno::CONNABORTED) => {
                    self.ended.store(true, Ordering::SeqCst);
                    return None;
                }
                Err(errno) => {
                    tracing::error!(%errno, "cannot read the fuse device; this connection is no longer served");
                    self.ended.store(true, Ordering::SeqCst);
                    return None;
                }
            };
            bump(&self.device.counters().requests);
            match Request::new(buffer, len, self.pool.clone(), self.protocol) {
                Ok(request) => {
                    let (unique, opcode) = (request.unique(), request.opcode());
                    return Some((request, unique, opcode));
                }
                Err(error) => {
                    // Cannot happen with a kernel that keeps its own rules; without a `unique` there is nothing to answer.
                    bump(&self.device.counters().malformed);
                    tracing::error!(%error, "malformed request ignored");
                }
            }
        }
    }

    fn dispatch(&self, request: Request, unique: Unique, opcode: Option<Opcode>) {
        let reply = || Reply::new(self.device.clone(), unique, opcode);
        match opcode {
            None => {
                bump(&self.device.counters().unknown_opcodes);
                tracing::debug!(
                    opcode = request.header().raw_opcode,
                    "unknown opcode answered ENOSYS"
                );
                reply().unsupported();
            }
            Some(Opcode::Interrupt) => match request.op() {
                Ok(Op::Interrupt { target }) => {
                    let interrupt = Interrupt {
                        device: self.device.clone(),
                        unique,
                        target,
                    };
                    self.guarded(|| self.service.interrupted(interrupt));
                }
                _ => bump(&self.device.counters().malformed),
            },
            Some(Opcode::Destroy) => {
                reply().ok();
            }
            Some(Opcode::Init) => {
                reply().error(Errno::IO);
            }
            Some(_) => {
                let reply = reply();
                self.guarded(|| self.service.call(request, reply));
            }
        }
    }

    /// A panic of the service costs one request (whose reply, dropped, says EIO), not a reader.
    fn guarded(&self, call: impl FnOnce()) {
        if std::panic::catch_unwind(AssertUnwindSafe(call)).is_err() {
            bump(&self.device.counters().panics);
            tracing::error!("the service panicked in a request; please report this bug");
        }
    }

    fn wake_watcher(&self) {
        let _watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        self.changed.notify_all();
    }

    /// Adds a reader whenever all have been busy for a tick without taking anything off the device; sleeps while all is calm.
    fn watch(self: Arc<Self>) {
        let mut calm_since = Instant::now();
        let mut seen = None;
        loop {
            if self.ended.load(Ordering::SeqCst) && self.threads.load(Ordering::SeqCst) == 0 {
                break;
            }
            let busy = self.reading.load(Ordering::SeqCst) == 0;
            let progress = self.progress.load(Ordering::Relaxed);
            if busy {
                calm_since = Instant::now();
                if seen == Some(progress)
                    && self.threads.load(Ordering::SeqCst) < self.max
                    && !self.ended.load(Ordering::SeqCst)
                    && let Err(error) = self.spawn()
                {
                    tracing::warn!(%error, "cannot start another reader");
                }
            }
            seen = busy.then_some(progress);
            let watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
            if calm_since.elapsed() < CALM {
                drop(self.changed.wait_timeout(watch, TICK));
            } else {
                self.watcher_asleep.store(true, Ordering::SeqCst);
                // Looked at again under the lock: a reader that went busy before it could see us asleep is not missed.
                let quiet = self.reading.load(Ordering::SeqCst) != 0;
                let ended =
                    self.ended.load(Ordering::SeqCst) && self.threads.load(Ordering::SeqCst) == 0;
                if quiet && !ended {
                    drop(self.changed.wait(watch));
                }
                self.watcher_asleep.store(false, Ordering::SeqCst);
                calm_since = Instant::now();
            }
        }
        self.guarded(|| self.service.destroyed());
        self.watch
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .destroyed = true;
        self.changed.notify_all();
    }
}
