//! What a mirror is told when it is made, and what it asks of the layer above.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use hobble_fuse::Tid;
use hobble_rules::Comm;

use crate::legacy::Legacy;

/// How to mirror.
#[derive(Debug)]
pub struct Config {
    /// The directory to be mirrored, best as the root of a tree that was cloned with `open_tree(OPEN_TREE_CLONE)`. Mounts that the clone brought along are
    /// stepped over where the kernel allows it (Linux 6.15): what they cover is served, and the layer above puts them back on top.
    pub root: OwnedFd,
    /// The same directory on the target's own mount. Descriptors that are handed to the target are opened through it, so that they are as if the
    /// target had opened them; without it they are on the mount of `root`.
    pub native: Option<OwnedFd>,
    /// Where the target sees the root: what absolute patterns of rules are matched against. With a leading slash, without a trailing one (empty for `/`).
    pub volume: Vec<u8>,
    /// How long the kernel may keep names and attributes.
    pub caching: Caching,
    /// Whether reads and writes may go past the server (Linux 6.9). Where the kernel or the backing filesystem cannot, they do not, whatever is said here.
    pub passthrough: bool,
    /// Where to write down what a successor must know ([`Mirror::resume`](crate::Mirror::resume)); made before the process was cloned from one that outlives it.
    pub legacy: Option<Legacy>,
}

/// How long the kernel may use what it was told without asking again.
///
/// The kernel sees to it by itself that what is changed through the hook is not stale. What this bounds is how late a change made *behind* the hook is
/// seen. Whoever has programs on both sides that rely on each other's changes at once should take [`Caching::NONE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caching {
    /// Names.
    pub entry: Duration,
    /// Attributes. Zero is used instead for files that may be mapped for writing: stores change their times without a request.
    pub attr: Duration,
}

impl Caching {
    /// Nothing is kept: every path walk and every `stat` asks.
    pub const NONE: Self = Self {
        entry: Duration::ZERO,
        attr: Duration::ZERO,
    };
}

impl Default for Caching {
    fn default() -> Self {
        Self {
            entry: Duration::from_secs(1),
            attr: Duration::from_secs(1),
        }
    }
}

/// What is known about a caller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CallerFacts {
    /// Its process (thread group id).
    pub pid: Option<u32>,
    /// The name of its process.
    pub comm: Option<Comm>,
    /// The name of the very thread.
    pub thread_comm: Option<Comm>,
}

/// What the mirror asks about callers, and tells about them. Everything is called on threads that serve requests and should be quick.
pub trait Callers: Send + Sync + 'static {
    /// Whether the rules are for this caller. Others' operations pass unmatched. `tid` 0: the kernel acts for nobody.
    fn in_scope(&self, tid: Tid) -> bool;

    /// Facts about a caller; asked only when a rule needs them.
    fn facts(&self, tid: Tid) -> CallerFacts;

    /// From now on, and until it is closed, the server holds the byte-range locks that a process (thread group id) takes on some file on this description of the
    /// backing file: what whoever undoes an attachment without its server needs to know to give them back. `pid` is 0 while it is not known whose they will be: they are being
    /// moved. Called with the lock table locked.
    fn holds_locks_on(&self, file: BorrowedFd<'_>, pid: u32) {
        let _ = (file, pid);
    }

    /// The descriptor that kept the original of a moved description is about to be closed: its number will be something else's.
    fn lets_go_of(&self, file: BorrowedFd<'_>) {
        let _ = file;
    }

    /// Files that are open have come under a rule, by a rename or a link, that does not see what is read and written through them:
    /// [`Mirror::misfits`](crate::Mirror::misfits) says which. They are to be opened anew, by somebody else: called on a thread that serves requests, as the others are.
    fn misfits(&self) {}
}

/// Everybody is in scope; facts come from `/proc`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Everybody;

impl Callers for Everybody {
    fn in_scope(&self, _tid: Tid) -> bool {
        true
    }

    fn facts(&self, tid: Tid) -> CallerFacts {
        let status = std::fs::read(format!("/proc/{tid}/status")).unwrap_or_default();
        let field = |text: &[u8], key: &[u8]| {
            text.split(|byte| *byte == b'\n')
                .find_map(|line| line.strip_prefix(key))
                .map(<[u8]>::to_vec)
        };
        let number = |bytes: Vec<u8>| {
            std::str::from_utf8(&bytes)
                .ok()
                .and_then(|text| text.trim().parse().ok())
        };
        let pid: Option<u32> = field(&status, b"Tgid:").and_then(number);
        let comm = |path: String| {
            std::fs::read(path)
                .ok()
                .map(|name| Comm::new(name.trim_ascii_end()))
        };
        CallerFacts {
            pid,
            comm: pid.and_then(|pid| comm(format!("/proc/{pid}/comm"))),
            thread_comm: comm(format!("/proc/{tid}/comm")),
        }
    }
}
