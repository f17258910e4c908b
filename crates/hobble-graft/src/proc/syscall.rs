//! `/proc/<pid>/task/<tid>/syscall`: the system call that a thread sleeps in.

use std::path::PathBuf;

use super::text::Cursor;
use super::{ParseError, ProcError};
use crate::ids::{Pid, Tid};

/// What a thread does, seen from the system call interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InSyscall {
    /// It runs; nothing can be said.
    Running,
    /// It sleeps in the kernel, but not in a system call (a page fault, a stop).
    Outside {
        /// Stack pointer.
        stack: u64,
        /// Instruction pointer.
        instruction: u64,
    },
    /// It sleeps in a system call.
    Inside {
        /// Its number.
        number: u64,
        /// Its arguments.
        arguments: [u64; 6],
        /// Stack pointer.
        stack: u64,
        /// Instruction pointer, after the instruction that entered the kernel.
        instruction: u64,
    },
}

/// Parses the text of a `syscall` file.
///
/// # Errors
/// The first byte that is not as fs/proc/base.c (`proc_pid_syscall`) writes it.
pub fn parse(text: &[u8]) -> Result<InSyscall, ParseError> {
    let mut at = Cursor::new(text);
    if at.try_literal(b"running") {
        return Ok(InSyscall::Running);
    }
    let number = at.signed("running or the number of a system call")?;
    let mut word = || {
        at.literal(b" 0x", "a space and a number in hexadecimal")?;
        at.hex("a number in hexadecimal")
    };
    let Ok(number) = u64::try_from(number) else {
        return Ok(InSyscall::Outside {
            stack: word()?,
            instruction: word()?,
        });
    };
    let arguments = [word()?, word()?, word()?, word()?, word()?, word()?];
    Ok(InSyscall::Inside {
        number,
        arguments,
        stack: word()?,
        instruction: word()?,
    })
}

/// `/proc/<pid>/task/<tid>/syscall`.
///
/// # Errors
/// [`ProcError::Gone`] when there is no such thread.
pub fn of_thread(pid: Pid, tid: Tid) -> Result<InSyscall, ProcError> {
    let path = PathBuf::from(format!("/proc/{pid}/task/{tid}/syscall"));
    parse(&super::read(&path)?).map_err(|e| ProcError::parse(&path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_forms() {
        assert_eq!(parse(b"running\n"), Ok(InSyscall::Running));
        assert_eq!(
            parse(b"-1 0x10 0x20\n"),
            Ok(InSyscall::Outside {
                stack: 16,
                instruction: 32
            })
        );
        let inside = parse(b"61 0x1 0x2 0x3 0x4 0x5 0x6 0x7 0x8\n");
        let expected = InSyscall::Inside {
            number: 61,
            arguments: [1, 2, 3, 4, 5, 6],
            stack: 7,
            instruction: 8,
        };
        assert_eq!(inside, Ok(expected));
        assert_eq!(
            parse(b"61 0x1\n"),
            Err(ParseError::new(6, "a space and a number in hexadecimal"))
        );
        assert_eq!(
            parse(b""),
            Err(ParseError::new(0, "running or the number of a system call"))
        );
    }
}
