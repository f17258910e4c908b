//! Which owner holds which byte ranges of one inode: the arithmetic of POSIX locks, and nothing else.
//!
//! Invariants: ranges of one owner never overlap, and adjacent ones of the same kind are one; two owners never hold the same byte unless both hold it
//! shared. (fcntl(2), fs/locks.c `posix_lock_inode`.)

use hobble_fuse::{Fh, LockOwner};

use super::{LockKind, LockRange};

/// Which side of an attachment a handle was opened on.
///
/// A program that keys its own state by `st_dev` sees two files where the kernel sees one owner of POSIX locks (kernel-hazards A1). So locks taken
/// through handles of different classes belong to different owners: they conflict, and closing a descriptor of one class drops nothing of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// Opened on the hook.
    Opened,
    /// Moved to the hook from the backing filesystem.
    Moved,
}

/// Who holds a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Owner {
    pub(crate) kernel: LockOwner,
    pub(crate) class: Class,
}

/// One locked range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) owner: Owner,
    /// The process that asked, as the kernel sent it.
    pub(crate) pid: u32,
    pub(crate) kind: LockKind,
    pub(crate) range: LockRange,
}

/// The locked ranges of one inode.
#[derive(Debug, Default)]
pub(crate) struct RangeTable {
    /// Sorted by first byte.
    held: Vec<Held>,
    /// Handles through which each owner has taken locks.
    through: Vec<(Owner, Fh)>,
}

impl RangeTable {
    /// The first lock of somebody else that keeps `owner` from taking this one.
    pub(crate) fn conflict(&self, owner: Owner, kind: LockKind, range: LockRange) -> Option<Held> {
        self.conflicts(owner, kind, range).next()
    }

