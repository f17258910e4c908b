//! Attributes, the filesystem's and the inodes', and the ioctls that are attributes by another name.

use std::io;
use std::os::fd::AsFd;

use hobble_fuse::types::{SetAttr, SetTime, StatFs};
use hobble_fuse::{Caller, Fh, NodeId, Reply};
use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, Statx, Timespec, Timestamps, Uid};

use super::{Turn, act_as, error, fail, setid_by, setid_of};
use crate::adopt::{IDENTIFY, Identity};
use crate::attr;
use crate::fd::ProcName;
use crate::mirror::Inner;
use crate::store::stat;
use crate::sys::identity::Setid;
use crate::sys::ioctl::{self, FsIoctl};

impl Inner {
    fn stat_of(&self, id: NodeId, fh: Option<Fh>) -> io::Result<Statx> {
        // Through the open file where there is one: it may be the only way left to the inode.
        if let Some(handle) = fh.and_then(|fh| self.handles.get(fh).ok()) {
            return stat(handle.file.as_fd());
        }
        stat(self.fd_of(&self.node(id)?)?.as_fd())
    }

    fn seen_by_door(&self, id: NodeId, caller: Caller) {
        if let Some(door) = self.doors.get(caller.tid) {
            door.note_seen(id);
        }
    }

    pub(crate) fn getattr(&self, id: NodeId, fh: Option<Fh>, turn: Turn<'_>, reply: Reply) {
        let Turn { caller, decision } = turn;
        self.seen_by_door(id, caller);
        match self
            .node(id)
            .and_then(|node| Ok((self.stat_of(id, fh)?, node)))
        {
            Ok((stat, node)) => {
                let attr = attr::forge(decision, attr::attr(node.inode, &stat));
                reply.attr(&attr, self.attr_valid(&node, decision));
            }
            Err(error) => fail(reply, &error),
        }
    }

    pub(crate) fn statx(&self, id: NodeId, fh: Option<Fh>, turn: Turn<'_>, reply: Reply) {
        let Turn { caller, decision } = turn;
        self.seen_by_door(id, caller);
        match self
            .node(id)
            .and_then(|node| Ok((self.stat_of(id, fh)?, node)))
        {
            Ok((stat, node)) => {
                reply.statx(
                    &attr::statx(decision, node.inode, &stat),
                    self.attr_valid(&node, decision),
                );
            }
            Err(error) => fail(reply, &error),
        }
    }

    pub(crate) fn setattr(&self, id: NodeId, change: &SetAttr, turn: Turn<'_>, reply: Reply) {
        let Turn { caller, decision } = turn;
        let changed = self.node(id).and_then(|node| {
            let fd = self.fd_of(&node)?;
            let file = change.fh.and_then(|fh| self.handles.get(fh).ok());
            if let Some(mode) = change.mode {
                // The kernel has taken away set-group-id already where the caller is not in the group (setattr_prepare, fs/attr.c).
                let _as_caller = act_as(caller, Setid::Keep)?;
                let name = ProcName::new(fd.as_fd());
                rustix::fs::chmodat(
                    CWD,
                    name.as_c_str(),
                    Mode::from_bits_retain(mode & 0o7777),
                    AtFlags::empty(),
                )?;
            }
            if change.uid.is_some() || change.gid.is_some() {
                // chown takes set-id bits away by itself (chown_common, fs/open.c).
                let _as_caller = act_as(caller, setid_of(caller))?;
                let (uid, gid) = (change.uid.map(Uid::from_raw), change.gid.map(Gid::from_raw));
                rustix::fs::chownat(fd.as_fd(), c"", uid, gid, AtFlags::EMPTY_PATH)?;
            }
            if let Some(size) = change.size {
                let _as_caller = act_as(caller, setid_by(change.kill_suidgid))?;
                match &file {
                    Some(handle) if handle.is_writable() => {
                        rustix::fs::ftruncate(handle.file.as_fd(), size)?
                    }
                    _ => {
                        let writable = self.with_descriptors(|| {
                            crate::fd::reopen(fd.as_fd(), OFlags::WRONLY | OFlags::NONBLOCK)
                        })?;
                        rustix::fs::ftruncate(writable.as_fd(), size)?;
                    }
                }
            }
            if change.atime.is_some() || change.mtime.is_some() {
                let _as_caller = act_as(caller, setid_of(caller))?;
                let times = Timestamps {
                    last_access: timespec(change.atime),
                    last_modification: timespec(change.mtime),
                };
                rustix::fs::utimensat(fd.as_fd(), c"", &times, AtFlags::EMPTY_PATH)?;
            }
            let stat = match &file {
                Some(handle) => stat(handle.file.as_fd())?,
                None => stat(fd.as_fd())?,
            };
            Ok((node, stat))
        });
        match changed {
            Ok((node, stat)) => {
                let attr = attr::forge(decision, attr::attr(node.inode, &stat));
                reply.attr(&attr, self.attr_valid(&node, decision));
            }
            Err(error) => fail(reply, &error),
        }
    }

    pub(crate) fn statfs(&self, id: NodeId, reply: Reply) {
        let found = self
            .node(id)
            .and_then(|node| Ok(rustix::fs::fstatvfs(self.fd_of(&node)?.as_fd())?));
        match found {
            Ok(found) => {
                reply.statfs(&StatFs::from(&found));
            }
            Err(error) => fail(reply, &error),
        }
    }

    pub(crate) fn ioctl(
        &self,
        fh: Fh,
        command: u32,
        data: &[u8],
        out_size: u32,
        caller: Caller,
        reply: Reply,
    ) {
        let done = self.handles.get(fh).and_then(|handle| {
            if command == IDENTIFY && self.doors.is_door(caller.tid) {
                return Ok((Identity::of(&handle).to_bytes().to_vec(), Identity::LEN));
            }
            // FITRIM and whatever else there is works on devices and filesystems beyond this tree.
            let known = FsIoctl::from_command(command).ok_or_else(|| error(libc::ENOTTY))?;
            let mut argument = [0; 32];
            if let Some((target, source)) = argument
                .get_mut(..known.len())
                .zip(data.get(..known.len().min(data.len())))
            {
                for (to, from) in target.iter_mut().zip(source) {
                    *to = *from;
                }
            }
            {
                let _as_caller = act_as(caller, setid_of(caller))?;
                ioctl::run(handle.file.as_fd(), known, &mut argument)?;
            }
            let len = if known.changes() { 0 } else { known.len() };
            Ok((argument.to_vec(), len))
        });
        match done {
            Ok((bytes, len)) => {
                let len = len.min(usize::try_from(out_size).unwrap_or(0));
                reply.ioctl(0, bytes.get(..len).unwrap_or_default());
            }
            Err(error) => fail(reply, &error),
        }
    }
}

fn timespec(time: Option<SetTime>) -> Timespec {
    match time {
        None => Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_OMIT,
        },
        Some(SetTime::Now) => Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_NOW,
        },
        Some(SetTime::At(time)) => Timespec {
            tv_sec: time.secs,
            tv_nsec: i64::from(time.nanos),
        },
    }
}
