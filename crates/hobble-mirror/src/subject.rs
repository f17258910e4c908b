//! What a request is about, in the words of the rules: its operation, its bytes, its file and its paths.
//!
//! Invariant: nothing here changes anything, and what takes a look at the backing tree (the file of a name) is done only when a rule asks.

use std::ffi::CStr;
use std::os::fd::AsFd;
use std::sync::Arc;

use hobble_fuse::{NodeId, Op};
use hobble_rules::{FileId, Op as RuleOp, PathMatch, Plan};

use crate::mirror::Inner;
use crate::store::{Inode, Store, resolve};

/// What a request is called in a rule; `None` for what no rule can name.
pub(crate) fn rule_op(op: &Op<'_>) -> Option<RuleOp> {
    Some(match op {
        Op::Lookup { .. } => RuleOp::Lookup,
        Op::Getattr { .. } | Op::Statx { .. } => RuleOp::Getattr,
        Op::Setattr(_) => RuleOp::Setattr,
        Op::Readlink => RuleOp::Readlink,
        Op::Symlink { .. } => RuleOp::Symlink,
        Op::Mknod { .. } => RuleOp::Mknod,
        Op::Mkdir { .. } => RuleOp::Mkdir,
        Op::Unlink { .. } => RuleOp::Unlink,
        Op::Rmdir { .. } => RuleOp::Rmdir,
        Op::Rename { .. } => RuleOp::Rename,
        Op::Link { .. } => RuleOp::Link,
        Op::Open { .. } => RuleOp::Open,
        Op::Create { .. } => RuleOp::Create,
        Op::Tmpfile { .. } => RuleOp::Tmpfile,
        Op::Read { .. } => RuleOp::Read,
        Op::Write { .. } => RuleOp::Write,
        Op::Statfs => RuleOp::Statfs,
        Op::Release { .. } => RuleOp::Release,
        Op::Fsync {
            datasync: false, ..
        } => RuleOp::Fsync,
        Op::Fsync { datasync: true, .. } => RuleOp::Fdatasync,
        Op::Setxattr { .. } => RuleOp::Setxattr,
        Op::Getxattr { .. } => RuleOp::Getxattr,
        Op::Listxattr { .. } => RuleOp::Listxattr,
        Op::Removexattr { .. } => RuleOp::Removexattr,
        Op::Flush { .. } => RuleOp::Flush,
        Op::Opendir { .. } => RuleOp::Opendir,
        Op::Readdir { .. } | Op::Readdirplus { .. } => RuleOp::Readdir,
        Op::Releasedir { .. } => RuleOp::Releasedir,
        Op::Fsyncdir { .. } => RuleOp::Fsyncdir,
        Op::Getlk(_) => RuleOp::Getlk,
        Op::Setlk(ask) | Op::Setlkw(ask) if ask.flock => RuleOp::Flock,
        Op::Setlk(_) | Op::Setlkw(_) => RuleOp::Setlk,
        Op::Access { .. } => RuleOp::Access,
        Op::Ioctl { .. } => RuleOp::Ioctl,
        Op::Fallocate { .. } => RuleOp::Fallocate,
        Op::Lseek { .. } => RuleOp::Lseek,
        Op::CopyFileRange(_) => RuleOp::CopyFileRange,
        Op::Syncfs => RuleOp::Syncfs,
        _ => return None,
    })
}

/// The bytes of a file that an operation works on.
pub(crate) fn range(op: &Op<'_>) -> (Option<u64>, Option<u64>) {
    let (offset, len) = match op {
        Op::Read { offset, size, .. } => (*offset, u64::from(*size)),
        Op::Write { offset, data, .. } => (*offset, data.len() as u64),
        Op::Fallocate { offset, length, .. } => (*offset, *length),
        Op::CopyFileRange(copy) => (copy.target_offset, copy.len),
        _ => return (None, None),
    };
    (Some(offset), Some(len))
}

