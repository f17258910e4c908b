//! `/proc/<pid>/stat` and `/proc/<pid>/task/<tid>/stat`: when a process started and whether it runs, exits or is the kernel's.
//!
//! The name in the second field is any 15 bytes, spaces, brackets and newlines included, so the fields are counted from the
//! *last* `)` (fs/proc/array.c, `do_task_stat`).

use std::path::{Path, PathBuf};

use super::text::Cursor;
use super::{ParseError, ProcError};
use crate::ids::{Pid, Tid};

/// `PF_EXITING` of include/linux/sched.h: the thread is in `do_exit` and takes no signal any more.
const PF_EXITING: u64 = 0x4;
/// `PF_KTHREAD`: a thread of the kernel, without memory or descriptors of its own.
const PF_KTHREAD: u64 = 0x0020_0000;

/// What a thread is doing, the third field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// `R`, running or ready to run.
    Running,
    /// `S`, in a sleep that signals end.
    Sleeping,
    /// `D`, in a sleep that nothing (or only SIGKILL) ends.
    DiskSleep,
    /// `I`, an idle thread of the kernel.
    Idle,
    /// `T`, stopped by a signal (job control).
    Stopped,
    /// `t`, stopped under a tracer.
    TracingStop,
    /// `Z`, exited, not yet waited for.
    Zombie,
    /// `X` or `x`, gone.
    Dead,
    /// `P`, parked by the kernel.
    Parked,
    /// A letter that this version does not know.
    Other(u8),
}

impl State {
    fn from_letter(letter: u8) -> Self {
        match letter {
            b'R' => Self::Running,
            b'S' => Self::Sleeping,
            b'D' => Self::DiskSleep,
            b'I' => Self::Idle,
            b'T' => Self::Stopped,
            b't' => Self::TracingStop,
            b'Z' => Self::Zombie,
            b'X' | b'x' => Self::Dead,
            b'P' => Self::Parked,
            other => Self::Other(other),
        }
    }

    /// Whether the thread has exited: it has no memory, descriptors or directories any more.
    pub fn is_dead(self) -> bool {
        matches!(self, Self::Zombie | Self::Dead)
    }
}

/// The fields that matter here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Field 1, the thread or process id.
    pub id: i32,
    /// Field 2, the name of the thread, any bytes.
    pub name: Vec<u8>,
    /// Field 3.
    pub state: State,
    /// Field 4, the parent's process id; 0 for the first process of a pid namespace and where the parent is outside it.
    pub parent: i32,
    /// Field 9, the kernel's `PF_*` word.
    pub flags: u64,
    /// Field 20, threads in the group.
    pub threads: u64,
    /// Field 22, start in clock ticks since boot.
    pub start_time: u64,
}

impl Stat {
    /// Whether the whole process has ended, and only its parent has not yet asked for its exit status. (For the `stat` of a
    /// process. A first thread that called `pthread_exit` is a zombie among living threads.)
    pub fn has_ended(&self) -> bool {
        self.state.is_dead() && self.threads <= 1
    }

    /// In `do_exit`: no signal, and no stop, reaches it any more.
    pub fn is_exiting(&self) -> bool {
        self.flags & PF_EXITING != 0
    }

    /// A thread of the kernel.
    pub fn is_kernel_thread(&self) -> bool {
        self.flags & PF_KTHREAD != 0
    }
}

