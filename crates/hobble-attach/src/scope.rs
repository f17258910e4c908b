//! Who is a target: the answer that the mirror asks for at every operation that a rule might match.
//!
//! Invariants: in `tree` scope a process is a target from its fork on, whatever becomes of its parents; a process that only got the pid of one is none.
//! Hobble's own processes ([`Own`]) are never targets, whoever started them.
//!
//! The process-event connector ([`crate::process_events`]) reports every fork before the child first runs (kernel/fork.c: `proc_fork_connector` precedes
//! `wake_up_new_task`), so draining it before deciding on an unknown caller makes a double-forked daemon a target. It reports every exit too, so with it a
//! pid, or a thread id, means who it meant when it was heard of.
//!
//! Where the connector cannot be had, or has lost events (ENOBUFS), nobody tells of an exit, and a number alone means nothing: a process counts only with the
//! start time that it was known with. The chain of parents is then followed at the first operation of a new process, which misses a process whose parents
//! have already gone; pre-flight says so.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use hobble_graft::ids::{Pid, ProcessId, Tid};
use hobble_graft::proc::{stat, status};

use crate::own::Own;

use crate::process_events::{Connector, ProcessEvent};

/// A chain of parents is short; the bound only keeps a race of re-used pids from looping.
const LONGEST_CHAIN: usize = 64;
/// Threads that are remembered where nobody tells of their end; then all are forgotten and looked up afresh.
const MOST_THREADS: usize = 1 << 14;

/// What is known of a thread.
#[derive(Debug, Clone, Copy)]
struct Thread {
    is_target: bool,
    /// When it started; `None` where its exit event takes it away.
    start: Option<u64>,
}

#[derive(Debug, Default)]
struct Tree {
    /// Members: pid, and the start time that makes the pid that process. `None` for one that was gone, or could not be looked at, when its fork event was
    /// read: until its exit event its pid is its own, and its children are members too. Only with the connector, and not past a loss of events.
    processes: BTreeMap<Pid, Option<u64>>,
    /// Known threads.
    threads: HashMap<i32, Thread>,
}

impl Tree {
    fn of(list: Vec<ProcessId>) -> Self {
        Self {
            processes: list
                .into_iter()
                .map(|process| (process.pid, Some(process.start_time)))
                .collect(),
            threads: HashMap::new(),
        }
    }

    /// Whether this very process is a member. One with the same pid that started at another time is forgotten: it has ended.
    fn has(&mut self, process: ProcessId) -> bool {
        let Some(start) = self.processes.get_mut(&process.pid) else {
            return false;
        };
        let is_same = *start.get_or_insert(process.start_time) == process.start_time;
        if !is_same {
            self.processes.remove(&process.pid);
        }
        is_same
    }

    /// Whether a process or one of its parents is a member; whoever is in between becomes one.
    fn has_above(&mut self, process: Pid, own: Own) -> bool {
        let mut chain: Vec<ProcessId> = Vec::new();
        let mut next = process;
        for _ in 0..LONGEST_CHAIN {
            let Ok(stat) = stat::of_process(next) else {
                return false;
            };
            let found = ProcessId {
                pid: next,
                start_time: stat.start_time,
            };
            // A parent, by adoption too, is older than its child: what is younger has the pid of a parent that has ended just now.
            if chain
                .last()
                .is_some_and(|child| child.start_time < found.start_time)
            {
                return false;
            }
            if self.has(found) {
                let between = chain
                    .into_iter()
                    .map(|process| (process.pid, Some(process.start_time)));
                self.processes.extend(between);
                return true;
            }
            chain.push(found);
            match Pid::new(stat.parent) {
                Some(parent) if parent.as_raw() > 1 && !own.acts_as(parent.as_raw()) => {
                    next = parent
                }
                _ => return false,
            }
        }
        false
    }

    fn forked(&mut self, parent: Pid, child_thread: i32, child: Pid) {
        self.threads.remove(&child_thread);
        let is_process = child_thread == child.as_raw();
        if self.processes.contains_key(&parent) {
            // A new thread of a member tells nothing new.
            if is_process || !self.processes.contains_key(&child) {
                self.processes.insert(child, start_of(child));
            }
        } else if is_process {
            // A re-used pid whose exit event was lost must not inherit its predecessor's place.
            self.processes.remove(&child);
        }
    }

    fn exited(&mut self, thread: i32, process: Pid) {
        self.threads.remove(&thread);
        let Some(start) = self.processes.get(&process) else {
            return;
        };
        // The pid may be another's by the time the event is read.
        let is_other = start.is_some_and(|start| start_of(process) != Some(start));
        if is_other || !has_other_threads(process, thread) {
            self.processes.remove(&process);
        }
    }

