//! System calls that no crate wraps: one short safe function each, borrowed descriptors in, owned descriptors out.
#![allow(unsafe_code)]

pub(crate) mod fcntl;
pub(crate) mod kcmp;
pub(crate) mod lock;
pub(crate) mod mount;
pub(crate) mod pagemap;
