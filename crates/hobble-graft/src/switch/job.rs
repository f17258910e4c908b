//! What one borrowed thread does for a switch, and how it is undone.
//!
//! Owns the order within a job and the room for descriptors that it needs. Invariant: what may have been changed is marked before the call that
//! changes it, so that an undo never misses anything.
//!
//! Length: each exchange and its undoing are read side by side.

use std::time::Instant;

use rustix::io::Errno;

use super::bystanders::{Bystanders, Closer};
use super::locks::{self, Grip, Hold};
use super::steps::{LockHandover, MovedLock, Step, StepLog, Way};
use super::{NotMoved, Report, SwitchError, descriptors, directories, in_place, mappings};
use crate::census::{Census, FsId, Table};
use crate::ids::{Fd, ProcessId, Tid};
use crate::limits::{self, DescriptorLimit};
use crate::proc::{ProcError, stat, status};
use crate::remote::{Borrowed, MESSAGE_DESCRIPTORS};
use crate::stop::{Deadline, Stopped};

/// Both ends of the pair of sockets.
const SOCKETS: u64 = 2;
/// Below this many descriptions a message, raising the limit is worth it.
const FEW: u64 = 16;

/// How far the handing over of locks has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Locks {
    /// As the target wants them.
    Full,
    /// Some write locks may be read locks.
    Weak,
    /// The exchange has begun.
    Lost,
}

/// A soft limit on descriptors that was raised for the time of a job.
#[derive(Clone, Copy, Debug)]
struct Raised {
    /// What it was.
    soft: u64,
    /// What it is now.
    raised: u64,
}

/// Everything to be done by one thread.
#[derive(Debug)]
pub(super) struct Job<'a> {
    pub(super) process: ProcessId,
    pub(super) tid: Tid,
    census: &'a Census,
    table: &'a Table,
    pub(super) items: Vec<descriptors::Item<'a>>,
    pub(super) directories: Vec<(FsId, directories::Item<'a>)>,
    pub(super) mappings: Vec<mappings::Item<'a>>,
    locks: Locks,
    /// Whoever kept the locks is dead: there is nothing to weaken through the old descriptors.
    pub(super) are_locks_gone: bool,
    /// Locks that are not handed over and would be lost in the exchange of the descriptors.
    bystanders: Bystanders<'a>,
    /// Locks that would be lost when the mappings are made, before the descriptors are exchanged.
    on_mapped: Bystanders<'a>,
}

impl<'a> Job<'a> {
    pub(super) fn new(process: ProcessId, tid: Tid, census: &'a Census, table: &'a Table) -> Self {
        Self {
            process,
            tid,
            census,
            table,
            items: Vec::new(),
            directories: Vec::new(),
            mappings: Vec::new(),
            locks: Locks::Full,
            are_locks_gone: false,
            bystanders: Bystanders::default(),
            on_mapped: Bystanders::default(),
        }
    }

    /// Exchanges everything.
    pub(super) fn run(
        &mut self,
        stopped: &mut Stopped,
        deadline: Deadline,
        log: &mut dyn StepLog,
        handover: &mut dyn LockHandover,
        report: &mut Report,
    ) -> Result<(), SwitchError> {
        let closer = self.closer();
        self.on_mapped = closer.lost_with_mappings(&self.mappings, Way::There)?;
        self.bystanders = closer.lost_with_descriptors(&self.items, &self.mappings)?;
        self.with_thread(stopped, deadline, log, |job, borrowed, message, log| {
            // Mappings first: each is made through a descriptor that is closed again, and closing any descriptor of a file drops the POSIX locks that the
            // process holds on it (fcntl_locking(2)). Before the descriptors are exchanged most are on the other filesystem's file.
            if !job.mappings.is_empty() {
                record(log, &job.mappings_step(Way::There, |_| true))?;
                job.on_mapped.protect(borrowed, deadline)?;
                let (count, bytes) =
                    mappings::exchange(borrowed, &mut job.mappings, Way::There, message, deadline)?;
                report.mappings += count;
                report.bytes_copied += bytes;
                job.on_mapped.take_again(borrowed, deadline)?;
            }
            job.exchange_directories(borrowed, deadline, log, report)?;
            job.exchange_descriptors(borrowed, message, deadline, log, handover, report)?;
            job.bystanders.take_again(borrowed, deadline)?;
            report.locks_taken_again += job.on_mapped.taken() + job.bystanders.taken();
            Ok(())
        })
    }

