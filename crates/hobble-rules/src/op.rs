//! The operations a rule can name, and what each of them is able to carry.
//!
//! Owns the list of operations, their lower-case FUSE names, the groups, and the tables that say which of them have an
//! offset, carry data or return attributes. Invariant: every [`Op`] fits in one bit of an [`OpSet`].

use std::fmt;

/// One VFS operation, by its FUSE name.
///
/// Variants of one request share a name: `rename` stands for RENAME and RENAME2, `readdir` for READDIR and READDIRPLUS, `getattr` for
/// GETATTR and STATX, `fsyncdir` for both kinds of directory sync. FSYNC alone is split, by its FUSE_FSYNC_FDATASYNC flag, into
/// [`Op::Fsync`] and [`Op::Fdatasync`], because a rule may want only the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
#[allow(missing_docs)] // Every variant is the operation of that name.
pub enum Op {
    Lookup,
    Getattr,
    Setattr,
    Readlink,
    Mknod,
    Mkdir,
    Unlink,
    Rmdir,
    Symlink,
    Rename,
    Link,
    Open,
    Read,
    Write,
    Flush,
    Release,
    Fsync,
    Fdatasync,
    Opendir,
    Readdir,
    Releasedir,
    Fsyncdir,
    Statfs,
    Setxattr,
    Getxattr,
    Listxattr,
    Removexattr,
    Access,
    Create,
    Getlk,
    Setlk,
    Flock,
    Fallocate,
    CopyFileRange,
    Lseek,
    Ioctl,
    Tmpfile,
    Syncfs,
}

impl Op {
    /// How many operations there are.
    pub const COUNT: usize = Self::ALL.len();

    /// Every operation, in the order of its bit.
    pub const ALL: [Self; 38] = [
        Self::Lookup,
        Self::Getattr,
        Self::Setattr,
        Self::Readlink,
        Self::Mknod,
        Self::Mkdir,
        Self::Unlink,
        Self::Rmdir,
        Self::Symlink,
        Self::Rename,
        Self::Link,
        Self::Open,
        Self::Read,
        Self::Write,
        Self::Flush,
        Self::Release,
        Self::Fsync,
        Self::Fdatasync,
        Self::Opendir,
        Self::Readdir,
        Self::Releasedir,
        Self::Fsyncdir,
        Self::Statfs,
        Self::Setxattr,
        Self::Getxattr,
        Self::Listxattr,
        Self::Removexattr,
        Self::Access,
        Self::Create,
        Self::Getlk,
        Self::Setlk,
        Self::Flock,
        Self::Fallocate,
        Self::CopyFileRange,
        Self::Lseek,
        Self::Ioctl,
        Self::Tmpfile,
        Self::Syncfs,
    ];

    /// The lower-case name, as written in a rule.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lookup => "lookup",
            Self::Getattr => "getattr",
            Self::Setattr => "setattr",
            Self::Readlink => "readlink",
            Self::Mknod => "mknod",
            Self::Mkdir => "mkdir",
            Self::Unlink => "unlink",
            Self::Rmdir => "rmdir",
            Self::Symlink => "symlink",
            Self::Rename => "rename",
            Self::Link => "link",
            Self::Open => "open",
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Release => "release",
            Self::Fsync => "fsync",
            Self::Fdatasync => "fdatasync",
            Self::Opendir => "opendir",
            Self::Readdir => "readdir",
            Self::Releasedir => "releasedir",
            Self::Fsyncdir => "fsyncdir",
            Self::Statfs => "statfs",
            Self::Setxattr => "setxattr",
            Self::Getxattr => "getxattr",
            Self::Listxattr => "listxattr",
            Self::Removexattr => "removexattr",
            Self::Access => "access",
            Self::Create => "create",
            Self::Getlk => "getlk",
            Self::Setlk => "setlk",
            Self::Flock => "flock",
            Self::Fallocate => "fallocate",
            Self::CopyFileRange => "copy_file_range",
            Self::Lseek => "lseek",
            Self::Ioctl => "ioctl",
            Self::Tmpfile => "tmpfile",
            Self::Syncfs => "syncfs",
        }
    }

    /// This operation's place in [`Op::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A set of operations; one bit each.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct OpSet(u64);

impl OpSet {
    /// No operation.
    pub const EMPTY: Self = Self(0);

    /// Every operation.
    pub const ALL: Self = Self((1 << Op::COUNT) - 1);

    /// Contents of files: `read`, `write`, `fallocate`, `copy_file_range`.
    pub const DATA: Self = Self::of(&[Op::Read, Op::Write, Op::Fallocate, Op::CopyFileRange]);

    /// Making things durable: `fsync`, `fdatasync`, `fsyncdir`, `syncfs`.
    pub const SYNC: Self = Self::of(&[Op::Fsync, Op::Fdatasync, Op::Fsyncdir, Op::Syncfs]);

    /// Names, directories and attributes, extended ones included.
    pub const METADATA: Self = Self::of(&[
        Op::Lookup,
        Op::Getattr,
        Op::Setattr,
        Op::Readlink,
        Op::Mknod,
        Op::Mkdir,
        Op::Unlink,
        Op::Rmdir,
        Op::Symlink,
        Op::Rename,
        Op::Link,
        Op::Open,
        Op::Create,
        Op::Tmpfile,
        Op::Opendir,
        Op::Readdir,
        Op::Statfs,
        Op::Setxattr,
        Op::Getxattr,
        Op::Listxattr,
        Op::Removexattr,
    ]);

