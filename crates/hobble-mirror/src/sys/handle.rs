//! File handles: `name_to_handle_at(2)` and `open_by_handle_at(2)`.
//!
//! A handle names an inode for as long as it exists, across renames of anything, and costs no descriptor. It holds the inode's generation, so a number that
//! the filesystem used again is a different handle.

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::check;

/// Longest handle a filesystem may make (`MAX_HANDLE_SZ`, include/linux/exportfs.h).
const MAX: usize = 128;
/// Handles up to this length are kept inside the node; ext4 needs 8 bytes, tmpfs 12, xfs 12 or 24, btrfs 20 or 40.
const INLINE: usize = 24;

#[repr(C)]
struct Raw {
    bytes: libc::c_uint,
    kind: libc::c_int,
    data: [u8; MAX],
}

/// The opaque bytes by which a filesystem finds an inode again.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct FileHandle {
    kind: i32,
    data: Data,
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum Data {
    Inline { len: u8, bytes: [u8; INLINE] },
    Heap(Box<[u8]>),
}

impl FileHandle {
    fn from_raw(raw: &Raw) -> Option<Self> {
        let used = raw.data.get(..usize::try_from(raw.bytes).ok()?)?;
        let mut bytes = [0; INLINE];
        let data = match bytes.get_mut(..used.len()) {
            Some(start) => {
                start.copy_from_slice(used);
                Data::Inline {
                    len: u8::try_from(used.len()).ok()?,
                    bytes,
                }
            }
            None => Data::Heap(used.into()),
        };
        Some(Self {
            kind: raw.kind,
            data,
        })
    }

    /// Its kind and bytes, to be put together again by [`FileHandle::from_parts`].
    pub(crate) fn parts(&self) -> (i32, &[u8]) {
        (self.kind, self.bytes())
    }

    /// The handle of which these are the parts; `None` when there are too many bytes.
    pub(crate) fn from_parts(kind: i32, bytes: &[u8]) -> Option<Self> {
        let mut raw = Raw {
            bytes: libc::c_uint::try_from(bytes.len()).ok()?,
            kind,
            data: [0; MAX],
        };
        raw.data.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Self::from_raw(&raw)
    }

    fn bytes(&self) -> &[u8] {
        match &self.data {
            Data::Inline { len, bytes } => bytes.get(..usize::from(*len)).unwrap_or_default(),
            Data::Heap(bytes) => bytes,
        }
    }

    /// The handle of the file that `fd` (an `O_PATH` descriptor will do) refers to. `EOPNOTSUPP` when the filesystem has none that can be opened again.
    pub(crate) fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let mut raw = Raw {
            bytes: MAX as libc::c_uint,
            kind: 0,
            data: [0; MAX],
        };
        let mut mount: libc::c_int = 0;
        let empty: &CStr = c"";
        // SAFETY: `raw` has the layout of `struct file_handle` followed by the `MAX` bytes that its length field announces, and it, `mount` and the
        // empty name outlive the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                fd.as_raw_fd(),
                empty.as_ptr(),
                &raw mut raw,
                &raw mut mount,
                libc::AT_EMPTY_PATH,
            )
        };
        check(result)?;
        Self::from_raw(&raw).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
    }

    /// Opens the inode. `anchor` is any file of the same mount that was opened for more than its path (fs/fhandle.c refuses `O_PATH`).
    /// `ESTALE` when the inode is gone.
    pub(crate) fn open(&self, anchor: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
        let bytes = self.bytes();
        let mut raw = Raw {
            bytes: bytes.len() as libc::c_uint,
            kind: self.kind,
            data: [0; MAX],
        };
        if let Some(start) = raw.data.get_mut(..bytes.len()) {
            start.copy_from_slice(bytes);
        }
        // SAFETY: `raw` has the layout of `struct file_handle`, its length field covers initialised bytes, and it outlives the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                anchor.as_raw_fd(),
                &raw mut raw,
                flags | libc::O_CLOEXEC,
            )
        };
        let fd = check(result)?;
        // SAFETY: the kernel just returned this descriptor to us, and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }
}

impl fmt::Debug for FileHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileHandle({}:", self.kind)?;
        for byte in self.bytes() {
            write!(f, "{byte:02x}")?;
        }
        f.write_str(")")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_handle_finds_its_inode_after_a_rename_and_not_after_it_is_gone() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let anchor = std::fs::File::open(dir.path()).unwrap();
        let file = std::fs::File::create(dir.path().join("a")).unwrap();
        let handle = FileHandle::of(file.as_fd()).unwrap();
        std::fs::rename(dir.path().join("a"), dir.path().join("b")).unwrap();
        let again = handle.open(anchor.as_fd(), libc::O_PATH).unwrap();
        assert_eq!(FileHandle::of(again.as_fd()).unwrap(), handle);
        drop((again, file));
        std::fs::remove_file(dir.path().join("b")).unwrap();
        let error = handle.open(anchor.as_fd(), libc::O_PATH).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESTALE));
    }
}
