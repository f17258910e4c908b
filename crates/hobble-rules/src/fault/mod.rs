//! What a rule does to an operation: one file per fault kind.
//!
//! Each file owns the checked form of its fault, how the raw form is checked, and the pure function from random draws to what is done. Invariant: nothing
//! here performs a fault; the executor does, from the values handed out.

pub mod attr;
pub mod corrupt;
pub mod errno;
pub mod latency;

use std::sync::Arc;

use attr::AttrOverride;
use corrupt::CorruptFault;
use errno::ErrnoFault;
use latency::LatencyFault;

/// The faults of one rule; several compose, the delay first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Faults {
    /// Delays the operation.
    pub latency: Option<LatencyFault>,
    /// Fails the operation.
    pub errno: Option<ErrnoFault>,
    /// Overrides attributes in the reply.
    pub attr: Option<Arc<AttrOverride>>,
    /// Alters the data read or written.
    pub corrupt: Option<CorruptFault>,
}

impl Faults {
    /// The kinds present, in the order in which unnamed rules are named after them.
    pub fn kinds(&self) -> impl Iterator<Item = FaultKind> {
        let present = [
            self.latency.as_ref().map(|_| FaultKind::Latency),
            self.errno.as_ref().map(|_| FaultKind::Errno),
            self.attr.as_ref().map(|_| FaultKind::Attr),
            self.corrupt.as_ref().map(|_| FaultKind::Corrupt),
        ];
        present.into_iter().flatten()
    }
}

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum FaultKind {
    /// The operation fails with an errno.
    Errno,
    /// The operation takes longer.
    Latency,
    /// The reply's attributes are not the true ones.
    Attr,
    /// The data read or written is not the true data.
    Corrupt,
}

impl FaultKind {
    /// Every kind of this version.
    pub const ALL: [Self; 4] = [Self::Errno, Self::Latency, Self::Attr, Self::Corrupt];

    /// The word for it in a rule.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Errno => "errno",
            Self::Latency => "latency",
            Self::Attr => "attr",
            Self::Corrupt => "corrupt",
        }
    }
}

/// Fault kinds that are named in the design and not in this version: a rule with one of them is told so, rather than being
/// offered the nearest word.
pub(crate) const NOT_IN_THIS_VERSION: [&str; 13] = [
    "throttle",
    "hang",
    "short_io",
    "torn_write",
    "lost_write",
    "drop_unsynced",
    "reorder",
    "fsync_fail",
    "capacity",
    "read_only",
    "bad_region",
    "dirent_loss",
    "signal",
];
