//! Whether a process is one that can be worked on: alive, the user's, of our word size, untraced, moving.

use std::path::PathBuf;

use super::status::{self, Status};
use super::{ProcError, cgroup, stat};
use crate::ids::{ProcessId, Tid};

/// Width of a process's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WordSize {
    /// A 32-bit program on a 64-bit kernel (x32 included).
    Bits32,
    /// A 64-bit program.
    Bits64,
}

/// The condition of one process at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// A thread of the kernel.
    pub is_kernel_thread: bool,
    /// Ended, and only waits to be waited for.
    pub is_zombie: bool,
    /// In `exit()`.
    pub is_exiting: bool,
    /// Stopped by job control (SIGSTOP and the like).
    pub is_stopped: bool,
    /// Stopped by the freezer; `None` when that cannot be seen.
    pub is_frozen: Option<bool>,
    /// Who traces it already.
    pub tracer: Option<Tid>,
    /// `None` when it has no memory (any more).
    pub word_size: Option<WordSize>,
    /// The rest of `status`.
    pub status: Status,
}

/// The condition of `process` now.
///
/// # Errors
/// [`ProcError::Gone`] when it is gone, or its pid is another process's by now.
pub fn of(process: ProcessId) -> Result<Condition, ProcError> {
    let pid = process.pid;
    let stat = stat::of_process(pid)?;
    if stat.start_time != process.start_time {
        return Err(ProcError::Gone {
            path: PathBuf::from(format!("/proc/{pid}")),
        });
    }
    let status = status::of_process(pid)?;
    Ok(Condition {
        is_kernel_thread: stat.is_kernel_thread(),
        is_zombie: stat.has_ended(),
        is_exiting: stat.is_exiting(),
        is_stopped: stat.state == stat::State::Stopped,
        is_frozen: cgroup::is_frozen(pid)?,
        tracer: status.tracer,
        word_size: word_size(&super::read(&PathBuf::from(format!("/proc/{pid}/auxv")))?),
        status,
    })
}

/// The word size by the shape of the auxiliary vector, which is an array of (type, value) pairs of the program's own words and ends
/// with type 0. Read as 64-bit words, that of a 32-bit program has types above 2³², because their upper half is a value.
fn word_size(auxv: &[u8]) -> Option<WordSize> {
    let (words, _) = auxv.as_chunks::<8>();
    let types = words
        .iter()
        .step_by(2)
        .map(|word| u64::from_ne_bytes(*word));
    let mut seen = false;
    for kind in types {
        if kind == 0 {
            break;
        }
        seen = true;
        if kind > u64::from(u32::MAX) {
            return Some(WordSize::Bits32);
        }
    }
    seen.then_some(WordSize::Bits64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn we_are_fit() {
        let condition = of(ProcessId::own().unwrap()).unwrap();
        assert!(
            !condition.is_zombie
                && !condition.is_exiting
                && !condition.is_stopped
                && !condition.is_kernel_thread
        );
        assert_eq!(condition.word_size, Some(WordSize::Bits64));
    }

    #[test]
    fn auxv_of_a_32_bit_program() {
        let pairs: [(u32, u32); 4] = [(32, 0xf7f0_1570), (33, 0xf7f0_1000), (6, 4096), (0, 0)];
        let bytes: Vec<u8> = pairs
            .iter()
            .flat_map(|(t, v)| [t.to_ne_bytes(), v.to_ne_bytes()].concat())
            .collect();
        assert_eq!(word_size(&bytes), Some(WordSize::Bits32));
        assert_eq!(word_size(&[]), None);
        assert_eq!(word_size(&[0; 64]), None);
    }

    #[test]
    fn a_stopped_child_is_seen_and_a_reused_pid_is_gone() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let raw = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(raw, rustix::process::Signal::STOP).unwrap();
        let id = ProcessId::of(crate::ids::Pid::new(raw.as_raw_nonzero().get()).unwrap()).unwrap();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(5);
        let mut stopped = false;
        while !stopped && std::time::Instant::now() < end {
            stopped = of(id).unwrap().is_stopped;
        }
        let reused = of(ProcessId {
            start_time: id.start_time + 1,
            ..id
        });
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(stopped);
        assert!(reused.unwrap_err().is_gone());
    }
}
