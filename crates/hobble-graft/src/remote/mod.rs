//! System calls made by somebody else's thread.
//!
//! Owns a thread that stands still while it is [`Borrowed`], the code and memory it needs for that, and their removal. Invariants:
//!
//! * **We may be killed at any instruction and the thread goes on unharmed.** Our code (see `arch`) lies in unused bytes behind
//!   the target's vDSO; no instruction of the target is replaced, no breakpoint set. From every instruction of it the thread
//!   finds its own way back: it closes what we opened in it, unmaps our memory, and loads the registers and the
//!   signal mask it had, its interrupted system call restarted by hand. The orders below (registers before mask on the way in, mask
//!   before registers on the way out, cells cleared before they are closed) keep that true between any two of our requests.
//! * The thread's own stack is never touched, and its stack pointer never changed.
//! * While we live, the thread ends in the same kind of stop in which it was found, with the same registers, so that the kernel
//!   itself restarts what it was doing, with whatever signals have come meanwhile.
//! * No call is made that overwrites the restart block (`nanosleep`, `poll`, `futex`, `rt_sigreturn`).
//! * A restartable sequence (rseq) that was interrupted is aborted, as the kernel would have done.
//!
//! After two traced calls (for the scratch mapping and a pair of sockets) the thread serves batches of calls: it
//! runs a table, writes a byte to its socket, and waits for the next byte in `read`. Thousands of calls then need no ptrace
//! stop at all. End of file or two seconds without a word mean that we have died (the time-out is needed: another process
//! may share our descriptor table and keep our end of the socket open).
//!
//! Taking a thread, using it and giving it back are in this one file, long as it is, because the orders above are only seen to be right when
//! all requests to the thread are read together.
//!
//! Length: the life of one borrow, from the first register to the last; its invariants hold only as a whole.

mod call;
mod error;
mod feed;
mod filter;
mod memory;
mod place;
mod residue;
mod sys;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

pub(crate) use call::{Call, Cell};
pub use error::RemoteError;
pub(crate) use feed::{Letter, Taken};
pub(crate) use memory::Memory;
pub use residue::{Cleaned, Residue, clean};

use call::decode;
use error::refused;

use crate::arch::{self, ENTRY_SIZE, Ending, Image, Registers, STOP_ON_ERROR};
use crate::ids::{Fd, Pid, ProcessId, Tid};
use crate::proc::status::{self, Seccomp};
use crate::stop::sys::{self as ptrace, Waited};
use crate::stop::{Deadline, Patience, Standing, Stopped};

/// Layout of the scratch mapping. The header's fields up to [`PEER`] are known to the code in the target.
const PROGRESS: u64 = 8;
const TABLE_FIRST: u64 = 16;
const SOCKET: u64 = 48;
const PEER: u64 = 52;
const CLEANUP: u64 = 0x1000;
const TABLE: u64 = 0x6000;
const DATA: u64 = 0x1_8000;
/// Messages that are received in place; see `feed`.
const LETTERS: u64 = DATA + 0x6000;
const SCRATCH_LENGTH: u64 = 0x2_8000;

/// One byte for each word that the code says: [`DONE`] is in the header, [`TAKEN`] behind it.
const TAKEN_AT: u64 = 36;
/// What is said at the end of a table.
const DONE: u8 = 0;
/// What is said when a message has been received in place.
const TAKEN: u8 = 1;

/// Where a received message goes: `struct msghdr`, `struct iovec`, the byte, the control buffer.
const MESSAGE: u64 = DATA;
const VECTOR: u64 = DATA + 64;
const BYTE: u64 = DATA + 80;
const CONTROL: u64 = DATA + 128;
/// Behind the header of the one control message (`struct cmsghdr`: 8 + 4 + 4 bytes) lie the descriptor numbers.
const CELLS: u64 = CONTROL + 16;

/// `SCM_MAX_FD` of include/net/scm.h.
pub(crate) const MESSAGE_DESCRIPTORS: usize = 253;

/// Entries that fit into the table.
const TABLE_ENTRIES: usize = ((DATA - TABLE) / ENTRY_SIZE as u64) as usize;
const _: () = assert!(CLEANUP + (MESSAGE_DESCRIPTORS as u64 + 2) * ENTRY_SIZE as u64 <= TABLE);
const _: () = assert!(CELLS + 4 * (MESSAGE_DESCRIPTORS as u64 + 1) <= SCRATCH_LENGTH);

/// How long the code in the target waits for a word of ours before it takes us for dead.
const SILENCE: i64 = 2;

/// The same, with a margin for the time between our looking at the clock and its hearing from us.
const TAKEN_FOR_DEAD: Duration = Duration::from_millis(1_800);

