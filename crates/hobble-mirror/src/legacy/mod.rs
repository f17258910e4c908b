//! What a mirror leaves behind: everything that whoever takes over its connection must know, written down in memory that outlives it.
//!
//! A server may be killed at any instruction. The kernel keeps what it has asked and was not answered, and hands it out again; the descriptors live in a table that is
//! shared with a process which lives on; what the numbers in the requests *mean* is in here. [`Mirror::resume`](crate::Mirror::resume) makes a mirror of it.
//!
//! It is a log of [`Fact`]s in two halves. Invariants:
//! * a fact counts once its length is part of the tail, which is moved by one atomic store after all its bytes are there;
//! * facts about one thing are appended in the order in which they became true: under the lock that guards the thing, or with the state read while the log is locked;
//! * a fact that names a descriptor is appended after that was opened and taken back before it is closed, so a number in here is never somebody else's;
//! * when one half is full enough, all that is true is said again in the other, while new facts are appended there as well. Until that is complete the older half is
//!   read first.
//!
//! A log that overflows is given up: taking over is then refused, and the hook is undone without it.

mod estate;
pub(crate) mod fact;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use hobble_fuse::{Unique, Witness};

use crate::lock::lock;
use crate::sys::shared::{HEAD, Shared};
pub(crate) use estate::{Claims, Estate};
pub(crate) use fact::Fact;

/// Bytes of address space for each half; memory is taken as it is written.
const HALF: usize = 512 << 20;
/// The same where so much cannot be had.
const SMALL_HALF: usize = 32 << 20;
/// Log that is kept at least before it is written anew.
const LEAST: u64 = 8 << 20;
/// Answers that are remembered when the log is written anew: more than there can be threads between noting one and sending it.
const ANSWERS: usize = 256;

/// Which half is appended to.
const ACTIVE: usize = 0;
/// 1 while not all that is true is in the active half.
const REWRITING: usize = 1;
/// The tails of the halves, in bytes.
const TAILS: [usize; 2] = [2, 3];
/// 1 when a fact did not fit.
const OVERFLOWN: usize = 4;
/// Signs of life.
const BEATS: usize = 5;
/// See [`Legacy::set_deadline`].
const DEADLINE: usize = 6;
/// See [`Legacy::set_server`].
const SERVER: usize = 7;
/// See [`Legacy::set_told`].
const TOLD: usize = 8;

/// The log. To be made before the process that serves is cloned, so that all sides have it. Cheap to clone.
#[derive(Clone)]
pub struct Legacy {
    inner: Arc<Inner>,
}

struct Inner {
    memory: Shared,
    half: usize,
    writer: Mutex<Writer>,
    /// Length of the log from which on it is to be written anew.
    due: AtomicU64,
}

#[derive(Default)]
struct Writer {
    buffer: Vec<u8>,
    /// The last answers that were noted.
    answers: VecDeque<(u64, i32, Vec<u8>)>,
    /// What was begun and is not answered yet.
    begun: HashMap<u64, u64>,
    note: Vec<u8>,
}

impl std::fmt::Debug for Legacy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Legacy").finish_non_exhaustive()
    }
}

impl Legacy {
    /// An empty log.
    ///
    /// # Errors
    /// `ENOMEM` when no address space can be had.
    pub fn new() -> io::Result<Self> {
        let make = |half: usize| Shared::new(HEAD + 2 * half).map(|memory| (memory, half));
        let (memory, half) = make(HALF).or_else(|_| make(SMALL_HALF))?;
        Ok(Self {
            inner: Arc::new(Inner {
                memory,
                half,
                writer: Mutex::default(),
                due: AtomicU64::new(LEAST),
            }),
        })
    }

    /// A sign of life of whoever serves.
    pub fn beat(&self) {
        self.inner
            .memory
            .word(BEATS)
            .fetch_add(1, Ordering::Relaxed);
    }

    /// How many signs of life there were.
    #[must_use]
    pub fn beats(&self) -> u64 {
        self.inner.memory.word(BEATS).load(Ordering::Relaxed)
    }

    /// Says until when whoever serves is to be done, in milliseconds of `CLOCK_BOOTTIME`; 0 for no limit.
    pub fn set_deadline(&self, at: u64) {
        self.inner
            .memory
            .word(DEADLINE)
            .store(at, Ordering::Relaxed);
    }

