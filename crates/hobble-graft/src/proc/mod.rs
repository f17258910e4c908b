//! Facts about processes, read from `/proc`.
//!
//! Owns the parsers of the kernel's text files and the errors of reading them. Invariant: a parser takes bytes, returns
//! typed values or the place of the first byte it does not understand, and never panics; names stay bytes, because the
//! kernel promises no encoding. A process that vanishes while it is read is [`ProcError::Gone`], an ordinary result.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

pub mod cgroup;
pub mod condition;
pub mod fdinfo;
pub mod locks;
pub mod maps;
pub mod mountinfo;
pub mod pagemap;
pub mod stat;
pub mod status;
pub mod syscall;
mod text;
pub mod tree;

pub use text::ParseError;

/// Why a fact could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcError {
    /// The process or thread does not exist (any more).
    #[error("{} is gone", path.display())]
    Gone {
        /// The file that was asked for.
        path: PathBuf,
    },
    /// The kernel refused.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file that was asked for.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        errno: Errno,
    },
    /// The file does not look as the kernel documents it.
    #[error("cannot understand {}", path.display())]
    Parse {
        /// The file that was read.
        path: PathBuf,
        /// Where, and what was expected there.
        #[source]
        source: ParseError,
    },
}

impl ProcError {
    pub(crate) fn read(path: &Path, error: &io::Error) -> Self {
        let errno = Errno::from_io_error(error).unwrap_or(Errno::IO);
        Self::errno(path, errno)
    }

    pub(crate) fn errno(path: &Path, errno: Errno) -> Self {
        // ENOENT when the directory of the process has gone, ESRCH when it went between open and read (fs/proc/base.c).
        if errno == Errno::NOENT || errno == Errno::SRCH {
            Self::Gone {
                path: path.to_owned(),
            }
        } else {
            Self::Read {
                path: path.to_owned(),
                errno,
            }
        }
    }

    pub(crate) fn parse(path: &Path, source: ParseError) -> Self {
        Self::Parse {
            path: path.to_owned(),
            source,
        }
    }

    /// Whether the process or thread was simply no longer there.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Gone { .. })
    }
}

/// The whole of a file in `/proc`.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, ProcError> {
    // Not `fs::read`: the size that stat reports for these files is 0 and only costs a system call.
    let file = File::open(path).map_err(|e| ProcError::read(path, &e))?;
    read_open(file.into(), path)
}

/// The rest of an open file in `/proc`; `path` is for the error.
pub(crate) fn read_open(file: OwnedFd, path: &Path) -> Result<Vec<u8>, ProcError> {
    let mut bytes = Vec::with_capacity(4096);
    File::from(file)
        .read_to_end(&mut bytes)
        .map_err(|e| ProcError::read(path, &e))?;
    Ok(bytes)
}
