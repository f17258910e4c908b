//! Standing still: every thread of some processes held at the border to user space, and let go again as if nothing had been.
//!
//! Owns the tracing relation to the targets. Invariants:
//!
//! * All requests come from one thread, as ptrace demands: [`Tracer::scope`] makes that thread, [`Stopped`] cannot leave it, and when
//!   it ends the kernel detaches whatever is still traced (`exit_ptrace`, kernel/ptrace.c). That is also the only way to let go
//!   of a thread that never stopped, and what happens when our process is killed. Nothing is ever seized with `PTRACE_O_EXITKILL`.
//! * A thread that stands still does so in a `PTRACE_EVENT_STOP` inside `get_signal`, before the kernel has decided
//!   whether the system call it was in is restarted. When it goes on, the kernel decides, knowing the signals that have come
//!   meanwhile: nothing is rewound by hand. The one exception are calls that return `EINTR` after any stop:
//!   they are given the number that means "again unless a handler runs" as soon as the stop is seen, so that our death after that leaves
//!   no `EINTR` behind. (Our being killed between the request and that moment does: some microseconds per thread, as after SIGSTOP.)
//! * No signal is taken away: one that shows up before the stop is delivered (its handler starts after the release), the others stay in
//!   the kernel's queues, real-time signals with their order and count.
//! * A group stop is kept: the kernel reinstates it when we detach (`__ptrace_unlink`).
//!
//! What remains if we die anywhere in here: nothing but that.

mod deadline;
mod facts;
pub(crate) mod sys;

use std::collections::BTreeSet;
use std::marker::PhantomData;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::io::Errno;

pub use deadline::Deadline;
pub(crate) use deadline::Patience;
use sys::Waited;

use crate::arch;
use crate::ids::{Pid, ProcessId, Tid};
use crate::proc::{ProcError, stat};

/// `PTRACE_EVENT_STOP` of include/uapi/linux/ptrace.h.
pub(crate) const EVENT_STOP: i32 = 128;

/// How long a thread may be on its way before we look why.
const LOOK_AFTER: Duration = Duration::from_millis(2);

/// How long letting go may wait for a thread that is still on its way into its stop.
const LETTING_GO: Duration = Duration::from_millis(20);

/// Why processes could not be made to stand still. Everything stopped so far has been let go.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StopError {
    /// A process has exited, or its pid belongs to another one now.
    #[error("process {pid} is gone")]
    Gone {
        /// The process.
        pid: Pid,
    },
    /// Somebody else traces a thread: a debugger, strace, another Hobble.
    #[error("thread {tid} of process {pid} is already traced by process {tracer} ({name})")]
    Traced {
        /// The process.
        pid: Pid,
        /// The thread.
        tid: Tid,
        /// The thread that traces it.
        tracer: i32,
        /// The tracer's name.
        name: String,
    },
    /// A thread of the kernel.
    #[error("process {pid} is a thread of the kernel")]
    KernelThread {
        /// The process.
        pid: Pid,
    },
    /// Our own process.
    #[error("process {pid} is this very process")]
    Own {
        /// The process.
        pid: Pid,
    },
    /// A thread runs code of another architecture (32-bit).
    #[error("thread {tid} of process {pid} does not run 64-bit code")]
    Foreign {
        /// The process.
        pid: Pid,
        /// The thread.
        tid: Tid,
    },
    /// The kernel refused to let us trace.
    #[error("cannot trace thread {tid} of process {pid}")]
    Refused {
        /// The process.
        pid: Pid,
        /// The thread.
        tid: Tid,
        /// The kernel's reason.
        #[source]
        errno: Errno,
    },
    /// A thread did not stop in time.
    #[error("thread {tid} of process {pid} did not stop in time: {waits}")]
    Unstoppable {
        /// The process.
        pid: Pid,
        /// The thread.
        tid: Tid,
        /// What it was found doing.
        waits: Waits,
    },
    /// The processes could not be listed or understood.
    #[error("cannot look at process {pid}")]
    Inspect {
        /// The process.
        pid: Pid,
        /// What failed.
        #[source]
        source: ProcError,
    },
    /// A directory of `/proc` could not be listed.
    #[error("cannot list {}", path.display())]
    List {
        /// The directory.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        errno: Errno,
    },
    /// The tracer's thread could not be started.
    #[error("cannot start the thread that traces")]
    Thread {
        /// The kernel's reason.
        #[source]
        errno: Errno,
    },
}

impl StopError {
    /// The process that stands in the way, where it is one.
    pub fn pid(&self) -> Option<Pid> {
        match self {
            Self::Gone { pid }
            | Self::Traced { pid, .. }
            | Self::KernelThread { pid }
            | Self::Own { pid }
            | Self::Foreign { pid, .. }
            | Self::Refused { pid, .. }
            | Self::Unstoppable { pid, .. }
            | Self::Inspect { pid, .. } => Some(*pid),
            Self::List { .. } | Self::Thread { .. } => None,
        }
    }
}

