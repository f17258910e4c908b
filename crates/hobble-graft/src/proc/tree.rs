//! Which processes there are: a process and its descendants, or everybody in a mount namespace.
//!
//! `/proc` is not a snapshot, so every answer is read until two readings in a row agree. What was once found is kept as long as it
//! lives: a child whose parent exits meanwhile is adopted by somebody else and would otherwise be lost.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::{ProcError, stat};
use crate::ids::{Pid, ProcessId, Tid};

/// Readings after which a tree that grows and grows is taken as it is.
const READINGS: usize = 64;

/// The kernel's name for a mount namespace: the inode of `/proc/<pid>/ns/mnt`. The first one always has the same number; others are
/// handed out again after their end, so hold a descriptor of the namespace where identity matters for long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MountNamespaceId(pub u64);

/// The mount namespace of a process (of its first thread).
///
/// # Errors
/// [`ProcError::Gone`] when there is no such process or it is a zombie.
pub fn mount_namespace(pid: Pid) -> Result<MountNamespaceId, ProcError> {
    namespace_at(&PathBuf::from(format!("/proc/{pid}/ns/mnt")))
}

fn namespace_at(path: &Path) -> Result<MountNamespaceId, ProcError> {
    let metadata = std::fs::metadata(path).map_err(|e| ProcError::read(path, &e))?;
    Ok(MountNamespaceId(metadata.ino()))
}

/// Every process in `/proc`, threads of the kernel and zombies included, by ascending pid.
///
/// # Errors
/// When `/proc` cannot be listed.
pub fn pids() -> Result<Vec<Pid>, ProcError> {
    numbers(Path::new("/proc")).map(|n| n.into_iter().filter_map(Pid::new).collect())
}

/// The threads of a process, by ascending id.
///
/// # Errors
/// [`ProcError::Gone`] when there is no such process.
pub fn threads(pid: Pid) -> Result<Vec<Tid>, ProcError> {
    let path = PathBuf::from(format!("/proc/{pid}/task"));
    let threads: Vec<Tid> = numbers(&path)?.into_iter().filter_map(Tid::new).collect();
    // A process that is reaped while it is listed leaves an empty directory rather than an error.
    if threads.is_empty() {
        Err(ProcError::Gone { path })
    } else {
        Ok(threads)
    }
}

