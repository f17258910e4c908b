//! The on-disk record that lets a fresh process undo an attachment.
//!
//! Invariant: a record that says how to undo a step is in the file before the step is taken. One record a line, `CRC32 JSON`; only
//! ever appended. The state directory is on a tmpfs and every record names its boot, so nothing is synced: a journal that survives
//! a crash of the machine describes processes that no longer exist.
//!
//! Reading treats the file as hostile: bounded in size and line length, every line checked, a process named by pid *and* start time. Only
//! a line that was cut off by its writer's death or by a full disk is forgiven: the last one without its newline, and one that the next writer has marked as cut
//! ([`CUT`]).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;

use hobble_graft::ids::MountId;
use hobble_graft::mounts::{PropagationRecord, UniqueMountId};
use hobble_graft::proc::mountinfo::Propagation;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// A process that cannot be mistaken for a later one with the same pid (`/proc/<pid>/stat` field 22).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Who {
    /// The pid as the host's pid namespace numbers it.
    pub(crate) pid: i32,
    /// Start time in clock ticks since boot.
    pub(crate) start: u64,
}

/// Where a moved open file description was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Place {
    /// The process.
    #[serde(flatten)]
    pub(crate) who: Who,
    /// The descriptor number.
    pub(crate) fd: i32,
}

/// One moved description: the descriptor of the holder's that keeps the original.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Kept {
    /// The holder's descriptor number.
    pub(crate) holder_fd: i32,
    /// Device number of the original.
    pub(crate) dev: u64,
    /// Inode number of the original.
    pub(crate) ino: u64,
    /// Every descriptor that shared the description.
    pub(crate) places: Vec<Place>,
}

/// A POSIX lock that a target held when it was moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PosixLock {
    /// The owner.
    #[serde(flatten)]
    pub(crate) who: Who,
    /// Device number of the file.
    pub(crate) dev: u64,
    /// Inode number of the file.
    pub(crate) ino: u64,
    /// Whether it excludes readers.
    pub(crate) write: bool,
    /// First byte.
    pub(crate) start_byte: u64,
    /// Last byte; `u64::MAX` for "to the end".
    pub(crate) end_byte: u64,
}

/// The mount around the volume, and how it propagated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Around {
    /// Its number.
    pub(crate) mount: u64,
    /// Its number that is never given again.
    pub(crate) unique: u64,
    /// `shared:N`.
    pub(crate) peer_group: Option<u64>,
    /// `master:N`.
    pub(crate) master: Option<u64>,
    /// `propagate_from:N`.
    pub(crate) propagate_from: Option<u64>,
    /// `unbindable`.
    pub(crate) unbindable: bool,
}

impl From<PropagationRecord> for Around {
    fn from(record: PropagationRecord) -> Self {
        let propagation = record.propagation;
        Self {
            mount: record.mount.0,
            unique: record.unique.0,
            peer_group: propagation.peer_group,
            master: propagation.master,
            propagate_from: propagation.propagate_from,
            unbindable: propagation.is_unbindable,
        }
    }
}

impl From<Around> for PropagationRecord {
    fn from(around: Around) -> Self {
        Self {
            mount: MountId(around.mount),
            unique: UniqueMountId(around.unique),
            propagation: Propagation {
                peer_group: around.peer_group,
                master: around.master,
                propagate_from: around.propagate_from,
                is_unbindable: around.unbindable,
            },
        }
    }
}

