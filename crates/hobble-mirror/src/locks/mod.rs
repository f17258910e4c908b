//! Byte-range locks and flock: who holds what, towards clients and towards everybody else.
//!
//! Owns the lock tables of all inodes, the descriptions that hold the same locks on the backing files, and whoever waits. Invariants:
//! * between clients of the hook the table decides; towards outsiders every owner has one open file description of its own on which the same ranges are held
//!   as OFD locks ([`crate::sys::lock`]), so what the table says is also what the backing file says;
//! * process-owned (`F_SETLK`) locks are never taken by the server: any close in the server would drop them;
//! * a reader thread never waits: a client that must wait for another client is queued here, one that must wait for an outsider gets a thread
//!   ([`waiter`]); INTERRUPT ends either with EINTR, also one that came while a rule delayed the request: the lot has the kernel send it again;
//! * flock has no table: each handle has its own description of the backing file, which is exactly what flock is about.
//!
//! The kernel sends OFD and POSIX locks alike (fs/fuse/file.c `fuse_lk_fill`). The difference shows in what ends them: FLUSH names the POSIX owner
//! of the closing process; the locks of an OFD owner go when the handle they were taken through is released. A cycle of OFD waiters gets EDEADLK like one
//! of POSIX waiters, where the kernel would have them hang.
//!
//! Length: the table, its waiters and its windows change under one lock and are read together.

mod handover;
mod table;
mod waiter;

pub use crate::sys::lock::{LockKind, LockRange};
pub use handover::{Handover, LockHolder, Locks, OwnerId, RangeLock};
pub use table::Class;
pub(crate) use table::Owner;

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use hobble_fuse::{Errno, Fh, FileLock, NodeId, Reply, Unique};
use rustix::fs::OFlags;

use crate::config::Callers;
use crate::legacy::fact::{self, Fact};
use crate::legacy::{Claims, Estate, Log};
use crate::lock::lock;
use crate::sys::lock as ofd;
use table::{Held, RangeTable};
use waiter::Wait;

/// One lock request.
#[derive(Clone)]
pub(crate) struct Ask {
    pub(crate) node: NodeId,
    pub(crate) fh: Fh,
    /// The handle's own description.
    pub(crate) file: Arc<OwnedFd>,
    /// The handle's access mode.
    pub(crate) access: OFlags,
    pub(crate) owner: Owner,
    pub(crate) pid: u32,
    pub(crate) kind: Option<LockKind>,
    pub(crate) range: LockRange,
}

/// The locks of all open files.
pub(crate) struct LockTable {
    state: Mutex<State>,
    callers: Arc<dyn Callers>,
    log: Log,
}

#[derive(Default)]
struct State {
    inodes: HashMap<NodeId, InodeLocks>,
    waiting: HashMap<Unique, Waiting>,
    /// Handles on which a graft is registering locks, and with which description.
    windows: HashMap<Fh, Vec<Window>>,
    /// Who has ever locked a range of which inode; a file that has seen too many owners has them all.
    seen: HashMap<NodeId, BTreeSet<u64>>,
}

/// Owners remembered for one inode.
const OWNERS_REMEMBERED: usize = 64;

#[derive(Default)]
struct InodeLocks {
    table: RangeTable,
    /// Where each owner's locks are held towards outsiders.
    files: HashMap<Owner, Description>,
    /// Who waits for other clients, in order of arrival.
    queue: Vec<Unique>,
    /// Descriptions that nobody holds locks on any more: closed once the log has been told.
    closing: Vec<Description>,
}

#[derive(Clone)]
struct Description {
    file: Arc<OwnedFd>,
    access: OFlags,
}

enum Waiting {
    /// For another client.
    Queued { ask: Ask, reply: Reply },
    /// For an outsider, on a thread.
    Outside {
        wait: Option<Arc<Wait>>,
        ask: Ask,
        file: Arc<OwnedFd>,
        reply: Reply,
    },
    /// For a flock, on a thread.
    Flock {
        wait: Option<Arc<Wait>>,
        reply: Reply,
    },
}

