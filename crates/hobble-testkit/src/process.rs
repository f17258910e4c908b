//! What `/proc` says about a process: identity, state, descriptors, mounts.
//!
//! Owns no state. It is written apart from the code under test on purpose: an error in Hobble's own parsers must not hide
//! itself from the tests.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags, fstat, fstatfs, open};

/// A process that is not confused with a later one of the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    /// The pid in the namespace of this process.
    pub pid: u32,
    /// Field 22 of `/proc/<pid>/stat`: start time in clock ticks since boot.
    pub start: u64,
}

/// The parts of `/proc/<pid>/stat` that tests look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// `R`, `S`, `D`, `T` (stopped), `t` (traced), `Z`.
    pub state: char,
    /// The parent.
    pub parent: u32,
    /// Start time in clock ticks since boot.
    pub start: u64,
}

/// Reads `/proc/<path>/stat`; `path` is `<pid>` or `<pid>/task/<tid>`.
///
/// # Errors
/// When the process is gone.
pub fn stat(path: &str) -> Result<Stat> {
    let text = fs::read_to_string(format!("/proc/{path}/stat"))
        .with_context(|| format!("no process {path}"))?;
    // The name may hold anything, the last parenthesis ends it: proc_pid_stat(5).
    let fields: Vec<&str> = text
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_ascii_whitespace().collect())
        .unwrap_or_default();
    let field = |n: usize| {
        fields
            .get(n - 3)
            .copied()
            .with_context(|| format!("no field {n} in /proc/{path}/stat"))
    };
    Ok(Stat {
        state: field(3)?.chars().next().unwrap_or('?'),
        parent: field(4)?.parse().context("odd parent in stat")?,
        start: field(22)?.parse().context("odd start time in stat")?,
    })
}

/// The identity of a running process.
///
/// # Errors
/// When it is gone.
pub fn identify(pid: u32) -> Result<Identity> {
    Ok(Identity {
        pid,
        start: stat(&pid.to_string())?.start,
    })
}

/// Whether this very process still runs; a zombie does not.
pub fn is_running(identity: Identity) -> bool {
    stat(&identity.pid.to_string())
        .is_ok_and(|stat| stat.start == identity.start && stat.state != 'Z')
}

/// All numeric entries of a directory of `/proc`.
pub fn numbers(directory: &str) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let mut found: Vec<u32> = entries
        .flatten()
        .filter_map(|entry| {
            entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
        })
        .collect();
    found.sort_unstable();
    found
}

/// `pid` and all its descendants, at this moment.
pub fn tree(pid: u32) -> Vec<u32> {
    let parents: BTreeMap<u32, u32> = numbers("/proc")
        .into_iter()
        .filter_map(|each| stat(&each.to_string()).ok().map(|stat| (each, stat.parent)))
        .collect();
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found.extend(
            parents
                .iter()
                .filter(|&(_, of)| *of == parent)
                .map(|(child, _)| *child),
        );
        next += 1;
    }
    found
}

/// A line of `/proc/<pid>/status`, without its name.
///
/// # Errors
/// When the process is gone or there is no such line.
pub fn status_field(pid: u32, name: &str) -> Result<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))
        .with_context(|| format!("no process {pid}"))?;
    text.lines()
        .find_map(|line| {
            line.strip_prefix(name)
                .and_then(|rest| rest.strip_prefix(':'))
        })
        .map(|value| value.trim().to_owned())
        .with_context(|| format!("no {name} in the status of {pid}"))
}

/// One slot of a descriptor table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// What `/proc/<pid>/fd/<n>` points to.
    pub link: PathBuf,
    /// Octal flags of `/proc/<pid>/fdinfo/<n>`, CLOEXEC (02000000) included.
    pub flags: u32,
    /// The position.
    pub position: u64,
    /// The mount that it was opened through.
    pub mount: u64,
    /// File type bits and permissions of the file itself.
    pub mode: u32,
    /// The file's inode number.
    pub inode: u64,
    /// Whether the file's filesystem is FUSE.
    pub hooked: bool,
}

