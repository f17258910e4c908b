//! `/proc/<pid>/mountinfo`: the mounts that a process can see, with their propagation.
//!
//! Spaces, tabs, newlines and backslashes in names are written as octal escapes and undone here; no other byte is
//! (fs/proc_namespace.c, `show_mountinfo`). Mounts outside the process's root directory are not listed by the kernel.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

use super::text::{Cursor, unescape};
use super::{ParseError, ProcError};
use crate::ids::{Device, MountId, Pid};

/// How mounts and unmounts travel to and from a mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Propagation {
    /// `shared:N`: it gives to and takes from the other members of peer group N.
    pub peer_group: Option<u64>,
    /// `master:N`: it takes from peer group N and gives it nothing.
    pub master: Option<u64>,
    /// `propagate_from:N`: the nearest group above the master that the process can see.
    pub propagate_from: Option<u64>,
    /// `unbindable`: private, and not copied by bind mounts.
    pub is_unbindable: bool,
}

impl Propagation {
    /// Whether nothing travels in either direction.
    pub fn is_private(&self) -> bool {
        self.peer_group.is_none() && self.master.is_none()
    }
}

/// A line of `mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Its id.
    pub id: MountId,
    /// The mount it lies on; its own id for the topmost one, and the id of an invisible one outside the process's root.
    pub parent: MountId,
    /// Device of the superblock; not the `st_dev` of its files on btrfs.
    pub device: Device,
    /// The directory of the filesystem that is mounted; `//deleted` is appended once that was removed.
    pub root: PathBuf,
    /// Where, as the process sees it.
    pub mount_point: PathBuf,
    /// Options of the mount, as `ro,nosuid`.
    pub options: OsString,
    /// Propagation.
    pub propagation: Propagation,
    /// Name of the filesystem type, with its subtype after a dot.
    pub fs_type: OsString,
    /// Device or other source.
    pub source: OsString,
    /// Options of the superblock.
    pub super_options: OsString,
}

/// Parses the text of `mountinfo`.
///
/// # Errors
/// The first byte that is not as `show_mountinfo` writes it.
pub fn parse(text: &[u8]) -> Result<Vec<Mount>, ParseError> {
    let mut at = Cursor::new(text);
    let mut mounts = Vec::new();
    while !at.is_empty() {
        mounts.push(mount(&mut at.line_cursor())?);
    }
    Ok(mounts)
}

fn mount(line: &mut Cursor<'_>) -> Result<Mount, ParseError> {
    let id = MountId(line.decimal("a mount id")?);
    line.literal(b" ", "a space")?;
    let parent = MountId(line.decimal("the parent's mount id")?);
    line.literal(b" ", "a space")?;
    let major = line.decimal_u32("a device number")?;
    line.literal(b":", "a colon")?;
    let minor = line.decimal_u32("a device number")?;
    line.literal(b" ", "a space")?;
    let root = name(line.until(b' ', "the root of the mount")?);
    let mount_point = name(line.until(b' ', "a mount point")?);
    let options = name(line.until(b' ', "mount options")?);
    let mut propagation = Propagation::default();
    loop {
        if line.try_literal(b"- ") {
            break;
        }
        let mut field = Cursor::new(line.rest());
        let place = line.error("a propagation field or a hyphen");
        let whole = line.until(b' ', "a propagation field or a hyphen")?;
        let group = |mut f: Cursor<'_>| f.decimal("a peer group").map(Some).map_err(|_| place);
        if field.try_literal(b"shared:") {
            propagation.peer_group = group(field)?;
        } else if field.try_literal(b"master:") {
            propagation.master = group(field)?;
        } else if field.try_literal(b"propagate_from:") {
            propagation.propagate_from = group(field)?;
        } else if whole == b"unbindable" {
            propagation.is_unbindable = true;
        }
        // proc(5): fields that are not known are to be passed over.
    }
    let fs_type = name(line.until(b' ', "a filesystem type")?);
    // A source may be empty, and then two spaces follow each other.
    let source = name(line.until(b' ', "a source")?);
    let super_options = name(line.rest());
    Ok(Mount {
        id,
        parent,
        device: Device { major, minor },
        root: root.into(),
        mount_point: mount_point.into(),
        options,
        propagation,
        fs_type,
        source,
        super_options,
    })
}

fn name(text: &[u8]) -> OsString {
    OsString::from_vec(unescape(text))
}

/// `/proc/<pid>/mountinfo`: parents before children, in the order they were mounted. The kernel holds its lock for as long as one
/// `read` lasts, so a list longer than a page may be of two moments.
///
/// # Errors
/// [`ProcError::Gone`] when there is no such process, or it is a zombie (errno EINVAL from the kernel).
pub fn of_process(pid: Pid) -> Result<Vec<Mount>, ProcError> {
    let path = PathBuf::from(format!("/proc/{pid}/mountinfo"));
    let text = super::read(&path).map_err(|error| match error {
        // A zombie has no namespaces: EINVAL from `mounts_open_common`.
        ProcError::Read {
            path,
            errno: rustix::io::Errno::INVAL,
        } => ProcError::Gone { path },
        other => other,
    })?;
    parse(&text).map_err(|e| ProcError::parse(&path, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt as _;

    #[test]
    fn escapes_groups_and_empty_sources() {
        let text = b"36 35 98:0 /a\\040b /mnt\\134x\\012\xff rw,noatime shared:1 master:2 propagate_from:3 new:4 unbindable - ext3.sub /dev/root rw\n\
            40 36 0:5 / / ro - tmpfs  rw,size=1k\n\
            41 36 0:4 net:[4026531840] /run/netns/a rw shared:9 - nsfs nsfs rw\n";
        let mounts = parse(text).unwrap();
        assert_eq!(mounts[0].root, PathBuf::from("/a b"));
        assert_eq!(
            mounts[0].mount_point.as_os_str().as_bytes(),
            b"/mnt\\x\n\xff"
        );
        assert_eq!(
            mounts[0].propagation,
            Propagation {
                peer_group: Some(1),
                master: Some(2),
                propagate_from: Some(3),
                is_unbindable: true
            }
        );
        assert_eq!(
            (mounts[1].fs_type.as_bytes(), mounts[1].source.as_bytes()),
            (&b"tmpfs"[..], &b""[..])
        );
        assert!(mounts[1].propagation.is_private());
        assert_eq!(mounts[2].root, PathBuf::from("net:[4026531840]"));
    }

    #[test]
    fn errors_have_places() {
        assert_eq!(
            parse(b"36 x"),
            Err(ParseError::new(3, "the parent's mount id"))
        );
        assert_eq!(
            parse(b"1 2 3:4 / / rw"),
            Err(ParseError::new(12, "mount options"))
        );
        assert_eq!(
            parse(b"1 2 3:4 / / rw shared:x - a b c"),
            Err(ParseError::new(15, "a propagation field or a hyphen"))
        );
        assert_eq!(
            parse(b"1 2 3:4 / / rw"),
            Err(ParseError::new(12, "mount options"))
        );
    }

    #[test]
    fn ours_has_a_proc() {
        assert!(
            of_process(Pid::own())
                .unwrap()
                .iter()
                .any(|m| m.fs_type == "proc")
        );
    }
}
