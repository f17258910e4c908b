//! Which processes are Hobble's own.
//!
//! Invariant: they are never targets, whatever the scope says of them: neither stopped, nor moved, nor faulted. There are three: the server, which takes
//! the steps; the holder, which shares its descriptor table; and the *caller*, which asked for the attachment, watches it and ends it. With
//! `--pid $$` or `--scope namespace` all of them are among the processes found.

use std::path::Path;

use hobble_graft::census;
use hobble_graft::ids::{Pid, ProcessId};
use hobble_graft::proc::{stat, tree};

/// Generations that are looked at; only a race of re-used pids could make a longer chain.
const GENERATIONS: usize = 64;

/// Hobble's own processes, as seen by one of them.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Own {
    caller: Option<ProcessId>,
}

impl Own {
    /// This process, whoever shares its descriptor table, and `caller`.
    pub(crate) fn new(caller: Option<ProcessId>) -> Self {
        Self { caller }
    }

    /// Who asked for the attachment.
    pub(crate) fn caller(self) -> Option<ProcessId> {
        self.caller
    }

    /// Whether this process is the caller: its pid may have been given again once it has left a detached attachment.
    fn is_caller(self, pid: Pid) -> bool {
        self.caller
            .is_some_and(|caller| caller.pid == pid && ProcessId::of(pid).ok() == Some(caller))
    }

    /// Whether the process is one of Hobble's own.
    pub(crate) fn includes(self, pid: Pid) -> bool {
        self.acts_as(pid.as_raw()) || census::shares_our_table(pid)
    }

    /// Whether the process is one of those that may do something on the hook: the holder only waits, so it is not asked for. Cheap for strangers.
    pub(crate) fn acts_as(self, pid: i32) -> bool {
        Pid::new(pid).is_some_and(|pid| pid == Pid::own() || self.is_caller(pid))
    }

    /// Whether the thread is the caller's. One look at `/proc` for strangers: this is asked at every operation that a rule might match.
    pub(crate) fn caller_has_thread(self, tid: i32) -> bool {
        self.caller.is_some_and(|caller| {
            Path::new(&format!("/proc/{}/task/{tid}", caller.pid)).exists()
                && self.is_caller(caller.pid)
        })
    }

    /// The same without a caller that lives in another mount namespace than `pid`: it cannot come upon the hook there, so nobody has to look for it.
    pub(crate) fn within_reach_of(self, pid: i32) -> Self {
        let namespace = |pid: Pid| tree::mount_namespace(pid).ok();
        let near = self.caller.filter(|caller| {
            Pid::new(pid)
                .and_then(namespace)
                .is_none_or(|theirs| namespace(caller.pid).is_none_or(|callers| callers == theirs))
        });
        Self { caller: near }
    }

    /// The caller's parents, nearest first: its shell, the terminal's server, what started those.
    pub(crate) fn ancestors(self) -> Vec<ProcessId> {
        let mut found = Vec::new();
        let mut next = self.caller.map(|caller| caller.pid);
        while let Some(pid) = next.filter(|_| found.len() < GENERATIONS) {
            next = stat::of_process(pid)
                .ok()
                .and_then(|stat| Pid::new(stat.parent))
                .inspect(|parent| found.extend(ProcessId::of(*parent)));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_caller_is_known_by_its_start_time_and_its_threads() {
        let mut child = std::process::Command::new("sleep")
            .arg("30")
            .spawn()
            .unwrap();
        let caller = ProcessId::of(Pid::new(child.id().cast_signed()).unwrap()).unwrap();
        let own = Own::new(Some(caller));
        let reused = Own::new(Some(ProcessId {
            start_time: caller.start_time + 1,
            ..caller
        }));
        let raw = caller.pid.as_raw();
        let seen = (
            own.includes(caller.pid) && own.caller_has_thread(raw),
            reused.includes(caller.pid) || reused.caller_has_thread(raw),
            own.ancestors().first().map(|parent| parent.pid),
        );
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(seen, (true, false, Some(Pid::own())));
        assert!(own.includes(Pid::own()) && !own.caller_has_thread(Pid::own().as_raw()));
        assert!(!own.includes(caller.pid), "it has ended");
    }
}