/// One line of the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Record {
    /// The first record.
    Opened {
        /// Format version; 1.
        v: u32,
        /// The attachment.
        id: String,
        /// `/proc/sys/kernel/random/boot_id`.
        boot_id: String,
        /// Seconds since the epoch.
        created: u64,
    },
    /// Who keeps the descriptors.
    Holder(Who),
    /// Who answers FUSE; again for everybody who undoes: the first of them that lives has the attachment to itself.
    Server(Who),
    /// This one lets others try.
    GaveUp(Who),
    /// What is attached.
    Attachment {
        /// The process the user named.
        target: Who,
        /// `tree` or `namespace`.
        scope: String,
        /// Inode of the target's mount namespace.
        mount_ns: u64,
        /// The volume as the target sees it.
        #[serde(with = "bytes")]
        path: Vec<u8>,
        /// Device number of the hook (`st_dev`).
        hook_dev: u64,
        /// Device number of the volume (`st_dev`).
        backing_dev: u64,
    },
    /// Descriptions that are about to be moved.
    Keeping {
        /// All of them, or a batch.
        kept: Vec<Kept>,
    },
    /// POSIX locks that are about to be handed over.
    Locks {
        /// All of them.
        posix: Vec<PosixLock>,
    },
    /// These processes are about to be stopped.
    Stopping {
        /// All of them.
        processes: Vec<Who>,
    },
    /// The hook is about to be placed; the propagation of the mount around the volume, to be given back.
    Placing(Around),
    /// Something is about to be left in a process, until the routine in it ends.
    Residue {
        /// The process.
        who: Who,
        /// As `hobble-graft` writes it.
        what: serde_json::Value,
    },
    /// A process's soft limit on descriptors is about to be raised for the time of an exchange.
    Limit {
        /// The process.
        who: Who,
        /// Its limit before.
        soft: u64,
        /// Its limit meanwhile: what is put back only while nobody has set another.
        raised: u64,
    },
    /// The limit of the last [`Record::Limit`] of a process has been put back, and is its own business again.
    LimitPutBack {
        /// The process.
        who: Who,
    },
    /// Descriptors are about to be exchanged.
    Grafting,
    /// The exchange is complete: locks are where they belong.
    Exchanged,
    /// Everything has been let go and runs on the hook.
    Attached,
    /// Recovery began.
    Recovering {
        /// Why.
        why: String,
    },
    /// The hook is off and the target native; only late descriptors, if any, remain.
    Recovered {
        /// How many descriptions stay on the hook until they are closed.
        left: u32,
    },
}

/// Bytes of a path: as text where they are text, else in hexadecimal behind a NUL (which no path holds).
mod bytes {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(bytes) {
            Ok(text) => serializer.serialize_str(text),
            Err(_) => {
                let mut text = String::from("\0");
                for byte in bytes {
                    text.push_str(&format!("{byte:02x}"));
                }
                serializer.serialize_str(&text)
            }
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let Some(hex) = text.strip_prefix('\0') else {
            return Ok(text.into_bytes());
        };
        hex.as_bytes()
            .chunks(2)
            .map(|pair| {
                std::str::from_utf8(pair)
                    .ok()
                    .filter(|pair| pair.len() == 2)
                    .and_then(|pair| u8::from_str_radix(pair, 16).ok())
                    .ok_or_else(|| D::Error::custom("path is not hexadecimal"))
            })
            .collect()
    }
}

