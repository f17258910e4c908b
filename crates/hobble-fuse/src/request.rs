//! One request of the kernel, owning its bytes.
//!
//! Invariant: the header was read and its length checked when the request was made; the rest is read on demand by
//! [`Request::op`], without copying.

use rustix::fs::OFlags;

use crate::abi;
use crate::buffer::{Buffer, DataBuffer, Pool};
use crate::decode::{self, DecodeError, Header, Op, Protocol};
use crate::ids::{Caller, NodeId, Unique};
use crate::opcode::Opcode;

/// A request. See [`crate::Service::call`].
pub struct Request {
    buffer: Buffer,
    pool: Pool,
    header: Header,
    protocol: Protocol,
    compact: bool,
}

impl Request {
    /// Takes over the first `len` bytes of a buffer.
    pub(crate) fn new(
        buffer: Buffer,
        len: usize,
        pool: Pool,
        protocol: Protocol,
    ) -> Result<Self, DecodeError> {
        let header = decode::header(buffer.request().get(..len).unwrap_or_default())?;
        Ok(Self {
            buffer,
            pool,
            header,
            protocol,
            compact: false,
        })
    }

    /// A request made by hand, for tests of a [`crate::Service`] without a kernel.
    ///
    /// # Errors
    /// When `bytes` has no valid header.
    pub fn from_bytes(bytes: &[u8], protocol: Protocol) -> Result<Self, DecodeError> {
        let pool = Pool::new(bytes.len(), 1);
        let mut buffer = pool.take();
        if let Some(target) = buffer.request_mut().get_mut(..bytes.len()) {
            target.copy_from_slice(bytes);
        }
        Self::new(buffer, bytes.len(), pool, protocol)
    }

    /// The header.
    #[must_use]
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// Who asks.
    #[must_use]
    pub const fn caller(&self) -> Caller {
        self.header.caller
    }

    /// The inode it is about.
    #[must_use]
    pub const fn node(&self) -> NodeId {
        self.header.node
    }

    /// The request's name.
    #[must_use]
    pub const fn unique(&self) -> Unique {
        self.header.unique
    }

    /// The opcode, if this crate knows it. A [`crate::Service`] is only called with those.
    #[must_use]
    pub const fn opcode(&self) -> Option<Opcode> {
        self.header.opcode()
    }

    /// The operation and its arguments, borrowed from the request. The data of a WRITE is aligned to
    /// [`crate::buffer::ALIGNMENT`] in memory (after [`Request::into_compact`], only if the file was opened with O_DIRECT).
    ///
    /// # Errors
    /// When the bytes are malformed; [`crate::Reply::malformed`] is the answer.
    pub fn op(&self) -> Result<Op<'_>, DecodeError> {
        decode::decode(self.bytes(), self.protocol)
    }

    /// Memory for the answer to a READ, of `size` bytes, aligned for O_DIRECT.
    #[must_use]
    pub fn data_buffer(&self, size: u32) -> DataBuffer {
        self.pool.data(usize::try_from(size).unwrap_or(usize::MAX))
    }

    /// Moves the request into memory of just its size, giving its large buffer back to the pool. To be done before a request
    /// waits: ten thousand waiting 4 KiB writes then need some 45 MiB.
    #[must_use]
    pub fn into_compact(self) -> Self {
        if self.compact {
            return self;
        }
        let direct =
            matches!(self.op(), Ok(Op::Write { flags, .. }) if flags.contains(OFlags::DIRECT));
        let buffer = self.buffer.compact(self.header.len, direct);
        Self {
            buffer,
            compact: true,
            ..self
        }
    }

    fn bytes(&self) -> &[u8] {
        self.buffer
            .request()
            .get(..self.header.len)
            .unwrap_or_default()
    }

    /// Bytes of memory held, for tests of the promise above.
    #[cfg(test)]
    pub(crate) fn footprint(&self) -> usize {
        self.buffer.request().len()
    }
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request")
            .field("header", &self.header)
            .finish_non_exhaustive()
    }
}

const _: () = assert!(abi::IN_HEADER_SIZE == 40);
