//! What `/proc` says about threads that are to be stopped.
//!
//! Owns the reading; changes nothing but what [`reap`] and [`send_stop_again`] say.

use std::path::PathBuf;

use rustix::io::Errno;

use super::{StopError, Thread, Waits, sys};
use crate::ids::{Pid, ProcessId, Tid};
use crate::proc::{self, stat, status};

/// `CLONE_VFORK` of include/uapi/linux/sched.h.
const CLONE_VFORK: u64 = 0x4000;

/// Refuses what can be seen beforehand.
pub(super) fn may_be_stopped(process: ProcessId) -> Result<(), StopError> {
    let pid = process.pid;
    if pid == Pid::own() {
        return Err(StopError::Own { pid });
    }
    let stat = match stat::of_process(pid) {
        Ok(stat) => stat,
        Err(error) if error.is_gone() => return Err(StopError::Gone { pid }),
        Err(source) => return Err(StopError::Inspect { pid, source }),
    };
    if stat.is_kernel_thread() {
        return Err(StopError::KernelThread { pid });
    }
    // A dead leader with living threads is a zombie to `stat`, and a process like any other to us.
    if stat.start_time != process.start_time || (stat.state.is_dead() && stat.threads <= 1) {
        return Err(StopError::Gone { pid });
    }
    match traced_by(pid, pid.leader()) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Who traces a thread, as an error; `None` when nobody does.
fn traced_by(pid: Pid, tid: Tid) -> Option<StopError> {
    let tracer = status::of_thread(tid).ok()?.tracer?;
    let name = proc::read(&PathBuf::from(format!("/proc/{tracer}/comm"))).unwrap_or_default();
    let name = String::from_utf8_lossy(name.trim_ascii_end()).into_owned();
    Some(StopError::Traced {
        pid,
        tid,
        tracer: tracer.as_raw(),
        name,
    })
}

/// Why the kernel refused to let us trace; `None` when the thread just exited.
pub(super) fn why_not_traceable(pid: Pid, tid: Tid, errno: Errno) -> Option<StopError> {
    match stat::of_thread(pid, tid) {
        Err(error) if error.is_gone() => return None,
        Ok(stat) if stat.is_exiting() || stat.state.is_dead() => return None,
        _ => {}
    }
    Some(traced_by(pid, tid).unwrap_or(StopError::Refused { pid, tid, errno }))
}

/// The threads of a process; none when it is gone.
pub(super) fn threads(pid: Pid) -> Result<Vec<Tid>, StopError> {
    let path = PathBuf::from(format!("/proc/{pid}/task"));
    let entries = match std::fs::read_dir(&path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(list_error(path, &error)),
    };
    let mut threads = Vec::new();
    for entry in entries {
        match entry {
            Ok(entry) => threads.extend(
                entry
                    .file_name()
                    .to_str()
                    .and_then(|n| n.parse().ok())
                    .and_then(Tid::new),
            ),
            // The process went while it was listed.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => break,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => break,
            Err(error) => return Err(list_error(path, &error)),
        }
    }
    Ok(threads)
}

fn list_error(path: PathBuf, error: &std::io::Error) -> StopError {
    StopError::List {
        path,
        errno: Errno::from_io_error(error).unwrap_or(Errno::IO),
    }
}

/// What a thread that does not stop is doing.
pub(super) fn waits(pid: Pid, tid: Tid) -> Waits {
    let asleep = stat::of_thread(pid, tid).is_ok_and(|stat| stat.state == stat::State::DiskSleep);
    if !asleep {
        return Waits::Busy;
    }
    let text =
        proc::read(&PathBuf::from(format!("/proc/{pid}/task/{tid}/syscall"))).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let mut words = text.split_ascii_whitespace();
    let call = words
        .next()
        .and_then(|w| w.parse::<i64>().ok())
        .unwrap_or(-1);
    let first = words
        .next()
        .and_then(|w| u64::from_str_radix(w.trim_start_matches("0x"), 16).ok())
        .unwrap_or(0);
    let vfork = match call {
        #[cfg(target_arch = "x86_64")]
        libc::SYS_vfork => true,
        libc::SYS_clone => first & CLONE_VFORK != 0,
        // Its flags are in memory; it can sleep uninterruptibly for nothing else.
        libc::SYS_clone3 => true,
        _ => false,
    };
    if vfork {
        Waits::ForVforkChild
    } else {
        Waits::InKernel { call }
    }
}

/// Sends a stop signal that was held back, unless a SIGCONT has come since: sending it would take that one away.
pub(super) fn send_stop_again(thread: &Thread, signal: i32) {
    let continued = status::of_thread(thread.tid).is_ok_and(|s| {
        [s.pending, s.shared_pending]
            .iter()
            .any(|set| set.contains(libc::SIGCONT.cast_unsigned()))
    });
    if !continued {
        let _ = sys::send_signal(thread.pid.as_raw(), thread.tid, signal);
    }
}

/// Takes the exit of a thread that we traced, so that the kernel goes on to tell its real parent. A process whose real parent
/// we are is left to whoever started it.
pub(super) fn reap(pid: Pid, tid: Tid) {
    if tid == pid.leader() {
        let ours = stat::of_process(pid).is_ok_and(|stat| stat.parent == Pid::own().as_raw());
        if ours {
            return;
        }
    }
    sys::take_exit(tid);
}
