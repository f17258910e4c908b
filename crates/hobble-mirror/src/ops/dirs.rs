//! Listings of directories.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::sync::Arc;

use hobble_fuse::dir::Full;
use hobble_fuse::{Delivery, DirBuilder, DirPlusBuilder, DirentKind, Fh, Reply};
use hobble_rules::Decision;
use rustix::fs::{FileType, RawDir, SeekFrom};

use super::fail;
use crate::handle::Handle;
use crate::lock::lock;
use crate::mirror::Inner;
use crate::store::{Inode, Node, Store, resolve};

/// What the backing filesystem says of one name.
struct Name<'a> {
    ino: u64,
    next: u64,
    kind: DirentKind,
    name: &'a std::ffi::CStr,
}

/// `S_IFMT` bits; `DT_UNKNOWN` where the filesystem does not say.
fn kind(kind: FileType) -> DirentKind {
    if kind == FileType::Unknown {
        DirentKind(0)
    } else {
        DirentKind::from_mode(kind.as_raw_mode())
    }
}

/// Memory for names: about what fits into the answer, since what does not is read again.
fn room(size: u32) -> usize {
    usize::try_from(size)
        .unwrap_or(usize::MAX)
        .clamp(1024, 64 * 1024)
}

impl Inner {
    /// Passes the names from `offset` on to `push` until that says it is full.
    fn list(
        handle: &Handle,
        offset: u64,
        room: usize,
        mut push: impl FnMut(Name<'_>) -> io::Result<Result<(), Full>>,
    ) -> io::Result<()> {
        let mut position = lock(&handle.directory);
        if *position != Some(offset) {
            rustix::fs::seek(handle.file.as_fd(), SeekFrom::Start(offset))?;
        }
        // Unknown until all that was read has been passed on.
        *position = None;
        let mut memory: Vec<MaybeUninit<u8>> = vec![MaybeUninit::uninit(); room];
        let mut entries = RawDir::new(handle.file.as_fd(), &mut memory);
        let mut last = offset;
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let next = entry.next_entry_cookie();
            let name = Name {
                ino: entry.ino(),
                next,
                kind: kind(entry.file_type()),
                name: entry.file_name(),
            };
            if push(name)?.is_err() {
                return Ok(());
            }
            last = next;
            if entries.is_buffer_empty() {
                *position = Some(last);
                break;
            }
        }
        if position.is_none() {
            *position = Some(last);
        }
        Ok(())
    }

    pub(crate) fn readdir(&self, fh: Fh, offset: u64, size: u32, reply: Reply) {
        let mut listing = DirBuilder::new(size);
        let listed = self.handles.get(fh).and_then(|handle| {
            let realm = handle.node.inode.realm;
            Self::list(&handle, offset, room(size), |name| {
                let ino = Store::visible_number(Inode {
                    realm,
                    number: name.ino,
                });
                Ok(listing.push(ino, name.next, name.kind, name.name.to_bytes()))
            })
        });
        match listed {
            Ok(()) => {
                reply.directory(listing);
            }
            // What was read before the error is shown; the error comes again.
            Err(_) if !listing.is_empty() => {
                reply.directory(listing);
            }
            Err(error) => fail(reply, &error),
        }
    }

    pub(crate) fn readdirplus(
        &self,
        fh: Fh,
        offset: u64,
        size: u32,
        reply: Reply,
        decision: &Decision,
    ) {
        let mut listing = DirPlusBuilder::new(size);
        // References taken for the kernel, to be given back if it does not get the answer.
        let mut taken: Vec<Arc<Node>> = Vec::new();
        let listed = self.handles.get(fh).and_then(|handle| {
            let directory = handle.node.inode.realm;
            // The handle may be on the target's own mount; nodes are looked up on ours, where alone they are the same nodes.
            let parent = self.fd_of(&handle.node)?;
            // Entries with attributes are about five times as long as those that are read.
            Self::list(&handle, offset, room(size / 4), |name| {
                let bytes = name.name.to_bytes();
                if !listing.fits(bytes.len()) {
                    return Ok(Err(Full));
                }
                let found = match bytes {
                    b"." | b".." => None,
                    _ => self
                        .with_descriptors(|| resolve(parent.as_fd(), name.name))
                        .ok(),
                };
                let node = found.and_then(|found| {
                    let stat = found.stat;
                    let node = self.store.acquire(found).ok()?;
                    if node.learn(&self.store, handle.node.id, bytes, stat.stx_nlink) {
                        self.names_changed(&[&node]);
                    }
                    Some((node, stat))
                });
                let pushed = match &node {
                    Some((node, stat)) => {
                        let entry = self.entry(node, stat, decision);
                        let kind = DirentKind::from_mode(u32::from(stat.stx_mode));
                        listing.push(Some(&entry), entry.attr.ino, name.next, kind, bytes)
                    }
                    None => {
                        let ino = Store::visible_number(Inode {
                            realm: directory,
                            number: name.ino,
                        });
                        listing.push(None, ino, name.next, name.kind, bytes)
                    }
                };
                if let Some((node, _)) = node {
                    if pushed.is_ok() {
                        taken.push(node);
                    } else {
                        self.store.forget(node.id, 1);
                    }
                }
                Ok(pushed)
            })
        });
        if let Err(error) = listed
            && listing.is_empty()
        {
            return fail(reply, &error);
        }
        if reply.directory_plus(listing) == Delivery::Gone {
            for node in taken {
                self.store.forget(node.id, 1);
            }
        }
        self.relieve();
    }
}
