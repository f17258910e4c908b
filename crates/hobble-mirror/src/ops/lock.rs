//! Lock requests, translated for the lock table.

use std::io;
use std::sync::Arc;

use hobble_fuse::decode::LockOp;
use hobble_fuse::{Caller, FileLock, NodeId, Reply};

use super::{fail, finish};
use crate::locks::{Ask, LockKind, LockRange, Owner};
use crate::mirror::Inner;

fn kind(kind: hobble_fuse::LockKind) -> Option<LockKind> {
    match kind {
        hobble_fuse::LockKind::Read => Some(LockKind::Read),
        hobble_fuse::LockKind::Write => Some(LockKind::Write),
        hobble_fuse::LockKind::Unlock => None,
    }
}

impl Inner {
    fn ask(&self, node: NodeId, op: &LockOp) -> io::Result<Ask> {
        let handle = self.handles.get(op.fh)?;
        Ok(Ask {
            node,
            fh: op.fh,
            file: Arc::clone(&handle.file),
            access: handle.access,
            owner: Owner {
                kernel: handle.canonical(op.owner),
                class: handle.class(),
            },
            pid: op.lock.pid,
            kind: kind(op.lock.kind),
            range: LockRange {
                start: op.lock.start,
                end: op.lock.end,
            },
        })
    }

    pub(crate) fn getlk(&self, node: NodeId, op: &LockOp, caller: Caller, reply: Reply) {
        if let Some(door) = self.doors.get(caller.tid) {
            // Asked by `F_OFD_GETLK` for the sake of the owner it names: the description itself.
            door.note_lock_owner(op.owner);
            reply.lock(&FileLock {
                kind: hobble_fuse::LockKind::Unlock,
                ..op.lock
            });
            return;
        }
        match self.ask(node, op).and_then(|ask| self.locks.test(&ask)) {
            Ok(Some(held)) => {
                reply.lock(&held);
            }
            Ok(None) => {
                reply.lock(&FileLock {
                    kind: hobble_fuse::LockKind::Unlock,
                    ..op.lock
                });
            }
            Err(error) => fail(reply, &error),
        }
    }

    pub(crate) fn setlk(&self, node: NodeId, op: &LockOp, wait: bool, reply: Reply) {
        if op.flock {
            return match self.handles.get(op.fh) {
                Ok(handle) => self
                    .locks
                    .flock(&handle.file, kind(op.lock.kind), wait, reply),
                Err(error) => fail(reply, &error),
            };
        }
        self.locks.saw(node, op.owner);
        match self.ask(node, op) {
            Ok(ask) if wait => self.locks.set_wait(ask, reply),
            Ok(ask) => finish(reply, self.locks.set(&ask)),
            Err(error) => fail(reply, &error),
        }
    }
}
