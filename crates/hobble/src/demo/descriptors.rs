//! What a process has open below a directory, as `/proc` tells it: descriptor number, file, mount and kind of filesystem.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;

/// One descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Descriptor {
    /// Its number in the process.
    pub(crate) fd: u32,
    /// What `/proc/<pid>/fd/<fd>` names.
    pub(crate) path: PathBuf,
    /// The mount it was opened through (`mnt_id` in `fdinfo`).
    pub(crate) mount: u64,
    /// The kind of filesystem of that mount, as the process's `mountinfo` says.
    pub(crate) filesystem: String,
}

impl Descriptor {
    /// Whether it goes through FUSE.
    pub(crate) fn is_hooked(&self) -> bool {
        self.filesystem == "fuse" || self.filesystem.starts_with("fuse.")
    }
}

/// The kinds of filesystem of all mounts that a process sees, by mount id.
fn mounts(pid: u32) -> anyhow::Result<BTreeMap<u64, String>> {
    let path = format!("/proc/{pid}/mountinfo");
    let text = std::fs::read(&path).with_context(|| format!("read {path}"))?;
    Ok(String::from_utf8_lossy(&text)
        .lines()
        .filter_map(parse_mount)
        .collect())
}

/// Mount id and kind of filesystem of a line of `mountinfo` (proc_pid_mountinfo(5)): the kind follows the lone hyphen.
fn parse_mount(line: &str) -> Option<(u64, String)> {
    let id = line.split(' ').next()?.parse().ok()?;
    let kind = line.split_once(" - ")?.1.split(' ').next()?;
    Some((id, kind.to_owned()))
}

/// The mount id in the text of an `fdinfo`.
fn parse_mount_id(fdinfo: &str) -> Option<u64> {
    fdinfo
        .lines()
        .find_map(|line| line.strip_prefix("mnt_id:"))?
        .trim()
        .parse()
        .ok()
}

/// What `pid` has open below `directory`, by number.
pub(crate) fn below(pid: u32, directory: &Path) -> anyhow::Result<Vec<Descriptor>> {
    let mounts = mounts(pid)?;
    let table = format!("/proc/{pid}/fd");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&table).with_context(|| format!("list {table}"))? {
        let entry = entry.with_context(|| format!("list {table}"))?;
        // A descriptor may be closed between listing and reading.
        let Ok(path) = std::fs::read_link(entry.path()) else {
            continue;
        };
        if !path.starts_with(directory) {
            continue;
        }
        let Some(fd) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let Ok(fdinfo) = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")) else {
            continue;
        };
        let mount = parse_mount_id(&fdinfo)
            .with_context(|| format!("no mnt_id in fdinfo of descriptor {fd}"))?;
        let filesystem = mounts
            .get(&mount)
            .cloned()
            .unwrap_or_else(|| "not mounted".to_owned());
        found.push(Descriptor {
            fd,
            path,
            mount,
            filesystem,
        });
    }
    found.sort_by_key(|descriptor| descriptor.fd);
    Ok(found)
}

/// The kind of filesystem that a directory lies on.
pub(crate) fn filesystem_of(directory: &Path) -> anyhow::Result<String> {
    let handle =
        std::fs::File::open(directory).with_context(|| format!("open {}", directory.display()))?;
    let fdinfo = format!(
        "/proc/self/fdinfo/{}",
        std::os::fd::AsRawFd::as_raw_fd(&handle)
    );
    let text = std::fs::read_to_string(&fdinfo).with_context(|| format!("read {fdinfo}"))?;
    let mount = parse_mount_id(&text).context("no mnt_id in fdinfo")?;
    Ok(mounts(std::process::id())?
        .get(&mount)
        .cloned()
        .unwrap_or_else(|| "unknown".to_owned()))
}

/// When a process started, in clock ticks since boot: with the pid, its identity.
pub(crate) fn start_time(pid: u32) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    parse_start_time(&text).with_context(|| format!("no start time in {path}"))
}

/// Field 22 of `stat`, counted behind the name, which may contain anything (proc_pid_stat(5)).
fn parse_start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?
        .1
        .split_ascii_whitespace()
        .nth(19)?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc() {
        let line =
            r"87 25 0:52 / /var/tmp/a\040b rw,relatime shared:1 - fuse.hobble hobble rw,user_id=0";
        assert_eq!(parse_mount(line), Some((87, "fuse.hobble".to_owned())));
        assert_eq!(parse_mount("nonsense"), None);
        assert_eq!(
            parse_mount_id("pos:\t0\nflags:\t02\nmnt_id:\t25\nino:\t3\n"),
            Some(25)
        );
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 424242 1 1";
        assert_eq!(parse_start_time(stat), Some(424_242));
    }

    #[test]
    fn own_descriptors_are_found_with_their_mount() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        let file = std::fs::File::create(&path).unwrap();
        let found = below(std::process::id(), directory.path()).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].path, path);
        assert_eq!(
            i64::from(found[0].fd),
            i64::from(std::os::fd::AsRawFd::as_raw_fd(&file))
        );
        assert!(!found[0].is_hooked());
        assert_eq!(
            found[0].filesystem,
            filesystem_of(directory.path()).unwrap()
        );
        assert!(start_time(std::process::id()).unwrap() > 0);
    }
}
