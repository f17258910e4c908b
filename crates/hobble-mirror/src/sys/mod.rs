//! System calls that no safe library offers, each behind a short safe function.
//!
//! Owns every `unsafe` block of this crate. Invariant: a function here takes borrowed descriptors, returns owned ones, and keeps no state
//! beyond the call except what the calling thread's credentials and file-system struct are ([`identity`]).
#![allow(unsafe_code)]

pub(crate) mod handle;
pub(crate) mod identity;
pub(crate) mod inherit;
pub(crate) mod ioctl;
pub(crate) mod lock;
pub(crate) mod path;
pub(crate) mod shared;
pub(crate) mod thread;

use std::io;

/// Turns the result of a raw system call into a `Result`.
fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
