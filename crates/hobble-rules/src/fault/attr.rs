//! Fault kind `attr`: the reply's attributes are not the true ones.
//!
//! Owns the attributes that can be overridden and how an override changes them. Invariant: an attribute that is not named keeps its true value; arithmetic
//! saturates instead of wrapping round.

use std::time::Duration;

use crate::check::{Checker, check_size};
use crate::diagnostic::quote;
use crate::spec::{AttrSpec, NumberOrText, TimeSpec};
use crate::units::parse_timestamp;

/// Type of a file, as in the top bits of `st_mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum FileKind {
    Regular,
    Directory,
    Symlink,
    Fifo,
    Socket,
    CharDevice,
    BlockDevice,
}

impl FileKind {
    /// Every kind.
    pub const ALL: [Self; 7] = [
        Self::Regular,
        Self::Directory,
        Self::Symlink,
        Self::Fifo,
        Self::Socket,
        Self::CharDevice,
        Self::BlockDevice,
    ];

    /// The word for it in a rule.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Regular => "regular",
            Self::Directory => "directory",
            Self::Symlink => "symlink",
            Self::Fifo => "fifo",
            Self::Socket => "socket",
            Self::CharDevice => "char_device",
            Self::BlockDevice => "block_device",
        }
    }

    /// Kind named by a word; those of IOChaos (`namedPipe`, `regularFile`, …) are accepted as well.
    #[must_use]
    pub fn named(word: &str) -> Option<Self> {
        let alias = match word {
            "regularFile" | "file" => Some(Self::Regular),
            "namedPipe" => Some(Self::Fifo),
            "charDevice" => Some(Self::CharDevice),
            "blockDevice" => Some(Self::BlockDevice),
            _ => None,
        };
        alias.or_else(|| Self::ALL.into_iter().find(|kind| kind.name() == word))
    }

    /// The S_IFMT bits of `st_mode` (inode(7)).
    #[must_use]
    pub const fn mode_bits(self) -> u32 {
        match self {
            Self::Regular => 0o100_000,
            Self::Directory => 0o040_000,
            Self::Symlink => 0o120_000,
            Self::Fifo => 0o010_000,
            Self::Socket => 0o140_000,
            Self::CharDevice => 0o020_000,
            Self::BlockDevice => 0o060_000,
        }
    }

    /// The kind that the S_IFMT bits of `mode` stand for.
    #[must_use]
    pub fn from_mode(mode: u32) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.mode_bits() == mode & 0o170_000)
    }
}

/// A point in time as `stat` reports it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    /// Seconds since 1970-01-01 00:00 UTC, negative before.
    pub sec: i64,
    /// Nanoseconds past `sec`, below 1,000,000,000.
    pub nsec: u32,
}

impl Timestamp {
    /// This much later; stops at the end of time.
    #[must_use]
    pub fn later(self, by: Duration) -> Self {
        let nsec = self.nsec + by.subsec_nanos();
        let carry = i64::from(nsec >= NANOS);
        let sec = self
            .sec
            .saturating_add(i64::try_from(by.as_secs()).unwrap_or(i64::MAX))
            .saturating_add(carry);
        Self {
            sec,
            nsec: nsec % NANOS,
        }
    }

    /// This much earlier; stops at the beginning of time.
    #[must_use]
    pub fn earlier(self, by: Duration) -> Self {
        let borrow = i64::from(self.nsec < by.subsec_nanos());
        let nsec = (self.nsec + NANOS - by.subsec_nanos()) % NANOS;
        let sec = self
            .sec
            .saturating_sub(i64::try_from(by.as_secs()).unwrap_or(i64::MAX))
            .saturating_sub(borrow);
        Self { sec, nsec }
    }
}

/// The largest size that the kernel takes: it refuses a reply with a larger one as broken (Linux, fs/fuse/dir.c, `fuse_invalid_attr`).
const LARGEST_SIZE: u64 = i64::MAX as u64;

const NANOS: u32 = 1_000_000_000;

/// The attributes that a reply carries and a rule can override.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Inode number.
    pub ino: u64,
    /// Bytes.
    pub size: u64,
    /// Blocks of 512 bytes.
    pub blocks: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of the content.
    pub mtime: Timestamp,
    /// Last change of the attributes.
    pub ctime: Timestamp,
    /// Type.
    pub kind: FileKind,
    /// Permission bits with setuid, setgid and sticky: `st_mode & 07777`.
    pub perm: u16,
    /// Number of names.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device file, in the kernel's encoding (`new_encode_dev`).
    pub rdev: u32,
}

/// How a count or size changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amount {
    /// It becomes this.
    Set(u64),
    /// So much more than the true value.
    Add(u64),
    /// So much less than the true value, at least 0.
    Sub(u64),
}