fn numbers(path: &Path) -> Result<Vec<i32>, ProcError> {
    let list = std::fs::read_dir(path).map_err(|e| ProcError::read(path, &e))?;
    let mut numbers = Vec::new();
    for entry in list {
        let entry = entry.map_err(|e| ProcError::read(path, &e))?;
        if let Some(number) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// `roots` and all their living descendants, by ascending pid. A descendant whose line of parents was already broken when this was
/// first called (a daemon that forked twice) cannot be told from a stranger.
///
/// # Errors
/// When `/proc` cannot be read. That a process vanishes is no error; it is left out.
pub fn descendants(roots: &[ProcessId]) -> Result<Vec<ProcessId>, ProcError> {
    let mut found: BTreeSet<ProcessId> = roots.iter().copied().collect();
    let mut previous = None;
    for _ in 0..READINGS {
        let mut all = Vec::new();
        for pid in pids()? {
            match stat::of_process(pid) {
                Ok(stat) if !stat.has_ended() => {
                    all.push((
                        ProcessId {
                            pid,
                            start_time: stat.start_time,
                        },
                        stat.parent,
                    ));
                }
                Ok(_) => {}
                Err(error) if error.is_gone() => {}
                Err(error) => return Err(error),
            }
        }
        let living: BTreeSet<ProcessId> = all.iter().map(|(id, _)| *id).collect();
        // Parents usually have smaller pids than their children but need not, so go round until nothing is added.
        loop {
            let members: BTreeSet<i32> = found
                .iter()
                .filter(|id| living.contains(id))
                .map(|id| id.pid.as_raw())
                .collect();
            let before = found.len();
            found.extend(
                all.iter()
                    .filter(|(_, parent)| members.contains(parent))
                    .map(|(id, _)| *id),
            );
            if found.len() == before {
                break;
            }
        }
        let now: Vec<ProcessId> = found
            .iter()
            .filter(|id| living.contains(id))
            .copied()
            .collect();
        if previous.as_ref() == Some(&now) {
            return Ok(now);
        }
        previous = Some(now);
    }
    Ok(previous.unwrap_or_default())
}

/// Who is in a mount namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inhabitants {
    /// Living processes with at least one thread in it, by ascending pid.
    pub processes: Vec<ProcessId>,
    /// Processes that have more privileges than we have, so that the kernel does not tell where they are.
    pub opaque: Vec<Pid>,
}

/// Everybody in the mount namespace, whatever their pid namespace.
///
/// # Errors
/// When `/proc` cannot be read. That a process vanishes is no error; it is left out.
pub fn in_mount_namespace(namespace: MountNamespaceId) -> Result<Inhabitants, ProcError> {
    let mut previous: Option<Inhabitants> = None;
    for _ in 0..READINGS {
        let mut now = Inhabitants::default();
        for pid in pids()? {
            match member(pid, namespace) {
                Ok(Some(id)) => now.processes.push(id),
                Ok(None) => {}
                Err(error) if error.is_gone() => {}
                Err(ProcError::Read {
                    errno: Errno::ACCESS | Errno::PERM,
                    ..
                }) => now.opaque.push(pid),
                Err(error) => return Err(error),
            }
        }
        if previous.as_ref() == Some(&now) {
            break;
        }
        previous = Some(now);
    }
    Ok(previous.unwrap_or_default())
}

fn member(pid: Pid, namespace: MountNamespaceId) -> Result<Option<ProcessId>, ProcError> {
    if stat::of_process(pid)?.is_kernel_thread() {
        return Ok(None);
    }
    // The first thread answers for nearly all; it may have ended, or be the one that went elsewhere.
    let by_process = mount_namespace(pid);
    let mut is_member = matches!(by_process, Ok(own) if own == namespace);
    if !is_member {
        for tid in threads(pid)? {
            let path = PathBuf::from(format!("/proc/{pid}/task/{tid}/ns/mnt"));
            match namespace_at(&path) {
                Ok(own) if own == namespace => is_member = true,
                Ok(_) => {}
                Err(error) if error.is_gone() => {}
                Err(error) => return Err(error),
            }
        }
    }
    if !is_member {
        return Ok(None);
    }
    let stat = stat::of_process(pid)?;
    Ok((!stat.has_ended()).then_some(ProcessId {
        pid,
        start_time: stat.start_time,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_holds_children_and_grandchildren_and_no_strangers() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "sleep 60 & sleep 60 & wait"])
            .spawn()
            .unwrap();
        let mut stranger = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let id = |c: &std::process::Child| {
            ProcessId::of(Pid::new(c.id().cast_signed()).unwrap()).unwrap()
        };
        let (root, other) = (id(&child), id(&stranger));
        let end = std::time::Instant::now() + std::time::Duration::from_secs(5);
        let mut tree = descendants(&[root]).unwrap();
        while tree.len() < 3 && std::time::Instant::now() < end {
            tree = descendants(&[root]).unwrap();
        }
        for process in tree.iter().skip(1) {
            let raw = rustix::process::Pid::from_raw(process.pid.as_raw()).unwrap();
            rustix::process::kill_process(raw, rustix::process::Signal::KILL).unwrap();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let after = descendants(&[root]).unwrap();
        stranger.kill().unwrap();
        stranger.wait().unwrap();
        assert_eq!(tree.len(), 3, "{tree:?}");
        assert!(tree.contains(&root) && !tree.contains(&other));
        assert_eq!(after, [], "nobody is left of a tree that was killed");
    }

    #[test]
    fn we_are_in_our_mount_namespace() {
        let own = ProcessId::own().unwrap();
        let namespace = mount_namespace(own.pid).unwrap();
        let ours = in_mount_namespace(namespace).unwrap();
        assert!(ours.processes.contains(&own) && !ours.opaque.contains(&own.pid));
        assert_eq!(
            in_mount_namespace(MountNamespaceId(1)).unwrap().processes,
            []
        );
    }
}