    /// Forgets whoever is not known to live still.
    fn retain_living(&mut self) {
        self.processes.retain(|pid, start| {
            start.is_some_and(|start_time| {
                let process = ProcessId {
                    pid: *pid,
                    start_time,
                };
                process.is_alive().unwrap_or(true)
            })
        });
    }
}

/// When the process or thread that has this number now started.
fn start_of(pid: Pid) -> Option<u64> {
    // A thread that is no leader is not listed in /proc, but may be looked up there, and what `stat` tells then is its own.
    stat::of_process(pid).ok().map(|stat| stat.start_time)
}

/// Whether a process has a living thread besides `thread`: the leader may exit before its threads (pthread_exit in main), and the process stays a target until
/// the last has gone. The one that reports its exit is still listed.
fn has_other_threads(process: Pid, thread: i32) -> bool {
    let threads = hobble_graft::proc::tree::threads(process).unwrap_or_default();
    threads
        .into_iter()
        .filter(|tid| tid.as_raw() != thread)
        .any(|tid| stat::of_thread(process, tid).is_ok_and(|stat| !stat.state.is_dead()))
}

/// The set of target processes.
#[derive(Debug)]
pub(crate) struct TargetSet {
    everyone: bool,
    own: Own,
    connector: Option<Connector>,
    tree: Mutex<Tree>,
}

impl TargetSet {
    /// Everybody who reaches the hook is a target (`--scope namespace`).
    pub(crate) fn everyone(own: Own) -> Arc<Self> {
        Arc::new(Self {
            everyone: true,
            own,
            connector: None,
            tree: Mutex::default(),
        })
    }

    /// These processes and all their later descendants. The subscription is made before `list` is called, so that no fork falls between.
    pub(crate) fn tree(own: Own, list: impl FnOnce() -> Vec<ProcessId>) -> Arc<Self> {
        let connector = match Connector::subscribe() {
            Ok(connector) => Some(connector),
            Err(error) => {
                tracing::warn!(%error, "process events are not available; descendants are found by their parents only");
                None
            }
        };
        Self::with(own, connector, list())
    }

    fn with(own: Own, connector: Option<Connector>, list: Vec<ProcessId>) -> Arc<Self> {
        Arc::new(Self {
            everyone: false,
            own,
            connector,
            tree: Mutex::new(Tree::of(list)),
        })
    }

    /// Whether forks are seen as they happen.
    pub(crate) fn follows_forks(&self) -> bool {
        self.everyone || self.connector.is_some()
    }

    /// The target processes known now, by ascending pid, those that have exited left out.
    pub(crate) fn processes(&self) -> Vec<ProcessId> {
        let mut tree = self.tree.lock().unwrap_or_else(PoisonError::into_inner);
        self.drain(&mut tree);
        if self.connector.is_none() {
            tree.retain_living();
        }
        tree.processes
            .iter()
            .filter_map(|(pid, start)| {
                Some(ProcessId {
                    pid: *pid,
                    start_time: start.or_else(|| start_of(*pid))?,
                })
            })
            .collect()
    }

    fn drain(&self, tree: &mut Tree) {
        let Some(connector) = &self.connector else {
            return;
        };
        let lost = connector.drain(|event| match event {
            ProcessEvent::Fork {
                parent,
                child_thread,
                child,
            } => {
                if let (Some(parent), Some(child)) = (Pid::new(parent), Pid::new(child)) {
                    // A new thread is reported with its process's own parent (kernel/fork.c, CLONE_THREAD), so a command of ours that the target started
                    // comes here with each of its threads.
                    if !self.own.acts_as(child.as_raw()) {
                        tree.forked(parent, child_thread, child);
                    }
                }
            }
            ProcessEvent::Exit { thread, process } => {
                if let Some(process) = Pid::new(process) {
                    tree.exited(thread, process);
                }
            }
        });
        if lost {
            tracing::warn!(
                "process events were lost; children whose parents have gone meanwhile are no targets"
            );
            tree.threads.clear();
            tree.retain_living();
        }
    }

