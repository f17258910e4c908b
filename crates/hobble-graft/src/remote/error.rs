//! Why a system call could not be made in a target.

use rustix::io::Errno;

use crate::ids::{Pid, Tid};
use crate::proc::{ProcError, stat};
use crate::stop::StopError;

/// Why a system call could not be made in a target. The calls' own errors are not among them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// The process has exited or was killed.
    #[error("process {pid} is gone")]
    Gone {
        /// The process.
        pid: Pid,
    },
    /// The thread is not among those that stand still.
    #[error("thread {tid} does not stand still")]
    NotStill {
        /// The thread.
        tid: Tid,
    },
    /// Nowhere to put our code or memory.
    #[error("no {what} in process {pid}")]
    NoRoom {
        /// The process.
        pid: Pid,
        /// What was looked for.
        what: &'static str,
    },
    /// The kernel refused a request of ours.
    #[error("cannot {what} in process {pid}")]
    Refused {
        /// The process.
        pid: Pid,
        /// What was asked for.
        what: &'static str,
        /// The kernel's reason.
        #[source]
        errno: Errno,
    },
    /// A call that prepares the borrow failed in the target.
    #[error("{call} failed in process {pid}")]
    Call {
        /// The process.
        pid: Pid,
        /// The system call.
        call: &'static str,
        /// Its error.
        #[source]
        errno: Errno,
    },
    /// Memory of the target could not be read or written.
    #[error("cannot reach memory of process {pid} at {address:#x}")]
    Memory {
        /// The process.
        pid: Pid,
        /// The address.
        address: u64,
        /// The kernel's reason.
        #[source]
        errno: Errno,
    },
    /// The mappings of the process could not be read.
    #[error("cannot look at process {pid}")]
    Inspect {
        /// The process.
        pid: Pid,
        /// What failed.
        #[source]
        source: ProcError,
    },
    /// The budget is used up.
    #[error("a call in thread {tid} did not end in time")]
    Late {
        /// The thread.
        tid: Tid,
    },
    /// The thread is not where we left it: it took us for dead and went on.
    #[error("thread {tid} has taken its tracer for dead and gone on by itself")]
    Lost {
        /// The thread.
        tid: Tid,
    },
    /// Our code in the target raised a signal.
    #[error("code run in thread {tid} raised signal {signal}")]
    Fault {
        /// The thread.
        tid: Tid,
        /// The signal.
        signal: i32,
    },
    /// A seccomp filter would kill the target if we died while it works for us.
    #[error(
        "the seccomp filter of thread {tid} would not let it make system call {call} if its tracer died"
    )]
    Filtered {
        /// The thread.
        tid: Tid,
        /// The number of the system call.
        call: i64,
    },
    /// A received message did not hold all descriptors.
    #[error("process {pid} received {got} of {sent} descriptors")]
    Truncated {
        /// The process.
        pid: Pid,
        /// How many were sent.
        sent: usize,
        /// How many arrived.
        got: usize,
    },
    /// The journal did not take the record of what would be left behind; nothing was done.
    #[error("cannot record what would be left in process {pid}")]
    Record {
        /// The process.
        pid: Pid,
        /// The journal's reason.
        #[source]
        source: std::io::Error,
    },
    /// The process could not be stopped for cleaning.
    #[error("cannot stop the process to clean it")]
    Stop(#[from] StopError),
    /// A thread is still inside code of a dead tracer.
    #[error("a thread of process {pid} is still inside code of a dead tracer")]
    StillInside {
        /// The process.
        pid: Pid,
    },
    /// A record of what was left behind does not look like one of ours.
    #[error("the record of what was left behind has a bad {field}")]
    BadResidue {
        /// The field.
        field: &'static str,
    },
}

/// The error of a request of ours. Requests to a thread that does not stand still fail in the same way as to one that is gone, so look.
pub(super) fn refused(pid: Pid, what: &'static str, errno: Errno) -> RemoteError {
    if is_gone(pid) {
        RemoteError::Gone { pid }
    } else {
        RemoteError::Refused { pid, what, errno }
    }
}

/// The error of reading or writing memory.
pub(super) fn unreachable_memory(pid: Pid, address: u64, errno: Errno) -> RemoteError {
    if is_gone(pid) {
        RemoteError::Gone { pid }
    } else {
        RemoteError::Memory {
            pid,
            address,
            errno,
        }
    }
}

/// Whether a process has exited or is about to. A dead leader with living threads is not gone.
fn is_gone(pid: Pid) -> bool {
    match stat::of_process(pid) {
        Ok(stat) => stat.threads <= 1 && (stat.state.is_dead() || stat.is_exiting()),
        Err(error) => error.is_gone(),
    }
}
