//! A tiny filesystem in memory, served over a detached FUSE mount.
//!
//! The mount is never attached anywhere: tests reach it through `/proc/self/fd/N/…`, and the kernel dissolves it when the last
//! descriptor has gone. [`Mounted`] aborts the connection when dropped, and a [`watchdog`] does when the test takes too long or its
//! process is killed: a thread that waits for an answer of its own, dead, process could not even be killed.
#![allow(dead_code, reason = "each test program uses a part of it")]

pub(crate) mod sys;
pub(crate) mod victim;
mod watchdog;

use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use hobble_fuse::mount::{self, Connection, MountOptions};
use hobble_fuse::park::{Lot, Wait, Wake};
use hobble_fuse::types::{Attr, Entry, OpenMode, Opened, StatFs};
use hobble_fuse::{
    Backing, Config, DirBuilder, DirPlusBuilder, DirentKind, Errno, Fh, Interrupt, Kernel,
    Negotiated, NodeId, Op, Opcode, Reply, Request, Server, Service, Unique,
};

/// How opens of one file are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Cached,
    Direct,
    Passthrough,
    PassthroughDirect,
}

pub(crate) struct Node {
    pub(crate) data: Vec<u8>,
    pub(crate) mode: Mode,
    backing: Option<Arc<Backing>>,
}

/// What one kind of operation has to put up with.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Delay {
    For(Duration),
    Hang,
    /// Drop the reply.
    Forget,
    /// Block the reader thread, as a slow backing call would.
    Block(Duration),
}

#[derive(Default)]
struct Tree {
    names: BTreeMap<CString, NodeId>,
    nodes: HashMap<NodeId, Node>,
}

pub(crate) struct MemFs {
    me: Weak<MemFs>,
    tree: Mutex<Tree>,
    pub(crate) lot: Lot,
    kernel: OnceLock<Kernel>,
    delays: Mutex<HashMap<Opcode, Delay>>,
    counts: Mutex<HashMap<Opcode, u64>>,
    /// Data of writes that was not aligned in memory.
    pub(crate) unaligned: AtomicU64,
    pub(crate) destroyed: AtomicUsize,
    /// Requests for which an INTERRUPT came.
    pub(crate) interrupts: Mutex<Vec<Unique>>,
    /// How waits ended.
    pub(crate) deadlines: AtomicUsize,
    pub(crate) released: AtomicUsize,
    pub(crate) exclusive: AtomicBool,
    /// How long names and attributes may be cached.
    pub(crate) ttl: Mutex<Duration>,
    /// Uniques of parked requests.
    pub(crate) last_parked: Mutex<Option<Unique>>,
}

