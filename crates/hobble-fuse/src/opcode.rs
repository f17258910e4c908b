//! The operations of the protocol, by number and by name.
//!
//! Invariant: one variant per opcode up to ABI 7.45; anything else is not an [`Opcode`] and is answered ENOSYS.

use std::fmt;

macro_rules! opcodes {
    ($($(#[$meta:meta])* $variant:ident = $number:literal, $name:literal;)*) => {
        /// What a request asks for (`enum fuse_opcode`).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        #[allow(missing_docs, reason = "each variant is the kernel's own word")]
        pub enum Opcode { $($(#[$meta])* $variant = $number,)* }

        impl Opcode {
            /// Every opcode, in the kernel's order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The opcode with this number, if this crate knows it.
            #[must_use]
            pub const fn from_raw(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// Its lower-case FUSE name, such as `copy_file_range`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

opcodes! {
    Lookup = 1, "lookup";
    Forget = 2, "forget";
    Getattr = 3, "getattr";
    Setattr = 4, "setattr";
    Readlink = 5, "readlink";
    Symlink = 6, "symlink";
    Mknod = 8, "mknod";
    Mkdir = 9, "mkdir";
    Unlink = 10, "unlink";
    Rmdir = 11, "rmdir";
    Rename = 12, "rename";
    Link = 13, "link";
    Open = 14, "open";
    Read = 15, "read";
    Write = 16, "write";
    Statfs = 17, "statfs";
    Release = 18, "release";
    Fsync = 20, "fsync";
    Setxattr = 21, "setxattr";
    Getxattr = 22, "getxattr";
    Listxattr = 23, "listxattr";
    Removexattr = 24, "removexattr";
    Flush = 25, "flush";
    Init = 26, "init";
    Opendir = 27, "opendir";
    Readdir = 28, "readdir";
    Releasedir = 29, "releasedir";
    Fsyncdir = 30, "fsyncdir";
    Getlk = 31, "getlk";
    Setlk = 32, "setlk";
    Setlkw = 33, "setlkw";
    Access = 34, "access";
    Create = 35, "create";
    Interrupt = 36, "interrupt";
    Bmap = 37, "bmap";
    Destroy = 38, "destroy";
    Ioctl = 39, "ioctl";
    Poll = 40, "poll";
    NotifyReply = 41, "notify_reply";
    BatchForget = 42, "batch_forget";
    Fallocate = 43, "fallocate";
    Readdirplus = 44, "readdirplus";
    Rename2 = 45, "rename2";
    Lseek = 46, "lseek";
    CopyFileRange = 47, "copy_file_range";
    Setupmapping = 48, "setupmapping";
    Removemapping = 49, "removemapping";
    Syncfs = 50, "syncfs";
    Tmpfile = 51, "tmpfile";
    Statx = 52, "statx";
    CopyFileRange64 = 53, "copy_file_range_64";
}

impl Opcode {
    /// Whether the kernel expects an answer. It does not for FORGET, BATCH_FORGET, INTERRUPT and NOTIFY_REPLY.
    #[must_use]
    pub const fn is_answered(self) -> bool {
        !matches!(
            self,
            Self::Forget | Self::BatchForget | Self::Interrupt | Self::NotifyReply
        )
    }
}

impl fmt::Display for Opcode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_are_unique_and_round_trip() {
        let mut names = std::collections::BTreeSet::new();
        for &opcode in Opcode::ALL {
            assert_eq!(Opcode::from_raw(opcode as u32), Some(opcode));
            assert!(names.insert(opcode.name()));
        }
        assert_eq!(Opcode::ALL.len(), 51);
        for unknown in [0, 7, 19, 54, 4096, u32::MAX] {
            assert_eq!(Opcode::from_raw(unknown), None);
        }
    }
}
