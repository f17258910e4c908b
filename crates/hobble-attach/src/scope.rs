//! Who is a target: the answer that the mirror asks for at every operation that a rule might match.
//!
//! Invariant: in `tree` scope a process is a target from its fork on, whatever becomes of its parents. The kernel's process-event
//! connector (drivers/connector/cn_proc.c) reports every fork before the child first runs (kernel/fork.c: `proc_fork_connector` precedes
//! `wake_up_new_task`), so draining the socket before deciding on an unknown caller makes a double-forked daemon a target. Where the connector
//! cannot be had, the chain of parents is followed at the first operation of a new process, which misses a process whose parents have
//! already gone; pre-flight says so. Hobble's own processes ([`Own`]) are never targets, whoever started them.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use crate::own::Own;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// `CN_IDX_PROC` of linux/connector.h; also the multicast group.
const CN_IDX_PROC: u32 = 1;
/// `CN_VAL_PROC`.
const CN_VAL_PROC: u32 = 1;
/// `PROC_CN_MCAST_LISTEN` of linux/cn_proc.h.
const PROC_CN_MCAST_LISTEN: u32 = 1;
/// `NLMSG_DONE`, the message type that the connector uses.
const NLMSG_DONE: u16 = 3;
const NLMSG_HEADER: usize = 16;
const CN_HEADER: usize = 20;
const EVENT_FORK: u32 = 0x0000_0001;
const EVENT_EXIT: u32 = 0x8000_0000;

/// A process event that matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ProcessEvent {
    Fork {
        parent: i32,
        child_thread: i32,
        child: i32,
    },
    Exit {
        thread: i32,
        process: i32,
    },
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes
        .get(offset..offset + 4)?
        .try_into()
        .ok()
        .map(u32::from_ne_bytes)
}

fn pid_at(bytes: &[u8], offset: usize) -> Option<i32> {
    u32_at(bytes, offset).and_then(|value| i32::try_from(value).ok())
}

/// Parses one netlink datagram of the connector.
fn parse_event(datagram: &[u8]) -> Option<ProcessEvent> {
    let event = datagram.get(NLMSG_HEADER + CN_HEADER..)?;
    // struct proc_event: what u32, cpu u32, timestamp_ns u64, then the union.
    let data = event.get(16..)?;
    match u32_at(event, 0)? {
        // parent_pid, parent_tgid, child_pid, child_tgid
        EVENT_FORK => Some(ProcessEvent::Fork {
            parent: pid_at(data, 4)?,
            child_thread: pid_at(data, 8)?,
            child: pid_at(data, 12)?,
        }),
        // process_pid, process_tgid, exit_code, exit_signal, …
        EVENT_EXIT => Some(ProcessEvent::Exit {
            thread: pid_at(data, 0)?,
            process: pid_at(data, 4)?,
        }),
        _ => None,
    }
}

/// A subscription to the connector.
#[derive(Debug)]
struct Connector {
    socket: OwnedFd,
}

impl Connector {
    fn subscribe() -> io::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            Some(netlink::CONNECTOR),
        )?;
        // A burst of forks must not overflow the queue; root may go past rmem_max.
        let _ = rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 8 << 20);
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, CN_IDX_PROC))?;
        let mut message = Vec::with_capacity(NLMSG_HEADER + CN_HEADER + 4);
        let total = (NLMSG_HEADER + CN_HEADER + 4) as u32;
        message.extend(total.to_ne_bytes());
        message.extend(NLMSG_DONE.to_ne_bytes());
        message.extend([0; 10]);
        message.extend(CN_IDX_PROC.to_ne_bytes());
        message.extend(CN_VAL_PROC.to_ne_bytes());
        message.extend([0; 8]);
        message.extend(4_u16.to_ne_bytes());
        message.extend([0; 2]);
        message.extend(PROC_CN_MCAST_LISTEN.to_ne_bytes());
        rustix::net::send(&socket, &message, SendFlags::empty())?;
        Ok(Self { socket })
    }

    /// Hands over what has come; says whether events were lost (ENOBUFS).
    fn drain(&self, mut each: impl FnMut(ProcessEvent)) -> bool {
        let mut buffer = [0_u8; 1024];
        let mut lost = false;
        loop {
            match rustix::net::recv(&self.socket, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((length, _)) => {
                    if let Some(event) = buffer.get(..length).and_then(parse_event) {
                        each(event);
                    }
                }
                Err(rustix::io::Errno::NOBUFS) => lost = true,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return lost,
            }
        }
    }
}

#[derive(Debug, Default)]
struct Tree {
    processes: HashSet<i32>,
    /// Known threads; a thread leaves with its exit event, so a re-used id is looked up afresh.
    threads: HashMap<i32, bool>,
}

/// The set of target processes.
#[derive(Debug)]
pub(crate) struct TargetSet {
    everyone: bool,
    own: Own,
    connector: Option<Connector>,
    tree: Mutex<Tree>,
}

/// Whether a thread is not a zombie.
fn is_living(process: i32, thread: &str) -> bool {
    std::fs::read_to_string(format!("/proc/{process}/task/{thread}/status")).is_ok_and(|text| {
        text.lines().any(|line| {
            line.strip_prefix("State:")
                .is_some_and(|state| !state.trim_start().starts_with(['Z', 'X']))
        })
    })
}

