//! Names: finding, making, moving and removing them.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use hobble_fuse::types::decode_rdev;
use hobble_fuse::{Caller, Creation, Delivery, NodeId, Reply};
use hobble_rules::Decision;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags};

use super::{Turn, act_as, create_as, error, fail, finish, setid_of};
use crate::door::Door;
use crate::mirror::Inner;
use crate::store::{Found, Node, resolve, stat};

/// Success, where an operation may have been done before and this errno is what it gets for being done twice.
pub(super) fn if_done(reply: &Reply, error: io::Error, twice: i32) -> io::Result<()> {
    if reply.may_be_done() && error.raw_os_error() == Some(twice) {
        Ok(())
    } else {
        Err(error)
    }
}

impl Inner {
    /// The number of the inode that a name leads to; 0 for none.
    pub(crate) fn number_of(&self, parent: NodeId, name: &CStr) -> u64 {
        self.parent(parent)
            .and_then(|directory| resolve(directory.as_fd(), name))
            .map_or(0, |found| found.stat.stx_ino)
    }

    pub(super) fn parent(&self, id: NodeId) -> io::Result<Arc<OwnedFd>> {
        let parent = self.node(id)?;
        if !parent.is_dir() {
            return Err(error(libc::ENOTDIR));
        }
        self.fd_of(&parent)
    }

    /// Finds a name and answers with its node, of which the kernel gains a reference.
    pub(crate) fn lookup(&self, parent: NodeId, name: &CStr, turn: Turn<'_>, reply: Reply) {
        let Turn { caller, decision } = turn;
        if let Some(door) = self.doors.get(caller.tid)
            && door.knows(parent, name.to_bytes())
        {
            return self.lookup_alias(&door, reply);
        }
        let found = match name.to_bytes() {
            b"." => self.again(parent),
            b".." => self.above(parent),
            _ => self.find(parent, name),
        };
        match found {
            Ok((node, found)) => self.answer_entry(&node, &found, reply, decision),
            Err(error) => fail(reply, &error),
        }
    }

    fn find(&self, parent: NodeId, name: &CStr) -> io::Result<(Arc<Node>, rustix::fs::Statx)> {
        let directory = self.parent(parent)?;
        let found = self
            .with_descriptors(|| resolve(directory.as_fd(), name))
            .map_err(|error| self.if_alive(parent, error))?;
        let stat = found.stat;
        let node = self.store.acquire(found)?;
        if node.learn(&self.store, parent, name.to_bytes(), stat.stx_nlink) {
            self.names_changed(&[&node]);
        }
        self.relieve();
        Ok((node, stat))
    }

    /// A directory that was removed behind our back holds nothing; ESTALE has the kernel look the whole path up again instead of believing that
    /// (fs/namei.c `filename_lookup`). One that was removed through the hook is really empty.
    fn if_alive(&self, directory: NodeId, error: io::Error) -> io::Error {
        if error.raw_os_error() != Some(libc::ENOENT) {
            return error;
        }
        let removed = || {
            let node = self.node(directory)?;
            Ok::<_, io::Error>(!node.is_kept() && stat(self.fd_of(&node)?.as_fd())?.stx_nlink == 0)
        };
        if removed().unwrap_or(false) {
            super::error(libc::ESTALE)
        } else {
            error
        }
    }

    /// LOOKUP of `.`: the kernel has a file handle and wants the inode back.
    fn again(&self, id: NodeId) -> io::Result<(Arc<Node>, rustix::fs::Statx)> {
        let node = self.node(id)?;
        let found = self.found(&node)?;
        let stat = found.stat;
        Ok((self.store.acquire(found)?, stat))
    }

    fn above(&self, id: NodeId) -> io::Result<(Arc<Node>, rustix::fs::Statx)> {
        if id == NodeId::ROOT {
            // Never out of the mirrored tree.
            return self.again(id);
        }
        let directory = self.parent(id)?;
        let found = resolve(directory.as_fd(), c"..")?;
        let stat = found.stat;
        Ok((self.store.acquire(found)?, stat))
    }

    fn found(&self, node: &Arc<Node>) -> io::Result<Found> {
        let fd = self.fd_of(node)?.try_clone()?;
        let stat = stat(fd.as_fd())?;
        Ok(Found { fd, stat })
    }

