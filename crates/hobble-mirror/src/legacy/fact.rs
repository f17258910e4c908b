//! What can be said about a mirror, in the words of [`Legacy`](super::Legacy).
//!
//! Invariant: whatever a fact says of one thing is said whole, so that of several facts about it the last is right, whatever became of those before; the one exception
//! is [`Fact::Lookups`], a difference.

use serde::{Deserialize, Serialize};

/// One fact.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Fact {
    /// The mirror itself.
    Mirror {
        volume: Vec<u8>,
        /// Number of the descriptor of the target's own mount.
        native: Option<i32>,
    },
    /// A connection, and what INIT agreed on.
    Served(Served),
    /// Reads and writes do not go past the server.
    NoPassthrough,
    /// A filesystem as seen through one mount.
    Realm(Realm),
    /// A node.
    Node {
        id: u64,
        realm: u16,
        number: u64,
        kind: u32,
        place: Place,
        lookups: u64,
    },
    /// The kernel has gained or lost references of a node.
    Lookups { id: u64, change: i64 },
    /// What changes about a node.
    State {
        id: u64,
        names: Vec<(u64, Vec<u8>)>,
        kept: Option<i32>,
        may_be_mapped: bool,
    },
    /// A node is gone.
    Gone { id: u64 },
    /// How the opens of a node's file do their I/O; `None` without any.
    Io { id: u64, io: Option<Io> },
    /// An open file.
    Handle(Handle),
    /// An open file is gone.
    HandleGone { fh: u64 },
    /// A moved description.
    Adopted(Adopted),
    /// A moved description is forgotten.
    AdoptedGone { id: u64 },
    /// The locks of one inode.
    Locks(Locks),
    /// Somebody has locked a range of an inode.
    Seen { node: u64, owner: u64 },
    /// Rounds of stand-ins that have arrived.
    Arrivals(u64),
    /// The next numbers of open files and moved descriptions.
    Next { fh: u64, adopted: u64 },
    /// Something that must not be done twice is about to be done. `before` is what tells afterwards whether it was, for some operations.
    Begun { unique: u64, before: u64 },
    /// It was done, and this is the answer.
    Answered {
        unique: u64,
        error: i32,
        bytes: Vec<u8>,
    },
    /// Whatever the layer above wants to be known.
    Note(Vec<u8>),
}

/// A filesystem as seen through one mount.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Realm {
    pub(crate) index: u16,
    pub(crate) device: (u32, u32),
    pub(crate) mount: u64,
    /// The descriptor that file handles are opened through.
    pub(crate) anchor: Option<i32>,
}

/// How an inode is found again.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Place {
    /// By file handle.
    Handle { kind: i32, bytes: Vec<u8> },
    /// By this descriptor.
    Descriptor(i32),
}

/// See [`crate::store::Io`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Io {
    /// By the number of the backing file.
    Passthrough(u32),
    /// Through the server.
    Served,
}

/// A served connection.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Served {
    pub(crate) device: i32,
    pub(crate) kernel_minor: u32,
    pub(crate) minor: u32,
    pub(crate) offered: u64,
    pub(crate) features: u64,
    pub(crate) max_write: u32,
    pub(crate) max_readahead: u32,
    pub(crate) max_stack_depth: u32,
}

/// An open file.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Handle {
    pub(crate) fh: u64,
    pub(crate) node: u64,
    pub(crate) file: i32,
    pub(crate) adopted: Option<u64>,
    pub(crate) flags: u32,
    pub(crate) direct: bool,
    pub(crate) opener: u32,
    /// The request that it is made for, as long as that is not answered; 0 for none.
    pub(crate) made_for: u64,
    pub(crate) ofd_owner: Option<u64>,
    pub(crate) known_as: Option<u64>,
    pub(crate) given_back: bool,
    pub(crate) superseded: bool,
    pub(crate) successor: Option<u64>,
    pub(crate) is_successor: bool,
    pub(crate) arrives: u64,
}

/// A moved description.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Adopted {
    pub(crate) id: u64,
    pub(crate) node: u64,
    pub(crate) original: i32,
    pub(crate) replaced: bool,
    pub(crate) path: Vec<u8>,
    pub(crate) deleted: bool,
    pub(crate) tmpfile: bool,
    pub(crate) pid: u32,
    pub(crate) above: Vec<u64>,
}

/// An owner of locks: the kernel's number, and whether it came by a moved description.
pub(crate) type Owner = (u64, bool);

/// The locks of one inode; all lists empty when there are none.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Locks {
    pub(crate) node: u64,
    pub(crate) held: Vec<Held>,
    /// Who has taken locks through which open file.
    pub(crate) through: Vec<(Owner, u64)>,
    /// On which descriptors they are held towards outsiders, and the access mode of each.
    pub(crate) files: Vec<(Owner, i32, u32)>,
}

/// One locked range.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Held {
    pub(crate) owner: Owner,
    pub(crate) pid: u32,
    pub(crate) is_write: bool,
    pub(crate) start: u64,
    pub(crate) end: u64,
}
