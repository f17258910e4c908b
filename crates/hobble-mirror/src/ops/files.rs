//! Open files and directories: opening, data, and closing.
//!
//! Length: all operations on open files.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hobble_fuse::decode::CopyRange;
use hobble_fuse::types::{OpenMode, Opened, Whence};
use hobble_fuse::{Backing, Caller, Delivery, Fh, LockOwner, NodeId, Reply, Request, Unique};
use hobble_rules::Decision;
use rustix::fs::{FallocateFlags, OFlags, SeekFrom, Statx};
use rustix::io::ReadWriteFlags;

use super::{Turn, act_as, error, fail, finish, setid_by, setid_of};
use crate::adopt::Adopted;
use crate::door::{Door, Purpose};
use crate::handle::{Handle, New};
use crate::lock::lock;
use crate::locks::Owner;
use crate::mirror::Inner;
use crate::store::Node;

/// What of the flags of an open concerns the backing file: the access mode, and how reads and writes behave. The kernel has dealt with the rest.
pub(super) fn client_flags(flags: OFlags) -> OFlags {
    flags
        & (OFlags::ACCMODE
            | OFlags::APPEND
            | OFlags::DIRECT
            | OFlags::DSYNC
            | OFlags::SYNC
            | OFlags::NOATIME
            | OFlags::NONBLOCK
            | OFlags::TRUNC)
}

/// A new handle, how the kernel shall treat it, and the backing file for its I/O.
type Entered = (Arc<Handle>, OpenMode, Option<Arc<Backing>>);

/// A page, on any machine whose pages are not larger.
const PAGE: u64 = 4096;

impl Inner {
    /// Opens a node's file as the caller would have.
    pub(super) fn open_file(
        &self,
        node: &Arc<Node>,
        flags: OFlags,
        kill_suidgid: bool,
        caller: Caller,
    ) -> io::Result<OwnedFd> {
        let flags = client_flags(flags);
        self.with_descriptors(|| {
            let _as_caller = act_as(caller, setid_by(kill_suidgid))?;
            match self.store.open(node, flags | OFlags::CLOEXEC) {
                // Unlinked behind our back, but still open.
                Err(stale) if stale.raw_os_error() == Some(libc::ESTALE) => {
                    let other = self.handles.any_of(node).ok_or(stale)?;
                    crate::fd::reopen(other.as_fd(), flags)
                }
                other => other,
            }
        })
    }

    pub(crate) fn open(
        &self,
        id: NodeId,
        flags: OFlags,
        kill_suidgid: bool,
        caller: Caller,
        reply: Reply,
    ) {
        let opened = self.node(id).and_then(|node| {
            if let Some(door) = self.doors.get(caller.tid)
                && let Some(handle) =
                    self.open_for_door(&door, &node, flags, caller, reply.unique().original())?
            {
                return Ok(handle);
            }
            let file = self.open_file(&node, flags, kill_suidgid, caller)?;
            Ok(self.enter(New {
                direct: self.rules.intercepts_data(self, &node),
                node,
                file: Arc::new(file),
                adopted: None,
                flags,
                opener: caller.tid,
                made_for: reply.unique().original(),
            }))
        });
        match opened {
            Ok((handle, mode, backing)) => {
                let opened = Opened {
                    fh: handle.fh,
                    mode,
                    backing: backing.as_deref(),
                };
                if reply.opened(&opened) == Delivery::Gone {
                    self.close(handle.fh);
                }
            }
            Err(error) => fail(reply, &error),
        }
    }

    /// Makes a handle for an open file.
    ///
    /// The plan may change meanwhile. A change looks at all handles after it has taken effect ([`Inner::set_plan`]) and waits for operations in progress before it
    /// does, so a handle made under the old plan is seen by it. The names may change as well, and whoever changes them looks at the handles that are there then: so they are
    /// looked at once more when this one is.
    fn enter(&self, new: New) -> Entered {
        let mut handle = self.handles.insert(new.clone());
        if !handle.direct && self.rules.intercepts_data(self, &new.node) {
            self.handles.remove(handle.fh);
            handle = self.handles.insert(New {
                direct: true,
                ..new
            });
        }
        let chosen = self.enter_io(
            &handle.node,
            &handle.file,
            handle.opened_with,
            handle.direct,
        );
        (handle, chosen.mode, chosen.backing)
    }