    /// Whether the thread belongs to a target. One look into a map for a thread that is known, where the connector tells when it ends.
    pub(crate) fn contains(&self, tid: i32) -> bool {
        if self.everyone {
            return !self.own.caller_has_thread(tid);
        }
        // Where nobody tells of its end, the answer that is known for a thread id counts for the thread that it was found for, and for no other: its start time
        // is read every time. That is a few microseconds for each operation on top of the two context switches of a FUSE request; to trust the id for a
        // while would fault a stranger's operations.
        let start = if self.connector.is_some() {
            None
        } else {
            let Some(start) = Pid::new(tid).and_then(start_of) else {
                return false;
            };
            Some(start)
        };
        let mut tree = self.tree.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = tree.threads.get(&tid)
            && known.start == start
        {
            return known.is_target;
        }
        self.drain(&mut tree);
        let Some(process) = Tid::new(tid)
            .and_then(|tid| status::of_thread(tid).ok())
            .and_then(|status| Pid::new(status.tgid))
        else {
            return false;
        };
        let is_target = !self.own.acts_as(process.as_raw()) && tree.has_above(process, self.own);
        if start.is_some() && tree.threads.len() >= MOST_THREADS {
            tree.threads.clear();
        }
        tree.threads.insert(tid, Thread { is_target, start });
        is_target
    }
}