/// A handle on which a graft is registering the locks of a process.
#[derive(Clone)]
struct Window {
    /// Where the process's locks are held meanwhile.
    file: Arc<OwnedFd>,
    access: OFlags,
    /// Whose locks these are; anybody's when empty.
    pids: Arc<[u32]>,
}

/// Answers to give once the table is free again.
type Answers = Vec<(Reply, io::Result<()>)>;

fn answer(answers: Answers) {
    for (reply, result) in answers {
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(crate::error::errno(&error)),
        };
    }
}

impl Description {
    fn allows(&self, kind: LockKind) -> bool {
        match (kind, self.access) {
            (_, OFlags::RDWR) => true,
            (LockKind::Read, access) => access == OFlags::RDONLY,
            (LockKind::Write, access) => access == OFlags::WRONLY,
        }
    }

    fn set(&self, kind: Option<LockKind>, range: LockRange) -> io::Result<()> {
        ofd::set(self.file.as_fd(), kind, range)
    }
}

const EVERYTHING: LockRange = LockRange {
    start: 0,
    end: LockRange::OPEN_END,
};

fn owner_fact(owner: Owner) -> fact::Owner {
    (owner.kernel.0, owner.class == Class::Moved)
}

fn owner_of((kernel, is_moved): fact::Owner) -> Owner {
    let class = if is_moved {
        Class::Moved
    } else {
        Class::Opened
    };
    Owner {
        kernel: hobble_fuse::LockOwner(kernel),
        class,
    }
}

impl LockTable {
    pub(crate) fn new(callers: Arc<dyn Callers>, log: Log) -> Self {
        Self {
            state: Mutex::default(),
            callers,
            log,
        }
    }

    /// The locks of a mirror that has died. They are held on the descriptions that it held them on.
    pub(crate) fn restore(
        callers: Arc<dyn Callers>,
        estate: &Estate,
        claims: &mut Claims,
        log: Log,
    ) -> io::Result<Self> {
        let table = Self::new(callers, log);
        let mut state = State::default();
        for (node, known) in &estate.locks {
            let mut inode = InodeLocks::default();
            for held in &known.held {
                let kind = if held.is_write {
                    LockKind::Write
                } else {
                    LockKind::Read
                };
                let range = LockRange {
                    start: held.start,
                    end: held.end,
                };
                let owner = owner_of(held.owner);
                let through = known
                    .through
                    .iter()
                    .filter(|(other, _)| *other == held.owner);
                for (_, fh) in through {
                    inode.table.set(owner, Fh(*fh), held.pid, Some(kind), range);
                }
            }
            for (owner, file, access) in &known.files {
                let description = Description {
                    file: claims.get(*file)?,
                    access: OFlags::from_bits_retain(*access),
                };
                inode.files.insert(owner_of(*owner), description);
            }
            state.inodes.insert(NodeId(*node), inode);
        }
        for (node, owner) in &estate.seen {
            state.seen.entry(NodeId(*node)).or_default().insert(*owner);
        }
        *lock(&table.state) = state;
        Ok(table)
    }

    /// Tells the log what is locked of an inode now, and closes what is of no use any more.
    fn say(&self, state: &mut State, node: NodeId) {
        if !self.log.is_kept() {
            if let Some(inode) = state.inodes.get_mut(&node) {
                inode.closing.clear();
            }
            return;
        }
        let inode = state.inodes.get(&node);
        self.log.say(|| {
            let held = inode.into_iter().flat_map(|inode| inode.table.all());
            let files = inode.into_iter().flat_map(|inode| &inode.files);
            let through = inode.into_iter().flat_map(|inode| inode.table.through());
            Fact::Locks(fact::Locks {
                node: node.0,
                held: held
                    .map(|held| fact::Held {
                        owner: owner_fact(held.owner),
                        pid: held.pid,
                        is_write: held.kind == LockKind::Write,
                        start: held.range.start,
                        end: held.range.end,
                    })
                    .collect(),
                through: through
                    .map(|(owner, fh)| (owner_fact(*owner), fh.0))
                    .collect(),
                files: files
                    .map(|(owner, description)| {
                        let number = description.file.as_raw_fd();
                        (owner_fact(*owner), number, description.access.bits())
                    })
                    .collect(),
            })
        });
        if let Some(inode) = state.inodes.get_mut(&node) {
            inode.closing.clear();
        }
    }

