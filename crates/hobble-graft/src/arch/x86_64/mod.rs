//! x86-64.

mod blob;
mod registers;

pub(crate) use blob::Image;
pub(crate) use registers::{Registers, dead_path, restarts_after_stop};

/// `AUDIT_ARCH_X86_64` of include/uapi/linux/audit.h, what seccomp filters see.
pub(crate) const AUDIT_ARCHITECTURE: u32 = 0xc000_003e;
