//! Which requests are parked, and who gets to end each.
//!
//! Invariant: deadline, INTERRUPT, release and kill race for a parked request, and exactly one wins: whoever takes it out of
//! the table, under its one lock, holds request and reply; nobody else can. An INTERRUPT is kept with its request for as long as that is
//! parked, and goes with it when its wait ends; one that comes before its request is remembered until the request is parked or it is
//! given back to the kernel. So no INTERRUPT is ever lost. The table reads no clock and starts no thread, so that `tests/park_model.rs`
//! runs this very file under a scheduler that tries interleavings.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use super::sync::{Mutex, MutexGuard};

/// One parked request, as the table sees it.
pub(crate) struct Parked<T> {
    /// When the wait ends by itself.
    pub(crate) deadline: Option<Instant>,
    /// When it was parked.
    pub(crate) since: Instant,
    /// The calling thread.
    pub(crate) tid: u32,
    /// The caller holds a lock meanwhile that others may queue for.
    pub(crate) exclusive: bool,
    /// Request, reply and what to do with them.
    pub(crate) payload: T,
}

/// A request taken out of the table, counted until dropped.
pub(crate) struct Taken<T, I> {
    /// What was parked.
    pub(crate) payload: T,
    /// The INTERRUPT that has come for it, if any.
    pub(crate) interrupt: Option<I>,
    /// Dropped when the request has been carried on with or answered.
    pub(crate) going: Going,
}

/// Counts one request that was taken out and is not finished.
pub(crate) struct Going(Arc<AtomicUsize>);

