//! x86-64.

mod blob;
mod registers;

pub(crate) use blob::Image;
pub(crate) use registers::{Registers, dead_path, restarts_after_stop};
