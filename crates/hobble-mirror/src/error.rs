//! What can go wrong with a mirror, apart from what single operations answer to their callers.

use std::io;

use hobble_fuse::Errno;
use hobble_fuse::park::LotError;
use thiserror::Error;

/// Why there is no mirror.
#[derive(Debug, Error)]
pub enum MirrorError {
    /// The root of the backing tree is not usable.
    #[error("cannot use the root of the backing tree")]
    Root(#[source] io::Error),
    /// A server thread could not be given the credentials it works with.
    #[error(
        "cannot prepare a worker: the server needs CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER, CAP_SETGID, CAP_SETUID and CAP_SYS_ADMIN"
    )]
    Worker(#[source] io::Error),
    /// What a dead server has left is not enough to go on with.
    #[error("cannot take over from the server that has died")]
    Legacy(#[source] io::Error),
    /// Requests cannot be parked.
    #[error("cannot set up the waiting of delayed operations")]
    Lot(#[from] LotError),
}

/// The errno to answer with for a failed system call.
pub(crate) fn errno(error: &io::Error) -> Errno {
    match error.raw_os_error() {
        Some(number) => Errno::from_raw_os_error(number),
        None if error.kind() == io::ErrorKind::OutOfMemory => Errno::NOMEM,
        None => Errno::IO,
    }
}