impl MemFs {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            tree: Mutex::default(),
            lot: Lot::new().unwrap(),
            kernel: OnceLock::new(),
            delays: Mutex::default(),
            counts: Mutex::default(),
            unaligned: AtomicU64::new(0),
            destroyed: AtomicUsize::new(0),
            interrupts: Mutex::default(),
            deadlines: AtomicUsize::new(0),
            released: AtomicUsize::new(0),
            exclusive: AtomicBool::new(false),
            ttl: Mutex::new(Duration::ZERO),
            last_parked: Mutex::new(None),
        })
    }

    pub(crate) fn add(&self, name: &str, mode: Mode, data: &[u8]) -> NodeId {
        let mut tree = self.tree.lock().unwrap();
        let node = NodeId(tree.nodes.len() as u64 + 2);
        tree.names.insert(CString::new(name).unwrap(), node);
        tree.nodes.insert(
            node,
            Node {
                data: data.to_vec(),
                mode,
                backing: None,
            },
        );
        node
    }

    /// Gives a file a backing file, for the passthrough modes.
    pub(crate) fn back(&self, node: NodeId, file: &File) {
        let backing = self
            .kernel
            .get()
            .unwrap()
            .backing_open(file.as_fd())
            .unwrap();
        self.tree
            .lock()
            .unwrap()
            .nodes
            .get_mut(&node)
            .unwrap()
            .backing = Some(Arc::new(backing));
    }

    pub(crate) fn change(&self, node: NodeId, data: &[u8]) {
        self.tree.lock().unwrap().nodes.get_mut(&node).unwrap().data = data.to_vec();
    }

    pub(crate) fn remove(&self, name: &str) {
        self.tree
            .lock()
            .unwrap()
            .names
            .remove(CString::new(name).unwrap().as_c_str());
    }

    pub(crate) fn contents(&self, node: NodeId) -> Vec<u8> {
        self.tree.lock().unwrap().nodes[&node].data.clone()
    }

    pub(crate) fn delay(&self, opcode: Opcode, delay: Delay) {
        self.delays.lock().unwrap().insert(opcode, delay);
    }

    pub(crate) fn no_delays(&self) {
        self.delays.lock().unwrap().clear();
    }

    /// Requests of this kind so far.
    pub(crate) fn count(&self, opcode: Opcode) -> u64 {
        self.counts
            .lock()
            .unwrap()
            .get(&opcode)
            .copied()
            .unwrap_or(0)
    }

    /// INTERRUPTs that came for the request parked last.
    pub(crate) fn interrupts(&self) -> usize {
        let parked = self.last_parked.lock().unwrap().unwrap();
        self.interrupts
            .lock()
            .unwrap()
            .iter()
            .filter(|&&target| target == parked)
            .count()
    }

    pub(crate) fn wait_parked(&self, number: usize) {
        wait_for("parked requests", || self.lot.parked() >= number);
    }

    fn attr(&self, tree: &Tree, node: NodeId) -> Option<Attr> {
        if node == NodeId::ROOT {
            return Some(Attr {
                ino: 1,
                mode: libc::S_IFDIR | 0o755,
                nlink: 2,
                blksize: 4096,
                ..Attr::default()
            });
        }
        let file = tree.nodes.get(&node)?;
        Some(Attr {
            ino: node.0,
            size: file.data.len() as u64,
            mode: libc::S_IFREG | 0o666,
            nlink: 1,
            blksize: 4096,
            ..Attr::default()
        })
    }

    fn serve(&self, request: &Request, reply: Reply) {
        let op = match request.op() {
            Ok(op) => op,
            Err(error) => {
                reply.malformed(&error);
                return;
            }
        };
        let ttl = *self.ttl.lock().unwrap();
        let mut tree = self.tree.lock().unwrap();
        let node = request.node();
        match op {
            Op::Lookup { name } => {
                let entry = tree.names.get(name).map(|&node| Entry {
                    node,
                    generation: 0,
                    attr: self.attr(&tree, node).unwrap(),
                    entry_valid: ttl,
                    attr_valid: ttl,
                });
                match entry {
                    Some(entry) => drop(reply.entry(&entry)),
                    None => drop(reply.error(Errno::NOENT)),
                }
            }
            Op::Getattr { .. } => match self.attr(&tree, node) {
                Some(attr) => drop(reply.attr(&attr, ttl)),
                None => drop(reply.error(Errno::STALE)),
            },
            Op::Setattr(set) => {
                if let (Some(size), Some(file)) = (set.size, tree.nodes.get_mut(&node)) {
                    file.data.resize(size as usize, 0);
                }
                let attr = self.attr(&tree, node).unwrap();
                reply.attr(&attr, ttl);
            }
            Op::Open { flags, .. } => {
                let file = tree.nodes.get_mut(&node).unwrap();
                if flags.contains(rustix::fs::OFlags::TRUNC) {
                    file.data.clear();
                }
                let (mode, backing) = match file.mode {
                    Mode::Cached => (OpenMode::KEEP_CACHE, None),
                    Mode::Direct => (OpenMode::DIRECT_IO | OpenMode::PARALLEL_DIRECT_WRITES, None),
                    Mode::Passthrough => (OpenMode::empty(), file.backing.as_deref()),
                    Mode::PassthroughDirect => (OpenMode::DIRECT_IO, file.backing.as_deref()),
                };
                let _ = reply.opened(&Opened {
                    fh: Fh(node.0),
                    mode,
                    backing,
                });
            }
            Op::Create { name, .. } => {
                let node = NodeId(tree.nodes.len() as u64 + 2);
                tree.names.insert(name.to_owned(), node);
                tree.nodes.insert(
                    node,
                    Node {
                        data: Vec::new(),
                        mode: Mode::Direct,
                        backing: None,
                    },
                );
                let attr = self.attr(&tree, node).unwrap();
                let entry = Entry {
                    node,
                    generation: 0,
                    attr,
                    entry_valid: ttl,
                    attr_valid: ttl,
                };
                let opened = Opened {
                    fh: Fh(node.0),
                    mode: OpenMode::DIRECT_IO,
                    backing: None,
                };
                let _ = reply.created(&entry, &opened);
            }
            Op::Unlink { name } => match tree.names.remove(name) {
                Some(_) => drop(reply.ok()),
                None => drop(reply.error(Errno::NOENT)),
            },
            Op::Read { offset, size, .. } => {
                let data = &tree.nodes[&node].data;
                let start = data.len().min(offset as usize);
                let end = data.len().min(start + size as usize);
                let mut buffer = request.data_buffer(size);
                buffer[..end - start].copy_from_slice(&data[start..end]);
                buffer.truncate(end - start);
                reply.buffer(buffer);
            }
            Op::Write { offset, data, .. } => {
                if !data.as_ptr().addr().is_multiple_of(4096) {
                    self.unaligned.fetch_add(1, Ordering::Relaxed);
                }
                let file = &mut tree.nodes.get_mut(&node).unwrap().data;
                let end = offset as usize + data.len();
                if file.len() < end {
                    file.resize(end, 0);
                }
                file[offset as usize..end].copy_from_slice(data);
                reply.written(data.len() as u32);
            }
            Op::Opendir { .. } => {
                let _ = reply.opened(&Opened {
                    fh: Fh(0),
                    mode: OpenMode::empty(),
                    backing: None,
                });
            }
            Op::Readdir { offset, size, .. } => {
                let mut listing = DirBuilder::new(size);
                for (i, (name, node)) in tree.names.iter().enumerate().skip(offset as usize) {
                    if listing
                        .push(node.0, i as u64 + 1, DirentKind(8), name.as_bytes())
                        .is_err()
                    {
                        break;
                    }
                }
                reply.directory(listing);
            }
            Op::Readdirplus { offset, size, .. } => {
                let mut listing = DirPlusBuilder::new(size);
                for (i, (name, &node)) in tree.names.iter().enumerate().skip(offset as usize) {
                    let attr = self.attr(&tree, node).unwrap();
                    let entry = Entry {
                        node,
                        generation: 0,
                        attr,
                        entry_valid: ttl,
                        attr_valid: ttl,
                    };
                    let next = i as u64 + 1;
                    if listing
                        .push(Some(&entry), node.0, next, DirentKind(8), name.as_bytes())
                        .is_err()
                    {
                        break;
                    }
                }
                let _ = reply.directory_plus(listing);
            }
            Op::Statfs => {
                reply.statfs(&StatFs {
                    block_size: 4096,
                    fragment_size: 4096,
                    name_max: 255,
                    ..StatFs::default()
                });
            }
            Op::Flush { .. } | Op::Release { .. } | Op::Releasedir { .. } | Op::Fsync { .. } => {
                reply.ok();
            }
            Op::Forget { .. } | Op::BatchForget(_) => reply.none(),
            _ => {
                reply.unsupported();
            }
        }
    }
}