    fn answer_entry(
        &self,
        node: &Node,
        stat: &rustix::fs::Statx,
        reply: Reply,
        decision: &Decision,
    ) {
        let entry = self.entry(node, stat, decision);
        if reply.entry(&entry) == Delivery::Gone {
            self.store.forget(node.id, 1);
        }
    }

    /// A name that exists for one door thread only leads to the inode it is about to open.
    fn lookup_alias(&self, door: &Door, reply: Reply) {
        let answered = door.adopted_node().map(|node| {
            let found = self.found(&node)?;
            let stat = found.stat;
            // One more reference to this very node, which may be known by no other means.
            self.store.reference(&node);
            Ok::<_, io::Error>((node, stat))
        });
        match answered {
            Some(Ok((node, stat))) => {
                let mut entry = self.entry(&node, &stat, &Decision::default());
                // Nobody else may find it: every other walk asks again, and is told that there is no such name.
                entry.entry_valid = Duration::ZERO;
                if reply.entry(&entry) == Delivery::Gone {
                    self.store.forget(node.id, 1);
                }
            }
            Some(Err(error)) => fail(reply, &error),
            None => fail(reply, &error(libc::ENOENT)),
        }
    }

    /// Finds what was just made and answers with it.
    fn answer_made(
        &self,
        parent: NodeId,
        name: &CStr,
        made: io::Result<()>,
        reply: Reply,
        decision: &Decision,
    ) {
        let made = made.or_else(|error| if_done(&reply, error, libc::EEXIST));
        match made.and_then(|()| self.find(parent, name)) {
            Ok((node, stat)) => self.answer_entry(&node, &stat, reply, decision),
            Err(error) => fail(reply, &error),
        }
    }

    pub(crate) fn symlink(
        &self,
        parent: NodeId,
        name: &CStr,
        target: &CStr,
        creation: &Creation<'_>,
        turn: Turn<'_>,
        reply: Reply,
    ) {
        let Turn { caller, decision } = turn;
        let made = self.parent(parent).and_then(|directory| {
            let _as_caller = create_as(caller, creation)?;
            Ok(rustix::fs::symlinkat(target, &*directory, name)?)
        });
        self.answer_made(parent, name, made, reply, decision);
    }

    pub(crate) fn mknod(
        &self,
        parent: NodeId,
        name: &CStr,
        (mode, rdev): (u32, u32),
        creation: &Creation<'_>,
        turn: Turn<'_>,
        reply: Reply,
    ) {
        let Turn { caller, decision } = turn;
        let made = self.parent(parent).and_then(|directory| {
            let _as_caller = create_as(caller, creation)?;
            let (major, minor) = decode_rdev(rdev);
            let device = rustix::fs::makedev(major, minor);
            let (kind, mode) = (
                FileType::from_raw_mode(mode),
                Mode::from_bits_retain(mode & 0o7777),
            );
            Ok(rustix::fs::mknodat(&*directory, name, kind, mode, device)?)
        });
        self.answer_made(parent, name, made, reply, decision);
    }

    pub(crate) fn mkdir(
        &self,
        parent: NodeId,
        name: &CStr,
        mode: u32,
        creation: &Creation<'_>,
        turn: Turn<'_>,
        reply: Reply,
    ) {
        let Turn { caller, decision } = turn;
        let made = self.parent(parent).and_then(|directory| {
            let _as_caller = create_as(caller, creation)?;
            Ok(rustix::fs::mkdirat(
                &*directory,
                name,
                Mode::from_bits_retain(mode & 0o7777),
            )?)
        });
        self.answer_made(parent, name, made, reply, decision);
    }

    /// What a name leads to, if the kernel knows it, with the descriptor of the search.
    fn known(&self, directory: &OwnedFd, name: &CStr) -> Option<(Arc<Node>, Found)> {
        let found = resolve(directory.as_fd(), name).ok()?;
        let node = self.store.peek(&found)?;
        Some((node, found))
    }