    /// Says everything that there is to be known of all locks.
    pub(crate) fn say_all(&self) {
        let mut state = lock(&self.state);
        let nodes: Vec<NodeId> = state.inodes.keys().copied().collect();
        for node in nodes {
            self.say(&mut state, node);
        }
        for (node, owners) in &state.seen {
            for owner in owners {
                self.log.say(|| Fact::Seen {
                    node: node.0,
                    owner: *owner,
                });
            }
        }
    }

    /// Remembers that an owner has locked a range of a file.
    pub(crate) fn saw(&self, node: NodeId, owner: hobble_fuse::LockOwner) {
        let mut state = lock(&self.state);
        let owners = state.seen.entry(node).or_default();
        if owners.len() < OWNERS_REMEMBERED && owners.insert(owner.0) {
            self.log.say(|| Fact::Seen {
                node: node.0,
                owner: owner.0,
            });
        }
    }

    /// Whether anybody but these owners (of OFD locks) has ever locked a range of a file.
    pub(crate) fn has_seen_others(&self, node: NodeId, ofd: &BTreeSet<u64>) -> bool {
        let state = lock(&self.state);
        state.seen.get(&node).is_some_and(|owners| {
            owners.len() >= OWNERS_REMEMBERED || owners.iter().any(|owner| !ofd.contains(owner))
        })
    }
}

impl InodeLocks {
    /// The description on which `ask.owner` holds its locks, opened or opened wider if need be.
    fn description(
        &mut self,
        ask: &Ask,
        kind: LockKind,
        callers: &dyn Callers,
    ) -> io::Result<Description> {
        let present = self.files.get(&ask.owner);
        if let Some(present) = present.filter(|present| present.allows(kind)) {
            return Ok(present.clone());
        }
        // A read-only handle gets a read-only description: one more writer would make execve fail with ETXTBSY. Anything else gets both directions, so that it
        // has to be changed once at most, and then holds shared locks only, which a second description can take as well before the first lets go.
        let access = if present.is_none() && ask.access == OFlags::RDONLY {
            OFlags::RDONLY
        } else {
            OFlags::RDWR
        };
        let opened = crate::fd::reopen(ask.file.as_fd(), access | OFlags::NONBLOCK);
        let (file, access) = match opened {
            Ok(file) => (file, access),
            Err(_) if present.is_none() => (
                crate::fd::reopen(ask.file.as_fd(), ask.access | OFlags::NONBLOCK)?,
                ask.access,
            ),
            Err(error) => return Err(error),
        };
        let wider = Description {
            file: Arc::new(file),
            access,
        };
        for held in self.table.of(ask.owner) {
            wider.set(Some(held.kind), held.range)?;
        }
        callers.holds_locks_on(wider.file.as_fd(), ask.pid);
        self.closing
            .extend(self.files.insert(ask.owner, wider.clone()));
        Ok(wider)
    }

    /// Takes or gives up a lock that no other client stands in the way of. `EAGAIN` when an outsider does.
    fn apply(&mut self, ask: &Ask, callers: &dyn Callers) -> io::Result<()> {
        match ask.kind {
            Some(kind) => self
                .description(ask, kind, callers)?
                .set(Some(kind), ask.range)?,
            None => {
                if let Some(description) = self.files.get(&ask.owner) {
                    description.set(None, ask.range)?;
                }
            }
        }
        self.table
            .set(ask.owner, ask.fh, ask.pid, ask.kind, ask.range);
        self.tidy(ask.owner);
        Ok(())
    }

