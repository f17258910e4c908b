//! Where delayed and hung requests wait, without a thread each.
//!
//! A [`Lot`] holds any number of requests; one timer thread ends each wait at its deadline, and a few workers (grown while they
//! are blocked in the backing filesystem) carry on with the request. Invariants: every parked request is carried on with or
//! answered exactly once (see `table.rs`); a signal other than SIGKILL never ends a wait; SIGKILL of the caller ends it within
//! [`POLL`], whatever happened before.
//!
//! Why so: answering EINTR to a harmless signal is itself a fault (a `read` of a regular file fails on SIGALRM with SA_RESTART,
//! on SIGSTOP/SIGCONT, on a ptrace stop), for FUSE has no way to say "restart". And the kernel sends INTERRUPT once per
//! request, at the first signal of any kind (`request_wait_answer`, fs/fuse/dev.c): a SIGKILL that comes after a harmless signal
//! is announced by nobody. So the lot looks at `/proc/<tid>/status` when the INTERRUPT comes and goes on looking. Callers that
//! get no INTERRUPT at all (asynchronous direct I/O, readahead) are looked at in turn. A thread inside `exit` gets no
//! signal any more and waits for its asynchronous requests, so those are released and new ones (FLUSH) not parked at all.

mod stuck;
mod table;
mod workers;

mod sync {
    pub(super) use std::sync::{Mutex, MutexGuard};
}

use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use thiserror::Error;

use crate::ids::{Caller, NodeId, Tid, Unique};
use crate::opcode::Opcode;
use crate::procfs::{Fate, Proc};
use crate::reply::Reply;
use crate::request::Request;
use crate::server::Interrupt;
use stuck::Stuck;
use table::{Counts, Interrupted, Outcome, Parked, Table, Taken};
use workers::Workers;

/// How often callers that have a signal pending are looked at, and at most how often the whole system is.
pub const POLL: Duration = Duration::from_millis(20);
/// How often callers without any known signal are looked at, [`ROUND`] at a time.
const IDLE_POLL: Duration = Duration::from_millis(30);
const ROUND: usize = 64;
/// How long an INTERRUPT waits for its request to be parked before the kernel is asked to repeat it.
const EARLY: Duration = Duration::from_millis(100);

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// Its time was up.
    Deadline,
    /// It was cut short: released, or never begun because the lot lets everything pass, or because the caller is about to be
    /// gone and what it asked for has to be done all the same.
    Released,
}

/// How long and how a request waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// Until when; `None` until released.
    pub until: Option<Instant>,
    /// The caller holds a lock meanwhile behind which others queue up, unkillable. Set by the lot itself for all operations
    /// that always do; a WRITE only does when it extends the file or its handle lacks PARALLEL_DIRECT_WRITES.
    pub exclusive: bool,
}

impl Wait {
    /// Until a moment.
    #[must_use]
    pub const fn until(deadline: Instant) -> Self {
        Self {
            until: Some(deadline),
            exclusive: false,
        }
    }

    /// Until released.
    #[must_use]
    pub const fn forever() -> Self {
        Self {
            until: None,
            exclusive: false,
        }
    }

    /// The same, with the caller holding an inode's lock.
    #[must_use]
    pub const fn exclusive(self) -> Self {
        Self {
            exclusive: true,
            ..self
        }
    }
}

/// A parked request that holds an inode's lock; see [`Lot::set_probe`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The request.
    pub unique: Unique,
    /// Its inode (for creations and renames, the directory).
    pub node: NodeId,
    /// Its caller.
    pub caller: Caller,
}

type Resume = Box<dyn FnOnce(Request, Reply, Wake) + Send>;
type Callback = Box<dyn FnOnce() + Send>;
type Probe = Arc<dyn Fn(&[Holder]) -> Vec<Unique> + Send + Sync>;

struct Waiting {
    request: Request,
    reply: Reply,
    resume: Resume,
}

