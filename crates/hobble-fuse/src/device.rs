//! One open `/dev/fuse` with a connection behind it: reading requests, writing replies, registering backing files.
//!
//! Invariant: a message is written whole, by one system call; the kernel takes no other (`fuse_dev_do_write`, fs/fuse/dev.c).

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::abi;
use crate::ids::Unique;

/// What the server counts. All figures only grow, but for `readers`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Metrics {
    /// Requests read.
    pub requests: u64,
    /// Replies dropped unanswered: each is a bug of the service. The caller got EIO.
    pub replies_dropped: u64,
    /// Replies that came after the kernel had stopped waiting (ENOENT), which is normal after an abort.
    pub replies_late: u64,
    /// Replies that the kernel refused, which is a bug of this crate or of the service.
    pub replies_refused: u64,
    /// Requests whose bytes could not be read.
    pub malformed: u64,
    /// Requests with an opcode this crate does not know, answered ENOSYS.
    pub unknown_opcodes: u64,
    /// Injected errors sent.
    pub injected_errors: u64,
    /// Calls of the service that panicked.
    pub panics: u64,
    /// Reader threads at this moment.
    pub readers: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) requests: AtomicU64,
    pub(crate) replies_dropped: AtomicU64,
    pub(crate) replies_late: AtomicU64,
    pub(crate) replies_refused: AtomicU64,
    pub(crate) malformed: AtomicU64,
    pub(crate) unknown_opcodes: AtomicU64,
    pub(crate) injected_errors: AtomicU64,
    pub(crate) panics: AtomicU64,
    pub(crate) readers: AtomicU64,
}

pub(crate) fn bump(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Counters {
    pub(crate) fn snapshot(&self) -> Metrics {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Metrics {
            requests: get(&self.requests),
            replies_dropped: get(&self.replies_dropped),
            replies_late: get(&self.replies_late),
            replies_refused: get(&self.replies_refused),
            malformed: get(&self.malformed),
            unknown_opcodes: get(&self.unknown_opcodes),
            injected_errors: get(&self.injected_errors),
            panics: get(&self.panics),
            readers: get(&self.readers),
        }
    }
}

/// Shared by the readers, the replies and the kernel handle.
#[derive(Clone, Debug)]
pub struct Device {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    fd: OwnedFd,
    counters: Counters,
}

impl Device {
    /// Takes an open `/dev/fuse`.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self {
            inner: Arc::new(Inner {
                fd,
                counters: Counters::default(),
            }),
        }
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.inner.counters
    }

    /// Waits for a request and reads it.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        rustix::io::read(&self.inner.fd, buffer)
    }

    /// Writes the reply to `unique`.
    pub(crate) fn reply(&self, unique: Unique, error: i32, parts: &[&[u8]]) -> Result<(), Errno> {
        self.message(unique.0, error, parts)
    }

    /// Writes a notification.
    pub(crate) fn notify(&self, code: i32, parts: &[&[u8]]) -> Result<(), Errno> {
        self.message(0, code, parts)
    }

    fn message(&self, unique: u64, error: i32, parts: &[&[u8]]) -> Result<(), Errno> {
        let body: usize = parts.iter().map(|part| part.len()).sum();
        let len = u32::try_from(abi::OUT_HEADER_SIZE + body).map_err(|_| Errno::MSGSIZE)?;
        let header = abi::OutHeader { len, error, unique };
        let fd = &self.inner.fd;
        loop {
            let written = match parts {
                [] => rustix::io::write(fd, header.as_bytes()),
                [one] => {
                    rustix::io::writev(fd, &[IoSlice::new(header.as_bytes()), IoSlice::new(one)])
                }
                [one, two] => rustix::io::writev(
                    fd,
                    &[
                        IoSlice::new(header.as_bytes()),
                        IoSlice::new(one),
                        IoSlice::new(two),
                    ],
                ),
                many => {
                    let mut slices = Vec::with_capacity(many.len() + 1);
                    slices.push(IoSlice::new(header.as_bytes()));
                    slices.extend(many.iter().map(|part| IoSlice::new(part)));
                    rustix::io::writev(fd, &slices)
                }
            };
            match written {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Registers a backing file; the kernel keeps a reference of its own to it.
    pub(crate) fn backing_open(&self, fd: BorrowedFd<'_>) -> Result<u32, Errno> {
        crate::sys::backing_open(self.inner.fd.as_fd(), fd)
    }

    pub(crate) fn backing_close(&self, id: u32) -> Result<(), Errno> {
        crate::sys::backing_close(self.inner.fd.as_fd(), id)
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.fd.as_fd()
    }
}

impl From<OwnedFd> for Device {
    fn from(fd: OwnedFd) -> Self {
        Self::new(fd)
    }
}
