//! Listings of directories, packed as the kernel reads them.
//!
//! Invariant: a builder never grows beyond the size that the request allows; an entry that does not fit is refused whole.

use zerocopy::IntoBytes;

use crate::abi;
use crate::types::Entry;

/// An entry did not fit; what was added before stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// Kind of file of a directory entry: the upper bits of `st_mode` (`DT_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirentKind(pub u32);

impl DirentKind {
    /// From `st_mode`.
    #[must_use]
    pub const fn from_mode(mode: u32) -> Self {
        Self((mode & 0o170_000) >> 12)
    }
}

/// The answer to READDIR.
#[derive(Debug)]
pub struct DirBuilder {
    bytes: Vec<u8>,
    limit: usize,
}

impl DirBuilder {
    /// For a request of `size` bytes.
    #[must_use]
    pub fn new(size: u32) -> Self {
        let limit = usize::try_from(size).unwrap_or(usize::MAX);
        Self {
            bytes: Vec::with_capacity(limit.min(1 << 16)),
            limit,
        }
    }

    /// Adds a name. `next` is the offset with which the kernel will ask for what follows this entry.
    ///
    /// # Errors
    /// [`Full`] when it does not fit.
    pub fn push(&mut self, ino: u64, next: u64, kind: DirentKind, name: &[u8]) -> Result<(), Full> {
        append(&mut self.bytes, self.limit, None, (ino, next, kind), name)
    }

    /// Whether nothing was added.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// The answer to READDIRPLUS.
#[derive(Debug)]
pub struct DirPlusBuilder {
    bytes: Vec<u8>,
    limit: usize,
}

impl DirPlusBuilder {
    /// For a request of `size` bytes.
    #[must_use]
    pub fn new(size: u32) -> Self {
        let limit = usize::try_from(size).unwrap_or(usize::MAX);
        Self {
            bytes: Vec::with_capacity(limit.min(1 << 16)),
            limit,
        }
    }

    /// Whether a name of this length still fits; to be asked before a reference to the inode is taken.
    #[must_use]
    pub const fn fits(&self, name_len: usize) -> bool {
        self.bytes.len() + record(true, name_len) <= self.limit
    }

    /// Adds a name with its inode, which thereby gains one reference from the kernel. `.` and `..` and inodes that could not
    /// be looked up have no `entry`: the kernel then takes the name only (fuse_direntplus_link, fs/fuse/readdir.c).
    ///
    /// # Errors
    /// [`Full`] when it does not fit.
    pub fn push(
        &mut self,
        entry: Option<&Entry>,
        ino: u64,
        next: u64,
        kind: DirentKind,
        name: &[u8],
    ) -> Result<(), Full> {
        let entry = entry.map(abi::EntryOut::from).unwrap_or_default();
        append(
            &mut self.bytes,
            self.limit,
            Some(entry),
            (ino, next, kind),
            name,
        )
    }

    /// Whether nothing was added.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

const fn record(plus: bool, name_len: usize) -> usize {
    let entry = if plus { size_of::<abi::EntryOut>() } else { 0 };
    abi::rec_align(entry + size_of::<abi::Dirent>() + name_len)
}

fn append(
    bytes: &mut Vec<u8>,
    limit: usize,
    entry: Option<abi::EntryOut>,
    (ino, off, kind): (u64, u64, DirentKind),
    name: &[u8],
) -> Result<(), Full> {
    let end = bytes.len() + record(entry.is_some(), name.len());
    let namelen = u32::try_from(name.len()).map_err(|_| Full)?;
    if end > limit {
        return Err(Full);
    }
    if let Some(entry) = entry {
        bytes.extend_from_slice(entry.as_bytes());
    }
    bytes.extend_from_slice(
        abi::Dirent {
            ino,
            off,
            namelen,
            kind: kind.0,
        }
        .as_bytes(),
    );
    bytes.extend_from_slice(name);
    bytes.resize(end, 0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use zerocopy::FromBytes;

    /// Reads a listing as the kernel does (parse_dirfile, fs/fuse/readdir.c).
    fn parse(mut bytes: &[u8], plus: bool) -> Vec<(u64, u64, u32, Vec<u8>)> {
        let mut found = Vec::new();
        let skip = if plus { 128 } else { 0 };
        while bytes.len() >= skip + 24 {
            let (head, rest) = abi::Dirent::read_from_prefix(&bytes[skip..]).unwrap();
            let name = rest[..head.namelen as usize].to_vec();
            found.push((head.ino, head.off, head.kind, name));
            bytes = &bytes[record(plus, head.namelen as usize)..];
        }
        assert!(bytes.is_empty());
        found
    }

    proptest! {
        #[test]
        fn what_fits_is_read_back_and_the_size_is_kept(
            size in 0u32..3000,
            names in proptest::collection::vec(proptest::collection::vec(1u8..=255, 1..255), 0..40),
            plus: bool,
        ) {
            let mut expected = Vec::new();
            let bytes = if plus {
                let mut dir = DirPlusBuilder::new(size);
                for (i, name) in names.iter().enumerate() {
                    let fits = dir.fits(name.len());
                    prop_assert_eq!(dir.push(None, i as u64, 7, DirentKind(8), name).is_ok(), fits);
                    if !fits { break; }
                    expected.push((i as u64, 7, 8, name.clone()));
                }
                dir.as_bytes().to_vec()
            } else {
                let mut dir = DirBuilder::new(size);
                for (i, name) in names.iter().enumerate() {
                    if dir.push(i as u64, 7, DirentKind(8), name).is_err() { break; }
                    expected.push((i as u64, 7, 8, name.clone()));
                }
                dir.as_bytes().to_vec()
            };
            prop_assert!(bytes.len() <= size as usize);
            prop_assert_eq!(parse(&bytes, plus), expected);
        }
    }

    #[test]
    fn kinds_are_those_of_getdents() {
        assert_eq!(
            DirentKind::from_mode(libc::S_IFDIR | 0o755).0,
            u32::from(libc::DT_DIR)
        );
        assert_eq!(
            DirentKind::from_mode(libc::S_IFREG).0,
            u32::from(libc::DT_REG)
        );
        assert_eq!(
            DirentKind::from_mode(libc::S_IFSOCK).0,
            u32::from(libc::DT_SOCK)
        );
    }
}