    /// What was last said by [`Legacy::set_deadline`].
    #[must_use]
    pub fn deadline(&self) -> u64 {
        self.inner.memory.word(DEADLINE).load(Ordering::Relaxed)
    }

    /// Says which process serves now, and is not merely undoing.
    pub fn set_server(&self, pid: u32) {
        self.inner
            .memory
            .word(SERVER)
            .store(u64::from(pid), Ordering::Relaxed);
    }

    /// What was last said by [`Legacy::set_server`]; 0 before.
    #[must_use]
    pub fn server(&self) -> u32 {
        u32::try_from(self.inner.memory.word(SERVER).load(Ordering::Relaxed)).unwrap_or(0)
    }

    /// Says how much has been told to whoever listens.
    pub fn set_told(&self, told: u64) {
        self.inner.memory.word(TOLD).store(told, Ordering::Relaxed);
    }

    /// What was last said by [`Legacy::set_told`]; 0 before.
    #[must_use]
    pub fn told(&self) -> u64 {
        self.inner.memory.word(TOLD).load(Ordering::Relaxed)
    }

    /// Remembers bytes for whoever takes over; the last ones count.
    pub fn note(&self, bytes: Vec<u8>) {
        let mut writer = lock(&self.inner.writer);
        writer.note.clone_from(&bytes);
        self.inner.put(&mut writer, &Fact::Note(bytes));
    }

    /// What was last given to [`Legacy::note`]. Only when whoever did has ended.
    ///
    /// # Errors
    /// When the log is incomplete or makes no sense.
    pub fn last_note(&self) -> io::Result<Vec<u8>> {
        let facts = self.facts()?.into_iter().rev();
        let mut notes = facts.filter_map(|fact| match fact {
            Fact::Note(bytes) => Some(bytes),
            _ => None,
        });
        Ok(notes.next().unwrap_or_default())
    }

    /// Takes over what whoever wrote before had in mind, so that it is said again when everything is.
    fn inherit(&self, estate: &Estate) {
        let mut writer = lock(&self.inner.writer);
        writer.note.clone_from(&estate.note);
        writer.begun.clone_from(&estate.begun);
        let answers = estate.answer_order.iter().rev().take(ANSWERS).rev();
        writer.answers = answers
            .filter_map(|unique| {
                let (error, bytes) = estate.answered.get(unique)?;
                Some((*unique, *error, bytes.clone()))
            })
            .collect();
        for (unique, ..) in writer.answers.clone() {
            writer.begun.remove(&unique);
        }
    }

    /// Forgets everything: another mirror is going to be told of.
    pub(crate) fn clear(&self) {
        let inner = &*self.inner;
        let mut writer = lock(&inner.writer);
        *writer = Writer::default();
        let [first, second] = TAILS;
        for word in [first, second, REWRITING, OVERFLOWN] {
            inner.memory.word(word).store(0, Ordering::SeqCst);
        }
        inner.due.store(LEAST, Ordering::Relaxed);
    }

    fn append(&self, make: impl FnOnce() -> Fact) {
        let mut writer = lock(&self.inner.writer);
        let fact = make();
        self.inner.put(&mut writer, &fact);
    }

    fn is_due(&self) -> bool {
        let inner = &*self.inner;
        let [first, second] = TAILS;
        let tail = inner
            .memory
            .word(if inner.active() == 0 { first } else { second });
        tail.load(Ordering::Relaxed) >= inner.due.load(Ordering::Relaxed)
    }