/// How often it must hear from us.
const SPEAK_EVERY: Duration = Duration::from_millis(500);

/// What giving a thread back may take at most when the budget is used up: it must be given back.
const GIVE_BACK: Duration = Duration::from_millis(500);

/// `MAP_FIXED_NOREPLACE`; older kernels than 4.17 take it for a hint.
const MAP_FIXED_NOREPLACE: u64 = 0x10_0000;

/// Where the thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Position {
    /// In a stop, its registers ours to set.
    Trapped,
    /// Making a call that we trace, or about to.
    Calling,
    /// Serving batches, or on its way into the wait for the next.
    Serving,
    /// Not ours any more: gone, or gone on by itself.
    Away,
}

/// A thread that makes system calls for us. Dropping it gives the thread back.
#[derive(Debug)]
pub struct Borrowed<'s> {
    stopped: &'s mut Stopped,
    pid: Pid,
    tid: Tid,
    memory: Memory,
    image: Image,
    residue: Residue,
    /// The registers and mask to end with, as the kernel had them.
    registers: Registers,
    mask: u64,
    seccomp: Seccomp,
    /// What the thread could go on doing without us.
    alone: filter::Alone,
    position: Position,
    socket: Option<OwnedFd>,
    /// The number of the target's end of the socket.
    socket_number: Option<Fd>,
    scratch: u64,
    is_blocked: bool,
    /// Whether the cells in the scratch mapping hold numbers; zeroes before that would name descriptor 0.
    has_cells: bool,
    /// When the code in the target last heard from us.
    spoken: Instant,
}

impl<'s> Borrowed<'s> {
    /// Borrows a thread of `process` that stands still. `record` is given what would be left behind if we died, before anything is
    /// changed; when it fails, nothing is.
    ///
    /// What remains if we die in here: at most the [`Residue`].
    ///
    /// # Errors
    /// See [`RemoteError`]; the thread stands still as before.
    pub fn open(
        stopped: &'s mut Stopped,
        process: ProcessId,
        tid: Tid,
        deadline: Deadline,
        record: &mut dyn FnMut(&Residue) -> std::io::Result<()>,
    ) -> Result<Self, RemoteError> {
        let pid = process.pid;
        let others: Vec<Tid> = stopped.threads(pid).collect();
        let thread = stopped
            .thread_mut(tid)
            .filter(|t| t.standing == Standing::Still && t.pid == pid);
        let thread = thread.ok_or(RemoteError::NotStill { tid })?;
        let refused = |what| move |errno| refused(pid, what, errno);
        let registers = ptrace::registers(tid).map_err(refused("read registers"))?;
        let mask = ptrace::signal_mask(tid).map_err(refused("read the signal mask"))?;
        let mut memory = Memory::new(pid, tid);
        let registers = abort_sequence(tid, registers, &mut memory)?;
        let seccomp = status::of_thread(tid)
            .map_err(|source| RemoteError::Inspect { pid, source })?
            .seccomp;
        let alone = filter::check(tid, seccomp)?;
        let mut image = Image::new();
        let size = image.bytes().len();
        let mappings = place::mappings(pid)?;
        let code = image
            .bytes()
            .get(..image.data_offset() as usize)
            .unwrap_or_default();
        let place::Room {
            address: code_address,
            is_left_over,
        } = place::for_code(pid, &mut memory, &mappings, size as u64, code)?;
        let scratch = place::for_scratch(pid, &mappings, SCRATCH_LENGTH)?;
        let mut original = vec![0; size];
        if is_left_over {
            let range = code_address..code_address + size as u64;
            let inside = |tid: &Tid| ptrace::registers(*tid).is_ok_and(|r| range.contains(&r.ip()));
            if others.iter().any(inside) {
                return Err(RemoteError::StillInside { pid });
            }
        } else {
            memory.read(code_address, &mut original)?;
        }
        let residue = Residue {
            pid: pid.as_raw(),
            start_time: process.start_time,
            tid: tid.as_raw(),
            code_address,
            original,
            scratch_address: scratch,
            scratch_length: SCRATCH_LENGTH,
        };
        record(&residue).map_err(|source| RemoteError::Record { pid, source })?;
        let ending = Ending {
            mask: Some(mask),
            ..Ending::default()
        };
        image.set_ending(&arch::dead_path(&registers), &ending);
        memory.force(code_address, image.bytes())?;
        thread.standing = Standing::Borrowed;
        let mut borrowed = Self {
            stopped,
            pid,
            tid,
            memory,
            image,
            residue,
            registers,
            mask,
            seccomp,
            alone,
            position: Position::Trapped,
            socket: None,
            socket_number: None,
            scratch: 0,
            is_blocked: false,
            has_cells: false,
            spoken: Instant::now(),
        };
        // From here on Drop gives the thread back.
        borrowed.prepare(scratch, deadline)?;
        Ok(borrowed)
    }

