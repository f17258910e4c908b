//! Memory for requests and replies.
//!
//! A buffer is large enough for the largest request, and places the payload of a WRITE at an address that is a multiple of
//! [`ALIGNMENT`]: 80 bytes of headers go just in front of it, so that one `read` of the device leaves data which an O_DIRECT
//! write of the backing file accepts. Buffers go back to their [`Pool`] when dropped; the pool keeps a bounded number.
//! Memory is zeroed once, when it is allocated, and lazily: pages that no request reaches are never touched.

use std::sync::{Arc, Mutex, PoisonError};

use crate::abi;

/// What O_DIRECT asks of addresses on any device in use: a page.
pub const ALIGNMENT: usize = 4096;

/// Memory with one aligned point in it.
struct Raw {
    bytes: Vec<u8>,
    /// Index of the aligned address; at least `abi::WRITE_PREFIX`.
    aligned: usize,
}

impl Raw {
    /// Room for `payload` bytes behind the aligned point and for the headers in front of it.
    fn new(payload: usize) -> Self {
        let bytes = vec![0; abi::WRITE_PREFIX + ALIGNMENT + payload];
        let prefix = bytes.as_ptr().wrapping_add(abi::WRITE_PREFIX);
        // align_offset may in theory say "impossible"; then the payload is merely not aligned and O_DIRECT fails.
        let aligned = abi::WRITE_PREFIX + prefix.align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { bytes, aligned }
    }

    fn request(&self) -> &[u8] {
        self.bytes
            .get(self.aligned - abi::WRITE_PREFIX..)
            .unwrap_or_default()
    }

    fn request_mut(&mut self) -> &mut [u8] {
        self.bytes
            .get_mut(self.aligned - abi::WRITE_PREFIX..)
            .unwrap_or_default()
    }

    fn payload(&self) -> &[u8] {
        self.bytes.get(self.aligned..).unwrap_or_default()
    }

    fn payload_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(self.aligned..).unwrap_or_default()
    }
}

/// Hands out buffers of one size and takes them back.
#[derive(Clone)]
pub struct Pool {
    inner: Arc<PoolInner>,
}

struct PoolInner {
    payload: usize,
    keep: usize,
    free: Mutex<Vec<Raw>>,
}

impl Pool {
    /// Buffers for payloads of up to `payload` bytes, of which at most `keep` are kept while unused.
    #[must_use]
    pub fn new(payload: usize, keep: usize) -> Self {
        let payload = payload.max(abi::MIN_READ_BUFFER);
        Self {
            inner: Arc::new(PoolInner {
                payload,
                keep,
                free: Mutex::new(Vec::new()),
            }),
        }
    }

    /// A buffer. Its contents are whatever the last user left.
    pub(crate) fn take(&self) -> Buffer {
        let free = self
            .inner
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let raw = free.unwrap_or_else(|| Raw::new(self.inner.payload));
        Buffer {
            raw: Some(raw),
            pool: Some(Arc::clone(&self.inner)),
        }
    }

    /// Memory for the answer to a READ of `size` bytes, aligned for O_DIRECT. Its contents are unspecified.
    #[must_use]
    pub fn data(&self, size: usize) -> DataBuffer {
        let buffer = if size <= self.inner.payload {
            self.take()
        } else {
            Buffer::sized(size)
        };
        DataBuffer { buffer, len: size }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("payload", &self.inner.payload)
            .finish_non_exhaustive()
    }
}

/// One buffer, given back when dropped.
pub(crate) struct Buffer {
    /// `None` only while being dropped.
    raw: Option<Raw>,
    pool: Option<Arc<PoolInner>>,
}

impl Buffer {
    /// A buffer of its own, outside any pool.
    fn sized(payload: usize) -> Self {
        Self {
            raw: Some(Raw::new(payload)),
            pool: None,
        }
    }

    /// Where a request is read into.
    pub(crate) fn request_mut(&mut self) -> &mut [u8] {
        self.raw.as_mut().map(Raw::request_mut).unwrap_or_default()
    }