    /// Says everything again: `say` does, by the log that it is given.
    fn rewrite(&self, say: impl FnOnce()) {
        let inner = &*self.inner;
        let word = |index| inner.memory.word(index);
        let old = inner.active();
        let new = 1 - old;
        {
            let mut writer = lock(&inner.writer);
            if word(REWRITING).load(Ordering::Relaxed) != 0 || inner.active() != old {
                return;
            }
            let tail = TAILS.get(new).copied().unwrap_or_default();
            word(tail).store(0, Ordering::Release);
            // Read in this order by whoever comes after us: the half with the truth is never missed.
            word(REWRITING).store(1, Ordering::SeqCst);
            word(ACTIVE).store(new as u64, Ordering::SeqCst);
            let begun: Vec<Fact> = writer
                .begun
                .iter()
                .map(|(unique, before)| Fact::Begun {
                    unique: *unique,
                    before: *before,
                })
                .collect();
            let answers: Vec<Fact> = writer
                .answers
                .iter()
                .map(|(unique, error, bytes)| Fact::Answered {
                    unique: *unique,
                    error: *error,
                    bytes: bytes.clone(),
                })
                .collect();
            let note = Fact::Note(writer.note.clone());
            for fact in begun.iter().chain(&answers).chain([&note]) {
                inner.put(&mut writer, fact);
            }
        }
        say();
        let _writer = lock(&inner.writer);
        let tail = TAILS.get(new).copied().unwrap_or_default();
        let said = word(tail).load(Ordering::Relaxed);
        inner.due.store((said * 3).max(LEAST), Ordering::Relaxed);
        word(REWRITING).store(0, Ordering::SeqCst);
        inner.memory.discard(inner.start_of(old), inner.half);
    }

    /// Every fact, in order. Only when whoever wrote them has ended.
    fn facts(&self) -> io::Result<Vec<Fact>> {
        let inner = &*self.inner;
        if inner.memory.word(OVERFLOWN).load(Ordering::Relaxed) != 0 {
            return Err(io::Error::other("the log had become too long"));
        }
        let active = inner.active();
        let is_rewriting = inner.memory.word(REWRITING).load(Ordering::SeqCst) != 0;
        let mut facts = Vec::new();
        if is_rewriting {
            inner.read_half(1 - active, &mut facts)?;
        }
        inner.read_half(active, &mut facts)?;
        Ok(facts)
    }
}

impl Inner {
    fn put(&self, writer: &mut Writer, fact: &Fact) {
        writer.buffer.clear();
        // Room for the length.
        writer.buffer.extend_from_slice(&[0; 4]);
        let encoded = postcard::to_extend(fact, std::mem::take(&mut writer.buffer));
        let active = self.active();
        let [first, second] = TAILS;
        let tail = self.memory.word(if active == 0 { first } else { second });
        let at = tail.load(Ordering::Relaxed);
        let fits = encoded.is_ok_and(|mut bytes| {
            let len = u32::try_from(bytes.len() - 4).unwrap_or(u32::MAX);
            if let Some(head) = bytes.get_mut(..4) {
                head.copy_from_slice(&len.to_ne_bytes());
            }
            let end = at + bytes.len() as u64;
            let fits = end <= self.half as u64
                && self.memory.write(
                    self.start_of(active) + usize::try_from(at).unwrap_or(usize::MAX / 2),
                    &bytes,
                );
            if fits {
                tail.store(end, Ordering::Release);
            }
            writer.buffer = bytes;
            fits
        });
        if !fits && self.memory.word(OVERFLOWN).swap(1, Ordering::Relaxed) == 0 {
            tracing::error!(
                "the log of what a successor must know is full: should this server die, the hook is undone without it"
            );
        }
    }

    fn active(&self) -> usize {
        usize::from(self.memory.word(ACTIVE).load(Ordering::SeqCst) != 0)
    }

    const fn start_of(&self, half: usize) -> usize {
        HEAD + half * self.half
    }

    fn read_half(&self, half: usize, facts: &mut Vec<Fact>) -> io::Result<()> {
        let tail = TAILS.get(half).copied().unwrap_or_default();
        let len = usize::try_from(self.memory.word(tail).load(Ordering::Acquire))
            .map_err(io::Error::other)?;
        let bytes = self
            .memory
            .read(self.start_of(half), len.min(self.half))
            .ok_or(io::ErrorKind::InvalidData)?;
        let mut rest = bytes.as_slice();
        while let Some((head, after)) = rest.split_first_chunk::<4>() {
            let len = usize::try_from(u32::from_ne_bytes(*head)).map_err(io::Error::other)?;
            let (fact, after) = after
                .split_at_checked(len)
                .ok_or(io::ErrorKind::InvalidData)?;
            facts.push(postcard::from_bytes(fact).map_err(io::Error::other)?);
            rest = after;
        }
        Ok(())
    }
}

/// The log of a mirror that may have none.
#[derive(Clone, Debug, Default)]
pub(crate) struct Log(Option<Legacy>);

impl Log {
    pub(crate) const fn new(legacy: Option<Legacy>) -> Self {
        Self(legacy)
    }