/// What is wrong with a journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Reading or writing failed.
    #[error("{op} the journal")]
    Io {
        /// What was attempted.
        op: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// It is larger than any attachment writes.
    #[error("the journal is larger than {limit} bytes")]
    TooLarge {
        /// The bound.
        limit: u64,
    },
    /// A line is not one that Hobble wrote.
    #[error("journal line {line} is damaged: {problem}")]
    Damaged {
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// It tells of another boot or another attachment.
    #[error("the journal is not this attachment's: {problem}")]
    Foreign {
        /// What differs.
        problem: String,
    },
}

/// No attachment writes more: 20,000 descriptors take about 3 MiB.
const MAX_BYTES: u64 = 64 << 20;

/// An open journal.
#[derive(Debug)]
pub(crate) struct Journal {
    file: File,
    /// The last line has no end: the next record says so and begins a line of its own.
    is_cut: bool,
}

/// Room for the records of a recovery, taken in advance.
const RESERVE: u64 = 1 << 20;

/// What ends a line that was cut off. No record ends so: each is a JSON object.
const CUT: u8 = b'~';

impl Journal {
    /// A journal on a file opened for appending.
    pub(crate) fn new(file: File) -> Self {
        Self {
            file,
            is_cut: false,
        }
    }

    /// A journal that another has written before, on a file opened for reading and appending.
    pub(crate) fn reopened(file: File) -> Result<Self, JournalError> {
        let io = |source| JournalError::Io { op: "read", source };
        let size = file.metadata().map_err(io)?.len();
        let mut last = *b"\n";
        if let Some(at) = size.checked_sub(1) {
            file.read_exact_at(&mut last, at).map_err(io)?;
        }
        Ok(Self {
            file,
            is_cut: last != *b"\n",
        })
    }

    /// Another writer of the same journal: every record is one write at its end.
    pub(crate) fn try_clone(&self) -> Result<Self, JournalError> {
        let file = self.file.try_clone().map_err(|source| JournalError::Io {
            op: "duplicate a descriptor of",
            source,
        })?;
        Ok(Self {
            file,
            is_cut: self.is_cut,
        })
    }

    /// Takes room beyond the end: whoever fills up the state directory while the target is attached must not keep it from being recovered, which is written down step by
    /// step. Where the filesystem cannot do that, records fit or do not.
    pub(crate) fn reserve(&self) -> Result<(), JournalError> {
        let io = |source| JournalError::Io {
            op: "take room for",
            source,
        };
        let size = self.file.metadata().map_err(io)?.len();
        match rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, size, RESERVE) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(errno) => Err(io(errno.into())),
        }
    }

    /// Appends one record; when this returns an error the step it announces must not be taken.
    pub(crate) fn append(&mut self, record: &Record) -> Result<(), JournalError> {
        let json = serde_json::to_string(record).map_err(|e| JournalError::Io {
            op: "encode a record for",
            source: e.into(),
        })?;
        let cut = if self.is_cut { "~\n" } else { "" };
        let line = format!("{cut}{:08x} {json}\n", crc32fast::hash(json.as_bytes()));
        // One write() to an O_APPEND file: a death in between, or a disk that is full, leaves at most one line without its newline.
        let written = self.file.write_all(line.as_bytes());
        self.is_cut = written.is_err();
        written.map_err(|source| JournalError::Io {
            op: "write",
            source,
        })?;
        if *record == Record::Attached
            && let Err(error) = self.reserve()
        {
            tracing::warn!(
                error = crate::preflight::chain(&error),
                "a state directory that fills up may keep the target from being recovered"
            );
        }
        Ok(())
    }
}

/// Everything a journal says, in order.
pub(crate) fn read(file: File) -> Result<Vec<Record>, JournalError> {
    let mut text = Vec::new();
    let size = file
        .take(MAX_BYTES + 1)
        .read_to_end(&mut text)
        .map_err(|source| JournalError::Io { op: "read", source })?;
    if size as u64 > MAX_BYTES {
        return Err(JournalError::TooLarge { limit: MAX_BYTES });
    }
    parse(&text)
}

