//! What a switch tells others while it works: the journal before each step, and whoever keeps locks held meanwhile.

use std::io;

use crate::census::{DescriptionId, TableId};
use crate::ids::{Fd, Pid};
use crate::proc::locks::FileLock;
use crate::remote::Residue;

/// Which way things are moved within one switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// The replacement is put in place.
    There,
    /// What was there before is put back, because something failed.
    Back,
}

/// A step that is about to be made in a target. Numbers are those of the target.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Step {
    /// A thread is borrowed; this is what would be left if we died.
    Borrow(Residue),
    /// The soft limit on descriptors is raised for the time of the switch.
    RaiseLimit {
        /// The process.
        pid: i32,
        /// Its start time, because this outlives the switch when we die in it.
        start_time: u64,
        /// Its soft limit now.
        soft: u64,
        /// Its soft limit during the switch.
        raised: u64,
    },
    /// The soft limit on descriptors **has been** put back: what takes [`Step::RaiseLimit`] back must not be in the log before it is done, or a death in
    /// between would leave the limit raised for good.
    LimitPutBack {
        /// The process.
        pid: i32,
        /// Its start time.
        start_time: u64,
    },
    /// Descriptors of one table are exchanged.
    Descriptors {
        /// A process that uses the table.
        pid: i32,
        /// The thread that does it.
        tid: i32,
        /// Which way.
        way: Way,
        /// The descriptors.
        numbers: Vec<i32>,
    },
    /// A working or root directory is exchanged.
    Directory {
        /// A process that uses it.
        pid: i32,
        /// The thread that does it.
        tid: i32,
        /// Which way.
        way: Way,
        /// Whether it is the root directory.
        is_root: bool,
    },
    /// Mappings are exchanged.
    Mappings {
        /// The process.
        pid: i32,
        /// Which way.
        way: Way,
        /// First and one-past-last address of each.
        ranges: Vec<(u64, u64)>,
    },
}

/// Where steps are written down before they are made.
pub trait StepLog {
    /// Takes note of a step. It is made only if this succeeds (steps back are made in any case, and [`Step::LimitPutBack`] has been).
    ///
    /// # Errors
    /// Whatever keeps the log from holding the step; the switch is rolled back then.
    fn step(&mut self, step: &Step) -> io::Result<()>;
}

/// Collects steps in memory.
impl StepLog for Vec<Step> {
    fn step(&mut self, step: &Step) -> io::Result<()> {
        self.push(step.clone());
        Ok(())
    }
}

/// A POSIX lock that a table holds on a file whose descriptors are about to be exchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MovedLock {
    /// The table that owns it.
    pub table: TableId,
    /// A process that uses the table.
    pub pid: Pid,
    /// The description that it was found on.
    pub description: DescriptionId,
    /// A descriptor of it in that table.
    pub fd: Fd,
    /// Kind and range, as they are between switches.
    pub lock: FileLock,
    /// Whether the description is open for reading. A write lock on one that is not cannot be turned into a read lock: it is lost with the exchange and taken
    /// again as soon as the new descriptors are in place, and nobody can hold the range in between.
    pub is_readable: bool,
}

/// Whoever keeps a range from outsiders while the target cannot: any `dup3` over a descriptor of a file drops all POSIX locks of the table on
/// it. Called between these steps, the same in both directions:
///
/// 1. the target turns its write locks into read locks;
/// 2. [`LockHandover::before`]: take an OFD read lock on the ranges, or make sure that the one that is held survives;
/// 3. the descriptors are exchanged: the target's locks are gone;
/// 4. the target takes read locks through the new descriptors;
/// 5. [`LockHandover::after`]: turn the OFD locks into write locks where the target is served from now on, or give them up;
/// 6. the target turns its read locks into write locks again.
///
/// Outsiders can take a read lock between 1 and 6, and never a write lock between 2 and 5.
pub trait LockHandover {
    /// See step 2.
    ///
    /// # Errors
    /// The switch is rolled back.
    fn before(&mut self, locks: &[MovedLock], way: Way) -> io::Result<()>;

    /// See step 5. With [`Way::Back`] it may come without a [`LockHandover::before`] of that way: when the switch failed before step 3, only to
    /// say that the locks are as they were.
    ///
    /// # Errors
    /// The switch is rolled back.
    fn after(&mut self, locks: &[MovedLock], way: Way) -> io::Result<()>;
}

/// Nobody: between the exchange and the new lock an outsider can take the range.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoHandover;

impl LockHandover for NoHandover {
    fn before(&mut self, _: &[MovedLock], _: Way) -> io::Result<()> {
        Ok(())
    }

    fn after(&mut self, _: &[MovedLock], _: Way) -> io::Result<()> {
        Ok(())
    }
}
