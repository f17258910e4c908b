//! Operations that must not be done twice.
//!
//! A request that a server had taken when it was killed comes again. Most operations do no harm when they are done twice; the others are written down in the log
//! ([`crate::legacy`]) before they are done, and their answers before they are given. Invariant: one that was answered is not done again, but gets the same answer; one that
//! was begun and not answered is done with the knowledge that it may be done already ([`Reply::may_be_done`]).

use std::os::fd::AsFd;

use hobble_fuse::{Op, Reply, Request};
use rustix::fs::{OFlags, RenameFlags};

use crate::mirror::Inner;

/// Whether doing it twice is not the same as doing it once, or leaves something behind.
fn is_once(op: &Op<'_>) -> bool {
    match op {
        Op::Symlink { .. }
        | Op::Mknod { .. }
        | Op::Mkdir { .. }
        | Op::Unlink { .. }
        | Op::Rmdir { .. }
        | Op::Rename { .. }
        | Op::Link { .. }
        | Op::Open { .. }
        | Op::Opendir { .. }
        | Op::Create { .. }
        | Op::Tmpfile { .. }
        | Op::Setxattr { .. }
        | Op::Removexattr { .. } => true,
        Op::Write {
            flags, from_cache, ..
        } => flags.contains(OFlags::APPEND) && !from_cache,
        _ => false,
    }
}

impl Inner {
    /// Writes down that an operation is about to be done. `None` when it was done by somebody who died, and has now been answered.
    pub(crate) fn once(&self, request: &Request, op: &Op<'_>, reply: Reply) -> Option<Reply> {
        if !self.log.is_kept() || !is_once(op) {
            return Some(reply);
        }
        let unique = request.unique();
        let mut reply = reply;
        let mut before = None;
        if unique.is_resent() {
            if let Some((error, bytes)) = self.past.answer(unique) {
                // Nobody waits any more: whatever the answer gave the kernel is not given; that is little, and ends with the hook.
                let _ = reply.repeat(error, bytes);
                return None;
            }
            before = self.past.begun(unique);
            if before.is_some() {
                reply = reply.begun_before();
            }
        }
        let before = before.unwrap_or_else(|| self.before(request, op));
        self.log.begin(unique, before);
        Some(match self.log.witness() {
            Some(witness) => reply.witnessed(witness),
            None => reply,
        })
    }

    /// What will tell whether it was done.
    fn before(&self, request: &Request, op: &Op<'_>) -> u64 {
        match op {
            Op::Write { fh, .. } => self
                .handles
                .get(*fh)
                .ok()
                .and_then(|handle| rustix::fs::fstat(handle.file.as_fd()).ok())
                .and_then(|stat| u64::try_from(stat.st_size).ok())
                .unwrap_or(0),
            Op::Rename { name, flags, .. } if flags.contains(RenameFlags::EXCHANGE) => {
                self.number_of(request.node(), name)
            }
            _ => 0,
        }
    }
}
