//! Names and numbers of the errnos of Linux, and the type of those that are injected.
//!
//! Owns the table of include/uapi/asm-generic/errno.h (Linux 6.18), which x86_64 and aarch64 use unchanged. Invariant: an [`InjectedErrno`] is one that the
//! kernel accepts in a FUSE reply and that user space may see: 1 to 511 (Linux, fs/fuse/dev.c, `fuse_dev_do_write` refuses 512 and up).

use std::fmt;
use std::num::NonZeroU16;

/// An errno that a rule injects; a type of its own so that no log, metric or handler confuses it with a real one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InjectedErrno(NonZeroU16);

impl InjectedErrno {
    /// The largest number that can be injected.
    pub const MAX: u16 = 511;

    /// The errno with this number; `None` outside 1 to 511.
    #[must_use]
    pub fn new(number: u16) -> Option<Self> {
        NonZeroU16::new(number)
            .filter(|number| number.get() <= Self::MAX)
            .map(Self)
    }

    /// The errno with this name, in any case; `None` when Linux has none such.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let same = |candidate: &&(&str, u16)| candidate.0.eq_ignore_ascii_case(name);
        TABLE
            .iter()
            .find(same)
            .or_else(|| ALIASES.iter().find(same))
            .and_then(|(_, number)| Self::new(*number))
    }

    /// Its positive number.
    #[must_use]
    pub const fn raw(self) -> i32 {
        self.0.get() as i32
    }

    /// Its name; `None` for a number without one.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        TABLE
            .iter()
            .find(|(_, number)| *number == self.0.get())
            .map(|(name, _)| *name)
    }
}

impl fmt::Display for InjectedErrno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "errno {}", self.0),
        }
    }
}

impl fmt::Debug for InjectedErrno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InjectedErrno({self})")
    }
}

/// Every name that [`InjectedErrno::named`] knows.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    TABLE.iter().chain(&ALIASES).map(|(name, _)| *name)
}