    fn prepare(&mut self, scratch: u64, deadline: Deadline) -> Result<(), RemoteError> {
        let mut written = vec![0; self.image.bytes().len()];
        self.memory.read(self.residue.code_address, &mut written)?;
        if written != self.image.bytes() {
            return Err(RemoteError::Memory {
                pid: self.pid,
                address: self.residue.code_address,
                errno: Errno::IO,
            });
        }
        if self.seccomp != Seccomp::Disabled {
            ptrace::set_options(self.tid, ptrace::OPTIONS | ptrace::SUSPEND_SECCOMP)
                .map_err(|errno| refused(self.pid, "suspend the seccomp filter", errno))?;
        }
        let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE) as u64
            | MAP_FIXED_NOREPLACE;
        let none = u64::MAX;
        // Recorded before it is made: if we die in between, the code unmaps nothing, or what it has just made. Nobody else maps memory in the
        // middle of the largest hole in these microseconds.
        self.set_ending((scratch, SCRATCH_LENGTH), (0, 0))?;
        // Whether the call has been made is not known when it is cut short; unmapping a hole does nothing.
        self.scratch = scratch;
        let mapped = self.call(
            "mmap",
            libc::SYS_mmap,
            [scratch, SCRATCH_LENGTH, protection, flags, none, 0],
            deadline,
        );
        if let Err(RemoteError::Call { .. }) = &mapped {
            self.scratch = 0;
            self.set_ending((0, 0), (0, 0))?;
        }
        let got = mapped?;
        self.scratch = got;
        if got != scratch {
            // A kernel before 4.17 takes the flag for a hint.
            self.set_ending((got, SCRATCH_LENGTH), (0, 0))?;
        }
        self.write_header()?;
        self.has_cells = true;
        let cleanup = (
            got + CLEANUP,
            got + CLEANUP + (MESSAGE_DESCRIPTORS + 2) as u64 * ENTRY_SIZE as u64,
        );
        self.set_ending((got, SCRATCH_LENGTH), cleanup)?;
        let kind = (libc::SOCK_STREAM | libc::SOCK_CLOEXEC) as u64;
        self.call(
            "socketpair",
            libc::SYS_socketpair,
            [libc::AF_UNIX as u64, kind, 0, got + SOCKET, 0, 0],
            deadline,
        )?;
        self.socket = Some(self.take(Cell(got + PEER))?);
        self.socket_number = Some(self.number_in(Cell(got + SOCKET))?);
        // Serve from here on. The first batch closes the other end and bounds the wait.
        let mut timeval = [0; 16];
        timeval[..8].copy_from_slice(&SILENCE.to_le_bytes());
        self.memory.write(got + DATA, &timeval)?;
        let option = [
            0,
            libc::SOL_SOCKET as u64,
            libc::SO_RCVTIMEO as u64,
            got + DATA,
            16,
        ];
        let calls = [
            Call::close(Cell(got + PEER)),
            Call::new(libc::SYS_setsockopt, &option)
                .first_is(Cell(got + SOCKET))
                .or_stop(),
        ];
        let mut calls = calls;
        self.run(&mut calls, deadline)?;
        match calls.last().and_then(Call::result) {
            Some(Ok(_)) => Ok(()),
            Some(Err(errno)) => Err(RemoteError::Call {
                pid: self.pid,
                call: "setsockopt",
                errno,
            }),
            None => Err(RemoteError::Lost { tid: self.tid }),
        }
    }

    /// The process.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// The thread.
    pub fn tid(&self) -> Tid {
        self.tid
    }

    /// Makes one system call in the target and gives what it returned there.
    ///
    /// It must not overwrite the restart block (`nanosleep`, `poll`, `futex` with a time-out), end the thread, or wait for long: after two
    /// seconds without a word from us the thread goes on by itself.
    ///
    /// # Errors
    /// See [`RemoteError`]; the error of the call itself is the inner one.
    pub fn system_call(
        &mut self,
        number: i64,
        arguments: [u64; 6],
        deadline: Deadline,
    ) -> Result<Result<u64, Errno>, RemoteError> {
        let mut calls = [Call::new(number, &arguments)];
        self.run(&mut calls, deadline)?;
        let [call] = calls;
        call.result().ok_or(RemoteError::Lost { tid: self.tid })
    }

    /// The memory of the process.
    pub(crate) fn memory(&mut self) -> &mut Memory {
        &mut self.memory
    }

    /// Writes the table that closes whatever is left in the cells, and empties the cells. Zeroes there would name descriptor 0.
    fn write_header(&mut self) -> Result<(), RemoteError> {
        let base = self.scratch;
        self.memory.write(base + SOCKET, &[0xff; 8])?;
        self.memory.write(base + TAKEN_AT, &[TAKEN])?;
        self.memory
            .write(base + CONTROL, &[0xff; 16 + 4 * (MESSAGE_DESCRIPTORS + 1)])?;
        let cells = (0..MESSAGE_DESCRIPTORS as u64)
            .map(|i| base + CELLS + 4 * i)
            .chain([base + PEER, base + SOCKET]);
        let table: Vec<u8> = cells
            .flat_map(|cell| Call::close(Cell(cell)).0.to_bytes())
            .collect();
        self.memory.write(base + CLEANUP, &table)
    }

    /// What the code in the target does when it ends by itself.
    fn set_ending(&mut self, scratch: (u64, u64), cleanup: (u64, u64)) -> Result<(), RemoteError> {
        let ending = Ending {
            mask: Some(self.mask),
            scratch,
            cleanup,
        };
        self.image
            .set_ending(&arch::dead_path(&self.registers), &ending);
        let at = self.residue.code_address + self.image.data_offset();
        let data = self.image.data().to_vec();
        self.memory.force(at, &data)
    }

    /// A descriptor of the target, as one of ours.
    fn take(&mut self, cell: Cell) -> Result<OwnedFd, RemoteError> {
        let fd = self.number_in(cell)?;
        self.get_fd(fd)
    }

    fn number_in(&mut self, cell: Cell) -> Result<Fd, RemoteError> {
        let mut number = [0; 4];
        self.memory.read(cell.0, &mut number)?;
        Fd::new(i32::from_le_bytes(number)).ok_or(RemoteError::Lost { tid: self.tid })
    }

    /// `pidfd_getfd` on the table of the borrowed thread (not of its process: a thread may have a table of its own).
    pub(crate) fn get_fd(&self, fd: Fd) -> Result<OwnedFd, RemoteError> {
        sys::get_fd(self.pid, self.tid, fd)
            .map_err(|errno| refused(self.pid, "take a descriptor", errno))
    }

    /// Makes one call by tracing it. Only while the thread is trapped.
    fn call(
        &mut self,
        name: &'static str,
        number: i64,
        arguments: [u64; 6],
        deadline: Deadline,
    ) -> Result<u64, RemoteError> {
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        let entry = self.residue.code_address + self.image.entry_one();
        let registers = self.registers.for_call(entry, number, arguments);
        ptrace::set_registers(self.tid, &registers)
            .map_err(|errno| refused(self.pid, "set registers", errno))?;
        if !self.is_blocked {
            // After the registers: dying in between, the thread runs our code, which sets the mask back.
            ptrace::set_signal_mask(self.tid, u64::MAX)
                .map_err(|errno| refused(self.pid, "block signals", errno))?;
            self.is_blocked = true;
        }
        let after = self.residue.code_address + self.image.one_return();
        let mut stops = 0;
        loop {
            self.position = Position::Calling;
            ptrace::resume_to_call(self.tid, 0)
                .map_err(|errno| refused(self.pid, "resume a thread", errno))?;
            let now = self.await_stop(true, deadline)?;
            // Before the signals were blocked a handler may have begun; its calls are not ours.
            if now.ip() != after {
                continue;
            }
            stops += 1;
            // Interrupted calls are made again by the kernel: one more entry and exit.
            let restarts = (-516..=-512).contains(&now.result());
            if stops % 2 == 0 && !restarts {
                return decode(now.result()).map_err(|errno| RemoteError::Call {
                    pid: self.pid,
                    call: name,
                    errno,
                });
            }
        }
    }

    /// Waits until the thread stops for a system call (`at_call`) or because we interrupted it, and gives its registers.
    fn await_stop(&mut self, at_call: bool, deadline: Deadline) -> Result<Registers, RemoteError> {
        let patience = Patience::new();
        loop {
            match ptrace::next_stop(self.tid) {
                Waited::Nothing if deadline.passed() => {
                    return Err(RemoteError::Late { tid: self.tid });
                }
                Waited::Nothing => patience.wait(),
                Waited::Gone => return Err(self.gone()),
                Waited::Stopped(status) => {
                    let is_call = status == libc::SIGTRAP | 0x80;
                    let is_event = status >> 8 == crate::stop::EVENT_STOP;
                    if (at_call && is_call) || (!at_call && is_event) {
                        self.position = Position::Trapped;
                        return ptrace::registers(self.tid)
                            .map_err(|errno| refused(self.pid, "read registers", errno));
                    }
                    if !at_call {
                        // Any stop cancels the request to stop: make it again.
                        ptrace::interrupt(self.tid)
                            .map_err(|errno| refused(self.pid, "stop a thread", errno))?;
                    }
                    self.pass(status, at_call)?;
                }
            }
        }
    }

    /// Lets a thread go on from a stop that is none of ours.
    fn pass(&mut self, status: i32, to_call: bool) -> Result<(), RemoteError> {
        let signal = status & 0x7f;
        let mut deliver = 0;
        if status >> 8 == 0 && status & 0x80 == 0 {
            match signal {
                libc::SIGSTOP => {
                    if let Some(thread) = self.stopped.thread_mut(self.tid) {
                        thread.held_signal = Some(signal);
                    }
                }
                // Only an instruction of ours can raise these while signals are blocked.
                libc::SIGSEGV
                | libc::SIGBUS
                | libc::SIGILL
                | libc::SIGFPE
                | libc::SIGTRAP
                | libc::SIGSYS => {
                    self.position = Position::Trapped;
                    return Err(RemoteError::Fault {
                        tid: self.tid,
                        signal,
                    });
                }
                other => deliver = other,
            }
        }
        let resumed = if to_call {
            ptrace::resume_to_call(self.tid, deliver)
        } else {
            ptrace::resume(self.tid, deliver)
        };
        resumed.map_err(|errno| refused(self.pid, "resume a thread", errno))
    }

    fn gone(&mut self) -> RemoteError {
        self.position = Position::Away;
        if let Some(thread) = self.stopped.thread_mut(self.tid) {
            thread.standing = Standing::Gone;
        }
        RemoteError::Gone { pid: self.pid }
    }

    /// Makes the calls in order and fills in their results. Calls after one that fails and [`Call::or_stop`]s are not made.
    ///
    /// What remains if we die in here: the calls of the batch that runs are still made, up to the first that fails and stops.
    pub(crate) fn run(
        &mut self,
        calls: &mut [Call],
        deadline: Deadline,
    ) -> Result<(), RemoteError> {
        self.run_sending(&[], calls, deadline)
    }

    /// As [`Self::run`]; the first call is [`Self::receive_call`] and receives these descriptors of ours.
    pub(crate) fn run_sending(
        &mut self,
        descriptors: &[BorrowedFd<'_>],
        calls: &mut [Call],
        deadline: Deadline,
    ) -> Result<(), RemoteError> {
        if self.position == Position::Serving && self.spoken.elapsed() >= TAKEN_FOR_DEAD {
            return Err(RemoteError::Lost { tid: self.tid });
        }
        let mut descriptors = Some(descriptors).filter(|list| !list.is_empty());
        for batch in calls.chunks_mut(TABLE_ENTRIES) {
            self.write_table(batch)?;
            self.start_batch()?;
            // After the word to start, which would otherwise be found in the descriptors' message.
            let sent = descriptors
                .take()
                .map_or(Ok(()), |list| self.send_or_nothing(list));
            self.await_byte(deadline)?;
            sent?;
            let made = self.read_results(batch)?;
            let failed = batch.iter().any(|call| {
                call.0.flags & STOP_ON_ERROR != 0 && !matches!(call.result(), Some(Ok(_)))
            });
            if made < batch.len() || failed {
                break;
            }
        }
        Ok(())
    }

    fn write_table(&mut self, calls: &[Call]) -> Result<(), RemoteError> {
        let bytes: Vec<u8> = calls.iter().flat_map(|call| call.0.to_bytes()).collect();
        let first = self.scratch + TABLE;
        let end = first + bytes.len() as u64;
        self.memory.write(first, &bytes)?;
        let mut header = [0; 16];
        header[..8].copy_from_slice(&first.to_le_bytes());
        header[8..].copy_from_slice(&end.to_le_bytes());
        self.memory.write(self.scratch + TABLE_FIRST, &header)
    }

    /// Fills in the results of the calls that were made, and says how many.
    fn read_results(&mut self, calls: &mut [Call]) -> Result<usize, RemoteError> {
        let reached = self.memory.read_u64(self.scratch + PROGRESS)?;
        let made = reached.saturating_sub(self.scratch + TABLE) / ENTRY_SIZE as u64;
        let made = usize::try_from(made).unwrap_or(0).min(calls.len());
        let mut results = vec![0; made * ENTRY_SIZE];
        self.memory.read(self.scratch + TABLE, &mut results)?;
        for (call, bytes) in calls.iter_mut().zip(results.chunks_exact(ENTRY_SIZE)) {
            if let Some(Ok(word)) = bytes.get(ENTRY_SIZE - 8..).map(<[u8; 8]>::try_from) {
                call.0.result = i64::from_le_bytes(word);
            }
        }
        Ok(made)
    }

    /// To be called now and then during long work outside the target, which would otherwise take us for dead.
    pub(crate) fn stay_awake(&mut self, deadline: Deadline) -> Result<(), RemoteError> {
        if self.position == Position::Serving && self.spoken.elapsed() > SPEAK_EVERY {
            self.run(&mut [Call::new(libc::SYS_gettid, &[])], deadline)?;
        }
        Ok(())
    }

    fn start_batch(&mut self) -> Result<(), RemoteError> {
        self.spoken = Instant::now();
        match self.position {
            Position::Away | Position::Calling => Err(RemoteError::Lost { tid: self.tid }),
            Position::Trapped => {
                let entry = self.residue.code_address + self.image.entry_batch();
                let registers = self.registers.for_call(entry, 0, [0; 6]);
                ptrace::set_registers(self.tid, &registers)
                    .map_err(|errno| refused(self.pid, "set registers", errno))?;
                ptrace::resume(self.tid, 0)
                    .map_err(|errno| refused(self.pid, "resume a thread", errno))?;
                self.position = Position::Serving;
                Ok(())
            }
            Position::Serving => {
                let socket = self
                    .socket
                    .as_ref()
                    .ok_or(RemoteError::Lost { tid: self.tid })?;
                let sent =
                    rustix::net::send(socket, &[1], SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
                match sent {
                    Ok(_) => Ok(()),
                    Err(Errno::PIPE | Errno::CONNRESET) => Err(self.lost_or_gone()),
                    Err(errno) => Err(refused(self.pid, "start a batch", errno)),
                }
            }
        }
    }

    fn lost_or_gone(&mut self) -> RemoteError {
        match ptrace::next_stop(self.tid) {
            Waited::Gone => self.gone(),
            _ => RemoteError::Lost { tid: self.tid },
        }
    }

    /// Waits for the word that a table is done.
    fn await_byte(&mut self, deadline: Deadline) -> Result<(), RemoteError> {
        self.hear(&mut [DONE], deadline).map(drop)
    }

    /// Waits for words of the code in the target, and says how many came.
    fn hear(&mut self, words: &mut [u8], deadline: Deadline) -> Result<usize, RemoteError> {
        loop {
            let socket = self
                .socket
                .as_ref()
                .ok_or(RemoteError::Lost { tid: self.tid })?;
            match rustix::net::recv(socket, &mut *words, RecvFlags::DONTWAIT) {
                Ok((came @ 1.., _)) => return Ok(came),
                Ok(_) | Err(Errno::CONNRESET) => return Err(self.lost_or_gone()),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(errno) => return Err(refused(self.pid, "hear from the code", errno)),
            }
            // Half a millisecond at most, so that stops of the thread are seen too.
            let timeout = rustix::event::Timespec {
                tv_sec: 0,
                tv_nsec: 500_000,
            };
            let polled =
                rustix::event::poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&timeout));
            if matches!(polled, Ok(1..)) {
                continue;
            }
            match ptrace::next_stop(self.tid) {
                Waited::Nothing => {}
                Waited::Gone => return Err(self.gone()),
                Waited::Stopped(status) => self.pass(status, false)?,
            }
            if deadline.passed() {
                return Err(RemoteError::Late { tid: self.tid });
            }
        }
    }

    /// Sends descriptors of ours to a batch that waits for them. When that is impossible, sends none, so that the batch ends.
    fn send_or_nothing(&self, descriptors: &[BorrowedFd<'_>]) -> Result<(), RemoteError> {
        self.send(descriptors).inspect_err(|_| self.send_nothing())
    }

    /// A message without descriptors; it is no order either.
    fn send_nothing(&self) {
        if let Some(socket) = &self.socket {
            let _ = rustix::net::send(socket, &[2], SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
        }
    }

    fn send(&self, descriptors: &[BorrowedFd<'_>]) -> Result<(), RemoteError> {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage};
        let socket = self
            .socket
            .as_ref()
            .ok_or(RemoteError::Lost { tid: self.tid })?;
        let mut space = vec![
            std::mem::MaybeUninit::uninit();
            rustix::cmsg_space!(ScmRights(MESSAGE_DESCRIPTORS))
        ];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let byte = [std::io::IoSlice::new(&[2])];
        let sent = if control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            rustix::net::sendmsg(socket, &byte, &mut control, flags)
        } else {
            Err(Errno::TOOMANYREFS)
        };
        sent.map(drop)
            .map_err(|errno| refused(self.pid, "send descriptors", errno))
    }

    /// Prepares the buffers for one message and gives the call that receives it. Descriptors of earlier messages must be closed.
    pub(crate) fn receive_call(&mut self, descriptors: usize) -> Result<Call, RemoteError> {
        let base = self.scratch;
        // CMSG_LEN(n * 4), not CMSG_SPACE: the kernel must not fit one more in.
        let control_length = 16 + 4 * descriptors as u64;
        let mut bytes = Vec::with_capacity((CELLS - MESSAGE) as usize + 4 * MESSAGE_DESCRIPTORS);
        for word in [
            0,
            0,
            base + VECTOR,
            1,
            base + CONTROL,
            control_length,
            0,
            0,
            base + BYTE,
            1,
        ] {
            bytes.extend_from_slice(&u64::to_le_bytes(word));
        }
        bytes.resize((CONTROL - MESSAGE) as usize, 0);
        bytes.resize((CELLS - MESSAGE) as usize + 4 * MESSAGE_DESCRIPTORS, 0xff);
        self.memory.write(base + MESSAGE, &bytes)?;
        let flags = libc::MSG_CMSG_CLOEXEC as u64;
        Ok(Call::new(libc::SYS_recvmsg, &[0, base + MESSAGE, flags])
            .first_is(Cell(base + SOCKET))
            .or_stop())
    }

    /// The cell of the `index`th descriptor of the message received last.
    pub(crate) fn cell(&self, index: usize) -> Cell {
        Cell(self.scratch + CELLS + 4 * index as u64)
    }

    /// The numbers of the first descriptors of the last message, -1 where none was received or it is closed.
    pub(crate) fn cells(&mut self, count: usize) -> Result<Vec<i32>, RemoteError> {
        let mut cells = vec![0; 4 * count.min(MESSAGE_DESCRIPTORS)];
        self.memory.read(self.scratch + CELLS, &mut cells)?;
        let numbers = cells
            .chunks_exact(4)
            .filter_map(|cell| cell.try_into().ok());
        Ok(numbers.map(i32::from_le_bytes).collect())
    }

    /// How many descriptors of the last message the target still holds open in its cells.
    pub(crate) fn open_cells(&mut self) -> Result<usize, RemoteError> {
        let mut cells = [0; 4 * MESSAGE_DESCRIPTORS];
        self.memory.read(self.scratch + CELLS, &mut cells)?;
        Ok(cells
            .chunks_exact(4)
            .filter(|cell| *cell != [0xff; 4])
            .count())
    }

    /// The calls that close what is left of the last message; those that are closed already cost nothing.
    pub(crate) fn close_calls(&self, descriptors: usize) -> impl Iterator<Item = Call> + use<> {
        let base = self.scratch;
        (0..descriptors as u64).map(move |index| Call::close(Cell(base + CELLS + 4 * index)))
    }

    /// Memory for arguments of calls: 8 KiB that no received message uses.
    pub(crate) fn argument_memory(&self) -> u64 {
        self.scratch + DATA + 0x4000
    }

    /// Gives the thread back as it was.
    ///
    /// What remains if we die in here: at most the [`Residue`].
    ///
    /// # Errors
    /// When the thread has gone, or cannot be taken back; it then goes on by itself within two seconds.
    pub fn close(mut self) -> Result<(), RemoteError> {
        self.give_back(Deadline::after(GIVE_BACK))
    }

    fn give_back(&mut self, deadline: Deadline) -> Result<(), RemoteError> {
        let result = self.try_give_back(deadline);
        self.position = Position::Away;
        // Without our end of the socket the code in the target ends by itself.
        self.socket = None;
        if let Err(error) = &result
            && !matches!(error, RemoteError::Gone { .. })
        {
            tracing::warn!(pid = self.pid.as_raw(), tid = self.tid.as_raw(), %error, "thread was not given back cleanly");
        }
        result
    }

    fn try_give_back(&mut self, deadline: Deadline) -> Result<(), RemoteError> {
        match self.position {
            Position::Away => return Ok(()),
            Position::Serving | Position::Calling => {
                ptrace::interrupt(self.tid)
                    .map_err(|errno| refused(self.pid, "stop a thread", errno))?;
                let now = self.await_stop(false, deadline)?;
                let offset = now.ip().wrapping_sub(self.residue.code_address);
                let length = self.image.bytes().len() as u64;
                if offset >= length || self.image.is_leaving(offset) {
                    // It has restored itself, or is about to: its registers are its own.
                    self.leave_it(Standing::Still);
                    if offset >= length {
                        let original = std::mem::take(&mut self.residue.original);
                        self.memory.force(self.residue.code_address, &original)?;
                    }
                    return Err(RemoteError::Lost { tid: self.tid });
                }
            }
            Position::Trapped => {}
        }
        if self.scratch != 0 {
            self.close_leftovers(deadline)?;
        }
        // Into the same kind of stop as at the beginning: the kernel then finishes the interrupted call.
        ptrace::interrupt(self.tid).map_err(|errno| refused(self.pid, "stop a thread", errno))?;
        ptrace::resume(self.tid, 0).map_err(|errno| refused(self.pid, "resume a thread", errno))?;
        self.await_stop(false, deadline)?;
        // The mask before the registers: dying in between, our code sets it once more and loads the registers.
        if self.is_blocked {
            ptrace::set_signal_mask(self.tid, self.mask)
                .map_err(|errno| refused(self.pid, "set the signal mask", errno))?;
            self.is_blocked = false;
        }
        ptrace::set_registers(self.tid, &self.registers)
            .map_err(|errno| refused(self.pid, "set registers", errno))?;
        if self.seccomp != Seccomp::Disabled {
            ptrace::set_options(self.tid, ptrace::OPTIONS)
                .map_err(|errno| refused(self.pid, "resume the seccomp filter", errno))?;
        }
        self.leave_it(Standing::Still);
        let original = std::mem::take(&mut self.residue.original);
        self.memory.force(self.residue.code_address, &original)
    }

    fn leave_it(&mut self, standing: Standing) {
        self.position = Position::Away;
        if let Some(thread) = self.stopped.thread_mut(self.tid) {
            thread.standing = standing;
            thread.undo_eintr();
        }
    }

    /// Closes what the cells still hold.
    fn close_cells(&mut self, deadline: Deadline) -> Result<(), RemoteError> {
        let mut cells = [0; 4 * MESSAGE_DESCRIPTORS];
        let mut ends = [0; 8];
        self.memory.read(self.scratch + CELLS, &mut cells)?;
        self.memory.read(self.scratch + SOCKET, &mut ends)?;
        let open: Vec<(u64, i32)> = (CELLS..)
            .step_by(4)
            .zip(cells.chunks_exact(4))
            .chain((SOCKET..).step_by(4).zip(ends.chunks_exact(4)))
            .filter_map(|(at, cell)| Some((at, i32::from_le_bytes(cell.try_into().ok()?))))
            .filter(|(_, fd)| *fd >= 0)
            .collect();
        for (at, fd) in open {
            self.memory.write(self.scratch + at, &[0xff; 4])?;
            self.call(
                "close",
                libc::SYS_close,
                [u64::from(fd.cast_unsigned()), 0, 0, 0, 0, 0],
                deadline,
            )?;
        }
        self.has_cells = false;
        Ok(())
    }

    /// Closes and unmaps what we made. The record of a descriptor is cleared before it is closed: were we to die in between, a leak is
    /// harmless and a number closed twice is not.
    fn close_leftovers(&mut self, deadline: Deadline) -> Result<(), RemoteError> {
        if self.has_cells {
            self.close_cells(deadline)?;
        }
        // The table is about to go; unmapping twice is harmless, see above.
        self.set_ending((self.scratch, SCRATCH_LENGTH), (0, 0))?;
        let scratch = std::mem::take(&mut self.scratch);
        self.call(
            "munmap",
            libc::SYS_munmap,
            [scratch, SCRATCH_LENGTH, 0, 0, 0, 0],
            deadline,
        )
        .map(drop)
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        if self.position != Position::Away {
            // Reported by give_back itself.
            let _ = self.give_back(Deadline::after(GIVE_BACK));
        }
    }
}

/// Where a thread that was stopped inside a restartable sequence has to go on: at its abort handler. The kernel would send it there
/// when it returns to the sequence (kernel/rseq.c, `rseq_ip_fixup`); after a call of ours it has forgotten the sequence.
fn abort_sequence(
    tid: Tid,
    mut registers: Registers,
    memory: &mut Memory,
) -> Result<Registers, RemoteError> {
    // EINVAL or EIO: a kernel before 5.13, or without rseq.
    let Ok(Some(area)) = ptrace::rseq_area(tid) else {
        return Ok(registers);
    };
    let descriptor = memory.read_u64(area + 8)?;
    if descriptor == 0 {
        return Ok(registers);
    }
    // struct rseq_cs: version and flags, start_ip, post_commit_offset, abort_ip. A program may leave a stale pointer, even to unmapped memory.
    let word = |memory: &mut Memory, at| memory.read_u64(descriptor + at);
    let (Ok(start), Ok(length), Ok(abort)) = (word(memory, 8), word(memory, 16), word(memory, 24))
    else {
        return Ok(registers);
    };
    if registers.ip().wrapping_sub(start) < length {
        registers.set_ip(abort);
    }
    Ok(registers)
}