/// What a thread does that keeps it from stopping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Waits {
    /// It waits for a child made by `vfork` to call `exec` or exit (not interruptible, fs/exec.c `mm_release`).
    ForVforkChild,
    /// It sleeps where only its own event wakes it (state D), in this system call.
    InKernel {
        /// The number of the system call, -1 when it is in none.
        call: i64,
    },
    /// It runs and had no time to stop.
    Busy,
}

impl std::fmt::Display for Waits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ForVforkChild => f.write_str("it waits for its vfork child"),
            Self::InKernel { call } => write!(f, "it sleeps uninterruptibly in system call {call}"),
            Self::Busy => f.write_str("it kept running"),
        }
    }
}

/// The right to trace, tied to the one thread that may use it.
#[derive(Debug)]
pub struct Tracer {
    _not_send: PhantomData<*const ()>,
}

impl Tracer {
    /// Runs `work` on a thread of its own, the only one that may trace. When the thread ends, the kernel lets go of everything that is
    /// still traced, so nothing outlives this call.
    ///
    /// # Errors
    /// [`StopError::Thread`] when no thread can be started, else what `work` returns.
    pub fn scope<R, E, F>(work: F) -> Result<R, E>
    where
        R: Send,
        E: Send + From<StopError>,
        F: FnOnce(&Tracer) -> Result<R, E> + Send,
    {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("tracer".to_owned())
                .spawn_scoped(scope, || {
                    // Short sleeps while waiting for stops must be short: the default slack is 50 µs. The thread ends with the scope.
                    let _ =
                        rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1_000));
                    work(&Tracer {
                        _not_send: PhantomData,
                    })
                });
            match thread {
                Ok(handle) => handle
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                Err(error) => {
                    let errno = Errno::from_io_error(&error).unwrap_or(Errno::AGAIN);
                    Err(StopError::Thread { errno }.into())
                }
            }
        })
    }

    /// Makes every thread of these processes stand still. Threads and processes that end meanwhile are no error as long as one
    /// process is left.
    ///
    /// A process that waits for its `vfork` child is held while the child, if it is one of `processes` too, is
    /// let run to its `exec` or exit.
    ///
    /// # Errors
    /// See [`StopError`]. Everything has been let go by then.
    pub fn stop_all(
        &self,
        processes: &[ProcessId],
        deadline: Deadline,
    ) -> Result<Stopped, StopError> {
        let mut stopped = Stopped {
            processes: Vec::new(),
            threads: Vec::new(),
            begun: None,
            _not_send: PhantomData,
        };
        stopped.add(processes, deadline)?;
        Ok(stopped)
    }
}

/// Where a thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Traced, not yet stopped.
    Coming,
    /// In a `PTRACE_EVENT_STOP`.
    Still,
    /// A vfork child that runs to its exec while its parent is held.
    Excused,
    /// Runs code of ours: see [`crate::remote`].
    Borrowed,
    /// Exited or exiting.
    Gone,
}

/// One thread that we trace.
#[derive(Debug)]
pub(crate) struct Thread {
    pub(crate) tid: Tid,
    pub(crate) pid: Pid,
    pub(crate) standing: Standing,
    /// A stop signal that came while the thread ran our code, to be sent again when it is let go.
    pub(crate) held_signal: Option<i32>,
}

/// Processes all of whose threads stand still. Dropping it lets them go.
#[derive(Debug)]
pub struct Stopped {
    processes: Vec<ProcessId>,
    threads: Vec<Thread>,
    begun: Option<Instant>,
    _not_send: PhantomData<*const ()>,
}

/// What letting go found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Released {
    /// From the first request to stop to the last thread let go.
    pub stood_still: Duration,
    /// Processes that had ended by then.
    pub gone: Vec<Pid>,
}

impl Stopped {
    /// Makes further processes stand still together with those that do already: children that were born before their parents stopped.
    ///
    /// # Errors
    /// See [`StopError`]; on an error the processes that stood still before still do.
    pub fn add(&mut self, processes: &[ProcessId], deadline: Deadline) -> Result<(), StopError> {
        let (old_processes, old_threads) = (self.processes.len(), self.threads.len());
        let result = self.try_add(processes, deadline);
        if result.is_err() {
            let rest = self.threads.split_off(old_threads);
            let_go(rest);
            self.processes.truncate(old_processes);
        }
        result
    }