/// Parses the text of a `stat` file.
///
/// # Errors
/// The first byte that is not as `do_task_stat` writes it.
pub fn parse(text: &[u8]) -> Result<Stat, ParseError> {
    let mut at = Cursor::new(text);
    let id = signed_i32(&mut at, "a process id")?;
    at.literal(b" (", "a name in brackets")?;
    let close = at
        .rest()
        .iter()
        .rposition(|b| *b == b')')
        .ok_or_else(|| at.error("a name in brackets"))?;
    let name = at.rest().get(..close).unwrap_or_default().to_owned();
    at.literal(&name, "a name in brackets")?;
    at.literal(b") ", "a space after the name")?;
    let letter = at.word("a state letter")?;
    let [letter] = letter else {
        return Err(at.error("one state letter"));
    };
    at.blanks();
    let parent = signed_i32(&mut at, "a parent's process id")?;
    // Fields 5 to 8: pgrp, session, tty_nr, tpgid.
    skip(&mut at, 4)?;
    at.blanks();
    let flags = at.decimal("a flag word")?;
    // Fields 10 to 19.
    skip(&mut at, 10)?;
    at.blanks();
    let threads = at.decimal("a number of threads")?;
    skip(&mut at, 1)?;
    at.blanks();
    let start_time = at.decimal("a start time")?;
    Ok(Stat {
        id,
        name,
        state: State::from_letter(*letter),
        parent,
        flags,
        threads,
        start_time,
    })
}

fn signed_i32(at: &mut Cursor<'_>, expected: &'static str) -> Result<i32, ParseError> {
    let place = at.error(expected);
    i32::try_from(at.signed(expected)?).map_err(|_| place)
}

fn skip(at: &mut Cursor<'_>, fields: usize) -> Result<(), ParseError> {
    for _ in 0..fields {
        at.blanks();
        at.signed("a number")?;
    }
    Ok(())
}

/// `/proc/<pid>/stat`.
///
/// # Errors
/// [`ProcError::Gone`] when there is no such process.
pub fn of_process(pid: Pid) -> Result<Stat, ProcError> {
    of(&PathBuf::from(format!("/proc/{pid}/stat")))
}

/// `/proc/<pid>/task/<tid>/stat`.
///
/// # Errors
/// [`ProcError::Gone`] when there is no such thread.
pub fn of_thread(pid: Pid, tid: Tid) -> Result<Stat, ProcError> {
    of(&PathBuf::from(format!("/proc/{pid}/task/{tid}/stat")))
}

fn of(path: &Path) -> Result<Stat, ProcError> {
    let text = super::read(path)?;
    parse(&text).map_err(|e| ProcError::parse(path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &[u8] = b"4242 (a) (b c\n) S 1 4242 4242 34816 4242 4194304 151 0 0 0 0 1 0 0 20 0 3 0 91234 8192 200 18446744073709551615 1 2 3\n";

    #[test]
    fn names_may_hold_brackets_spaces_and_newlines() {
        let stat = parse(LINE).unwrap();
        assert_eq!(stat.name, b"a) (b c\n");
        assert_eq!(
            (stat.id, stat.parent, stat.threads, stat.start_time),
            (4242, 1, 3, 91234)
        );
        assert_eq!(stat.state, State::Sleeping);
        assert!(!stat.is_exiting() && !stat.is_kernel_thread());
    }

    #[test]
    fn errors_have_places() {
        assert_eq!(parse(b""), Err(ParseError::new(0, "a process id")));
        assert_eq!(
            parse(b"12 name"),
            Err(ParseError::new(2, "a name in brackets"))
        );
        assert_eq!(
            parse(b"12 (x) SS 1"),
            Err(ParseError::new(9, "one state letter"))
        );
        assert_eq!(
            parse(b"12 (x) S 1 2 3"),
            Err(ParseError::new(14, "a number"))
        );
    }

    #[test]
    fn kthreadd_is_the_kernels_and_we_are_not() {
        let own = of_process(Pid::own()).unwrap();
        assert_eq!(own.id, Pid::own().as_raw());
        assert!(!own.is_kernel_thread());
        // Pid 2 is kthreadd in the first pid namespace only; elsewhere there is nothing to compare with.
        if std::fs::read("/proc/2/comm").is_ok_and(|name| name == b"kthreadd\n") {
            assert!(of_process(Pid::new(2).unwrap()).unwrap().is_kernel_thread());
        }
    }

    #[test]
    fn no_such_process_is_gone() {
        assert!(
            of_process(Pid::new(i32::MAX).unwrap())
                .unwrap_err()
                .is_gone()
        );
    }
}