/// Why there is no lot.
#[derive(Debug, Error)]
pub enum LotError {
    /// `/proc` is needed to tell a kill from a harmless signal.
    #[error("cannot use /proc (ESRCH: it is that of another pid namespace)")]
    Proc(#[source] Errno),
    /// No thread.
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
}

/// See the module's text. Cheap to clone; when the last clone goes, everything parked is released.
#[derive(Clone)]
pub struct Lot {
    handle: Arc<Handle>,
}

/// Ends the threads with the last clone.
struct Handle(Arc<Shared>);

struct Shared {
    table: Table<Waiting, Interrupt, Callback>,
    proc: Proc,
    workers: Workers,
    bell: Bell,
    probe: RwLock<Option<Probe>>,
}

/// Wakes the timer thread.
struct Bell {
    state: Mutex<BellState>,
    changed: Condvar,
}

#[derive(Default)]
struct BellState {
    rung: bool,
    closed: bool,
}

impl Bell {
    fn ring(&self) {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .rung = true;
        self.changed.notify_one();
    }

    fn close(&self) {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .closed = true;
        self.changed.notify_one();
    }

    /// Waits for a ring or for `until`; `false` once closed.
    fn wait(&self, until: Option<Instant>) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if state.closed {
                return false;
            }
            if std::mem::take(&mut state.rung) {
                return true;
            }
            state = match until {
                None => self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return true;
                    }
                    self.changed
                        .wait_timeout(state, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
    }
}

impl Lot {
    /// An empty lot, with its timer thread.
    ///
    /// # Errors
    /// When `/proc` cannot be opened or no thread can be started.
    pub fn new() -> Result<Self, LotError> {
        let shared = Arc::new(Shared {
            table: Table::new(),
            proc: Proc::open().map_err(LotError::Proc)?,
            workers: Workers::new().map_err(LotError::Thread)?,
            bell: Bell {
                state: Mutex::default(),
                changed: Condvar::new(),
            },
            probe: RwLock::new(None),
        });
        let timer = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("fuse-timer".into())
            .spawn(move || timer.run())
            .map_err(LotError::Thread)?;
        Ok(Self {
            handle: Arc::new(Handle(shared)),
        })
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.handle.0
    }

    /// Lets a request wait, then carries on with it in `resume`, which may block in calls on the backing filesystem. `resume`
    /// runs on another thread, or on this one, before `park` returns, where nothing may be parked. If the caller is killed
    /// meanwhile, `resume` is dropped and the request answered EINTR; FLUSH, RELEASE and RELEASEDIR, which must not be lost, are
    /// carried on with instead ([`Wake::Released`]).
    pub fn park(
        &self,
        request: Request,
        reply: Reply,
        wait: Wait,
        resume: impl FnOnce(Request, Reply, Wake) + Send + 'static,
    ) {
        let shared = self.shared();
        let tid = request.caller().tid;
        // Looked at before parking: a thread that exits now has been exiting when it sent this. One in `exit` gets no INTERRUPT.
        if matches!(shared.proc.fate(tid), Fate::Exiting | Fate::Gone) {
            return resume(request, reply, Wake::Released);
        }
        let unique = request.unique();
        let parked = Parked {
            deadline: wait.until,
            since: Instant::now(),
            tid: tid.0,
            exclusive: wait.exclusive || request.opcode().is_some_and(holds_lock),
            payload: Waiting {
                request: request.into_compact(),
                reply,
                resume: Box::new(resume),
            },
        };
        match shared.table.park(unique.0, parked) {
            Outcome::Parked {
                interrupted: true, ..
            } => {
                shared.look_at(unique.0, tid);
                shared.bell.ring();
            }
            Outcome::Parked { sooner, first, .. } => {
                // The first of all, or the first that holds a lock, also starts the polling.
                if sooner || first {
                    shared.bell.ring();
                }
            }
            Outcome::Bypassed(waiting, interrupt) => waiting.go_on(Wake::Released, interrupt),
        }
    }

    /// To be called from [`crate::Service::interrupted`].
    pub fn interrupted(&self, interrupt: Interrupt) {
        let shared = self.shared();
        let unique = interrupt.target().0;
        match shared.table.interrupt(unique, interrupt, Instant::now()) {
            Interrupted::Parked(tid) => {
                shared.look_at(unique, Tid(tid));
                shared.bell.ring();
            }
            Interrupted::Hook(callback) => callback(),
            Interrupted::Early => shared.bell.ring(),
        }
    }

