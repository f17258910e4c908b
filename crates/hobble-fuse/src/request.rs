//! One request of the kernel, owning its bytes.
//!
//! Invariant: the header was read and its length checked when the request was made; the rest is read on demand by
//! [`Request::op`], without copying.

use rustix::fs::OFlags;

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
        let pool = Pool::new(bytes.len(), 0);
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
        self.buffer.capacity()
    }
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request")
            .field("header", &self.header)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;
    use crate::{Features, abi};

    fn write(data: &[u8], flags: u32) -> Request {
        let body = abi::WriteIn {
            size: data.len() as u32,
            flags,
            ..Default::default()
        };
        let header = abi::InHeader {
            len: (abi::WRITE_PREFIX + data.len()) as u32,
            opcode: Opcode::Write as u32,
            ..Default::default()
        };
        let bytes = [header.as_bytes(), body.as_bytes(), data].concat();
        Request::from_bytes(
            &bytes,
            Protocol {
                minor: 45,
                features: Features::MIRROR,
            },
        )
        .unwrap()
    }

    fn data(request: &Request) -> &[u8] {
        match request.op().unwrap() {
            Op::Write { data, .. } => data,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn ten_thousand_waiting_writes_need_less_than_100_mib() {
        let total: usize = (0..10_000)
            .map(|_| write(&[1; 4096], 0).into_compact().footprint())
            .sum();
        assert!(total < 50 << 20, "{total} bytes");
        let direct = libc::O_DIRECT.cast_unsigned();
        let total: usize = (0..10_000)
            .map(|_| write(&[1; 4096], direct).into_compact().footprint())
            .sum();
        assert!(total < 100 << 20, "{total} bytes with O_DIRECT");
    }

    #[test]
    fn data_stays_aligned_where_the_backing_write_needs_it() {
        let aligned = |request: &Request| data(request).as_ptr().addr().is_multiple_of(4096);
        let contents: Vec<u8> = (0..=255).cycle().take(8192).collect();
        let request = write(&contents, libc::O_DIRECT.cast_unsigned());
        assert!(aligned(&request));
        let request = request.into_compact().into_compact();
        assert!(aligned(&request));
        assert_eq!(data(&request), contents);
        assert_eq!(data(&write(&contents, 0).into_compact()), contents);
    }
}