impl Service for MemFs {
    fn started(&self, kernel: &Kernel, _: &Negotiated) {
        self.kernel.set(kernel.clone()).unwrap();
    }

    fn call(&self, request: Request, reply: Reply) {
        let opcode = request.opcode().unwrap();
        *self.counts.lock().unwrap().entry(opcode).or_default() += 1;
        let delay = self.delays.lock().unwrap().get(&opcode).copied();
        let mut wait = match delay {
            None => return self.serve(&request, reply),
            Some(Delay::Forget) => return,
            Some(Delay::Block(time)) => {
                std::thread::sleep(time);
                return self.serve(&request, reply);
            }
            Some(Delay::For(time)) => Wait::until(Instant::now() + time),
            Some(Delay::Hang) => Wait::forever(),
        };
        if self.exclusive.load(Ordering::Relaxed) {
            wait = wait.exclusive();
        }
        *self.last_parked.lock().unwrap() = Some(request.unique());
        let me = self.me.upgrade().unwrap();
        self.lot
            .park(request, reply, wait, move |request, reply, wake| {
                match wake {
                    Wake::Deadline => &me.deadlines,
                    Wake::Released => &me.released,
                }
                .fetch_add(1, Ordering::Relaxed);
                me.serve(&request, reply);
            });
    }

