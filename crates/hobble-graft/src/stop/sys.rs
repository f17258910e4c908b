//! `ptrace` and `waitid`, one short wrapper per request.
//!
//! Owns the unsafe calls; keeps no state. Every function concerns one thread that the calling thread traces (or is
//! about to), and reports the kernel's error number as it is.

#![allow(unsafe_code)]

use std::mem::MaybeUninit;

use rustix::io::Errno;

use crate::arch::Registers;
use crate::ids::Tid;

/// `PTRACE_O_TRACESYSGOOD`: without it a tracer that dies during a system call stop leaves a SIGTRAP behind, which kills
/// the thread (`ptrace_report_syscall` sends the stop's number as a signal; with this option the number is no signal).
pub(crate) const OPTIONS: usize = libc::PTRACE_O_TRACESYSGOOD as usize;
/// `PTRACE_O_SUSPEND_SECCOMP`.
pub(crate) const SUSPEND_SECCOMP: usize = 1 << 21;

const GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
const SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
const NT_PRSTATUS: usize = 1;

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// The requests that take and give plain numbers.
fn request(request: libc::c_uint, tid: Tid, address: usize, data: usize) -> Result<i64, Errno> {
    // SAFETY: only called with requests that read no memory of ours, or whose `address` and `data` point to objects that
    // the callers below keep alive and large enough.
    let result = unsafe { libc::ptrace(request, tid.as_raw(), address, data) };
    if result == -1 {
        Err(last_errno())
    } else {
        Ok(result)
    }
}

/// `PTRACE_SEIZE`: begin tracing; the thread runs on.
pub(crate) fn seize(tid: Tid, options: usize) -> Result<(), Errno> {
    request(libc::PTRACE_SEIZE, tid, 0, options).map(drop)
}