impl Slot {
    /// Whether it is a regular file or a directory, the kinds that a hook moves.
    pub fn movable(&self) -> bool {
        matches!(self.mode & 0o170_000, 0o100_000 | 0o040_000)
    }
}

/// `FUSE_SUPER_MAGIC` of `linux/magic.h`.
const FUSE_SUPER_MAGIC: i64 = 0x6573_5546;

/// The descriptor table of a process. Descriptors that close or change while they are looked at are left out.
///
/// Asks the file's own filesystem for attributes, so a hook that hangs makes this hang.
///
/// # Errors
/// When the process is gone.
pub fn descriptors(pid: u32) -> Result<BTreeMap<u32, Slot>> {
    fs::metadata(format!("/proc/{pid}/fd")).with_context(|| format!("no process {pid}"))?;
    Ok(numbers(&format!("/proc/{pid}/fd"))
        .into_iter()
        .filter_map(|number| Some((number, slot(pid, number)?)))
        .collect())
}

/// One slot, seen at one moment: everything is asked through one O_PATH descriptor of the file, and the text in fdinfo
/// counts only if it is about the same file.
fn slot(pid: u32, number: u32) -> Option<Slot> {
    let file = open(
        format!("/proc/{pid}/fd/{number}"),
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .ok()?;
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).ok()?;
    let own = fs::read_to_string(format!("/proc/thread-self/fdinfo/{}", file.as_raw_fd())).ok()?;
    let field = |text: &str, name: &str| -> Option<u64> {
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?
            .trim();
        if name == "flags" {
            u64::from_str_radix(value, 8).ok()
        } else {
            value.parse().ok()
        }
    };
    for same in ["mnt_id", "ino"] {
        if field(&info, same)? != field(&own, same)? {
            return None;
        }
    }
    let status = fstat(&file).ok()?;
    Some(Slot {
        link: fs::read_link(format!("/proc/thread-self/fd/{}", file.as_raw_fd())).ok()?,
        flags: u32::try_from(field(&info, "flags")?).ok()?,
        position: field(&info, "pos")?,
        mount: field(&info, "mnt_id")?,
        mode: status.st_mode,
        inode: status.st_ino,
        hooked: fstatfs(&file).ok()?.f_type == FUSE_SUPER_MAGIC,
    })
}

/// The mounts that a process sees: `(mount id, mount point, filesystem type)`.
///
/// # Errors
/// When the process is gone.
pub fn mounts(process: &str) -> Result<Vec<(u64, String, String)>> {
    let text = fs::read_to_string(format!("/proc/{process}/mountinfo"))
        .with_context(|| format!("no process {process}"))?;
    let mut found = Vec::new();
    for line in text.lines() {
        let mut fields = line.split(' ');
        let id = fields
            .next()
            .and_then(|id| id.parse().ok())
            .context("odd line in mountinfo")?;
        let point = fields.nth(3).context("odd line in mountinfo")?.to_owned();
        let kind = fields
            .skip_while(|field| *field != "-")
            .nth(1)
            .context("odd line in mountinfo")?
            .to_owned();
        found.push((id, point, kind));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_described() -> Result<()> {
        let pid = std::process::id();
        assert!(is_running(identify(pid)?));
        assert_eq!(status_field(pid, "Pid")?, pid.to_string());
        assert!(tree(pid).contains(&pid));
        assert!(
            mounts("self")?
                .iter()
                .any(|(_, point, kind)| point == "/proc" && kind == "proc")
        );
        let file = tempfile::tempfile()?;
        let number = std::os::fd::AsRawFd::as_raw_fd(&file) as u32;
        let slot = descriptors(pid)?
            .remove(&number)
            .context("own descriptor not found")?;
        assert!(slot.movable() && !slot.hooked && slot.flags & 0o2_000_000 != 0);
        Ok(())
    }

    #[test]
    fn a_process_that_never_was_is_not_running() {
        assert!(!is_running(Identity {
            pid: std::process::id(),
            start: 0
        }));
        assert!(identify(u32::MAX).is_err());
    }
}