/// Whether the kernel holds an inode's lock exclusively while it waits for this operation, so that others queue behind it, unkillable.
pub(crate) fn is_exclusive(op: &Op<'_>) -> bool {
    matches!(
        op,
        Op::Setattr(_)
            | Op::Symlink { .. }
            | Op::Mknod { .. }
            | Op::Mkdir { .. }
            | Op::Unlink { .. }
            | Op::Rmdir { .. }
            | Op::Rename { .. }
            | Op::Link { .. }
            | Op::Create { .. }
            | Op::Write { .. }
            | Op::Setxattr { .. }
            | Op::Removexattr { .. }
            | Op::Fallocate { .. }
            | Op::CopyFileRange(_)
            | Op::Fsync { .. }
            | Op::Fsyncdir { .. }
    )
}

impl Inner {
    /// The file that an operation works on, for rules that count each apart. By its inode number as programs see it: a node's id is another after the kernel has forgotten the
    /// node, and depends on who came first; a device number changes from boot to boot. A name that leads nowhere so far counts as a file of its own.
    pub(crate) fn file_of(&self, node: NodeId, op: &Op<'_>) -> FileId {
        let known = |id: NodeId| {
            self.store
                .get(id)
                .map_or(FileId(0), |node| FileId(Store::visible_number(node.inode)))
        };
        let child = |parent: NodeId, name: &CStr| match self.inode_of_child(parent, name) {
            Ok(inode) => FileId(Store::visible_number(inode)),
            Err(_) => FileId::named(known(parent), name.to_bytes()),
        };
        match op {
            Op::Lookup { name }
            | Op::Symlink { name, .. }
            | Op::Mknod { name, .. }
            | Op::Mkdir { name, .. }
            | Op::Unlink { name }
            | Op::Rmdir { name }
            | Op::Create { name, .. }
            | Op::Rename { name, .. } => child(node, name),
            Op::Link { source, .. } => known(*source),
            // The one that is changed, as for `range`.
            Op::CopyFileRange(copy) => known(copy.target_node),
            _ => known(node),
        }
    }

    fn inode_of_child(&self, parent: NodeId, name: &CStr) -> std::io::Result<Inode> {
        let parent = self
            .store
            .get(parent)
            .ok_or_else(|| std::io::Error::from_raw_os_error(libc::ESTALE))?;
        let directory = self.fd_of(&parent)?;
        let found = self.with_descriptors(|| resolve(directory.as_fd(), name))?;
        self.store.inode_of(&found)
    }

    /// What the rules say about the paths that an operation works on.
    pub(crate) fn matches_for(
        &self,
        plan: &Plan,
        node: NodeId,
        op: &Op<'_>,
    ) -> Vec<Arc<[PathMatch]>> {
        let child = |parent: NodeId, name: &CStr| -> Arc<[PathMatch]> {
            let path = self.store.path_of_child(parent, name.to_bytes());
            path.map(|path| self.match_path(plan, &path))
                .into_iter()
                .collect()
        };
        let known = |id: NodeId| -> Arc<[PathMatch]> {
            self.store
                .get(id)
                .map_or_else(|| Arc::from([]), |node| self.matches_of(plan, &node))
        };
        match op {
            Op::Lookup { name }
            | Op::Symlink { name, .. }
            | Op::Mknod { name, .. }
            | Op::Mkdir { name, .. }
            | Op::Unlink { name }
            | Op::Rmdir { name }
            | Op::Create { name, .. } => vec![child(node, name)],
            Op::Rename {
                name,
                new_parent,
                new_name,
                ..
            } => vec![child(node, name), child(*new_parent, new_name)],
            Op::Link { source, new_name } => vec![known(*source), child(node, new_name)],
            Op::CopyFileRange(copy) => vec![known(node), known(copy.target_node)],
            _ => vec![known(node)],
        }
    }
}
