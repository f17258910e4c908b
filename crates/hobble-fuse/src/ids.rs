//! Numbers that cross the kernel border, each with a type of its own so that none can be taken for another.

use std::fmt;

macro_rules! id {
    ($($(#[$meta:meta])* $name:ident($inner:ty);)*) => {
        $(
            $(#[$meta])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
            pub struct $name(pub $inner);

            impl fmt::Display for $name {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    fmt::Display::fmt(&self.0, f)
                }
            }
        )*
    };
}

id! {
    /// An inode as the server and the kernel call it. Chosen by the server; 1 is the root; 0 means "none".
    NodeId(u64);
    /// An open file or directory, chosen by the server in its reply to OPEN, OPENDIR, CREATE or TMPFILE.
    Fh(u64);
    /// Names one request for as long as the kernel waits for its reply; never re-used within a connection.
    Unique(u64);
    /// An opaque hash that stands for the owner of locks: a table of descriptors (POSIX) or an open file (OFD, flock).
    LockOwner(u64);
    /// A thread, as seen from the pid namespace in which the filesystem was created; 0 when it is not visible from there.
    Tid(u32);
}

impl NodeId {
    /// The root of the filesystem (`FUSE_ROOT_ID`).
    pub const ROOT: Self = Self(1);
}

impl Unique {
    /// Whether the kernel had handed this request out before, to a server that died (`FUSE_UNIQUE_RESEND`, Linux 6.9).
    #[must_use]
    pub const fn is_resent(self) -> bool {
        self.0 & crate::abi::UNIQUE_RESEND != 0
    }

    /// The number under which the request was handed out first.
    #[must_use]
    pub const fn original(self) -> Self {
        Self(self.0 & !crate::abi::UNIQUE_RESEND)
    }
}

/// Who caused a request.
///
/// Requests that the kernel sends on nobody's behalf (RELEASE, write-back) carry tid 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Caller {
    /// fsuid of the caller; [`Caller::NOBODY`] when it has no mapping.
    pub uid: u32,
    /// fsgid of the caller; [`Caller::NOBODY`] when it has no mapping.
    pub gid: u32,
    /// The calling thread.
    pub tid: Tid,
}

impl Caller {
    /// What `uid` and `gid` are when the kernel has nobody to name (`FUSE_INVALID_UIDGID`).
    pub const NOBODY: u32 = crate::abi::INVALID_UIDGID;
}