    /// Operations that work on a byte range of a file, so that `range` can look at it.
    pub const WITH_RANGE: Self = Self::DATA;

    /// Operations that carry file data through the server, so that `corrupt` can alter it.
    pub const WITH_DATA: Self = Self::of(&[Op::Read, Op::Write]);

    /// Operations whose reply carries attributes, so that `attr` can override them.
    pub const WITH_ATTRIBUTES: Self = Self::of(&[
        Op::Lookup,
        Op::Getattr,
        Op::Setattr,
        Op::Mknod,
        Op::Mkdir,
        Op::Symlink,
        Op::Link,
        Op::Create,
        Op::Tmpfile,
        Op::Readdir,
    ]);

    /// Operations that never reach the server: the hook is mounted with `default_permissions`, so the kernel checks permissions itself and
    /// sends no ACCESS (Linux, fs/fuse/dir.c, `fuse_permission`).
    pub const NEVER_SENT: Self = Self::of(&[Op::Access]);

    /// Operations whose result nobody waits for: RELEASE and RELEASEDIR are sent in the background (Linux, fs/fuse/file.c,
    /// `fuse_file_put`), so neither an errno nor a delay is seen by a program.
    pub const UNOBSERVED: Self = Self::of(&[Op::Release, Op::Releasedir]);

    /// Operations for which the kernel takes ENOSYS as "not implemented" and never asks again for the life of the mount (`no_open`, `no_fsync`,
    /// `no_flush`, … in Linux, fs/fuse/fuse_i.h), so that the fault would outlive its rule.
    pub const LATCHES_ENOSYS: Self = Self::of(&[
        Op::Open,
        Op::Opendir,
        Op::Create,
        Op::Tmpfile,
        Op::Rename,
        Op::Flush,
        Op::Fsync,
        Op::Fdatasync,
        Op::Fsyncdir,
        Op::Setxattr,
        Op::Getxattr,
        Op::Listxattr,
        Op::Removexattr,
        Op::Access,
        Op::Getattr,
        Op::Fallocate,
        Op::CopyFileRange,
        Op::Lseek,
        Op::Link,
        Op::Syncfs,
    ]);

    /// The groups a rule can name, with what they stand for.
    pub const GROUPS: [(&'static str, Self); 3] = [
        ("data", Self::DATA),
        ("metadata", Self::METADATA),
        ("sync", Self::SYNC),
    ];

    const fn of(ops: &[Op]) -> Self {
        let mut bits = 0;
        let mut rest = ops;
        while let [first, tail @ ..] = rest {
            bits |= 1 << *first as u64;
            rest = tail;
        }
        Self(bits)
    }

    /// The set with just this operation.
    #[must_use]
    pub const fn only(op: Op) -> Self {
        Self(1 << op as u64)
    }

    /// Whether the operation is in the set.
    #[must_use]
    pub const fn contains(self, op: Op) -> bool {
        self.0 & (1 << op as u64) != 0
    }

    /// Whether there is none in the set.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// What is in both.
    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What is in either.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What is here and not in `other`.
    #[must_use]
    pub const fn difference(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether every operation of `other` is here too.
    #[must_use]
    pub const fn is_superset(self, other: Self) -> bool {
        other.0 & !self.0 == 0
    }

    /// Whether the two have any operation in common.
    #[must_use]
    pub const fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// The operations, in the order of [`Op::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Op> {
        Op::ALL.into_iter().filter(move |op| self.contains(*op))
    }

    /// What a word of a rule stands for: the name of an operation or of a group, in any case. `fsync` stands for both kinds of sync.
    #[must_use]
    pub fn named(word: &str) -> Option<Self> {
        let word = word.to_ascii_lowercase();
        if word == "fsync" {
            return Some(Self::of(&[Op::Fsync, Op::Fdatasync]));
        }
        let group = Self::GROUPS
            .iter()
            .find(|(name, _)| *name == word)
            .map(|(_, ops)| *ops);
        group.or_else(|| {
            Op::ALL
                .into_iter()
                .find(|op| op.name() == word)
                .map(Self::only)
        })
    }

    /// Every word that [`OpSet::named`] knows.
    pub fn words() -> impl Iterator<Item = &'static str> {
        Op::ALL
            .into_iter()
            .map(Op::name)
            .chain(Self::GROUPS.into_iter().map(|(name, _)| name))
    }
}

impl fmt::Debug for OpSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl FromIterator<Op> for OpSet {
    fn from_iter<T: IntoIterator<Item = Op>>(ops: T) -> Self {
        ops.into_iter()
            .fold(Self::EMPTY, |set, op| set.union(Self::only(op)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_has_its_own_bit_and_name() {
        for (place, op) in Op::ALL.into_iter().enumerate() {
            assert_eq!(op.index(), place);
            assert!(OpSet::named(op.name()).unwrap().contains(op), "{op}");
        }
        assert_eq!(OpSet::ALL.iter().count(), Op::COUNT);
    }

    #[test]
    fn fsync_is_both_kinds_and_fdatasync_one() {
        assert_eq!(
            OpSet::named("FSync").unwrap(),
            OpSet::only(Op::Fsync).union(OpSet::only(Op::Fdatasync))
        );
        assert_eq!(
            OpSet::named("fdatasync").unwrap(),
            OpSet::only(Op::Fdatasync)
        );
    }

    #[test]
    fn groups_do_not_overlap() {
        assert!(!OpSet::DATA.intersects(OpSet::METADATA));
        assert!(!OpSet::DATA.intersects(OpSet::SYNC));
        assert!(!OpSet::METADATA.intersects(OpSet::SYNC));
    }
}