    /// What a door thread opens is bound to a description that there is already.
    fn open_for_door(
        &self,
        door: &Door,
        node: &Arc<Node>,
        flags: OFlags,
        caller: Caller,
        made_for: Unique,
    ) -> io::Result<Option<Entered>> {
        let (file, adopted) = match door.purpose() {
            Purpose::Look => return Ok(None),
            Purpose::StandIn(adopted) => {
                if adopted.node.id != node.id {
                    // The path leads elsewhere by now.
                    return Err(error(libc::ESTALE));
                }
                (Arc::clone(&adopted.original), Some(adopted))
            }
            Purpose::Again(handle) => {
                if handle.node.id != node.id {
                    return Err(error(libc::ESTALE));
                }
                (Arc::clone(&handle.file), handle.adopted.clone())
            }
        };
        let entered = self.enter(New {
            direct: self.rules.intercepts_data(self, node),
            node: Arc::clone(node),
            file,
            adopted,
            flags,
            opener: caller.tid,
            made_for,
        });
        door.note_opened(entered.0.fh);
        Ok(Some(entered))
    }

    /// O_TMPFILE by a door thread: the description that it stands for, whose file can be linked later because the kernel remembers how this one was made
    /// (kernel-hazards A9).
    pub(super) fn tmpfile_for_door(
        &self,
        node: &Arc<Node>,
        flags: OFlags,
        caller: Caller,
        reply: Reply,
    ) {
        let made = self
            .doors
            .get(caller.tid)
            .ok_or_else(|| error(libc::EINVAL))
            .and_then(|door| {
                let stat = crate::store::stat(self.fd_of(node)?.as_fd())?;
                let entered = self
                    .open_for_door(&door, node, flags, caller, reply.unique().original())?
                    .ok_or_else(|| error(libc::EINVAL))?;
                self.store.reference(node);
                Ok((stat, entered))
            });
        match made {
            Ok((stat, entered)) => {
                self.answer_opened(node, &stat, entered, reply, &Decision::default())
            }
            Err(error) => fail(reply, &error),
        }
    }

    /// The answer to CREATE and TMPFILE; the caller holds the node's reference for the kernel.
    pub(super) fn answer_created(
        &self,
        node: &Arc<Node>,
        stat: &Statx,
        (file, flags): (OwnedFd, OFlags),
        turn: Turn<'_>,
        reply: Reply,
    ) {
        let Turn { caller, decision } = turn;
        let file = match self.nativized(node, file, flags) {
            Ok(file) => file,
            Err(error) => {
                self.store.forget(node.id, 1);
                return fail(reply, &error);
            }
        };
        let entered = self.enter(New {
            direct: self.rules.intercepts_data(self, node),
            node: Arc::clone(node),
            file: Arc::new(file),
            adopted: None,
            flags,
            opener: caller.tid,
            made_for: reply.unique().original(),
        });
        self.answer_opened(node, stat, entered, reply, decision);
    }

    /// What was created through our own mount, opened on the target's.
    fn nativized(&self, node: &Arc<Node>, file: OwnedFd, flags: OFlags) -> io::Result<OwnedFd> {
        if !self.store.has_native() {
            return Ok(file);
        }
        self.with_descriptors(|| {
            self.store.open(
                node,
                client_flags(flags).difference(OFlags::TRUNC) | OFlags::CLOEXEC,
            )
        })
    }

    fn answer_opened(
        &self,
        node: &Arc<Node>,
        stat: &Statx,
        (handle, mode, backing): Entered,
        reply: Reply,
        decision: &Decision,
    ) {
        let entry = self.entry(node, stat, decision);
        let opened = Opened {
            fh: handle.fh,
            mode,
            backing: backing.as_deref(),
        };
        if reply.created(&entry, &opened) == Delivery::Gone {
            self.close(handle.fh);
            self.store.forget(node.id, 1);
        }
    }