    /// Forgets what `owner` holds; on the backing file too, unless the locks go on there without us (`leave`).
    fn drop_owner(&mut self, owner: Owner, leave: bool) -> bool {
        if let Some(description) = self.files.remove(&owner) {
            if !leave && let Err(error) = description.set(None, EVERYTHING) {
                tracing::warn!(%error, "could not unlock a backing file; it is unlocked when its description is closed");
            }
            self.closing.push(description);
        }
        self.table.drop_owner(owner)
    }

    fn tidy(&mut self, owner: Owner) {
        if self.table.of(owner).next().is_none() {
            self.closing.extend(self.files.remove(&owner));
        }
    }

    fn is_idle(&self) -> bool {
        self.table.is_empty() && self.queue.is_empty()
    }
}

impl State {
    /// Whether queueing behind `blockers` would close a circle of clients that wait for each other.
    fn deadlocks(&self, owner: Owner, blockers: &[Held]) -> bool {
        let mut seen: Vec<Owner> = Vec::new();
        let mut next: Vec<Owner> = blockers.iter().map(|held| held.owner).collect();
        while let Some(blocker) = next.pop() {
            if blocker == owner {
                return true;
            }
            if seen.contains(&blocker) {
                continue;
            }
            seen.push(blocker);
            for waiting in self.waiting.values() {
                let Waiting::Queued { ask, .. } = waiting else {
                    continue;
                };
                if ask.owner != blocker {
                    continue;
                }
                let (Some(inode), Some(kind)) = (self.inodes.get(&ask.node), ask.kind) else {
                    continue;
                };
                next.extend(
                    inode
                        .table
                        .conflicts(ask.owner, kind, ask.range)
                        .map(|held| held.owner),
                );
            }
        }
        false
    }

    /// A handle on which a graft registers locks: the owner that is now learnt holds them on the graft's description.
    fn bind_window(&mut self, ask: &Ask, callers: &dyn Callers) {
        let window = self.windows.get(&ask.fh).and_then(|windows| {
            windows
                .iter()
                .find(|window| window.pids.contains(&ask.pid))
                .or_else(|| windows.iter().find(|window| window.pids.is_empty()))
        });
        if let Some(window) = window {
            let description = Description {
                file: Arc::clone(&window.file),
                access: window.access,
            };
            callers.holds_locks_on(description.file.as_fd(), ask.pid);
            let inode = self.inodes.entry(ask.node).or_default();
            inode
                .closing
                .extend(inode.files.insert(ask.owner, description));
        }
    }

    fn forget_if_idle(&mut self, node: NodeId) {
        if self.inodes.get(&node).is_some_and(InodeLocks::is_idle) {
            self.inodes.remove(&node);
        }
    }
}

impl LockTable {
    /// What keeps the asker from the lock.
    pub(crate) fn test(&self, ask: &Ask) -> io::Result<Option<FileLock>> {
        let Some(kind) = ask.kind else {
            return Err(Errno::INVAL.into());
        };
        let mut state = lock(&self.state);
        let inode = state.inodes.entry(ask.node).or_default();
        if let Some(held) = inode.table.conflict(ask.owner, kind, ask.range) {
            return Ok(Some(file_lock(held.kind, held.range, held.pid)));
        }
        // The owner's description if it has one: its own locks must not stand in its way.
        let own = inode
            .files
            .get(&ask.owner)
            .map(|description| Arc::clone(&description.file));
        state.forget_if_idle(ask.node);
        let file = own.as_ref().unwrap_or(&ask.file);
        let found = ofd::get(file.as_fd(), kind, ask.range)?;
        // An outsider's OFD lock has no pid (-1, F_OFD_GETLK in fcntl(2)); 0 is what the kernel makes of a pid it cannot show.
        Ok(found.map(|(kind, range, pid)| file_lock(kind, range, u32::try_from(pid).unwrap_or(0))))
    }