    /// Has `callback` called once when any signal comes for the caller of a request that is not parked but may be answered
    /// EINTR (SETLKW waiting on a helper thread). It runs on a thread that serves requests and must not block. Once the
    /// guard has gone no call begins any more, though one that has begun may still be running.
    #[must_use = "dropping the guard removes the callback"]
    pub fn on_interrupt(
        &self,
        unique: Unique,
        callback: impl FnOnce() + Send + 'static,
    ) -> InterruptGuard {
        if let Some(callback) = self.shared().table.hook(unique.0, Box::new(callback)) {
            callback();
        }
        InterruptGuard {
            shared: Arc::downgrade(self.shared()),
            unique,
        }
    }

    /// Ends all waits. Returns how many.
    pub fn release_all(&self) -> usize {
        self.release_for(|_| true)
    }

    /// Ends the waits of chosen callers. Returns how many. They are carried on with by other threads; see [`Lot::settle`].
    /// `choose` must not call the lot, which is locked meanwhile.
    pub fn release_for(&self, mut choose: impl FnMut(&Caller) -> bool) -> usize {
        let released = self
            .shared()
            .table
            .release(|parked| choose(&parked.payload.request.caller()));
        let count = released.len();
        for waiting in released {
            self.shared().submit(waiting, Wake::Released);
        }
        count
    }

    /// While `true`, nothing is parked: every wait ends before it begins. What is parked already stays until released.
    pub fn bypass(&self, on: bool) {
        self.shared().table.set_bypass(on);
    }

    /// Waits until every request whose wait has ended has been carried on with. `false` when `timeout` passed first.
    #[must_use]
    pub fn settle(&self, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        loop {
            let settled = self
                .shared()
                .workers
                .settle(end.saturating_duration_since(Instant::now()));
            // The timer may hold one that it has taken and not handed over yet; that takes microseconds.
            if settled && self.shared().table.counts().going == 0 {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
            std::thread::yield_now();
        }
    }

    /// Number of requests parked.
    #[must_use]
    pub fn parked(&self) -> usize {
        self.shared().table.counts().parked
    }

    /// Whoever queues for a lock that the caller of a parked request holds cannot be killed meanwhile: not even SIGKILL takes a
    /// thread out of the kernel's `inode_lock`. So while such requests have been parked for longer than [`POLL`], the lot looks
    /// for killed threads that wait for a lock, and if there is one, all of these requests are carried on with. `probe` replaces
    /// that search where more is known: it gets the requests, at most once per [`POLL`], and names those that shall go on.
    pub fn set_probe(&self, probe: impl Fn(&[Holder]) -> Vec<Unique> + Send + Sync + 'static) {
        *self
            .shared()
            .probe
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(probe));
        self.shared().bell.ring();
    }
}

impl std::fmt::Debug for Lot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lot")
            .field("parked", &self.parked())
            .finish_non_exhaustive()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.table.set_bypass(true);
        for waiting in self.0.table.release(|_| true) {
            self.0.submit(waiting, Wake::Released);
        }
        self.0.bell.close();
        self.0.workers.close();
    }
}

/// Removes the callback of [`Lot::on_interrupt`] when dropped.
pub struct InterruptGuard {
    shared: Weak<Shared>,
    unique: Unique,
}

impl Drop for InterruptGuard {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            drop(shared.table.unhook(self.unique.0));
        }
    }
}

impl Waiting {
    /// Carries on. A signal that came during the wait may matter now, to a lock request that begins to wait for the lock: it has the kernel send the INTERRUPT
    /// again, which otherwise comes once per request.
    fn go_on(self, wake: Wake, interrupt: Option<Interrupt>) {
        (self.resume)(self.request, self.reply, wake);
        interrupt.into_iter().for_each(Interrupt::again);
    }
}

impl Shared {
    fn submit(&self, taken: Taken<Waiting, Interrupt>, wake: Wake) {
        self.workers.submit(Box::new(move || {
            let Taken {
                payload,
                interrupt,
                going,
            } = taken;
            payload.go_on(wake, interrupt);
            drop(going);
        }));
    }

    /// Ends the wait of a request if its caller was killed or has gone.
    fn look_at(&self, unique: u64, tid: Tid) {
        self.end(unique, self.proc.fate_for_sure(tid));
    }

