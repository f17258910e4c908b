//! `/proc/<pid>/fdinfo/<fd>`: what the kernel tells of a descriptor without our having to hold it.
//!
//! The first four lines are written by fs/proc/fd.c (`seq_show`), then locks, then whatever the kind of file adds. The position
//! is read without the lock that `lseek` would take, so looking never waits for a `read` in progress.

use super::ParseError;
use super::locks::{self, FileLock};
use super::text::Cursor;
use crate::ids::{Device, MountId};

/// The facts of one descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FdInfo {
    /// File position, in bytes (an opaque cookie for directories).
    pub position: i64,
    /// The flags of `open(2)`, plus `O_CLOEXEC` when the descriptor (not the description) has it.
    pub flags: u32,
    /// The mount that the file was opened through.
    pub mount: MountId,
    /// The inode number that the filesystem uses inside, not always `st_ino`.
    pub inode: u64,
    /// Locks held through this descriptor: those of its description, and the POSIX locks of its table set through it.
    pub locks: Vec<FileLock>,
    /// `scm_fds:` of a unix socket: descriptors in its receive queue.
    pub in_flight: u64,
    /// `UserFiles:` of an io_uring: size of its table of registered files.
    pub registered_files: u64,
    /// `inotify` lines: what is watched, as (device of the superblock, inode).
    pub inotify: Vec<(Device, u64)>,
    /// Number of `fanotify` marks.
    pub fanotify_marks: usize,
}

impl FdInfo {
    /// Whether `execve` closes the descriptor.
    pub fn close_on_exec(&self) -> bool {
        self.flags & libc::O_CLOEXEC.cast_unsigned() != 0
    }
}

/// Parses the text of an `fdinfo` file. Lines of kinds of files that are of no interest here are passed over.
///
/// # Errors
/// The first byte of a line that should be understood and is not.
pub fn parse(text: &[u8]) -> Result<FdInfo, ParseError> {
    let mut at = Cursor::new(text);
    at.literal(b"pos:\t", "pos:")?;
    let position = at.signed("a file position")?;
    at.literal(b"\nflags:\t", "flags:")?;
    let place = at.error("octal flags");
    let flags = u32::try_from(at.octal("octal flags")?).map_err(|_| place)?;
    at.literal(b"\nmnt_id:\t", "mnt_id:")?;
    let mount = MountId(at.decimal("a mount id")?);
    at.literal(b"\nino:\t", "ino:")?;
    let inode = at.decimal("an inode number")?;
    at.literal(b"\n", "a new line")?;
    let mut info = FdInfo {
        position,
        flags,
        mount,
        inode,
        locks: Vec::new(),
        in_flight: 0,
        registered_files: 0,
        inotify: Vec::new(),
        fanotify_marks: 0,
    };
    while !at.is_empty() {
        let mut line = at.line_cursor();
        if line.try_literal(b"lock:\t") {
            info.locks.push(locks::parse_line(&mut line)?.lock);
        } else if line.try_literal(b"scm_fds: ") {
            info.in_flight = line.decimal("a number of descriptors")?;
        } else if line.try_literal(b"UserFiles:\t") {
            info.registered_files = line.decimal("a number of files")?;
        } else if line.try_literal(b"inotify ") {
            info.inotify.push(inotify(&mut line)?);
        } else if line.try_literal(b"fanotify ino:")
            || line.try_literal(b"fanotify mnt_id:")
            || line.try_literal(b"fanotify sdev:")
        {
            info.fanotify_marks += 1;
        }
    }
    Ok(info)
}

/// `wd:<n> ino:<hex> sdev:<hex> …` (fs/notify/fdinfo.c, `inotify_fdinfo`); the device is the kernel's own `MAJOR << 20 | MINOR`.
fn inotify(line: &mut Cursor<'_>) -> Result<(Device, u64), ParseError> {
    line.literal(b"wd:", "wd:")?;
    line.signed("a watch descriptor")?;
    line.literal(b" ino:", "ino:")?;
    let inode = line.hex("an inode number")?;
    line.literal(b" sdev:", "sdev:")?;
    let place = line.error("a device");
    let device = u32::try_from(line.hex("a device")?).map_err(|_| place)?;
    Ok((
        Device {
            major: device >> 20,
            minor: device & 0xf_ffff,
        },
        inode,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proc::locks::{LockClass, LockKind};

    #[test]
    fn plain_locked_and_special() {
        let text = b"pos:\t1000\nflags:\t02100002\nmnt_id:\t27\nino:\t10010884\nlock:\t1: FLOCK  ADVISORY  WRITE 13423 fe:00:10010884 0 EOF\n";
        let info = parse(text).unwrap();
        assert_eq!(
            (info.position, info.mount, info.inode),
            (1000, MountId(27), 10_010_884)
        );
        assert!(info.close_on_exec());
        assert_eq!(info.flags & 3, 2);
        assert_eq!(
            (info.locks[0].class, info.locks[0].kind),
            (LockClass::Flock, LockKind::Write)
        );

        let socket =
            parse(b"pos:\t0\nflags:\t02000002\nmnt_id:\t10\nino:\t30786\nscm_fds: 2\n").unwrap();
        assert_eq!(socket.in_flight, 2);

        let watch = parse(
            b"pos:\t0\nflags:\t00\nmnt_id:\t17\nino:\t1038\n\
            inotify wd:1 ino:98c128 sdev:fe00000 mask:fff ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:28c1\n",
        )
        .unwrap();
        assert_eq!(
            watch.inotify,
            [(
                Device {
                    major: 254,
                    minor: 0
                },
                0x98_c128
            )]
        );
        assert!(!watch.close_on_exec());

        let marks = parse(
            b"pos:\t0\nflags:\t02\nmnt_id:\t17\nino:\t1038\nfanotify flags:0 event-flags:8000\n\
            fanotify mnt_id:1b mflags:0 mask:20 ignored_mask:0\nfanotify ino:98c128 sdev:fe00000 mflags:0\n",
        )
        .unwrap();
        assert_eq!(marks.fanotify_marks, 2);
    }

    #[test]
    fn positions_may_be_negative_and_errors_have_places() {
        assert_eq!(
            parse(b"pos:\t-1\nflags:\t0\nmnt_id:\t1\nino:\t1\n")
                .unwrap()
                .position,
            -1
        );
        assert_eq!(parse(b"pos: 1"), Err(ParseError::new(0, "pos:")));
        assert_eq!(
            parse(b"pos:\t1\nflags:\t08"),
            Err(ParseError::new(15, "mnt_id:"))
        );
        assert_eq!(
            parse(b"pos:\t1\nflags:\t0\nmnt_id:\t1\nino:\t1"),
            Err(ParseError::new(32, "a new line"))
        );
    }
}
