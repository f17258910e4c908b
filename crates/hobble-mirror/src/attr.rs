//! Attributes, from the backing file to the kernel.
//!
//! Invariant: the file type is never forged towards the kernel. It marks an inode whose type changes as bad for as long as it lives (`fuse_make_bad`, fs/fuse/dir.c), which
//! would outlast the rule.

use std::sync::atomic::Ordering;
use std::time::Duration;

use hobble_fuse::types::{Attr, Entry, StatxAttr, Timestamp};
use hobble_rules::{Attributes, Decision, FileKind, Op as RuleOp};
use rustix::fs::Statx;

use crate::mirror::Inner;
use crate::store::{Inode, Node, Store};

/// The attributes of an inode, as programs shall see them without any rule.
pub(crate) fn attr(inode: Inode, stat: &Statx) -> Attr {
    Attr {
        ino: Store::visible_number(inode),
        ..Attr::from(stat)
    }
}

/// Applies what a decision says about attributes.
pub(crate) fn forge(decision: &Decision, attr: Attr) -> Attr {
    if decision.attr.is_empty() {
        return attr;
    }
    let to = |time: Timestamp| hobble_rules::Timestamp {
        sec: time.secs,
        nsec: time.nanos,
    };
    let from = |time: hobble_rules::Timestamp| Timestamp {
        secs: time.sec,
        nanos: time.nsec,
    };
    let Some(kind) = FileKind::from_mode(attr.mode) else {
        return attr;
    };
    let forged = decision.attributes(Attributes {
        ino: attr.ino,
        size: attr.size,
        blocks: attr.blocks,
        atime: to(attr.atime),
        mtime: to(attr.mtime),
        ctime: to(attr.ctime),
        kind,
        perm: (attr.mode & 0o7777) as u16,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
    });
    Attr {
        ino: forged.ino,
        // The kernel refuses sizes that its own arithmetic cannot hold, and marks the inode bad (fuse_invalid_attr, fs/fuse/dir.c).
        size: forged.size.min(i64::MAX as u64),
        blocks: forged.blocks,
        atime: from(forged.atime),
        mtime: from(forged.mtime),
        ctime: from(forged.ctime),
        mode: (attr.mode & libc::S_IFMT) | u32::from(forged.perm & 0o7777),
        nlink: forged.nlink,
        uid: forged.uid,
        gid: forged.gid,
        rdev: forged.rdev,
        ..attr
    }
}

/// The answer to STATX.
pub(crate) fn statx(decision: &Decision, inode: Inode, stat: &Statx) -> StatxAttr {
    let plain = StatxAttr::from(stat);
    StatxAttr {
        attr: forge(decision, attr(inode, stat)),
        ..plain
    }
}

impl Inner {
    /// How long the kernel may use attributes of a node.
    pub(crate) fn attr_valid(&self, node: &Node, decision: &Decision) -> Duration {
        if !decision.attr.is_empty()
            || node.may_be_mapped.load(Ordering::Relaxed)
            || self.rules.matches(self, node, RuleOp::Getattr)
        {
            return Duration::ZERO;
        }
        self.caching.attr
    }

    /// How long the kernel may use a name of a node.
    fn entry_valid(&self, node: &Node, decision: &Decision) -> Duration {
        if !decision.attr.is_empty() || self.rules.matches(self, node, RuleOp::Lookup) {
            return Duration::ZERO;
        }
        self.caching.entry
    }

    /// The answer that gives the kernel a node, of which the caller holds one reference for it.
    pub(crate) fn entry(&self, node: &Node, stat: &Statx, decision: &Decision) -> Entry {
        Entry {
            node: node.id,
            generation: node.generation(),
            attr: forge(decision, attr(node.inode, stat)),
            entry_valid: self.entry_valid(node, decision),
            attr_valid: self.attr_valid(node, decision),
        }
    }
}