    pub(crate) fn opendir(&self, id: NodeId, flags: OFlags, caller: Caller, reply: Reply) {
        let opened = self.node(id).and_then(|node| {
            let mut file = None;
            let mut adopted: Option<Arc<Adopted>> = None;
            if let Some(door) = self.doors.get(caller.tid) {
                match door.purpose() {
                    Purpose::StandIn(wanted) if wanted.node.id == node.id => {
                        file = Some(Arc::clone(&wanted.original));
                        adopted = Some(wanted);
                    }
                    Purpose::Again(handle) if handle.node.id == node.id => {
                        file = Some(Arc::clone(&handle.file));
                        adopted.clone_from(&handle.adopted);
                    }
                    _ => {}
                }
            }
            let bound = file.is_some();
            let file = match file {
                Some(file) => file,
                None => Arc::new(self.with_descriptors(|| {
                    let _as_caller = act_as(caller, setid_of(caller))?;
                    let how = OFlags::RDONLY
                        | OFlags::DIRECTORY
                        | OFlags::CLOEXEC
                        | (flags & OFlags::NOATIME);
                    self.store.open(&node, how)
                })?),
            };
            let handle = self.handles.insert(New {
                node,
                file,
                adopted,
                flags,
                direct: false,
                opener: caller.tid,
                made_for: reply.unique().original(),
            });
            if bound && let Some(door) = self.doors.get(caller.tid) {
                door.note_opened(handle.fh);
            }
            Ok(handle)
        });
        match opened {
            Ok(handle) => {
                let opened = Opened {
                    fh: handle.fh,
                    mode: OpenMode::empty(),
                    backing: None,
                };
                if reply.opened(&opened) == Delivery::Gone {
                    self.close(handle.fh);
                }
            }
            Err(error) => fail(reply, &error),
        }
    }

    pub(crate) fn read(
        &self,
        request: &Request,
        (fh, flags): (Fh, OFlags),
        (offset, size): (u64, u32),
        paged: bool,
        reply: Reply,
        decision: &Decision,
    ) {
        let mut buffer = request.data_buffer(size);
        let read = self.handles.get(fh).and_then(|handle| {
            handle.follow_flags(flags)?;
            let read = rustix::io::pread(handle.file.as_fd(), &mut *buffer, offset)?;
            Ok((handle, read))
        });
        match read {
            Ok((handle, read)) => {
                buffer.truncate(read);
                for corruption in &decision.corrupt {
                    corruption.apply(&mut buffer);
                }
                reply.buffer(buffer);
                if paged && handle.direct {
                    // sendfile and splice fill the page cache even here (fuse_splice_read, fs/fuse/file.c): what the next one finds there would be stale and
                    // would hide faults. Only direct reads name a lock owner.
                    self.drop_pages(&handle.node, offset, u64::from(size));
                }
            }
            Err(error) => fail(reply, &error),
        }
    }

    fn drop_pages(&self, node: &Node, offset: u64, len: u64) {
        let Some(kernel) = self.kernel.get() else {
            return;
        };
        let start = offset / PAGE * PAGE;
        let len = offset + len - start;
        if let (Ok(start), Ok(len)) = (i64::try_from(start), i64::try_from(len)) {
            kernel.inval_inode(node.id, start, len);
        }
    }

    pub(crate) fn write(
        &self,
        (fh, flags): (Fh, OFlags),
        offset: u64,
        data: &[u8],
        (kill_suidgid, from_cache): (bool, bool),
        turn: Turn<'_>,
        reply: Reply,
    ) {
        let Turn { caller, decision } = turn;
        let mut altered;
        let data = if decision.corrupt.is_empty() {
            data
        } else {
            altered = Aligned::copy(data);
            for corruption in &decision.corrupt {
                corruption.apply(altered.bytes());
            }
            altered.bytes()
        };
        let written = self.handles.get(fh).and_then(|handle| {
            // Pages written back say nothing about the flags or the caller of any write.
            if !from_cache {
                handle.follow_flags(flags)?;
            }
            if reply.may_be_done()
                && let Some(before) = self.past.begun(reply.unique())
                && is_appended(handle.file.as_fd(), before, data)?
            {
                return Ok(data.len());
            }
            let how = write_flags(flags, &handle, from_cache);
            let _as_caller = act_as(caller, setid_by(kill_suidgid))?;
            if how.is_empty() {
                Ok(rustix::io::pwrite(handle.file.as_fd(), data, offset)?)
            } else {
                Ok(rustix::io::pwritev2(
                    handle.file.as_fd(),
                    &[io::IoSlice::new(data)],
                    offset,
                    how,
                )?)
            }
        });
        match written {
            Ok(written) => {
                reply.written(u32::try_from(written).unwrap_or(u32::MAX));
            }
            Err(error) => fail(reply, &error),
        }
    }

    pub(crate) fn release(&self, fh: Fh, reply: Reply) {
        self.close(fh);
        reply.ok();
    }

