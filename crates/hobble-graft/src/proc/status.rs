//! `/proc/<pid>/status`: identity, credentials, signals, tracer and seccomp of a process or thread.

use std::path::{Path, PathBuf};

use super::text::Cursor;
use super::{ParseError, ProcError};
use crate::ids::{Pid, Tid};

/// A signal set as the kernel prints it: bit `n - 1` is signal `n`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SignalSet(pub u64);

impl SignalSet {
    /// Whether `signal` (1 to 64) is in the set.
    pub fn contains(self, signal: u32) -> bool {
        signal
            .checked_sub(1)
            .and_then(|bit| self.0.checked_shr(bit))
            .is_some_and(|bits| bits & 1 == 1)
    }
}

/// Real, effective, saved and filesystem id, in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct IdSet {
    /// Who it is.
    pub real: u32,
    /// Whose rights it has.
    pub effective: u32,
    /// What it may go back to.
    pub saved: u32,
    /// Whose rights it has in filesystems.
    pub filesystem: u32,
}

/// Whether system calls are filtered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Seccomp {
    /// They are not.
    #[default]
    Disabled,
    /// Strict mode: read, write, exit and sigreturn only.
    Strict,
    /// By a program.
    Filter,
}

/// The lines that matter here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// `Tgid:`, the process that a thread belongs to.
    pub tgid: i32,
    /// `Pid:`, the thread itself.
    pub id: i32,
    /// `PPid:`, 0 when the parent is outside our pid namespace.
    pub parent: i32,
    /// `TracerPid:`, who traces it, if anybody does. (A tracer outside our pid namespace reads as nobody.)
    pub tracer: Option<Tid>,
    /// `Uid:`.
    pub uid: IdSet,
    /// `Gid:`.
    pub gid: IdSet,
    /// `Groups:`.
    pub groups: Vec<u32>,
    /// `NSpid:`, its id in every pid namespace from ours inwards.
    pub namespace_ids: Vec<i32>,
    /// `VmRSS:`, resident memory in KiB; 0 without memory.
    pub resident_kib: u64,
    /// `SigPnd:`, pending for the thread.
    pub pending: SignalSet,
    /// `ShdPnd:`, pending for the process.
    pub shared_pending: SignalSet,
    /// `SigBlk:`.
    pub blocked: SignalSet,
    /// `SigIgn:`.
    pub ignored: SignalSet,
    /// `SigCgt:`, those with a handler.
    pub caught: SignalSet,
    /// `CapEff:`, effective capabilities, bit `n` is capability `n`.
    pub capabilities: u64,
    /// `Seccomp:`.
    pub seccomp: Seccomp,
}

/// Parses the text of a `status` file. Unknown lines are passed over, missing ones leave their default, but `Tgid`, `Pid` and
/// `PPid` must be there.
///
/// # Errors
/// The first byte of a known line that is not as fs/proc/array.c writes it.
pub fn parse(text: &[u8]) -> Result<Status, ParseError> {
    let mut status = Status::default();
    let (mut has_tgid, mut has_id, mut has_parent) = (false, false, false);
    let mut at = Cursor::new(text);
    while !at.is_empty() {
        let mut line = at.line_cursor();
        let key = line.until(b':', "a key and a colon")?;
        line.blanks();
        match key {
            b"Tgid" => {
                status.tgid = id(&mut line)?;
                has_tgid = true;
            }
            b"Pid" => {
                status.id = id(&mut line)?;
                has_id = true;
            }
            b"PPid" => {
                status.parent = id(&mut line)?;
                has_parent = true;
            }
            b"TracerPid" => status.tracer = Tid::new(id(&mut line)?),
            b"Uid" => status.uid = id_set(&mut line)?,
            b"Gid" => status.gid = id_set(&mut line)?,
            b"Groups" => status.groups = list(&mut line, |l| l.decimal_u32("a group id"))?,
            b"NSpid" => status.namespace_ids = list(&mut line, id)?,
            b"VmRSS" => status.resident_kib = line.decimal("a size in kB")?,
            b"SigPnd" => status.pending = set(&mut line)?,
            b"ShdPnd" => status.shared_pending = set(&mut line)?,
            b"SigBlk" => status.blocked = set(&mut line)?,
            b"SigIgn" => status.ignored = set(&mut line)?,
            b"SigCgt" => status.caught = set(&mut line)?,
            b"CapEff" => status.capabilities = line.hex("a capability set")?,
            b"Seccomp" => {
                let place = line.error("a seccomp mode");
                status.seccomp = match line.decimal("a seccomp mode")? {
                    0 => Seccomp::Disabled,
                    1 => Seccomp::Strict,
                    2 => Seccomp::Filter,
                    _ => return Err(place),
                };
            }
            _ => {}
        }
    }
    if has_tgid && has_id && has_parent {
        Ok(status)
    } else {
        Err(at.error("Tgid, Pid and PPid"))
    }
}