    /// All locks of others that keep `owner` from taking this one.
    pub(crate) fn conflicts(
        &self,
        owner: Owner,
        kind: LockKind,
        range: LockRange,
    ) -> impl Iterator<Item = Held> + '_ {
        self.held.iter().copied().filter(move |held| {
            held.owner != owner
                && held.range.overlaps(range)
                && (kind == LockKind::Write || held.kind == LockKind::Write)
        })
    }

    /// Makes `owner` hold the range as `kind`, or not at all.
    pub(crate) fn set(
        &mut self,
        owner: Owner,
        fh: Fh,
        pid: u32,
        kind: Option<LockKind>,
        range: LockRange,
    ) {
        let mut kept = Vec::with_capacity(self.held.len() + 2);
        for held in self.held.drain(..) {
            if held.owner != owner || !held.range.overlaps(range) {
                kept.push(held);
                continue;
            }
            if held.range.start < range.start {
                kept.push(Held {
                    range: LockRange {
                        start: held.range.start,
                        end: range.start - 1,
                    },
                    ..held
                });
            }
            if held.range.end > range.end {
                kept.push(Held {
                    range: LockRange {
                        start: range.end + 1,
                        end: held.range.end,
                    },
                    ..held
                });
            }
        }
        if let Some(kind) = kind {
            let mut whole = range;
            kept.retain(|held| {
                let touches = held.owner == owner
                    && held.kind == kind
                    && (held.range.end.checked_add(1) == Some(range.start)
                        || range.end.checked_add(1) == Some(held.range.start));
                if touches {
                    whole.start = whole.start.min(held.range.start);
                    whole.end = whole.end.max(held.range.end);
                }
                !touches
            });
            kept.push(Held {
                owner,
                pid,
                kind,
                range: whole,
            });
            if !self.through.contains(&(owner, fh)) {
                self.through.push((owner, fh));
            }
        }
        kept.sort_by_key(|held| held.range.start);
        self.held = kept;
        self.tidy();
    }

    /// Drops everything `owner` holds. Says whether there was anything.
    pub(crate) fn drop_owner(&mut self, owner: Owner) -> bool {
        let before = self.held.len();
        self.held.retain(|held| held.owner != owner);
        self.tidy();
        self.held.len() != before
    }

    /// A handle is gone: names the owners that had taken locks through it and through no other handle that is still open.
    pub(crate) fn close(&mut self, fh: Fh) -> Vec<Owner> {
        let owners: Vec<Owner> = self
            .through
            .iter()
            .filter(|(_, through)| *through == fh)
            .map(|(owner, _)| *owner)
            .collect();
        self.through.retain(|(_, through)| *through != fh);
        owners
            .into_iter()
            .filter(|owner| !self.through.iter().any(|(other, _)| other == owner))
            .collect()
    }

    /// One handle takes the place of another.
    pub(crate) fn succeed(&mut self, old: Fh, new: Fh) {
        let owners: Vec<Owner> = self
            .through
            .iter()
            .filter(|(_, through)| *through == old)
            .map(|(owner, _)| *owner)
            .collect();
        self.through.retain(|(_, through)| *through != old);
        for owner in owners {
            if !self.through.contains(&(owner, new)) {
                self.through.push((owner, new));
            }
        }
    }

    /// Makes `owner` hold what it held before.
    pub(crate) fn restore(&mut self, owner: Owner, before: &[Held]) {
        self.held.retain(|held| held.owner != owner);
        self.held.extend_from_slice(before);
        self.held.sort_by_key(|held| held.range.start);
        self.tidy();
    }

    /// What `owner` holds.
    pub(crate) fn of(&self, owner: Owner) -> impl Iterator<Item = Held> + '_ {
        self.held
            .iter()
            .copied()
            .filter(move |held| held.owner == owner)
    }

    /// All locked ranges.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Held> {
        self.held.iter()
    }

    /// Who has taken locks through which handle.
    pub(crate) fn through(&self) -> impl Iterator<Item = &(Owner, Fh)> {
        self.through.iter()
    }

    /// Everybody who holds something.
    pub(crate) fn owners(&self) -> Vec<Owner> {
        let mut owners = Vec::new();
        for held in &self.held {
            if !owners.contains(&held.owner) {
                owners.push(held.owner);
            }
        }
        owners
    }

    /// The handles through which `owner` took its locks.
    pub(crate) fn handles(&self, owner: Owner) -> Vec<Fh> {
        self.through
            .iter()
            .filter(|(other, _)| *other == owner)
            .map(|(_, fh)| *fh)
            .collect()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    fn tidy(&mut self) {
        let held = &self.held;
        self.through
            .retain(|(owner, _)| held.iter().any(|held| held.owner == *owner));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BYTES: u64 = 24;

    /// The reference: what every owner holds of every byte.
    #[derive(Default)]
    struct Model {
        bytes: std::collections::HashMap<(u64, u64), LockKind>,
    }

    impl Model {
        fn conflict(&self, owner: u64, kind: LockKind, range: LockRange) -> bool {
            self.bytes.iter().any(|((other, byte), held)| {
                *other != owner
                    && (range.start..=range.end).contains(byte)
                    && (kind == LockKind::Write || *held == LockKind::Write)
            })
        }

        fn set(&mut self, owner: u64, kind: Option<LockKind>, range: LockRange) {
            for byte in range.start..=range.end {
                match kind {
                    Some(kind) => self.bytes.insert((owner, byte), kind),
                    None => self.bytes.remove(&(owner, byte)),
                };
            }
        }
    }

    fn owner(number: u64) -> Owner {
        // Two classes of the same kernel owner are two owners.
        let class = if number.is_multiple_of(2) {
            Class::Opened
        } else {
            Class::Moved
        };
        Owner {
            kernel: LockOwner(number / 2),
            class,
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Set(u64, Option<LockKind>, LockRange),
        Drop(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let kind = prop_oneof![
            Just(None),
            Just(Some(LockKind::Read)),
            Just(Some(LockKind::Write))
        ];
        prop_oneof![
            8 => (0..4u64, kind, 0..BYTES, 0..BYTES).prop_map(|(owner, kind, a, b)| {
                Step::Set(owner, kind, LockRange { start: a.min(b), end: a.max(b) })
            }),
            1 => (0..4u64).prop_map(Step::Drop),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_a_table_of_single_bytes(steps in proptest::collection::vec(step(), 1..60)) {
            let mut table = RangeTable::default();
            let mut model = Model::default();
            for step in steps {
                match step {
                    Step::Set(number, kind, range) => {
                        if let Some(wanted) = kind {
                            let conflict = table.conflict(owner(number), wanted, range).is_some();
                            prop_assert_eq!(conflict, model.conflict(number, wanted, range));
                            if conflict {
                                continue;
                            }
                        }
                        table.set(owner(number), Fh(number), 1, kind, range);
                        model.set(number, kind, range);
                    }
                    Step::Drop(number) => {
                        let had = table.drop_owner(owner(number));
                        prop_assert_eq!(had, model.bytes.keys().any(|(other, _)| *other == number));
                        model.set(number, None, LockRange { start: 0, end: BYTES });
                    }
                }
                for number in 0..4 {
                    let ranges: Vec<Held> = table.of(owner(number)).collect();
                    let mut bytes = std::collections::HashMap::new();
                    for held in &ranges {
                        for byte in held.range.start..=held.range.end {
                            prop_assert!(bytes.insert(byte, held.kind).is_none(), "ranges of one owner overlap");
                        }
                    }
                    let expected = model.bytes.iter().filter(|((other, _), _)| *other == number);
                    let expected: std::collections::HashMap<u64, LockKind> = expected.map(|((_, byte), kind)| (*byte, *kind)).collect();
                    prop_assert_eq!(&bytes, &expected);
                    for pair in ranges.windows(2) {
                        prop_assert!(pair[0].range.end + 1 < pair[1].range.start || pair[0].kind != pair[1].kind, "adjacent ranges are one");
                    }
                }
            }
        }
    }

    #[test]
    fn a_closed_handle_names_the_owners_it_was_the_last_handle_of() {
        let mut table = RangeTable::default();
        let range = |start, end| LockRange { start, end };
        table.set(owner(0), Fh(1), 1, Some(LockKind::Write), range(0, 1));
        table.set(owner(0), Fh(2), 1, Some(LockKind::Write), range(4, 5));
        table.set(owner(2), Fh(1), 1, Some(LockKind::Write), range(8, 9));
        assert_eq!(table.close(Fh(1)), [owner(2)]);
        assert_eq!(table.close(Fh(2)), [owner(0)]);
    }

    #[test]
    fn a_lock_to_the_end_of_everything_does_not_overflow() {
        let mut table = RangeTable::default();
        let all = LockRange {
            start: 0,
            end: LockRange::OPEN_END,
        };
        table.set(owner(0), Fh(1), 1, Some(LockKind::Read), all);
        table.set(
            owner(0),
            Fh(1),
            1,
            None,
            LockRange {
                start: 10,
                end: LockRange::OPEN_END,
            },
        );
        let left: Vec<Held> = table.of(owner(0)).collect();
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].range, LockRange { start: 0, end: 9 });
    }
}
