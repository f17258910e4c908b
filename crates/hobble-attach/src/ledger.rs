//! The ledger: what is known of single descriptors of the holder's, for whoever undoes an attachment whose server is dead.
//!
//! Where the journal tells of steps, the ledger tells of states that change too often for a record each. It is a file of slots of one size, a slot for
//! every descriptor number of the table that holder and server share. Invariants: a slot is written before that which it describes is relied on; reading treats the
//! file as hostile, so a slot is a hint about a descriptor that must be checked against the descriptor itself.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

/// Bytes of a slot: kind and value.
const SLOT: usize = 16;
/// No process has more descriptors (`fs.nr_open` is 2^20 unless raised).
const MAX_SLOTS: usize = 1 << 20;

/// What is said about one descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// It was closed: whatever has the number from now on is something else.
    Free,
    /// It keeps an original, which had this position at the last exchange.
    ///
    /// An exchange goes table by table, so a server that dies in the middle of one leaves processes that shared a description with one on either side of
    /// the hook. Which of the two has been used since, and so has the true position, is the one that is not where it was.
    Kept {
        /// Bytes from the beginning, or a cookie of the directory.
        position: i64,
    },
    /// On it the server holds POSIX locks of a process; which, the kernel shows with it (`lock:` in proc_pid_fdinfo(5)).
    Locks {
        /// The process, by the number the kernel gave it when the lock was taken, believed only of a process that has the same file open on the hook; 0 while
        /// the locks are on their way to the hook.
        pid: u32,
    },
}

impl Entry {
    fn encode(self) -> [u8; SLOT] {
        let (kind, value) = match self {
            Self::Free => (0_u64, 0),
            Self::Kept { position } => (1, position),
            Self::Locks { pid } => (2, i64::from(pid)),
        };
        let mut slot = [0; SLOT];
        for (place, word) in slot.chunks_exact_mut(8).zip([kind, value.cast_unsigned()]) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        slot
    }

    fn decode(slot: &[u8]) -> Option<Self> {
        let mut words = slot
            .chunks_exact(8)
            .filter_map(|word| word.try_into().ok().map(u64::from_ne_bytes));
        let (kind, value) = (words.next()?, words.next()?);
        match kind {
            0 => Some(Self::Free),
            1 => Some(Self::Kept {
                position: value.cast_signed(),
            }),
            2 => Some(Self::Locks {
                pid: u32::try_from(value).ok()?,
            }),
            _ => None,
        }
    }
}

/// The ledger of an attachment that is served.
#[derive(Debug)]
pub(crate) struct Ledger {
    file: File,
    /// What it says, in its form in the file: numbers of descriptors that were opened together are often some apart, and one large write takes less time than many
    /// small ones while the target stands still.
    slots: Mutex<Vec<u8>>,
}

impl Ledger {
    /// A ledger on a file opened for writing, not for appending, of which this is known.
    pub(crate) fn new(file: File, known: &BTreeMap<i32, Entry>) -> Self {
        let mut slots = Vec::new();
        for (number, entry) in known {
            put(&mut slots, *number, *entry);
        }
        Self {
            file,
            slots: Mutex::new(slots),
        }
    }

    /// Writes what is known of some descriptors.
    ///
    /// # Errors
    /// What writing says; nothing may be done then that relies on it.
    pub(crate) fn write(&self, entries: &BTreeMap<i32, Entry>) -> io::Result<()> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut first, mut end) = (usize::MAX, 0);
        for (number, entry) in entries {
            if let Some(at) = put(&mut slots, *number, *entry) {
                first = first.min(at);
                end = end.max(at + SLOT);
            }
        }
        match slots.get(first..end) {
            Some(changed) => self.file.write_all_at(changed, first as u64),
            None => Ok(()),
        }
    }
}

/// Puts an entry into its place. Says where that is, in bytes.
fn put(slots: &mut Vec<u8>, number: i32, entry: Entry) -> Option<usize> {
    let at = usize::try_from(number)
        .ok()
        .filter(|number| *number < MAX_SLOTS)?
        * SLOT;
    if slots.len() < at + SLOT {
        slots.resize(at + SLOT, 0);
    }
    slots
        .get_mut(at..at + SLOT)?
        .copy_from_slice(&entry.encode());
    Some(at)
}

/// Everything a ledger says, by descriptor number.
///
/// # Errors
/// What reading says.
pub(crate) fn read(file: File) -> io::Result<BTreeMap<i32, Entry>> {
    let mut bytes = Vec::new();
    file.take((MAX_SLOTS * SLOT) as u64)
        .read_to_end(&mut bytes)?;
    let slots = bytes.chunks_exact(SLOT).enumerate();
    Ok(slots
        .filter_map(|(number, slot)| Some((i32::try_from(number).ok()?, Entry::decode(slot)?)))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write_and_read(batches: &[BTreeMap<i32, Entry>]) -> BTreeMap<i32, Entry> {
        let file = tempfile::tempfile().expect("temporary file");
        let ledger = Ledger::new(file.try_clone().expect("duplicate"), &BTreeMap::new());
        for batch in batches {
            ledger.write(batch).expect("write");
        }
        read(file).expect("read")
    }

    fn entry() -> impl Strategy<Value = Entry> {
        prop_oneof![
            any::<i64>().prop_map(|position| Entry::Kept { position }),
            any::<u32>().prop_map(|pid| Entry::Locks { pid }),
            Just(Entry::Free),
        ]
    }

    proptest! {
        #[test]
        fn what_was_written_last_is_read(batches in proptest::collection::vec(proptest::collection::btree_map(0..40_i32, entry(), 0..20), 0..6)) {
            let expected: BTreeMap<i32, Entry> = batches.iter().flatten().map(|(number, entry)| (*number, *entry)).collect();
            let mut read = write_and_read(&batches);
            // A slot that was never written reads as one that is free.
            read.retain(|number, entry| *entry != Entry::Free || expected.contains_key(number));
            prop_assert_eq!(read, expected);
        }

        #[test]
        fn nonsense_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let file = tempfile::tempfile().expect("temporary file");
            file.write_all_at(&bytes, 0).expect("write");
            let _ = read(file);
        }
    }
}