fn id(line: &mut Cursor<'_>) -> Result<i32, ParseError> {
    let place = line.error("a process id");
    i32::try_from(line.signed("a process id")?).map_err(|_| place)
}

fn id_set(line: &mut Cursor<'_>) -> Result<IdSet, ParseError> {
    let mut next = || {
        line.blanks();
        line.decimal_u32("a user or group id")
    };
    Ok(IdSet {
        real: next()?,
        effective: next()?,
        saved: next()?,
        filesystem: next()?,
    })
}

fn set(line: &mut Cursor<'_>) -> Result<SignalSet, ParseError> {
    line.hex("a signal set").map(SignalSet)
}

fn list<'a, T>(
    line: &mut Cursor<'a>,
    mut one: impl FnMut(&mut Cursor<'a>) -> Result<T, ParseError>,
) -> Result<Vec<T>, ParseError> {
    let mut items = Vec::new();
    line.blanks();
    while !line.is_empty() {
        items.push(one(line)?);
        line.blanks();
    }
    Ok(items)
}

/// `/proc/<pid>/status`.
///
/// # Errors
/// [`ProcError::Gone`] when there is no such process.
pub fn of_process(pid: Pid) -> Result<Status, ProcError> {
    of(&PathBuf::from(format!("/proc/{pid}/status")))
}

/// `/proc/<tid>/status`: for whoever knows a thread but not its process, as a FUSE server does of its callers.
///
/// # Errors
/// [`ProcError::Gone`] when there is no such thread.
pub fn of_thread(tid: Tid) -> Result<Status, ProcError> {
    // Threads have no entry in a listing of /proc, but may be looked up there (fs/proc/base.c, `proc_pid_lookup`).
    of(&PathBuf::from(format!("/proc/{tid}/status")))
}

fn of(path: &Path) -> Result<Status, ProcError> {
    parse(&super::read(path)?).map_err(|e| ProcError::parse(path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"Name:\ta: \\n\xffb\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t100\nNgid:\t0\nPid:\t101\nPPid:\t1\nTracerPid:\t7\n\
        Uid:\t1000\t1001\t1002\t1003\nGid:\t5\t5\t5\t5\nFDSize:\t64\nGroups:\t4 24 27 \nNStgid:\t100\t2\nNSpid:\t101\t3\nVmRSS:\t    4096 kB\n\
        SigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\nSigBlk:\tfffffffe7ffbfeff\nCapEff:\t000001ffffffffff\nSeccomp:\t2\n";

    #[test]
    fn all_lines() {
        let status = parse(TEXT).unwrap();
        assert_eq!((status.tgid, status.id, status.parent), (100, 101, 1));
        assert_eq!(status.tracer, Tid::new(7));
        assert_eq!(
            status.uid,
            IdSet {
                real: 1000,
                effective: 1001,
                saved: 1002,
                filesystem: 1003
            }
        );
        assert_eq!(status.groups, [4, 24, 27]);
        assert_eq!(status.namespace_ids, [101, 3]);
        assert_eq!(status.resident_kib, 4096);
        assert!(status.pending.contains(9) && !status.pending.contains(8));
        assert!(!status.pending.contains(0) && !status.pending.contains(65));
        assert_eq!(status.seccomp, Seccomp::Filter);
    }

    #[test]
    fn errors_have_places() {
        assert_eq!(parse(b"Tgid:\tx"), Err(ParseError::new(6, "a process id")));
        assert_eq!(
            parse(b"Tgid:\t1\nPid:\t1\n"),
            Err(ParseError::new(15, "Tgid, Pid and PPid"))
        );
        assert_eq!(
            parse(b"nonsense\n"),
            Err(ParseError::new(0, "a key and a colon"))
        );
    }

    #[test]
    fn ours() {
        let status = of_process(Pid::own()).unwrap();
        assert_eq!(status.id, Pid::own().as_raw());
        assert_eq!(status.tgid, status.id);
        let thread = Tid::new(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
        assert_eq!(of_thread(thread).unwrap().tgid, status.id);
    }
}
