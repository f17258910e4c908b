//! Taking over from a mirror whose server has died.
//!
//! Invariant: nothing is served before everything that the log names has been found: a mirror that is not whole is not made, and what it would have been made of stays
//! open for whoever undoes the hook by other means.

use std::collections::{HashMap, HashSet};
use std::os::fd::{OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use hobble_fuse::park::Lot;
use hobble_fuse::{BackingId, Errno, Features, Kernel, Negotiated, NodeId, Unique};

use crate::config::{Caching, Callers};
use crate::door::Doors;
use crate::error::MirrorError;
use crate::faults::Rules;
use crate::handle::Handles;
use crate::legacy::fact::{Io, Served};
use crate::legacy::{Claims, Estate, Fact, Legacy, Log};
use crate::lock::lock;
use crate::locks::LockTable;
use crate::mirror::{Inner, Mirror};
use crate::store::Store;
use crate::sys::identity;

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

impl Inner {
    /// The kernel can be told things from now on.
    pub(crate) fn take_up(&self, kernel: &Kernel, agreed: &Negotiated) {
        self.log.say(|| served(kernel.device_number(), agreed));
        for (node, io) in std::mem::take(&mut *lock(&self.modes)) {
            let handles = self.handles.select(|handle| handle.node.id == node);
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
    }

    /// Tells the log everything.
    pub(crate) fn say_all(&self) {
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
}