    fn try_add(&mut self, processes: &[ProcessId], deadline: Deadline) -> Result<(), StopError> {
        for process in processes {
            if !self.processes.contains(process) {
                match facts::may_be_stopped(*process) {
                    Ok(()) => self.processes.push(*process),
                    // Whoever has ended since the processes were listed needs no stopping.
                    Err(StopError::Gone { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        if let (Some(first), true) = (processes.first(), self.processes.is_empty()) {
            return Err(StopError::Gone { pid: first.pid });
        }
        // Seizing disturbs nobody: do all of it before the first thread is made to stop.
        self.seize_new(None)?;
        self.begun.get_or_insert_with(Instant::now);
        for thread in self
            .threads
            .iter_mut()
            .filter(|t| t.standing == Standing::Coming)
        {
            if sys::interrupt(thread.tid).is_err() {
                thread.standing = Standing::Gone;
            }
        }
        loop {
            self.collect(deadline)?;
            // A thread that was not stopped yet may have made another one after the scan.
            if !self.seize_new(Some(()))? {
                break;
            }
        }
        self.check_code()
    }

    /// Seizes threads that are not known yet; says whether there were any. With `interrupt` they are made to stop at once.
    fn seize_new(&mut self, interrupt: Option<()>) -> Result<bool, StopError> {
        let known: BTreeSet<Tid> = self.threads.iter().map(|t| t.tid).collect();
        let mut found = false;
        for process in self.processes.clone() {
            for tid in facts::threads(process.pid)? {
                if known.contains(&tid) {
                    continue;
                }
                match sys::seize(tid, sys::OPTIONS) {
                    Ok(()) => {}
                    Err(Errno::SRCH) => continue,
                    Err(errno) => match facts::why_not_traceable(process.pid, tid, errno) {
                        Some(error) => return Err(error),
                        None => continue,
                    },
                }
                found = true;
                let standing = match interrupt {
                    Some(()) if sys::interrupt(tid).is_err() => Standing::Gone,
                    _ => Standing::Coming,
                };
                self.threads.push(Thread {
                    tid,
                    pid: process.pid,
                    standing,
                    held_signal: None,
                });
            }
        }
        Ok(found)
    }

    /// Waits until no thread is on its way any more.
    fn collect(&mut self, deadline: Deadline) -> Result<(), StopError> {
        let patience = Patience::new();
        let mut looked = Duration::ZERO;
        loop {
            let mut coming = false;
            for thread in self
                .threads
                .iter_mut()
                .filter(|t| t.standing == Standing::Coming)
            {
                thread.poll();
                coming |= thread.standing == Standing::Coming;
            }
            if !coming && !self.recall_excused() {
                return Ok(());
            }
            if patience.waited() > looked + LOOK_AFTER {
                looked = patience.waited();
                self.look_why();
            }
            let late = |t: &&Thread| matches!(t.standing, Standing::Coming | Standing::Excused);
            if deadline.passed()
                && let Some(thread) = self.threads.iter().find(late)
            {
                let waits = facts::waits(thread.pid, thread.tid);
                return Err(StopError::Unstoppable {
                    pid: thread.pid,
                    tid: thread.tid,
                    waits,
                });
            }
            patience.wait();
        }
    }

    /// Threads that are late may be exiting, or wait for a vfork child that we hold ourselves.
    fn look_why(&mut self) {
        let mut excuse = Vec::new();
        for thread in self
            .threads
            .iter_mut()
            .filter(|t| t.standing == Standing::Coming)
        {
            match stat::of_thread(thread.pid, thread.tid) {
                Ok(stat) if stat.is_exiting() || stat.state.is_dead() => {
                    thread.standing = Standing::Gone
                }
                Ok(_) if facts::waits(thread.pid, thread.tid) == Waits::ForVforkChild => {
                    excuse.push(thread.pid)
                }
                Ok(_) => {}
                Err(error) if error.is_gone() => thread.standing = Standing::Gone,
                Err(_) => {}
            }
        }
        if excuse.is_empty() {
            return;
        }
        for thread in self
            .threads
            .iter_mut()
            .filter(|t| t.standing == Standing::Still)
        {
            let parent = stat::of_process(thread.pid)
                .ok()
                .and_then(|stat| Pid::new(stat.parent));
            if parent.is_some_and(|parent| excuse.contains(&parent))
                && sys::resume(thread.tid, 0).is_ok()
            {
                thread.standing = Standing::Excused;
            }
        }
    }

    /// Once nobody waits any more, excused children are stopped like the others. Says whether there were any.
    fn recall_excused(&mut self) -> bool {
        let mut any = false;
        for thread in self
            .threads
            .iter_mut()
            .filter(|t| t.standing == Standing::Excused)
        {
            any = true;
            thread.standing = if sys::interrupt(thread.tid).is_ok() {
                Standing::Coming
            } else {
                Standing::Gone
            };
        }
        any
    }

    /// Refuses 32-bit code once everything stands still, and a set of processes that has become empty.
    fn check_code(&mut self) -> Result<(), StopError> {
        for thread in self
            .threads
            .iter()
            .filter(|t| t.standing == Standing::Still)
        {
            match sys::registers(thread.tid) {
                Ok(registers) if registers.is_64_bit() => {}
                Ok(_) | Err(Errno::NOEXEC) => {
                    return Err(StopError::Foreign {
                        pid: thread.pid,
                        tid: thread.tid,
                    });
                }
                Err(_) => {}
            }
        }
        match self.processes.first() {
            Some(first) if !self.threads.iter().any(|t| t.standing == Standing::Still) => {
                Err(StopError::Gone { pid: first.pid })
            }
            _ => Ok(()),
        }
    }

    /// The processes that stand still, in the order they were named.
    pub fn processes(&self) -> &[ProcessId] {
        &self.processes
    }

    /// The threads of a process that stand still.
    pub fn threads(&self, pid: Pid) -> impl Iterator<Item = Tid> + '_ {
        self.threads
            .iter()
            .filter(move |t| t.pid == pid && t.standing == Standing::Still)
            .map(|t| t.tid)
    }

    /// How long the first of them has been standing still.
    pub fn so_far(&self) -> Duration {
        self.begun.map_or(Duration::ZERO, |begun| begun.elapsed())
    }

    pub(crate) fn thread_mut(&mut self, tid: Tid) -> Option<&mut Thread> {
        self.threads.iter_mut().find(|t| t.tid == tid)
    }

    /// Lets everybody go.
    pub fn release(mut self) -> Released {
        let threads = std::mem::take(&mut self.threads);
        let processes = std::mem::take(&mut self.processes);
        let_go(threads);
        let stood_still = self.so_far();
        let alive = |process: &ProcessId| !matches!(process.is_alive(), Ok(false));
        let gone = processes
            .iter()
            .filter(|p| !alive(p))
            .map(|p| p.pid)
            .collect();
        Released { stood_still, gone }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let_go(std::mem::take(&mut self.threads));
    }
}

impl Thread {
    /// Takes up what has happened to a thread that is to stop.
    pub(crate) fn poll(&mut self) {
        match sys::next_stop(self.tid) {
            Waited::Nothing => {}
            Waited::Gone => self.standing = Standing::Gone,
            Waited::Stopped(status) if status >> 8 == EVENT_STOP => {
                self.standing = Standing::Still;
                self.undo_eintr();
            }
            Waited::Stopped(status) => {
                // A signal that was on its way before our request: deliver it as without us; its handler starts only after the
                // release. Any stop cancels the request to stop (ptrace_stop, kernel/signal.c), so make it again first.
                let signal = if status & 0x80 != 0 { 0 } else { status & 0x7f };
                let again = sys::interrupt(self.tid).and_then(|()| sys::resume(self.tid, signal));
                if again.is_err() {
                    self.standing = Standing::Gone;
                }
            }
        }
    }

    /// See [`arch::restarts_after_stop`].
    pub(crate) fn undo_eintr(&self) {
        let Ok(mut registers) = sys::registers(self.tid) else {
            return;
        };
        if arch::restarts_after_stop(&registers) {
            registers.restart_unless_handled();
            // Fails only when the thread has been killed meanwhile.
            let _ = sys::set_registers(self.tid, &registers);
        }
    }
}

/// Detaches all of them, in the order in which they were stopped.
fn let_go(mut threads: Vec<Thread>) {
    for thread in &threads {
        if let Some(signal) = thread.held_signal {
            facts::send_stop_again(thread, signal);
        }
    }
    let give_up = Deadline::after(LETTING_GO);
    let patience = Patience::new();
    loop {
        let mut coming = false;
        for thread in &mut threads {
            if matches!(thread.standing, Standing::Excused | Standing::Borrowed) {
                let ok = sys::interrupt(thread.tid).is_ok();
                thread.standing = if ok { Standing::Coming } else { Standing::Gone };
            }
            if thread.standing == Standing::Coming {
                thread.poll();
            }
            match thread.standing {
                Standing::Still => {
                    // ESRCH: killed, or detached a moment ago.
                    let _ = sys::detach(thread.tid, 0);
                    thread.standing = Standing::Gone;
                    thread.held_signal = None;
                }
                Standing::Coming => coming = true,
                _ => {}
            }
        }
        if !coming || give_up.passed() {
            break;
        }
        patience.wait();
    }
    for thread in &threads {
        match thread.standing {
            Standing::Gone => facts::reap(thread.pid, thread.tid),
            _ => tracing::warn!(
                pid = thread.pid.as_raw(),
                tid = thread.tid.as_raw(),
                "thread has not stopped yet; the kernel lets it go when the tracing thread ends"
            ),
        }
    }
}