    /// Takes or gives up a lock, without waiting.
    pub(crate) fn set(self: &Arc<Self>, ask: &Ask) -> io::Result<()> {
        let mut answers = Answers::new();
        let result = {
            let mut state = lock(&self.state);
            state.bind_window(ask, &*self.callers);
            let inode = state.inodes.entry(ask.node).or_default();
            let result = match ask.kind {
                Some(kind) if inode.table.conflict(ask.owner, kind, ask.range).is_some() => {
                    Err(Errno::AGAIN.into())
                }
                _ => inode.apply(ask, &*self.callers),
            };
            // Giving up and sharing both may let others in.
            if result.is_ok() && ask.kind != Some(LockKind::Write) {
                self.admit(&mut state, ask.node, &mut answers);
            }
            self.say(&mut state, ask.node);
            state.forget_if_idle(ask.node);
            result
        };
        answer(answers);
        result
    }

    /// Takes a lock, answering when it is there.
    pub(crate) fn set_wait(self: &Arc<Self>, ask: Ask, reply: Reply) {
        let mut answers = Answers::new();
        {
            let mut state = lock(&self.state);
            state.bind_window(&ask, &*self.callers);
            let node = ask.node;
            self.attempt(&mut state, ask, reply, &mut answers);
            self.say(&mut state, node);
        }
        answer(answers);
    }

    fn attempt(self: &Arc<Self>, state: &mut State, ask: Ask, reply: Reply, answers: &mut Answers) {
        let inode = state.inodes.entry(ask.node).or_default();
        let kind = ask.kind.unwrap_or(LockKind::Read);
        let blockers: Vec<Held> = if ask.kind.is_some() {
            inode.table.conflicts(ask.owner, kind, ask.range).collect()
        } else {
            Vec::new()
        };
        if !blockers.is_empty() {
            if state.deadlocks(ask.owner, &blockers) {
                answers.push((reply, Err(Errno::DEADLK.into())));
                return;
            }
            let unique = reply.unique();
            if let Some(inode) = state.inodes.get_mut(&ask.node) {
                inode.queue.push(unique);
            }
            state.waiting.insert(unique, Waiting::Queued { ask, reply });
            return;
        }
        match inode.apply(&ask, &*self.callers) {
            Ok(()) => {
                let node = ask.node;
                answers.push((reply, Ok(())));
                if ask.kind != Some(LockKind::Write) {
                    self.admit(state, node, answers);
                }
            }
            Err(error) if is_conflict(&error) => self.wait_outside(state, ask, reply, answers),
            Err(error) => answers.push((reply, Err(error))),
        }
    }

    /// An outsider holds it: waits on a thread.
    fn wait_outside(
        self: &Arc<Self>,
        state: &mut State,
        ask: Ask,
        reply: Reply,
        answers: &mut Answers,
    ) {
        let Some(kind) = ask.kind else {
            return answers.push((reply, Ok(())));
        };
        let unique = reply.unique();
        let described =
            state
                .inodes
                .entry(ask.node)
                .or_default()
                .description(&ask, kind, &*self.callers);
        let file = match described {
            Ok(description) => description.file,
            Err(error) => return answers.push((reply, Err(error))),
        };
        let range = ask.range;
        let (table, blocking) = (Arc::clone(self), Arc::clone(&file));
        state.waiting.insert(
            unique,
            Waiting::Outside {
                wait: None,
                ask,
                file,
                reply,
            },
        );
        // The thread cannot finish before this returns: it needs the table for that.
        let started = Wait::start(
            move || ofd::set_wait(blocking.as_fd(), kind, range),
            move |result| table.finish(unique, result),
        );
        self.note_wait(state, unique, started, answers);
    }

    fn note_wait(
        &self,
        state: &mut State,
        unique: Unique,
        started: io::Result<Arc<Wait>>,
        answers: &mut Answers,
    ) {
        match (started, state.waiting.get_mut(&unique)) {
            (Ok(started), Some(Waiting::Outside { wait, .. } | Waiting::Flock { wait, .. })) => {
                *wait = Some(started)
            }
            (Ok(_), _) => {}
            (Err(error), _) => {
                if let Some(Waiting::Outside { reply, .. } | Waiting::Flock { reply, .. }) =
                    state.waiting.remove(&unique)
                {
                    answers.push((reply, Err(error)));
                }
            }
        }
    }