    /// Whether something failed because the process has been killed. Then all kinds of calls fail, while it may still be seen to live.
    pub(super) fn is_about_the_dead(&self, reason: &SwitchError) -> bool {
        if reason.is_gone() && !matches!(self.process.is_alive(), Ok(true)) {
            return true;
        }
        // A borrowed thread does not end by itself: if it does, so does its whole process (SIGKILL, or the end of another thread by exit_group).
        match stat::of_thread(self.process.pid, self.tid) {
            Ok(stat) if stat.state.is_dead() || stat.is_exiting() => true,
            Ok(_) => status::of_thread(self.tid)
                .is_ok_and(|status| status.pending.contains(libc::SIGKILL.cast_unsigned())),
            Err(error) => error.is_gone(),
        }
    }

    /// Puts back what may have been changed, and checks it.
    pub(super) fn undo(
        &mut self,
        stopped: &mut Stopped,
        deadline: Deadline,
        log: &mut dyn StepLog,
        handover: &mut dyn LockHandover,
    ) -> Result<(), SwitchError> {
        let untouched = self.locks == Locks::Full
            && self.bystanders.are_untouched()
            && self.on_mapped.are_untouched()
            && !self.items.iter().any(|i| i.is_touched)
            && !self.directories.iter().any(|(_, i)| i.is_touched)
            && !self.mappings.iter().any(|i| i.is_touched);
        if untouched {
            return Ok(());
        }
        self.with_thread(
            stopped,
            deadline,
            &mut Regardless(log),
            |job, borrowed, message, log| {
                // Whatever fails, the rest is put back all the same.
                let bystanders = job.bystanders.protect(borrowed, deadline);
                let on_mapped = job.protect_on_mapped(borrowed, deadline);
                let mappings = if job.mappings.iter().any(|i| i.is_touched) {
                    record(log, &job.mappings_step(Way::Back, |item| item.is_touched))?;
                    mappings::exchange(borrowed, &mut job.mappings, Way::Back, message, deadline)
                        .map(drop)
                } else {
                    Ok(())
                };
                let on_mapped = on_mapped.and(job.on_mapped.take_again(borrowed, deadline));
                let directories = job.restore_directories(borrowed, deadline, log);
                let descriptors =
                    job.restore_descriptors(borrowed, message, deadline, log, handover);
                let bystanders = bystanders.and(job.bystanders.take_again(borrowed, deadline));
                descriptors
                    .and(on_mapped)
                    .and(bystanders)
                    .and(directories)
                    .and(mappings)
            },
        )?;
        self.verify()
    }

    /// Borrows the thread, with room for descriptors, and gives it back.
    fn with_thread(
        &mut self,
        stopped: &mut Stopped,
        deadline: Deadline,
        log: &mut dyn StepLog,
        work: impl FnOnce(
            &mut Self,
            &mut Borrowed<'_>,
            usize,
            &mut dyn StepLog,
        ) -> Result<(), SwitchError>,
    ) -> Result<(), SwitchError> {
        let (message, old) = self.make_room(log)?;
        let result = (|| {
            let mut step =
                |residue: &crate::remote::Residue| log.step(&Step::Borrow(residue.clone()));
            let mut borrowed =
                Borrowed::open(stopped, self.process, self.tid, deadline, &mut step)?;
            let done = work(self, &mut borrowed, message, log);
            let closed = borrowed.close();
            done?;
            Ok(closed?)
        })();
        if let Some(raised) = old {
            self.put_limit_back(raised, log)?;
        }
        result
    }

    /// Puts a raised soft limit back, unless somebody else has set it meanwhile (prlimit(2) works on a stopped process too).
    fn put_limit_back(&self, limit: Raised, log: &mut dyn StepLog) -> Result<(), SwitchError> {
        let pid = self.process.pid;
        let put_back = self.limit().and_then(|now| {
            if now.soft == limit.raised {
                self.set_limit(DescriptorLimit {
                    soft: limit.soft.min(now.hard),
                    ..now
                })?;
            }
            Ok(())
        });
        match put_back {
            // A dead process needs no limit.
            Ok(()) | Err(SwitchError::Gone { .. }) => {}
            Err(error) => return Err(error),
        }
        let step = Step::LimitPutBack {
            pid: pid.as_raw(),
            start_time: self.process.start_time,
        };
        // It is done already. Without the record a recovery finds that the limit is not the raised one any more, and leaves it.
        if let Err(error) = log.step(&step) {
            tracing::warn!(%error, "that a limit was put back is not recorded");
        }
        Ok(())
    }