    fn end(&self, unique: u64, fate: Fate) {
        match fate {
            Fate::Living => {}
            Fate::Killed => {
                let Some(taken) = self.table.take(unique) else {
                    return;
                };
                // What these do to locks and handles has to happen however their caller ends.
                let must_happen = matches!(
                    taken.payload.request.opcode(),
                    Some(Opcode::Flush | Opcode::Release | Opcode::Releasedir)
                );
                if must_happen {
                    self.submit(taken, Wake::Released);
                } else {
                    taken.payload.reply.error(Errno::INTR);
                }
            }
            Fate::Exiting | Fate::Gone => {
                if let Some(waiting) = self.table.take(unique) {
                    self.submit(waiting, Wake::Released);
                }
            }
        }
    }

    /// The timer thread.
    fn run(&self) {
        let mut due = Vec::new();
        let mut stuck = Stuck::default();
        let mut last_look = Instant::now();
        let mut last_round = Instant::now();
        loop {
            let next = self.table.due(Instant::now(), &mut due);
            for waiting in due.drain(..) {
                self.submit(waiting, Wake::Deadline);
            }
            let Counts {
                parked,
                interrupted,
                exclusive,
                ..
            } = self.table.counts();
            let now = Instant::now();
            let (stale, more_early) = self
                .table
                .stale_interrupts(now.checked_sub(EARLY).unwrap_or(now));
            stale.into_iter().for_each(Interrupt::again);
            if now.duration_since(last_look) >= POLL {
                last_look = now;
                for (unique, tid) in self.table.interrupted() {
                    self.look_at(unique, Tid(tid));
                }
                if exclusive > 0 {
                    self.look_behind(now, &mut stuck);
                }
            }
            if parked > 0 && now.duration_since(last_round) >= IDLE_POLL {
                last_round = now;
                self.look_around();
            }
            let mut until = next;
            let mut no_later_than =
                |at: Instant| until = Some(until.map_or(at, |until| until.min(at)));
            if interrupted > 0 || exclusive > 0 {
                no_later_than(last_look + POLL);
            }
            if parked > 0 {
                no_later_than(last_round + IDLE_POLL);
            }
            if more_early {
                no_later_than(now + POLL);
            }
            if !self.bell.wait(until) {
                return;
            }
        }
    }

    /// Looks at some of those for whom no INTERRUPT has come.
    fn look_around(&self) {
        for tid in self.table.next_round(ROUND) {
            let fate = self.proc.fate(Tid(tid));
            if fate != Fate::Living {
                for unique in self.table.requests_of(tid) {
                    self.end(unique, fate);
                }
            }
        }
    }

    /// Lets go on whoever holds a lock that a killed thread waits for.
    fn look_behind(&self, now: Instant, stuck: &mut Stuck) {
        let mut holders = Vec::new();
        self.table
            .holders(now.checked_sub(POLL).unwrap_or(now), |unique, parked| {
                let request = &parked.payload.request;
                holders.push(Holder {
                    unique: Unique(unique),
                    node: request.node(),
                    caller: request.caller(),
                });
            });
        if holders.is_empty() {
            return;
        }
        let probe = self
            .probe
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let chosen = if let Some(probe) = probe {
            probe(&holders)
        } else if stuck.is_due(now) && stuck.scan(&self.proc, &self.table.tids()) {
            holders.iter().map(|holder| holder.unique).collect()
        } else {
            return;
        };
        for unique in chosen {
            if let Some(waiting) = self.table.take(unique.0) {
                self.submit(waiting, Wake::Released);
            }
        }
    }
}

/// Operations during which the kernel holds an inode's lock, shared or exclusive, or has others wait for the same lookup:
/// fs/namei.c, fs/open.c, fs/xattr.c, fs/readdir.c, fs/fuse/dir.c and fs/fuse/file.c of Linux 6.18.
const fn holds_lock(opcode: Opcode) -> bool {
    matches!(
        opcode,
        Opcode::Lookup
            | Opcode::Create
            | Opcode::Tmpfile
            | Opcode::Mknod
            | Opcode::Mkdir
            | Opcode::Symlink
            | Opcode::Link
            | Opcode::Unlink
            | Opcode::Rmdir
            | Opcode::Rename
            | Opcode::Rename2
            | Opcode::Setattr
            | Opcode::Setxattr
            | Opcode::Removexattr
            | Opcode::Fsync
            | Opcode::Fsyncdir
            | Opcode::Fallocate
            | Opcode::CopyFileRange
            | Opcode::CopyFileRange64
            | Opcode::Readdir
            | Opcode::Readdirplus
            | Opcode::Lseek
    )
}
