//! Asserts that a test leaves the machine as it found it.
//!
//! Owns the snapshot taken at the start. Invariant: a difference is reported only when it lasts longer than [`GRACE`], since the
//! kernel takes mounts and loop devices down after the last process has gone.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::process;

/// How long something may take to disappear.
pub const GRACE: Duration = Duration::from_secs(5);

/// The state of the machine at one moment, to compare with a later one.
///
/// The check covers: mounts of this thread's namespace and of the process's own, FUSE connections, loop devices,
/// stopped or traced tasks, processes of Hobble, entries of the state directory, own descriptors. On a machine where
/// other test runs go on at the same time set `HOBBLE_SHARED_MACHINE=1`: what cannot be told apart from theirs is then
/// left out (FUSE connections, loop devices, tasks, processes).
#[derive(Debug)]
pub struct LeakCheck {
    state_dirs: Vec<PathBuf>,
    before: BTreeSet<String>,
}

impl LeakCheck {
    /// Takes the snapshot; `state_dirs` are Hobble's state directories that the test uses.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn new(state_dirs: Vec<PathBuf>) -> Result<LeakCheck> {
        let before = snapshot(&state_dirs)?;
        Ok(LeakCheck { state_dirs, before })
    }

    /// Compares with now.
    ///
    /// # Errors
    /// Lists what is there now and was not before, [`GRACE`] later.
    pub fn finish(self) -> Result<()> {
        let deadline = Instant::now() + GRACE;
        loop {
            let now = snapshot(&self.state_dirs)?;
            let left: Vec<&String> = now.difference(&self.before).collect();
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!("left behind: {left:#?}");
            }
            // The kernel takes things down in its own time and tells nobody.
            thread::sleep(Duration::from_millis(50));
        }
    }
}

fn snapshot(state_dirs: &[PathBuf]) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for view in ["self", "thread-self"] {
        for (id, point, kind) in process::mounts(view)? {
            found.insert(format!("mount {id} of {kind} at {point}"));
        }
    }
    for directory in state_dirs {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            found.insert(format!("state {}", entry.path().display()));
        }
    }
    let own = process::numbers("/proc/self/fd").len();
    // Only the number counts: which slot a descriptor has is chance. One entry per count makes the
    // difference of two sets show growth and not shrinkage.
    found.extend((0..own).map(|n| format!("descriptor no. {}", n + 1)));
    if std::env::var_os("HOBBLE_SHARED_MACHINE").is_none() {
        for connection in process::numbers("/sys/fs/fuse/connections") {
            found.insert(format!("FUSE connection {connection}"));
        }
        for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
            if let Ok(file) = fs::read_to_string(entry.path().join("loop/backing_file")) {
                found.insert(format!(
                    "loop device {} on {}",
                    entry.file_name().to_string_lossy(),
                    file.trim_end()
                ));
            }
        }
        for pid in process::numbers("/proc") {
            task_facts(pid, &mut found);
        }
    }
    Ok(found)
}

fn task_facts(pid: u32, found: &mut BTreeSet<String>) {
    let Ok(stat) = process::stat(&pid.to_string()) else {
        return;
    };
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let name = name.trim_end();
    // By executable: a server is started through /proc/self/exe, and is called so.
    let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    let is_hobble = exe
        .file_name()
        .is_some_and(|file| matches!(file.to_str(), Some("hobble" | "hobble (deleted)")));
    if is_hobble && stat.state != 'Z' {
        found.insert(format!("process {pid} of hobble"));
    }
    for tid in process::numbers(&format!("/proc/{pid}/task")) {
        if let Ok(task) = process::stat(&format!("{pid}/task/{tid}"))
            && matches!(task.state, 'T' | 't')
        {
            found.insert(format!(
                "task {tid} of {pid} ({name}) in state {}",
                task.state
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_new_is_no_leak() -> Result<()> {
        LeakCheck::new(Vec::new())?.finish()
    }

    #[test]
    fn an_entry_in_the_state_directory_is_a_leak() -> Result<()> {
        let scratch = crate::scratch::Scratch::new()?;
        let check = LeakCheck::new(vec![scratch.path().to_owned()])?;
        fs::write(scratch.path().join("attachment"), "")?;
        let error = check.finish().unwrap_err().to_string();
        assert!(error.contains("attachment"), "{error}");
        Ok(())
    }
}