impl Amount {
    fn of(self, truth: u64) -> u64 {
        match self {
            Self::Set(value) => value,
            Self::Add(more) => truth.saturating_add(more),
            Self::Sub(less) => truth.saturating_sub(less),
        }
    }
}

/// How a time changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeChange {
    /// It becomes this.
    Set(Timestamp),
    /// So much later than the true time.
    Later(Duration),
    /// So much earlier than the true time.
    Earlier(Duration),
}

impl TimeChange {
    fn of(self, truth: Timestamp) -> Timestamp {
        match self {
            Self::Set(value) => value,
            Self::Later(by) => truth.later(by),
            Self::Earlier(by) => truth.earlier(by),
        }
    }
}

/// A checked `attr` fault: what is `None` keeps its true value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttrOverride {
    /// Inode number.
    pub ino: Option<u64>,
    /// Bytes.
    pub size: Option<Amount>,
    /// Blocks of 512 bytes.
    pub blocks: Option<Amount>,
    /// Last access.
    pub atime: Option<TimeChange>,
    /// Last change of the content.
    pub mtime: Option<TimeChange>,
    /// Last change of the attributes.
    pub ctime: Option<TimeChange>,
    /// Type.
    pub kind: Option<FileKind>,
    /// Permission bits.
    pub perm: Option<u16>,
    /// Number of names.
    pub nlink: Option<Amount>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Device number.
    pub rdev: Option<u32>,
}

impl AttrOverride {
    /// The attributes to report in the place of the true ones.
    #[must_use]
    pub fn apply(&self, truth: Attributes) -> Attributes {
        let amount =
            |change: Option<Amount>, truth: u64| change.map_or(truth, |change| change.of(truth));
        let time =
            |change: Option<TimeChange>, truth| change.map_or(truth, |change| change.of(truth));
        Attributes {
            ino: self.ino.unwrap_or(truth.ino),
            size: amount(self.size, truth.size).min(LARGEST_SIZE),
            blocks: amount(self.blocks, truth.blocks),
            atime: time(self.atime, truth.atime),
            mtime: time(self.mtime, truth.mtime),
            ctime: time(self.ctime, truth.ctime),
            kind: self.kind.unwrap_or(truth.kind),
            perm: self.perm.unwrap_or(truth.perm),
            nlink: u32::try_from(amount(self.nlink, u64::from(truth.nlink))).unwrap_or(u32::MAX),
            uid: self.uid.unwrap_or(truth.uid),
            gid: self.gid.unwrap_or(truth.gid),
            rdev: self.rdev.unwrap_or(truth.rdev),
        }
    }