    /// A name is about to go. A node whose last name it is keeps a descriptor: a file handle leads nowhere once the inode is only held by the programs that
    /// the kernel knows of (an `O_PATH` descriptor, a working directory).
    fn keep_if_last(node: &Node, found: Found) {
        if node.is_dir() || found.stat.stx_nlink <= 1 {
            node.keep(Arc::new(found.fd));
        }
    }

    pub(crate) fn unlink(
        &self,
        parent: NodeId,
        name: &CStr,
        directory: bool,
        caller: Caller,
        reply: Reply,
    ) {
        let removed = self.parent(parent).and_then(|parent_fd| {
            let known = self.known(&parent_fd, name).map(|(node, found)| {
                Self::keep_if_last(&node, found);
                node
            });
            let flags = if directory {
                AtFlags::REMOVEDIR
            } else {
                AtFlags::empty()
            };
            let _as_caller = act_as(caller, setid_of(caller))?;
            rustix::fs::unlinkat(&*parent_fd, name, flags)
                .or_else(|errno| if_done(&reply, errno.into(), libc::ENOENT))?;
            if let Some(node) = known {
                node.change_names(|names| names.lose(parent, name.to_bytes()));
            }
            Ok(())
        });
        finish(reply, removed);
    }

    pub(crate) fn rename(
        &self,
        (parent, name): (NodeId, &CStr),
        (new_parent, new_name): (NodeId, &CStr),
        flags: RenameFlags,
        caller: Caller,
        reply: Reply,
    ) {
        let renamed = self.parent(parent).and_then(|from| {
            let to = self.parent(new_parent)?;
            let moved = self.known(&from, name).map(|(node, _)| node);
            let met = self.known(&to, new_name);
            let exchange = flags.contains(RenameFlags::EXCHANGE);
            let is_exchanged = exchange
                && reply.may_be_done()
                && self.past.begun(reply.unique()).is_some_and(|before| {
                    moved
                        .as_ref()
                        .is_none_or(|moved| moved.inode.number != before)
                });
            let met = met.map(|(node, found)| {
                if !exchange {
                    Self::keep_if_last(&node, found);
                }
                node
            });
            {
                let _as_caller = act_as(caller, setid_of(caller))?;
                if !is_exchanged {
                    rustix::fs::renameat_with(&*from, name, &*to, new_name, flags)
                        .or_else(|errno| if_done(&reply, errno.into(), libc::ENOENT))?;
                }
            }
            let (old, new) = ((parent, name.to_bytes()), (new_parent, new_name.to_bytes()));
            if let Some(met) = &met {
                met.change_names(|names| {
                    if exchange {
                        names.rename(new, old);
                        true
                    } else {
                        names.lose(new.0, new.1)
                    }
                });
            }
            if let Some(moved) = &moved {
                moved.change_names(|names| {
                    names.rename(old, new);
                    true
                });
            }
            let renamed: Vec<&Node> = [&moved, &met]
                .into_iter()
                .flatten()
                .map(|node| &**node)
                .collect();
            if renamed.iter().any(|node| node.is_dir()) {
                self.store.directory_moved();
            }
            self.names_changed(&renamed);
            Ok(())
        });
        finish(reply, renamed);
    }

    pub(crate) fn link(
        &self,
        source: NodeId,
        parent: NodeId,
        name: &CStr,
        turn: Turn<'_>,
        reply: Reply,
    ) {
        let Turn { caller, decision } = turn;
        let linked = self.node(source).and_then(|node| {
            let file = self.fd_of(&node)?;
            let directory = self.parent(parent)?;
            let _as_caller = act_as(caller, setid_of(caller))?;
            // By the descriptor itself, not by following it: this works for symlinks and for O_TMPFILE as well.
            rustix::fs::linkat(&*file, c"", &*directory, name, AtFlags::EMPTY_PATH)
                .or_else(|errno| if_done(&reply, errno.into(), libc::EEXIST))
        });
        let found = linked.and_then(|()| self.find(parent, name));
        match found {
            Ok((node, stat)) => {
                // Its first name, perhaps (`O_TMPFILE`), which `find` makes nothing of.
                self.names_changed(&[&node]);
                self.answer_entry(&node, &stat, reply, decision);
            }
            Err(error) => fail(reply, &error),
        }
    }