fn status_field(pid: i32, field: &str) -> Option<i32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    text.lines().find_map(|line| {
        line.strip_prefix(field)?
            .strip_prefix(':')?
            .trim()
            .parse()
            .ok()
    })
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
    pub(crate) fn tree(own: Own, list: impl FnOnce() -> Vec<i32>) -> Arc<Self> {
        let connector = match Connector::subscribe() {
            Ok(connector) => Some(connector),
            Err(error) => {
                tracing::warn!(%error, "process events are not available; descendants are found by their parents only");
                None
            }
        };
        let tree = Tree {
            processes: list().into_iter().collect(),
            threads: HashMap::new(),
        };
        Arc::new(Self {
            everyone: false,
            own,
            connector,
            tree: Mutex::new(tree),
        })
    }

    /// Whether forks are seen as they happen.
    pub(crate) fn follows_forks(&self) -> bool {
        self.everyone || self.connector.is_some()
    }

    /// The target processes known now, those that have exited left out.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let mut tree = self.tree.lock().unwrap_or_else(PoisonError::into_inner);
        self.drain(&mut tree);
        tree.processes.iter().copied().collect()
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
                tree.threads.remove(&child_thread);
                if tree.processes.contains(&parent) {
                    // A new thread is reported with its process's own parent (kernel/fork.c, CLONE_THREAD), so a command of ours that the target started
                    // comes here with each of its threads.
                    if !self.own.acts_as(child) {
                        tree.processes.insert(child);
                    }
                } else if child_thread == child {
                    // A re-used pid whose exit event was lost must not inherit its predecessor's place.
                    tree.processes.remove(&child);
                }
            }
            ProcessEvent::Exit { thread, process } => {
                tree.threads.remove(&thread);
                // The leader may exit before its threads (pthread_exit in main); the process stays a target until the last has gone. The one that reports
                // its exit is still listed.
                let others =
                    std::fs::read_dir(format!("/proc/{process}/task")).map_or(0, |tasks| {
                        tasks
                            .filter_map(Result::ok)
                            .filter(|task| {
                                task.file_name().to_str().is_some_and(|name| {
                                    name.parse() != Ok(thread) && is_living(process, name)
                                })
                            })
                            .count()
                    });
                if others == 0 {
                    tree.processes.remove(&process);
                }
            }
        });
        if lost {
            tree.threads.clear();
            tree.processes
                .retain(|pid| status_field(*pid, "Tgid").is_some());
        }
    }

    /// Whether the thread belongs to a target.
    pub(crate) fn contains(&self, tid: i32) -> bool {
        if self.everyone {
            return !self.own.caller_has_thread(tid);
        }
        let mut tree = self.tree.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = tree.threads.get(&tid) {
            return *known;
        }
        self.drain(&mut tree);
        let Some(process) = status_field(tid, "Tgid") else {
            return false;
        };
        if self.own.acts_as(process) {
            tree.threads.insert(tid, false);
            return false;
        }
        let mut member = tree.processes.contains(&process);
        let mut ancestor = process;
        let mut chain = vec![process];
        // A chain of parents is short; the bound only keeps a race of re-used pids from looping.
        for _ in 0..64 {
            if member {
                break;
            }
            match status_field(ancestor, "PPid") {
                Some(parent) if parent > 1 && !self.own.acts_as(parent) => ancestor = parent,
                _ => break,
            }
            member = tree.processes.contains(&ancestor);
            chain.push(ancestor);
        }
        if member {
            tree.processes.extend(chain);
        }
        tree.threads.insert(tid, member);
        member
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
                    let mut polled = [rustix::event::PollFd::new(
                        &connector.socket,
                        rustix::event::PollFlags::IN,
                    )];
                    let second = rustix::event::Timespec {
                        tv_sec: 1,
                        tv_nsec: 0,
                    };
                    let _ = rustix::event::poll(&mut polled, Some(&second));
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
    use std::process::{Command, Stdio};

    #[test]
    fn events_are_parsed_and_nonsense_is_not() {
        let mut datagram = vec![0_u8; NLMSG_HEADER + CN_HEADER];
        datagram.extend(EVENT_FORK.to_ne_bytes());
        datagram.extend([0; 12]);
        for pid in [10_u32, 10, 12, 11] {
            datagram.extend(pid.to_ne_bytes());
        }
        assert_eq!(
            parse_event(&datagram),
            Some(ProcessEvent::Fork {
                parent: 10,
                child_thread: 12,
                child: 11
            })
        );
        for length in 0..datagram.len() {
            assert_eq!(parse_event(&datagram[..length]), None);
        }
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
        let set = TargetSet::tree(Own::default(), || vec![shell.id() as i32]);
        assert!(
            set.follows_forks(),
            "the process-event connector is needed for this test"
        );
        use std::io::{BufRead, Write};
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
        let id =
            hobble_graft::ids::ProcessId::of(hobble_graft::ids::Pid::new(caller).expect("a pid"));
        let own = Own::new(Some(id.expect("it runs")));
        let tree = TargetSet::tree(own, || vec![above]);
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