    /// Whether it changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Checks the raw form.
pub(crate) fn check(checker: &mut Checker<'_>, spec: &AttrSpec) -> Option<AttrOverride> {
    let checked = AttrOverride {
        ino: spec.ino,
        size: amount(checker, "size", spec.size.as_ref()),
        blocks: amount(checker, "blocks", spec.blocks.as_ref()),
        atime: time(checker, "atime", spec.atime.as_ref()),
        mtime: time(checker, "mtime", spec.mtime.as_ref()),
        ctime: time(checker, "ctime", spec.ctime.as_ref()),
        kind: spec.kind.as_deref().and_then(|word| kind(checker, word)),
        perm: spec.perm.as_ref().and_then(|perm| mode(checker, perm)),
        nlink: amount(checker, "nlink", spec.nlink.as_ref()),
        uid: spec.uid,
        gid: spec.gid,
        rdev: spec.rdev.as_ref().and_then(|rdev| device(checker, rdev)),
    };
    if *spec == AttrSpec::default() {
        checker
            .error("fault.attr", "is empty")
            .hint("one or more attributes, such as `perm: \"0000\"`");
        return None;
    }
    if let Some(Amount::Set(size)) = checked.size
        && size > LARGEST_SIZE
    {
        checker.error(
            "fault.attr.size",
            format!("{size} is larger than any file: at most {LARGEST_SIZE}"),
        );
    }
    if checked.ino == Some(0) {
        checker.error("fault.attr.ino", "0 is not an inode number");
    }
    if checked
        .nlink
        .is_some_and(|nlink| matches!(nlink, Amount::Set(links) if links > u64::from(u32::MAX)))
    {
        checker.error("fault.attr.nlink", "must fit in 32 bits");
    }
    if checked.kind.is_some() {
        // fuse_do_getattr and fuse_dentry_revalidate (fs/fuse/dir.c) compare it with the type that the inode was made with.
        let cause = "is not reported: the kernel marks an inode whose type changes as bad, which would outlast the rule";
        let alone = AttrSpec {
            kind: None,
            ..spec.clone()
        } == AttrSpec::default();
        if alone {
            checker
                .error(
                    "fault.attr.kind",
                    format!("{cause}; so this rule alters nothing"),
                )
                .hint("`errno: EIO` is what a program sees of such an inode");
        } else {
            checker.warn("fault.attr.kind", cause);
        }
    }
    if checked.size.is_some() {
        checker.warn(
            "fault.attr.size",
            "reads past the forged size find the end of the file; appends go to the true end",
        );
    }
    Some(checked)
}

/// A count or size: `4096`, `64KiB`, `+1MiB`, `-1`.
fn amount(checker: &mut Checker<'_>, key: &str, spec: Option<&NumberOrText>) -> Option<Amount> {
    let field = format!("fault.attr.{key}");
    let spec = spec?;
    let relative =
        |change: fn(u64) -> Amount, rest: &str| (change, NumberOrText::Text(rest.to_owned()));
    let (change, size) = match spec {
        NumberOrText::Text(text) => match (text.strip_prefix('+'), text.strip_prefix('-')) {
            (Some(rest), _) => relative(Amount::Add, rest),
            (_, Some(rest)) => relative(Amount::Sub, rest),
            _ => relative(Amount::Set, text),
        },
        number @ NumberOrText::Number(_) => (Amount::Set as fn(u64) -> Amount, number.clone()),
    };
    check_size(checker, &field, &size).map(change)
}

fn time(checker: &mut Checker<'_>, key: &str, spec: Option<&TimeSpec>) -> Option<TimeChange> {
    let field = format!("fault.attr.{key}");
    match spec? {
        TimeSpec::Parts(parts) if parts.nsec >= NANOS => {
            checker.error(&format!("{field}.nsec"), "must be below 1000000000");
            None
        }
        TimeSpec::Parts(parts) => Some(TimeChange::Set(Timestamp {
            sec: parts.sec,
            nsec: parts.nsec,
        })),
        TimeSpec::Text(text) => match (text.strip_prefix('+'), text.strip_prefix('-')) {
            (Some(rest), _) => checker.duration(&field, rest).map(TimeChange::Later),
            (_, Some(rest)) => checker.duration(&field, rest).map(TimeChange::Earlier),
            _ => match parse_timestamp(text) {
                Ok(point) => Some(TimeChange::Set(point)),
                Err(cause) => {
                    checker.error(&field, format!("{}: {cause}", quote(text)));
                    None
                }
            },
        },
    }
}

fn kind(checker: &mut Checker<'_>, word: &str) -> Option<FileKind> {
    let kind = FileKind::named(word);
    if kind.is_none() {
        checker.unknown(
            "fault.attr.kind",
            "file type",
            word,
            &FileKind::ALL.map(FileKind::name),
        );
    }
    kind
}

/// Permission bits: octal text, or a number.
fn mode(checker: &mut Checker<'_>, spec: &NumberOrText) -> Option<u16> {
    const FIELD: &str = "fault.attr.perm";
    let bits = match spec {
        NumberOrText::Text(text) => {
            let digits = text.strip_prefix("0o").unwrap_or(text);
            let octal =
                !digits.is_empty() && digits.bytes().all(|digit| matches!(digit, b'0'..=b'7'));
            octal.then(|| u64::from_str_radix(digits, 8).ok()).flatten()
        }
        NumberOrText::Number(number) => Some(*number),
    };
    let shown = match spec {
        NumberOrText::Text(text) => quote(text),
        NumberOrText::Number(number) => number.to_string(),
    };
    let Some(perm) = bits
        .and_then(|bits| u16::try_from(bits).ok())
        .filter(|perm| *perm <= 0o7777)
    else {
        checker
            .error(
                FIELD,
                format!("{shown} is not a mode: \"0000\" to \"7777\", octal"),
            )
            .hint("\"0644\", or the number 420");
        return None;
    };
    if let NumberOrText::Number(number) = spec
        && *number > 7
        && number.to_string().bytes().all(|digit| digit < b'8')
    {
        let cause = format!("{number} is decimal, that is octal {perm:04o}");
        checker
            .warn(FIELD, cause)
            .hint(format!("write \"0{number}\" if octal was meant"));
    }
    Some(perm)
}

/// A device number: as the kernel encodes it for user space, or `major:minor`.
fn device(checker: &mut Checker<'_>, spec: &NumberOrText) -> Option<u32> {
    const FIELD: &str = "fault.attr.rdev";
    let number = match spec {
        NumberOrText::Number(number) => u32::try_from(*number).ok(),
        NumberOrText::Text(text) => text.split_once(':').and_then(|(major, minor)| {
            let major: u32 = major.parse().ok().filter(|major| *major < 1 << 12)?;
            let minor: u32 = minor.parse().ok().filter(|minor| *minor < 1 << 20)?;
            // new_encode_dev, include/linux/kdev_t.h.
            Some((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
        }),
    };
    if number.is_none() {
        checker.error(FIELD, "not a device number: 32 bits, or major:minor");
    }
    number
}