    fn limit(&self) -> Result<DescriptorLimit, SwitchError> {
        let pid = self.process.pid;
        limits::descriptors(pid).map_err(|error| match error {
            ProcError::Gone { .. } => SwitchError::Gone { pid },
            source => SwitchError::ReadLimit { pid, source },
        })
    }

    fn set_limit(&self, limit: DescriptorLimit) -> Result<(), SwitchError> {
        let pid = self.process.pid;
        limits::set_soft(pid, limit).map_err(|errno| match errno {
            Errno::SRCH => SwitchError::Gone { pid },
            errno => SwitchError::Limit { pid, errno },
        })
    }

    /// How many descriptors a message may have; raises the soft limit where there is no room, and gives the old one.
    fn make_room(&self, log: &mut dyn StepLog) -> Result<(usize, Option<Raised>), SwitchError> {
        let pid = self.process.pid;
        let DescriptorLimit { soft, hard } = self.limit()?;
        let mut used = self.table.descriptors as u64;
        if soft < used + SOCKETS + FEW {
            // Tight: descriptors above the limit, made before it was lowered, do not take room below it.
            used = self.used_below(soft).unwrap_or(used);
        }
        // dup3 onto a number at or above the soft limit is refused: the program may have lowered it since.
        let highest = self
            .items
            .iter()
            .flat_map(|i| &i.places)
            .map(|(fd, _)| fd.as_raw())
            .max();
        let needed = highest.map_or(0, |fd| u64::from(fd.cast_unsigned()) + 1);
        let wanted = (self.items.len() + 1)
            .max(self.mappings.len())
            .min(MESSAGE_DESCRIPTORS) as u64;
        let room = |soft: u64| soft.saturating_sub(used).saturating_sub(SOCKETS);
        let mut now = soft;
        let mut old = None;
        if soft < needed || room(soft) < wanted.min(FEW) {
            let raised = needed.max(used + SOCKETS + wanted).min(hard).max(soft);
            if raised > soft {
                record(
                    log,
                    &Step::RaiseLimit {
                        pid: pid.as_raw(),
                        start_time: self.process.start_time,
                        soft,
                        raised,
                    },
                )?;
                self.set_limit(DescriptorLimit { soft: raised, hard })?;
                old = Some(Raised { soft, raised });
                now = raised;
            }
        }
        let message = room(now).min(wanted);
        if message == 0 || now < needed {
            if let Some(old) = old {
                self.put_limit_back(old, log)?;
            }
            return Err(SwitchError::TableFull { pid, used, hard });
        }
        // To enlarge a table that threads share takes a grace period of RCU, several milliseconds (fs/file.c, `expand_fdtable`).
        let spare = self
            .capacity()
            .map(|capacity| capacity.saturating_sub(used + SOCKETS))
            .filter(|spare| *spare >= FEW);
        let message = spare.map_or(message, |spare| message.min(spare));
        Ok((usize::try_from(message).unwrap_or(1), old))
    }

    /// How many descriptors the table holds without being enlarged, if others share it (`FDSize` of proc_pid_status(5)).
    fn capacity(&self) -> Option<u64> {
        if self.table.members.len() < 2 {
            return None;
        }
        let path = format!("/proc/{}/task/{}/status", self.process.pid, self.tid);
        let status = std::fs::read(path).ok()?;
        let line = status
            .split(|byte| *byte == b'\n')
            .find_map(|line| line.strip_prefix(b"FDSize:"))?;
        std::str::from_utf8(line).ok()?.trim().parse().ok()
    }

    /// Descriptors with a number below the limit; `None` when they cannot be listed.
    fn used_below(&self, limit: u64) -> Option<u64> {
        let directory =
            std::fs::read_dir(format!("/proc/{}/task/{}/fd", self.process.pid, self.tid)).ok()?;
        let number = |entry: std::io::Result<std::fs::DirEntry>| {
            entry.ok()?.file_name().to_str()?.parse::<u64>().ok()
        };
        Some(
            directory
                .filter_map(number)
                .filter(|fd| *fd < limit)
                .count() as u64,
        )
    }

    fn moved_locks(&self) -> Vec<MovedLock> {
        locks::of_items(self.table.id, self.process.pid, &self.items)
    }