    /// The kernel knows this handle no more (or never did).
    pub(super) fn close(&self, fh: Fh) {
        let Some(handle) = self.handles.remove(fh) else {
            return;
        };
        if handle.node.is_regular() {
            self.end_locks(&handle);
            self.leave_io(&handle.node, &handle.file);
        }
        // With its last stand-in a moved description is closed, unless somebody else has it open: the program, once it was given back.
        if let Some(adopted) = &handle.adopted {
            let same = |other: &Arc<Handle>| {
                other
                    .adopted
                    .as_ref()
                    .is_some_and(|other| Arc::ptr_eq(other, adopted))
            };
            if !self.handles.all().iter().any(same) {
                self.disown(adopted.id);
            }
        }
    }

    /// What becomes of the locks of a handle that is gone.
    fn end_locks(&self, handle: &Handle) {
        let node = handle.node.id;
        if handle.superseded.load(Ordering::Acquire)
            && let Some(successor) = *lock(&handle.successor)
            && self.handles.get(successor).is_ok()
        {
            return self.locks.succeed(node, handle.fh, successor);
        }
        if handle.given_back.load(Ordering::Acquire) {
            let ofd = handle.ofd_owner().map(|owner| Self::owner(handle, owner));
            return self.locks.release_given_back(node, handle.fh, ofd);
        }
        if let Some(adopted) = &handle.adopted
            && !adopted.replaced.load(Ordering::Acquire)
            && let Some(owner) = handle.ofd_owner()
        {
            // Held on the original, with which its program goes on.
            self.locks.leave(node, Self::owner(handle, owner));
        }
        self.locks.release(node, handle.fh);
    }

    fn owner(handle: &Handle, owner: LockOwner) -> Owner {
        Owner {
            kernel: owner,
            class: handle.class(),
        }
    }

    /// Drops the POSIX locks of a process that closes a descriptor; not when it was exchanged for another (then they have
    /// moved, or are about to), nor when it is the copy by which a stand-in comes to the program: in a later round of the same attachment the process's locks are here
    /// already.
    pub(crate) fn flush_locks(&self, fh: Fh, owner: LockOwner) {
        let Ok(handle) = self.handles.get(fh) else {
            return;
        };
        if handle.superseded.load(Ordering::Acquire) || handle.given_back.load(Ordering::Acquire) {
            return;
        }
        let is_arriving =
            handle.arrives.load(Ordering::Acquire) > self.arrivals.load(Ordering::Acquire);
        let is_copy = is_arriving || handle.is_successor.load(Ordering::Acquire);
        if is_copy && self.quiet.load(Ordering::Acquire) {
            return;
        }
        self.locks
            .flush(handle.node.id, Self::owner(&handle, owner));
    }

    pub(crate) fn flush(&self, fh: Fh, owner: LockOwner, reply: Reply) {
        let flushed = self.handles.get(fh).and_then(|handle| {
            self.flush_locks(fh, owner);
            if handle.is_writable() && handle.node.is_regular() {
                // Filesystems that report late errors at close (NFS) do so at any close of the description.
                crate::sys::path::close(rustix::io::fcntl_dupfd_cloexec(handle.file.as_fd(), 0)?)?;
            }
            Ok(())
        });
        if self.flushless.load(Ordering::Acquire) {
            reply.error(hobble_fuse::Errno::NOSYS);
            return;
        }
        finish(reply, flushed);
    }

    pub(crate) fn fsync(&self, fh: Fh, datasync: bool, reply: Reply) {
        let synced = self.handles.get(fh).and_then(|handle| {
            let file = handle.file.as_fd();
            let synced = if datasync {
                rustix::fs::fdatasync(file)
            } else {
                rustix::fs::fsync(file)
            };
            Ok(synced?)
        });
        finish(reply, synced);
    }

    pub(crate) fn fallocate(
        &self,
        fh: Fh,
        (offset, length): (u64, u64),
        mode: FallocateFlags,
        caller: Caller,
        reply: Reply,
    ) {
        let done = self.handles.get(fh).and_then(|handle| {
            let _as_caller = act_as(caller, setid_of(caller))?;
            Ok(rustix::fs::fallocate(
                handle.file.as_fd(),
                mode,
                offset,
                length,
            )?)
        });
        finish(reply, done);
    }