/// Keeps the set current while nobody asks, so that the event queue stays short; ends when the set is dropped.
pub(crate) fn follow(set: &Arc<TargetSet>) -> io::Result<()> {
    if set.connector.is_none() {
        return Ok(());
    }
    let weak = Arc::downgrade(set);
    std::thread::Builder::new()
        .name("hobble-scope".into())
        .spawn(move || {
            while let Some(set) = weak.upgrade() {
                if let Some(connector) = &set.connector {
                    connector.wait();
                }
                let mut tree = set.tree.lock().unwrap_or_else(PoisonError::into_inner);
                set.drain(&mut tree);
            }
        })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, Write};
    use std::process::{Child, Command, Stdio};

    fn id(child: &Child) -> ProcessId {
        ProcessId::of(Pid::new(child.id().cast_signed()).expect("pid")).expect("alive")
    }

    /// A process that is gone when this is.
    struct Process(Child);

    impl Process {
        fn sleeping() -> Self {
            Self(Command::new("sleep").arg("30").spawn().expect("sleep"))
        }

        fn pid(&self) -> i32 {
            self.0.id().cast_signed()
        }
    }

    impl Drop for Process {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// A shell with a child that sleeps, and the child's pid.
    fn parent_and_child() -> (Process, i32) {
        let mut shell = Command::new("sh")
            .args(["-c", "sleep 30 >/dev/null 2>&1 & echo $!; wait"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("sh");
        let mut line = String::new();
        std::io::BufReader::new(shell.stdout.take().expect("stdout"))
            .read_line(&mut line)
            .expect("read");
        (Process(shell), line.trim().parse().expect("pid"))
    }

    fn kill(pid: i32) {
        let pid = rustix::process::Pid::from_raw(pid).expect("pid");
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }

    #[test]
    fn without_events_descendants_are_found_by_their_parents() {
        let (shell, child) = parent_and_child();
        let set = TargetSet::with(Own::default(), None, vec![id(&shell.0)]);
        assert!(!set.follows_forks());
        let stranger = Process::sleeping();
        assert!(set.contains(child), "a child of a target");
        assert!(set.contains(child), "the answer is remembered");
        assert!(!set.contains(stranger.pid()), "a stranger");
        let known: Vec<i32> = set
            .processes()
            .into_iter()
            .map(|process| process.pid.as_raw())
            .collect();
        let mut both = [shell.pid(), child];
        both.sort_unstable();
        assert_eq!(known, both);
        // It stays a target when its parent has gone.
        drop(shell);
        assert!(set.contains(child), "an orphan that was a target");
        assert_eq!(set.processes().len(), 1, "the parent has ended");
        kill(child);
    }

    #[test]
    fn a_reused_pid_is_no_target_and_neither_are_its_children() {
        let (shell, child) = parent_and_child();
        let now = id(&shell.0);
        // What had the pid before.
        let before = ProcessId {
            start_time: now.start_time - 1,
            ..now
        };
        for connector in [None, Connector::subscribe().ok()] {
            let set = TargetSet::with(Own::default(), connector, vec![before]);
            assert_eq!(
                (set.contains(shell.pid()), set.contains(child)),
                (false, false)
            );
        }
        let set = TargetSet::with(Own::default(), None, vec![before]);
        assert_eq!(set.processes(), [], "it has ended");
        kill(child);
    }

    #[test]
    fn without_events_what_is_known_of_a_thread_id_does_not_outlive_the_thread() {
        let (target, stranger) = (Process::sleeping(), Process::sleeping());
        let set = TargetSet::with(Own::default(), None, vec![id(&target.0)]);
        // Both ids were somebody else's when they were asked about first.
        {
            let mut tree = set.tree.lock().expect("lock");
            for (process, is_target) in [(&target, false), (&stranger, true)] {
                let start = Some(id(&process.0).start_time - 1);
                tree.threads
                    .insert(process.pid(), Thread { is_target, start });
            }
        }
        assert_eq!(
            (set.contains(target.pid()), set.contains(stranger.pid())),
            (true, false)
        );
    }

    #[test]
    fn whoever_was_gone_when_its_fork_was_read_has_children_that_are_targets() {
        let pid = |raw| Pid::new(raw).expect("pid");
        // Above the largest pid that Linux gives (PID_MAX_LIMIT): nobody has it.
        let (root, daemon) = (pid(4_194_305), pid(4_194_306));
        let living = Process::sleeping();
        let mut tree = Tree::of(vec![ProcessId {
            pid: root,
            start_time: 1,
        }]);
        tree.forked(root, daemon.as_raw(), daemon);
        tree.forked(daemon, living.pid(), pid(living.pid()));
        tree.exited(daemon.as_raw(), daemon);
        assert!(!tree.processes.contains_key(&daemon));
        assert!(tree.has(id(&living.0)));
        // Past a loss of events a pid without a start time could be anybody's.
        tree.forked(root, daemon.as_raw(), daemon);
        tree.retain_living();
        assert_eq!(
            tree.processes.into_keys().collect::<Vec<_>>(),
            [pid(living.pid())]
        );
    }

    #[test]
    fn a_daemon_that_forks_twice_stays_a_target_and_a_stranger_is_none() {
        // The shell waits for its first line, so that it is in the set before it forks.
        let mut shell = Command::new("sh")
            .args([
                "-c",
                "read x; (sh -c 'sleep 30 >/dev/null 2>&1 & echo $!'); read x",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("sh");
        let set = TargetSet::tree(Own::default(), || vec![id(&shell)]);
        assert!(
            set.follows_forks(),
            "the process-event connector is needed for this test"
        );
        shell
            .stdin
            .as_mut()
            .expect("stdin")
            .write_all(b"go\n")
            .expect("write");
        let mut line = String::new();
        std::io::BufReader::new(shell.stdout.take().expect("stdout"))
            .read_line(&mut line)
            .expect("read");
        let orphan: i32 = line.trim().parse().expect("pid");
        let mut stranger = Command::new("sleep").arg("30").spawn().expect("sleep");
        let seen = (
            set.contains(orphan),
            set.contains(stranger.id() as i32),
            set.contains(shell.id() as i32),
        );
        let _ = rustix::process::kill_process(
            rustix::process::Pid::from_raw(orphan).expect("pid"),
            rustix::process::Signal::KILL,
        );
        let _ = stranger.kill();
        let _ = stranger.wait();
        let _ = shell.kill();
        let _ = shell.wait();
        assert_eq!(seen, (true, false, true));
    }

    #[test]
    fn the_caller_is_no_target_though_its_shell_is_one() {
        // A shell, the command that it runs, and what that starts: as with `hobble inject --pid $$`.
        let mut shell = Command::new("sh")
            .args(["-c", "sh -c 'sleep 30 >/dev/null & echo $! $$; wait'; :"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("sh");
        use std::io::BufRead;
        let mut line = String::new();
        std::io::BufReader::new(shell.stdout.take().expect("stdout"))
            .read_line(&mut line)
            .expect("read");
        let pids: Vec<i32> = line
            .split_ascii_whitespace()
            .map(|pid| pid.parse().expect("pid"))
            .collect();
        let (below, caller, above) = (pids[0], pids[1], shell.id() as i32);
        let of_caller = ProcessId::of(Pid::new(caller).expect("a pid"));
        let own = Own::new(Some(of_caller.expect("it runs")));
        let tree = TargetSet::tree(own, || vec![id(&shell)]);
        let everyone = TargetSet::everyone(own);
        let seen = [above, caller, below].map(|pid| (tree.contains(pid), everyone.contains(pid)));
        for pid in [below, caller] {
            let _ = rustix::process::kill_process(
                rustix::process::Pid::from_raw(pid).expect("pid"),
                rustix::process::Signal::KILL,
            );
        }
        let _ = shell.kill();
        let _ = shell.wait();
        // What the caller started lives in the same namespace, where everybody else is a target.
        assert_eq!(seen, [(true, true), (false, false), (false, true)]);
    }
}