impl Drop for Going {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What came of parking a request.
pub(crate) enum Outcome<T, I> {
    /// It waits. `sooner`: its deadline is now the first of all. `first`: there was none before, or none that holds a lock.
    /// `interrupted`: an INTERRUPT for it had come before.
    Parked {
        sooner: bool,
        first: bool,
        interrupted: bool,
    },
    /// Nothing is parked at present: go on at once. With the INTERRUPT that had come before.
    Bypassed(T, Option<I>),
}

/// How many requests there are.
pub(crate) struct Counts {
    /// Parked.
    pub(crate) parked: usize,
    /// Of these, those whose INTERRUPT has come.
    pub(crate) interrupted: usize,
    /// Of these, those that hold a lock.
    pub(crate) exclusive: usize,
    /// Not parked any more and not finished either.
    pub(crate) going: usize,
}

/// What an INTERRUPT meant.
pub(crate) enum Interrupted<C> {
    /// The request is parked, for this thread. From now on it is among those to be polled.
    Parked(u32),
    /// Somebody wanted to know.
    Hook(C),
    /// Nothing of that name yet: remembered.
    Early,
}

/// See the module's text. `T` is what is parked, `I` the right to answer an INTERRUPT, `C` a callback.
pub(crate) struct Table<T, I, C> {
    inner: Mutex<Inner<T, I, C>>,
}

struct Inner<T, I, C> {
    parked: HashMap<u64, Parked<T>>,
    deadlines: BTreeSet<(Instant, u64)>,
    /// Parked requests for which an INTERRUPT has come: the kernel will not send another.
    interrupted: BTreeMap<u64, I>,
    early: HashMap<u64, (Instant, I)>,
    hooks: HashMap<u64, C>,
    /// Parked requests that hold a lock.
    exclusive: usize,
    bypass: bool,
    /// Requests taken out and not finished.
    going: Arc<AtomicUsize>,
    /// Where the slow round over all callers goes on.
    round: u32,
}

impl<T, I, C> Inner<T, I, C> {
    fn take(&mut self, unique: u64) -> Option<Taken<T, I>> {
        let parked = self.parked.remove(&unique)?;
        if let Some(deadline) = parked.deadline {
            self.deadlines.remove(&(deadline, unique));
        }
        let interrupt = self.interrupted.remove(&unique);
        self.exclusive -= usize::from(parked.exclusive);
        // Counted under the lock: at no moment is a request neither parked nor going.
        self.going.fetch_add(1, Ordering::SeqCst);
        let going = Going(Arc::clone(&self.going));
        Some(Taken {
            payload: parked.payload,
            interrupt,
            going,
        })
    }
}

impl<T, I, C> Table<T, I, C> {
    pub(crate) fn new() -> Self {
        Self {
            inner: Mutex::new(Inner {
                parked: HashMap::new(),
                deadlines: BTreeSet::new(),
                interrupted: BTreeMap::new(),
                early: HashMap::new(),
                hooks: HashMap::new(),
                exclusive: 0,
                bypass: false,
                going: Arc::new(AtomicUsize::new(0)),
                round: 0,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner<T, I, C>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Parks a request, unless nothing is parked at present.
    pub(crate) fn park(&self, unique: u64, parked: Parked<T>) -> Outcome<T, I> {
        let mut inner = self.lock();
        let early = inner.early.remove(&unique).map(|(_, token)| token);
        if inner.bypass {
            return Outcome::Bypassed(parked.payload, early);
        }
        let mut sooner = false;
        if let Some(deadline) = parked.deadline {
            sooner = inner
                .deadlines
                .first()
                .is_none_or(|&(first, _)| deadline < first);
            inner.deadlines.insert((deadline, unique));
        }
        let interrupted = early.is_some();
        if let Some(token) = early {
            inner.interrupted.insert(unique, token);
        }
        let first = inner.parked.is_empty() || (parked.exclusive && inner.exclusive == 0);
        inner.exclusive += usize::from(parked.exclusive);
        inner.parked.insert(unique, parked);
        Outcome::Parked {
            sooner,
            first,
            interrupted,
        }
    }

    /// An INTERRUPT for a request has come.
    pub(crate) fn interrupt(&self, unique: u64, token: I, now: Instant) -> Interrupted<C> {
        let mut inner = self.lock();
        if let Some(hook) = inner.hooks.remove(&unique) {
            return Interrupted::Hook(hook);
        }
        if let Some(tid) = inner.parked.get(&unique).map(|parked| parked.tid) {
            inner.interrupted.insert(unique, token);
            return Interrupted::Parked(tid);
        }
        inner.early.insert(unique, (now, token));
        Interrupted::Early
    }

    /// Registers a callback. It is given back at once if the INTERRUPT has come before.
    pub(crate) fn hook(&self, unique: u64, callback: C) -> Option<C> {
        let mut inner = self.lock();
        if inner.early.remove(&unique).is_some() {
            return Some(callback);
        }
        inner.hooks.insert(unique, callback);
        None
    }

    /// Removes a callback.
    pub(crate) fn unhook(&self, unique: u64) -> Option<C> {
        self.lock().hooks.remove(&unique)
    }

    /// Takes one request out.
    pub(crate) fn take(&self, unique: u64) -> Option<Taken<T, I>> {
        self.lock().take(unique)
    }

    /// Takes out what is due, and tells when the next will be.
    pub(crate) fn due(&self, now: Instant, due: &mut Vec<Taken<T, I>>) -> Option<Instant> {
        let mut inner = self.lock();
        loop {
            let &(deadline, unique) = inner.deadlines.first()?;
            if deadline > now {
                return Some(deadline);
            }
            inner.deadlines.remove(&(deadline, unique));
            due.extend(inner.take(unique));
        }
    }

    /// Takes out all that `choose` wants.
    pub(crate) fn release(&self, mut choose: impl FnMut(&Parked<T>) -> bool) -> Vec<Taken<T, I>> {
        let mut inner = self.lock();
        let chosen: Vec<u64> = inner
            .parked
            .iter()
            .filter(|(_, parked)| choose(parked))
            .map(|(&unique, _)| unique)
            .collect();
        chosen
            .into_iter()
            .filter_map(|unique| inner.take(unique))
            .collect()
    }

    /// While set, nothing is parked. What is parked already stays.
    pub(crate) fn set_bypass(&self, on: bool) {
        self.lock().bypass = on;
    }

    /// How many there are.
    pub(crate) fn counts(&self) -> Counts {
        let inner = self.lock();
        Counts {
            parked: inner.parked.len(),
            interrupted: inner.interrupted.len(),
            exclusive: inner.exclusive,
            going: inner.going.load(Ordering::SeqCst),
        }
    }

    /// The callers of all parked requests.
    pub(crate) fn tids(&self) -> HashSet<u32> {
        self.lock()
            .parked
            .values()
            .map(|parked| parked.tid)
            .collect()
    }

    /// Requests whose INTERRUPT has come, with their threads.
    pub(crate) fn interrupted(&self) -> Vec<(u64, u32)> {
        let inner = self.lock();
        inner
            .interrupted
            .keys()
            .filter_map(|unique| inner.parked.get(unique).map(|parked| (*unique, parked.tid)))
            .collect()
    }

    /// The next few callers of parked requests, each once however many it has, in a round that never ends.
    pub(crate) fn next_round(&self, most: usize) -> Vec<u32> {
        let mut inner = self.lock();
        let callers: BTreeSet<u32> = inner.parked.values().map(|parked| parked.tid).collect();
        let next: Vec<u32> = callers
            .range(inner.round..)
            .chain(callers.range(..inner.round))
            .copied()
            .take(most)
            .collect();
        inner.round = next.last().map_or(0, |last| last.wrapping_add(1));
        next
    }

    /// The requests of one caller.
    pub(crate) fn requests_of(&self, tid: u32) -> Vec<u64> {
        let inner = self.lock();
        inner
            .parked
            .iter()
            .filter(|(_, parked)| parked.tid == tid)
            .map(|(&unique, _)| unique)
            .collect()
    }

    /// Calls `see` for every parked request that holds a lock and was parked before `before`.
    pub(crate) fn holders(&self, before: Instant, mut see: impl FnMut(u64, &Parked<T>)) {
        for (&unique, parked) in &self.lock().parked {
            if parked.exclusive && parked.since <= before {
                see(unique, parked);
            }
        }
    }

    /// Takes out the INTERRUPTs that came before `before` and whose request has not been parked since; `more` says
    /// whether others are left.
    pub(crate) fn stale_interrupts(&self, before: Instant) -> (Vec<I>, bool) {
        let mut inner = self.lock();
        if inner.early.is_empty() {
            return (Vec::new(), false);
        }
        let stale: Vec<u64> = inner
            .early
            .iter()
            .filter(|(_, (at, _))| *at <= before)
            .map(|(&unique, _)| unique)
            .collect();
        let tokens = stale
            .into_iter()
            .filter_map(|unique| inner.early.remove(&unique))
            .map(|(_, token)| token)
            .collect();
        (tokens, !inner.early.is_empty())
    }
}