    pub(crate) fn lseek(&self, fh: Fh, offset: u64, whence: Whence, reply: Reply) {
        let found = self.handles.get(fh).and_then(|handle| {
            let from = match whence {
                Whence::Set => SeekFrom::Start(offset),
                Whence::Current => SeekFrom::Current(offset.cast_signed()),
                Whence::End => SeekFrom::End(offset.cast_signed()),
                Whence::Data => SeekFrom::Data(offset),
                Whence::Hole => SeekFrom::Hole(offset),
            };
            // Moves the position of our description, which nobody uses: data goes to explicit offsets, and a moved description gets its
            // position back when it is given back.
            Ok(rustix::fs::seek(handle.file.as_fd(), from)?)
        });
        match found {
            Ok(offset) => {
                reply.lseek(offset);
            }
            Err(error) => fail(reply, &error),
        }
    }

    pub(crate) fn copy_file_range(&self, copy: &CopyRange, caller: Caller, reply: Reply) {
        let copied = self.handles.get(copy.source).and_then(|source| {
            let target = self.handles.get(copy.target)?;
            if copy.flags != 0 {
                return Err(error(libc::EINVAL));
            }
            let (mut from, mut to) = (copy.source_offset, copy.target_offset);
            let len = usize::try_from(copy.len).unwrap_or(usize::MAX);
            let _as_caller = act_as(caller, setid_of(caller))?;
            Ok(rustix::fs::copy_file_range(
                source.file.as_fd(),
                Some(&mut from),
                target.file.as_fd(),
                Some(&mut to),
                len,
            )?)
        });
        match copied {
            Ok(bytes) => {
                reply.copied(bytes as u64);
            }
            Err(error) => fail(reply, &error),
        }
    }

    pub(crate) fn syncfs(&self, reply: Reply) {
        let synced = self.store.sync();
        finish(reply, synced);
    }
}

/// Whether these bytes are somewhere behind what was the end of the file before a write that appends them was begun. Others may have appended too.
fn is_appended(file: BorrowedFd<'_>, before: u64, data: &[u8]) -> io::Result<bool> {
    /// More is not looked through: what is appended while a server dies is as much as was under way.
    const MOST: u64 = 64 << 20;
    let size = rustix::fs::fstat(file)?.st_size;
    let added = u64::try_from(size).unwrap_or(0).saturating_sub(before);
    if data.is_empty() || added < data.len() as u64 {
        return Ok(false);
    }
    // By a description of our own: the program's may not read, and what O_DIRECT demands of a buffer does not matter then.
    let reader = crate::fd::reopen(file, OFlags::RDONLY | OFlags::CLOEXEC)?;
    let mut bytes = vec![0; usize::try_from(added.min(MOST)).unwrap_or_default()];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match rustix::io::pread(&reader, rest, before + filled as u64)? {
            0 => break,
            read => filled += read,
        }
    }
    bytes.truncate(filled);
    Ok(bytes.windows(data.len()).any(|window| window == data))
}

/// How one write differs from what the description does by itself: RWF_DSYNC and RWF_SYNC arrive as flags of the file (`fuse_write_flags`, fs/fuse/file.c).
fn write_flags(flags: OFlags, handle: &Handle, from_cache: bool) -> ReadWriteFlags {
    if from_cache {
        return if handle.status().contains(OFlags::APPEND) {
            NOAPPEND
        } else {
            ReadWriteFlags::empty()
        };
    }
    if flags.contains(OFlags::SYNC) && !handle.opened_with.contains(OFlags::SYNC) {
        return ReadWriteFlags::SYNC;
    }
    if flags.contains(OFlags::DSYNC) && !handle.opened_with.contains(OFlags::DSYNC) {
        return ReadWriteFlags::DSYNC;
    }
    ReadWriteFlags::empty()
}

/// `RWF_NOAPPEND` (Linux 6.9): pages go where they belong whatever the description says.
const NOAPPEND: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x20);

/// A copy of data whose first byte is at the start of a page, as direct I/O demands.
struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn copy(data: &[u8]) -> Self {
        let page = PAGE as usize;
        let mut memory = vec![0; data.len() + page];
        let start = memory.as_ptr().align_offset(page).min(page);
        if let Some(target) = memory.get_mut(start..start + data.len()) {
            target.copy_from_slice(data);
        }
        Self {
            memory,
            start,
            len: data.len(),
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        self.memory
            .get_mut(self.start..self.start + self.len)
            .unwrap_or_default()
    }
}