    fn interrupted(&self, interrupt: Interrupt) {
        self.interrupts.lock().unwrap().push(interrupt.target());
        self.lot.interrupted(interrupt);
    }

    fn destroyed(&self) {
        self.destroyed.fetch_add(1, Ordering::SeqCst);
        self.lot.release_all();
    }
}

/// Tests that use the kernel take turns: many measure times. `cargo nextest` sees to it by itself.
static TURN: Mutex<()> = Mutex::new(());

std::thread_local! {
    /// Mounts of the test on this thread, which has its turn from the first to the last.
    static MOUNTS: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// A served, detached mount.
pub(crate) struct Mounted {
    pub(crate) fs: Arc<MemFs>,
    pub(crate) server: Server,
    pub(crate) mount: OwnedFd,
    pub(crate) connection: Connection,
    watchdog: Option<watchdog::Watchdog>,
    turn: Option<std::sync::MutexGuard<'static, ()>>,
}

impl Mounted {
    pub(crate) fn new() -> Self {
        Self::with(&Config::default())
    }

    pub(crate) fn with(config: &Config) -> Self {
        let turn = (MOUNTS.get() == 0).then(|| TURN.lock().unwrap_or_else(PoisonError::into_inner));
        assert!(
            rustix::process::geteuid().is_root(),
            "this test makes FUSE mounts and needs root"
        );
        let new = mount::create(&MountOptions {
            source: "hobble-fuse test".into(),
            ..MountOptions::default()
        })
        .unwrap();
        let fs = MemFs::new();
        let server = Server::start(new.device, fs.clone(), config).unwrap();
        MOUNTS.set(MOUNTS.get() + 1);
        Self {
            fs,
            server,
            mount: new.mount,
            connection: new.connection,
            watchdog: Some(watchdog::Watchdog::over(new.connection)),
            turn,
        }
    }

    /// A path to a file of the mount, good in this process and in children that inherit the descriptor.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.mount.as_raw_fd()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        MOUNTS.set(MOUNTS.get() - 1);
        self.fs.lot.bypass(true);
        self.fs.lot.release_all();
        let _ = self.connection.abort();
        self.watchdog = None;
        assert!(
            self.server.wait(Duration::from_secs(10)) || std::thread::panicking(),
            "the server did not end"
        );
    }
}

/// Waits for a condition that must become true soon.
#[track_caller]
pub(crate) fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < end, "waited 10 s for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A child of this test, killed and reaped when dropped. One that does not die of it has its connection aborted, for it may wait
/// for a lock, unkillable, and the test that failed would wait for it.
pub(crate) struct Child(pub(crate) std::process::Child, pub(crate) Connection);

impl Child {
    pub(crate) fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.0)
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(self.pid(), signal).unwrap();
    }

    /// Waits for its end; how long that took.
    #[track_caller]
    pub(crate) fn wait(&mut self) -> (Duration, std::process::ExitStatus) {
        let start = Instant::now();
        let status = self
            .ended_within(Duration::from_secs(10))
            .expect("the child did not end within 10 s");
        (start.elapsed(), status)
    }

    fn ended_within(&mut self, time: Duration) -> Option<std::process::ExitStatus> {
        let end = Instant::now() + time;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return Some(status);
            }
            if Instant::now() >= end {
                return None;
            }
            std::thread::sleep(Duration::from_micros(500));
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        if self.ended_within(Duration::from_secs(1)).is_none() {
            let _ = self.1.abort();
            let _ = self.0.wait();
        }
    }
}