    /// A thread's wait for an outsider has ended.
    fn finish(self: &Arc<Self>, unique: Unique, result: io::Result<()>) {
        let mut answers = Answers::new();
        {
            let mut state = lock(&self.state);
            match state.waiting.remove(&unique) {
                Some(Waiting::Outside {
                    ask, file, reply, ..
                }) => {
                    let node = ask.node;
                    match result {
                        Ok(()) => {
                            let inode = state.inodes.entry(ask.node).or_default();
                            let current = inode.files.entry(ask.owner).or_insert_with(|| {
                                self.callers.holds_locks_on(file.as_fd(), ask.pid);
                                Description {
                                    file: Arc::clone(&file),
                                    access: OFlags::RDWR,
                                }
                            });
                            if Arc::ptr_eq(&current.file, &file) {
                                inode
                                    .table
                                    .set(ask.owner, ask.fh, ask.pid, ask.kind, ask.range);
                                answers.push((reply, Ok(())));
                            } else {
                                // The owner's description was changed meanwhile: what this one holds goes, and all begins again.
                                drop(file);
                                self.attempt(&mut state, ask, reply, &mut answers);
                            }
                        }
                        Err(error) => {
                            if let Some(inode) = state.inodes.get_mut(&ask.node) {
                                inode.tidy(ask.owner);
                            }
                            answers.push((reply, Err(error)));
                        }
                    }
                    self.say(&mut state, node);
                    state.forget_if_idle(node);
                }
                Some(Waiting::Flock { reply, .. }) => answers.push((reply, result)),
                Some(queued @ Waiting::Queued { .. }) => {
                    state.waiting.insert(unique, queued);
                }
                None => {}
            }
        }
        answer(answers);
    }

    /// Lets in those who need not wait any more, in order of arrival.
    fn admit(self: &Arc<Self>, state: &mut State, node: NodeId, answers: &mut Answers) {
        let Some(inode) = state.inodes.get_mut(&node) else {
            return;
        };
        let queue = std::mem::take(&mut inode.queue);
        for unique in queue {
            let Some(Waiting::Queued { ask, .. }) = state.waiting.get(&unique) else {
                continue;
            };
            let Some(inode) = state.inodes.get_mut(&node) else {
                continue;
            };
            let kind = ask.kind.unwrap_or(LockKind::Read);
            if inode.table.conflict(ask.owner, kind, ask.range).is_some() {
                inode.queue.push(unique);
                continue;
            }
            let Some(Waiting::Queued { ask, reply }) = state.waiting.remove(&unique) else {
                continue;
            };
            let applied = state
                .inodes
                .entry(node)
                .or_default()
                .apply(&ask, &*self.callers);
            match applied {
                Ok(()) => answers.push((reply, Ok(()))),
                Err(error) if is_conflict(&error) => self.wait_outside(state, ask, reply, answers),
                Err(error) => answers.push((reply, Err(error))),
            }
        }
    }

    /// A flock, on the handle's own description.
    pub(crate) fn flock(
        self: &Arc<Self>,
        file: &Arc<OwnedFd>,
        kind: Option<LockKind>,
        wait: bool,
        reply: Reply,
    ) {
        use rustix::fs::FlockOperation as Operation;
        let (now, later) = match kind {
            Some(LockKind::Read) => (Operation::NonBlockingLockShared, Operation::LockShared),
            Some(LockKind::Write) => (
                Operation::NonBlockingLockExclusive,
                Operation::LockExclusive,
            ),
            None => (Operation::NonBlockingUnlock, Operation::Unlock),
        };
        match rustix::fs::flock(file.as_fd(), now) {
            Ok(()) => {
                reply.ok();
            }
            Err(Errno::AGAIN) if wait => {
                let mut answers = Answers::new();
                {
                    let mut state = lock(&self.state);
                    let unique = reply.unique();
                    let (table, blocking) = (Arc::clone(self), Arc::clone(file));
                    state
                        .waiting
                        .insert(unique, Waiting::Flock { wait: None, reply });
                    let started = Wait::start(
                        move || Ok(rustix::fs::flock(blocking.as_fd(), later)?),
                        move |result| table.finish(unique, result),
                    );
                    self.note_wait(&mut state, unique, started, &mut answers);
                }
                answer(answers);
            }
            Err(errno) => {
                reply.error(errno);
            }
        }
    }

