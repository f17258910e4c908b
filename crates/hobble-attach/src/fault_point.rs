//! Places where a test lets the server or the target die by SIGKILL, to prove that recovery works from there.
//!
//! `HOBBLE_FAULT_POINT=STEP[:N]` makes the server kill itself the N-th time (default: first) it passes STEP, `HOBBLE_FAULT_POINT=target@STEP[:N]` makes it
//! kill the process that was named as the target. The variable is read by the holder only and reaches nobody else. Points sit right after a
//! journal record and before the step it announces, and right after the step.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use hobble_graft::ids::ProcessId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal};

/// Every fault point, in the order in which an attachment passes them; last those of a server that takes over from a dead one.
pub const POINTS: &[&str] = &[
    "journal-opened",
    "served",
    "precopied",
    "stopping",
    "stopped",
    "mounting",
    "mounted",
    "grafting",
    "borrowing",
    "exchanging-directory",
    "exchanging-descriptors",
    "grafted",
    "let-go",
    "injecting",
    "updating",
    "updated",
    "recovering",
    "recover-stopped",
    "recover-grafted",
    "unmounted",
    "recovered",
    "takeover-claimed",
    "takeover-served",
    "taken-over",
];

/// What stands before a step at which the target dies.
const TARGET: &str = "target@";

/// How long the target gets to be gone before the step goes on. One that stands still under us may not be gone before we look after it, so this is no error.
const GONE_WITHIN: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// Who dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Server,
    Target,
}

#[derive(Debug)]
struct Point {
    victim: Victim,
    name: String,
    count: u32,
}

struct Armed {
    point: Point,
    target: Option<ProcessId>,
    left: AtomicU32,
}

static ARMED: OnceLock<Option<Armed>> = OnceLock::new();

fn parse(text: &str) -> Result<Point, String> {
    let (victim, rest) = match text.strip_prefix(TARGET) {
        Some(rest) => (Victim::Target, rest),
        None => (Victim::Server, text),
    };
    let (name, count) = rest.split_once(':').unwrap_or((rest, "1"));
    let count: u32 = count
        .parse()
        .map_err(|_| format!("HOBBLE_FAULT_POINT: `{count}` is not a count"))?;
    if !POINTS.contains(&name) {
        return Err(format!(
            "HOBBLE_FAULT_POINT: `{name}` is not one of {}",
            POINTS.join(", ")
        ));
    }
    Ok(Point {
        victim,
        name: name.to_owned(),
        count: count.max(1),
    })
}

/// Arms the point that `HOBBLE_FAULT_POINT` names; called once, by the holder before it clones the server.
///
/// # Errors
/// A text naming the nearest mistake, when the variable is set to something that is no fault point.
pub(crate) fn arm_from_environment(target: Option<ProcessId>) -> Result<(), String> {
    let armed = match std::env::var("HOBBLE_FAULT_POINT") {
        Err(_) => None,
        Ok(text) => {
            let point = parse(&text)?;
            Some(Armed {
                left: AtomicU32::new(point.count),
                point,
                target,
            })
        }
    };
    let _ = ARMED.set(armed);
    Ok(())
}

/// Passes a point: somebody dies here by SIGKILL when a test asked for it.
pub(crate) fn pass(name: &str) {
    debug_assert!(POINTS.contains(&name), "unknown fault point {name}");
    if let Some(Some(armed)) = ARMED.get()
        && armed.point.name == name
        && armed.left.fetch_sub(1, Ordering::SeqCst) == 1
    {
        match (armed.point.victim, armed.target) {
            (Victim::Server, _) => kill_ourselves(),
            (Victim::Target, Some(target)) => {
                if let Err(error) = kill_target(target) {
                    tracing::error!(pid = target.pid.as_raw(), %error, "the target cannot be killed");
                }
            }
            (Victim::Target, None) => {}
        }
    }
}

fn kill_ourselves() {
    let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
    // SIGKILL to oneself is delivered before kill() returns to user space (signal(7)).
    loop {
        std::thread::park();
    }
}

/// Kills the target and waits for its end, which makes its descriptor readable (pidfd_open(2)).
fn kill_target(target: ProcessId) -> rustix::io::Result<()> {
    let pid = Pid::from_raw(target.pid.as_raw()).ok_or(rustix::io::Errno::SRCH)?;
    let process = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    // The descriptor names one process for good: if the pid is the target's after it was opened, so is the descriptor.
    if ProcessId::of(target.pid).ok() != Some(target) {
        return Err(rustix::io::Errno::SRCH);
    }
    rustix::process::pidfd_send_signal(&process, Signal::KILL)?;
    poll(
        &mut [PollFd::new(&process, PollFlags::IN)],
        Some(&GONE_WITHIN),
    )
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_names_its_victim_and_how_often_it_is_passed_before() {
        let point = parse("stopped").unwrap();
        assert_eq!((point.victim, point.count), (Victim::Server, 1));
        let point = parse("target@let-go:3").unwrap();
        assert_eq!(point.victim, Victim::Target);
        assert_eq!((point.name.as_str(), point.count), ("let-go", 3));
        for (wrong, word) in [
            ("lunch", "let-go"),
            ("target@lunch", "`lunch`"),
            ("holder@stopped", "`holder@stopped`"),
            ("stopped:often", "`often`"),
        ] {
            let error = parse(wrong).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn only_the_very_process_is_killed() {
        let mut child = std::process::Command::new("sleep")
            .arg("30")
            .spawn()
            .unwrap();
        let pid = hobble_graft::ids::Pid::new(child.id().cast_signed()).unwrap();
        let target = ProcessId::of(pid).unwrap();
        let another = ProcessId {
            start_time: target.start_time + 1,
            ..target
        };
        let spared = kill_target(another).is_err() && child.try_wait().unwrap().is_none();
        let killed = kill_target(target).is_ok() && child.try_wait().unwrap().is_some();
        let _ = child.kill();
        let _ = child.wait();
        assert!(spared && killed, "spared {spared}, killed {killed}");
    }
}
