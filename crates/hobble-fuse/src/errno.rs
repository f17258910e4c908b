//! Error numbers, with those that a rule asked for kept apart from those that really happened.

use std::fmt;

pub use rustix::io::Errno;

/// An error number that a rule asked for. It becomes an ordinary errno only in the bytes of the reply
/// ([`crate::Reply::injected`]), so that counters and logs never mistake an injected failure for a real one.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct InjectedErrno(i32);

impl InjectedErrno {
    /// Largest number that the kernel accepts from a server: it refuses -512 and below (`fuse_dev_do_write`, fs/fuse/dev.c).
    pub const MAX: i32 = 511;

    /// Takes a positive error number; `None` when the kernel would refuse it in a reply.
    #[must_use]
    pub const fn new(number: i32) -> Option<Self> {
        if number >= 1 && number <= Self::MAX {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The positive number.
    #[must_use]
    pub const fn number(self) -> i32 {
        self.0
    }
}

impl fmt::Debug for InjectedErrno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InjectedErrno({:?})", Errno::from_raw_os_error(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_kernel_accepts_can_be_injected() {
        assert_eq!(InjectedErrno::new(5).map(InjectedErrno::number), Some(5));
        assert_eq!(
            InjectedErrno::new(511).map(InjectedErrno::number),
            Some(511)
        );
        for bad in [0, -5, 512, i32::MAX, i32::MIN] {
            assert_eq!(InjectedErrno::new(bad), None);
        }
    }
}