/// `PTRACE_INTERRUPT`: stop before returning to user space.
pub(crate) fn interrupt(tid: Tid) -> Result<(), Errno> {
    request(libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// `PTRACE_SETOPTIONS`.
pub(crate) fn set_options(tid: Tid, options: usize) -> Result<(), Errno> {
    request(libc::PTRACE_SETOPTIONS, tid, 0, options).map(drop)
}

/// `PTRACE_CONT`, delivering `signal` unless it is 0.
pub(crate) fn resume(tid: Tid, signal: i32) -> Result<(), Errno> {
    request(libc::PTRACE_CONT, tid, 0, signal.cast_unsigned() as usize).map(drop)
}

/// `PTRACE_SYSCALL`: as [`resume`], up to the next entry to or exit from a system call.
pub(crate) fn resume_to_call(tid: Tid, signal: i32) -> Result<(), Errno> {
    request(
        libc::PTRACE_SYSCALL,
        tid,
        0,
        signal.cast_unsigned() as usize,
    )
    .map(drop)
}

/// `PTRACE_DETACH`: end tracing; the thread runs on, or is stopped if its group is.
pub(crate) fn detach(tid: Tid, signal: i32) -> Result<(), Errno> {
    request(libc::PTRACE_DETACH, tid, 0, signal.cast_unsigned() as usize).map(drop)
}

/// `PTRACE_POKEDATA`: writes eight bytes, also where the mapping is not writable.
pub(crate) fn poke(tid: Tid, address: u64, word: u64) -> Result<(), Errno> {
    request(libc::PTRACE_POKEDATA, tid, address as usize, word as usize).map(drop)
}

/// `PTRACE_GETREGSET(NT_PRSTATUS)`.
pub(crate) fn registers(tid: Tid) -> Result<Registers, Errno> {
    let mut registers = Registers::default();
    let size = size_of_val(registers.raw());
    let mut vector = libc::iovec {
        iov_base: std::ptr::from_mut(registers.raw_mut()).cast(),
        iov_len: size,
    };
    request(
        libc::PTRACE_GETREGSET,
        tid,
        NT_PRSTATUS,
        (&raw mut vector).addr_for_kernel(),
    )?;
    // A 32-bit thread gives the shorter 32-bit structure.
    if vector.iov_len == size {
        Ok(registers)
    } else {
        Err(Errno::NOEXEC)
    }
}

/// `PTRACE_SETREGSET(NT_PRSTATUS)`.
pub(crate) fn set_registers(tid: Tid, registers: &Registers) -> Result<(), Errno> {
    let mut copy = *registers;
    let size = size_of_val(copy.raw());
    let mut vector = libc::iovec {
        iov_base: std::ptr::from_mut(copy.raw_mut()).cast(),
        iov_len: size,
    };
    request(
        libc::PTRACE_SETREGSET,
        tid,
        NT_PRSTATUS,
        (&raw mut vector).addr_for_kernel(),
    )
    .map(drop)
}

/// `PTRACE_GETSIGMASK`: the mask that will be in force in user space (in `sigsuspend`, the one it will set back).
pub(crate) fn signal_mask(tid: Tid) -> Result<u64, Errno> {
    let mut mask = 0_u64;
    request(
        libc::PTRACE_GETSIGMASK,
        tid,
        size_of::<u64>(),
        (&raw mut mask).addr_for_kernel(),
    )?;
    Ok(mask)
}

/// `PTRACE_SETSIGMASK`.
pub(crate) fn set_signal_mask(tid: Tid, mask: u64) -> Result<(), Errno> {
    let mut mask = mask;
    request(
        libc::PTRACE_SETSIGMASK,
        tid,
        size_of::<u64>(),
        (&raw mut mask).addr_for_kernel(),
    )
    .map(drop)
}

/// Where a thread has registered its `struct rseq` (`PTRACE_GET_RSEQ_CONFIGURATION`, Linux 5.13); `None` when it has not.
pub(crate) fn rseq_area(tid: Tid) -> Result<Option<u64>, Errno> {
    // struct ptrace_rseq_configuration of include/uapi/linux/ptrace.h: pointer, size, signature, flags, pad.
    let mut configuration = [0_u64; 3];
    let size = size_of_val(&configuration);
    request(
        GET_RSEQ_CONFIGURATION,
        tid,
        size,
        (&raw mut configuration).addr_for_kernel(),
    )?;
    let [pointer, ..] = configuration;
    Ok((pointer != 0).then_some(pointer))
}

/// `PTRACE_SECCOMP_GET_FILTER`: the instructions of the `index`th filter from the newest, one 64-bit word each; `None` when there are no more.
pub(crate) fn seccomp_filter(tid: Tid, index: usize) -> Result<Option<Vec<u64>>, Errno> {
    let count = match request(SECCOMP_GET_FILTER, tid, index, 0) {
        Ok(count) => usize::try_from(count).unwrap_or(0),
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(errno),
    };
    // The kernel writes as many as it has just told: the target stands still, and filters are never changed.
    let mut words = vec![0_u64; count];
    request(
        SECCOMP_GET_FILTER,
        tid,
        index,
        words.as_mut_ptr().addr_for_kernel(),
    )?;
    Ok(Some(words))
}

/// The address of a local object as ptrace takes it.
trait AddrForKernel {
    fn addr_for_kernel(self) -> usize;
}

impl<T> AddrForKernel for *mut T {
    fn addr_for_kernel(self) -> usize {
        self.expose_provenance()
    }
}

/// What `waitid` says about a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waited {
    /// Nothing new.
    Nothing,
    /// It stopped: the signal number in the low byte, a `PTRACE_EVENT` in the next, bit 7 for a system call.
    Stopped(i32),
    /// It has exited, or was never ours.
    Gone,
}

fn waitid(tid: Tid, options: libc::c_int) -> Result<Option<(i32, i32)>, Errno> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let id = tid.as_raw().cast_unsigned();
    // SAFETY: info is large enough for a siginfo_t and outlives the call.
    let result = unsafe {
        libc::waitid(
            libc::P_PID,
            id,
            info.as_mut_ptr(),
            options | libc::__WALL | libc::WNOHANG,
        )
    };
    if result == -1 {
        return Err(last_errno());
    }
    // SAFETY: all zeroes is a valid siginfo_t, and the kernel has filled it where it had something to say.
    let info = unsafe { info.assume_init() };
    // SAFETY: waitid leaves si_pid 0 or fills it, together with si_status.
    let pid = unsafe { info.si_pid() };
    if pid == 0 {
        return Ok(None);
    }
    // SAFETY: as above.
    let status = unsafe { info.si_status() };
    Ok(Some((info.si_code, status)))
}

/// Takes the next stop of a thread, without waiting. An exit is seen but not taken: its parent, which may be us in another role, needs it.
pub(crate) fn next_stop(tid: Tid) -> Waited {
    match waitid(tid, libc::WSTOPPED) {
        Ok(Some((_, status))) => Waited::Stopped(status),
        Ok(None) => match waitid(tid, libc::WEXITED | libc::WNOWAIT) {
            // The kernel reports stops of a traced thread whether asked to or not (kernel/exit.c, `wait_task_stopped`).
            Ok(Some((libc::CLD_EXITED | libc::CLD_KILLED | libc::CLD_DUMPED, _))) => Waited::Gone,
            Ok(Some(_)) => Waited::Nothing,
            Ok(None) => Waited::Nothing,
            Err(_) => Waited::Gone,
        },
        Err(_) => Waited::Gone,
    }
}

/// Takes the exit of a thread that we traced, so that the kernel can tell its real parent.
pub(crate) fn take_exit(tid: Tid) {
    // Nothing to take, or taken already, are both fine.
    let _ = waitid(tid, libc::WEXITED);
}

/// `tgkill`, for a stop signal that we held back.
pub(crate) fn send_signal(group: i32, tid: Tid, signal: i32) -> Result<(), Errno> {
    // SAFETY: takes numbers only.
    let result = unsafe { libc::syscall(libc::SYS_tgkill, group, tid.as_raw(), signal) };
    if result == -1 {
        Err(last_errno())
    } else {
        Ok(())
    }
}