    pub(crate) fn readlink(&self, node: NodeId, reply: Reply) {
        let target = self.node(node).and_then(|node| {
            let fd = self.fd_of(&node)?;
            Ok(rustix::fs::readlinkat(&*fd, c"", Vec::with_capacity(256))?)
        });
        match target {
            Ok(target) => {
                reply.data(target.to_bytes());
            }
            Err(error) => fail(reply, &error),
        }
    }

    /// Makes a file and opens it; or opens it, if somebody was faster and the caller does not mind.
    pub(crate) fn create(
        &self,
        parent: NodeId,
        name: &CStr,
        (flags, mode, kill_suidgid): (OFlags, u32, bool),
        creation: &Creation<'_>,
        turn: Turn<'_>,
        reply: Reply,
    ) {
        let caller = turn.caller;
        let created = self.parent(parent).and_then(|directory| {
            let wanted = super::files::client_flags(flags);
            let made = self.with_descriptors(|| {
                let _as_caller = create_as(caller, creation)?;
                let how =
                    wanted | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                Ok(rustix::fs::openat(
                    &*directory,
                    name,
                    how,
                    Mode::from_bits_retain(mode & 0o7777),
                )?)
            });
            let file = match made {
                Ok(file) => Some(file),
                Err(error)
                    if error.raw_os_error() == Some(libc::EEXIST)
                        && (!flags.contains(OFlags::EXCL) || reply.may_be_done()) =>
                {
                    None
                }
                Err(error) => return Err(error),
            };
            let (node, stat) = self.find(parent, name)?;
            let opened = match file {
                // Found under the name it was just given; if it is another file by now, that one is opened, as if the other had been there first.
                Some(file) if self.is(&node, &file) => Ok(file),
                _ if !node.is_regular() => Err(error(libc::ESTALE)),
                _ => self.open_file(&node, flags, kill_suidgid, caller),
            };
            match opened {
                Ok(file) => Ok((node, stat, file)),
                Err(error) => {
                    self.store.forget(node.id, 1);
                    Err(error)
                }
            }
        });
        match created {
            Ok((node, stat, file)) => self.answer_created(&node, &stat, (file, flags), turn, reply),
            Err(error) => fail(reply, &error),
        }
    }

    fn is(&self, node: &Arc<Node>, file: &OwnedFd) -> bool {
        let same = || {
            let (one, other) = (stat(self.fd_of(node)?.as_fd())?, stat(file.as_fd())?);
            Ok::<_, io::Error>(
                (one.stx_ino, one.stx_dev_major, one.stx_dev_minor)
                    == (other.stx_ino, other.stx_dev_major, other.stx_dev_minor),
            )
        };
        same().unwrap_or(false)
    }

    pub(crate) fn tmpfile(
        &self,
        parent: NodeId,
        flags: OFlags,
        mode: u32,
        creation: &Creation<'_>,
        turn: Turn<'_>,
        reply: Reply,
    ) {
        let caller = turn.caller;
        if let Some(door) = self.doors.get(caller.tid)
            && let Some(node) = door.adopted_node()
        {
            return self.tmpfile_for_door(&node, flags, caller, reply);
        }
        let created = self.parent(parent).and_then(|directory| {
            let file = self.with_descriptors(|| {
                let _as_caller = create_as(caller, creation)?;
                let how = super::files::client_flags(flags) | OFlags::TMPFILE | OFlags::CLOEXEC;
                let how = if flags.contains(OFlags::EXCL) {
                    how | OFlags::EXCL
                } else {
                    how
                };
                Ok(rustix::fs::openat(
                    &*directory,
                    c".",
                    how,
                    Mode::from_bits_retain(mode & 0o7777),
                )?)
            })?;
            let path = crate::fd::reopen_path(file.as_fd())?;
            let stat = stat(path.as_fd())?;
            let node = self.store.acquire(Found { fd: path, stat })?;
            // It has no name to be found by once the program's last descriptor is an O_PATH one.
            node.keep_open(&self.store)?;
            Ok((node, stat, file))
        });
        match created {
            Ok((node, stat, file)) => self.answer_created(&node, &stat, (file, flags), turn, reply),
            Err(error) => fail(reply, &error),
        }
    }
}