    /// Where descriptors are closed.
    fn closer(&self) -> Closer<'a> {
        Closer {
            census: self.census,
            table: self.table.id,
            pid: self.process.pid,
            tid: self.tid,
        }
    }

    /// Before old mappings are made again.
    fn protect_on_mapped(
        &mut self,
        borrowed: &mut Borrowed<'_>,
        deadline: Deadline,
    ) -> Result<(), SwitchError> {
        let are_descriptors_old = !self.items.iter().any(|item| item.is_touched);
        if self.on_mapped.are_untouched() {
            self.on_mapped = if are_descriptors_old {
                self.closer()
                    .lost_with_mappings(&self.mappings, Way::Back)?
            } else {
                // They are handed back with the descriptors.
                Bystanders::default()
            };
        }
        self.on_mapped.protect(borrowed, deadline)
    }

    /// Puts the replacements of all descriptors in place.
    fn put_in_place(
        &mut self,
        borrowed: &mut Borrowed<'_>,
        message: usize,
        deadline: Deadline,
    ) -> Result<usize, SwitchError> {
        let numbers = in_place::Numbers {
            census: self.census,
            table: self.table.id,
            is_alone: self.table.members.len() == 1,
        };
        let (items, bystanders) = (&mut self.items, &mut self.bystanders);
        let placed = descriptors::spare(borrowed, items, bystanders, numbers, deadline)?;
        let (way, numbers) = (Way::There, Some(numbers));
        Ok(placed + descriptors::place(borrowed, items, way, message, numbers, deadline)?)
    }

    fn exchange_descriptors(
        &mut self,
        borrowed: &mut Borrowed<'_>,
        message: usize,
        deadline: Deadline,
        log: &mut dyn StepLog,
        handover: &mut dyn LockHandover,
        report: &mut Report,
    ) -> Result<(), SwitchError> {
        if self.items.is_empty() {
            return Ok(());
        }
        record(log, &self.descriptors_step(Way::There, |_| true))?;
        let moved = self.moved_locks();
        if moved.is_empty() {
            report.descriptors += self.put_in_place(borrowed, message, deadline)?;
            return Ok(());
        }
        let pid = self.process.pid;
        if !self.are_locks_gone {
            self.locks = Locks::Weak;
            locks::hold(borrowed, moved.iter().map(Grip::from), Hold::Read, deadline)?;
        }
        handover
            .before(&moved, Way::There)
            .map_err(|source| SwitchError::Handover { pid, source })?;
        self.locks = Locks::Lost;
        let lost = Instant::now();
        report.descriptors += self.put_in_place(borrowed, message, deadline)?;
        locks::hold(borrowed, moved.iter().map(Grip::from), Hold::Read, deadline)?;
        handover
            .after(&moved, Way::There)
            .map_err(|source| SwitchError::Handover { pid, source })?;
        locks::hold(borrowed, moved.iter().map(Grip::from), Hold::Full, deadline)?;
        report.lock_window = report.lock_window.max(lost.elapsed());
        report.locks += moved.len();
        Ok(())
    }

    fn restore_descriptors(
        &mut self,
        borrowed: &mut Borrowed<'_>,
        message: usize,
        deadline: Deadline,
        log: &mut dyn StepLog,
        handover: &mut dyn LockHandover,
    ) -> Result<(), SwitchError> {
        let pid = self.process.pid;
        let moved = self.moved_locks();
        if !self.items.iter().any(|item| item.is_touched) {
            if self.locks == Locks::Full {
                return Ok(());
            }
            // Only weakened: through the old descriptors they are made full again.
            handover
                .after(&moved, Way::Back)
                .map_err(|source| SwitchError::Handover { pid, source })?;
            locks::hold(borrowed, moved.iter().map(Grip::from), Hold::Full, deadline)?;
            self.locks = Locks::Full;
            return Ok(());
        }
        record(
            log,
            &self.descriptors_step(Way::Back, |item| item.is_touched),
        )?;
        if moved.is_empty() {
            descriptors::place(
                borrowed,
                &mut self.items,
                Way::Back,
                message,
                None,
                deadline,
            )?;
            return Ok(());
        }
        handover
            .before(&moved, Way::Back)
            .map_err(|source| SwitchError::Handover { pid, source })?;
        descriptors::place(
            borrowed,
            &mut self.items,
            Way::Back,
            message,
            None,
            deadline,
        )?;
        locks::hold(borrowed, moved.iter().map(Grip::from), Hold::Read, deadline)?;
        handover
            .after(&moved, Way::Back)
            .map_err(|source| SwitchError::Handover { pid, source })?;
        locks::hold(borrowed, moved.iter().map(Grip::from), Hold::Full, deadline)?;
        self.locks = Locks::Full;
        Ok(())
    }

    fn exchange_directories(
        &mut self,
        borrowed: &mut Borrowed<'_>,
        deadline: Deadline,
        log: &mut dyn StepLog,
        report: &mut Report,
    ) -> Result<(), SwitchError> {
        for (fs, item) in &mut self.directories {
            record(
                log,
                &directory_step(self.process, self.tid, Way::There, item.is_root),
            )?;
            match directories::change(borrowed, item, Way::There, deadline)? {
                Ok(()) => report.directories += 1,
                Err(errno) => {
                    item.is_touched = false;
                    report.not_moved.push(NotMoved::Directory {
                        fs: *fs,
                        is_root: item.is_root,
                        errno,
                    });
                }
            }
        }
        Ok(())
    }

    fn restore_directories(
        &mut self,
        borrowed: &mut Borrowed<'_>,
        deadline: Deadline,
        log: &mut dyn StepLog,
    ) -> Result<(), SwitchError> {
        let pid = self.process.pid;
        // The root first here too: it leads through the working directory.
        for (_, item) in self
            .directories
            .iter_mut()
            .filter(|(_, item)| item.is_touched)
        {
            record(
                log,
                &directory_step(self.process, self.tid, Way::Back, item.is_root),
            )?;
            directories::change(borrowed, item, Way::Back, deadline)?
                .map_err(|errno| SwitchError::Directory { pid, errno })?;
            item.is_touched = false;
        }
        Ok(())
    }

    /// Whether every descriptor refers to what was there before.
    fn verify(&self) -> Result<(), SwitchError> {
        use std::os::fd::AsRawFd as _;
        let own = std::process::id().cast_signed();
        for item in &self.items {
            for (fd, _) in &item.places {
                let same = crate::sys::kcmp::file(
                    own,
                    item.back.as_raw_fd(),
                    self.tid.as_raw(),
                    fd.as_raw(),
                );
                match same {
                    Ok(std::cmp::Ordering::Equal) => {}
                    Err(Errno::SRCH) => {
                        return Err(SwitchError::Gone {
                            pid: self.process.pid,
                        });
                    }
                    _ => {
                        return Err(SwitchError::NotRestored {
                            pid: self.process.pid,
                            fd: *fd,
                        });
                    }
                }
            }
        }
        Ok(())
    }

    fn descriptors_step(&self, way: Way, which: impl Fn(&descriptors::Item<'_>) -> bool) -> Step {
        let numbers: Vec<i32> = self
            .items
            .iter()
            .filter(|i| which(i))
            .flat_map(|i| &i.places)
            .map(|(fd, _): &(Fd, bool)| fd.as_raw())
            .collect();
        Step::Descriptors {
            pid: self.process.pid.as_raw(),
            tid: self.tid.as_raw(),
            way,
            numbers,
        }
    }

    fn mappings_step(&self, way: Way, which: impl Fn(&mappings::Item<'_>) -> bool) -> Step {
        let ranges = self
            .mappings
            .iter()
            .filter(|i| which(i))
            .map(|i| (i.mapping.start, i.mapping.end))
            .collect();
        Step::Mappings {
            pid: self.process.pid.as_raw(),
            way,
            ranges,
        }
    }
}

fn directory_step(process: ProcessId, tid: Tid, way: Way, is_root: bool) -> Step {
    Step::Directory {
        pid: process.pid.as_raw(),
        tid: tid.as_raw(),
        way,
        is_root,
    }
}

/// The log during an undo, which does not wait for it.
struct Regardless<'l>(&'l mut dyn StepLog);

impl StepLog for Regardless<'_> {
    fn step(&mut self, step: &Step) -> std::io::Result<()> {
        if let Err(error) = self.0.step(step) {
            tracing::warn!(%error, "a step of an undo was not recorded");
        }
        Ok(())
    }
}

fn record(log: &mut dyn StepLog, step: &Step) -> Result<(), SwitchError> {
    log.step(step)
        .map_err(|source| SwitchError::Record { source })
}