    /// A descriptor was closed: the POSIX locks of its process on this inode go.
    pub(crate) fn flush(self: &Arc<Self>, node: NodeId, owner: Owner) {
        self.drop_owners(node, false, |_| vec![owner]);
    }

    /// A handle is gone: so are the locks that were taken through it alone.
    pub(crate) fn release(self: &Arc<Self>, node: NodeId, fh: Fh) {
        self.drop_owners(node, false, |inode| inode.table.close(fh));
        lock(&self.state).windows.remove(&fh);
    }

    /// A handle is gone whose description goes on without us: so do that description's own locks. Those of processes stay until whoever moves them has
    /// them released ([`Locks::release`]): nobody may get in between.
    pub(crate) fn release_given_back(self: &Arc<Self>, node: NodeId, fh: Fh, ofd: Option<Owner>) {
        self.drop_owners(node, true, |inode| {
            let _ = inode.table.close(fh);
            ofd.into_iter().collect()
        });
        lock(&self.state).windows.remove(&fh);
    }

    /// An owner's locks go on without us.
    pub(crate) fn leave(self: &Arc<Self>, node: NodeId, owner: Owner) {
        self.drop_owners(node, true, |_| vec![owner]);
    }

    /// What was locked through one handle counts as locked through another, which has taken its place.
    pub(crate) fn succeed(&self, node: NodeId, old: Fh, new: Fh) {
        let mut state = lock(&self.state);
        if let Some(inode) = state.inodes.get_mut(&node) {
            inode.table.succeed(old, new);
            self.say(&mut state, node);
        }
    }

    fn drop_owners(
        self: &Arc<Self>,
        node: NodeId,
        leave: bool,
        which: impl FnOnce(&mut InodeLocks) -> Vec<Owner>,
    ) {
        let mut answers = Answers::new();
        {
            let mut state = lock(&self.state);
            let Some(inode) = state.inodes.get_mut(&node) else {
                return;
            };
            let mut dropped = false;
            for owner in which(inode) {
                dropped |= inode.drop_owner(owner, leave);
            }
            if dropped {
                self.admit(&mut state, node, &mut answers);
            }
            self.say(&mut state, node);
            state.forget_if_idle(node);
        }
        answer(answers);
    }

    /// Ends the wait of a request with EINTR. `false` when it does not wait here.
    pub(crate) fn interrupt(&self, unique: Unique) -> bool {
        let mut state = lock(&self.state);
        match state.waiting.get(&unique) {
            None => false,
            Some(Waiting::Outside { wait, .. } | Waiting::Flock { wait, .. }) => {
                if let Some(wait) = wait {
                    wait.cancel();
                }
                true
            }
            Some(Waiting::Queued { ask, .. }) => {
                let node = ask.node;
                if let Some(inode) = state.inodes.get_mut(&node) {
                    inode.queue.retain(|queued| *queued != unique);
                }
                let removed = state.waiting.remove(&unique);
                state.forget_if_idle(node);
                drop(state);
                if let Some(Waiting::Queued { reply, .. }) = removed {
                    reply.error(Errno::INTR);
                }
                true
            }
        }
    }

    /// Ends every wait with EINTR: the connection is gone.
    pub(crate) fn interrupt_all(&self) {
        let waiting: Vec<Unique> = lock(&self.state).waiting.keys().copied().collect();
        for unique in waiting {
            self.interrupt(unique);
        }
    }
}

fn is_conflict(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

fn file_lock(kind: LockKind, range: LockRange, pid: u32) -> FileLock {
    let kind = match kind {
        LockKind::Read => hobble_fuse::LockKind::Read,
        LockKind::Write => hobble_fuse::LockKind::Write,
    };
    FileLock {
        start: range.start,
        end: range.end,
        kind,
        pid,
    }
}