    pub(crate) const fn is_kept(&self) -> bool {
        self.0.is_some()
    }

    /// Appends a fact, which is put together while the log is locked: what it says is true then. `make` must not wait for a lock under which somebody appends.
    pub(crate) fn say(&self, make: impl FnOnce() -> Fact) {
        if let Some(legacy) = &self.0 {
            legacy.append(make);
        }
    }

    /// Whether it is time to say everything again.
    pub(crate) fn is_due(&self) -> bool {
        self.0.as_ref().is_some_and(Legacy::is_due)
    }

    pub(crate) fn rewrite(&self, say: impl FnOnce()) {
        if let Some(legacy) = &self.0 {
            legacy.rewrite(say);
        }
    }

    /// Something that must not be done twice is about to be done.
    pub(crate) fn begin(&self, unique: Unique, before: u64) {
        if let Some(legacy) = &self.0 {
            let unique = unique.original().0;
            let mut writer = lock(&legacy.inner.writer);
            writer.begun.insert(unique, before);
            legacy
                .inner
                .put(&mut writer, &Fact::Begun { unique, before });
        }
    }

    /// Who is to be told the answer to it.
    pub(crate) fn witness(&self) -> Option<Arc<dyn Witness>> {
        let legacy = self.0.as_ref()?;
        Some(Arc::clone(&legacy.inner) as Arc<dyn Witness>)
    }
}

impl Witness for Inner {
    fn answering(&self, unique: Unique, error: i32, parts: &[&[u8]]) {
        // The same memory, under the one lock that it has.
        let bytes = parts.concat();
        let mut writer = lock(&self.writer);
        writer.begun.remove(&unique.0);
        writer.answers.push_back((unique.0, error, bytes.clone()));
        if writer.answers.len() > ANSWERS {
            writer.answers.pop_front();
        }
        self.put(
            &mut writer,
            &Fact::Answered {
                unique: unique.0,
                error,
                bytes,
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notes(legacy: &Legacy) -> Vec<Vec<u8>> {
        legacy
            .facts()
            .unwrap()
            .into_iter()
            .filter_map(|fact| match fact {
                Fact::Note(bytes) => Some(bytes),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn facts_come_back_in_order_and_survive_a_rewrite_at_any_moment() {
        let legacy = Legacy::new().unwrap();
        let log = Log::new(Some(legacy.clone()));
        log.say(|| Fact::Arrivals(1));
        legacy.note(b"a".to_vec());
        log.begin(Unique(7), 9);
        assert_eq!(legacy.facts().unwrap().len(), 3);
        legacy.rewrite(|| {
            // Half done: nothing of what was true before is missing.
            let facts = legacy.facts().unwrap();
            assert!(facts.iter().any(|fact| matches!(fact, Fact::Arrivals(1))));
            log.say(|| Fact::Arrivals(2));
        });
        let facts = legacy.facts().unwrap();
        assert!(!facts.iter().any(|fact| matches!(fact, Fact::Arrivals(1))));
        assert!(facts.iter().any(|fact| matches!(fact, Fact::Arrivals(2))));
        assert!(facts.iter().any(|fact| matches!(
            fact,
            Fact::Begun {
                unique: 7,
                before: 9
            }
        )));
        assert_eq!(notes(&legacy), [b"a".to_vec()]);
    }

    #[test]
    fn an_answer_ends_what_was_begun() {
        let legacy = Legacy::new().unwrap();
        let log = Log::new(Some(legacy.clone()));
        log.begin(Unique(7), 0);
        log.witness()
            .unwrap()
            .answering(Unique(7), -2, &[b"ab", b"c"]);
        legacy.rewrite(|| {});
        let facts = legacy.facts().unwrap();
        assert!(!facts.iter().any(|fact| matches!(fact, Fact::Begun { .. })));
        assert!(facts.iter().any(
            |fact| matches!(fact, Fact::Answered { unique: 7, error: -2, bytes } if bytes == b"abc")
        ));
    }

    #[test]
    fn a_log_that_is_full_is_no_log() {
        let legacy = Legacy::new().unwrap();
        let big = vec![1; 200 << 20];
        for _ in 0..3 {
            legacy.note(big.clone());
        }
        assert!(legacy.facts().is_err());
    }
}
