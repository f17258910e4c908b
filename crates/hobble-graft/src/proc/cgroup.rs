//! `/proc/<pid>/cgroup`, and whether a process stands still because its cgroup is frozen.
//!
//! Both hierarchies are understood: version 2 says `frozen 1` in `cgroup.events`, version 1 `FROZEN` in `freezer.state`. A frozen
//! process cannot be stopped by a tracer, so it is looked for before one tries.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use super::text::Cursor;
use super::{ParseError, ProcError, mountinfo};
use crate::ids::Pid;

/// A line of `cgroup`: the place of a process in one hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// Number of the hierarchy; 0 is version 2.
    pub hierarchy: u64,
    /// Controllers of a version 1 hierarchy, or `name=…`; empty for version 2.
    pub controllers: Vec<Vec<u8>>,
    /// The cgroup, from the root of the reader's cgroup namespace.
    pub path: PathBuf,
}

/// Parses the text of `cgroup`.
///
/// # Errors
/// The first byte that is not as `proc_cgroup_show` writes it.
pub fn parse(text: &[u8]) -> Result<Vec<Membership>, ParseError> {
    let mut at = Cursor::new(text);
    let mut memberships = Vec::new();
    while !at.is_empty() {
        let mut line = at.line_cursor();
        let hierarchy = line.decimal("the number of a hierarchy")?;
        line.literal(b":", "a colon")?;
        let controllers = line.until(b':', "controllers and a colon")?;
        let controllers = controllers
            .split(|b| *b == b',')
            .filter(|c| !c.is_empty())
            .map(<[u8]>::to_vec)
            .collect();
        let path = OsString::from_vec(line.rest().to_vec()).into();
        memberships.push(Membership {
            hierarchy,
            controllers,
            path,
        });
    }
    Ok(memberships)
}

/// `/proc/<pid>/cgroup`.
///
/// # Errors
/// [`ProcError::Gone`] when there is no such process.
pub fn of_process(pid: Pid) -> Result<Vec<Membership>, ProcError> {
    let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
    parse(&super::read(&path)?).map_err(|e| ProcError::parse(&path, e))
}

/// Whether the process is frozen, by its own cgroup or one above it; `None` when no hierarchy that could say so is mounted where
/// we can see it.
///
/// # Errors
/// [`ProcError::Gone`] when there is no such process.
pub fn is_frozen(pid: Pid) -> Result<Option<bool>, ProcError> {
    let mounts = mountinfo::of_process(Pid::own())?;
    let mut known = None;
    for membership in of_process(pid)? {
        let is_v2 = membership.hierarchy == 0;
        if !is_v2 && !membership.controllers.iter().any(|c| c == b"freezer") {
            continue;
        }
        let mount = mounts.iter().find(|m| {
            if is_v2 {
                m.fs_type == "cgroup2"
            } else {
                let options = std::os::unix::ffi::OsStrExt::as_bytes(m.super_options.as_os_str());
                m.fs_type == "cgroup" && options.split(|b| *b == b',').any(|o| o == b"freezer")
            }
        });
        let Some(mount) = mount else { continue };
        let Ok(below) = membership.path.strip_prefix(&mount.root) else {
            continue;
        };
        let directory = mount.mount_point.join(below);
        let file = directory.join(if is_v2 {
            "cgroup.events"
        } else {
            "freezer.state"
        });
        // The root of a hierarchy has neither file: it cannot be frozen.
        let frozen = match super::read(&file) {
            Ok(text) if is_v2 => text.split(|b| *b == b'\n').any(|line| line == b"frozen 1"),
            Ok(text) => text.trim_ascii() != b"THAWED",
            Err(error) if error.is_gone() && below == Path::new("") => false,
            Err(error) if error.is_gone() => continue,
            Err(error) => return Err(error),
        };
        known = Some(known.unwrap_or(false) || frozen);
    }
    Ok(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions() {
        let list = parse(b"12:cpu,cpuacct:/a:b\n1:name=systemd:/\n0::/user.slice\n").unwrap();
        assert_eq!(list[0].controllers, [b"cpu".to_vec(), b"cpuacct".to_vec()]);
        assert_eq!(list[0].path, PathBuf::from("/a:b"));
        assert_eq!((list[2].hierarchy, list[2].controllers.len()), (0, 0));
        assert_eq!(
            parse(b"x"),
            Err(ParseError::new(0, "the number of a hierarchy"))
        );
        assert_eq!(
            parse(b"1:cpu"),
            Err(ParseError::new(2, "controllers and a colon"))
        );
    }

    #[test]
    fn we_are_not_frozen() {
        assert_ne!(is_frozen(Pid::own()).unwrap(), Some(true));
    }

    /// A child in a freezer cgroup of its own, thawed and gone in the end.
    struct Frozen {
        child: std::process::Child,
        directory: PathBuf,
        switch: (&'static str, &'static str, &'static str),
    }

    impl Drop for Frozen {
        fn drop(&mut self) {
            let _ = std::fs::write(self.directory.join(self.switch.0), self.switch.2);
            let _ = self.child.kill();
            let _ = self.child.wait();
            // A cgroup is busy until the kernel has let go of its last process.
            for _ in 0..200 {
                if std::fs::remove_dir(&self.directory).is_ok() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        }
    }

    #[test]
    fn a_frozen_process_is_seen() {
        let mounts = mountinfo::of_process(Pid::own()).unwrap();
        let v1 = mounts.iter().find(|m| {
            m.fs_type == "cgroup"
                && m.super_options
                    .to_string_lossy()
                    .split(',')
                    .any(|o| o == "freezer")
        });
        let v2 = || mounts.iter().find(|m| m.fs_type == "cgroup2");
        let (mount, switch) = match v1 {
            Some(mount) => (mount, ("freezer.state", "FROZEN", "THAWED")),
            None => (
                v2().expect("no cgroup hierarchy is mounted"),
                ("cgroup.freeze", "1", "0"),
            ),
        };
        let directory = mount
            .mount_point
            .join(format!("hobble-test-{}", std::process::id()));
        std::fs::create_dir(&directory).expect("cgroups cannot be made here");
        let child = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        let pid = Pid::new(child.id().cast_signed()).unwrap();
        let frozen = Frozen {
            child,
            directory,
            switch,
        };
        std::fs::write(frozen.directory.join("cgroup.procs"), pid.to_string()).unwrap();
        assert_eq!(is_frozen(pid).unwrap(), Some(false));
        std::fs::write(frozen.directory.join(switch.0), switch.1).unwrap();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while is_frozen(pid).unwrap() != Some(true) {
            assert!(
                std::time::Instant::now() < end,
                "it does not freeze, or is not seen to"
            );
        }
    }
}