/// Parses the bytes of a journal.
pub(crate) fn parse(text: &[u8]) -> Result<Vec<Record>, JournalError> {
    let mut records = Vec::new();
    let mut lines: Vec<&[u8]> = text.split(|&b| b == b'\n').collect();
    // What follows the last newline was being written when its writer died.
    lines.pop();
    for (index, line) in lines.into_iter().enumerate() {
        if line.last() == Some(&CUT) {
            continue;
        }
        let damaged = |problem: String| JournalError::Damaged {
            line: index + 1,
            problem,
        };
        let (sum, json) = line
            .split_at_checked(9)
            .filter(|(sum, _)| sum.last() == Some(&b' '))
            .ok_or_else(|| damaged("it has no checksum".into()))?;
        let sum = sum
            .get(..8)
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u32::from_str_radix(hex, 16).ok())
            .ok_or_else(|| damaged("its checksum is not hexadecimal".into()))?;
        if sum != crc32fast::hash(json) {
            return Err(damaged("its checksum does not match".into()));
        }
        let record: Record = serde_json::from_slice(json).map_err(|e| damaged(e.to_string()))?;
        let first = index == 0;
        if first != matches!(record, Record::Opened { .. }) {
            return Err(damaged(
                if first {
                    "the first record must open the journal"
                } else {
                    "the journal is opened twice"
                }
                .into(),
            ));
        }
        if let Record::Opened { v, .. } = &record
            && *v != 1
        {
            return Err(damaged(format!(
                "format version {v} is not known to this version of Hobble"
            )));
        }
        records.push(record);
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Vec<Record> {
        let who = Who {
            pid: 42,
            start: 4711,
        };
        vec![
            Record::Opened {
                v: 1,
                id: "abcd".into(),
                boot_id: "b".into(),
                created: 1,
            },
            Record::Holder(who),
            Record::Attachment {
                target: who,
                scope: "tree".into(),
                mount_ns: 1,
                path: b"/data/\xff".to_vec(),
                hook_dev: 7,
                backing_dev: 8,
            },
            Record::Keeping {
                kept: vec![Kept {
                    holder_fd: 9,
                    dev: 1,
                    ino: 2,
                    places: vec![Place { who, fd: 3 }],
                }],
            },
            Record::Attached,
        ]
    }

    fn written(records: &[Record]) -> Vec<u8> {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("journal");
        let mut journal = Journal::new(
            File::options()
                .append(true)
                .create(true)
                .open(&path)
                .expect("open"),
        );
        for record in records {
            journal.append(record).expect("append");
        }
        std::fs::read(&path).expect("read")
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(parse(&written(&sample())).expect("parse"), sample());
    }

    #[test]
    fn the_checksum_is_the_one_of_journals_written_before() {
        // CRC-32 as in IEEE 802.3: a journal may be read by another version than the one that wrote it.
        assert_eq!(crc32fast::hash(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn a_cut_last_line_is_forgiven_and_a_cut_middle_is_not() {
        let text = written(&sample());
        assert_eq!(
            parse(&text[..text.len() - 5]).expect("parse").len(),
            sample().len() - 1
        );
        let mut holed = text.clone();
        holed.drain(20..40);
        assert!(matches!(
            parse(&holed),
            Err(JournalError::Damaged { line: 1, .. })
        ));
    }

    #[test]
    fn writing_goes_on_after_a_line_that_was_cut_off() {
        let text = written(&sample());
        for cut in [1, 7, 30] {
            let dir = tempfile::tempdir().expect("temporary directory");
            let path = dir.path().join("journal");
            std::fs::write(&path, &text[..text.len() - cut]).expect("write");
            // Two that come at the same time see the same end.
            let open = || {
                let file = File::options().read(true).append(true).open(&path);
                Journal::reopened(file.expect("open")).expect("reopen")
            };
            let who = Who { pid: 1, start: 2 };
            for mut journal in [open(), open()] {
                journal.append(&Record::Server(who)).expect("append");
                journal.append(&Record::GaveUp(who)).expect("append");
            }
            let records = parse(&std::fs::read(&path).expect("read")).expect("parse");
            let mut expected = sample();
            expected.pop();
            for _ in 0..2 {
                expected.extend([Record::Server(who), Record::GaveUp(who)]);
            }
            assert_eq!(records, expected);
        }
    }

    #[test]
    fn room_for_a_recovery_is_taken_and_not_seen() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("journal");
        let file = File::options().append(true).create(true).open(&path);
        let mut journal = Journal::new(file.expect("open"));
        for record in sample() {
            journal.append(&record).expect("append");
        }
        let text = std::fs::read(&path).expect("read");
        assert_eq!(parse(&text).expect("parse"), sample());
        let taken = std::fs::metadata(&path).expect("stat").blocks() * 512;
        if taken < RESERVE {
            eprintln!("skipped: the temporary directory's filesystem takes no room in advance");
        }
    }

    #[test]
    fn every_single_changed_byte_is_noticed() {
        let text = written(&sample());
        for position in 0..text.len() - 1 {
            let mut changed = text.clone();
            changed[position] ^= 0x01;
            if let Ok(records) = parse(&changed) {
                // Only the last line may vanish, when its newline is what changed.
                assert_ne!(records, sample(), "byte {position}");
                assert!(records.len() < sample().len());
            }
        }
    }

    #[test]
    fn a_journal_opened_twice_is_refused() {
        let mut text = written(&sample());
        text.extend(written(&sample()));
        assert!(matches!(parse(&text), Err(JournalError::Damaged { .. })));
    }

    proptest! {
        #[test]
        fn nonsense_never_panics(text in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = parse(&text);
        }
    }
}