/// One name for each number.
const TABLE: [(&str, u16); 131] = [
    ("EPERM", 1),
    ("ENOENT", 2),
    ("ESRCH", 3),
    ("EINTR", 4),
    ("EIO", 5),
    ("ENXIO", 6),
    ("E2BIG", 7),
    ("ENOEXEC", 8),
    ("EBADF", 9),
    ("ECHILD", 10),
    ("EAGAIN", 11),
    ("ENOMEM", 12),
    ("EACCES", 13),
    ("EFAULT", 14),
    ("ENOTBLK", 15),
    ("EBUSY", 16),
    ("EEXIST", 17),
    ("EXDEV", 18),
    ("ENODEV", 19),
    ("ENOTDIR", 20),
    ("EISDIR", 21),
    ("EINVAL", 22),
    ("ENFILE", 23),
    ("EMFILE", 24),
    ("ENOTTY", 25),
    ("ETXTBSY", 26),
    ("EFBIG", 27),
    ("ENOSPC", 28),
    ("ESPIPE", 29),
    ("EROFS", 30),
    ("EMLINK", 31),
    ("EPIPE", 32),
    ("EDOM", 33),
    ("ERANGE", 34),
    ("EDEADLK", 35),
    ("ENAMETOOLONG", 36),
    ("ENOLCK", 37),
    ("ENOSYS", 38),
    ("ENOTEMPTY", 39),
    ("ELOOP", 40),
    ("ENOMSG", 42),
    ("EIDRM", 43),
    ("ECHRNG", 44),
    ("EL2NSYNC", 45),
    ("EL3HLT", 46),
    ("EL3RST", 47),
    ("ELNRNG", 48),
    ("EUNATCH", 49),
    ("ENOCSI", 50),
    ("EL2HLT", 51),
    ("EBADE", 52),
    ("EBADR", 53),
    ("EXFULL", 54),
    ("ENOANO", 55),
    ("EBADRQC", 56),
    ("EBADSLT", 57),
    ("EBFONT", 59),
    ("ENOSTR", 60),
    ("ENODATA", 61),
    ("ETIME", 62),
    ("ENOSR", 63),
    ("ENONET", 64),
    ("ENOPKG", 65),
    ("EREMOTE", 66),
    ("ENOLINK", 67),
    ("EADV", 68),
    ("ESRMNT", 69),
    ("ECOMM", 70),
    ("EPROTO", 71),
    ("EMULTIHOP", 72),
    ("EDOTDOT", 73),
    ("EBADMSG", 74),
    ("EOVERFLOW", 75),
    ("ENOTUNIQ", 76),
    ("EBADFD", 77),
    ("EREMCHG", 78),
    ("ELIBACC", 79),
    ("ELIBBAD", 80),
    ("ELIBSCN", 81),
    ("ELIBMAX", 82),
    ("ELIBEXEC", 83),
    ("EILSEQ", 84),
    ("ERESTART", 85),
    ("ESTRPIPE", 86),
    ("EUSERS", 87),
    ("ENOTSOCK", 88),
    ("EDESTADDRREQ", 89),
    ("EMSGSIZE", 90),
    ("EPROTOTYPE", 91),
    ("ENOPROTOOPT", 92),
    ("EPROTONOSUPPORT", 93),
    ("ESOCKTNOSUPPORT", 94),
    ("EOPNOTSUPP", 95),
    ("EPFNOSUPPORT", 96),
    ("EAFNOSUPPORT", 97),
    ("EADDRINUSE", 98),
    ("EADDRNOTAVAIL", 99),
    ("ENETDOWN", 100),
    ("ENETUNREACH", 101),
    ("ENETRESET", 102),
    ("ECONNABORTED", 103),
    ("ECONNRESET", 104),
    ("ENOBUFS", 105),
    ("EISCONN", 106),
    ("ENOTCONN", 107),
    ("ESHUTDOWN", 108),
    ("ETOOMANYREFS", 109),
    ("ETIMEDOUT", 110),
    ("ECONNREFUSED", 111),
    ("EHOSTDOWN", 112),
    ("EHOSTUNREACH", 113),
    ("EALREADY", 114),
    ("EINPROGRESS", 115),
    ("ESTALE", 116),
    ("EUCLEAN", 117),
    ("ENOTNAM", 118),
    ("ENAVAIL", 119),
    ("EISNAM", 120),
    ("EREMOTEIO", 121),
    ("EDQUOT", 122),
    ("ENOMEDIUM", 123),
    ("EMEDIUMTYPE", 124),
    ("ECANCELED", 125),
    ("ENOKEY", 126),
    ("EKEYEXPIRED", 127),
    ("EKEYREVOKED", 128),
    ("EKEYREJECTED", 129),
    ("EOWNERDEAD", 130),
    ("ENOTRECOVERABLE", 131),
    ("ERFKILL", 132),
    ("EHWPOISON", 133),
];

/// Second names.
const ALIASES: [(&str, u16); 3] = [("EWOULDBLOCK", 11), ("EDEADLOCK", 35), ("ENOTSUP", 95)];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_go_both_ways() {
        for (name, number) in TABLE {
            let errno = InjectedErrno::named(&name.to_lowercase()).unwrap();
            assert_eq!((errno.raw(), errno.name()), (i32::from(number), Some(name)));
        }
        for (name, number) in ALIASES {
            assert_eq!(
                InjectedErrno::named(name),
                InjectedErrno::new(number),
                "{name}"
            );
        }
    }

    #[test]
    fn numbers_agree_with_the_system() {
        for (name, number) in [
            ("EIO", 5),
            ("ENOSPC", 28),
            ("EDQUOT", 122),
            ("EUCLEAN", 117),
            ("ESTALE", 116),
        ] {
            assert_eq!(InjectedErrno::named(name).unwrap().raw(), number);
        }
        let text = std::io::Error::from_raw_os_error(InjectedErrno::named("EROFS").unwrap().raw())
            .to_string();
        assert!(text.starts_with("Read-only file system"), "{text}");
    }

    #[test]
    fn success_and_kernel_internal_numbers_are_refused() {
        assert_eq!(InjectedErrno::new(0), None);
        assert_eq!(InjectedErrno::new(512), None);
        assert_eq!(InjectedErrno::new(511).unwrap().to_string(), "errno 511");
    }
}