    /// Bytes of memory held.
    #[cfg(test)]
    pub(crate) fn capacity(&self) -> usize {
        self.raw.as_ref().map_or(0, |raw| raw.bytes.capacity())
    }

    /// What was read.
    pub(crate) fn request(&self) -> &[u8] {
        self.raw.as_ref().map(Raw::request).unwrap_or_default()
    }

    /// A copy of the first `len` bytes of the request in memory of just that size. The payload stays aligned if `aligned`.
    pub(crate) fn compact(&self, len: usize, aligned: bool) -> Self {
        let source = self.request().get(..len).unwrap_or_default();
        let raw = if aligned {
            let mut raw = Raw::new(len.saturating_sub(abi::WRITE_PREFIX));
            if let Some(target) = raw.request_mut().get_mut(..len) {
                target.copy_from_slice(source);
            }
            raw
        } else {
            Raw {
                bytes: source.to_vec(),
                aligned: abi::WRITE_PREFIX,
            }
        };
        Self {
            raw: Some(raw),
            pool: None,
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let (Some(raw), Some(pool)) = (self.raw.take(), self.pool.take()) {
            let mut free = pool.free.lock().unwrap_or_else(PoisonError::into_inner);
            if free.len() < pool.keep {
                free.push(raw);
            }
        }
    }
}

/// Memory for data on its way to the kernel: aligned to [`ALIGNMENT`], of the length asked for.
pub struct DataBuffer {
    buffer: Buffer,
    len: usize,
}

impl DataBuffer {
    /// Shortens it to the bytes that were really read.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

impl std::ops::Deref for DataBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.buffer
            .raw
            .as_ref()
            .and_then(|raw| raw.payload().get(..self.len))
            .unwrap_or_default()
    }
}

impl std::ops::DerefMut for DataBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let len = self.len;
        self.buffer
            .raw
            .as_mut()
            .and_then(|raw| raw.payload_mut().get_mut(..len))
            .unwrap_or_default()
    }
}

impl std::fmt::Debug for DataBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DataBuffer")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn aligned(bytes: &[u8]) -> bool {
        bytes.as_ptr().addr().is_multiple_of(ALIGNMENT)
    }

    #[test]
    fn payloads_are_aligned() {
        let pool = Pool::new(1 << 20, 2);
        let mut buffer = pool.take();
        assert!(buffer.request_mut().len() >= abi::WRITE_PREFIX + (1 << 20));
        assert!(aligned(&buffer.request()[abi::WRITE_PREFIX..]));
        assert!(aligned(&pool.data(100)));
        let large = pool.data(3 << 20);
        assert_eq!(large.len(), 3 << 20);
        assert!(aligned(&large));
    }

    #[test]
    fn a_compact_copy_is_equal_and_aligned_where_asked() {
        let pool = Pool::new(1 << 20, 2);
        let mut buffer = pool.take();
        let len = abi::WRITE_PREFIX + 4096;
        for (i, byte) in buffer.request_mut()[..len].iter_mut().enumerate() {
            *byte = (i % 251) as u8;
        }
        for keep in [false, true] {
            let copy = buffer.compact(len, keep);
            assert_eq!(copy.request()[..len], buffer.request()[..len]);
            if keep {
                assert!(aligned(&copy.request()[abi::WRITE_PREFIX..]));
            } else {
                assert_eq!(copy.request().len(), len);
            }
        }
    }

    #[test]
    fn a_request_shorter_than_the_headers_of_a_write_survives_compaction() {
        let pool = Pool::new(8192, 1);
        let mut buffer = pool.take();
        buffer.request_mut()[..41].copy_from_slice(&[7; 41]);
        for keep in [false, true] {
            assert_eq!(buffer.compact(41, keep).request()[..41], [7; 41]);
        }
    }

    #[test]
    fn buffers_come_back_but_not_without_bound() {
        let pool = Pool::new(8192, 2);
        let all: Vec<_> = (0..5).map(|_| pool.take()).collect();
        drop(all);
        assert_eq!(pool.inner.free.lock().unwrap().len(), 2);
    }
}
