//! The operations. Each does on the backing tree what was asked for, as the caller would have, and answers.
//!
//! Invariants that all keep: an inode is reached through its node, never through a path; what creates, allocates or may clear set-id bits runs as the caller;
//! a reference or handle that the kernel did not take is given back.

mod attrs;
mod dirs;
mod files;
mod lock;
mod names;
mod once;
mod xattrs;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hobble_fuse::{Caller, Creation, NodeId, Reply};

use hobble_rules::Decision;

use crate::error::errno;
use crate::mirror::Inner;
use crate::store::Node;
use crate::sys::identity::{self, Assumed, Setid, Who};

/// Whose turn it is, and what the rules say about it.
#[derive(Clone, Copy)]
pub(crate) struct Turn<'a> {
    pub(crate) caller: Caller,
    /// Only what alters results: delay and errno have been dealt with.
    pub(crate) decision: &'a Decision,
}

/// Answers with the errno of a failed operation.
fn fail(reply: Reply, error: &io::Error) {
    reply.error(errno(error));
}

/// Answers an operation that has no result.
fn finish(reply: Reply, result: io::Result<()>) {
    match result {
        Ok(()) => {
            reply.ok();
        }
        Err(error) => fail(reply, &error),
    }
}

fn error(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// Whether set-id bits outlive a change by this caller where the kernel does not say. Root has CAP_FSETID, as a rule; nobody else has.
fn setid_of(caller: Caller) -> Setid {
    if caller.uid == 0 {
        Setid::Keep
    } else {
        Setid::Clear
    }
}

/// What the kernel says about set-id bits: with HANDLE_KILLPRIV_V2 it asks for them to be cleared exactly when the caller lacks CAP_FSETID.
fn setid_by(kill: bool) -> Setid {
    if kill { Setid::Clear } else { Setid::Keep }
}

/// Acts as the caller.
fn act_as(caller: Caller, setid: Setid) -> io::Result<Assumed> {
    identity::assume(Who {
        uid: caller.uid,
        gid: caller.gid,
        groups: &[],
        setid,
        umask: 0,
    })
}

/// Creates as the caller: with its umask, and with the one of its supplementary groups that may matter, the directory's.
fn create_as(caller: Caller, creation: &Creation<'_>) -> io::Result<Assumed> {
    let groups: Vec<u32> = creation.groups.iter().collect();
    identity::assume(Who {
        uid: caller.uid,
        gid: caller.gid,
        groups: &groups,
        setid: setid_of(caller),
        umask: creation.umask & 0o777,
    })
}

impl Inner {
    fn node(&self, id: NodeId) -> io::Result<Arc<Node>> {
        self.store.get(id).ok_or_else(|| error(libc::ESTALE))
    }

    /// A descriptor of a node's inode, good for what an `O_PATH` descriptor is good for.
    pub(crate) fn fd_of(&self, node: &Arc<Node>) -> io::Result<Arc<OwnedFd>> {
        match self.with_descriptors(|| node.fd(&self.store)) {
            // Unlinked behind our back, but still open.
            Err(stale) if stale.raw_os_error() == Some(libc::ESTALE) => {
                self.handles.any_of(node).ok_or(stale)
            }
            other => other,
        }
    }

    /// Tries again with fewer descriptors in use when they have run out.
    pub(crate) fn with_descriptors<T>(&self, work: impl Fn() -> io::Result<T>) -> io::Result<T> {
        match work() {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                self.store.shed_descriptors();
                work()
            }
            other => other,
        }
    }

    /// Asks the kernel to forget nodes that hold descriptors, when those become scarce.
    fn relieve(&self) {
        let Some(kernel) = self.kernel.get() else {
            return;
        };
        for link in self.store.overdue() {
            if let Ok(name) = std::ffi::CString::new(link.name.into_vec()) {
                kernel.inval_entry(link.parent, name, false);
            }
        }
    }
}
